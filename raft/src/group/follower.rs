//! How a follower handles a leader's messages.

use bytes::Bytes;

use super::role::Role;
use super::{Group, Installing, StepError};
use crate::entries::Entries;
use crate::log::{LogReadError, LogReader};
use crate::message::{AppendOutcome, CommitPoint, MessageBody, Stamp};
use crate::rules::broken;
use crate::types::{LogIndex, Payload, PeerId, SnapshotMeta, Term, Time};

impl<R: LogReader> Group<R> {
    /// Follows `from`, which sent a message as leader of the current term.
    pub(super) fn hear_leader(&mut self, from: PeerId) -> Result<(), StepError> {
        if let Some(leader) = self.leader()
            && leader != from
        {
            return Err(StepError::TwoLeaders { from, leader, term: self.term });
        }
        self.become_follower(self.term, Some(from));
        self.put_off_election();
        Ok(())
    }

    /// Handles an append (Raft §5.3). The acknowledgement covers the prefix that this message has
    /// verified against the leader, and nothing else in the log. It is sent when that prefix is
    /// durable.
    pub(super) fn on_append(
        &mut self,
        from: PeerId,
        (mut prev_index, prev_term): (LogIndex, Term),
        mut entries: Entries,
        commit: LogIndex,
        stamp: Stamp,
    ) -> Result<(), StepError> {
        let change = self.check_entries(from, (prev_index, prev_term), &entries)?;
        if self.installing.is_some() {
            // The log is about to be replaced, so its content means nothing now, and a refusal
            // would ask for another snapshot.
            return Ok(());
        }
        let end = LogIndex(prev_index.0.saturating_add(entries.len() as u64));
        let committed = self.log.commit();
        if prev_index < committed {
            // Up to our commit index, every leader's log equals ours.
            let edge = entries.iter().find(|entry| entry.index == committed);
            if let Some(edge) = edge
                && !self.log.matches(edge.index, edge.term)?
            {
                let (here, index) = (self.me.peer, edge.index);
                return Err(StepError::CommittedConflict { here, from, index });
            }
            entries = entries.since(committed.next());
            prev_index = committed;
        } else if prev_index > self.log.last_index()
            || !(self.log.matches(prev_index, prev_term)? || broken!(AppendAfterEqualEntry))
        {
            let (hint_index, hint_term) = self.log.last_at_most(prev_index, prev_term)?;
            let outcome = AppendOutcome::Rejected { prev_index, hint_index, hint_term };
            self.answer_as_follower(from, MessageBody::AppendReply { outcome, stamp });
            return Ok(());
        }
        self.take_entries(entries, change)?;
        let match_index = end.max(prev_index);
        let verified =
            if broken!(CommitVerifiedPrefix) { self.log.last_index() } else { match_index };
        self.log.commit_to(commit.min(verified));
        let outcome = AppendOutcome::Accepted { match_index };
        let reply = self.message(from, MessageBody::AppendReply { outcome, stamp });
        if broken!(AcknowledgeAfterSync) {
            self.outbox.send(reply);
            return Ok(());
        }
        self.outbox.acknowledge(reply);
        Ok(())
    }

    /// Appends the entries that the log does not have. Entries in the log that contradict them are
    /// cut off first.
    fn take_entries(
        &mut self,
        entries: Entries,
        change: Option<LogIndex>,
    ) -> Result<(), LogReadError> {
        let last = self.log.last_index();
        let mut new = last.next();
        if entries.first().is_none_or(|first| first.index == new) {
            self.log.extend(entries, change);
            return Ok(());
        }
        for entry in entries.iter().take_while(|entry| entry.index <= last) {
            if !self.log.matches(entry.index, entry.term)? || broken!(TruncateOnConflictOnly) {
                new = entry.index;
                self.log.truncate(new)?;
                break;
            }
        }
        self.log.extend(entries.since(new), change);
        Ok(())
    }

