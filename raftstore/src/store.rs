//! A store put together: its engines, its workers, log writer and apply workers.
//!
//! [`Store::open`] restores every region from disk and returns the parts without
//! running them. [`Store::start`] gives each a thread; a test that wants to decide
//! what happens when takes the parts and calls their `turn`s itself.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use crossbeam_channel::{Receiver, bounded, unbounded};
use esker_engine::{KvEngine, LogBatch, LogEngine};
use esker_model::{Clock, Region, RegionId, StoreId};
use esker_mutants::broken;
use esker_raft::{LogIndex, PeerId, Term};
use tokio::sync::SetOnce;

use crate::apply::{Applier, bury, complete_installation};
use crate::config::{APPLY_QUEUE, LOG_QUEUE, StoreConfig, WORKER_INBOX};
use crate::error::StoreError;
use crate::log_writer::LogWriter;
use crate::message::{ApplyTask, Input, Notice};
use crate::outbox::Outbox;
use crate::peer::PeerSeed;
use crate::read::ReadDelegates;
use crate::router::{StoreHandle, worker_of};
use crate::shell::RunningStore;
use crate::snapshot::ReceivedSnapshot;
use crate::state::{self, Applied, RaftState, RegionState, decode_entry};
use crate::worker::{Shared, Worker};

/// What a store is made of, before it runs.
pub struct Parts {
    pub store: StoreId,
    pub kv: KvEngine,
    pub log: LogEngine,
    /// Where received snapshots wait; must be empty of all but what an
    /// interrupted installation left.
    pub snapshots: PathBuf,
    pub config: StoreConfig,
    pub outbox: Arc<dyn Outbox>,
    pub clock: Arc<dyn Clock>,
}

/// A store whose parts do not run yet.
pub struct Store {
    pub handle: StoreHandle,
    pub workers: Vec<Worker>,
    pub log_writer: LogWriter,
    pub appliers: Vec<Applier>,
    pub flusher: Flusher,
    pub(crate) shared: Arc<Shared>,
    pub(crate) clock: Arc<dyn Clock>,
}

/// Makes the key-value engine durable when logs wait for it.
pub struct Flusher {
    kv: KvEngine,
    log: LogEngine,
    asked: Receiver<()>,
}

impl Flusher {
    /// Flushes if it was asked to.
    pub fn turn(&mut self) -> Result<bool, StoreError> {
        match self.asked.try_recv() {
            Ok(()) => self.flush().map(|()| true),
            Err(_) => Ok(false),
        }
    }

    pub(crate) fn flush(&mut self) -> Result<(), StoreError> {
        // So that a log which was exchanged for an older copy is found out at the next start.
        self.kv.note_log_sequence(self.log.sequence())?;
        self.kv.persist()?;
        Ok(())
    }

    pub(crate) fn channel(&self) -> &Receiver<()> {
        &self.asked
    }
}

impl Store {
    /// Restores the store from its engines.
    ///
    /// # Errors
    /// When the disk fails, or what is on it contradicts itself.
    pub fn open(parts: Parts) -> Result<Store, StoreError> {
        let Parts { store, kv, log, snapshots, config, outbox, clock } = parts;
        let workers = config.workers.max(1);
        let (inbox_senders, inboxes): (Vec<_>, Vec<_>) =
            (0..workers).map(|_| bounded::<Input>(WORKER_INBOX)).unzip();
        // Bounded by what the task queues hold: see `message`.
        let (notice_senders, notices): (Vec<_>, Vec<_>) =
            (0..workers).map(|_| unbounded::<Notice>()).unzip();
        let (log_tasks, log_queue) = bounded(LOG_QUEUE);
        let (apply_tasks, apply_queues): (Vec<_>, Vec<_>) =
            (0..config.apply_workers.max(1)).map(|_| bounded::<ApplyTask>(APPLY_QUEUE)).unzip();
        let (flush, flush_asked) = bounded(1);
        let delegates = Arc::new(ReadDelegates::default());
        let log_writer = LogWriter {
            log: log.clone(),
            tasks: log_queue,
            notices: notice_senders.clone(),
            outbox: outbox.clone(),
        };
        let shared = Arc::new(Shared {
            store,
            raft: Arc::new(config.raft()),
            config,
            kv: kv.clone(),
            log: log.clone(),
            outbox,
            delegates: delegates.clone(),
            ranges: Arc::default(),
            log_tasks,
            apply_tasks,
            notices: notice_senders,
            flush,
        });
        let appliers = apply_queues.into_iter().map(|queue| Applier::new(&shared, queue)).collect();
        let mut workers: Vec<Worker> = inboxes
            .into_iter()
            .zip(notices)
            .enumerate()
            .map(|(number, (inbox, notices))| Worker::new(shared.clone(), number, inbox, notices))
            .collect();
        let now = clock.now();
        for seed in restore(&shared, &snapshots)? {
            let id = seed.descriptor.id;
            if let Err(other) = shared.ranges.claim(id, &seed.descriptor.range) {
                return Err(StoreError::Corrupt {
                    what: format!("the range of region {id}"),
                    why: format!("it overlaps region {other}"),
                });
            }
            let owner = worker_of(id, workers.len());
            workers[owner].add_peer(now, seed)?;
        }
        let handle = StoreHandle {
            store,
            inboxes: inbox_senders.into(),
            notices: shared.notices.clone().into(),
            ranges: shared.ranges.clone(),
            delegates,
            kv: kv.clone(),
            log: log.clone(),
            clock: clock.clone(),
            stopped: Arc::new(AtomicBool::new(false)),
            damage: Arc::new(SetOnce::new()),
            held: Default::default(),
        };
        for damage in [kv.damage(), log.damage()] {
            let (workers, found) = (shared.notices.clone(), handle.damage.clone());
            damage.on_found(move |what| {
                if found.set(what.to_owned()).is_ok() {
                    tracing::error!(store = %store, "this store stops serving, its data is damaged: {what}");
                    metrics::gauge!("esker_store_damaged").set(1.0);
                    for worker in &workers {
                        let _ = worker.send(Notice::Retire);
                    }
                }
            });
        }
        let flusher = Flusher { kv, log, asked: flush_asked };
        Ok(Store { handle, workers, log_writer, appliers, flusher, shared, clock })
    }

