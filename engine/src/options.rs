//! How the two RocksDB instances of a store are tuned, in one place.
//!
//! The block cache is shared by both, because a node has one memory. The `kv`
//! instance is tuned for mixed reads and writes of small values. The `log`
//! instance is written in order, read rarely and soon deleted: large memtables
//! so that most entries are gone before they are ever flushed.

use std::sync::{Arc, OnceLock};
use std::thread;

use rocksdb::{
    AsRawPtr, BlockBasedOptions, Cache, DBCompressionType, DBRecoveryMode, LogLevel, Options,
};

use crate::environment::{Environment, MemoryEnv};
use crate::family::Cf;

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;

const BLOOM_BITS_PER_KEY: f64 = 10.0;
const KV_BLOCK_BYTES: usize = 16 * KIB;
const KV_SST_BYTES: u64 = 32 * MIB as u64;
/// The size of level 1 (or the base level) in memtables, so that level 0 moves down in one piece.
const BASE_LEVEL_MEMTABLES: u64 = 4;
/// Memtables per family, the active one included, before writes wait for a flush.
const MEMTABLES: i32 = 4;
const LOG_MEMTABLES: i32 = 3;
/// Reads get slower with every range deletion in a memtable. A memtable with this many is full.
const LOG_RANGE_DELETIONS_PER_MEMTABLE: u32 = 512;
/// Flushes and compactions write out this much at a time rather than all at the
/// end, so that they do not hold up the log's fsync.
const BYTES_PER_BACKGROUND_SYNC: u64 = MIB as u64;
/// RocksDB takes disk space for the log this much at a time, before it is written. By default
/// RocksDB takes 1.1 memtables at once, of which an idle store never uses anything.
const LOG_PREALLOCATION: u64 = 4 * MIB as u64;
/// The same for the list of an instance's files.
const MANIFEST_PREALLOCATION: usize = 64 * KIB;
const INFO_LOG_BYTES: usize = 8 * MIB;
const INFO_LOG_FILES: usize = 4;
/// A simulated store's memory grows in steps of this size.
const MEMORY_ARENA_BYTES: usize = 32 * KIB;

/// The cache of uncompressed blocks. Clones share the cache, which is made when the first engine
/// opens.
#[derive(Clone, Default)]
pub struct BlockCache(Arc<OnceLock<Cache>>);

impl BlockCache {
    fn get(&self, bytes: usize) -> &Cache {
        self.0.get_or_init(|| Cache::new_lru_cache(bytes))
    }
}

#[derive(Clone)]
pub struct EngineOptions {
    pub environment: Environment,
    /// Shared by every engine that is opened with these options or a clone.
    pub block_cache: BlockCache,
    /// The size of `block_cache`, read when the cache is made.
    pub block_cache_bytes: usize,
    /// The size of each memtable of the `kv` instance.
    pub write_buffer_bytes: usize,
    /// The size of each memtable of the `log` instance.
    pub log_write_buffer_bytes: usize,
    /// What the `log` instance takes of the disk at a time, before it is written; 0 is 1.1 memtables.
    pub log_preallocation_bytes: u64,
    /// Flushes and compactions at one time, per instance.
    pub max_background_jobs: i32,
    /// SST files that an instance holds open; it has about a dozen other files besides.
    pub max_open_files: i32,
    /// The `kv` instance does not flush when it closes, as if the process died.
    /// For simulated crashes.
    pub lose_memtables_on_close: bool,
    /// Whether RocksDB compacts by itself. For simulated crashes, which take the files as they are
    /// at one moment, it must not.
    pub compacts: bool,
}

impl Default for EngineOptions {
    /// For a node on a small machine that shares it with other programs.
    fn default() -> Self {
        let cores = thread::available_parallelism().map_or(2, usize::from);
        EngineOptions {
            environment: Environment::Disk,
            block_cache: BlockCache::default(),
            block_cache_bytes: 256 * MIB,
            write_buffer_bytes: 64 * MIB,
            log_write_buffer_bytes: 128 * MIB,
            log_preallocation_bytes: LOG_PREALLOCATION,
            max_background_jobs: cores.clamp(2, 8) as i32,
            max_open_files: 1024,
            lose_memtables_on_close: false,
            compacts: true,
        }
    }
}

impl EngineOptions {
    /// For one of many simulated stores: memory is taken as it is used, and a close is a crash. A
    /// short simulation never fills the memtables, so what a crash loses depends on
    /// [`persist`](crate::KvEngine::persist) alone and not on a background thread.
    pub fn in_memory(memory: MemoryEnv) -> EngineOptions {
        EngineOptions {
            environment: Environment::Memory(memory),
            block_cache_bytes: 8 * MIB,
            write_buffer_bytes: 64 * MIB,
            log_write_buffer_bytes: 64 * MIB,
            max_background_jobs: 2,
            max_open_files: 256,
            lose_memtables_on_close: true,
            ..EngineOptions::default()
        }
    }

