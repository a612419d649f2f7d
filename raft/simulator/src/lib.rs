//! Whole groups of peers in one thread. Everything that can happen to a cluster happens to them,
//! and after every step they are compared with what Raft promises.
//!
//! # What it simulates
//!
//! A [`World`] holds one to seven peers. Each is the real core of `esker-raft` with a driver around
//! it: a disk that finishes its writes at any time, a state machine that applies late, and a clock
//! that runs fast or slow. Between the peers is a network that loses, doubles, delays and reorders
//! messages. Everything that happens is an [`Action`], and the same action has the same effect
//! every time.
//!
//! ```text
//!   seed ──▶ Generator ──▶ Action ──▶ World ──▶ Checks ──▶ Violation
//!               ▲                       │                      │
//!               └──── what it sees ─────┘      shorter list ◀──┘ shrink
//!                                                   │
//!                                                   └──▶ a story, which replays
//! ```
//!
//! A [`Generator`] chooses the actions, from one seed and from the state of the world. It decides
//! delays, losses, partitions, crashes, clients and changes of members. Now and then it follows a
//! scheme that is aimed at one rule of the protocol. A seed's [`Theme`] decides which faults it
//! has.
//!
//! # What it checks
//!
//! `checks` knows everything that any peer ever did: one leader in a term, elected by durable
//! votes; one vote in a term; matching logs; acknowledgements of what is durable; commits of what a
//! majority holds; one history of all state machines; configurations that overlap; leases that
//! exclude others; and a history that is exactly linearizable for clients. When the faults end, the
//! group must work again in bounded virtual time. A panic of the core is a violation like any
//! other.
//!
//! # What it promises
//!
//! - The same seed and the same sources give the same run, on any machine. A world has no
//!   randomness. A generator has one source of randomness, and decides nothing by the order of a
//!   hash map.
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
