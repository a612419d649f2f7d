//! A region's descriptor: its range, its epoch, its peers, and how membership changes shape them.
//!
//! The descriptor is `metapb.Region`, as clients and placement know it. The roles
//! of its peers carry the whole Raft configuration: in a joint configuration an
//! `IncomingVoter` votes only in the new majority, a `DemotingVoter` only in the
//! old one, so that one record, written with the applied index, is all that a
//! restart needs.

use esker_raft::{ChangeStep, ConfChange, Configuration, LeaveJoint, PeerId};
use esker_rpc::proto::metapb::{Peer, PeerRole, Region, RegionEpoch};

use crate::ids::{RegionId, StoreId};

/// Questions asked of a region's descriptor.
pub trait RegionExt {
    fn region_id(&self) -> RegionId;
    fn epoch(&self) -> RegionEpoch;
    fn contains_key(&self, key: &[u8]) -> bool;
    /// Whether `[start, end)` lies inside; an empty `end` means no upper bound.
    fn contains_range(&self, start: &[u8], end: &[u8]) -> bool;
    fn overlaps(&self, start: &[u8], end: &[u8]) -> bool;
    fn peer_on(&self, store: StoreId) -> Option<&Peer>;
    fn peer(&self, id: PeerId) -> Option<&Peer>;
    fn configuration(&self) -> Configuration;
    fn is_initialized(&self) -> bool;
}

impl RegionExt for Region {
    fn region_id(&self) -> RegionId {
        RegionId(self.id)
    }

    fn epoch(&self) -> RegionEpoch {
        self.region_epoch.unwrap_or_default()
    }

    fn contains_key(&self, key: &[u8]) -> bool {
        *key >= *self.start_key && (self.end_key.is_empty() || *key < *self.end_key)
    }

    fn contains_range(&self, start: &[u8], end: &[u8]) -> bool {
        *start >= *self.start_key
            && (self.end_key.is_empty() || (!end.is_empty() && *end <= *self.end_key))
    }

    fn overlaps(&self, start: &[u8], end: &[u8]) -> bool {
        (end.is_empty() || *self.start_key < *end)
            && (self.end_key.is_empty() || *start < *self.end_key)
    }

    fn peer_on(&self, store: StoreId) -> Option<&Peer> {
        self.peers.iter().find(|peer| peer.store_id == store.0)
    }

    fn peer(&self, id: PeerId) -> Option<&Peer> {
        self.peers.iter().find(|peer| peer.id == id.0)
    }

    fn configuration(&self) -> Configuration {
        let with = |roles: &[PeerRole]| {
            self.peers
                .iter()
                .filter(|peer| roles.contains(&peer.role()))
                .map(|peer| PeerId(peer.id))
                .collect()
        };
        let joint = self
            .peers
            .iter()
            .any(|peer| matches!(peer.role(), PeerRole::IncomingVoter | PeerRole::DemotingVoter));
        Configuration {
            voters: with(&[PeerRole::Voter, PeerRole::IncomingVoter]),
            voters_outgoing: if joint {
                with(&[PeerRole::Voter, PeerRole::DemotingVoter])
            } else {
                Default::default()
            },
            learners: with(&[PeerRole::Learner]),
            learners_next: with(&[PeerRole::DemotingVoter]),
            witnesses: Default::default(),
            auto_leave: joint,
        }
    }

    fn is_initialized(&self) -> bool {
        !self.peers.is_empty()
    }
}

/// Whether `epoch` still describes the region's range.
pub fn same_range(epoch: &RegionEpoch, current: &RegionEpoch) -> bool {
    epoch.version == current.version
}

/// One wished change of a region's membership.
#[derive(Clone, Debug, PartialEq)]
pub enum PeerChange {
    /// Adds a voter, or promotes a learner that is already there.
    AddVoter(Peer),
    /// Adds a learner, or demotes a voter that is already there.
    AddLearner(Peer),
    Remove(Peer),
}

impl PeerChange {
    pub fn peer(&self) -> &Peer {
        match self {
            PeerChange::AddVoter(peer)
            | PeerChange::AddLearner(peer)
            | PeerChange::Remove(peer) => peer,
        }
    }
}

