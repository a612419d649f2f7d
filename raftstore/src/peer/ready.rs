//! What the group wants after a turn, and what it learns when that is done.

use std::time::Duration;

use bytes::Bytes;
use esker_engine::KvEngine;
use esker_model::{Region, RegionReport};
use esker_raft::{
    ConfChange, Entries, LogIndex, Message, MessageBody, Ready, ReadyNumber, SnapshotMeta, Time,
};

use super::{Outputs, Peer, QUESTION_AFTER};
use crate::apply::decode_snapshot;
use crate::config::StoreConfig;
use crate::envelope::{Address, Consensus, Content, Envelope};
use crate::error::{RequestError, StoreError};
use crate::message::{AppliedNotice, ApplyTask, Effect, Persisted, Proposal, ReadRequest};
use crate::outbox::Outbox;
use crate::read::RegionSnapshot;
use crate::state::{Applied, applied_in, bounds, durable_applied, encode_entry};

/// How soon a leader looks again whether its pending peers have caught up.
pub(super) const LOOK_AGAIN: Duration = Duration::from_millis(50);
/// The same when none of them answers: they may come back.
pub(super) const LOOK_AT_SILENT: Duration = Duration::from_secs(1);

impl Peer {
    /// Proposes what waits, and moves everything the group wants to `out`.
    pub fn collect(
        &mut self,
        now: Time,
        kv: &KvEngine,
        outbox: &dyn Outbox,
        out: &mut Outputs,
    ) -> Result<(), StoreError> {
        if self.destroying {
            return Ok(());
        }
        self.propose_waiting(now);
        self.confirm_waiting_reads(now);
        while let Some(ready) = self.group.ready() {
            self.take_ready(kv, ready, outbox, out)?;
        }
        self.serve_confirmed(kv)?;
        // Before the messages of this turn leave: among them may be the one that
        // makes another peer the leader.
        self.publish_lease();
        Ok(())
    }

    fn publish_lease(&self) {
        let lease = self.group.lease_until();
        match lease {
            // Until an entry of this term is applied, what earlier leaders
            // committed may not be visible here.
            Some(until)
                if self.splitting.is_none()
                    && !self.installing
                    && !self.retired
                    && self.applied.term == self.group.term() =>
            {
                self.delegate.publish_lease(self.applied.term, until);
            }
            _ => self.delegate.withdraw_lease(),
        }
    }

    fn confirm_waiting_reads(&mut self, now: Time) {
        if self.reads.is_empty() {
            return;
        }
        let reads = std::mem::take(&mut self.reads);
        let id = self.next_read;
        self.next_read += 1;
        match self.group.read_index(now, id) {
            Ok(()) => {
                self.confirming.insert(id, reads);
            }
            Err(_) => self.refuse_reads(reads),
        }
    }

    fn refuse_reads(&self, reads: Vec<ReadRequest>) {
        let error = if self.is_leader() || self.leader().is_none() {
            RequestError::ReadIndexNotReady(self.id)
        } else {
            self.not_leader()
        };
        for read in reads {
            // A leader that lost its place says so; a follower asked for a
            // replica read may be asked again.
            let _ = read.reply.send(Err(error.clone()));
        }
    }

