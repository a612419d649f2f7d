//! RocksDB alone as YCSB's table: what one synced copy on this machine costs.

use std::path::Path;

use bytes::Bytes;
use rocksdb::{
    BlockBasedOptions, Cache, DB, DBCompressionType, Direction, IteratorMode, Options, WriteBatch,
    WriteOptions,
};

use super::{Database, DatabaseError};

/// As large as a store's, unless its settings say otherwise.
const BLOCK_CACHE_BYTES: usize = 256 << 20;
const WRITE_BUFFER_BYTES: usize = 64 << 20;
const BLOOM_BITS_PER_KEY: f64 = 10.0;
const BLOCK_BYTES: usize = 16 << 10;

/// A RocksDB in a directory, each of whose writes is synced before it is answered, and whose memory
/// is a store's.
///
/// Its requests block the thread that makes them, as RocksDB's do: it wants a runtime with a thread
/// for each client.
pub struct BareRocksDb(DB);

impl BareRocksDb {
    /// Opens the RocksDB in `directory`, or makes an empty one there.
    ///
    /// # Errors
    /// What RocksDB says, as one line.
    pub fn open(directory: &Path) -> Result<BareRocksDb, String> {
        let mut table = BlockBasedOptions::default();
        table.set_block_cache(&Cache::new_lru_cache(BLOCK_CACHE_BYTES));
        table.set_cache_index_and_filter_blocks(true);
        table.set_block_size(BLOCK_BYTES);
        table.set_bloom_filter(BLOOM_BITS_PER_KEY, false);
        let mut options = Options::default();
        options.create_if_missing(true);
        options.set_block_based_table_factory(&table);
        options.set_write_buffer_size(WRITE_BUFFER_BYTES);
        options.set_max_write_buffer_number(4);
        options.set_compression_type(DBCompressionType::Lz4);
        options.set_bottommost_compression_type(DBCompressionType::Zstd);
        options.set_level_compaction_dynamic_level_bytes(true);
        DB::open(&options, directory).map(BareRocksDb).map_err(|error| error.to_string())
    }
}

fn failed(error: rocksdb::Error) -> DatabaseError {
    DatabaseError::Request(error.into())
}

fn synced() -> WriteOptions {
    let mut options = WriteOptions::default();
    options.set_sync(true);
    options
}

impl Database for BareRocksDb {
    async fn read(&self, key: Bytes) -> Result<Option<Bytes>, DatabaseError> {
        Ok(self.0.get(key).map_err(failed)?.map(Bytes::from))
    }

    async fn write(&self, key: Bytes, value: Bytes) -> Result<(), DatabaseError> {
        self.0.put_opt(key, value, &synced()).map_err(failed)
    }

    async fn write_batch(&self, records: Vec<(Bytes, Bytes)>) -> Result<(), DatabaseError> {
        let mut batch = WriteBatch::default();
        for (key, value) in records {
            batch.put(key, value);
        }
        self.0.write_opt(batch, &synced()).map_err(failed)
    }

    async fn scan(&self, start: Bytes, limit: u32) -> Result<Vec<(Bytes, Bytes)>, DatabaseError> {
        let from = IteratorMode::From(&start, Direction::Forward);
        let pairs = self.0.iterator(from).take(limit as usize);
        pairs
            .map(|pair| pair.map(|(key, value)| (key.into(), value.into())).map_err(failed))
            .collect()
    }
}
