//! Reads under a leader's lease, on the caller's thread.
//!
//! The worker that owns a region publishes until when its leader's lease holds. A
//! read takes the time *first*, then looks at the lease, then takes a snapshot of
//! the engine, then checks that the lease was not withdrawn meanwhile and that the
//! region's range is still the same:
//!
//! - Time before lease: a lease that is withdrawn (transfer, split, step-down) is
//!   withdrawn before anybody else may lead, so a lease that is seen after the
//!   time was taken was in force at that time.
//! - Snapshot after lease: all writes acknowledged before the read began were
//!   applied here by then.
//! - Lease and range after snapshot: data leaves a store only after the lease was
//!   withdrawn (a snapshot of the leader's is installed in its place) or the
//!   descriptor has changed (a split, a removal). A reader may be held up between any
//!   two of its steps for as long as that takes.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arc_swap::ArcSwap;
use esker_engine::{Cf, EngineError, KvEngine, KvIter, KvSnapshot};
use esker_model::{KeyRange, Region, RegionId};
use esker_mutants::broken;
use esker_raft::{PeerId, Term, Time};
use parking_lot::RwLock;

use crate::message::RequestContext;
use crate::state::bounds;

/// What a worker lets readers on other threads know of one of its regions.
#[derive(Debug)]
pub struct ReadDelegate {
    descriptor: ArcSwap<Region>,
    /// Nanoseconds on the store's clock; zero when there is no lease.
    lease_until: AtomicU64,
    /// The term in which that lease was won.
    lease_term: AtomicU64,
    peer: AtomicU64,
    /// Bytes and keys that reads returned since they were last asked for, whoever leads.
    read_bytes: AtomicU64,
    read_keys: AtomicU64,
}

/// A region's data as of one moment, linearizable with respect to the request that asked for it.
/// What is read of it is counted, for placement's picture of the load.
#[derive(Clone)]
pub struct RegionSnapshot {
    kv: KvSnapshot,
    descriptor: Arc<Region>,
    delegate: Arc<ReadDelegate>,
}

/// Whether blocks that are read stay in the engine's cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cache {
    Fill,
    /// For reads of so much that they would push everything else out.
    Bypass,
}

/// The pairs of a range of one region, in key order.
pub struct RegionIter {
    iter: KvIter,
    delegate: Arc<ReadDelegate>,
    keys: u64,
    bytes: u64,
}

impl ReadDelegate {
    pub fn new(descriptor: Arc<Region>, peer: PeerId) -> Self {
        ReadDelegate {
            descriptor: ArcSwap::new(descriptor),
            lease_until: AtomicU64::new(0),
            lease_term: AtomicU64::new(0),
            peer: AtomicU64::new(peer.0),
            read_bytes: AtomicU64::new(0),
            read_keys: AtomicU64::new(0),
        }
    }

    pub fn set_descriptor(&self, descriptor: Arc<Region>) {
        self.descriptor.store(descriptor);
    }

    pub fn descriptor(&self) -> Arc<Region> {
        self.descriptor.load_full()
    }

    /// Only the region's worker calls this, after withdrawing the lease of an earlier term.
    pub fn publish_lease(&self, term: Term, until: Time) {
        self.lease_term.store(term.0, Ordering::Release);
        self.lease_until.store(until.0, Ordering::Release);
    }

    /// The term of the lease that is in force at `now`, for those who keep what they
    /// learnt in one term from being used in another.
    pub fn lease_term(&self, now: Time) -> Option<Term> {
        let before = self.lease_term.load(Ordering::Acquire);
        let holds = self.holds_lease(now);
        let after = self.lease_term.load(Ordering::Acquire);
        (holds && before == after).then_some(Term(after))
    }

    pub fn withdraw_lease(&self) {
        self.lease_until.store(0, Ordering::Release);
    }

    pub fn holds_lease(&self, now: Time) -> bool {
        now.0 < self.lease_until.load(Ordering::Acquire)
    }

