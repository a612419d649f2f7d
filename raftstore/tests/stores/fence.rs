//! A write that is sent more than once takes effect once, whatever happens between its attempts.
//!
//! The stories are told with tags, as our client sends them; the first of them also without,
//! where the later write is lost.

use std::time::Duration;

use esker_engine::Cf;
use esker_model::{KeyRange, LogIndex, PeerChange, Region, RegionId, StoreId};
use esker_raftstore::{
    Admin, Answer, CompareAndSwap, Mutation, RequestContext, RequestError, StoreConfig, Swap,
    WriteResult, WriteTag, remembered_records,
};

use crate::cluster::{Cluster, TICK, bytes, config};

/// One attempt of a put: what a client sends, and may have sent long ago.
#[derive(Clone)]
struct Attempt {
    region: Region,
    context: RequestContext,
    key: &'static str,
    value: &'static str,
}

impl Attempt {
    fn new(
        cluster: &Cluster,
        key: &'static str,
        value: &'static str,
        tag: Option<WriteTag>,
    ) -> Self {
        let region = cluster.region_of(key.as_bytes());
        let context = RequestContext { tag, ..Cluster::context(&region) };
        Attempt { region, context, key, value }
    }

    /// The same, for the region as it is now.
    fn again(&self, cluster: &Cluster) -> Self {
        Attempt::new(cluster, self.key, self.value, self.context.tag)
    }

    fn start(&self, cluster: &mut Cluster) -> Answer<WriteResult> {
        let leader = cluster.await_leader(self.region.id.0);
        self.start_at(cluster, leader)
    }

    fn start_at(&self, cluster: &Cluster, leader: u64) -> Answer<WriteResult> {
        let Attempt { region, context, key, value } = self;
        cluster.start_put_with(leader, region, *context, key, value).expect("the inbox has room")
    }

    fn finish(&self, cluster: &mut Cluster) -> Result<WriteResult, RequestError> {
        let answer = self.start(cluster);
        await_answer(cluster, answer)
    }
}

fn await_answer(
    cluster: &mut Cluster,
    mut answer: Answer<WriteResult>,
) -> Result<WriteResult, RequestError> {
    let mut found = None;
    cluster.run_until("an answer", |_| {
        found = answer.try_recv().ok();
        found.is_some()
    });
    found.unwrap()
}

/// An attempt and the write that follows it, both acknowledged: the key holds `later`.
fn early_and_later(cluster: &mut Cluster, fenced: bool) -> Attempt {
    let tag = |cluster: &Cluster, number, horizon| fenced.then(|| cluster.tag(number, horizon));
    let early = Attempt::new(cluster, "k", "early", tag(cluster, 1, LogIndex(0)));
    let done = early.finish(cluster).expect("written");
    let later = Attempt::new(cluster, "k", "later", tag(cluster, 2, done.index));
    later.finish(cluster).expect("written");
    early
}

#[test]
fn a_first_attempt_that_arrives_late_does_not_overwrite_what_came_after_the_second() {
    for fenced in [false, true] {
        let mut cluster = Cluster::replicated();
        let late = early_and_later(&mut cluster, fenced);
        assert_eq!(cluster.get("k").as_deref(), Some("later"));
        late.finish(&mut cluster).expect("it has happened");
        // The second line is what this is about: without a tag the acknowledged write is lost.
        let expected = if fenced { "later" } else { "early" };
        assert_eq!(cluster.get("k").as_deref(), Some(expected));
        cluster.await_agreement(&[1, 2, 3]);
    }
}

#[test]
fn both_attempts_with_anothers_write_between_take_effect_once() {
    for fenced in [false, true] {
        let mut cluster = Cluster::replicated();
        cluster.transfer(1, 1);
        let tag = fenced.then(|| cluster.tag(1, LogIndex(0)));
        let first = Attempt::new(&cluster, "k", "A", tag);
        // It reaches the logs of others, and its leader dies before it can say so.
        let mut answer = first.start(&mut cluster);
        cluster.machines.get_mut(&StoreId(1)).unwrap().stuck_apply = true;
        cluster.settle();
        assert!(answer.try_recv().is_err(), "the outcome is unknown");
        cluster.crash(1);
        let leader = cluster.await_leader(1);
        cluster.run_until("the new leader serves", |cluster| {
            cluster.store(leader).handle.holds_lease(RegionId(1))
        });
        assert_eq!(cluster.get("k").as_deref(), Some("A"), "seen");
        cluster.put("k", "B");
        first.again(&cluster).finish(&mut cluster).expect("it has happened");
        let expected = if fenced { "B" } else { "A" };
        assert_eq!(cluster.get("k").as_deref(), Some(expected), "A, B, and then A again?");
        cluster.start(StoreId(1));
        cluster.await_agreement(&[1, 2, 3]);
    }
}

