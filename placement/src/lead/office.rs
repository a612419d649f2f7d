//! A term of office: how it begins, what is done in it, and how it ends. This is the background
//! task of a member.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use esker_mutants::broken;
use parking_lot::{Mutex, RwLock};
use thiserror::Error;
use tokio::sync::{Notify, watch};
use tokio::time::MissedTickBehavior;
use tracing::{debug, info};

use super::{Counters, Facts, Lead};
use crate::cluster::Cluster;
use crate::ids::IdAllocator;
use crate::map::StoreMap;
use crate::server::{Shared, convert};
use crate::state::{
    CLUSTER_ID_PREFIX, DamagedState, DurableState, Fact, Leadership, PREFIX, StateError,
};
use crate::timestamp::TimestampOracle;

/// How often the windows are looked after. Far below the low mark of the timestamps' window, so
/// that requests hardly ever wait for a window.
const WINDOW_INTERVAL: Duration = Duration::from_millis(50);
/// The wait before another attempt at something that failed for an unknown reason.
const RETRY: Duration = Duration::from_millis(100);

/// Why a term of office did not begin.
#[derive(Debug, Error)]
enum OfficeError {
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Damaged(#[from] DamagedState),
}

/// Follows the elections of the placement driver's group for ever. Serves while this member leads,
/// and not a moment longer. Ends only when the group itself ends, or with an error when the stored
/// state cannot be read.
pub(crate) async fn run(shared: Arc<Shared>) -> Result<(), DamagedState> {
    let mut leadership = shared.state.leadership();
    loop {
        let seen = *leadership.borrow_and_update();
        if seen.is_self {
            match take_office(&shared, seen.term).await {
                Ok(lead) => {
                    info!(term = seen.term, cluster_id = lead.cluster_id, "placement leads");
                    let lead = Arc::new(lead);
                    shared.lead.send_replace(Some(Arc::clone(&lead)));
                    hold_office(&shared, &lead, &mut leadership, seen).await;
                    shared.lead.send_replace(None);
                    lead.end();
                    info!(term = seen.term, "placement leads no more");
                    // If the term of office ended although this member still leads, it begins
                    // again.
                    if *leadership.borrow() == seen {
                        tokio::time::sleep(RETRY).await;
                        continue;
                    }
                }
                Err(OfficeError::Damaged(damaged)) => return Err(damaged),
                Err(OfficeError::State(error)) => {
                    debug!(term = seen.term, %error, "could not take up office yet");
                    // Tried again after a pause, or at the next change.
                    let _ = tokio::time::timeout(RETRY, leadership.changed()).await;
                    if leadership.has_changed().is_err() {
                        return Ok(());
                    }
                    continue;
                }
            }
        } else if shared.cluster_id().is_none() {
            learn_cluster_id(&shared).await?;
            if shared.cluster_id().is_none() {
                let _ = tokio::time::timeout(RETRY, leadership.changed()).await;
                if leadership.has_changed().is_err() {
                    return Ok(());
                }
                continue;
            }
        }
        if *leadership.borrow() == seen && leadership.changed().await.is_err() {
            return Ok(());
        }
    }
}

/// Learns the cluster's id from what this member applied, if it has never led, because every member
/// answers it to clients.
async fn learn_cluster_id(shared: &Shared) -> Result<(), DamagedState> {
    match shared.state.scan_stale(CLUSTER_ID_PREFIX.to_vec()).await {
        Ok(pairs) => {
            if let Some(id) = DurableState::decode(pairs)?.cluster_id {
                shared.set_cluster_id(id);
            }
        }
        Err(error) => debug!(%error, "the cluster's id is not known yet"),
    }
    Ok(())
}

/// Loads the durable state and secures windows behind everything that earlier leaders may have
/// given. Only then does it return a lead to serve with.
async fn take_office(shared: &Shared, term: u64) -> Result<Lead, OfficeError> {
    let durable = DurableState::decode(shared.state.scan(PREFIX.to_vec()).await?)?;
    let mut facts = Vec::new();
    let cluster_id = durable.cluster_id.unwrap_or_else(|| {
        // The first leader's first write gives the cluster its id.
        let id = loop {
            let id = rand::random::<u64>();
            if id != 0 {
                break id;
            }
        };
        facts.push(Fact::ClusterId(id));
        id
    });
    let mut counters = Counters {
        timestamps: TimestampOracle::resume(durable.timestamp_bound),
        ids: IdAllocator::resume(durable.id_bound),
    };
    let windows = wanted_windows(&counters, shared.clock.wall_ms());
    facts.extend(windows.facts());
    shared.state.write(facts.into_iter().map(Fact::into_write).collect(), term).await?;
    windows.are_durable(&mut counters);
    shared.set_cluster_id(cluster_id);

    let now = shared.clock.awake();
    let mut stores = StoreMap::default();
    let newest_ms = durable.stores.iter().map(convert::last_heartbeat_ms).max().unwrap_or_default();
    for store in durable.stores {
        let heartbeat_ms = convert::last_heartbeat_ms(&store);
        match convert::store_descriptor(store) {
            Ok(descriptor) => stores.resume(descriptor, heartbeat_ms, newest_ms, now),
            // If the store were left out, its address and its id could be given to another store.
            Err(error) => {
                let (key, why) = (b"pd/store/".to_vec(), error.to_string());
                return Err(DamagedState { key, why }.into());
            }
        }
    }
    let mut schedule = shared.config.schedule.clone();
    if let Some(count) = durable.max_replicas {
        schedule.max_replicas = usize::try_from(count).unwrap_or(schedule.max_replicas);
    }
    Ok(Lead {
        term,
        cluster_id,
        state: Arc::clone(&shared.state),
        clock: Arc::clone(&shared.clock),
        counters: Mutex::new(counters),
        windows: watch::Sender::new(0),
        window_wanted: Notify::new(),
        cluster: RwLock::new(Cluster::new(stores, schedule, shared.config.limits.clone())),
        heard: watch::Sender::new(0),
        bootstrapped: AtomicBool::new(durable.bootstrapped),
        facts: tokio::sync::Mutex::new(Facts {
            gc_safe_point: durable.gc_safe_point,
            services: durable.services.into_iter().collect(),
        }),
        cutting: tokio::sync::Mutex::default(),
        streams: Mutex::default(),
        ended: watch::Sender::new(false),
    })
}

/// Bounds that should be made durable next.
#[derive(Clone, Copy, Debug, Default)]
struct Windows {
    timestamps: Option<u64>,
    ids: Option<u64>,
}

fn wanted_windows(counters: &Counters, wall_ms: u64) -> Windows {
    Windows {
        timestamps: counters.timestamps.wanted_bound(wall_ms),
        ids: counters.ids.wanted_bound(),
    }
}

impl Windows {
    fn facts(self) -> Vec<Fact> {
        let timestamps = self.timestamps.map(Fact::TimestampBound);
        let ids = self.ids.map(Fact::IdBound);
        timestamps.into_iter().chain(ids).collect()
    }

