//! The words of the placement driver: identities, regions and replicas as the
//! schedulers see them. The wire's messages are checked and turned into these
//! once, in [`crate::server`]; nothing below ever looks at a raw message.

use std::fmt;

use bytes::Bytes;

macro_rules! identity {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub u64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

identity!(
    /// A store: one node's share of the data.
    StoreId
);
identity!(
    /// A region: a range of keys and the Raft group that replicates it.
    RegionId
);
identity!(
    /// One replica of one region. Never used again after it was removed.
    PeerId
);
identity!(
    /// A member of the placement driver itself.
    MemberId
);

/// A point on this process's monotonic clock, in milliseconds. Ages and
/// deadlines are measured with it, so that a step of the wall clock neither
/// declares stores dead nor keeps dead ones alive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment(pub u64);

impl Moment {
    /// Milliseconds from `earlier` to this moment; zero when it lies ahead.
    pub fn since(self, earlier: Moment) -> u64 {
        self.0.saturating_sub(earlier.0)
    }

    /// The moment `millis` milliseconds later.
    pub fn after(self, millis: u64) -> Moment {
        Moment(self.0.saturating_add(millis))
    }
}

/// How often a region changed: `version` counts changes of its range,
/// `conf_ver` changes of its peers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Epoch {
    pub conf_ver: u64,
    pub version: u64,
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.version, self.conf_ver)
    }
}

/// What a peer may do in its group. The last two exist only while the group is
/// in a joint configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Voter,
    Learner,
    IncomingVoter,
    DemotingVoter,
}

impl Role {
    /// Whether the group is between two configurations because of this peer.
    pub fn is_joint(self) -> bool {
        matches!(self, Role::IncomingVoter | Role::DemotingVoter)
    }
}

/// One replica and where it lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    pub id: PeerId,
    pub store: StoreId,
    pub role: Role,
    pub witness: bool,
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.id, self.store)
    }
}

/// The range `[start, end)`, an empty `end` meaning no upper bound, with its
/// epoch and its replicas.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Region {
    pub id: RegionId,
    pub start: Bytes,
    pub end: Bytes,
    pub epoch: Epoch,
    pub peers: Vec<Peer>,
}

impl Region {
    /// Whether `key` lies in the region.
    pub fn contains(&self, key: &[u8]) -> bool {
        key >= self.start.as_ref() && (self.end.is_empty() || key < self.end.as_ref())
    }

    /// The replica with this id.
    pub fn peer(&self, id: PeerId) -> Option<&Peer> {
        self.peers.iter().find(|peer| peer.id == id)
    }

    /// The replica on this store; a store holds at most one.
    pub fn peer_on(&self, store: StoreId) -> Option<&Peer> {
        self.peers.iter().find(|peer| peer.store == store)
    }

    /// Whether the group is between two configurations.
    pub fn in_joint(&self) -> bool {
        self.peers.iter().any(|peer| peer.role.is_joint())
    }
}

/// What went through a region since the report before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    pub bytes_written: u64,
    pub bytes_read: u64,
    pub keys_written: u64,
    pub keys_read: u64,
}

/// A replica that its leader has not heard from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DownPeer {
    pub peer: PeerId,
    pub seconds: u64,
}

/// What a region's leader says about its region: the heartbeat.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegionReport {
    pub region: Region,
    pub leader: Peer,
    /// The leader's Raft term; zero where it is not known, which never wins
    /// over a known one and never loses to it either.
    pub term: u64,
    pub down: Vec<DownPeer>,
    /// Replicas that are not caught up with the leader.
    pub pending: Vec<PeerId>,
    pub traffic: Traffic,
    /// Bytes, as the leader estimates them.
    pub approximate_size: u64,
    pub approximate_keys: u64,
}

impl RegionReport {
    /// Whether this replica hears from its leader and is caught up with it.
    pub fn is_caught_up(&self, peer: PeerId) -> bool {
        !self.pending.contains(&peer) && !self.down.iter().any(|down| down.peer == peer)
    }
}
