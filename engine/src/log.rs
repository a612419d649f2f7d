//! The raft log of all groups of a store, and their raft state.
//!
//! Unlike the key-value engine the log **has a WAL**, and [`LogEngine::write`] returns only when
//! the batch is synced. One fsync persists the writes of all groups of the store. A vote or an
//! acknowledgement may leave the store only after that fsync.
//!
//! # Layout
//!
//! Keys sort by kind, group and index; numbers are big-endian. The first byte stands for the kind
//! and the version of its format, so another layout of a record takes another first byte.
//!
//! | key                          | value                                      |
//! |------------------------------|--------------------------------------------|
//! | `01`                         | the mark of the data directory             |
//! | `02` group (8 bytes)         | the group's raft state                     |
//! | `03` group, index (8 bytes)  | the entry                                  |
//! | `04` number (8 bytes)        | a note of the store's journal              |
//!
//! Values are the caller's bytes. RocksDB's checksums guard them: WAL records are checked when the
//! engine opens, a block whenever it is read.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use bytes::Bytes;
use esker_mutants::broken;
use rocksdb::{ColumnFamily, ColumnFamilyDescriptor, DB, DBRawIterator, ReadOptions, WriteOptions};

use crate::damage::Damage;
use crate::error::{EngineError, EngineName, Location};
use crate::family::Cf;
use crate::mark::Mark;
use crate::operations::Operations;
use crate::options::EngineOptions;
use crate::statistics::EngineStatistics;

const MARK: u8 = 0x01;
const STATE: u8 = 0x02;
const ENTRY: u8 = 0x03;
const NOTE: u8 = 0x04;

/// A kind and one number: a group's, or a note's.
const NUMBER_KEY_BYTES: usize = 1 + 8;
const ENTRY_KEY_BYTES: usize = 1 + 8 + 8;

/// The most entries that are deleted one by one. A range deletion is a single record, however long
/// the range, but it slows down every later read of its memtable.
const MAX_POINT_DELETES: u64 = 32;

/// The only family of this instance.
const FAMILY: Cf = Cf::Default;

fn number_key(kind: u8, number: u64) -> [u8; NUMBER_KEY_BYTES] {
    let mut key = [kind; NUMBER_KEY_BYTES];
    key[1..].copy_from_slice(&number.to_be_bytes());
    key
}

fn state_key(group: u64) -> [u8; NUMBER_KEY_BYTES] {
    number_key(STATE, group)
}

fn note_key(number: u64) -> [u8; NUMBER_KEY_BYTES] {
    number_key(NOTE, number)
}

fn entry_key(group: u64, index: u64) -> [u8; ENTRY_KEY_BYTES] {
    let mut key = [ENTRY; ENTRY_KEY_BYTES];
    key[1..9].copy_from_slice(&group.to_be_bytes());
    key[9..].copy_from_slice(&index.to_be_bytes());
    key
}

/// The first key behind all entries of a group.
fn entries_end(group: u64) -> Vec<u8> {
    match group.checked_add(1) {
        Some(next) => entry_key(next, 0).to_vec(),
        None => vec![ENTRY + 1],
    }
}

/// The number in the last eight bytes of a key.
fn last_number(key: &[u8]) -> Option<u64> {
    key.last_chunk().map(|bytes| u64::from_be_bytes(*bytes))
}

/// A handle on the open log. Clones share the log.
#[derive(Clone)]
pub struct LogEngine {
    shared: Arc<LogShared>,
}

struct LogShared {
    db: DB,
    at: Location,
    /// Every change up to this sequence number is synced.
    synced: AtomicU64,
    /// Bytes that were written since the log was opened.
    written: AtomicU64,
}

impl LogShared {
    fn family(&self) -> &ColumnFamily {
        match self.db.cf_handle(FAMILY.name()) {
            Some(handle) => handle,
            None => unreachable!("the raft log opened without its column family"),
        }
    }

    /// An iterator over `[low, high)`.
    fn iter(&self, low: &[u8], high: &[u8]) -> DBRawIterator<'_> {
        let mut options = ReadOptions::default();
        options.set_iterate_lower_bound(low);
        options.set_iterate_upper_bound(high);
        options.set_total_order_seek(true);
        self.db.raw_iterator_cf_opt(self.family(), options)
    }

    fn write(&self, operations: &Operations, sync: bool) -> Result<(), EngineError> {
        let mut options = WriteOptions::default();
        options.set_sync(sync);
        self.db
            .write_opt(operations.to_write_batch(|_| self.family()), &options)
            .map_err(self.at.error("a write"))
    }
}

