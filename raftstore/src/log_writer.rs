//! The log writer: what all regions of all workers want to append becomes one
//! write with one fsync.
//!
//! In: [`LogTask`]s. Out: the messages that only a durable log may send (votes,
//! acknowledgements), and a notice to each region's worker. While a write is on
//! its way to the disk the next tasks gather, so that batches grow with load.

use std::sync::Arc;
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender};
use esker_engine::LogEngine;
use esker_model::Clock;
use esker_mutants::broken;

use crate::backlog::Backlog;
use crate::disk::DiskWatch;
use crate::error::StoreError;
use crate::message::{LogTask, Notice};
use crate::outbox::Outbox;
use crate::router::worker_of;

/// Bytes past which no further task is merged into a write.
const MAX_WRITE_BYTES: usize = 16 << 20;

pub struct LogWriter {
    pub(crate) log: LogEngine,
    pub(crate) tasks: Receiver<LogTask>,
    pub(crate) notices: Vec<Sender<Notice>>,
    pub(crate) outbox: Arc<dyn Outbox>,
    /// What is in `tasks`, and what is being written.
    pub(crate) backlog: Arc<Backlog>,
    pub(crate) disk: Arc<DiskWatch>,
    pub(crate) clock: Arc<dyn Clock>,
}

impl LogWriter {
    /// Writes all that waits; tells whether there was anything.
    ///
    /// # Errors
    /// When the disk does. Nothing of the batch may then be considered durable,
    /// and the store must stop.
    pub fn turn(&mut self) -> Result<bool, StoreError> {
        match self.tasks.try_recv() {
            Ok(first) => self.write_with(first).map(|()| true),
            Err(_) => Ok(false),
        }
    }

    /// Writes `first` and what waits behind it.
    pub fn write_with(&mut self, first: LogTask) -> Result<(), StoreError> {
        let LogTask { mut batch, mut persisted } = first;
        let mut taken = batch.bytes();
        while batch.bytes() < MAX_WRITE_BYTES {
            let Ok(next) = self.tasks.try_recv() else { break };
            taken += next.batch.bytes();
            batch.merge(&next.batch);
            persisted.extend(next.persisted);
        }
        if broken!(PromiseAfterSync) {
            for message in persisted.iter_mut().flat_map(|done| done.messages.drain(..)) {
                self.outbox.send(message);
            }
        }
        if !batch.is_empty() {
            let began = Instant::now();
            let written = self.log.write(&batch);
            if !broken!(FailedWriteStopsStore) {
                written?;
            }
            metrics::histogram!("esker_log_write_seconds").record(began.elapsed());
            metrics::histogram!("esker_log_write_bytes").record(batch.bytes() as f64);
        }
        // Where there was nothing to write, too: then it took no time.
        self.disk.done(self.clock.now(), !self.tasks.is_empty());
        for done in persisted {
            for message in done.messages {
                self.outbox.send(message);
            }
            let worker = worker_of(done.region, self.notices.len());
            // A worker that is gone is stopping, and so is this writer.
            let _ = self.notices[worker].send(Notice::Persisted {
                region: done.region,
                generation: done.generation,
                number: done.number,
            });
        }
        self.backlog.done(taken, |worker| {
            let _ = self.notices[worker].send(Notice::Room);
        });
        Ok(())
    }
}
