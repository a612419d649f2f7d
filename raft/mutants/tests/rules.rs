//! Every rule of the protocol that can be broken is broken, one at a time. A few simulated clusters
//! must find the violation, or the table says why they cannot and what does.
//!
//! The simulator's sources are compiled here once more, against the copy of the core in which rules
//! can be broken.

extern crate esker_raft_mutants as esker_raft;

#[allow(dead_code, unused_imports, reason = "the simulator's program uses the rest")]
#[path = "../../simulator/src/lib.rs"]
mod simulator;

use esker_raft::{
    Config, Configuration, Entry, HardState, LogIndex, Message, MessageBody, Payload, PeerId, Rule,
    Stamp, Term, Time, break_rule,
};
use simulator::driver::{Disk, EntryLog, GROUP, Machine, Node, Settings};
use simulator::{Fleet, Run, Theme, Violation, shrink};

/// As many steps as the simulator's program takes by default.
const STEPS: u64 = 10_000;

/// What finds a broken rule.
enum Found {
    /// At most this many seeds of this theme, from 0 on.
    By(Theme, u64),
    /// Messages by hand, which no leader of ours would send. Returns whether a promise was broken.
    Hand(fn() -> bool),
    /// A trace whose effects differ from the record.
    Trace(&'static str),
}

use Found::{By, Hand, Trace};

/// What finds each broken rule, with at least twice the seeds that it took, and the violations that
/// may be seen first.
fn table(rule: Rule) -> (Found, &'static [&'static str]) {
    match rule {
        Rule::OneVotePerTerm => (By(Theme::Elections, 4), &["OneVotePerTerm"]),
        Rule::VoteSurvivesRestart => (By(Theme::Elections, 20), &["OneVotePerTerm"]),
        Rule::VoteAfterSync => (By(Theme::Elections, 4), &["VotesAreDurable"]),
        Rule::CandidacyAfterSync => (By(Theme::Elections, 4), &["VotesAreDurable"]),
        Rule::VoteForCompleteLog => (By(Theme::Elections, 20), &["LeaderIsComplete"]),
        Rule::CommitOwnTermOnly => (By(Theme::Elections, 20), &["CommitsOwnTermOnly"]),
        Rule::AppendAfterEqualEntry => (By(Theme::Partitions, 20), &["LogsMatch", "NoPanic"]),
        Rule::TruncateOnConflictOnly => {
            (By(Theme::Network, 20), &["CommittedIsOnMajorities", "MessagesAreTaken"])
        }
        // Our leader finds the exact point at which a follower's log departs from its own before
        // the follower accepts any entry. The first entry after that point cuts off the rest of the
        // follower's log, so the whole log is then verified. The rule guards against leaders that
        // search in another way, so the test plays such a leader.
        Rule::CommitVerifiedPrefix => (Hand(a_follower_commits_what_was_not_verified), &[]),
        Rule::HeartbeatCommitCapped => (By(Theme::Partitions, 40), &["OneEntryCommitted"]),
        Rule::AcknowledgeAfterSync => (By(Theme::Calm, 4), &["AcknowledgedIsDurable"]),
        Rule::LeaderCountsDurableOnly => (By(Theme::Disks, 4), &["CommittedIsOnMajorities"]),
        Rule::ReplacedEntriesNotDurable => {
            (By(Theme::Disks, 40), &["AcknowledgedIsDurable", "AppliedIsDurable"])
        }
        Rule::ApplyDurableOnly => (By(Theme::Disks, 4), &["AppliedIsDurable"]),
        Rule::OlderTermsIgnored => (By(Theme::Elections, 20), &["ElectedByMajorities"]),
        Rule::SnapshotAckAfterInstall => (By(Theme::Snapshots, 10), &["AcknowledgedIsDurable"]),
        Rule::JointNeedsBothMajorities => {
            (By(Theme::Members, 20), &["CommittedIsOnMajorities", "ElectedByMajorities"])
        }
        Rule::ManyVotersJointly => (By(Theme::Members, 10), &["ConfigurationsOverlap"]),
        Rule::OneChangeAtATime => (By(Theme::Members, 10), &["OneChangeAtATime"]),
        Rule::TailMayHoldChange => (By(Theme::Members, 20), &["OneChangeAtATime"]),
        Rule::ApplyBeforeCampaign => (By(Theme::Members, 20), &["CandidatesKnowMembers"]),
        Rule::ReadConfirmsLeadership => (By(Theme::Partitions, 40), &["ReadsAreFresh"]),
        Rule::ReadAfterOwnTermCommits => (By(Theme::Elections, 40), &["ReadsAreFresh"]),
        Rule::ReadWaitsForNextRound => (By(Theme::Partitions, 40), &["ReadsAreFresh"]),
        Rule::LeaseAllowsForDrift => (By(Theme::Leases, 60), &["LeaseExcludesOthers"]),
        Rule::LeaseFromSendTime => (By(Theme::Leases, 200), &["LeaseExcludesOthers"]),
        Rule::LeaseVoidAfterHandover => (By(Theme::Transfers, 200), &["LeaseExcludesOthers"]),
        Rule::CommitOfLaterTerms => (Trace("commit_of_a_later_term"), &[]),
        Rule::NoLeaseDuringChange => (Trace("lone_voter_restarts"), &[]),
        Rule::PromiseAfterFirstRecord => (Trace("newcomer_keeps_its_promise"), &[]),
        Rule::LoyaltySurvivesRestart => (By(Theme::Leases, 20), &["LeaseExcludesOthers"]),
        Rule::LoneVoterAppliesFirst => (Trace("lone_voter_that_has_not_applied"), &[]),
        Rule::UnstampedProvesNoAge => (Trace("snapshot_acknowledged_late"), &[]),
        Rule::LoyaltyToLiveLeader => (By(Theme::Leases, 10), &["LeaseExcludesOthers"]),
    }
}

