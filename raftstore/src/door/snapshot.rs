//! Snapshots: the region that one describes, and the pairs that it brings.

use bytes::Bytes;
use esker_engine::Cf;
use esker_model::limits::MAX_COMMAND_BYTES;
use esker_model::{KeyRange, Region};
use esker_raft::SnapshotMeta;

use super::{Fault, check_key};
use crate::apply::decode_snapshot;
use crate::region::configuration;

/// The region that a snapshot describes: what this store would keep as its own.
pub(super) fn check_region(data: Bytes, meta: &SnapshotMeta) -> Result<Region, Fault> {
    let (region, _) = decode_snapshot(data).map_err(Fault::Snapshot)?;
    if region.peers.is_empty() {
        return Err(Fault::Impossible { what: "number of peers", value: 0 });
    }
    // The descriptor is what a restart makes the group's configuration from.
    if configuration(&region) != meta.configuration || meta.configuration.validate().is_err() {
        return Err(Fault::Contradiction("the members of the region and of the group"));
    }
    Ok(region)
}

/// Sees that the pairs of a snapshot are what a region can hold, in their order.
#[derive(Debug, Default)]
pub(crate) struct PairCheck {
    range: KeyRange,
    last: Option<(Cf, Bytes)>,
}

impl PairCheck {
    pub fn within(range: KeyRange) -> PairCheck {
        PairCheck { range, last: None }
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
        if key.is_empty() || !self.range.contains(key) {
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
