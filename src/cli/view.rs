//! The printed form of regions and stores: plain data, with keys as text. Serialized, these are the
//! JSON of the commands.

use esker_client::RegionInfo;
use esker_client::admin::{MemberInfo, MemberState};
use esker_model::{Peer, Region, Role};
use esker_rpc::convert::end_key;
use esker_rpc::proto::{esker as wire, metapb};
use esker_rpc::text::Printable;
use serde::Serialize;

use super::key::Text;
use super::output::{Align, table};

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RegionView {
    pub id: u64,
    pub start_key: Text,
    /// Exclusive. Empty when there is no upper bound.
    pub end_key: Text,
    pub epoch: EpochView,
    pub leader: Option<PeerView>,
    pub peers: Vec<PeerView>,
    /// Stores whose replica still has to catch up.
    pub pending: Vec<u64>,
    /// Stores whose replica the leader has not heard from.
    pub down: Vec<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct EpochView {
    pub version: u64,
    pub conf_ver: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PeerView {
    pub id: u64,
    pub store: u64,
    pub role: &'static str,
}

impl RegionView {
    pub fn new(region: Region, leader: Option<&Peer>) -> Self {
        let mut peers: Vec<PeerView> = region.peers.iter().map(PeerView::new).collect();
        peers.sort_by_key(|peer| peer.store);
        RegionView {
            id: region.id.0,
            start_key: Text(region.range.start().clone()),
            end_key: Text(end_key(&region.range)),
            epoch: EpochView { version: region.epoch.version, conf_ver: region.epoch.conf_ver },
            leader: leader.map(PeerView::new),
            peers,
            pending: Vec::new(),
            down: Vec::new(),
        }
    }
}

/// The region as the placement driver knows it.
impl From<RegionInfo> for RegionView {
    fn from(info: RegionInfo) -> Self {
        let store = |id| info.region.peer(id).map(|peer| peer.store.0);
        RegionView {
            down: info.down.iter().filter_map(|down| store(down.peer)).collect(),
            pending: info.pending.iter().filter_map(|id| store(*id)).collect(),
            ..RegionView::new(info.region, info.leader.as_ref())
        }
    }
}

impl PeerView {
    pub fn new(peer: &Peer) -> Self {
        let role = match peer.role {
            Role::Voter if peer.witness => "witness",
            role => role.name(),
        };
        PeerView { id: peer.id.0, store: peer.store.0, role }
    }
}

/// A table of regions.
pub fn region_table(regions: &[RegionView]) -> String {
    let headers = [
        ("REGION", Align::Right),
        ("START", Align::Left),
        ("END", Align::Left),
        ("EPOCH", Align::Left),
        ("LEADER", Align::Right),
        ("STORES", Align::Left),
    ];
    table(
        &headers,
        regions.iter().map(|region| {
            vec![
                region.id.to_string(),
                region.start_key.bound(),
                region.end_key.bound(),
                epoch(region.epoch),
                region.leader.as_ref().map_or("-".to_owned(), |peer| peer.store.to_string()),
                stores(region),
            ]
        }),
    )
}

/// The epoch as `version.conf_ver`.
pub fn epoch(epoch: EpochView) -> String {
    format!("{}.{}", epoch.version, epoch.conf_ver)
}

/// The stores of the peers. Each that is not a plain, live voter is marked.
fn stores(region: &RegionView) -> String {
    let name = |peer: &PeerView| {
        let role = (peer.role != "voter").then_some(peer.role);
        let down = region.down.contains(&peer.store).then_some("down");
        let pending = region.pending.contains(&peer.store).then_some("pending");
        let marks: Vec<_> = [role, down, pending].into_iter().flatten().collect();
        match marks[..] {
            [] => peer.store.to_string(),
            _ => format!("{} ({})", peer.store, marks.join(", ")),
        }
    };
    region.peers.iter().map(name).collect::<Vec<_>>().join(", ")
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct StoreView {
    pub id: u64,
    pub address: String,
    /// `up`, `disconnected` or `down`, by the store's heartbeats. `offline` or `tombstone` if an
    /// operator wants the store gone.
    pub state: &'static str,
    /// Whether the store has been heard from, independent of what an operator wants.
    pub liveness: &'static str,
    pub labels: Vec<LabelView>,
    pub version: String,
    /// Replicas on this store, and those of them that lead their region.
    pub regions: u64,
    pub leaders: u64,
    /// Milliseconds since the store's last heartbeat. None if placement's leader has not had one.
    pub heartbeat_age_ms: Option<u64>,
    /// For how many milliseconds the store has been silent, also if it sent no heartbeat since
    /// placement's leader began to lead.
    pub silent_ms: u64,
    /// The damage that the store found.
    pub damaged: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LabelView {
    pub key: String,
    pub value: String,
}

impl StoreView {
    pub fn new(known: wire::StoreState, regions: &[RegionView]) -> Self {
        let liveness = match known.liveness() {
            wire::StoreLiveness::Alive => "alive",
            wire::StoreLiveness::Disconnected => "disconnected",
            wire::StoreLiveness::Down => "down",
            wire::StoreLiveness::Unknown => "unknown",
        };
        let store = known.store.unwrap_or_default();
        let id = store.id;
        let holds = |region: &&RegionView| region.peers.iter().any(|peer| peer.store == id);
        let leads =
            |region: &&RegionView| region.leader.as_ref().is_some_and(|peer| peer.store == id);
        let label = |label: metapb::StoreLabel| LabelView { key: label.key, value: label.value };
        StoreView {
            id,
            address: store.address,
            state: match metapb::StoreState::try_from(store.state) {
                Ok(metapb::StoreState::Up) if liveness == "alive" => "up",
                Ok(metapb::StoreState::Up) => liveness,
                Ok(metapb::StoreState::Offline) => "offline",
                Ok(metapb::StoreState::Tombstone) => "tombstone",
                Err(_) => "unknown",
            },
            liveness,
            labels: store.labels.into_iter().map(label).collect(),
            version: store.version,
            regions: regions.iter().filter(holds).count() as u64,
            leaders: regions.iter().filter(leads).count() as u64,
            heartbeat_age_ms: known.is_heard.then_some(known.silent_ms),
            silent_ms: known.silent_ms,
            damaged: Some(known.damaged).filter(|damaged| !damaged.is_empty()),
        }
    }

    /// The state in a table, with everything else that is wrong.
    fn state(&self) -> String {
        let silent = (self.state == "offline" && self.liveness != "alive").then_some(self.liveness);
        let damaged = self.damaged.is_some().then_some("damaged");
        let marks: Vec<_> = silent.into_iter().chain(damaged).collect();
        match marks[..] {
            [] => self.state.to_owned(),
            _ => format!("{} ({})", self.state, marks.join(", ")),
        }
    }

    fn heartbeat(&self) -> String {
        match self.heartbeat_age_ms {
            Some(age) => format!("{} ago", duration(age)),
            None => format!("none for {}", duration(self.silent_ms)),
        }
    }
}

/// A table of stores, followed by the reports of those that are damaged.
pub fn store_table(stores: &[StoreView]) -> String {
    let headers = [
        ("STORE", Align::Right),
        ("ADDRESS", Align::Left),
        ("STATE", Align::Left),
        ("REGIONS", Align::Right),
        ("LEADERS", Align::Right),
        ("HEARTBEAT", Align::Right),
        ("LABELS", Align::Left),
        ("VERSION", Align::Left),
    ];
    // A store's report may be any text.
    let plain = |text: &str| Printable(text.as_bytes()).to_string();
    let mut text = table(
        &headers,
        stores.iter().map(|store| {
            let labels: Vec<_> =
                store.labels.iter().map(|label| format!("{}={}", label.key, label.value)).collect();
            vec![
                store.id.to_string(),
                plain(&store.address),
                store.state(),
                store.regions.to_string(),
                store.leaders.to_string(),
                store.heartbeat(),
                plain(&labels.join(",")),
                plain(&store.version),
            ]
        }),
    );
    for store in stores {
        if let Some(damaged) = &store.damaged {
            text += &format!("\n\nstore {} is damaged: {}", store.id, plain(damaged));
        }
    }
    text
}

/// A duration in the largest unit that is precise enough.
fn duration(ms: u64) -> String {
    const MINUTE: u64 = 60_000;
    const HOUR: u64 = 60 * MINUTE;
    const DAY: u64 = 24 * HOUR;
    match ms {
        0..MINUTE => format!("{:.1} s", ms as f64 / 1e3),
        MINUTE..HOUR => format!("{} min", ms / MINUTE),
        HOUR..DAY => format!("{} h {} min", ms / HOUR, ms % HOUR / MINUTE),
        _ => format!("{} d {} h", ms / DAY, ms % DAY / HOUR),
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct MemberView {
    pub id: u64,
    pub name: String,
    pub addresses: Vec<String>,
    pub leader: bool,
    /// What the member is doing, as it reports itself: `up`, `waiting` to be let in, or `silent`.
    pub state: &'static str,
}

impl From<MemberInfo> for MemberView {
    fn from(info: MemberInfo) -> Self {
        let MemberInfo { member, leads, state } = info;
        MemberView {
            id: member.member_id,
            name: member.name,
            // In the form that --placement takes.
            addresses: member
                .client_urls
                .iter()
                .map(|url| url.trim_start_matches("http://").to_owned())
                .collect(),
            leader: leads,
            state: match state {
                MemberState::Up => "up",
                MemberState::Waiting => "waiting",
                MemberState::Silent => "silent",
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use esker_model::{DownPeer, Epoch, KeyRange, PeerId, RegionId, StoreId};

    use super::*;

    fn region() -> Region {
        let end = Some(Bytes::from_static(b"m\x00"));
        Region {
            id: RegionId(4),
            range: KeyRange::new(Bytes::new(), end).expect("a range"),
            epoch: Epoch { conf_ver: 5, version: 2 },
            peers: vec![Peer::voter(PeerId(5), StoreId(1)), Peer::learner(PeerId(6), StoreId(2))],
        }
    }

    #[test]
    fn a_region_prints_its_bounds_epoch_leader_and_stores() {
        let leader = Peer::voter(PeerId(5), StoreId(1));
        let regions = [RegionView::new(region(), Some(&leader)), RegionView::new(region(), None)];
        let text = region_table(&regions);
        let lines: Vec<Vec<_>> =
            text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines[1], ["4", "\"\"", "m\\x00", "2.5", "1", "1,", "2", "(learner)"]);
        assert_eq!(lines[2][4], "-");
    }

    #[test]
    fn a_region_in_json_has_its_keys_as_text() {
        let json = serde_json::to_value(RegionView::new(region(), None)).expect("plain data");
        assert_eq!(json["end_key"], "m\\x00");
        assert_eq!(json["epoch"]["version"], 2);
        assert_eq!(json["leader"], serde_json::Value::Null);
        assert_eq!(json["peers"][1]["role"], "learner");
    }

    #[test]
    fn a_replica_that_is_down_or_behind_is_marked() {
        let info = RegionInfo {
            region: region(),
            leader: None,
            down: vec![DownPeer { peer: PeerId(6), seconds: 9 }],
            pending: vec![PeerId(5)],
        };
        let view = RegionView::from(info);
        assert_eq!((&view.down[..], &view.pending[..]), (&[2][..], &[1][..]));
        assert!(region_table(&[view]).ends_with("1 (pending), 2 (learner, down)"));
    }

    fn state(silent_ms: u64, liveness: wire::StoreLiveness) -> wire::StoreState {
        wire::StoreState {
            store: Some(metapb::Store { id: 1, ..metapb::Store::default() }),
            liveness: liveness.into(),
            silent_ms,
            is_heard: true,
            damaged: String::new(),
        }
    }

    #[test]
    fn a_store_counts_its_replicas_and_leaders_and_tells_how_long_it_has_been_silent() {
        use wire::StoreLiveness::{Alive, Disconnected, Down};
        let leader = Peer::voter(PeerId(5), StoreId(1));
        let regions = [RegionView::new(region(), Some(&leader)), RegionView::new(region(), None)];
        let view = StoreView::new(state(1_500, Alive), &regions);
        assert_eq!((view.regions, view.leaders, view.heartbeat_age_ms), (2, 1, Some(1_500)));
        for (silent, liveness, shown, age) in [
            (1_500, Alive, "up", "1.5 s ago"),
            (20_000, Disconnected, "disconnected", "20.0 s ago"),
            (125_000, Disconnected, "disconnected", "2 min ago"),
            (4_000_000, Down, "down", "1 h 6 min ago"),
            (200_000_000, Down, "down", "2 d 7 h ago"),
        ] {
            let view = StoreView::new(state(silent, liveness), &regions);
            assert_eq!((view.state, view.silent_ms), (shown, silent));
            let text = store_table(&[view]);
            assert!(text.contains(shown) && text.contains(age), "{text}");
        }
        let unheard = wire::StoreState { is_heard: false, ..state(3_000, Alive) };
        let unheard = StoreView::new(unheard, &regions);
        assert_eq!(unheard.heartbeat_age_ms, None);
        assert!(store_table(&[unheard]).contains("none for 3.0 s"));
    }

    #[test]
    fn a_store_that_is_being_emptied_and_one_that_is_damaged_say_so() {
        let mut known = state(30_000, wire::StoreLiveness::Disconnected);
        if let Some(store) = &mut known.store {
            store.state = metapb::StoreState::Offline.into();
        }
        known.damaged = "block 7 of\n000042.sst".to_owned();
        let view = StoreView::new(known, &[]);
        assert_eq!((view.state, view.liveness), ("offline", "disconnected"));
        let text = store_table(&[view]);
        assert!(text.contains("offline (disconnected, damaged)"), "{text}");
        assert!(text.ends_with("store 1 is damaged: block 7 of\\x0A000042.sst"), "{text}");
    }
}
