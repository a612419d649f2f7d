//! The messages between peers.
//!
//! Every message carries the sender's term, with one exception: a request for a
//! pre-vote, and its grant, carry the term that the candidate *would* have.

use bytes::Bytes;

use crate::entries::Entries;
use crate::types::{
    GroupId, LogIndex, MAX_INDEX_LEAP, MAX_TERM_LEAP, PeerId, SnapshotMeta, Term, Time,
};

/// One message between two peers of a group.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Message {
    /// The group of both peers.
    pub group: GroupId,
    /// The sender.
    pub from: PeerId,
    /// The receiver.
    pub to: PeerId,
    /// See the module's documentation.
    pub term: Term,
    /// The content.
    pub body: MessageBody,
}

/// When a leader sent something, by its own count and clock. Replies echo the stamp, so the leader
/// needs no table from rounds to instants. No other peer interprets it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Stamp {
    /// How many rounds of ReadIndex the leader had begun when it sent this.
    pub round: u64,
    /// The leader's clock when it sent this. A lease is counted from here.
    pub sent: Time,
}

/// The last entry that a peer knows to be committed. A peer that has the entry at this index in
/// this term may take it, and all before it, for committed. Candidates and voters exchange their
/// commit points, because a leader may have died before its followers learned what it had
/// committed. Without the exchange, the rest of a group could wait forever for the vote of a
/// removed peer, if they hold its removal but do not know that it is committed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct CommitPoint {
    /// The commit index.
    pub index: LogIndex,
    /// The term of the entry there.
    pub term: Term,
}

/// The content of a message.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum MessageBody {
    /// Asks whether the receiver would vote for the sender. It is sent before the term is raised,
    /// so that a peer that cannot win does not disturb the others (dissertation §9.6).
    PreVote {
        /// The candidate's last index.
        last_index: LogIndex,
        /// The term of the entry there.
        last_term: Term,
        /// What the candidate knows to be committed.
        commit: CommitPoint,
    },
    /// The reply to a request for a pre-vote.
    PreVoteReply {
        /// Whether the voter would vote for the candidate.
        granted: bool,
        /// What the voter knows to be committed.
        commit: CommitPoint,
    },
    /// Asks for the receiver's vote in this term (Raft §5.2).
    Vote {
        /// The candidate's last index.
        last_index: LogIndex,
        /// The term of the entry there.
        last_term: Term,
        /// Whether the leader itself asked for this election ([`MessageBody::TimeoutNow`]). Then
        /// loyalty to that leader is no reason to refuse.
        transfer: bool,
        /// What the candidate knows to be committed.
        commit: CommitPoint,
    },
    /// The reply to a request for a vote.
    VoteReply {
        /// Whether the vote was given, and is durable.
        granted: bool,
        /// What the voter knows to be committed.
        commit: CommitPoint,
    },
    /// Entries that follow the one at `prev_index` (Raft §5.3).
    Append {
        /// The index before the first entry.
        prev_index: LogIndex,
        /// The term of the entry there.
        prev_term: Term,
        /// The entries; may be empty.
        entries: Entries,
        /// The leader's commit index.
        commit: LogIndex,
        /// Echoed in the reply.
        stamp: Stamp,
    },
    /// The reply to an append or a snapshot.
    AppendReply {
        /// Accepted, or refused with a hint.
        outcome: AppendOutcome,
        /// The append's stamp.
        stamp: Stamp,
    },
    /// The leader's commit point, for a follower that has every entry and may now apply more. There
    /// is no reply. The next append or heartbeat makes up for a lost one.
    Commit {
        /// It counts only if the follower has this very entry.
        commit: CommitPoint,
    },
    /// The sender still leads.
    Heartbeat {
        /// The leader's commit index, but never beyond what the leader knows this follower to hold.
        commit: LogIndex,
        /// Echoed in the reply.
        stamp: Stamp,
    },
    /// The sender still follows.
    HeartbeatReply {
        /// The heartbeat's stamp.
        stamp: Stamp,
    },
    /// The state at an index, for a follower that needs entries which the leader no longer has
    /// (Raft §7). The driver carries the data. This message is stepped into the receiver once all
    /// of the data is there.
    InstallSnapshot {
        /// The point in the log that the snapshot stands for. Boxed, because it is large and rare.
        meta: Box<SnapshotMeta>,
        /// The driver's own description of the data.
        data: Bytes,
    },
    /// Orders the receiver to campaign at once, because the leader hands over (dissertation §3.10).
    TimeoutNow,
    /// A follower asks for the index that it must have applied before it may read.
    ReadIndex {
        /// Names the follower's batch of waiting reads.
        batch: u64,
    },
    /// The reply to [`MessageBody::ReadIndex`].
    ReadIndexReply {
        /// The request's batch.
        batch: u64,
        /// Reads are linearizable at and beyond this applied index.
        index: LogIndex,
    },
    /// A follower passes a request for another leader on to the leader.
    TransferRequest {
        /// The peer that is to lead.
        target: PeerId,
    },
}

