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
use std::process::Command;
use std::thread;
use std::{fs, io};

use esker_mutants::{Bug, VARIABLE, break_with};
use esker_simulator::fleet::Job;
use parking_lot::Mutex;

/// What finds a bug.
enum Found {
    /// One of so many seeds, from 0 on.
    Within(u64),
    /// A test that was made for it. Returns whether a promise was broken.
    Hand(fn() -> bool),
    /// A test of the library that has the rule, by its name.
    Unit(&'static str),
    /// A test of `raftstore/tests/stores`, by its name.
    Stores(&'static str),
    /// A test of `client/tests/client`, by its name.
    Client(&'static str),
}

use Found::{Client, Hand, Stores, Unit, Within};

/// At least twice as many seeds as the slowest bug took that seeds find.
const SEEN: u64 = 25;

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
        Bug::RetiredLogIsRemoved => {
            Stores("memory::a_voter_that_nobody_has_filled_yet_keeps_its_vote_over_a_restart")
        }
        Bug::SlowDiskGivesWay => Stores(
            "slow_disk::a_leader_whose_disk_does_not_answer_hands_all_its_regions_over_within_two_seconds",
        ),
        Bug::SlowStoreIsNotChosen => Stores("slow_disk::a_slow_store_campaigns_after_the_others"),
        // Both need two candidates, and a restart between them, within one election timeout.
        Bug::EmptyPeerKeepsItsVote => Hand(store::an_empty_peer_votes_twice),
        Bug::PromiseOutlivesRestart => Hand(store::a_promise_to_a_leader_is_forgotten),

        Bug::SkippedProposalIsUnknown => Unit(
            "peer::writes::tests::nobody_knows_what_became_of_a_proposal_that_a_snapshot_covers",
        ),
        Bug::RemovedPeersProposalIsUnknown => Unit(
            "peer::writes::tests::nobody_knows_what_became_of_a_proposal_that_a_snapshot_covers",
        ),
        Bug::UnknownIsToldAsUnknown => {
            Unit("error::tests::a_client_is_told_whether_a_write_had_no_effect_or_may_have_had_one")
        }
        Bug::ProposalIsAnsweredByItsEntry => Stores(
            "life::a_deposed_leaders_write_is_never_acknowledged_and_its_caller_learns_that_it_is_gone",
        ),

        Bug::SwapIsAlone => Within(SEEN),
        // What is wrong lasts until the batch is written, within one turn of the apply worker.
        // Machines crash between turns.
        Bug::SwapCountsWithItsEffect => Hand(store::a_swap_that_stops_the_store_counts_as_applied),
        // The keys that expire have a client each, which does not swap.
        Bug::SwapSeesNoExpiredValue => Hand(store::a_swap_finds_an_expired_value),
        Bug::EpochIsCheckedAtApply => Stores(
            "life::a_write_that_is_proposed_before_a_split_and_applied_after_it_is_refused_on_every_replica",
        ),
        Bug::RangeEndsAtItsEnd => Within(SEEN),
        Bug::DuplicateChangesNothing => Stores(
            "fence::a_first_attempt_that_arrives_late_does_not_overwrite_what_came_after_the_second",
        ),
        Bug::TagsOutliveRestart => Within(SEEN),
        Bug::TagsTravelInSnapshots => Within(SEEN),
        Bug::TagsOutliveSplit => Stores(
            "fence::after_a_split_the_part_that_keeps_the_log_knows_and_the_other_refuses_what_was_meant_for_both",
        ),
        Bug::SnapshotHasWhatItSays => Stores(
            "life::a_snapshot_has_the_entries_that_are_applied_in_the_same_turn_as_it_is_taken",
        ),

        Bug::ShapeIsDurable => Within(SEEN),
        Bug::InstallationIsNoted => Within(SEEN),
        Bug::RemovalIsNoted => Within(SEEN),
        Bug::NotesWaitForFlush => Within(SEEN),
        Bug::FilesWaitForFlush => Within(SEEN),
        // A flush that comes in the middle of an installation, on another thread.
        Bug::OpenNoteIsKept => Unit(
            "journal::tests::a_note_that_is_yet_to_be_carried_out_is_not_covered_by_a_flush_that_begins",
        ),
        Bug::SplitsOutliveTheirLog => {
            Stores("moves::a_region_that_was_split_off_one_that_left_the_store_survives_a_crash")
        }
        Bug::PartsOfSplitAreDisjoint => Within(SEEN),
        Bug::StaleRequestIsRefused => Within(SEEN),
        Bug::HeldWriteIsCheckedAgain => Stores(
            "pressure::a_write_that_waits_for_room_while_its_region_is_split_does_not_land_in_another_region",
        ),
        Bug::BacklogIsBounded => Stores(
            "pressure::a_leader_whose_disk_hangs_keeps_its_lease_and_hands_over_no_more_than_there_is_room_for",
        ),
        Bug::TombstoneIsHeeded => {
            Stores("moves::a_message_that_was_long_under_way_brings_no_removed_replica_back")
        }
        // It breaks no promise, and costs an election timeout.
        Bug::EarlyMessagesAreKept => Hand(store::an_early_message_is_lost),
        Bug::RemovedDataIsDeleted => Within(SEEN),
        Bug::RemovedPeerIsTold => Within(SEEN),
        // Nothing comes between the steps of a reader: there is one thread.
        Bug::RemovedPeerIsUnseen => Hand(store::a_removed_peer_is_still_seen),
        Bug::RefusedSplitIsOver => Stores(
            "reads::a_leader_whose_split_is_refused_when_it_is_applied_reads_under_its_lease_again",
        ),

        Bug::InstallReplacesOldData => Within(SEEN),
        Bug::InstalledFilesAreRemoved => Within(SEEN),
        Bug::InstallationIsRecorded => Stores(
            "life::a_store_that_crashes_when_a_snapshot_is_installed_and_the_log_does_not_know_starts_again",
        ),
        Bug::SnapshotNeedsFreeRange => Within(SEEN),
        // It breaks no promise, and costs a snapshot with every heartbeat.
        Bug::DeliveredSnapshotIsAwaited => Hand(store::a_snapshot_that_arrived_is_sent_again),

        Bug::LeaseEndsWithTransfer => Stores("reads::a_lease_does_not_outlive_a_transfer"),
        Bug::LeaseEndsWithSplit => Stores(
            "reads::a_leader_that_has_not_applied_a_split_serves_no_lease_reads_of_what_it_gave_away",
        ),
        Bug::ViewTellsHowFarItIs => Unit(
            "peer::reads::tests::a_followers_read_waits_for_the_leader_when_its_view_is_further_than_its_peer_was_told",
        ),
        Bug::ConfirmedReadWaits => Within(SEEN),
        Bug::FollowerReadsNoFurtherThanLeader => {
            Stores("reads::a_follower_shows_nothing_that_its_leader_would_not_show_under_its_lease")
        }
        // As above: one thread.
        Bug::LeaseReadLooksTwice => Hand(store::a_lease_read_misses_a_split),

        Bug::TimeToLiveIsStored => Within(SEEN),
        Bug::ExpiredValueIsGone => Within(SEEN),

        Bug::ScanGoesOnAtTheBound => Within(SEEN),
        Bug::ReverseScanReachesTheBound => Within(SEEN),
        Bug::DeleteRangeGoesOnAtTheBound => Within(SEEN),
        Bug::PagesLeaveNoGap => Within(SEEN),
        Bug::PartOfBatchIsUnknown => Within(SEEN),
        Bug::PartOfRangeIsUnknown => {
            Client("kv::a_range_of_which_a_part_is_gone_does_not_end_as_if_nothing_was")
        }
        Bug::AttemptsShareOneTag => Unit(
            "kv::fence::tests::a_repetition_keeps_its_tag_and_its_horizon_whatever_was_learnt_meanwhile",
        ),
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
        Bug::HandedOutUnderLease => {
            Unit("lead::tests::nothing_is_handed_out_without_the_lease_of_this_term")
        }
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
        Bug::OperatorKnowsItsMembers => {
            Unit("operator::set::tests::an_operator_ends_when_somebody_else_changes_the_members")
        }
        Bug::OrderIsSentAgain => Unit(
            "operator::set::tests::an_operator_goes_from_step_to_step_as_reports_show_them_done",
        ),
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

/// What comes of a test that is compiled with the bugs.
fn outcome(target: &[&str], test: &str, bug: Option<Bug>) -> Result<bool, String> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(".."));
    // The same features as this test has, so that nothing is compiled again.
    command.args(["test", "--features", "esker-simulator/mutants"]).args(target);
    command.args(["--no-fail-fast", "--", "--exact", test]);
    command.env_remove(VARIABLE);
    if let Some(bug) = bug {
        command.env(VARIABLE, bug.name());
    }
    let output = command.output().map_err(|error| format!("cargo does not start: {error}"))?;
    let said = String::from_utf8_lossy(&output.stdout);
    let ends = |end: &str| said.lines().any(|line| line == format!("test {test} ... {end}"));
    match (ends("ok"), ends("FAILED")) {
        (true, false) => Ok(true),
        (false, true) => Ok(false),
        _ => Err(format!("{test} was not run: {}", String::from_utf8_lossy(&output.stderr))),
    }
}

/// Whether a test passes as long as the rule is kept, and only so.
fn try_test(target: &[&str], test: &str, bug: Bug) -> Result<String, String> {
    if !outcome(target, test, None)? {
        return Err(format!("{test} fails although the rule is kept"));
    }
    if outcome(target, test, Some(bug))? {
        return Err(format!("{test} passes although the rule is broken"));
    }
    Ok(format!("by {test}"))
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
        Unit(test) => try_test(&["--lib"], test, bug),
        Stores(test) => try_test(&["--test", "stores"], test, bug),
        Client(test) => try_test(&["--test", "client"], test, bug),
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
