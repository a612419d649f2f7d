//! The stores of the cluster: their descriptors, and their states as of their last report.

use std::collections::BTreeMap;

use esker_model::{StoreId, Time};
use esker_mutants::broken;
use thiserror::Error;

/// What an operator wants of a store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum StoreState {
    /// It serves and takes replicas.
    #[default]
    Up,
    /// It is being emptied: its replicas move elsewhere.
    Offline,
    /// It left for good. Its id never comes back.
    Tombstone,
}

/// A location label, such as `zone=a`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Label {
    pub key: String,
    pub value: String,
}

/// How far a store's memory had come. It only grows, so less means an older copy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StoreMemory {
    /// Drawn when the store's directory was first used. Zero from stores that do not report it.
    pub lineage: u64,
    /// How often the directory was started.
    pub generation: u64,
    /// How many changes its log holds durably.
    pub log_sequence: u64,
    /// Drawn at each start.
    pub start: u64,
}

impl StoreMemory {
    /// Whether a store that was last known as `self` may come back as `now`.
    fn may_become(&self, now: &StoreMemory) -> bool {
        if self.lineage == 0 {
            return true;
        }
        // The same generation from two starts means that one of the two directories is a copy.
        let goes_on = now.generation > self.generation
            || (now.generation == self.generation && now.start == self.start);
        self.lineage == now.lineage && goes_on && now.log_sequence >= self.log_sequence
    }
}

/// The descriptor of a store: what it reports of itself when it starts. Durable.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StoreDescriptor {
    pub id: StoreId,
    /// `host:port`, without a scheme.
    pub address: String,
    pub peer_address: String,
    pub status_address: String,
    pub state: StoreState,
    pub labels: Vec<Label>,
    pub version: String,
    pub git_hash: String,
    pub deploy_path: String,
    /// Seconds since the Unix epoch.
    pub start_timestamp: i64,
    pub memory: StoreMemory,
}

/// What a store reports of itself with each heartbeat.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StoreStats {
    /// Bytes of its disk. Zero if the store does not know.
    pub capacity: u64,
    pub available: u64,
    pub used_size: u64,
    pub region_count: u32,
    pub sending_snapshots: u32,
    pub receiving_snapshots: u32,
    pub applying_snapshots: u32,
    /// Seconds since the Unix epoch.
    pub start_time: u32,
    pub is_busy: bool,
    pub bytes_written: u64,
    pub bytes_read: u64,
    pub keys_written: u64,
    pub keys_read: u64,
    pub log_sequence: u64,
    /// The damage that was found, by file or entry. Empty for a store without damage.
    pub damage: String,
    /// Drawn at the start of the store. Zero from stores that do not report it.
    pub start: u64,
    /// How often the store's directory was started.
    pub generation: u64,
}

/// After which silence the state of a store changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreConfig {
    /// After this many milliseconds of silence nothing new is placed on the store.
    pub disconnected_after_ms: u64,
    /// After this many milliseconds of silence the store's replicas are replaced.
    pub down_after_ms: u64,
}

impl Default for StoreConfig {
    fn default() -> Self {
        Self {
            disconnected_after_ms: 20_000,
            // Copying a store's data is expensive. A restart or a reboot takes less time than this.
            down_after_ms: 30 * 60_000,
        }
    }
}

/// Whether a store has been heard from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Liveness {
    Alive,
    Disconnected,
    Down,
}

/// The state of a store, as far as a replica on it is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoreHealth {
    /// It serves, and takes more replicas.
    Good,
    /// It has been silent for a while. Nothing is placed on it, and nothing is moved away yet.
    Silent,
    /// It has been silent for so long that its replicas are replaced.
    Down,
    /// Its operator empties it.
    Draining,
    /// It is gone for good, or was never known.
    Gone,
}

impl StoreHealth {
    /// Whether a replica on such a store has to be replaced.
    pub fn must_be_left(self) -> bool {
        matches!(self, Self::Down | Self::Draining | Self::Gone)
    }

    /// Whether a replica on such a store answers.
    pub fn is_live(self) -> bool {
        matches!(self, Self::Good | Self::Draining)
    }
}

