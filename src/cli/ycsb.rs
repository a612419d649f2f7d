//! `esker ycsb`: the benchmark's options, its progress on a terminal, and its tables.

mod target;

use std::fmt::Write;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, Subcommand};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};
use serde::Serialize;

use self::target::Target;
use super::cluster::ClusterArguments;
use super::error::CliError;
use super::number::whole;
use super::output::{Align, one_line, print, print_json, table};
use crate::ycsb::{
    self, Database, GIVE_UP_AFTER, Length, Options, PhaseReport, Progress, RecordShape, Workload,
};

/// Operations of a run for which neither a number nor a time is given.
const DEFAULT_OPERATIONS: u64 = 100_000;

/// The most clients. With more, the benchmark would measure its own queues.
const MAX_THREADS: u64 = 4_096;

/// The most records. The benchmark computes their popularity before it begins.
const MAX_RECORDS: u64 = 1_000_000_000;

/// The most operations, and the longest run: a week.
const MAX_OPERATIONS: u64 = 1_000_000_000_000;
const MAX_SECONDS: u64 = 7 * 24 * 60 * 60;

/// The most bytes of a record, which is one write to a region, with room for its key.
const MAX_RECORD_BYTES: u64 = 7 << 20;

/// The most bytes of the records in one request of the load phase. Each client has them in memory.
const MAX_REQUEST_BYTES: u64 = 64 << 20;

/// The most records in one request of the load phase.
const MAX_BATCH: u64 = 1_024;

/// The most fields of a record, and the most bytes of a field.
const MAX_FIELDS: u64 = 1_024;
const MAX_FIELD_SIZE: u64 = 1 << 20;

/// How often the progress is drawn.
const REDRAW: Duration = Duration::from_millis(200);

/// Measures a cluster with YCSB, the Yahoo! Cloud Serving Benchmark
///
/// A record is one value of --fields times --value-size bytes, under a hashed key. A
/// read reads all fields. An update writes the whole record, as with YCSB's
/// writeallfields=true; a read-modify-write reads the record and changes one field. The
/// shares of the requests and the popularity of the records are those of YCSB's core
/// workloads.
///
/// --target measures something else than Esker in the same way: TiKV, by its own client,
/// whose placement driver --placement names; etcd, whose members --placement names; or
/// RocksDB alone, in the directory --dir, with every write synced.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  esker ycsb all --workload a --records 100000 --operations 200000 --threads 64"
)]
pub struct YcsbArguments {
    #[command(flatten)]
    cluster: ClusterArguments,
    /// What is measured
    #[arg(long, global = true, value_enum, default_value_t = Target::Esker, value_name = "SYSTEM")]
    target: Target,
    /// The directory of RocksDB's data, with --target rocksdb
    #[arg(long, global = true, value_name = "DIR")]
    dir: Option<PathBuf>,
    #[command(subcommand)]
    command: YcsbCommand,
}

#[derive(Debug, Subcommand)]
enum YcsbCommand {
    /// Inserts the records
    #[command(
        after_help = "Example:\n  esker ycsb load --workload a --records 100000 --threads 64"
    )]
    Load {
        #[command(flatten)]
        dataset: DatasetArguments,
        #[command(flatten)]
        load: LoadArguments,
    },
    /// Makes a workload's requests on the records that were loaded
    #[command(
        after_help = "Example:\n  esker ycsb run --workload b --records 100000 --seconds 60 --threads 64"
    )]
    Run {
        #[command(flatten)]
        dataset: DatasetArguments,
        #[command(flatten)]
        run: RunArguments,
    },
    /// Loads, then runs
    #[command(
        after_help = "Example:\n  esker ycsb all --workload f --records 10000 --operations 50000 --json"
    )]
    All {
        #[command(flatten)]
        dataset: DatasetArguments,
        #[command(flatten)]
        load: LoadArguments,
        #[command(flatten)]
        run: RunArguments,
    },
}

