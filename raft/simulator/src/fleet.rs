//! Many seeds on many threads.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use super::generator::Theme;
use super::run::Run;
use super::summary::Summary;
use super::violation::Violation;

/// Which seeds to run.
#[derive(Clone, Copy, Debug)]
pub struct Fleet {
    pub from: u64,
    pub seeds: u64,
    pub steps: u64,
    pub theme: Option<Theme>,
    pub threads: usize,
}

impl Fleet {
    /// As many threads as there are cores.
    pub fn cores() -> usize {
        thread::available_parallelism().map_or(1, usize::from)
    }

    fn run_of(&self, seed: u64) -> Run {
        Run { seed, steps: self.steps, theme: self.theme }
    }

    /// Runs all seeds, or until one breaks a promise. Seeds are begun in order and ended once
    /// begun, so that the result is the same on any number of threads. `progress` gets the number
    /// of seeds that are done. Every thread calls `prepare` first.
    ///
    /// # Errors
    /// The run that broke a promise, and the promise.
    pub fn run(
        &self,
        prepare: impl Fn() + Sync,
        progress: impl Fn(u64) + Sync,
    ) -> Result<Summary, (Run, Violation)> {
        let (next, done) = (AtomicU64::new(self.from), AtomicU64::new(0));
        let broken = AtomicBool::new(false);
        let total = Mutex::new(Summary::default());
        let failures = Mutex::new(Vec::new());
        let work = || {
            prepare();
            let mut mine = Summary::default();
            loop {
                let seed = next.fetch_add(1, Ordering::Relaxed);
                if seed >= self.from + self.seeds || broken.load(Ordering::Relaxed) {
                    break;
                }
                match self.run_of(seed).run() {
                    Ok(summary) => mine.add(&summary),
                    Err(violation) => {
                        broken.store(true, Ordering::Relaxed);
                        let mut failures = failures.lock().expect("no thread panics");
                        failures.push((seed, violation));
                    }
                }
                progress(done.fetch_add(1, Ordering::Relaxed) + 1);
            }
            total.lock().expect("no thread panics").add(&mine);
        };
        thread::scope(|scope| {
            for _ in 0..self.threads.max(1) {
                scope.spawn(work);
            }
        });
        let failures = failures.into_inner().expect("no thread panics");
        match failures.into_iter().min_by_key(|(seed, _)| *seed) {
            Some((seed, violation)) => Err((self.run_of(seed), violation)),
            None => Ok(total.into_inner().expect("no thread panics")),
        }
    }
}
