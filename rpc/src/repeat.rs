//! Which of many similar events deserve a line in the log.
//!
//! When a store is away, every attempt to reach it fails, many times a second. The log gets the
//! first failure, then one line a minute with the number of failures that it stands for, and one
//! line when all is well again. The code that can fail owns a [`Repeated`] and reports to it. The
//! time is an argument: an [`Instant`], or the time of another clock.

use std::ops::Sub;
use std::time::{Duration, Instant};

/// The time between two lines about the same failure.
pub const REPEAT_INTERVAL: Duration = Duration::from_secs(60);

/// What is remembered of one kind of failure.
#[derive(Debug, Clone)]
pub struct Repeated<T = Instant> {
    /// When the last line was written.
    told: Option<T>,
    /// Failures since that line.
    untold: u64,
    outage: Option<Outage<T>>,
}

/// Failures without a success between them.
#[derive(Debug, Clone)]
struct Outage<T> {
    began: T,
    times: u64,
    told: bool,
}

/// The failures that are over, for the line about their end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Recovery {
    pub times: u64,
    pub lasted: Duration,
}

impl<T> Repeated<T> {
    pub const fn new() -> Self {
        Repeated { told: None, untold: 0, outage: None }
    }
}

impl<T> Default for Repeated<T> {
    fn default() -> Self {
        Repeated::new()
    }
}

impl<T: Copy + Sub<Output = Duration>> Repeated<T> {
    /// Counts a failure. Returns the number of failures for the line that is due now, this one
    /// included; `None` when no line is due.
    pub fn failed(&mut self, now: T) -> Option<u64> {
        let outage = self.outage.get_or_insert(Outage { began: now, times: 0, told: false });
        outage.times += 1;
        self.untold += 1;
        // This holds across recoveries, too: a thing that breaks and heals twice a second gets one
        // line a minute.
        if self.told.is_some_and(|told| now - told < REPEAT_INTERVAL) {
            return None;
        }
        outage.told = true;
        self.told = Some(now);
        Some(std::mem::take(&mut self.untold))
    }

    /// Counts a success. Returns the failures that are over if there was a line about them; `None`
    /// otherwise.
    pub fn recovered(&mut self, now: T) -> Option<Recovery> {
        let outage = self.outage.take()?;
        outage.told.then(|| Recovery { times: outage.times, lasted: now - outage.began })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A clock that a test sets.
    #[derive(Clone, Copy)]
    struct Second(u64);

    impl Sub for Second {
        type Output = Duration;

        fn sub(self, earlier: Second) -> Duration {
            Duration::from_secs(self.0 - earlier.0)
        }
    }

    #[test]
    fn a_failure_is_told_once_then_once_a_minute_with_the_count_then_once_when_it_is_over() {
        let mut repeated = Repeated::new();
        let told: Vec<(u64, u64)> = (0..=150)
            .filter_map(|second| repeated.failed(Second(second)).map(|times| (second, times)))
            .collect();
        assert_eq!(told, [(0, 1), (60, 60), (120, 60)]);
        let over = Recovery { times: 151, lasted: Duration::from_secs(151) };
        assert_eq!(repeated.recovered(Second(151)), Some(over));
        assert_eq!(repeated.recovered(Second(152)), None, "it was well already");
    }

    #[test]
    fn what_breaks_and_heals_all_the_time_is_not_told_more_often() {
        let mut repeated = Repeated::new();
        let (mut broken, mut healed) = (Vec::new(), 0);
        for second in (0..240).step_by(2) {
            broken.extend(repeated.failed(Second(second)));
            healed += u64::from(repeated.recovered(Second(second + 1)).is_some());
        }
        assert_eq!(broken, [1, 30, 30, 30]);
        assert_eq!(healed, 4, "one end for each beginning that was told");
    }

    #[test]
    fn an_outage_long_after_the_last_is_told_at_once() {
        let mut repeated = Repeated::new();
        assert_eq!(repeated.failed(Second(0)), Some(1));
        assert!(repeated.recovered(Second(1)).is_some());
        assert_eq!(repeated.failed(Second(30)), None);
        // The failure goes on, so it gets its line, late.
        assert_eq!(repeated.failed(Second(61)), Some(2));
        let over = Recovery { times: 2, lasted: Duration::from_secs(40) };
        assert_eq!(repeated.recovered(Second(70)), Some(over));
        assert_eq!(repeated.failed(Second(500)), Some(1));
    }
}
