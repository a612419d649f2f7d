//! The gRPC service `pdpb.PD`: all its methods. What each method does is in the modules beside this
//! one.

use std::future::Future;
use std::sync::Arc;

use esker_rpc::proto::pdpb;
use esker_rpc::proto::pdpb::pd_server::Pd;
use tokio::time::Instant;
use tonic::codegen::BoxStream;
use tonic::{Request, Response, Status, Streaming};

use super::headers::{RequestWithHeader, ResponseWithHeader};
use super::{MIN_STREAM_LIFE, Refusal, Shared, regions, stores, streams};
use crate::lead::Lead;
use crate::state::MemberInfo;

/// `pdpb.PD` over one member of the placement driver.
pub struct PdService {
    shared: Arc<Shared>,
}

impl PdService {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// One request, answered by the leader for its own cluster only.
    async fn unary<Q, R, F>(
        &self,
        request: Request<Q>,
        handle: impl FnOnce(Arc<Lead>, Q) -> F + Send,
    ) -> Result<Response<R>, Status>
    where
        Q: RequestWithHeader,
        R: ResponseWithHeader,
        F: Future<Output = Result<R, Refusal>> + Send,
    {
        unary(&self.shared, request, handle).await
    }
}

/// See [`PdService::unary`]. The other service uses it, too.
pub(super) async fn unary<Q, R, F>(
    shared: &Shared,
    request: Request<Q>,
    handle: impl FnOnce(Arc<Lead>, Q) -> F + Send,
) -> Result<Response<R>, Status>
where
    Q: RequestWithHeader,
    R: ResponseWithHeader,
    F: Future<Output = Result<R, Refusal>> + Send,
{
    let request = request.into_inner();
    hear_of(shared, request.header());
    let lead = shared.lead().await?;
    let answer = match shared.check_cluster(&lead, request.header()) {
        Ok(()) => handle(Arc::clone(&lead), request).await,
        Err(refusal) => Err(refusal),
    };
    // A lease that is still held confirms what was read from memory.
    if !lead.is_current() && lead.current().await.is_err() {
        return Err(shared.not_leader());
    }
    shared.answer(answer)
}

/// Passes on the cluster that a request is for.
fn hear_of(shared: &Shared, header: Option<&pdpb::RequestHeader>) {
    if let Some(header) = header
        && header.cluster_id != 0
    {
        shared.state.heard_of_cluster(header.cluster_id);
    }
}

/// A member as a message.
pub(super) fn member_message(member: &MemberInfo) -> pdpb::Member {
    let url = format!("http://{}", member.address);
    pdpb::Member {
        name: member.name.clone(),
        member_id: member.id.0,
        peer_urls: vec![url.clone()],
        client_urls: vec![url],
        binary_version: env!("CARGO_PKG_VERSION").to_owned(),
        ..Default::default()
    }
}

#[tonic::async_trait]
impl Pd for PdService {
    async fn get_cluster_info(
        &self,
        _: Request<pdpb::GetClusterInfoRequest>,
    ) -> Result<Response<pdpb::GetClusterInfoResponse>, Status> {
        self.shared.answer(Ok(pdpb::GetClusterInfoResponse {
            service_modes: vec![pdpb::ServiceMode::PdSvcMode.into()],
            tso_urls: Vec::new(),
            ..Default::default()
        }))
    }

    /// Every member answers this, for any header, because clients learn from it which cluster this
    /// is and which member leads. The order of the members matters: see `server/roll.rs`.
    async fn get_members(
        &self,
        request: Request<pdpb::GetMembersRequest>,
    ) -> Result<Response<pdpb::GetMembersResponse>, Status> {
        let shared = &self.shared;
        hear_of(shared, request.into_inner().header.as_ref());
        // Clients call this once when they connect, so it is worth waiting for a leader that is
        // just being elected.
        let roll = shared.roll().await;
        if shared.cluster_id().is_none() {
            return Err(Status::unavailable("the cluster's id is not known yet"));
        }
        let leader = roll.leader.as_ref().map(member_message);
        shared.answer(Ok(pdpb::GetMembersResponse {
            members: roll.members.iter().map(member_message).collect(),
            etcd_leader: leader.clone(),
            leader,
            ..Default::default()
        }))
    }

    async fn tso(
        &self,
        request: Request<Streaming<pdpb::TsoRequest>>,
    ) -> Result<Response<BoxStream<pdpb::TsoResponse>>, Status> {
        let opened = Instant::now();
        let lead = self.shared.lead_within(MIN_STREAM_LIFE).await?;
        let requests = request.into_inner();
        let answers = streams::timestamps(Arc::clone(&self.shared), lead, requests, opened);
        Ok(Response::new(answers))
    }

    async fn region_heartbeat(
        &self,
        request: Request<Streaming<pdpb::RegionHeartbeatRequest>>,
    ) -> Result<Response<BoxStream<pdpb::RegionHeartbeatResponse>>, Status> {
        let lead = self.shared.lead().await?;
        let reports = request.into_inner();
        let orders = streams::region_heartbeats(Arc::clone(&self.shared), lead, reports);
        Ok(Response::new(orders))
    }

    async fn query_region(
        &self,
        request: Request<Streaming<pdpb::QueryRegionRequest>>,
    ) -> Result<Response<BoxStream<pdpb::QueryRegionResponse>>, Status> {
        let lead = self.shared.lead().await?;
        let requests = request.into_inner();
        let answers = streams::region_queries(Arc::clone(&self.shared), lead, requests);
        Ok(Response::new(answers))
    }

