//! Whether the disk of this store's log keeps up with those of the other stores.
//!
//! A leader needs no disk of its own to commit: its followers' disks are enough. So a leader knows
//! best that its disk is slow, or does not answer: what the others have made durable is not durable
//! here. Then its store gives way: it hands over the regions that it leads, and does not seek to lead
//! until its disk is well again.
//!
//! Two things have to come together. The log's writes themselves take long here: a thread that waits
//! for a processor, or a queue, is no slow disk. And regions that this store leads come later here
//! than on the others: where the others' disks are as slow, nobody would do better.
//!
//! In: when the log writer has something to do and when it has done it, and what the workers see of
//! their regions. Out: whether the store gives way, which workers, placement and the log are told.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use esker_mutants::broken;
use esker_raft::Time;
use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::config::{DISK_MEMORY, DISK_WELL_AFTER, DISK_WELL_BELOW};

/// Stands for a log writer that has nothing to do.
const IDLE: u64 = u64::MAX;

/// Turns of workers that are looked at before the regions are said to be late.
const MIN_SAMPLES: u32 = 4;

/// What one turn of a worker saw of the regions that it leads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// How long after the others this store had made something durable, at most; zero where it was
    /// not later.
    pub behind: Option<Duration>,
    /// How long the others have had something that this store still does not have, at most.
    pub waits: Option<Duration>,
}

impl Seen {
    /// Something became durable here so long after it was durable on the others.
    pub fn was_behind(&mut self, by: Duration) {
        self.behind = self.behind.max(Some(by));
    }

    /// Something has been durable on the others for so long, and is not here.
    pub fn waits_for(&mut self, since: Duration) {
        self.waits = self.waits.max(Some(since));
    }
}

/// The state of a store's disk, which its workers and its log writer share.
pub struct DiskWatch {
    /// See [`crate::config::StoreConfig::slow_disk`].
    slow: Duration,
    /// See [`crate::config::StoreConfig::stalled_disk`].
    stalled: Duration,
    gives_way: AtomicBool,
    changed: Notify,
    /// Since when the log writer has something to do, or [`IDLE`].
    busy_since: AtomicU64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// How long a write takes, on average over time: a write that took long counts for as long as it
    /// took, and what came before is forgotten with time.
    takes: Duration,
    wrote_at: Time,
    /// How far behind the others the last turns were, on average.
    behind: Duration,
    samples: u32,
    seen_at: Time,
    /// Since when no write has been slow.
    well_since: Time,
    /// How long it must stay so. Longer with each time that the store gave way, and back to the first
    /// after an hour.
    well_after: Duration,
    gave_way_at: Option<Time>,
}

/// What changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// The store gives way from now on, because a write has not been answered for so long.
    Stalled(Duration),
    /// The same, because writes take so long on average.
    Slow(Duration),
    /// It does not any more.
    Well,
}

impl DiskWatch {
    pub fn new(slow: Duration, stalled: Duration) -> Self {
        DiskWatch {
            slow,
            stalled,
            gives_way: AtomicBool::new(false),
            changed: Notify::new(),
            busy_since: AtomicU64::new(IDLE),
            state: Mutex::default(),
        }
    }

    /// Whether the store hands its regions over, and does not seek to lead.
    pub fn gives_way(&self) -> bool {
        self.gives_way.load(Ordering::Acquire)
    }

    /// Completes when [`gives_way`](Self::gives_way) has changed since the last call. For one caller.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// The log writer got something to do.
    pub fn handed(&self, now: Time) {
        // If it has something already, that was first.
        let _ = self.busy_since.compare_exchange(IDLE, now.0, Ordering::AcqRel, Ordering::Relaxed);
    }

