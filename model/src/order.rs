//! What placement orders the leader of a region to do.

use std::fmt;

use bytes::Bytes;
use esker_raft::PeerId;

use crate::id::{RegionId, StoreId};
use crate::region::{Epoch, Peer, Role};

/// A replica's id and its store. What a [`Peer`] is apart from its role.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Seat {
    /// The replica. A new replica has an id that was never used before.
    pub peer: PeerId,
    /// The store that holds the replica, or is to hold it.
    pub store: StoreId,
}

impl Seat {
    /// The peer in this seat, with a role.
    pub fn with(self, role: Role) -> Peer {
        Peer { id: self.peer, store: self.store, role, witness: false }
    }
}

impl From<&Peer> for Seat {
    fn from(peer: &Peer) -> Seat {
        Seat { peer: peer.id, store: peer.store }
    }
}

impl From<Peer> for Seat {
    fn from(peer: Peer) -> Seat {
        Seat::from(&peer)
    }
}

impl fmt::Display for Seat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} on store {}", self.peer, self.store)
    }
}

/// One change of a region's membership. A peer that is new gets an id that was drawn from placement
/// when the region's epoch was known, and the change names that epoch. So its id is larger than
/// those of all peers that the region has had: a store takes no peer with a smaller id than one
/// that has left it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PeerChange {
    /// Adds a voter, or promotes a learner that is already there.
    AddVoter(Seat),
    /// Adds a learner, or demotes a voter that is already there.
    AddLearner(Seat),
    /// Takes a peer out of the region, and deletes its data.
    Remove(Seat),
}

impl PeerChange {
    /// The replica that is changed.
    pub fn seat(self) -> Seat {
        match self {
            PeerChange::AddVoter(seat)
            | PeerChange::AddLearner(seat)
            | PeerChange::Remove(seat) => seat,
        }
    }
}

/// What is to be done to a region.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Makes all changes at once, by joint consensus where more than one voter changes. Without
    /// changes, it leaves the joint configuration.
    ChangePeers(Vec<PeerChange>),
    /// Makes another voter the leader.
    TransferLeader(Seat),
    /// Cuts the region at keys inside of it.
    Split(Vec<Bytes>),
}

/// An action for the leader of a region, made for the epoch that the leader reported last. An order
/// is advice. An order that no longer fits the region is dropped, and placement sees the region's
/// state in the next report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Order {
    /// The region to change.
    pub region: RegionId,
    /// The epoch that the order is for. A region with another epoch drops the order.
    pub epoch: Epoch,
    /// The peer that led the region in the last report, to which the order goes.
    pub leader: Peer,
    /// What the leader is to do.
    pub action: Action,
}
