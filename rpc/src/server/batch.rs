//! One `BatchCommands` stream: many requests at once, answered in the order in which they finish.
//!
//! The response stream owns the request stream and all unfinished work. The connection polls it.
//! When the client hangs up, the connection drops it, and the work with it.

use std::future::ready;
use std::iter::Zip;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};
use std::vec::IntoIter;

use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, Stream, StreamExt};
use parking_lot::Mutex;
use prost::Message;
use tokio::task::JoinHandle;
use tonic::Status;

use crate::procedures::{Batched, BatchedReply};
use crate::proto::tikvpb::batch_commands_request::Request as Command;
use crate::proto::tikvpb::batch_commands_response::Response;
use crate::proto::tikvpb::{
    BatchCommandsEmptyRequest, BatchCommandsEmptyResponse, BatchCommandsRequest,
    BatchCommandsResponse,
};
use crate::repeat::Repeated;
use crate::service::{Caller, Request, StoreService, is_refusal};

/// Requests of one stream that may be under way. At this limit the other requests of the last
/// message wait, and the stream is not read, so that the client has to wait.
pub const MAX_IN_FLIGHT_PER_STREAM: usize = 4096;

/// Responses sent in one message.
pub const MAX_RESPONSES_PER_BATCH: usize = 256;

/// A message is sent once its responses have reached this size.
pub const MAX_RESPONSE_BATCH_BYTES: usize = 1 << 20;

/// The longest delay that a client may ask for in an empty request.
const MAX_EMPTY_DELAY: Duration = Duration::from_secs(60);

/// An error is about the store as a whole, not about this request.
type Work = BoxFuture<'static, Result<(u64, Response), Status>>;

/// The requests of a message, with their ids.
type Commands = Zip<IntoIter<Command>, IntoIter<u64>>;

/// The responses to a stream of requests.
pub(super) struct Responses<S, I> {
    service: Arc<S>,
    incoming: I,
    /// The incoming half has ended. Requests that were read are still answered.
    ended: bool,
    /// What is left of the last message because [`MAX_IN_FLIGHT_PER_STREAM`] requests are in flight.
    /// The next message is not read before.
    waiting: Option<Commands>,
    in_flight: FuturesUnordered<Work>,
    /// An error that ends the stream when the responses that are ready have been sent.
    failed: Option<Status>,
}

impl<S, I> Responses<S, I>
where
    S: StoreService,
    I: Stream<Item = Result<BatchCommandsRequest, Status>> + Unpin,
{
    pub(super) fn new(service: Arc<S>, incoming: I) -> Self {
        Responses {
            service,
            incoming,
            ended: false,
            waiting: None,
            in_flight: FuturesUnordered::new(),
            failed: None,
        }
    }

    /// Drops all work, and ends with this error when the responses that are ready have been sent.
    fn fail(&mut self, status: Status) {
        self.ended = true;
        self.waiting = None;
        self.in_flight.clear();
        self.failed = Some(status);
    }

    fn accept(&mut self, batch: BatchCommandsRequest) {
        if batch.requests.len() != batch.request_ids.len() {
            self.failed = Some(Status::invalid_argument(format!(
                "a batch of {} requests came with {} ids",
                batch.requests.len(),
                batch.request_ids.len()
            )));
            self.ended = true;
            return;
        }
        metrics::histogram!("esker_rpc_batch_commands_size").record(batch.requests.len() as f64);
        self.waiting = Some(batch.requests.into_iter().zip(batch.request_ids));
    }

    /// The next request to begin. The memory of a message is freed with its last request.
    fn next_waiting(&mut self) -> Option<(Command, u64)> {
        let next = self.waiting.as_mut()?.next();
        if next.is_none() {
            self.waiting = None;
        }
        next
    }

    /// Reads and begins requests while there is room for them.
    fn begin(&mut self, context: &mut Context<'_>) {
        while self.in_flight.len() < MAX_IN_FLIGHT_PER_STREAM {
            if let Some((request, id)) = self.next_waiting() {
                self.in_flight.push(self.start(id, request.cmd));
                continue;
            }
            if self.ended {
                return;
            }
            match self.incoming.poll_next_unpin(context) {
                Poll::Ready(Some(Ok(batch))) => self.accept(batch),
                // The connection broke or the client gave up, so no one reads the answers.
                Poll::Ready(Some(Err(status))) => self.fail(status),
                Poll::Ready(None) => self.ended = true,
                Poll::Pending => return,
            }
        }
    }

    fn start(&self, id: u64, command: Option<Batched>) -> Work {
        let request = match command {
            Some(Batched::Empty(request)) => {
                let reply = |reply| Response { cmd: Some(BatchedReply::Empty(reply)) };
                let remembers = self.service.remembers_writes();
                let answer = empty(request, remembers);
                return answer.map(move |answer| Ok((id, reply(answer)))).boxed();
            }
            command => command.and_then(Request::of_batched),
        };
        let Some(request) = request else {
            // This version does not know the command. An empty response makes the client's call
            // fail. Without a response the call would wait for ever.
            return ready(Ok((id, Response { cmd: None }))).boxed();
        };
        let long = may_take_long(&request);
        let refusal = request.refusal();
        let answer = self.service.handle(request, Caller::default());
        let work = async move {
            match answer.await {
                Ok(reply) => Ok((id, Response { cmd: reply.into_batched() })),
                Err(status) if is_refusal(&status) => {
                    tracing::debug!(%status, "a batched command was refused");
                    Ok((id, Response { cmd: refusal(status.message()).into_batched() }))
                }
                // The status is about the store as a whole. The stream ends with it, so that the
                // client turns to another store instead of giving up.
                Err(status) => Err(status),
            }
        };
        if long { Spawned(tokio::spawn(work)).into_work() } else { work.boxed() }
    }
}

