//! What a node serves: the store's requests, the traffic between stores, reports to
//! placement, and the placement driver's own replicated state.
//!
//! Everything here connects the sockets of `esker-rpc` with the regions of `esker-raftstore`. It
//! decides nothing about regions.

pub mod admin;
pub mod assembly;
pub mod bootstrap;
pub mod founding;
pub mod health;
pub mod heartbeats;
pub mod known_stores;
pub mod late;
pub mod member;
pub mod newcomer;
pub mod outbox;
pub mod pages;
pub mod recall;
mod replacing;
pub mod split_ids;
pub mod traffic;
