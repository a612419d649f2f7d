//! Leading: proposals, replication and the commit rule (Raft §5.3, §5.4.2).

use bytes::Bytes;
use thiserror::Error;

use super::role::{Leader, Role};
use super::{Group, SnapshotOutcome, StepError};
use crate::config::Config;
use crate::configuration::ConfigError;
use crate::entries::Entries;
use crate::log::{LogReadError, LogReader};
use crate::message::{AppendOutcome, CommitPoint, Message, MessageBody, Stamp};
use crate::progress::{FlowLimits, Follow, ProgressState};
use crate::quorum;
use crate::read::ReadRounds;
use crate::rules::broken;
use crate::types::{Entry, Identity, LogIndex, Payload, PeerId, Term, Time};

/// Why a proposal was refused. Nothing was appended.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum ProposeError {
    /// Only the leader takes proposals.
    #[error("peer {peer} does not lead; the leader is {leader:?}")]
    NotLeader {
        /// This peer.
        peer: PeerId,
        /// The leader that this peer knows, if any.
        leader: Option<PeerId>,
    },
    /// Further proposals could keep the next leader from ever catching up.
    #[error("leadership is being handed to peer {target}")]
    TransferInProgress {
        /// The next leader.
        target: PeerId,
    },
    /// A witness leads only until it has brought a voter with data up to date.
    #[error("peer {peer} is a witness and leads only to hand over")]
    Witness {
        /// This peer.
        peer: PeerId,
    },
    /// Larger than [`Config::max_entry_bytes`].
    #[error("a proposal of {bytes} bytes is over the limit of {limit}")]
    TooLarge {
        /// Bytes of the proposal.
        bytes: usize,
        /// Bytes that it may have.
        limit: usize,
    },
    /// Proposals come faster than the group commits them.
    #[error("{bytes} bytes of proposals are not committed yet")]
    UncommittedFull {
        /// Bytes that are not committed.
        bytes: usize,
    },
    /// One change of members at a time.
    #[error("a change of members up to entry {index} is not applied yet")]
    ChangePending {
        /// The index up to which a change lies, or may lie.
        index: LogIndex,
    },
    /// The new configuration has witnesses, and no voter with data that could be brought up to date
    /// without a snapshot. Afterwards no voter might have the data.
    #[error("after the change no voter with data would be up to date: catch one up first")]
    DataWouldBeLost,
    /// The change does not fit the configuration.
    #[error(transparent)]
    InvalidChange(#[from] ConfigError),
}

impl<R: LogReader> Group<R> {
    /// Appends a command if this peer leads. The command is committed when it comes out of a Ready
    /// with the returned index **and** the returned term.
    ///
    /// # Errors
    /// See [`ProposeError`].
    pub fn propose(&mut self, now: Time, command: Bytes) -> Result<(LogIndex, Term), ProposeError> {
        self.advance(now);
        let limit = self.config.max_uncommitted_bytes;
        let payload = Payload::Command(command);
        self.check_size(&payload)?;
        let leader = self.proposer()?;
        let bytes = leader.uncommitted_bytes;
        if bytes > 0 && bytes.saturating_add(payload.bytes()) > limit {
            return Err(ProposeError::UncommittedFull { bytes });
        }
        Ok(self.append_own(payload))
    }

    pub(super) fn check_size(&self, payload: &Payload) -> Result<(), ProposeError> {
        let (bytes, limit) = (payload.bytes(), self.config.max_entry_bytes);
        if bytes > limit {
            return Err(ProposeError::TooLarge { bytes, limit });
        }
        Ok(())
    }

    /// The state of this leader, if it may propose now.
    pub(super) fn proposer(&mut self) -> Result<&mut Leader, ProposeError> {
        let (peer, known, witness) = (self.me.peer, self.leader(), self.is_witness());
        match &mut self.role {
            Role::Leader(leader) => match &leader.transfer {
                Some(transfer) => Err(ProposeError::TransferInProgress { target: transfer.target }),
                None if witness => Err(ProposeError::Witness { peer }),
                None => Ok(leader),
            },
            _ => Err(ProposeError::NotLeader { peer, leader: known }),
        }
    }

