//! Members come and go.

use std::time::Duration;

use esker_model::{Peer, PeerChange, PeerId, RegionId, Role, Seat, StoreId};
use esker_raftstore::state::raft_state;
use esker_raftstore::{Admin, StoreConfig};

use crate::cluster::{Cluster, TICK, config, peer};

fn remove(cluster: &mut Cluster, region: u64, store: u64) {
    let leader = cluster.await_leader(region);
    let descriptor = cluster.region_on(leader, region).unwrap();
    let gone = *descriptor.peer_on(StoreId(store)).unwrap();
    cluster.admin(region, &Admin::ChangePeers(vec![PeerChange::Remove(gone.into())]));
}

#[test]
fn a_removed_replica_takes_its_data_with_it_and_may_come_back_under_a_new_id() {
    let mut cluster = Cluster::replicated();
    cluster.transfer(1, 1);
    cluster.put("a", "1");
    cluster.await_agreement(&[1, 2, 3]);
    remove(&mut cluster, 1, 3);
    cluster.run_until("store 3 holds nothing", |cluster| {
        cluster.region_on(3, 1).is_none() && cluster.contents(3).is_empty()
    });
    cluster.put("b", "2");
    cluster.add_replica(1, 3);
    cluster.await_agreement(&[1, 2, 3]);
}

#[test]
fn a_replica_that_was_removed_while_it_was_away_does_not_disturb_and_goes() {
    let mut cluster = Cluster::replicated();
    cluster.transfer(1, 1);
    cluster.put("a", "1");
    cluster.await_agreement(&[1, 2, 3]);
    cluster.isolate(3);
    remove(&mut cluster, 1, 3);
    let term = cluster.status(1, 1).unwrap().term;
    cluster.heal();
    cluster.run_until("store 3 knows that it was removed", |cluster| {
        cluster.region_on(3, 1).is_none() && cluster.contents(3).is_empty()
    });
    assert_eq!(cluster.status(1, 1).unwrap().term, term, "the removed replica forced an election");
    // Not even a restart brings it back.
    cluster.crash(3);
    cluster.start(StoreId(3));
    cluster.run(Duration::from_secs(5));
    assert_eq!(cluster.region_on(3, 1), None);
}

/// Stores that flush nothing but what they must.
fn unflushed() -> Cluster {
    let never = Duration::from_secs(3600);
    let config = StoreConfig { flush_after: never, flush_files_after: never, ..config() };
    let mut cluster = Cluster::replicated_with(config);
    cluster.transfer(1, 1);
    cluster.put("a", "1");
    cluster.await_agreement(&[1, 2, 3]);
    cluster
}

#[test]
fn a_removal_that_is_made_good_after_a_crash_takes_no_data_of_what_came_later() {
    let mut cluster = unflushed();
    cluster.store(3).handle.engine().persist().unwrap();
    // The replica leaves store 3, and comes back under another id with a snapshot.
    remove(&mut cluster, 1, 3);
    cluster.run_until("it has left", |cluster| cluster.region_on(3, 1).is_none());
    cluster.add_replica(1, 3);
    cluster.await_agreement(&[1, 2, 3]);
    // A region is split off, which has data of its own then.
    let parts = cluster.split(1, &["m"]);
    let child = parts.iter().find(|part| part.id != RegionId(1)).unwrap().id;
    cluster.await_leader(child.0);
    cluster.put("b", "2");
    cluster.run_until("store 3 has it", |cluster| cluster.contents(3).contains_key("b"));
    // The parent leaves again. Of that the engine keeps what was written before the removal.
    remove(&mut cluster, 1, 3);
    cluster.run_until("it has left again", |cluster| cluster.region_on(3, 1).is_none());
    cluster.crash(3);
    cluster.start(StoreId(3));
    assert!(cluster.region_on(3, child.0).is_some());
    assert_eq!(cluster.local(3, "b").as_deref(), Some("2"), "the removal took what came later");
    cluster.put("c", "3");
    cluster.run_until("it goes on", |cluster| cluster.contents(3).contains_key("c"));
}

