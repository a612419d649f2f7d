//! Which connections have calls open.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::Request;
use axum::http::Version;
use axum::middleware::Next;
use axum::response::Response;
use http_body::{Frame, SizeHint};

use super::connections::{Connection, OpenCall};

/// Runs a call, which stays open until its response has been sent or dropped.
pub(super) async fn counted(request: Request, next: Next) -> Response {
    let Some(connection) = request.extensions().get::<Arc<Connection>>().cloned() else {
        return next.run(request).await;
    };
    let http2 = request.version() == Version::HTTP_2;
    let call = connection.begin_call(http2, Instant::now());
    next.run(request).await.map(|body| Body::new(Counted { body, _call: call }))
}

/// The body of a response, with the call that it ends.
struct Counted {
    body: Body,
    _call: OpenCall,
}

impl HttpBody for Counted {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
