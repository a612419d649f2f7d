//! Which region of a store holds which keys, and messages that came too early.
//!
//! Shared by a store's workers; touched only when regions come, go or change
//! their range, never by reads and writes.

use std::collections::{BTreeMap, HashMap};

use std::ops::Bound;

use bytes::Bytes;
use esker_rpc::proto::esker::RaftMessage;
use parking_lot::Mutex;

use crate::config::{MAX_EARLY_MESSAGES, MAX_EARLY_REGIONS};
use crate::ids::RegionId;

/// The ranges of a store's initialized regions. They never overlap.
#[derive(Debug, Default)]
pub struct Ranges {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    /// Start key to end key and region.
    by_start: BTreeMap<Bytes, (Bytes, RegionId)>,
    starts: HashMap<RegionId, Bytes>,
    /// Messages for regions that a split on this store has yet to create, so that
    /// the new region's first election is not lost.
    early: HashMap<RegionId, Vec<RaftMessage>>,
}

impl Inner {
    fn overlapping(&self, start: &[u8], end: &[u8], except: RegionId) -> Option<RegionId> {
        let before =
            self.by_start.range::<[u8], _>((Bound::Unbounded, Bound::Included(start))).next_back();
        let inside = self.by_start.range::<[u8], _>((Bound::Excluded(start), Bound::Unbounded));
        before
            .into_iter()
            .chain(inside)
            .take_while(|(from, _)| end.is_empty() || ***from < *end)
            .find(|(_, (to, region))| *region != except && (to.is_empty() || **to > *start))
            .map(|(_, (_, region))| *region)
    }

    fn remove(&mut self, region: RegionId) {
        if let Some(start) = self.starts.remove(&region) {
            self.by_start.remove(&start);
        }
    }
}

impl Ranges {
    /// Gives `region` the range, unless another region has part of it.
    ///
    /// # Errors
    /// The region that has part of the range.
    pub fn claim(&self, region: RegionId, start: &Bytes, end: &Bytes) -> Result<(), RegionId> {
        let mut inner = self.inner.lock();
        if let Some(other) = inner.overlapping(start, end, region) {
            return Err(other);
        }
        inner.remove(region);
        inner.by_start.insert(start.clone(), (end.clone(), region));
        inner.starts.insert(region, start.clone());
        Ok(())
    }

    pub fn release(&self, region: RegionId) {
        self.inner.lock().remove(region);
    }

    /// Replaces a region by the parts it was split into, in one step.
    pub fn replace(&self, parent: RegionId, parts: impl Iterator<Item = (RegionId, Bytes, Bytes)>) {
        let mut inner = self.inner.lock();
        inner.remove(parent);
        for (region, start, end) in parts {
            inner.remove(region);
            inner.by_start.insert(start.clone(), (end, region));
            inner.starts.insert(region, start);
        }
    }

    pub fn overlaps(&self, start: &[u8], end: &[u8], except: RegionId) -> bool {
        self.inner.lock().overlapping(start, end, except).is_some()
    }

    /// Keeps a message for a region that is yet to come, within bounds.
    pub fn keep_early(&self, message: RaftMessage) {
        let mut inner = self.inner.lock();
        let region = RegionId(message.region_id);
        if inner.early.len() >= MAX_EARLY_REGIONS && !inner.early.contains_key(&region) {
            // The split may never come here; what is kept is only a saving of time.
            inner.early.clear();
        }
        let kept = inner.early.entry(region).or_default();
        if kept.len() >= MAX_EARLY_MESSAGES {
            kept.remove(0);
        }
        kept.push(message);
    }

    pub fn take_early(&self, region: RegionId) -> Vec<RaftMessage> {
        self.inner.lock().early.remove(&region).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(text: &str) -> Bytes {
        Bytes::copy_from_slice(text.as_bytes())
    }

    #[test]
    fn a_range_is_claimed_once() {
        let ranges = Ranges::default();
        ranges.claim(RegionId(1), &key("b"), &key("d")).unwrap();
        assert_eq!(ranges.claim(RegionId(2), &key("c"), &key("")), Err(RegionId(1)));
        assert_eq!(ranges.claim(RegionId(2), &key("a"), &key("c")), Err(RegionId(1)));
        assert_eq!(ranges.claim(RegionId(2), &key(""), &key("")), Err(RegionId(1)));
        ranges.claim(RegionId(2), &key("d"), &key("")).unwrap();
        ranges.claim(RegionId(3), &key(""), &key("b")).unwrap();
        assert!(ranges.overlaps(b"x", b"", RegionId(9)));
        assert!(!ranges.overlaps(b"x", b"", RegionId(2)));
        ranges.release(RegionId(2));
        assert!(!ranges.overlaps(b"x", b"", RegionId(9)));
    }

    #[test]
    fn a_split_replaces_the_parent_by_its_parts() {
        let ranges = Ranges::default();
        ranges.claim(RegionId(1), &key(""), &key("")).unwrap();
        ranges.replace(
            RegionId(1),
            [(RegionId(2), key(""), key("m")), (RegionId(1), key("m"), key(""))].into_iter(),
        );
        assert_eq!(ranges.claim(RegionId(3), &key("a"), &key("b")), Err(RegionId(2)));
        assert_eq!(ranges.claim(RegionId(3), &key("m"), &key("n")), Err(RegionId(1)));
    }

    #[test]
    fn early_messages_are_few_and_the_newest() {
        let ranges = Ranges::default();
        for n in 0..20u8 {
            let message =
                RaftMessage { region_id: 7, message: Bytes::from(vec![n]), ..Default::default() };
            ranges.keep_early(message);
        }
        let kept = ranges.take_early(RegionId(7));
        assert_eq!(kept.len(), MAX_EARLY_MESSAGES);
        assert_eq!(kept[0].message[0], 12);
        assert!(ranges.take_early(RegionId(7)).is_empty());
    }
}
