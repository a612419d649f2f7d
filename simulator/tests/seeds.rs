//! Simulated clusters, each with faults of its own, keep their promises; and a seed replays.
//!
//! `ESKER_SIMULATOR_SEEDS=2000` runs more of them.

use std::path::PathBuf;

use esker_simulator::fleet::{Fleet, Job};

/// How many seeds are run unless told otherwise.
const SEEDS: u64 = 100;
/// How often something takes effect at least, in a hundred seeds. A simulation in which it does not
/// happen would find nothing wrong with it.
const IN_A_HUNDRED: [(&str, u64); 12] = [
    ("crashes", 200),
    ("power lost between two steps", 40),
    ("blackouts", 40),
    ("disks failed", 80),
    ("disks lost", 25),
    ("splits", 200),
    ("transfers", 40),
    ("learners added", 50),
    ("voters added", 5),
    ("replicas exchanged", 4),
    ("peers removed", 10),
    ("snapshots sent", 100),
];

fn program() -> PathBuf {
    PathBuf::from(env!("CARGO_BIN_EXE_esker-simulator"))
}

#[test]
fn clusters_under_everything_at_once_keep_their_promises() {
    let asked = std::env::var("ESKER_SIMULATOR_SEEDS").ok();
    let seeds = asked.and_then(|seeds| seeds.parse().ok()).unwrap_or(SEEDS);
    let jobs: Vec<Job> = (0..seeds).map(Job::of).collect();
    match Fleet::new(program()).run(&jobs, |_| {}) {
        Ok(summary) => {
            println!("{summary:?}");
            // Clients that get nothing done would see nothing wrong.
            assert!(summary.operations > seeds * 500, "hardly anything was done: {summary:?}");
            for (what, least) in IN_A_HUNDRED.iter().filter(|_| seeds >= 100) {
                let count = summary.counts.get(*what).copied().unwrap_or(0);
                assert!(count * 100 >= least * seeds, "{count} {what} in {seeds} seeds");
            }
        }
        Err(broken) => {
            let (job, report) = *broken;
            let (promise, what) = report.violation.expect("a promise was broken");
            panic!(
                "seed {} broke a promise: {promise}\n{what}\nreplay and cut it down: cargo run -p \
                 esker-simulator -- --from {} --seeds 1",
                job.seed, job.seed
            );
        }
    }
}

#[test]
fn a_seed_replays_word_for_word() {
    for seed in [3, 4] {
        let run = || Job::of(seed).run(&program()).expect("a process");
        assert_eq!(run(), run(), "seed {seed}");
    }
}
