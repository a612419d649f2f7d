//! Which region of a store holds which keys, and messages that came too early.
//!
//! Shared by a store's workers; touched only when regions come, go or change
//! their range, never by reads and writes.

use std::collections::{BTreeMap, HashMap};
use std::ops::Bound;

use bytes::Bytes;
use esker_model::{KeyRange, RegionId};
use parking_lot::Mutex;

use crate::config::{MAX_EARLY_MESSAGES, MAX_EARLY_REGIONS};
use crate::door::Arrived;

/// The ranges of a store's initialized regions. They never overlap.
#[derive(Debug, Default)]
pub struct Ranges {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    /// By their start keys.
    by_start: BTreeMap<Bytes, (KeyRange, RegionId)>,
    starts: HashMap<RegionId, Bytes>,
    /// Messages for regions that a split on this store has yet to create, so that
    /// the new region's first election is not lost.
    early: HashMap<RegionId, Vec<Arrived>>,
}

impl Inner {
    fn overlapping(&self, wanted: &KeyRange, except: RegionId) -> Option<RegionId> {
        let start = &wanted.start()[..];
        let before =
            self.by_start.range::<[u8], _>((Bound::Unbounded, Bound::Included(start))).next_back();
        let inside = self.by_start.range::<[u8], _>((Bound::Excluded(start), Bound::Unbounded));
        before
            .into_iter()
            .chain(inside)
            .take_while(|(start, _)| wanted.is_above(start))
            .find(|(_, (range, region))| *region != except && range.overlaps(wanted))
            .map(|(_, (_, region))| *region)
    }

    fn insert(&mut self, region: RegionId, range: KeyRange) {
        self.starts.insert(region, range.start().clone());
        self.by_start.insert(range.start().clone(), (range, region));
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
    pub fn claim(&self, region: RegionId, range: &KeyRange) -> Result<(), RegionId> {
        let mut inner = self.inner.lock();
        if let Some(other) = inner.overlapping(range, region) {
            return Err(other);
        }
        inner.remove(region);
        inner.insert(region, range.clone());
        Ok(())
    }

    pub fn release(&self, region: RegionId) {
        self.inner.lock().remove(region);
    }

    /// Replaces a region by the parts it was split into, in one step.
    pub fn replace(&self, parent: RegionId, parts: impl Iterator<Item = (RegionId, KeyRange)>) {
        let mut inner = self.inner.lock();
        inner.remove(parent);
        for (region, range) in parts {
            inner.remove(region);
            inner.insert(region, range);
        }
    }

    pub fn overlaps(&self, range: &KeyRange, except: RegionId) -> bool {
        self.inner.lock().overlapping(range, except).is_some()
    }

    /// Keeps a message for a region that is yet to come, within bounds.
    pub fn keep_early(&self, message: Arrived) {
        let mut inner = self.inner.lock();
        let region = message.region();
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

    pub fn take_early(&self, region: RegionId) -> Vec<Arrived> {
        self.inner.lock().early.remove(&region).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use esker_model::{Epoch, Peer, PeerId, StoreId};

    use super::*;
    use crate::door::Checked;
    use crate::envelope::Address;

    fn range(start: &str, end: &str) -> KeyRange {
        let key = |text: &str| Bytes::copy_from_slice(text.as_bytes());
        KeyRange::new(key(start), Some(key(end)).filter(|end| !end.is_empty())).unwrap()
    }

    #[test]
    fn a_range_is_claimed_once() {
        let ranges = Ranges::default();
        ranges.claim(RegionId(1), &range("b", "d")).unwrap();
        assert_eq!(ranges.claim(RegionId(2), &range("c", "")), Err(RegionId(1)));
        assert_eq!(ranges.claim(RegionId(2), &range("a", "c")), Err(RegionId(1)));
        assert_eq!(ranges.claim(RegionId(2), &range("", "")), Err(RegionId(1)));
        ranges.claim(RegionId(2), &range("d", "")).unwrap();
        ranges.claim(RegionId(3), &range("", "b")).unwrap();
        assert!(ranges.overlaps(&range("x", ""), RegionId(9)));
        assert!(!ranges.overlaps(&range("x", ""), RegionId(2)));
        ranges.release(RegionId(2));
        assert!(!ranges.overlaps(&range("x", ""), RegionId(9)));
    }

    #[test]
    fn a_split_replaces_the_parent_by_its_parts() {
        let ranges = Ranges::default();
        ranges.claim(RegionId(1), &range("", "")).unwrap();
        let parts = [(RegionId(2), range("", "m")), (RegionId(1), range("m", ""))];
        ranges.replace(RegionId(1), parts.into_iter());
        assert_eq!(ranges.claim(RegionId(3), &range("a", "b")), Err(RegionId(2)));
        assert_eq!(ranges.claim(RegionId(3), &range("m", "n")), Err(RegionId(1)));
    }

    #[test]
    fn early_messages_are_few_and_the_newest() {
        let ranges = Ranges::default();
        for conf_ver in 0..20 {
            let peer = |id| Peer::voter(PeerId(id), StoreId(id));
            let address = Address {
                region: RegionId(7),
                from: peer(1),
                to: peer(2),
                epoch: Epoch { conf_ver, version: 1 },
            };
            ranges.keep_early(Arrived { address, content: Checked::Question });
        }
        let kept = ranges.take_early(RegionId(7));
        assert_eq!(kept.len(), MAX_EARLY_MESSAGES);
        assert_eq!(kept[0].address.epoch.conf_ver, 12);
        assert!(ranges.take_early(RegionId(7)).is_empty());
    }
}
