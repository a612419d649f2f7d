//! Disks and apply workers that do not keep up: what waits is bounded, and costs no lease.

use std::time::Duration;

use esker_model::{NewRegion, PeerId, Region, RegionId, StoreId};
use esker_raft::MessageBody;
use esker_raftstore::envelope::Content;
use esker_raftstore::{Admin, Answer, RequestError, StoreConfig, WriteResult};

use crate::cluster::{self, Cluster, bytes};

/// The size of a value here, and what its entry has besides.
const VALUE: usize = 1 << 20;
const ENTRY: usize = VALUE + (1 << 10);

/// How long a disk hangs here is not to matter: what waits for it does.
fn config() -> StoreConfig {
    const LONG: Duration = Duration::from_secs(3600);
    StoreConfig { slow_disk: LONG, stalled_disk: LONG, ..cluster::config() }
}

type Writing = Result<Answer<WriteResult>, RequestError>;

fn stick_disk(cluster: &mut Cluster, store: u64, stuck: bool) {
    cluster.machines.get_mut(&StoreId(store)).unwrap().stuck_disk = stuck;
}

fn stick_apply(cluster: &mut Cluster, store: u64, stuck: bool) {
    cluster.machines.get_mut(&StoreId(store)).unwrap().stuck_apply = stuck;
}

/// Begins to write so many large values to the region of the key `a` on store 1, and lets the
/// workers take them.
fn write_large(cluster: &mut Cluster, count: usize) -> Vec<Writing> {
    let region = cluster.region_of(b"a");
    write_large_to(cluster, &region, count)
}

/// The same for a region as somebody knows it.
fn write_large_to(cluster: &mut Cluster, region: &Region, count: usize) -> Vec<Writing> {
    let value = "v".repeat(VALUE);
    let mut writing = Vec::new();
    for n in 0..count {
        writing.push(cluster.start_put(1, region, &format!("a{n:04}"), &value));
        cluster.settle();
    }
    writing
}

/// How many were acknowledged, and how many refused because the store was busy.
fn outcomes(writing: Vec<Writing>) -> (usize, usize) {
    let (mut done, mut busy) = (0, 0);
    for one in writing {
        match one.and_then(|mut answer| answer.try_recv().expect("it is answered")) {
            Ok(_) => done += 1,
            Err(RequestError::ServerIsBusy { .. }) => busy += 1,
            Err(other) => panic!("{other}"),
        }
    }
    (done, busy)
}

#[test]
fn a_leader_whose_disk_hangs_keeps_its_lease_and_hands_over_no_more_than_there_is_room_for() {
    let mut cluster = Cluster::replicated_with(config());
    cluster.transfer(1, 1);
    cluster.put("b", "1");
    stick_disk(&mut cluster, 1, true);
    let writing = write_large(&mut cluster, 40);
    let (log, _) = cluster.store(1).backlog_bytes();
    assert!(log > VALUE, "it waits for the disk");
    assert!(log <= config().region_log_backlog + ENTRY, "{log} bytes of one region");
    cluster.run(Duration::from_secs(10));
    assert_eq!(cluster.leader(1), Some(1));
    assert!(cluster.store(1).handle.holds_lease(RegionId(1)), "the worker did not wait");
    stick_disk(&mut cluster, 1, false);
    cluster.settle();
    let (done, busy) = outcomes(writing);
    assert_eq!((done, busy), (40, 0));
    assert_eq!(cluster.store(1).backlog_bytes(), (0, 0));
    cluster.await_agreement(&[1, 2, 3]);
}

#[test]
fn writes_that_wait_for_a_disk_that_hangs_are_refused_when_their_leader_is_deposed() {
    let mut cluster = Cluster::replicated_with(config());
    cluster.transfer(1, 1);
    stick_disk(&mut cluster, 1, true);
    let mut writing = write_large(&mut cluster, config().region_log_backlog / VALUE + 3);
    cluster.isolate(1);
    cluster.run(Duration::from_secs(5));
    // Nothing is known of what was proposed. The last was not.
    let proposed = writing.first_mut().unwrap().as_mut().unwrap();
    assert!(proposed.try_recv().is_err(), "it may still happen");
    let held = writing.last_mut().unwrap().as_mut().unwrap();
    let refused = held.try_recv().expect("it is answered").expect_err("nobody leads here");
    assert!(matches!(refused, RequestError::NotLeader { .. }), "{refused}");
}

