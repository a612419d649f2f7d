//! Many runs at once, each in a process of its own.
//!
//! A process and not a thread: the runtime's choices depend on how many runtimes the process had
//! before, and a run must not depend on other runs. It also keeps a run that never ends, or takes
//! its process with it, from ending the others.

use std::collections::BTreeSet;
use std::fmt;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use crate::journal::{Counts, Violation};
use crate::plan::Plan;
use crate::run::Outcome;

/// How long one run may take by the clock on the wall: some thirty times what the longest take.
const ENDS_WITHIN: Duration = Duration::from_secs(180);
/// How often a process is looked at.
const LOOK: Duration = Duration::from_millis(5);

/// The promise that a run breaks which takes its process with it, or never ends.
const ENDS: &str = "a run ends";

/// Which part of a plan is run: what its seed decides, without what was cut away.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cut {
    /// Faults that do not happen, by their places in the plan.
    pub faults: BTreeSet<usize>,
    /// Actors that do not act.
    pub actors: BTreeSet<usize>,
}

/// One run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Job {
    pub seed: u64,
    pub cut: Cut,
    /// A mistake to make on purpose, by its name.
    pub bug: Option<String>,
}

/// What a run's process said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    pub seed: u64,
    pub hash: u64,
    pub operations: u64,
    pub rested_ms: u64,
    pub counts: Counts,
    pub violation: Option<(String, String)>,
}

impl Job {
    pub fn of(seed: u64) -> Job {
        Job { seed, cut: Cut::default(), bug: None }
    }

    /// What is run.
    ///
    /// # Errors
    /// When this build knows no such mistake.
    pub fn plan(&self) -> Result<Plan, String> {
        let plan = Plan::of(self.seed).without(&self.cut.faults, &self.cut.actors);
        let Some(name) = &self.bug else { return Ok(plan) };
        #[cfg(feature = "mutants")]
        if let Some(bug) = esker_mutants::Bug::named(name) {
            return Ok(Plan { bug: Some(bug), ..plan });
        }
        Err(format!("this build knows no rule {name} that could be broken"))
    }

    /// The arguments by which the program runs it.
    pub fn arguments(&self) -> Vec<String> {
        let mut arguments = vec!["--seed".to_owned(), self.seed.to_string()];
        let lists =
            [("--without-faults", &self.cut.faults), ("--without-actors", &self.cut.actors)];
        for (name, list) in lists {
            if !list.is_empty() {
                let list: Vec<String> = list.iter().map(usize::to_string).collect();
                arguments.extend([name.to_owned(), list.join(",")]);
            }
        }
        if let Some(bug) = &self.bug {
            arguments.extend(["--bug".to_owned(), bug.clone()]);
        }
        arguments
    }

    /// Runs it in a process of its own, with `program`, and waits for the end.
    ///
    /// # Errors
    /// When there is no process.
    pub fn run(&self, program: &Path) -> io::Result<Report> {
        let mut child = Command::new(program)
            .args(self.arguments())
            .arg("--report")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let (said, complained) = (child.stdout.take(), child.stderr.take());
        let read = |pipe: Option<Box<dyn io::Read + Send>>| {
            std::thread::spawn(move || {
                let mut text = Vec::new();
                if let Some(mut pipe) = pipe {
                    let _ = pipe.read_to_end(&mut text);
                }
                String::from_utf8_lossy(&text).into_owned()
            })
        };
        let said = read(said.map(|pipe| Box::new(pipe) as _));
        let complained = read(complained.map(|pipe| Box::new(pipe) as _));
        let began = Instant::now();
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break Some(status);
            }
            if began.elapsed() > ENDS_WITHIN {
                child.kill()?;
                child.wait()?;
                break None;
            }
            std::thread::sleep(LOOK);
        };
        let said = said.join().unwrap_or_default();
        let complained = complained.join().unwrap_or_default();
        let ended = match status {
            None => format!("it had not ended after {ENDS_WITHIN:?}"),
            Some(status) => format!("its process ended with {status}\n{complained}"),
        };
        Ok(Report::parse(&said).unwrap_or_else(|| Report {
            seed: self.seed,
            hash: 0,
            operations: 0,
            rested_ms: 0,
            counts: Counts::new(),
            violation: Some((ENDS.to_owned(), ended)),
        }))
    }
}

impl fmt::Display for Report {
    /// What `Report::parse` reads.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Report { seed, hash, operations, rested_ms, counts, violation } = self;
        writeln!(f, "report {seed} {hash} {operations} {rested_ms}")?;
        let counts: Vec<String> =
            counts.iter().map(|(what, count)| format!("{count} {what}")).collect();
        writeln!(f, "{}", counts.join(", "))?;
        match violation {
            None => writeln!(f, "kept"),
            Some((promise, what)) => write!(f, "broken {promise}\n{what}"),
        }
    }
}

