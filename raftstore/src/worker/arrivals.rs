//! What comes to a worker from outside: requests for its regions, and messages of
//! other stores, some of them for regions that are not here, not here yet, or not
//! here any more.

use esker_model::limits::MAX_EPOCH_LEAP;
use esker_model::{Region, RegionId, may_follow};
use esker_mutants::broken;
use esker_raft::{CommitPoint, LogIndex, Message, MessageBody, Time};

use super::Worker;
use crate::config::MAX_EMPTY_PEERS;
use crate::door::{Arrived, Checked, Fault, Reach, complain};
use crate::envelope::{Address, Consensus, Content, Envelope};
use crate::error::{RequestError, StoreError};
use crate::message::Input;
use crate::peer::Peer;
use crate::snapshot::ReceivedSnapshot;
use crate::state::{Applied, RegionState, raft_state, region_state};

/// The size of the entries that it brings.
fn appended_bytes(consensus: &Consensus) -> usize {
    match &consensus.message.body {
        MessageBody::Append { entries, .. } => entries.bytes(),
        _ => 0,
    }
}

impl Worker {
    pub(super) fn on_input(&mut self, now: Time, input: Input) -> Result<(), StoreError> {
        match input {
            Input::Write(request) => match self.peers.get_mut(&request.region) {
                Some(peer) => {
                    self.touched.insert(request.region);
                    peer.on_write(request);
                }
                None => {
                    let _ = request.reply.send(Err(RequestError::RegionNotFound(request.region)));
                }
            },
            Input::Read(request) => match self.peers.get_mut(&request.region) {
                Some(peer) => {
                    self.touched.insert(request.region);
                    peer.on_read(request);
                }
                None => {
                    let _ = request.reply.send(Err(RequestError::RegionNotFound(request.region)));
                }
            },
            Input::Admin(request) => match self.peers.get_mut(&request.region) {
                Some(peer) => {
                    self.touched.insert(request.region);
                    peer.on_admin(now, request);
                }
                None => {
                    let _ = request.reply.send(Err(RequestError::RegionNotFound(request.region)));
                }
            },
            Input::Raft(message, _) => self.on_raft(now, *message)?,
            Input::Snapshot(message, files) => self.on_snapshot(now, *message, files)?,
            Input::Unreachable(store) => {
                for (region, peer) in &mut self.peers {
                    if peer.is_leader() {
                        peer.unreachable(store);
                        self.touched.insert(*region);
                    }
                }
            }
            Input::Status { region, reply } => {
                let status = self.peers.get(&region).map(Peer::status);
                let not_found = Err(RequestError::RegionNotFound(region));
                let _ = reply.send(status.unwrap_or(not_found));
            }
            Input::ReportAll => {
                for (region, peer) in &mut self.peers {
                    if peer.is_leader() {
                        peer.report_soon();
                        self.touched.insert(*region);
                    }
                }
            }
        }
        Ok(())
    }

    pub(super) fn on_raft(&mut self, now: Time, arrived: Arrived) -> Result<(), StoreError> {
        let region = arrived.region();
        let Arrived { address, content } = arrived;
        if let Err(fault) = self.may_speak(&address) {
            complain(self.shared.store, &address, &fault);
            return Ok(());
        }
        match content {
            Checked::Gone => self.on_gone(&address),
            Checked::Question => self.on_membership_question(&address)?,
            Checked::Raft(consensus, reach) => {
                if !self.has_peer_for(now, &address, &consensus)? {
                    return Ok(());
                }
                if let Some(peer) = self.peers.get_mut(&region) {
                    if !reach.lies_in(peer.descriptor()) {
                        complain(self.shared.store, &address, &Fault::OutsideOfRegion);
                        return Ok(());
                    }
                    let bytes = appended_bytes(&consensus);
                    if bytes > 0 && !self.shared.log_backlog.has_reserve_beside(self.appended) {
                        // The leader sends it again when it hears that it is missing. Heartbeats
                        // come by themselves.
                        metrics::counter!("esker_raft_messages_dropped_total").increment(1);
                        return Ok(());
                    }
                    self.appended += bytes;
                    peer.step(now, &address, *consensus)?;
                    self.touched.insert(region);
                }
            }
            // It comes by a way of its own.
            Checked::Snapshot(..) => {}
        }
        Ok(())
    }

    /// A member of the region may speak to it, from the store where it is known to be. Of other
    /// peers, which may be members that this store has not heard of, only the stores can be known.
    fn may_speak(&self, address: &Address) -> Result<(), Fault> {
        let (from, store) = (address.from.id, address.from.store);
        let member = self
            .peers
            .get(&address.region)
            .and_then(|peer| peer.descriptor().peer(from).map(|member| member.store));
        match member {
            Some(said) if said == store => Ok(()),
            Some(said) => Err(Fault::OtherSender { said, from: store }),
            None if self.shared.outbox.knows_store(store) => Ok(()),
            None => Err(Fault::UnknownStore(store)),
        }
    }