#[test]
fn writes_that_wait_leave_room_for_the_entries_of_other_stores() {
    let limits = StoreConfig { log_backlog: 8 * VALUE, region_log_backlog: 64 * VALUE, ..config() };
    let mut cluster = Cluster::replicated_with(limits);
    let parts = cluster.split(1, &["m"]);
    let (own, others) = (parts[0].id.0, parts[1].id.0);
    for (region, store) in [(own, 1), (others, 2)] {
        cluster.await_leader(region);
        cluster.transfer(region, store);
    }
    cluster.run(Duration::from_secs(1));
    stick_disk(&mut cluster, 1, true);
    let writing = write_large(&mut cluster, 20);
    let (log, _) = cluster.store(1).backlog_bytes();
    assert!(log < 8 * VALUE, "there is room for others: {log} bytes");
    let before = cluster.status(1, others).unwrap().last;
    cluster.put("z", "of the other store's region");
    assert_eq!(cluster.status(1, others).unwrap().last, before.next());
    stick_disk(&mut cluster, 1, false);
    cluster.settle();
    assert_eq!(outcomes(writing), (20, 0));
    cluster.await_agreement(&[1, 2, 3]);
}

#[test]
fn a_store_takes_no_more_writes_than_its_budget_and_takes_others_when_these_are_answered() {
    let budget = 8 * VALUE;
    let mut cluster = Cluster::replicated_with(StoreConfig { write_budget: budget, ..config() });
    cluster.transfer(1, 1);
    stick_disk(&mut cluster, 1, true);
    let writing = write_large(&mut cluster, 20);
    let refused = writing.iter().filter(|one| one.is_err()).count();
    assert!((12..=14).contains(&refused), "{refused} of 20 refused");
    stick_disk(&mut cluster, 1, false);
    cluster.settle();
    let (done, busy) = outcomes(writing);
    assert_eq!(done + busy, 20);
    assert_eq!(busy, refused);
    let (again, _) = outcomes({
        let writing = write_large(&mut cluster, 7);
        cluster.settle();
        writing
    });
    assert_eq!(again, 7, "there is room again");
}

#[test]
fn a_follower_whose_disk_hangs_takes_no_more_than_there_is_room_for_and_gets_the_rest_later() {
    let mut cluster = Cluster::replicated_with(config());
    cluster.transfer(1, 1);
    stick_disk(&mut cluster, 2, true);
    let writing = write_large(&mut cluster, 90);
    let (done, busy) = outcomes(writing);
    assert_eq!((done, busy), (90, 0), "the other two are a majority");
    let (log, _) = cluster.store(2).backlog_bytes();
    assert!(log <= config().log_backlog + ENTRY, "{log} bytes");
    stick_disk(&mut cluster, 2, false);
    cluster.await_agreement(&[1, 2, 3]);
}

#[test]
fn a_store_without_room_for_messages_gets_entries_one_after_another_and_keeps_its_leader() {
    let mut cluster = Cluster::replicated_with(StoreConfig { message_budget: 1, ..config() });
    cluster.transfer(1, 1);
    let region = cluster.region_of(b"a");
    let value = "v".repeat(VALUE / 16);
    let writing: Vec<_> = (0..40)
        .map(|n| {
            let writing = cluster.start_put(1, &region, &format!("a{n:04}"), &value);
            // More than one message is sent before the others take any.
            let leader = cluster.machines.get_mut(&StoreId(1)).unwrap().store.as_mut().unwrap();
            for worker in &mut leader.workers {
                worker.turn(&*cluster.clock).unwrap();
            }
            writing
        })
        .collect();
    let term = cluster.status(1, 1).unwrap().term;
    cluster.run(Duration::from_secs(5));
    assert_eq!(outcomes(writing), (40, 0));
    cluster.await_agreement(&[1, 2, 3]);
    assert_eq!(cluster.status(1, 1).unwrap().term, term, "there was an election");
}