    /// What of it is handed out before it is durable: nothing.
    fn early(self) -> Windows {
        Windows {
            timestamps: self.timestamps.filter(|_| broken!(TimestampsAfterTheirWindow)),
            ids: self.ids.filter(|_| broken!(IdsAfterTheirWindow)),
        }
    }

    fn are_durable(self, counters: &mut Counters) {
        if let Some(bound) = self.timestamps {
            counters.timestamps.bound_is_durable(bound);
        }
        if let Some(bound) = self.ids {
            counters.ids.bound_is_durable(bound);
        }
    }
}

/// Serves until leadership changes or the term of office ends by itself.
async fn hold_office(
    shared: &Shared,
    lead: &Lead,
    leadership: &mut watch::Receiver<Leadership>,
    seen: Leadership,
) {
    let lost = async {
        // An error means that the group is gone, and then the term of office is over, too.
        let _ = leadership.wait_for(|now| !now.is_self || now.term != seen.term).await;
    };
    tokio::select! {
        () = lost => {}
        () = lead.ended() => {}
        () = keep_windows(lead) => {}
        () = schedule(shared, lead) => {}
    }
}

/// Keeps both sequences' windows ahead. Ends with the term of office.
async fn keep_windows(lead: &Lead) {
    let mut interval = tokio::time::interval(WINDOW_INTERVAL);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let windows = wanted_windows(&lead.counters.lock(), lead.clock.wall_ms());
        let facts = windows.facts();
        if !facts.is_empty() {
            windows.early().are_durable(&mut lead.counters.lock());
            if lead.commit(facts).await.is_err() {
                return;
            }
            windows.are_durable(&mut lead.counters.lock());
            lead.windows.send_modify(|count| *count += 1);
        }
        tokio::select! {
            _ = interval.tick() => {}
            () = lead.window_wanted.notified() => {}
        }
    }
}

/// Runs the schedulers at their interval, under a lease.
async fn schedule(shared: &Shared, lead: &Lead) {
    let mut interval = tokio::time::interval(shared.config.schedule_interval);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        interval.tick().await;
        if !lead.is_bootstrapped() || !lead.is_current() {
            continue;
        }
        let orders = lead.cluster.write().tick(lead.clock.awake(), &mut || lead.fresh_peer());
        lead.tell(orders);
        let cluster = lead.cluster.read();
        metrics::gauge!("esker_placement_regions").set(cluster.regions.len() as f64);
        metrics::gauge!("esker_placement_stores").set(cluster.stores.iter().count() as f64);
        metrics::gauge!("esker_placement_operators").set(cluster.operators.iter().count() as f64);
    }
}