#[test]
fn a_store_starts_again_after_one_change_has_exchanged_its_replica() {
    let mut cluster = unflushed();
    cluster.split(1, &["m"]);
    let descriptor = cluster.region_on(1, 1).unwrap();
    let gone = *descriptor.peer_on(StoreId(3)).unwrap();
    let next = Peer { role: Role::Learner, ..Peer::voter(PeerId(9_000), StoreId(3)) };
    let change = vec![PeerChange::Remove(gone.into()), PeerChange::AddLearner(next.into())];
    cluster.admin(1, &Admin::ChangePeers(change));
    cluster.run_until("the first has left", |cluster| {
        cluster.region_on(3, 1).is_none_or(|region| region.peer(gone.id).is_none())
    });
    cluster.crash(3);
    cluster.start(StoreId(3));
    cluster.put("x", "2");
    cluster.run_until("the second has the data", |cluster| cluster.contents(3).contains_key("x"));
}

#[test]
fn a_replica_that_was_removed_while_all_that_it_knows_were_replaced_goes() {
    let mut cluster = Cluster::new(4);
    cluster.await_leader(1);
    cluster.add_replica(1, 2);
    cluster.add_replica(1, 3);
    cluster.put("a", "1");
    cluster.await_agreement(&[1, 2, 3]);
    cluster.isolate(3);
    cluster.add_replica(1, 4);
    cluster.transfer(1, 4);
    for store in [1, 2] {
        remove(&mut cluster, 1, store);
        cluster.run_until("it has left", |cluster| cluster.region_on(store, 1).is_none());
        cluster.add_replica(1, store);
    }
    remove(&mut cluster, 1, 3);
    cluster.heal();
    cluster.run_until("store 3 knows that it was removed", |cluster| {
        cluster.region_on(3, 1).is_none() && cluster.contents(3).is_empty()
    });
}

#[test]
fn a_region_that_was_split_off_one_that_left_the_store_survives_a_crash() {
    // Nothing is flushed but what the store itself needs.
    let never = Duration::from_secs(3600);
    let mut cluster = Cluster::replicated_with(StoreConfig { flush_after: never, ..config() });
    cluster.transfer(1, 1);
    cluster.put("a", "1");
    cluster.await_agreement(&[1, 2, 3]);
    cluster.store(3).handle.engine().persist().unwrap();
    let parts = cluster.split(1, &["m"]);
    let child = parts.iter().find(|part| part.id != RegionId(1)).unwrap().id;
    cluster.await_leader(child.0);
    cluster.put("b", "2");
    cluster.run_until("store 3 has the child", |cluster| cluster.contents(3).len() == 2);
    remove(&mut cluster, 1, 3);
    cluster.run_until("the parent has left store 3", |cluster| cluster.region_on(3, 1).is_none());
    cluster.crash(3);
    cluster.start(StoreId(3));
    assert!(cluster.region_on(3, child.0).is_some(), "the child left with its parent");
    assert_eq!(cluster.region_on(3, 1), None);
    cluster.run_until("store 3 has what was written", |cluster| cluster.contents(3).len() == 2);
    cluster.put("c", "3");
    cluster.run_until("it goes on", |cluster| cluster.contents(3).len() == 3);
}

#[test]
fn a_message_that_was_long_under_way_brings_no_removed_replica_back() {
    let mut cluster = Cluster::new(3);
    cluster.await_leader(1);
    cluster.add_replica(1, 2);
    cluster.carried = Some(Vec::new());
    cluster.add_replica(1, 3);
    cluster.await_agreement(&[1, 2, 3]);
    let carried = cluster.carried.take().unwrap();
    remove(&mut cluster, 1, 3);
    cluster.run_until("store 3 holds nothing", |cluster| cluster.region_on(3, 1).is_none());
    cluster.run(Duration::from_secs(1));
    cluster.isolate(3);
    let mut arrived = 0;
    for message in carried.into_iter().filter(|message| message.address.to.store == StoreId(3)) {
        cluster.store(3).handle.raft_message(message.into_wire());
        arrived += 1;
    }
    assert!(arrived > 0);
    cluster.run(Duration::from_secs(1));
    cluster.crash(3);
    let (kv, log) = cluster.engines(StoreId(3));
    assert_eq!(raft_state(&log, RegionId(1)).unwrap(), None, "there is a peer again");
    kv.close_like_a_crash();
}

