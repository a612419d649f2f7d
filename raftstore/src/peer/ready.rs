//! What the group wants after a turn: for each part of it the room that sees to it, in the order
//! that its promises need.

use std::time::Duration;

use bytes::Bytes;
use esker_engine::KvEngine;
use esker_mutants::broken;
use esker_raft::{Ready, RoleChange, SnapshotMeta, Time};

use super::{Life, Outputs, Peer, SLOW_PRIORITY};
use crate::config::StoreConfig;
use crate::error::StoreError;
use crate::message::{ApplyTask, Persisted};
use crate::outbox::Outbox;
use crate::worker::Shared;

/// What a region holds back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// Writes, for which the log writer has no room.
    pub for_log: bool,
    /// Committed entries, for which the apply worker has no room.
    pub for_apply: bool,
}

impl Peer {
    /// Proposes what waits, and moves everything the group wants to `out`.
    pub fn collect(
        &mut self,
        now: Time,
        shared: &Shared,
        out: &mut Outputs,
    ) -> Result<(), StoreError> {
        if self.is_destroying() {
            return Ok(());
        }
        self.propose_waiting(now, shared, out.log.batch.bytes());
        self.confirm_waiting_reads(now);
        let backlog = shared.apply_backlog(self.id);
        loop {
            self.group.hold_committed(!backlog.has_room_beside(0));
            let Some(ready) = self.group.ready() else { break };
            self.take_ready(shared, ready, out)?;
        }
        self.watch_disk(now, out);
        self.serve_confirmed(&shared.kv)?;
        // Before the messages of this turn leave: among them may be the one that
        // makes another peer the leader.
        self.publish_lease();
        Ok(())
    }

    /// What is kept here until there is room for it elsewhere.
    pub fn held(&self, config: &StoreConfig) -> Held {
        if self.is_destroying() {
            return Held::default();
        }
        Held {
            // Where the region itself has no room, it is touched when its own writes are durable.
            for_log: self.writes.is_waiting() && self.log.has_room_beside(0, config),
            for_apply: self.group.has_held_committed(),
        }
    }

    fn take_ready(
        &mut self,
        shared: &Shared,
        ready: Ready,
        out: &mut Outputs,
    ) -> Result<(), StoreError> {
        if let Some(failure) = &ready.log_failure {
            return Err(StoreError::Corrupt {
                what: format!("the log of region {}", self.id),
                why: failure.to_string(),
            });
        }
        if let Some(role) = &ready.role {
            self.take_role(role, &*shared.outbox, out);
        }
        if !ready.messages.is_empty() {
            let addressed: Vec<_> =
                ready.messages.into_iter().filter_map(|m| self.address(m)).collect();
            out.messages.extend(addressed);
        }
        self.log.write(
            ready.number,
            &ready.entries,
            ready.hard_state,
            ready.must_sync,
            &mut out.log.batch,
        );
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
            self.install(meta, data, out)?;
        }
        if !ready.committed.is_empty() {
            let proposals = self.writes.take_committed(&ready.committed);
            shared.apply_backlog(self.id).add(ready.committed.bytes());
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
        for (number, index) in ready.reads {
            self.reads.confirmed(number, index);
        }
        self.serve_confirmed(&shared.kv)?;
        for number in ready.failed_reads {
            if let Some(reads) = self.reads.take_failed(number) {
                self.refuse_reads(reads);
            }
        }
        for to in ready.snapshots_wanted {
            let task = ApplyTask::TakeSnapshot { region: self.id, generation: self.generation, to };
            out.apply.push((self.id, task));
        }
        Ok(())
    }

    /// Compares the disk of this leader with those of its followers.
    fn watch_disk(&mut self, now: Time, out: &mut Outputs) {
        if !self.is_leader() {
            self.behind = None;
            return;
        }
        let (commit, durable) = (self.group.commit_index(), self.group.persisted_index());
        let was_durable = std::mem::replace(&mut self.was_durable, durable);
        if let Some((index, since)) = self.behind {
            if durable < index {
                out.disk.waits_for(now - since);
                return;
            }
            out.disk.was_behind(now - since);
            self.behind = None;
        } else if durable > was_durable {
            // It was here no later than on the others.
            out.disk.was_behind(Duration::ZERO);
        }
        if commit > durable {
            self.behind = Some((commit, now));
        }
    }

    /// Whether this peer does not lead, or hands its leadership over already.
    pub fn is_handing_over(&self) -> bool {
        !self.is_leader() || self.group.transfer_target().is_some()
    }

    /// From now on this peer campaigns after the others, or no more than they.
    pub fn yield_elections(&mut self, yields: bool) {
        if self.life == Life::Serving {
            let yields = yields && !broken!(SlowStoreIsNotChosen);
            self.group.set_priority(if yields { SLOW_PRIORITY } else { 0 });
        }
    }

    /// Gives way to the peers of other stores: see [`crate::disk`]. Returns whether this peer leads,
    /// and hands over.
    pub fn give_way(&mut self, now: Time) -> bool {
        self.yield_elections(true);
        // Where there is nobody to hand over to, a slow leader is better than none.
        self.life == Life::Serving
            && self.is_leader()
            && self.group.transfer_leader(now, None).is_ok()
    }

    fn take_role(&mut self, role: &RoleChange, outbox: &dyn Outbox, out: &mut Outputs) {
        let leads = self.is_leader();
        if leads != self.was_leader {
            self.was_leader = leads;
            self.writes.forget_split();
            out.leadership.push(self.id);
            self.reports.report_soon();
            if leads {
                // What was written and read here under other leaders is no traffic of this one.
                self.reports.begin_to_lead();
                self.delegate.take_read_load();
            }
            tracing::info!(
                region = %self.id, store = %self.store, term = %role.term,
                "{}", if leads { "leads" } else { "no longer leads" }
            );
        }
        if !leads && role.leader.is_none() {
            // Nobody could tell it how far it may read.
            let waiting = self.reads.take_confirmed();
            self.refuse_reads(waiting);
        }
        outbox.leadership(self.id, role.term, self.leader(), leads);
    }

    /// Puts the snapshot that was received in the place of this peer's data.
    fn install(
        &mut self,
        meta: SnapshotMeta,
        data: Bytes,
        out: &mut Outputs,
    ) -> Result<(), StoreError> {
        let (index, term) = (meta.index, meta.term);
        let task = self.snapshots.install(self.generation, meta, data)?;
        // Before the task leaves: a reader under the lease would find part of the data.
        self.delegate.withdraw_lease();
        self.writes.replaced_up_to(index, term);
        out.apply.push((self.id, task));
        Ok(())
    }

    /// Answers reads for which this replica is far enough, and its leader too.
    fn serve_confirmed(&mut self, kv: &KvEngine) -> Result<(), StoreError> {
        if !self.is_installing() {
            self.reads.take_views(kv, self.id, self.applied)?;
        }
        self.reads.answer(self.is_leader(), &self.descriptor, &self.delegate);
        Ok(())
    }
}
