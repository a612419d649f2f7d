//! Handling messages. Their terms are compared before anything else (Raft §5.1).

use std::cmp::Ordering;

use thiserror::Error;

use super::Group;
use super::role::Role;
use crate::log::{LogReadError, LogReader};
use crate::message::{Message, MessageBody, Stamp};
use crate::rules::broken;
use crate::types::{GroupId, Identity, LogIndex, PeerId, Term, Time};

/// Why a message was refused. An error for a message that no correct peer sends means that data or
/// a disk is damaged somewhere.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum StepError {
    /// Delivered to the wrong peer.
    #[error("a message for peer {to} was given to peer {here}")]
    WrongRecipient {
        /// This peer.
        here: PeerId,
        /// The peer that the message was for.
        to: PeerId,
    },
    /// Delivered to the wrong group, perhaps to a group of another cluster.
    #[error("a message of group {group} was given to peer {here} of group {ours}")]
    WrongGroup {
        /// This peer.
        here: PeerId,
        /// Its group.
        ours: GroupId,
        /// The message's group.
        group: GroupId,
    },
    /// A peer sends no message to itself.
    #[error("peer {here} was given a message from itself")]
    FromItself {
        /// This peer.
        here: PeerId,
    },
    /// Entries that are no continuation of each other, or of a future term.
    #[error("peer {from} sent a malformed {what}")]
    Malformed {
        /// The sender.
        from: PeerId,
        /// The kind of message.
        what: &'static str,
    },
    /// A number that no correct peer can have reached.
    #[error("peer {from} sent the impossible {what} {value}")]
    OutOfRange {
        /// The sender.
        from: PeerId,
        /// The kind of number.
        what: &'static str,
        /// Its value.
        value: u64,
    },
    /// This peer's disk has lost entries that the peer acknowledged, and perhaps more. The driver
    /// must stop the peer. Otherwise it could go on voting, and the next leader would repair its
    /// log without any notice of the loss.
    #[error(
        "peer {here} acknowledged entries up to {commit} to leader {from}, but its log ends at \
         {last}: its disk has lost data; remove the peer and add a new one"
    )]
    LostEntries {
        /// This peer.
        here: PeerId,
        /// The leader.
        from: PeerId,
        /// The commit index that the leader sent.
        commit: LogIndex,
        /// Where this log ends.
        last: LogIndex,
    },
    /// Another peer's disk has lost entries that it acknowledged to this leader.
    #[error(
        "peer {from} refuses entries after {prev}, but has acknowledged all up to \
         {acknowledged}: its disk has lost data; remove the peer and add a new one"
    )]
    PeerLostEntries {
        /// The peer.
        from: PeerId,
        /// The index after which it refuses entries.
        prev: LogIndex,
        /// The last index that it acknowledged.
        acknowledged: LogIndex,
    },
    /// Election safety is broken.
    #[error("peer {from} claims to lead term {term}, but peer {leader} does")]
    TwoLeaders {
        /// The sender.
        from: PeerId,
        /// The leader known before.
        leader: PeerId,
        /// In this term.
        term: Term,
    },
    /// State machine safety is broken.
    #[error("leader {from} has another entry at {index}, which peer {here} has committed")]
    CommittedConflict {
        /// This peer.
        here: PeerId,
        /// The leader.
        from: PeerId,
        /// Where they differ.
        index: LogIndex,
    },
    /// An acknowledgement of entries that were never sent.
    #[error("peer {from} acknowledges entry {index}, but the log ends at {last}")]
    ImpossibleAck {
        /// The sender.
        from: PeerId,
        /// What it acknowledges.
        index: LogIndex,
        /// Where the leader's log ends.
        last: LogIndex,
    },
    /// The driver's log could not be read. The driver must stop the store.
    #[error(transparent)]
    Log(#[from] LogReadError),
}

impl<R: LogReader> Group<R> {
    /// Takes a message from another peer.
    ///
    /// # Errors
    /// See [`StepError`]. A refused message has changed at most the term, the leader that this peer
    /// follows, and the promise to that leader.
    pub fn step(&mut self, now: Time, message: Message) -> Result<(), StepError> {
        self.advance(now);
        let Identity { group: ours, peer: here } = self.me;
        let Message { group, from, to, .. } = message;
        if group != ours {
            return Err(StepError::WrongGroup { here, ours, group });
        }
        if to != here {
            return Err(StepError::WrongRecipient { here, to });
        }
        if from == here {
            return Err(StepError::FromItself { here });
        }
        if from.0 == 0 {
            return Err(StepError::Malformed { from, what: "sender" });
        }
        if let Some((what, value)) = message.out_of_range((self.term, self.log.last_index())) {
            return Err(StepError::OutOfRange { from, what, value });
        }
        let sender = message.sender_term();
        let known = message.body.commit_point();
        let deserves_a_look = match message.term.cmp(&self.term) {
            Ordering::Less if broken!(OlderTermsIgnored) && message.body.is_answer() => true,
            Ordering::Less => {
                self.answer_older_term(&message);
                false
            }
            Ordering::Equal => true,
            Ordering::Greater => self.enter_term_of(&message),
        };
        // Once committed, an entry stays committed, so a commit point from any peer counts. But the
        // leader of our term need not have what a *later* term committed. Its correct appends would
        // then look like contradictions.
        if let Some(commit) = known
            && (sender <= self.term || broken!(CommitOfLaterTerms))
        {
            self.learn_commit(commit)?;
        }
        if deserves_a_look { self.dispatch(message) } else { Ok(()) }
    }

