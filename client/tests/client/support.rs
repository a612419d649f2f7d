//! Servers that tests start, stop and start again.

use std::future::Future;
use std::net::SocketAddr;
use std::time::Duration;

use esker_rpc::server::{ConnectionLimits, ServeError, serve};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tonic::service::Routes;

/// Far longer than anything here takes. A test that waits so long has failed.
const PATIENCE: Duration = Duration::from_secs(30);

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
        let address = listener.local_addr().expect("a bound address");
        let (stop, stopped) = oneshot::channel();
        let shutdown = async {
            let _ = stopped.await;
        };
        let (limits, http) = (ConnectionLimits::default(), axum::Router::new());
        let running = tokio::spawn(serve(listener, limits, routes, http, shutdown));
        Server { address, stop, running }
    }

    /// Stops the server. Every connection is closed when this returns.
    pub async fn stop(self) -> SocketAddr {
        self.stop.send(()).expect("the server is running");
        let ended = soon("the server stops", self.running).await;
        ended.expect("no panic").expect("no error");
        self.address
    }
}

/// An address at which nothing listens.
pub async fn closed_address() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    listener.local_addr().expect("a bound address").to_string()
}
