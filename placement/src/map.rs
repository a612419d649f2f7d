//! The cluster map: which stores exist and their states, and which region holds which keys and
//! which peer leads it.
//!
//! Flows in: what stores and leaders report, and the time. Flows out: lookups, and the view that
//! the schedulers decide on. Stores are durable, and the caller writes them to the replicated state
//! first. Regions are not durable. The stores own that truth, and a new leader of the placement
//! driver learns it from their heartbeats within one round.

mod regions;
mod stores;

pub use regions::{CLAIM_MS, Gap, RefusedReport, RegionMap, StaleReport, StoreLoad};
pub use stores::{
    Label, Liveness, PutStoreError, Store, StoreConfig, StoreDescriptor, StoreHealth, StoreMap,
    StoreMemory, StoreState, StoreStats,
};