    pub(super) fn append_own(&mut self, payload: Payload) -> (LogIndex, Term) {
        let Role::Leader(leader) = &mut self.role else {
            panic!("only a leader appends entries of its own");
        };
        let entry = Entry { term: self.term, index: self.log.last_index().next(), payload };
        leader.uncommitted_bytes += entry.bytes();
        leader.replicate = true;
        let at = (entry.index, entry.term);
        self.log.append(entry);
        at
    }

    pub(super) fn become_leader(&mut self) {
        let (now, last) = (self.now, self.log.last_index());
        let follow = |peer| (peer, Follow::new(last.next(), now));
        let mut follows: Vec<_> = self.configuration.peers().map(follow).collect();
        follows.shrink_to_fit();
        let leader = Leader {
            follows,
            term_start: last.next(),
            hand_over_by: now + self.config.election_timeout,
            // Any entry in the tail may be a change of members.
            pending_change: if broken!(TailMayHoldChange) { LogIndex(0) } else { last },
            uncommitted_bytes: 0,
            round: 0,
            reads: ReadRounds::default(),
            heartbeat_due: now + self.config.heartbeat_interval,
            quorum_due: now + self.config.election_timeout,
            transfer: None,
            lease_void: false,
            replicate: true,
        };
        assert!(
            self.vote == Some(self.me.peer),
            "peer {} would lead term {} without its own vote",
            self.me.peer,
            self.term
        );
        self.drop_role(Role::Leader(Box::new(leader)));
        // Entries of earlier terms commit only together with an entry of this term (§5.4.2), so the
        // term begins with one.
        self.append_own(Payload::Noop);
        self.count_own_log();
    }

    /// Counts the leader's own log towards the quorum. It counts like any other, so only as far as
    /// it is durable.
    pub(super) fn count_own_log(&mut self) {
        let Role::Leader(leader) = &mut self.role else { return };
        let last = self.log.last_index();
        let durable = if broken!(LeaderCountsDurableOnly) { last } else { self.log.persisted() };
        if let Some(follow) = leader.follow_mut(self.me.peer) {
            follow.own_log(durable, last);
        }
        self.commit_what_a_quorum_has();
    }

    pub(super) fn commit_what_a_quorum_has(&mut self) {
        let Role::Leader(leader) = &mut self.role else { return };
        let index = quorum::reached(&self.configuration, |peer| {
            leader.follow(peer).map_or(LogIndex(0), Follow::match_index)
        });
        let before = self.log.commit();
        // Everything from the first entry of this term on is of this term. Nothing older is
        // committed by counting (Raft §5.4.2, figure 8).
        let own_term = index >= leader.term_start || broken!(CommitOwnTermOnly);
        if own_term && index > before {
            self.log.commit_to(index);
            let freed = self.log.bytes_between(before.max(leader.term_start.prev()), index);
            leader.uncommitted_bytes = leader.uncommitted_bytes.saturating_sub(freed);
            leader.replicate = true;
        }
    }

    pub(super) fn on_append_reply(
        &mut self,
        from: PeerId,
        outcome: AppendOutcome,
        stamp: Stamp,
    ) -> Result<(), StepError> {
        let Role::Leader(leader) = &mut self.role else { return Ok(()) };
        let round = leader.round;
        let Some(follow) = leader.follow_mut(from) else { return Ok(()) };
        match outcome {
            AppendOutcome::Accepted { match_index } => {
                let last = self.log.last_index();
                if match_index > last {
                    if broken!(OlderTermsIgnored) {
                        return Ok(());
                    }
                    return Err(StepError::ImpossibleAck { from, index: match_index, last });
                }
                follow.heard(self.now, round, stamp);
                let news = follow.accepted(self.now, match_index, self.log.first_index());
                if news && match_index > self.log.commit() {
                    self.commit_what_a_quorum_has();
                }
            }
            AppendOutcome::Rejected { prev_index, hint_index, hint_term } => {
                if let Some(acknowledged) = follow.has_lost(prev_index, stamp) {
                    let prev = prev_index;
                    return Err(StepError::PeerLostEntries { from, prev, acknowledged });
                }
                follow.heard(self.now, round, stamp);
                let (agreed, _) = self.log.last_at_most(hint_index, hint_term)?;
                follow.rejected(prev_index, agreed.min(hint_index));
            }
        }
        self.serve_again();
        self.confirm_reads();
        self.hand_over_if_caught_up();
        Ok(())
    }