impl LogEngine {
    /// Opens the log in `dir`, or makes an empty one there.
    pub fn open(dir: &Path, options: &EngineOptions) -> Result<LogEngine, EngineError> {
        let at = Location::new(EngineName::Log, dir);
        let family = ColumnFamilyDescriptor::new(FAMILY.name(), options.log_family());
        let db = DB::open_cf_descriptors(
            &options.log_database(),
            options.environment.database_path(dir),
            [family],
        )
        .map_err(|error| at.open_error(error))?;
        // Everything in a log that was just opened comes from the disk.
        let synced = AtomicU64::new(db.latest_sequence_number());
        let written = AtomicU64::new(0);
        Ok(LogEngine { shared: Arc::new(LogShared { db, at, synced, written }) })
    }

    /// Makes the batch durable, all of it or nothing. After an error the store has to stop, because
    /// it is unknown what is on the disk.
    pub fn write(&self, batch: &LogBatch) -> Result<(), EngineError> {
        if batch.is_empty() {
            return Ok(());
        }
        let started = Instant::now();
        // Everything that any thread wrote before is in the WAL before this batch, and so is synced
        // with it.
        let before = self.shared.db.latest_sequence_number();
        self.shared.write(&batch.0, !broken!(LogIsSynced))?;
        self.shared.synced.fetch_max(before, Ordering::Release);
        self.shared.written.fetch_add(batch.bytes() as u64, Ordering::Relaxed);
        metrics::histogram!("esker_engine_log_write_seconds").record(started.elapsed());
        metrics::counter!("esker_engine_log_write_bytes_total").increment(batch.bytes() as u64);
        Ok(())
    }

    /// The entries `[low, high)` in order, as many as fit into `max_bytes` but at
    /// least one. A missing entry is a [`Gap`](EngineError::Gap).
    pub fn entries(
        &self,
        group: u64,
        low: u64,
        high: u64,
        max_bytes: usize,
    ) -> Result<Vec<(u64, Bytes)>, EngineError> {
        let mut entries = Vec::new();
        let mut bytes = 0;
        let mut iter = self.shared.iter(&entry_key(group, low), &entry_key(group, high));
        iter.seek_to_first();
        for index in low..high {
            let Some((key, value)) = iter.item() else {
                self.check(&iter)?;
                return Err(EngineError::Gap { group, index });
            };
            if key != entry_key(group, index) {
                return Err(EngineError::Gap { group, index });
            }
            bytes += value.len();
            if bytes > max_bytes && !entries.is_empty() {
                break;
            }
            entries.push((index, Bytes::copy_from_slice(value)));
            iter.next();
        }
        Ok(entries)
    }

    pub fn entry(&self, group: u64, index: u64) -> Result<Option<Bytes>, EngineError> {
        self.get(&entry_key(group, index))
    }

    /// The first and last index that a group has, if it has any.
    pub fn bounds(&self, group: u64) -> Result<Option<(u64, u64)>, EngineError> {
        let mut iter = self.shared.iter(&entry_key(group, 0), &entries_end(group));
        iter.seek_to_first();
        let first = iter.key().and_then(last_number);
        self.check(&iter)?;
        iter.seek_to_last();
        let last = iter.key().and_then(last_number);
        self.check(&iter)?;
        Ok(first.zip(last))
    }

    pub fn state(&self, group: u64) -> Result<Option<Bytes>, EngineError> {
        self.get(&state_key(group))
    }

    /// Calls `visit` with every group's state, in ascending order of groups.
    pub fn states(&self, visit: impl FnMut(u64, &[u8])) -> Result<(), EngineError> {
        self.numbered(STATE, "the reading of states", visit)
    }

    /// Calls `visit` with every note of the journal, in the order of their numbers.
    pub fn notes(&self, visit: impl FnMut(u64, &[u8])) -> Result<(), EngineError> {
        self.numbered(NOTE, "the reading of notes", visit)
    }

    fn numbered(
        &self,
        kind: u8,
        reading: &'static str,
        mut visit: impl FnMut(u64, &[u8]),
    ) -> Result<(), EngineError> {
        let mut iter = self.shared.iter(&[kind], &[kind + 1]);
        iter.seek_to_first();
        while let Some((key, value)) = iter.item() {
            let Some(number) = last_number(key).filter(|_| key.len() == NUMBER_KEY_BYTES) else {
                let reason = format!("{} is no key of its kind", key.escape_ascii());
                return Err(self.shared.at.corruption(reading, reason));
            };
            visit(number, value);
            iter.next();
        }
        self.check(&iter)
    }

    /// Drops the notes `[from, to)`. The deletion is not synced: after a crash the notes may be
    /// back.
    pub fn forget_notes(&self, from: u64, to: u64) -> Result<(), EngineError> {
        let mut batch = LogBatch::new();
        batch.delete_numbers(from, to, note_key);
        if batch.is_empty() {
            return Ok(());
        }
        self.shared.write(&batch.0, false)
    }

