//! What consensus costs: CPU time per committed proposal of Esker's core and of two
//! other Raft libraries, on the same three nodes in memory, in one run.
//!
//! ```text
//! cargo bench --manifest-path benches/consensus/Cargo.toml
//! ```
//!
//! Criterion reports every case by itself. The table at the end compares the libraries by rounds of
//! its own that take turns between them, so that other work on the machine affects all alike. A
//! filter chooses among criterion's cases, not in the table: `-- none` after the command above
//! leaves only the table.
//!
//! `workload` defines a step, and the file of each library names the documentation that it follows.
//! The crate `raft` takes its types from one of two codecs, here prost's. The other is its default,
//! and shares payloads where prost's copies them. To use it, add `--no-default-features --features
//! protobuf-codec`.

mod esker;
mod openraft;
mod raft_rs;
mod workload;

use std::time::Duration;

use criterion::{Criterion, Throughput};

use crate::workload::{Cluster, CpuTime, LOADS, Load, cost_of};

/// The name, the package, and a function that starts three nodes.
type Library = (&'static str, &'static str, fn() -> Box<dyn Cluster>);

const LIBRARIES: [Library; 3] = [
    ("esker-raft", "esker-raft", || Box::new(esker::Esker::start())),
    (raft_rs::NAME, "raft", || Box::new(raft_rs::RaftRs::start())),
    ("openraft", "openraft", || Box::new(openraft::Openraft::start())),
];

/// Rounds of each library and load in the table. Their median counts.
const ROUNDS: usize = 9;

fn main() {
    let mut criterion = Criterion::default()
        .with_measurement(CpuTime)
        .warm_up_time(Duration::from_secs(1))
        .measurement_time(Duration::from_secs(3))
        .configure_from_args();
    for load in LOADS {
        measure(&mut criterion, load);
    }
    criterion.final_summary();
    // Without `--bench`, or with other arguments, nothing is to be measured.
    let has = |wanted: &str| std::env::args().any(|arg| arg == wanted);
    if has("--bench") && !["--test", "--list", "--profile-time"].into_iter().any(has) {
        print_table();
    }
}

fn measure(criterion: &mut Criterion<CpuTime>, load: Load) {
    let Load { payload, proposals } = load;
    let mut group = criterion.benchmark_group(format!("{payload} B x {proposals}"));
    group.throughput(Throughput::Elements(proposals as u64));
    for (name, _, start) in LIBRARIES {
        let mut cluster = None;
        group.bench_function(name, |bencher| {
            let cluster = cluster.get_or_insert_with(start);
            bencher.iter_custom(|steps| cost_of(|| cluster.run(steps, load)));
        });
    }
    group.finish();
}

fn print_table() {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    println!("CPU time of the process per committed proposal, three nodes, {cores} cores");
    println!("(\"others\": the cost by that of the better of the two other libraries)\n");
    println!("| library | version | payload | proposals per step | CPU µs per proposal | others |");
    println!("|---|---|--:|--:|--:|--:|");
    for load in LOADS {
        let costs = compare(load);
        for (at, (name, package, _)) in LIBRARIES.into_iter().enumerate() {
            let others = (0..costs.len()).filter(|other| *other != at).map(|other| costs[other]);
            println!(
                "| {name} | {} | {} B | {} | {:.3} | {:.2} |",
                version(package),
                load.payload,
                load.proposals,
                costs[at],
                costs[at] / others.fold(f64::INFINITY, f64::min),
            );
        }
    }
}

/// Each library's microseconds of CPU time per proposal.
fn compare(load: Load) -> [f64; LIBRARIES.len()] {
    // Each run takes at least tens of milliseconds.
    let steps = if load.proposals == 1 { 16_000 } else { 2_000 };
    let mut clusters = LIBRARIES.map(|(_, _, start)| start());
    let mut costs = LIBRARIES.map(|_| Vec::new());
    // The first round warms up.
    for round in 0..=ROUNDS {
        for (cluster, costs) in clusters.iter_mut().zip(&mut costs) {
            let cost = cost_of(|| cluster.run(steps, load));
            if round > 0 {
                costs.push(cost);
            }
        }
    }
    costs.map(|mut costs| {
        costs.sort_unstable();
        costs[ROUNDS / 2].as_secs_f64() * 1e6 / (steps * load.proposals as u64) as f64
    })
}

/// The version of a package, as cargo resolved it.
fn version(package: &str) -> &'static str {
    let name = format!("name = \"{package}\"\nversion = \"");
    let (_, rest) = include_str!("../Cargo.lock").split_once(&name).expect("it was compiled");
    rest.split_once('"').expect("a lock file is well-formed").0
}