    pub(super) fn on_heartbeat_reply(&mut self, from: PeerId, stamp: Stamp) {
        let limits = self.flow_limits();
        let Role::Leader(leader) = &mut self.role else { return };
        let round = leader.round;
        let Some(follow) = leader.follow_mut(from) else { return };
        follow.heard(self.now, round, stamp);
        follow.nudged(self.log.first_index(), self.log.last_index(), limits);
        self.serve_again();
        self.confirm_reads();
        // A witness tries again if its order to campaign was lost.
        self.hand_over_if_caught_up();
    }

    fn serve_again(&mut self) {
        if let Role::Leader(leader) = &mut self.role {
            leader.replicate = true;
        }
    }

    fn flow_limits(&self) -> FlowLimits {
        let Config { max_inflight_messages, max_inflight_bytes, .. } = &*self.config;
        FlowLimits { messages: *max_inflight_messages, bytes: *max_inflight_bytes }
    }

    /// Reports that the driver could not reach a peer, so appends in flight may be lost.
    pub fn unreachable(&mut self, peer: PeerId) {
        if let Role::Leader(leader) = &mut self.role
            && let Some(follow) = leader.follow_mut(peer)
        {
            follow.lost();
        }
    }

    /// Reports how the sending of a snapshot ended that [`crate::Ready::snapshots_wanted`] asked
    /// for. Appends to `to` resume only after this call, or after a reply from `to`.
    pub fn snapshot_sent(&mut self, to: PeerId, outcome: SnapshotOutcome) {
        let Role::Leader(leader) = &mut self.role else { return };
        let Some(follow) = leader.follow_mut(to) else { return };
        match outcome {
            SnapshotOutcome::Delivered => follow.snapshot_delivered(),
            SnapshotOutcome::Failed => follow.snapshot_failed(),
        }
    }

    pub(super) fn send_heartbeats(&mut self) {
        self.rest();
        let Identity { group, peer: from } = self.me;
        let (term, sent) = (self.term, self.now);
        let Role::Leader(leader) = &mut self.role else { return };
        let stamp = Stamp { round: leader.round, sent };
        for (to, follow) in leader.follows.iter_mut().filter(|(to, _)| *to != from) {
            // Beyond the prefix that this follower is known to share, its log may differ.
            let known = follow.match_index();
            let commit = self.log.commit();
            let commit = if broken!(HeartbeatCommitCapped) { commit } else { commit.min(known) };
            follow.told_commit(commit);
            let body = MessageBody::Heartbeat { commit, stamp };
            self.outbox.send(Message { group, from, to: *to, term, body });
        }
    }

    /// Sends appends to every follower, as far as its limits allow. Called once per Ready, so that
    /// everything that was proposed and acknowledged since the last Ready is sent together.
    pub(super) fn replicate(&mut self) {
        self.log.seal();
        let limits = self.flow_limits();
        let Role::Leader(leader) = &mut self.role else { return };
        if !std::mem::take(&mut leader.replicate) {
            return;
        }
        let stamp = Stamp { round: leader.round, sent: self.now };
        let own = self.me.peer;
        let has_data = !self.configuration.is_witness(own);
        let mut replication = Replication {
            log: &self.log,
            limits,
            max_bytes: self.config.max_append_bytes,
            me: self.me,
            term: self.term,
            stamp,
            outbox: &mut self.outbox,
        };
        for (to, follow) in leader.follows.iter_mut().filter(|(to, _)| *to != own) {
            match replication.serve(*to, follow) {
                Ok(()) => {}
                Err(LogReadError::Compacted { .. }) => {
                    follow.needs_snapshot();
                    if has_data {
                        replication.outbox.want_snapshot(*to);
                    } else {
                        // Another leader may have data, or a log that goes back further.
                        follow.snapshot_failed();
                    }
                }
                Err(failure) => replication.outbox.log_failed(failure),
            }
        }
        if let Some(follow) = leader.follow_mut(own) {
            follow.own_log(self.log.persisted(), self.log.last_index());
        }
    }