    fn count_read(&self, keys: u64, bytes: u64) {
        self.read_keys.fetch_add(keys, Ordering::Relaxed);
        self.read_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Bytes and keys read since the last call.
    pub fn take_read_load(&self) -> (u64, u64) {
        (self.read_bytes.swap(0, Ordering::Relaxed), self.read_keys.swap(0, Ordering::Relaxed))
    }

    /// Whether the lease of `term` was not withdrawn. It is published again only in a later
    /// term, or while its leader still leads and has kept its data.
    ///
    /// A reader asks this after it took its view. A view that lacks data was taken after the data
    /// left, and the data left after the lease was withdrawn. So the reader sees the withdrawal,
    /// or the lease of a later term.
    fn kept_lease(&self, term: u64) -> bool {
        self.lease_until.load(Ordering::Acquire) != 0
            && self.lease_term.load(Ordering::Acquire) == term
    }

    fn lease_read(
        self: &Arc<Self>,
        snapshot: impl FnOnce() -> KvSnapshot,
        context: &RequestContext,
        now: Time,
    ) -> Option<RegionSnapshot> {
        let term = self.lease_term.load(Ordering::Acquire);
        if !self.holds_lease(now) {
            return None;
        }
        if context.peer.is_some_and(|peer| peer.0 != self.peer.load(Ordering::Relaxed)) {
            return None;
        }
        let before = self.descriptor.load_full();
        if !context.epoch.is_same_range(before.epoch) {
            return None;
        }
        let kv = snapshot();
        let after = self.descriptor.load();
        let kept_range = before.epoch.is_same_range(after.epoch) || broken!(LeaseReadLooksTwice);
        (kept_range && self.kept_lease(term)).then(|| RegionSnapshot::new(kv, before, self.clone()))
    }
}

impl std::fmt::Debug for RegionSnapshot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "view of region {}", self.descriptor.id)
    }
}

impl RegionSnapshot {
    pub fn new(kv: KvSnapshot, descriptor: Arc<Region>, delegate: Arc<ReadDelegate>) -> Self {
        RegionSnapshot { kv, descriptor, delegate }
    }

    /// The region as it was at that moment.
    pub fn descriptor(&self) -> &Arc<Region> {
        &self.descriptor
    }

    /// The value of one key, which must lie in the region.
    ///
    /// # Errors
    /// When the engine cannot read it.
    pub fn get(&self, cf: Cf, key: &[u8]) -> Result<Option<Vec<u8>>, EngineError> {
        let found = self.kv.get(cf, key)?;
        let bytes = key.len() + found.as_ref().map_or(0, Vec::len);
        self.delegate.count_read(1, bytes as u64);
        Ok(found)
    }

    /// The part of a range that lies in the region; `None` where none does. The iterator is not
    /// positioned yet.
    pub fn iter(&self, cf: Cf, range: &KeyRange, cache: Cache) -> Option<RegionIter> {
        let part = range.intersection(&self.descriptor.range)?;
        let (start, end) = bounds(&part);
        let iter = match cache {
            Cache::Fill => self.kv.iter(cf, start, end),
            Cache::Bypass => self.kv.iter_uncached(cf, start, end),
        };
        Some(RegionIter { iter, delegate: self.delegate.clone(), keys: 0, bytes: 0 })
    }

    /// The engine's whole view, whose reads nobody counts: for what placement does not balance.
    pub fn uncounted(&self) -> &KvSnapshot {
        &self.kv
    }
}

impl RegionIter {
    pub fn seek_to_first(&mut self) {
        self.iter.seek_to_first();
    }

    pub fn seek_to_last(&mut self) {
        self.iter.seek_to_last();
    }

    /// Whether the iterator is at a pair.
    ///
    /// # Errors
    /// When the engine cannot read what comes next.
    pub fn valid(&self) -> Result<bool, EngineError> {
        self.iter.valid()
    }

    pub fn key(&self) -> &[u8] {
        self.iter.key()
    }

    pub fn value(&self) -> &[u8] {
        self.iter.value()
    }

    pub fn next(&mut self) {
        self.count();
        self.iter.next();
    }

    pub fn prev(&mut self) {
        self.count();
        self.iter.prev();
    }

    fn count(&mut self) {
        self.keys += 1;
        self.bytes += (self.iter.key().len() + self.iter.value().len()) as u64;
    }
}

impl Drop for RegionIter {
    fn drop(&mut self) {
        self.delegate.count_read(self.keys, self.bytes);
    }
}

