//! The log as the core sees it: the newest entries in memory, the older ones
//! behind a [`LogReader`], and how far each stage of their life has come.
//!
//! ```text
//!  compacted      applied  emitted   commit  persisted  handed   last
//!  ────┤·······──────┤────────┤─────────┤────────┤─────────┤───────┤
//!   gone    reader      with the driver    …        being written
//! ```
//!
//! Promises: what is committed is never replaced; an entry is emitted for
//! application once, and only when it is committed and durable here; a notice
//! that something became durable never speaks for entries that replaced it.

use std::collections::VecDeque;

use thiserror::Error;

use crate::rules::broken;
use crate::types::{Entry, LogIndex, Term};

/// Bytes of committed entries in one [`crate::Ready`], at least one entry.
pub const MAX_COMMITTED_BYTES: usize = 1 << 20;

/// Bytes of committed entries that the driver has and has not reported applied.
pub const MAX_APPLYING_BYTES: usize = 64 << 20;

/// The driver's log, lent to the core for entries it no longer holds.
pub trait LogReader {
    /// The entries from `low` up to, not including, `high`: at least one, and no
    /// more than fit in `max_bytes` beyond the first.
    ///
    /// # Errors
    /// [`LogReadError::Compacted`] if `low` is gone, [`LogReadError::Failed`] otherwise.
    fn entries(
        &self,
        low: LogIndex,
        high: LogIndex,
        max_bytes: usize,
    ) -> Result<Vec<Entry>, LogReadError>;

    /// The term of the entry at `index`, `None` if the log does not have it.
    ///
    /// # Errors
    /// [`LogReadError::Failed`].
    fn term(&self, index: LogIndex) -> Result<Option<Term>, LogReadError>;
}