    /// About the bytes that were written since the log was opened.
    pub fn written_bytes(&self) -> u64 {
        self.shared.written.load(Ordering::Relaxed)
    }

    /// How many handles keep the log open, this one included.
    pub fn holders(&self) -> usize {
        Arc::strong_count(&self.shared)
    }

    /// Whether the log's data was found damaged.
    pub fn damage(&self) -> &Damage {
        &self.shared.at.damage
    }

    /// A sequence number up to which all changes are certainly durable. It grows with every write,
    /// and never goes back unless the log was exchanged for an older copy.
    pub fn sequence(&self) -> u64 {
        self.shared.synced.load(Ordering::Acquire)
    }

    /// The mark of this part of a data directory.
    pub(crate) fn mark(&self) -> Result<Option<Mark>, EngineError> {
        Ok(self.get(&[MARK])?.and_then(|stored| Mark::decode(&stored)))
    }

    /// Durable when this returns.
    pub(crate) fn put_mark(&self, mark: &Mark) -> Result<(), EngineError> {
        let mut batch = LogBatch::new();
        batch.0.put(FAMILY, &[MARK], &mark.encode());
        self.write(&batch)
    }

    /// Whether nothing but a mark was ever written.
    pub(crate) fn is_blank(&self) -> Result<bool, EngineError> {
        let mut iter = self.shared.iter(&[MARK + 1], &[u8::MAX]);
        iter.seek_to_first();
        let blank = iter.item().is_none();
        self.check(&iter)?;
        Ok(blank)
    }

    /// Drops the entries `[from, to)`. The deletion is not synced: after a crash the entries may be
    /// back, which only costs their space.
    pub fn compact(&self, group: u64, from: u64, to: u64) -> Result<(), EngineError> {
        let mut batch = LogBatch::new();
        batch.cut(group, from, to);
        if batch.is_empty() {
            return Ok(());
        }
        self.shared.write(&batch.0, false)
    }

    pub fn statistics(&self) -> Result<EngineStatistics, EngineError> {
        let shared = &self.shared;
        EngineStatistics::read(&shared.db, &shared.at, &[shared.family()])
    }

    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        let value = self
            .shared
            .db
            .get_cf(self.shared.family(), key)
            .map_err(self.shared.at.error("a read"))?;
        Ok(value.map(Bytes::from))
    }

    /// Returns the error, if an iterator stands on no entry because of one.
    fn check(&self, iter: &DBRawIterator<'_>) -> Result<(), EngineError> {
        iter.status().map_err(self.shared.at.error("a scan"))
    }
}

/// Changes to the logs of any number of groups, which become durable together. A later change wins
/// over an earlier one. A batch is plain data in memory, and its caller bounds it by
/// [`bytes`](Self::bytes).
#[derive(Clone, Debug, Default)]
pub struct LogBatch(Operations);

impl LogBatch {
    pub fn new() -> LogBatch {
        LogBatch::default()
    }

    /// Writes an entry, in place of one with the same index.
    pub fn append(&mut self, group: u64, index: u64, entry: &[u8]) {
        self.0.put(FAMILY, &entry_key(group, index), entry);
    }

    /// Deletes the entries `[from, to)`: a stale tail, or what was applied long
    /// ago.
    pub fn cut(&mut self, group: u64, from: u64, to: u64) {
        self.delete_numbers(from, to, |index| entry_key(group, index));
    }

    /// Deletes the keys of the numbers `[from, to)`.
    fn delete_numbers<const N: usize>(&mut self, from: u64, to: u64, key: impl Fn(u64) -> [u8; N]) {
        if to.saturating_sub(from) > MAX_POINT_DELETES {
            self.0.delete_range(FAMILY, &key(from), &key(to));
            return;
        }
        for number in from..to {
            self.0.delete(FAMILY, &key(number));
        }
    }

    /// Writes a note of the store's journal. Numbers ascend, and none is used twice.
    pub fn note(&mut self, number: u64, note: &[u8]) {
        self.0.put(FAMILY, &note_key(number), note);
    }

    pub fn put_state(&mut self, group: u64, state: &[u8]) {
        self.0.put(FAMILY, &state_key(group), state);
    }

    /// Deletes a group: its state and all its entries.
    pub fn remove(&mut self, group: u64) {
        self.0.delete(FAMILY, &state_key(group));
        self.0.delete_range(FAMILY, &entry_key(group, 0), &entries_end(group));
    }

    /// Adds the changes of `other` after these.
    pub fn merge(&mut self, other: &LogBatch) {
        self.0.append(&other.0);
    }

    /// The number of changes; a deleted range is one.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// About the bytes that the batch takes in the WAL.
    pub fn bytes(&self) -> usize {
        self.0.bytes()
    }

    /// Empties the batch and keeps its memory for the next one.
    pub fn clear(&mut self) {
        self.0.clear();
    }
}
