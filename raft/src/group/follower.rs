//! What a leader sends, as its followers take it.

use bytes::Bytes;

use super::role::Role;
use super::{Group, Installing, StepError};
use crate::log::LogReader;
use crate::message::{AppendOutcome, CommitPoint, MessageBody, Stamp};
use crate::rules::broken;
use crate::types::{Entry, LogIndex, PeerId, SnapshotMeta, Term, Time};

impl<R: LogReader> Group<R> {
    /// A leader of the current term spoke.
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

    /// Raft §5.3. The acknowledgement speaks of the prefix that this message has
    /// verified against the leader, never of what else lies in the log, and
    /// leaves when that prefix is durable.
    pub(super) fn on_append(
        &mut self,
        from: PeerId,
        (mut prev_index, prev_term): (LogIndex, Term),
        mut entries: Vec<Entry>,
        commit: LogIndex,
        stamp: Stamp,
    ) -> Result<(), StepError> {
        self.check_entries(from, (prev_index, prev_term), &entries)?;
        if self.installing.is_some() {
            // The log is about to be replaced: what it says now means nothing,
            // and a refusal would ask for another snapshot.
            return Ok(());
        }
        let end = LogIndex(prev_index.0.saturating_add(entries.len() as u64));
        let committed = self.log.commit();
        if prev_index < committed {
            // Up to the commit index every leader has what we have.
            let known = entries.iter().take_while(|entry| entry.index <= committed).count();
            if let Some(edge) = entries[..known].last().filter(|entry| entry.index == committed)
                && !self.log.matches(edge.index, edge.term)?
            {
                let (here, index) = (self.me.peer, edge.index);
                return Err(StepError::CommittedConflict { here, from, index });
            }
            entries.drain(..known);
            prev_index = committed;
        } else if prev_index > self.log.last_index()
            || !(self.log.matches(prev_index, prev_term)? || broken!(AppendAfterEqualEntry))
        {
            let (hint_index, hint_term) = self.log.last_at_most(prev_index, prev_term)?;
            let outcome = AppendOutcome::Rejected { prev_index, hint_index, hint_term };
            let reply = self.message(from, MessageBody::AppendReply { outcome, stamp });
            self.outbox.send(reply);
            return Ok(());
        }
        for entry in entries {
            if entry.index <= self.log.last_index() {
                if self.log.matches(entry.index, entry.term)? && !broken!(TruncateOnConflictOnly) {
                    continue;
                }
                self.log.truncate(entry.index)?;
            }
            self.log.append(entry);
        }
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

    fn check_entries(
        &self,
        from: PeerId,
        prev: (LogIndex, Term),
        entries: &[Entry],
    ) -> Result<(), StepError> {
        let (mut index, mut term) = prev;
        for entry in entries {
            if entry.index.0 == u64::MAX || entry.index != index.next() || entry.term < term {
                return Err(StepError::Malformed { from, what: "append" });
            }
            (index, term) = (entry.index, entry.term);
        }
        if term > self.term {
            return Err(StepError::Malformed { from, what: "append" });
        }
        Ok(())
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
                // The leader says no more than this peer has acknowledged. Who
                // lost that on a disk may have lost votes too, and must not go on.
                return Err(StepError::LostEntries { here: self.me.peer, from, commit, last });
            }
            self.log.commit_to(commit.min(last));
        }
        self.rest();
        let reply = self.message(from, MessageBody::HeartbeatReply { stamp });
        self.outbox.send(reply);
        Ok(())
    }

    /// The leader has committed as far as this, if we have it. Anything else it
    /// will say again.
    pub(super) fn on_commit(&mut self, commit: CommitPoint) -> Result<(), StepError> {
        Ok(self.learn_commit(commit)?)
    }

    /// Raft §7. The data is here; the driver is asked to install it, unless the
    /// log already reaches that far.
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
            // One at a time. The leader hears of the one under way when it is
            // installed, and asks for another if that was not enough.
            return Ok(());
        }
        if meta.index <= self.log.commit() {
            self.acknowledge_snapshot(from, self.log.commit());
            return Ok(());
        }
        if self.log.matches(meta.index, meta.term)? {
            // What a snapshot contains is committed.
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

    /// The driver has replaced its log and its state machine by the snapshot of
    /// [`crate::Ready::snapshot`] at `index`, durably.
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
