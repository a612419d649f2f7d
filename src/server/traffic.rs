//! What comes in from other stores, passed to the store that it is for.
//!
//! A node may hold two stores: its data store, and the small store on which its placement member
//! keeps its state. Both use one port, and the store id distinguishes them.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use esker_engine::Cf;
use esker_model::{RegionId, StoreId};
use esker_raftstore::door::announced_range;
use esker_raftstore::{SnapshotReceiver, StoreHandle};
use esker_rpc::proto::esker::{RaftMessage, SnapshotHead, SnapshotTail};
use esker_rpc::transport::{RaftHandler, SnapshotError, SnapshotSink};
use parking_lot::RwLock;

struct Local {
    cluster: u64,
    handle: StoreHandle,
    snapshots: PathBuf,
}

/// The stores of this node.
#[derive(Default)]
pub struct Traffic {
    stores: RwLock<HashMap<u64, Arc<Local>>>,
    received: AtomicU64,
}

impl Traffic {
    /// Accepts messages for this store from now on. `snapshots` is the folder in which the store
    /// receives snapshots.
    pub fn add(&self, cluster: u64, handle: StoreHandle, snapshots: PathBuf) {
        let id = handle.store_id().0;
        self.stores.write().insert(id, Arc::new(Local { cluster, handle, snapshots }));
    }

    /// Stops accepting messages for this store.
    pub fn remove(&self, store: u64) {
        self.stores.write().remove(&store);
    }

    /// Stops accepting messages.
    pub fn clear(&self) {
        self.stores.write().clear();
    }

    fn store(&self, id: u64) -> Option<Arc<Local>> {
        self.stores.read().get(&id).cloned()
    }
}

impl RaftHandler for Traffic {
    fn cluster_id(&self, store: u64) -> Option<u64> {
        self.store(store).map(|local| local.cluster)
    }

    fn on_raft(&self, from_store: u64, to_store: u64, message: RaftMessage) {
        // Not under the lock, because this reads the whole message.
        if let Some(local) = self.store(to_store) {
            local.handle.raft_message_from(StoreId(from_store), message);
        }
    }

    fn begin_snapshot(&self, head: SnapshotHead) -> Result<Box<dyn SnapshotSink>, SnapshotError> {
        let local = self
            .store(head.to_store)
            .ok_or_else(|| format!("store {} is not on this node", head.to_store))?;
        let message = head.message.ok_or("the snapshot names no region")?;
        let region = RegionId(message.region_id);
        if local.handle.is_taken(region, &announced_range(&message)?) {
            // Refused before the data is sent, not after.
            return Err(
                format!("another region of store {} has part of its range", head.to_store).into()
            );
        }
        let number = self.received.fetch_add(1, Ordering::Relaxed);
        let stem = format!("{}-from-{}-{number}", message.region_id, head.from_store);
        let from = StoreId(head.from_store);
        let receiver = local.handle.receive_snapshot(from, &message, &local.snapshots, stem)?;
        Ok(Box::new(Incoming { local, message, receiver }))
    }
}

/// One snapshot that is being received.
struct Incoming {
    local: Arc<Local>,
    message: RaftMessage,
    receiver: SnapshotReceiver,
}

impl SnapshotSink for Incoming {
    fn block(&mut self, cf: u32, pairs: Bytes) -> Result<(), SnapshotError> {
        let cf = Cf::from_number(cf).ok_or_else(|| format!("unknown column family {cf}"))?;
        Ok(self.receiver.block(cf, pairs)?)
    }

    fn finish(self: Box<Self>, tail: SnapshotTail) -> Result<(), SnapshotError> {
        let files = self.receiver.finish()?;
        if files.pairs() != tail.pairs {
            let got = files.pairs();
            files.discard();
            return Err(format!("{got} pairs arrived of {}", tail.pairs).into());
        }
        let handle = &self.local.handle;
        handle.snapshot_received(self.message, files.clone()).map_err(|refused| {
            files.discard();
            refused.into()
        })
    }
}
