//! Which region of a store holds which keys, which peers wait for their data, and messages that
//! came too early.
//!
//! Shared by a store's workers and apply workers; touched only when regions come, go or change
//! their range, never by reads and writes.

use std::collections::{BTreeMap, HashMap};
use std::ops::Bound;

use bytes::Bytes;
use esker_model::{KeyRange, PeerId, RegionId};
use parking_lot::Mutex;

use crate::config::{MAX_EARLY_MESSAGES, MAX_EARLY_REGIONS};
use crate::door::Arrived;

/// Has a range that is no region's any more, until its data is gone.
const NOBODY: RegionId = RegionId(0);

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
    /// The store's peers without data. They have no range yet. Each came when no other region had
    /// a part of its range. Another may have got it since, by a snapshot from before a split. Then
    /// that split is yet to be applied here, and has data for the peer. At most [`MAX_EMPTY_PEERS`]
    /// for each worker, and those that a split has just brought.
    ///
    /// [`MAX_EMPTY_PEERS`]: crate::config::MAX_EMPTY_PEERS
    empty: HashMap<RegionId, Empty>,
    /// Messages for regions that a split on this store has yet to create, so that
    /// the new region's first election is not lost.
    early: HashMap<RegionId, Vec<Arrived>>,
}

/// A peer without data.
#[derive(Debug)]
struct Empty {
    peer: PeerId,
    fate: Fate,
}

/// What becomes of a peer without data.
#[derive(Debug, PartialEq, Eq)]
enum Fate {
    /// A snapshot or a split may bring its data.
    Waits,
    /// A split has brought its data, or is about to, and its worker does not know of it yet. No
    /// other peer takes its place meanwhile, and it does not leave.
    Filled,
    /// It is being removed. A split brings nothing to it.
    Leaves,
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

    /// Replaces a region by the parts it was split into, in one step. Some of its range may be no
    /// region's here: nobody gets it before [`Ranges::cleared`].
    pub fn replace(
        &self,
        parent: RegionId,
        parts: impl Iterator<Item = (RegionId, KeyRange)>,
        nobodys: impl Iterator<Item = KeyRange>,
    ) {
        let mut inner = self.inner.lock();
        inner.remove(parent);
        for (region, range) in parts {
            inner.remove(region);
            inner.insert(region, range);
        }
        for range in nobodys {
            inner.by_start.insert(range.start().clone(), (range, NOBODY));
        }
    }

    /// The data of a range that was nobody's is gone.
    pub fn cleared(&self, range: &KeyRange) {
        let mut inner = self.inner.lock();
        if inner.by_start.get(range.start()).is_some_and(|(_, region)| *region == NOBODY) {
            inner.by_start.remove(range.start());
        }
    }

    /// Whether a peer without data may come for a region with this range. It may not while another
    /// region has a part of the range, or while a split has just brought the data of another peer
    /// of the region.
    pub fn admit(&self, region: RegionId, peer: PeerId, range: &KeyRange) -> bool {
        let mut inner = self.inner.lock();
        if inner.overlapping(range, region).is_some() || inner.empty.contains_key(&region) {
            return false;
        }
        inner.empty.insert(region, Empty { peer, fate: Fate::Waits });
        true
    }

    /// Whether `peer` gets the data that a split has for it. It does not where it has left already,
    /// or a later peer has come: the split would bring back a peer that was removed, or take the
    /// place of a peer that has voted. `is_over` returns whether the disk says so, and is asked
    /// after the memory, where a peer that leaves is until the disk says so.
    ///
    /// # Errors
    /// Those of `is_over`.
    pub fn fill<E>(
        &self,
        region: RegionId,
        peer: PeerId,
        is_over: impl FnOnce() -> Result<bool, E>,
    ) -> Result<bool, E> {
        let mut inner = self.inner.lock();
        let is_over = match inner.empty.get(&region) {
            Some(empty) => empty.peer > peer || empty.fate == Fate::Leaves,
            None => is_over()?,
        };
        if !is_over {
            inner.empty.insert(region, Empty { peer, fate: Fate::Filled });
        }
        Ok(!is_over)
    }

    /// Whether a peer that is to be removed may leave now. One without data may not while a split
    /// brings it: it is removed when it has it.
    pub fn leave(&self, region: RegionId) -> bool {
        match self.inner.lock().empty.get_mut(&region) {
            Some(Empty { fate: Fate::Filled, .. }) => false,
            Some(empty) => {
                empty.fate = Fate::Leaves;
                true
            }
            None => true,
        }
    }

    /// The region's peer has its data, or is gone.
    pub fn settle(&self, region: RegionId) {
        self.inner.lock().empty.remove(&region);
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
        ranges.replace(RegionId(1), parts.into_iter(), std::iter::empty());
        assert_eq!(ranges.claim(RegionId(3), &range("a", "b")), Err(RegionId(2)));
        assert_eq!(ranges.claim(RegionId(3), &range("m", "n")), Err(RegionId(1)));
    }

    #[test]
    fn what_a_split_leaves_to_nobody_is_free_when_its_data_is_gone() {
        let ranges = Ranges::default();
        ranges.claim(RegionId(1), &range("", "")).unwrap();
        let parts = [(RegionId(1), range("m", ""))];
        ranges.replace(RegionId(1), parts.into_iter(), [range("", "m")].into_iter());
        // Not even the region itself, under a later peer.
        assert!(!ranges.admit(RegionId(2), PeerId(9), &range("", "m")));
        assert!(ranges.claim(RegionId(2), &range("", "m")).is_err());
        ranges.cleared(&range("", "m"));
        ranges.claim(RegionId(2), &range("", "m")).unwrap();
        ranges.cleared(&range("", "m"));
        assert!(ranges.overlaps(&range("", "m"), RegionId(9)), "it is the region's now");
    }

    /// Whether a split fills a peer of region 2, where the disk says nothing against it.
    fn fills(ranges: &Ranges, peer: u64) -> bool {
        ranges.fill(RegionId(2), PeerId(peer), || Ok::<_, ()>(false)).unwrap()
    }

    #[test]
    fn a_split_fills_the_peer_that_waits_but_none_that_leaves_or_was_followed() {
        let child = RegionId(2);
        let admitted = |peer| {
            let ranges = Ranges::default();
            assert!(ranges.admit(child, PeerId(peer), &range("", "m")));
            ranges.claim(RegionId(1), &range("", "")).unwrap();
            ranges
        };
        let ranges = admitted(5);
        assert!(fills(&ranges, 5), "it waits for it");
        assert!(!ranges.leave(child), "it would be removed and filled at the same time");
        ranges.settle(child);
        assert!(ranges.leave(child));

        let ranges = admitted(5);
        assert!(ranges.leave(child));
        assert!(!fills(&ranges, 5), "it leaves");
        ranges.settle(child);
        let is_over = ranges.fill(child, PeerId(5), || Ok::<_, ()>(true));
        assert_eq!(is_over, Ok(false), "it has left");

        assert!(!fills(&admitted(6), 5), "a later peer waits");

        let ranges = Ranges::default();
        ranges.claim(RegionId(1), &range("", "")).unwrap();
        assert!(fills(&ranges, 5));
        let parts = [(child, range("", "m")), (RegionId(1), range("m", ""))];
        ranges.replace(RegionId(1), parts.into_iter(), std::iter::empty());
        let later = || ranges.admit(child, PeerId(6), &range("", "m"));
        assert!(!later(), "the peer with the data comes first");
        ranges.settle(child);
        assert!(later());
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
