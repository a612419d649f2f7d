//! Whole groups of peers in one thread, to which everything happens that can
//! happen to a cluster, and which are compared with what Raft promises after every
//! step.
//!
//! # What it simulates
//!
//! A [`World`] holds one to seven peers: the real core of `esker-raft`, and around
//! each a driver with a disk that finishes its writes when it likes, a state
//! machine that applies late, and a clock that runs fast or slow. Between them is
//! a network that loses, doubles, delays and reorders. Everything that happens is
//! an [`Action`], and a world does with it the same every time.
//!
//! ```text
//!   seed ──▶ Generator ──▶ Action ──▶ World ──▶ Checks ──▶ Violation
//!               ▲                       │                      │
//!               └──── what it sees ─────┘      shorter list ◀──┘ shrink
//!                                                   │
//!                                                   └──▶ a story, which replays
//! ```
//!
//! A [`Generator`] chooses the actions, from one seed and from what it sees of the
//! world. It decides delays, losses, partitions, crashes, clients and changes of
//! members, and now and then follows a scheme that is after one rule of the
//! protocol. Which misfortunes a seed is to have is its [`Theme`].
//!
//! # What it checks
//!
//! `checks` knows everything that any peer ever did: one leader in a term, elected
//! by durable votes; one vote in a term; matching logs; acknowledgements of what is
//! durable; commits of what a majority holds; one history of all state machines;
//! configurations that overlap; leases that exclude others; and that clients see a
//! linearizable history, exactly. When the faults end, the group must work again in
//! bounded virtual time. A panic of the core is a violation like any other.
//!
//! # What it promises
//!
//! - The same seed and the same sources give the same run, on any machine: a world
//!   has no randomness, and a generator has one, and decides nothing by the order
//!   of a hash map.
//! - A run that breaks a promise is cut down, and printed as a story that replays
//!   it ([`Story`], the language of `raft/tests/traces`).
//! - A rule of the protocol that is broken on purpose is found: `raft/mutants`
//!   breaks them all, one at a time.
//!
//! The modules name each other by `super::`, because `raft/mutants` compiles the
//! same sources against its own copy of the core.

mod action;
mod checks;
pub mod driver;
mod fleet;
mod generator;
mod run;
mod settle;
mod setup;
mod shrink;
mod story;
mod summary;
mod violation;
mod world;

pub use action::Action;
pub use fleet::Fleet;
pub use generator::{Generator, Theme};
pub use run::{Recording, Run};
pub use settle::RECOVERY_LIMIT;
pub use setup::{PeerSetup, Setup};
pub use shrink::shrink;
pub use story::{Story, tell_action};
pub use summary::Summary;
pub use violation::{Checked, Promise, Violation, catching};
pub use world::World;
