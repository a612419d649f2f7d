//! What comes to a worker from outside: requests for its regions, and messages of
//! other stores, some of them for regions that are not here, not here yet, or not
//! here any more.

use bytes::Bytes;
use esker_raft::{CommitPoint, Message, MessageBody, PeerId, Time};
use esker_rpc::proto::esker::RaftMessage;
use esker_rpc::proto::metapb::Region;

use super::Worker;
use crate::config::MAX_EMPTY_PEERS;
use crate::door::{Arrived, Content, Fault, MAX_EPOCH_LEAP, complain, may_follow};
use crate::error::{RequestError, StoreError};
use crate::ids::{RegionId, StoreId};
use crate::message::Input;
use crate::region::RegionExt;
use crate::snapshot::ReceivedSnapshot;
use crate::state::{Applied, RegionState, raft_state, region_state};

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
            Input::Raft(message) => self.on_raft(now, *message)?,
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
                let status = match self.peers.get(&region) {
                    Some(peer) if peer.is_initialized() && !peer.destroying => Ok(peer.status()),
                    _ => Err(RequestError::RegionNotFound(region)),
                };
                let _ = reply.send(status);
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
        let Arrived { envelope, content } = arrived;
        if let Err(fault) = self.may_speak(region, &envelope) {
            complain(self.shared.store, &envelope, &fault);
            return Ok(());
        }
        match content {
            Content::Gone => self.on_gone(region, &envelope),
            Content::Question => self.on_membership_question(region, &envelope)?,
            Content::Raft(message, reach) => {
                if !self.has_peer_for(now, region, &envelope, &message)? {
                    return Ok(());
                }
                if let Some(peer) = self.peers.get_mut(&region) {
                    if !reach.lies_in(peer.descriptor()) {
                        complain(self.shared.store, &envelope, &Fault::OutsideOfRegion);
                        return Ok(());
                    }
                    peer.step(now, &envelope, message)?;
                    self.touched.insert(region);
                }
            }
            // It comes by a way of its own.
            Content::Snapshot(..) => {}
        }
        Ok(())
    }

    /// A member of the region may speak to it, from the store where it is known to be. Of
    /// others, who may be members that this store has not heard of, only their stores can
    /// be known.
    fn may_speak(&self, region: RegionId, envelope: &RaftMessage) -> Result<(), Fault> {
        let from = envelope.from.unwrap_or_default();
        let store = StoreId(from.store_id);
        let member = self.peers.get(&region).and_then(|peer| {
            peer.descriptor().peer(PeerId(from.id)).map(|member| StoreId(member.store_id))
        });
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
        region: RegionId,
        envelope: &RaftMessage,
        message: &Message,
    ) -> Result<bool, StoreError> {
        let to = envelope.to.unwrap_or_default();
        let from = envelope.from.unwrap_or_default();
        if let Some(peer) = self.peers.get(&region) {
            if peer.destroying || to.id < peer.me.id {
                return Ok(false);
            }
            if to.id > peer.me.id {
                // The region left this store and came back under a new id while
                // this peer did not hear of it.
                let conf_ver = envelope.epoch.unwrap_or_default().conf_ver;
                if self.may_have_left(region, conf_ver) {
                    self.destroy(region, conf_ver.saturating_sub(1));
                }
                return Ok(false);
            }
            let descriptor = peer.descriptor();
            let is_vote =
                matches!(message.body, MessageBody::Vote { .. } | MessageBody::PreVote { .. });
            let behind = envelope.epoch.unwrap_or_default().conf_ver < descriptor.epoch().conf_ver;
            if is_vote
                && behind
                && peer.is_initialized()
                && descriptor.peer(PeerId(from.id)).is_none()
            {
                // A removed peer that was away and campaigns: it is told, not heard.
                let descriptor = descriptor.clone();
                self.tell_gone(envelope, &descriptor);
                return Ok(false);
            }
            let newer = envelope.epoch.unwrap_or_default().conf_ver > descriptor.epoch().conf_ver;
            if peer.is_initialized()
                && !newer
                && descriptor.peer(PeerId(from.id)).is_none()
                && message.term >= peer.term()
            {
                // Who is no member, and knows of no later members either, has no say. One of
                // an earlier term has none anyway, and is told that its term is over.
                complain(self.shared.store, envelope, &Fault::NotAMember(from.id));
                return Ok(false);
            }
            return Ok(true);
        }
        if let Some(RegionState::Tombstone { region: last, peer: removed, applied }) =
            region_state(&self.shared.kv, region)?
        {
            let epoch = envelope.epoch.unwrap_or_default();
            // One change may have removed that peer and added another one here: the
            // newcomer's epoch is then the tombstone's own.
            let is_newcomer = to.id > removed.0 && epoch.conf_ver >= last.epoch().conf_ver;
            if !is_newcomer {
                let is_vote =
                    matches!(message.body, MessageBody::Vote { .. } | MessageBody::PreVote { .. });
                // Without peers it does not know who stayed.
                if is_vote && epoch.conf_ver < last.epoch().conf_ver && !last.peers.is_empty() {
                    match last.peer(PeerId(from.id)) {
                        Some(_) => self.refuse_vote(envelope, message, applied),
                        None => self.tell_gone(envelope, &last),
                    }
                }
                return Ok(false);
            }
        }
        let may_create = envelope.is_initial
            && matches!(
                message.body,
                MessageBody::Append { .. }
                    | MessageBody::Heartbeat { .. }
                    | MessageBody::Vote { .. }
                    | MessageBody::PreVote { .. }
            );
        if !may_create {
            return Ok(false);
        }
        if self.shared.ranges.overlaps(&envelope.start_key, &envelope.end_key, region) {
            // A split that is not applied here yet will create the region; or a
            // region that should have gone is still here.
            self.shared.ranges.keep_early(envelope.clone());
            return Ok(false);
        }
        if raft_state(&self.shared.log, region)?.is_some_and(|left| left.peer.0 > to.id) {
            // For a peer that a later one has followed here, which a restart emptied.
            return Ok(false);
        }
        let empty = self.peers.values().filter(|peer| !peer.is_initialized()).count();
        if empty >= MAX_EMPTY_PEERS {
            complain(self.shared.store, envelope, &Fault::TooManyEmpty);
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
            let ours = peer.descriptor().epoch().conf_ver;
            let later = conf_ver > ours && conf_ver - ours <= MAX_EPOCH_LEAP;
            later && !(peer.is_initialized() && peer.is_leader())
        })
    }

    /// A learner that hears of no leader asks whether it is still a member: it does
    /// not campaign, so that nobody would tell it otherwise.
    fn on_membership_question(
        &mut self,
        region: RegionId,
        envelope: &RaftMessage,
    ) -> Result<(), StoreError> {
        let from = PeerId(envelope.from.unwrap_or_default().id);
        let asked = envelope.epoch.unwrap_or_default().conf_ver;
        let known = match self.peers.get(&region) {
            Some(peer) => Some((**peer.descriptor()).clone()),
            None => match region_state(&self.shared.kv, region)? {
                Some(RegionState::Tombstone { region, .. }) => Some(region),
                Some(_) | None => None,
            },
        };
        if let Some(descriptor) = known
            && !descriptor.peers.is_empty()
            && asked < descriptor.epoch().conf_ver
            && descriptor.peer(from).is_none()
        {
            self.tell_gone(envelope, &descriptor);
        }
        Ok(())
    }

    /// A peer that stayed counts on the vote of one that left, because it has not
    /// applied the removal. Told that the removal is committed, it does.
    fn refuse_vote(&self, envelope: &RaftMessage, asked: &Message, applied: Applied) {
        let Some(from) = envelope.from else { return };
        let commit = CommitPoint { index: applied.index, term: applied.term };
        let (term, body) = match asked.body {
            // A request for a pre-vote names the term after the candidate's own.
            MessageBody::PreVote { .. } => {
                (asked.term.prev(), MessageBody::PreVoteReply { granted: false, commit })
            }
            _ => (asked.term, MessageBody::VoteReply { granted: false, commit }),
        };
        let mut encoded = Vec::new();
        Message { group: asked.group, from: asked.to, to: asked.from, term, body }
            .encode(&mut encoded);
        let answer = RaftMessage {
            region_id: envelope.region_id,
            from: envelope.to,
            to: Some(from),
            epoch: envelope.epoch,
            message: encoded.into(),
            ..Default::default()
        };
        self.shared.outbox.send(StoreId(from.store_id), answer);
    }

    fn tell_gone(&self, envelope: &RaftMessage, descriptor: &Region) {
        let Some(from) = envelope.from else { return };
        self.shared.outbox.send(
            StoreId(from.store_id),
            RaftMessage {
                region_id: envelope.region_id,
                from: envelope.to,
                to: Some(from),
                epoch: Some(descriptor.epoch()),
                gone: true,
                ..Default::default()
            },
        );
    }

    /// Another store says that this peer was removed. Peer ids are never used
    /// twice: a later membership without the peer means that it is gone for good.
    fn on_gone(&mut self, region: RegionId, envelope: &RaftMessage) {
        let Some(peer) = self.peers.get(&region) else { return };
        let conf_ver = envelope.epoch.unwrap_or_default().conf_ver;
        let later = self.may_have_left(region, conf_ver);
        let is_me = envelope.to.unwrap_or_default().id == peer.me.id;
        if is_me && later && peer.is_initialized() && !peer.is_installing() {
            tracing::info!(%region, store = %self.shared.store, "was removed from the region while away");
            // In the membership that the answer speaks of this store may have
            // another peer already: the tombstone must not refuse that one.
            self.destroy(region, conf_ver - 1);
        }
    }

    fn on_snapshot(
        &mut self,
        now: Time,
        arrived: Arrived,
        files: ReceivedSnapshot,
    ) -> Result<(), StoreError> {
        let region = arrived.region();
        let Arrived { envelope, content: Content::Snapshot(message, descriptor) } = arrived else {
            files.discard();
            return Ok(());
        };
        let may_follow = match self.peers.get(&region) {
            Some(peer) if !may_follow(peer.descriptor(), &descriptor) => {
                Err(Fault::Contradiction("the region here and in the snapshot"))
            }
            _ => self.may_speak(region, &envelope),
        };
        if let Err(fault) = may_follow {
            complain(self.shared.store, &envelope, &fault);
            files.discard();
            return Ok(());
        }
        // The first message of a leader may be the snapshot itself.
        let here = self.peers.contains_key(&region)
            || self.has_peer_for(
                now,
                region,
                &RaftMessage { is_initial: true, ..envelope.clone() },
                &Message {
                    body: MessageBody::Heartbeat {
                        commit: Default::default(),
                        stamp: Default::default(),
                    },
                    ..message.clone()
                },
            )?;
        let same = |id: u64| self.peers.get(&region).is_some_and(|peer| peer.me.id == id);
        let busy =
            self.peers.get(&region).is_some_and(|peer| peer.is_installing() || peer.destroying);
        if !here || busy || !same(envelope.to.unwrap_or_default().id) {
            files.discard();
            return Ok(());
        }
        // The range is taken now, and the old one is kept until its data is gone:
        // another region must get no part of either.
        let before = self.peers.get(&region).map(|peer| peer.descriptor().clone());
        let (start, end) = match &before {
            Some(before) if before.is_initialized() => spanning(before, &descriptor),
            _ => (descriptor.start_key.clone(), descriptor.end_key.clone()),
        };
        if let Err(other) = self.shared.ranges.claim(region, &start, &end) {
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
            peer.step_snapshot(now, &envelope, message, files)?;
            peer.collect(now, &self.shared.kv, &*self.shared.outbox, &mut self.out)?;
            if !peer.is_installing() {
                // The group has all that the snapshot holds, or follows another leader.
                peer.drop_unused_snapshot();
                match before.filter(|before| before.is_initialized()) {
                    Some(before) => {
                        let kept =
                            self.shared.ranges.claim(region, &before.start_key, &before.end_key);
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

/// The smallest range that holds both regions'.
fn spanning(a: &Region, b: &Region) -> (Bytes, Bytes) {
    let start = a.start_key.clone().min(b.start_key.clone());
    let end = match a.end_key.is_empty() || b.end_key.is_empty() {
        true => Bytes::new(),
        false => a.end_key.clone().max(b.end_key.clone()),
    };
    (start, end)
}
