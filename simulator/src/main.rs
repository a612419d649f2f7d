fn main() {
    let mut args = std::env::args().skip(1);
    let from: u64 = args.next().and_then(|a| a.parse().ok()).unwrap_or(0);
    let count: u64 = args.next().and_then(|a| a.parse().ok()).unwrap_or(1);
    let trace = args.next().is_some();
    for seed in from..from + count {
        let plan = esker_simulator::plan::Plan::of(seed);
        let began = std::time::Instant::now();
        let outcome = esker_simulator::run::run(&plan, trace);
        for line in &outcome.lines {
            println!("{line}");
        }
        println!(
            "seed {seed}: {:016x} {} operations, rest after {:?}, {:?} real; {}",
            outcome.hash,
            outcome.operations,
            outcome.rested_after,
            began.elapsed(),
            outcome.violation.map_or("ok".into(), |v| v.to_string())
        );
    }
}
