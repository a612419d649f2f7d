//! Changes of members.
//!
//! A configuration takes effect when its entry is **applied**, not when it is
//! appended, so that the driver can veto it and that no configuration ever has
//! to be taken back. Three rules make that safe:
//!
//! 1. A leader proposes a change only when everything up to the one before is
//!    applied here, and a new leader takes its whole unapplied tail for one.
//! 2. So an append that carries change k+1 also carries a commit index that covers change k. A peer
//!    that has k+1 in its log knows that k is committed, because entries and commit index are
//!    written together.
//! 3. No peer campaigns that knows of a committed change it has not applied.
//!
//! A candidate is therefore at most one change behind any possible leader, and majorities of
//! neighbouring configurations always share a voter. A voter does not check its configuration: a
//! learner that was promoted and has not heard of it yet still gives its vote.

use super::Group;
use super::leader::ProposeError;
use super::role::Role;
use crate::configuration::{ConfigError, Configuration};
use crate::log::LogReader;
use crate::message::MessageBody;
use crate::progress::Follow;
use crate::rules::broken;
use crate::types::{ConfChange, LogIndex, Payload, Term, Time};

impl<R: LogReader> Group<R> {
    /// Appends a change of members if this peer leads and no other is pending.
    ///
    /// # Errors
    /// See [`ProposeError`].
    pub fn propose_change(
        &mut self,
        now: Time,
        change: ConfChange,
    ) -> Result<(LogIndex, Term), ProposeError> {
        self.advance(now);
        let applied = self.log.applied();
        let leader = self.proposer()?;
        if leader.pending_change > applied && !broken!(OneChangeAtATime) {
            return Err(ProposeError::ChangePending { index: leader.pending_change });
        }
        let next = self.configuration.changed(&change)?;
        if !self.keeps_the_data(&next) {
            return Err(ProposeError::DataWouldBeLost);
        }
        let payload = Payload::Change(Box::new(change));
        self.check_size(&payload)?;
        Ok(self.append_change(payload))
    }

    /// Whether at least one new voter that is no witness has the data, or can get it from the log.
    /// Otherwise a witness could be left that can give no snapshot to the others. A joint
    /// configuration needs no check: it is left only by a majority that got the data from the old
    /// voters.
    fn keeps_the_data(&self, next: &Configuration) -> bool {
        let first = self.log.first_index();
        let has = |peer, match_index: LogIndex| {
            next.voters.contains(&peer)
                && !next.is_witness(peer)
                && (peer == self.me.peer || match_index.next() >= first)
        };
        next.witnesses.is_empty()
            || next.is_joint()
            || self.progress().any(|(peer, p)| has(peer, p.match_index))
    }

    fn append_change(&mut self, change: Payload) -> (LogIndex, Term) {
        let at = self.append_own(change);
        if let Role::Leader(leader) = &mut self.role {
            leader.pending_change = at.0;
        }
        at
    }

    /// Whether the log may hold a change that is not applied on this peer.
    #[must_use]
    pub fn has_pending_change(&self) -> bool {
        let end = match &self.role {
            Role::Leader(leader) => leader.pending_change,
            _ => self.log.change_horizon(),
        };
        end > self.log.applied()
    }

    /// Applies a change that the driver has reached in the log. The driver reports the index with
    /// [`Group::applied`] afterwards. Returns the new configuration.
    ///
    /// # Errors
    /// If the change does not fit the configuration, which then stays as it is. The leader that
    /// proposed the change has checked that it fits.
    pub fn apply_change(
        &mut self,
        now: Time,
        change: &ConfChange,
    ) -> Result<Configuration, ConfigError> {
        self.advance(now);
        self.configuration = self.configuration.changed(change)?;
        self.follow_members();
        Ok(self.configuration.clone())
    }

    /// Reports that the driver skips the entry with a change, on every peer alike. Returns the
    /// configuration, which stays as it is.
    pub fn ignore_change(&mut self) -> Configuration {
        self.configuration.clone()
    }

    /// Adapts a leader's records to the new members.
    fn follow_members(&mut self) {
        let (now, next) = (self.now, self.log.last_index().next());
        let (own, witness) = (self.me.peer, self.is_witness());
        if witness {
            self.fail_own_reads();
        }
        let Role::Leader(leader) = &mut self.role else { return };
        let members = &self.configuration;
        if witness {
            leader.hand_over_by = now + self.config.election_timeout;
        }
        leader.follows.retain(|(peer, _)| members.contains(*peer) || *peer == own);
        for peer in members.peers() {
            if leader.follow(peer).is_none() {
                leader.follows.push((peer, Follow::new(next, now)));
            }
        }
        leader.follows.shrink_to_fit();
        leader.replicate = true;
        if let Some(transfer) = &leader.transfer
            && !members.is_voter(transfer.target)
        {
            leader.transfer = None;
        }
        if members.is_voter(own) {
            // A smaller quorum may already hold entries that a larger quorum lacked.
            self.commit_what_a_quorum_has();
            self.confirm_reads();
            self.hand_over_if_caught_up();
        } else {
            self.resign();
        }
    }

    /// Proposes the end of an applied joint configuration, if the leader is to end it by itself.
    pub(super) fn leave_joint_if_due(&mut self) {
        let Role::Leader(leader) = &self.role else { return };
        let due = self.configuration.is_joint()
            && self.configuration.auto_leave
            && leader.pending_change <= self.log.applied();
        if due {
            self.append_change(Payload::Change(Box::default()));
        }
    }

    /// Resigns, because this leader is no longer a voter. It sends its commit index to all peers,
    /// hands over to the voter with the furthest log, and steps down (dissertation §4.2.2).
    fn resign(&mut self) {
        self.replicate();
        let Role::Leader(leader) = &mut self.role else { return };
        leader.lease_void = true;
        if let Some(heir) = self.best_successor(false) {
            let message = self.message(heir, MessageBody::TimeoutNow);
            self.outbox.send(message);
        }
        self.become_follower(self.term, None);
    }
}