#[test]
fn a_heartbeat_is_taken_although_entries_have_used_up_the_room_for_messages() {
    let mut cluster = Cluster::replicated_with(StoreConfig { message_budget: 1, ..config() });
    cluster.transfer(1, 1);
    cluster.carried = Some(Vec::new());
    cluster.put("a", &"v".repeat(VALUE / 16));
    cluster.run(Duration::from_secs(1));
    let carried = cluster.carried.take().unwrap();
    let to_store_2 = |is_meant: fn(&MessageBody) -> bool| {
        let found = carried.iter().rev().find(|message| match &message.content {
            Content::Consensus(consensus) => {
                message.address.to.store == StoreId(2) && is_meant(&consensus.message.body)
            }
            Content::Gone | Content::Question => false,
        });
        found.expect("it was sent").clone()
    };
    let entries = to_store_2(
        |body| matches!(body, MessageBody::Append { entries, .. } if !entries.is_empty()),
    );
    let heartbeat = to_store_2(|body| matches!(body, MessageBody::Heartbeat { .. }));
    // They come again, before the worker has taken the first.
    let machine = cluster.machines.get_mut(&StoreId(2)).unwrap();
    let store = machine.store.as_mut().unwrap();
    store.handle.raft_message(entries.clone().into_wire());
    store.handle.raft_message(entries.into_wire());
    store.handle.raft_message(heartbeat.into_wire());
    for worker in &mut store.workers {
        worker.turn(&*cluster.clock).unwrap();
    }
    store.log_writer.turn().unwrap();
    let sent = machine.sent.take_messages();
    let replies = |is_meant: fn(&MessageBody) -> bool| {
        let meant = sent.iter().filter(|message| match &message.content {
            Content::Consensus(consensus) => is_meant(&consensus.message.body),
            Content::Gone | Content::Question => false,
        });
        meant.count()
    };
    assert_eq!(replies(|body| matches!(body, MessageBody::HeartbeatReply { .. })), 1);
    assert_eq!(replies(|body| matches!(body, MessageBody::AppendReply { .. })), 1);
}

#[test]
fn what_an_apply_worker_has_no_room_for_stays_in_the_log() {
    let mut cluster = Cluster::replicated_with(config());
    cluster.transfer(1, 1);
    stick_apply(&mut cluster, 2, true);
    let writing = write_large(&mut cluster, 90);
    assert_eq!(outcomes(writing), (90, 0));
    cluster.run(Duration::from_secs(2));
    let (_, apply) = cluster.store(2).backlog_bytes();
    assert!(apply > config().apply_backlog / 2, "it waits: {apply} bytes");
    assert!(apply <= config().apply_backlog + ENTRY, "{apply} bytes");
    stick_apply(&mut cluster, 2, false);
    cluster.await_agreement(&[1, 2, 3]);
    assert_eq!(cluster.store(2).backlog_bytes(), (0, 0));
}

#[test]
fn a_write_that_waits_for_room_while_its_region_is_split_does_not_land_in_another_region() {
    let mut cluster = Cluster::replicated_with(config());
    cluster.transfer(1, 1);
    let before = cluster.region_of(b"z");
    stick_apply(&mut cluster, 1, true);
    // The parent keeps its id, and the part behind `m`.
    let new = NewRegion { id: RegionId(77), peers: [71, 72, 73].map(PeerId).to_vec() };
    let split = Admin::Split { keys: vec![bytes("m")], regions: vec![new] };
    let mut split = cluster.store(1).handle.admin(before.id, before.epoch, split).start().unwrap();
    cluster.settle();
    // It is committed. What comes now does not go to the log at once.
    stick_disk(&mut cluster, 1, true);
    let count = config().region_log_backlog / VALUE + 2;
    let writing = write_large_to(&mut cluster, &before, count);
    let held = cluster.start_put(1, &before, "b", "of the region that was");
    cluster.settle();
    stick_apply(&mut cluster, 1, false);
    cluster.settle();
    assert!(split.try_recv().unwrap().is_ok(), "it is split");
    stick_disk(&mut cluster, 1, false);
    cluster.settle();
    for one in writing.into_iter().chain([held]) {
        let refused = one.unwrap().try_recv().expect("it is answered").expect_err("it was split");
        assert!(matches!(refused, RequestError::EpochNotMatch { .. }), "{refused}");
    }
    cluster.await_leader(77);
    assert_eq!(cluster.get("b"), None);
    assert_eq!(cluster.contents(1).len(), 0);
}