/// Whether a command reads so much that it needs a task of its own. All other commands of a stream
/// are polled on one task, and a long read would hold them up.
fn may_take_long(request: &Request) -> bool {
    !matches!(
        request,
        Request::RawGet(_)
            | Request::RawPut(_)
            | Request::RawDelete(_)
            | Request::RawBatchPut(_)
            | Request::RawBatchDelete(_)
            | Request::Get(_)
            | Request::Prewrite(_)
            | Request::Commit(_)
    )
}

async fn empty(
    request: BatchCommandsEmptyRequest,
    remembers_writes: bool,
) -> BatchCommandsEmptyResponse {
    let delay = Duration::from_millis(request.delay_time).min(MAX_EMPTY_DELAY);
    if !delay.is_zero() {
        tokio::time::sleep(delay).await;
    }
    BatchCommandsEmptyResponse { test_id: request.test_id, remembers_writes }
}

/// Shared by all streams, because a cause that fails one command may fail any.
static FAILED: Mutex<Repeated> = Mutex::new(Repeated::new());

/// A task that is aborted when this handle is dropped.
struct Spawned(JoinHandle<Result<(u64, Response), Status>>);

impl Spawned {
    fn into_work(mut self) -> Work {
        async move {
            (&mut self.0).await.unwrap_or_else(|error| {
                if let Some(times) = FAILED.lock().failed(Instant::now()) {
                    tracing::error!(times, %error, "a batched command's task failed");
                }
                Err(Status::internal("the task of a command failed"))
            })
        }
        .boxed()
    }
}

impl Drop for Spawned {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl<S, I> Stream for Responses<S, I>
where
    S: StoreService,
    I: Stream<Item = Result<BatchCommandsRequest, Status>> + Unpin,
{
    type Item = Result<BatchCommandsResponse, Status>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        this.begin(context);
        let mut batch = BatchCommandsResponse::default();
        let mut bytes = 0;
        while batch.responses.len() < MAX_RESPONSES_PER_BATCH && bytes < MAX_RESPONSE_BATCH_BYTES {
            match this.in_flight.poll_next_unpin(context) {
                Poll::Ready(Some(Ok((id, response)))) => {
                    bytes += response.encoded_len();
                    batch.responses.push(response);
                    batch.request_ids.push(id);
                }
                Poll::Ready(Some(Err(status))) => this.fail(status),
                Poll::Ready(None) | Poll::Pending => break,
            }
        }
        if !batch.responses.is_empty() {
            return Poll::Ready(Some(Ok(batch)));
        }
        // Nothing waits while nothing is in flight, because there was room for it.
        if this.ended && this.in_flight.is_empty() {
            return Poll::Ready(this.failed.take().map(Err));
        }
        Poll::Pending
    }
}
