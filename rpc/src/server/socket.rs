//! Accepted sockets that the server can cut.
//!
//! HTTP/2's own graceful end waits for open streams, and a store's streams are open for as long as
//! its peers live. So every socket also watches a signal at which it fails its next read or write.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use futures_util::{Stream, StreamExt};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::server::Connected;

/// The sockets that a listener accepts, each of which ends when `cut` turns true.
pub(super) fn incoming(
    listener: TcpListener,
    cut: watch::Receiver<bool>,
) -> impl Stream<Item = io::Result<Severable>> {
    TcpListenerStream::new(listener).map(move |accepted| {
        let stream = accepted?;
        // Small replies must not wait for the acknowledgement of the ones before them.
        stream.set_nodelay(true)?;
        let mut cut = cut.clone();
        Ok(Severable {
            stream,
            cut: Box::pin(async move {
                // The sender's end going away counts as the signal.
                let _ = cut.wait_for(|cut| *cut).await;
            }),
            severed: false,
        })
    })
}

/// A socket that fails once the signal has come.
pub(super) struct Severable {
    stream: TcpStream,
    cut: Pin<Box<dyn Future<Output = ()> + Send>>,
    severed: bool,
}

impl Severable {
    fn check(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        if !self.severed && self.cut.as_mut().poll(context).is_ready() {
            self.severed = true;
        }
        if self.severed {
            return Err(io::Error::new(
                io::ErrorKind::ConnectionAborted,
                "this server is stopping",
            ));
        }
        Ok(())
    }
}

impl Connected for Severable {
    type ConnectInfo = <TcpStream as Connected>::ConnectInfo;

    fn connect_info(&self) -> Self::ConnectInfo {
        self.stream.connect_info()
    }
}

impl AsyncRead for Severable {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.check(context)?;
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

// Only reads watch for the signal: a connection always has one pending, and the wakers of a read
// and of a write may belong to different tasks.
impl AsyncWrite for Severable {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, buffer)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
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
