//! A thousand clusters under every fault that a seed can produce. The program
//! runs any number of them: `cargo run --release -p esker-raft-simulator`.

use esker_raft_simulator::{Fleet, Run, Story, Summary, Theme, tell_action};

const SEEDS: u64 = 1_000;
const STEPS: u64 = 10_000;

fn run(theme: Option<Theme>, seeds: u64) -> Summary {
    let fleet = Fleet { from: 0, seeds, steps: STEPS, theme, threads: Fleet::cores() };
    let summary = fleet.run(|| {}, |_| {}).unwrap_or_else(|(run, violation)| {
        let theme = run.theme.map(|theme| format!(" --profile {}", theme.name()));
        panic!(
            "seed {} broke a promise: {violation}\ncut it down with: cargo run --release -p \
             esker-raft-simulator -- --seed {} --steps {STEPS}{}",
            run.seed,
            run.seed,
            theme.unwrap_or_default()
        )
    });
    println!("{summary}");
    summary
}

#[test]
fn no_fault_breaks_a_promise_and_every_kind_of_thing_happens() {
    let summary = run(None, SEEDS);
    assert_eq!((summary.runs, summary.steps), (SEEDS, SEEDS * STEPS));
    // A simulation without events proves nothing.
    let least = [
        ("leaders", summary.leaders, 10_000),
        ("witnesses that led", summary.witnesses_led, 100),
        ("committed entries", summary.committed, 200_000),
        ("writes", summary.writes, 150_000),
        ("reads at leaders", summary.reads_at_leaders, 50_000),
        ("reads at followers", summary.reads_at_followers, 5_000),
        ("lease reads", summary.lease_reads, 15_000),
        ("changes", summary.changes, 2_500),
        ("joint configurations", summary.joint, 750),
        ("snapshots", summary.snapshots, 1_000),
        ("crashes", summary.crashes, 15_000),
        ("partitions", summary.partitions, 25_000),
        ("schemes", summary.schemes, 2_500),
        ("lost messages", summary.lost, 100_000),
        ("doubled messages", summary.doubled, 25_000),
        ("reordered messages", summary.reordered, 250_000),
    ];
    for (what, count, least) in least {
        assert!(count >= least, "only {count} {what}, and {least} are the least");
    }
    assert!(summary.hopeless * 20 <= SEEDS, "{} groups were beyond help", summary.hopeless);
}

#[test]
fn a_calm_network_keeps_its_leader() {
    let summary = run(Some(Theme::Calm), 20);
    assert!(summary.leaders <= 20 * 30, "{} leaders came and went", summary.leaders);
    assert_eq!(summary.crashes, 0);
}

#[test]
fn a_seed_gives_the_same_run_every_time() {
    for seed in 0..22 {
        let run = Run { seed, steps: 2_000, theme: None };
        assert_eq!(run.run(), run.run(), "seed {seed}");
    }
}

#[test]
fn a_run_told_as_a_script_happens_again_word_for_word() {
    for seed in 0..44 {
        let run = Run { seed, steps: 1_000, theme: None };
        let (mut script, mut told) = (String::new(), String::new());
        run.follow(|founding, action, what| {
            script += &action.map_or_else(|| founding.to_owned(), tell_action);
            script.push('\n');
            told += what;
            true
        });
        let mut story = Story::default();
        goldenscript::generate(&mut story, &(script + "---\n")).expect("the script runs");
        let again = story.so_far();
        // Commands print a little more than the effects.
        let more = ["keeps its log from", ", durable ", "(lost)"];
        let shown = |line: &&str| more.into_iter().any(|more| line.contains(more));
        let mut again = again.lines().filter(|line| !shown(line));
        for line in told.lines() {
            assert_eq!(again.next(), Some(line), "seed {seed}");
        }
        assert_eq!(again.next(), None, "seed {seed} tells more");
    }
}