#[derive(Debug, Args)]
struct DatasetArguments {
    /// One of YCSB's core workloads, or u, which only updates
    #[arg(long, value_enum)]
    workload: Workload,
    /// How many records are loaded
    #[arg(long, value_name = "N", default_value_t = 100_000, allow_negative_numbers = true,
          value_parser = whole(1, MAX_RECORDS))]
    records: u64,
    /// How many clients make requests at once
    #[arg(long, value_name = "N", default_value_t = 64, allow_negative_numbers = true,
          value_parser = whole(1, MAX_THREADS))]
    threads: u64,
    /// Bytes of one field
    #[arg(long, value_name = "N", default_value_t = 100, allow_negative_numbers = true,
          value_parser = whole(1, MAX_FIELD_SIZE))]
    value_size: u64,
    /// Fields of a record
    #[arg(long, value_name = "N", default_value_t = 10, allow_negative_numbers = true,
          value_parser = whole(1, MAX_FIELDS))]
    fields: u64,
    /// The same seed makes the same requests
    #[arg(long, value_name = "N", default_value_t = 0, allow_negative_numbers = true)]
    seed: u64,
}

#[derive(Debug, Args)]
struct LoadArguments {
    /// Records in one request of the load
    #[arg(long, value_name = "N", default_value_t = 1, allow_negative_numbers = true,
          value_parser = whole(1, MAX_BATCH))]
    batch: u64,
}

#[derive(Debug, Args)]
struct RunArguments {
    /// Ends after so many operations [default: 100000, unless --seconds is given]
    #[arg(long, value_name = "N", conflicts_with = "seconds", allow_negative_numbers = true,
          value_parser = whole(1, MAX_OPERATIONS))]
    operations: Option<u64>,
    /// Ends after so many seconds, whatever the number of operations
    #[arg(long, value_name = "N", allow_negative_numbers = true,
          value_parser = whole(1, MAX_SECONDS))]
    seconds: Option<u64>,
    /// Runs the workload for so many seconds before it measures
    #[arg(long, value_name = "SECONDS", allow_negative_numbers = true,
          value_parser = whole(1, MAX_SECONDS))]
    warmup: Option<u64>,
}

/// Which phases to run, and with which options.
struct Plan {
    loads: bool,
    runs: bool,
    options: Options,
}

impl Plan {
    /// Checks that a store accepts such records, and that this machine can hold a request of them.
    fn check(&self) -> Result<(), CliError> {
        let (size, batch) = (self.options.shape.value_size() as u64, self.options.batch as u64);
        if size > MAX_RECORD_BYTES {
            return Err(CliError::LargeRecord { size, limit: MAX_RECORD_BYTES });
        }
        // Both factors are bounded, so no product overflows.
        if size * batch > MAX_REQUEST_BYTES {
            return Err(CliError::LargeRequest { size, batch, limit: MAX_REQUEST_BYTES });
        }
        Ok(())
    }
}

impl YcsbCommand {
    fn plan(self) -> Plan {
        let (dataset, load, run) = match self {
            YcsbCommand::Load { dataset, load } => (dataset, Some(load), None),
            YcsbCommand::Run { dataset, run } => (dataset, None, Some(run)),
            YcsbCommand::All { dataset, load, run } => (dataset, Some(load), Some(run)),
        };
        let seconds = |run: &RunArguments| {
            run.seconds.map(|seconds| Length::Time(Duration::from_secs(seconds)))
        };
        let operations = |run: &RunArguments| run.operations.map(Length::Operations);
        let length = run.as_ref().and_then(|run| operations(run).or(seconds(run)));
        Plan {
            loads: load.is_some(),
            runs: run.is_some(),
            options: Options {
                workload: dataset.workload,
                records: dataset.records,
                length: length.unwrap_or(Length::Operations(DEFAULT_OPERATIONS)),
                threads: dataset.threads as usize,
                shape: RecordShape {
                    fields: dataset.fields as usize,
                    field_size: dataset.value_size as usize,
                },
                seed: dataset.seed,
                warmup: run.and_then(|run| run.warmup).map(Duration::from_secs),
                batch: load.map_or(1, |load| load.batch as usize),
                give_up_after: GIVE_UP_AFTER,
            },
        }
    }
}

/// The JSON of a benchmark.
#[derive(Debug, Serialize)]
struct Benchmark {
    phases: Vec<PhaseReport>,
}

