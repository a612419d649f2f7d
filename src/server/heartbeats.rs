//! A store's reports to placement, and placement's orders to the store.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use esker_client::{ClientError, PlacementClient};
use esker_model::{Action, Epoch, Order, PeerChange, Region, RegionId};
use esker_raftstore::{Admin, RequestError, StoreHandle};
use esker_rpc::proto::metapb::StoreMemory;
use esker_rpc::proto::pdpb::{ErrorType, StoreStats, TimeInterval};
use esker_rpc::repeat::Repeated;
use esker_storage::SplitIds as _;
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::outbox::{MAX_WAITING_REPORTS, Report};
use super::pages::DiskSpace;
use super::split_ids::PlacementIds;

/// How often a store reports that it is alive.
const STORE_HEARTBEAT: Duration = Duration::from_secs(5);

/// Repeated failures of a store's calls to placement.
#[derive(Default)]
struct Faults {
    heartbeats: Mutex<Repeated>,
    splits: Mutex<Repeated>,
    orders: Mutex<Repeated>,
}

/// Carries reports and orders until the store stops or the task is aborted. `space` returns how full
/// the store's disk is. `memory` is the one with which the store introduced itself to placement.
pub async fn run(
    store: StoreHandle,
    placement: PlacementClient,
    mut reports: mpsc::Receiver<Report>,
    space: impl Fn() -> DiskSpace + Send,
    memory: StoreMemory,
) {
    let (outgoing, stream) = mpsc::channel(MAX_WAITING_REPORTS);
    let reporter = store.clone();
    // A new leader of placement knows no regions.
    let mut orders = placement.region_heartbeats(stream, move || reporter.report_all());
    let started = store.clock().wall_s();
    let faults = Arc::new(Faults::default());
    let mut alive = tokio::time::interval(STORE_HEARTBEAT);
    // These tasks end with this one, because no one needs reports of a store that has ended.
    let mut saying = JoinSet::new();
    // A store that stops because its data is damaged no longer reports regions. But as long as its
    // node lives it reports the damage.
    let (mut reporting, mut damaged) = (true, false);
    loop {
        tokio::select! {
            _ = store.damaged(), if !damaged => {
                damaged = true;
                alive.reset_immediately();
            }
            () = store.disk_changed() => alive.reset_immediately(),
            report = reports.recv(), if reporting => match report {
                Some(Report::Region(report)) => {
                    // If the channel is full, the report is dropped, and the region is reported
                    // again.
                    let _ = outgoing.try_send(*report);
                }
                Some(Report::Split(regions)) => {
                    let (placement, faults) = (placement.clone(), Arc::clone(&faults));
                    tokio::spawn(async move {
                        // The leaders' own reports contain the same a little later.
                        if let Err(error) = placement.report_batch_split(&regions).await
                            && let Some(times) = faults.splits.lock().failed(Instant::now())
                        {
                            tracing::info!(times, %error, "a split could not be reported");
                        }
                    });
                }
                None if store.damage().is_some() => reporting = false,
                None => return,
            },
            order = orders.recv() => match order {
                Some(order) => carry_out(&store, &placement, order, &faults),
                None => return,
            },
            _ = alive.tick() => {
                let stats = StoreStats {
                    esker_start: memory.start,
                    esker_generation: memory.generation,
                    ..statistics(&store, space(), started)
                };
                while saying.try_join_next().is_some() {}
                saying.spawn(say_alive(placement.clone(), stats, Arc::clone(&faults)));
            }
        }
    }
}

async fn say_alive(placement: PlacementClient, stats: StoreStats, faults: Arc<Faults>) {
    let heard = placement.store_heartbeat(stats).await;
    let (mut heartbeats, now) = (faults.heartbeats.lock(), Instant::now());
    match heard {
        Ok(_) => {
            if let Some(over) = heartbeats.recovered(now) {
                tracing::warn!(times = over.times, after = ?over.lasted, "placement takes the store's heartbeats again");
            }
        }
        // Two processes that run as the same store would vote twice.
        Err(ClientError::PlacementRefused {
            kind: ErrorType::DuplicatedEntry, message, ..
        }) => {
            tracing::error!("{message}");
            eprintln!("esker: {message}");
            std::process::abort();
        }
        Err(error) => {
            if let Some(times) = heartbeats.failed(now) {
                tracing::warn!(times, %error, "placement did not take the store's heartbeat");
            }
        }
    }
}

