//! The program: runs seeds, or replays one.

use std::io::{self, IsTerminal as _, Write as _};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use esker_simulator::fleet::{Cut, Fleet, Job, Report};
use esker_simulator::{run, shrink};

/// Simulates whole clusters under every fault that a seed can produce: stores, placement members
/// and clients, in one thread and on one virtual clock. Checks that what clients saw is
/// linearizable, and what must be so when the faults are over.
///
/// Each seed is one cluster and one run. If a promise is broken, the run is cut down to what is
/// needed for it, and the exit status is 1.
#[derive(Parser)]
#[command(
    name = "esker-simulator",
    after_help = "Example: a night's work, and one of its seeds again, told as a story\n  \
                  cargo run -p esker-simulator -- --seeds 10000\n  \
                  cargo run -p esker-simulator -- --seed 4711 --trace"
)]
struct Arguments {
    /// How many seeds to run
    #[arg(long, default_value_t = 100, conflicts_with = "seed")]
    seeds: u64,
    /// The first seed
    #[arg(long, default_value_t = 0, conflicts_with = "seed")]
    from: u64,
    /// Replays this seed only
    #[arg(long)]
    seed: Option<u64>,
    /// Prints what happens
    #[arg(long, requires = "seed")]
    trace: bool,
    /// Faults of the seed that do not happen, by their numbers in the story's head
    #[arg(long, value_name = "NUMBERS", value_delimiter = ',', requires = "seed")]
    without_faults: Vec<usize>,
    /// Clients of the seed that do nothing
    #[arg(long, value_name = "NUMBERS", value_delimiter = ',', requires = "seed")]
    without_actors: Vec<usize>,
    /// How many seeds run at once [default: one for each core]
    #[arg(long)]
    threads: Option<usize>,
    /// Goes on when a promise is broken, and lists all seeds that break one
    #[arg(long, conflicts_with = "seed")]
    all: bool,
    /// Prints what the processes of a fleet tell each other
    #[arg(long, hide = true)]
    report: bool,
    /// A mistake that is made on purpose, in a build with the feature `mutants`
    #[arg(long, hide = true)]
    bug: Option<String>,
}

fn main() -> ExitCode {
    if std::env::var_os("RUST_LOG").is_some() {
        tracing_subscriber::fmt()
            .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
            .with_writer(io::stderr)
            .with_ansi(false)
            .without_time()
            .init();
    }
    let arguments = Arguments::parse();
    let outcome = match arguments.seed {
        Some(seed) => run_one(&arguments, seed),
        None => run_many(&arguments),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        // The reader of our output has closed the pipe.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run_one(arguments: &Arguments, seed: u64) -> io::Result<bool> {
    let cut = Cut {
        faults: arguments.without_faults.iter().copied().collect(),
        actors: arguments.without_actors.iter().copied().collect(),
    };
    let job = Job { seed, cut, bug: arguments.bug.clone() };
    let mut out = io::stdout().lock();
    let plan = job.plan().map_err(io::Error::other)?;
    if arguments.trace {
        writeln!(out, "{plan}")?;
    }
    drop(out);
    let outcome = run::run(&plan, arguments.trace);
    let report = Report::of(seed, &outcome);
    let mut out = io::stdout().lock();
    if arguments.report {
        write!(out, "{report}")?;
        return Ok(report.violation.is_none());
    }
    match &report.violation {
        None => writeln!(
            out,
            "seed {seed}: {} operations, at rest {} ms after the faults, fingerprint {:016x}",
            report.operations, report.rested_ms, report.hash
        )?,
        Some((promise, what)) => writeln!(out, "seed {seed} broke a promise: {promise}\n{what}")?,
    }
    Ok(report.violation.is_none())
}

fn run_many(arguments: &Arguments) -> io::Result<bool> {
    let mut fleet = Fleet::new(std::env::current_exe()?);
    fleet.threads = arguments.threads.unwrap_or(fleet.threads);
    fleet.goes_on = arguments.all;
    let last = arguments.from.saturating_add(arguments.seeds);
    let jobs: Vec<Job> = (arguments.from..last)
        .map(|seed| Job { bug: arguments.bug.clone(), ..Job::of(seed) })
        .collect();
    let (begin, mut progress) = (Instant::now(), Progress::default());
    let result = fleet.run(&jobs, |done| progress.show(&format!("{done} of {} seeds", jobs.len())));
    progress.end();
    let (job, report) = match result {
        Err(_) if arguments.all => return Ok(false),
        Ok(summary) => {
            let mut out = io::stdout().lock();
            writeln!(out, "{:<28}{:>12}", "seeds", summary.runs)?;
            writeln!(out, "{:<28}{:>12}", "operations", summary.operations)?;
            let rest = summary.longest_rest_ms;
            writeln!(out, "{:<28}{:>9} ms", "longest way to rest", rest)?;
            for (what, count) in &summary.counts {
                writeln!(out, "{what:<28}{count:>12}")?;
            }
            let seconds = begin.elapsed().as_secs_f64();
            writeln!(out, "{:<28}{seconds:>10.1} s", "real time")?;
            return Ok(true);
        }
        Err(broken) => *broken,
    };
    let promise = report.violation.as_ref().map_or("", |(promise, _)| promise);
    eprintln!("seed {} broke a promise: {promise}", job.seed);
    let (job, report) = shrink::shrink(&fleet.program, job, report, |attempts| {
        progress.show(&format!("cutting it down, attempt {attempts}"));
    });
    progress.end();
    let mut out = io::stdout().lock();
    if let Some((promise, what)) = &report.violation {
        writeln!(out, "{promise}\n{what}\n")?;
    }
    writeln!(out, "{}", job.plan().map_err(io::Error::other)?)?;
    let again = job.arguments().join(" ");
    writeln!(out, "replay it: cargo run -p esker-simulator -- {again} --trace")?;
    Ok(false)
}

/// The progress: a line that changes on a terminal, or now and then a new line in a pipe.
#[derive(Default)]
struct Progress {
    shown: Option<Instant>,
}

impl Progress {
    fn show(&mut self, line: &str) {
        let is_terminal = io::stderr().is_terminal();
        let interval = Duration::from_millis(if is_terminal { 200 } else { 30_000 });
        if self.shown.is_some_and(|shown| shown.elapsed() < interval) {
            return;
        }
        self.shown = Some(Instant::now());
        match is_terminal {
            true => eprint!("\r\x1b[K{line}"),
            false => eprintln!("{line}"),
        }
    }

    fn end(&mut self) {
        if io::stderr().is_terminal() {
            eprint!("\r\x1b[K");
        }
    }
}
