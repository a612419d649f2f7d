//! The key-value engine: the applied state of all regions of a store.
//!
//! # What survives
//!
//! It has **no WAL**. The raft log is the truth: every change here comes from a committed entry
//! that is synced there, and the applied index of a region is written in the same batch as the
//! changes. A crash loses the memtables. All families are flushed together ([atomic flush]), so the
//! state after some prefix of the writes survives, and the log replays the rest. An entry may leave
//! the log only when a [point](KvEngine::set_point) that was set behind its effects is durable.
//!
//! [atomic flush]: https://github.com/facebook/rocksdb/wiki/Atomic-flush

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use rocksdb::{
    BottommostLevelCompaction, ColumnFamily, ColumnFamilyDescriptor, CompactOptions, DB,
    FlushOptions, IngestExternalFileOptions, ReadOptions, ReadTier, WriteOptions,
};

use crate::damage::Damage;
use crate::environment::Environment;
use crate::error::{EngineError, EngineName, Location};
use crate::family::Cf;
use crate::mark::Mark;
use crate::operations::{KEYS_END, Operations};
use crate::options::EngineOptions;
use crate::snapshot::KvSnapshot;
use crate::sst::SstFile;
use crate::statistics::EngineStatistics;

/// The mark's key in the family `meta`. It sorts below every record about regions.
const MARK: &[u8] = b"\0mark";
/// The key in the family `meta` of the newest point in the order of the writes.
const POINT: &[u8] = b"\0point";

/// A handle on the open engine. Clones share the engine, which closes when the last handle,
/// snapshot and iterator is dropped.
#[derive(Clone)]
pub struct KvEngine {
    shared: Arc<KvShared>,
}

pub(crate) struct KvShared {
    pub db: DB,
    pub at: Location,
    pub options: EngineOptions,
}

impl KvShared {
    pub fn family(&self, cf: Cf) -> &ColumnFamily {
        match self.db.cf_handle(cf.name()) {
            Some(handle) => handle,
            None => unreachable!("the engine opened without its column family {cf}"),
        }
    }
}

impl KvEngine {
    /// Opens the engine in `dir`, or makes an empty one there.
    pub fn open(dir: &Path, options: &EngineOptions) -> Result<KvEngine, EngineError> {
        let at = Location::new(EngineName::Kv, dir);
        let families =
            Cf::ALL.map(|cf| ColumnFamilyDescriptor::new(cf.name(), options.kv_family(cf)));
        let db = DB::open_cf_descriptors(
            &options.kv_database(),
            options.environment.database_path(dir),
            families,
        )
        .map_err(|error| at.open_error(error))?;
        Ok(KvEngine { shared: Arc::new(KvShared { db, at, options: options.clone() }) })
    }

    pub(crate) fn shared(&self) -> &Arc<KvShared> {
        &self.shared
    }

    /// Makes the whole batch visible at once. The batch is not durable before
    /// [`persist`](Self::persist) or a flush of RocksDB's own.
    pub fn write(&self, batch: &KvBatch) -> Result<(), EngineError> {
        if batch.is_empty() {
            return Ok(());
        }
        let started = Instant::now();
        let mut options = WriteOptions::default();
        options.disable_wal(true);
        let shared = &self.shared;
        let operations = batch.0.to_write_batch(|cf| shared.family(cf));
        shared.db.write_opt(operations, &options).map_err(shared.at.error("a write"))?;
        metrics::histogram!("esker_engine_kv_write_seconds").record(started.elapsed());
        metrics::counter!("esker_engine_kv_write_bytes_total").increment(batch.bytes() as u64);
        Ok(())
    }

    /// How many handles, SST builders and snapshots keep the engine open, this handle included. A
    /// snapshot's clones and iterators count as one with it.
    pub fn holders(&self) -> usize {
        Arc::strong_count(&self.shared)
    }

    /// Whether the engine's data was found damaged.
    pub fn damage(&self) -> &Damage {
        &self.shared.at.damage
    }

    /// Whether the engine's files are on a disk, where other programs see them.
    pub fn is_on_disk(&self) -> bool {
        matches!(self.shared.options.environment, Environment::Disk)
    }

    pub fn get(&self, cf: Cf, key: &[u8]) -> Result<Option<Vec<u8>>, EngineError> {
        let shared = &self.shared;
        shared.db.get_cf(shared.family(cf), key).map_err(shared.at.error("a read"))
    }

    /// Reads what a crash at this moment would leave: flushed data only.
    pub fn get_durable(&self, cf: Cf, key: &[u8]) -> Result<Option<Vec<u8>>, EngineError> {
        let shared = &self.shared;
        let mut options = ReadOptions::default();
        options.set_read_tier(ReadTier::Persisted);
        shared.db.get_cf_opt(shared.family(cf), key, &options).map_err(shared.at.error("a read"))
    }

