//! Applying: committed entries become writes of the key-value engine.
//!
//! An apply worker takes what waits for all its regions and merges it into few
//! engine writes. Each entry is applied exactly once: the applied index is
//! written in the batch that holds the entry's effects. Whoever waits for a
//! command is answered when that batch is written and not before, and every
//! command is checked again against the region as it is at this entry.

mod admin;
mod remembered;

pub(crate) use admin::{Installation, bury, clear_range};
pub(crate) use remembered::decode_snapshot;
pub use remembered::records as remembered_records;

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use crossbeam_channel::{Receiver, Sender};
use esker_engine::{KvBatch, KvEngine, LogEngine};
use esker_model::{Region, RegionId, StoreId};
use esker_mutants::broken;
use esker_raft::{ConfChange, Entries, Payload, PeerId, SnapshotMeta};
use esker_rpc::display_key;
use prost::Message as _;
use remembered::{Remembered, Verdict};

use crate::backlog::Backlog;
use crate::command::{
    Body, Command, CommandError, CompareAndSwap, Mutation, Swap, TaggedCommand, Write,
};
use crate::config::{APPLY_BATCH_BYTES, APPLY_TURN, StoreConfig};
use crate::error::{RequestError, StoreError};
use crate::journal::{Journal, Note};
use crate::message::{
    AdminResult, AppliedNotice, ApplyTask, Effect, Notice, Proposal, Reply, SwapResult, Waiter,
    Waiters, WriteResult,
};
use crate::ranges::Ranges;
use crate::raw_value::RawValue;
use crate::region::configuration;
use crate::router::worker_of;
use crate::snapshot::RegionSnapshotSource;
use crate::state::{self, Applied, bounds};
use crate::worker::Shared;

/// A region as far as its entries are applied.
struct Progress {
    region: Region,
    generation: u64,
    applied: Applied,
    /// The applied index is behind what the batch holds.
    dirty: bool,
    /// The tagged commands that were applied; read when the next one comes.
    remembered: Option<Remembered>,
    /// The turn in which that was last needed.
    remembered_in: u64,
}

/// Answers that wait for the batch to be written.
enum Answer {
    Write(Reply<WriteResult>, Result<WriteResult, RequestError>),
    Admin(Reply<AdminResult>, Result<AdminResult, RequestError>),
}

pub struct Applier {
    store: StoreId,
    kv: KvEngine,
    log: LogEngine,
    ranges: Arc<Ranges>,
    tasks: Receiver<ApplyTask>,
    notices: Vec<Sender<Notice>>,
    /// What is in `tasks`, and what was taken and is not written yet.
    backlog: Arc<Backlog>,
    taken: usize,
    regions: HashMap<RegionId, Progress>,
    batch: KvBatch,
    journal: Arc<Journal>,
    /// What the journal is told before the answers and notices leave. It is in the engine, or in
    /// the batch.
    notes: Vec<Note>,
    answers: Vec<Answer>,
    /// Regions with entries in the batch whose workers have not been told.
    touched: Vec<AppliedNotice>,
    /// See [`crate::config::MAX_REMEMBERED_WRITES`].
    remembered_writes: usize,
    /// See [`crate::config::MAX_REMEMBERED_IN_MEMORY`].
    remembered_in_memory: usize,
    /// Tagged commands that all regions together hold in memory.
    in_memory: usize,
    turns: u64,
}

impl Applier {
    pub(crate) fn new(shared: &Shared, tasks: Receiver<ApplyTask>, backlog: Arc<Backlog>) -> Self {
        let StoreConfig { remembered_writes, remembered_in_memory, .. } = shared.config;
        Applier {
            store: shared.store,
            kv: shared.kv.clone(),
            log: shared.log.clone(),
            ranges: shared.ranges.clone(),
            tasks,
            notices: shared.notices.clone(),
            backlog,
            taken: 0,
            regions: HashMap::new(),
            batch: KvBatch::new(),
            journal: shared.journal.clone(),
            notes: Vec::new(),
            answers: Vec::new(),
            touched: Vec::new(),
            remembered_writes,
            remembered_in_memory,
            in_memory: 0,
            turns: 0,
        }
    }

