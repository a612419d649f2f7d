//! The vocabulary that stores, placement, clients and tools share.
//!
//! | module | what it owns |
//! |---|---|
//! | [`id`] | regions, stores, members; peers, terms and indexes come from the consensus core |
//! | [`key`] | [`KeyRange`], whose end may be open |
//! | [`region`] | [`Region`], its [`Epoch`] and its [`Peer`]s with their roles |
//! | [`report`] | what a region's leader reports to placement |
//! | [`order`] | what placement orders a region's leader to do |
//! | [`timestamp`] | a point in the cluster's order of transactions |
//! | [`clock`] | the one clock: monotonic time and wall time |
//! | [`limits`] | the largest key, region and epoch that any part of the system accepts |
//!
//! A value of one of these types is possible: its ids are not zero, its range is not empty, its
//! epoch is not absent. A message from the wire becomes such a value, or a typed error, in
//! `esker_rpc::convert` and in no other place.
//!
//! This crate does no I/O apart from reading the clock, and depends on nothing of Esker but the
//! ids of `esker-raft`. A program that embeds a node finds it as `esker::model`.

#![warn(missing_docs)]

pub mod clock;
pub mod id;
pub mod key;
pub mod limits;
pub mod order;
pub mod region;
pub mod report;
pub mod timestamp;

pub use clock::{Clock, SystemClock};
pub use esker_raft::{LogIndex, PeerId, Term, Time};
pub use id::{MemberId, RegionId, StoreId};
pub use key::{EmptyRange, KeyRange};
pub use order::{Action, Order, PeerChange, Seat};
pub use region::{Epoch, NewRegion, Peer, Region, Role, may_follow};
pub use report::{DownPeer, RegionReport, Traffic};
pub use timestamp::Timestamp;