    /// Gives every part a thread.
    ///
    /// # Errors
    /// When the system refuses a thread.
    pub fn start(self) -> Result<RunningStore, StoreError> {
        RunningStore::start(self)
    }
}

/// Every peer that this store holds, its log and its data brought into agreement.
fn restore(shared: &Shared, snapshots: &Path) -> Result<Vec<PeerSeed>, StoreError> {
    let (kv, log) = (&shared.kv, &shared.log);
    let mut seeds = Vec::new();
    let mut obsolete = LogBatch::new();
    for (id, found) in state::region_states(kv)? {
        let descriptor = match found {
            RegionState::Normal(descriptor) => descriptor,
            RegionState::Installing { region, index, term, files } => {
                tracing::info!(region = %id, "finishing the installation of a snapshot");
                let files = ReceivedSnapshot::from_record(snapshots, &files)?;
                files.require(kv)?;
                complete_installation(kv, &region, Applied { index, term }, &files)?;
                region
            }
            RegionState::Tombstone { peer, .. } => {
                // What a later peer of the region has promised stays, although nobody has
                // filled it yet: an empty voter that forgot its vote could vote twice.
                if state::raft_state(log, id)?.is_some_and(|left| left.peer <= peer) {
                    obsolete.remove(id.0);
                }
                continue;
            }
        };
        if descriptor.peer_on(shared.store).is_none() {
            // The removal was applied, and the crash came before the data went.
            let applied = state::applied(kv, id)?.unwrap_or(Applied::INITIAL);
            let peer = state::raft_state(log, id)?.map_or(PeerId(0), |left| left.peer);
            bury(kv, &descriptor, peer, descriptor.clone(), applied)?;
            obsolete.remove(id.0);
            continue;
        }
        seeds.push(restore_peer(shared, id, descriptor, &mut obsolete)?);
    }
    if !obsolete.is_empty() {
        log.write(&obsolete)?;
    }
    Ok(seeds)
}

fn restore_peer(
    shared: &Shared,
    id: RegionId,
    descriptor: Region,
    repairs: &mut LogBatch,
) -> Result<PeerSeed, StoreError> {
    let (kv, log) = (&shared.kv, &shared.log);
    let corrupt =
        |why: String| StoreError::Corrupt { what: format!("the state of region {id}"), why };
    let Some(me) = descriptor.peer_on(shared.store).copied() else {
        return Err(corrupt(format!("it has no peer on store {}", shared.store)));
    };
    let applied = state::applied(kv, id)?
        .ok_or_else(|| corrupt("it has data but no applied index".into()))?;
    let stored = state::raft_state(log, id)?;
    // Even without a record: it may have answered a heartbeat, and so promised its
    // leader not to vote for another, before its first record was written.
    let fresh = broken!(PromiseOutlivesRestart);
    let mut raft = stored.unwrap_or(RaftState::empty(me.id));
    if applied.index < raft.truncated.0 {
        return Err(corrupt(format!(
            "its data is at index {} but its log begins after {}",
            applied.index, raft.truncated.0
        )));
    }
    if term_at(log, id, &raft, applied.index)? != Some(applied.term) {
        // Entries are applied when they are durable in the log, so the log has them. Only
        // a split or a snapshot puts data in place before the log is told.
        let came_whole = applied == Applied::INITIAL
            || state::installed(kv, id)?.is_some_and(|installed| installed == applied);
        if !came_whole {
            return Err(corrupt(format!(
                "its data is at index {}, but its log ends at {}; the log has lost entries",
                applied.index, raft.last
            )));
        }
        // Everything up to the applied index is in the data; what the log has beyond it
        // contradicts a committed entry.
        repairs.cut(id.0, 0, raft.last.0.saturating_add(1));
        raft.truncated = (applied.index, applied.term);
        raft.last = applied.index;
        if raft.hard_state.term < applied.term {
            raft.hard_state.term = applied.term;
            raft.hard_state.vote = None;
        }
        repairs.put_state(id.0, &raft.encode());
    }
    raft.hard_state.commit = raft.hard_state.commit.max(applied.index);
    if raft.last < raft.hard_state.commit {
        return Err(corrupt(format!(
            "its log ends at {} but index {} was committed; the log has lost entries",
            raft.last, raft.hard_state.commit
        )));
    }
    let last_term = term_at(log, id, &raft, raft.last)?
        .ok_or_else(|| corrupt(format!("its last log entry {} is missing", raft.last)))?;
    Ok(PeerSeed { descriptor, me, raft_state: raft, last_term, applied, generation: 0, fresh })
}

fn term_at(
    log: &LogEngine,
    id: RegionId,
    raft: &RaftState,
    index: LogIndex,
) -> Result<Option<Term>, StoreError> {
    if index == raft.truncated.0 {
        return Ok(Some(raft.truncated.1));
    }
    if index > raft.last {
        return Ok(None);
    }
    let stored = log.entry(id.0, index.0)?;
    stored.map(|bytes| decode_entry(id, index.0, bytes).map(|entry| entry.term)).transpose()
}
