//! The placement driver: it decides where Esker's data is placed, and hands out the cluster's ids
//! and timestamps.
//!
//! **What flows in**: heartbeats of stores and of regions' leaders, lookups and requests of clients
//! over gRPC and HTTP, and the outcome of its own group's elections. **What flows out**: answers,
//! orders for regions' leaders, and writes to its own replicated key space. It never touches user
//! data.
//!
//! **What it promises**
//!
//! - Ids never repeat and timestamps never go back, across leaders, restarts and clock steps:
//!   [`ids`], [`timestamp`].
//! - A deposed leader answers nothing. Every answer is given under a lease of the very term whose
//!   state it comes from ([`lead`]).
//! - A region is never left with fewer live voters than before: [`schedule`].
//!
//! **What it does not keep.** The map from keys to regions is not durable. The stores own that
//! truth, and a new leader learns it from their heartbeats. After the bootstrap, or after a change
//! of the placement driver's leader, the leader of the region that holds a key may not have
//! reported yet. Then a lookup waits for a moment and returns an error that clients retry, never a
//! guess.
//!
//! The modules, from the inside out:
//!
//! | module | what is in it | I/O |
//! |---|---|---|
//! | [`map`], [`operator`], [`schedule`], [`cluster`] | the cluster as known, and what to do about it | none, the time is an argument |
//! | [`ids`], [`timestamp`] | sequences with a durable window | none |
//! | [`state`] | what is durable, and the key space that it is in | behind a trait |
//! | [`lead`] | one term of office: loads, keeps windows, schedules, ends | yes |
//! | [`server`] | gRPC and HTTP | yes |

pub mod cluster;
pub mod ids;
pub mod lead;
pub mod map;
pub mod operator;
pub mod schedule;
pub mod server;
pub mod state;
pub mod timestamp;

#[cfg(test)]
mod testing;

pub use esker_model::MemberId;
pub use operator::OperatorLimits;
pub use schedule::ScheduleConfig;
pub use server::{PlacementConfig, PlacementServer};
pub use state::{
    DamagedState, Leadership, MemberInfo, Pairs, ReplicatedState, StateError, StateWrite,
};
