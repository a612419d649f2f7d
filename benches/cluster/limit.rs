//! What this machine can do at most: three synced logs and three key-value engines, written by one
//! thread after the other, with nothing between them.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use esker_engine::{Cf, EngineOptions, KvBatch, KvEngine, LogBatch, LogEngine};
use hdrhistogram::Histogram;
use rand::{RngExt as _, SeedableRng as _};

use crate::Outcome;
use crate::rows::{LARGE_BATCHES, RECORDS, VALUE_BYTES};

const COPIES: usize = 3;
/// The sizes of batches, which are the numbers of clients.
pub const BATCHES: [usize; 3] = [1, 64, 256];
const READERS: usize = 2;

/// What was measured in one round.
#[derive(Debug, Clone, Default)]
pub struct Limits {
    /// The median of one synced write of a record, in microseconds.
    pub synced_put_us: f64,
    /// Records a second in batches of so many.
    pub writes: Vec<(usize, f64)>,
    /// Records a second of a larger size, in bytes.
    pub large: Vec<(usize, f64)>,
    /// Reads a second of two threads.
    pub gets: f64,
}

impl Limits {
    pub fn writes(&self, batch: usize) -> Option<f64> {
        self.writes.iter().find(|(size, _)| *size == batch).map(|(_, rate)| *rate)
    }

    pub fn large(&self, bytes: usize) -> Option<f64> {
        self.large.iter().find(|(size, _)| *size == bytes).map(|(_, rate)| *rate)
    }
}

struct Engines {
    logs: Vec<LogEngine>,
    kvs: Vec<KvEngine>,
    index: u64,
}

impl Engines {
    fn open(folder: &Path) -> Outcome<Engines> {
        let (mut logs, mut kvs) = (Vec::new(), Vec::new());
        for copy in 0..COPIES {
            let folder = folder.join(copy.to_string());
            std::fs::create_dir_all(&folder)?;
            let options = EngineOptions::default();
            logs.push(LogEngine::open(&folder.join("log"), &options)?);
            kvs.push(KvEngine::open(&folder.join("kv"), &options)?);
        }
        Ok(Engines { logs, kvs, index: 0 })
    }

    /// The records that are read and written over.
    fn load(&self, value: &[u8]) -> Outcome<()> {
        for kv in &self.kvs {
            let mut all = KvBatch::new();
            for record in 0..RECORDS {
                all.put(Cf::Default, &key(record), value);
                if all.len() >= 1_000 {
                    kv.write(&all)?;
                    all.clear();
                }
            }
        }
        Ok(())
    }

    /// Writes batches until the time is over. Returns the records a second.
    fn writes(&mut self, batch: usize, value: &[u8], window: Duration) -> Outcome<f64> {
        let began = Instant::now();
        let mut records = 0;
        let (mut entries, mut pairs) = (LogBatch::new(), KvBatch::new());
        while began.elapsed() < window {
            entries.clear();
            pairs.clear();
            for _ in 0..batch {
                self.index += 1;
                entries.append(1, self.index, value);
                // Spread over the records in no order, as updates are.
                let key = key(self.index.wrapping_mul(0x9E37_79B9_7F4A_7C15) % RECORDS);
                pairs.put(Cf::Default, &key, value);
            }
            for log in &self.logs {
                log.write(&entries)?;
            }
            for kv in &self.kvs {
                kv.write(&pairs)?;
            }
            records += batch as u64;
        }
        Ok(records as f64 / began.elapsed().as_secs_f64())
    }

    fn synced_put_us(&mut self, value: &[u8], window: Duration) -> Outcome<f64> {
        let began = Instant::now();
        let mut latencies = Histogram::<u64>::new(3)?;
        let mut batch = LogBatch::new();
        while began.elapsed() < window {
            batch.clear();
            self.index += 1;
            batch.append(2, self.index, value);
            let started = Instant::now();
            self.logs[0].write(&batch)?;
            latencies.record(started.elapsed().as_nanos() as u64)?;
        }
        Ok(latencies.value_at_quantile(0.5) as f64 / 1_000.0)
    }

    fn gets(&self, value: &[u8], window: Duration) -> Outcome<f64> {
        let kv = &self.kvs[0];
        let over = AtomicBool::new(false);
        let began = Instant::now();
        let reads = std::thread::scope(|scope| {
            let read = |reader: u64| {
                let (mut reads, mut next) = (0_u64, reader);
                while !over.load(Ordering::Relaxed) {
                    next = next.wrapping_add(7_919) % RECORDS;
                    let found = kv.get(Cf::Default, &key(next))?;
                    assert!(found.is_some_and(|found| found.len() == value.len()));
                    reads += 1;
                }
                Outcome::Ok(reads)
            };
            let readers: Vec<_> =
                (0..READERS as u64).map(|reader| scope.spawn(move || read(reader))).collect();
            std::thread::sleep(window);
            over.store(true, Ordering::Relaxed);
            readers
                .into_iter()
                .map(|reader| reader.join().map_err(|_| "a reader panicked")?)
                .sum::<Outcome<u64>>()
        })?;
        Ok(reads as f64 / began.elapsed().as_secs_f64())
    }
}

/// What compresses as the records of the systems do: six random bits in each byte.
fn printable(bytes: usize) -> Vec<u8> {
    let mut random = rand::rngs::SmallRng::seed_from_u64(7);
    (0..bytes).map(|_| b' ' + (random.random::<u8>() & 63)).collect()
}

fn key(record: u64) -> [u8; 24] {
    let mut key = *b"user0000000000000000....";
    key[16..].copy_from_slice(&record.to_be_bytes());
    key
}

/// Measures everything in a new folder: the reads for `window`, all else for half of it.
pub fn measure(folder: &Path, window: Duration) -> Outcome<Limits> {
    let folder = folder.join("limit");
    let mut engines = Engines::open(&folder)?;
    let value = printable(VALUE_BYTES);
    let part = window / 2;
    engines.load(&value)?;
    let synced_put_us = engines.synced_put_us(&value, part)?;
    let mut writes = Vec::new();
    for batch in BATCHES {
        writes.push((batch, engines.writes(batch, &value, part)?));
    }
    let mut large = Vec::new();
    for (bytes, batch) in LARGE_BATCHES {
        large.push((bytes, engines.writes(batch, &printable(bytes), part)?));
    }
    let gets = engines.gets(&value, window)?;
    drop(engines);
    std::fs::remove_dir_all(&folder)?;
    Ok(Limits { synced_put_us, writes, large, gets })
}
