//! Entries that are shared instead of copied.
//!
//! An entry is made once and then needed many times: in the cache, by the disk, in the message to
//! each follower, by the state machine. The entries that are appended between two Readies become
//! one shared *batch*, and every user holds a reference to it. So the cost of an entry does not
//! grow with the number of its users.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;

use crate::types::{Entry, LogIndex};

/// A part of one shared batch; at least one entry.
#[derive(Clone)]
struct Segment {
    batch: Arc<[Entry]>,
    /// The index of the entry at `from`. It is kept here so that the search for a segment does not
    /// touch the memory of every batch.
    first: LogIndex,
    from: u32,
    to: u32,
    bytes: usize,
}

/// Consecutive entries of a log. A clone shares them.
///
/// Made from a `Vec<Entry>` or collected from an iterator; read through
/// [`Entries::iter`] and its relatives.
#[derive(Clone, Default)]
pub struct Entries {
    first: Option<Segment>,
    /// Almost always empty, so it is a thin pointer.
    #[allow(clippy::box_collection, reason = "a vector here would make every message larger")]
    more: Option<Box<Vec<Segment>>>,
}

impl Segment {
    fn new(batch: Arc<[Entry]>, bytes: usize) -> Option<Segment> {
        // A batch is bounded by the limit on uncommitted bytes or by what fits into a message.
        let to = u32::try_from(batch.len()).expect("a batch has less than 2^32 entries");
        let first = batch.first()?.index;
        Some(Segment { batch, first, from: 0, to, bytes })
    }

    fn entries(&self) -> &[Entry] {
        &self.batch[self.from as usize..self.to as usize]
    }

    fn len(&self) -> usize {
        (self.to - self.from) as usize
    }

    /// The index after the last entry.
    fn end(&self) -> LogIndex {
        LogIndex(self.first.0 + u64::from(self.to - self.from))
    }

    /// The entries with indexes in `[low, high)`, if there are any.
    fn within(&self, low: LogIndex, high: LogIndex) -> Option<Segment> {
        if low <= self.first && self.end() <= high {
            return Some(self.clone());
        }
        let offset = |index: LogIndex| {
            let offset = index.0.saturating_sub(self.first.0).min(self.len() as u64);
            self.from + offset as u32
        };
        self.part(offset(low), offset(high))
    }

    fn part(&self, from: u32, to: u32) -> Option<Segment> {
        if from >= to {
            return None;
        }
        let first = LogIndex(self.first.0 + u64::from(from - self.from));
        let mut part = Segment { batch: Arc::clone(&self.batch), first, from, to, bytes: 0 };
        part.bytes = part.entries().iter().map(Entry::bytes).sum();
        Some(part)
    }

    /// As many entries from the beginning of the segment as fit, at least one if `any`.
    fn fitting(self, max_bytes: usize, any: bool) -> Option<Segment> {
        if self.bytes <= max_bytes {
            return Some(self);
        }
        let mut bytes = 0;
        let fits = |entry: &&Entry| {
            bytes += entry.bytes();
            bytes <= max_bytes
        };
        let count = self.entries().iter().take_while(fits).count().max(usize::from(any));
        self.part(self.from, self.from + count as u32)
    }
}

