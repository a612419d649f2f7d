//! The log as the core sees it: the newest entries in memory, the older ones behind a
//! [`LogReader`], and the index that each stage of processing has reached.
//!
//! ```text
//!  compacted      applied  emitted   commit  persisted  handed   last
//!  ────┤·······──────┤────────┤─────────┤────────┤─────────┤───────┤
//!   gone    reader      with the driver    …        being written
//! ```
//!
//! Promises: A committed entry is never replaced. An entry is emitted for application once, and
//! only when it is committed and durable on this peer. A notice that entries became durable never
//! counts for entries that replaced them.

use std::collections::VecDeque;

use thiserror::Error;

use crate::entries::{Cache, Entries};
use crate::rules::broken;
use crate::types::{Entry, LogIndex, Payload, Term};

/// Bytes of committed entries in one [`crate::Ready`], at least one entry.
pub const MAX_COMMITTED_BYTES: usize = 1 << 20;

/// Bytes of committed entries that the driver has received and not yet reported as applied.
pub const MAX_APPLYING_BYTES: usize = 64 << 20;

/// Entries that are durable and not applied stay in memory up to this many times
/// [`crate::Config::max_entry_cache_bytes`]. Beyond that they are read back from the disk.
pub const UNAPPLIED_CACHES: usize = 8;

/// The driver's log, lent to the core for entries it no longer holds.
pub trait LogReader {
    /// The entries in `[low, high)`: at least one, and no more than fit in `max_bytes` beyond the
    /// first.
    ///
    /// # Errors
    /// [`LogReadError::Compacted`] if `low` is gone, [`LogReadError::Failed`] otherwise.
    fn entries(
        &self,
        low: LogIndex,
        high: LogIndex,
        max_bytes: usize,
    ) -> Result<Vec<Entry>, LogReadError>;

    /// The term of the entry at `index`; `None` if the log does not have that entry.
    ///
    /// # Errors
    /// [`LogReadError::Failed`].
    fn term(&self, index: LogIndex) -> Result<Option<Term>, LogReadError>;
}

/// Why the log could not be read.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum LogReadError {
    /// The entry is before the beginning of the log.
    #[error("log entry {index} has been compacted")]
    Compacted {
        /// The entry.
        index: LogIndex,
    },
    /// The entry should be there. The driver must stop the store, because carrying on would lose
    /// data.
    #[error("log entry {index} cannot be read: {reason}")]
    Failed {
        /// The entry.
        index: LogIndex,
        /// What went wrong.
        reason: String,
    },
}

/// What became durable when the write of one Ready finishes.
#[derive(Clone, Copy, Debug)]
struct Write {
    number: u64,
    last: LogIndex,
}

#[derive(Debug)]
pub(crate) struct Log<R> {
    reader: R,
    /// The last index that the log no longer has, and its term.
    compacted: (LogIndex, Term),
    last: (LogIndex, Term),
    /// The newest entries; they end at `last` unless there are none.
    cache: Cache,
    max_cache_bytes: usize,
    /// The last index that was handed out to be written.
    handed: LogIndex,
    /// The last index that is known to be durable.
    persisted: LogIndex,
    /// Writes that have not been reported as finished.
    writes: VecDeque<Write>,
    commit: LogIndex,
    /// The last index that was handed out to be applied.
    emitted: LogIndex,
    applied: LogIndex,
    /// The ends and sizes of batches that were emitted and are not wholly applied.
    applying: VecDeque<(LogIndex, usize)>,
    applying_bytes: usize,
    /// No change of members lies beyond this index, as far as this peer knows.
    change_horizon: LogIndex,
}

impl<R: LogReader> Log<R> {
    pub fn new(
        reader: R,
        compacted: (LogIndex, Term),
        last: (LogIndex, Term),
        commit: LogIndex,
        applied: LogIndex,
        max_cache_bytes: usize,
    ) -> Self {
        Log {
            reader,
            compacted,
            last,
            cache: Cache::default(),
            max_cache_bytes,
            handed: last.0,
            persisted: last.0,
            writes: VecDeque::new(),
            commit,
            emitted: applied,
            applied,
            applying: VecDeque::new(),
            applying_bytes: 0,
            // The tail was not read, so assume that it ends with a change of members.
            change_horizon: last.0,
        }
    }

    pub fn reader(&self) -> &R {
        &self.reader
    }

    pub fn first_index(&self) -> LogIndex {
        self.compacted.0.next()
    }

    pub fn last(&self) -> (LogIndex, Term) {
        self.last
    }

    pub fn last_index(&self) -> LogIndex {
        self.last.0
    }

    pub fn commit(&self) -> LogIndex {
        self.commit
    }

    pub fn applied(&self) -> LogIndex {
        self.applied
    }

    pub fn persisted(&self) -> LogIndex {
        self.persisted
    }

    pub fn change_horizon(&self) -> LogIndex {
        self.change_horizon
    }

