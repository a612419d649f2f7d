//! Reads see what was acknowledged before they began, whoever is asked.

use std::time::Duration;

use esker_model::{Clock, LogIndex, NewRegion, PeerChange, PeerId, RegionId, StoreId, Time};
use esker_raft::{GroupId, Message, MessageBody};
use esker_raftstore::config::WORKER_INBOX;
use esker_raftstore::envelope::{Address, Consensus, Content};
use esker_raftstore::{
    Admin, RegionSnapshot, ReplicaRole, RequestContext, RequestError, StoreHandle,
};
use esker_rpc::proto::esker::RaftMessage;

use crate::cluster::{Cluster, bytes, value};

#[test]
fn a_leader_with_a_lease_answers_at_once_and_without_one_asks_its_followers() {
    let mut cluster = Cluster::replicated();
    cluster.transfer(1, 1);
    cluster.put("a", "1");
    let region = cluster.region_of(b"a");
    assert!(cluster.store(1).handle.holds_lease(RegionId(1)));
    // Not one turn is taken: the answer comes on this thread.
    let mut answer = cluster.start_read(1, &region, Cluster::context(&region));
    assert_eq!(value(&answer.try_recv().unwrap().unwrap(), "a").as_deref(), Some("1"));

    // Longer than any lease, and nobody had a turn.
    cluster.isolate(1);
    cluster.run(Duration::from_millis(960));
    assert!(!cluster.store(1).handle.holds_lease(RegionId(1)));
    let mut answer = cluster.start_read(1, &region, Cluster::context(&region));
    assert!(answer.try_recv().is_err());
}

#[test]
fn a_deposed_leader_serves_no_reads() {
    let mut cluster = Cluster::replicated();
    cluster.transfer(1, 1);
    cluster.put("a", "1");
    let region = cluster.region_of(b"a");
    cluster.isolate(1);
    cluster.run_until("another leader", |cluster| {
        [2, 3]
            .iter()
            .any(|id| cluster.status(*id, 1).is_some_and(|s| s.role == ReplicaRole::Leader))
    });
    cluster.put("a", "2");
    let mut answer = cluster.start_read(1, &region, Cluster::context(&region));
    cluster.run(Duration::from_secs(3));
    if let Ok(Ok(snapshot)) = answer.try_recv() {
        panic!("stale read: {:?}", value(&snapshot, "a"));
    }
}

#[test]
fn a_new_leader_serves_no_lease_reads_before_it_has_applied_what_its_predecessor_acknowledged() {
    let mut cluster = Cluster::replicated();
    cluster.transfer(1, 1);
    cluster.put("a", "1");
    cluster.await_agreement(&[1, 2, 3]);
    // Store 2 has the next write in its log, and is slow to apply it.
    cluster.machines.get_mut(&StoreId(2)).unwrap().stuck_apply = true;
    cluster.put("a", "2");
    let region = cluster.region_of(b"a");
    cluster.transfer(1, 2);
    cluster.run(Duration::from_millis(500));
    assert!(!cluster.store(2).handle.holds_lease(RegionId(1)));
    let mut answer = cluster.start_read(2, &region, Cluster::context(&region));
    cluster.settle();
    assert!(answer.try_recv().is_err(), "answered from what is applied so far");
    cluster.machines.get_mut(&StoreId(2)).unwrap().stuck_apply = false;
    cluster.settle();
    assert_eq!(value(&answer.try_recv().unwrap().unwrap(), "a").as_deref(), Some("2"));
    assert!(cluster.store(2).handle.holds_lease(RegionId(1)));
}

#[test]
fn a_lease_does_not_outlive_a_transfer() {
    let mut cluster = Cluster::replicated();
    cluster.transfer(1, 1);
    cluster.put("a", "1");
    let region = cluster.region_of(b"a");
    // The old leader hears nothing of the election that it asks for.
    cluster.cut.insert((StoreId(2), StoreId(1)));
    cluster.cut.insert((StoreId(3), StoreId(1)));
    let target = region.peer_on(StoreId(2)).unwrap().id;
    let handle = cluster.store(1).handle.clone();
    let _asked = handle
        .admin(RegionId(1), region.epoch, Admin::TransferLeader(Some(target)))
        .start()
        .unwrap();
    cluster.settle();
    assert_eq!(cluster.leader(1), Some(2), "the transfer is over at once");
    assert!(!cluster.store(1).handle.holds_lease(RegionId(1)));
    cluster.put("a", "2");
    let mut answer = cluster.start_read(1, &region, Cluster::context(&region));
    cluster.settle();
    assert!(!matches!(answer.try_recv(), Ok(Ok(_))), "a stale read");
}