/// Why a change of membership makes no sense for a region.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChangeError {
    #[error("region {0} is in the middle of a membership change; try again when it is done")]
    Joint(RegionId),
    #[error("no change asked for")]
    Empty,
    #[error("region {region} already has peer {peer} on store {store}")]
    StoreTaken { region: RegionId, store: StoreId, peer: PeerId },
    #[error("region {region} has no peer {peer}")]
    NoSuchPeer { region: RegionId, peer: PeerId },
    #[error("peer {peer} of region {region} is named twice, or already has that role")]
    NothingToDo { region: RegionId, peer: PeerId },
    #[error(
        "voter {peer} of region {region} must become a learner before it is removed together with other changes"
    )]
    RemovesVoterInJoint { region: RegionId, peer: PeerId },
    #[error("region {0} would be left without a voter")]
    NoVoter(RegionId),
}

/// The region after `changes`: at once where at most one voter changes, joint otherwise.
///
/// # Errors
/// When the changes do not fit the region as it is.
pub fn changed(region: &Region, changes: &[PeerChange]) -> Result<Region, ChangeError> {
    let id = region.region_id();
    let has_joint_roles = |region: &Region| {
        region
            .peers
            .iter()
            .any(|peer| matches!(peer.role(), PeerRole::IncomingVoter | PeerRole::DemotingVoter))
    };
    if has_joint_roles(region) {
        return Err(ChangeError::Joint(id));
    }
    if changes.is_empty() {
        return Err(ChangeError::Empty);
    }
    // The core enters a joint configuration when more than one voter changes.
    let is_voter =
        |id: u64| region.peers.iter().any(|peer| peer.id == id && peer.role() == PeerRole::Voter);
    let moves_voter = |change: &&PeerChange| match change {
        PeerChange::AddVoter(_) => true,
        PeerChange::AddLearner(peer) | PeerChange::Remove(peer) => is_voter(peer.id),
    };
    let joint = changes.iter().filter(moves_voter).count() > 1;
    let mut next = region.clone();
    for (at, change) in changes.iter().enumerate() {
        let named = change.peer();
        let peer_id = PeerId(named.id);
        let store = StoreId(named.store_id);
        let nothing = ChangeError::NothingToDo { region: id, peer: peer_id };
        if changes[..at].iter().any(|earlier| earlier.peer().id == named.id) {
            return Err(nothing);
        }
        let position = next.peers.iter().position(|peer| peer.id == named.id);
        if position.is_none()
            && let Some(taken) = next.peer_on(store)
            && !matches!(change, PeerChange::Remove(_))
        {
            return Err(ChangeError::StoreTaken { region: id, store, peer: PeerId(taken.id) });
        }
        match (change, position) {
            (PeerChange::AddVoter(_), None) => {
                let role = if joint { PeerRole::IncomingVoter } else { PeerRole::Voter };
                next.peers.push(Peer { role: role.into(), ..*named });
            }
            (PeerChange::AddVoter(_), Some(i)) if next.peers[i].role() == PeerRole::Learner => {
                let role = if joint { PeerRole::IncomingVoter } else { PeerRole::Voter };
                next.peers[i].set_role(role);
            }
            (PeerChange::AddLearner(_), None) => {
                next.peers.push(Peer { role: PeerRole::Learner.into(), ..*named });
            }
            (PeerChange::AddLearner(_), Some(i)) if next.peers[i].role() == PeerRole::Voter => {
                let role = if joint { PeerRole::DemotingVoter } else { PeerRole::Learner };
                next.peers[i].set_role(role);
            }
            (PeerChange::AddVoter(_) | PeerChange::AddLearner(_), Some(_)) => return Err(nothing),
            (PeerChange::Remove(_), None) => {
                return Err(ChangeError::NoSuchPeer { region: id, peer: peer_id });
            }
            (PeerChange::Remove(_), Some(i)) => {
                if joint && next.peers[i].role() == PeerRole::Voter {
                    return Err(ChangeError::RemovesVoterInJoint { region: id, peer: peer_id });
                }
                next.peers.remove(i);
            }
        }
    }
    let votes = |roles: [PeerRole; 2]| next.peers.iter().any(|p| roles.contains(&p.role()));
    if !votes([PeerRole::Voter, PeerRole::IncomingVoter]) {
        return Err(ChangeError::NoVoter(id));
    }
    next.region_epoch.get_or_insert_default().conf_ver += changes.len() as u64;
    Ok(next)
}