/// One store as the placement driver knows it.
#[derive(Clone, Debug)]
pub struct Store {
    pub descriptor: StoreDescriptor,
    pub stats: StoreStats,
    /// The last sign of life, or when this leader learned of the store.
    pub last_seen: Time,
    /// For how many milliseconds the store had been silent before that, at the least, according to
    /// what an earlier leader made durable.
    silent_before_ms: u64,
    /// The wall clock at the last heartbeat, in milliseconds. Zero when none came.
    pub last_heartbeat_ms: u64,
    /// Whether this leader has heard of the store itself.
    pub is_heard: bool,
    /// When this leader last made the store's descriptor durable.
    saved: Option<Time>,
}

impl Store {
    /// For how long the store has been silent, in milliseconds. If the silence began under an
    /// earlier leader, up to a minute of it may be missing.
    pub fn silent_ms(&self, now: Time) -> u64 {
        self.silent_before_ms.saturating_add(now.millis_since(self.last_seen))
    }
}

/// How often a store's memory, and the fact that the store is alive, are made durable.
const SAVE_MEMORY_EVERY_MS: u64 = 60_000;
/// How long a store must be silent before another may take its address for good: longer than the
/// time between two heartbeats of a running store.
const REPLACED_AFTER_MS: u64 = 10_000;

/// Why a store was not accepted.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum PutStoreError {
    #[error(
        "store {id} was removed from the cluster; empty the store's directory, `store` in the data \
         directory, and start again"
    )]
    Tombstone { id: StoreId },
    #[error(
        "address {address} belongs to store {holder}, which store {id} cannot take; \
         use the data directory of store {holder}, or, if that is lost for good, empty this \
         store's and start with --replace"
    )]
    DuplicateAddress { id: StoreId, address: String, holder: StoreId },
    #[error(
        "address {address} belongs to store {holder}, which was heard of {silent_ms} ms ago; \
         stop it, and try again when it has been silent for {} s", REPLACED_AFTER_MS / 1_000
    )]
    StillAlive { address: String, holder: StoreId, silent_ms: u64 },
    #[error(
        "address {address} belongs to store {holder}, the only one of the cluster: nobody else has \
         its data; put its data directory back, or found a new cluster"
    )]
    OnlyStore { address: String, holder: StoreId },
    #[error(
        "the data directory of store {id} is an older copy (start {}, change {}) than what the \
         cluster last saw of it (start {}, change {}); put the newest back; if it is lost for \
         good, empty the directory and start with --replace",
        now.generation, now.log_sequence, last.generation, last.log_sequence
    )]
    OlderCopy { id: StoreId, now: StoreMemory, last: StoreMemory },
    #[error(
        "store {id} was started again since this process was, from a copy of its data directory: \
         one of the two must not go on, and the later one does"
    )]
    OtherStart { id: StoreId },
    #[error("store {id} gives no address")]
    NoAddress { id: StoreId },
}

/// All stores, by id.
#[derive(Debug, Default)]
pub struct StoreMap {
    stores: BTreeMap<StoreId, Store>,
}

impl StoreMap {
    /// Whether `descriptor` may be put. The caller makes it durable, then calls [`StoreMap::put`].
    /// Returns what is to be stored: a store that restarts while it is being emptied is still being
    /// emptied.
    pub fn check_put(&self, descriptor: StoreDescriptor) -> Result<StoreDescriptor, PutStoreError> {
        let id = descriptor.id;
        if descriptor.address.is_empty() {
            return Err(PutStoreError::NoAddress { id });
        }
        let known = self.stores.get(&id).map(|known| &known.descriptor);
        // This check comes first, because a removed store's address no longer matters.
        if known.is_some_and(|known| known.state == StoreState::Tombstone) {
            return Err(PutStoreError::Tombstone { id });
        }
        if let Some(holder) = self.holder(&descriptor) {
            return Err(PutStoreError::DuplicateAddress {
                id,
                address: descriptor.address,
                holder: holder.descriptor.id,
            });
        }
        let Some(known) = known else {
            return Ok(StoreDescriptor { state: StoreState::Up, ..descriptor });
        };
        if !known.memory.may_become(&descriptor.memory) && !broken!(OlderCopyIsRefused) {
            let (now, last) = (descriptor.memory, known.memory);
            return Err(PutStoreError::OlderCopy { id, now, last });
        }
        Ok(StoreDescriptor { state: known.state, ..descriptor })
    }

