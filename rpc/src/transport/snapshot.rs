//! Sending snapshots: a few at a time, no faster than allowed, each on a connection of its own.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::StreamExt;
use parking_lot::Mutex;
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;

use super::{SentSnapshot, Shared, SnapshotError, SnapshotOutcome};
use crate::channel;
use crate::proto::esker::snapshot_chunk::Part;
use crate::proto::esker::transport_client::TransportClient;
use crate::proto::esker::{RaftMessage, SnapshotBlock, SnapshotChunk, SnapshotHead, SnapshotTail};
use crate::repeat::Repeated;
use crate::server::MAX_MESSAGE_BYTES;

/// Snapshots sent at the same time.
pub const MAX_CONCURRENT_SNAPSHOTS: usize = 4;

/// Snapshots that may wait to be sent. Further ones fail at once, and Raft asks again.
pub const MAX_WAITING_SNAPSHOTS: usize = 64;

/// The rate of all snapshots together, until it is set.
pub const DEFAULT_SNAPSHOT_BYTES_PER_SECOND: u64 = 100 << 20;

/// Blocks read ahead of the socket.
const BLOCKS_AHEAD: usize = 4;

/// How long the receiver may be silent after all data was sent, while it takes the data over.
const TAKE_OVER_TIMEOUT: Duration = Duration::from_secs(120);

/// Pairs of one column family, as a source returns them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotPart {
    pub cf: u32,
    /// Length-prefixed pairs in key order, in the store's encoding.
    pub pairs: Bytes,
    /// The number of pairs.
    pub count: u64,
}

/// Reads a snapshot's data. Called on a thread that may block.
pub trait SnapshotSource: Send + 'static {
    /// The next part, `None` after the last. A part should be a few hundred kilobytes, and must be
    /// under [`MAX_MESSAGE_BYTES`].
    fn next_part(&mut self) -> Result<Option<SnapshotPart>, SnapshotError>;
}

/// The limits and counts that all snapshots of a store share.
pub(super) struct Limits {
    running: Semaphore,
    started: AtomicUsize,
    bytes_per_second: AtomicU64,
    /// When the next byte may be sent.
    free_at: Mutex<Instant>,
    failures: Mutex<Repeated>,
}

impl Limits {
    pub(super) fn new(bytes_per_second: u64) -> Self {
        Limits {
            running: Semaphore::new(MAX_CONCURRENT_SNAPSHOTS),
            started: AtomicUsize::new(0),
            bytes_per_second: AtomicU64::new(bytes_per_second.max(1)),
            free_at: Mutex::new(Instant::now()),
            failures: Mutex::default(),
        }
    }

    pub(super) fn set_rate(&self, bytes_per_second: u64) {
        self.bytes_per_second.store(bytes_per_second.max(1), Ordering::Relaxed);
    }

    /// Waits until this many bytes may be sent.
    async fn pace(&self, bytes: usize) {
        let rate = self.bytes_per_second.load(Ordering::Relaxed) as f64;
        let turn = {
            let mut free_at = self.free_at.lock();
            let turn = (*free_at).max(Instant::now());
            *free_at = turn + Duration::from_secs_f64(bytes as f64 / rate);
            turn
        };
        tokio::time::sleep_until(turn.into()).await;
    }
}

/// Sends one snapshot on tasks of its own.
pub(super) fn start(
    shared: Arc<Shared>,
    to_store: u64,
    message: RaftMessage,
    source: Box<dyn SnapshotSource>,
) {
    let snapshot = SentSnapshot {
        to_store,
        region: message.region_id,
        to_peer: message.to.as_ref().map_or(0, |peer| peer.id),
    };
    let runtime = shared.runtime.clone();
    runtime.spawn(async move {
        let limits = &shared.snapshots;
        let started = limits.started.fetch_add(1, Ordering::AcqRel);
        let result = if started >= MAX_CONCURRENT_SNAPSHOTS + MAX_WAITING_SNAPSHOTS {
            Err("too many snapshots are waiting".into())
        } else {
            match limits.running.acquire().await {
                Ok(_permit) => send(&shared, to_store, message, source).await,
                Err(closed) => Err(closed.to_string()),
            }
        };
        limits.started.fetch_sub(1, Ordering::AcqRel);
        let outcome = match result {
            Ok(bytes) => {
                tracing::info!(?snapshot, bytes, "sent a snapshot");
                if let Some(over) = limits.failures.lock().recovered(Instant::now()) {
                    tracing::info!(times = over.times, lasted = ?over.lasted, "snapshots arrive again");
                }
                metrics::counter!("esker_transport_snapshot_bytes_total").increment(bytes);
                SnapshotOutcome::Delivered
            }
            Err(reason) => {
                // Each snapshot is asked for again, and there are as many as the other store lacks
                // regions.
                if let Some(times) = limits.failures.lock().failed(Instant::now()) {
                    tracing::warn!(?snapshot, times, reason, "could not send a snapshot");
                }
                SnapshotOutcome::Failed
            }
        };
        shared.events.snapshot_outcome(snapshot, outcome);
    });
}