    fn take_ready(
        &mut self,
        kv: &KvEngine,
        ready: Ready,
        outbox: &dyn Outbox,
        out: &mut Outputs,
    ) -> Result<(), StoreError> {
        if let Some(failure) = &ready.log_failure {
            return Err(StoreError::Corrupt {
                what: format!("the log of region {}", self.id),
                why: failure.to_string(),
            });
        }
        if let Some(role) = &ready.role {
            let leads = self.is_leader();
            if leads != self.was_leader {
                self.was_leader = leads;
                self.splitting = None;
                out.leadership.push(self.id);
                self.next_report = Time(0);
                tracing::info!(
                    region = %self.id, store = %self.store, term = %role.term,
                    "{}", if leads { "leads" } else { "no longer leads" }
                );
            }
            if !leads && role.leader.is_none() {
                // Nobody could tell it how far it may read.
                let waiting = self.confirmed.drain(..).map(|(_, reads)| reads);
                let waiting = waiting.chain(self.ahead.drain(..).map(|(_, _, reads)| reads));
                let waiting: Vec<ReadRequest> = waiting.flatten().collect();
                self.refuse_reads(waiting);
            }
            outbox.leadership(self.id, role.term, self.leader(), leads);
        }
        if !ready.messages.is_empty() {
            let addressed: Vec<_> =
                ready.messages.into_iter().filter_map(|m| self.address(m)).collect();
            out.messages.extend(addressed);
        }
        self.write_log(&ready.entries, ready.hard_state, ready.must_sync, out);
        if ready.snapshot.is_some()
            || ready.must_sync
            || !ready.entries.is_empty()
            || !ready.messages_after_persist.is_empty()
        {
            let messages =
                ready.messages_after_persist.into_iter().filter_map(|m| self.address(m)).collect();
            out.log.persisted.push(Persisted {
                region: self.id,
                generation: self.generation,
                number: ready.number,
                messages,
            });
        }
        if let Some((meta, data)) = ready.snapshot {
            self.install(meta, &data, out)?;
        }
        if !ready.committed.is_empty() {
            let proposals = self.proposals_of(&ready.committed);
            out.apply.push((
                self.id,
                ApplyTask::Entries {
                    region: self.id,
                    generation: self.generation,
                    entries: ready.committed,
                    proposals,
                },
            ));
        }
        for (id, index) in ready.reads {
            if let Some(reads) = self.confirming.remove(&id) {
                self.confirmed.push_back((index, reads));
            }
        }
        self.serve_confirmed(kv)?;
        for id in ready.failed_reads {
            if let Some(reads) = self.confirming.remove(&id) {
                self.refuse_reads(reads);
            }
        }
        for to in ready.snapshots_wanted {
            let task = ApplyTask::TakeSnapshot { region: self.id, generation: self.generation, to };
            out.apply.push((self.id, task));
        }
        Ok(())
    }

    fn write_log(
        &mut self,
        entries: &Entries,
        hard_state: Option<esker_raft::HardState>,
        must_sync: bool,
        out: &mut Outputs,
    ) {
        if let Some(hard_state) = hard_state {
            self.raft_state.hard_state = hard_state;
        }
        let group = self.id.0;
        if let (Some(first), Some(last)) = (entries.first(), entries.last()) {
            let mut encoded = Vec::new();
            for entry in entries {
                encode_entry(entry, &mut encoded);
                out.log.batch.append(group, entry.index.0, &encoded);
            }
            if first.index <= self.raft_state.last && last.index < self.raft_state.last {
                out.log.batch.cut(group, last.index.0 + 1, self.raft_state.last.0 + 1);
            }
            self.raft_state.last = last.index;
        }
        // A commit index alone need not be durable: it is learnt again.
        if must_sync || !entries.is_empty() {
            out.log.batch.put_state(group, &self.raft_state.encode());
        }
    }

    /// From this peer to another of its region.
    fn address_of(&self, to: esker_model::Peer) -> Address {
        Address { region: self.id, from: self.me, to, epoch: self.descriptor.epoch }
    }

