//! The clocks of the machines: one time for all, of which each machine's clock shows its own view.

use std::sync::atomic::{AtomicI64, AtomicU32, Ordering};

use esker_model::{Clock, Time};
use tokio::time::Instant;

/// What the wall clocks show when a simulation begins: November 2023, in milliseconds.
const EPOCH_MS: i64 = 1_700_000_000_000;

/// One machine's clock.
pub struct MachineClock {
    began: Instant,
    /// How many millionths of a second the monotonic clock goes forward in one second.
    rate_ppm: AtomicU32,
    /// How far the wall clock is ahead.
    ahead_ms: AtomicI64,
}

impl MachineClock {
    /// `drift_ppm`: how many millionths it is too fast.
    pub fn new(began: Instant, drift_ppm: i32) -> Self {
        let rate_ppm = 1_000_000_u32.saturating_add_signed(drift_ppm);
        MachineClock { began, rate_ppm: AtomicU32::new(rate_ppm), ahead_ms: AtomicI64::new(0) }
    }

    /// Sets the wall clock to so many milliseconds before or after the right time.
    pub fn set_ahead_ms(&self, ahead: i64) {
        self.ahead_ms.store(ahead, Ordering::SeqCst);
    }
}

impl Clock for MachineClock {
    fn now(&self) -> Time {
        let right = self.began.elapsed().as_nanos();
        let shown = right * u128::from(self.rate_ppm.load(Ordering::SeqCst)) / 1_000_000;
        Time(u64::try_from(shown).unwrap_or(u64::MAX - 1) + 1)
    }

    fn wall_ms(&self) -> u64 {
        let since = i64::try_from(self.began.elapsed().as_millis()).unwrap_or(i64::MAX);
        let shown = EPOCH_MS + since + self.ahead_ms.load(Ordering::SeqCst);
        u64::try_from(shown).unwrap_or(0)
    }
}
