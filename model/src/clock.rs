//! The one clock.
//!
//! Code whose behaviour depends on the time asks a [`Clock`], so that a test can steer it.
//! Asynchronous code waits by `tokio::time`, which a test can pause and advance. Nothing else
//! reads the time, except to measure how long a disk took, or to hold back a line in a log.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use esker_raft::Time;
use rustix::time::{ClockId, clock_gettime};

/// Monotonic time and wall time.
pub trait Clock: Send + Sync + 'static {
    /// The time of leases and promises. It never goes back, and it goes on while the machine
    /// sleeps. The other members do not sleep with it, so a leader that slept through its lease
    /// must find the lease over when it wakes.
    fn now(&self) -> Time;

    /// The time of silences: for how long others have not been heard. It never goes back, and it
    /// stands still while the machine sleeps, because a sleeping machine cannot hear anything.
    fn awake(&self) -> Time {
        self.now()
    }

    /// Milliseconds since the Unix epoch. This time may step either way. People read it, timestamps
    /// are made of it, and values with a time to live expire by it.
    fn wall_ms(&self) -> u64;

    /// Seconds since the Unix epoch.
    fn wall_s(&self) -> u64 {
        self.wall_ms() / 1_000
    }
}

/// The clocks of the operating system.
///
/// On Linux and Android [`Clock::now`] is `CLOCK_BOOTTIME`. Elsewhere it is `CLOCK_MONOTONIC`,
/// which goes on during sleep on macOS and stands still on some BSDs. On such a BSD, a machine that
/// sleeps must not run a store.
#[derive(Debug)]
pub struct SystemClock {
    /// Nanoseconds of [`SystemClock::ID`].
    start: u64,
    awake: Instant,
}

impl SystemClock {
    #[cfg(any(target_os = "linux", target_os = "android"))]
    const ID: ClockId = ClockId::Boottime;
    #[cfg(not(any(target_os = "linux", target_os = "android")))]
    const ID: ClockId = ClockId::Monotonic;

    /// A clock whose moments count from now.
    pub fn new() -> SystemClock {
        SystemClock { start: Self::nanos(), awake: Instant::now() }
    }

    fn nanos() -> u64 {
        let time = clock_gettime(Self::ID);
        let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
        seconds * 1_000_000_000 + u64::try_from(time.tv_nsec).unwrap_or(0)
    }
}

impl Default for SystemClock {
    fn default() -> Self {
        SystemClock::new()
    }
}

impl Clock for SystemClock {
    fn now(&self) -> Time {
        // A year of nanoseconds is 2^55, so this does not overflow in the life of a process. One is
        // added so that zero, "no lease", is before every moment.
        Time(Self::nanos() - self.start + 1)
    }

    fn awake(&self) -> Time {
        let nanos = u64::try_from(self.awake.elapsed().as_nanos()).unwrap_or(u64::MAX);
        Time(nanos.saturating_add(1))
    }

    fn wall_ms(&self) -> u64 {
        // A clock before 1970 counts as zero. Timestamps then come from placement's durable window
        // alone, which is correct, but slow.
        SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A test cannot put the machine to sleep, but a time namespace can pretend that it slept. In
    /// such a namespace, the clocks that count sleep are ahead of the others.
    #[cfg(target_os = "linux")]
    #[test]
    fn the_clock_of_leases_counts_the_time_that_a_machine_slept() {
        const SLEPT: u64 = 1_000_000;
        const INSIDE: &str = "ESKER_TEST_SLEPT";
        let name = "the_clock_of_leases_counts_the_time_that_a_machine_slept";
        if std::env::var_os(INSIDE).is_some() {
            let awake = clock_gettime(ClockId::Monotonic).tv_sec as u64;
            let clock = SystemClock { start: 0, awake: Instant::now() };
            let counted = clock.now().0 / 1_000_000_000;
            assert!(counted >= awake + SLEPT, "{counted} s counted, {awake} s awake");
            println!("it counts");
            return;
        }
        let me = std::env::current_exe().expect("a test is a program");
        let inside = std::process::Command::new("unshare")
            .args(["--time", "--boottime", &SLEPT.to_string()])
            .arg(me)
            .args(["--nocapture", name])
            .env(INSIDE, "1")
            .output();
        let Ok(inside) = inside else { return };
        let said = String::from_utf8_lossy(&inside.stdout);
        if !said.contains("running 1 test") {
            // Only root may make a time namespace.
            eprintln!("not shown here: {}", String::from_utf8_lossy(&inside.stderr));
            return;
        }
        assert!(inside.status.success() && said.contains("it counts"), "{said}");
    }
}
