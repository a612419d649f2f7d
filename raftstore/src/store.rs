//! A store put together: its engines, its workers, log writer and apply workers.
//!
//! [`Store::open`] restores every region from disk and returns the parts without
//! running them. [`Store::start`] gives each a thread; a test that wants to decide
//! what happens when takes the parts and calls their `turn`s itself.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use crossbeam_channel::{bounded, unbounded};
use esker_engine::{KvEngine, LogEngine};
use esker_model::{Clock, StoreId};
use tokio::sync::SetOnce;

use crate::apply::Applier;
use crate::backlog::Backlog;
use crate::budget::Budget;
use crate::config::{StoreConfig, WORKER_INBOX};
use crate::disk::DiskWatch;
use crate::error::StoreError;
use crate::flusher::{Flusher, Points};
use crate::journal::Journal;
use crate::log_writer::LogWriter;
use crate::message::{ApplyTask, Input, Notice};
use crate::outbox::Outbox;
use crate::read::ReadDelegates;
use crate::recovery::restore;
use crate::router::{StoreHandle, worker_of};
use crate::shell::RunningStore;
use crate::worker::{Queues, Shared, Worker};

/// What a store is made of, before it runs.
pub struct Parts {
    pub store: StoreId,
    pub kv: KvEngine,
    pub log: LogEngine,
    /// Where received snapshots wait; must be empty of all but what the journal names.
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
        let (raft_senders, raft_inboxes): (Vec<_>, Vec<_>) =
            (0..workers).map(|_| bounded::<Input>(WORKER_INBOX)).unzip();
        // At most one for each task: see `message`.
        let (notice_senders, notices): (Vec<_>, Vec<_>) =
            (0..workers).map(|_| unbounded::<Notice>()).unzip();
        // Not bounded in number: see `backlog`.
        let (log_tasks, log_queue) = unbounded();
        let (apply_tasks, apply_queues): (Vec<_>, Vec<_>) =
            (0..config.apply_workers.max(1)).map(|_| unbounded::<ApplyTask>()).unzip();
        let log_backlog = Backlog::new(config.log_backlog, workers);
        // Else writes that are held here would take all room from entries that are sent once.
        let log_backlog = Arc::new(log_backlog.with_reserve(config.log_backlog / 4));
        let apply_backlogs: Vec<_> = apply_tasks
            .iter()
            .map(|_| Arc::new(Backlog::new(config.apply_backlog, workers)))
            .collect();
        let (journal, notes_left) = Journal::open(log.clone())?;
        let journal = Arc::new(journal);
        let points = Arc::new(Points::open(&kv)?);
        let delegates = Arc::new(ReadDelegates::default());
        let disk = Arc::new(DiskWatch::new(config.slow_disk, config.stalled_disk));
        let log_writer = LogWriter {
            log: log.clone(),
            tasks: log_queue,
            notices: notice_senders.clone(),
            outbox: outbox.clone(),
            backlog: log_backlog.clone(),
            disk: disk.clone(),
            clock: clock.clone(),
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
            log_backlog,
            apply_backlogs,
            notices: notice_senders,
            journal: journal.clone(),
            points: points.clone(),
            disk: disk.clone(),
        });
        let appliers = apply_queues
            .into_iter()
            .zip(&shared.apply_backlogs)
            .map(|(queue, backlog)| Applier::new(&shared, queue, backlog.clone()))
            .collect();
        let mut workers: Vec<Worker> = inboxes
            .into_iter()
            .zip(raft_inboxes)
            .zip(notices)
            .enumerate()
            .map(|(number, ((requests, raft), notices))| {
                let queues = Queues { requests, raft, notices };
                Worker::new(shared.clone(), number, queues)
            })
            .collect();
        let now = clock.now();
        for seed in restore(&shared, notes_left, &snapshots)? {
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
            raft_inboxes: raft_senders.into(),
            notices: shared.notices.clone().into(),
            ranges: shared.ranges.clone(),
            delegates,
            kv: kv.clone(),
            log: log.clone(),
            clock: clock.clone(),
            stopped: Arc::new(AtomicBool::new(false)),
            damage: Arc::new(SetOnce::new()),
            held: Default::default(),
            writes: Budget::new(shared.config.write_budget),
            messages: Budget::new(shared.config.message_budget),
            disk,
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
        let flusher = Flusher::new(kv, log, journal, points, &shared.config);
        Ok(Store { handle, workers, log_writer, appliers, flusher, shared, clock })
    }

    /// Bytes that wait for the log writer, and for all apply workers.
    pub fn backlog_bytes(&self) -> (usize, usize) {
        let apply = self.shared.apply_backlogs.iter().map(|backlog| backlog.bytes());
        (self.shared.log_backlog.bytes(), apply.sum())
    }

    /// Gives every part a thread.
    ///
    /// # Errors
    /// When the system refuses a thread.
    pub fn start(self) -> Result<RunningStore, StoreError> {
        RunningStore::start(self)
    }
}
