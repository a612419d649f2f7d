//! The task that sends to one store.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::{Stream, stream};

use super::Shared;
use super::queue::{Full, Queue};
use crate::backoff::Backoff;
use crate::channel;
use crate::proto::esker::transport_client::TransportClient;
use crate::proto::esker::{RaftBatch, RaftMessage};
use crate::repeat::Repeated;
use crate::server::MAX_MESSAGE_BYTES;

/// Messages in one batch on the wire.
pub const MAX_BATCH_MESSAGES: usize = 1024;

/// Bytes of one batch, unless one message alone is larger.
pub const MAX_BATCH_BYTES: usize = 4 << 20;

/// The first wait after a failure to reach a store.
const FIRST_RETRY: Duration = Duration::from_millis(50);

/// The longest wait after such a failure. A store that comes back may stay cut off for so long.
const LONGEST_RETRY: Duration = Duration::from_secs(1);

/// If a stream that lived this long breaks, the reason is a new one. It is opened again without a
/// wait.
const STABLE: Duration = Duration::from_secs(5);

/// A stream that lived this long shows that the store is back.
const SETTLED: Duration = Duration::from_secs(1);

/// The queue to one store. Dropping it ends the task that drains the queue.
pub(super) struct Link {
    queue: Arc<Queue>,
}

impl Link {
    pub(super) fn start(store: u64, shared: Arc<Shared>) -> Self {
        let queue = Arc::new(Queue::new(store));
        let runtime = shared.runtime.clone();
        runtime.spawn(run(store, Arc::clone(&queue), shared));
        Link { queue }
    }

    pub(super) fn push(&self, message: RaftMessage) -> Result<(), Full> {
        let pushed = self.queue.push(message);
        if pushed.is_err() {
            metrics::counter!("esker_transport_dropped_messages_total", "reason" => "full")
                .increment(1);
        }
        pushed
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.queue.clear();
        self.queue.close();
    }
}

async fn run(store: u64, queue: Arc<Queue>, shared: Arc<Shared>) {
    let mut backoff = Backoff::new(FIRST_RETRY, LONGEST_RETRY);
    let mut breaks = Repeated::new();
    // Connects only when there is a message to send, because not every pair of stores shares a
    // region.
    while queue.ready().await {
        let started = Instant::now();
        let broken = send_until_broken(store, &queue, &shared, || {
            if let Some(over) = breaks.recovered(Instant::now()) {
                tracing::info!(store, breaks = over.times, after = ?over.lasted, "the stream to a store is back");
            }
        })
        .await;
        if queue.is_closed() {
            return;
        }
        let dropped = queue.clear();
        metrics::counter!("esker_transport_breaks_total").increment(1);
        if let Some(times) = breaks.failed(Instant::now()) {
            tracing::info!(store, times, dropped, reason = %broken, "the stream to a store broke");
        }
        metrics::counter!("esker_transport_dropped_messages_total", "reason" => "unreachable")
            .increment(dropped as u64);
        // Also if nothing was queued, because messages that the socket had taken may be lost.
        shared.events.unreachable(store);
        if started.elapsed() >= STABLE {
            backoff.reset();
            continue;
        }
        tokio::time::sleep(backoff.step()).await;
        // Messages that came meanwhile are sent on the next connection, and dropped if that fails,
        // too.
    }
}

/// Opens a stream and sends what is queued until the stream or the queue ends. Returns the reason.
/// Calls `settled` once the stream has lived for a while.
async fn send_until_broken(
    store: u64,
    queue: &Arc<Queue>,
    shared: &Arc<Shared>,
    settled: impl FnOnce(),
) -> String {
    let address = match shared.resolver.address(store).await {
        Ok(address) => address,
        Err(reason) => return format!("no address: {reason}"),
    };
    let connection = match channel::connect(&address).await {
        Ok(connection) => connection,
        Err(reason) => return reason,
    };
    metrics::counter!("esker_transport_connections_total").increment(1);
    tracing::debug!(store, %address, "connected to a store");
    let mut client = TransportClient::new(connection).max_encoding_message_size(MAX_MESSAGE_BYTES);
    let batches = batches(store, Arc::clone(queue), shared);
    let mut call = std::pin::pin!(client.raft(batches));
    let ended = tokio::select! {
        ended = &mut call => ended,
        () = tokio::time::sleep(SETTLED) => {
            settled();
            call.await
        }
    };
    match ended {
        Ok(_) => "the store ended it".into(),
        Err(status) => format!("{address}: {}", channel::describe(&status)),
    }
}

/// The queue as a stream of batches.
fn batches(
    to_store: u64,
    queue: Arc<Queue>,
    shared: &Shared,
) -> impl Stream<Item = RaftBatch> + Send + use<> {
    let (cluster_id, from_store) = (shared.cluster_id, shared.self_store);
    stream::unfold(queue, move |queue| async move {
        let messages = queue.take(MAX_BATCH_MESSAGES, MAX_BATCH_BYTES).await?;
        metrics::histogram!("esker_transport_batch_messages").record(messages.len() as f64);
        Some((RaftBatch { cluster_id, from_store, to_store, messages }, queue))
    })
}
