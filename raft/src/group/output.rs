//! Collecting outputs, and handing them out as one [`Ready`].

use super::Group;
use crate::log::{LogReadError, LogReader};
use crate::message::{AppendOutcome, Message, MessageBody, Stamp};
use crate::ready::{Ready, ReadyNumber, RoleChange};
use crate::types::{LogIndex, PeerId, SnapshotMeta};

/// Outputs since the last Ready. Boxed, because an idle group has none.
#[derive(Debug, Default)]
pub(super) struct Outbox(Option<Box<Pending>>);

#[derive(Debug, Default)]
struct Pending {
    messages: Vec<Message>,
    after_persist: Vec<Message>,
    reads: Vec<(u64, LogIndex)>,
    failed_reads: Vec<u64>,
    snapshots_wanted: Vec<PeerId>,
    log_failure: Option<LogReadError>,
}

impl Outbox {
    #[inline]
    fn pending(&mut self) -> &mut Pending {
        self.0.get_or_insert_default()
    }

    #[inline(always)]
    pub fn send(&mut self, message: Message) {
        self.pending().messages.push(message);
    }

    pub fn send_after_persist(&mut self, message: Message) {
        self.pending().after_persist.push(message);
    }

    /// Sends an acknowledgement. Of several acknowledgements to one leader in one Ready only the
    /// furthest is sent, so a burst of appends gets one reply.
    #[inline]
    pub fn acknowledge(&mut self, reply: Message) {
        let after_persist = &mut self.pending().after_persist;
        if let Some(earlier) = after_persist.last_mut()
            && (earlier.to, earlier.term) == (reply.to, reply.term)
            && let (Some(old), Some(new)) = (accepted(&mut earlier.body), accepted_in(&reply.body))
        {
            *old.0 = (*old.0).max(new.0);
            *old.1 = if new.1.sent >= old.1.sent { new.1 } else { *old.1 };
            return;
        }
        after_persist.push(reply);
    }

    pub fn answer_read(&mut self, id: u64, index: LogIndex) {
        self.pending().reads.push((id, index));
    }

    pub fn fail_reads(&mut self, ids: impl Iterator<Item = u64>) {
        let mut ids = ids.peekable();
        if ids.peek().is_some() {
            self.pending().failed_reads.extend(ids);
        }
    }

    pub fn want_snapshot(&mut self, peer: PeerId) {
        self.pending().snapshots_wanted.push(peer);
    }

    pub fn log_failed(&mut self, failure: LogReadError) {
        self.pending().log_failure = Some(failure);
    }

    fn is_empty(&self) -> bool {
        self.0.as_ref().is_none_or(|pending| pending.is_empty())
    }

    /// Moves everything into `ready`. With `keep`, keeps the capacity that `ready` had, because
    /// more will soon follow.
    fn hand_over(&mut self, ready: &mut Ready, keep: bool) {
        let Some(pending) = self.0.as_deref_mut() else { return };
        std::mem::swap(&mut ready.messages, &mut pending.messages);
        std::mem::swap(&mut ready.messages_after_persist, &mut pending.after_persist);
        if pending.has_rare() {
            std::mem::swap(&mut ready.reads, &mut pending.reads);
            std::mem::swap(&mut ready.failed_reads, &mut pending.failed_reads);
            std::mem::swap(&mut ready.snapshots_wanted, &mut pending.snapshots_wanted);
            ready.log_failure = pending.log_failure.take();
        }
        if !keep {
            self.0 = None;
        }
    }

    pub fn shrink(&mut self) {
        self.0 = self.0.take().filter(|pending| !pending.is_empty());
    }
}

impl Pending {
    fn is_empty(&self) -> bool {
        self.messages.is_empty() && self.after_persist.is_empty() && !self.has_rare()
    }

    fn has_rare(&self) -> bool {
        !(self.reads.is_empty()
            && self.failed_reads.is_empty()
            && self.snapshots_wanted.is_empty()
            && self.log_failure.is_none())
    }
}

fn accepted(body: &mut MessageBody) -> Option<(&mut LogIndex, &mut Stamp)> {
    match body {
        MessageBody::AppendReply { outcome: AppendOutcome::Accepted { match_index }, stamp } => {
            Some((match_index, stamp))
        }
        _ => None,
    }
}

fn accepted_in(body: &MessageBody) -> Option<(LogIndex, Stamp)> {
    match body {
        MessageBody::AppendReply { outcome: AppendOutcome::Accepted { match_index }, stamp } => {
            Some((*match_index, *stamp))
        }
        _ => None,
    }
}

impl<R: LogReader> Group<R> {
    /// The work to do now, if any. Allocates nothing if there is none. May be called again before
    /// the last Ready is durable.
    pub fn ready(&mut self) -> Option<Ready> {
        let mut ready = Ready::default();
        self.ready_into(&mut ready).then_some(ready)
    }

    /// Like [`Group::ready`], but fills a Ready that was carried out. Its memory is used again,
    /// because for small and frequent Readies allocation would cost more than the work itself.
    /// Returns whether there is anything to do. If not, `ready` is empty.
    pub fn ready_into(&mut self, ready: &mut Ready) -> bool {
        if ready.number != ReadyNumber(0) {
            ready.clear();
        }
        self.log.seal();
        self.serve_reads();
        self.replicate();
        let hard_state = self.hard_state();
        let state_changed = hard_state != self.reported_state;
        let role = RoleChange { role: self.role(), term: self.term, leader: self.leader() };
        let role_changed = role != self.reported_role;
        let frozen = self.installing.is_some();
        let snapshot_due = self.installing.as_ref().is_some_and(|one| one.data.is_some());
        let unwritten = self.log.has_unwritten();
        let emittable = !frozen && !self.holds_committed && self.log.has_emittable();
        if !(state_changed || role_changed || snapshot_due || unwritten || emittable)
            && self.outbox.is_empty()
        {
            return false;
        }

        let number = ReadyNumber(self.last_ready.0 + 1);
        self.last_ready = number;
        ready.number = number;
        if unwritten {
            self.log.write_begun(number.0);
            self.log.take_unwritten(&mut ready.entries);
        }
        if state_changed {
            let before = (self.reported_state.term, self.reported_state.vote);
            let vote_changed = (self.term, self.vote) != before;
            if vote_changed {
                self.vote_ready = number;
            }
            ready.must_sync = vote_changed;
            ready.hard_state = Some(hard_state);
            self.reported_state = hard_state;
        }
        ready.must_sync |= unwritten;
        if role_changed {
            ready.role = Some(role);
            self.reported_role = role;
        }
        // The order of entries to append and a log to replace would be unclear within one Ready, so
        // the snapshot waits for the next.
        if let Some(installing) = &mut self.installing
            && !unwritten
        {
            let data = installing.data.take();
            ready.snapshot = data.map(|data| (SnapshotMeta::clone(&installing.meta), data));
        }
        if emittable && let Err(failure) = self.log.take_committed(&mut ready.committed) {
            self.outbox.log_failed(failure);
        }
        self.outbox.hand_over(ready, self.busy);
        self.busy |= unwritten || emittable;
        true
    }
}
