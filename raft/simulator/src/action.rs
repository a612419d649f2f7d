//! Everything that can happen to a cluster, as data. A run is a list of actions, which can be
//! recorded, replayed, cut down, and printed as a story.

use bytes::Bytes;
use esker_raft::{ConfChange, LogIndex, PeerId};

/// One thing that happens. An action that no longer applies, because the peer is down or the
/// message is gone, does nothing. So any part of a list is a list that can be run.
#[derive(Clone, PartialEq, Debug)]
pub enum Action {
    /// This many nanoseconds pass in the world. Each peer's clock has its own rate.
    Pass(u64),
    /// The peer gets the time.
    Tick(PeerId),
    /// The message at this position in the queue between two peers arrives.
    Deliver { from: PeerId, to: PeerId, at: usize },
    /// That message is lost.
    Drop { from: PeerId, to: PeerId, at: usize },
    /// That message is doubled. The copy goes to the end of the queue.
    Again { from: PeerId, to: PeerId, at: usize },
    /// The peer's disk finishes its oldest writes.
    Sync { peer: PeerId, count: usize },
    /// The peer's state machine applies the next entries.
    Apply { peer: PeerId, count: usize },
    /// The peer has installed a snapshot.
    Install(PeerId),
    /// The peer's state machine reaches its disk.
    Save(PeerId),
    /// The peer drops its log up to this index.
    Compact { peer: PeerId, index: LogIndex },
    /// The peer's driver is busy, so the core's output waits.
    Hold(PeerId),
    /// The peer's driver goes on.
    Release(PeerId),
    /// A client writes at this peer.
    Propose { peer: PeerId, command: Bytes },
    /// A client reads at this peer, by way of ReadIndex.
    Read { peer: PeerId, id: u64 },
    /// A client reads at this peer, if it holds a lease.
    LeaseRead(PeerId),
    /// The peer is asked to change the members.
    Change { peer: PeerId, change: ConfChange },
    /// The peer is asked to hand over leadership.
    Transfer { peer: PeerId, to: Option<PeerId> },
    /// The peer is asked to campaign.
    Campaign(PeerId),
    /// The peer loses everything but its disk, which keeps the first `kept` of the writes that were
    /// under way.
    Crash { peer: PeerId, kept: usize },
    /// The peer starts again.
    Restart(PeerId),
    /// The peer's driver reports that it cannot reach another peer.
    Unreachable { peer: PeerId, other: PeerId },
}

impl Action {
    /// The peer that the action happens to, if it happens to one.
    pub fn peer(&self) -> Option<PeerId> {
        match *self {
            Action::Pass(_) => None,
            Action::Deliver { to: peer, .. }
            | Action::Tick(peer)
            | Action::Sync { peer, .. }
            | Action::Apply { peer, .. }
            | Action::Install(peer)
            | Action::Save(peer)
            | Action::Compact { peer, .. }
            | Action::Hold(peer)
            | Action::Release(peer)
            | Action::Propose { peer, .. }
            | Action::Read { peer, .. }
            | Action::LeaseRead(peer)
            | Action::Change { peer, .. }
            | Action::Transfer { peer, .. }
            | Action::Campaign(peer)
            | Action::Crash { peer, .. }
            | Action::Restart(peer)
            | Action::Unreachable { peer, .. } => Some(peer),
            Action::Drop { from, .. } | Action::Again { from, .. } => Some(from),
        }
    }

    /// Whether the action involves this peer in any way.
    pub fn concerns(&self, peer: PeerId) -> bool {
        match *self {
            Action::Deliver { from, to, .. }
            | Action::Drop { from, to, .. }
            | Action::Again { from, to, .. } => from == peer || to == peer,
            _ => self.peer() == Some(peer),
        }
    }
}