/// The region after it has left its joint configuration.
pub fn left_joint(region: &Region) -> Region {
    let mut next = region.clone();
    let mut changes = 0;
    for peer in &mut next.peers {
        match peer.role() {
            PeerRole::IncomingVoter => peer.set_role(PeerRole::Voter),
            PeerRole::DemotingVoter => peer.set_role(PeerRole::Learner),
            PeerRole::Voter | PeerRole::Learner => continue,
        }
        changes += 1;
    }
    next.region_epoch.get_or_insert_default().conf_ver += changes;
    next
}

/// The consensus core's form of a change; `context` travels with it to where it is applied.
pub fn conf_change(changes: &[PeerChange], context: bytes::Bytes) -> ConfChange {
    let steps = changes
        .iter()
        .map(|change| match change {
            PeerChange::AddVoter(peer) => ChangeStep::AddVoter(PeerId(peer.id)),
            PeerChange::AddLearner(peer) => ChangeStep::AddLearner(PeerId(peer.id)),
            PeerChange::Remove(peer) => ChangeStep::Remove(PeerId(peer.id)),
        })
        .collect();
    ConfChange { steps, leave: LeaveJoint::Auto, context }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(id: u64, role: PeerRole) -> Peer {
        Peer { id, store_id: id, role: role.into(), is_witness: false }
    }

    fn region(peers: Vec<Peer>) -> Region {
        Region {
            id: 1,
            region_epoch: Some(RegionEpoch { conf_ver: 1, version: 1 }),
            peers,
            ..Default::default()
        }
    }

    fn roles(region: &Region) -> Vec<(u64, PeerRole)> {
        region.peers.iter().map(|peer| (peer.id, peer.role())).collect()
    }

    #[test]
    fn one_change_takes_effect_at_once() {
        let one = region(vec![peer(1, PeerRole::Voter)]);
        let two = changed(&one, &[PeerChange::AddLearner(peer(2, PeerRole::Learner))]).unwrap();
        assert_eq!(roles(&two), [(1, PeerRole::Voter), (2, PeerRole::Learner)]);
        let two = changed(&two, &[PeerChange::AddVoter(peer(2, PeerRole::Voter))]).unwrap();
        assert_eq!(roles(&two), [(1, PeerRole::Voter), (2, PeerRole::Voter)]);
        assert_eq!(two.epoch().conf_ver, 3);
        assert!(two.configuration().voters_outgoing.is_empty());
    }

    #[test]
    fn several_changes_go_through_a_joint_configuration() {
        let before = region(vec![
            peer(1, PeerRole::Voter),
            peer(2, PeerRole::Voter),
            peer(3, PeerRole::Learner),
        ]);
        let joint = changed(
            &before,
            &[
                PeerChange::AddVoter(peer(3, PeerRole::Voter)),
                PeerChange::AddLearner(peer(2, PeerRole::Learner)),
            ],
        )
        .unwrap();
        let configuration = joint.configuration();
        assert!(configuration.voters.contains(&PeerId(3)));
        assert!(!configuration.voters.contains(&PeerId(2)));
        assert!(configuration.voters_outgoing.contains(&PeerId(2)));
        assert!(!configuration.voters_outgoing.contains(&PeerId(3)));
        assert_eq!(changed(&joint, &[]), Err(ChangeError::Joint(RegionId(1))));
        let after = left_joint(&joint);
        assert_eq!(
            roles(&after),
            [(1, PeerRole::Voter), (2, PeerRole::Learner), (3, PeerRole::Voter)]
        );
        assert_eq!(after.epoch().conf_ver, 5);
    }

    #[test]
    fn the_last_voter_cannot_leave() {
        let one = region(vec![peer(1, PeerRole::Voter)]);
        assert_eq!(
            changed(&one, &[PeerChange::Remove(peer(1, PeerRole::Voter))]),
            Err(ChangeError::NoVoter(RegionId(1)))
        );
    }

    #[test]
    fn ranges_without_an_upper_bound_contain_and_overlap_as_they_should() {
        let mut whole = region(vec![peer(1, PeerRole::Voter)]);
        assert!(whole.contains_range(b"", b"") && whole.overlaps(b"x", b""));
        whole.end_key = bytes::Bytes::from_static(b"m");
        assert!(!whole.contains_range(b"a", b"") && whole.contains_range(b"a", b"m"));
        assert!(!whole.overlaps(b"m", b"") && whole.overlaps(b"l", b"m"));
        assert!(!whole.contains_key(b"m") && whole.contains_key(b""));
    }
}