#[test]
fn attempts_that_share_an_entry_take_effect_once_and_the_untagged_beside_them_always() {
    let mut cluster = Cluster::replicated();
    let tag = cluster.tag(1, LogIndex(0));
    let attempt = Attempt::new(&cluster, "k", "A", Some(tag));
    let untagged = |value| Attempt::new(&cluster, "k", value, None);
    let between = [untagged("B"), untagged("C")];
    let mut answers = Vec::new();
    // All of them wait for the worker's next turn.
    let leader = cluster.await_leader(1);
    for each in [&between[0], &attempt, &between[1], &attempt] {
        answers.push(each.start_at(&cluster, leader));
    }
    let mut indexes = Vec::new();
    for answer in answers {
        indexes.push(await_answer(&mut cluster, answer).expect("done").index);
    }
    assert!(indexes.iter().all(|index| *index == indexes[0]), "one entry: {indexes:?}");
    assert_eq!(cluster.get("k").as_deref(), Some("C"));
    cluster.await_agreement(&[1, 2, 3]);
}

#[test]
fn a_store_that_got_the_region_by_a_snapshot_knows_what_was_applied() {
    let mut cluster = Cluster::replicated();
    cluster.transfer(1, 1);
    cluster.isolate(3);
    let late = early_and_later(&mut cluster, true);
    for number in 0..60 {
        cluster.put(&format!("other-{number}"), "x");
    }
    cluster.run(Duration::from_secs(10));
    let before = cluster.snapshots_carried;
    cluster.heal();
    cluster.await_agreement(&[1, 2, 3]);
    assert!(cluster.snapshots_carried > before, "it came by its log");
    cluster.transfer(1, 3);
    late.finish(&mut cluster).expect("it has happened");
    assert_eq!(cluster.get("k").as_deref(), Some("later"));
    // Nor does it forget it with what it did not flush.
    cluster.crash(3);
    cluster.start(StoreId(3));
    cluster.transfer(1, 3);
    late.finish(&mut cluster).expect("it has happened");
    assert_eq!(cluster.get("k").as_deref(), Some("later"));
    cluster.await_agreement(&[1, 2, 3]);
}

#[test]
fn a_restart_forgets_nothing_whether_the_engine_was_flushed_or_the_log_is_applied_again() {
    for flushed in [false, true] {
        let mut cluster = Cluster::replicated();
        let late = early_and_later(&mut cluster, true);
        cluster.await_agreement(&[1, 2, 3]);
        for store in 1..=3 {
            if flushed {
                cluster.store(store).handle.engine().persist().unwrap();
            }
            cluster.crash(store);
        }
        for store in 1..=3 {
            cluster.start(StoreId(store));
        }
        late.finish(&mut cluster).expect("it has happened");
        assert_eq!(cluster.get("k").as_deref(), Some("later"));
        cluster.await_agreement(&[1, 2, 3]);
    }
}

#[test]
fn what_a_region_cannot_know_any_more_it_refuses_without_effect_and_says_how_far_it_is() {
    let mut cluster = Cluster::replicated_with(StoreConfig { remembered_writes: 4, ..config() });
    let late = early_and_later(&mut cluster, true);
    let mut last = LogIndex(0);
    for number in 10..20 {
        let tag = cluster.tag(number, last);
        let other = Attempt::new(&cluster, "other", "x", Some(tag));
        last = match other.finish(&mut cluster) {
            Ok(done) => done.index,
            Err(RequestError::Forgotten { applied, .. }) => applied,
            Err(error) => panic!("{error}"),
        };
    }
    let refused = late.finish(&mut cluster);
    let Err(RequestError::Forgotten { applied, .. }) = refused else { panic!("{refused:?}") };
    assert!(applied > last, "{applied} is where it was refused");
    assert_eq!(cluster.get("k").as_deref(), Some("later"));
    // A first attempt goes on from there.
    let new = Attempt::new(&cluster, "k", "new", Some(cluster.tag(3, applied)));
    new.finish(&mut cluster).expect("written");
    assert_eq!(cluster.get("k").as_deref(), Some("new"));
    cluster.await_agreement(&[1, 2, 3]);
}

#[test]
fn what_is_old_is_forgotten_and_refused_and_takes_no_space() {
    let mut cluster = Cluster::replicated();
    let late = early_and_later(&mut cluster, true);
    cluster.run(Duration::from_secs(40));
    let tag = cluster.tag(3, LogIndex(0));
    let other = Attempt::new(&cluster, "other", "x", Some(tag));
    other.finish(&mut cluster).expect("nothing was forgotten before it");
    assert!(matches!(late.finish(&mut cluster), Err(RequestError::Forgotten { .. })));
    assert_eq!(cluster.get("k").as_deref(), Some("later"));
    cluster.await_agreement(&[1, 2, 3]);
    for store in 1..=3 {
        let kv = cluster.store(store).handle.engine().clone();
        // The last entry, and how far it has forgotten.
        assert_eq!(remembered_records(&kv, RegionId(1)).unwrap().len(), 2, "store {store}");
    }
}

