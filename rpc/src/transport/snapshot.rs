//! Sending snapshots: a few at a time, no faster than allowed, each on a connection of its own.
//!
//! A thread that may block reads the data. A task paces it and passes it on to the connection. The
//! task promises that a receiver which takes nothing more does not keep the thread, the data that it
//! reads, or a place among the snapshots that are sent at once: see [`BLOCK_TIMEOUT`]. It also
//! promises that snapshots for one store leave places for those of others.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::{AcquireError, Semaphore, SemaphorePermit, mpsc};
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

/// Snapshots sent to one store at the same time. So a store that is stuck does not keep all others
/// from getting theirs.
pub const MAX_CONCURRENT_SNAPSHOTS_PER_STORE: usize = 2;

/// Snapshots for one store that may wait to be sent. Further ones fail at once.
pub const MAX_WAITING_SNAPSHOTS_PER_STORE: usize = 32;

/// The rate of all snapshots together, until it is set.
pub const DEFAULT_SNAPSHOT_BYTES_PER_SECOND: u64 = 100 << 20;

/// Blocks read ahead of the one that is passed on to the connection.
const BLOCKS_AHEAD: usize = 4;

/// Blocks passed on that the connection has not taken yet.
const BLOCKS_PASSED_ON: usize = 1;

/// How long finding the receiver's address may take, and how long the receiver may then take no
/// block while one is ready for it. A block is about 512 KiB and at most [`MAX_MESSAGE_BYTES`], so a
/// receiver with a slow disk or a slow network is faster than that, and one whose disk hangs is not.
const BLOCK_TIMEOUT: Duration = Duration::from_secs(60);

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
    started: Mutex<Started>,
    /// [`BLOCK_TIMEOUT`], but for tests.
    block_timeout: Duration,
    bytes_per_second: AtomicU64,
    /// When the next byte may be sent.
    free_at: Mutex<Instant>,
    failures: Mutex<Repeated>,
}

impl Limits {
    pub(super) fn new(bytes_per_second: u64) -> Self {
        Limits {
            running: Semaphore::new(MAX_CONCURRENT_SNAPSHOTS),
            started: Mutex::default(),
            block_timeout: BLOCK_TIMEOUT,
            bytes_per_second: AtomicU64::new(bytes_per_second.max(1)),
            free_at: Mutex::new(Instant::now()),
            failures: Mutex::default(),
        }
    }

    pub(super) fn set_rate(&self, bytes_per_second: u64) {
        self.bytes_per_second.store(bytes_per_second.max(1), Ordering::Relaxed);
    }

    /// Lets a snapshot wait for its turn; `None` if too many do.
    fn admit(&self, store: u64) -> Option<Admitted<'_>> {
        let mut started = self.started.lock();
        let to_store = started.to_stores.get(&store).map_or(0, |to_store| to_store.count);
        if started.count >= MAX_CONCURRENT_SNAPSHOTS + MAX_WAITING_SNAPSHOTS
            || to_store >= MAX_CONCURRENT_SNAPSHOTS_PER_STORE + MAX_WAITING_SNAPSHOTS_PER_STORE
        {
            return None;
        }
        started.count += 1;
        let to_store = started.to_stores.entry(store).or_insert_with(ToStore::new);
        to_store.count += 1;
        let turns = Arc::clone(&to_store.running);
        Some(Admitted { limits: self, store, turns })
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

/// The snapshots that have begun to wait and have not ended.
#[derive(Default)]
struct Started {
    count: usize,
    /// Without the stores that have none.
    to_stores: HashMap<u64, ToStore>,
}

struct ToStore {
    count: usize,
    running: Arc<Semaphore>,
}

impl ToStore {
    fn new() -> Self {
        ToStore { count: 0, running: Arc::new(Semaphore::new(MAX_CONCURRENT_SNAPSHOTS_PER_STORE)) }
    }
}

/// A snapshot that counts as started until this is dropped.
struct Admitted<'a> {
    limits: &'a Limits,
    store: u64,
    /// The turns of the store's snapshots.
    turns: Arc<Semaphore>,
}

impl Admitted<'_> {
    /// Waits for a turn, which lasts until the permits are dropped. The turn among the store's own
    /// snapshots comes first, so one that waits for it takes no turn from another store.
    async fn turn(&self) -> Result<[SemaphorePermit<'_>; 2], AcquireError> {
        Ok([self.turns.acquire().await?, self.limits.running.acquire().await?])
    }
}