    /// The other store that has the address, if there is one.
    fn holder(&self, descriptor: &StoreDescriptor) -> Option<&Store> {
        self.stores.values().find(|other| {
            other.descriptor.id != descriptor.id
                && other.descriptor.state != StoreState::Tombstone
                && other.descriptor.address == descriptor.address
        })
    }

    /// Whether `descriptor` may take its address from a store that lost its memory for good.
    /// Returns that store's descriptor as a tombstone; `None` if no store has the address.
    ///
    /// # Errors
    /// When that store was heard of less than 10 s ago, or is the only store of the cluster.
    pub fn check_replace(
        &self,
        descriptor: &StoreDescriptor,
        now: Time,
    ) -> Result<Option<StoreDescriptor>, PutStoreError> {
        // Only a new store takes another's place, because a known store has a place of its own.
        if self.stores.contains_key(&descriptor.id) {
            return Ok(None);
        }
        let Some(holder) = self.holder(descriptor) else { return Ok(None) };
        let is_in_use = |store: &&Store| store.descriptor.state != StoreState::Tombstone;
        if self.stores.values().filter(is_in_use).count() == 1 {
            let (address, holder) = (descriptor.address.clone(), holder.descriptor.id);
            return Err(PutStoreError::OnlyStore { address, holder });
        }
        let silent_ms = now.millis_since(holder.last_seen);
        // A leader that has just begun has not heard of any store yet.
        if silent_ms < REPLACED_AFTER_MS {
            let (address, holder) = (descriptor.address.clone(), holder.descriptor.id);
            return Err(PutStoreError::StillAlive { address, holder, silent_ms });
        }
        Ok(Some(StoreDescriptor { state: StoreState::Tombstone, ..holder.descriptor.clone() }))
    }

    /// Takes in a store as an earlier leader knew it. `heartbeat_ms` and `newest_ms` are wall
    /// times: of the last durable heartbeat of this store, and of any store. The silence is
    /// measured up to `newest_ms` and not up to now, because stores were not silent while no leader
    /// listened, and because clocks differ.
    pub fn resume(
        &mut self,
        descriptor: StoreDescriptor,
        heartbeat_ms: u64,
        newest_ms: u64,
        now: Time,
    ) {
        let id = descriptor.id;
        self.put(descriptor, now);
        if let Some(store) = self.stores.get_mut(&id) {
            store.is_heard = false;
            if heartbeat_ms != 0 {
                store.last_heartbeat_ms = heartbeat_ms;
                // The store may have been heard of until its next heartbeat was to be made durable.
                let silent_ms = newest_ms.saturating_sub(heartbeat_ms);
                store.silent_before_ms = silent_ms.saturating_sub(SAVE_MEMORY_EVERY_MS);
            }
        }
    }

    /// Takes in a durable descriptor.
    pub fn put(&mut self, descriptor: StoreDescriptor, now: Time) {
        match self.stores.get_mut(&descriptor.id) {
            Some(known) => {
                // A tombstone is no sign of life.
                if descriptor.state != StoreState::Tombstone {
                    known.last_seen = now;
                    known.silent_before_ms = 0;
                    known.is_heard = true;
                }
                known.descriptor = descriptor;
                known.saved = None;
            }
            None => {
                self.stores.insert(
                    descriptor.id,
                    Store {
                        descriptor,
                        stats: StoreStats::default(),
                        last_seen: now,
                        silent_before_ms: 0,
                        last_heartbeat_ms: 0,
                        is_heard: true,
                        // The first heartbeat is to be made durable.
                        saved: None,
                    },
                );
            }
        }
    }

