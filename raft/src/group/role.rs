//! The roles of a peer, each with the state that only a peer in that role has.

use crate::progress::Follow;
use crate::read::{ForwardedReads, ReadRounds};
use crate::ready::RoleKind;
use crate::types::{LogIndex, PeerId, Time};

#[derive(Debug)]
pub(super) enum Role {
    Follower(Follower),
    Candidate(Candidate),
    Leader(Box<Leader>),
}

#[derive(Debug)]
pub(super) struct Follower {
    pub leader: Option<PeerId>,
    /// When to campaign, unless a message from the leader comes.
    pub deadline: Time,
    /// Reads passed on to the leader.
    pub reads: ForwardedReads,
    /// The leader hands over to this peer, which has changes of members to
    /// apply before it may campaign.
    pub asked_to_campaign: bool,
}

#[derive(Debug)]
pub(super) struct Candidate {
    /// Whether the candidate asks for pre-votes. It is then still in the term
    /// before the one that it wants.
    pub pre: bool,
    /// Each peer's reply. There are few, so this is a list.
    pub votes: Vec<(PeerId, bool)>,
    /// When to try again.
    pub deadline: Time,
}

#[derive(Debug)]
pub(super) struct Leader {
    /// Every member, itself included.
    pub follows: Vec<(PeerId, Follow)>,
    /// The index of the leader's first entry. It may count replicas for a
    /// commit only from there on.
    pub term_start: LogIndex,
    /// When a leading witness that has begun no handover steps down.
    pub hand_over_by: Time,
    /// A change of members may lie at this index or before. No other is
    /// proposed until this index is applied.
    pub pending_change: LogIndex,
    /// Bytes of the leader's own proposals that are not committed.
    pub uncommitted_bytes: usize,
    /// Rounds of ReadIndex begun.
    pub round: u64,
    pub reads: ReadRounds,
    pub heartbeat_due: Time,
    /// When the quorum's latest replies will be too old, if no more come.
    pub quorum_due: Time,
    pub transfer: Option<Box<Transfer>>,
    /// Whether another peer was ordered to campaign in spite of every promise.
    /// The order may arrive at any time, so there is no lease for the rest of
    /// this term.
    pub lease_void: bool,
    /// Whether something may have to be sent to a peer.
    pub replicate: bool,
}

/// A transfer of leadership under way.
#[derive(Debug)]
pub(super) struct Transfer {
    pub target: PeerId,
    /// When the leader gives the transfer up and goes on leading.
    pub deadline: Time,
    /// Whether the order to campaign was sent to the target.
    pub told: bool,
}

impl Role {
    pub fn kind(&self) -> RoleKind {
        match self {
            Role::Follower(_) => RoleKind::Follower,
            Role::Candidate(Candidate { pre: true, .. }) => RoleKind::PreCandidate,
            Role::Candidate(_) => RoleKind::Candidate,
            Role::Leader(_) => RoleKind::Leader,
        }
    }
}

impl Follower {
    pub fn new(leader: Option<PeerId>, deadline: Time) -> Self {
        let reads = ForwardedReads::default();
        Follower { leader, deadline, reads, asked_to_campaign: false }
    }
}

impl Leader {
    pub fn follow(&self, peer: PeerId) -> Option<&Follow> {
        self.follows.iter().find(|(other, _)| *other == peer).map(|(_, follow)| follow)
    }

    pub fn follow_mut(&mut self, peer: PeerId) -> Option<&mut Follow> {
        self.follows.iter_mut().find(|(other, _)| *other == peer).map(|(_, follow)| follow)
    }
}
