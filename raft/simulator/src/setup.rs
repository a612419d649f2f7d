//! A cluster before anything happens to it.

use std::time::Duration;

use esker_raft::{Config, Configuration, HardState, LogIndex, PeerId, Term};

use super::driver::{Disk, EntryLog, Machine, Settings};

/// Local nanoseconds per thousand of the world's, for a clock that runs right.
pub const TRUE_RATE: u64 = 1000;

/// What every peer's clock shows at the beginning, unless its setup adds to it.
pub const EPOCH: u64 = 1_000_000_000;

/// One peer.
#[derive(Clone, PartialEq, Debug)]
pub struct PeerSetup {
    pub id: PeerId,
    pub priority: i32,
    pub seed: u64,
    /// Local nanoseconds per thousand of the world's.
    pub rate: u64,
    /// How far its clock is ahead of the epoch at the beginning, in nanoseconds.
    pub ahead: u64,
}

impl PeerSetup {
    /// A peer with nothing special about it.
    pub fn plain(id: PeerId) -> Self {
        PeerSetup { id, priority: 0, seed: id.0, rate: TRUE_RATE, ahead: 0 }
    }
}

/// A cluster that never ran, of founders and empty peers. The founders' logs begin after index 1 of
/// term 1, so that a newcomer gets the members only from a snapshot. With `fresh`, the founders
/// know their members and have nothing else.
#[derive(Clone, Debug)]
pub struct Setup {
    pub members: Configuration,
    /// All peers, in the order of their ids.
    pub peers: Vec<PeerSetup>,
    /// The settings of all peers. The seed is each peer's own.
    pub config: Config,
    pub lazy_sync: bool,
    /// Founders begin in term 0 before index 1. No other peer can then learn the members, so no
    /// other peer can join.
    pub fresh: bool,
}

impl Default for Setup {
    fn default() -> Self {
        let config = Config {
            election_timeout: Duration::from_millis(100),
            heartbeat_interval: Duration::from_millis(20),
            ..Config::default()
        };
        let members = Configuration::default();
        Setup { members, peers: Vec::new(), config, lazy_sync: false, fresh: false }
    }
}

impl Setup {
    /// The disk that a peer begins with.
    pub fn disk(&self, id: PeerId) -> Disk {
        if !self.members.contains(id) {
            return Disk::default();
        }
        let start = if self.fresh { (LogIndex(0), Term(0)) } else { (LogIndex(1), Term(1)) };
        let machine = Machine {
            index: start.0,
            term: start.1,
            digest: 0,
            has_data: !self.members.is_witness(id),
            configuration: self.members.clone(),
        };
        let hard_state = HardState { term: start.1, vote: None, commit: start.0 };
        Disk { hard_state, log: EntryLog::after(start), machine }
    }

    /// A peer's settings.
    pub fn settings(&self, peer: &PeerSetup) -> Settings {
        Settings {
            config: self.config.clone(),
            priority: peer.priority,
            seed: peer.seed,
            lazy_sync: self.lazy_sync,
        }
    }
}