    fn cache_first(&self) -> LogIndex {
        self.cache.first_index().unwrap_or(self.last.0.next())
    }

    /// The term at `index`; `None` beyond either end.
    #[inline]
    pub fn term(&self, index: LogIndex) -> Result<Option<Term>, LogReadError> {
        if index == self.last.0 {
            return Ok(Some(self.last.1));
        }
        self.term_before_last(index)
    }

    fn term_before_last(&self, index: LogIndex) -> Result<Option<Term>, LogReadError> {
        if index == self.compacted.0 {
            return Ok(Some(self.compacted.1));
        }
        if index < self.compacted.0 || index > self.last.0 {
            return Ok(None);
        }
        match self.cache.get(index) {
            Some(entry) => Ok(Some(entry.term)),
            None => match self.reader.term(index)? {
                Some(term) => Ok(Some(term)),
                None => Err(LogReadError::Failed { index, reason: "it is missing".into() }),
            },
        }
    }

    #[inline]
    pub fn matches(&self, index: LogIndex, term: Term) -> Result<bool, LogReadError> {
        Ok(self.term(index)? == Some(term))
    }

    /// The last index at or before `index` with a term of at most `term`, and that entry's term.
    /// Both sides of a conflict use it to skip whole terms (Raft §5.3, end). Terms never fall along
    /// a log, so a binary search finds the index in a few reads.
    pub fn last_at_most(
        &self,
        index: LogIndex,
        term: Term,
    ) -> Result<(LogIndex, Term), LogReadError> {
        let (mut low, mut low_term) = self.compacted;
        let mut high = index.min(self.last.0).0;
        while low.0 < high {
            let middle = LogIndex(low.0 + (high - low.0).div_ceil(2));
            let here = self.term(middle)?.unwrap_or_default();
            if here <= term {
                (low, low_term) = (middle, here);
            } else {
                high = middle.0 - 1;
            }
        }
        Ok((low, low_term))
    }

    /// Puts into `found`, which is empty, the entries in `[low, high)`: at least one if there are
    /// any, no more than fit in `max_bytes` beyond the first. Entries that were appended since the
    /// last [`Log::seal`] are not among them.
    pub fn slice(
        &self,
        low: LogIndex,
        high: LogIndex,
        max_bytes: usize,
        found: &mut Entries,
    ) -> Result<(), LogReadError> {
        let high = high.min(self.last.0.next());
        if low >= high {
            return Ok(());
        }
        if low <= self.compacted.0 {
            return Err(LogReadError::Compacted { index: low });
        }
        if low >= self.cache_first() {
            self.cache.slice(low, high, max_bytes, found);
            return Ok(());
        }
        *found = self.read(low, high.min(self.cache_first()), max_bytes)?;
        Ok(())
    }

    #[cold]
    fn read(
        &self,
        low: LogIndex,
        high: LogIndex,
        max_bytes: usize,
    ) -> Result<Entries, LogReadError> {
        let read = self.reader.entries(low, high, max_bytes)?;
        let contiguous = (low.0..).zip(&read).all(|(index, entry)| entry.index.0 == index);
        if read.is_empty() || !contiguous {
            let reason = "the reader returned other entries".into();
            return Err(LogReadError::Failed { index: low, reason });
        }
        Ok(Entries::from(read))
    }

    /// Bytes of the entries in `(after, up_to]` that are in memory.
    pub fn bytes_between(&self, after: LogIndex, up_to: LogIndex) -> usize {
        self.cache.bytes_between(after, up_to)
    }

    /// Adds an entry at the end.
    pub fn append(&mut self, entry: Entry) {
        assert!(
            entry.index == self.last.0.next() && entry.term >= self.last.1,
            "an entry continues the log: indexes rise by one and terms never fall"
        );
        if matches!(entry.payload, Payload::Change(_)) {
            self.change_horizon = entry.index;
        }
        self.last = (entry.index, entry.term);
        self.cache.push(entry);
    }

    /// Adds entries of another peer's log at the end; the last change of members
    /// among them, if there is one, is at `change`.
    pub fn extend(&mut self, entries: Entries, change: Option<LogIndex>) {
        let (Some(first), Some(last)) = (entries.first(), entries.last()) else { return };
        assert!(
            first.index == self.last.0.next() && first.term >= self.last.1,
            "entries continue the log: indexes rise by one and terms never fall"
        );
        if let Some(change) = change.filter(|change| *change >= first.index) {
            self.change_horizon = change;
        }
        self.last = (last.index, last.term);
        self.cache.extend(entries);
    }

    /// Makes one batch of the entries that were appended one by one.
    pub fn seal(&mut self) {
        self.cache.seal();
    }

