//! Waits that grow, with jitter, so that callers that failed together do not come back together.

use std::time::Duration;

/// The next waits after failures without a success between them.
#[derive(Clone, Debug)]
pub struct Backoff {
    first: Duration,
    longest: Duration,
    next: Duration,
}

impl Backoff {
    /// Starts at about `first` and doubles up to about `longest`.
    ///
    /// # Panics
    /// If `first` is longer than `longest`.
    pub fn new(first: Duration, longest: Duration) -> Self {
        assert!(first <= longest, "a backoff grows from its first wait to its longest");
        Backoff { first, longest, next: first }
    }

    /// How long to wait now: between a half and the whole of the current step.
    pub fn step(&mut self) -> Duration {
        let step = self.next;
        self.next = (step * 2).min(self.longest);
        let half = step / 2;
        let spread = u64::try_from(half.as_nanos()).unwrap_or(u64::MAX);
        half + Duration::from_nanos(rand::random_range(0..=spread))
    }

    /// Starts over, after a success.
    pub fn reset(&mut self) {
        self.next = self.first;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_the_longest_and_start_over_after_a_reset() {
        let first = Duration::from_millis(10);
        let longest = Duration::from_millis(80);
        let mut backoff = Backoff::new(first, longest);
        for step in [10, 20, 40, 80, 80].map(Duration::from_millis) {
            let wait = backoff.step();
            assert!(wait >= step / 2 && wait <= step, "{wait:?} is not within {step:?}");
        }
        backoff.reset();
        assert!(backoff.step() <= first);
    }
}
