//! Conversion between the messages of the wire and the types of this crate. What another process
//! sends is checked here, once.

use esker_model::{Order, Region, RegionReport, StoreId};
use esker_rpc::convert;
use esker_rpc::proto::{metapb, pdpb};
use thiserror::Error;

use super::checks;
use crate::map::{Label, Store, StoreDescriptor, StoreMemory, StoreState, StoreStats};

/// What a message lacks, or what it contradicts itself in.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Malformed {
    #[error(transparent)]
    Wire(#[from] convert::Malformed),
    #[error("region {region}: {what}")]
    Region { region: u64, what: &'static str },
    #[error("store {store}: {what}")]
    Store { store: u64, what: &'static str },
    #[error("a safe point of {physical} ms lies in the future: it is {wall_ms} ms")]
    Future { physical: u64, wall_ms: u64 },
}

pub fn region(message: Option<metapb::Region>) -> Result<Region, Malformed> {
    let region = convert::region(message)?;
    checks::region(&region)?;
    Ok(region)
}

pub fn report(message: pdpb::RegionHeartbeatRequest) -> Result<RegionReport, Malformed> {
    let mut report = RegionReport::try_from(message)?;
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

/// A store's descriptor, in its form on the wire and on disk.
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

/// A store in its form on the wire and on disk, with the time of its last heartbeat in nanoseconds.
pub fn store_message(store: &Store) -> metapb::Store {
    let nanos = store.last_heartbeat_ms.saturating_mul(NANOS);
    metapb::Store {
        last_heartbeat: i64::try_from(nanos).unwrap_or(i64::MAX),
        ..descriptor_message(&store.descriptor)
    }
}

/// The time of a store's last heartbeat in milliseconds. Zero if there was none.
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
        // Only one line is shown. The whole finding is in the store's own log.
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

pub fn report_message(report: &RegionReport) -> pdpb::Region {
    let RegionReport { region, leader, down, pending, .. } = report;
    pdpb::Region {
        region: Some(region.into()),
        leader: Some(leader.into()),
        down_peers: convert::down_messages(region, down),
        pending_peers: convert::pending_messages(region, pending),
    }
}

/// An order for a region's leader, as a message.
pub fn order(cluster_id: u64, order: &Order) -> pdpb::RegionHeartbeatResponse {
    pdpb::RegionHeartbeatResponse {
        header: Some(pdpb::ResponseHeader { cluster_id, error: None }),
        ..order.into()
    }
}
