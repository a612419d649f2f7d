//! Many Raft groups on one node.
//!
//! A **region** is a range of keys and the Raft group that replicates it; a
//! **store** holds one peer of each of many regions, in one data directory. This
//! crate drives those peers: it turns requests into log entries and entries into
//! data, serves linearizable reads, splits regions, changes their members, and
//! brings followers back by log or by snapshot.
//!
//! In: requests and messages, through a [`StoreHandle`]. Out: answers to the requests, and
//! messages and reports through the [`Outbox`] that the store was given.
//!
//! ```text
//!  requests, messages ──▶ inbox ──▶ worker ──▶ log writer ──▶ log engine (one fsync)
//!                                   │  ▲  └──▶ outbox (appends leave beside the write)
//!                                   │  └────── notices: persisted, applied
//!                                   └────────▶ apply worker ──▶ kv engine, answers
//!  reads under a lease ──▶ ReadDelegates ──▶ kv snapshot (no worker involved)
//! ```
//!
//! It promises:
//!
//! - a write that was answered is synced in the logs of a majority, and visible to every read that
//!   begins afterwards;
//! - a read is answered by a peer that leads at that moment, or after such a peer was asked;
//! - an outcome that is unknown is reported as unknown.
//!
//! The parts have no threads and no clock of their own: see [`store::Store`] for how they are
//! driven.

mod apply;
mod backlog;
mod budget;
pub mod command;
pub mod config;
mod disk;
pub mod door;
pub mod envelope;
mod error;
mod flusher;
mod journal;
mod log_writer;
pub mod message;
mod outbox;
mod peer;
mod ranges;
pub mod raw_value;
mod read;
mod recovery;
pub mod region;
mod router;
mod shell;
mod snapshot;
pub mod state;
pub mod store;
mod survey;
mod worker;

pub use apply::remembered_records;
pub use command::{CompareAndSwap, Mutation, Swap};
pub use config::StoreConfig;
pub use envelope::Envelope;
pub use error::{RequestError, StoreError};
pub use message::{
    Admin, AdminResult, Answer, PeerProgress, RegionStatus, ReplicaRole, RequestContext,
    SwapResult, WriteResult, WriteTag,
};
pub use outbox::Outbox;
pub use read::{Cache, ReadDelegate, ReadDelegates, RegionIter, RegionSnapshot};
pub use region::configuration;
pub use router::{Call, Request, StoreHandle};
pub use shell::RunningStore;
pub use snapshot::{ReceivedSnapshot, RegionSnapshotSource, SnapshotBlock, SnapshotReceiver};
pub use store::{Parts, Store};
pub use survey::{MAX_PARTS, RegionChecksum, SurveyError};
