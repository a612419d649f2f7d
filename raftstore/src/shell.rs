//! The threads of a store. The only place in this crate that has any.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use crossbeam_channel::{Sender, after, never};
use esker_engine::KvEngine;
use esker_model::Clock;

use crate::config::FLUSH_LOOK;
use crate::error::StoreError;
use crate::flusher::Flusher;
use crate::message::Notice;
use crate::router::StoreHandle;
use crate::store::Store;
use crate::worker::Worker;

/// A store whose parts run. Dropping it stops them.
pub struct RunningStore {
    handle: StoreHandle,
    notices: Vec<Sender<Notice>>,
    threads: Vec<JoinHandle<()>>,
    stopped: Arc<AtomicBool>,
    kv: KvEngine,
}

/// A store by name, and whether its data was found damaged.
#[derive(Clone)]
struct Watched {
    name: String,
    handle: StoreHandle,
}

impl Watched {
    /// The engines know first; those that they tell may not have been told yet.
    fn is_damaged(&self) -> bool {
        let StoreHandle { kv, log, .. } = &self.handle;
        kv.damage().found().is_some() || log.damage().found().is_some()
    }

    /// Nothing when the part must end, because the store's data is damaged: the whole store
    /// is being stopped then, and the node lives on to say so. Any other error ends the
    /// process: a store that could not write, or that found what cannot be, must not go on
    /// to promise anything.
    fn must_go_on<T>(&self, outcome: Result<T, StoreError>) -> Option<T> {
        let store = &self.name;
        match outcome {
            Ok(value) => Some(value),
            Err(error) if self.is_damaged() => {
                tracing::error!("a part of {store} stops: {error}");
                None
            }
            Err(error) => {
                tracing::error!("{store} stops: {error}");
                eprintln!("esker: {store} stops: {error}");
                std::process::abort();
            }
        }
    }
}

impl RunningStore {
    pub(crate) fn start(store: Store) -> Result<Self, StoreError> {
        let Store { handle, workers, mut log_writer, appliers, flusher, shared, clock } = store;
        let name = format!("store {}", handle.store_id());
        let watched = Watched { name: name.clone(), handle: handle.clone() };
        let mut threads = Vec::new();
        let mut spawn = |role: String, body: Box<dyn FnOnce() + Send>| {
            // Linux shows fifteen characters of a thread's name.
            let store = name.clone();
            let guarded = move || {
                // A part that is gone would leave a store that still leads and
                // answers nobody.
                if catch_unwind(AssertUnwindSafe(body)).is_err() {
                    eprintln!("esker: {store} stops: an invariant of its own is broken, see above");
                    std::process::abort();
                }
            };
            let thread = Builder::new().name(role).spawn(guarded).map_err(StoreError::Thread)?;
            threads.push(thread);
            Ok::<(), StoreError>(())
        };
        for (number, worker) in workers.into_iter().enumerate() {
            let (clock, watched) = (clock.clone(), watched.clone());
            spawn(
                format!("region-{number}"),
                Box::new(move || run_worker(worker, &*clock, &watched)),
            )?;
        }
        let writer_watched = watched.clone();
        spawn(
            "log-writer".into(),
            Box::new(move || {
                let tasks = log_writer.tasks.clone();
                while let Ok(first) = tasks.recv() {
                    if writer_watched.must_go_on(log_writer.write_with(first)).is_none() {
                        return;
                    }
                }
            }),
        )?;
        for (number, mut applier) in appliers.into_iter().enumerate() {
            let watched = watched.clone();
            spawn(
                format!("apply-{number}"),
                Box::new(move || {
                    let tasks = applier.channel().clone();
                    while let Ok(first) = tasks.recv() {
                        if watched.must_go_on(applier.apply_with(first)).is_none() {
                            return;
                        }
                    }
                }),
            )?;
        }
        let stopped = handle.stopped.clone();
        let flush_stopped = stopped.clone();
        spawn(
            "flush".into(),
            Box::new(move || run_flusher(flusher, &*clock, &flush_stopped, &watched)),
        )?;
        let notices = shared.notices.clone();
        let kv = shared.kv.clone();
        Ok(RunningStore { handle, notices, threads, stopped, kv })
    }

    pub fn handle(&self) -> &StoreHandle {
        &self.handle
    }

    /// Stops the parts one after another, and makes the data durable so that the
    /// next start has nothing to redo. Returns when the directory can be opened again:
    /// requests that were under way hold the engines until they have been answered.
    pub fn stop(mut self) {
        /// How long they may take, and how often it is looked.
        const RELEASED_WITHIN: Duration = Duration::from_secs(2);
        const LOOK: Duration = Duration::from_millis(2);
        self.shut_down();
        let store = self.handle.store_id();
        if let Err(error) = self.kv.persist() {
            // The log has everything; only the next start takes longer.
            tracing::warn!("store {store}: final flush: {error}");
        }
        let (kv, log) = (self.kv.clone(), self.handle.log.clone());
        drop(self);
        let began = Instant::now();
        while kv.holders() > 1 || log.holders() > 1 {
            if began.elapsed() > RELEASED_WITHIN {
                tracing::warn!("store {store} is stopped, but somebody still reads its data");
                return;
            }
            std::thread::sleep(LOOK);
        }
    }

    fn shut_down(&mut self) {
        self.stopped.store(true, Ordering::Release);
        for worker in &self.notices {
            let _ = worker.send(Notice::Stop);
        }
        // The workers go and take the senders of the other parts' queues with
        // them: those end when their queues are empty.
        for thread in self.threads.drain(..) {
            // The flusher waits for nothing but the time.
            thread.thread().unpark();
            if thread.join().is_err() {
                tracing::error!("a thread of store {} had panicked", self.handle.store_id());
            }
        }
    }
}

impl Drop for RunningStore {
    fn drop(&mut self) {
        self.shut_down();
    }
}

fn run_worker(mut worker: Worker, clock: &dyn Clock, watched: &Watched) {
    let queues = worker.queues().clone();
    while !worker.is_stopping() {
        match watched.must_go_on(worker.turn(clock)) {
            Some(true) => continue,
            Some(false) => {}
            None => return,
        }
        let wake = match worker.next_deadline() {
            Some(deadline) => after(deadline - clock.now()),
            None => never(),
        };
        let mut ready = crossbeam_channel::Select::new();
        ready.recv(&queues.requests);
        ready.recv(&queues.raft);
        ready.recv(&queues.notices);
        ready.recv(&wake);
        ready.ready();
    }
}

fn run_flusher(mut flusher: Flusher, clock: &dyn Clock, stopped: &AtomicBool, watched: &Watched) {
    while !stopped.load(Ordering::Acquire) {
        if watched.must_go_on(flusher.turn(clock.now())).is_none() {
            return;
        }
        std::thread::park_timeout(FLUSH_LOOK);
    }
}
