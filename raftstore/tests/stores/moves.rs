//! Members come and go.

use std::time::Duration;

use esker_model::{Peer, PeerChange, PeerId, RegionId, Role, StoreId};
use esker_raftstore::Admin;

use crate::cluster::{Cluster, config, peer};

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
