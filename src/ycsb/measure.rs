//! Latencies and failures. Each client records its own, and they are added up at the end, so that
//! no client waits for another to record a number.

use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use serde::Serialize;

/// The longest latency that is distinguished from longer ones.
const LONGEST: Duration = Duration::from_secs(600);

/// Significant decimal digits of a recorded latency.
const PRECISION: u8 = 3;

/// A kind of request, as the report names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    Read,
    Update,
    Insert,
    /// Many inserts in one request, counted and measured as one.
    InsertBatch,
    Scan,
    /// The whole request. Its read and its update are also counted under their kinds.
    ReadModifyWrite,
}

impl Kind {
    pub const ALL: [Kind; 6] = [
        Kind::Read,
        Kind::Update,
        Kind::Insert,
        Kind::InsertBatch,
        Kind::Scan,
        Kind::ReadModifyWrite,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Kind::Read => "read",
            Kind::Update => "update",
            Kind::Insert => "insert",
            Kind::InsertBatch => "insert-batch",
            Kind::Scan => "scan",
            Kind::ReadModifyWrite => "read-modify-write",
        }
    }
}

/// The requests of one kind.
#[derive(Debug)]
pub struct Tally {
    /// Latencies of the requests that succeeded, in microseconds.
    pub latencies: Histogram<u64>,
    pub errors: u64,
}

impl Tally {
    fn new() -> Self {
        let longest = LONGEST.as_micros() as u64;
        Tally {
            latencies: Histogram::new_with_bounds(1, longest, PRECISION)
                .expect("the bounds of the histogram are constants that it accepts"),
            errors: 0,
        }
    }
}

/// What one client, or all of them together, measured.
#[derive(Debug, Default)]
pub struct Measurements {
    /// By kind. Only kinds that were requested have a tally.
    tallies: [Option<Box<Tally>>; Kind::ALL.len()],
    /// Operations of the workload, successful or not. A read-modify-write counts as one, and a
    /// batch of inserts as many as it has records.
    pub operations: u64,
    pub failed_operations: u64,
    first_error: Option<(Instant, String)>,
}

impl Measurements {
    /// Records the outcome of a request that was sent at `start`, and returns its result.
    pub fn record<T, E: std::fmt::Display>(
        &mut self,
        kind: Kind,
        start: Instant,
        outcome: Result<T, E>,
    ) -> Result<T, E> {
        let now = Instant::now();
        let tally = self.tallies[kind as usize].get_or_insert_with(|| Box::new(Tally::new()));
        match &outcome {
            Ok(_) => {
                let micros = u64::try_from((now - start).as_micros()).unwrap_or(u64::MAX);
                tally.latencies.saturating_record(micros.max(1));
            }
            Err(error) => {
                tally.errors += 1;
                if self.first_error.is_none() {
                    self.first_error = Some((now, error.to_string()));
                }
            }
        }
        outcome
    }

    pub fn tally(&self, kind: Kind) -> Option<&Tally> {
        self.tallies[kind as usize].as_deref()
    }

    pub fn first_error(&self) -> Option<&str> {
        self.first_error.as_ref().map(|(_, error)| error.as_str())
    }

    /// Adds what another client measured.
    pub fn add(&mut self, other: Measurements) {
        self.operations += other.operations;
        self.failed_operations += other.failed_operations;
        self.first_error = match (self.first_error.take(), other.first_error) {
            (Some(ours), Some(theirs)) => Some(if ours.0 <= theirs.0 { ours } else { theirs }),
            (ours, theirs) => ours.or(theirs),
        };
        for (ours, theirs) in self.tallies.iter_mut().zip(other.tallies) {
            match (ours.as_mut(), theirs) {
                (Some(ours), Some(theirs)) => {
                    ours.latencies
                        .add(&theirs.latencies)
                        .expect("all histograms have the same bounds");
                    ours.errors += theirs.errors;
                }
                (None, theirs) => *ours = theirs,
                (Some(_), None) => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ago(micros: u64) -> Instant {
        Instant::now()
            .checked_sub(Duration::from_micros(micros))
            .expect("the machine has been up for longer than this test looks back")
    }

    #[test]
    fn clients_add_up() {
        let mut one = Measurements { operations: 2, ..Measurements::default() };
        let mut two =
            Measurements { operations: 3, failed_operations: 1, ..Measurements::default() };
        let _ = one.record::<_, String>(Kind::Read, ago(1_000), Ok(()));
        let _ = two.record::<_, String>(Kind::Read, ago(50_000), Ok(()));
        let _ = two.record::<_, String>(Kind::Scan, ago(10), Ok(()));
        let _ = two.record::<(), _>(Kind::Read, ago(10), Err("refused"));
        one.add(two);
        let reads = one.tally(Kind::Read).expect("both read");
        assert_eq!((reads.latencies.len(), reads.errors), (2, 1));
        assert!(reads.latencies.max() >= 50_000 && reads.latencies.min() < 50_000);
        assert_eq!(one.tally(Kind::Scan).map(|tally| tally.latencies.len()), Some(1));
        assert!(one.tally(Kind::Update).is_none());
        assert_eq!((one.operations, one.failed_operations), (5, 1));
    }

    #[test]
    fn the_first_error_of_all_clients_is_kept() {
        let mut early = Measurements::default();
        let mut late = Measurements::default();
        let _ = early.record::<(), _>(Kind::Read, Instant::now(), Err("first"));
        let _ = early.record::<(), _>(Kind::Read, Instant::now(), Err("second"));
        let _ = late.record::<(), _>(Kind::Read, Instant::now(), Err("third"));
        late.add(early);
        assert_eq!(late.first_error(), Some("first"));
    }

    #[test]
    fn a_latency_beyond_the_longest_is_kept_as_the_longest() {
        let mut tally = Tally::new();
        tally.latencies.saturating_record(u64::MAX);
        assert!(tally.latencies.max() >= LONGEST.as_micros() as u64);
    }
}
