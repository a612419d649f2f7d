//! A whole simulated cluster without faults, in which a test does what no plan does.

use std::fs;
use std::ops::Range;
use std::path::PathBuf;
use std::time::Duration;

use esker_client::{KvClient, PlacementClient};
use esker_simulator::disk::Crash;
use esker_simulator::entropy;
use esker_simulator::journal::Journal;
use esker_simulator::network::{CLIENTS, Host, Quality};
use esker_simulator::operator::connect;
use esker_simulator::plan::Plan;
use esker_simulator::world::World;
use tokio::time::{Instant, sleep, timeout};

use crate::copy;

/// How long the cluster comes up.
const START: Duration = Duration::from_secs(8);
/// How long a machine is down.
const DOWN: Duration = Duration::from_secs(2);
/// How long an operation may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// Between two attempts.
const PAUSE: Duration = Duration::from_millis(100);

/// Runs a test in a cluster of three stores and one placement member, which is up. To be called on
/// a thread that has done nothing else.
fn within<T>(test: impl AsyncFnOnce(&mut World) -> T) -> T {
    entropy::seed_thread(1);
    let root = tempfile::tempdir().expect("a directory");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let plan = Plan {
            members: 1,
            stores: 3,
            quality: Quality { delay_ms: 2, loss_percent: 0 },
            actors: Vec::new(),
            faults: Vec::new(),
            ..Plan::of(0)
        };
        let journal = Journal::new(Instant::now(), false);
        let mut world = World::new(&plan, root.path(), journal).expect("the machines are made");
        world.drive(sleep(START)).await;
        test(&mut world).await
    })
}

/// A client of placement at another place than all before.
async fn placement(world: &mut World, place: u32) -> PlacementClient {
    let around = world.around.clone();
    world.drive(connect(&around, Host(CLIENTS + 50 + place))).await
}

/// From now on what is written there does not become durable.
fn stall(world: &mut World, host: Host) {
    const FOR_EVER: Duration = Duration::from_secs(3_600);
    let machine = world.machines.get_mut(&host).expect("it is there");
    machine.stalls.disk = Instant::now() + FOR_EVER;
}

/// Whether an operation on a region that was split fails for a client that knew it before.
pub fn a_client_keeps_an_outdated_region() -> bool {
    within(async |world: &mut World| {
        let placement = placement(world, 0).await;
        let asking = async {
            let client = || KvClient::new(placement.clone(), []).with_deadline(PATIENCE);
            let old = client();
            while old.put("k", "1").await.is_err() {
                sleep(PAUSE).await;
            }
            while client().split_region(vec!["g".into()]).await.is_err() {
                sleep(PAUSE).await;
            }
            old.put("k", "2").await.is_err()
        };
        world.drive(asking).await
    })
}

/// More than half of what one window holds.
const MANY: u32 = 600;

/// Ids, if there are any in time.
async fn ids(world: &mut World, placement: &PlacementClient) -> Option<Range<u64>> {
    let drawn = world.drive(timeout(PATIENCE, placement.alloc_id(MANY))).await;
    world.drive(sleep(PAUSE)).await;
    drawn.ok()?.ok()
}

/// Whether placement gives an id twice, when it has lost power while its disk was stalled.
pub fn ids_come_again_after_a_crash() -> bool {
    within(async |world: &mut World| {
        let (member, before) = (Host::member(0), placement(world, 0).await);
        stall(world, member);
        let mut drawn: Vec<Range<u64>> = Vec::new();
        for _ in 0..3 {
            drawn.extend(ids(world, &before).await);
        }
        world.crash(member, Crash::Power, DOWN);
        let after = placement(world, 1).await;
        let again = ids(world, &after).await.expect("the member serves again");
        drawn.iter().any(|range| range.start < again.end && again.start < range.end)
    })
}

/// A timestamp, if there is one in time.
async fn timestamp(world: &mut World, placement: &PlacementClient) -> Option<u64> {
    let drawn = world.drive(timeout(PATIENCE, placement.tso(1))).await;
    Some(drawn.ok()?.ok()?.0)
}

/// Whether timestamps go back, when placement has lost power while its disk was stalled, and its
/// wall clock is set back.
pub fn timestamps_go_back_after_a_crash() -> bool {
    within(async |world: &mut World| {
        let (member, before) = (Host::member(0), placement(world, 0).await);
        stall(world, member);
        // Longer than what was durable, and shorter than the window after it.
        world.drive(sleep(Duration::from_secs(4))).await;
        let earlier = timestamp(world, &before).await;
        world.crash(member, Crash::Power, DOWN);
        world.machines[&member].clock.set_ahead_ms(-60_000);
        let after = placement(world, 1).await;
        let later = timestamp(world, &after).await.expect("the member serves again");
        earlier.is_some_and(|earlier| earlier >= later)
    })
}

fn disk(world: &World, host: Host) -> PathBuf {
    world.machines[&host].disk().path()
}

/// Whether a store starts with its directory as it was one start before.
pub fn a_store_starts_with_an_older_copy() -> bool {
    within(async |world: &mut World| {
        let host = Host::store(1);
        let aside = world.around.root.join("aside");
        assert!(world.machines[&host].on().is_some(), "it has started");
        world.crash(host, Crash::Process, DOWN);
        copy(&disk(world, host), &aside).expect("it is copied");
        world.drive(sleep(START)).await;
        assert!(world.machines[&host].on().is_some(), "it has started again");
        world.crash(host, Crash::Process, DOWN);
        let directory = disk(world, host);
        fs::remove_dir_all(&directory).expect("it is removed");
        copy(&aside, &directory).expect("it is put back");
        // It may soon stop again, because others know that it has lost something.
        let until = Instant::now() + DOWN + START;
        while Instant::now() < until {
            world.drive(sleep(Duration::from_millis(10))).await;
            if world.machines[&host].on().is_some() {
                return true;
            }
        }
        false
    })
}