    /// The end of the time in which this leader may serve reads from its own state without a
    /// message; `None` if it may not.
    ///
    /// A quorum that replied to messages sent at time T has promised to elect no other leader for
    /// one election timeout from T, measured by clocks that may run faster than ours. The driver
    /// must stop using an earlier result of this function **before** it sends the messages of the
    /// next Ready.
    #[must_use]
    pub fn lease_until(&self) -> Option<Time> {
        let Role::Leader(leader) = &self.role else { return None };
        let void = leader.lease_void && !broken!(LeaseVoidAfterHandover);
        // A peer that has applied a change which is not applied here may treat its promise as void,
        // because it was given to an old configuration. A voter that remains alone does so.
        let changing = leader.pending_change > self.log.applied() && !broken!(NoLeaseDuringChange);
        let unsure = void || changing || leader.transfer.is_some();
        let blocked = unsure || !self.config.check_quorum || self.is_witness();
        // Before its first entry is committed, a leader may not even know what is committed (Raft
        // §8).
        if blocked || self.log.commit() < leader.term_start {
            return None;
        }
        let own = self.me.peer;
        let sent = quorum::reached(&self.configuration, |peer| {
            if peer == own {
                return self.now;
            }
            leader.follow(peer).map_or(Time(0), |follow| {
                if broken!(LeaseFromSendTime) { follow.last_ack() } else { follow.acked_sent() }
            })
        });
        if sent == Time(0) {
            return None;
        }
        Some(sent + self.config.lease())
    }
}

/// The state that all followers are served from.
struct Replication<'a, R> {
    log: &'a crate::log::Log<R>,
    limits: FlowLimits,
    max_bytes: usize,
    me: Identity,
    term: Term,
    stamp: Stamp,
    outbox: &'a mut super::output::Outbox,
}

impl<R: LogReader> Replication<'_, R> {
    fn serve(&mut self, to: PeerId, follow: &mut Follow) -> Result<(), LogReadError> {
        // This loop ends, because each append uses up a probe's turn, fills the pipeline, or comes
        // closer to the log's end.
        while follow.may_send(self.limits) {
            let probing = follow.state() == ProgressState::Probe;
            if !probing && follow.next_index() > self.log.last_index() {
                break;
            }
            self.append_to(to, follow, self.max_bytes)?;
        }
        if follow.take_ping() {
            self.append_to(to, follow, 0)?;
        }
        let index = self.log.commit();
        if follow.lacks_commit(index)
            && let Some(term) = self.log.term(index)?
        {
            follow.told_commit(index);
            self.send(to, MessageBody::Commit { commit: CommitPoint { index, term } });
        }
        Ok(())
    }

    #[inline(always)]
    fn send(&mut self, to: PeerId, body: MessageBody) {
        let Identity { group, peer: from } = self.me;
        self.outbox.send(Message { group, from, to, term: self.term, body });
    }

    /// Sends one append of at most about `max_bytes`, or without entries if that is zero.
    fn append_to(
        &mut self,
        to: PeerId,
        follow: &mut Follow,
        max_bytes: usize,
    ) -> Result<(), LogReadError> {
        let next = follow.next_index();
        let prev_index = next.prev();
        let Some(prev_term) = self.log.term(prev_index)? else {
            return Err(LogReadError::Compacted { index: prev_index });
        };
        let high = if max_bytes == 0 { next } else { self.log.last_index().next() };
        let mut entries = Entries::default();
        self.log.slice(next, high, max_bytes, &mut entries)?;
        let bytes = entries.bytes();
        let commit = self.log.commit();
        follow.sent(entries.last().map(|entry| entry.index), bytes, commit);
        let stamp = self.stamp;
        self.send(to, MessageBody::Append { prev_index, prev_term, entries, commit, stamp });
        Ok(())
    }
}
