//! Bootstrap, ids, stores, the cluster's settings and the GC safe points.

use std::sync::Arc;

use esker_model::{KeyRange, StoreId};
use esker_rpc::proto::pdpb;

use super::{Refusal, checks, convert};
use crate::lead::Lead;
use crate::map::{PutStoreError, StoreDescriptor, StoreState};
use crate::state::{Fact, ServiceSafePoint};

/// Replicas that a cluster may be set to have.
const MAX_REPLICAS: std::ops::RangeInclusive<u32> = 1..=9;
/// Services that may hold a GC safe point.
const MAX_GC_SERVICES: usize = 1_024;
/// The longest name of such a service, in bytes.
const MAX_GC_SERVICE_ID: usize = 256;
/// Milliseconds in a second.
const SECOND_MS: u64 = 1_000;

pub fn not_bootstrapped() -> Refusal {
    Refusal::header(
        pdpb::ErrorType::NotBootstrapped,
        "the cluster is not bootstrapped: no store has started it yet",
    )
}

/// Enters the first store and the first region of the cluster. Only the first call succeeds.
pub async fn bootstrap(
    lead: Arc<Lead>,
    request: pdpb::BootstrapRequest,
) -> Result<pdpb::BootstrapResponse, Refusal> {
    let _one_at_a_time = lead.facts.lock().await;
    if lead.is_bootstrapped() {
        return Err(Refusal::header(
            pdpb::ErrorType::AlreadyBootstrapped,
            "the cluster is bootstrapped already; join it with PutStore",
        ));
    }
    let store = named_store(&lead, request.store)?;
    let store = lead.cluster.read().stores.check_put(store)?;
    let region =
        convert::region(request.region).map_err(|error| Refusal::invalid(error.to_string()))?;
    let ids = region.peers.iter().map(|peer| peer.id.0).chain([region.id.0]);
    if let Some(id) = ids.into_iter().find(|id| !lead.may_have_given(*id)) {
        return Err(Refusal::invalid(format!(
            "id {id} was never handed out by this cluster: ask for one with AllocID"
        )));
    }
    if region.range != KeyRange::all() {
        return Err(Refusal::invalid(format!(
            "the first region, {}, must hold all keys",
            region.id
        )));
    }
    let is_on_store = region.peers.len() == 1 && region.peers[0].store == store.id;
    if !is_on_store {
        return Err(Refusal::invalid(format!(
            "the first region, {}, must have its only peer on store {}",
            region.id, store.id
        )));
    }
    let facts =
        vec![Fact::Store(Box::new(convert::descriptor_message(&store))), Fact::Bootstrapped];
    lead.commit(facts).await?;
    let now = lead.clock.awake();
    lead.cluster.write().stores.put(store, now);
    lead.set_bootstrapped();
    Ok(pdpb::BootstrapResponse::default())
}

pub async fn is_bootstrapped(
    lead: Arc<Lead>,
    _: pdpb::IsBootstrappedRequest,
) -> Result<pdpb::IsBootstrappedResponse, Refusal> {
    Ok(pdpb::IsBootstrappedResponse { bootstrapped: lead.is_bootstrapped(), ..Default::default() })
}

/// Consecutive ids. The response has the last, as clients expect.
pub async fn alloc_id(
    lead: Arc<Lead>,
    request: pdpb::AllocIdRequest,
) -> Result<pdpb::AllocIdResponse, Refusal> {
    let count = request.count.max(1);
    Ok(pdpb::AllocIdResponse { id: lead.ids(count).await?, count, ..Default::default() })
}

/// The descriptor of a store that introduces itself, if its id is one of this cluster's.
fn named_store(
    lead: &Lead,
    store: Option<esker_rpc::proto::metapb::Store>,
) -> Result<StoreDescriptor, Refusal> {
    let store = store.ok_or_else(|| Refusal::invalid("the request has no store"))?;
    let store =
        convert::store_descriptor(store).map_err(|error| Refusal::invalid(error.to_string()))?;
    if !lead.may_have_given(store.id.0) {
        return Err(Refusal::invalid(format!(
            "store id {} was never handed out by this cluster: ask for one with AllocID",
            store.id
        )));
    }
    Ok(store)
}

impl From<PutStoreError> for Refusal {
    fn from(error: PutStoreError) -> Self {
        let kind = match error {
            PutStoreError::Tombstone { .. } => pdpb::ErrorType::StoreTombstone,
            PutStoreError::DuplicateAddress { .. }
            | PutStoreError::StillAlive { .. }
            | PutStoreError::OtherStart { .. } => pdpb::ErrorType::DuplicatedEntry,
            PutStoreError::NoAddress { .. }
            | PutStoreError::OnlyStore { .. }
            | PutStoreError::OlderCopy { .. } => pdpb::ErrorType::InvalidValue,
        };
        Refusal::header(kind, error.to_string())
    }
}