/// What a reader gets that has looked at store 1's lease of region 1, and is held up while
/// something happens before it takes its view of the engine.
fn read_while(cluster: &mut Cluster, happens: impl FnOnce(&mut Cluster)) -> Option<RegionSnapshot> {
    let region = cluster.region_on(1, 1).unwrap();
    let handle = cluster.store(1).handle.clone();
    let now = cluster.clock.now();
    let mut held_up = false;
    let view = || {
        held_up = true;
        happens(cluster);
        handle.engine().snapshot()
    };
    let delegates = handle.delegates();
    let found = delegates.lease_read_with(RegionId(1), &Cluster::context(&region), now, view);
    assert!(held_up, "store 1 has no lease");
    found
}

/// Store 1 led, and the others go on without what it needs to follow them by its log.
fn replaced_while_cut_off(cluster: &mut Cluster) {
    cluster.isolate(1);
    cluster.run_until("another leader", |cluster| matches!(cluster.leader(1), Some(2 | 3)));
    for n in 0..100 {
        cluster.put("b", &n.to_string());
    }
    cluster.run_until("the leader has forgotten what store 1 needs", |cluster| {
        let last = cluster.status(1, 1).unwrap().last;
        let leader = cluster.leader(1).unwrap();
        cluster.status(leader, 1).unwrap().first > last.next()
    });
}

#[test]
fn a_reader_that_is_held_up_gets_nothing_from_a_store_that_was_deposed_and_took_a_snapshot() {
    let mut cluster = Cluster::replicated();
    cluster.transfer(1, 1);
    cluster.put("a", "1");
    let found = read_while(&mut cluster, |_| ()).expect("nothing happened");
    assert_eq!(value(&found, "a").as_deref(), Some("1"));
    // The installation ends in its middle, as it may be when the view is taken.
    cluster.lost_files = true;
    let found = read_while(&mut cluster, |cluster| {
        replaced_while_cut_off(cluster);
        cluster.machines.get_mut(&StoreId(1)).unwrap().stuck_apply = true;
        cluster.heal();
        cluster.run(Duration::from_secs(2));
        let store = cluster.machines.get_mut(&StoreId(1)).unwrap().store.as_mut().unwrap();
        let stopped = store.appliers.iter_mut().any(|applier| applier.turn().is_err());
        assert!(stopped, "no snapshot came");
        assert_eq!(cluster.local(1, "a"), None, "the old data is still there");
    });
    assert_eq!(found.map(|found| value(&found, "a")), None, "half of an installation was read");
}

#[test]
fn a_reader_that_is_held_up_gets_nothing_under_the_lease_of_an_earlier_term() {
    let mut cluster = Cluster::replicated();
    cluster.transfer(1, 1);
    cluster.put("a", "1");
    let found = read_while(&mut cluster, |cluster| {
        let before = cluster.snapshots_carried;
        replaced_while_cut_off(cluster);
        cluster.heal();
        cluster.await_agreement(&[1, 2, 3]);
        assert!(cluster.snapshots_carried > before, "it came back without a snapshot");
        cluster.transfer(1, 1);
        cluster.put("a", "2");
        assert!(cluster.store(1).handle.holds_lease(RegionId(1)));
    });
    assert!(found.is_none(), "{found:?}");
}

#[test]
fn a_reader_that_is_held_up_gets_nothing_of_a_region_that_left_its_store() {
    let mut cluster = Cluster::replicated();
    cluster.transfer(1, 1);
    cluster.put("a", "1");
    let found = read_while(&mut cluster, |cluster| {
        let region = cluster.region_on(1, 1).unwrap();
        let me = *region.peer_on(StoreId(1)).unwrap();
        let removal = Admin::ChangePeers(vec![PeerChange::Remove(me.into())]);
        let handle = cluster.store(1).handle.clone();
        let _asked = handle.admin(RegionId(1), region.epoch, removal).start().unwrap();
        cluster.run_until("store 1 is empty", |cluster| cluster.contents(1).is_empty());
    });
    assert!(found.is_none(), "{found:?}");
}

