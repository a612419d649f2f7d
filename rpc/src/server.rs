//! The server's side of a socket: one port that speaks gRPC and plain HTTP.
//!
//! A listener, the gRPC services and an HTTP router flow in; [`serve`] runs until told to stop. It
//! promises to return soon after that, however long-lived the streams of its clients are: they get
//! [`SHUTDOWN_GRACE`] to end, and are then cut. And it promises that connections which only sit
//! there cost a client that works neither its place nor its time: see `connections`.

mod batch;
mod calls;
mod connections;
mod greeting;
mod socket;
mod tikv;

use std::convert::Infallible;
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::net::TcpListener;
use tokio::sync::watch;
use tonic::service::Routes;

use connections::Connections;

pub use batch::{MAX_IN_FLIGHT_PER_STREAM, MAX_RESPONSE_BATCH_BYTES, MAX_RESPONSES_PER_BATCH};
pub use connections::{
    ConnectionLimits, DEFAULT_CONNECTIONS, GREETING_TIMEOUT, HTTP1_CALL_TIMEOUT,
    HTTP1_IDLE_TIMEOUT, MAX_ENDING,
};
pub use socket::{LISTEN_BACKLOG, listen};
pub use tikv::TikvService;

/// The largest message in either direction. Above every limit that the layers behind it set, so
/// that what is too large for them is refused by them, with a response that says so.
pub const MAX_MESSAGE_BYTES: usize = 64 << 20;

/// How much of one stream may be on the way unread: enough for the bandwidth-delay product of a
/// fast network, small enough that a stalled reader holds little memory.
pub const STREAM_WINDOW_BYTES: u32 = 2 << 20;

/// The same for all streams of a connection together.
pub const CONNECTION_WINDOW_BYTES: u32 = 8 << 20;

/// Calls that may be open at once on one connection.
pub const MAX_CONCURRENT_STREAMS: u32 = 4096;

/// A connection on which nothing is heard for this long is asked whether it lives.
pub const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);

/// How long the answer to that may take before the connection is closed.
pub const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);

/// How often connections are looked at that may have to go.
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);

/// How long open calls may take to end after the shutdown signal.
pub const SHUTDOWN_GRACE: Duration = Duration::from_millis(500);

/// Why a server stopped other than because it was told to.
#[derive(Debug, thiserror::Error)]
#[error("serving on {address} failed: {source}")]
pub struct ServeError {
    pub address: String,
    pub source: tonic::transport::Error,
}

/// Serves gRPC `services` and the routes of `http` on one listener until `shutdown` completes.
///
/// Plain HTTP/1.1 and HTTP/2 without TLS are told apart by their first bytes. A path that neither
/// side knows gets the fallback of `http`, by default 404, which gRPC clients read as UNIMPLEMENTED.
pub async fn serve(
    listener: TcpListener,
    limits: ConnectionLimits,
    services: Routes,
    http: axum::Router,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), ServeError> {
    let address = listener
        .local_addr()
        .map_or_else(|error| format!("an unknown address ({error})"), |a| a.to_string());
    // Two routers that both have a fallback cannot be merged.
    let http = http.merge(services.into_axum_router().reset_fallback());
    let routes = Routes::from(http.layer(axum::middleware::from_fn(calls::counted)));
    let connections = Ending(Connections::new(limits));
    let (stop, mut stop_seen) = watch::channel(false);
    let server = tonic::transport::Server::builder()
        .accept_http1(true)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_concurrent_streams(MAX_CONCURRENT_STREAMS)
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .add_routes(routes)
        .serve_with_incoming_shutdown(
            socket::incoming(listener, Arc::clone(&connections.0)),
            async move {
                // An error means that the sender is gone, which only happens when `serve` itself is.
                let _ = stop_seen.wait_for(|stop| *stop).await;
            },
        );
    let stopping = async {
        shutdown.await;
        let _ = stop.send(true);
        tokio::time::sleep(SHUTDOWN_GRACE).await;
        connections.0.close();
        // The server's own future ends the race, once the last connection has noticed.
        std::future::pending::<Infallible>().await
    };
    let sweeping = async {
        let mut looks = tokio::time::interval(SWEEP_INTERVAL);
        loop {
            looks.tick().await;
            connections.0.sweep(Instant::now());
        }
    };
    tokio::select! {
        result = server => result.map_err(|source| ServeError { address, source }),
        never = stopping => match never {},
        () = sweeping => Ok(()),
    }
}

/// Connections are tasks of their own, and end with the server also when it is dropped.
struct Ending(Arc<Connections>);

impl Drop for Ending {
    fn drop(&mut self) {
        self.0.close();
    }
}