    pub(crate) fn channel(&self) -> &Receiver<ApplyTask> {
        &self.tasks
    }

    /// Applies all that waits; tells whether there was anything.
    ///
    /// # Errors
    /// When the disk fails, or an entry cannot be read: the store must stop.
    pub fn turn(&mut self) -> Result<bool, StoreError> {
        match self.tasks.try_recv() {
            Ok(first) => self.apply_with(first).map(|()| true),
            Err(_) => Ok(false),
        }
    }

    /// Applies `first` and what waits behind it.
    pub fn apply_with(&mut self, first: ApplyTask) -> Result<(), StoreError> {
        self.take(first)?;
        for _ in 1..APPLY_TURN {
            let Ok(task) = self.tasks.try_recv() else { break };
            self.take(task)?;
        }
        self.flush()
    }

    fn take(&mut self, task: ApplyTask) -> Result<(), StoreError> {
        match task {
            ApplyTask::Register { region, generation, applied } => {
                let id = region.id;
                let progress = Progress {
                    region,
                    generation,
                    applied,
                    dirty: false,
                    remembered: None,
                    remembered_in: 0,
                };
                let former = self.regions.insert(id, progress).and_then(|p| p.remembered);
                self.in_memory -= former.map_or(0, |known| known.len());
            }
            ApplyTask::Entries { region, generation, entries, proposals } => {
                self.taken += entries.bytes();
                self.apply_entries(region, generation, entries, proposals)?;
            }
            ApplyTask::TakeSnapshot { region, generation, to } => {
                if !broken!(SnapshotHasWhatItSays) {
                    self.flush()?;
                }
                self.take_snapshot(region, generation, to)?;
            }
            ApplyTask::Install { region, generation, meta, descriptor, remembered, files } => {
                self.flush()?;
                self.install(region, generation, meta, descriptor, &remembered, &files)?;
            }
            ApplyTask::Clear { region, range } => {
                self.flush()?;
                self.clear(region, range)?;
            }
            ApplyTask::Destroy { region, generation, peer, tombstone_conf_ver } => {
                self.flush()?;
                self.destroy(region, generation, peer, tombstone_conf_ver)?;
            }
        }
        Ok(())
    }

    fn tell(&self, region: RegionId, notice: Notice) {
        // A worker that is gone is stopping, and so is this one.
        let _ = self.notices[worker_of(region, self.notices.len())].send(notice);
    }

    /// Writes the batch, and the journal where regions changed; then answers, and tells the
    /// workers.
    fn flush(&mut self) -> Result<(), StoreError> {
        self.write_batch()?;
        if !self.notes.is_empty() {
            let notes = std::mem::take(&mut self.notes);
            self.journal.write(&notes)?;
        }
        for answer in self.answers.drain(..) {
            // A caller who has gone needs no answer.
            match answer {
                Answer::Write(reply, result) => {
                    let _ = reply.send(result);
                }
                Answer::Admin(reply, result) => {
                    let _ = reply.send(result);
                }
            }
        }
        for notice in std::mem::take(&mut self.touched) {
            self.tell(notice.region, Notice::Applied(notice));
        }
        let notices = &self.notices;
        self.backlog.done(std::mem::take(&mut self.taken), |worker| {
            let _ = notices[worker].send(Notice::Room);
        });
        self.turns += 1;
        if self.in_memory > self.remembered_in_memory {
            self.unload();
        }
        Ok(())
    }

    /// Lets go of what regions remember that have had no tagged command for longest. All of it is
    /// in the engine: the batch was just written.
    fn unload(&mut self) {
        let mut loaded: Vec<&mut Progress> =
            self.regions.values_mut().filter(|progress| progress.remembered.is_some()).collect();
        loaded.sort_unstable_by_key(|progress| progress.remembered_in);
        for progress in loaded {
            // Some more than needed, so that the next turns need not do the same.
            if self.in_memory <= self.remembered_in_memory / 4 * 3 {
                break;
            }
            self.in_memory -= progress.remembered.take().map_or(0, |known| known.len());
        }
    }