#[test]
fn a_leader_that_has_not_applied_a_split_serves_no_lease_reads_of_what_it_gave_away() {
    let mut cluster = Cluster::replicated();
    cluster.transfer(1, 1);
    cluster.put("a", "1");
    cluster.await_agreement(&[1, 2, 3]);
    let region = cluster.region_of(b"a");
    // The left part becomes region 50. The others apply the split, store 1 does not.
    cluster.machines.get_mut(&StoreId(1)).unwrap().stuck_apply = true;
    let handle = cluster.store(1).handle.clone();
    let split = Admin::Split {
        keys: vec![bytes("m")],
        regions: vec![NewRegion { id: RegionId(50), peers: [51, 52, 53].map(PeerId).to_vec() }],
    };
    let _done = handle.admin(RegionId(1), region.epoch, split).start().unwrap();
    cluster.run_until("the new region has a leader elsewhere", |cluster| {
        [2, 3]
            .iter()
            .any(|id| cluster.status(*id, 50).is_some_and(|s| s.role == ReplicaRole::Leader))
    });
    let child = cluster.region_on(2, 50).unwrap();
    let leader =
        [2, 3].into_iter().find(|id| cluster.status(*id, 50).unwrap().role == ReplicaRole::Leader);
    let mut written = cluster.start_put(leader.unwrap(), &child, "a", "2").unwrap();
    cluster.run(Duration::from_millis(100));
    assert!(written.try_recv().unwrap().is_ok(), "the new region takes writes");
    let mut answer = cluster.start_read(1, &region, Cluster::context(&region));
    cluster.settle();
    assert!(!matches!(answer.try_recv(), Ok(Ok(_))), "a stale read after a split");
    cluster.machines.get_mut(&StoreId(1)).unwrap().stuck_apply = false;
    cluster.settle();
    assert!(matches!(answer.try_recv(), Ok(Err(RequestError::EpochNotMatch { .. }))));
}

#[test]
fn a_leader_whose_split_is_refused_when_it_is_applied_reads_under_its_lease_again() {
    let mut cluster = Cluster::replicated();
    cluster.transfer(1, 1);
    cluster.put("a", "1");
    cluster.await_agreement(&[1, 2, 3]);
    let region = cluster.region_of(b"a");
    let split = |child: u64| {
        let peers = [1, 2, 3].map(|n| PeerId(child + n)).to_vec();
        let regions = vec![NewRegion { id: RegionId(child), peers }];
        Admin::Split { keys: vec![bytes("m")], regions }
    };
    let ask = |cluster: &Cluster, store, child| {
        let handle = cluster.store(store).handle.clone();
        handle.admin(RegionId(1), region.epoch, split(child)).start().unwrap()
    };
    // Store 2 has the split in its log, leads, and has not applied it: it takes another one.
    cluster.machines.get_mut(&StoreId(2)).unwrap().stuck_apply = true;
    let mut first = ask(&cluster, 1, 50);
    cluster.run(Duration::from_millis(200));
    assert!(first.try_recv().unwrap().is_ok());
    cluster.transfer(1, 2);
    let mut second = ask(&cluster, 2, 60);
    cluster.run(Duration::from_millis(200));
    assert!(second.try_recv().is_err(), "it waits to be applied");
    cluster.machines.get_mut(&StoreId(2)).unwrap().stuck_apply = false;
    cluster.run(Duration::from_millis(200));
    assert!(second.try_recv().unwrap().is_err(), "the region has changed");
    assert_eq!(cluster.leader(1), Some(2));
    assert!(cluster.store(2).handle.holds_lease(RegionId(1)));
}

