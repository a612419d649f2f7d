//! Snapshots: the region that one describes, and the pairs that it brings.

use bytes::Bytes;
use esker_engine::Cf;
use esker_raft::{MAX_PEERS, SnapshotMeta};
use esker_rpc::proto::metapb::{PeerRole, Region};

use super::{Fault, MAX_EPOCH_LEAP, MAX_ID, check_epoch, check_key, check_range};
use crate::apply::decode_snapshot;
use crate::config::MAX_COMMAND_BYTES;
use crate::region::RegionExt;

/// The region that a snapshot describes: what this store would keep as its own.
pub(super) fn check_region(data: Bytes, meta: &SnapshotMeta) -> Result<Region, Fault> {
    let (region, _) = decode_snapshot(data).map_err(Fault::Snapshot)?;
    if !(1..=MAX_ID).contains(&region.id) {
        return Err(Fault::Impossible { what: "region", value: region.id });
    }
    check_epoch(&region.region_epoch.ok_or(Fault::Missing("epoch"))?)?;
    check_range(&region.start_key, &region.end_key)?;
    if !(1..=MAX_PEERS).contains(&region.peers.len()) {
        let value = region.peers.len() as u64;
        return Err(Fault::Impossible { what: "number of peers", value });
    }
    for (at, peer) in region.peers.iter().enumerate() {
        let is_twice = |other: &esker_rpc::proto::metapb::Peer| {
            other.id == peer.id || other.store_id == peer.store_id
        };
        if !(1..=MAX_ID).contains(&peer.id)
            || peer.store_id == 0
            || PeerRole::try_from(peer.role).is_err()
        {
            return Err(Fault::Impossible { what: "peer", value: peer.id });
        }
        if region.peers[..at].iter().any(is_twice) {
            return Err(Fault::Contradiction("two of its peers"));
        }
    }
    // The descriptor is what a restart makes the group's configuration from.
    if region.configuration() != meta.configuration || meta.configuration.validate().is_err() {
        return Err(Fault::Contradiction("the members of the region and of the group"));
    }
    Ok(region)
}

/// Whether `newer` can be what became of `known`, both of the same region.
///
/// Regions are split and never joined: what comes later is a part of what was there
/// before, at a version that is higher if it is a smaller one. Whoever makes regions
/// grow extends this rule.
pub(crate) fn may_follow(known: &Region, newer: &Region) -> bool {
    let (old, new) = (known.epoch(), newer.epoch());
    let leap = |old: u64, new: u64| old <= new && new - old <= MAX_EPOCH_LEAP;
    if !known.is_initialized() {
        return true;
    }
    let same_range = known.start_key == newer.start_key && known.end_key == newer.end_key;
    leap(old.version, new.version)
        && leap(old.conf_ver, new.conf_ver)
        && known.contains_range(&newer.start_key, &newer.end_key)
        && same_range == (old.version == new.version)
}

/// Sees that the pairs of a snapshot are what a region can hold, in their order.
#[derive(Debug, Default)]
pub(crate) struct PairCheck {
    start: Bytes,
    end: Bytes,
    last: Option<(Cf, Bytes)>,
}

impl PairCheck {
    pub fn within(start: Bytes, end: Bytes) -> PairCheck {
        PairCheck { start, end, last: None }
    }

    /// The next pair.
    ///
    /// # Errors
    /// Why it cannot be the next one of this region.
    pub fn next(&mut self, cf: Cf, key: &Bytes, value: &[u8]) -> Result<(), Fault> {
        check_key(key)?;
        if value.len() > MAX_COMMAND_BYTES {
            return Err(Fault::TooLarge { size: value.len(), limit: MAX_COMMAND_BYTES });
        }
        if key.is_empty() || *key < self.start || (!self.end.is_empty() && *key >= self.end) {
            return Err(Fault::OutsideOfRegion);
        }
        let follows = match &self.last {
            Some((last_cf, last)) => cf > *last_cf || (cf == *last_cf && *key > *last),
            None => true,
        };
        if cf == Cf::Meta || !follows {
            return Err(Fault::Contradiction("the order of its pairs"));
        }
        self.last = Some((cf, key.clone()));
        Ok(())
    }
}
