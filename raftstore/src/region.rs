//! How a region's descriptor and the consensus core's view of its members belong together.
//!
//! The roles of a region's peers carry the whole Raft configuration: in a joint configuration an
//! incoming voter votes only in the new majority, a demoting voter only in the old one. So one
//! record, written with the applied index, is all that a restart needs.

use bytes::Bytes;
use esker_model::{Peer, PeerChange, PeerId, Region, RegionId, Role, Seat, StoreId};
use esker_raft::{ChangeStep, ConfChange, Configuration, LeaveJoint};

/// The Raft configuration that the roles of the region's peers describe.
pub fn configuration(region: &Region) -> Configuration {
    let with = |roles: &[Role]| {
        region.peers.iter().filter(|peer| roles.contains(&peer.role)).map(|peer| peer.id).collect()
    };
    let joint = region.in_joint();
    Configuration {
        voters: with(&[Role::Voter, Role::IncomingVoter]),
        voters_outgoing: if joint {
            with(&[Role::Voter, Role::DemotingVoter])
        } else {
            Default::default()
        },
        learners: with(&[Role::Learner]),
        learners_next: with(&[Role::DemotingVoter]),
        witnesses: Default::default(),
        auto_leave: joint,
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
    let id = region.id;
    if region.in_joint() {
        return Err(ChangeError::Joint(id));
    }
    if changes.is_empty() {
        return Err(ChangeError::Empty);
    }
    // The core enters a joint configuration when more than one voter changes.
    let is_voter = |id: PeerId| region.peer(id).is_some_and(|peer| peer.role == Role::Voter);
    let moves_voter = |change: &&PeerChange| match change {
        PeerChange::AddVoter(_) => true,
        PeerChange::AddLearner(seat) | PeerChange::Remove(seat) => is_voter(seat.peer),
    };
    let joint = changes.iter().filter(moves_voter).count() > 1;
    let mut next = region.clone();
    for (at, change) in changes.iter().enumerate() {
        let seat @ Seat { peer, store } = change.seat();
        let nothing = ChangeError::NothingToDo { region: id, peer };
        if changes[..at].iter().any(|earlier| earlier.seat().peer == peer) {
            return Err(nothing);
        }
        let position = next.peers.iter().position(|known| known.id == peer);
        if position.is_none()
            && let Some(taken) = next.peer_on(store)
            && !matches!(change, PeerChange::Remove(_))
        {
            return Err(ChangeError::StoreTaken { region: id, store, peer: taken.id });
        }
        match (change, position) {
            (PeerChange::AddVoter(_), None) => {
                next.peers.push(seat.with(if joint { Role::IncomingVoter } else { Role::Voter }));
            }
            (PeerChange::AddVoter(_), Some(i)) if next.peers[i].role == Role::Learner => {
                next.peers[i].role = if joint { Role::IncomingVoter } else { Role::Voter };
            }
            (PeerChange::AddLearner(_), None) => next.peers.push(seat.with(Role::Learner)),
            (PeerChange::AddLearner(_), Some(i)) if next.peers[i].role == Role::Voter => {
                next.peers[i].role = if joint { Role::DemotingVoter } else { Role::Learner };
            }
            (PeerChange::AddVoter(_) | PeerChange::AddLearner(_), Some(_)) => return Err(nothing),
            (PeerChange::Remove(_), None) => {
                return Err(ChangeError::NoSuchPeer { region: id, peer });
            }
            (PeerChange::Remove(_), Some(i)) => {
                if joint && next.peers[i].role == Role::Voter {
                    return Err(ChangeError::RemovesVoterInJoint { region: id, peer });
                }
                next.peers.remove(i);
            }
        }
    }
    let votes = |peer: &Peer| matches!(peer.role, Role::Voter | Role::IncomingVoter);
    if !next.peers.iter().any(votes) {
        return Err(ChangeError::NoVoter(id));
    }
    next.epoch.conf_ver += changes.len() as u64;
    Ok(next)
}

/// The region after it has left its joint configuration.
pub fn left_joint(region: &Region) -> Region {
    let mut next = region.clone();
    let mut changes = 0;
    for peer in &mut next.peers {
        match peer.role {
            Role::IncomingVoter => peer.role = Role::Voter,
            Role::DemotingVoter => peer.role = Role::Learner,
            Role::Voter | Role::Learner => continue,
        }
        changes += 1;
    }
    next.epoch.conf_ver += changes;
    next
}

/// The consensus core's form of a change; `context` travels with it to where it is applied.
pub fn conf_change(changes: &[PeerChange], context: Bytes) -> ConfChange {
    let steps = changes
        .iter()
        .map(|change| match change {
            PeerChange::AddVoter(seat) => ChangeStep::AddVoter(seat.peer),
            PeerChange::AddLearner(seat) => ChangeStep::AddLearner(seat.peer),
            PeerChange::Remove(seat) => ChangeStep::Remove(seat.peer),
        })
        .collect();
    ConfChange { steps, leave: LeaveJoint::Auto, context }
}

#[cfg(test)]
mod tests {
    use esker_model::{Epoch, KeyRange};

    use super::*;

    fn seat(id: u64) -> Seat {
        Seat { peer: PeerId(id), store: StoreId(id) }
    }

    fn region(peers: &[(u64, Role)]) -> Region {
        Region {
            id: RegionId(1),
            range: KeyRange::all(),
            epoch: Epoch::FIRST,
            peers: peers.iter().map(|(id, role)| seat(*id).with(*role)).collect(),
        }
    }

    fn roles(region: &Region) -> Vec<(u64, Role)> {
        region.peers.iter().map(|peer| (peer.id.0, peer.role)).collect()
    }

    #[test]
    fn one_change_takes_effect_at_once() {
        let one = region(&[(1, Role::Voter)]);
        let two = changed(&one, &[PeerChange::AddLearner(seat(2))]).unwrap();
        assert_eq!(roles(&two), [(1, Role::Voter), (2, Role::Learner)]);
        let two = changed(&two, &[PeerChange::AddVoter(seat(2))]).unwrap();
        assert_eq!(roles(&two), [(1, Role::Voter), (2, Role::Voter)]);
        assert_eq!(two.epoch.conf_ver, 3);
        assert!(configuration(&two).voters_outgoing.is_empty());
    }

    #[test]
    fn several_changes_go_through_a_joint_configuration() {
        let before = region(&[(1, Role::Voter), (2, Role::Voter), (3, Role::Learner)]);
        let changes = [PeerChange::AddVoter(seat(3)), PeerChange::AddLearner(seat(2))];
        let joint = changed(&before, &changes).unwrap();
        let members = configuration(&joint);
        assert!(members.voters.contains(&PeerId(3)));
        assert!(!members.voters.contains(&PeerId(2)));
        assert!(members.voters_outgoing.contains(&PeerId(2)));
        assert!(!members.voters_outgoing.contains(&PeerId(3)));
        assert_eq!(changed(&joint, &[]), Err(ChangeError::Joint(RegionId(1))));
        let after = left_joint(&joint);
        assert_eq!(roles(&after), [(1, Role::Voter), (2, Role::Learner), (3, Role::Voter)]);
        assert_eq!(after.epoch.conf_ver, 5);
    }

    #[test]
    fn the_last_voter_cannot_leave() {
        let one = region(&[(1, Role::Voter)]);
        assert_eq!(
            changed(&one, &[PeerChange::Remove(seat(1))]),
            Err(ChangeError::NoVoter(RegionId(1)))
        );
    }
}