impl Report {
    pub fn of(seed: u64, outcome: &Outcome) -> Report {
        let of = |Violation { promise, what }: &Violation| ((*promise).to_owned(), what.clone());
        Report {
            seed,
            hash: outcome.hash,
            operations: outcome.operations as u64,
            rested_ms: u64::try_from(outcome.rested_after.as_millis()).unwrap_or(u64::MAX),
            counts: outcome.counts.clone(),
            violation: outcome.violation.as_ref().map(of),
        }
    }

    fn parse(text: &str) -> Option<Report> {
        let (first, rest) = text.split_once('\n')?;
        let mut numbers =
            first.strip_prefix("report ")?.split(' ').map_while(|number| number.parse().ok());
        let mut number = || numbers.next();
        let (seed, hash, operations, rested_ms) = (number()?, number()?, number()?, number()?);
        let (counts, rest) = rest.split_once('\n')?;
        let count = |count: &str| {
            let (count, what) = count.split_once(' ')?;
            Some((what.to_owned(), count.parse().ok()?))
        };
        let counts = counts.split(", ").filter_map(count).collect();
        let violation = match rest.strip_prefix("broken ") {
            Some(broken) => {
                let (promise, what) = broken.split_once('\n')?;
                Some((promise.to_owned(), what.to_owned()))
            }
            None => {
                rest.strip_prefix("kept")?;
                None
            }
        };
        Some(Report { seed, hash, operations, rested_ms, counts, violation })
    }
}

/// What many runs came to.
#[derive(Clone, Debug, Default)]
pub struct Summary {
    pub runs: u64,
    pub operations: u64,
    /// The longest that a cluster took to come to rest.
    pub longest_rest_ms: u64,
    pub counts: Counts,
}

/// Runs on all cores.
pub struct Fleet {
    /// The program that a run's process is.
    pub program: PathBuf,
    pub threads: usize,
    /// Goes on when a promise was broken, and says so each time.
    pub goes_on: bool,
}

impl Fleet {
    /// One run for each core at a time.
    pub fn new(program: PathBuf) -> Fleet {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        Fleet { program, threads, goes_on: false }
    }

    /// Runs the jobs in their order, until one breaks a promise: its report then is the error.
    /// `progress` is called with the number of those that are done.
    ///
    /// # Errors
    /// The first report of a broken promise, or why a process could not be started.
    pub fn run(
        &self,
        jobs: &[Job],
        mut progress: impl FnMut(u64),
    ) -> Result<Summary, Box<(Job, Report)>> {
        let (next, is_over) = (AtomicU64::new(0), AtomicBool::new(false));
        let (tell, reports) = mpsc::channel();
        std::thread::scope(|scope| {
            for _ in 0..self.threads.max(1) {
                let (tell, next, is_over) = (tell.clone(), &next, &is_over);
                scope.spawn(move || {
                    while !is_over.load(Ordering::SeqCst) {
                        let index = next.fetch_add(1, Ordering::SeqCst);
                        let Some(job) = jobs.get(usize::try_from(index).unwrap_or(usize::MAX))
                        else {
                            return;
                        };
                        let report = job.run(&self.program).unwrap_or_else(|error| Report {
                            seed: job.seed,
                            hash: 0,
                            operations: 0,
                            rested_ms: 0,
                            counts: Counts::new(),
                            violation: Some((ENDS.to_owned(), error.to_string())),
                        });
                        if tell.send((job.clone(), report)).is_err() {
                            return;
                        }
                    }
                });
            }
            drop(tell);
            let mut summary = Summary::default();
            let mut broken = None;
            for (job, report) in reports {
                summary.runs += 1;
                summary.operations += report.operations;
                summary.longest_rest_ms = summary.longest_rest_ms.max(report.rested_ms);
                for (what, count) in &report.counts {
                    *summary.counts.entry(what.clone()).or_default() += count;
                }
                progress(summary.runs);
                let Some((promise, what)) = &report.violation else { continue };
                if self.goes_on {
                    let first = what.lines().next().unwrap_or_default();
                    println!("seed {} broke a promise: {promise}: {first}", job.seed);
                }
                is_over.store(!self.goes_on, Ordering::SeqCst);
                broken.get_or_insert(Box::new((job, report)));
            }
            broken.map_or(Ok(summary), Err)
        })
    }
}
