//! Where a store's messages and reports go. It is a trait, because the sockets are outside of this
//! crate.

use esker_model::{Peer, Region, RegionId, RegionReport, StoreId, Term};

use crate::envelope::Envelope;
use crate::snapshot::RegionSnapshotSource;

/// Where messages and reports go. Called by workers and by the log writer: must not block.
pub trait Outbox: Send + Sync + 'static {
    /// To the store of the message's receiver. Messages may be lost; the consensus core sends again
    /// what matters.
    fn send(&self, message: Envelope);
    /// Streams a snapshot, which `message` announces, to the store of its receiver. The outcome
    /// comes back as `Notice::SnapshotSent`.
    fn send_snapshot(&self, message: Envelope, source: RegionSnapshotSource);
    /// What the leader of a region reports to placement.
    fn report_region(&self, report: RegionReport);
    /// Regions as they are after a split, from the store of their leader.
    fn report_split(&self, regions: Vec<Region>);
    /// The leader of a region, in `term`, as this store's peer knows it. `here`: it is this peer.
    fn leadership(&self, region: RegionId, term: Term, leader: Option<Peer>, here: bool);
    /// Whether the cluster knows this store. Asked about stores that speak of a region without
    /// being known as members of it. An outbox that does not know yet finds out and returns `false`:
    /// what was refused in between is sent again. Without a placement driver, every store is known.
    fn knows_store(&self, _store: StoreId) -> bool {
        true
    }
}