#[test]
fn after_a_split_the_part_that_keeps_the_log_knows_and_the_other_refuses_what_was_meant_for_both() {
    let mut cluster = Cluster::replicated();
    let right = early_and_later(&mut cluster, true);
    let tag = cluster.tag(3, LogIndex(0));
    let left = Attempt::new(&cluster, "a", "early", Some(tag));
    left.finish(&mut cluster).expect("written");
    cluster.put("a", "later");
    cluster.split(1, &["f"]);
    for key in ["a", "k"] {
        let id = cluster.region_of(key.as_bytes()).id;
        cluster.await_leader(id.0);
    }
    // As they were sent, before the split: neither part takes them.
    for late in [&right, &left] {
        let refused = late.finish(&mut cluster);
        assert!(matches!(refused, Err(RequestError::EpochNotMatch { .. })), "{refused:?}");
    }
    // Sent again: the log in which the horizon means something goes on in the right part.
    assert_eq!(right.again(&cluster).region.id.0, 1);
    right.again(&cluster).finish(&mut cluster).expect("it has happened");
    assert_eq!(cluster.get("k").as_deref(), Some("later"));
    assert_eq!(cluster.get("a").as_deref(), Some("later"));
    // The left part begins a log of its own, and remembers what is written to it.
    assert_ne!(left.again(&cluster).region.id.0, 1, "and so no client sends it there");
    let tag = cluster.tag(4, LogIndex(0));
    let new = Attempt::new(&cluster, "a", "new", Some(tag));
    new.finish(&mut cluster).expect("written");
    cluster.put("a", "last");
    new.finish(&mut cluster).expect("it has happened");
    assert_eq!(cluster.get("a").as_deref(), Some("last"));
    cluster.await_agreement(&[1, 2, 3]);
}

#[test]
fn a_write_of_nothing_is_one_with_a_tag_too() {
    let mut cluster = Cluster::replicated();
    let region = cluster.region_of(b"k");
    let tag = Some(cluster.tag(1, LogIndex(0)));
    let context = RequestContext { tag, ..Cluster::context(&region) };
    for _ in 0..2 {
        let leader = cluster.await_leader(1);
        let handle = cluster.store(leader).handle.clone();
        let answer = handle.write(region.id, context, Vec::new()).start().unwrap();
        await_answer(&mut cluster, answer).expect("nothing was written");
    }
    cluster.put("k", "served");
    cluster.await_agreement(&[1, 2, 3]);
}

#[test]
fn a_range_is_deleted_once() {
    let mut cluster = Cluster::replicated();
    let region = cluster.region_of(b"k");
    let tag = cluster.tag(1, LogIndex(0));
    let context = RequestContext { tag: Some(tag), ..Cluster::context(&region) };
    let delete = |cluster: &mut Cluster| {
        let leader = cluster.await_leader(1);
        let range = KeyRange::new(bytes("a"), Some(bytes("z"))).unwrap();
        let range = Mutation::DeleteRange { cf: Cf::Default, range };
        let handle = cluster.store(leader).handle.clone();
        let answer = handle.write(region.id, context, vec![range]).start().unwrap();
        await_answer(cluster, answer).expect("deleted")
    };
    cluster.put("k", "old");
    delete(&mut cluster);
    assert_eq!(cluster.get("k"), None);
    cluster.put("k", "new");
    delete(&mut cluster);
    assert_eq!(cluster.get("k").as_deref(), Some("new"));
}

#[test]
fn a_compare_and_swap_that_is_repeated_happens_once_and_its_result_is_not_made_up() {
    let mut cluster = Cluster::replicated();
    let region = cluster.region_of(b"k");
    let tag = cluster.tag(1, LogIndex(0));
    let context = RequestContext { tag: Some(tag), ..Cluster::context(&region) };
    let swap = |cluster: &mut Cluster| {
        let leader = cluster.await_leader(1);
        let swap = Mutation::CompareAndSwap(CompareAndSwap {
            cf: Cf::Default,
            key: bytes("k"),
            expected: None,
            then: Swap::Put { value: bytes("swapped"), expires_at: None },
            now_s: 0,
        });
        let handle = cluster.store(leader).handle.clone();
        let answer = handle.write(region.id, context, vec![swap]).start().unwrap();
        await_answer(cluster, answer)
    };
    assert!(swap(&mut cluster).expect("done").swap.expect("a result").swapped);
    cluster.delete("k");
    let repeated = swap(&mut cluster);
    assert!(matches!(repeated, Err(RequestError::Undetermined(_))), "{repeated:?}");
    assert_eq!(cluster.get("k"), None);
}

#[test]
fn a_replica_that_leaves_takes_what_it_remembers_with_it() {
    let mut cluster = Cluster::replicated();
    cluster.transfer(1, 1);
    early_and_later(&mut cluster, true);
    cluster.await_agreement(&[1, 2, 3]);
    let kv = cluster.store(3).handle.engine().clone();
    assert_eq!(remembered_records(&kv, RegionId(1)).unwrap().len(), 2);
    let gone = *cluster.region_on(1, 1).unwrap().peer_on(StoreId(3)).unwrap();
    cluster.admin(1, &Admin::ChangePeers(vec![PeerChange::Remove(gone.into())]));
    cluster.run_until("store 3 holds nothing", |cluster| cluster.region_on(3, 1).is_none());
    cluster.run(TICK);
    assert_eq!(remembered_records(&kv, RegionId(1)).unwrap(), []);
}
