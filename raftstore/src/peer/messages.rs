//! Messages of the region's other peers, and messages to them.

use std::time::Instant;

use esker_model::{Peer as PeerMeta, StoreId};
use esker_mutants::broken;
use esker_raft::{
    LogIndex, MAX_INDEX_LEAP, Message, MessageBody, PeerId, SnapshotOutcome, StepError, Time,
};
use esker_rpc::repeat::Repeated;
use parking_lot::Mutex;

use super::{Outputs, Peer, snapshots};
use crate::envelope::{Address, Consensus, Content, Envelope};
use crate::error::StoreError;
use crate::snapshot::{ReceivedSnapshot, RegionSnapshotSource};

impl Peer {
    /// Takes a message of the group's own protocol.
    pub fn step(
        &mut self,
        now: Time,
        address: &Address,
        consensus: Consensus,
    ) -> Result<(), StoreError> {
        let sender = address.from;
        self.members.heard(now, sender, self.descriptor.peer(sender.id).is_some());
        let Consensus { message, applied, .. } = consensus;
        match self.group.step(now, message) {
            Ok(()) => {
                // Others than the leader have nothing to say of it, and nobody has applied
                // what no log can hold yet.
                let possible = self.group.last_index().0.saturating_add(MAX_INDEX_LEAP);
                if self.group.leader() == Some(sender.id) && applied.0 <= possible {
                    self.reads.leader_is_at(applied);
                }
                Ok(())
            }
            // Going on would lose data or make replicas differ.
            Err(
                broken @ (StepError::Log(_)
                | StepError::CommittedConflict { .. }
                | StepError::LostEntries { .. }
                | StepError::TwoLeaders { .. }),
            ) => {
                let what = format!("the log of region {}", self.id);
                Err(StoreError::Corrupt { what, why: broken.to_string() })
            }
            Err(broken @ StepError::PeerLostEntries { .. }) => {
                // The peer says so again with every message.
                static LOSSES: Mutex<Repeated<Instant>> = Mutex::new(Repeated::new());
                metrics::counter!("esker_raft_peers_lost_entries_total").increment(1);
                if let Some(times) = LOSSES.lock().failed(Instant::now()) {
                    tracing::error!(
                        region = %self.id, store = %self.store, times, %broken, "message refused"
                    );
                }
                Ok(())
            }
            Err(refused) => {
                metrics::counter!("esker_raft_messages_refused_total").increment(1);
                tracing::debug!(region = %self.id, store = %self.store, %refused, "message refused");
                Ok(())
            }
        }
    }

    /// Takes a snapshot whose files are on this store's disk already.
    pub fn step_snapshot(
        &mut self,
        now: Time,
        address: &Address,
        consensus: Consensus,
        files: ReceivedSnapshot,
    ) -> Result<(), StoreError> {
        self.snapshots.received(files);
        self.step(now, address, consensus)
    }

    /// The group did not want the snapshot that was received: its files go.
    pub fn drop_unused_snapshot(&mut self) {
        self.snapshots.drop_unused();
    }

    pub fn unreachable(&mut self, store: StoreId) {
        if let Some(peer) = self.descriptor.peer_on(store) {
            self.group.unreachable(peer.id);
        }
    }

    pub fn snapshot_sent(&mut self, to: PeerId, delivered: bool) {
        let delivered = delivered && !broken!(DeliveredSnapshotIsAwaited);
        let outcome = if delivered { SnapshotOutcome::Delivered } else { SnapshotOutcome::Failed };
        self.group.snapshot_sent(to, outcome);
    }

    /// The message that goes with a snapshot to a follower; nothing if it cannot be sent any more.
    pub fn snapshot_message(
        &mut self,
        to: PeerId,
        taken: &RegionSnapshotSource,
    ) -> Option<Envelope> {
        let target = self.meta_of(to).filter(|_| self.is_leader());
        let Some(target) = target else {
            self.snapshot_sent(to, false);
            return None;
        };
        let consensus = snapshots::message(&self.group, to, taken);
        // The epoch of the region in the snapshot.
        let address = Address { epoch: taken.descriptor.epoch, ..self.address_of(target) };
        Some(Envelope { address, content: Content::Consensus(Box::new(consensus)) })
    }

    /// From this peer to another of its region.
    fn address_of(&self, to: PeerMeta) -> Address {
        Address { region: self.id, from: self.me, to, epoch: self.descriptor.epoch }
    }

    /// A message of the group, addressed; nothing if it is not known where its receiver lives.
    pub(super) fn address(&self, message: Message) -> Option<Envelope> {
        let to = self.meta_of(message.to)?;
        // Only a message that may create a peer needs the range, for the check
        // against the regions that are there. The bounds of a region may be long.
        let creates = self.may_create(&message).then(|| self.descriptor.range.clone());
        let applied = if self.is_leader() { self.applied.index } else { LogIndex(0) };
        let consensus = Consensus { message, applied, creates };
        let content = Content::Consensus(Box::new(consensus));
        Some(Envelope { address: self.address_of(to), content })
    }

    /// Whether the message's addressee may not exist yet, and is to be created by it.
    fn may_create(&self, message: &Message) -> bool {
        let may = match &message.body {
            MessageBody::Append { entries, .. } => entries.is_empty(),
            MessageBody::Heartbeat { .. } => true,
            MessageBody::Vote { .. } | MessageBody::PreVote { .. } => true,
            _ => false,
        };
        // A follower that has acknowledged anything exists; should it be gone, then for good.
        let is_known = || {
            let mut followers = self.group.progress();
            followers.any(|(peer, at)| peer == message.to && at.match_index.0 > 0)
        };
        may && self.is_initialized() && !is_known()
    }

    /// Asks all others whether this peer is still a member.
    pub(super) fn ask_for_membership(&self, out: &mut Outputs) {
        for to in self.descriptor.peers.iter().filter(|peer| peer.id != self.me.id) {
            out.messages
                .push(Envelope { address: self.address_of(*to), content: Content::Question });
        }
    }
}
