//! Connections to other processes: their addresses, and the settings that all of them share.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tonic::transport::{Channel, Endpoint, Uri};
use tower::{Service, service_fn};

use crate::server::{CONNECTION_WINDOW_BYTES, STREAM_WINDOW_BYTES};

/// How long a connection attempt may take.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// A connection on which nothing is heard for this long is sent a ping. Short, because everything
/// that is sent on a dead connection is lost until its death is noticed.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(2);

/// How long the answer to the ping may take before the connection counts as broken.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(3);

/// Why a text is not the address of a server, in one line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{address}` is not an address: {reason}; write HOST:PORT")]
pub struct AddressError {
    /// The text, as it was given.
    pub address: String,
    /// What is wrong with it.
    pub reason: String,
}

/// The endpoint at `host:port`, with or without `http://` before it. A dead connection to it is
/// noticed within seconds, and calls that wait for an answer on that connection fail.
///
/// # Errors
/// When the text is no address.
pub fn endpoint(address: &str) -> Result<Endpoint, AddressError> {
    let refused = |reason: String| AddressError { address: address.into(), reason };
    let bare = address.trim();
    let bare = bare.strip_prefix("http://").unwrap_or(bare).trim_end_matches('/');
    if bare.contains("://") {
        return Err(refused("only http is spoken".into()));
    }
    let Some((host, port)) = bare.rsplit_once(':') else {
        return Err(refused("the port is missing".into()));
    };
    if host.is_empty() {
        return Err(refused("the host is missing".into()));
    }
    match port.parse::<u16>() {
        Ok(0) => return Err(refused("port 0 cannot be connected to".into())),
        Ok(_) => {}
        Err(_) => return Err(refused(format!("`{port}` is not a port"))),
    }
    let endpoint = Endpoint::from_shared(format!("http://{bare}"))
        .map_err(|error| refused(error.to_string()))?;
    Ok(endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true))
}

/// Connects now, within [`CONNECT_TIMEOUT`]. An error is one line with the address and the reason.
pub async fn connect(address: &str) -> Result<Channel, String> {
    Dialer::default().connect(address).await
}

/// A connection's two byte streams.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin + 'static {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin + 'static> Stream for T {}

/// Opens connections in another way than by TCP.
pub trait Dial: Send + Sync + 'static {
    /// A connection to the server at `address` (`host:port`).
    fn dial(&self, address: &str) -> BoxFuture<'static, std::io::Result<Box<dyn Stream>>>;
}

impl std::fmt::Debug for Dialer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.0.is_some() { "Dialer(other)" } else { "Dialer(TCP)" })
    }
}

/// The way in which a program reaches servers: by TCP, unless it is given another. Cheap to clone.
#[derive(Clone, Default)]
pub struct Dialer(Option<Arc<dyn Dial>>);

impl Dialer {
    /// Reaches servers by `dial`.
    pub fn new(dial: impl Dial) -> Self {
        Dialer(Some(Arc::new(dial)))
    }

    /// Connects now, within [`CONNECT_TIMEOUT`].
    ///
    /// # Errors
    /// One line that names the address and says why there is no connection.
    pub async fn connect(&self, address: &str) -> Result<Channel, String> {
        self.connect_as(address, |endpoint| endpoint).await
    }

    /// The same with other settings than [`endpoint`] gives.
    ///
    /// # Errors
    /// One line that names the address and says why there is no connection.
    pub async fn connect_as(
        &self,
        address: &str,
        adjusted: impl FnOnce(Endpoint) -> Endpoint,
    ) -> Result<Channel, String> {
        let endpoint = adjusted(endpoint(address).map_err(|error| error.to_string())?);
        let connected = match &self.0 {
            None => endpoint.connect().await,
            Some(dial) => endpoint.connect_with_connector(connector(dial, address)).await,
        };
        connected.map_err(|error| format!("{address}: {}", root_cause(&error)))
    }

    /// A connection that is opened when it is first used, and again when it breaks. Must be called
    /// within a runtime.
    ///
    /// # Errors
    /// When the address is none.
    pub fn connect_lazy(&self, address: &str) -> Result<Channel, AddressError> {
        let endpoint = endpoint(address)?;
        Ok(match &self.0 {
            None => endpoint.connect_lazy(),
            Some(dial) => endpoint.connect_with_connector_lazy(connector(dial, address)),
        })
    }
}

/// What tonic opens a connection with.
fn connector(
    dial: &Arc<dyn Dial>,
    address: &str,
) -> impl Service<Uri, Response = TokioIo<Box<dyn Stream>>, Error = std::io::Error, Future: Send>
+ Send
+ use<> {
    let (dial, address) = (Arc::clone(dial), address.to_owned());
    service_fn(move |_: Uri| {
        let dialled = dial.dial(&address);
        async move { dialled.await.map(TokioIo::new) }
    })
}

/// The innermost of an error's causes, because tonic's own message is only "transport error".
fn root_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    cause.to_string()
}

/// A status as one line, without tonic's headers and details.
pub fn describe(status: &tonic::Status) -> String {
    if status.message().is_empty() {
        format!("{:?}", status.code())
    } else {
        format!("{:?}: {}", status.code(), status.message())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_needs_a_host_and_a_port_and_may_have_a_scheme() {
        for good in ["127.0.0.1:2379", "http://localhost:2379", "[::1]:80", " h:1 ", "http://h:1/"]
        {
            assert!(endpoint(good).is_ok(), "{good} was refused");
        }
        for bad in ["", "localhost", ":80", "h:", "h:x", "h:0", "h:70000", "https://h:1", "a b:1"] {
            let error = endpoint(bad).expect_err(bad).to_string();
            assert!(error.contains(bad) && !error.contains('\n'), "{error}");
        }
    }
}