    /// What a region remembers, to be put back; from the engine where it is not in memory.
    fn take_remembered(&mut self, progress: &mut Progress) -> Result<Remembered, StoreError> {
        progress.remembered_in = self.turns;
        let known = match progress.remembered.take() {
            Some(known) => {
                self.in_memory -= known.len();
                known
            }
            None if broken!(TagsOutliveRestart) => Remembered::default(),
            None => Remembered::load(&self.kv.snapshot(), progress.region.id)?,
        };
        Ok(known)
    }

    fn put_remembered(&mut self, progress: &mut Progress, known: Remembered) {
        self.in_memory += known.len();
        progress.remembered = Some(known);
    }

    fn write_batch(&mut self) -> Result<(), StoreError> {
        for notice in &self.touched {
            if let Some(progress) = self.regions.get_mut(&notice.region)
                && progress.dirty
            {
                state::put_applied(&mut self.batch, notice.region, progress.applied);
                progress.dirty = false;
            }
        }
        if !self.batch.is_empty() {
            let began = std::time::Instant::now();
            self.kv.write(&self.batch)?;
            metrics::histogram!("esker_apply_write_seconds").record(began.elapsed());
            self.batch.clear();
        }
        Ok(())
    }

    fn apply_entries(
        &mut self,
        region: RegionId,
        generation: u64,
        entries: Entries,
        proposals: Vec<Proposal>,
    ) -> Result<(), StoreError> {
        // Tasks of an earlier peer of this region may still come.
        let is_current = |progress: &Progress| progress.generation == generation;
        if !self.regions.get(&region).is_some_and(is_current) {
            return Ok(());
        }
        let Some(mut progress) = self.regions.remove(&region) else { return Ok(()) };
        let mut notice = AppliedNotice {
            region,
            generation,
            applied: progress.applied,
            effects: Vec::new(),
            written_bytes: 0,
            written_keys: 0,
        };
        let mut proposals = proposals.into_iter().peekable();
        for entry in &entries {
            assert_eq!(
                entry.index,
                progress.applied.index.next(),
                "region {region} must apply its entries one after another"
            );
            let waiters =
                proposals.next_if(|proposal| proposal.index == entry.index).map(|p| p.waiters);
            let at = Applied { index: entry.index, term: entry.term };
            match &entry.payload {
                Payload::Noop => {}
                Payload::Command(command) => {
                    let command = decode(region, at, command.clone())?;
                    self.apply_command(&mut progress, at, command, waiters, &mut notice)?;
                }
                Payload::Change(change) => {
                    self.apply_change(
                        &mut progress,
                        at,
                        ConfChange::clone(change),
                        waiters,
                        &mut notice,
                    )?;
                }
            }
            progress.applied = at;
            progress.dirty = true;
            notice.applied = at;
            if self.batch.bytes() >= APPLY_BATCH_BYTES {
                self.write_batch_with(&mut progress)?;
            }
        }
        self.regions.insert(region, progress);
        match self.touched.iter_mut().find(|earlier| earlier.region == region) {
            Some(earlier) => {
                earlier.applied = notice.applied;
                earlier.effects.append(&mut notice.effects);
                earlier.written_bytes += notice.written_bytes;
                earlier.written_keys += notice.written_keys;
            }
            None => self.touched.push(notice),
        }
        Ok(())
    }

    fn apply_command(
        &mut self,
        progress: &mut Progress,
        at: Applied,
        command: Command,
        waiters: Option<Waiters>,
        notice: &mut AppliedNotice,
    ) -> Result<(), StoreError> {
        let Command { epoch, body } = command;
        let write = match body {
            Body::Write(write) => write,
            admin => return self.apply_admin(progress, at, epoch, admin, waiters, notice),
        };
        if !epoch.is_same_range(progress.region.epoch) && !broken!(EpochIsCheckedAtApply) {
            // The region was split between proposal and commit: on every replica alike.
            let error = RequestError::epoch_not_match(&progress.region);
            self.answer_writes(waiters, &mut |_| Err(error.clone()));
            return Ok(());
        }
        if !write.tagged.is_empty() {
            return self.apply_tagged(progress, at, &write, waiters, notice);
        }
        let swap = self.apply_mutations(progress, &write.mutations, notice)?;
        let index = at.index;
        self.answer_writes(waiters, &mut |_| Ok(WriteResult { swap: swap.clone(), index }));
        Ok(())
    }

