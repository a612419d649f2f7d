//! What a store puts out, until the network carries it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use esker_model::{Peer, Region, RegionId, RegionReport, StoreId, Term};
use esker_raftstore::{Envelope, Outbox, RegionSnapshotSource};
use parking_lot::Mutex;

/// What a store put out and the network has not carried yet.
#[derive(Default)]
pub struct Sent {
    messages: Mutex<VecDeque<Envelope>>,
    snapshots: Mutex<VecDeque<(Envelope, RegionSnapshotSource)>>,
    pub reports: Mutex<BTreeMap<u64, RegionReport>>,
    /// What was sent since a test began to listen.
    heard: Mutex<Option<Vec<Envelope>>>,
    /// Stores that the cluster does not know.
    pub strangers: Mutex<BTreeSet<StoreId>>,
}

impl Sent {
    /// Messages that the network has not carried yet.
    pub fn waiting(&self) -> usize {
        self.messages.lock().len()
    }

    /// The messages, for the network to carry them.
    pub fn take_messages(&self) -> VecDeque<Envelope> {
        std::mem::take(&mut *self.messages.lock())
    }

    /// The snapshots, for the network to carry them; those of slow regions stay.
    pub fn take_snapshots(
        &self,
        slow: &BTreeSet<RegionId>,
    ) -> VecDeque<(Envelope, RegionSnapshotSource)> {
        let mut waiting = self.snapshots.lock();
        let is_slow = |sent: &(Envelope, _)| slow.contains(&sent.0.address.region);
        let (stay, go) = std::mem::take(&mut *waiting).into_iter().partition(is_slow);
        *waiting = stay;
        go
    }

    /// Whether a snapshot waits for the network.
    pub fn has_snapshot_of(&self, region: u64) -> bool {
        self.snapshots.lock().iter().any(|(sent, _)| sent.address.region == RegionId(region))
    }

    /// What the store has sent since the last call, carried or not; nothing at the first.
    pub fn listen(&self) -> Vec<Envelope> {
        self.heard.lock().replace(Vec::new()).unwrap_or_default()
    }
}

impl Outbox for Sent {
    fn send(&self, message: Envelope) {
        if let Some(heard) = &mut *self.heard.lock() {
            heard.push(message.clone());
        }
        self.messages.lock().push_back(message);
    }

    fn send_snapshot(&self, message: Envelope, source: RegionSnapshotSource) {
        self.snapshots.lock().push_back((message, source));
    }

    fn report_region(&self, report: RegionReport) {
        self.reports.lock().insert(report.region.id.0, report);
    }

    fn report_split(&self, _: Vec<Region>) {}

    fn leadership(&self, _: RegionId, _: Term, _: Option<Peer>, _: bool) {}

    fn knows_store(&self, store: StoreId) -> bool {
        !self.strangers.lock().contains(&store)
    }
}