#[test]
fn a_learner_that_was_removed_while_it_was_away_goes_too_although_it_never_campaigns() {
    let mut cluster = Cluster::replicated();
    cluster.transfer(1, 1);
    cluster.put("a", "1");
    let me = *cluster.region_on(1, 1).unwrap().peer_on(StoreId(3)).unwrap();
    let learner = Peer { role: Role::Learner, ..me };
    cluster.admin(1, &Admin::ChangePeers(vec![PeerChange::AddLearner(learner.into())]));
    cluster.await_agreement(&[1, 2, 3]);
    cluster.isolate(3);
    remove(&mut cluster, 1, 3);
    cluster.crash(3);
    cluster.heal();
    cluster.start(StoreId(3));
    cluster.run_until("store 3 knows that it was removed", |cluster| {
        cluster.region_on(3, 1).is_none() && cluster.contents(3).is_empty()
    });
}

#[test]
fn a_replica_that_left_and_came_back_under_a_new_id_while_it_was_away_is_replaced() {
    let mut cluster = Cluster::replicated();
    cluster.transfer(1, 1);
    cluster.put("a", "1");
    cluster.isolate(3);
    remove(&mut cluster, 1, 3);
    let again = Peer { role: Role::Learner, ..peer(cluster.allocate(), 3) };
    cluster.admin(1, &Admin::ChangePeers(vec![PeerChange::AddLearner(again.into())]));
    cluster.put("b", "2");
    cluster.heal();
    cluster.await_agreement(&[1, 2, 3]);
    assert_eq!(cluster.region_on(3, 1).unwrap().peer_on(StoreId(3)).unwrap().id, again.id);
}

#[test]
fn a_replica_moves_in_one_joint_change_under_writes() {
    let mut cluster = Cluster::with(4, config());
    cluster.await_leader(1);
    cluster.add_replica(1, 2);
    cluster.add_replica(1, 3);
    cluster.transfer(1, 1);
    let learner = Peer { role: Role::Learner, ..peer(cluster.allocate(), 4) };
    cluster.admin(1, &Admin::ChangePeers(vec![PeerChange::AddLearner(learner.into())]));
    for n in 0..30 {
        cluster.put(&format!("k{n}"), "v");
    }
    let old = *cluster.region_on(1, 1).unwrap().peer_on(StoreId(2)).unwrap();
    cluster.admin(
        1,
        &Admin::ChangePeers(vec![
            PeerChange::AddVoter(learner.into()),
            PeerChange::AddLearner(old.into()),
        ]),
    );
    cluster.put("during", "v");
    cluster.run_until("the joint configuration is left", |cluster| {
        let region = cluster.region_on(1, 1).unwrap();
        region.peers.iter().all(|p| matches!(p.role, Role::Voter | Role::Learner))
    });
    let region = cluster.region_on(1, 1).unwrap();
    assert_eq!(region.peer_on(StoreId(2)).unwrap().role, Role::Learner);
    assert_eq!(region.peer_on(StoreId(4)).unwrap().role, Role::Voter);
    remove(&mut cluster, 1, 2);
    cluster.await_agreement(&[1, 3, 4]);
    cluster.run_until("store 2 is empty", |cluster| cluster.contents(2).is_empty());
}

#[test]
fn a_leader_may_remove_itself() {
    let mut cluster = Cluster::replicated();
    cluster.transfer(1, 1);
    cluster.put("a", "1");
    let me = *cluster.region_on(1, 1).unwrap().peer_on(StoreId(1)).unwrap();
    let handle = cluster.store(1).handle.clone();
    let epoch = cluster.region_on(1, 1).unwrap().epoch;
    let _asked = handle
        .admin(RegionId(1), epoch, Admin::ChangePeers(vec![PeerChange::Remove(me.into())]))
        .start();
    cluster.run_until("the others have a leader and store 1 is empty", |cluster| {
        cluster.contents(1).is_empty() && matches!(cluster.leader(1), Some(2 | 3))
    });
    assert_eq!(cluster.get("a").as_deref(), Some("1"));
    cluster.put("b", "2");
}