/// Whether a trace differs from its record.
fn ends_otherwise(name: &str) -> bool {
    let path = format!("{}/../tests/traces/{name}.txt", env!("CARGO_MANIFEST_DIR"));
    let recorded = std::fs::read_to_string(path).expect("the trace is there");
    let mut story = simulator::Story::default();
    let told = simulator::catching(|| Ok(goldenscript::generate(&mut story, &recorded)));
    !matches!(told, Ok(Ok(told)) if told == recorded)
}

/// A follower has 2, 3 and 4 of a leader of term 2. Another, of term 3, shares 2 and 3 with it, has
/// another entry at 4, and says that 4 is committed in a message that ends with 3. Returns whether
/// the follower takes its own entry 4 for committed.
fn a_follower_commits_what_was_not_verified() -> bool {
    let start = (LogIndex(1), Term(1));
    let configuration = Configuration::of_voters([1, 2, 3].map(PeerId));
    let (index, term) = start;
    let machine = Machine { index, term, digest: 0, has_data: true, configuration };
    let hard_state = HardState { term, vote: None, commit: index };
    let disk = Disk { hard_state, log: EntryLog::after(start), machine };
    let settings = Settings { config: Config::default(), priority: 0, seed: 1, lazy_sync: false };
    let mut follower = Node::create(PeerId(1), settings, disk, Time(1));
    let mut append =
        |from, term, prev_index: u64, prev_term, indexes: std::ops::RangeInclusive<u64>, commit| {
            let entry =
                |index| Entry { term: Term(2), index: LogIndex(index), payload: Payload::Noop };
            let body = MessageBody::Append {
                prev_index: LogIndex(prev_index),
                prev_term: Term(prev_term),
                entries: indexes.map(entry).collect(),
                commit: LogIndex(commit),
                stamp: Stamp::default(),
            };
            let (from, to, term) = (PeerId(from), PeerId(1), Term(term));
            let taken = follower.step(Time(1), Message { group: GROUP, from, to, term, body });
            taken.expect("a leader's message is taken");
            follower.group().commit_index()
        };
    append(2, 2, 1, 1, 2..=4, 1);
    append(3, 3, 2, 2, 3..=3, 4) == LogIndex(4)
}

