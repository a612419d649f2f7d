//! What the leader of a region reports to placement: the region's heartbeat.

use esker_raft::{PeerId, Term};

use crate::region::{Peer, Region};

/// The reads and writes of a region since its last report.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Bytes of the keys and values that were written.
    pub bytes_written: u64,
    /// Bytes that were read to answer clients.
    pub bytes_read: u64,
    /// Keys that were written.
    pub keys_written: u64,
    /// Keys that were read to answer clients.
    pub keys_read: u64,
}

/// A replica that its leader has not heard from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DownPeer {
    /// The silent replica.
    pub peer: PeerId,
    /// For how many seconds it has been silent.
    pub seconds: u64,
}

/// A leader's report of its region.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegionReport {
    /// The descriptor that the leader has applied.
    pub region: Region,
    /// One of the region's peers.
    pub leader: Peer,
    /// The leader's Raft term. `None` where the term is not known. Such a report neither wins over
    /// a report with a term nor loses to it.
    pub term: Option<Term>,
    /// Replicas that the leader has not heard from for more than 10 seconds.
    pub down: Vec<DownPeer>,
    /// Replicas that are not caught up with the leader.
    pub pending: Vec<PeerId>,
    /// What the region was used for since the last report.
    pub traffic: Traffic,
    /// Bytes that the region holds, as the leader estimates them.
    pub approximate_size: u64,
    /// Keys that the region holds, as the leader estimates them. Esker's stores do not count keys,
    /// and report 0.
    pub approximate_keys: u64,
}

impl RegionReport {
    /// Whether this replica hears from its leader and is caught up with it.
    pub fn is_caught_up(&self, peer: PeerId) -> bool {
        !self.pending.contains(&peer) && !self.down.iter().any(|down| down.peer == peer)
    }
}