#[test]
fn the_last_peer_is_not_stuck_when_the_leader_that_left_did_not_tell_it_of_the_commit() {
    let mut cluster = Cluster::with(2, config());
    cluster.await_leader(1);
    cluster.add_replica(1, 2);
    cluster.put("a", "1");
    cluster.await_agreement(&[1, 2]);
    cluster.run(Duration::from_secs(1));
    let region = cluster.region_on(1, 1).unwrap();
    let me = *region.peer_on(StoreId(1)).unwrap();
    let handle = cluster.store(1).handle.clone();
    let removal = Admin::ChangePeers(vec![PeerChange::Remove(me.into())]);
    let _asked = handle.admin(RegionId(1), region.epoch, removal).start().unwrap();
    // The append goes out; the acknowledgement comes back; nothing after that.
    let before = cluster.store(2).handle.clone();
    cluster.step();
    cluster.step();
    cluster.cut.insert((StoreId(1), StoreId(2)));
    cluster.settle();
    assert!(cluster.region_on(1, 1).is_none(), "store 1 has left");
    let peers = before.delegates().get(RegionId(1)).unwrap().descriptor();
    assert_eq!(peers.peers.len(), 2, "store 2 was not told");
    cluster.heal();
    cluster.run_until("store 2 leads alone", |cluster| cluster.leader(1) == Some(2));
    assert_eq!(cluster.get("a").as_deref(), Some("1"));
    assert_eq!(cluster.region_on(2, 1).unwrap().peers.len(), 1);
}

#[test]
fn a_split_that_a_follower_applies_late_loses_neither_data_nor_its_first_election() {
    let mut cluster = Cluster::replicated();
    cluster.transfer(1, 1);
    for n in 0..20 {
        cluster.put(&format!("k{n:02}"), "v");
    }
    cluster.await_agreement(&[1, 2, 3]);
    cluster.machines.get_mut(&StoreId(3)).unwrap().stuck_apply = true;
    cluster.isolate(2);
    // Without store 2 the new region needs the vote of store 3, which does not
    // know the region yet.
    let parts = cluster.split(1, &["k10"]);
    let child = parts.iter().find(|part| part.id != RegionId(1)).unwrap().id.0;
    cluster.run(Duration::from_millis(100));
    cluster.machines.get_mut(&StoreId(3)).unwrap().stuck_apply = false;
    cluster.settle();
    assert!(cluster.leader(child).is_some(), "the first election waited for a timeout");
    cluster.heal();
    cluster.put("k05", "new");
    cluster.await_agreement(&[1, 2, 3]);
}

/// Region 1 on stores 1 and 2. Store 3 is to have it, too: the snapshot for it was taken, and is
/// long under way. Then the region is split. Returns the new region.
fn split_while_a_snapshot_is_under_way(cluster: &mut Cluster) -> u64 {
    cluster.await_leader(1);
    cluster.add_replica(1, 2);
    cluster.transfer(1, 1);
    for n in 0..20 {
        cluster.put(&format!("k{n:02}"), "v");
    }
    cluster.slow_snapshots.insert(RegionId(1));
    let learner = Seat { peer: PeerId(cluster.allocate()), store: StoreId(3) };
    cluster.admin(1, &Admin::ChangePeers(vec![PeerChange::AddLearner(learner)]));
    cluster.run_until("a snapshot is under way", |cluster| {
        cluster.machines[&StoreId(1)].sent.has_snapshot_of(1)
    });
    cluster.isolate(3);
    let parts = cluster.split(1, &["k10"]);
    parts.iter().find(|part| part.id != RegionId(1)).unwrap().id.0
}

/// The snapshot of region 1 arrives on store 3, from before the split, and then the split.
fn apply_the_split_on_store_3(cluster: &mut Cluster) {
    assert!(cluster.machines[&StoreId(1)].sent.has_snapshot_of(1));
    cluster.slow_snapshots.remove(&RegionId(1));
    cluster.run_until("store 3 has applied the split", |cluster| {
        cluster.region_on(3, 1).is_some_and(|region| !region.contains(b"k00"))
    });
}

