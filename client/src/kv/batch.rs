//! One `BatchCommands` stream to a store, shared by all requests for it.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use esker_model::limits::MAX_COMMAND_BYTES;
use esker_rpc::channel;
use esker_rpc::procedures::{Batched, BatchedReply};
use esker_rpc::proto::tikvpb::batch_commands_request::Request;
use esker_rpc::proto::tikvpb::tikv_client::TikvClient;
use esker_rpc::proto::tikvpb::{BatchCommandsRequest, BatchCommandsResponse};
use esker_rpc::server::MAX_MESSAGE_BYTES;
use futures_util::{Stream, StreamExt, stream};
use parking_lot::Mutex;
use prost::Message;
use tokio::sync::{Semaphore, mpsc, oneshot};
use tonic::transport::Channel;

use super::stores::SendError;

/// Requests sent in one message.
pub const MAX_REQUESTS_PER_BATCH: usize = 128;

/// A message is sent once its requests have reached this size.
const MAX_REQUEST_BATCH_BYTES: usize = 1 << 20;

/// The largest request fits into a message together with those that gathered before it. A message
/// that is too large cannot be sent, and that ends the stream for all requests on it. The last part
/// is room for contexts, ids and lengths.
const _: () = assert!(
    MAX_REQUEST_BATCH_BYTES + MAX_COMMAND_BYTES + (MAX_REQUESTS_PER_BATCH << 10)
        <= MAX_MESSAGE_BYTES
);

/// Requests to one store that may be unanswered, including those that wait to be sent.
pub const MAX_IN_FLIGHT: usize = 4096;

/// How long a store may take to accept the stream.
const OPEN_TIMEOUT: Duration = Duration::from_secs(3);

/// Hands requests to the stream. Clones share the stream, which ends with the last of them.
#[derive(Clone)]
pub(super) struct BatchStream {
    waiting: mpsc::Sender<(u64, Box<Batched>)>,
    next_id: Arc<AtomicU64>,
    pending: Arc<Pending>,
}

/// The requests that are not answered yet.
struct Pending {
    room: Semaphore,
    callers: Mutex<Callers>,
}

#[derive(Default)]
struct Callers {
    by_id: HashMap<u64, Caller>,
    /// Why the stream ended. Set once.
    ended: Option<String>,
}

struct Caller {
    answer: oneshot::Sender<Result<BatchedReply, SendError>>,
    /// Whether the store may have seen the request.
    sent: bool,
}

impl BatchStream {
    pub(super) fn open(address: String, channel: Channel) -> Self {
        let (waiting, queue) = mpsc::channel(MAX_IN_FLIGHT);
        let pending =
            Arc::new(Pending { room: Semaphore::new(MAX_IN_FLIGHT), callers: Mutex::default() });
        tokio::spawn(run(address, channel, queue, Arc::clone(&pending)));
        BatchStream { waiting, next_id: Arc::default(), pending }
    }

    pub(super) fn has_ended(&self) -> bool {
        self.pending.callers.lock().ended.is_some()
    }

    /// Sends a request and waits for its reply. If the caller stops waiting before the request is
    /// on its way, the request is not sent. If it is on its way already, `seen` is set.
    pub(super) async fn send(
        &self,
        command: Box<Batched>,
        seen: &AtomicBool,
    ) -> Result<BatchedReply, SendError> {
        let not_sent = |reason: &dyn ToString| SendError::NotSent(reason.to_string());
        let _room = self.pending.room.acquire().await.map_err(|closed| not_sent(&closed))?;
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let (answer, answered) = oneshot::channel();
        {
            let mut callers = self.pending.callers.lock();
            if let Some(reason) = &callers.ended {
                return Err(not_sent(reason));
            }
            callers.by_id.insert(id, Caller { answer, sent: false });
        }
        let _listed = Listed { id, pending: &self.pending, seen };
        self.waiting.send((id, command)).await.map_err(|_| not_sent(&"the stream has ended"))?;
        answered.await.map_err(|_| not_sent(&"the stream has ended"))?
    }
}

/// Takes a caller off the list when it stops waiting.
struct Listed<'a> {
    id: u64,
    pending: &'a Pending,
    seen: &'a AtomicBool,
}

impl Drop for Listed<'_> {
    fn drop(&mut self) {
        let caller = self.pending.callers.lock().by_id.remove(&self.id);
        // If another task took the caller off the list, the caller was answered or is about to be.
        // So the store may have carried the request out, although the caller no longer waits for
        // that.
        self.seen.store(caller.is_none_or(|caller| caller.sent), Ordering::Relaxed);
    }
}