    /// The log writer has done all that it took, and has more, or nothing. What came while it wrote
    /// waited for the disk only since then.
    pub fn done(&self, now: Time, has_more: bool) {
        let next = if has_more { now.0 } else { IDLE };
        let since = self.busy_since.swap(next, Ordering::AcqRel);
        if since == IDLE {
            return;
        }
        let took = now - Time(since);
        let mut state = self.state.lock();
        let elapsed = now - state.wrote_at;
        state.wrote_at = now;
        let weight = |time: Duration| (time.as_secs_f64() / DISK_MEMORY.as_secs_f64()).min(1.0);
        let (takes, last) = (state.takes.as_secs_f64(), took.as_secs_f64());
        let weight = if last > takes { weight(took) } else { weight(elapsed) };
        state.takes = Duration::from_secs_f64(takes + (last - takes) * weight);
        if took >= DISK_WELL_BELOW && state.takes >= DISK_WELL_BELOW {
            state.well_since = now;
        }
    }

    /// How long the disk has not answered.
    fn waits(&self, now: Time) -> Duration {
        match self.busy_since.load(Ordering::Acquire) {
            IDLE => Duration::ZERO,
            since => now - Time(since),
        }
    }

    /// Takes what a worker's turn saw. Returns what follows from it, to one caller only.
    pub fn observe(&self, now: Time, seen: Seen) -> Option<Change> {
        if seen == Seen::default() && !self.gives_way() {
            return None;
        }
        let waits = self.waits(now);
        let mut state = self.state.lock();
        if let Some(behind) = seen.behind {
            if now >= state.seen_at + DISK_MEMORY {
                // What was long ago says nothing of now.
                (state.behind, state.samples) = (Duration::ZERO, 0);
            }
            // An average of about the last eight.
            state.behind = (state.behind * 7 + behind) / 8;
            state.samples = state.samples.saturating_add(1);
            state.seen_at = now;
        }
        if waits >= DISK_WELL_BELOW.max(self.slow) {
            state.well_since = now;
        }
        if !self.gives_way() {
            let change = self.must_give_way(&state, seen, waits)?;
            if broken!(SlowDiskGivesWay) {
                return None;
            }
            let again = state.gave_way_at.is_some_and(|at| now < at + MEMORY_OF_EPISODES);
            state.well_after = match again {
                true => (state.well_after * 2).min(DISK_WELL_AFTER.1),
                false => DISK_WELL_AFTER.0,
            };
            state.gave_way_at = Some(now);
            state.well_since = now;
            self.set(true);
            return Some(change);
        }
        // A disk that does not answer has kept `well_since` up to now.
        if now < state.well_since + state.well_after || now >= state.wrote_at + state.well_after {
            return None;
        }
        (state.behind, state.samples) = (Duration::ZERO, 0);
        self.set(false);
        Some(Change::Well)
    }

    fn must_give_way(&self, state: &State, seen: Seen, waits: Duration) -> Option<Change> {
        if waits >= self.stalled && seen.waits.is_some_and(|since| since >= self.stalled) {
            return Some(Change::Stalled(waits));
        }
        // An average over long writes needs as long to rise.
        let is_late = state.samples >= MIN_SAMPLES && state.behind >= self.slow / 2;
        (state.takes >= self.slow && is_late).then_some(Change::Slow(state.takes))
    }

    /// There is nothing that this store could lead: what its disk does is not known, and does not
    /// matter.
    pub fn leads_nothing(&self) -> Option<Change> {
        let _state = self.state.lock();
        if !self.gives_way() {
            return None;
        }
        self.set(false);
        Some(Change::Well)
    }

    /// Whether the log writer has nothing to do.
    pub fn is_idle(&self) -> bool {
        self.busy_since.load(Ordering::Acquire) == IDLE
    }

    fn set(&self, gives_way: bool) {
        self.gives_way.store(gives_way, Ordering::Release);
        // Of several stores in one process, each counts.
        let slow = metrics::gauge!("esker_stores_with_slow_disk");
        if gives_way {
            slow.increment(1.0)
        } else {
            slow.decrement(1.0)
        }
        self.changed.notify_one();
    }
}

