//! Writers that remember which of their writes were acknowledged.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use esker_client::KvClient;
use parking_lot::Mutex;
use tokio::task::JoinHandle;

use super::eventually;
use super::process::PATIENCE;

/// Keys of one writer: few, so that most writes replace a value.
const KEYS_PER_WRITER: u64 = 24;

/// A writer that is not stopped ends after this many writes.
const MAX_WRITES_PER_WRITER: u64 = 50_000;

/// Text that makes a value larger than its number.
const PADDING: &str = "abcdefghijklmnopqrstuvwxyzabcdefghijklmnopqrstuvwxyzabcdefghijklmn";

/// The versions of a key: the last one that was acknowledged, and the last one that was
/// sent and may have been written, too.
#[derive(Debug, Clone, Copy, Default)]
struct Versions {
    acknowledged: u64,
    sent: u64,
}

/// What happened so far.
#[derive(Default)]
struct Ledger {
    keys: BTreeMap<Bytes, Versions>,
    acknowledged: u64,
    longest: Duration,
    errors: Vec<String>,
}

pub struct Load {
    stop: Arc<AtomicBool>,
    ledger: Arc<Mutex<Ledger>>,
    writers: Vec<JoinHandle<()>>,
}

/// The key of a writer; together they spread over the regions that [`split_keys`] makes.
fn key(writer: u64, number: u64) -> Bytes {
    format!("load/{number:02}/{writer:02}").into()
}

/// Where to split so that the load has this many regions.
pub fn split_keys(regions: u64) -> Vec<Bytes> {
    (1..regions).map(|part| key(0, part * KEYS_PER_WRITER / regions)).collect()
}

/// One key in each of the regions that [`split_keys`] makes, none of which the load uses.
pub fn probe_keys(regions: u64) -> Vec<Bytes> {
    (0..regions).map(|part| key(99, part * KEYS_PER_WRITER / regions)).collect()
}

impl Load {
    /// Starts writers, each with keys of its own, that write one key after another.
    pub fn start(client: &KvClient, writers: u64) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let ledger = Arc::new(Mutex::new(Ledger::default()));
        let writers = (0..writers)
            .map(|writer| {
                tokio::spawn(write(client.clone(), writer, Arc::clone(&stop), Arc::clone(&ledger)))
            })
            .collect();
        Load { stop, ledger, writers }
    }

    /// Waits until `more` further writes have been acknowledged.
    pub async fn acknowledges(&self, more: u64) {
        let wanted = self.ledger.lock().acknowledged + more;
        eventually("the load goes on", PATIENCE, async || {
            let ledger = self.ledger.lock();
            match ledger.acknowledged >= wanted {
                true => Ok(()),
                false => Err(format!("{} of {wanted}: {:?}", ledger.acknowledged, ledger.errors)),
            }
        })
        .await;
    }

    /// Stops the writers after their current writes.
    pub async fn stop(mut self) -> Outcome {
        self.stop.store(true, Ordering::Relaxed);
        for writer in self.writers.drain(..) {
            writer.await.expect("a writer does not panic");
        }
        self.outcome()
    }

    /// Stops the writers in the middle of their writes, for a cluster that is no longer there to
    /// answer.
    pub async fn abandon(mut self) -> Outcome {
        for writer in self.writers.drain(..) {
            writer.abort();
            let _ = writer.await;
        }
        self.outcome()
    }

    fn outcome(&self) -> Outcome {
        let mut ledger = self.ledger.lock();
        Outcome {
            keys: std::mem::take(&mut ledger.keys),
            acknowledged: ledger.acknowledged,
            longest: ledger.longest,
            errors: std::mem::take(&mut ledger.errors),
        }
    }
}

/// The writes that were acknowledged, and how the load went.
pub struct Outcome {
    keys: BTreeMap<Bytes, Versions>,
    pub acknowledged: u64,
    /// How long the slowest write took.
    pub longest: Duration,
    pub errors: Vec<String>,
}

impl Outcome {
    /// Reads every key. It must hold the last value that was acknowledged, or a later one that was
    /// under way.
    pub async fn assert_kept(&self, client: &KvClient) {
        assert!(self.acknowledged > 0, "there was no load");
        for (key, versions) in &self.keys {
            let found = client.get(key.clone()).await.expect("the cluster answers");
            let version = found.as_ref().map_or(0, |value| version(value));
            assert!(
                (versions.acknowledged..=versions.sent).contains(&version),
                "{key:?} holds version {version}, but {versions:?}"
            );
        }
    }

    /// How many keys must exist.
    pub fn kept_keys(&self) -> u64 {
        self.keys.values().filter(|versions| versions.acknowledged > 0).count() as u64
    }
}

async fn write(client: KvClient, writer: u64, stop: Arc<AtomicBool>, ledger: Arc<Mutex<Ledger>>) {
    for number in 1..=MAX_WRITES_PER_WRITER {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        let key = key(writer, number % KEYS_PER_WRITER);
        ledger.lock().keys.entry(key.clone()).or_default().sent = number;
        let started = Instant::now();
        let written = client.put(key.clone(), format!("{number}:{PADDING}")).await;
        let mut ledger = ledger.lock();
        ledger.longest = ledger.longest.max(started.elapsed());
        match written {
            Ok(()) => {
                ledger.acknowledged += 1;
                ledger.keys.entry(key).or_default().acknowledged = number;
            }
            Err(error) => ledger.errors.push(error.to_string()),
        }
    }
}

fn version(value: &[u8]) -> u64 {
    let text = std::str::from_utf8(value).expect("the load writes text");
    let (version, padding) = text.split_once(':').expect("the load writes a version first");
    assert_eq!(padding, PADDING, "a value came back whole");
    version.parse().expect("the load writes numbers")
}