/// Returns the size of the data that was delivered, or why it was not.
async fn send(
    shared: &Arc<Shared>,
    to_store: u64,
    message: RaftMessage,
    source: Box<dyn SnapshotSource>,
) -> Result<u64, String> {
    let address = shared.resolver.address(to_store).await?;
    let connection = channel::connect(&address).await?;
    let mut client = TransportClient::new(connection).max_encoding_message_size(MAX_MESSAGE_BYTES);
    let head = SnapshotHead {
        cluster_id: shared.cluster_id,
        from_store: shared.self_store,
        to_store,
        message: Some(message),
    };
    let (chunks, outgoing) = mpsc::channel(BLOCKS_AHEAD);
    let mut reader = tokio::task::spawn_blocking(move || read(head, source, &chunks));
    let pacer = Arc::clone(shared);
    let paced = ReceiverStream::new(outgoing).then(move |part: Part| {
        let shared = Arc::clone(&pacer);
        async move {
            if let Part::Block(block) = &part {
                shared.snapshots.pace(block.pairs.len()).await;
            }
            SnapshotChunk { part: Some(part) }
        }
    });
    let mut call = Box::pin(client.snapshot(paced));
    // There is no limit to how long the paced blocks take, but to the silence after the last one.
    let mut read = None;
    let response = loop {
        tokio::select! {
            response = &mut call => break response,
            done = &mut reader, if read.is_none() => read = Some(done),
            () = tokio::time::sleep(TAKE_OVER_TIMEOUT), if read.is_some() => {
                return Err(format!("{address}: no answer within {TAKE_OVER_TIMEOUT:?}"));
            }
        }
    };
    // Ends the reader, in case the receiver stopped before the end.
    drop(call);
    let read = match read {
        Some(read) => read,
        None => reader.await,
    };
    match (read.map_err(|error| error.to_string())?, response) {
        (Ok(bytes), Ok(_)) => Ok(bytes),
        // If the source failed, the receiver only reports that the data broke off.
        (Err(ReadError::Source(reason)), _) => Err(format!("reading it: {reason}")),
        (_, Err(status)) => Err(format!("{address}: {}", channel::describe(&status))),
        (Err(ReadError::StreamEnded), Ok(_)) => {
            Err(format!("{address}: took over a snapshot before its end"))
        }
    }
}

/// Why a snapshot was not passed to the stream as a whole.
enum ReadError {
    Source(SnapshotError),
    /// The stream takes no more chunks. The response has the reason.
    StreamEnded,
}

/// Reads the source into chunks, on a thread that may block. Ends early, without a tail, when the
/// source fails or the stream takes no more chunks. The receiver then drops what it has.
fn read(
    head: SnapshotHead,
    mut source: Box<dyn SnapshotSource>,
    chunks: &mpsc::Sender<Part>,
) -> Result<u64, ReadError> {
    let gone = |_| ReadError::StreamEnded;
    chunks.blocking_send(Part::Head(head)).map_err(gone)?;
    let mut sum = crc32fast::Hasher::new();
    let mut tail = SnapshotTail::default();
    while let Some(part) = source.next_part().map_err(ReadError::Source)? {
        let crc32 = crc32fast::hash(&part.pairs);
        sum.update(&part.pairs);
        tail.pairs += part.count;
        tail.bytes += part.pairs.len() as u64;
        let block = SnapshotBlock { cf: part.cf, pairs: part.pairs, crc32 };
        chunks.blocking_send(Part::Block(block)).map_err(gone)?;
    }
    tail.crc32 = sum.finalize();
    let bytes = tail.bytes;
    chunks.blocking_send(Part::Tail(tail)).map_err(gone)?;
    Ok(bytes)
}
