//! What a store finds out about the data of one region: its size, where to cut it, its checksum.
//!
//! [`StoreHandle::checksum`] and [`StoreHandle::middle_keys`] read a great deal and block the
//! calling thread meanwhile.

use bytes::Bytes;
use esker_engine::{Cf, EngineError};
use esker_model::{Epoch, LogIndex, NewRegion, Region, RegionId};

use crate::error::{RequestError, StoreError};
use crate::message::{Admin, ReplicaRole};
use crate::router::StoreHandle;
use crate::state::{applied_in, bounds};

/// The most parts that one request may cut a region into.
pub const MAX_PARTS: u32 = 128;

/// The sum over all that a replica holds of a region. Equal on every replica that has applied the
/// same entries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RegionChecksum {
    /// The entry that the replica had applied last.
    pub applied: LogIndex,
    /// CRC-32 (IEEE) over column families, keys and values, each with its length.
    pub crc32: u32,
    pub pairs: u64,
    /// Of keys and values.
    pub bytes: u64,
}

impl StoreHandle {
    /// Bytes of the region on this store's disk, roughly.
    ///
    /// # Errors
    /// When the engine cannot tell.
    pub fn approximate_size(&self, region: &Region) -> Result<u64, EngineError> {
        let (start, end) = bounds(&region.range);
        self.kv.approximate_size(start, end)
    }

    /// Keys that cut the region into so many parts of about equal size, in ascending order. Fewer
    /// where the region has too few keys.
    ///
    /// # Errors
    /// When that many parts are not possible, or the region holds too few keys to be cut at all.
    pub fn middle_keys(&self, region: &Region, parts: u32) -> Result<Vec<Bytes>, SurveyError> {
        let refused = |reason: String| RequestError::Split { region: region.id, reason };
        if !(2..=MAX_PARTS).contains(&parts) {
            return Err(refused(format!("{parts} parts; 2 to {MAX_PARTS} are possible")).into());
        }
        let (start, end) = bounds(&region.range);
        let keys = self.kv.split_keys(start, end, parts as usize)?;
        if keys.is_empty() {
            return Err(refused("it holds too few keys to be cut into parts".into()).into());
        }
        Ok(keys.into_iter().map(Bytes::from).collect())
    }

    /// The checksum of the region's data on this store.
    ///
    /// # Errors
    /// When the disk fails, or holds what cannot be.
    pub fn checksum(&self, region: &Region) -> Result<RegionChecksum, StoreError> {
        let view = self.kv.snapshot();
        let applied = applied_in(&view, region.id)?;
        let mut hash = crc32fast::Hasher::new();
        let mut sum = RegionChecksum {
            applied: applied.map_or(LogIndex(0), |applied| applied.index),
            ..RegionChecksum::default()
        };
        let (start, end) = bounds(&region.range);
        for cf in Cf::DATA {
            let mut iter = view.iter_uncached(cf, start, end);
            iter.seek_to_first();
            while iter.valid()? {
                hash.update(&[cf.number()]);
                for part in [iter.key(), iter.value()] {
                    hash.update(&(part.len() as u64).to_be_bytes());
                    hash.update(part);
                    sum.bytes += part.len() as u64;
                }
                sum.pairs += 1;
                iter.next();
            }
        }
        sum.crc32 = hash.finalize();
        Ok(sum)
    }

    /// Cuts a region that this store leads at keys that lie inside it, in any order, and returns
    /// the regions that cover the old range then, in key order. `ids` is asked for as many ids of
    /// new regions as there are keys, once it is known that the region is led here.
    ///
    /// # Errors
    /// When the region is not led here, has changed, or cannot be cut there.
    pub async fn split(
        &self,
        region: RegionId,
        epoch: Epoch,
        mut keys: Vec<Bytes>,
        ids: impl AsyncFnOnce(&Region, u32) -> Result<Vec<NewRegion>, String>,
    ) -> Result<Vec<Region>, RequestError> {
        keys.sort();
        keys.dedup();
        let refused = |reason: String| RequestError::Split { region, reason };
        let status = self.status(region).await?;
        if status.role != ReplicaRole::Leader {
            let leader = status.leader.and_then(|leader| status.region.peer(leader).copied());
            return Err(RequestError::NotLeader { region, leader });
        }
        if status.region.epoch != epoch {
            return Err(RequestError::epoch_not_match(&status.region));
        }
        let count = u32::try_from(keys.len()).map_err(|_| refused("too many keys".into()))?;
        let regions = ids(&status.region, count).await.map_err(refused)?;
        Ok(self.admin(region, epoch, Admin::Split { keys, regions }).await?.regions)
    }
}

/// Why a region was not surveyed.
#[derive(Debug, thiserror::Error)]
pub enum SurveyError {
    #[error(transparent)]
    Refused(#[from] RequestError),
    #[error(transparent)]
    Engine(#[from] EngineError),
}
