//! The simulator's own test: every deliberate bug is found, one at a time.
//!
//! `broken!(Rule)` in the code marks where a bug can be: see `mutants/src/lib.rs`. The table here
//! says what finds it. With the feature `mutants`:
//!
//! ```text
//! cargo test --features esker-simulator/mutants --test mutants -- --nocapture
//! ESKER_BUG=LogIsSynced cargo test --features esker-simulator/mutants --test mutants
//! ```
//!
//! prints a line for each bug, or looks for one alone.

#[path = "mutants/cluster.rs"]
mod cluster;
#[path = "mutants/engine.rs"]
mod engine;
#[path = "mutants/placement.rs"]
mod placement;
#[path = "mutants/store.rs"]
mod store;

use std::collections::BTreeMap;
use std::path::Path;
use std::thread;
use std::{fs, io};

use esker_mutants::{Bug, break_with};
use esker_simulator::fleet::Job;
use parking_lot::Mutex;

/// What finds a bug.
enum Found {
    /// One of so many seeds, from 0 on.
    Within(u64),
    /// A test that was made for it. Returns whether a promise was broken.
    Hand(fn() -> bool),
}

use Found::{Hand, Within};

/// Seeds for the bugs that were found: at least twice as many as the slowest took.
const SEEN: u64 = 25;
/// Seeds for the bugs that [`SEEN`] seeds do not find. None of them has been found yet.
const UNSEEN: u64 = 200;

/// What finds each bug; and, where no seed can, why.
fn table(bug: Bug) -> Found {
    match bug {
        Bug::LogIsSynced => Within(SEEN),
        // No plan puts an older copy of an engine back.
        Bug::OldPartIsRefused => Hand(engine::an_older_log_is_opened),
        Bug::PromiseAfterSync => Within(SEEN),
        Bug::VoteIsStoredAlone => Within(SEEN),
        Bug::FailedWriteStopsStore => Within(SEEN),
        Bug::LogIsCutBehindDurableData => Within(SEEN),
        Bug::RetiredLogIsRemoved => Within(UNSEEN),
        // Both need two candidates, and a restart between them, within one election timeout.
        Bug::EmptyPeerKeepsItsVote => Hand(store::an_empty_peer_votes_twice),
        Bug::PromiseOutlivesRestart => Hand(store::a_promise_to_a_leader_is_forgotten),

        Bug::SkippedProposalIsUnknown => Within(UNSEEN),
        Bug::RemovedPeersProposalIsUnknown => Within(UNSEEN),
        Bug::UnknownIsToldAsUnknown => Within(UNSEEN),
        Bug::ProposalIsAnsweredByItsEntry => Within(UNSEEN),

        Bug::SwapIsAlone => Within(SEEN),
        // What is wrong lasts until the batch is written, within one turn of the apply worker.
        // Machines crash between turns.
        Bug::SwapCountsWithItsEffect => Hand(store::a_swap_that_stops_the_store_counts_as_applied),
        // The keys that expire have a client each, which does not swap.
        Bug::SwapSeesNoExpiredValue => Hand(store::a_swap_finds_an_expired_value),
        Bug::EpochIsCheckedAtApply => Within(UNSEEN),
        Bug::RangeEndsAtItsEnd => Within(SEEN),
        Bug::DuplicateChangesNothing => Within(UNSEEN),
        Bug::TagsOutliveRestart => Within(SEEN),
        Bug::TagsTravelInSnapshots => Within(SEEN),
        Bug::TagsOutliveSplit => Within(UNSEEN),
        Bug::SnapshotHasWhatItSays => Within(UNSEEN),

        Bug::ShapeIsDurable => Within(SEEN),
        Bug::PartsOfSplitAreDisjoint => Within(SEEN),
        Bug::StaleRequestIsRefused => Within(SEEN),
        Bug::TombstoneIsHeeded => Within(UNSEEN),
        // It breaks no promise, and costs an election timeout.
        Bug::EarlyMessagesAreKept => Hand(store::an_early_message_is_lost),
        Bug::RemovedDataIsDeleted => Within(SEEN),
        Bug::RemovedPeerIsTold => Within(SEEN),
        // Nothing comes between the steps of a reader: there is one thread.
        Bug::RemovedPeerIsUnseen => Hand(store::a_removed_peer_is_still_seen),
        Bug::RefusedSplitIsOver => Within(UNSEEN),

        Bug::InstallReplacesOldData => Within(SEEN),
        Bug::InstalledFilesAreRemoved => Within(UNSEEN),
        Bug::InstallationIsRecorded => Within(UNSEEN),
        Bug::SnapshotNeedsFreeRange => Within(SEEN),
        // It breaks no promise, and costs a snapshot with every heartbeat.
        Bug::DeliveredSnapshotIsAwaited => Hand(store::a_snapshot_that_arrived_is_sent_again),

        Bug::LeaseEndsWithTransfer => Within(UNSEEN),
        Bug::LeaseEndsWithSplit => Within(UNSEEN),
        Bug::LeaseNeedsOwnTerm => Within(UNSEEN),
        Bug::ViewTellsHowFarItIs => Within(UNSEEN),
        Bug::ConfirmedReadWaits => Within(SEEN),
        Bug::FollowerReadsNoFurtherThanLeader => Within(UNSEEN),
        // As above: one thread.
        Bug::LeaseReadLooksTwice => Hand(store::a_lease_read_misses_a_split),

        Bug::TimeToLiveIsStored => Within(SEEN),
        Bug::ExpiredValueIsGone => Within(SEEN),

        Bug::ScanGoesOnAtTheBound => Within(SEEN),
        Bug::ReverseScanReachesTheBound => Within(SEEN),
        Bug::DeleteRangeGoesOnAtTheBound => Within(SEEN),
        Bug::PagesLeaveNoGap => Within(SEEN),
        Bug::PartOfBatchIsUnknown => Within(SEEN),
        Bug::PartOfRangeIsUnknown => Within(UNSEEN),
        Bug::AttemptsShareOneTag => Within(UNSEEN),
        Bug::UnknownWriteEndsAsUnknown => Within(SEEN),
        Bug::SwapIsSentOnce => Within(SEEN),
        Bug::LateAnswerIsUnknown => Within(SEEN),
        // The clients take an operation that fails in time for one that the faults made fail, and
        // the last look at all keys is a new client's.
        Bug::EpochErrorCorrectsCache => Hand(cluster::a_client_keeps_an_outdated_region),

        // No plan has so many ids drawn, or the disk stalled for so long, that what is in the next
        // window is needed before that window is durable.
        Bug::IdsAfterTheirWindow => Hand(cluster::ids_come_again_after_a_crash),
        Bug::TimestampsAfterTheirWindow => Hand(cluster::timestamps_go_back_after_a_crash),
        Bug::IdsGoOnBehindTheWindow => Within(SEEN),
        Bug::TimestampsGoForward => Within(SEEN),
        Bug::HandedOutUnderLease => Within(UNSEEN),
        // The leader of another term loads the state anew, and a write is in the log before the
        // elections that come after it: nothing is left that could be written in a wrong term.
        Bug::StateIsWrittenInItsTerm => Hand(store::state_is_written_in_another_term),
        Bug::OneReplicaOnAStore => Within(SEEN),
        Bug::LostStoreIsLeft => Within(SEEN),
        // A region that has a voter less for a moment loses nothing, unless a disk is lost in that
        // moment, which no plan does.
        Bug::SuccessorVotesFirst => Hand(placement::a_voter_is_removed_before_its_successor_votes),
        // The newer report comes again within seconds, and clients ask again until then.
        Bug::NewerEpochWins => Hand(placement::an_older_report_wins),
        Bug::OperatorKnowsItsMembers => Within(UNSEEN),
        Bug::OrderIsSentAgain => Within(UNSEEN),
        // No plan puts an older copy of a directory back.
        Bug::OlderCopyIsRefused => Hand(cluster::a_store_starts_with_an_older_copy),
    }
}

