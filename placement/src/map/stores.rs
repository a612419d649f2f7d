//! The stores of the cluster: who they are, and how they were when they last
//! said so.

use std::collections::BTreeMap;

use thiserror::Error;

use crate::types::{Moment, StoreId};

/// What an operator wants of a store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum StoreState {
    /// It serves and takes replicas.
    #[default]
    Up,
    /// It is being emptied: its replicas move elsewhere.
    Offline,
    /// It left for good; its id never comes back.
    Tombstone,
}

/// A location label, such as `zone=a`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Label {
    pub key: String,
    pub value: String,
}

/// Who a store is: what it says of itself when it starts. Durable.
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
}

/// What a store says of itself with each heartbeat.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StoreStats {
    /// Bytes of its disk; zero where it does not know.
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
}

/// How long a silent store is believed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreConfig {
    /// After this many milliseconds nothing new is placed on it.
    pub disconnected_after_ms: u64,
    /// After this many milliseconds its replicas are replaced.
    pub down_after_ms: u64,
}

impl Default for StoreConfig {
    fn default() -> Self {
        Self {
            disconnected_after_ms: 20_000,
            // Copying a store's data is dear; a restart or a reboot takes less.
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

/// What a replica on a store is worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoreHealth {
    /// Serves and takes more.
    Good,
    /// Silent for a while; nothing is placed on it, nothing moved away yet.
    Silent,
    /// Silent for so long that its replicas are replaced.
    Down,
    /// Its operator empties it.
    Draining,
    /// Gone for good, or never heard of.
    Gone,
}

impl StoreHealth {
    /// Whether a replica there has to be replaced.
    pub fn must_be_left(self) -> bool {
        matches!(self, Self::Down | Self::Draining | Self::Gone)
    }

    /// Whether a replica there answers.
    pub fn is_live(self) -> bool {
        matches!(self, Self::Good | Self::Draining)
    }
}

/// One store as the placement driver knows it.
#[derive(Clone, Debug)]
pub struct Store {
    pub descriptor: StoreDescriptor,
    pub stats: StoreStats,
    /// The last sign of life, or when this leader learned of the store: after a
    /// change of leader every store gets its full time to speak.
    pub last_seen: Moment,
    /// Wall clock of the last heartbeat, milliseconds; zero when none came.
    pub last_heartbeat_ms: u64,
}

/// Why a store was not accepted.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum PutStoreError {
    #[error("store {id} was removed from the cluster; start with an empty data directory")]
    Tombstone { id: StoreId },
    #[error(
        "address {address} belongs to store {holder}, which store {id} cannot take; \
         remove store {holder} first, or use its data directory"
    )]
    DuplicateAddress { id: StoreId, address: String, holder: StoreId },
    #[error("store {id} gives no address")]
    NoAddress { id: StoreId },
}

/// All stores, by id.
#[derive(Debug, Default)]
pub struct StoreMap {
    stores: BTreeMap<StoreId, Store>,
}

impl StoreMap {
    /// Whether `descriptor` may be put; the caller makes it durable, then calls
    /// [`StoreMap::put`]. Answers what is to be stored: a restarting store does
    /// not undo that it is being emptied.
    pub fn check_put(&self, descriptor: StoreDescriptor) -> Result<StoreDescriptor, PutStoreError> {
        let id = descriptor.id;
        if descriptor.address.is_empty() {
            return Err(PutStoreError::NoAddress { id });
        }
        let holder = self.stores.values().find(|other| {
            other.descriptor.id != id
                && other.descriptor.state != StoreState::Tombstone
                && other.descriptor.address == descriptor.address
        });
        if let Some(holder) = holder {
            return Err(PutStoreError::DuplicateAddress {
                id,
                address: descriptor.address,
                holder: holder.descriptor.id,
            });
        }
        let state = match self.stores.get(&id).map(|known| known.descriptor.state) {
            Some(StoreState::Tombstone) => return Err(PutStoreError::Tombstone { id }),
            Some(state) => state,
            None => StoreState::Up,
        };
        Ok(StoreDescriptor { state, ..descriptor })
    }

