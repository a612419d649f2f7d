//! What operators ask of one store: to look into a region, split it, or move its leadership.

use std::path::PathBuf;
use std::sync::Arc;

use esker_model::{Epoch, Region, RegionId, StoreId};
use esker_raft::ProgressState;
use esker_raftstore::{Admin as RegionAdmin, ReplicaRole, RequestError};
use esker_rpc::convert;
use esker_rpc::proto::esker::admin_server::Admin;
use esker_rpc::proto::esker::{
    PeerProgress, RegionChecksum, RegionDetailRequest, RegionDetailResponse, Role,
    SplitRegionRequest, SplitRegionResponse, StoreDetailRequest, StoreDetailResponse,
    TransferLeaderRequest, TransferLeaderResponse,
};
use esker_rpc::proto::metapb::{RegionEpoch, Store};
use esker_storage::{Storage, StorageError};
use tonic::{Request, Response, Status};

use super::late::{LateStore, not_open};
use super::pages::disk_space;

/// Serves the `Admin` service of a node.
pub struct AdminService {
    pub store: Arc<LateStore>,
    pub directory: PathBuf,
}

impl AdminService {
    fn open(&self) -> Result<Arc<Storage>, Status> {
        self.store.get().ok_or_else(not_open)
    }
}

#[tonic::async_trait]
impl Admin for AdminService {
    async fn transfer_leader(
        &self,
        request: Request<TransferLeaderRequest>,
    ) -> Result<Response<TransferLeaderResponse>, Status> {
        let request = request.into_inner();
        let service = self.open()?;
        let region = RegionId(request.region_id);
        let transfer = async {
            let status = service.store().status(region).await?;
            let to = StoreId(request.to_store);
            let target = *status.region.peer_on(to).ok_or_else(|| RequestError::Transfer {
                region,
                reason: format!("it has no replica on store {to}"),
            })?;
            let already = status.role == ReplicaRole::Leader && status.peer.id == target.id;
            if !already {
                let epoch = asked_epoch(region, request.region_epoch, &status.region)?;
                let admin = RegionAdmin::TransferLeader(Some(target.id));
                service.store().admin(region, epoch, admin).await?;
            }
            Ok::<_, RequestError>(target)
        };
        Ok(Response::new(match transfer.await {
            Ok(target) => {
                TransferLeaderResponse { target: Some(target.into()), region_error: None }
            }
            Err(error) => {
                TransferLeaderResponse { region_error: Some(error.to_proto().into()), target: None }
            }
        }))
    }

    async fn split_region(
        &self,
        request: Request<SplitRegionRequest>,
    ) -> Result<Response<SplitRegionResponse>, Status> {
        let request = request.into_inner();
        let service = self.open()?;
        Ok(Response::new(match split(&service, request).await {
            Ok(regions) => SplitRegionResponse {
                regions: regions.iter().map(Into::into).collect(),
                region_error: None,
            },
            Err(error) => SplitRegionResponse {
                region_error: Some(service.region_error(error).into()),
                regions: Vec::new(),
            },
        }))
    }

    async fn region_detail(
        &self,
        request: Request<RegionDetailRequest>,
    ) -> Result<Response<RegionDetailResponse>, Status> {
        let request = request.into_inner();
        let service = self.open()?;
        let detail = detail(&service, &request).await;
        Ok(Response::new(detail.unwrap_or_else(|error| RegionDetailResponse {
            region_error: Some(service.region_error(error).into()),
            ..Default::default()
        })))
    }

    async fn store_detail(
        &self,
        _: Request<StoreDetailRequest>,
    ) -> Result<Response<StoreDetailResponse>, Status> {
        let service = self.open()?;
        let store = service.store();
        let space = disk_space(&self.directory);
        let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        let descriptors = store.delegates().descriptors();
        let leads = |region: &&Arc<Region>| store.holds_lease(region.id);
        Ok(Response::new(StoreDetailResponse {
            store: Some(Store { id: store.store_id().0, ..Store::default() }),
            cluster_id: service.cluster_id(),
            region_count: count(descriptors.len()),
            leader_count: count(descriptors.iter().filter(leads).count()),
            capacity: space.total,
            available: space.available,
            used_size: store.engine().statistics().map_or(0, |engine| engine.sst_bytes),
        }))
    }
}

/// The epoch in an operator's request. If the request names none, the present epoch.
fn asked_epoch(
    region: RegionId,
    asked: Option<RegionEpoch>,
    present: &Region,
) -> Result<Epoch, RequestError> {
    match asked {
        None => Ok(present.epoch),
        Some(asked) => convert::epoch(Some(asked))
            .map_err(|error| RequestError::Malformed { region, reason: error.to_string() }),
    }
}

fn state_name(state: ProgressState) -> &'static str {
    match state {
        ProgressState::Probe => "probe",
        ProgressState::Replicate => "replicate",
        ProgressState::Snapshot => "snapshot",
    }
}

async fn split(
    service: &Storage,
    request: SplitRegionRequest,
) -> Result<Vec<Region>, StorageError> {
    let region = RegionId(request.region_id);
    let store = service.store();
    let status = store.status(region).await?;
    let epoch = asked_epoch(region, request.region_epoch, &status.region)?;
    let keys = match request.keys.is_empty() {
        false => request.keys,
        true => {
            let (handle, known) = (store.clone(), status.region.clone());
            let parts = request.parts;
            service.blocking(region, move || Ok(handle.middle_keys(&known, parts)?)).await?
        }
    };
    service.split_at(region, epoch, keys).await
}

async fn detail(
    service: &Storage,
    request: &RegionDetailRequest,
) -> Result<RegionDetailResponse, StorageError> {
    let id = RegionId(request.region_id);
    let store = service.store();
    let status = store.status(id).await?;
    let role = match status.role {
        ReplicaRole::Leader => Role::Leader,
        ReplicaRole::Candidate => Role::Candidate,
        ReplicaRole::Learner => Role::Learner,
        ReplicaRole::Follower => Role::Follower,
    };
    let size = store.approximate_size(&status.region)?;
    let checksum = match request.with_checksum {
        true => Some(checksum(service, &status.region).await?),
        false => None,
    };
    let leader = status.leader.and_then(|leader| status.region.peer(leader).map(Into::into));
    let progress = status
        .progress
        .iter()
        .filter_map(|progress| {
            Some(PeerProgress {
                peer: Some(status.region.peer(progress.peer)?.into()),
                match_index: progress.matched.0,
                next_index: progress.next.0,
                state: state_name(progress.state).to_owned(),
                recently_active: progress.recently_active,
            })
        })
        .collect();
    Ok(RegionDetailResponse {
        role: role.into(),
        term: status.term.0,
        leader,
        first_index: status.first.0,
        last_index: status.last.0,
        commit_index: status.commit.0,
        applied_index: status.applied.0,
        progress,
        approximate_size: size,
        checksum,
        region: Some(status.region.into()),
        ..Default::default()
    })
}

/// The checksum over all that a replica holds of a region, and the applied index at that moment.
async fn checksum(service: &Storage, region: &Region) -> Result<RegionChecksum, StorageError> {
    let (handle, known) = (service.store().clone(), region.clone());
    let sum = service.blocking(region.id, move || Ok(handle.checksum(&known)?)).await?;
    Ok(RegionChecksum {
        applied_index: sum.applied.0,
        checksum: u64::from(sum.crc32),
        pairs: sum.pairs,
        bytes: sum.bytes,
    })
}