#[test]
fn a_follower_answers_a_replica_read_after_asking_the_leader() {
    let mut cluster = Cluster::replicated();
    cluster.transfer(1, 1);
    cluster.put("a", "1");
    let region = cluster.region_of(b"a");
    let context = RequestContext { replica_read: true, ..Cluster::context(&region) };
    let mut answer = cluster.start_read(2, &region, context);
    cluster.settle();
    assert_eq!(value(&answer.try_recv().unwrap().unwrap(), "a").as_deref(), Some("1"));
    let mut answer = cluster.start_read(2, &region, Cluster::context(&region));
    cluster.settle();
    match answer.try_recv().unwrap() {
        Err(RequestError::NotLeader { leader: Some(leader), .. }) => {
            assert_eq!(leader.store, StoreId(1))
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_follower_shows_nothing_that_its_leader_would_not_show_under_its_lease() {
    let mut cluster = Cluster::replicated();
    cluster.transfer(1, 1);
    cluster.put("a", "1");
    cluster.await_agreement(&[1, 2, 3]);
    // The leader commits the next write and is slow to apply it; store 2 is not.
    cluster.machines.get_mut(&StoreId(1)).unwrap().stuck_apply = true;
    let region = cluster.region_of(b"a");
    let mut written = cluster.start_put(1, &region, "a", "2").unwrap();
    cluster.run(Duration::from_millis(300));
    assert_eq!(cluster.local(2, "a").as_deref(), Some("2"), "the follower is ahead");
    let context = RequestContext { replica_read: true, ..Cluster::context(&region) };
    let mut at_follower = cluster.start_read(2, &region, context);
    cluster.run(Duration::from_millis(300));
    let seen = at_follower.try_recv();
    // What a reader who has asked the follower then finds at the leader.
    let mut at_leader = cluster.start_read(1, &region, Cluster::context(&region));
    cluster.settle();
    let found = at_leader.try_recv().unwrap().unwrap();
    assert_eq!(value(&found, "a").as_deref(), Some("1"));
    assert!(seen.is_err(), "the follower showed what the leader does not: time ran backwards");
    cluster.machines.get_mut(&StoreId(1)).unwrap().stuck_apply = false;
    cluster.run(Duration::from_millis(300));
    assert!(written.try_recv().unwrap().is_ok());
    assert_eq!(value(&at_follower.try_recv().unwrap().unwrap(), "a").as_deref(), Some("2"));
}

#[test]
fn a_request_for_another_peer_or_region_is_told_so() {
    let mut cluster = Cluster::replicated();
    cluster.transfer(1, 1);
    let region = cluster.region_of(b"a");
    let context = RequestContext { peer: Some(PeerId(77)), ..Cluster::context(&region) };
    let mut answer = cluster.start_read(1, &region, context);
    cluster.settle();
    assert!(matches!(answer.try_recv().unwrap(), Err(RequestError::PeerNotMatch { .. })));
    let mut answer = cluster.store(1).handle.status(RegionId(999)).start().unwrap();
    cluster.settle();
    assert_eq!(answer.try_recv().unwrap(), Err(RequestError::RegionNotFound(RegionId(999))));
}

/// A clock during whose reading a message arrives.
struct Racing {
    time: Time,
    store: StoreHandle,
    message: RaftMessage,
}

impl Clock for Racing {
    fn now(&self) -> Time {
        self.store.raft_message(self.message.clone());
        self.time
    }

    fn wall_ms(&self) -> u64 {
        0
    }
}

#[test]
fn a_message_is_never_taken_with_a_time_from_before_it_came() {
    // A follower promises its leader not to vote for another for a while from when
    // it heard of it. Counted from an earlier moment, the promise could end before
    // the lease that rests on it.
    let mut cluster = Cluster::replicated();
    cluster.transfer(1, 1);
    cluster.run(Duration::from_secs(1));
    let region = cluster.region_on(2, 1).unwrap();
    let on = |store| *region.peer_on(StoreId(store)).unwrap();
    let heartbeat = Message {
        group: GroupId(1),
        from: on(1).id,
        to: on(2).id,
        term: cluster.status(1, 1).unwrap().term,
        body: MessageBody::Heartbeat { commit: Default::default(), stamp: Default::default() },
    };
    let consensus = Consensus { message: heartbeat, applied: LogIndex(0), creates: None };
    let address = Address { region: RegionId(1), from: on(1), to: on(2), epoch: region.epoch };
    let message = address.with(Content::Consensus(Box::new(consensus)));
    let store = cluster.store(2).handle.clone();
    let clock = Racing { time: cluster.clock.now(), store, message };
    let machine = cluster.machines.get_mut(&StoreId(2)).unwrap();
    let worker = &mut machine.store.as_mut().unwrap().workers[1];
    worker.turn(&clock).unwrap();
    assert_eq!(machine.sent.waiting(), 0, "the heartbeat was answered with a time from before it");
    worker.turn(&clock).unwrap();
    assert!(machine.sent.waiting() > 0, "the next turn answers it");
}

#[test]
fn a_store_with_a_full_inbox_says_that_it_is_busy_and_goes_on() {
    let mut cluster = Cluster::replicated();
    cluster.transfer(1, 1);
    let region = cluster.region_of(b"a");
    // Nobody takes a turn meanwhile.
    let mut answers = Vec::new();
    let refused = loop {
        match cluster.start_put(1, &region, "a", "1") {
            Ok(answer) => answers.push(answer),
            Err(refused) => break refused,
        }
    };
    assert!(matches!(refused, RequestError::ServerIsBusy { .. }), "{refused}");
    assert_eq!(answers.len(), WORKER_INBOX);
    cluster.run(Duration::from_millis(500));
    for mut answer in answers {
        assert!(answer.try_recv().unwrap().is_ok(), "what was taken is carried out");
    }
    cluster.put("a", "2");
}
