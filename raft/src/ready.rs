//! What the core wants done: the one output of a [`crate::Group`].

use bytes::Bytes;

use crate::entries::Entries;
use crate::log::LogReadError;
use crate::message::Message;
use crate::types::{HardState, LogIndex, PeerId, SnapshotMeta, Term};

/// Readies are numbered from 1, without gaps, for as long as the group lives.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct ReadyNumber(pub u64);

/// What a peer is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum RoleKind {
    /// Follows a leader, or waits for one. Learners stay followers.
    Follower,
    /// Asks whether it could win.
    PreCandidate,
    /// Asks for votes.
    Candidate,
    /// Leads.
    Leader,
}

/// The peer's role, term or leader is another than in the Ready before.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RoleChange {
    /// What it is now.
    pub role: RoleKind,
    /// In which term.
    pub term: Term,
    /// Whom it takes for the leader.
    pub leader: Option<PeerId>,
}

/// What to do, in this order: first take note of `role` (a leader that is no
/// longer one, or that hands over, must serve no lease read once its messages are
/// out); then everything else, where `messages` need not wait for the write.
///
/// Readies are written in their order, and each atomically: no crash may keep a
/// later one, or a part of one, and lose what came before it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Ready {
    /// What to report to [`crate::Group::persisted`]; 0 if nothing is to be done.
    pub number: ReadyNumber,
    /// Write this, together with `entries`.
    pub hard_state: Option<HardState>,
    /// Whether the write must reach the disk before `persisted`. If not, the
    /// driver may report it as soon as all before it are durable, and leave it to a
    /// later sync, because all that can be lost is a commit index that is found again.
    pub must_sync: bool,
    /// Append these. The first may lie before the log's end: then everything
    /// from it on is replaced, also what lies beyond the last of these.
    pub entries: Entries,
    /// Replace the whole log and the state machine by this snapshot, when this Ready
    /// and all before it are written and what they committed is applied; then call
    /// [`crate::Group::snapshot_installed`].
    pub snapshot: Option<(SnapshotMeta, Bytes)>,
    /// Send at once.
    pub messages: Vec<Message>,
    /// Send when this Ready and all before it are durable, even if this one has
    /// nothing to write: they promise what those contain.
    pub messages_after_persist: Vec<Message>,
    /// Apply in this order. All are durable here and come only once.
    pub committed: Entries,
    /// Reads, by their ids, that may be served once this index is applied.
    pub reads: Vec<(u64, LogIndex)>,
    /// Reads that nobody answers: to be tried again, maybe elsewhere.
    pub failed_reads: Vec<u64>,
    /// Peers that wait for a snapshot, each named once: produce and send it, then
    /// call [`crate::Group::snapshot_sent`].
    pub snapshots_wanted: Vec<PeerId>,
    /// What this peer is now, if that changed.
    pub role: Option<RoleChange>,
    /// The log could not be read. The driver must stop the store.
    pub log_failure: Option<LogReadError>,
}

impl Ready {
    /// Makes it empty and keeps its room.
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

    /// Whether anything has to be written before `messages_after_persist` may go
    /// and [`crate::Group::persisted`] be called.
    #[must_use]
    pub fn needs_write(&self) -> bool {
        self.hard_state.is_some() || !self.entries.is_empty()
    }
}