impl YcsbArguments {
    pub async fn execute(self) -> Result<(), CliError> {
        let plan = self.command.plan();
        plan.check()?;
        let json = self.cluster.json;
        let phases = self.target.measure(&self.cluster, self.dir.as_deref(), &plan).await?;
        let outcome = first_failure(&phases);
        if json {
            print_json(&Benchmark { phases })?;
        }
        outcome
    }
}

/// Runs the phases of `plan`, and shows each as it ends.
async fn measure<D: Database>(
    database: &Arc<D>,
    plan: &Plan,
    json: bool,
) -> Result<Vec<PhaseReport>, CliError> {
    let show = |report: &PhaseReport| if json { Ok(()) } else { print(&text(report)) };
    let options = &plan.options;
    let mut phases = Vec::new();
    if plan.loads {
        let progress = Arc::new(Progress::default());
        let phase = ycsb::load(database, options, &progress);
        phases.push(watch("load", Some(options.records), &progress, phase).await);
        phases.iter().try_for_each(show)?;
    }
    // Of a database that has gone away there is nothing more to measure.
    if plan.runs && phases.iter().all(|phase| phase.cut_short.is_none()) {
        let operations = match options.length {
            Length::Operations(operations) => Some(operations),
            Length::Time(_) => None,
        };
        let progress = Arc::new(Progress::default());
        let phase = ycsb::run(database, options, &progress);
        phases.push(watch("run", operations, &progress, phase).await);
        phases.last().map_or(Ok(()), show)?;
    }
    Ok(phases)
}

/// Draws the progress of `phase` until it ends, if there is a terminal to draw on.
async fn watch(
    name: &'static str,
    operations: Option<u64>,
    progress: &Progress,
    phase: impl Future<Output = PhaseReport>,
) -> PhaseReport {
    if !std::io::stderr().is_terminal() {
        return phase.await;
    }
    let bar =
        ProgressBar::with_draw_target(operations, ProgressDrawTarget::stderr()).with_message(name);
    let template = match operations {
        Some(_) => "{msg} [{bar:40}] {human_pos}/{human_len} {rate}/s {eta}",
        None => "{msg} [{elapsed}] {human_pos} {rate}/s",
    };
    if let Ok(style) = ProgressStyle::with_template(template) {
        let rate = |state: &ProgressState, text: &mut dyn std::fmt::Write| {
            // A failure to draw the bar cannot be reported.
            let _ = write!(text, "{:.0}", state.per_sec());
        };
        bar.set_style(style.with_key("rate", rate).progress_chars("=> "));
    }
    let mut redraw = tokio::time::interval(REDRAW);
    tokio::pin!(phase);
    let report = loop {
        tokio::select! {
            report = &mut phase => break report,
            _ = redraw.tick() => bar.set_position(progress.ended()),
        }
    };
    bar.finish_and_clear();
    report
}

/// A benchmark with a failed operation has failed, however fast the other operations were.
fn first_failure(phases: &[PhaseReport]) -> Result<(), CliError> {
    if let Some(reason) = phases.iter().find_map(|phase| phase.cut_short.clone()) {
        let first = phases.iter().find_map(|phase| phase.first_error.clone());
        let first = first.unwrap_or_else(|| "none, nothing was answered".into());
        return Err(CliError::CutShort { reason, first });
    }
    let errors = phases.iter().map(|phase| phase.errors).sum();
    if errors == 0 {
        return Ok(());
    }
    let first = phases.iter().find_map(|phase| phase.first_error.clone());
    Err(CliError::Benchmark {
        errors,
        operations: phases.iter().map(|phase| phase.operations).sum(),
        first: first.unwrap_or_default(),
    })
}