    /// Whether the message's addressee is here, after creating it where it should be.
    fn has_peer_for(
        &mut self,
        now: Time,
        address: &Address,
        consensus: &Consensus,
    ) -> Result<bool, StoreError> {
        let Address { region, from, to, epoch } = *address;
        let message = &consensus.message;
        if let Some(peer) = self.peers.get(&region) {
            if peer.is_destroying() {
                return Ok(false);
            }
            if to.id > peer.me().id {
                // The region left this store and came back under a new id while
                // this peer did not hear of it.
                if self.may_have_left(region, epoch.conf_ver) {
                    self.destroy(region, epoch.conf_ver.saturating_sub(1));
                }
                return Ok(false);
            }
            let descriptor = peer.descriptor();
            let is_vote =
                matches!(message.body, MessageBody::Vote { .. } | MessageBody::PreVote { .. });
            let behind = epoch.conf_ver < descriptor.epoch.conf_ver;
            if is_vote && behind && peer.is_initialized() && descriptor.peer(from.id).is_none() {
                // A removed peer that was away and campaigns: it is told so, and has no say. So is
                // one that asks a peer which has left, too: all that it knows may have left.
                let descriptor = descriptor.clone();
                self.tell_gone(address, &descriptor);
                return Ok(false);
            }
            if to.id < peer.me().id {
                // For a peer that this one has followed here.
                return Ok(false);
            }
            let newer = epoch.conf_ver > descriptor.epoch.conf_ver;
            if peer.is_initialized()
                && !newer
                && descriptor.peer(from.id).is_none()
                && message.term >= peer.term()
            {
                // A peer that is no member, and knows of no later members either, has no say. One
                // of an earlier term has none anyway, and is told that its term is over.
                complain(self.shared.store, address, &Fault::NotAMember(from.id));
                return Ok(false);
            }
            return Ok(true);
        }
        if !broken!(TombstoneIsHeeded)
            && let Some(RegionState::Tombstone { region: last, peer: removed, applied }) =
                region_state(&self.shared.kv, region)?
        {
            // One change may have removed that peer and added another one here: the
            // newcomer's epoch is then the tombstone's own.
            let is_newcomer = to.id > removed && epoch.conf_ver >= last.epoch.conf_ver;
            if !is_newcomer {
                let is_vote =
                    matches!(message.body, MessageBody::Vote { .. } | MessageBody::PreVote { .. });
                // Without peers it does not know who stayed.
                if is_vote && epoch.conf_ver < last.epoch.conf_ver && !last.peers.is_empty() {
                    match last.peer(from.id) {
                        Some(_) => self.refuse_vote(address, message, applied),
                        None => self.tell_gone(address, &last),
                    }
                }
                return Ok(false);
            }
        }
        let may_create = consensus.creates.as_ref().filter(|_| {
            matches!(
                message.body,
                MessageBody::Append { .. }
                    | MessageBody::Heartbeat { .. }
                    | MessageBody::Vote { .. }
                    | MessageBody::PreVote { .. }
            )
        });
        let Some(range) = may_create else {
            return Ok(false);
        };
        if raft_state(&self.shared.log, region)?.is_some_and(|left| left.peer > to.id) {
            // For a peer that a later one has followed here, which a restart emptied.
            return Ok(false);
        }
        let empty = self.peers.values().filter(|peer| !peer.is_initialized()).count();
        if empty >= MAX_EMPTY_PEERS {
            complain(self.shared.store, address, &Fault::TooManyEmpty);
            return Ok(false);
        }
        if !self.shared.ranges.admit(region, to.id, range) && !broken!(SnapshotNeedsFreeRange) {
            // A split that is not applied here yet, or was applied just now, will create the
            // region; or a region that should have gone is still here.
            let content = Checked::Raft(Box::new(consensus.clone()), Reach::default());
            if !broken!(EarlyMessagesAreKept) {
                self.shared.ranges.keep_early(Arrived { address: *address, content });
            }
            return Ok(false);
        }
        self.add_empty_peer(now, region, to)?;
        Ok(true)
    }

    /// Whether this store's peer can have left the region by the change of members with this
    /// number, without having heard of it. A leader cannot: it learns first of what it commits,
    /// and one that was deposed without noticing steps down within an election timeout.
    fn may_have_left(&self, region: RegionId, conf_ver: u64) -> bool {
        self.peers.get(&region).is_some_and(|peer| {
            let ours = peer.descriptor().epoch.conf_ver;
            let later = conf_ver > ours && conf_ver - ours <= MAX_EPOCH_LEAP;
            later && !(peer.is_initialized() && peer.is_leader())
        })
    }

    /// A learner that hears of no leader asks whether it is still a member: it does
    /// not campaign, so that nobody would tell it otherwise.
    fn on_membership_question(&mut self, address: &Address) -> Result<(), StoreError> {
        let Address { region, from, epoch, .. } = *address;
        let known = match self.peers.get(&region) {
            Some(peer) => Some((**peer.descriptor()).clone()),
            None => match region_state(&self.shared.kv, region)? {
                Some(RegionState::Tombstone { region, .. }) => Some(region),
                Some(_) | None => None,
            },
        };
        if let Some(descriptor) = known
            && !descriptor.peers.is_empty()
            && epoch.conf_ver < descriptor.epoch.conf_ver
            && descriptor.peer(from.id).is_none()
        {
            self.tell_gone(address, &descriptor);
        }
        Ok(())
    }

