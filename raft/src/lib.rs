//! Raft for one group of peers: the consensus core of Esker, without a clock, a
//! disk, a socket or a thread.
//!
//! This is a text on the protocol as it is implemented. "Raft" with a section is
//! Ongaro and Ousterhout, "In Search of an Understandable Consensus Algorithm"
//! (the extended version); "dissertation" is Ongaro's, "Consensus: Bridging Theory
//! and Practice". `docs/consensus.md` tells the same from the other side: each
//! classic hazard, how it is met, and the test that shows it.
//!
//! # The protocol
//!
//! Peers agree on a **log** of commands; each applies it, in order, to its own
//! state machine, and so all machines go through the same states.
//!
//! **Terms and leaders** (Raft §5.1, §5.2). Time is divided into *terms*, numbered
//! and each with at most one *leader*, because a peer gives one vote in a term and
//! a leader needs those of a majority. Every message carries its sender's term;
//! a peer that sees a newer one has been out of touch, and follows. A peer that hears of
//! no leader for a random one to two *election timeouts* campaigns: random, so
//! that peers rarely campaign together and split the vote. Three refinements keep
//! elections from doing harm. Before it raises the term a peer asks in a *pre-vote*
//! whether it could win (dissertation §9.6); a peer that could not disturbs nobody. A follower
//! that hears its leader is *loyal*: for one election timeout it elects nobody else
//! and does not even look at the term of a peer that asks (§4.2.3). And a leader that hears
//! no majority for an election timeout steps down (§6.2). See [`Group::tick`],
//! [`Group::campaign`].
//!
//! **Replication** (Raft §5.3). Only the leader appends. It sends its entries with
//! the index and term of the entry before them, and a follower takes them only if
//! it has that very entry; by induction, two logs with one entry in common are
//! equal up to it (*log matching*). A follower that refuses says where, and in
//! which term, its log may still agree, so that a whole term is skipped for each
//! round trip. Once the logs agree somewhere, appends are sent in a pipeline,
//! bounded in messages and bytes; a follower that needs entries which are gone gets
//! a snapshot, while the others are served as before. See [`ProgressState`].
//!
//! **Commit** (Raft §5.4). An entry is *committed* when a majority holds it durably
//! *and it is of the leader's own term*; everything before it is committed with it.
//! A voter elects nobody whose log is behind its own, so every later leader has it
//! (*leader completeness*). The restriction to its own term is what figure 8 of the
//! paper is about: an older entry on a majority can still be replaced. So that it
//! need not wait for a client, each leader begins its term with an empty entry.
//!
//! **Members** (Raft §6). A change of one voter takes effect at once; any other set
//! of changes goes through a *joint* configuration, in which elections and commits
//! need a majority of the old voters and one of the new. Learners receive the log
//! and have no vote. Witnesses vote and keep the log and have no data. See
//! [`Group::propose_change`]; the rules that make it safe to let a configuration
//! take effect when it is *applied* are in the module `group::membership`.
//!
//! **Reads** (dissertation §6.4). A read needs no entry: it waits for the commit
//! index of a leader that has *since* been confirmed by a majority ([`Group::read_index`]).
//! And it needs no message while the leader holds a *lease*: a majority that has
//! answered something sent at time T is loyal until one election timeout after T,
//! by clocks whose speeds differ by a stated bound ([`Group::lease_until`]).
//!
//! **Durability.** A vote, an acknowledgement and a candidacy are promises, and
//! leave only when what they promise is on disk. Replication waits for no disk: a
//! leader sends entries while it writes them, and counts itself among those who
//! hold them when its own write has ended. Many writes may be under way.
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
//! // Applied with this index and this term: so it is this proposal.
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
//! - Votes and acknowledgements leave only when what they promise is durable; a
//!   leader replicates without waiting for its own disk, and counts itself only
//!   for what that disk holds.
//! - Committed entries come out once, in order, when they are durable here.
//! - Nothing that a peer sends makes it panic: what no correct peer sends is refused
//!   with a [`StepError`]. A violated invariant of its own does, with a sentence that
//!   names it, because carrying on would lose data.
//! - A group with nothing to do allocates nothing and costs under a kibibyte.
//!
//! # What it leaves to the driver
//!
//! The bytes of snapshots; what commands mean; retries of proposals and reads; the
//! clock, which must not go back, and whose speed must keep to
//! [`Config::max_clock_drift`] for leases (a clock that stands still while a machine
//! sleeps does not); answers for peers that were removed and are gone, as long as
//! others may count on their votes; and a disk that keeps what it has synced.
//! A peer whose disk does not is found out where it can be ([`StepError::LostEntries`]),
//! but no protocol of this kind survives amnesia: it must be replaced under a new
//! [`PeerId`], which is why ids are never used twice.
//!
//! # The rooms
//!
//! `group` is the state machine, with a file for each part of the protocol; `log`
//! the log as the core sees it; `progress` what a leader knows of one follower;
//! `configuration` and `quorum` who decides; `read` the queues of ReadIndex; `codec`
//! the bytes. `broken!(Rule)` in the code marks a rule that the proof rests on:
//! see `rules`.

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