    /// Whether a heartbeat comes from the process that last introduced itself as the store. A
    /// process of an earlier start may still be alive if its directory was copied and the copy was
    /// started.
    pub fn check_start(&self, id: StoreId, stats: &StoreStats) -> Result<(), PutStoreError> {
        let known = self.stores.get(&id).map_or_else(StoreMemory::default, |s| s.descriptor.memory);
        let differ = known.start != 0 && stats.start != 0 && known.start != stats.start;
        // If this placement driver's own memory went back, it may know only an earlier start.
        match differ && known.generation >= stats.generation {
            true => Err(PutStoreError::OtherStart { id }),
            false => Ok(()),
        }
    }

    /// Takes in a heartbeat, and returns the store; `None` when it is unknown.
    pub fn heartbeat(
        &mut self,
        id: StoreId,
        stats: StoreStats,
        now: Time,
        wall_ms: u64,
    ) -> Option<&Store> {
        let store = self.stores.get_mut(&id)?;
        let memory = &mut store.descriptor.memory;
        memory.log_sequence = memory.log_sequence.max(stats.log_sequence);
        store.stats = stats;
        store.last_seen = now;
        store.silent_before_ms = 0;
        store.is_heard = true;
        store.last_heartbeat_ms = wall_ms;
        Some(store)
    }

    /// Whether it is time to make the store's memory durable. Returns true once each time.
    pub fn take_unsaved(&mut self, id: StoreId, now: Time) -> bool {
        let due = |store: &&mut Store| {
            store.saved.is_none_or(|saved| now.millis_since(saved) >= SAVE_MEMORY_EVERY_MS)
        };
        match self.stores.get_mut(&id).filter(due) {
            Some(store) => {
                store.saved = Some(now);
                true
            }
            None => false,
        }
    }

    /// The store with this id.
    pub fn get(&self, id: StoreId) -> Option<&Store> {
        self.stores.get(&id)
    }

    /// Every store, by id.
    pub fn iter(&self) -> impl Iterator<Item = &Store> {
        self.stores.values()
    }

    /// Whether this store has been heard from. A leader that has just begun relies on what an
    /// earlier leader recorded of a silence. But it replaces no replicas for that alone, because
    /// the store must have had time to report.
    pub fn liveness(store: &Store, config: &StoreConfig, now: Time) -> Liveness {
        let silent = store.silent_ms(now);
        let had_time = now.millis_since(store.last_seen) >= config.disconnected_after_ms;
        if silent >= config.down_after_ms && had_time {
            Liveness::Down
        } else if silent >= config.disconnected_after_ms {
            Liveness::Disconnected
        } else {
            Liveness::Alive
        }
    }

