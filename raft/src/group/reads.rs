//! ReadIndex on both sides; see [`crate::read`] for the idea.

use super::Group;
use super::role::Role;
use crate::log::LogReader;
use crate::message::MessageBody;
use crate::progress::Follow;
use crate::quorum;
use crate::read::{ReadError, Reader};
use crate::rules::broken;
use crate::types::{Identity, LogIndex, PeerId, Time};

impl<R: LogReader> Group<R> {
    /// Asks for the index that a linearizable read has to wait for. The index comes in
    /// [`crate::Ready::reads`] under this `id`. If leadership is lost, the id comes in
    /// [`crate::Ready::failed_reads`] instead. With [`crate::Config::check_quorum`], that happens
    /// soon after replies stop.
    ///
    /// # Errors
    /// If there is no leader to ask, too many reads wait, or this peer is a witness.
    pub fn read_index(&mut self, now: Time, id: u64) -> Result<(), ReadError> {
        self.advance(now);
        let peer = self.me.peer;
        if self.is_witness() {
            return Err(ReadError::Witness { peer });
        }
        match &mut self.role {
            Role::Leader(leader) if leader.reads.is_full() => Err(ReadError::TooMany { peer }),
            Role::Leader(leader) => {
                leader.reads.add(Reader::Here(id));
                Ok(())
            }
            Role::Follower(follower) if follower.leader.is_some() => {
                if follower.reads.is_full() {
                    return Err(ReadError::TooMany { peer });
                }
                follower.reads.add(id);
                Ok(())
            }
            Role::Follower(_) | Role::Candidate(_) => Err(ReadError::NoLeader { peer }),
        }
    }

    pub(super) fn on_read_index(&mut self, peer: PeerId, batch: u64) {
        if let Role::Leader(leader) = &mut self.role
            && !leader.reads.is_full()
        {
            leader.reads.add(Reader::There { peer, batch });
        }
    }

    pub(super) fn on_read_index_reply(&mut self, from: PeerId, batch: u64, index: LogIndex) {
        let Role::Follower(follower) = &mut self.role else { return };
        if follower.leader == Some(from) {
            for id in follower.reads.answered(batch) {
                self.outbox.answer_read(id, index);
            }
        }
    }

    /// Fails this peer's reads, because it has become a witness and has no data.
    pub(super) fn fail_own_reads(&mut self) {
        match &mut self.role {
            Role::Follower(follower) => {
                self.outbox.fail_reads(std::mem::take(&mut follower.reads).into_ids());
            }
            Role::Candidate(_) => {}
            Role::Leader(leader) => {
                self.outbox.fail_reads(std::mem::take(&mut leader.reads).into_ids());
            }
        }
    }

    /// Begins a round for the leader's waiting reads, or passes a follower's waiting reads on.
    /// Called once per Ready, so that reads that came together share a round.
    pub(super) fn serve_reads(&mut self) {
        match &mut self.role {
            Role::Leader(leader) => {
                // Before its own first entry is committed, a leader's commit index
                // may be behind what earlier leaders acknowledged (Raft §8).
                let knows_commits = self.log.commit() >= leader.term_start;
                let may_know = knows_commits || broken!(ReadAfterOwnTermCommits);
                if !leader.reads.may_begin() || !may_know {
                    return;
                }
                if !broken!(ReadWaitsForNextRound) || leader.round == 0 {
                    leader.round += 1;
                }
                leader.reads.begin(leader.round, self.log.commit());
                self.send_heartbeats();
                self.confirm_reads();
            }
            Role::Follower(follower) => {
                let Some(leader) = follower.leader.filter(|_| follower.reads.has_waiting()) else {
                    return;
                };
                self.next_batch += 1;
                let batch = self.next_batch;
                follower.reads.begin(batch, self.now + self.config.election_timeout);
                let request = self.message(leader, MessageBody::ReadIndex { batch });
                self.outbox.send(request);
            }
            Role::Candidate(_) => {}
        }
    }

    /// Answers the reads of the rounds that a quorum has confirmed.
    pub(super) fn confirm_reads(&mut self) {
        let Identity { group, peer: own } = self.me;
        let term = self.term;
        let Role::Leader(leader) = &mut self.role else { return };
        if leader.reads.is_idle() {
            return;
        }
        let round = leader.round;
        let confirmed = quorum::reached(&self.configuration, |peer| {
            if peer == own || broken!(ReadConfirmsLeadership) {
                round
            } else {
                leader.follow(peer).map_or(0, Follow::acked_round)
            }
        });
        let outbox = &mut self.outbox;
        leader.reads.confirmed(confirmed, |reader, index| match reader {
            Reader::Here(id) => outbox.answer_read(id, index),
            Reader::There { peer, batch } => {
                let body = MessageBody::ReadIndexReply { batch, index };
                outbox.send(crate::Message { group, from: own, to: peer, term, body });
            }
        });
    }
}
