//! When the key-value engine is flushed, and how much of it is durable.
//!
//! RocksDB flushes a memtable that is full. A store that is written little would keep its data in
//! memory for long, and with it the Raft log that brings it back after a crash. So the flusher
//! flushes what has waited for too long, or has let the log grow too much: once for all regions.
//!
//! To know what is durable it sets a *point* in the order of the engine's writes every second in
//! which there were any, and looks which points a crash would leave. So no other thread has to read
//! the disk for it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use esker_engine::{KvEngine, LogEngine};
use esker_mutants::broken;
use esker_raft::Time;

use crate::config::{FLUSH_LOOK, MAX_POINTS, StoreConfig};
use crate::error::StoreError;
use crate::journal::{Journal, MAX_NOTES};

/// The points in the order of the key-value engine's writes.
#[derive(Debug)]
pub struct Points {
    /// The newest point that was set, or is about to be.
    newest: AtomicU64,
    /// The newest point that is durable.
    durable: AtomicU64,
}

impl Points {
    pub fn open(kv: &KvEngine) -> Result<Points, StoreError> {
        let durable = kv.durable_point()?;
        Ok(Points { newest: AtomicU64::new(durable), durable: AtomicU64::new(durable) })
    }

    /// The next point. It follows all writes that returned before this call.
    pub fn next(&self) -> u64 {
        self.newest.load(Ordering::SeqCst) + 1
    }

    /// Whether everything written before the point is durable.
    pub fn is_durable(&self, point: u64) -> bool {
        point <= self.durable.load(Ordering::SeqCst)
    }
}

/// A point that is not durable yet.
struct Waiting {
    point: u64,
    since: Time,
    /// How much had been written to the log.
    log_bytes: u64,
    /// Notes of the journal that speak of earlier writes are below this number.
    covered: u64,
}

/// Flushes the key-value engine when there is need.
pub struct Flusher {
    kv: KvEngine,
    log: LogEngine,
    journal: Arc<Journal>,
    points: Arc<Points>,
    flush_after: Duration,
    flush_files_after: Duration,
    flush_log_bytes: u64,
    next_look: Time,
    /// The engine's sequence number behind the newest point.
    marked: u64,
    /// In their order.
    waiting: VecDeque<Waiting>,
    /// Since when files of snapshots are kept for a flush.
    files_since: Option<Time>,
}

impl Flusher {
    pub(crate) fn new(
        kv: KvEngine,
        log: LogEngine,
        journal: Arc<Journal>,
        points: Arc<Points>,
        config: &StoreConfig,
    ) -> Flusher {
        let StoreConfig { flush_after, flush_files_after, flush_log_bytes, .. } = *config;
        Flusher {
            kv,
            log,
            journal,
            points,
            flush_after,
            flush_files_after,
            flush_log_bytes,
            next_look: Time(0),
            marked: 0,
            waiting: VecDeque::new(),
            files_since: None,
        }
    }

    /// Looks whether it is time, and flushes if there is need. Returns whether it did.
    ///
    /// # Errors
    /// When the disk fails: the store must stop.
    pub fn turn(&mut self, now: Time) -> Result<bool, StoreError> {
        if now < self.next_look {
            return Ok(false);
        }
        self.next_look = now + FLUSH_LOOK;
        // A point that was set is a write, too.
        if self.kv.sequence() > self.marked && self.waiting.len() < MAX_POINTS {
            self.set_point(now)?;
        }
        self.look()?;
        let must = self.must_flush(now);
        if must {
            self.flush(now)?;
        }
        Ok(must)
    }

    fn set_point(&mut self, now: Time) -> Result<(), StoreError> {
        let covered = self.journal.covered();
        // First the number, then the point: whoever saw the number before has written before.
        let point = self.points.newest.fetch_add(1, Ordering::SeqCst) + 1;
        let log_bytes = self.log.written_bytes();
        let sequence = self.kv.sequence();
        // So that a log that is exchanged for an older copy is found out at the next start.
        let noted = self.kv.note_log_sequence(self.log.sequence())?;
        self.kv.set_point(point)?;
        // These are the only changes that need no further point.
        self.marked = sequence + 1 + u64::from(noted);
        self.waiting.push_back(Waiting { point, since: now, log_bytes, covered });
        Ok(())
    }

    /// Looks which points are durable, and drops what only they needed.
    fn look(&mut self) -> Result<(), StoreError> {
        let durable = match self.waiting.is_empty() {
            true => return Ok(()),
            false if broken!(NotesWaitForFlush) => self.points.next() - 1,
            false => self.kv.durable_point()?,
        };
        let mut covered = None;
        while let Some(first) = self.waiting.pop_front_if(|first| first.point <= durable) {
            covered = Some(first.covered);
        }
        if let Some(covered) = covered {
            self.points.durable.fetch_max(durable, Ordering::SeqCst);
            self.journal.forget(covered)?;
        }
        Ok(())
    }

    fn must_flush(&mut self, now: Time) -> bool {
        let (notes, files) = self.journal.waiting();
        self.files_since = files.then(|| self.files_since.unwrap_or(now));
        let old = |since: Time, limit: Duration| now - since >= limit;
        let oldest = self.waiting.front();
        oldest.is_some_and(|oldest| {
            old(oldest.since, self.flush_after)
                || self.log.written_bytes() - oldest.log_bytes >= self.flush_log_bytes
        }) || notes >= MAX_NOTES
            || self.files_since.is_some_and(|since| old(since, self.flush_files_after))
    }

    fn flush(&mut self, now: Time) -> Result<(), StoreError> {
        self.files_since = None;
        self.set_point(now)?;
        self.kv.persist()?;
        metrics::counter!("esker_store_flushes_total").increment(1);
        self.look()
    }
}