    /// Checks that the entries continue `prev` and each other. Returns the index of the last change
    /// of members among them.
    fn check_entries(
        &self,
        from: PeerId,
        prev: (LogIndex, Term),
        entries: &Entries,
    ) -> Result<Option<LogIndex>, StepError> {
        let ((mut index, mut term), mut change) = (prev, None);
        for entry in entries.iter() {
            if entry.index != index.next() || entry.term < term {
                return Err(StepError::Malformed { from, what: "append" });
            }
            (index, term) = (entry.index, entry.term);
            if matches!(entry.payload, Payload::Change(_)) {
                change = Some(index);
            }
        }
        if term > self.term {
            return Err(StepError::Malformed { from, what: "append" });
        }
        Ok(change)
    }

    pub(super) fn on_heartbeat(
        &mut self,
        from: PeerId,
        commit: LogIndex,
        stamp: Stamp,
    ) -> Result<(), StepError> {
        if self.installing.is_none() {
            let last = self.log.last_index();
            if commit > last && !broken!(HeartbeatCommitCapped) {
                // The leader sends no commit index beyond what this peer has acknowledged. So this
                // peer's disk has lost entries. It may have lost votes too, and the peer must not
                // go on.
                return Err(StepError::LostEntries { here: self.me.peer, from, commit, last });
            }
            self.log.commit_to(commit.min(last));
        }
        self.rest();
        self.answer_as_follower(from, MessageBody::HeartbeatReply { stamp });
        Ok(())
    }

    /// A reply is a promise to elect no other leader for a while. After a restart, a peer without
    /// any record that it ever ran would not know of its promise. So the reply waits, if necessary,
    /// until there is such a record.
    fn answer_as_follower(&mut self, to: PeerId, body: MessageBody) {
        let reply = self.message(to, body);
        if self.is_vote_durable() || broken!(PromiseAfterFirstRecord) {
            self.outbox.send(reply);
        } else {
            self.outbox.send_after_persist(reply);
        }
    }

    /// Commits up to `commit` if our log has that entry. Otherwise the next append or heartbeat
    /// carries the commit index again.
    pub(super) fn on_commit(&mut self, commit: CommitPoint) -> Result<(), StepError> {
        Ok(self.learn_commit(commit)?)
    }

    /// Handles a snapshot (Raft §7). The data is here already. The next Ready asks the driver to
    /// install it, unless the log already reaches that far.
    pub(super) fn on_install_snapshot(
        &mut self,
        from: PeerId,
        meta: Box<SnapshotMeta>,
        data: Bytes,
    ) -> Result<(), StepError> {
        if meta.configuration.validate().is_err() || meta.index.0 == 0 || meta.term > self.term {
            return Err(StepError::Malformed { from, what: "snapshot" });
        }
        if self.installing.is_some() {
            // One snapshot is installed at a time. The leader gets a reply when the current one is
            // installed, and sends another if that was not enough.
            return Ok(());
        }
        if meta.index <= self.log.commit() {
            self.acknowledge_snapshot(from, self.log.commit());
            return Ok(());
        }
        if self.log.matches(meta.index, meta.term)? {
            // Everything in a snapshot is committed.
            self.log.commit_to(meta.index);
            self.acknowledge_snapshot(from, meta.index);
            return Ok(());
        }
        if broken!(SnapshotAckAfterInstall) {
            self.acknowledge_snapshot(from, meta.index);
        }
        self.installing = Some(Box::new(Installing { meta, data: Some(data) }));
        Ok(())
    }

    /// Reports that the driver has durably replaced its log and its state machine by the snapshot
    /// of [`crate::Ready::snapshot`] at `index`.
    pub fn snapshot_installed(&mut self, now: Time, index: LogIndex) {
        self.advance(now);
        if self.installing.as_ref().is_none_or(|installing| installing.meta.index != index) {
            return;
        }
        let Some(installed) = self.installing.take() else { return };
        let meta = installed.meta;
        self.log.reset(meta.index, meta.term);
        self.configuration = meta.configuration;
        if let Role::Follower(follower) = &self.role
            && let Some(leader) = follower.leader
        {
            self.acknowledge_snapshot(leader, index);
        }
    }

    fn acknowledge_snapshot(&mut self, to: PeerId, match_index: LogIndex) {
        let outcome = AppendOutcome::Accepted { match_index };
        let stamp = Stamp::default();
        let reply = self.message(to, MessageBody::AppendReply { outcome, stamp });
        self.outbox.acknowledge(reply);
    }
}