/// The table of a phase's requests, and the line with its total at the end.
fn text(report: &PhaseReport) -> String {
    let headers = [
        ("REQUEST", Align::Left),
        ("COUNT", Align::Right),
        ("ERRORS", Align::Right),
        ("PER SECOND", Align::Right),
        ("MEAN µs", Align::Right),
        ("P50 µs", Align::Right),
        ("P95 µs", Align::Right),
        ("P99 µs", Align::Right),
        ("P99.9 µs", Align::Right),
        ("MAX µs", Align::Right),
    ];
    let rows = report.requests.iter().map(|request| {
        let mut row = vec![
            request.kind.name().to_owned(),
            request.count.to_string(),
            request.errors.to_string(),
            format!("{:.0}", request.throughput),
            format!("{:.0}", request.mean_us),
        ];
        let percentiles =
            [request.p50_us, request.p95_us, request.p99_us, request.p999_us, request.max_us];
        row.extend(percentiles.map(|micros| micros.to_string()));
        row
    });
    let partial = match &report.cut_short {
        Some(reason) => format!(" (partial: it ended early, because {reason})"),
        None => String::new(),
    };
    let mut text = format!(
        "{} of workload {}: {} records, {} threads{partial}\n{}\n",
        report.phase.name(),
        report.workload,
        report.records,
        report.threads,
        table(&headers, rows),
    );
    if let Some(error) = &report.first_error {
        let _ = writeln!(text, "first error: {}", one_line(error));
    }
    let _ = write!(
        text,
        "total: {} operations in {:.2} s, {:.0} operations/s, {} errors",
        report.operations, report.seconds, report.throughput, report.errors,
    );
    text
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use clap::Parser;
    use parking_lot::Mutex;

    use super::*;
    use crate::ycsb::DatabaseError;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(subcommand)]
        command: YcsbCommand,
    }

    fn plan(line: &str) -> Result<Plan, clap::Error> {
        let words = std::iter::once("ycsb").chain(line.split_whitespace());
        Line::try_parse_from(words).map(|line| line.command.plan())
    }

    /// Keeps records in memory. Refuses all reads if the test asks for that.
    #[derive(Default)]
    struct Memory {
        table: Mutex<std::collections::BTreeMap<Bytes, Bytes>>,
        refuses_reads: bool,
    }

    impl Database for Memory {
        async fn read(&self, key: Bytes) -> Result<Option<Bytes>, DatabaseError> {
            if self.refuses_reads {
                return Err(DatabaseError::Request("the read was refused".into()));
            }
            Ok(self.table.lock().get(&key).cloned())
        }

        async fn write(&self, key: Bytes, value: Bytes) -> Result<(), DatabaseError> {
            self.table.lock().insert(key, value);
            Ok(())
        }

        async fn write_batch(&self, records: Vec<(Bytes, Bytes)>) -> Result<(), DatabaseError> {
            self.table.lock().extend(records);
            Ok(())
        }

        async fn scan(
            &self,
            start: Bytes,
            limit: u32,
        ) -> Result<Vec<(Bytes, Bytes)>, DatabaseError> {
            let table = self.table.lock();
            let found = table.range(start..).take(limit as usize);
            Ok(found.map(|(key, value)| (key.clone(), value.clone())).collect())
        }
    }

    async fn outcome(line: &str, database: Memory) -> Vec<PhaseReport> {
        let plan = plan(line).expect("the line is right");
        measure(&Arc::new(database), &plan, true).await.expect("nothing is written")
    }

    #[test]
    fn a_record_is_ten_fields_of_a_hundred_bytes_unless_told_otherwise() {
        let plan = plan("all --workload a").expect("complete");
        assert!(plan.loads && plan.runs);
        assert_eq!(plan.options.shape.value_size(), 1_000);
        assert_eq!(plan.options.records, 100_000);
        assert_eq!(plan.options.length, Length::Operations(DEFAULT_OPERATIONS));
        assert_eq!(plan.options.batch, 1);
    }

    #[test]
    fn a_partial_table_says_so_and_the_benchmark_fails_with_the_reason() {
        let report = PhaseReport {
            phase: ycsb::Phase::Run,
            workload: "u",
            records: 9,
            threads: 2,
            seconds: 40.0,
            operations: 3,
            errors: 2,
            throughput: 0.1,
            first_error: Some("store 2 does not answer".into()),
            cut_short: Some("no request succeeded for 30 s".into()),
            requests: Vec::new(),
        };
        let text = text(&report);
        let title = "run of workload u: 9 records, 2 threads (partial: it ended early, because no \
                     request succeeded for 30 s)\n";
        assert!(text.starts_with(title), "{text}");
        let error = first_failure(&[report]).expect_err("it was cut short").to_string();
        assert!(error.contains("store 2 does not answer") && error.contains("30 s"), "{error}");
    }

    #[test]
    fn a_run_has_operations_or_seconds_but_not_both() {
        let timed = plan("run --workload c --seconds 3 --warmup 1").expect("complete");
        assert!(!timed.loads);
        assert_eq!(timed.options.length, Length::Time(Duration::from_secs(3)));
        assert_eq!(timed.options.warmup, Some(Duration::from_secs(1)));
        assert!(plan("run --workload c --seconds 3 --operations 9").is_err());
        assert!(plan("run").is_err(), "which workload?");
        assert!(plan("run --workload g").is_err());
        assert!(plan("run --workload u").is_ok());
        assert!(plan("load --workload a --operations 9").is_err(), "a load inserts all records");
    }

    #[test]
    fn numbers_out_of_their_range_are_refused_by_the_name_of_their_option() {
        let edges = [
            ("records", MAX_RECORDS),
            ("threads", MAX_THREADS),
            ("value-size", MAX_FIELD_SIZE),
            ("fields", MAX_FIELDS),
            ("batch", MAX_BATCH),
            ("operations", MAX_OPERATIONS),
            ("seconds", MAX_SECONDS),
            ("warmup", MAX_SECONDS),
        ];
        for (option, most) in edges {
            assert!(plan(&format!("all --workload a --{option} {most}")).is_ok(), "{option}");
            let outside = [0, most + 1, u64::MAX].map(|number| number.to_string());
            for number in outside.into_iter().chain(["-1".into(), "1.5".into(), "many".into()]) {
                let refused = plan(&format!("all --workload a --{option} {number}"));
                let Err(refused) = refused else { panic!("--{option} {number} is taken") };
                assert!(refused.to_string().contains(&format!("'--{option} <")), "{refused}");
            }
        }
    }

    #[test]
    fn records_that_no_store_would_take_are_refused_before_the_first() {
        let check = |line: &str| plan(line).expect("each number is in its range").check();
        assert!(check("all --workload a --fields 7 --value-size 1048576").is_ok());
        assert!(check("load --workload a --batch 1024").is_ok());
        for (line, named) in [
            ("all --workload a --fields 8 --value-size 1048576", "--value-size"),
            ("run --workload a --fields 1024 --value-size 1048576", "--value-size"),
            ("load --workload a --fields 7 --value-size 1048576 --batch 10", "--batch"),
        ] {
            let refused = check(line).expect_err(line).to_string();
            assert!(refused.contains(named), "{refused}");
        }
    }

    #[tokio::test]
    async fn a_phase_prints_a_row_for_each_kind_and_ends_with_the_total() {
        let phases =
            outcome("all --workload f --records 50 --operations 90 --threads 4", Memory::default())
                .await;
        let text = text(&phases[1]);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[0], "run of workload f: 50 records, 4 threads");
        for (line, start) in lines[1..].iter().zip([
            "REQUEST",
            "read ",
            "update ",
            "read-modify-write ",
            "total: 90",
        ]) {
            assert!(line.starts_with(start), "{text}");
        }
        assert!(text.ends_with("operations/s, 0 errors"), "{text}");
        assert!(first_failure(&phases).is_ok());
    }

    #[tokio::test]
    async fn both_phases_are_one_document_of_json() {
        let phases =
            outcome("all --workload e --records 50 --operations 90 --threads 4", Memory::default())
                .await;
        let json = serde_json::to_value(Benchmark { phases }).expect("plain data");
        assert_eq!(json["phases"][0]["phase"], "load");
        assert_eq!(json["phases"][1]["phase"], "run");
        assert_eq!(json["phases"][1]["operations"], 90);
        assert_eq!(json["phases"][0]["requests"][0]["kind"], "insert");
    }

    #[tokio::test]
    async fn one_failed_operation_fails_the_benchmark_and_is_shown() {
        let database = Memory { refuses_reads: true, ..Memory::default() };
        let phases =
            outcome("all --workload c --records 50 --operations 9 --threads 1", database).await;
        assert!(
            text(&phases[1]).contains("\nfirst error: the read was refused"),
            "{}",
            text(&phases[1])
        );
        let error = first_failure(&phases).expect_err("all reads failed").to_string();
        assert!(
            error.starts_with("9 of 59 operations failed; the first one: the read was refused"),
            "{error}"
        );
    }
}
