//! The timestamp oracle: 64 bits, physical milliseconds `<< 18 | logical`, that never go back.
//!
//! Flows in: the wall clock, requests, and notices that a window is durable. Flows out: timestamps,
//! and the bound that should be made durable next.
//!
//! Why they are monotone:
//!
//! - Within one leader, by memory: a physical part is never smaller than the one given before,
//!   whatever the wall clock does.
//! - Across leaders and restarts, by the window: nothing is given at or above a bound that is
//!   durable in the replicated state, and a new leader starts *at* that bound. So everything that
//!   it gives is larger than everything before, also when its own clock is behind.
//! - In real time (a later request gets a larger timestamp), by the lease: the caller hands nothing
//!   out without one. So a deposed leader does not return a small timestamp after its successor
//!   returned a large one.
//!
//! When a millisecond's logical part overflows, the physical part advances ahead of the wall clock,
//! up to the bound.

pub use esker_model::timestamp::{LOGICAL_LIMIT, MAX_PHYSICAL, Timestamp};
use esker_mutants::broken;
use thiserror::Error;

/// How far ahead of the clock a durable write reserves, in milliseconds.
pub const WINDOW_MS: u64 = 3_000;
/// A new window is written when less than this is left, in milliseconds.
pub const WINDOW_LOW_MS: u64 = 1_500;
/// Why no timestamp was given.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum TimestampError {
    #[error("{count} timestamps in one request: at most {LOGICAL_LIMIT} are given")]
    TooMany { count: u32 },
    #[error("the durable window of timestamps is used up; the next one is being written")]
    WindowExhausted,
}

/// Hands out timestamps below a durable bound.
#[derive(Debug)]
pub struct TimestampOracle {
    /// The smallest timestamp that may be given next.
    physical: u64,
    logical: u64,
    /// Physical parts below this are reserved on disk.
    durable: u64,
}

impl TimestampOracle {
    /// Continues at `durable`, the bound (milliseconds) read from the replicated state; `None` if
    /// there is none yet.
    pub fn resume(durable: Option<u64>) -> Self {
        let bound = durable.unwrap_or(0);
        Self { physical: bound, logical: 0, durable: bound }
    }

    /// The bound (milliseconds) to write next, when little of the window is left at `wall_ms`.
    pub fn wanted_bound(&self, wall_ms: u64) -> Option<u64> {
        let from = self.physical.max(wall_ms.min(MAX_PHYSICAL));
        let bound = from.saturating_add(WINDOW_MS).min(MAX_PHYSICAL);
        (self.durable < from.saturating_add(WINDOW_LOW_MS) && bound > self.durable).then_some(bound)
    }

    /// Notes that the replicated state holds `bound` now.
    pub fn bound_is_durable(&mut self, bound: u64) {
        self.durable = self.durable.max(bound);
    }

