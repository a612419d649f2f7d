//! Handing leadership over (dissertation §3.10). The leader takes no more proposals, brings the
//! target up to date, gives up its lease, and orders the target to campaign at once.

use thiserror::Error;

use super::Group;
use super::role::{Role, Transfer};
use crate::log::LogReader;
use crate::message::MessageBody;
use crate::types::{PeerId, Time};

/// Why leadership is not handed over.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum TransferError {
    /// There is no known leader that could hand over.
    #[error("peer {peer} knows no leader that could hand over")]
    NoLeader {
        /// This peer.
        peer: PeerId,
    },
    /// The target leads already.
    #[error("peer {peer} leads already")]
    AlreadyLeader {
        /// The leader.
        peer: PeerId,
    },
    /// Learners, witnesses and strangers cannot lead.
    #[error("peer {peer} is no voter that can lead")]
    NotElectable {
        /// The target.
        peer: PeerId,
    },
    /// Another transfer is under way.
    #[error("leadership is being handed to peer {target}")]
    InProgress {
        /// The other target.
        target: PeerId,
    },
    /// There is no other voter that can lead and was heard from recently.
    #[error("no other peer can lead, or none was heard from")]
    NoTarget,
}

impl<R: LogReader> Group<R> {
    /// Hands leadership to `to`, or to the best successor. Gives up after an election timeout. A
    /// follower passes the request on to the leader, and there `None` means the follower itself.
    /// Returns the target.
    ///
    /// The lease ends with this call: see [`Group::lease_until`].
    ///
    /// # Errors
    /// See [`TransferError`].
    pub fn transfer_leader(
        &mut self,
        now: Time,
        to: Option<PeerId>,
    ) -> Result<PeerId, TransferError> {
        self.advance(now);
        let own = self.me.peer;
        let Some(leader) = self.leader() else {
            return Err(TransferError::NoLeader { peer: own });
        };
        if leader != own {
            let target = to.unwrap_or(own);
            if target == leader {
                return Err(TransferError::AlreadyLeader { peer: target });
            }
            let wish = self.message(leader, MessageBody::TransferRequest { target });
            self.outbox.send(wish);
            return Ok(target);
        }
        let target = match to {
            Some(target) => target,
            None => self.best_successor(true).ok_or(TransferError::NoTarget)?,
        };
        self.begin_transfer(target)?;
        Ok(target)
    }

    /// The peer that this leader is handing over to.
    #[must_use]
    pub fn transfer_target(&self) -> Option<PeerId> {
        match &self.role {
            Role::Leader(leader) => leader.transfer.as_ref().map(|transfer| transfer.target),
            _ => None,
        }
    }

    fn begin_transfer(&mut self, target: PeerId) -> Result<(), TransferError> {
        if target == self.me.peer {
            return Err(TransferError::AlreadyLeader { peer: target });
        }
        let members = &self.configuration;
        if !members.voters.contains(&target) || members.is_witness(target) {
            return Err(TransferError::NotElectable { peer: target });
        }
        let deadline = self.now + self.config.election_timeout;
        let Role::Leader(leader) = &mut self.role else { return Ok(()) };
        match &leader.transfer {
            Some(transfer) if transfer.target == target => return Ok(()),
            Some(transfer) => return Err(TransferError::InProgress { target: transfer.target }),
            None => leader.transfer = Some(Box::new(Transfer { target, deadline, told: false })),
        }
        leader.replicate = true;
        self.hand_over_if_caught_up();
        Ok(())
    }

    /// Orders the target to campaign, if it has the whole log.
    pub(super) fn hand_over_if_caught_up(&mut self) {
        if self.is_witness() {
            self.choose_heir();
        }
        let Role::Leader(leader) = &mut self.role else { return };
        let last = self.log.last_index();
        let Some((target, false)) = leader.transfer.as_ref().map(|one| (one.target, one.told))
        else {
            return;
        };
        if leader.follow(target).is_none_or(|follow| follow.match_index() < last) {
            return;
        }
        // From here on the promises that a lease rests on are void. They stay void, because the
        // message may be delivered long after the transfer was given up.
        leader.lease_void = true;
        if let Some(transfer) = &mut leader.transfer {
            transfer.told = true;
        }
        let message = self.message(target, MessageBody::TimeoutNow);
        self.outbox.send(message);
    }

    /// Lets a witness hand over to the first voter with data that has caught up. In a joint
    /// configuration that may be one of the old voters, because perhaps no other peer has the data
    /// that the new voters need.
    fn choose_heir(&mut self) {
        let last = self.log.last_index();
        let deadline = self.now + self.config.election_timeout;
        let heir = self.furthest(true, |peer| self.configuration.is_voter(peer));
        let Role::Leader(leader) = &mut self.role else { return };
        let ready = |target| leader.follow(target).is_some_and(|f| f.match_index() == last);
        if let (None, Some(target)) = (&leader.transfer, heir.filter(|heir| ready(*heir))) {
            leader.transfer = Some(Box::new(Transfer { target, deadline, told: false }));
        }
    }

    /// The voter with the furthest log among those that were heard from recently. If there is none,
    /// and voters need not be `alive`, among all voters.
    pub(super) fn best_successor(&self, alive: bool) -> Option<PeerId> {
        self.furthest(alive, |peer| self.configuration.voters.contains(&peer))
    }

    fn furthest(&self, alive: bool, is_voter: impl Fn(PeerId) -> bool) -> Option<PeerId> {
        let witnesses = &self.configuration.witnesses;
        let fit = |peer| peer != self.me.peer && is_voter(peer) && !witnesses.contains(&peer);
        let known = self.progress().filter(|(peer, p)| fit(*peer) && (p.recently_active || !alive));
        known.max_by_key(|(_, p)| (p.recently_active, p.match_index)).map(|(peer, _)| peer)
    }
}
