//! What stores and tools send to the placement driver, compared with what is possible.
//!
//! In: a message that `convert` has read. Out: nothing, or [`Malformed`] and no effect. There are
//! two kinds of checks. Bounds ensure that everything kept has a limit, and that no sum of it
//! overflows. Belonging ensures that a store reports only its own regions, with ids that this
//! cluster gave. Whether a range fits the known ones is decided by the map
//! ([`esker_model::may_follow`]). Which process may connect at all is not checked here.

use std::time::Instant;

use esker_model::{DownPeer, PeerId, Region, RegionReport, StoreId, Timestamp, Traffic};
use esker_rpc::repeat::Repeated;
use parking_lot::Mutex;

use super::convert::Malformed;
use crate::cluster::Cluster;
use crate::lead::Lead;
use crate::map::{StoreDescriptor, StoreState, StoreStats};

/// The most bytes, keys or seconds in one report.
pub const MAX_REPORTED: u64 = 1 << 50;
/// Bytes of a store's disk.
pub const MAX_STORE_BYTES: u64 = 1 << 60;
/// The highest sequence number of a store's log, because RocksDB's have 56 bits.
pub const MAX_LOG_SEQUENCE: u64 = 1 << 56;
/// Labels of one store, and the bytes of each of their parts.
pub const MAX_LABELS: usize = 64;
pub const MAX_LABEL_BYTES: usize = 256;
/// Bytes of an address, a version or a path of a store.
pub const MAX_TEXT_BYTES: usize = 1 << 10;
/// How far ahead of this member's clock a time may be, in milliseconds: a day.
pub const MAX_AHEAD_MS: u64 = 24 * 60 * 60 * 1_000;
/// Regions that one split leaves.
pub const MAX_PARTS: usize = 1_025;

/// Checks a well-formed region: it must have peers.
pub fn region(region: &Region) -> Result<(), Malformed> {
    let wrong = |what| Err(Malformed::Region { region: region.id.0, what });
    if region.peers.is_empty() {
        return wrong("no peers");
    }
    Ok(())
}

/// Checks that a report is possible. Removes the parts of it that cannot be used.
pub fn report(report: &mut RegionReport) -> Result<(), Malformed> {
    region(&report.region)?;
    let wrong = |what| Err(Malformed::Region { region: report.region.id.0, what });
    let Traffic { bytes_written, bytes_read, keys_written, keys_read } = report.traffic;
    let numbers = [
        bytes_written,
        bytes_read,
        keys_written,
        keys_read,
        report.approximate_size,
        report.approximate_keys,
    ];
    if numbers.iter().any(|number| *number > MAX_REPORTED) {
        return wrong("more bytes or keys than any store can hold");
    }
    let RegionReport { region, down, pending, .. } = report;
    only_members(region, down, |down| down.peer);
    only_members(region, pending, |peer| *peer);
    for DownPeer { seconds, .. } in down.iter_mut() {
        *seconds = (*seconds).min(MAX_REPORTED);
    }
    Ok(())
}

/// Removes peers that are not the region's, and repetitions.
fn only_members<T>(region: &Region, named: &mut Vec<T>, peer_of: impl Fn(&T) -> PeerId) {
    let mut seen = Vec::new();
    named.retain(|item| {
        let peer = peer_of(item);
        let is_new = region.peer(peer).is_some() && !seen.contains(&peer);
        if is_new {
            seen.push(peer);
        }
        is_new
    });
}

/// Checks that a region belongs to this cluster: its ids were given here, and its stores are known.
pub fn belongs(lead: &Lead, cluster: &Cluster, region: &Region) -> Result<(), Malformed> {
    let wrong = |what| Err(Malformed::Region { region: region.id.0, what });
    let ids = region.peers.iter().map(|peer| peer.id.0).chain([region.id.0]);
    if ids.into_iter().any(|id| !lead.may_have_given(id)) {
        return wrong("an id that this cluster never gave");
    }
    if region.peers.iter().any(|peer| cluster.stores.get(peer.store).is_none()) {
        return wrong("a peer on a store that this cluster does not know");
    }
    Ok(())
}

/// Checks that the store on whose stream a report came may make it: the store leads the region, and
/// has not left the cluster.
pub fn is_senders(
    cluster: &Cluster,
    report: &RegionReport,
    sender: StoreId,
) -> Result<(), Malformed> {
    let wrong = |what| Err(Malformed::Region { region: report.region.id.0, what });
    if report.leader.store != sender {
        return wrong("reported by a store that does not lead it");
    }
    match cluster.stores.get(sender).map(|store| store.descriptor.state) {
        Some(StoreState::Up | StoreState::Offline) => Ok(()),
        Some(StoreState::Tombstone) | None => {
            wrong("reported by a store that is not in the cluster")
        }
    }
}

/// Checks that a store's description of itself is within bounds.
pub fn store(store: &StoreDescriptor) -> Result<(), Malformed> {
    let wrong = |what| Err(Malformed::Store { store: store.id.0, what });
    let texts = [
        &store.address,
        &store.peer_address,
        &store.status_address,
        &store.version,
        &store.git_hash,
        &store.deploy_path,
    ];
    if texts.iter().any(|text| text.len() > MAX_TEXT_BYTES) {
        return wrong("an address, a version or a path that is too long");
    }
    let is_long = |part: &String| part.len() > MAX_LABEL_BYTES;
    if store.labels.len() > MAX_LABELS
        || store.labels.iter().any(|label| is_long(&label.key) || is_long(&label.value))
    {
        return wrong("too many labels, or too long ones");
    }
    if store.memory.log_sequence > MAX_LOG_SEQUENCE {
        return wrong("a log longer than any");
    }
    Ok(())
}

/// Checks that a store's heartbeat describes a possible store.
pub fn stats(store: u64, stats: &StoreStats) -> Result<(), Malformed> {
    let bytes = [stats.capacity, stats.available, stats.used_size];
    let traffic = [stats.bytes_written, stats.bytes_read, stats.keys_written, stats.keys_read];
    if bytes.iter().chain(&traffic).any(|number| *number > MAX_STORE_BYTES) {
        return Err(Malformed::Store { store, what: "more bytes or keys than any disk can hold" });
    }
    if stats.log_sequence > MAX_LOG_SEQUENCE {
        return Err(Malformed::Store { store, what: "a log longer than any" });
    }
    Ok(())
}

/// Checks that a GC safe point is a time that has come or soon will. A safe point that is far ahead
/// could never be taken back, and would let everything be collected.
pub fn safe_point(safe_point: u64, wall_ms: u64) -> Result<(), Malformed> {
    let physical = Timestamp(safe_point).physical();
    if physical > wall_ms.saturating_add(MAX_AHEAD_MS) {
        return Err(Malformed::Future { physical, wall_ms });
    }
    Ok(())
}

/// Logs that a message was refused: once, then at most once in a while, however many come.
pub fn complain(from: Option<StoreId>, why: &dyn std::fmt::Display) {
    static REFUSALS: Mutex<Repeated<Instant>> = Mutex::new(Repeated::new());
    metrics::counter!("esker_placement_reports_refused_total").increment(1);
    let times = REFUSALS.lock().failed(Instant::now());
    if let Some(times) = times {
        tracing::warn!(from = from.map_or(0, |store| store.0), times, "refused a report: {why}");
    }
}