pub async fn put_store(
    lead: Arc<Lead>,
    request: pdpb::PutStoreRequest,
) -> Result<pdpb::PutStoreResponse, Refusal> {
    if !lead.is_bootstrapped() {
        return Err(not_bootstrapped());
    }
    let _one_at_a_time = lead.facts.lock().await;
    let store = named_store(&lead, request.store)?;
    let now = lead.clock.awake();
    let replaced = match request.esker_replace {
        true => lead.cluster.read().stores.check_replace(&store, now)?,
        false => None,
    };
    let mut put = Vec::new();
    if let Some(replaced) = replaced {
        tracing::warn!(store = %replaced.id, by = %store.id, "a store is replaced for good");
        put.push(replaced);
        put.push(StoreDescriptor { state: StoreState::Up, ..store });
    } else {
        put.push(lead.cluster.read().stores.check_put(store)?);
    }
    // Both changes together, or none, so that the address always belongs to exactly one store.
    let facts = put.iter().map(|store| Fact::Store(Box::new(convert::descriptor_message(store))));
    lead.commit(facts.collect()).await?;
    let mut cluster = lead.cluster.write();
    for store in put {
        cluster.stores.put(store, now);
    }
    Ok(pdpb::PutStoreResponse::default())
}

fn unknown_store(id: StoreId) -> Refusal {
    Refusal::header(
        pdpb::ErrorType::EntryNotFound,
        format!("store {id} is not known to this cluster"),
    )
}

pub async fn get_store(
    lead: Arc<Lead>,
    request: pdpb::GetStoreRequest,
) -> Result<pdpb::GetStoreResponse, Refusal> {
    let id = StoreId(request.store_id);
    let cluster = lead.cluster.read();
    let store = cluster.stores.get(id).ok_or_else(|| unknown_store(id))?;
    Ok(pdpb::GetStoreResponse {
        store: Some(convert::store_message(store)),
        stats: Some(convert::stats_message(store)),
        ..Default::default()
    })
}

pub async fn get_all_stores(
    lead: Arc<Lead>,
    request: pdpb::GetAllStoresRequest,
) -> Result<pdpb::GetAllStoresResponse, Refusal> {
    let cluster = lead.cluster.read();
    let stores = cluster
        .stores
        .iter()
        .filter(|store| {
            let is_gone = store.descriptor.state == StoreState::Tombstone;
            !(is_gone && request.exclude_tombstone_stores)
        })
        .map(convert::store_message)
        .collect();
    Ok(pdpb::GetAllStoresResponse { stores, ..Default::default() })
}

pub async fn store_heartbeat(
    lead: Arc<Lead>,
    request: pdpb::StoreHeartbeatRequest,
) -> Result<pdpb::StoreHeartbeatResponse, Refusal> {
    if !lead.is_bootstrapped() {
        return Err(not_bootstrapped());
    }
    let stats = request.stats.ok_or_else(|| Refusal::invalid("the heartbeat has no stats"))?;
    let id = StoreId(stats.store_id);
    let stats = convert::stats(&stats)?;
    let (now, wall_ms) = (lead.clock.awake(), lead.clock.wall_ms());
    let (state, unsaved) = {
        let mut cluster = lead.cluster.write();
        cluster.stores.check_start(id, &stats)?;
        let store =
            cluster.stores.heartbeat(id, stats, now, wall_ms).ok_or_else(|| unknown_store(id))?;
        if store.descriptor.state == StoreState::Tombstone {
            return Err(PutStoreError::Tombstone { id }.into());
        }
        (convert::store_message(store).node_state, cluster.stores.take_unsaved(id, now))
    };
    if unsaved {
        save_memory(&lead, id).await?;
    }
    Ok(pdpb::StoreHeartbeatResponse { state, ..Default::default() })
}

/// Makes a store's memory durable, and the fact that it was heard of. So a later leader, too,
/// recognises an older copy of its directory.
async fn save_memory(lead: &Lead, id: StoreId) -> Result<(), Refusal> {
    let _one_at_a_time = lead.facts.lock().await;
    // The store as it is now, not as it was before the wait.
    let store = lead.cluster.read().stores.get(id).map(convert::store_message);
    match store {
        Some(store) => Ok(lead.commit(vec![Fact::Store(Box::new(store))]).await?),
        None => Ok(()),
    }
}

pub async fn get_cluster_config(
    lead: Arc<Lead>,
    _: pdpb::GetClusterConfigRequest,
) -> Result<pdpb::GetClusterConfigResponse, Refusal> {
    let max_replicas = lead.cluster.read().config.max_replicas;
    Ok(pdpb::GetClusterConfigResponse {
        cluster: Some(esker_rpc::proto::metapb::Cluster {
            id: lead.cluster_id,
            max_peer_count: u32::try_from(max_replicas).unwrap_or(u32::MAX),
        }),
        ..Default::default()
    })
}

