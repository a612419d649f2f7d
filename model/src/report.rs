//! What the leader of a region reports to placement: the region's heartbeat.

use esker_raft::{PeerId, Term};

use crate::region::{Peer, Region};

/// The reads and writes of a region since its last report.
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

/// A leader's report of its region.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegionReport {
    pub region: Region,
    /// One of the region's peers.
    pub leader: Peer,
    /// The leader's Raft term. `None` where the term is not known. Such a report neither wins over
    /// a report with a term nor loses to it.
    pub term: Option<Term>,
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