    /// Sets a point in the order of the writes. When the point is durable, all writes that returned
    /// before this call are. Points ascend.
    pub fn set_point(&self, number: u64) -> Result<(), EngineError> {
        let mut batch = KvBatch::new();
        batch.put(Cf::Meta, POINT, &number.to_be_bytes());
        self.write(&batch)
    }

    /// The newest point that a crash at this moment would leave, or 0. Reads the disk.
    pub fn durable_point(&self) -> Result<u64, EngineError> {
        let stored = self.get_durable(Cf::Meta, POINT)?;
        Ok(stored.and_then(|stored| stored.try_into().ok()).map_or(0, u64::from_be_bytes))
    }

    /// How many changes the engine has seen. It grows with every write.
    pub fn sequence(&self) -> u64 {
        self.shared.db.latest_sequence_number()
    }

    /// Reads many keys of one family at once, in the order given.
    pub fn get_many<K: AsRef<[u8]>>(
        &self,
        cf: Cf,
        keys: &[K],
    ) -> Result<Vec<Option<Vec<u8>>>, EngineError> {
        get_many(&self.shared, cf, keys, &ReadOptions::default())
    }

    /// The mark of this part of a data directory.
    pub(crate) fn mark(&self) -> Result<Option<Mark>, EngineError> {
        Ok(self.get(Cf::Meta, MARK)?.and_then(|stored| Mark::decode(&stored)))
    }

    /// Visible at once; durable with the next [`persist`](Self::persist).
    pub(crate) fn put_mark(&self, mark: &Mark) -> Result<(), EngineError> {
        let mut batch = KvBatch::new();
        batch.put(Cf::Meta, MARK, &mark.encode());
        self.write(&batch)
    }

    /// Whether nothing but a mark was ever written.
    pub(crate) fn is_blank(&self) -> Result<bool, EngineError> {
        let view = self.snapshot();
        for cf in Cf::ALL {
            let mut iter = view.iter(cf, b"", None);
            iter.seek_to_first();
            while iter.valid()? {
                if cf != Cf::Meta || iter.key() != MARK {
                    return Ok(false);
                }
                iter.next();
            }
        }
        Ok(true)
    }

    /// A consistent view of all families as they are now.
    pub fn snapshot(&self) -> KvSnapshot {
        KvSnapshot::new(Arc::clone(&self.shared))
    }

    /// Flushes all families together and waits: every write that returned before
    /// the call is durable after it.
    pub fn persist(&self) -> Result<(), EngineError> {
        let shared = &self.shared;
        let families = Cf::ALL.map(|cf| shared.family(cf));
        let mut options = FlushOptions::default();
        options.set_wait(true);
        shared.db.flush_cfs_opt(&families, &options).map_err(shared.at.error("a flush"))
    }

    /// Adds whole files, made by [`SstBuilder`](crate::SstBuilder) in the same environment. Their
    /// pairs win over everything written before. Files of one family must not overlap. The files
    /// stay at their path until the caller removes them, so that an interrupted ingestion can be
    /// repeated. On a disk the engine links the files and copies no byte.
    ///
    /// Each family's files are durable at once, but the families follow one after the other, and
    /// the files may outlive writes that were made before. So a caller first records its intention
    /// durably, keeps the files until all its writes are durable, and starts over after a crash.
    /// Only memtables that hold a key or a deletion inside the range of a file are flushed, because
    /// what they hold would win over the file.
    pub fn ingest(&self, files: Vec<SstFile>) -> Result<(), EngineError> {
        let shared = &self.shared;
        let mut options = IngestExternalFileOptions::default();
        options.set_move_files(matches!(shared.options.environment, Environment::Disk));
        for cf in Cf::ALL {
            let paths = files.iter().filter(|file| file.cf == cf);
            let paths: Vec<PathBuf> =
                paths.map(|file| self.ingestible(&file.path)).collect::<Result<_, _>>()?;
            if paths.is_empty() {
                continue;
            }
            shared
                .db
                .ingest_external_file_cf_opts(shared.family(cf), &options, paths)
                .map_err(shared.at.error("the ingestion of SST files"))?;
        }
        Ok(())
    }

