//! The schedulers: pure functions from a view of the cluster to operators.
//!
//! - [`replicas`] brings every region to its number of healthy replicas.
//! - [`leaders`] spreads leaders over the stores, and scatters on request.
//!
//! They read nothing but the view, and change nothing. The caller decides whether to admit what
//! they propose.

pub mod leaders;
pub mod replicas;

use esker_model::{StoreId, Time};

use crate::map::{Liveness, RegionMap, Store, StoreConfig, StoreHealth, StoreMap, StoreState};
use crate::operator::{OperatorKind, OperatorSet};

/// The goals of the schedulers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScheduleConfig {
    /// Voters that every region should have.
    pub max_replicas: usize,
    pub stores: StoreConfig,
    /// A difference in leaders between two stores that deserves a transfer. At least 2, because
    /// otherwise one leader would go to and fro for ever.
    pub leader_difference: usize,
    /// For how many milliseconds balance does not move a region's leader again, because each move
    /// costs its clients a retry.
    pub leader_rest_ms: u64,
    /// Transfers that one round of balance proposes at most.
    pub leader_batch: usize,
}

impl Default for ScheduleConfig {
    fn default() -> Self {
        Self {
            max_replicas: 3,
            stores: StoreConfig::default(),
            leader_difference: 2,
            leader_rest_ms: 10_000,
            leader_batch: 8,
        }
    }
}

/// Everything that a scheduler may look at.
pub struct View<'a> {
    pub stores: &'a StoreMap,
    pub regions: &'a RegionMap,
    pub operators: &'a OperatorSet,
    pub config: &'a ScheduleConfig,
    pub now: Time,
}

impl View<'_> {
    /// The state of `store`, as far as a replica on it is concerned.
    pub fn health(&self, store: StoreId) -> StoreHealth {
        self.stores.health(store, &self.config.stores, self.now)
    }

    /// Whether `store` has been silent for so long that nothing new is placed on it.
    pub fn is_silent(&self, store: StoreId) -> bool {
        self.stores.get(store).is_some_and(|store| {
            StoreMap::liveness(store, &self.config.stores, self.now) != Liveness::Alive
        })
    }

    /// Stores that take new leaders and replicas.
    pub fn good_stores(&self) -> impl Iterator<Item = &Store> {
        self.stores.iter().filter(|store| {
            store.descriptor.state == StoreState::Up
                && self.health(store.descriptor.id) == StoreHealth::Good
        })
    }

    /// Whether the limits leave room for one more operator at `store`.
    pub fn has_room(&self, store: StoreId, kind: OperatorKind) -> bool {
        self.operators.has_room(store, kind)
    }
}
