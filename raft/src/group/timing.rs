//! The deadlines of a peer, which pass without any message.

use super::Group;
use super::role::Role;
use crate::log::LogReader;
use crate::quorum;
use crate::types::Time;

impl<R: LogReader> Group<R> {
    /// Moves the group's clock to `now`, and acts on the deadlines that have passed. It may be
    /// called at any rate.
    pub fn tick(&mut self, now: Time) {
        self.advance(now);
        match &self.role {
            Role::Follower(_) => self.tick_follower(),
            Role::Candidate(candidate) => {
                if self.now >= candidate.deadline {
                    self.become_follower(self.term, None);
                    self.campaign_or_wait();
                }
            }
            Role::Leader(_) => self.tick_leader(),
        }
    }

    /// When [`Group::tick`] will next have something to do; `None` if only an
    /// input can change anything.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Time> {
        match &self.role {
            Role::Follower(follower) => {
                let election = self.is_candidate_material().then_some(follower.deadline);
                [election, follower.reads.deadline()].into_iter().flatten().min()
            }
            Role::Candidate(candidate) => Some(candidate.deadline),
            Role::Leader(leader) => {
                let transfer = leader.transfer.as_ref().map(|transfer| transfer.deadline);
                let quorum = self.config.check_quorum.then_some(leader.quorum_due);
                let heartbeat = Some(leader.heartbeat_due);
                let waits = self.is_witness() && leader.transfer.is_none();
                let handover = waits.then_some(leader.hand_over_by);
                [transfer, quorum, heartbeat, handover].into_iter().flatten().min()
            }
        }
    }

    fn tick_follower(&mut self) {
        let Role::Follower(follower) = &mut self.role else { return };
        if follower.reads.deadline().is_some_and(|deadline| deadline <= self.now) {
            self.outbox.fail_reads(follower.reads.expired(self.now).into_iter());
        }
        if self.now >= follower.deadline && self.is_candidate_material() {
            self.campaign_or_wait();
        }
    }

    fn campaign_or_wait(&mut self) {
        let deadline = if self.is_loyal() {
            self.loyal_until
        } else if self.is_electable() {
            return self.start_campaign();
        } else {
            // A change of members or a snapshot is being applied: try again soon.
            self.now + self.config.heartbeat_interval
        };
        if let Role::Follower(follower) = &mut self.role {
            follower.deadline = deadline;
        }
    }

    fn tick_leader(&mut self) {
        // This check comes first, so that a leader that was suspended sends nothing as a leader.
        if !self.check_quorum() {
            return;
        }
        let witness = self.is_witness();
        let Role::Leader(leader) = &mut self.role else { return };
        if leader.transfer.as_ref().is_some_and(|transfer| transfer.deadline <= self.now) {
            leader.transfer = None;
        }
        if witness && leader.transfer.is_none() && self.now >= leader.hand_over_by {
            // This witness reaches no peer that it can bring up to date, or no peer took over. It
            // steps down, so that a peer with the data gets a chance.
            return self.become_follower(self.term, None);
        }
        if self.now >= leader.heartbeat_due {
            leader.heartbeat_due = self.now + self.config.heartbeat_interval;
            self.send_heartbeats();
        }
    }

    /// Steps down if no quorum was heard from for an election timeout. Clients then look for
    /// another leader instead of waiting for one that can decide nothing (dissertation §6.2).
    /// Returns whether this peer still leads.
    fn check_quorum(&mut self) -> bool {
        let Role::Leader(leader) = &mut self.role else { return false };
        if !self.config.check_quorum || self.now < leader.quorum_due {
            return true;
        }
        let (own, now) = (self.me.peer, self.now);
        let heard = quorum::reached(&self.configuration, |peer| {
            if peer == own { now } else { leader.follow(peer).map_or(Time(0), |f| f.last_ack()) }
        });
        let due = heard + self.config.election_timeout;
        if due <= now {
            self.become_follower(self.term, None);
            return false;
        }
        leader.quorum_due = due;
        true
    }
}
