//! One step of an operator: the order for a region's leader, and how a later report shows that it
//! was carried out.

use std::collections::BTreeMap;
use std::fmt;

use esker_model::{Action, PeerChange, PeerId, RegionReport, Role, Seat, StoreId};

/// One change that a region's leader is to make.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Adds a replica, without a vote until it has caught up.
    AddLearner(Seat),
    /// Makes a caught-up learner a voter.
    Promote(Seat),
    /// Makes a caught-up learner a voter and a voter a learner, in one joint change. At no moment
    /// are there fewer voters than before.
    Swap { promote: Seat, demote: Seat },
    /// Leaves the joint configuration, if the group did not leave by itself.
    LeaveJoint,
    /// Removes a replica.
    Remove(Seat),
    /// Makes another voter the leader.
    TransferLeader { from: StoreId, to: Seat },
}

/// The progress of a step as of the last report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress {
    Done,
    /// The leader should get the order.
    Send,
    /// It is too early for the order.
    Wait,
    /// The region is no longer as it was when the step was planned.
    Impossible(String),
}

impl Step {
    /// The action that the region's leader is ordered to take.
    pub fn action(&self) -> Action {
        match self {
            Self::AddLearner(seat) => Action::ChangePeers(vec![PeerChange::AddLearner(*seat)]),
            Self::Promote(seat) => Action::ChangePeers(vec![PeerChange::AddVoter(*seat)]),
            Self::Swap { promote, demote } => Action::ChangePeers(vec![
                PeerChange::AddVoter(*promote),
                PeerChange::AddLearner(*demote),
            ]),
            Self::LeaveJoint => Action::ChangePeers(Vec::new()),
            Self::Remove(seat) => Action::ChangePeers(vec![PeerChange::Remove(*seat)]),
            Self::TransferLeader { to, .. } => Action::TransferLeader(*to),
        }
    }

    /// The stores that the step burdens.
    pub(crate) fn stores(&self) -> Vec<StoreId> {
        match self {
            Self::AddLearner(seat) | Self::Promote(seat) | Self::Remove(seat) => vec![seat.store],
            Self::Swap { promote, demote } => vec![promote.store, demote.store],
            Self::LeaveJoint => Vec::new(),
            Self::TransferLeader { from, to } => vec![*from, to.store],
        }
    }

    /// The store whose replica has to catch up, or to take over, for the step.
    pub(crate) fn counts_on(&self) -> Option<StoreId> {
        match self {
            Self::AddLearner(seat) | Self::Promote(seat) => Some(seat.store),
            Self::Swap { promote, .. } => Some(promote.store),
            Self::TransferLeader { to, .. } => Some(to.store),
            Self::LeaveJoint | Self::Remove(_) => None,
        }
    }

    /// Changes the members of a region as the step does.
    pub(super) fn take_effect(&self, members: &mut BTreeMap<PeerId, Role>) {
        match self {
            Self::AddLearner(seat) => drop(members.insert(seat.peer, Role::Learner)),
            Self::Promote(seat) => drop(members.insert(seat.peer, Role::Voter)),
            Self::Swap { promote, demote } => {
                members.insert(promote.peer, Role::Voter);
                members.insert(demote.peer, Role::Learner);
            }
            Self::Remove(seat) => drop(members.remove(&seat.peer)),
            Self::LeaveJoint | Self::TransferLeader { .. } => {}
        }
    }

    /// Compares the step with the report of the region's leader.
    pub fn progress(&self, report: &RegionReport) -> Progress {
        let region = &report.region;
        match self {
            Self::AddLearner(seat) => match region.peer_on(seat.store) {
                Some(peer) if peer.id == seat.peer => Progress::Done,
                Some(peer) => Progress::Impossible(format!(
                    "store {} already holds replica {}",
                    seat.store, peer.id
                )),
                None if region.in_joint() => Progress::Wait,
                None => Progress::Send,
            },
            Self::Promote(seat) => match region.peer(seat.peer).map(|peer| peer.role) {
                None => gone(seat),
                Some(Role::Voter) => Progress::Done,
                Some(Role::Learner) if report.is_caught_up(seat.peer) && !region.in_joint() => {
                    Progress::Send
                }
                Some(_) => Progress::Wait,
            },
            Self::Swap { promote, demote } => swap_progress(report, promote, demote),
            Self::LeaveJoint if region.in_joint() => Progress::Send,
            Self::LeaveJoint => Progress::Done,
            Self::Remove(seat) => match region.peer(seat.peer) {
                None => Progress::Done,
                Some(_) if report.leader.id == seat.peer => {
                    Progress::Impossible(format!("replica {seat} leads the region"))
                }
                Some(_) if region.in_joint() => Progress::Wait,
                Some(_) => Progress::Send,
            },
            Self::TransferLeader { from, to } => {
                if report.leader.id == to.peer {
                    Progress::Done
                } else if report.leader.store != *from {
                    Progress::Impossible(format!(
                        "store {} leads instead of store {from}",
                        report.leader.store
                    ))
                } else {
                    match region.peer(to.peer).map(|peer| peer.role) {
                        None => gone(to),
                        Some(Role::Voter) if report.is_caught_up(to.peer) => Progress::Send,
                        Some(_) => Progress::Wait,
                    }
                }
            }
        }
    }
}

fn swap_progress(report: &RegionReport, promote: &Seat, demote: &Seat) -> Progress {
    let Some(incoming) = report.region.peer(promote.peer) else {
        return gone(promote);
    };
    let outgoing = report.region.peer(demote.peer).map(|peer| peer.role);
    let has_vote = matches!(incoming.role, Role::Voter | Role::IncomingVoter);
    let has_lost_vote = !matches!(outgoing, Some(Role::Voter | Role::IncomingVoter));
    if has_vote && has_lost_vote {
        Progress::Done
    } else if has_vote {
        Progress::Impossible(format!(
            "replica {promote} votes already, and replica {demote} still does"
        ))
    } else if has_lost_vote {
        Progress::Impossible(format!("replica {demote} lost its vote in another change"))
    } else if report.leader.id == demote.peer {
        Progress::Impossible(format!("replica {demote} leads the region"))
    } else if report.is_caught_up(promote.peer) && !report.region.in_joint() {
        Progress::Send
    } else {
        Progress::Wait
    }
}

fn gone(seat: &Seat) -> Progress {
    Progress::Impossible(format!("replica {seat} is gone"))
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AddLearner(seat) => write!(f, "add learner {seat}"),
            Self::Promote(seat) => write!(f, "promote {seat}"),
            Self::Swap { promote, demote } => write!(f, "promote {promote} and demote {demote}"),
            Self::LeaveJoint => f.write_str("leave the joint configuration"),
            Self::Remove(seat) => write!(f, "remove {seat}"),
            Self::TransferLeader { from, to } => {
                write!(f, "move the leader from store {from} to {to}")
            }
        }
    }
}
