//! The HTTP pages that tools read: JSON in the shapes that `pd-ctl` users know.
//!
//! A member that does not lead redirects to the member that leads.

use std::sync::Arc;

use axum::extract::State;
use axum::http::{StatusCode, Uri};
use axum::response::{IntoResponse, Redirect, Response};
use axum::routing::get;
use axum::{Json, Router};
use esker_model::{Peer, RegionReport, Role};
use esker_rpc::convert::end_key;
use esker_rpc::proto::metapb;
use serde_json::{Value, json};

use super::Shared;
use crate::cluster::Cluster;
use crate::lead::Lead;
use crate::map::{Store, StoreState};
use crate::state::MemberInfo;

const GIB: f64 = (1u64 << 30) as f64;
const MIB: u64 = 1 << 20;
const SECOND_MS: u64 = 1_000;
const NANOS_PER_MS: u64 = 1_000_000;

pub(super) fn router(shared: Arc<Shared>) -> Router {
    Router::new()
        .route("/pd/api/v1/regions", get(regions))
        .route("/pd/api/v1/stores", get(stores))
        .route("/pd/api/v1/members", get(members))
        .route("/pd/api/v1/health", get(health))
        .with_state(shared)
}

/// The lead, or the response with the place to go to.
async fn lead(shared: &Shared, uri: &Uri) -> Result<Arc<Lead>, Response> {
    match shared.lead().await {
        Ok(lead) => Ok(lead),
        Err(status) => match shared.leader() {
            Some(leader) if leader.id != shared.state.me() => {
                Err(Redirect::temporary(&format!("http://{}{}", leader.address, uri))
                    .into_response())
            }
            _ => Err((StatusCode::SERVICE_UNAVAILABLE, Json(json!({ "error": status.message() })))
                .into_response()),
        },
    }
}

async fn regions(State(shared): State<Arc<Shared>>, uri: Uri) -> Response {
    let lead = match lead(&shared, &uri).await {
        Ok(lead) => lead,
        Err(elsewhere) => return elsewhere,
    };
    let reports: Vec<_> = lead.cluster.read().regions.iter().cloned().collect();
    let regions: Vec<_> = reports.iter().map(|report| region_json(report)).collect();
    Json(json!({ "count": regions.len(), "regions": regions })).into_response()
}

fn peer_json(peer: &Peer) -> Value {
    let role = match peer.role {
        Role::Voter => "Voter",
        Role::Learner => "Learner",
        Role::IncomingVoter => "IncomingVoter",
        Role::DemotingVoter => "DemotingVoter",
    };
    let mut json = json!({ "id": peer.id.0, "store_id": peer.store.0, "role_name": role });
    if peer.role == Role::Learner {
        json["is_learner"] = Value::Bool(true);
    }
    json
}

/// Keys are in upper-case hexadecimal. Sizes are in MiB, at least 1 for a region that is not empty.
fn region_json(report: &RegionReport) -> Value {
    let region = &report.region;
    let hex = |key: &[u8]| key.iter().map(|byte| format!("{byte:02X}")).collect::<String>();
    let size = report.approximate_size.div_ceil(MIB);
    let mut json = json!({
        "id": region.id.0,
        "start_key": hex(region.range.start()),
        "end_key": hex(&end_key(&region.range)),
        "epoch": { "conf_ver": region.epoch.conf_ver, "version": region.epoch.version },
        "peers": region.peers.iter().map(peer_json).collect::<Vec<_>>(),
        "leader": peer_json(&report.leader),
        "written_bytes": report.traffic.bytes_written,
        "read_bytes": report.traffic.bytes_read,
        "written_keys": report.traffic.keys_written,
        "read_keys": report.traffic.keys_read,
        "approximate_size": size,
        "approximate_keys": report.approximate_keys,
    });
    let down: Vec<_> = report
        .down
        .iter()
        .filter_map(|down| {
            let peer = peer_json(region.peer(down.peer)?);
            Some(json!({ "peer": peer, "down_seconds": down.seconds }))
        })
        .collect();
    if !down.is_empty() {
        json["down_peers"] = down.into();
    }
    let pending: Vec<_> =
        report.pending.iter().filter_map(|id| region.peer(*id).map(peer_json)).collect();
    if !pending.is_empty() {
        json["pending_peers"] = pending.into();
    }
    json
}