pub async fn put_cluster_config(
    lead: Arc<Lead>,
    request: pdpb::PutClusterConfigRequest,
) -> Result<pdpb::PutClusterConfigResponse, Refusal> {
    let count = request
        .cluster
        .ok_or_else(|| Refusal::invalid("the request has no cluster"))?
        .max_peer_count;
    if !MAX_REPLICAS.contains(&count) {
        return Err(Refusal::invalid(format!(
            "{count} replicas are not possible: give {} to {}",
            MAX_REPLICAS.start(),
            MAX_REPLICAS.end()
        )));
    }
    let _one_at_a_time = lead.facts.lock().await;
    lead.commit(vec![Fact::MaxReplicas(u64::from(count))]).await?;
    lead.cluster.write().config.max_replicas = count as usize;
    Ok(pdpb::PutClusterConfigResponse::default())
}

pub async fn get_gc_safe_point(
    lead: Arc<Lead>,
    _: pdpb::GetGcSafePointRequest,
) -> Result<pdpb::GetGcSafePointResponse, Refusal> {
    Ok(pdpb::GetGcSafePointResponse {
        safe_point: lead.facts.lock().await.gc_safe_point,
        ..Default::default()
    })
}

/// Moves the safe point forward. An older one changes nothing. Returns the safe point that holds.
pub async fn update_gc_safe_point(
    lead: Arc<Lead>,
    request: pdpb::UpdateGcSafePointRequest,
) -> Result<pdpb::UpdateGcSafePointResponse, Refusal> {
    checks::safe_point(request.safe_point, lead.clock.wall_ms())?;
    let mut facts = lead.facts.lock().await;
    if request.safe_point > facts.gc_safe_point {
        lead.commit(vec![Fact::GcSafePoint(request.safe_point)]).await?;
        facts.gc_safe_point = request.safe_point;
    }
    Ok(pdpb::UpdateGcSafePointResponse {
        new_safe_point: facts.gc_safe_point,
        ..Default::default()
    })
}

/// Holds, moves or (with no time to live) gives up a service's safe point. A safe point below the
/// smallest that any service holds is not accepted, because what it is to keep may be collected
/// already. The response has the smallest safe point and its service.
pub async fn update_service_gc_safe_point(
    lead: Arc<Lead>,
    request: pdpb::UpdateServiceGcSafePointRequest,
) -> Result<pdpb::UpdateServiceGcSafePointResponse, Refusal> {
    let id = request.service_id.to_vec();
    if id.is_empty() || id.len() > MAX_GC_SERVICE_ID {
        return Err(Refusal::invalid(format!(
            "a service's name has 1 to {MAX_GC_SERVICE_ID} bytes, not {}",
            id.len()
        )));
    }
    checks::safe_point(request.safe_point, lead.clock.wall_ms())?;
    let now_s = i64::try_from(lead.clock.wall_ms() / SECOND_MS).unwrap_or(i64::MAX);
    let mut facts = lead.facts.lock().await;
    let mut writes: Vec<_> = facts
        .services
        .iter()
        .filter(|(_, point)| point.expires_at_s <= now_s)
        .map(|(id, _)| Fact::ServiceGone(id.clone()))
        .collect();
    let mut services = facts.services.clone();
    services.retain(|_, point| point.expires_at_s > now_s);
    if request.ttl <= 0 {
        if services.remove(&id).is_some() {
            writes.push(Fact::ServiceGone(id));
        }
    } else {
        let smallest = services.values().map(|point| point.safe_point).min();
        let floor = smallest.unwrap_or(facts.gc_safe_point);
        if request.safe_point >= floor {
            if services.len() >= MAX_GC_SERVICES && !services.contains_key(&id) {
                return Err(Refusal::invalid(format!(
                    "{MAX_GC_SERVICES} services hold safe points already"
                )));
            }
            let point = ServiceSafePoint {
                safe_point: request.safe_point,
                expires_at_s: now_s.saturating_add(request.ttl),
            };
            writes.push(Fact::Service(id.clone(), point.clone()));
            services.insert(id, point);
        }
    }
    if !writes.is_empty() {
        lead.commit(writes).await?;
        facts.services = services;
    }
    let smallest =
        facts.services.iter().min_by_key(|(id, point)| (point.safe_point, (*id).clone()));
    Ok(match smallest {
        Some((id, point)) => pdpb::UpdateServiceGcSafePointResponse {
            service_id: id.clone().into(),
            ttl: point.expires_at_s.saturating_sub(now_s),
            min_safe_point: point.safe_point,
            ..Default::default()
        },
        None => pdpb::UpdateServiceGcSafePointResponse {
            min_safe_point: facts.gc_safe_point,
            ..Default::default()
        },
    })
}

pub async fn get_min_ts(
    lead: Arc<Lead>,
    _: pdpb::GetMinTsRequest,
) -> Result<pdpb::GetMinTsResponse, Refusal> {
    Ok(pdpb::GetMinTsResponse {
        timestamp: Some(lead.timestamps(1).await?.into()),
        ..Default::default()
    })
}