impl Drop for Admitted<'_> {
    fn drop(&mut self) {
        let mut started = self.limits.started.lock();
        started.count -= 1;
        if let Some(to_store) = started.to_stores.get_mut(&self.store) {
            to_store.count -= 1;
            if to_store.count == 0 {
                started.to_stores.remove(&self.store);
            }
        }
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
        let result = match limits.admit(to_store) {
            None => Err("too many snapshots are waiting".into()),
            Some(admitted) => match admitted.turn().await {
                Ok(_turn) => send(&shared, to_store, message, source).await,
                Err(closed) => Err(closed.to_string()),
            },
        };
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
    let block_timeout = shared.snapshots.block_timeout;
    let address =
        tokio::time::timeout(block_timeout, shared.resolver.address(to_store))
            .await
            .map_err(|_| format!("no address of store {to_store} within {block_timeout:?}"))??;
    let connection = channel::connect(&address).await?;
    let mut client = TransportClient::new(connection).max_encoding_message_size(MAX_MESSAGE_BYTES);
    let head = SnapshotHead {
        cluster_id: shared.cluster_id,
        from_store: shared.self_store,
        to_store,
        message: Some(message),
    };
    let (parts, read_parts) = mpsc::channel(BLOCKS_AHEAD);
    let reader = tokio::task::spawn_blocking(move || read(head, source, &parts));
    let (chunks, outgoing) = mpsc::channel(BLOCKS_PASSED_ON);
    // Both are dropped at the end of this block, whatever its result is. A cancelled call resets its
    // stream. The reader may be blocked because no one takes its parts. It ends when the other end
    // of their channel is gone.
    let response = {
        let mut call = std::pin::pin!(client.snapshot(ReceiverStream::new(outgoing)));
        let passing_on = pass_on(&shared.snapshots, read_parts, chunks);
        tokio::select! {
            response = &mut call => Ok(response),
            passed_on = passing_on => match passed_on {
                Err(Stuck) => Err(format!("{address}: took no block for {block_timeout:?}")),
                Ok(()) => tokio::time::timeout(TAKE_OVER_TIMEOUT, call)
                    .await
                    .map_err(|_| format!("{address}: no answer within {TAKE_OVER_TIMEOUT:?}")),
            },
        }
    };
    // The place of this snapshot is free only when its data is. A thread that reads cannot be
    // stopped while it waits for this store's own disk.
    let read = reader.await.map_err(|error| error.to_string())?;
    match (read, response) {
        (Ok(bytes), Ok(Ok(_))) => Ok(bytes),
        // If the source failed, the receiver only reports that the data broke off.
        (Err(ReadError::Source(reason)), _) => Err(format!("reading it: {reason}")),
        (_, Err(reason)) => Err(reason),
        (_, Ok(Err(status))) => Err(format!("{address}: {}", channel::describe(&status))),
        (Err(ReadError::StreamEnded), Ok(Ok(_))) => {
            Err(format!("{address}: took over a snapshot before its end"))
        }
    }
}

/// The receiver has taken no block for too long.
#[derive(Debug)]
struct Stuck;

/// Passes parts on to the connection at the allowed rate, until there are no more or the connection
/// takes no more because the call has ended. There is no limit to how long reading and pacing take,
/// but to how long the connection leaves a part that is ready.
async fn pass_on(
    limits: &Limits,
    mut parts: mpsc::Receiver<Part>,
    chunks: mpsc::Sender<SnapshotChunk>,
) -> Result<(), Stuck> {
    while let Some(part) = parts.recv().await {
        if let Part::Block(block) = &part {
            limits.pace(block.pairs.len()).await;
        }
        let sending = chunks.send(SnapshotChunk { part: Some(part) });
        match tokio::time::timeout(limits.block_timeout, sending).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => break,
            Err(_) => return Err(Stuck),
        }
    }
    Ok(())
}

/// Why a snapshot was not passed to the stream as a whole.
enum ReadError {
    Source(SnapshotError),
    /// No one takes more parts. The response, or its absence, has the reason.
    StreamEnded,
}

/// Reads the source into parts, on a thread that may block. Ends early, without a tail, when the
/// source fails or no one takes more parts. The receiver then drops what it has.
fn read(
    head: SnapshotHead,
    mut source: Box<dyn SnapshotSource>,
    parts: &mpsc::Sender<Part>,
) -> Result<u64, ReadError> {
    let gone = |_| ReadError::StreamEnded;
    parts.blocking_send(Part::Head(head)).map_err(gone)?;
    let mut sum = crc32fast::Hasher::new();
    let mut tail = SnapshotTail::default();
    while let Some(part) = source.next_part().map_err(ReadError::Source)? {
        let crc32 = crc32fast::hash(&part.pairs);
        sum.update(&part.pairs);
        tail.pairs += part.count;
        tail.bytes += part.pairs.len() as u64;
        let block = SnapshotBlock { cf: part.cf, pairs: part.pairs, crc32 };
        parts.blocking_send(Part::Block(block)).map_err(gone)?;
    }
    tail.crc32 = sum.finalize();
    let bytes = tail.bytes;
    parts.blocking_send(Part::Tail(tail)).map_err(gone)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests;
