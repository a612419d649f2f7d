//! The performance of whole clusters on this machine, beside what the machine can do at most and
//! beside etcd: `make bench`. One table, and the same as JSON.
//!
//! Several rounds measure everything in turn, and every ratio is taken within one round, because a
//! machine's speed changes from minute to minute. What is shown is the median of the rounds.

mod limit;
mod options;
mod processor;
mod rows;
mod systems;
mod table;

use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use esker::ycsb::{self, Database, Length, PhaseReport, Progress, RecordShape};
use tokio::signal::unix::{SignalKind, signal};

use self::options::Options;
use self::processor::Meter;
use self::rows::{Load, Round, Sample};
use self::systems::{Running, System};

/// What every part of the benchmark returns, whatever went wrong.
pub type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

fn main() -> Outcome<()> {
    let options = Options::parse();
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        tokio::select! {
            outcome = measure(&options) => outcome,
            // What was started ends with it, and its data goes.
            _ = tokio::signal::ctrl_c() => Err("interrupted".into()),
            _ = terminate.recv() => Err("told to end".into()),
        }
    })
}

async fn measure(options: &Options) -> Outcome<()> {
    let folder = tempfile::Builder::new().prefix("esker-bench-").tempdir_in(&options.dir)?;
    let mut systems = System::all(options, folder.path());
    systems.retain(|system| options.wants(&system.to_string()));
    for system in &mut systems {
        progress(&format!("loading {system}"));
        system.prepare(options).await?;
    }
    let mut rounds = Vec::new();
    let mut outcome = Ok(());
    for number in 1..=options.rounds {
        let mut round = Round::default();
        outcome = measure_round(number, &mut round, &mut systems, folder.path(), options).await;
        rounds.push(round);
        if outcome.is_err() {
            println!("partial, because something failed in round {number}: see below");
            break;
        }
    }
    let table = table::Table::of(&rounds, options);
    println!("{table}");
    std::fs::write(&options.json, table.json()?)?;
    println!("as JSON: {}", options.json.display());
    outcome
}

/// Measures everything once. What is measured when it fails stays in `round`.
async fn measure_round(
    number: u32,
    round: &mut Round,
    systems: &mut [System],
    folder: &Path,
    options: &Options,
) -> Outcome<()> {
    progress(&format!("round {number} of {}: the limits", options.rounds));
    round.limits = limit::measure(folder, options.window())?;
    for system in systems {
        let running = system.start().await?;
        for load in system.loads(options) {
            progress(&format!("round {number} of {}: {system}, {load}", options.rounds));
            let sample = run(&running, load, options).await?;
            round.samples.insert((system.place(), system.regions(), load), sample);
        }
        running.stop().await;
    }
    Ok(())
}

/// One load against a system that runs.
async fn run(running: &Running, load: Load, options: &Options) -> Outcome<Sample> {
    match running {
        Running::Embedded { client, .. } | Running::Processes { client, .. } => {
            requests(client, running, load, options).await
        }
        Running::Etcd { client, .. } => requests(client, running, load, options).await,
    }
}

async fn requests<D: Database>(
    client: &Arc<D>,
    running: &Running,
    load: Load,
    options: &Options,
) -> Outcome<Sample> {
    let table = Arc::new(systems::Table::new(client, load.value_bytes));
    let settings = settings(load, options);
    if load.value_bytes != rows::VALUE_BYTES && load.workload.mix().read > 0 {
        return Err("only the records of the usual size were loaded".into());
    }
    // The warm-up is not counted, and the processor's clock starts after it.
    let length = Length::Time(options.warm_up());
    let warm = ycsb::Options { length, seed: settings.seed + 1, ..settings.clone() };
    check(&ycsb::run(&table, &warm, &Arc::new(Progress::default())).await)?;
    let meter = Meter::start(running.processes());
    let report = ycsb::run(&table, &settings, &Arc::new(Progress::default())).await;
    let processor = meter.read();
    check(&report)?;
    Ok(Sample::new(&report, processor, load))
}

fn settings(load: Load, options: &Options) -> ycsb::Options {
    ycsb::Options {
        workload: load.workload,
        records: load.records(),
        length: Length::Time(options.window()),
        threads: load.clients,
        shape: RecordShape { fields: 1, field_size: load.value_bytes },
        seed: 7,
        warmup: None,
        batch: 1,
        give_up_after: Duration::from_secs(30),
    }
}

/// A benchmark in which anything failed measures nothing.
fn check(report: &PhaseReport) -> Outcome<()> {
    match (&report.cut_short, &report.first_error) {
        (Some(reason), _) | (None, Some(reason)) => {
            Err(format!("{} of {} operations failed: {reason}", report.errors, report.operations)
                .into())
        }
        (None, None) => Ok(()),
    }
}

fn progress(text: &str) {
    eprintln!("{text}");
}