    /// As the rest of [`Self::apply_command`], for an entry with commands that must not take
    /// effect twice: see [`remembered`].
    fn apply_tagged(
        &mut self,
        progress: &mut Progress,
        at: Applied,
        command: &Write,
        waiters: Option<Waiters>,
        notice: &mut AppliedNotice,
    ) -> Result<(), StoreError> {
        let id = progress.region.id;
        let mut known = self.take_remembered(progress)?;
        let mut swap = None;
        let mut verdicts = Vec::with_capacity(command.tagged.len());
        let mut next = 0;
        for tagged in &command.tagged {
            let first = tagged.first as usize;
            self.apply_mutations(progress, &command.mutations[next..first], notice)?;
            next = first + tagged.count as usize;
            let verdict = known.judge(tagged);
            if verdict == Verdict::New {
                let mutations = &command.mutations[first..next];
                swap = self.apply_mutations(progress, mutations, notice)?;
                known.add(at.index, command.now_s, tagged);
            }
            count_verdict(verdict);
            verdicts.push(verdict);
        }
        self.apply_mutations(progress, &command.mutations[next..], notice)?;
        known.finish(&mut self.batch, id, at.index, self.remembered_writes);
        self.put_remembered(progress, known);
        let is_swap = |tagged: &TaggedCommand| command.mutations[tagged.first as usize].is_swap();
        let index = at.index;
        self.answer_writes(waiters, &mut |waiter| {
            let verdict = waiter.tagged.map(|number| (verdicts[number], &command.tagged[number]));
            match verdict {
                Some((Verdict::Forgotten, _)) => {
                    Err(RequestError::Forgotten { region: id, applied: index })
                }
                // It has happened, but what it found is not remembered.
                Some((Verdict::Duplicate, tagged)) if is_swap(tagged) => {
                    Err(RequestError::Undetermined(id))
                }
                _ => Ok(WriteResult { swap: swap.clone(), index }),
            }
        });
        Ok(())
    }

    fn answer_writes(
        &mut self,
        waiters: Option<Waiters>,
        result: &mut dyn FnMut(&Waiter) -> Result<WriteResult, RequestError>,
    ) {
        let Some(Waiters::Write(waiters)) = waiters else { return };
        self.answers.extend(waiters.into_iter().map(|waiter| {
            let result = result(&waiter);
            Answer::Write(waiter.reply, result)
        }));
    }

    /// Applies what one command changes. Returns what became of it where it is a compare-and-swap,
    /// which is alone in its command.
    fn apply_mutations(
        &mut self,
        progress: &mut Progress,
        mutations: &[Mutation],
        notice: &mut AppliedNotice,
    ) -> Result<Option<SwapResult>, StoreError> {
        for mutation in mutations {
            match mutation {
                Mutation::Put { cf, key, value } => {
                    notice.written_bytes += (key.len() + value.len()) as u64;
                    self.batch.put(*cf, key, value);
                }
                Mutation::Delete { cf, key } => {
                    notice.written_bytes += key.len() as u64;
                    self.batch.delete(*cf, key);
                }
                Mutation::DeleteRange { cf, range } => {
                    let (start, end) = bounds(range);
                    let end = end.filter(|_| !broken!(RangeEndsAtItsEnd));
                    self.batch.delete_range(*cf, start, end);
                }
                Mutation::CompareAndSwap(swap) => {
                    return self.compare_and_swap(progress, swap, notice).map(Some);
                }
            }
            notice.written_keys += 1;
        }
        Ok(None)
    }

