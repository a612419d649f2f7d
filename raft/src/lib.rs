//! Raft for one group of peers: the consensus core of Esker, without a clock, a
//! disk, a socket or a thread.
//!
//! This text describes the protocol as it is implemented. "Raft" with a section is Ongaro and
//! Ousterhout, "In Search of an Understandable Consensus Algorithm" (the extended version);
//! "dissertation" is Ongaro's, "Consensus: Bridging Theory and Practice". `docs/consensus.md`
//! describes the same protocol by its hazards: each classic hazard, how it is met, and the test
//! that shows it.
//!
//! # The protocol
//!
//! Peers agree on a **log** of commands. Each peer applies the log, in order, to its own state
//! machine, so all machines go through the same states.
//!
//! **Terms and leaders** (Raft §5.1, §5.2). Time is divided into numbered *terms*. Each term has at
//! most one *leader*, because a peer gives one vote in a term and a leader needs the votes of a
//! majority. Every message carries its sender's term. A peer that sees a newer term has been out of
//! touch, and moves to that term. A peer that hears of no leader for one to two *election timeouts*
//! campaigns. The exact time is random, so that peers rarely campaign together and split the vote.
//! Three refinements keep elections from doing harm. Before a peer raises the term, it asks in a
//! *pre-vote* whether it could win (dissertation §9.6), so a peer that could not win disturbs
//! nobody. A follower that hears its leader is *loyal*: for one election timeout it elects nobody
//! else, and it ignores even the term of a peer that asks for a vote (§4.2.3). And a leader that
//! hears no majority for an election timeout steps down (§6.2). See [`Group::tick`],
//! [`Group::campaign`].
//!
//! **Replication** (Raft §5.3). Only the leader appends. It sends its entries with the index and
//! term of the entry before them, and a follower takes them only if it has that very entry. By
//! induction, two logs with one entry in common are equal up to that entry (*log matching*). A
//! follower that refuses an append replies with the index and term at which its log may still
//! agree, so that each round trip skips a whole term. Once the logs agree somewhere, appends are
//! sent in a pipeline, bounded in messages and bytes. A follower that needs entries which are gone
//! gets a snapshot, while the others are served as before. See [`ProgressState`].
//!
//! **Commit** (Raft §5.4). An entry is *committed* when a majority holds it durably *and it is of
//! the leader's own term*. Everything before it is committed with it. A voter elects no peer with a
//! log behind its own, so every later leader has the entry (*leader completeness*). Figure 8 of the
//! paper shows why the leader's own term is required: an older entry on a majority can still be
//! replaced. Each leader begins its term with an empty entry, so that it need not wait for a client
//! to commit older entries.
//!
//! **Members** (Raft §6). A change of one voter takes effect at once. Any other set of changes goes
//! through a *joint* configuration, in which elections and commits need a majority of the old
//! voters and a majority of the new. Learners receive the log and have no vote. Witnesses vote and
//! keep the log, but have no data. See [`Group::propose_change`]. A configuration takes effect when
//! it is *applied*; the module `group::membership` has the rules that make that safe.
//!
//! **Reads** (dissertation §6.4). A read needs no entry. It waits for the commit index of a leader
//! that a majority has confirmed *since* the read began ([`Group::read_index`]). A read needs no
//! message while the leader holds a *lease*: a majority that has replied to messages sent at time T
//! is loyal until one election timeout after T. The speeds of the clocks may differ by a stated
//! bound ([`Group::lease_until`]).
//!
//! **Durability.** A vote, an acknowledgement and a candidacy are promises, and are sent only when
//! what they promise is on disk. Replication waits for no disk: a leader sends entries while it
//! writes them. The leader counts itself among the peers that hold the entries only when its own
//! write has ended. Many writes may be under way.
//!
//! # What flows in, what flows out
//!
//! A [`Group`] is one peer's part in that protocol. A *driver* feeds it messages ([`Group::step`]),
//! the time ([`Group::tick`]), proposals, reads, and notices that something was written
//! ([`Group::persisted`]) or applied ([`Group::applied`]). The driver collects one [`Ready`] after
//! another. Each is a list of things to write, send and apply. The driver is free in how it carries
//! them out, as long as it keeps the order that [`Ready`] states. Many Readies may be on their way
//! to the disk at once. The group reads entries that it no longer holds in memory back through a
//! [`LogReader`].
//!
//! ```text
//!   messages, proposals, time            ┌───────┐   Ready: entries, hard state,
//!   persisted(n), applied(i)   ────────▶ │ Group │ ────▶   messages now / after the
//!                                        └───┬───┘         write, committed, reads
//!                              LogReader ◀───┘
//! ```
//!
//! A group of one, driven by hand:
//!
//! ```
//! use std::sync::Arc;
//! use esker_raft::*;
//!
//! /// Everything is in the group's own cache, so nothing is ever read back.
//! struct NoLog;
//! impl LogReader for NoLog {
//!     fn entries(&self, low: LogIndex, _: LogIndex, _: usize) -> Result<Vec<Entry>, LogReadError> {
//!         Err(LogReadError::Compacted { index: low })
//!     }
//!     fn term(&self, _: LogIndex) -> Result<Option<Term>, LogReadError> {
//!         Ok(None)
//!     }
//! }
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let me = Identity { group: GroupId(1), peer: PeerId(1) };
//! let founded = Restored { configuration: Configuration::of_voters([me.peer]), ..Restored::default() };
//! let mut now = Time(0);
//! let mut group = Group::create(me, Arc::new(Config::default()), NoLog, founded, now)?;
//! let (mut log, mut machine) = (Vec::new(), Vec::new());
//!
//! let mut work = |group: &mut Group<NoLog>, now| {
//!     while let Some(ready) = group.ready() {
//!         // 1. Send ready.messages. 2. Write these, with ready.hard_state, and sync:
//!         log.extend(ready.entries.iter().cloned());
//!         group.persisted(now, ready.number);
//!         // 3. Send ready.messages_after_persist. 4. Apply what is committed:
//!         for entry in &ready.committed {
//!             if let Payload::Command(command) = &entry.payload {
//!                 machine.push(command.clone());
//!             }
//!             group.applied(entry.index);
//!         }
//!     }
//! };
//!
//! group.campaign(now);
//! work(&mut group, now);
//! assert_eq!(group.role(), RoleKind::Leader);
//! let (index, term) = group.propose(now, "hello".into())?;
//! work(&mut group, now);
//! // An entry that is applied with this index and this term is this proposal.
//! assert_eq!((index, term), (LogIndex(2), Term(1)));
//! now = group.next_deadline().expect("a leader has heartbeats to send");
//! group.tick(now);
//! assert_eq!(machine, ["hello"]);
//! # Ok(())
//! # }
//! ```
//!
//! # What it promises
//!
//! - The same inputs and the same seed give the same outputs.
//! - Votes and acknowledgements are sent only when what they promise is durable. A leader
//!   replicates without waiting for its own disk, and counts itself only for what that disk holds.
//! - Committed entries come out once, in order, when they are durable on this peer.
//! - No message from another peer makes a group panic: a message that no correct peer sends is
//!   refused with a [`StepError`]. A violated invariant of the group itself panics, with a sentence
//!   that names it, because carrying on would lose data.
//! - A group with nothing to do allocates nothing and costs under a kibibyte.
//!
//! # What it leaves to the driver
//!
//! The driver owns the bytes of snapshots, the meaning of commands, and retries of proposals and
//! reads. It provides the clock, which must not go back. For leases, the clock's speed must keep to
//! [`Config::max_clock_drift`]; a clock that stands still while a machine sleeps does not. The
//! driver replies for peers that were removed and are gone, as long as others may count on their
//! votes. And it needs a disk that keeps what it has synced. A peer on a disk that does not is
//! detected where that is possible ([`StepError::LostEntries`]). But no protocol of this kind
//! survives amnesia: such a peer must be replaced under a new [`PeerId`], which is why ids are
//! never used twice.
//!
//! # The modules
//!
//! `group` is the state machine, with a file for each part of the protocol. `log` is the log as the
//! core sees it. `progress` holds what a leader knows of one follower. `configuration` and `quorum`
//! hold the members and the majorities that decide. `read` has the queues of ReadIndex, and `codec`
//! the byte forms. `broken!(Rule)` in the code marks a rule that the proof rests on: see `rules`.

mod codec;
mod config;
mod configuration;
mod entries;
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
pub use entries::{Entries, Iter};
pub use group::{Group, ProposeError, Restored, SnapshotOutcome, StepError, TransferError};
pub use log::{LogReadError, LogReader, MAX_APPLYING_BYTES, MAX_COMMITTED_BYTES, UNAPPLIED_CACHES};
pub use message::{AppendOutcome, CommitPoint, Message, MessageBody, Stamp};
pub use peer_set::PeerSet;
pub use progress::{Progress, ProgressState};
pub use read::{MAX_PENDING_READS, MAX_READ_ROUNDS, ReadError};
pub use ready::{Ready, ReadyNumber, RoleChange, RoleKind};
#[cfg(esker_break_rules)]
pub use rules::{Rule, break_rule};
pub use types::{
    ChangeStep, ConfChange, Entry, GroupId, HardState, Identity, LeaveJoint, LogIndex,
    MAX_INDEX_LEAP, MAX_TERM_LEAP, Payload, PeerId, SnapshotMeta, Term, Time,
};
