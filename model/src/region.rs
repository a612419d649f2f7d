//! A region: its range, its epoch and its peers.

use std::fmt;

use esker_raft::PeerId;

use crate::id::{RegionId, StoreId};
use crate::key::KeyRange;
use crate::limits::MAX_EPOCH_LEAP;

/// How often a region changed. A command carries the epoch that it was made for, so a store notices
/// that the region has changed since. Neither number ever falls.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Epoch {
    /// Counts changes of the region's peers.
    pub conf_ver: u64,
    /// Counts changes of the region's range.
    pub version: u64,
}

impl Epoch {
    /// The epoch of a cluster's first region.
    pub const FIRST: Epoch = Epoch { conf_ver: 1, version: 1 };

    /// Whether both epochs describe the same range of a region.
    pub fn is_same_range(self, other: Epoch) -> bool {
        self.version == other.version
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.version, self.conf_ver)
    }
}

/// What a peer may do in its group. In a joint configuration an `IncomingVoter` votes in the new
/// majority alone, and a `DemotingVoter` in the old one alone. So the roles of a region's peers
/// carry the whole Raft configuration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Role {
    /// Votes, may lead, and counts for the majority that commits an entry.
    #[default]
    Voter,
    /// Gets all entries, and has no vote. A replica begins as a learner until it has caught up.
    Learner,
    /// Becomes a voter when the joint configuration ends.
    IncomingVoter,
    /// Becomes a learner when the joint configuration ends.
    DemotingVoter,
}

impl Role {
    /// Whether the group is between two configurations because of this peer.
    pub fn is_joint(self) -> bool {
        matches!(self, Role::IncomingVoter | Role::DemotingVoter)
    }

    /// The role's name in the literature, for messages.
    pub fn name(self) -> &'static str {
        match self {
            Role::Voter => "voter",
            Role::Learner => "learner",
            Role::IncomingVoter => "incoming voter",
            Role::DemotingVoter => "demoting voter",
        }
    }
}

/// One replica and the store that holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Peer {
    /// Not zero. Never used again after the peer was removed.
    pub id: PeerId,
    /// The store that holds the replica. Not zero.
    pub store: StoreId,
    /// What the peer may do. Only voters lead.
    pub role: Role,
    /// A witness votes and keeps the log, and stores no data.
    pub witness: bool,
}

impl Peer {
    /// A peer that votes and stores data.
    pub fn voter(id: PeerId, store: StoreId) -> Peer {
        Peer { id, store, role: Role::Voter, witness: false }
    }

    /// A peer that stores data and has no vote.
    pub fn learner(id: PeerId, store: StoreId) -> Peer {
        Peer { role: Role::Learner, ..Peer::voter(id, store) }
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.id, self.store)
    }
}

/// A region's descriptor: what the region is at one epoch.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Region {
    /// Stays with the region for good. After a split the right-most part keeps it.
    pub id: RegionId,
    /// The keys that the region holds.
    pub range: KeyRange,
    /// Rises with every change of `range` or `peers`, so of two descriptors of one region the later
    /// is known.
    pub epoch: Epoch,
    /// No two peers have the same id or the same store. Empty where the holder of the descriptor
    /// does not know the peers: see [`Region::uninitialized`].
    pub peers: Vec<Peer>,
}

impl Region {
    /// The descriptor of a peer that was created by a message and has received nothing yet, or of a
    /// peer whose data is being deleted.
    pub fn uninitialized(id: RegionId) -> Region {
        Region { id, range: KeyRange::all(), epoch: Epoch::default(), peers: Vec::new() }
    }

    /// Whether range, epoch and peers are known.
    pub fn is_initialized(&self) -> bool {
        !self.peers.is_empty()
    }

    /// Whether `key` lies in the region's range.
    pub fn contains(&self, key: &[u8]) -> bool {
        self.range.contains(key)
    }

    /// The peer with this id.
    pub fn peer(&self, id: PeerId) -> Option<&Peer> {
        self.peers.iter().find(|peer| peer.id == id)
    }

    /// The peer on this store; a store holds at most one.
    pub fn peer_on(&self, store: StoreId) -> Option<&Peer> {
        self.peers.iter().find(|peer| peer.store == store)
    }

    /// Whether the group is between two configurations.
    pub fn in_joint(&self) -> bool {
        self.peers.iter().any(|peer| peer.role.is_joint())
    }
}

/// Ids for a region that a split creates.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct NewRegion {
    /// Never used before.
    pub id: RegionId,
    /// One id for each peer of the split region, in the order of these peers.
    pub peers: Vec<PeerId>,
}

/// Whether `newer` can have come from `known`: the region itself later, or a part of it.
///
/// Regions are split and never joined, so a later region lies inside the earlier one. A region
/// keeps its range until its version rises, and its range is smaller then. Another region that has
/// a part of the range came out of this one by a split, with a higher version. A change that lets
/// regions grow has to extend this rule.
pub fn may_follow(known: &Region, newer: &Region) -> bool {
    let leap = |old: u64, new: u64| old <= new && new - old <= MAX_EPOCH_LEAP;
    let (old, new) = (known.epoch, newer.epoch);
    if !known.range.contains_range(&newer.range) || !leap(old.version, new.version) {
        return false;
    }
    if newer.id != known.id {
        return new.version > old.version;
    }
    (known.range == newer.range) == (old.version == new.version) && leap(old.conf_ver, new.conf_ver)
}
