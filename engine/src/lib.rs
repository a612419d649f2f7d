//! Storage of one Esker store on RocksDB.
//!
//! # What flows in and out
//!
//! In: batches of changes ([`KvBatch`], [`LogBatch`]) and SST files
//! ([`SstBuilder`] to [`SstFile`]). Out: values, iterators over consistent
//! snapshots ([`KvSnapshot`], [`KvIter`]), and what a restart finds. This crate
//! knows column families and groups of numbered entries; it knows no region, no
//! raft and no transaction. It has no threads of its own: every call works on the
//! thread of its caller, and RocksDB flushes and compacts on its own.
//!
//! # What it promises
//!
//! A store has two engines, because they promise different things:
//!
//! | | [`LogEngine`] | [`KvEngine`] |
//! |---|---|---|
//! | holds | raft entries and raft state | what the entries were applied to |
//! | a write returns when | it is synced to disk | it is visible |
//! | after a crash | every returned write is there | a prefix of the writes is there |
//!
//! So the log is the truth. One fsync of the log serves all groups, and the applied state costs no
//! fsync at all. [`KvEngine::get_durable`] reads only the applied state that a crash would leave;
//! an entry stays in the log until its changes are part of that state.
//!
//! Both engines verify the checksum of every block that they read. Instead of wrong data they
//! return [`EngineError::Corruption`], which names the file. The engine also reports the corruption
//! to its [`Damage`], so that the store can be stopped.
//!
//! [`DataDir`] is the folder on disk around them: locked by one process, and marked with the
//! cluster and store that it belongs to. It opens the [`Engines`], and refuses parts that do not
//! belong together: a store that has lost a part of its memory must not send messages. With
//! [`Environment::Memory`] the same engines run without a disk, for simulations of whole clusters
//! with crashes.

mod damage;
mod directory;
mod environment;
mod error;
mod family;
mod kv;
mod log;
mod mark;
mod memory;
mod operations;
mod options;
mod ranges;
mod snapshot;
mod sst;
mod statistics;

pub use damage::Damage;
pub use directory::{DataDir, DirError, IDENT, Ident, Kind, replace_file};
pub use environment::{Environment, MemoryEnv};
pub use error::{EngineError, EngineName};
pub use family::Cf;
pub use kv::{KvBatch, KvEngine};
pub use log::{LogBatch, LogEngine};
pub use mark::{Fault, Mark, Part};
pub use memory::Engines;
pub use operations::MAX_KEY_BYTES;
pub use options::{BlockCache, EngineOptions};
pub use snapshot::{KvIter, KvSnapshot};
pub use sst::{SstBuilder, SstFile};
pub use statistics::EngineStatistics;