async fn run(
    address: String,
    channel: Channel,
    queue: mpsc::Receiver<(u64, Box<Batched>)>,
    pending: Arc<Pending>,
) {
    let reason = converse(channel, queue, &pending).await;
    let reason = format!("{address}: {reason}");
    let callers = {
        let mut callers = pending.callers.lock();
        callers.ended = Some(reason.clone());
        std::mem::take(&mut callers.by_id)
    };
    tracing::debug!(reason, unanswered = callers.len(), "a batch stream ended");
    for caller in callers.into_values() {
        let error = if caller.sent {
            SendError::Unknown(reason.clone())
        } else {
            SendError::NotSent(reason.clone())
        };
        let _ = caller.answer.send(Err(error));
    }
}

/// Sends and receives until the stream breaks or is no longer held. Returns why it ended.
async fn converse(
    channel: Channel,
    queue: mpsc::Receiver<(u64, Box<Batched>)>,
    pending: &Arc<Pending>,
) -> String {
    let mut client = TikvClient::new(channel)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    let opening = client.batch_commands(batches(queue, Arc::clone(pending)));
    let mut responses = match tokio::time::timeout(OPEN_TIMEOUT, opening).await {
        Ok(Ok(responses)) => responses.into_inner(),
        Ok(Err(status)) => return channel::describe(&status),
        Err(_) => return format!("no stream within {OPEN_TIMEOUT:?}"),
    };
    loop {
        match responses.next().await {
            Some(Ok(batch)) => pending.answer(batch),
            Some(Err(status)) => return channel::describe(&status),
            None => return "the store ended the stream".into(),
        }
    }
}

/// The queue as a stream of batches. All requests that wait when the connection has room go
/// together.
fn batches(
    queue: mpsc::Receiver<(u64, Box<Batched>)>,
    pending: Arc<Pending>,
) -> impl Stream<Item = BatchCommandsRequest> + Send + 'static {
    stream::unfold((queue, pending), |(mut queue, pending)| async move {
        loop {
            let mut next = Some(queue.recv().await?);
            let mut batch = BatchCommandsRequest::default();
            let mut bytes = 0;
            while let Some((id, command)) = next {
                if pending.mark_sent(id) {
                    let request = Request { cmd: Some(*command) };
                    bytes += request.encoded_len();
                    batch.requests.push(request);
                    batch.request_ids.push(id);
                }
                let full = batch.requests.len() >= MAX_REQUESTS_PER_BATCH
                    || bytes >= MAX_REQUEST_BATCH_BYTES;
                next = if full { None } else { queue.try_recv().ok() };
            }
            // All callers of a batch may have given up.
            if !batch.requests.is_empty() {
                metrics::histogram!("esker_client_batch_requests")
                    .record(batch.requests.len() as f64);
                return Some((batch, (queue, pending)));
            }
        }
    })
}

impl Pending {
    /// Notes that the store may see a request from now on; `false` if no caller waits for the
    /// request.
    fn mark_sent(&self, id: u64) -> bool {
        match self.callers.lock().by_id.get_mut(&id) {
            Some(caller) => {
                caller.sent = true;
                true
            }
            None => false,
        }
    }

    fn answer(&self, batch: BatchCommandsResponse) {
        let mut callers = self.callers.lock();
        for (response, id) in batch.responses.into_iter().zip(batch.request_ids) {
            // Without an entry the caller has given up.
            let Some(caller) = callers.by_id.remove(&id) else {
                continue;
            };
            let answer = response
                .cmd
                .ok_or_else(|| SendError::Refused("the store does not serve this command".into()));
            let _ = caller.answer.send(answer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether a request counts as seen when its caller stops waiting after `happened`.
    fn is_seen_after(happened: impl Fn(&Pending)) -> bool {
        let pending = Pending { room: Semaphore::new(1), callers: Mutex::default() };
        let (answer, _answered) = oneshot::channel();
        pending.callers.lock().by_id.insert(7, Caller { answer, sent: false });
        let seen = AtomicBool::new(false);
        let listed = Listed { id: 7, pending: &pending, seen: &seen };
        happened(&pending);
        drop(listed);
        seen.into_inner()
    }

    #[test]
    fn only_a_request_still_in_the_queue_is_known_not_to_be_seen() {
        assert!(!is_seen_after(|_| ()));
        assert!(is_seen_after(|pending| assert!(pending.mark_sent(7))));
        // An answer, or the end of the stream, arrives when the caller's time runs out.
        assert!(is_seen_after(|pending| {
            pending.mark_sent(7);
            let request_ids = vec![7];
            let responses = vec![Default::default()];
            pending.answer(BatchCommandsResponse { responses, request_ids, ..Default::default() });
        }));
        assert!(is_seen_after(|pending| {
            pending.mark_sent(7);
            drop(std::mem::take(&mut pending.callers.lock().by_id));
        }));
    }
}
