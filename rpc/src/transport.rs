//! Raft traffic between stores.
//!
//! Outgoing: [`RaftTransport::send`] takes a message from any thread and never blocks. Messages
//! wait in a bounded queue for their store. A task for each store drains its queue into batches on
//! one stream for all regions. If a store cannot be reached, the messages that wait for it are
//! dropped. The region logic is notified, so that it stops streaming entries there, and Raft
//! repeats what matters. Snapshots travel on connections of their own, so that they do not delay
//! heartbeats.
//!
//! Incoming: [`TransportService`] checks that a stream is meant for this cluster and store, checks
//! the checksums of snapshots, and passes everything on to a [`RaftHandler`].
//!
//! Messages from one store to another arrive in the order in which they were sent, or not at all.
//! None arrives twice.

mod link;
mod queue;
mod receive;
mod snapshot;

use std::collections::HashMap;
use std::sync::Arc;

use futures_util::future::BoxFuture;
use parking_lot::RwLock;
use tokio::runtime::Handle;

use crate::proto::esker::RaftMessage;

pub use link::{MAX_BATCH_BYTES, MAX_BATCH_MESSAGES};
pub use queue::{Full, MAX_QUEUED_BYTES, MAX_QUEUED_MESSAGES};
pub use receive::{RaftHandler, SnapshotSink, TransportService};
pub use snapshot::{
    DEFAULT_SNAPSHOT_BYTES_PER_SECOND, MAX_CONCURRENT_SNAPSHOTS,
    MAX_CONCURRENT_SNAPSHOTS_PER_STORE, MAX_WAITING_SNAPSHOTS, MAX_WAITING_SNAPSHOTS_PER_STORE,
    SnapshotPart, SnapshotSource,
};

/// Why a snapshot's data could not be read or taken over. The store defines the errors.
pub type SnapshotError = Box<dyn std::error::Error + Send + Sync>;

/// Where stores listen. Called before every connection attempt, so that a store may move.
pub trait AddressResolver: Send + Sync + 'static {
    /// The `host:port` of a store, or one line about why it is not known.
    fn address(&self, store: u64) -> BoxFuture<'_, Result<String, String>>;
}

/// Events that the region logic must learn of. The transport's tasks call these methods, which must
/// not block.
pub trait TransportEvents: Send + Sync + 'static {
    /// Messages to this store may have been lost. Called at most once per connection attempt.
    fn unreachable(&self, store: u64);

    /// The outcome of a snapshot. Called exactly once for each [`RaftTransport::send_snapshot`].
    fn snapshot_outcome(&self, snapshot: SentSnapshot, outcome: SnapshotOutcome);
}

/// Which snapshot an outcome is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SentSnapshot {
    pub to_store: u64,
    pub region: u64,
    /// The receiving peer.
    pub to_peer: u64,
}

/// Whether the receiver has taken over the whole snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SnapshotOutcome {
    Delivered,
    Failed,
}

/// The sending side of the traffic of one store. Cheap to clone. The tasks behind it end when the
/// last clone is dropped.
#[derive(Clone)]
pub struct RaftTransport {
    shared: Arc<Shared>,
    links: Arc<RwLock<HashMap<u64, link::Link>>>,
}

/// The state that all tasks of a transport share.
struct Shared {
    resolver: Arc<dyn AddressResolver>,
    events: Arc<dyn TransportEvents>,
    self_store: u64,
    cluster_id: u64,
    runtime: Handle,
    snapshots: snapshot::Limits,
}

impl RaftTransport {
    /// A transport that connects only when something is sent. Its tasks run on `runtime`.
    pub fn new(
        resolver: Arc<dyn AddressResolver>,
        self_store: u64,
        cluster_id: u64,
        runtime: Handle,
        events: Arc<dyn TransportEvents>,
    ) -> Self {
        let snapshots = snapshot::Limits::new(DEFAULT_SNAPSHOT_BYTES_PER_SECOND);
        let shared = Shared { resolver, events, self_store, cluster_id, runtime, snapshots };
        RaftTransport { shared: Arc::new(shared), links: Arc::default() }
    }

    /// How fast all snapshots together may be sent, from the next block on.
    pub fn set_snapshot_rate(&self, bytes_per_second: u64) {
        self.shared.snapshots.set_rate(bytes_per_second);
    }

    /// Queues a message for a store. Returns at once. A full queue means that the store receives
    /// less than it is sent. The caller must then treat the message as lost on the way.
    pub fn send(&self, to_store: u64, message: RaftMessage) -> Result<(), Full> {
        if let Some(link) = self.links.read().get(&to_store) {
            return link.push(message);
        }
        self.links
            .write()
            .entry(to_store)
            .or_insert_with(|| link::Link::start(to_store, Arc::clone(&self.shared)))
            .push(message)
    }

    /// Sends a snapshot. `message` is the core's InstallSnapshot, and `source` reads the data.
    /// Returns at once. The outcome comes as an event.
    pub fn send_snapshot(
        &self,
        to_store: u64,
        message: RaftMessage,
        source: Box<dyn SnapshotSource>,
    ) {
        snapshot::start(Arc::clone(&self.shared), to_store, message, source);
    }

    /// Forgets a store that has left the cluster. The messages that wait for it are dropped, and
    /// its connection is closed. A later message would connect again.
    pub fn disconnect(&self, store: u64) {
        self.links.write().remove(&store);
    }
}
