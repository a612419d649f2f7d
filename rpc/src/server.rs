//! The server's side of a socket: one port that speaks gRPC and plain HTTP.
//!
//! A listener, the gRPC services and an HTTP router flow in. [`serve`] runs until its shutdown
//! signal. It promises to return soon after the signal, however long-lived the streams of its
//! clients are. Streams get [`SHUTDOWN_GRACE`] to end, and are then cut. It also promises that idle
//! connections never keep out or slow down a client that works: see `connections`.

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

/// The largest message in either direction. It is above every limit of the layers behind the
/// socket, so these layers refuse what is too large for them, with a response that gives the
/// reason.
pub const MAX_MESSAGE_BYTES: usize = 64 << 20;

/// How many unread bytes of one stream may be on the way: enough for the bandwidth-delay product of
/// a fast network, and so few that a stalled reader holds little memory.
pub const STREAM_WINDOW_BYTES: u32 = 2 << 20;

/// How many unread bytes of all streams of a connection together may be on the way.
pub const CONNECTION_WINDOW_BYTES: u32 = 8 << 20;

/// Calls that may be open at once on one connection.
pub const MAX_CONCURRENT_STREAMS: u32 = 4096;

/// A connection on which nothing is heard for this long is sent a ping.
pub const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);

/// How long the answer to the ping may take before the connection is closed.
pub const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);

/// How often the server looks for connections that are overdue.
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);

/// How long open calls may take to end after the shutdown signal.
pub const SHUTDOWN_GRACE: Duration = Duration::from_millis(500);

/// Why a server stopped without its shutdown signal.
#[derive(Debug, thiserror::Error)]
#[error("serving on {address} failed: {source}")]
pub struct ServeError {
    pub address: String,
    pub source: tonic::transport::Error,
}

/// Serves gRPC `services` and the routes of `http` on one listener until `shutdown` completes.
///
/// The first bytes of a connection show whether it is plain HTTP/1.1 or HTTP/2 without TLS. A path
/// that neither side knows gets the fallback of `http`, by default 404, which gRPC clients read as
/// UNIMPLEMENTED.
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
                // An error means that the sender is gone. That happens only when `serve` itself is
                // dropped.
                let _ = stop_seen.wait_for(|stop| *stop).await;
            },
        );
    let stopping = async {
        shutdown.await;
        let _ = stop.send(true);
        tokio::time::sleep(SHUTDOWN_GRACE).await;
        connections.0.close();
        // The server's own future ends the race when the last connection has closed.
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

/// Connections are tasks of their own. They end with the server, also when it is dropped.
struct Ending(Arc<Connections>);

impl Drop for Ending {
    fn drop(&mut self) {
        self.0.close();
    }
}