    /// The options of a whole instance.
    fn database(&self) -> Options {
        let mut options = Options::default();
        options.create_if_missing(true);
        options.create_missing_column_families(true);
        options.set_paranoid_checks(true);
        options.set_max_background_jobs(self.max_background_jobs);
        options.set_max_open_files(self.max_open_files);
        options.set_bytes_per_sync(BYTES_PER_BACKGROUND_SYNC);
        options.set_manifest_preallocation_size(MANIFEST_PREALLOCATION);
        options.set_keep_log_file_num(INFO_LOG_FILES);
        options.set_max_log_file_size(INFO_LOG_BYTES);
        // Nobody reads the periodic dumps, and they would wake every instance.
        options.set_stats_dump_period_sec(0);
        options.set_stats_persist_period_sec(0);
        if let Environment::Memory(memory) = &self.environment {
            options.set_env(memory.env());
            options.set_log_level(LogLevel::Fatal);
        }
        options
    }

    /// The options that the families of both instances have in common.
    fn family(&self, options: &mut Options, table: &mut BlockBasedOptions) {
        table.set_block_cache(self.block_cache.get(self.block_cache_bytes));
        // Filters and indexes count against the cache, so that its size is the
        // bound that the operator set.
        table.set_cache_index_and_filter_blocks(true);
        table.set_cache_index_and_filter_blocks_with_high_priority(true);
        table.set_pin_l0_filter_and_index_blocks_in_cache(true);
        options.set_block_based_table_factory(table);
        options.set_disable_auto_compactions(!self.compacts);
        options.set_compression_type(DBCompressionType::Lz4);
        options.set_level_compaction_dynamic_level_bytes(true);
        if let Environment::Memory(memory) = &self.environment {
            // Families need this, too: SST files are built without a database around them.
            options.set_env(memory.env());
            options.set_arena_block_size(MEMORY_ARENA_BYTES);
        }
    }

    pub(crate) fn kv_database(&self) -> Options {
        let mut options = self.database();
        // Without a WAL, only this option makes a crash leave one prefix of the writes across all
        // families.
        options.set_atomic_flush(true);
        // Safety: the pointer is used while `options` lives.
        unsafe {
            librocksdb_sys::rocksdb_options_set_avoid_flush_during_shutdown(
                options.as_raw_ptr(),
                u8::from(self.lose_memtables_on_close),
            );
        }
        options
    }

    /// The options of a family, in the database and in SST files that are built beside it.
    pub(crate) fn kv_family(&self, cf: Cf) -> Options {
        let mut options = Options::default();
        let mut table = BlockBasedOptions::default();
        table.set_block_size(KV_BLOCK_BYTES);
        if Cf::DATA.contains(&cf) {
            table.set_bloom_filter(BLOOM_BITS_PER_KEY, false);
            table.set_whole_key_filtering(true);
            table.set_optimize_filters_for_memory(true);
        }
        self.family(&mut options, &mut table);
        options.set_bottommost_compression_type(DBCompressionType::Zstd);
        options.set_write_buffer_size(self.write_buffer_bytes);
        options.set_max_write_buffer_number(MEMTABLES);
        options.set_target_file_size_base(KV_SST_BYTES);
        options.set_max_bytes_for_level_base(self.write_buffer_bytes as u64 * BASE_LEVEL_MEMTABLES);
        options
    }

    pub(crate) fn log_database(&self) -> Options {
        let mut options = self.database();
        // A record that a crash cut short at the very end was never acknowledged;
        // a bad record before that is damage, and the store must not start. WALs
        // are not recycled: the end of a recycled file looks like damage.
        options.set_wal_recovery_mode(DBRecoveryMode::TolerateCorruptedTailRecords);
        // With a single column family this bounds the preallocation and nothing else: a memtable is
        // still flushed when it is full.
        options.set_max_total_wal_size(self.log_preallocation_bytes);
        options
    }

    pub(crate) fn log_family(&self) -> Options {
        let mut options = Options::default();
        let mut table = BlockBasedOptions::default();
        table.set_block_size(KV_BLOCK_BYTES);
        self.family(&mut options, &mut table);
        options.set_write_buffer_size(self.log_write_buffer_bytes);
        options.set_max_write_buffer_number(LOG_MEMTABLES);
        // Most of what is flushed is deleted soon, so the files gather before work is spent on
        // them.
        options.set_level_zero_file_num_compaction_trigger(8);
        options.set_level_zero_slowdown_writes_trigger(32);
        options.set_level_zero_stop_writes_trigger(64);
        options.set_target_file_size_base(self.log_write_buffer_bytes as u64);
        options.set_max_bytes_for_level_base(
            self.log_write_buffer_bytes as u64 * BASE_LEVEL_MEMTABLES,
        );
        // Safety: the pointer is used while `options` lives.
        unsafe {
            librocksdb_sys::rocksdb_options_set_memtable_max_range_deletions(
                options.as_raw_ptr(),
                LOG_RANGE_DELETIONS_PER_MEMTABLE,
            );
        }
        options
    }
}