    /// A peer that stayed counts on the vote of one that left, because it has not
    /// applied the removal. Told that the removal is committed, it does.
    fn refuse_vote(&self, address: &Address, asked: &Message, applied: Applied) {
        let commit = CommitPoint { index: applied.index, term: applied.term };
        let (term, body) = match asked.body {
            // A request for a pre-vote names the term after the candidate's own.
            MessageBody::PreVote { .. } => {
                (asked.term.prev(), MessageBody::PreVoteReply { granted: false, commit })
            }
            _ => (asked.term, MessageBody::VoteReply { granted: false, commit }),
        };
        let message = Message { group: asked.group, from: asked.to, to: asked.from, term, body };
        let consensus = Consensus { message, applied: LogIndex(0), creates: None };
        self.shared.outbox.send(Envelope {
            address: address.reversed(address.epoch),
            content: Content::Consensus(Box::new(consensus)),
        });
    }

    fn tell_gone(&self, address: &Address, descriptor: &Region) {
        if broken!(RemovedPeerIsTold) {
            return;
        }
        let address = address.reversed(descriptor.epoch);
        self.shared.outbox.send(Envelope { address, content: Content::Gone });
    }

    /// Another store says that this peer was removed. Peer ids are never used
    /// twice: a later membership without the peer means that it is gone for good.
    fn on_gone(&mut self, address: &Address) {
        let Address { region, to, epoch, .. } = *address;
        let Some(peer) = self.peers.get(&region) else { return };
        let later = self.may_have_left(region, epoch.conf_ver);
        let is_me = to.id == peer.me().id;
        if is_me && later && peer.is_initialized() && !peer.is_installing() {
            tracing::info!(%region, store = %self.shared.store, "was removed from the region while away");
            // In the membership that the answer speaks of this store may have
            // another peer already: the tombstone must not refuse that one.
            self.destroy(region, epoch.conf_ver - 1);
        }
    }

    fn on_snapshot(
        &mut self,
        now: Time,
        arrived: Arrived,
        files: ReceivedSnapshot,
    ) -> Result<(), StoreError> {
        let region = arrived.region();
        let Arrived { address, content: Checked::Snapshot(consensus, descriptor) } = arrived else {
            files.discard();
            return Ok(());
        };
        let may_follow = match self.peers.get(&region).map(|peer| peer.descriptor()) {
            Some(known) if known.is_initialized() && !may_follow(known, &descriptor) => {
                Err(Fault::Contradiction("the region here and in the snapshot"))
            }
            _ => self.may_speak(&address),
        };
        if let Err(fault) = may_follow {
            complain(self.shared.store, &address, &fault);
            files.discard();
            return Ok(());
        }
        // The first message of a leader may be the snapshot itself.
        let here = self.peers.contains_key(&region) || {
            let body =
                MessageBody::Heartbeat { commit: Default::default(), stamp: Default::default() };
            let message = Message { body, ..consensus.message.clone() };
            let first = Consensus { message, creates: consensus.creates.clone(), ..*consensus };
            self.has_peer_for(now, &address, &first)?
        };
        let same = |id| self.peers.get(&region).is_some_and(|peer| peer.me().id == id);
        let busy = self
            .peers
            .get(&region)
            .is_some_and(|peer| peer.is_installing() || peer.is_destroying());
        if !here || busy || !same(address.to.id) {
            files.discard();
            return Ok(());
        }
        // The range is taken now, and the old one is kept until its data is gone:
        // another region must get no part of either.
        let before = self.peers.get(&region).map(|peer| peer.descriptor().clone());
        let wanted = match &before {
            Some(before) if before.is_initialized() => before.range.spanning(&descriptor.range),
            _ => descriptor.range.clone(),
        };
        if let Err(other) = self.shared.ranges.claim(region, &wanted)
            && !broken!(SnapshotNeedsFreeRange)
        {
            if let Some(times) = self.crowded.failed(now) {
                tracing::info!(
                    %region, %other, store = %self.shared.store, times,
                    "snapshot refused: its range is not free"
                );
            }
            files.discard();
            return Ok(());
        }
        if let Some(peer) = self.peers.get_mut(&region) {
            peer.step_snapshot(now, &address, *consensus, files)?;
            peer.collect(now, &self.shared, &mut self.out)?;
            if !peer.is_installing() {
                // The group has all that the snapshot holds, or follows another leader.
                peer.drop_unused_snapshot();
                match before.filter(|before| before.is_initialized()) {
                    Some(before) => {
                        let kept = self.shared.ranges.claim(region, &before.range);
                        assert!(kept.is_ok(), "region {region} lost its range to another region");
                    }
                    None => self.shared.ranges.release(region),
                }
            }
            self.touched.insert(region);
        }
        Ok(())
    }
}
