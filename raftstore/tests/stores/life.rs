//! From the first store to a replicated, split, crashed and restarted cluster.

use std::time::Duration;

use esker_model::{PeerId, RegionId, StoreId};
use esker_raftstore::{Admin, ReplicaRole, RequestError};

use crate::cluster::{Cluster, TICK};

#[test]
fn a_cluster_grows_splits_changes_leaders_and_survives_a_crash() {
    let mut cluster = Cluster::new(3);
    assert_eq!(cluster.await_leader(1), 1);
    for n in 0..50 {
        cluster.put(&format!("key-{n:03}"), "before");
    }
    cluster.add_replica(1, 2);
    cluster.add_replica(1, 3);
    cluster.await_agreement(&[1, 2, 3]);

    let parts = cluster.split(1, &["key-010", "key-020", "key-030"]);
    assert_eq!(parts.len(), 4);
    for (n, part) in parts.iter().enumerate() {
        cluster.await_leader(part.id.0);
        cluster.transfer(part.id.0, 1 + (n as u64) % 3);
    }
    for n in 0..50 {
        cluster.put(&format!("key-{n:03}"), "after");
    }
    // Everything that store 2 was told last is in its memory only.
    cluster.crash(2);
    for n in 0..25 {
        cluster.put(&format!("key-{n:03}"), "while store 2 was down");
    }
    cluster.start(StoreId(2));
    for n in 0..50 {
        let expected = if n < 25 { "while store 2 was down" } else { "after" };
        assert_eq!(cluster.get(&format!("key-{n:03}")).as_deref(), Some(expected));
    }
    cluster.await_agreement(&[1, 2, 3]);
    assert_eq!(cluster.contents(2).len(), 50);
}

#[test]
fn a_store_that_crashes_before_its_log_write_has_promised_nothing() {
    let mut cluster = Cluster::replicated();
    cluster.transfer(1, 1);
    cluster.put("a", "1");
    cluster.await_agreement(&[1, 2, 3]);
    // Stores 2 and 3 receive the write, and their disks do not answer.
    for id in [2, 3] {
        cluster.machines.get_mut(&StoreId(id)).unwrap().stuck_disk = true;
    }
    let region = cluster.region_of(b"a");
    let mut answer = cluster.start_put(1, &region, "a", "2").unwrap();
    cluster.run(Duration::from_millis(200));
    assert!(answer.try_recv().is_err(), "acknowledged with one durable copy of three");
    cluster.crash(2);
    cluster.crash(3);
    cluster.crash(1);
    cluster.start(StoreId(2));
    cluster.start(StoreId(3));
    // The two that never held it form a majority: the write may be gone, the
    // acknowledged one may not.
    assert_eq!(cluster.get("a").as_deref(), Some("1"));
    cluster.start(StoreId(1));
    cluster.put("b", "3");
    cluster.await_agreement(&[1, 2, 3]);
}

#[test]
fn what_was_acknowledged_survives_the_crash_of_every_store_at_once() {
    let mut cluster = Cluster::replicated();
    for n in 0..100 {
        cluster.put(&format!("k{n:03}"), &n.to_string());
    }
    cluster.split(1, &["k040"]);
    for n in 0..100 {
        if n % 3 == 0 {
            cluster.delete(&format!("k{n:03}"));
        }
    }
    for id in [1, 2, 3] {
        cluster.crash(id);
    }
    for id in [1, 2, 3] {
        cluster.start(StoreId(id));
    }
    for n in 0..100 {
        let expected = (n % 3 != 0).then(|| n.to_string());
        assert_eq!(cluster.get(&format!("k{n:03}")), expected);
    }
    cluster.await_agreement(&[1, 2, 3]);
}

#[test]
fn a_replica_whose_log_was_truncated_while_it_was_away_comes_back_by_snapshot() {
    let mut cluster = Cluster::replicated();
    cluster.transfer(1, 1);
    for n in 0..20 {
        cluster.put(&format!("old-{n}"), "x");
    }
    leave_store_3_behind_the_log(&mut cluster);
    for n in 0..20 {
        cluster.delete(&format!("old-{n}"));
    }
    let carried = cluster.snapshots_carried;
    cluster.heal();
    cluster.await_agreement(&[1, 2, 3]);
    assert!(cluster.snapshots_carried > carried, "it came back without a snapshot");
    assert_eq!(cluster.contents(3).len(), 200);
    // And goes on as a member like any other.
    cluster.transfer(1, 3);
    cluster.put("last", "z");
    cluster.crash(3);
    cluster.start(StoreId(3));
    cluster.await_agreement(&[1, 2, 3]);
}