impl Entries {
    /// The entries in order.
    #[must_use]
    #[inline]
    pub fn iter(&self) -> Iter<'_> {
        let here = self.first.as_ref().map_or(&[][..], Segment::entries).iter();
        let more = self.more.as_ref().map_or(&[][..], |more| &more[..]).iter();
        Iter { here, more }
    }

    fn segments(&self) -> impl Iterator<Item = &Segment> {
        self.first.iter().chain(self.more.iter().flat_map(|more| more.iter()))
    }

    fn last_segment(&self) -> Option<&Segment> {
        self.more.as_ref().and_then(|more| more.last()).or(self.first.as_ref())
    }

    /// How many there are.
    #[must_use]
    #[inline]
    pub fn len(&self) -> usize {
        let first = self.first.as_ref().map_or(0, Segment::len);
        let Some(more) = &self.more else { return first };
        first + more.iter().map(Segment::len).sum::<usize>()
    }

    /// Whether there are none.
    #[must_use]
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.first.is_none()
    }

    /// The first one.
    #[must_use]
    #[inline]
    pub fn first(&self) -> Option<&Entry> {
        self.first.as_ref().and_then(|segment| segment.entries().first())
    }

    /// The last one.
    #[must_use]
    #[inline]
    pub fn last(&self) -> Option<&Entry> {
        self.last_segment().and_then(|segment| segment.entries().last())
    }

    /// The sum of [`Entry::bytes`].
    #[must_use]
    #[inline]
    pub fn bytes(&self) -> usize {
        let first = self.first.as_ref().map_or(0, |segment| segment.bytes);
        let Some(more) = &self.more else { return first };
        first + more.iter().map(|segment| segment.bytes).sum::<usize>()
    }

    /// The entries with an index of at least `low`.
    #[must_use]
    #[inline]
    pub fn since(self, low: LogIndex) -> Entries {
        if self.first.as_ref().is_none_or(|segment| low <= segment.first) {
            return self;
        }
        let end = LogIndex(u64::MAX);
        let mut rest = Entries::default();
        for segment in self.segments().filter_map(|segment| segment.within(low, end)) {
            rest.push(segment);
        }
        rest
    }

    fn push(&mut self, segment: Segment) {
        if self.first.is_none() {
            self.first = Some(segment);
        } else {
            self.more.get_or_insert_default().push(segment);
        }
    }
}

/// The entries of [`Entries`], in order.
#[derive(Clone)]
pub struct Iter<'a> {
    here: std::slice::Iter<'a, Entry>,
    more: std::slice::Iter<'a, Segment>,
}

impl<'a> Iterator for Iter<'a> {
    type Item = &'a Entry;

    #[inline]
    fn next(&mut self) -> Option<&'a Entry> {
        loop {
            if let Some(entry) = self.here.next() {
                return Some(entry);
            }
            self.here = self.more.next()?.entries().iter();
        }
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let more: usize = self.more.clone().map(Segment::len).sum();
        let all = self.here.len() + more;
        (all, Some(all))
    }
}

impl<'a> IntoIterator for &'a Entries {
    type Item = &'a Entry;
    type IntoIter = Iter<'a>;

    fn into_iter(self) -> Iter<'a> {
        self.iter()
    }
}

impl From<Vec<Entry>> for Entries {
    fn from(entries: Vec<Entry>) -> Self {
        let bytes = entries.iter().map(Entry::bytes).sum();
        if entries.is_empty() {
            return Entries::default();
        }
        Entries { first: Segment::new(Arc::from(entries), bytes), more: None }
    }
}

impl FromIterator<Entry> for Entries {
    fn from_iter<I: IntoIterator<Item = Entry>>(entries: I) -> Self {
        Entries::from(entries.into_iter().collect::<Vec<_>>())
    }
}

impl PartialEq for Entries {
    fn eq(&self, other: &Self) -> bool {
        self.iter().eq(other.iter())
    }
}

impl Eq for Entries {}

impl fmt::Debug for Entries {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

/// The newest entries of a log, in memory.
#[derive(Default)]
pub(crate) struct Cache {
    segments: VecDeque<Segment>,
    bytes: usize,
    /// The entries that were appended one by one since the last batch was made. Its capacity is
    /// kept.
    tail: Vec<Entry>,
    tail_bytes: usize,
}

impl Cache {
    /// The sum of [`Entry::bytes`] over the whole cache.
    pub fn bytes(&self) -> usize {
        self.bytes + self.tail_bytes
    }

    /// The index of the first entry, if there is one.
    pub fn first_index(&self) -> Option<LogIndex> {
        match self.segments.front() {
            Some(segment) => Some(segment.first),
            None => self.tail.first().map(|entry| entry.index),
        }
    }

    #[inline]
    pub fn get(&self, index: LogIndex) -> Option<&Entry> {
        if let Some(first) = self.tail.first()
            && index >= first.index
        {
            return self.tail.get(usize::try_from(index.0 - first.index.0).ok()?);
        }
        let segment = &self.segments[self.position(index)?];
        segment.entries().get(usize::try_from(index.0.checked_sub(segment.first.0)?).ok()?)
    }

