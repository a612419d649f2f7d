//! Consistent views of the key-value engine, and iterators over them.
//!
//! RocksDB's snapshots and iterators borrow the database. Ours share its
//! ownership, so that a read can outlive the call that began it and move
//! between threads. An open snapshot keeps deleted data on disk, so hold it for
//! a request or a transfer, not for longer.

use std::mem;
use std::sync::Arc;

use rocksdb::{DBRawIterator, ReadOptions, Snapshot};

use crate::error::EngineError;
use crate::family::Cf;
use crate::kv::{KvShared, get_many};

/// The read-ahead of a scan that does not fill the block cache.
const READAHEAD_BYTES: usize = 2 << 20;

/// All families at one moment. Clones share that moment.
#[derive(Clone)]
pub struct KvSnapshot {
    shared: Arc<SnapshotShared>,
}

/// The fields drop in this order: a field that borrows goes before the field
/// that it borrows from.
struct SnapshotShared {
    /// For point reads at this snapshot.
    read: ReadOptions,
    snapshot: Snapshot<'static>,
    engine: Arc<KvShared>,
}

impl KvSnapshot {
    pub(crate) fn new(engine: Arc<KvShared>) -> KvSnapshot {
        let snapshot = engine.db.snapshot();
        // Safety: the snapshot borrows the database inside `engine`, which the
        // Arc keeps at one address and alive until after the snapshot's drop.
        let snapshot = unsafe { mem::transmute::<Snapshot<'_>, Snapshot<'static>>(snapshot) };
        let mut read = ReadOptions::default();
        read.set_snapshot(&snapshot);
        KvSnapshot { shared: Arc::new(SnapshotShared { read, snapshot, engine }) }
    }

    pub fn get(&self, cf: Cf, key: &[u8]) -> Result<Option<Vec<u8>>, EngineError> {
        self.get_with(cf, key, <[u8]>::to_vec)
    }

    /// Lends the value to `visit` instead of copying it: the value may lie in a
    /// block of the cache.
    pub fn get_with<T>(
        &self,
        cf: Cf,
        key: &[u8],
        visit: impl FnOnce(&[u8]) -> T,
    ) -> Result<Option<T>, EngineError> {
        let SnapshotShared { engine, read, .. } = &*self.shared;
        let value = engine
            .db
            .get_pinned_cf_opt(engine.family(cf), key, read)
            .map_err(engine.at.error("a read"))?;
        Ok(value.map(|value| visit(&value)))
    }

    /// Reads many keys of one family at once, in the order given.
    pub fn get_many<K: AsRef<[u8]>>(
        &self,
        cf: Cf,
        keys: &[K],
    ) -> Result<Vec<Option<Vec<u8>>>, EngineError> {
        get_many(&self.shared.engine, cf, keys, &self.shared.read)
    }

    /// Iterates `[lower, upper)` of a family, or up to the family's end without
    /// an upper bound. A new iterator stands on no pair, so seek first.
    pub fn iter(&self, cf: Cf, lower: &[u8], upper: Option<&[u8]>) -> KvIter {
        self.iter_with(cf, lower, upper, ReadOptions::default())
    }

    /// For a long scan that is not repeated: it leaves the block cache to other
    /// reads.
    pub fn iter_uncached(&self, cf: Cf, lower: &[u8], upper: Option<&[u8]>) -> KvIter {
        let mut options = ReadOptions::default();
        options.fill_cache(false);
        options.set_readahead_size(READAHEAD_BYTES);
        self.iter_with(cf, lower, upper, options)
    }

    fn iter_with(
        &self,
        cf: Cf,
        lower: &[u8],
        upper: Option<&[u8]>,
        mut options: ReadOptions,
    ) -> KvIter {
        let engine = &self.shared.engine;
        options.set_snapshot(&self.shared.snapshot);
        options.set_total_order_seek(true);
        options.set_iterate_lower_bound(lower);
        if let Some(upper) = upper {
            options.set_iterate_upper_bound(upper);
        }
        let raw = engine.db.raw_iterator_cf_opt(engine.family(cf), options);
        // Safety: the iterator borrows the database and the snapshot, which the
        // clone beside it keeps alive until after the iterator's drop.
        let raw = unsafe { mem::transmute::<DBRawIterator<'_>, DBRawIterator<'static>>(raw) };
        KvIter { raw, snapshot: self.clone() }
    }

    pub(crate) fn engine(&self) -> &KvShared {
        &self.shared.engine
    }
}

/// A cursor over a range of one family at one snapshot. The cursor keeps the
/// snapshot open.
///
/// It stands on a pair or on none. [`valid`](Self::valid) returns which, and
/// returns the error of a seek or step that failed. The other calls that need a
/// pair panic without one.
pub struct KvIter {
    /// Dropped before the snapshot that it borrows.
    raw: DBRawIterator<'static>,
    snapshot: KvSnapshot,
}

const NOWHERE: &str = "an iterator was used that stands on no pair: valid() was not asked";

impl KvIter {
    /// Moves to the first key at or after `key`, within the bounds.
    pub fn seek(&mut self, key: &[u8]) {
        self.raw.seek(key);
    }

    /// Moves to the last key at or before `key`, within the bounds.
    pub fn seek_for_prev(&mut self, key: &[u8]) {
        self.raw.seek_for_prev(key);
    }

    pub fn seek_to_first(&mut self) {
        self.raw.seek_to_first();
    }

    pub fn seek_to_last(&mut self) {
        self.raw.seek_to_last();
    }

    pub fn next(&mut self) {
        assert!(self.raw.valid(), "{NOWHERE}");
        self.raw.next();
    }

    pub fn prev(&mut self) {
        assert!(self.raw.valid(), "{NOWHERE}");
        self.raw.prev();
    }

    /// Whether the iterator stands on a pair. `Ok(false)` is the end of the
    /// range. After an error the range may go on.
    pub fn valid(&self) -> Result<bool, EngineError> {
        if self.raw.valid() {
            return Ok(true);
        }
        let at = &self.snapshot.engine().at;
        self.raw.status().map_err(at.error("a scan"))?;
        Ok(false)
    }

    pub fn key(&self) -> &[u8] {
        match self.raw.key() {
            Some(key) => key,
            None => panic!("{NOWHERE}"),
        }
    }

    pub fn value(&self) -> &[u8] {
        match self.raw.value() {
            Some(value) => value,
            None => panic!("{NOWHERE}"),
        }
    }
}