    async fn bootstrap(
        &self,
        request: Request<pdpb::BootstrapRequest>,
    ) -> Result<Response<pdpb::BootstrapResponse>, Status> {
        self.unary(request, stores::bootstrap).await
    }

    async fn is_bootstrapped(
        &self,
        request: Request<pdpb::IsBootstrappedRequest>,
    ) -> Result<Response<pdpb::IsBootstrappedResponse>, Status> {
        self.unary(request, stores::is_bootstrapped).await
    }

    async fn alloc_id(
        &self,
        request: Request<pdpb::AllocIdRequest>,
    ) -> Result<Response<pdpb::AllocIdResponse>, Status> {
        self.unary(request, stores::alloc_id).await
    }

    async fn get_store(
        &self,
        request: Request<pdpb::GetStoreRequest>,
    ) -> Result<Response<pdpb::GetStoreResponse>, Status> {
        self.unary(request, stores::get_store).await
    }

    async fn put_store(
        &self,
        request: Request<pdpb::PutStoreRequest>,
    ) -> Result<Response<pdpb::PutStoreResponse>, Status> {
        self.unary(request, stores::put_store).await
    }

    async fn get_all_stores(
        &self,
        request: Request<pdpb::GetAllStoresRequest>,
    ) -> Result<Response<pdpb::GetAllStoresResponse>, Status> {
        self.unary(request, stores::get_all_stores).await
    }

    async fn store_heartbeat(
        &self,
        request: Request<pdpb::StoreHeartbeatRequest>,
    ) -> Result<Response<pdpb::StoreHeartbeatResponse>, Status> {
        self.unary(request, stores::store_heartbeat).await
    }

    async fn get_cluster_config(
        &self,
        request: Request<pdpb::GetClusterConfigRequest>,
    ) -> Result<Response<pdpb::GetClusterConfigResponse>, Status> {
        self.unary(request, stores::get_cluster_config).await
    }

    async fn put_cluster_config(
        &self,
        request: Request<pdpb::PutClusterConfigRequest>,
    ) -> Result<Response<pdpb::PutClusterConfigResponse>, Status> {
        self.unary(request, stores::put_cluster_config).await
    }

    async fn get_gc_safe_point(
        &self,
        request: Request<pdpb::GetGcSafePointRequest>,
    ) -> Result<Response<pdpb::GetGcSafePointResponse>, Status> {
        self.unary(request, stores::get_gc_safe_point).await
    }

    async fn update_gc_safe_point(
        &self,
        request: Request<pdpb::UpdateGcSafePointRequest>,
    ) -> Result<Response<pdpb::UpdateGcSafePointResponse>, Status> {
        self.unary(request, stores::update_gc_safe_point).await
    }

    async fn update_service_gc_safe_point(
        &self,
        request: Request<pdpb::UpdateServiceGcSafePointRequest>,
    ) -> Result<Response<pdpb::UpdateServiceGcSafePointResponse>, Status> {
        self.unary(request, stores::update_service_gc_safe_point).await
    }

    /// The whole cluster has one sequence, so its next timestamp is the smallest that any caller
    /// will get.
    async fn get_min_ts(
        &self,
        request: Request<pdpb::GetMinTsRequest>,
    ) -> Result<Response<pdpb::GetMinTsResponse>, Status> {
        self.unary(request, stores::get_min_ts).await
    }

    async fn get_region(
        &self,
        request: Request<pdpb::GetRegionRequest>,
    ) -> Result<Response<pdpb::GetRegionResponse>, Status> {
        self.unary(request, regions::get_region).await
    }

    async fn get_prev_region(
        &self,
        request: Request<pdpb::GetRegionRequest>,
    ) -> Result<Response<pdpb::GetRegionResponse>, Status> {
        self.unary(request, regions::get_prev_region).await
    }

    async fn get_region_by_id(
        &self,
        request: Request<pdpb::GetRegionByIdRequest>,
    ) -> Result<Response<pdpb::GetRegionResponse>, Status> {
        self.unary(request, regions::get_region_by_id).await
    }

    async fn scan_regions(
        &self,
        request: Request<pdpb::ScanRegionsRequest>,
    ) -> Result<Response<pdpb::ScanRegionsResponse>, Status> {
        self.unary(request, regions::scan_regions).await
    }

    async fn batch_scan_regions(
        &self,
        request: Request<pdpb::BatchScanRegionsRequest>,
    ) -> Result<Response<pdpb::BatchScanRegionsResponse>, Status> {
        self.unary(request, regions::batch_scan_regions).await
    }

    async fn ask_split(
        &self,
        request: Request<pdpb::AskSplitRequest>,
    ) -> Result<Response<pdpb::AskSplitResponse>, Status> {
        self.unary(request, regions::ask_split).await
    }

    async fn ask_batch_split(
        &self,
        request: Request<pdpb::AskBatchSplitRequest>,
    ) -> Result<Response<pdpb::AskBatchSplitResponse>, Status> {
        self.unary(request, regions::ask_batch_split).await
    }

    async fn report_batch_split(
        &self,
        request: Request<pdpb::ReportBatchSplitRequest>,
    ) -> Result<Response<pdpb::ReportBatchSplitResponse>, Status> {
        self.unary(request, regions::report_batch_split).await
    }

    async fn scatter_region(
        &self,
        request: Request<pdpb::ScatterRegionRequest>,
    ) -> Result<Response<pdpb::ScatterRegionResponse>, Status> {
        self.unary(request, regions::scatter_region).await
    }

    async fn get_operator(
        &self,
        request: Request<pdpb::GetOperatorRequest>,
    ) -> Result<Response<pdpb::GetOperatorResponse>, Status> {
        self.unary(request, regions::get_operator).await
    }
}