/// After so long without, the store gives way for as short as the first time.
const MEMORY_OF_EPISODES: Duration = Duration::from_secs(3_600);

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn at(ms: u64) -> Time {
        Time(ms * 1_000_000)
    }

    /// A disk, and the time.
    struct Bench {
        disk: DiskWatch,
        now: u64,
    }

    impl Bench {
        fn new() -> Bench {
            Bench { disk: DiskWatch::new(100 * MS, 1_000 * MS), now: 10_000 }
        }

        /// A write that takes so long, and comes so much later than on the others.
        fn write(&mut self, takes: u64, behind: u32) -> Option<Change> {
            self.disk.handed(at(self.now));
            self.now += takes;
            self.disk.done(at(self.now), false);
            self.disk.observe(at(self.now), Seen { behind: Some(behind * MS), waits: None })
        }

        fn rest(&mut self, ms: u64) {
            self.now += ms;
        }

        /// Writes of so long, as the others' or not, until the store gives way; the time.
        fn until_it_gives_way(&mut self, takes: u64, behind: u32) -> Option<u64> {
            let began = self.now;
            while self.now < began + 60_000 {
                if self.write(takes, behind).is_some() {
                    return Some(self.now - began);
                }
            }
            None
        }
    }

    #[test]
    fn a_disk_that_is_slower_than_the_others_gives_way_within_two_seconds() {
        let mut bench = Bench::new();
        for _ in 0..1_000 {
            assert_eq!(bench.write(2, 0), None);
        }
        let within = bench.until_it_gives_way(200, 195).expect("it is slow");
        assert!(within <= 2_000, "{within} ms");
        assert!(bench.disk.gives_way());
        assert!(Bench::new().until_it_gives_way(400, 390).is_some_and(|within| within <= 2_000));
    }

    #[test]
    fn one_write_that_takes_long_is_no_slow_disk() {
        for (takes, every) in [(300, 1), (450, 5), (900, 50)] {
            let mut bench = Bench::new();
            for _ in 0..20 {
                for _ in 0..2_000 / every {
                    assert_eq!(bench.write(2, 0), None);
                    bench.rest(every);
                }
                assert_eq!(bench.write(takes.min(400), takes as u32), None, "{takes}");
                bench.rest(2_000);
            }
        }
    }

    #[test]
    fn a_disk_that_is_as_slow_as_the_others_and_a_late_region_on_a_fast_disk_move_nothing() {
        assert_eq!(Bench::new().until_it_gives_way(300, 20), None);
        assert_eq!(Bench::new().until_it_gives_way(3, 900), None);
    }

    #[test]
    fn a_disk_that_does_not_answer_gives_way_and_is_well_when_it_has_answered_for_a_while() {
        let mut bench = Bench::new();
        bench.disk.handed(at(10_000));
        let waits = |ms: u32| Seen { waits: Some(ms * MS), behind: None };
        assert_eq!(bench.disk.observe(at(10_900), waits(880)), None);
        let stalled = bench.disk.observe(at(11_100), waits(1_080));
        assert_eq!(stalled, Some(Change::Stalled(1_100 * MS)));
        // It says nothing for a minute: that is no sign of health.
        for second in 12..70 {
            assert_eq!(bench.disk.observe(at(second * 1_000), Seen::default()), None);
        }
        bench.now = 70_000;
        bench.disk.done(at(bench.now), false);
        let well_again = |bench: &mut Bench| {
            let began = bench.now;
            loop {
                bench.rest(500);
                bench.disk.handed(at(bench.now));
                bench.rest(3);
                bench.disk.done(at(bench.now), false);
                match bench.disk.observe(at(bench.now), Seen::default()) {
                    Some(change) => break (change, bench.now - began),
                    None => assert!(bench.now < began + 900_000),
                }
            }
        };
        let (change, within) = well_again(&mut bench);
        assert_eq!(change, Change::Well);
        assert!((10_000..20_000).contains(&within), "{within}");
        assert!(!bench.disk.gives_way());

        // The next time it takes longer.
        bench.until_it_gives_way(300, 290).expect("it is slow");
        let (_, next) = well_again(&mut bench);
        assert!((20_000..40_000).contains(&next), "{next}");
    }

    #[test]
    fn a_disk_under_load_is_well_again_although_some_writes_take_long() {
        let mut bench = Bench::new();
        bench.until_it_gives_way(300, 290).expect("it is slow");
        let began = bench.now;
        while bench.disk.gives_way() {
            for n in 0..20 {
                bench.write(if n == 0 { 80 } else { 10 }, 0);
            }
            assert!(bench.now < began + 30_000);
        }
    }
}