    /// Decided here and on every replica alike: by the data as of the entry before
    /// this one, and by the clock reading that travels in the command.
    ///
    /// A compare-and-swap is alone in its entry. Were it not, the batch that must
    /// be written before it could hold half of an entry, and a replica that lost
    /// the other half in a crash would decide the first half again on other data.
    fn compare_and_swap(
        &mut self,
        progress: &mut Progress,
        swap: &CompareAndSwap,
        notice: &mut AppliedNotice,
    ) -> Result<SwapResult, StoreError> {
        if broken!(SwapCountsWithItsEffect) {
            progress.applied.index = progress.applied.index.next();
            progress.dirty = true;
        }
        self.write_batch_with(progress)?;
        let CompareAndSwap { cf, key, expected, then, now_s } = swap;
        let previous = match self.kv.get(*cf, key)? {
            Some(stored) => {
                Some(RawValue::decode(stored.into()).map_err(|e| StoreError::Corrupt {
                    what: format!("the value of key {}", display_key(key)),
                    why: e.to_string(),
                })?)
            }
            None => None,
        };
        let previous =
            previous.filter(|value| value.is_live(*now_s) || broken!(SwapSeesNoExpiredValue));
        let swapped = previous.as_ref().map(|found| &found.value) == expected.as_ref();
        match then {
            Swap::Delete if swapped => self.batch.delete(*cf, key),
            Swap::Put { value, expires_at } if swapped => {
                self.batch.put(*cf, key, &RawValue::new(value.clone(), *expires_at).encode());
                notice.written_bytes += (key.len() + value.len()) as u64;
                notice.written_keys += 1;
            }
            Swap::Delete | Swap::Put { .. } => {}
        }
        Ok(SwapResult { swapped, previous })
    }

    /// Writes the batch in the middle of a region's entries, with how far the region is.
    fn write_batch_with(&mut self, progress: &mut Progress) -> Result<(), StoreError> {
        if progress.dirty {
            state::put_applied(&mut self.batch, progress.region.id, progress.applied);
            progress.dirty = false;
        }
        self.write_batch()
    }

    /// Applies entries that were applied before a crash. Returns what they did to the shape of
    /// regions. Nobody waits for them, and the journal has them.
    pub(crate) fn replay(
        &mut self,
        region: &Region,
        applied: Applied,
        entries: Entries,
    ) -> Result<Vec<Effect>, StoreError> {
        let id = region.id;
        self.take(ApplyTask::Register { region: region.clone(), generation: 0, applied })?;
        self.apply_entries(id, 0, entries, Vec::new())?;
        self.write_batch()?;
        self.notes.clear();
        Ok(self.touched.drain(..).flat_map(|notice| notice.effects).collect())
    }

    fn take_snapshot(
        &mut self,
        region: RegionId,
        generation: u64,
        to: PeerId,
    ) -> Result<(), StoreError> {
        let Some(progress) = self.regions.get(&region).filter(|p| p.generation == generation)
        else {
            return Ok(());
        };
        let view = self.kv.snapshot();
        let data = match &progress.remembered {
            Some(known) => known.snapshot_data(&progress.region),
            None => Remembered::load(&view, region)?.snapshot_data(&progress.region),
        };
        let meta = SnapshotMeta {
            index: progress.applied.index,
            term: progress.applied.term,
            configuration: configuration(&progress.region),
        };
        let data = data.encode_to_vec().into();
        let taken = RegionSnapshotSource::new(progress.region.clone(), meta, data, view);
        self.tell(region, Notice::SnapshotTaken { region, generation, to, taken: Box::new(taken) });
        Ok(())
    }
}

fn count_verdict(verdict: Verdict) {
    match verdict {
        Verdict::New => {}
        Verdict::Duplicate => {
            metrics::counter!("esker_apply_duplicate_writes_total").increment(1);
        }
        Verdict::Forgotten => {
            metrics::counter!("esker_apply_forgotten_writes_total").increment(1);
        }
    }
}

fn decode(region: RegionId, at: Applied, command: Bytes) -> Result<Command, StoreError> {
    let what = || format!("entry {} of region {region}", at.index);
    Command::decode(command).map_err(|error| match error {
        CommandError::Format { found, known } => StoreError::Format { what: what(), found, known },
        error => StoreError::Corrupt { what: what(), why: error.to_string() },
    })
}