    /// Draws `count` timestamps with one physical part (zero counts as one) and returns the last.
    pub fn allocate(&mut self, count: u32, wall_ms: u64) -> Result<Timestamp, TimestampError> {
        let count_of = u64::from(count.max(1));
        if count_of > LOGICAL_LIMIT {
            return Err(TimestampError::TooMany { count });
        }
        let mut physical = self.physical;
        let mut logical = self.logical;
        // If the clock stepped far ahead, time goes on inside the present window until the next one
        // is durable.
        let now = wall_ms.min(self.durable.saturating_sub(1));
        if now > physical || broken!(TimestampsGoForward) {
            physical = now;
            logical = 0;
        }
        if logical + count_of > LOGICAL_LIMIT {
            physical += 1;
            logical = 0;
        }
        if physical >= self.durable {
            return Err(TimestampError::WindowExhausted);
        }
        self.physical = physical;
        self.logical = logical + count_of;
        Ok(Timestamp::new(physical, self.logical - 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const NOON: u64 = 1_700_000_000_000;

    fn started(wall_ms: u64) -> TimestampOracle {
        let mut oracle = TimestampOracle::resume(None);
        oracle.bound_is_durable(oracle.wanted_bound(wall_ms).unwrap());
        oracle
    }

    #[test]
    fn a_batch_is_answered_by_its_last_timestamp() {
        let mut oracle = started(NOON);
        assert_eq!(oracle.allocate(10, NOON), Ok(Timestamp::new(NOON, 9)));
        assert_eq!(oracle.allocate(1, NOON), Ok(Timestamp::new(NOON, 10)));
        assert_eq!(oracle.allocate(2, NOON + 1), Ok(Timestamp::new(NOON + 1, 1)));
    }

    #[test]
    fn a_full_millisecond_flows_over_into_the_next() {
        let mut oracle = started(NOON);
        oracle.allocate(LOGICAL_LIMIT as u32 - 1, NOON).unwrap();
        assert_eq!(oracle.allocate(2, NOON), Ok(Timestamp::new(NOON + 1, 1)));
        assert_eq!(
            oracle.allocate(LOGICAL_LIMIT as u32 + 1, NOON),
            Err(TimestampError::TooMany { count: LOGICAL_LIMIT as u32 + 1 })
        );
    }

    #[test]
    fn nothing_is_given_without_a_durable_window() {
        let mut oracle = TimestampOracle::resume(None);
        assert_eq!(oracle.allocate(1, NOON), Err(TimestampError::WindowExhausted));
        let mut oracle = TimestampOracle::resume(Some(NOON));
        assert_eq!(oracle.allocate(1, NOON - 5_000), Err(TimestampError::WindowExhausted));
    }

    #[test]
    fn a_new_leader_with_a_slow_clock_starts_at_the_saved_bound() {
        let mut old = started(NOON);
        let last = old.allocate(1, NOON).unwrap();
        let mut new = TimestampOracle::resume(Some(NOON + WINDOW_MS));
        let slow = NOON - 3_600_000;
        new.bound_is_durable(new.wanted_bound(slow).unwrap());
        assert!(new.allocate(1, slow).unwrap() > last);
    }

    #[test]
    fn a_clock_that_leaps_ahead_waits_for_its_window_and_goes_on_meanwhile() {
        let mut oracle = started(NOON);
        let leap = NOON + 86_400_000;
        assert_eq!(oracle.allocate(1, leap), Ok(Timestamp::new(NOON + WINDOW_MS - 1, 0)));
        oracle.bound_is_durable(oracle.wanted_bound(leap).unwrap());
        assert_eq!(oracle.allocate(1, leap), Ok(Timestamp::new(leap, 0)));
    }

    #[derive(Clone, Debug)]
    enum Event {
        Give(u32),
        Clock(i64),
        Save,
        /// The write became durable, but the leader that made it is gone.
        SaveAndLose,
        Restart,
    }

    fn event() -> impl Strategy<Value = Event> {
        prop_oneof![
            6 => (1u32..3_000).prop_map(Event::Give),
            2 => (200_000u32..262_144).prop_map(Event::Give),
            3 => (-100_000i64..100_000).prop_map(Event::Clock),
            3 => Just(Event::Save),
            1 => Just(Event::SaveAndLose),
            1 => Just(Event::Restart),
        ]
    }

    proptest! {
        #[test]
        fn timestamps_never_go_back_over_leaders_restarts_and_clock_steps(
            events in proptest::collection::vec(event(), 1..300)
        ) {
            let mut saved: Option<u64> = None;
            let mut wall = NOON;
            let mut oracle = TimestampOracle::resume(saved);
            let mut last = Timestamp(0);
            for event in events {
                match event {
                    Event::Give(count) => {
                        if let Ok(given) = oracle.allocate(count, wall) {
                            prop_assert!(given.logical() + 1 >= u64::from(count));
                            let first = Timestamp(given.0 - u64::from(count) + 1);
                            prop_assert!(first > last, "{first} after {last}");
                            prop_assert!(given.physical() < saved.unwrap());
                            last = given;
                        }
                    }
                    Event::Clock(step) => wall = wall.saturating_add_signed(step),
                    Event::Save => {
                        if let Some(bound) = oracle.wanted_bound(wall) {
                            prop_assert!(Some(bound) > saved);
                            saved = Some(bound);
                            oracle.bound_is_durable(bound);
                            prop_assert!(oracle.allocate(1, wall).map(|given| last = given).is_ok());
                        }
                    }
                    Event::SaveAndLose => {
                        saved = oracle.wanted_bound(wall).or(saved);
                        oracle = TimestampOracle::resume(saved);
                    }
                    Event::Restart => oracle = TimestampOracle::resume(saved),
                }
            }
        }
    }
}
