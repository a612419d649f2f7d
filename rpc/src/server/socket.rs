//! Listening, accepting, and sockets that the server can cut.
//!
//! HTTP/2's own graceful end waits for open streams, and a store's streams are open for as long as
//! its peers live. So every socket also watches a signal that makes its reads and writes fail.

use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use futures_util::{FutureExt, Stream, stream};
use rustix::io::Errno;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tonic::transport::server::Connected;

use super::connections::{Admission, Connection, Connections};
use super::greeting::Greeting;
use crate::repeat::Repeated;

/// Connections that the system completes before they are accepted. In a burst larger than this,
/// clients would have to connect again, which takes a second and more. The system may allow less
/// (`net.core.somaxconn`).
pub const LISTEN_BACKLOG: u32 = 4096;

/// How long to wait after a failed accept whose cause may last, instead of failing again at once.
const ACCEPT_RETRY: Duration = Duration::from_millis(20);

/// Listens on `host:port`. Port 0 stands for any free port.
///
/// # Errors
/// When the host has no address, or none that can be listened on.
pub async fn listen(address: &str) -> io::Result<TcpListener> {
    let mut failed = None;
    for address in tokio::net::lookup_host(address).await? {
        match listen_at(address) {
            Ok(listener) => return Ok(listener),
            Err(error) => failed = Some(error),
        }
    }
    Err(failed.unwrap_or_else(|| {
        io::Error::new(io::ErrorKind::AddrNotAvailable, "the host has no address")
    }))
}

fn listen_at(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    // A node that starts again gets its port even if old connections linger.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(LISTEN_BACKLOG)
}

/// The sockets that a listener accepts and `connections` admits. The stream never ends.
pub(super) fn incoming(
    listener: TcpListener,
    connections: Arc<Connections>,
) -> impl Stream<Item = io::Result<Severable>> {
    let acceptor =
        Acceptor { listener, connections, reserve: Acceptor::reserve(), refused: Repeated::new() };
    stream::unfold(acceptor, |mut acceptor| async move {
        let accepted = acceptor.accept().await;
        Some((Ok(accepted), acceptor))
    })
}

struct Acceptor {
    listener: TcpListener,
    connections: Arc<Connections>,
    /// A descriptor that is given up when no other is free, so that a waiting client can be
    /// accepted and closed. Otherwise the client would wait in the queue until its own deadline.
    reserve: Option<File>,
    refused: Repeated,
}

impl Acceptor {
    fn reserve() -> Option<File> {
        File::open("/dev/null").ok()
    }

    /// The next connection that there is room for.
    async fn accept(&mut self) -> Severable {
        loop {
            self.connections.room().await;
            let stream = match self.listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    self.recover(&error).await;
                    continue;
                }
            };
            metrics::counter!("esker_connections_accepted_total").increment(1);
            // Small replies must not wait for the acknowledgement of earlier ones. This fails if
            // the client is gone already.
            if stream.set_nodelay(true).is_err() {
                continue;
            }
            let now = Instant::now();
            match self.connections.admit(now) {
                Some(admission) => {
                    if let Some(over) = self.refused.recovered(now) {
                        tracing::info!(refused = over.times, lasted = ?over.lasted, "connections are accepted again");
                    }
                    return Severable { stream, admission, greeting: Greeting::default() };
                }
                None => self.refuse("full", "as many as are allowed have calls open"),
            }
        }
    }

    fn refuse(&mut self, reason: &'static str, why: &str) {
        metrics::counter!("esker_connections_refused_total", "reason" => reason).increment(1);
        if let Some(times) = self.refused.failed(Instant::now()) {
            tracing::warn!(times, why, "a connection was refused");
        }
    }

    async fn recover(&mut self, error: &io::Error) {
        use io::ErrorKind;
        match error.kind() {
            // The error is about one client that hung up.
            ErrorKind::ConnectionAborted
            | ErrorKind::ConnectionReset
            | ErrorKind::Interrupted
            | ErrorKind::TimedOut => return,
            _ => {}
        }
        match Errno::from_io_error(error) {
            Some(Errno::MFILE | Errno::NFILE) => {
                self.refuse(
                    "descriptors",
                    "no file descriptor is free; raise the limit of open files",
                );
                self.reserve = None;
                let closed = matches!(self.listener.accept().now_or_never(), Some(Ok(_)));
                self.reserve = Acceptor::reserve();
                // Another task may have taken the descriptor first.
                let patience = if closed { Duration::ZERO } else { ACCEPT_RETRY };
                self.connections.free_one(patience).await;
            }
            _ => {
                self.refuse("error", &error.to_string());
                tokio::time::sleep(ACCEPT_RETRY).await;
            }
        }
    }
}

/// A socket that fails once its connection is severed.
pub(super) struct Severable {
    stream: TcpStream,
    admission: Admission,
    greeting: Greeting,
}

fn ended() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionAborted, "this server ended the connection")
}

impl Connected for Severable {
    /// The connection, which a call needs to register itself.
    type ConnectInfo = Arc<Connection>;

    fn connect_info(&self) -> Self::ConnectInfo {
        Arc::clone(&self.admission.connection)
    }
}

impl AsyncRead for Severable {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.admission.connection.is_severed_for_reader(context) {
            return Poll::Ready(Err(ended()));
        }
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(context, buffer);
        if self.greeting != Greeting::Over && self.greeting.hear(&buffer.filled()[before..]) {
            self.admission.connection.greeted(Instant::now());
        }
        read
    }
}

impl AsyncWrite for Severable {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.admission.connection.is_severed_for_writer(context) {
            return Poll::Ready(Err(ended()));
        }
        Pin::new(&mut self.stream).poll_write(context, buffer)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if self.admission.connection.is_severed_for_writer(context) {
            return Poll::Ready(Err(ended()));
        }
        Pin::new(&mut self.stream).poll_write_vectored(context, buffers)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