impl MessageBody {
    /// The commit point that a candidate or voter sends with it.
    pub(crate) fn commit_point(&self) -> Option<CommitPoint> {
        match self {
            MessageBody::PreVote { commit, .. }
            | MessageBody::PreVoteReply { commit, .. }
            | MessageBody::Vote { commit, .. }
            | MessageBody::VoteReply { commit, .. } => Some(*commit),
            _ => None,
        }
    }

    /// Whether it is a reply to something that was sent in its term.
    pub(crate) fn is_answer(&self) -> bool {
        matches!(
            self,
            MessageBody::PreVoteReply { .. }
                | MessageBody::VoteReply { .. }
                | MessageBody::AppendReply { .. }
                | MessageBody::HeartbeatReply { .. }
                | MessageBody::ReadIndexReply { .. }
        )
    }
}

impl Message {
    /// The highest term that the sender can have been in.
    pub(crate) fn sender_term(&self) -> Term {
        match self.body {
            MessageBody::PreVote { .. } | MessageBody::PreVoteReply { granted: true, .. } => {
                self.term.prev()
            }
            _ => self.term,
        }
    }

    /// The first number in it that no honest peer could have counted up to while this peer was at
    /// `known`, its term and the end of its log. After this check, adding one to a number cannot
    /// overflow.
    #[inline]
    pub(crate) fn out_of_range(&self, known: (Term, LogIndex)) -> Option<(&'static str, u64)> {
        let Message { term, body, .. } = self;
        let none = (LogIndex(0), Term(0));
        let ((index, entry_term), also) = match body {
            MessageBody::PreVote { last_index, last_term, commit }
            | MessageBody::Vote { last_index, last_term, commit, .. } => {
                ((*last_index, *last_term), (commit.index, commit.term))
            }
            MessageBody::PreVoteReply { commit, .. }
            | MessageBody::VoteReply { commit, .. }
            | MessageBody::Commit { commit } => ((commit.index, commit.term), none),
            MessageBody::Append { prev_index, prev_term, entries, commit, .. } => {
                let end = LogIndex(prev_index.0.saturating_add(entries.len() as u64));
                ((end.max(*commit), *prev_term), none)
            }
            MessageBody::AppendReply { outcome, .. } => match outcome {
                AppendOutcome::Accepted { match_index } => ((*match_index, Term(0)), none),
                AppendOutcome::Rejected { prev_index, hint_index, hint_term } => {
                    ((*prev_index.max(hint_index), *hint_term), none)
                }
            },
            MessageBody::Heartbeat { commit, .. } => ((*commit, Term(0)), none),
            MessageBody::InstallSnapshot { meta, .. } => ((meta.index, meta.term), none),
            MessageBody::ReadIndexReply { index, .. } => ((*index, Term(0)), none),
            MessageBody::HeartbeatReply { .. }
            | MessageBody::TimeoutNow
            | MessageBody::ReadIndex { .. }
            | MessageBody::TransferRequest { .. } => (none, none),
        };
        let terms = [*term, entry_term, also.1].into_iter().max().unwrap_or_default();
        let indexes = index.max(also.0);
        // The limits also bound the number that this peer would go on counting from. A peer that
        // was led to the highest of all numbers could not count on, and no reply to it would be
        // possible.
        let highest_term = Term(known.0.0.saturating_add(MAX_TERM_LEAP)).min(Term::MAX);
        if terms > highest_term {
            return Some(("term", terms.0));
        }
        let highest_index = LogIndex(known.1.0.saturating_add(MAX_INDEX_LEAP)).min(LogIndex::MAX);
        (indexes > highest_index).then_some(("index", indexes.0))
    }
}

/// Whether an append was accepted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AppendOutcome {
    /// The follower's log equals the leader's up to here, durably.
    Accepted {
        /// The last index known to be equal.
        match_index: LogIndex,
    },
    /// There is another entry, or none, at `prev_index`.
    Rejected {
        /// The append's `prev_index`, to distinguish old refusals from new.
        prev_index: LogIndex,
        /// The last index at which the logs may still agree.
        hint_index: LogIndex,
        /// The follower's term there. It lets the leader skip a whole term per round trip.
        hint_term: Term,
    },
}
