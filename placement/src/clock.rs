//! Where the placement driver gets the time from; tests bring their own.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use crate::types::Moment;

/// Two clocks: one that people read, and one that never steps.
pub trait Clock: Send + Sync + 'static {
    /// Milliseconds since the Unix epoch; may step either way. Timestamps are
    /// made of it.
    fn wall_ms(&self) -> u64;

    /// Milliseconds on a clock that never goes back. Ages and deadlines are
    /// measured with it.
    fn now(&self) -> Moment;
}

/// The clocks of the operating system.
#[derive(Debug)]
pub struct SystemClock {
    start: Instant,
}

impl SystemClock {
    /// A clock whose moments count from now.
    pub fn new() -> Self {
        Self { start: Instant::now() }
    }
}

impl Default for SystemClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for SystemClock {
    fn wall_ms(&self) -> u64 {
        // A clock before 1970 counts as zero: timestamps then come from the
        // durable window alone, which is correct, only slow.
        SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
    }

    fn now(&self) -> Moment {
        Moment(u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX))
    }
}