    /// A message of an older term has no effect, but its sender may need a reply to learn that it
    /// is behind. Otherwise a leader that was deposed without noticing would go on forever when no
    /// follower is in its term any more.
    fn answer_older_term(&mut self, message: &Message) {
        let body = match message.body {
            MessageBody::Append { .. }
            | MessageBody::Commit { .. }
            | MessageBody::Heartbeat { .. }
            | MessageBody::InstallSnapshot { .. } => {
                MessageBody::HeartbeatReply { stamp: Stamp::default() }
            }
            MessageBody::PreVote { .. } => {
                MessageBody::PreVoteReply { granted: false, commit: self.commit_point() }
            }
            MessageBody::Vote { .. } => {
                MessageBody::VoteReply { granted: false, commit: self.commit_point() }
            }
            _ => return,
        };
        let reply = self.message(message.from, body);
        self.outbox.send(reply);
    }

    /// Moves to the message's newer term if the message proves that this term has begun. Returns
    /// whether the message is to be handled.
    fn enter_term_of(&mut self, message: &Message) -> bool {
        match message.body {
            // These carry a term that may never come.
            MessageBody::PreVote { .. } | MessageBody::PreVoteReply { granted: true, .. } => true,
            // A peer that merely cannot hear a live leader, or that was removed, must not depose
            // that leader, not even by raising the term (dissertation §4.2.3).
            MessageBody::Vote { transfer: false, .. } if self.is_loyal() => false,
            MessageBody::Append { .. }
            | MessageBody::Commit { .. }
            | MessageBody::Heartbeat { .. }
            | MessageBody::InstallSnapshot { .. } => {
                self.become_follower(message.term, Some(message.from));
                true
            }
            _ => {
                self.become_follower(message.term, None);
                true
            }
        }
    }

    fn dispatch(&mut self, message: Message) -> Result<(), StepError> {
        let Message { from, term, body, .. } = message;
        match body {
            MessageBody::PreVote { last_index, last_term, .. } => {
                self.on_pre_vote(from, term, (last_term, last_index));
            }
            MessageBody::PreVoteReply { granted, .. } => {
                self.on_pre_vote_reply(from, term, granted);
            }
            MessageBody::Vote { last_index, last_term, transfer, .. } => {
                self.on_vote(from, (last_term, last_index), transfer);
            }
            MessageBody::VoteReply { granted, .. } => {
                self.on_vote_reply(from, granted);
            }
            MessageBody::Append { prev_index, prev_term, entries, commit, stamp } => {
                self.hear_leader(from)?;
                self.on_append(from, (prev_index, prev_term), entries, commit, stamp)?;
            }
            MessageBody::AppendReply { outcome, stamp } => {
                self.on_append_reply(from, outcome, stamp)?;
            }
            MessageBody::Commit { commit } => {
                self.hear_leader(from)?;
                self.on_commit(commit)?;
            }
            MessageBody::Heartbeat { commit, stamp } => {
                self.hear_leader(from)?;
                self.on_heartbeat(from, commit, stamp)?;
            }
            MessageBody::HeartbeatReply { stamp } => self.on_heartbeat_reply(from, stamp),
            MessageBody::InstallSnapshot { meta, data } => {
                self.hear_leader(from)?;
                self.on_install_snapshot(from, meta, data)?;
            }
            MessageBody::TimeoutNow => self.on_timeout_now(from),
            MessageBody::ReadIndex { batch } => self.on_read_index(from, batch),
            MessageBody::ReadIndexReply { batch, index } => {
                self.on_read_index_reply(from, batch, index);
            }
            MessageBody::TransferRequest { target } => {
                // The result is ignored: the peer that asked sees from a change of leader whether
                // the request was granted.
                if matches!(self.role, Role::Leader(_)) {
                    let _ = self.transfer_leader(self.now, Some(target));
                }
            }
        }
        Ok(())
    }
}
