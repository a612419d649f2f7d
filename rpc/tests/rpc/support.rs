//! Servers that tests start, stop and start again.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use esker_model::StoreId;
use esker_rpc::proto::kvrpcpb::RawGetResponse;
use esker_rpc::server::{ConnectionLimits, ServeError, TikvService, serve};
use esker_rpc::service::{Answer, Caller, Reply, Request, StoreService, unimplemented};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tonic::service::Routes;

/// Far longer than anything here takes. A test that waits so long has failed.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Waits for something that must happen.
pub async fn soon<T>(what: &str, event: impl Future<Output = T>) -> T {
    match tokio::time::timeout(PATIENCE, event).await {
        Ok(value) => value,
        Err(_) => panic!("waited in vain: {what}"),
    }
}

/// A server on a port of its own.
pub struct Server {
    pub address: SocketAddr,
    stop: oneshot::Sender<()>,
    running: JoinHandle<Result<(), ServeError>>,
}

impl Server {
    pub async fn start(routes: Routes) -> Self {
        Self::start_at("127.0.0.1:0".parse().expect("an address"), routes).await
    }

    /// Starts a server at the address of an earlier one.
    pub async fn start_at(address: SocketAddr, routes: Routes) -> Self {
        let listener = TcpListener::bind(address).await.expect("a free port");
        Self::start_on(listener, routes, axum::Router::new())
    }

    pub fn start_on(listener: TcpListener, routes: Routes, http: axum::Router) -> Self {
        Self::start_limited(listener, ConnectionLimits::default(), routes, http)
    }

    pub fn start_limited(
        listener: TcpListener,
        limits: ConnectionLimits,
        routes: Routes,
        http: axum::Router,
    ) -> Self {
        let address = listener.local_addr().expect("a bound address");
        let (stop, stopped) = oneshot::channel();
        let shutdown = async {
            let _ = stopped.await;
        };
        let running = tokio::spawn(serve(listener, limits, routes, http, shutdown));
        Server { address, stop, running }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Stops the server. Every connection is closed when this returns.
    pub async fn stop(self) -> SocketAddr {
        self.stop.send(()).expect("the server is running");
        let ended = soon("the server stops", self.running).await;
        ended.expect("no panic").expect("no error");
        self.address
    }
}

/// A store that answers a get with its own key, at once.
struct Echo;

impl StoreService for Echo {
    fn store_id(&self) -> StoreId {
        StoreId(1)
    }

    fn handle(&self, request: Request, _: Caller) -> Answer {
        let Request::RawGet(request) = request else { return unimplemented(request.name()) };
        let reply = RawGetResponse { value: request.key, ..Default::default() };
        Box::pin(std::future::ready(Ok(Reply::RawGet(reply))))
    }
}

/// The `Tikv` service over a store that echoes.
pub fn echo() -> Routes {
    Routes::new(TikvService::new(Arc::new(Echo)).into_server())
}