fn statistics(store: &StoreHandle, space: DiskSpace, started: u64) -> StoreStats {
    let now_s = store.clock().wall_s();
    let used = store
        .engine()
        .statistics()
        .map_or(0, |engine| engine.sst_bytes.saturating_add(engine.memtable_bytes));
    StoreStats {
        store_id: store.store_id().0,
        capacity: space.total,
        available: space.available,
        used_size: used,
        region_count: u32::try_from(store.delegates().count()).unwrap_or(u32::MAX),
        start_time: u32::try_from(started).unwrap_or(u32::MAX),
        esker_log_sequence: store.log_sequence(),
        // It is to get no leaders.
        is_busy: store.has_slow_disk(),
        esker_damage: store.damage().unwrap_or_default().to_owned(),
        interval: Some(TimeInterval {
            start_timestamp: now_s.saturating_sub(STORE_HEARTBEAT.as_secs()),
            end_timestamp: now_s,
        }),
        ..Default::default()
    }
}

/// Whether this change of the region is one that placement orders. A voter is made of a learner, so
/// that an absent peer never counts for a majority. And a peer stays on its store.
fn may_be_ordered(region: &Region, change: PeerChange) -> bool {
    let known = region.peer(change.seat().peer);
    let is_here = known.is_some_and(|known| known.store == change.seat().store);
    match change {
        PeerChange::AddVoter(_) | PeerChange::Remove(_) => is_here,
        PeerChange::AddLearner(_) => is_here || known.is_none(),
    }
}

/// Carries out an order. An order is advice: one that no longer fits the region is dropped, and
/// placement sees the region's state in the next report.
fn carry_out(store: &StoreHandle, placement: &PlacementClient, order: Order, faults: &Arc<Faults>) {
    let Order { region, epoch, action, .. } = order;
    let Some(known) = store.delegates().get(region).map(|region| region.descriptor()) else {
        return;
    };
    let admin = match action {
        Action::Split(keys) => {
            tokio::spawn(split_region(store.clone(), placement.clone(), region, epoch, keys));
            return;
        }
        Action::TransferLeader(to) => Admin::TransferLeader(Some(to.peer)),
        Action::ChangePeers(changes) => {
            if !changes.iter().all(|change| may_be_ordered(&known, *change)) {
                tracing::debug!(%region, "an order that does not fit the region");
                return;
            }
            Admin::ChangePeers(changes)
        }
    };
    let (store, faults) = (store.clone(), Arc::clone(faults));
    tokio::spawn(async move {
        match store.admin(region, epoch, admin.clone()).await {
            Ok(_) => tracing::info!(%region, order = ?admin, "done"),
            // The order came twice, or too late.
            Err(RequestError::EpochNotMatch { .. } | RequestError::ServerIsBusy { .. }) => {}
            Err(error) => {
                if let Some(times) = faults.orders.lock().failed(Instant::now()) {
                    tracing::info!(%region, order = ?admin, times, %error, "order not carried out");
                }
            }
        }
    });
}

async fn split_region(
    store: StoreHandle,
    placement: PlacementClient,
    region: RegionId,
    epoch: Epoch,
    keys: Vec<Bytes>,
) {
    let count = keys.len();
    let ids = async |region: &Region, count| {
        PlacementIds(placement).split_ids(region.clone(), count).await
    };
    match store.split(region, epoch, keys, ids).await {
        Ok(_) => tracing::info!(%region, keys = count, "split, as placement asked"),
        // The order came twice or too late, or the members are being changed. Placement asks again.
        Err(error) => tracing::debug!(%region, keys = count, ?error, "not split"),
    }
}