/// Why the log could not be read.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum LogReadError {
    /// The entry is behind the beginning of the log.
    #[error("log entry {index} has been compacted")]
    Compacted {
        /// The entry.
        index: LogIndex,
    },
    /// The entry should be there. The driver must stop the store: carrying on
    /// would lose data.
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
    /// The end of what the log no longer has.
    compacted: (LogIndex, Term),
    last: (LogIndex, Term),
    /// The newest entries; its back is at `last` unless it is empty.
    entries: VecDeque<Entry>,
    entry_bytes: usize,
    max_cache_bytes: usize,
    /// The end of what was given out to be written.
    handed: LogIndex,
    /// The end of what is known to be durable.
    persisted: LogIndex,
    /// Writes that have not been reported.
    writes: VecDeque<Write>,
    commit: LogIndex,
    /// The end of what was given out to be applied.
    emitted: LogIndex,
    applied: LogIndex,
    /// Batches that were emitted and not all applied: their ends and sizes.
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
            entries: VecDeque::new(),
            entry_bytes: 0,
            max_cache_bytes,
            handed: last.0,
            persisted: last.0,
            writes: VecDeque::new(),
            commit,
            emitted: applied,
            applied,
            applying: VecDeque::new(),
            applying_bytes: 0,
            // The tail was not read: assume the worst of it.
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
        LogIndex(self.last.0.0.saturating_sub(self.entries.len() as u64).saturating_add(1))
    }

    fn cached(&self, index: LogIndex) -> Option<&Entry> {
        let offset = index.0.checked_sub(self.cache_first().0)?;
        self.entries.get(usize::try_from(offset).ok()?)
    }

    /// The term at `index`; `None` beyond either end.
    pub fn term(&self, index: LogIndex) -> Result<Option<Term>, LogReadError> {
        if index == self.last.0 {
            return Ok(Some(self.last.1));
        }
        if index == self.compacted.0 {
            return Ok(Some(self.compacted.1));
        }
        if index < self.compacted.0 || index > self.last.0 {
            return Ok(None);
        }
        match self.cached(index) {
            Some(entry) => Ok(Some(entry.term)),
            None => match self.reader.term(index)? {
                Some(term) => Ok(Some(term)),
                None => Err(LogReadError::Failed { index, reason: "it is missing".into() }),
            },
        }
    }

    pub fn matches(&self, index: LogIndex, term: Term) -> Result<bool, LogReadError> {
        Ok(self.term(index)? == Some(term))
    }

    /// The last index at or before `index` whose term is at most `term`, with its
    /// term: both sides of a conflict use it to skip whole terms (Raft §5.3, end).
    /// Terms never fall along a log, so halving finds it in a few reads.
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

    /// Entries in `[low, high)`, at least one if there are any, no more than fit
    /// in `max_bytes` beyond the first.
    pub fn slice(
        &self,
        low: LogIndex,
        high: LogIndex,
        max_bytes: usize,
    ) -> Result<Vec<Entry>, LogReadError> {
        let high = high.min(self.last.0.next());
        if low >= high {
            return Ok(Vec::new());
        }
        if low <= self.compacted.0 {
            return Err(LogReadError::Compacted { index: low });
        }
        let mut found = Vec::new();
        let mut bytes = 0;
        let cache_first = self.cache_first();
        if low < cache_first {
            found = self.reader.entries(low, high.min(cache_first), max_bytes)?;
            let contiguous = (low.0..).zip(&found).all(|(index, entry)| entry.index.0 == index);
            if found.is_empty() || !contiguous {
                let reason = "the reader returned other entries".into();
                return Err(LogReadError::Failed { index: low, reason });
            }
            bytes = found.iter().map(Entry::bytes).sum();
            if low.0 + (found.len() as u64) < cache_first.0 {
                return Ok(found);
            }
        }
        let from = usize::try_from(low.max(cache_first).0 - cache_first.0).unwrap_or(usize::MAX);
        for entry in self.entries.iter().skip(from) {
            bytes += entry.bytes();
            if entry.index >= high || (bytes > max_bytes && !found.is_empty()) {
                break;
            }
            found.push(entry.clone());
        }
        Ok(found)
    }

    /// Bytes of the entries in `(after, up_to]` that are in memory.
    pub fn bytes_between(&self, after: LogIndex, up_to: LogIndex) -> usize {
        let from = after.next().max(self.cache_first());
        let skipped = usize::try_from(from.0 - self.cache_first().0).unwrap_or(usize::MAX);
        let wanted = self.entries.iter().skip(skipped);
        wanted.take_while(|entry| entry.index <= up_to).map(Entry::bytes).sum()
    }

    /// Adds an entry at the end.
    pub fn append(&mut self, entry: Entry) {
        assert!(
            entry.index == self.last.0.next() && entry.term >= self.last.1,
            "an entry continues the log: indexes rise by one and terms never fall"
        );
        if matches!(entry.payload, crate::Payload::Change(_)) {
            self.change_horizon = entry.index;
        }
        self.last = (entry.index, entry.term);
        self.entry_bytes += entry.bytes();
        self.entries.push_back(entry);
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
        while self.entries.back().is_some_and(|entry| entry.index >= from) {
            let dropped = self.entries.pop_back().map_or(0, |entry| entry.bytes());
            self.entry_bytes -= dropped;
        }
        self.last = (end, term);
        self.handed = self.handed.min(end);
        self.change_horizon = self.change_horizon.min(end);
        if broken!(ReplacedEntriesNotDurable) {
            return Ok(());
        }
        self.persisted = self.persisted.min(end);
        // Writes under way will end with the old entries on disk, and must then
        // not be taken for a proof that the new ones are there.
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

    /// The entries that no Ready has carried yet, which must all be in memory.
    pub fn take_unwritten(&mut self) -> Vec<Entry> {
        let from = self.handed.next().0 - self.cache_first().0;
        let entries =
            self.entries.iter().skip(usize::try_from(from).unwrap_or(usize::MAX)).cloned();
        let entries: Vec<_> = entries.collect();
        self.handed = self.last.0;
        entries
    }

    /// Notes that Ready `number` carries everything up to the log's end.
    pub fn write_begun(&mut self, number: u64) {
        self.writes.push_back(Write { number, last: self.last.0 });
    }

    /// Ready `number` and all before it are durable.
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

    /// The next committed entries to apply.
    pub fn take_committed(&mut self) -> Result<Vec<Entry>, LogReadError> {
        if !self.has_emittable() {
            return Ok(Vec::new());
        }
        let high = self.emittable().next();
        let entries = self.slice(self.emitted.next(), high, MAX_COMMITTED_BYTES)?;
        if let Some(last) = entries.last() {
            let bytes = entries.iter().map(Entry::bytes).sum();
            self.emitted = last.index;
            self.applying.push_back((last.index, bytes));
            self.applying_bytes += bytes;
        }
        Ok(entries)
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
        while self.entries.front().is_some_and(|entry| entry.index <= index) {
            let dropped = self.entries.pop_front().map_or(0, |entry| entry.bytes());
            self.entry_bytes -= dropped;
        }
    }

    /// Everything is replaced by a snapshot at this index.
    pub fn reset(&mut self, index: LogIndex, term: Term) {
        self.compacted = (index, term);
        self.last = (index, term);
        self.entries.clear();
        self.entry_bytes = 0;
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

    /// Lets go of entries that nobody here needs any more. Followers that lag
    /// behind the cache are served by the reader.
    fn evict(&mut self) {
        let done = self.persisted.min(self.applied);
        while self.entry_bytes > self.max_cache_bytes
            && self.entries.front().is_some_and(|entry| entry.index <= done)
        {
            let dropped = self.entries.pop_front().map_or(0, |entry| entry.bytes());
            self.entry_bytes -= dropped;
        }
    }

    /// Gives back memory that an idle group does not need.
    pub fn shrink(&mut self) {
        let done = self.persisted.min(self.applied);
        if self.entries.back().is_none_or(|entry| entry.index <= done) {
            self.entries = VecDeque::new();
            self.entry_bytes = 0;
        }
        if self.writes.is_empty() {
            self.writes = VecDeque::new();
        }
        if self.applying.is_empty() {
            self.applying = VecDeque::new();
        }
    }
}
