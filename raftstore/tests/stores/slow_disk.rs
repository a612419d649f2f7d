//! A store whose disk is slower than those of the others gives way, and leads again when it is well.

use std::time::Duration;

use esker_model::StoreId;
use esker_raftstore::ReplicaRole;

use crate::cluster::{Cluster, TICK};

const SECOND: Duration = Duration::from_secs(1);

fn stick(cluster: &mut Cluster, store: u64, stuck: bool) {
    cluster.machines.get_mut(&StoreId(store)).unwrap().stuck_disk = stuck;
}

/// Three stores, and three regions that store 1 leads.
fn led_by_the_first() -> (Cluster, Vec<u64>) {
    let mut cluster = Cluster::replicated();
    let parts = cluster.split(1, &["h", "p"]);
    let regions: Vec<u64> = parts.iter().map(|region| region.id.0).collect();
    for region in &regions {
        cluster.await_leader(*region);
        cluster.transfer(*region, 1);
    }
    cluster.run(SECOND);
    (cluster, regions)
}

fn leaders(cluster: &mut Cluster, regions: &[u64]) -> Vec<Option<u64>> {
    regions.iter().map(|region| cluster.leader(*region)).collect()
}

/// Runs until store 1 leads none of the regions; how long that took.
fn await_that_the_first_leads_none(cluster: &mut Cluster, regions: &[u64]) -> Duration {
    let mut waited = Duration::ZERO;
    while leaders(cluster, regions).iter().any(|leader| leader.is_none_or(|leader| leader == 1)) {
        cluster.run(TICK);
        waited += TICK;
        assert!(waited < 10 * SECOND, "{:?}", leaders(cluster, regions));
    }
    waited
}

#[test]
fn a_leader_whose_disk_does_not_answer_hands_all_its_regions_over_within_two_seconds() {
    let (mut cluster, regions) = led_by_the_first();
    stick(&mut cluster, 1, true);
    // One write is enough to notice. It is not lost: the two other stores have it.
    let region = cluster.region_of(b"a");
    let written = cluster.start_put(1, &region, "a", "1").expect("it is taken");
    let waited = await_that_the_first_leads_none(&mut cluster, &regions);
    assert!(waited <= 2 * SECOND, "{waited:?}");
    assert!(cluster.store(1).handle.has_slow_disk());
    cluster.put("b", "2");
    assert_eq!(cluster.get("a").as_deref(), Some("1"));
    drop(written);

    // As long as the disk is not well, nobody chooses it.
    cluster.run(30 * SECOND);
    stick(&mut cluster, 1, false);
    cluster.run(5 * SECOND);
    assert!(cluster.store(1).handle.has_slow_disk());
    assert!(leaders(&mut cluster, &regions).iter().all(|leader| *leader != Some(1)));
    cluster.run(10 * SECOND);
    assert!(!cluster.store(1).handle.has_slow_disk(), "it has answered for ten seconds");
    cluster.transfer(regions[0], 1);
    cluster.run(10 * SECOND);
    assert_eq!(cluster.leader(regions[0]), Some(1), "it leads like any other");
    cluster.await_agreement(&[1, 2, 3]);
}

#[test]
fn a_leader_whose_disk_is_slower_than_the_others_hands_over() {
    let (mut cluster, regions) = led_by_the_first();
    let mut writes = 0;
    // Each write takes 200 ms to reach the disk of store 1.
    while !cluster.store(1).handle.has_slow_disk() {
        stick(&mut cluster, 1, true);
        let region = cluster.region_of(b"a");
        let _ = cluster.start_put(1, &region, "a", &writes.to_string());
        cluster.run(Duration::from_millis(200));
        stick(&mut cluster, 1, false);
        cluster.run(TICK);
        writes += 1;
        assert!(writes < 10, "it gives way within two seconds");
    }
    await_that_the_first_leads_none(&mut cluster, &regions);
}

#[test]
fn a_follower_whose_disk_does_not_answer_moves_no_leader() {
    let (mut cluster, regions) = led_by_the_first();
    stick(&mut cluster, 2, true);
    for n in 0..100 {
        cluster.put(&format!("k{n}"), "v");
        cluster.run(TICK);
    }
    cluster.run(10 * SECOND);
    assert_eq!(leaders(&mut cluster, &regions), [Some(1); 3]);
    stick(&mut cluster, 2, false);
    cluster.run(SECOND);
    assert_eq!(leaders(&mut cluster, &regions), [Some(1); 3]);
    cluster.await_agreement(&[1, 2, 3]);
}

#[test]
fn a_disk_that_is_as_slow_as_the_others_is_no_reason() {
    let (mut cluster, regions) = led_by_the_first();
    for n in 0..10 {
        (1..=3).for_each(|store| stick(&mut cluster, store, true));
        let region = cluster.region_of(b"a");
        let _ = cluster.start_put(1, &region, "a", &n.to_string());
        cluster.run(Duration::from_millis(300));
        (1..=3).for_each(|store| stick(&mut cluster, store, false));
        cluster.run(TICK);
    }
    assert!(!cluster.store(1).handle.has_slow_disk());
    assert_eq!(leaders(&mut cluster, &regions), [Some(1); 3]);
}

#[test]
fn a_slow_store_campaigns_after_the_others() {
    let (mut cluster, regions) = led_by_the_first();
    stick(&mut cluster, 1, true);
    let region = cluster.region_of(b"a");
    let _ = cluster.start_put(1, &region, "a", "1");
    await_that_the_first_leads_none(&mut cluster, &regions);
    for region in &regions {
        cluster.transfer(*region, 2);
    }
    stick(&mut cluster, 1, false);
    cluster.run(SECOND);
    // Of the two that are left, the one that is well leads.
    cluster.isolate(2);
    cluster.run(6 * SECOND);
    assert!(cluster.store(1).handle.has_slow_disk());
    for region in &regions {
        let role = cluster.status(3, *region).expect("it has a replica").role;
        assert_eq!(role, ReplicaRole::Leader, "region {region}");
    }
    cluster.heal();
    cluster.run(2 * SECOND);
    cluster.await_agreement(&[1, 2, 3]);
}
