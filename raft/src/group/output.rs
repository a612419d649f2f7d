//! Collecting what is wanted, and handing it out as one [`Ready`].

use super::Group;
use crate::log::{LogReadError, LogReader};
use crate::message::{AppendOutcome, Message, MessageBody, Stamp};
use crate::ready::{Ready, ReadyNumber, RoleChange};
use crate::types::{LogIndex, PeerId, SnapshotMeta};

/// What has piled up since the last Ready. Boxed: a group at rest has nothing here.
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
    fn pending(&mut self) -> &mut Pending {
        self.0.get_or_insert_default()
    }

    pub fn send(&mut self, message: Message) {
        self.pending().messages.push(message);
    }

    pub fn send_after_persist(&mut self, message: Message) {
        self.pending().after_persist.push(message);
    }

    /// Sends an acknowledgement. Of several to one leader in one Ready only the
    /// furthest counts, so a burst of appends is answered once.
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

    /// Takes what is there, and keeps the box if there will soon be more.
    fn take(&mut self, keep: bool) -> Pending {
        if keep {
            return self.0.as_deref_mut().map(std::mem::take).unwrap_or_default();
        }
        self.0.take().map(|pending| *pending).unwrap_or_default()
    }

    pub fn shrink(&mut self) {
        self.0 = self.0.take().filter(|pending| !pending.is_empty());
    }
}

impl Pending {
    fn is_empty(&self) -> bool {
        self.messages.is_empty()
            && self.after_persist.is_empty()
            && self.reads.is_empty()
            && self.failed_reads.is_empty()
            && self.snapshots_wanted.is_empty()
            && self.log_failure.is_none()
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
    /// What is to be done now, if anything; nothing is allocated if not. May be
    /// called again before the last Ready is durable.
    pub fn ready(&mut self) -> Option<Ready> {
        self.serve_reads();
        self.replicate();
        let hard_state = self.hard_state();
        let state_changed = hard_state != self.reported_state;
        let role = RoleChange { role: self.role(), term: self.term, leader: self.leader() };
        let role_changed = role != self.reported_role;
        let frozen = self.installing.is_some();
        let snapshot_due = self.installing.as_ref().is_some_and(|one| one.data.is_some());
        let idle = !state_changed
            && !role_changed
            && !snapshot_due
            && self.outbox.is_empty()
            && !self.log.has_unwritten()
            && (frozen || !self.log.has_emittable());
        if idle {
            return None;
        }

        let number = ReadyNumber(self.last_ready.0 + 1);
        self.last_ready = number;
        let entries = if self.log.has_unwritten() {
            self.log.write_begun(number.0);
            self.log.take_unwritten()
        } else {
            Vec::new()
        };
        let (term, vote) = (hard_state.term, hard_state.vote);
        let vote_changed = (term, vote) != (self.reported_state.term, self.reported_state.vote);
        if vote_changed {
            self.vote_ready = number;
        }
        self.reported_state = hard_state;
        self.reported_role = role;
        // Entries to append and a log to replace in one Ready would leave their
        // order open: the snapshot waits for the next.
        let snapshot = match &mut self.installing {
            Some(installing) if entries.is_empty() => {
                let data = installing.data.take();
                data.map(|data| (SnapshotMeta::clone(&installing.meta), data))
            }
            _ => None,
        };
        let committed = if frozen { Ok(Vec::new()) } else { self.log.take_committed() };
        let committed = committed.unwrap_or_else(|failure| {
            self.outbox.log_failed(failure);
            Vec::new()
        });
        let outbox = self.outbox.take(self.busy);
        self.busy |= !entries.is_empty() || !committed.is_empty();
        Some(Ready {
            number,
            hard_state: state_changed.then_some(hard_state),
            must_sync: vote_changed || !entries.is_empty(),
            entries,
            snapshot,
            messages: outbox.messages,
            messages_after_persist: outbox.after_persist,
            committed,
            reads: outbox.reads,
            failed_reads: outbox.failed_reads,
            snapshots_wanted: outbox.snapshots_wanted,
            role: role_changed.then_some(role),
            log_failure: outbox.log_failure,
        })
    }
}