/// Runs a theme's first seeds on all cores, with a rule broken or with none.
fn seek(theme: Theme, seeds: u64, rule: Option<Rule>) -> Option<(Run, Violation)> {
    let threads = Fleet::cores();
    let fleet = Fleet { from: 0, seeds, steps: STEPS, theme: Some(theme), threads };
    fleet.run(|| break_rule(rule), |_| {}).err()
}

#[test]
fn every_broken_rule_is_found() {
    let mut missed = Vec::new();
    let mut most = std::collections::BTreeMap::new();
    for &rule in Rule::ALL {
        let (theme, seeds, expected) = match table(rule) {
            (By(theme, seeds), expected) => (theme, seeds, expected),
            (found, _) => {
                let breaks = || match found {
                    Hand(breaks) => breaks(),
                    Trace(name) => ends_otherwise(name),
                    By(..) => false,
                };
                assert!(!breaks(), "{rule:?} is kept, and something breaks");
                break_rule(Some(rule));
                if !breaks() {
                    missed.push(format!("{rule:?} was not found"));
                }
                break_rule(None);
                continue;
            }
        };
        let longest = most.entry(theme.name()).or_insert((theme, seeds));
        longest.1 = seeds.max(longest.1);
        match seek(theme, seeds, Some(rule)) {
            Some((run, violation)) => {
                println!("{rule:?}: seed {} of {}: {violation}", run.seed, theme.name());
                if !expected.contains(&violation.promise.name().as_str()) {
                    missed.push(format!("{rule:?} broke {}", violation.promise.name()));
                }
            }
            None => missed.push(format!("{rule:?} was not found in {seeds} seeds")),
        }
    }
    assert!(missed.is_empty(), "the simulator has become blind: {missed:#?}");
    for (theme, seeds) in most.into_values() {
        if let Some((run, violation)) = seek(theme, seeds, None) {
            panic!(
                "with every rule kept, seed {} of {} fails: {violation}",
                run.seed,
                theme.name()
            );
        }
    }
}

#[test]
fn a_run_that_breaks_a_promise_is_cut_down_to_a_script_that_replays_it() {
    // Each run takes thousands of actions. The number is the most that the shortened one may have.
    let cases = [
        (Rule::VoteForCompleteLog, 200),
        (Rule::HeartbeatCommitCapped, 200),
        (Rule::TruncateOnConflictOnly, 200),
        (Rule::SnapshotAckAfterInstall, 300),
        (Rule::JointNeedsBothMajorities, 200),
    ];
    for (rule, most) in cases {
        let (By(theme, seeds), _) = table(rule) else { panic!("{rule:?} is broken by hand") };
        break_rule(Some(rule));
        let runs = (0..seeds).map(|seed| Run { seed, steps: STEPS, theme: Some(theme) });
        let recording = runs.into_iter().find_map(Run::record).expect("a seed fails");
        let short = shrink(&recording);
        let (before, after) = (recording.actions.len(), short.actions.len());
        println!("{rule:?}: {before} actions became {after}");
        assert_eq!(short.violation.promise, recording.violation.promise);
        assert!(after <= most, "{after} actions are too many to read for {rule:?}");

        let mut story = simulator::Story::default();
        let script = short.script();
        let ended = simulator::catching(|| Ok(goldenscript::generate(&mut story, &script)));
        let broken = story.violation.or(ended.err());
        let promise = broken.map(|violation| violation.promise);
        assert_eq!(promise, Some(short.violation.promise), "{rule:?}:\n{script}");
        break_rule(None);
    }
}