/// Cuts store 3 off, until store 1, which leads, does not have any more what store 3 needs.
fn leave_store_3_behind_the_log(cluster: &mut Cluster) {
    cluster.await_agreement(&[1, 2, 3]);
    cluster.isolate(3);
    for n in 0..200 {
        cluster.put(&format!("new-{n}"), "y");
    }
    cluster.run_until("the leader has forgotten what store 3 needs", |cluster| {
        let behind = cluster.status(3, 1).unwrap().last;
        cluster.status(1, 1).is_some_and(|leader| leader.first > behind.next())
    });
}

#[test]
fn a_snapshot_has_the_entries_that_are_applied_in_the_same_turn_as_it_is_taken() {
    let mut cluster = Cluster::replicated();
    cluster.transfer(1, 1);
    leave_store_3_behind_the_log(&mut cluster);
    cluster.machines.get_mut(&StoreId(1)).unwrap().stuck_apply = true;
    let region = cluster.region_of(b"a");
    let mut answer = cluster.start_put(1, &region, "last", "z").unwrap();
    cluster.run(TICK * 5);
    assert!(answer.try_recv().is_err(), "it is committed, and waits to be applied");
    cluster.heal();
    cluster.run(Duration::from_secs(1));
    assert_eq!(cluster.leader(1), Some(1));
    let carried = cluster.snapshots_carried;
    cluster.machines.get_mut(&StoreId(1)).unwrap().stuck_apply = false;
    cluster.settle();
    assert!(answer.try_recv().unwrap().is_ok());
    cluster.await_agreement(&[1, 2, 3]);
    assert!(cluster.snapshots_carried > carried, "it came back without a snapshot");
}

#[test]
fn a_store_that_crashes_when_a_snapshot_is_installed_and_the_log_does_not_know_starts_again() {
    let mut cluster = Cluster::replicated();
    cluster.transfer(1, 1);
    leave_store_3_behind_the_log(&mut cluster);
    let expected = cluster.contents(1);
    cluster.machines.get_mut(&StoreId(3)).unwrap().stuck_disk = true;
    cluster.heal();
    cluster.run_until("store 3 has the data", |cluster| cluster.contents(3) == expected);
    cluster.crash(3);
    cluster.start(StoreId(3));
    cluster.put("last", "z");
    cluster.await_agreement(&[1, 2, 3]);
}

#[test]
fn a_write_to_a_region_that_was_split_meanwhile_is_refused_with_the_new_regions() {
    let mut cluster = Cluster::replicated();
    cluster.transfer(1, 1);
    let before = cluster.region_of(b"a");
    cluster.split(1, &["m"]);
    let mut answer = cluster.start_put(1, &before, "a", "1").unwrap();
    cluster.settle();
    match answer.try_recv().unwrap() {
        Err(RequestError::EpochNotMatch { current, .. }) => assert_eq!(current[0].id, RegionId(1)),
        other => panic!("{other:?}"),
    }
    cluster.put("a", "2");
    assert_eq!(cluster.get("a").as_deref(), Some("2"));
}

#[test]
fn a_write_that_is_proposed_before_a_split_and_applied_after_it_is_refused_on_every_replica() {
    let mut cluster = Cluster::replicated();
    cluster.transfer(1, 1);
    let region = cluster.region_of(b"a");
    let split = Admin::Split {
        keys: vec![bytes::Bytes::from_static(b"m")],
        regions: vec![esker_model::NewRegion {
            id: RegionId(50),
            peers: [51, 52, 53].map(PeerId).to_vec(),
        }],
    };
    // Both wait in one inbox: the split is proposed at once, the write at the
    // end of the same turn, under the epoch of before.
    let handle = cluster.store(1).handle.clone();
    let mut done = handle.admin(RegionId(1), region.epoch, split).start().unwrap();
    let mut answer = cluster.start_put(1, &region, "z", "lost").unwrap();
    cluster.run(TICK * 20);
    assert!(done.try_recv().unwrap().is_ok());
    let refused = answer.try_recv().unwrap();
    assert!(matches!(refused, Err(RequestError::EpochNotMatch { .. })), "{refused:?}");
    for store in [1, 2, 3] {
        assert_eq!(cluster.local(store, "z"), None);
    }
}

#[test]
fn a_deposed_leaders_write_is_never_acknowledged_and_its_caller_learns_that_it_is_gone() {
    let mut cluster = Cluster::replicated();
    cluster.transfer(1, 1);
    cluster.put("a", "1");
    cluster.isolate(1);
    let region = cluster.region_of(b"a");
    let mut answer = cluster.start_put(1, &region, "a", "lost").unwrap();
    cluster.run_until("another leader", |cluster| {
        [2, 3]
            .iter()
            .any(|id| cluster.status(*id, 1).is_some_and(|s| s.role == ReplicaRole::Leader))
    });
    cluster.put("a", "2");
    assert!(answer.try_recv().is_err());
    cluster.heal();
    cluster.await_agreement(&[1, 2, 3]);
    assert!(matches!(answer.try_recv().unwrap(), Err(RequestError::StaleCommand(_))));
    assert_eq!(cluster.get("a").as_deref(), Some("2"));
}
