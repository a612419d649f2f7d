//! Short ways to write reports and stores in this crate's tests.

use bytes::Bytes;
use esker_model::{
    DownPeer, Epoch, KeyRange, Peer, PeerId, Region, RegionId, RegionReport, Role, StoreId, Term,
    Time, Traffic,
};

use crate::map::{StoreDescriptor, StoreMap};

/// The id that the peer of region `region` on store `store` has in tests.
pub fn peer_id(region: u64, store: u64) -> PeerId {
    PeerId(region * 100 + store)
}

/// The keys from `start` to `end`. An empty end means no end.
pub fn range(start: &str, end: &str) -> KeyRange {
    let key = |text: &str| Bytes::copy_from_slice(text.as_bytes());
    KeyRange::new(key(start), Some(key(end)).filter(|end| !end.is_empty())).expect("a range")
}

/// A report under construction. It has one voter, on store 1, which leads.
pub struct ReportBuilder {
    report: RegionReport,
}

/// A report of region `id` over `[start, end)`.
pub fn report(id: u64, start: &str, end: &str) -> ReportBuilder {
    let leader = peer(id, 1, Role::Voter);
    ReportBuilder {
        report: RegionReport {
            region: Region {
                id: RegionId(id),
                range: range(start, end),
                epoch: Epoch { conf_ver: 1, version: 1 },
                peers: vec![leader],
            },
            leader,
            term: None,
            down: Vec::new(),
            pending: Vec::new(),
            traffic: Traffic::default(),
            approximate_size: 10,
            approximate_keys: 1,
        },
    }
}

fn peer(region: u64, store: u64, role: Role) -> Peer {
    Peer { id: peer_id(region, store), store: StoreId(store), role, witness: false }
}

impl ReportBuilder {
    fn id(&self) -> u64 {
        self.report.region.id.0
    }

    pub fn version(mut self, version: u64) -> Self {
        self.report.region.epoch.version = version;
        self
    }

    pub fn conf_ver(mut self, conf_ver: u64) -> Self {
        self.report.region.epoch.conf_ver = conf_ver;
        self
    }

    pub fn term(mut self, term: u64) -> Self {
        self.report.term = Some(Term(term));
        self
    }

    pub fn voters(mut self, stores: &[u64]) -> Self {
        let id = self.id();
        self.report.region.peers =
            stores.iter().map(|store| peer(id, *store, Role::Voter)).collect();
        self.report.leader = self.report.region.peers[0];
        self
    }

    pub fn with(mut self, store: u64, role: Role) -> Self {
        let added = peer(self.id(), store, role);
        self.report.region.peers.push(added);
        self
    }

    pub fn leader(mut self, store: u64) -> Self {
        self.report.leader =
            *self.report.region.peer_on(StoreId(store)).expect("the leader is one of the peers");
        self
    }

    pub fn pending(mut self, store: u64) -> Self {
        let id = peer_id(self.id(), store);
        self.report.pending.push(id);
        self
    }

    pub fn down(mut self, store: u64, seconds: u64) -> Self {
        let peer = peer_id(self.id(), store);
        self.report.down.push(DownPeer { peer, seconds });
        self
    }

    pub fn build(self) -> RegionReport {
        self.report
    }
}

/// Stores `1..=count`, all up and just heard from.
pub fn stores(count: u64, now: Time) -> StoreMap {
    let mut stores = StoreMap::default();
    for id in 1..=count {
        stores.put(
            StoreDescriptor {
                id: StoreId(id),
                address: format!("store-{id}:20160"),
                ..StoreDescriptor::default()
            },
            now,
        );
    }
    stores
}