    /// Takes in a durable descriptor.
    pub fn put(&mut self, descriptor: StoreDescriptor, now: Moment) {
        match self.stores.get_mut(&descriptor.id) {
            Some(known) => {
                known.descriptor = descriptor;
                known.last_seen = now;
            }
            None => {
                self.stores.insert(
                    descriptor.id,
                    Store {
                        descriptor,
                        stats: StoreStats::default(),
                        last_seen: now,
                        last_heartbeat_ms: 0,
                    },
                );
            }
        }
    }

    /// Takes in a heartbeat; answers the store, or nothing when it is unknown.
    pub fn heartbeat(
        &mut self,
        id: StoreId,
        stats: StoreStats,
        now: Moment,
        wall_ms: u64,
    ) -> Option<&Store> {
        let store = self.stores.get_mut(&id)?;
        store.stats = stats;
        store.last_seen = now;
        store.last_heartbeat_ms = wall_ms;
        Some(store)
    }

    /// The store with this id.
    pub fn get(&self, id: StoreId) -> Option<&Store> {
        self.stores.get(&id)
    }

    /// Every store, by id.
    pub fn iter(&self) -> impl Iterator<Item = &Store> {
        self.stores.values()
    }

    /// Whether this store has been heard from.
    pub fn liveness(store: &Store, config: &StoreConfig, now: Moment) -> Liveness {
        let silent = now.since(store.last_seen);
        if silent >= config.down_after_ms {
            Liveness::Down
        } else if silent >= config.disconnected_after_ms {
            Liveness::Disconnected
        } else {
            Liveness::Alive
        }
    }

    /// What a replica on store `id` is worth.
    pub fn health(&self, id: StoreId, config: &StoreConfig, now: Moment) -> StoreHealth {
        let Some(store) = self.stores.get(&id) else {
            return StoreHealth::Gone;
        };
        match (store.descriptor.state, Self::liveness(store, config, now)) {
            (StoreState::Tombstone, _) => StoreHealth::Gone,
            (_, Liveness::Down) => StoreHealth::Down,
            (_, Liveness::Disconnected) => StoreHealth::Silent,
            (StoreState::Offline, Liveness::Alive) => StoreHealth::Draining,
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
        stores.put(descriptor(1, "a:1"), Moment(0));
        let refused = stores.check_put(descriptor(2, "a:1"));
        assert!(matches!(refused, Err(PutStoreError::DuplicateAddress { holder: StoreId(1), .. })));
        // The same store comes back, also at another address.
        assert!(stores.check_put(descriptor(1, "a:1")).is_ok());
        assert!(stores.check_put(descriptor(1, "b:1")).is_ok());
        let tombstone = StoreDescriptor { state: StoreState::Tombstone, ..descriptor(1, "a:1") };
        stores.put(tombstone, Moment(0));
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
        stores.put(offline, Moment(0));
        let again = stores.check_put(descriptor(1, "a:1")).unwrap();
        assert_eq!(again.state, StoreState::Offline);
    }

    #[test]
    fn a_silent_store_is_first_disconnected_then_down() {
        let config = StoreConfig { disconnected_after_ms: 100, down_after_ms: 1_000 };
        let mut stores = StoreMap::default();
        stores.put(descriptor(1, "a:1"), Moment(50));
        let at = |stores: &StoreMap, now| stores.health(StoreId(1), &config, Moment(now));
        assert_eq!(at(&stores, 149), StoreHealth::Good);
        assert_eq!(at(&stores, 150), StoreHealth::Silent);
        assert_eq!(at(&stores, 1_050), StoreHealth::Down);
        stores.heartbeat(StoreId(1), StoreStats::default(), Moment(1_100), 7);
        assert_eq!(at(&stores, 1_101), StoreHealth::Good);
        assert_eq!(stores.health(StoreId(2), &config, Moment(0)), StoreHealth::Gone);
    }
}
