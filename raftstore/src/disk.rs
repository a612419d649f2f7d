//! Whether the disk of this store's log keeps up with those of the other stores.
//!
//! A leader needs no disk of its own to commit: its followers' disks are enough. So a leader knows
//! best that its disk is slow, or does not answer: what the others have made durable is not durable
//! here. Then its store gives way: it hands over the regions that it leads, and does not seek to lead
//! until its disk is well again. A disk that is as slow as those of the others is no reason, because
//! nobody would do better.
//!
//! In: what each worker's turn saw. Out: whether the store gives way, which workers, placement and
//! the log are told.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use esker_mutants::broken;
use esker_raft::Time;
use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::config::{DISK_PROBE, DISK_WELL_AFTER, DISK_WELL_BELOW, SLOW_DISK_SAMPLES};

/// What one turn of a worker saw of the disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// How long after the others this store had made something durable, at most.
    pub behind: Option<Duration>,
    /// How long the others have had something that this store still does not have.
    pub waits: Option<Duration>,
    /// How long a write of the log took, at most.
    pub took: Option<Duration>,
}

impl Seen {
    /// A write that followed the others' after so long.
    pub fn was_behind(&mut self, by: Duration) {
        self.behind = self.behind.max(Some(by));
    }

    /// A write that has not followed the others' for so long.
    pub fn waits_for(&mut self, since: Duration) {
        self.waits = self.waits.max(Some(since));
    }

    /// A write that took so long.
    pub fn wrote(&mut self, within: Duration) {
        self.took = self.took.max(Some(within));
    }
}

/// The state of a store's disk, which its workers share.
pub struct DiskWatch {
    /// See [`crate::config::StoreConfig::slow_disk`].
    slow: Duration,
    /// See [`crate::config::StoreConfig::stalled_disk`].
    stalled: Duration,
    gives_way: AtomicBool,
    changed: Notify,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// The average of how far behind the others the last writes were.
    behind: Duration,
    samples: u32,
    /// When something was slow last, and when something was seen at all.
    slow_at: Time,
    seen_at: Time,
    probe_at: Time,
}

/// What changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// The store gives way from now on, because something has waited, or is on average behind, for
    /// so long.
    Stalled(Duration),
    /// See [`Change::Stalled`].
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
            state: Mutex::default(),
        }
    }

    /// Whether the store hands its regions over, and does not seek to lead.
    pub fn gives_way(&self) -> bool {
        self.gives_way.load(Ordering::Acquire)
    }

    /// Completes when [`gives_way`](Self::gives_way) has changed since the last call.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Takes what a turn saw. Returns what follows from it, to one caller only.
    pub fn observe(&self, now: Time, seen: Seen) -> Option<Change> {
        if seen == Seen::default() && !self.gives_way() {
            return None;
        }
        let mut state = self.state.lock();
        if let Some(behind) = seen.behind {
            // An average of about the last four.
            state.behind = (state.behind * 3 + behind) / 4;
            state.samples = state.samples.saturating_add(1);
        }
        if seen.behind.is_some() || seen.took.is_some() {
            state.seen_at = now;
        }
        let is_slow = |time: Option<Duration>| time.is_some_and(|time| time >= DISK_WELL_BELOW);
        if is_slow(seen.behind) || is_slow(seen.waits) || is_slow(seen.took) {
            state.slow_at = now;
        }
        if !self.gives_way() {
            let change = match seen.waits.filter(|since| *since >= self.stalled) {
                Some(since) => Change::Stalled(since),
                None if state.samples >= SLOW_DISK_SAMPLES && state.behind >= self.slow => {
                    Change::Slow(state.behind)
                }
                None => return None,
            };
            if broken!(SlowDiskGivesWay) {
                return None;
            }
            state.slow_at = now;
            state.probe_at = now;
            self.set(true);
            return Some(change);
        }
        // Nothing is known of a disk that answered nothing.
        let is_well =
            now >= state.slow_at + DISK_WELL_AFTER && now < state.seen_at + 2 * DISK_PROBE;
        if !is_well {
            return None;
        }
        (state.behind, state.samples) = (Duration::ZERO, 0);
        self.set(false);
        Some(Change::Well)
    }

    /// Whether the log is to be written now for no other reason than to see how long it takes: the
    /// store gives way, and perhaps has nothing else to write.
    pub fn must_probe(&self, now: Time) -> bool {
        if !self.gives_way() {
            return false;
        }
        let mut state = self.state.lock();
        if now < state.probe_at {
            return false;
        }
        state.probe_at = now + DISK_PROBE;
        true
    }

    fn set(&self, gives_way: bool) {
        self.gives_way.store(gives_way, Ordering::Release);
        metrics::gauge!("esker_store_disk_slow").set(f64::from(u8::from(gives_way)));
        self.changed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn watch() -> DiskWatch {
        DiskWatch::new(100 * MS, 1_000 * MS)
    }

    fn at(ms: u64) -> Time {
        Time(ms * 1_000_000)
    }

    fn behind(ms: u32) -> Seen {
        Seen { behind: Some(ms * MS), took: Some(ms * MS), ..Seen::default() }
    }

    #[test]
    fn a_disk_that_is_slower_than_the_others_gives_way_and_one_slow_write_does_not() {
        let disk = watch();
        assert_eq!(disk.observe(at(0), behind(350)), None);
        for n in 1..100 {
            assert_eq!(disk.observe(at(n), behind(2)), None);
        }
        let verdicts: Vec<_> =
            (100..120).filter_map(|n| disk.observe(at(n * 10), behind(200))).collect();
        assert!(matches!(verdicts[..], [Change::Slow(by)] if by >= 100 * MS), "{verdicts:?}");
        assert!(disk.gives_way());
    }

    #[test]
    fn a_disk_that_does_not_answer_gives_way_and_is_well_again_when_it_has_answered_for_a_while() {
        let disk = watch();
        let waits = |ms: u32| Seen { waits: Some(ms * MS), ..Seen::default() };
        assert_eq!(disk.observe(at(900), waits(900)), None);
        assert_eq!(disk.observe(at(1_100), waits(1_100)), Some(Change::Stalled(1_100 * MS)));
        // It says nothing for a minute: that is no sign of health.
        assert!(disk.must_probe(at(1_100)));
        assert!(!disk.must_probe(at(1_200)), "one probe at a time");
        assert_eq!(disk.observe(at(60_000), Seen::default()), None);
        let mut now = 60_000;
        let well = loop {
            now += 500;
            let seen = Seen { took: Some(3 * MS), ..Seen::default() };
            if let Some(change) = disk.observe(at(now), seen) {
                break change;
            }
            assert!(now < 200_000);
        };
        assert_eq!(well, Change::Well);
        assert!(!disk.gives_way());
        assert!(!disk.must_probe(at(now + 10_000)));
    }

    #[test]
    fn a_slow_write_now_and_then_keeps_it_from_being_well() {
        let disk = watch();
        disk.observe(at(0), Seen { waits: Some(2_000 * MS), ..Seen::default() });
        for second in 1..100_u64 {
            let took = if second % 5 == 0 { 300 * MS } else { MS };
            let seen = Seen { took: Some(took), ..Seen::default() };
            assert_eq!(disk.observe(at(second * 1_000), seen), None);
        }
    }
}
