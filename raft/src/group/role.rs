//! What a peer is, with the state that only such a peer has.

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
    /// When to campaign, unless the leader is heard from.
    pub deadline: Time,
    /// Reads passed on to the leader.
    pub reads: ForwardedReads,
    /// The leader hands over to this peer, which has changes of members to
    /// apply before it may campaign.
    pub asked_to_campaign: bool,
}

#[derive(Debug)]
pub(super) struct Candidate {
    /// Whether it asks for pre-votes, in the term before the one it wants.
    pub pre: bool,
    /// Who has answered what. A handful, so a list.
    pub votes: Vec<(PeerId, bool)>,
    /// When to try again.
    pub deadline: Time,
}

#[derive(Debug)]
pub(super) struct Leader {
    /// Every member, itself included.
    pub follows: Vec<(PeerId, Follow)>,
    /// The index of its first entry: only from there on may it count commits.
    pub term_start: LogIndex,
    /// When a witness that has begun no handover gives way.
    pub hand_over_by: Time,
    /// A change of members may lie here or before: none other is proposed until
    /// this index is applied.
    pub pending_change: LogIndex,
    /// Of its own proposals.
    pub uncommitted_bytes: usize,
    /// Rounds of ReadIndex begun.
    pub round: u64,
    pub reads: ReadRounds,
    pub heartbeat_due: Time,
    /// When the quorum's latest answers, if none come, will be too old.
    pub quorum_due: Time,
    pub transfer: Option<Box<Transfer>>,
    /// Another peer was told to campaign in spite of every promise, and the
    /// message may arrive at any time: no lease for the rest of this term.
    pub lease_void: bool,
    /// Something may have to be sent to somebody.
    pub replicate: bool,
}

/// Leadership on its way to another peer.
#[derive(Debug)]
pub(super) struct Transfer {
    pub target: PeerId,
    /// When the leader goes on leading.
    pub deadline: Time,
    /// Whether the target was told to campaign.
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
