//! Between the wire's messages and the words of this crate. What a peer sends is
//! checked here, once.

use bytes::Bytes;
use esker_rpc::proto::{eraftpb, metapb, pdpb};
use thiserror::Error;

use super::checks;
use crate::map::{Label, Store, StoreDescriptor, StoreMemory, StoreState, StoreStats};
use crate::operator::{Order, Seat, Step};
use crate::timestamp::Timestamp;
use crate::types::{
    DownPeer, Epoch, Peer, PeerId, Region, RegionId, RegionReport, Role, StoreId, Traffic,
};

/// What a message lacks or contradicts itself in.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Malformed {
    #[error("the message has no {0}")]
    Missing(&'static str),
    #[error("region {region}: {what}")]
    Region { region: u64, what: &'static str },
    #[error("store {store}: {what}")]
    Store { store: u64, what: &'static str },
    #[error("a safe point of {physical} ms lies in the future: it is {wall_ms} ms")]
    Future { physical: u64, wall_ms: u64 },
}

pub fn region(message: metapb::Region) -> Result<Region, Malformed> {
    let id = message.id;
    let wrong = |what| Malformed::Region { region: id, what };
    if id == 0 {
        return Err(wrong("zero is not an id"));
    }
    let epoch = message.region_epoch.ok_or_else(|| wrong("no epoch"))?;
    if !message.end_key.is_empty() && message.start_key >= message.end_key {
        return Err(wrong("its range is empty"));
    }
    if message.peers.len() > checks::MAX_PEERS {
        return Err(wrong("more peers than a group can have"));
    }
    let peers = message
        .peers
        .iter()
        .map(|message| {
            peer(message).ok_or_else(|| wrong("a peer without ids or with an unknown role"))
        })
        .collect::<Result<Vec<_>, _>>()?;
    let is_twice = |peer: &Peer| {
        let same = |other: &&Peer| other.store == peer.store || other.id == peer.id;
        peers.iter().filter(same).count() > 1
    };
    if peers.iter().any(is_twice) {
        return Err(wrong("two of its peers share a store or an id"));
    }
    let region = Region {
        id: RegionId(id),
        start: message.start_key,
        end: message.end_key,
        epoch: Epoch { conf_ver: epoch.conf_ver, version: epoch.version },
        peers,
    };
    checks::region(&region)?;
    Ok(region)
}

fn peer(message: &metapb::Peer) -> Option<Peer> {
    let role = match metapb::PeerRole::try_from(message.role).ok()? {
        metapb::PeerRole::Voter => Role::Voter,
        metapb::PeerRole::Learner => Role::Learner,
        metapb::PeerRole::IncomingVoter => Role::IncomingVoter,
        metapb::PeerRole::DemotingVoter => Role::DemotingVoter,
    };
    (message.id != 0 && message.store_id != 0).then_some(Peer {
        id: PeerId(message.id),
        store: StoreId(message.store_id),
        role,
        witness: message.is_witness,
    })
}

pub fn report(message: pdpb::RegionHeartbeatRequest) -> Result<RegionReport, Malformed> {
    let region = region(message.region.ok_or(Malformed::Missing("region"))?)?;
    let wrong = |what| Malformed::Region { region: region.id.0, what };
    let leader = message.leader.ok_or_else(|| wrong("no leader"))?;
    let leader = *region
        .peer(PeerId(leader.id))
        .ok_or_else(|| wrong("its leader is not one of its peers"))?;
    let mut report = RegionReport {
        leader,
        region,
        term: message.term,
        down: message
            .down_peers
            .iter()
            .filter_map(|down| {
                let peer = PeerId(down.peer.as_ref()?.id);
                Some(DownPeer { peer, seconds: down.down_seconds })
            })
            .collect(),
        pending: message.pending_peers.iter().map(|peer| PeerId(peer.id)).collect(),
        traffic: Traffic {
            bytes_written: message.bytes_written,
            bytes_read: message.bytes_read,
            keys_written: message.keys_written,
            keys_read: message.keys_read,
        },
        approximate_size: message.approximate_size,
        approximate_keys: message.approximate_keys,
    };
    checks::report(&mut report)?;
    Ok(report)
}

pub fn store_descriptor(message: metapb::Store) -> Result<StoreDescriptor, Malformed> {
    let wrong = |what| Malformed::Store { store: message.id, what };
    if message.id == 0 {
        return Err(wrong("zero is not an id"));
    }
    let state = match metapb::StoreState::try_from(message.state) {
        Ok(metapb::StoreState::Up) => StoreState::Up,
        Ok(metapb::StoreState::Offline) => StoreState::Offline,
        Ok(metapb::StoreState::Tombstone) => StoreState::Tombstone,
        Err(_) => return Err(wrong("an unknown state")),
    };
    let descriptor = StoreDescriptor {
        id: StoreId(message.id),
        address: message.address,
        peer_address: message.peer_address,
        status_address: message.status_address,
        state,
        labels: message
            .labels
            .into_iter()
            .map(|label| Label { key: label.key, value: label.value })
            .collect(),
        version: message.version,
        git_hash: message.git_hash,
        deploy_path: message.deploy_path,
        start_timestamp: message.start_timestamp,
        memory: message.esker_memory.map_or_else(StoreMemory::default, |memory| StoreMemory {
            lineage: memory.lineage,
            generation: memory.generation,
            log_sequence: memory.log_sequence,
            start: memory.start,
        }),
    };
    checks::store(&descriptor)?;
    Ok(descriptor)
}

/// A store's durable part on the wire, and on disk.
pub fn descriptor_message(store: &StoreDescriptor) -> metapb::Store {
    let (state, node_state) = match store.state {
        StoreState::Up => (metapb::StoreState::Up, metapb::NodeState::Serving),
        StoreState::Offline => (metapb::StoreState::Offline, metapb::NodeState::Removing),
        StoreState::Tombstone => (metapb::StoreState::Tombstone, metapb::NodeState::Removed),
    };
    metapb::Store {
        id: store.id.0,
        address: store.address.clone(),
        state: state.into(),
        labels: store
            .labels
            .iter()
            .map(|label| metapb::StoreLabel { key: label.key.clone(), value: label.value.clone() })
            .collect(),
        version: store.version.clone(),
        peer_address: store.peer_address.clone(),
        status_address: store.status_address.clone(),
        git_hash: store.git_hash.clone(),
        start_timestamp: store.start_timestamp,
        deploy_path: store.deploy_path.clone(),
        node_state: node_state.into(),
        esker_memory: (store.memory != StoreMemory::default()).then_some(metapb::StoreMemory {
            lineage: store.memory.lineage,
            generation: store.memory.generation,
            log_sequence: store.memory.log_sequence,
            start: store.memory.start,
        }),
        ..Default::default()
    }
}

/// Nanoseconds in a millisecond.
const NANOS: u64 = 1_000_000;

/// A store on the wire and on disk, with the time of its last heartbeat in nanoseconds.
pub fn store_message(store: &Store) -> metapb::Store {
    let nanos = store.last_heartbeat_ms.saturating_mul(NANOS);
    metapb::Store {
        last_heartbeat: i64::try_from(nanos).unwrap_or(i64::MAX),
        ..descriptor_message(&store.descriptor)
    }
}

/// The time of a store's last heartbeat in milliseconds; zero where there was none.
pub fn last_heartbeat_ms(message: &metapb::Store) -> u64 {
    u64::try_from(message.last_heartbeat).unwrap_or_default() / NANOS
}

pub fn stats(message: &pdpb::StoreStats) -> Result<StoreStats, Malformed> {
    let stats = StoreStats {
        capacity: message.capacity,
        available: message.available,
        used_size: message.used_size,
        region_count: message.region_count,
        sending_snapshots: message.sending_snap_count,
        receiving_snapshots: message.receiving_snap_count,
        applying_snapshots: message.applying_snap_count,
        start_time: message.start_time,
        is_busy: message.is_busy,
        bytes_written: message.bytes_written,
        bytes_read: message.bytes_read,
        keys_written: message.keys_written,
        keys_read: message.keys_read,
        log_sequence: message.esker_log_sequence,
        // One line is shown; what was found is in the store's own log.
        damage: message.esker_damage.chars().take(checks::MAX_TEXT_BYTES).collect(),
        start: message.esker_start,
        generation: message.esker_generation,
    };
    checks::stats(message.store_id, &stats)?;
    Ok(stats)
}

pub fn stats_message(store: &Store) -> pdpb::StoreStats {
    let stats = &store.stats;
    pdpb::StoreStats {
        store_id: store.descriptor.id.0,
        capacity: stats.capacity,
        available: stats.available,
        used_size: stats.used_size,
        region_count: stats.region_count,
        sending_snap_count: stats.sending_snapshots,
        receiving_snap_count: stats.receiving_snapshots,
        applying_snap_count: stats.applying_snapshots,
        start_time: stats.start_time,
        is_busy: stats.is_busy,
        bytes_written: stats.bytes_written,
        bytes_read: stats.bytes_read,
        keys_written: stats.keys_written,
        keys_read: stats.keys_read,
        esker_log_sequence: stats.log_sequence,
        esker_damage: stats.damage.clone(),
        esker_start: stats.start,
        esker_generation: stats.generation,
        ..Default::default()
    }
}

pub fn peer_message(peer: &Peer) -> metapb::Peer {
    let role = match peer.role {
        Role::Voter => metapb::PeerRole::Voter,
        Role::Learner => metapb::PeerRole::Learner,
        Role::IncomingVoter => metapb::PeerRole::IncomingVoter,
        Role::DemotingVoter => metapb::PeerRole::DemotingVoter,
    };
    metapb::Peer {
        id: peer.id.0,
        store_id: peer.store.0,
        role: role.into(),
        is_witness: peer.witness,
    }
}

fn epoch_message(epoch: Epoch) -> metapb::RegionEpoch {
    metapb::RegionEpoch { conf_ver: epoch.conf_ver, version: epoch.version }
}

pub fn region_message(region: &Region) -> metapb::Region {
    metapb::Region {
        id: region.id.0,
        start_key: region.start.clone(),
        end_key: region.end.clone(),
        region_epoch: Some(epoch_message(region.epoch)),
        peers: region.peers.iter().map(peer_message).collect(),
    }
}

pub fn down_messages(report: &RegionReport) -> Vec<pdpb::PeerStats> {
    report
        .down
        .iter()
        .filter_map(|down| {
            Some(pdpb::PeerStats {
                peer: Some(peer_message(report.region.peer(down.peer)?)),
                down_seconds: down.seconds,
            })
        })
        .collect()
}

pub fn pending_messages(report: &RegionReport) -> Vec<metapb::Peer> {
    report.pending.iter().filter_map(|id| report.region.peer(*id).map(peer_message)).collect()
}

pub fn report_message(report: &RegionReport) -> pdpb::Region {
    pdpb::Region {
        region: Some(region_message(&report.region)),
        leader: Some(peer_message(&report.leader)),
        down_peers: down_messages(report),
        pending_peers: pending_messages(report),
    }
}

pub fn timestamp_message(timestamp: Timestamp) -> pdpb::Timestamp {
    pdpb::Timestamp {
        // Both parts are far below 63 bits.
        physical: timestamp.physical().cast_signed(),
        logical: timestamp.logical().cast_signed(),
        suffix_bits: 0,
    }
}

/// What a region's leader is told.
pub fn order(cluster_id: u64, order: &Order) -> pdpb::RegionHeartbeatResponse {
    use eraftpb::ConfChangeType::{AddLearnerNode, AddNode, RemoveNode};
    let change =
        |seat: &Seat, kind: eraftpb::ConfChangeType, role: metapb::PeerRole| pdpb::ChangePeer {
            peer: Some(metapb::Peer {
                id: seat.peer.0,
                store_id: seat.store.0,
                role: role.into(),
                is_witness: false,
            }),
            change_type: kind.into(),
        };
    let voter = |seat| change(seat, AddNode, metapb::PeerRole::Voter);
    let learner = |seat| change(seat, AddLearnerNode, metapb::PeerRole::Learner);
    let changes = match &order.step {
        Step::AddLearner(seat) => Some(vec![learner(seat)]),
        Step::Promote(seat) => Some(vec![voter(seat)]),
        Step::Swap { promote, demote } => Some(vec![voter(promote), learner(demote)]),
        Step::LeaveJoint => Some(Vec::new()),
        Step::Remove(seat) => Some(vec![change(seat, RemoveNode, metapb::PeerRole::Voter)]),
        Step::TransferLeader { .. } => None,
    };
    let transfer_leader = match &order.step {
        Step::TransferLeader { to, .. } => {
            let peer = metapb::Peer { id: to.peer.0, store_id: to.store.0, ..Default::default() };
            Some(pdpb::TransferLeader { peer: Some(peer), peers: vec![peer] })
        }
        _ => None,
    };
    pdpb::RegionHeartbeatResponse {
        header: Some(pdpb::ResponseHeader { cluster_id, error: None }),
        transfer_leader,
        region_id: order.region.0,
        region_epoch: Some(epoch_message(order.epoch)),
        target_peer: Some(peer_message(&order.leader)),
        change_peer_v2: changes.map(|changes| pdpb::ChangePeerV2 { changes }),
        ..Default::default()
    }
}

/// What a region's leader is told to cut it at keys inside of it.
pub fn split_order(
    cluster_id: u64,
    report: &RegionReport,
    keys: Vec<Bytes>,
) -> pdpb::RegionHeartbeatResponse {
    pdpb::RegionHeartbeatResponse {
        header: Some(pdpb::ResponseHeader { cluster_id, error: None }),
        region_id: report.region.id.0,
        region_epoch: Some(epoch_message(report.region.epoch)),
        target_peer: Some(peer_message(&report.leader)),
        split_region: Some(pdpb::SplitRegion { policy: pdpb::CheckPolicy::Usekey.into(), keys }),
        ..Default::default()
    }
}

/// A range as it was asked for. An empty one is an error: nobody means it.
pub fn key_range(start: Bytes, end: Bytes) -> Result<crate::map::KeyRange, Malformed> {
    if !end.is_empty() && start >= end {
        return Err(Malformed::Missing("key between its start and its end"));
    }
    Ok(crate::map::KeyRange { start, end })
}
