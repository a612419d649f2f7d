//! What leaves a store, as a trait: the sockets are outside of this crate.

use esker_raft::PeerId;
use esker_rpc::proto::esker::RaftMessage;
use esker_rpc::proto::metapb::{Peer, Region};

use crate::ids::{RegionId, StoreId};
use crate::snapshot::RegionSnapshotSource;

/// A leader's report of its region to placement.
#[derive(Clone, Debug, PartialEq)]
pub struct RegionReport {
    pub region: Region,
    pub leader: Peer,
    pub term: u64,
    /// Peers that were not heard of for a while, with the seconds.
    pub down: Vec<(Peer, u64)>,
    /// Peers that are not caught up.
    pub pending: Vec<Peer>,
    pub written_bytes: u64,
    pub written_keys: u64,
    pub read_bytes: u64,
    pub read_keys: u64,
    pub approximate_bytes: u64,
}

/// Where messages and reports go. Called by workers and by the log writer: must not block.
pub trait Outbox: Send + Sync + 'static {
    /// Messages may be lost; the consensus core sends again what matters.
    fn send(&self, to: StoreId, message: RaftMessage);
    /// Streams a snapshot; its outcome comes back as `Notice::SnapshotSent`.
    fn send_snapshot(
        &self,
        to: StoreId,
        peer: PeerId,
        message: RaftMessage,
        source: RegionSnapshotSource,
    );
    fn report_region(&self, report: RegionReport);
    /// Regions as they are after a split, the leader's store says so.
    fn report_split(&self, regions: Vec<Region>);
    /// A region is led by this store (`true`) or no longer is, in `term`.
    fn leadership(&self, region: RegionId, term: u64, leader: Option<Peer>, here: bool);
    /// Whether the cluster knows this store. Asked about stores that speak of a region without
    /// being known as members of it. Who does not know yet finds out and says no: what was
    /// refused in between is sent again. Without a placement driver, every store is known.
    fn knows_store(&self, _store: StoreId) -> bool {
        true
    }
}