/// The promise that a seed breaks with this bug, or with none.
fn broken_promise(seed: u64, bug: Option<Bug>) -> Option<String> {
    /// Of the first line of what happened.
    const CHARACTERS: usize = 120;
    let job = Job { bug: bug.map(|bug| bug.name().to_owned()), ..Job::of(seed) };
    let report = job.run(Path::new(env!("CARGO_BIN_EXE_esker-simulator"))).expect("a process");
    report.violation.map(|(promise, what)| {
        let said = what.lines().next().unwrap_or_default();
        let said: String = said.chars().take(CHARACTERS).collect();
        format!("{promise}: {said}")
    })
}

/// Seeds, and whether they break a promise without any bug.
type Sick = Mutex<BTreeMap<u64, bool>>;

/// How the bug was found, or why not.
fn look_for(bug: Bug, sick: &Sick) -> Result<String, String> {
    match table(bug) {
        Within(seeds) => {
            for seed in 0..seeds {
                let Some(promise) = broken_promise(seed, Some(bug)) else { continue };
                let known = sick.lock().get(&seed).copied();
                let is_sick = known.unwrap_or_else(|| broken_promise(seed, None).is_some());
                sick.lock().insert(seed, is_sick);
                if !is_sick {
                    return Ok(format!("seed {seed}: {promise}"));
                }
            }
            Err(format!("not found within {seeds} seeds"))
        }
        Hand(breaks) => {
            let with = |bug| {
                let testing = thread::spawn(move || {
                    break_with(bug);
                    breaks()
                });
                testing.join()
            };
            match (with(None), with(Some(bug))) {
                (Ok(false), Ok(true)) => Ok("by the test made for it".into()),
                (Ok(false), Ok(false)) => Err("not found by the test made for it".into()),
                (Ok(true), _) => Err("its test fails although the rule is kept".into()),
                (Err(_), _) | (_, Err(_)) => Err("its test panics".into()),
            }
        }
    }
}

#[test]
fn every_bug_is_found() {
    let bugs = match std::env::var("ESKER_BUG") {
        Ok(name) => vec![Bug::named(&name).unwrap_or_else(|| panic!("there is no rule {name}"))],
        Err(_) => Bug::ALL.to_vec(),
    };
    let (queue, sick) = (Mutex::new(bugs.into_iter()), Sick::default());
    let missed = Mutex::new(Vec::new());
    let next = || queue.lock().next();
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                while let Some(bug) = next() {
                    match look_for(bug, &sick) {
                        Ok(how) => println!("{}: {how}", bug.name()),
                        Err(why) => {
                            println!("{}: {why}", bug.name());
                            missed.lock().push(format!("{}: {why}", bug.name()));
                        }
                    }
                }
            });
        }
    });
    let sick: Vec<u64> =
        sick.into_inner().into_iter().filter_map(|(s, is)| is.then_some(s)).collect();
    println!("without any bug these seeds fail: {sick:?}");
    let missed = missed.into_inner();
    assert!(missed.is_empty(), "nothing finds these: {missed:#?}");
}

/// Copies a directory and all that is in it.
fn copy(from: &Path, to: &Path) -> io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (from, to) = (entry.path(), to.join(entry.file_name()));
        if entry.file_type()?.is_dir() {
            copy(&from, &to)?;
        } else {
            fs::copy(&from, &to)?;
        }
    }
    Ok(())
}