/// Every store that has not left for good.
async fn stores(State(shared): State<Arc<Shared>>, uri: Uri) -> Response {
    let lead = match lead(&shared, &uri).await {
        Ok(lead) => lead,
        Err(elsewhere) => return elsewhere,
    };
    let cluster = lead.cluster.read();
    let stores: Vec<_> = cluster
        .stores
        .iter()
        .filter(|store| store.descriptor.state != StoreState::Tombstone)
        .map(|store| store_json(&lead, &cluster, store))
        .collect();
    Json(json!({ "count": stores.len(), "stores": stores })).into_response()
}

fn gib(bytes: u64) -> String {
    format!("{:.4}GiB", bytes as f64 / GIB)
}

fn store_json(lead: &Lead, cluster: &Cluster, store: &Store) -> Value {
    use crate::map::{Liveness, StoreMap};
    let descriptor = &store.descriptor;
    let now = lead.clock.awake();
    let liveness = StoreMap::liveness(store, &cluster.config.stores, now);
    let (state, name) = match (descriptor.state, liveness) {
        (StoreState::Up, Liveness::Alive) => (metapb::StoreState::Up, "Up"),
        (StoreState::Up, Liveness::Disconnected) => (metapb::StoreState::Up, "Disconnected"),
        (StoreState::Up, Liveness::Down) => (metapb::StoreState::Up, "Down"),
        (StoreState::Offline, _) => (metapb::StoreState::Offline, "Offline"),
        (StoreState::Tombstone, _) => (metapb::StoreState::Tombstone, "Tombstone"),
    };
    let labels: Vec<_> = descriptor
        .labels
        .iter()
        .map(|label| json!({ "key": label.key, "value": label.value }))
        .collect();
    let load = cluster.regions.load(descriptor.id);
    let stats = &store.stats;
    let uptime_s =
        (store.last_heartbeat_ms / SECOND_MS).saturating_sub(u64::from(stats.start_time));
    json!({
        "store": {
            "id": descriptor.id.0,
            "address": descriptor.address,
            "labels": labels,
            "version": descriptor.version,
            "peer_address": descriptor.peer_address,
            "status_address": descriptor.status_address,
            "git_hash": descriptor.git_hash,
            "start_timestamp": descriptor.start_timestamp,
            "deploy_path": descriptor.deploy_path,
            "last_heartbeat": store.last_heartbeat_ms.saturating_mul(NANOS_PER_MS),
            "state": i32::from(state),
            "state_name": name,
        },
        "status": {
            "capacity": gib(stats.capacity),
            "available": gib(stats.available),
            "used_size": gib(stats.used_size),
            "leader_count": load.map_or(0, |load| load.leaders.len()),
            "region_count": load.map_or(0, |load| load.replicas.len()),
            "region_size": load.map_or(0, |load| load.size.div_ceil(MIB)),
            "sending_snap_count": stats.sending_snapshots,
            "receiving_snap_count": stats.receiving_snapshots,
            "applying_snap_count": stats.applying_snapshots,
            "is_busy": stats.is_busy,
            "uptime": format!("{uptime_s}s"),
            // Not a field of `pd-ctl`: how long the store has been silent, by this member's clock.
            "silent_ms": store.silent_ms(now),
        },
    })
}

fn member_json(member: &MemberInfo) -> Value {
    let url = format!("http://{}", member.address);
    json!({
        "name": member.name,
        "member_id": member.id.0,
        "peer_urls": [url],
        "client_urls": [url],
        "binary_version": env!("CARGO_PKG_VERSION"),
    })
}

/// Answered by every member.
async fn members(State(shared): State<Arc<Shared>>) -> Response {
    let roll = shared.roll().await;
    let members: Vec<_> = roll.members.iter().map(member_json).collect();
    let leader = roll.leader.as_ref().map(member_json);
    let mut json = json!({
        "header": { "cluster_id": shared.cluster_id().unwrap_or(0) },
        "members": members,
    });
    if let Some(leader) = leader {
        json["leader"] = leader.clone();
        json["etcd_leader"] = leader;
    }
    Json(json).into_response()
}

/// Of itself a member knows whether there is a leader. Of the others it knows whether they answer.
async fn health(State(shared): State<Arc<Shared>>) -> Response {
    let roll = shared.roll().await;
    let me = shared.state.me();
    let healths: Vec<_> = roll
        .members
        .iter()
        .map(|member| {
            let is_self = member.id == me;
            let is_healthy = match is_self {
                true => roll.leader.is_some(),
                false => roll.present.contains(&member.id),
            };
            json!({
                "name": member.name,
                "member_id": member.id.0,
                "client_urls": [format!("http://{}", member.address)],
                "health": is_healthy,
            })
        })
        .collect();
    Json(healths).into_response()
}
