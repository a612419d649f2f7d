//! The program: runs seeds, replays one, or runs a script.

use std::io::{self, IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use esker_raft_simulator::{Fleet, Run, Story, Theme, Violation, catching, shrink, tell_action};

/// Simulates Raft groups under every fault that a seed can produce, and compares what they do with
/// what Raft promises.
///
/// Each seed is one cluster and one run. If a promise is broken, the run is cut
/// down to a script that replays it, and the exit status is 1.
#[derive(Parser)]
#[command(
    name = "esker-raft-simulator",
    after_help = "Example: a night's work, and one of its seeds again, told as a story\n  \
                  cargo run --release -p esker-raft-simulator -- --seeds 1000000\n  \
                  cargo run --release -p esker-raft-simulator -- --seed 4711 --trace"
)]
struct Arguments {
    /// How many seeds to run
    #[arg(long, default_value_t = 1000, conflicts_with_all = ["seed", "script"])]
    seeds: u64,
    /// The first seed
    #[arg(long, default_value_t = 0, conflicts_with_all = ["seed", "script"])]
    from: u64,
    /// Replays this seed only
    #[arg(long, conflicts_with = "script")]
    seed: Option<u64>,
    /// Prints what happens, as a story
    #[arg(long, requires = "seed")]
    trace: bool,
    /// How many steps each seed takes: actions other than the passing of time
    #[arg(long, default_value_t = 10_000)]
    steps: u64,
    /// What all seeds stress, instead of what each seed decides
    #[arg(long, value_name = "NAME", value_parser = theme)]
    profile: Option<Theme>,
    /// How many seeds run at once [default: one for each core]
    #[arg(long)]
    threads: Option<usize>,
    /// Runs a script in the language of raft/tests/traces
    #[arg(long, value_name = "FILE")]
    script: Option<PathBuf>,
    /// Where the script of a broken promise is written
    #[arg(long, value_name = "DIR", default_value = ".")]
    out: PathBuf,
}

fn theme(name: &str) -> Result<Theme, String> {
    let names: Vec<_> = Theme::ALL.iter().map(|theme| theme.name()).collect();
    Theme::named(name).ok_or_else(|| format!("it is one of {}", names.join(", ")))
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let outcome = match (&arguments.script, arguments.seed) {
        (Some(script), _) => run_script(script),
        (None, Some(seed)) => run_one(&arguments, seed),
        (None, None) => run_many(&arguments),
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

fn run_many(arguments: &Arguments) -> io::Result<bool> {
    let Arguments { from, seeds, steps, profile: theme, .. } = *arguments;
    let threads = arguments.threads.unwrap_or_else(Fleet::cores);
    let fleet = Fleet { from, seeds, steps, theme, threads };
    let begin = Instant::now();
    let progress = Progress::new(seeds);
    let result = fleet.run(|| {}, |done| progress.show(done));
    progress.end();
    let mut out = io::stdout().lock();
    match result {
        Ok(summary) => {
            write!(out, "{summary}")?;
            let taken = begin.elapsed().as_secs_f64();
            let each = taken * 1e6 * threads as f64 / (summary.steps.max(1) as f64);
            writeln!(out, "{:<28}{taken:>16.1}", "seconds")?;
            writeln!(out, "{:<28}{each:>16.2}", "microseconds per step")?;
            Ok(true)
        }
        Err((run, violation)) => {
            drop(out);
            report(arguments, run, &violation)?;
            Ok(false)
        }
    }
}

/// Prints what was broken, and how to see it again.
fn report(arguments: &Arguments, run: Run, violation: &Violation) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "seed {} broke a promise: {violation}", run.seed)?;
    let theme = run.theme.map(|theme| format!(" --profile {}", theme.name()));
    writeln!(
        out,
        "replay it: cargo run --release -p esker-raft-simulator -- --seed {} --steps {}{}",
        run.seed,
        run.steps,
        theme.unwrap_or_default()
    )?;
    let Some(recording) = run.record() else {
        writeln!(out, "it did not happen again: the core is not deterministic")?;
        return Ok(());
    };
    let short = shrink(&recording);
    let (before, after) = (recording.actions.len(), short.actions.len());
    let path = arguments.out.join(format!("raft-seed-{}.txt", run.seed));
    std::fs::create_dir_all(&arguments.out).map_err(|error| about(&arguments.out, &error))?;
    std::fs::write(&path, short.script()).map_err(|error| about(&path, &error))?;
    writeln!(out, "{before} actions were cut down to {after}, in {}:\n", path.display())?;
    write!(out, "{}", short.script())
}

fn about(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

fn run_one(arguments: &Arguments, seed: u64) -> io::Result<bool> {
    let run = Run { seed, steps: arguments.steps, theme: arguments.profile };
    if arguments.trace {
        let mut out = io::BufWriter::new(io::stdout().lock());
        let mut failed = Ok(());
        run.follow(|setup, action, story| {
            let line = action.map_or_else(|| setup.to_owned(), tell_action);
            failed = writeln!(out, "> {line}").and_then(|()| write!(out, "{story}"));
            failed.is_ok()
        });
        out.flush()?;
        failed?;
    }
    match run.run() {
        Ok(summary) => {
            write!(io::stdout().lock(), "{summary}")?;
            Ok(true)
        }
        Err(violation) => {
            report(arguments, run, &violation)?;
            Ok(false)
        }
    }
}

/// Runs a script, and ignores what it records as the expected effects.
fn run_script(path: &Path) -> io::Result<bool> {
    let script = std::fs::read_to_string(path).map_err(|error| about(path, &error))?;
    let mut story = Story::default();
    let told = catching(|| Ok(goldenscript::generate(&mut story, &script)));
    let broken = match told {
        Ok(Ok(told)) => {
            write!(io::stdout().lock(), "{told}")?;
            return Ok(true);
        }
        Ok(Err(error)) => story.violation.take().ok_or(error)?,
        Err(panic) => panic,
    };
    let mut out = io::stdout().lock();
    write!(out, "{}", story.so_far())?;
    writeln!(out, "a promise is broken: {broken}")?;
    Ok(false)
}

/// The progress: a line that changes on a terminal, or now and then a new line in a pipe.
struct Progress {
    seeds: u64,
    terminal: bool,
    shown: std::sync::Mutex<Instant>,
}

impl Progress {
    fn new(seeds: u64) -> Self {
        let terminal = io::stderr().is_terminal();
        Progress { seeds, terminal, shown: std::sync::Mutex::new(Instant::now()) }
    }

    fn show(&self, done: u64) {
        let interval =
            if self.terminal { Duration::from_millis(200) } else { Duration::from_secs(30) };
        let Ok(mut shown) = self.shown.try_lock() else { return };
        if shown.elapsed() < interval {
            return;
        }
        *shown = Instant::now();
        let line = format!("{done} of {} seeds", self.seeds);
        if self.terminal {
            eprint!("\r{line}");
        } else {
            eprintln!("{line}");
        }
    }

    fn end(&self) {
        if self.terminal {
            eprint!("\r\x1b[K");
        }
    }
}
