use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};

use bytes::Bytes;
use esker_engine::{EngineError, LogBatch, LogEngine};
use proptest::prelude::*;

use crate::{Place, everywhere};

const ALL: usize = usize::MAX;

fn append(log: &LogEngine, group: u64, indexes: impl IntoIterator<Item = u64>) {
    let mut batch = LogBatch::new();
    for index in indexes {
        batch.append(group, index, format!("{group}/{index}").as_bytes());
    }
    log.write(&batch).expect("a write");
}

fn indexes(log: &LogEngine, group: u64, low: u64, high: u64) -> Vec<u64> {
    let entries = log.entries(group, low, high, ALL).expect("entries");
    entries
        .iter()
        .map(|(index, entry)| {
            assert_eq!(entry, &Bytes::from(format!("{group}/{index}")));
            *index
        })
        .collect()
}

#[test]
fn what_was_written_is_there_after_a_crash() {
    everywhere(|place| {
        let log = place.log();
        let mut batch = LogBatch::new();
        batch.put_state(7, b"term 3");
        batch.append(7, 1, b"7/1");
        batch.append(7, 2, b"7/2");
        log.write(&batch).expect("a write");
        drop(log);

        let log = place.log();
        assert_eq!(log.state(7).expect("a read"), Some(Bytes::from("term 3")));
        assert_eq!(log.state(8).expect("a read"), None);
        assert_eq!(indexes(&log, 7, 1, 3), [1, 2]);
        assert_eq!(log.entry(7, 2).expect("a read"), Some(Bytes::from("7/2")));
        assert_eq!(log.entry(7, 3).expect("a read"), None);
    });
}

#[test]
fn a_torn_write_is_lost_as_a_whole_and_the_ones_before_it_are_not() {
    let place = Place::on_disk();
    let log = place.log();
    append(&log, 1, 1..=3);
    append(&log, 1, 4..=6);
    drop(log);
    let wal = fs::read_dir(place.path("log"))
        .expect("the log's folder")
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "log"))
        .max()
        .expect("a WAL");
    let file = OpenOptions::new().write(true).open(&wal).expect("the WAL");
    let length = file.metadata().expect("its length").len();
    file.set_len(length - 3).expect("the WAL is cut");

    let log = place.log();
    assert_eq!(log.bounds(1).expect("a read"), Some((1, 3)));
    assert_eq!(indexes(&log, 1, 1, 4), [1, 2, 3]);
}

#[test]
fn entries_stop_at_the_size_limit_but_give_at_least_one() {
    everywhere(|place| {
        let log = place.log();
        append(&log, 1, 1..=9);
        let count = |max_bytes| log.entries(1, 1, 10, max_bytes).expect("entries").len();
        assert_eq!(count(0), 1);
        assert_eq!(count(3), 1);
        assert_eq!(count(5), 1);
        assert_eq!(count(6), 2);
        assert_eq!(count(ALL), 9);
        assert!(log.entries(1, 5, 5, ALL).expect("no entries").is_empty());
    });
}

#[test]
fn a_missing_entry_is_a_gap_that_names_group_and_index() {
    everywhere(|place| {
        let log = place.log();
        append(&log, 4, [1, 2, 4]);
        append(&log, 5, [3]);
        for (low, high, missing) in [(1, 5, 3), (0, 2, 0), (4, 6, 5), (3, 4, 3)] {
            let error = log.entries(4, low, high, ALL).expect_err("a gap");
            assert!(
                matches!(error, EngineError::Gap { group: 4, index } if index == missing),
                "{error}"
            );
        }
        assert_eq!(
            log.entries(4, 3, 5, ALL).expect_err("a gap").to_string(),
            "the raft log of group 4 has no entry 3"
        );
    });
}

#[test]
fn a_conflicting_tail_is_cut_and_written_over_in_one_batch() {
    everywhere(|place| {
        let log = place.log();
        append(&log, 1, 1..=100);
        append(&log, 2, 1..=100);
        let mut batch = LogBatch::new();
        batch.append(1, 5, b"1/5");
        batch.cut(1, 6, 101);
        log.write(&batch).expect("a write");
        assert_eq!(log.bounds(1).expect("a read"), Some((1, 5)));
        assert_eq!(log.bounds(2).expect("a read"), Some((1, 100)));
        append(&log, 1, 6..=7);
        assert_eq!(indexes(&log, 1, 1, 8), [1, 2, 3, 4, 5, 6, 7]);
    });
}

#[test]
fn compaction_drops_the_front_of_one_group_only() {
    everywhere(|place| {
        let log = place.log();
        append(&log, 1, 1..=200);
        append(&log, 2, 1..=3);
        log.compact(1, 1, 151).expect("a compaction");
        assert_eq!(log.bounds(1).expect("a read"), Some((151, 200)));
        log.compact(1, 151, 155).expect("a compaction");
        assert_eq!(log.bounds(1).expect("a read"), Some((155, 200)));
        log.compact(1, 155, 155).expect("nothing to compact");
        assert_eq!(log.bounds(2).expect("a read"), Some((1, 3)));
        drop(log);
        assert_eq!(place.log().bounds(1).expect("a read"), Some((155, 200)));
    });
}

