//! The work that the core wants done, which is the only output of a [`crate::Group`].

use bytes::Bytes;

use crate::entries::Entries;
use crate::log::LogReadError;
use crate::message::Message;
use crate::types::{HardState, LogIndex, PeerId, SnapshotMeta, Term};

/// Readies are numbered from 1, without gaps, for as long as the group lives.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct ReadyNumber(pub u64);

/// The role of a peer.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum RoleKind {
    /// Follows a leader, or waits for one. Learners stay followers.
    Follower,
    /// Asks whether it could win an election.
    PreCandidate,
    /// Asks for votes.
    Candidate,
    /// Leads.
    Leader,
}

/// The peer's role, term and leader, when they differ from the Ready before.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RoleChange {
    /// The role now.
    pub role: RoleKind,
    /// The term of that role.
    pub term: Term,
    /// The leader that the peer knows, if any.
    pub leader: Option<PeerId>,
}

/// The work to do. First take note of `role`: a leader that is no longer one, or that hands over,
/// must serve no lease read once its messages are out. Then do everything else; `messages` need not
/// wait for the write.
///
/// Readies are written in their order, and each atomically: after a crash, no Ready may be there in
/// part, or without those before it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Ready {
    /// The number to report to [`crate::Group::persisted`]; 0 if there is nothing to do.
    pub number: ReadyNumber,
    /// Write this, together with `entries`.
    pub hard_state: Option<HardState>,
    /// Whether the write must reach the disk before `persisted`. If not, the driver may report the
    /// Ready as soon as all Readies before it are durable, and leave the write to a later sync. All
    /// that a crash can then lose is a commit index, which the group finds again.
    pub must_sync: bool,
    /// Append these entries. If the first lies before the log's end, it replaces everything from
    /// its index on, also what lies beyond the last of these entries.
    pub entries: Entries,
    /// Replace the whole log and the state machine by this snapshot, but only when this Ready and
    /// all before it are written and their committed entries are applied. Then call
    /// [`crate::Group::snapshot_installed`].
    pub snapshot: Option<(SnapshotMeta, Bytes)>,
    /// Send at once.
    pub messages: Vec<Message>,
    /// Send when this Ready and all before it are durable, even if this one has nothing to write.
    /// These messages promise what those Readies contain.
    pub messages_after_persist: Vec<Message>,
    /// Apply in this order. All these entries are durable on this peer, and each comes only once.
    pub committed: Entries,
    /// Reads, by their ids, that may be served once this index is applied.
    pub reads: Vec<(u64, LogIndex)>,
    /// Ids of reads that failed, to be tried again, maybe on another peer.
    pub failed_reads: Vec<u64>,
    /// Peers that wait for a snapshot, each named once. Produce and send it, then call
    /// [`crate::Group::snapshot_sent`].
    pub snapshots_wanted: Vec<PeerId>,
    /// This peer's role, term and leader, if one of them changed.
    pub role: Option<RoleChange>,
    /// The log could not be read. The driver must stop the store.
    pub log_failure: Option<LogReadError>,
}

impl Ready {
    /// Makes it empty and keeps its capacity.
    pub(crate) fn clear(&mut self) {
        self.number = ReadyNumber(0);
        self.hard_state = None;
        self.must_sync = false;
        self.entries = Entries::default();
        self.snapshot = None;
        self.messages.clear();
        self.messages_after_persist.clear();
        self.committed = Entries::default();
        self.reads.clear();
        self.failed_reads.clear();
        self.snapshots_wanted.clear();
        self.role = None;
        self.log_failure = None;
    }

    /// Whether anything has to be written before `messages_after_persist` may be sent and
    /// [`crate::Group::persisted`] may be called.
    #[must_use]
    pub fn needs_write(&self) -> bool {
        self.hard_state.is_some() || !self.entries.is_empty()
    }
}
