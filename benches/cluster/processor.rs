//! Processor time of this process and of others.

use std::path::Path;
use std::time::Duration;

/// Clock ticks in a second, as Linux counts them for programs.
const TICKS_PER_SECOND: u64 = 100;

/// Processor time since a moment, of this process and of those that it started.
pub struct Meter {
    processes: Vec<u32>,
    before: Duration,
}

impl Meter {
    pub fn start(mut processes: Vec<u32>) -> Meter {
        processes.push(std::process::id());
        let before = total(&processes);
        Meter { processes, before }
    }

    pub fn read(&self) -> Duration {
        total(&self.processes).saturating_sub(self.before)
    }
}

fn total(processes: &[u32]) -> Duration {
    processes.iter().map(|process| used_by(*process).unwrap_or_default()).sum()
}

/// The time that a process and its threads have used; `None` where the system does not say.
fn used_by(process: u32) -> Option<Duration> {
    let stat = std::fs::read_to_string(Path::new("/proc").join(process.to_string()).join("stat"));
    // The name may contain spaces, and ends with the last parenthesis. The 14th and the 15th field
    // are the time in the program and in the kernel.
    let (_, rest) =
        stat.ok()?.rsplit_once(')').map(|(name, rest)| (name.len(), rest.to_owned()))?;
    let mut fields = rest.split_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(Duration::from_millis((user + system) * 1_000 / TICKS_PER_SECOND))
}
