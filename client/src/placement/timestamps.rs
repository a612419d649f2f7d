//! Timestamps. Concurrent callers share one request on one stream.

use std::sync::Weak;

use esker_model::Timestamp;
use esker_rpc::backoff::Backoff;
use esker_rpc::channel;
use esker_rpc::proto::pdpb::pd_client::PdClient;
use esker_rpc::proto::pdpb::{TsoRequest, TsoResponse};
use futures_util::StreamExt;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::calls::wrong;
use super::{Attempt, FIRST_RETRY, LONGEST_RETRY, Shared};
use crate::error::ClientError;

/// Timestamps asked for in one request: far fewer than fit in a millisecond (2^18).
pub const MAX_TIMESTAMPS_PER_REQUEST: u32 = 1 << 16;

/// Callers that may wait for the task.
const MAX_WAITING: usize = 4096;

struct Wanted {
    count: u32,
    answer: oneshot::Sender<Result<Timestamp, ClientError>>,
}

/// Hands callers to the task that holds the stream.
pub(super) struct Oracle {
    wanted: mpsc::Sender<Wanted>,
}

impl Oracle {
    /// Starts the task, which ends with the client. Must be called within a runtime.
    pub(super) fn new(shared: Weak<Shared>) -> Self {
        let (wanted, waiting) = mpsc::channel(MAX_WAITING);
        tokio::spawn(run(shared, waiting));
        Oracle { wanted }
    }

    pub(super) async fn get(&self, count: u32) -> Result<Timestamp, ClientError> {
        let count = count.clamp(1, MAX_TIMESTAMPS_PER_REQUEST);
        let (answer, answered) = oneshot::channel();
        self.wanted.send(Wanted { count, answer }).await.map_err(|_| ClientError::Closed)?;
        answered.await.map_err(|_| ClientError::Closed)?
    }
}

/// One open stream.
struct Open {
    requests: mpsc::Sender<TsoRequest>,
    responses: Streaming<TsoResponse>,
}

async fn run(shared: Weak<Shared>, mut waiting: mpsc::Receiver<Wanted>) {
    let mut open = None;
    while let Some(first) = waiting.recv().await {
        let Some(shared) = shared.upgrade() else {
            return;
        };
        let mut count = first.count;
        let mut batch = vec![first];
        // The caller whose count no longer fits begins the next batch.
        let mut next = None;
        while let Ok(wanted) = waiting.try_recv() {
            if count + wanted.count > MAX_TIMESTAMPS_PER_REQUEST {
                next = Some(wanted);
                break;
            }
            count += wanted.count;
            batch.push(wanted);
        }
        serve(&shared, &mut open, count, batch).await;
        if let Some(wanted) = next {
            let count = wanted.count;
            serve(&shared, &mut open, count, vec![wanted]).await;
        }
    }
}

/// Serves one batch: each caller gets timestamps or an error.
async fn serve(shared: &Shared, open: &mut Option<Open>, count: u32, batch: Vec<Wanted>) {
    match request(shared, open, count).await {
        Ok(last) => {
            // The batch is dealt out from its first timestamp on. Each caller gets the last of its
            // own.
            let mut logical = last.logical() - (u64::from(count) - 1);
            for wanted in batch {
                let own = Timestamp::new(last.physical(), logical + u64::from(wanted.count) - 1);
                logical += u64::from(wanted.count);
                // A caller that has given up no longer listens.
                let _ = wanted.answer.send(Ok(own));
            }
        }
        Err(error) => {
            for wanted in batch {
                let _ = wanted.answer.send(Err(error.clone()));
            }
        }
    }
}

async fn request(
    shared: &Shared,
    open: &mut Option<Open>,
    count: u32,
) -> Result<Timestamp, ClientError> {
    let started = Instant::now();
    let mut backoff = Backoff::new(FIRST_RETRY, LONGEST_RETRY);
    loop {
        let current = shared.leader.current();
        let attempt = async {
            let stream = match open.as_mut() {
                Some(stream) => stream,
                None => open.insert(connect(current.channel.clone()).await?),
            };
            ask(shared, stream, count).await
        };
        let failed = match shared.attempt(&current, started, attempt).await {
            Ok(timestamp) => return Ok(timestamp),
            Err(failed) => failed,
        };
        // A late answer must not be taken for the answer to the next request.
        *open = None;
        let reason = match failed {
            Attempt::Final(error) => return Err(error),
            Attempt::Again(reason) => reason,
        };
        shared.before_next("tso", started, &mut backoff, &current, reason).await?;
    }
}

async fn connect(channel: tonic::transport::Channel) -> Result<Open, Attempt> {
    // One request is open at a time.
    let (requests, outgoing) = mpsc::channel(1);
    let responses = PdClient::new(channel)
        .tso(ReceiverStream::new(outgoing))
        .await
        .map_err(|status| Attempt::Again(channel::describe(&status)))?
        .into_inner();
    Ok(Open { requests, responses })
}

async fn ask(shared: &Shared, stream: &mut Open, count: u32) -> Result<Timestamp, Attempt> {
    let request = TsoRequest { header: Some(shared.header()), count, ..Default::default() };
    let ended = || Attempt::Again("the stream of timestamps ended".into());
    stream.requests.send(request).await.map_err(|_| ended())?;
    let response = match stream.responses.next().await {
        Some(Ok(response)) => response,
        Some(Err(status)) => return Err(Attempt::Again(channel::describe(&status))),
        None => return Err(ended()),
    };
    shared.judge("tso", response.header.as_ref())?;
    let wrong = |problem: String| Attempt::Final(wrong("tso", problem));
    let last = response.timestamp.ok_or_else(|| wrong("no timestamp".into()))?;
    let last = Timestamp::try_from(last).map_err(|error| wrong(error.to_string()))?;
    if response.count != count || last.logical() + 1 < u64::from(count) {
        return Err(wrong("another number of timestamps than was asked for".into()));
    }
    Ok(last)
}
