//! What peers say to each other.
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
    /// Of which group both are.
    pub group: GroupId,
    /// Who sent it.
    pub from: PeerId,
    /// Whom it is for.
    pub to: PeerId,
    /// See the module's documentation.
    pub term: Term,
    /// What it says.
    pub body: MessageBody,
}

/// When a leader sent something, in its own words. Replies echo it, so the
/// leader needs no table from rounds to instants; nobody else interprets it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Stamp {
    /// How many rounds of ReadIndex the leader had begun when it sent this.
    pub round: u64,
    /// The leader's clock when it sent this: what a lease is counted from.
    pub sent: Time,
}

/// The end of what a peer knows to be committed. Candidates and voters tell each
/// other, because an election is where knowledge that died with a leader matters:
/// a peer that has the entry at this index in this term may take it, and all
/// before it, for committed. Without this, the rest of a group could wait forever
/// for the vote of a peer whose removal they hold and do not know to be committed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct CommitPoint {
    /// The commit index.
    pub index: LogIndex,
    /// The term of the entry there.
    pub term: Term,
}

/// What a message says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum MessageBody {
    /// Would you vote for me? Asked before raising the term, so that a peer
    /// that cannot win does not disturb those that work (dissertation §9.6).
    PreVote {
        /// The candidate's last index.
        last_index: LogIndex,
        /// And the term of the entry there.
        last_term: Term,
        /// What the candidate knows to be committed.
        commit: CommitPoint,
    },
    /// The answer to a pre-vote.
    PreVoteReply {
        /// Whether the voter would.
        granted: bool,
        /// What the voter knows to be committed.
        commit: CommitPoint,
    },
    /// Vote for me in this term (Raft §5.2).
    Vote {
        /// The candidate's last index.
        last_index: LogIndex,
        /// And the term of the entry there.
        last_term: Term,
        /// The leader itself asked for this election ([`MessageBody::TimeoutNow`]):
        /// loyalty to it is no reason to refuse.
        transfer: bool,
        /// What the candidate knows to be committed.
        commit: CommitPoint,
    },
    /// The answer to a request for a vote.
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
        /// What follows; may be empty.
        entries: Entries,
        /// How far the leader has committed.
        commit: LogIndex,
        /// Echoed in the reply.
        stamp: Stamp,
    },
    /// The answer to an append or a snapshot.
    AppendReply {
        /// Accepted, or refused with a hint.
        outcome: AppendOutcome,
        /// Echo of the append's.
        stamp: Stamp,
    },
    /// So far is committed: how a follower that has everything learns that it may
    /// apply it. Wants no answer, and a lost one is made up for by the next append
    /// or heartbeat.
    Commit {
        /// Counts only where the follower has this very entry.
        commit: CommitPoint,
    },
    /// I still lead.
    Heartbeat {
        /// How far the leader has committed, never beyond what it knows this
        /// follower to hold.
        commit: LogIndex,
        /// Echoed in the reply.
        stamp: Stamp,
    },
    /// And I still follow.
    HeartbeatReply {
        /// Echo of the heartbeat's.
        stamp: Stamp,
    },
    /// The state at an index, for a follower that needs entries which the
    /// leader no longer has (Raft §7). The driver carries the data; this is
    /// stepped into the receiver once all of it is there.
    InstallSnapshot {
        /// What the snapshot stands for. Boxed, because it is large and rare.
        meta: Box<SnapshotMeta>,
        /// The driver's own description of the data.
        data: Bytes,
    },
    /// Campaign at once: the leader hands over (dissertation §3.10).
    TimeoutNow,
    /// A follower asks up to where it must have applied before it may read.
    ReadIndex {
        /// Names the follower's batch of waiting reads.
        batch: u64,
    },
    /// The answer to that.
    ReadIndexReply {
        /// Echo of the request's.
        batch: u64,
        /// Reads are linearizable at and beyond this applied index.
        index: LogIndex,
    },
    /// A follower passes on a wish for another leader.
    TransferRequest {
        /// The wished-for leader.
        target: PeerId,
    },
}

impl MessageBody {
    /// What candidates and voters tell each other.
    pub(crate) fn commit_point(&self) -> Option<CommitPoint> {
        match self {
            MessageBody::PreVote { commit, .. }
            | MessageBody::PreVoteReply { commit, .. }
            | MessageBody::Vote { commit, .. }
            | MessageBody::VoteReply { commit, .. } => Some(*commit),
            _ => None,
        }
    }

    /// Whether it answers something that was asked or sent in its term.
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

    /// The first number in it, if there is one, that no honest peer could have
    /// counted up to while this one was at `known`: its term, and the end of its log.
    /// Everything behind this check can add one without fear.
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
        // The limits apply to what this peer would count on from there, too: one that was
        // led to the highest of all numbers could not go on counting, nor be answered.
        let highest_term = Term(known.0.0.saturating_add(MAX_TERM_LEAP)).min(Term::MAX);
        if terms > highest_term {
            return Some(("term", terms.0));
        }
        let highest_index = LogIndex(known.1.0.saturating_add(MAX_INDEX_LEAP)).min(LogIndex::MAX);
        (indexes > highest_index).then_some(("index", indexes.0))
    }
}

/// Whether an append fitted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AppendOutcome {
    /// The follower's log equals the leader's up to here, durably.
    Accepted {
        /// The last index known to be equal.
        match_index: LogIndex,
    },
    /// There is another entry, or none, at `prev_index`.
    Rejected {
        /// The append's `prev_index`, to tell old refusals from new.
        prev_index: LogIndex,
        /// The last index at which the logs may still agree…
        hint_index: LogIndex,
        /// …and the follower's term there: skips a whole term per round trip.
        hint_term: Term,
    },
}
