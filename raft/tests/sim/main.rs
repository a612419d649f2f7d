//! Whole clusters under every fault that a seed can think of.
//!
//! One seed decides everything: delays, losses, duplicates, partitions, crashes
//! that lose what was not synced, slow disks, slow state machines, clocks that
//! run fast or slow, proposals, reads, changes of members, transfers and
//! compactions. After every step `checks` compares what the peers did with what
//! Raft promises. A failure names its seed; `ESKER_RAFT_SEED=n` replays it, and
//! `ESKER_RAFT_SEEDS=n` runs more of them than the suite has time for.

#[path = "../cluster/mod.rs"]
mod cluster;

mod checks;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};

use world::{Faults, World};

const SEEDS: u64 = 200;
const STEPS: usize = 4000;

fn run(seed: u64, faults: Faults) -> checks::Summary {
    let mut world = World::new(seed, faults);
    for _ in 0..STEPS {
        world.step();
    }
    world.settle();
    world.checks.summary.clone()
}

fn run_all(faults: Faults) -> checks::Summary {
    let number = |name| std::env::var(name).ok().and_then(|value| value.parse::<u64>().ok());
    let seeds = match number("ESKER_RAFT_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("ESKER_RAFT_SEEDS").unwrap_or(SEEDS),
    };
    let mut total = checks::Summary::default();
    for seed in seeds {
        let run = catch_unwind(AssertUnwindSafe(|| run(seed, faults)));
        match run {
            Ok(summary) => total.add(&summary),
            Err(_) => panic!("seed {seed} failed: replay it with ESKER_RAFT_SEED={seed}"),
        }
    }
    println!("{total:?}");
    total
}

#[test]
fn a_lossy_network_and_crashing_peers_never_break_a_promise() {
    let total = run_all(Faults::NETWORK_AND_CRASHES);
    assert!(
        total.runs == 1 || (total.leaders > 100 && total.committed > 5_000),
        "too little happened: {total:?}"
    );
    assert!(
        total.runs == 1 || (total.reads > 500 && total.lease_checks > 5_000),
        "too little was read: {total:?}"
    );
}

#[test]
fn changing_members_under_faults_never_breaks_a_promise() {
    let total = run_all(Faults::EVERYTHING);
    assert!(
        total.runs == 1 || (total.changes > 200 && total.snapshots > 50),
        "too little changed: {total:?}"
    );
}

#[test]
fn a_calm_network_keeps_its_leader_and_commits() {
    let total = run_all(Faults::NONE);
    let runs = total.runs;
    assert!(
        total.runs == 1 || total.leaders < runs * 3,
        "leaders came and went for no reason: {total:?}"
    );
    assert!(total.runs == 1 || total.committed > runs * 100, "too little was committed: {total:?}");
}