#[test]
fn a_removed_group_leaves_nothing_and_its_neighbours_everything() {
    everywhere(|place| {
        let log = place.log();
        let groups = [0, 1, 2, u64::MAX - 1, u64::MAX];
        for group in groups {
            let mut batch = LogBatch::new();
            batch.put_state(group, b"state");
            log.write(&batch).expect("a write");
            append(&log, group, [0, 1, u64::MAX - 1]);
        }
        for removed in [1, u64::MAX] {
            let mut batch = LogBatch::new();
            batch.remove(removed);
            log.write(&batch).expect("a write");
        }
        let mut left = Vec::new();
        log.states(|group, state| {
            assert_eq!(state, b"state");
            left.push(group);
        })
        .expect("the states");
        assert_eq!(left, [0, 2, u64::MAX - 1]);
        for group in groups {
            let expected = left.contains(&group).then_some((0, u64::MAX - 1));
            assert_eq!(log.bounds(group).expect("a read"), expected, "{group}");
        }
    });
}

#[derive(Clone, Debug)]
enum Step {
    Append(u64, u64, u8),
    Cut(u64, u64, u64),
    PutState(u64, u8),
    Remove(u64),
    Compact(u64, u64, u64),
    Write,
    Reopen,
}

fn step() -> impl Strategy<Value = Step> {
    let group = 0..3_u64;
    let index = 0..100_u64;
    prop_oneof![
        8 => (group.clone(), index.clone(), any::<u8>()).prop_map(|(g, i, v)| Step::Append(g, i, v)),
        2 => (group.clone(), index.clone(), index.clone()).prop_map(|(g, a, b)| Step::Cut(g, a, b)),
        2 => (group.clone(), any::<u8>()).prop_map(|(g, v)| Step::PutState(g, v)),
        1 => group.clone().prop_map(Step::Remove),
        1 => (group, index.clone(), index).prop_map(|(g, a, b)| Step::Compact(g, a, b)),
        3 => Just(Step::Write),
        1 => Just(Step::Reopen),
    ]
}

#[derive(Clone, Default)]
struct Model {
    entries: BTreeMap<(u64, u64), Vec<u8>>,
    states: BTreeMap<u64, Vec<u8>>,
}

impl Model {
    fn take(&mut self, step: &Step) {
        match *step {
            Step::Append(group, index, value) => {
                self.entries.insert((group, index), vec![value]);
            }
            Step::Cut(group, from, to) | Step::Compact(group, from, to) => {
                self.entries.retain(|&(g, i), _| g != group || i < from || i >= to)
            }
            Step::PutState(group, value) => {
                self.states.insert(group, vec![value]);
            }
            Step::Remove(group) => {
                self.states.remove(&group);
                self.entries.retain(|&(g, _), _| g != group);
            }
            Step::Write | Step::Reopen => {}
        }
    }

    fn check(&self, log: &LogEngine) {
        let mut states = BTreeMap::new();
        log.states(|group, state| {
            states.insert(group, state.to_vec());
        })
        .expect("the states");
        assert_eq!(states, self.states);
        for group in 0..3 {
            let mut own = self.entries.range((group, 0)..=(group, u64::MAX));
            let first = own.next().map(|(&(_, index), _)| index);
            let last = own.next_back().map(|(&(_, index), _)| index).or(first);
            assert_eq!(log.bounds(group).expect("a read"), first.zip(last));
            for index in 0..100 {
                let expected = self.entries.get(&(group, index));
                let found = log.entry(group, index).expect("a read");
                assert_eq!(found.as_deref(), expected.map(Vec::as_slice));
                let run = log.entries(group, index, index + 2, ALL);
                let whole = expected.is_some() && self.entries.contains_key(&(group, index + 1));
                assert_eq!(run.is_ok(), whole, "entries {group}/{index}..");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_log_holds_what_a_sorted_map_would(steps in prop::collection::vec(step(), 1..80)) {
        let place = Place::in_memory();
        let mut log = place.log();
        let mut model = Model::default();
        let mut batch = LogBatch::new();
        let mut unwritten = Vec::new();
        for step in &steps {
            match *step {
                Step::Append(group, index, value) => batch.append(group, index, &[value]),
                Step::Cut(group, from, to) => batch.cut(group, from, to),
                Step::PutState(group, value) => batch.put_state(group, &[value]),
                // Through another batch, so that merging is tried as well.
                Step::Remove(group) => {
                    let mut other = LogBatch::new();
                    other.remove(group);
                    batch.merge(&other);
                }
                Step::Compact(group, from, to) => {
                    log.compact(group, from, to).expect("a compaction");
                    model.take(step);
                    model.check(&log);
                    continue;
                }
                Step::Write => {
                    log.write(&batch).expect("a write");
                    batch.clear();
                    unwritten.drain(..).for_each(|step| model.take(step));
                    model.check(&log);
                }
                Step::Reopen => {
                    drop(log);
                    log = place.log();
                    batch.clear();
                    unwritten.clear();
                    model.check(&log);
                }
            }
            unwritten.push(step);
        }
    }
}