    /// The position of the segment that may hold `index`. It is usually near the end.
    #[inline]
    fn position(&self, index: LogIndex) -> Option<usize> {
        const NEAR: usize = 4;
        for position in (0..self.segments.len()).rev().take(NEAR) {
            if self.segments[position].first <= index {
                return Some(position);
            }
        }
        let after = self.segments.partition_point(|segment| segment.first <= index);
        after.checked_sub(1)
    }

    /// Adds one entry at the end.
    pub fn push(&mut self, entry: Entry) {
        self.tail_bytes += entry.bytes();
        self.tail.push(entry);
    }

    /// Adds entries at the end.
    #[inline]
    pub fn extend(&mut self, entries: Entries) {
        self.seal();
        self.bytes += entries.bytes();
        self.segments.extend(entries.first);
        if let Some(more) = entries.more {
            self.segments.extend(*more);
        }
    }

    /// Makes the entries that were added one by one a batch that can be shared.
    #[inline]
    pub fn seal(&mut self) {
        if self.tail.is_empty() {
            return;
        }
        let bytes = std::mem::take(&mut self.tail_bytes);
        let batch: Arc<[Entry]> = self.tail.drain(..).collect();
        self.bytes += bytes;
        self.segments.extend(Segment::new(batch, bytes));
    }

    /// Adds to `found`, which is empty, the entries in `[low, high)` that are in
    /// batches: at least one if there are any, and no more than fit in `max_bytes`
    /// beyond the first.
    #[inline]
    pub fn slice(&self, low: LogIndex, high: LogIndex, max_bytes: usize, found: &mut Entries) {
        // In most calls only the newest batch is wanted.
        if let Some(last) = self.segments.back()
            && last.first == low
            && last.end() <= high
            && last.bytes <= max_bytes
        {
            found.first = Some(last.clone());
            return;
        }
        self.slice_several(low, high, max_bytes, found);
    }

    fn slice_several(&self, low: LogIndex, high: LogIndex, max_bytes: usize, found: &mut Entries) {
        let mut left = max_bytes;
        let Some(position) = self.position(low) else { return };
        for segment in self.segments.range(position..) {
            if segment.first >= high {
                return;
            }
            let Some(wanted) = segment.within(low, high) else { continue };
            let end = wanted.to;
            let Some(fitting) = wanted.fitting(left, found.is_empty()) else { return };
            left = left.saturating_sub(fitting.bytes);
            let whole = fitting.to == end;
            found.push(fitting);
            if !whole {
                return;
            }
        }
    }

    /// The bytes of the entries in `(after, up_to]` that are in the cache.
    pub fn bytes_between(&self, after: LogIndex, up_to: LogIndex) -> usize {
        let position = self.position(after.next()).unwrap_or(0);
        let mut bytes = 0;
        for segment in self.segments.range(position..) {
            if segment.first > up_to {
                return bytes;
            }
            bytes += if after < segment.first && segment.end() <= up_to.next() {
                segment.bytes
            } else {
                segment.within(after.next(), up_to.next()).map_or(0, |part| part.bytes)
            };
        }
        let in_tail = self.tail.iter().filter(|entry| entry.index > after && entry.index <= up_to);
        bytes + in_tail.map(Entry::bytes).sum::<usize>()
    }

    /// Drops the entries from `from` on.
    pub fn truncate(&mut self, from: LogIndex) {
        self.seal();
        while let Some(segment) = self.segments.pop_back_if(|last| last.end() > from) {
            self.bytes -= segment.bytes;
            if let Some(kept) = segment.within(LogIndex(0), from) {
                self.bytes += kept.bytes;
                self.segments.push_back(kept);
                return;
            }
        }
    }

    /// Drops the batches that end at or before `index`.
    pub fn drop_to(&mut self, index: LogIndex) {
        while self.drop_first(index) {}
    }

    /// Drops the first batch if it ends at or before `index`.
    pub fn drop_first(&mut self, index: LogIndex) -> bool {
        let Some(segment) = self.segments.pop_front_if(|first| first.end() <= index.next()) else {
            return false;
        };
        self.bytes -= segment.bytes;
        true
    }

    pub fn clear(&mut self) {
        *self = Cache::default();
    }
}

impl fmt::Debug for Cache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let entries = self.segments.iter().flat_map(|segment| segment.entries());
        f.debug_list().entries(entries.chain(&self.tail)).finish()
    }
}
