//! Raft for one group of peers: the consensus core of Esker, without a clock, a
//! disk, a socket or a thread.
//!
//! # The protocol in a paragraph
//!
//! Peers agree on a log of commands. Time is divided into *terms*, each with at
//! most one *leader*, elected by a majority that gives each term one vote. Only
//! the leader appends; it sends its entries to the *followers*, which take them
//! if their log agrees before them, and an entry that a majority holds durably is
//! *committed*: no later leader can lack it, because a voter elects nobody whose
//! log is behind its own. What is committed is applied, in order, everywhere.
//! (Ongaro and Ousterhout, "In Search of an Understandable Consensus Algorithm";
//! section numbers in this crate refer to it, "dissertation" to Ongaro's.)
//!
//! # What flows in, what flows out
//!
//! A [`Group`] is one peer's half of that conversation. A *driver* feeds it
//! messages ([`Group::step`]), the time ([`Group::tick`]), proposals, reads, and
//! notices that something was written ([`Group::persisted`]) or applied
//! ([`Group::applied`]). It collects one [`Ready`] after another, each a list of
//! things to write, send and apply, and carries them out as it likes as long as
//! the order that [`Ready`] states is kept. Many Readies may be on their way to
//! the disk at once. Entries that the group no longer holds in memory it reads
//! back through a [`LogReader`].
//!
//! ```text
//!   messages, proposals, time            ┌───────┐   Ready: entries, hard state,
//!   persisted(n), applied(i)   ────────▶ │ Group │ ────▶   messages now / after the
//!                                        └───┬───┘         write, committed, reads
//!                              LogReader ◀───┘
//! ```
//!
//! # What it promises
//!
//! - The same inputs and the same seed give the same outputs.
//! - Votes and acknowledgements leave only when what they promise is durable; a
//!   leader replicates without waiting for its own disk, and counts itself only
//!   for what that disk holds.
//! - Committed entries come out once, in order, when they are durable here.
//! - Nothing that a peer sends makes it panic. A violated invariant of its own
//!   does, with a sentence that names it, because carrying on would lose data.
//! - A group with nothing to do allocates nothing and costs under a kibibyte.

mod codec;
mod config;
mod configuration;
mod group;
mod log;
mod message;
mod peer_set;
mod progress;
pub mod quorum;
mod random;
mod read;
mod ready;
mod rules;
mod types;

pub use codec::DecodeError;
pub use config::{Config, MAX_PRIORITY_WAIT, WITNESS_WAIT};
pub use configuration::{ConfigError, Configuration, MAX_PEERS};
pub use group::{Group, ProposeError, Restored, SnapshotOutcome, StepError, TransferError};
pub use log::{LogReadError, LogReader, MAX_APPLYING_BYTES, MAX_COMMITTED_BYTES};
pub use message::{AppendOutcome, CommitPoint, Message, MessageBody, Stamp};
pub use peer_set::PeerSet;
pub use progress::{Progress, ProgressState};
pub use read::{MAX_PENDING_READS, MAX_READ_ROUNDS, ReadError};
pub use ready::{Ready, ReadyNumber, RoleChange, RoleKind};
#[cfg(esker_break_rules)]
pub use rules::{Rule, break_rule};
pub use types::{
    ChangeStep, ConfChange, Entry, GroupId, HardState, Identity, LeaveJoint, LogIndex, Payload,
    PeerId, SnapshotMeta, Term, Time,
};
