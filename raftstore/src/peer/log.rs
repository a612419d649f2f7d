//! The group's log on disk: what is read from it, appended to it, and dropped.

use esker_engine::{KvEngine, LogBatch, LogEngine};
use esker_model::RegionId;
use esker_mutants::broken;
use esker_raft::{
    Entries, Entry, Group, HardState, LogIndex, LogReadError, LogReader, SnapshotMeta, Term, Time,
};

use crate::config::StoreConfig;
use crate::error::StoreError;
use crate::state::{self, RaftState, decode_entry, durable_applied, encode_entry};

/// Reads entries that the group no longer keeps in memory.
#[derive(Clone)]
pub struct GroupLog {
    log: LogEngine,
    region: RegionId,
}

impl GroupLog {
    pub fn new(log: LogEngine, region: RegionId) -> Self {
        GroupLog { log, region }
    }
}

impl LogReader for GroupLog {
    fn entries(
        &self,
        low: LogIndex,
        high: LogIndex,
        max_bytes: usize,
    ) -> Result<Vec<Entry>, LogReadError> {
        let failed = |reason: String| LogReadError::Failed { index: low, reason };
        let stored = self
            .log
            .entries(self.region.0, low.0, high.0, max_bytes)
            .map_err(|e| failed(e.to_string()))?;
        stored
            .into_iter()
            .map(|(index, bytes)| {
                decode_entry(self.region, index, bytes).map_err(|e| failed(e.to_string()))
            })
            .collect()
    }

    fn term(&self, index: LogIndex) -> Result<Option<Term>, LogReadError> {
        let failed = |reason: String| LogReadError::Failed { index, reason };
        let stored = self.log.entry(self.region.0, index.0).map_err(|e| failed(e.to_string()))?;
        stored
            .map(|bytes| decode_entry(self.region, index.0, bytes).map(|entry| entry.term))
            .transpose()
            .map_err(|e| failed(e.to_string()))
    }
}

/// What the disk will hold of the group's log, once it has all that was handed to the log writer.
pub struct StoredLog {
    region: RegionId,
    /// The group's record. It changes in a batch together with the entries that it speaks of, so
    /// that a crash leaves both or neither; `truncated` never lies behind `last`. Only a commit
    /// index that is new by itself is not written: it is learnt again.
    state: RaftState,
    /// The prefix that the group has agreed to forget, by the last command of that kind which was
    /// applied here. It waits until the key-value engine could not lose it any more, and then
    /// goes, as it does when it is found to be forgotten already.
    may_truncate: Option<(LogIndex, Term)>,
    /// When to look again whether the log may be shortened.
    next_look: Time,
}

impl StoredLog {
    pub fn new(region: RegionId, state: RaftState, next_look: Time) -> Self {
        StoredLog { region, state, may_truncate: None, next_look }
    }

    pub fn state(&self) -> &RaftState {
        &self.state
    }

    /// Writes what the group wants to be durable.
    pub fn write(
        &mut self,
        entries: &Entries,
        hard_state: Option<HardState>,
        must_sync: bool,
        batch: &mut LogBatch,
    ) {
        if let Some(hard_state) = hard_state {
            self.state.hard_state = hard_state;
        }
        let group = self.region.0;
        if let (Some(first), Some(last)) = (entries.first(), entries.last()) {
            let mut encoded = Vec::new();
            for entry in entries {
                encode_entry(entry, &mut encoded);
                batch.append(group, entry.index.0, &encoded);
            }
            if first.index <= self.state.last && last.index < self.state.last {
                batch.cut(group, last.index.0 + 1, self.state.last.0 + 1);
            }
            self.state.last = last.index;
        }
        // A commit index alone need not be durable: it is learnt again.
        let vote_is_due = must_sync && !broken!(VoteIsStoredAlone);
        if vote_is_due || !entries.is_empty() {
            batch.put_state(group, &self.state.encode());
        }
    }

    /// A snapshot's data is in place: what the log still holds is obsolete.
    pub fn replaced_by(&mut self, meta: &SnapshotMeta, batch: &mut LogBatch) {
        let last = self.state.last;
        self.state.truncated = (meta.index, meta.term);
        self.state.last = meta.index;
        self.state.hard_state.commit = self.state.hard_state.commit.max(meta.index);
        batch.cut(self.region.0, 0, last.0 + 1);
        batch.put_state(self.region.0, &self.state.encode());
    }

    /// The group has agreed to forget the log up to this entry.
    pub fn may_truncate(&mut self, index: LogIndex, term: Term) {
        self.may_truncate = Some((index, term));
    }

    /// Forgets the prefix of the log that the group agreed to forget and that the
    /// key-value engine could not lose any more. Returns the last entry of it, if there was any.
    pub fn truncate(
        &mut self,
        kv: &KvEngine,
        batch: &mut LogBatch,
    ) -> Result<Option<(LogIndex, Term)>, StoreError> {
        let Some((index, term)) = self.may_truncate else { return Ok(None) };
        if index <= self.state.truncated.0 {
            self.may_truncate = None;
            return Ok(None);
        }
        let durable = if broken!(LogIsCutBehindDurableData) {
            state::applied(kv, self.region)?
        } else {
            durable_applied(kv, self.region)?
        };
        if durable.is_none_or(|durable| durable.index < index) {
            return Ok(None);
        }
        let from = self.state.truncated.0.next();
        self.state.truncated = (index, term);
        // With the turn's appends, behind those that are under way: a record
        // written past them would be replaced by an older one.
        batch.put_state(self.region.0, &self.state.encode());
        batch.cut(self.region.0, from.0, index.0 + 1);
        self.may_truncate = None;
        Ok(Some((index, term)))
    }

    /// Whether the log waits for the key-value engine to become durable.
    pub fn waits_for_flush(&self) -> bool {
        self.may_truncate.is_some_and(|(index, _)| index > self.state.truncated.0)
    }

    /// Whether it is time to look at the log's length; then the next time is set.
    pub fn is_due(&mut self, now: Time, config: &StoreConfig) -> bool {
        let due = now >= self.next_look;
        if due {
            self.next_look = now + config.log_gc_interval;
        }
        due
    }

    /// When to look: a leader always does, another peer only for what it may forget.
    pub fn deadline(&self, leads: bool) -> Option<Time> {
        (leads || self.may_truncate.is_some()).then_some(self.next_look)
    }
}

/// Up to which entry everybody may forget the log, as its leader sees it: what all useful
/// followers hold. Nothing if that is not worth an entry.
pub fn dispensable(
    group: &Group<GroupLog>,
    applied: LogIndex,
    config: &StoreConfig,
) -> Option<(LogIndex, Term)> {
    let first = group.first_index();
    let last = group.last_index();
    let mut behind = applied;
    for (_, progress) in group.progress() {
        let lag = last.0.saturating_sub(progress.match_index.0);
        if lag <= config.log_gc_max_lag && progress.match_index < behind {
            behind = progress.match_index;
        }
    }
    // A snapshot that is on its way must find the entries that follow it.
    if behind.0 < first.0.saturating_add(config.log_gc_threshold) {
        return None;
    }
    let term = group.reader().term(behind).ok()??;
    Some((behind, term))
}