    fn address(&self, message: Message) -> Option<Envelope> {
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

    fn proposals_of(&mut self, committed: &Entries) -> Vec<Proposal> {
        let mut taken = Vec::new();
        for entry in committed {
            self.fail_superseded(entry);
            if let Some(front) = self.proposals.front()
                && front.index == entry.index
                && front.term == entry.term
            {
                taken.extend(self.proposals.pop_front());
            }
        }
        taken
    }

    fn install(
        &mut self,
        meta: SnapshotMeta,
        data: &[u8],
        out: &mut Outputs,
    ) -> Result<(), StoreError> {
        let data = Bytes::copy_from_slice(data);
        let (descriptor, remembered) = decode_snapshot(data).map_err(|why| {
            StoreError::Corrupt { what: format!("a snapshot of region {}", self.id), why }
        })?;
        let files = self.received.take().ok_or_else(|| StoreError::Corrupt {
            what: format!("a snapshot of region {}", self.id),
            why: "its files are not here".into(),
        })?;
        self.installing = true;
        self.delegate.withdraw_lease();
        while self.proposals.front().is_some_and(|proposal| proposal.index <= meta.index) {
            if let Some(unknown) = self.proposals.pop_front() {
                unknown.fail(&RequestError::Undetermined(self.id));
            }
        }
        out.apply.push((
            self.id,
            ApplyTask::Install {
                region: self.id,
                generation: self.generation,
                meta,
                descriptor,
                remembered: Box::new(remembered),
                files,
            },
        ));
        Ok(())
    }

    /// The group did not want the snapshot that was received: its files go.
    pub fn drop_unused_snapshot(&mut self) {
        if let Some(unused) = self.received.take() {
            unused.discard();
        }
    }

    pub fn is_installing(&self) -> bool {
        self.installing
    }

    /// Answers reads for which this replica is far enough, and its leader too.
    ///
    /// The second matters on a follower. It may have applied more than its leader
    /// has; a reader who saw that here and then asked the leader, who reads under
    /// a lease from what it has applied, would see time run backwards.
    fn serve_confirmed(&mut self, kv: &KvEngine) -> Result<(), StoreError> {
        let mut shared = None;
        while !self.installing
            && self.confirmed.front().is_some_and(|(index, _)| *index <= self.applied.index)
        {
            let Some((_, reads)) = self.confirmed.pop_front() else { break };
            let (view, index) = match &shared {
                Some((view, index)) => (view, *index),
                None => {
                    // The view may be further than this peer has been told.
                    let view = kv.snapshot();
                    let applied = applied_in(&view, self.id)?.unwrap_or(self.applied);
                    let (view, index) = shared.insert((view, applied.index));
                    (&*view, *index)
                }
            };
            self.ahead.push_back((index, view.clone(), reads));
        }
        while let Some((index, ..)) = self.ahead.front()
            && (self.is_leader() || *index <= self.leader_applied)
        {
            let Some((_, view, reads)) = self.ahead.pop_front() else { break };
            for read in reads {
                let answer = if read.context.epoch.is_same_range(self.descriptor.epoch) {
                    let descriptor = self.descriptor.clone();
                    Ok(RegionSnapshot::new(view.clone(), descriptor, self.delegate.clone()))
                } else {
                    Err(self.epoch_not_match())
                };
                let _ = read.reply.send(answer);
            }
        }
        Ok(())
    }

    pub fn on_persisted(&mut self, now: Time, number: ReadyNumber) {
        self.group.persisted(now, number);
    }

    /// Entries are applied. Effects on the region's shape are the worker's to carry out first.
    pub fn on_applied(&mut self, notice: &AppliedNotice) {
        self.applied = notice.applied;
        self.written_bytes += notice.written_bytes;
        self.written_keys += notice.written_keys;
        for effect in &notice.effects {
            match effect {
                Effect::MayTruncate { index, term } => self.may_truncate = Some((*index, *term)),
                Effect::Split { index, .. } | Effect::SplitRefused { index }
                    if self.splitting.is_some_and(|splitting| splitting <= *index) =>
                {
                    self.splitting = None;
                }
                _ => {}
            }
        }
        self.group.applied(notice.applied.index);
    }

    /// A change of members is applied; tells whether this peer is still a member.
    pub fn on_changed(
        &mut self,
        now: Time,
        change: &ConfChange,
        descriptor: Region,
    ) -> Result<bool, StoreError> {
        let configuration =
            self.group.apply_change(now, change).map_err(|e| StoreError::Corrupt {
                what: format!("a change of members of region {}", self.id),
                why: e.to_string(),
            })?;
        assert_eq!(
            configuration,
            crate::region::configuration(&descriptor),
            "the descriptor of region {} and its Raft configuration must say the same",
            self.id
        );
        self.set_descriptor(descriptor);
        match self.descriptor.peer(self.me.id).copied() {
            Some(me) => {
                self.me = me;
                Ok(true)
            }
            None => Ok(false),
        }
    }

    pub fn on_change_refused(&mut self) {
        self.group.ignore_change();
    }

    /// The snapshot's data is in place; what the log still holds is obsolete.
    pub fn on_installed(
        &mut self,
        now: Time,
        descriptor: Region,
        meta: &SnapshotMeta,
        out: &mut Outputs,
    ) {
        self.installing = false;
        let last = self.raft_state.last;
        self.raft_state.truncated = (meta.index, meta.term);
        self.raft_state.last = meta.index;
        self.raft_state.hard_state.commit = self.raft_state.hard_state.commit.max(meta.index);
        out.log.batch.cut(self.id.0, 0, last.0 + 1);
        out.log.batch.put_state(self.id.0, &self.raft_state.encode());
        self.applied = Applied { index: meta.index, term: meta.term };
        if let Some(me) = descriptor.peer(self.me.id) {
            self.me = *me;
        }
        self.set_descriptor(descriptor);
        self.group.snapshot_installed(now, meta.index);
    }

    /// Reports and shortens the log when it is time.
    pub fn housekeep(
        &mut self,
        now: Time,
        config: &StoreConfig,
        kv: &KvEngine,
        out: &mut Outputs,
    ) -> Result<Option<RegionReport>, StoreError> {
        if now >= self.next_log_gc && !self.destroying {
            self.next_log_gc = now + config.log_gc_interval;
            if self.is_leader() {
                self.propose_truncation(now, config.log_gc_threshold, config.log_gc_max_lag);
            }
            self.truncate(kv, out)?;
        }
        if self.is_learner() && now >= self.next_question && !self.destroying {
            self.next_question = now + QUESTION_AFTER;
            if now - self.last_heard >= QUESTION_AFTER {
                self.ask_for_membership(out);
            }
        }
        if !self.is_leader() || self.destroying {
            return Ok(None);
        }
        if let Some(look) = self.next_look
            && now >= look
        {
            let (pending, look) = self.pending();
            self.next_look = look.map(|soon| now + soon);
            if pending.is_empty() {
                self.next_report = now;
            }
        }
        if now < self.next_report {
            return Ok(None);
        }
        self.next_report = now + config.region_report_interval;
        let (start, end) = bounds(&self.descriptor.range);
        let size = kv.approximate_size(start, end)?;
        Ok(Some(self.report(now, size)))
    }

    fn ask_for_membership(&self, out: &mut Outputs) {
        for to in self.descriptor.peers.iter().filter(|peer| peer.id != self.me.id) {
            out.messages
                .push(Envelope { address: self.address_of(*to), content: Content::Question });
        }
    }

    /// Forgets the prefix of the log that the group agreed to forget and that the
    /// key-value engine could not lose any more.
    fn truncate(&mut self, kv: &KvEngine, out: &mut Outputs) -> Result<(), StoreError> {
        let Some((index, term)) = self.may_truncate else { return Ok(()) };
        if index <= self.raft_state.truncated.0 {
            self.may_truncate = None;
            return Ok(());
        }
        if durable_applied(kv, self.id)?.is_none_or(|durable| durable.index < index) {
            return Ok(());
        }
        let from = self.raft_state.truncated.0.next();
        self.raft_state.truncated = (index, term);
        // With the turn's appends, behind those that are under way: a record
        // written past them would be replaced by an older one.
        out.log.batch.put_state(self.id.0, &self.raft_state.encode());
        out.log.batch.cut(self.id.0, from.0, index.0 + 1);
        self.group.compacted(index, term);
        self.may_truncate = None;
        Ok(())
    }

    /// Whether the log waits for the key-value engine to become durable.
    pub fn waits_for_flush(&self) -> bool {
        self.may_truncate.is_some_and(|(index, _)| index > self.raft_state.truncated.0)
    }
}
