//! What leaves a store of this node: messages through the transport, reports through a channel.

use std::sync::Arc;

use arc_swap::ArcSwapOption;
use esker_model::{Peer, PeerId, Region, RegionId, RegionReport, StoreId, Term};
use esker_raftstore::{Envelope, Outbox, RegionSnapshotSource, StoreHandle};
use esker_rpc::transport::{
    RaftTransport, SentSnapshot, SnapshotError, SnapshotOutcome, SnapshotPart, SnapshotSource,
    TransportEvents,
};
use futures_util::future::BoxFuture;
use tokio::sync::{mpsc, watch};

use super::known_stores::KnownStores;
use super::member::MemberBook;

/// Reports that may wait for placement. A report that does not fit is made again later.
pub const MAX_WAITING_REPORTS: usize = 16 << 10;

/// A store's report to placement.
#[derive(Debug)]
pub enum Report {
    Region(Box<RegionReport>),
    Split(Vec<Region>),
}

/// The peer that leads a region, for tasks that wait for it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RegionLeader {
    pub term: Term,
    pub leader: Option<Peer>,
    pub here: bool,
}

/// The receiver of a store's reports.
pub enum Audience {
    /// A data store reports to placement, which knows all other stores.
    Placement(mpsc::Sender<Report>, KnownStores),
    /// The placement driver's own store reports the leader to its member.
    Member(watch::Sender<RegionLeader>),
}

impl Audience {
    pub fn report_region(&self, report: RegionReport) {
        if let Audience::Placement(reports, _) = self {
            let _ = reports.try_send(Report::Region(Box::new(report)));
        }
    }

    pub fn report_split(&self, regions: Vec<Region>) {
        if let Audience::Placement(reports, _) = self {
            let _ = reports.try_send(Report::Split(regions));
        }
    }

    pub fn leadership(&self, leader: RegionLeader) {
        if let Audience::Member(leaders) = self {
            leaders.send_replace(leader);
        }
    }

    pub fn knows_store(&self, store: StoreId) -> bool {
        match self {
            Audience::Placement(_, stores) => stores.knows(store),
            Audience::Member(_) => super::member::is_member_store(store),
        }
    }
}

/// The outbox of a store that runs on this node.
pub struct NodeOutbox {
    transport: RaftTransport,
    audience: Audience,
}

impl NodeOutbox {
    pub fn new(transport: RaftTransport, audience: Audience) -> Self {
        NodeOutbox { transport, audience }
    }
}

impl Outbox for NodeOutbox {
    fn send(&self, message: Envelope) {
        // A full queue means that the other store receives less than it is sent. The message is
        // lost.
        let _ = self.transport.send(message.address.to.store.0, message.into_wire());
    }

    fn send_snapshot(&self, message: Envelope, source: RegionSnapshotSource) {
        let to = message.address.to.store.0;
        self.transport.send_snapshot(to, message.into_wire(), Box::new(Outgoing(source)));
    }

    fn report_region(&self, report: RegionReport) {
        self.audience.report_region(report);
    }

    fn report_split(&self, regions: Vec<Region>) {
        self.audience.report_split(regions);
    }

    fn leadership(&self, _region: RegionId, term: Term, leader: Option<Peer>, here: bool) {
        self.audience.leadership(RegionLeader { term, leader, here });
    }

    fn knows_store(&self, store: StoreId) -> bool {
        self.audience.knows_store(store)
    }
}

struct Outgoing(RegionSnapshotSource);

impl SnapshotSource for Outgoing {
    fn next_part(&mut self) -> Result<Option<SnapshotPart>, SnapshotError> {
        Ok(self.0.next_block()?.map(|block| SnapshotPart {
            cf: u32::from(block.cf.number()),
            pairs: block.pairs,
            count: block.count,
        }))
    }
}

/// Reports to a store what became of its traffic. Made before the store, because the store needs
/// the transport and the transport needs this.
#[derive(Default)]
pub struct Events {
    store: ArcSwapOption<StoreHandle>,
}

impl Events {
    pub fn connect(&self, store: StoreHandle) {
        self.store.store(Some(Arc::new(store)));
    }

    /// Releases the store. Connections to other stores end a little later than the store, and must
    /// not keep its directory in use until then.
    pub fn disconnect(&self) {
        self.store.store(None);
    }
}

impl TransportEvents for Events {
    fn unreachable(&self, store: u64) {
        if let Some(handle) = &*self.store.load() {
            handle.unreachable(StoreId(store));
        }
    }

    fn snapshot_outcome(&self, snapshot: SentSnapshot, outcome: SnapshotOutcome) {
        if let Some(handle) = &*self.store.load() {
            let delivered = outcome == SnapshotOutcome::Delivered;
            handle.snapshot_sent(RegionId(snapshot.region), PeerId(snapshot.to_peer), delivered);
        }
    }
}

/// The addresses of stores, as placement knows them.
pub struct PlacementAddresses(pub esker_client::PlacementClient);

impl esker_rpc::transport::AddressResolver for PlacementAddresses {
    fn address(&self, store: u64) -> BoxFuture<'_, Result<String, String>> {
        Box::pin(async move {
            let (store, _) =
                self.0.get_store(StoreId(store)).await.map_err(|error| error.to_string())?;
            Ok(store.address)
        })
    }
}

/// The addresses of the members of the placement driver.
pub struct MemberAddresses(pub Arc<MemberBook>);

impl esker_rpc::transport::AddressResolver for MemberAddresses {
    fn address(&self, store: u64) -> BoxFuture<'_, Result<String, String>> {
        let found = self.0.address_of_store(store);
        Box::pin(
            async move { found.ok_or_else(|| format!("no placement member has store {store}")) },
        )
    }
}
