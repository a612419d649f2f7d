//! The group's log on disk: what is read from it, appended to it, and dropped.

use std::collections::VecDeque;

use esker_engine::{LogBatch, LogEngine};
use esker_model::RegionId;
use esker_mutants::broken;
use esker_raft::{
    Entries, Entry, Group, HardState, LogIndex, LogReadError, LogReader, ReadyNumber, SnapshotMeta,
    Term, Time,
};

use crate::config::StoreConfig;
use crate::flusher::Points;
use crate::state::{Applied, RaftState, decode_entry, encode_entry};

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
    /// applied here. It goes as far as the key-value engine could not lose it any more, and waits
    /// for that.
    may_truncate: Option<(LogIndex, Term)>,
    /// How far the key-value engine has the region durably, as far as is known here, and the next
    /// that will be known: when this point is durable.
    durable: Option<Applied>,
    next_durable: Option<(u64, Applied)>,
    /// The sizes of the appends that the log writer has, in their order.
    under_way: VecDeque<(ReadyNumber, usize)>,
    under_way_bytes: usize,
    /// When to look again whether the log may be shortened.
    next_look: Time,
}

impl StoredLog {
    pub fn new(region: RegionId, state: RaftState, next_look: Time) -> Self {
        StoredLog {
            region,
            state,
            may_truncate: None,
            durable: None,
            next_durable: None,
            under_way: VecDeque::new(),
            under_way_bytes: 0,
            next_look,
        }
    }

    pub fn state(&self) -> &RaftState {
        &self.state
    }

    /// Whether this region may give more to the log writer, besides so many bytes that it will.
    pub fn has_room_beside(&self, more: usize, config: &StoreConfig) -> bool {
        self.under_way_bytes + more < config.region_log_backlog || broken!(BacklogIsBounded)
    }

    /// What was written for this Ready, and for all before it, is durable.
    pub fn written(&mut self, number: ReadyNumber) {
        while let Some((_, bytes)) = self.under_way.pop_front_if(|(of, _)| *of <= number) {
            self.under_way_bytes -= bytes;
        }
    }

    /// Writes what the group wants to be durable.
    pub fn write(
        &mut self,
        number: ReadyNumber,
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
            let bytes = entries.bytes();
            self.under_way.push_back((number, bytes));
            self.under_way_bytes += bytes;
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

    /// Looks how far the key-value engine has the region durably, which is applied up to `applied`.
    fn look_what_is_durable(&mut self, points: &Points, applied: Applied) {
        if let Some((_, known)) = self.next_durable.take_if(|(point, _)| points.is_durable(*point))
        {
            self.durable = Some(known);
        }
        if self.next_durable.is_none() {
            self.next_durable = Some((points.next(), applied));
        }
        if broken!(LogIsCutBehindDurableData) {
            self.durable = Some(applied);
        }
    }

    /// Forgets of the log's prefix that the group agreed to forget what the key-value engine could
    /// not lose any more. The region is applied up to `applied`. Returns the last entry that goes,
    /// if there was any.
    pub fn truncate(
        &mut self,
        points: &Points,
        applied: Applied,
        batch: &mut LogBatch,
    ) -> Option<(LogIndex, Term)> {
        let (wanted, term) = self.may_truncate?;
        self.look_what_is_durable(points, applied);
        let durable = self.durable?;
        let (index, term) = match durable.index < wanted {
            true => (durable.index, durable.term),
            false => (wanted, term),
        };
        if index == wanted {
            self.may_truncate = None;
        }
        let from = self.state.truncated.0.next();
        if index < from {
            return None;
        }
        self.state.truncated = (index, term);
        // With the turn's appends, behind those that are under way: a record
        // written past them would be replaced by an older one.
        batch.put_state(self.region.0, &self.state.encode());
        batch.cut(self.region.0, from.0, index.0 + 1);
        Some((index, term))
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
    stored: &StoredLog,
    applied: LogIndex,
    config: &StoreConfig,
) -> Option<(LogIndex, Term)> {
    // What was agreed on may wait until it is durable, and need not be agreed on again.
    let agreed = stored.may_truncate.map_or(LogIndex(0), |(index, _)| index.next());
    let first = group.first_index().max(agreed);
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
