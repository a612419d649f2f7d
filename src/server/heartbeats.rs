//! A store's reports to placement, and placement's orders to the store.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use esker_client::{ClientError, PlacementClient};
use esker_raftstore::{
    Admin, PeerChange, PeerId, RegionExt, RegionId, RegionReport, RequestError, StoreHandle,
};
use esker_rpc::proto::eraftpb::ConfChangeType;
use esker_rpc::proto::metapb::{Region, RegionEpoch, StoreMemory};
use esker_rpc::proto::pdpb::{
    ChangePeer, CheckPolicy, ErrorType, PeerStats, RegionHeartbeatRequest, RegionHeartbeatResponse,
    SplitRegion, StoreStats, TimeInterval,
};
use esker_rpc::repeat::Repeated;
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::outbox::{MAX_WAITING_REPORTS, Report};
use super::regions::RegionService;

/// How often a store says that it is alive.
const STORE_HEARTBEAT: Duration = Duration::from_secs(5);

/// Failures of a store's dealings with placement that may come in rows.
#[derive(Default)]
struct Faults {
    heartbeats: Mutex<Repeated>,
    splits: Mutex<Repeated>,
    orders: Mutex<Repeated>,
}

/// Carries reports and orders until the store stops or the task is aborted. `memory` is that with
/// which the store introduced itself to placement.
pub async fn run(
    store: StoreHandle,
    placement: PlacementClient,
    mut reports: mpsc::Receiver<Report>,
    directory: PathBuf,
    memory: StoreMemory,
) {
    let (outgoing, stream) = mpsc::channel(MAX_WAITING_REPORTS);
    let reporter = store.clone();
    // A leader of placement that is new knows no region.
    let mut orders = placement.region_heartbeats(stream, move || reporter.report_all());
    let started = seconds();
    let faults = Arc::new(Faults::default());
    let mut alive = tokio::time::interval(STORE_HEARTBEAT);
    // They end with this task: what is said of a store that has ended concerns nobody.
    let mut saying = JoinSet::new();
    // A store that stops because its data is damaged reports no regions any more, but says
    // for as long as its node lives why.
    let (mut reporting, mut damaged) = (true, false);
    loop {
        tokio::select! {
            _ = store.damaged(), if !damaged => {
                damaged = true;
                alive.reset_immediately();
            }
            report = reports.recv(), if reporting => match report {
                Some(Report::Region(report)) => {
                    // Full: the region is reported again.
                    let _ = outgoing.try_send(heartbeat(*report));
                }
                Some(Report::Split(regions)) => {
                    let (placement, faults) = (placement.clone(), Arc::clone(&faults));
                    tokio::spawn(async move {
                        // The leaders' own reports say the same a little later.
                        if let Err(error) = placement.report_batch_split(regions).await
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
                    ..statistics(&store, &directory, started)
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
        // Two processes that are the same store would vote twice.
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

fn seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

fn heartbeat(report: RegionReport) -> RegionHeartbeatRequest {
    const MIB: u64 = 1 << 20;
    RegionHeartbeatRequest {
        region: Some(report.region),
        leader: Some(report.leader),
        down_peers: report
            .down
            .into_iter()
            .map(|(peer, down_seconds)| PeerStats { peer: Some(peer), down_seconds })
            .collect(),
        pending_peers: report.pending,
        bytes_written: report.written_bytes,
        bytes_read: report.read_bytes,
        keys_written: report.written_keys,
        keys_read: report.read_keys,
        approximate_size: report.approximate_bytes.div_ceil(MIB),
        interval: Some(TimeInterval { start_timestamp: 0, end_timestamp: seconds() }),
        term: report.term,
        ..Default::default()
    }
}

fn statistics(store: &StoreHandle, directory: &Path, started: u64) -> StoreStats {
    let space = super::pages::disk_space(directory);
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
        esker_damage: store.damage().unwrap_or_default().to_owned(),
        interval: Some(TimeInterval {
            start_timestamp: seconds().saturating_sub(STORE_HEARTBEAT.as_secs()),
            end_timestamp: seconds(),
        }),
        ..Default::default()
    }
}

/// Nothing for a kind that is not known, and for what placement orders of no region: a
/// voter comes from a learner, so that a peer that is nowhere never counts for a majority;
/// and a peer stays on its store.
fn peer_change(region: &Region, change: &ChangePeer) -> Option<PeerChange> {
    let peer = change.peer?;
    let known = region.peer(PeerId(peer.id));
    let is_here = known.is_some_and(|known| known.store_id == peer.store_id);
    match ConfChangeType::try_from(change.change_type).ok()? {
        ConfChangeType::AddNode => is_here.then_some(PeerChange::AddVoter(peer)),
        ConfChangeType::AddLearnerNode => {
            (is_here || known.is_none()).then_some(PeerChange::AddLearner(peer))
        }
        ConfChangeType::RemoveNode => is_here.then_some(PeerChange::Remove(peer)),
    }
}

fn peer_changes(region: &Region, changes: &[ChangePeer]) -> Option<Admin> {
    let changes = changes.iter().map(|change| peer_change(region, change));
    changes.collect::<Option<Vec<_>>>().map(Admin::ChangePeers)
}

/// An order is advice: what does not fit the region any more is dropped, and
/// placement sees from the next report where the region really is.
fn carry_out(
    store: &StoreHandle,
    placement: &PlacementClient,
    order: RegionHeartbeatResponse,
    faults: &Arc<Faults>,
) {
    let region = RegionId(order.region_id);
    let epoch = order.region_epoch.unwrap_or_default();
    if let Some(split) = order.split_region {
        tokio::spawn(split_region(store.clone(), placement.clone(), region, epoch, split));
        return;
    }
    let Some(known) = store.delegates().get(region).map(|region| region.descriptor()) else {
        return;
    };
    let admin = if let Some(transfer) = order.transfer_leader {
        transfer.peer.map(|peer| Admin::TransferLeader(Some(PeerId(peer.id))))
    } else if let Some(change) = order.change_peer_v2 {
        peer_changes(&known, &change.changes)
    } else {
        order
            .change_peer
            .as_ref()
            .and_then(|change| peer_changes(&known, std::slice::from_ref(change)))
    };
    let Some(admin) = admin else {
        tracing::debug!(%region, "an order that does not fit the region");
        return;
    };
    let (store, faults) = (store.clone(), Arc::clone(faults));
    tokio::spawn(async move {
        match store.admin(region, epoch, admin.clone()).await {
            Ok(_) => tracing::info!(%region, order = ?admin, "done"),
            // Told twice, or too late.
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
    epoch: RegionEpoch,
    split: SplitRegion,
) {
    if split.policy() != CheckPolicy::Usekey || split.keys.is_empty() {
        tracing::info!(%region, policy = ?split.policy(), "only splits at given keys are served");
        return;
    }
    let keys = split.keys.len();
    match RegionService::split_at(&store, &placement, region, epoch, split.keys).await {
        Ok(_) => tracing::info!(%region, keys, "split, as placement asked"),
        // Told twice or too late, or the members are being changed: placement asks again.
        Err(error) => tracing::debug!(%region, keys, ?error, "not split"),
    }
}