    /// The state of store `id`, as far as a replica on it is concerned.
    pub fn health(&self, id: StoreId, config: &StoreConfig, now: Time) -> StoreHealth {
        let Some(store) = self.stores.get(&id) else {
            return StoreHealth::Gone;
        };
        match (store.descriptor.state, Self::liveness(store, config, now)) {
            (StoreState::Tombstone, _) => StoreHealth::Gone,
            // The store has stopped serving, and reports that for as long as its node lives.
            _ if !store.stats.damage.is_empty() => StoreHealth::Down,
            (_, Liveness::Down) => StoreHealth::Down,
            (_, Liveness::Disconnected) => StoreHealth::Silent,
            (StoreState::Offline, Liveness::Alive) => StoreHealth::Draining,
            // The store has time to report, but is not counted on before it has reported.
            (StoreState::Up, Liveness::Alive) if !store.is_heard => StoreHealth::Silent,
            (StoreState::Up, Liveness::Alive) => StoreHealth::Good,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn descriptor(id: u64, address: &str) -> StoreDescriptor {
        StoreDescriptor {
            id: StoreId(id),
            address: address.to_owned(),
            ..StoreDescriptor::default()
        }
    }

    #[test]
    fn an_address_belongs_to_one_store_until_that_is_a_tombstone() {
        let mut stores = StoreMap::default();
        stores.put(descriptor(1, "a:1"), Time::from_millis(0));
        let refused = stores.check_put(descriptor(2, "a:1"));
        assert!(matches!(refused, Err(PutStoreError::DuplicateAddress { holder: StoreId(1), .. })));
        // The same store comes back, first at the same address, then at another.
        assert!(stores.check_put(descriptor(1, "a:1")).is_ok());
        assert!(stores.check_put(descriptor(1, "b:1")).is_ok());
        let tombstone = StoreDescriptor { state: StoreState::Tombstone, ..descriptor(1, "a:1") };
        stores.put(tombstone, Time::from_millis(0));
        assert!(stores.check_put(descriptor(2, "a:1")).is_ok());
        assert_eq!(
            stores.check_put(descriptor(1, "c:1")),
            Err(PutStoreError::Tombstone { id: StoreId(1) })
        );
    }

    #[test]
    fn a_restart_does_not_undo_that_a_store_is_being_emptied() {
        let mut stores = StoreMap::default();
        let offline = StoreDescriptor { state: StoreState::Offline, ..descriptor(1, "a:1") };
        stores.put(offline, Time::from_millis(0));
        let again = stores.check_put(descriptor(1, "a:1")).unwrap();
        assert_eq!(again.state, StoreState::Offline);
    }

    #[test]
    fn a_store_comes_back_with_all_that_it_remembered_or_not_at_all() {
        let memory = |generation, start, log_sequence| StoreMemory {
            lineage: 9,
            generation,
            start,
            log_sequence,
        };
        let store = |memory| StoreDescriptor { memory, ..descriptor(1, "a:1") };
        let mut stores = StoreMap::default();
        stores.put(store(memory(4, 77, 100)), Time::from_millis(0));
        let stats = StoreStats { log_sequence: 500, ..StoreStats::default() };
        stores.heartbeat(StoreId(1), stats, Time::from_millis(1), 1).unwrap();
        assert!(stores.check_put(store(memory(5, 78, 500))).is_ok());
        assert!(stores.check_put(store(memory(4, 77, 500))).is_ok(), "told twice");
        let heartbeat = |generation, start| {
            let stats = StoreStats { start, generation, ..StoreStats::default() };
            stores.check_start(StoreId(1), &stats)
        };
        let other = Err(PutStoreError::OtherStart { id: StoreId(1) });
        assert_eq!(heartbeat(4, 77), Ok(()));
        assert_eq!(heartbeat(3, 76), other, "an earlier process that goes on");
        assert_eq!(heartbeat(4, 76), other, "started twice from one copy");
        assert_eq!(heartbeat(5, 78), Ok(()), "what placement has forgotten");
        for (older, why) in [
            (memory(3, 70, 500), "an earlier start"),
            (memory(4, 79, 500), "the same start, counted on from a copy"),
            (memory(5, 78, 499), "a copy made while the store ran"),
            (StoreMemory { lineage: 8, ..memory(5, 78, 500) }, "another directory"),
            (StoreMemory::default(), "a store that does not say"),
        ] {
            let refused = stores.check_put(store(older));
            assert!(matches!(refused, Err(PutStoreError::OlderCopy { .. })), "{why}");
        }
    }

    #[test]
    fn a_store_that_lost_its_memory_is_replaced_when_it_is_silent_and_by_a_newcomer_only() {
        let mut stores = StoreMap::default();
        stores.put(descriptor(1, "a:1"), Time::from_millis(0));
        stores.put(descriptor(2, "b:1"), Time::from_millis(0));
        let newcomer = descriptor(7, "a:1");
        let early = stores.check_replace(&newcomer, Time::from_millis(REPLACED_AFTER_MS - 1));
        assert!(matches!(early, Err(PutStoreError::StillAlive { .. })));
        let replaced =
            stores.check_replace(&newcomer, Time::from_millis(REPLACED_AFTER_MS)).unwrap().unwrap();
        assert_eq!((replaced.id, replaced.state), (StoreId(1), StoreState::Tombstone));
        // A known store has a place of its own, and a free address is not taken from any store.
        let known = descriptor(2, "a:1");
        assert_eq!(stores.check_replace(&known, Time(u64::MAX)), Ok(None));
        assert_eq!(stores.check_replace(&descriptor(7, "c:1"), Time(u64::MAX)), Ok(None));
    }

    #[test]
    fn the_only_store_is_not_replaced() {
        let mut stores = StoreMap::default();
        stores.put(descriptor(1, "a:1"), Time::from_millis(0));
        let gone = StoreDescriptor { state: StoreState::Tombstone, ..descriptor(2, "b:1") };
        stores.put(gone, Time::from_millis(0));
        let refused = stores.check_replace(&descriptor(7, "a:1"), Time(u64::MAX));
        assert!(matches!(refused, Err(PutStoreError::OnlyStore { holder: StoreId(1), .. })));
    }

    #[test]
    fn a_silence_goes_on_under_the_next_leader() {
        let config = StoreConfig { disconnected_after_ms: 20_000, down_after_ms: 1_800_000 };
        let liveness = |heartbeat_ms: u64, newest_ms: u64, after: u64| {
            let mut stores = StoreMap::default();
            stores.resume(descriptor(1, "a:1"), heartbeat_ms, newest_ms, Time::from_millis(5));
            let store = stores.get(StoreId(1)).unwrap();
            StoreMap::liveness(store, &config, Time::from_millis(5 + after))
        };
        const DAY_MS: u64 = 86_400_000;
        // Its later heartbeats may not have been made durable.
        assert_eq!(liveness(DAY_MS, DAY_MS + 79_999, 0), Liveness::Alive);
        assert_eq!(liveness(DAY_MS, DAY_MS + 80_000, 0), Liveness::Disconnected);
        // Not only for a silence that an earlier leader recorded.
        assert_eq!(liveness(DAY_MS, 2 * DAY_MS, 19_999), Liveness::Disconnected);
        assert_eq!(liveness(DAY_MS, 2 * DAY_MS, 20_000), Liveness::Down);
        // All stores were silent for as long, because no leader listened.
        assert_eq!(liveness(DAY_MS, DAY_MS, 19_999), Liveness::Alive);
        // A store that never sent a heartbeat.
        assert_eq!(liveness(0, DAY_MS, 19_999), Liveness::Alive);
        let mut stores = StoreMap::default();
        stores.resume(descriptor(1, "a:1"), DAY_MS, 2 * DAY_MS, Time::from_millis(5));
        assert!(
            stores.take_unsaved(StoreId(1), Time::from_millis(5)),
            "a new leader writes it down at once"
        );
        // Nothing is placed on the store before it has reported to this leader.
        assert_eq!(stores.health(StoreId(1), &config, Time::from_millis(5)), StoreHealth::Silent);
        stores.heartbeat(StoreId(1), StoreStats::default(), Time::from_millis(6), 2 * DAY_MS);
        assert_eq!(stores.get(StoreId(1)).unwrap().silent_ms(Time::from_millis(7)), 1);
        assert_eq!(stores.health(StoreId(1), &config, Time::from_millis(7)), StoreHealth::Good);
    }

    #[test]
    fn a_damaged_store_is_left_at_once() {
        let mut stores = StoreMap::default();
        stores.put(descriptor(1, "a:1"), Time::from_millis(0));
        let stats = StoreStats { damage: "000012.sst".to_owned(), ..StoreStats::default() };
        stores.heartbeat(StoreId(1), stats, Time::from_millis(1), 1).unwrap();
        let health = stores.health(StoreId(1), &StoreConfig::default(), Time::from_millis(2));
        assert!(health.must_be_left() && !health.is_live());
    }

    #[test]
    fn a_silent_store_is_first_disconnected_then_down() {
        let config = StoreConfig { disconnected_after_ms: 100, down_after_ms: 1_000 };
        let mut stores = StoreMap::default();
        stores.put(descriptor(1, "a:1"), Time::from_millis(50));
        let at =
            |stores: &StoreMap, now| stores.health(StoreId(1), &config, Time::from_millis(now));
        assert_eq!(at(&stores, 149), StoreHealth::Good);
        assert_eq!(at(&stores, 150), StoreHealth::Silent);
        assert_eq!(at(&stores, 1_050), StoreHealth::Down);
        stores.heartbeat(StoreId(1), StoreStats::default(), Time::from_millis(1_100), 7);
        assert_eq!(at(&stores, 1_101), StoreHealth::Good);
        assert_eq!(stores.health(StoreId(2), &config, Time::from_millis(0)), StoreHealth::Gone);
    }
}