    /// Drops every entry from `from` on, because a leader has others there.
    pub fn truncate(&mut self, from: LogIndex) -> Result<(), LogReadError> {
        assert!(
            from > self.commit,
            "committed entry {from} would be replaced: the commit index is {}",
            self.commit
        );
        let end = from.prev();
        let term = self.term(end)?.unwrap_or_default();
        self.cache.truncate(from);
        self.last = (end, term);
        self.handed = self.handed.min(end);
        self.change_horizon = self.change_horizon.min(end);
        if broken!(ReplacedEntriesNotDurable) {
            return Ok(());
        }
        self.persisted = self.persisted.min(end);
        // Writes under way will end with the old entries on disk. Their end must not be taken for a
        // proof that the new entries are there.
        for write in &mut self.writes {
            write.last = write.last.min(end);
        }
        Ok(())
    }

    pub fn commit_to(&mut self, index: LogIndex) -> bool {
        assert!(index <= self.last.0, "commit index {index} is beyond the log's end");
        let rises = index > self.commit;
        self.commit = self.commit.max(index);
        rises
    }

    pub fn has_unwritten(&self) -> bool {
        self.handed < self.last.0
    }

    /// Puts into `unwritten` the entries that no Ready has carried yet, which must
    /// all be in memory.
    pub fn take_unwritten(&mut self, unwritten: &mut Entries) {
        self.cache.slice(self.handed.next(), self.last.0.next(), usize::MAX, unwritten);
        assert!(
            unwritten.last().map(|entry| entry.index) == Some(self.last.0),
            "what is not written yet is in memory"
        );
        self.handed = self.last.0;
    }

    /// Notes that Ready `number` carries the entries up to the log's end.
    pub fn write_begun(&mut self, number: u64) {
        self.writes.push_back(Write { number, last: self.last.0 });
    }

    /// Notes that Ready `number` and all before it are durable.
    pub fn write_finished(&mut self, number: u64) {
        while let Some(write) = self.writes.pop_front_if(|write| write.number <= number) {
            self.persisted = self.persisted.max(write.last);
        }
        self.evict();
    }

    fn emittable(&self) -> LogIndex {
        if broken!(ApplyDurableOnly) { self.commit } else { self.commit.min(self.persisted) }
    }

    pub fn has_emittable(&self) -> bool {
        self.emitted < self.emittable() && self.applying_bytes < MAX_APPLYING_BYTES
    }

    /// Puts into `committed` the next committed entries to apply.
    pub fn take_committed(&mut self, committed: &mut Entries) -> Result<(), LogReadError> {
        if !self.has_emittable() {
            return Ok(());
        }
        let high = self.emittable().next();
        self.slice(self.emitted.next(), high, MAX_COMMITTED_BYTES, committed)?;
        if let Some(last) = committed.last() {
            let bytes = committed.bytes();
            self.emitted = last.index;
            self.applying.push_back((last.index, bytes));
            self.applying_bytes += bytes;
        }
        Ok(())
    }

    pub fn applied_to(&mut self, index: LogIndex) {
        if index <= self.applied {
            return;
        }
        assert!(
            index <= self.emitted,
            "entry {index} is reported applied, but only those up to {} were given out",
            self.emitted
        );
        self.applied = index;
        while let Some((_, bytes)) = self.applying.pop_front_if(|(end, _)| *end <= index) {
            self.applying_bytes -= bytes;
        }
        self.evict();
    }

    pub fn compact(&mut self, index: LogIndex, term: Term) {
        if index <= self.compacted.0 {
            return;
        }
        assert!(index <= self.applied, "entry {index} was dropped before it was applied");
        self.compacted = (index, term);
        self.cache.drop_to(index);
    }

    /// Replaces the whole log by a snapshot at this index.
    pub fn reset(&mut self, index: LogIndex, term: Term) {
        self.compacted = (index, term);
        self.last = (index, term);
        self.cache.clear();
        self.handed = index;
        self.persisted = index;
        self.commit = self.commit.max(index);
        self.emitted = index;
        self.applied = index;
        self.applying.clear();
        self.applying_bytes = 0;
        self.change_horizon = index;
        self.writes.clear();
    }

    /// Drops entries from the cache that this peer no longer needs. The reader serves followers
    /// that lag behind the cache.
    fn evict(&mut self) {
        let done = self.persisted.min(self.applied);
        while self.cache.bytes() > self.max_cache_bytes && self.cache.drop_first(done) {}
        // If applying is slow, entries are dropped that can be read back from the disk.
        let durable = self.persisted.min(self.commit);
        let most = self.max_cache_bytes.saturating_mul(UNAPPLIED_CACHES);
        while self.cache.bytes() > most && self.cache.drop_first(durable) {}
    }

    /// Frees memory that an idle group does not need.
    pub fn shrink(&mut self) {
        let done = self.persisted.min(self.applied);
        if self.last.0 <= done {
            self.cache.clear();
        }
        if self.writes.is_empty() {
            self.writes = VecDeque::new();
        }
        if self.applying.is_empty() {
            self.applying = VecDeque::new();
        }
    }
}