#[test]
fn a_split_that_is_applied_late_does_not_bring_back_a_replica_that_has_left() {
    let mut cluster = Cluster::new(3);
    let child = split_while_a_snapshot_is_under_way(&mut cluster);
    cluster.heal();
    cluster
        .run_until("store 3 has the new region", |cluster| cluster.region_on(3, child).is_some());
    let region = cluster.region_on(3, child).unwrap();
    remove(&mut cluster, child, 3);
    cluster.run_until("store 3 holds nothing", |cluster| {
        cluster.region_on(3, child).is_none() && cluster.contents(3).is_empty()
    });
    apply_the_split_on_store_3(&mut cluster);
    assert_eq!(cluster.region_on(3, child), None, "the removed replica is back");
    assert_eq!(cluster.contents(3).len(), 10, "nobody's data was left behind");
    assert!(!cluster.store(3).handle.is_taken(RegionId(9), &region.range), "nobody's range");
    // Nor does a restart bring it back, and a later replica finds its place free.
    cluster.crash(3);
    cluster.start(StoreId(3));
    cluster.run(TICK);
    assert_eq!(cluster.region_on(3, child), None);
    cluster.add_replica(child, 3);
    cluster.await_agreement(&[1, 2, 3]);
}

#[test]
fn a_split_that_is_applied_late_does_not_take_the_place_of_a_later_replica_and_of_its_vote() {
    let mut cluster = Cluster::new(3);
    let child = split_while_a_snapshot_is_under_way(&mut cluster);
    cluster.transfer(child, 1);
    // Store 3 never hears of its first peer of the new region.
    remove(&mut cluster, child, 3);
    cluster.slow_snapshots.insert(RegionId(child));
    let newcomer = Seat { peer: PeerId(cluster.allocate()), store: StoreId(3) };
    cluster.admin(child, &Admin::ChangePeers(vec![PeerChange::AddVoter(newcomer)]));
    cluster.heal();
    cluster.run(Duration::from_secs(1));
    cluster.transfer(child, 2);
    cluster.run(Duration::from_secs(1));
    let leads = *cluster.region_on(2, child).unwrap().peer_on(StoreId(2)).unwrap();
    let term = cluster.status(2, child).unwrap().term;
    apply_the_split_on_store_3(&mut cluster);
    cluster.run(Duration::from_secs(1));
    cluster.crash(3);
    let (kv, log) = cluster.engines(StoreId(3));
    let record = raft_state(&log, RegionId(child)).unwrap().expect("the newcomer has voted");
    kv.close_like_a_crash();
    drop(log);
    assert_eq!(record.peer, newcomer.peer, "an earlier peer took its place");
    assert_eq!((record.hard_state.term, record.hard_state.vote), (term, Some(leads.id)));
    cluster.start(StoreId(3));
    cluster.slow_snapshots.clear();
    cluster.await_agreement(&[1, 2, 3]);
    let region = cluster.region_on(3, child).unwrap();
    assert_eq!(region.peer_on(StoreId(3)).unwrap().id, newcomer.peer);
}

#[test]
fn a_crash_in_the_middle_of_a_split_or_a_membership_change_is_taken_up_again() {
    let mut cluster = Cluster::replicated();
    for n in 0..20 {
        cluster.put(&format!("k{n:02}"), "v");
    }
    for round in 0..4u64 {
        let victim = 1 + round % 3;
        let key = format!("k{:02}", 4 + round * 4);
        let parts = cluster.split(cluster.region_of(key.as_bytes()).id.0, &[&key]);
        cluster.crash(victim);
        let other = parts[0].id;
        cluster.await_leader(other.0);
        cluster.put("k00", &format!("round {round}"));
        cluster.start(StoreId(victim));
        cluster.await_agreement(&[1, 2, 3]);
    }
    let ids: std::collections::BTreeSet<PeerId> = cluster
        .store(1)
        .handle
        .delegates()
        .descriptors()
        .iter()
        .flat_map(|region| region.peers.iter().map(|peer| peer.id).collect::<Vec<_>>())
        .collect();
    assert_eq!(ids.len(), 15, "five regions of three peers each");
}