const SHARDS: usize = 16;

/// The delegates of all regions of a store, found without passing a worker.
#[derive(Debug)]
pub struct ReadDelegates {
    hasher: RandomState,
    shards: [RwLock<HashMap<RegionId, Arc<ReadDelegate>>>; SHARDS],
}

impl Default for ReadDelegates {
    fn default() -> Self {
        ReadDelegates {
            hasher: RandomState::new(),
            shards: std::array::from_fn(|_| RwLock::default()),
        }
    }
}

impl ReadDelegates {
    fn shard(&self, region: RegionId) -> &RwLock<HashMap<RegionId, Arc<ReadDelegate>>> {
        &self.shards[(self.hasher.hash_one(region) as usize) % SHARDS]
    }

    pub fn insert(&self, region: RegionId, delegate: Arc<ReadDelegate>) {
        self.shard(region).write().insert(region, delegate);
    }

    pub fn remove(&self, region: RegionId) {
        self.shard(region).write().remove(&region);
    }

    pub fn get(&self, region: RegionId) -> Option<Arc<ReadDelegate>> {
        self.shard(region).read().get(&region).cloned()
    }

    /// Regions on the store, whatever their role.
    pub fn count(&self) -> usize {
        self.shards.iter().map(|shard| shard.read().len()).sum()
    }

    /// Every region's descriptor as this store has applied it.
    pub fn descriptors(&self) -> Vec<Arc<Region>> {
        self.shards
            .iter()
            .flat_map(|shard| {
                shard.read().values().map(|delegate| delegate.descriptor()).collect::<Vec<_>>()
            })
            .collect()
    }

    /// The region's data under its leader's lease, or nothing where only the
    /// region's worker can answer. `now` must have been taken by the caller for
    /// this request, on the clock that the workers run on.
    pub fn lease_read(
        &self,
        kv: &KvEngine,
        region: RegionId,
        context: &RequestContext,
        now: Time,
    ) -> Option<RegionSnapshot> {
        self.lease_read_with(region, context, now, || kv.snapshot())
    }

    /// The same, with a view that `snapshot` takes when it is time.
    pub fn lease_read_with(
        &self,
        region: RegionId,
        context: &RequestContext,
        now: Time,
        snapshot: impl FnOnce() -> KvSnapshot,
    ) -> Option<RegionSnapshot> {
        if context.replica_read {
            return None;
        }
        self.get(region)?.lease_read(snapshot, context, now)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use esker_engine::{EngineOptions, MemoryEnv};
    use esker_model::Epoch;

    use super::*;

    const LEASE: Time = Time(100);

    fn led() -> (KvEngine, Arc<ReadDelegate>, RequestContext) {
        let options = EngineOptions::in_memory(MemoryEnv::new());
        let kv = KvEngine::open(Path::new("/kv"), &options).expect("an engine");
        let epoch = Epoch::FIRST;
        let region = Region { epoch, ..Region::uninitialized(RegionId(7)) };
        let delegate = Arc::new(ReadDelegate::new(Arc::new(region), PeerId(1)));
        delegate.publish_lease(Term(5), LEASE);
        (kv, delegate, RequestContext { epoch, ..RequestContext::default() })
    }

    /// What happens while a reader is held up between its look at the lease and its snapshot.
    fn read_while(happens: impl FnOnce(&ReadDelegate)) -> bool {
        let (kv, delegate, context) = led();
        let snapshot = || {
            happens(&delegate);
            kv.snapshot()
        };
        delegate.lease_read(snapshot, &context, Time(1)).is_some()
    }

    #[test]
    fn a_reader_that_is_held_up_gets_nothing_of_a_lease_that_was_withdrawn() {
        assert!(read_while(|_| ()));
        assert!(read_while(|delegate| delegate.publish_lease(Term(5), Time(900))), "renewed");
        // Deposed; the data may be exchanged for a snapshot's from now on.
        assert!(!read_while(ReadDelegate::withdraw_lease));
        assert!(
            !read_while(|delegate| {
                delegate.withdraw_lease();
                delegate.publish_lease(Term(6), Time(900));
            }),
            "exchanged, and elected again"
        );
    }
}
