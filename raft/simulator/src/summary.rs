//! How much was exercised, because a simulation without events proves nothing.

use std::fmt;

/// Counts of what happened in one run, or in many.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Summary {
    pub runs: u64,
    pub steps: u64,
    pub virtual_ms: u64,
    pub leaders: u64,
    pub witnesses_led: u64,
    pub committed: u64,
    pub applied: u64,
    pub writes: u64,
    pub reads_at_leaders: u64,
    pub reads_at_followers: u64,
    pub reads_failed: u64,
    pub lease_reads_begun: u64,
    pub lease_reads: u64,
    pub changes: u64,
    pub joint: u64,
    pub snapshots: u64,
    pub crashes: u64,
    pub partitions: u64,
    pub schemes: u64,
    pub delivered: u64,
    pub lost: u64,
    pub doubled: u64,
    pub reordered: u64,
    pub recoveries: u64,
    /// Recoveries in spite of a link that stays cut.
    pub around: u64,
    /// Runs with a group that no protocol could have helped: see
    /// `settle::is_hopeless`.
    pub hopeless: u64,
    /// The longest recovery, in virtual milliseconds, and its seed.
    pub worst_recovery_ms: u64,
    pub worst_seed: u64,
}

impl Summary {
    pub fn add(&mut self, other: &Summary) {
        if other.worst_recovery_ms > self.worst_recovery_ms {
            self.worst_recovery_ms = other.worst_recovery_ms;
            self.worst_seed = other.worst_seed;
        }
        for (mine, theirs) in self.counts_mut().into_iter().zip(other.counts()) {
            *mine.1 += theirs.1;
        }
    }

    /// Every count, with its name.
    pub fn counts(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let mut copy = self.clone();
        let counts = copy.counts_mut().map(|(name, count)| (name, *count));
        counts.into_iter()
    }

    fn counts_mut(&mut self) -> [(&'static str, &mut u64); 26] {
        [
            ("runs", &mut self.runs),
            ("steps", &mut self.steps),
            ("virtual time, ms", &mut self.virtual_ms),
            ("leaders elected", &mut self.leaders),
            ("  of them witnesses", &mut self.witnesses_led),
            ("entries committed", &mut self.committed),
            ("entries applied", &mut self.applied),
            ("writes acknowledged", &mut self.writes),
            ("reads at leaders", &mut self.reads_at_leaders),
            ("reads at followers", &mut self.reads_at_followers),
            ("reads given up", &mut self.reads_failed),
            ("lease reads allowed", &mut self.lease_reads_begun),
            ("lease reads answered", &mut self.lease_reads),
            ("changes of members applied", &mut self.changes),
            ("  of them into joint", &mut self.joint),
            ("snapshots installed", &mut self.snapshots),
            ("crashes", &mut self.crashes),
            ("partitions", &mut self.partitions),
            ("schemes", &mut self.schemes),
            ("messages delivered", &mut self.delivered),
            ("messages lost", &mut self.lost),
            ("messages doubled", &mut self.doubled),
            ("messages reordered", &mut self.reordered),
            ("recoveries", &mut self.recoveries),
            ("  of them around a cut link", &mut self.around),
            ("  of them hopeless", &mut self.hopeless),
        ]
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, count) in self.counts() {
            writeln!(f, "{name:<28}{count:>16}")?;
        }
        let worst = format!("{} (seed {})", self.worst_recovery_ms, self.worst_seed);
        writeln!(f, "{:<28}{worst:>16}", "worst recovery, ms")
    }
}
