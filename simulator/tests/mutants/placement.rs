//! What placement decides, by plain values.

use esker_model::{
    Epoch, KeyRange, Peer, PeerId, Region, RegionId, RegionReport, StoreId, Time, Traffic,
};
use esker_placement::map::{RegionMap, StoreDescriptor, StoreMap, StoreState};
use esker_placement::operator::{OperatorLimits, OperatorSet, Step};
use esker_placement::schedule::{ScheduleConfig, View, replicas};

const NOW: Time = Time::from_millis(10_000_000);
const REGION: RegionId = RegionId(1);
const LOST: StoreId = StoreId(3);

/// A region on the stores 1 to 3, the first of which leads it.
fn report(version: u64) -> RegionReport {
    let peers: Vec<Peer> = (1..=3).map(|id| Peer::voter(PeerId(100 + id), StoreId(id))).collect();
    let leader = peers[0];
    let epoch = Epoch { conf_ver: 1, version };
    RegionReport {
        region: Region { id: REGION, range: KeyRange::all(), epoch, peers },
        leader,
        term: None,
        down: Vec::new(),
        pending: Vec::new(),
        traffic: Traffic::default(),
        approximate_size: 0,
        approximate_keys: 0,
    }
}

/// Whether the replica on a store that is gone leaves before another one votes.
pub fn a_voter_is_removed_before_its_successor_votes() -> bool {
    let mut stores = StoreMap::default();
    for id in (1..=4).map(StoreId) {
        let state = if id == LOST { StoreState::Tombstone } else { StoreState::Up };
        let address = format!("store{id}:20160");
        stores.put(StoreDescriptor { id, address, state, ..StoreDescriptor::default() }, NOW);
    }
    let (report, mut regions) = (report(1), RegionMap::default());
    regions.report(report.clone()).expect("nothing else is known");
    let (operators, config) =
        (OperatorSet::new(OperatorLimits::default()), ScheduleConfig::default());
    let view = View {
        stores: &stores,
        regions: &regions,
        operators: &operators,
        config: &config,
        now: NOW,
    };
    let operator = replicas::check(&view, &report, &mut || Some(PeerId(777)));
    let operator = operator.expect("a store is gone");
    let (steps, _) = operator.steps();
    let leaves =
        steps.iter().position(|step| matches!(step, Step::Remove(seat) if seat.store == LOST));
    let votes = steps.iter().position(|step| matches!(step, Step::Promote(_) | Step::Swap { .. }));
    leaves.expect("it leaves") < votes.expect("another votes")
}

/// Whether a region is known as of an older report, after a newer one.
pub fn an_older_report_wins() -> bool {
    let mut regions = RegionMap::default();
    regions.report(report(3)).expect("nothing else is known");
    let _ = regions.report(report(2));
    regions.get(REGION).is_some_and(|known| known.region.epoch.version == 2)
}
