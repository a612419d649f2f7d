//! An engine's statistics, for metrics and for the store's report.

use rocksdb::{ColumnFamily, DB, properties};

use crate::error::{EngineError, Location};

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EngineStatistics {
    pub memtable_bytes: u64,
    pub sst_bytes: u64,
    /// What compaction still has to rewrite. Writes slow down when this is
    /// large.
    pub pending_compaction_bytes: u64,
    /// Bytes in the cache that all engines with the same options share.
    pub block_cache_bytes: u64,
}

impl EngineStatistics {
    pub(crate) fn read(
        db: &DB,
        at: &Location,
        families: &[&ColumnFamily],
    ) -> Result<EngineStatistics, EngineError> {
        let property = |family: &ColumnFamily, name| {
            db.property_int_value_cf(family, name)
                .map(Option::unwrap_or_default)
                .map_err(at.error("a look at its statistics"))
        };
        let mut statistics = EngineStatistics::default();
        for &family in families {
            statistics.memtable_bytes += property(family, properties::SIZE_ALL_MEM_TABLES)?;
            statistics.sst_bytes += property(family, properties::TOTAL_SST_FILES_SIZE)?;
            statistics.pending_compaction_bytes +=
                property(family, properties::ESTIMATE_PENDING_COMPACTION_BYTES)?;
            statistics.block_cache_bytes = property(family, properties::BLOCK_CACHE_USAGE)?;
        }
        Ok(statistics)
    }
}
