//! How much disk space the log takes before it is used, and what that is good for.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use esker_engine::{EngineOptions, LogBatch, LogEngine};

const MIB: u64 = 1 << 20;

fn allocated(directory: &Path) -> u64 {
    const BLOCK: u64 = 512;
    let files = std::fs::read_dir(directory).expect("a directory");
    files
        .map(|file| file.expect("an entry").metadata().expect("it is there").blocks() * BLOCK)
        .sum()
}

fn left_to_rocksdb() -> EngineOptions {
    EngineOptions { log_preallocation_bytes: 0, ..EngineOptions::default() }
}

#[test]
fn a_log_takes_little_more_than_it_holds() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let log = LogEngine::open(directory.path(), &EngineOptions::default()).expect("a log");
    let mut batch = LogBatch::new();
    batch.append(1, 1, b"an entry");
    log.write(&batch).expect("a durable write");
    let taken = allocated(directory.path());
    assert!(taken <= 6 * MIB, "{taken} bytes for one entry");
}

/// Appends entries until `bytes` are in the log.
fn fill(log: &LogEngine, index: &mut u64, bytes: u64, entry: &[u8]) -> Duration {
    let started = Instant::now();
    for _ in 0..bytes / entry.len() as u64 {
        *index += 1;
        let mut batch = LogBatch::new();
        batch.append(1, *index, entry);
        log.write(&batch).expect("a durable write");
    }
    started.elapsed()
}

/// Prints how much faster or slower appends are than with RocksDB's own preallocation. The numbers
/// are for `docs/performance.md`. There is nothing to assert, because disks differ.
#[test]
#[ignore = "measures, for minutes"]
fn what_preallocation_costs() {
    const ROUNDS: usize = 8;
    const ROUND: u64 = 32 * MIB;
    for entry in [1 << 10, 64 << 10] {
        let entry = vec![7; entry];
        let logs = [EngineOptions::default(), left_to_rocksdb()].map(|options| {
            let directory = tempfile::tempdir().expect("a temporary directory");
            let log = LogEngine::open(directory.path(), &options).expect("a log");
            (directory, log)
        });
        let mut indexes = [0; 2];
        let mut took = [Duration::ZERO; 2];
        // The two take turns, so that a busy machine slows down both.
        for round in 0..ROUNDS {
            for at in [round % 2, 1 - round % 2] {
                took[at] += fill(&logs[at].1, &mut indexes[at], ROUND, &entry);
            }
        }
        let ratio = took[1].as_secs_f64() / took[0].as_secs_f64();
        println!("{} byte entries: {took:?}, ratio {ratio:.3}", entry.len());
    }
}