    /// A path that the engine may move away without a loss for the caller.
    fn ingestible(&self, path: &Path) -> Result<PathBuf, EngineError> {
        if matches!(self.shared.options.environment, Environment::Memory(_)) {
            return Ok(path.to_path_buf());
        }
        let link = path.with_extension("ingest");
        let failed = |error: std::io::Error| EngineError::Sst {
            action: "link",
            path: path.to_path_buf(),
            reason: error.to_string(),
        };
        match std::fs::remove_file(&link) {
            // An earlier attempt was interrupted.
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(error)),
        }
        std::fs::hard_link(path, &link).map_err(failed)?;
        Ok(link)
    }

    /// Frees at once the space of the files that lie wholly inside the range; other data in the
    /// range stays. The deletion is durable at once, and visible in open snapshots.
    ///
    /// Call this **before** a batch deletes the range, never after: a file in the range may hold
    /// the deletion of data in a file that reaches beyond the range, and that data would come back
    /// to life. The deletion survives a crash that loses earlier writes, so first record durably
    /// that the range is dead.
    pub fn delete_files_in_range(
        &self,
        cf: Cf,
        start: &[u8],
        end: Option<&[u8]>,
    ) -> Result<(), EngineError> {
        let last = match end {
            // RocksDB takes the end inclusively, but `end` belongs to the
            // neighbour.
            Some(end) => key_before(end),
            None => KEYS_END.to_vec(),
        };
        if start > last.as_slice() {
            return Ok(());
        }
        let shared = &self.shared;
        shared
            .db
            .delete_file_in_range_cf(shared.family(cf), start, &last)
            .map_err(shared.at.error("the deletion of files"))
    }

    /// Rewrites the range's data down to the last level, which frees the space of deleted data.
    /// Returns when that is done.
    pub fn compact(&self, cf: Cf, start: &[u8], end: Option<&[u8]>) -> Result<(), EngineError> {
        self.persist()?;
        let shared = &self.shared;
        let mut options = CompactOptions::default();
        options.set_bottommost_level_compaction(BottommostLevelCompaction::Force);
        shared.db.compact_range_cf_opt(shared.family(cf), Some(start), end, &options);
        Ok(())
    }

    pub fn statistics(&self) -> Result<EngineStatistics, EngineError> {
        let families = Cf::ALL.map(|cf| self.shared.family(cf));
        EngineStatistics::read(&self.shared.db, &self.shared.at, &families)
    }

    /// Closes the engine as if the process died: the memtables are lost. For tests and simulations
    /// that opened it with `lose_memtables_on_close`. This must be the last handle, and no snapshot
    /// or iterator may be left.
    pub fn close_like_a_crash(self) {
        assert!(
            self.shared.options.lose_memtables_on_close,
            "an engine that keeps its memtables on close cannot close like a crash"
        );
        let shared = Arc::into_inner(self.shared);
        assert!(
            shared.is_some(),
            "a store cannot crash while others still use its key-value engine"
        );
    }
}

pub(crate) fn get_many<K: AsRef<[u8]>>(
    shared: &KvShared,
    cf: Cf,
    keys: &[K],
    options: &ReadOptions,
) -> Result<Vec<Option<Vec<u8>>>, EngineError> {
    let keys = keys.iter().map(AsRef::as_ref);
    shared
        .db
        .batched_multi_get_cf_opt(shared.family(cf), keys, false, options)
        .into_iter()
        .map(|value| match value {
            Ok(value) => Ok(value.map(|value| value.to_vec())),
            Err(error) => Err(shared.at.error("a read")(error)),
        })
        .collect()
}

/// A key just below `key`, with hardly any key between them, or the empty key.
fn key_before(key: &[u8]) -> Vec<u8> {
    /// The greatest key below another one ends in an endless run of 0xff; this stands for that run.
    const RUN: [u8; 16] = [0xff; 16];
    let mut before = key.to_vec();
    match before.pop() {
        None | Some(0) => {}
        Some(last) => {
            before.push(last - 1);
            before.extend_from_slice(&RUN);
        }
    }
    before
}

/// Changes that become visible together, and are lost or kept together. A later change wins over an
/// earlier one. A batch is plain data in memory, and its caller bounds it by
/// [`bytes`](Self::bytes).
#[derive(Clone, Debug, Default)]
pub struct KvBatch(Operations);

impl KvBatch {
    pub fn new() -> KvBatch {
        KvBatch::default()
    }

    pub fn put(&mut self, cf: Cf, key: &[u8], value: &[u8]) {
        self.0.put(cf, key, value);
    }

    pub fn delete(&mut self, cf: Cf, key: &[u8]) {
        self.0.delete(cf, key);
    }

    /// Deletes `[start, end)`; without an end, everything from `start`. An empty or reversed range
    /// deletes nothing.
    pub fn delete_range(&mut self, cf: Cf, start: &[u8], end: Option<&[u8]>) {
        self.0.delete_range(cf, start, end.unwrap_or(&KEYS_END));
    }

    /// Adds the changes of `other` after these.
    pub fn append(&mut self, other: &KvBatch) {
        self.0.append(&other.0);
    }

    /// The number of changes; a deleted range is one.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// About the bytes that the batch takes in a memtable.
    pub fn bytes(&self) -> usize {
        self.0.bytes()
    }

    /// Empties the batch and keeps its memory for the next one.
    pub fn clear(&mut self) {
        self.0.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::key_before;

    #[test]
    fn the_key_before_is_below_but_above_everything_shorter() {
        assert_eq!(key_before(b"a\0"), b"a");
        assert!(key_before(b"b").as_slice() < b"b".as_slice());
        assert!(key_before(b"b").as_slice() > b"azzzz".as_slice());
        assert_eq!(key_before(b""), b"");
    }
}
