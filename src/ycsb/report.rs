//! The result of a phase, as plain data. Serialized, it is the JSON that programs read.

use std::time::Duration;

use serde::Serialize;

use super::measure::{Kind, Measurements, Tally};
use super::workload::Workload;

/// A part of a benchmark.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    Load,
    Run,
}

impl Phase {
    pub fn name(self) -> &'static str {
        match self {
            Phase::Load => "load",
            Phase::Run => "run",
        }
    }
}

/// Why a phase ended before its time. What it measured until then is in its report.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum CutShort {
    /// No request succeeded for so many seconds.
    Silent { seconds: u64 },
}

impl std::fmt::Display for CutShort {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            CutShort::Silent { seconds } => {
                write!(f, "no request succeeded for {seconds} s")
            }
        }
    }
}

/// One kind of request in one phase. Latencies are in microseconds, of the requests
/// that succeeded.
#[derive(Debug, Serialize)]
pub struct RequestReport {
    pub kind: Kind,
    pub count: u64,
    pub errors: u64,
    pub throughput: f64,
    pub mean_us: f64,
    pub p50_us: u64,
    pub p95_us: u64,
    pub p99_us: u64,
    pub p999_us: u64,
    pub max_us: u64,
}

/// One phase. `throughput` is in successful operations per second. `operations` also counts those
/// that failed.
#[derive(Debug, Serialize)]
pub struct PhaseReport {
    pub phase: Phase,
    pub workload: &'static str,
    pub records: u64,
    pub threads: usize,
    pub seconds: f64,
    pub operations: u64,
    pub errors: u64,
    pub throughput: f64,
    pub first_error: Option<String>,
    /// Why the phase ended before its time, if it did.
    pub cut_short: Option<String>,
    pub requests: Vec<RequestReport>,
}

impl PhaseReport {
    pub fn new(
        phase: Phase,
        workload: Workload,
        records: u64,
        threads: usize,
        elapsed: Duration,
        measured: &Measurements,
        cut_short: Option<CutShort>,
    ) -> Self {
        let seconds = elapsed.as_secs_f64();
        let requests = Kind::ALL
            .into_iter()
            .filter_map(|kind| Some(RequestReport::new(kind, measured.tally(kind)?, seconds)))
            .collect();
        PhaseReport {
            phase,
            workload: workload.letter(),
            records,
            threads,
            seconds,
            operations: measured.operations,
            errors: measured.failed_operations,
            throughput: rate(measured.operations - measured.failed_operations, seconds),
            first_error: measured.first_error().map(str::to_owned),
            cut_short: cut_short.map(|reason| reason.to_string()),
            requests,
        }
    }
}

impl RequestReport {
    fn new(kind: Kind, tally: &Tally, seconds: f64) -> Self {
        let latencies = &tally.latencies;
        let count = latencies.len();
        RequestReport {
            kind,
            count,
            errors: tally.errors,
            throughput: rate(count, seconds),
            mean_us: latencies.mean(),
            p50_us: latencies.value_at_quantile(0.5),
            p95_us: latencies.value_at_quantile(0.95),
            p99_us: latencies.value_at_quantile(0.99),
            p999_us: latencies.value_at_quantile(0.999),
            max_us: latencies.max(),
        }
    }
}

/// A count per second; zero in no time.
fn rate(count: u64, seconds: f64) -> f64 {
    if seconds > 0.0 { count as f64 / seconds } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    fn report() -> PhaseReport {
        let mut measured = Measurements::default();
        (measured.operations, measured.failed_operations) = (3, 1);
        let _ = measured.record::<_, String>(Kind::Read, Instant::now(), Ok(()));
        let _ = measured.record::<_, String>(Kind::Update, Instant::now(), Ok(()));
        let _ =
            measured.record::<(), _>(Kind::Update, Instant::now(), Err("region 2 has no leader"));
        PhaseReport::new(Phase::Run, Workload::A, 100, 4, Duration::from_secs(2), &measured, None)
    }

    #[test]
    fn json_has_the_numbers_under_stable_names() {
        let json = serde_json::to_value(report()).expect("a report is plain data");
        assert_eq!(json["phase"], "run");
        assert_eq!(json["workload"], "a");
        assert_eq!(json["operations"], 3);
        assert_eq!(json["errors"], 1);
        assert_eq!(json["throughput"], 1.0);
        assert_eq!(json["first_error"], "region 2 has no leader");
        let requests = json["requests"].as_array().expect("a list of kinds");
        assert_eq!(requests.len(), 2);
        for name in [
            "kind",
            "count",
            "errors",
            "throughput",
            "mean_us",
            "p50_us",
            "p95_us",
            "p99_us",
            "p999_us",
            "max_us",
        ] {
            assert!(requests[1].get(name).is_some(), "{name} is missing");
        }
        assert_eq!(requests[1]["kind"], "update");
        assert_eq!(requests[1]["errors"], 1);
    }
}
