//! A cluster for the tests of the admin client: real sockets, the services that it
//! calls, and answers from a script instead of regions and logs.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;

use bytes::Bytes;
use esker_client::{AdminClient, PlacementClient};
use esker_rpc::proto::esker::admin_server::{Admin, AdminServer};
use esker_rpc::proto::esker::founding_server::{Founding, FoundingServer};
use esker_rpc::proto::pdpb::pd_server::{Pd, PdServer};
use esker_rpc::proto::{errorpb, esker as wire, metapb, pdpb};
use futures_util::{Stream, StreamExt};
use parking_lot::Mutex;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status, Streaming};

const CLUSTER_ID: u64 = 7;

/// The state of the cluster, and how it is to answer.
#[derive(Debug, Default)]
pub struct Script {
    pub regions: Vec<pdpb::Region>,
    /// The stores that have an admin service, which is this one for all.
    pub stores: Vec<u64>,
    /// Answers to the next changes. When there are none left, the change is made.
    pub refusals: VecDeque<errorpb::Error>,
    /// What came of a split, and how often placement is asked for a region that it does not know
    /// before it hears of these.
    pub unheard: (Vec<pdpb::Region>, usize),
    /// Answers to the next replacements of a member: a refusal, or none that arrives.
    pub replacements: VecDeque<Option<String>>,
    /// Whether a transfer of leadership that was accepted does not happen.
    pub transfers_fail: bool,
    /// How often regions were asked for by range, and how often a change was asked for.
    pub scans: usize,
    pub changes: usize,
}

impl Script {
    fn find(&mut self, id: u64) -> Option<&mut pdpb::Region> {
        let regions = self.regions.iter_mut();
        regions
            .into_iter()
            .find(|known| known.region.as_ref().is_some_and(|region| region.id == id))
    }
}

/// The peer of a store in every region of a script.
pub fn peer(store: u64) -> metapb::Peer {
    metapb::Peer { id: 100 + store, store_id: store, ..Default::default() }
}

/// A region on stores 1 to 3, led by store 1.
pub fn region(id: u64, start: &str, end: &str) -> pdpb::Region {
    pdpb::Region {
        region: Some(metapb::Region {
            id,
            start_key: Bytes::copy_from_slice(start.as_bytes()),
            end_key: Bytes::copy_from_slice(end.as_bytes()),
            region_epoch: Some(metapb::RegionEpoch { conf_ver: 3, version: 1 }),
            peers: [1, 2, 3].map(peer).to_vec(),
        }),
        leader: Some(peer(1)),
        ..Default::default()
    }
}

fn id_of(region: &pdpb::Region) -> Option<u64> {
    region.region.as_ref().map(|region| region.id)
}

/// Serves `script` on a port of its own, and connects to it.
pub async fn serve(script: Script) -> (AdminClient, Arc<Mutex<Script>>) {
    let listener =
        tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("loopback has a free port");
    let address = listener.local_addr().expect("it is bound").to_string();
    let script = Arc::new(Mutex::new(script));
    let fake = Fake { address: address.clone(), script: Arc::clone(&script) };
    let server = tonic::transport::Server::builder()
        .add_service(PdServer::new(fake.clone()))
        .add_service(AdminServer::new(fake.clone()))
        .add_service(FoundingServer::new(fake))
        .serve_with_incoming(TcpListenerStream::new(listener));
    tokio::spawn(server);
    let placement = PlacementClient::connect(vec![address]).await.expect("the server listens");
    (AdminClient::new(placement), script)
}

#[derive(Clone)]
struct Fake {
    address: String,
    script: Arc<Mutex<Script>>,
}

fn header() -> Option<pdpb::ResponseHeader> {
    Some(pdpb::ResponseHeader { cluster_id: CLUSTER_ID, ..Default::default() })
}

fn found(region: Option<pdpb::Region>) -> Response<pdpb::GetRegionResponse> {
    let region = region.unwrap_or_default();
    Response::new(pdpb::GetRegionResponse {
        header: header(),
        region: region.region,
        leader: region.leader,
        down_peers: region.down_peers,
        ..Default::default()
    })
}

#[tonic::async_trait]
impl Pd for Fake {
    async fn get_members(
        &self,
        _: Request<pdpb::GetMembersRequest>,
    ) -> Result<Response<pdpb::GetMembersResponse>, Status> {
        let member = pdpb::Member {
            name: "placement-1".to_owned(),
            member_id: 1,
            client_urls: vec![format!("http://{}", self.address)],
            ..Default::default()
        };
        Ok(Response::new(pdpb::GetMembersResponse {
            header: header(),
            members: vec![member.clone()],
            leader: Some(member),
            ..Default::default()
        }))
    }

    async fn tso(
        &self,
        requests: Request<Streaming<pdpb::TsoRequest>>,
    ) -> Result<
        Response<Pin<Box<dyn Stream<Item = Result<pdpb::TsoResponse, Status>> + Send>>>,
        Status,
    > {
        let answers = requests.into_inner().map(|request| {
            request.map(|request| pdpb::TsoResponse {
                header: header(),
                count: request.count,
                timestamp: Some(pdpb::Timestamp {
                    physical: 1_000,
                    logical: 9,
                    ..Default::default()
                }),
            })
        });
        Ok(Response::new(answers.boxed()))
    }

    async fn get_store(
        &self,
        request: Request<pdpb::GetStoreRequest>,
    ) -> Result<Response<pdpb::GetStoreResponse>, Status> {
        let id = request.into_inner().store_id;
        if !self.script.lock().stores.contains(&id) {
            let error =
                pdpb::Error { r#type: pdpb::ErrorType::EntryNotFound.into(), ..Default::default() };
            let header =
                header().map(|header| pdpb::ResponseHeader { error: Some(error), ..header });
            return Ok(Response::new(pdpb::GetStoreResponse { header, ..Default::default() }));
        }
        let store = metapb::Store { id, address: self.address.clone(), ..Default::default() };
        Ok(Response::new(pdpb::GetStoreResponse {
            header: header(),
            store: Some(store),
            ..Default::default()
        }))
    }

    async fn get_region_by_id(
        &self,
        request: Request<pdpb::GetRegionByIdRequest>,
    ) -> Result<Response<pdpb::GetRegionResponse>, Status> {
        let mut script = self.script.lock();
        let known = script.find(request.get_ref().region_id).cloned();
        if known.is_none() {
            script.unheard.1 = script.unheard.1.saturating_sub(1);
            if script.unheard.1 == 0 {
                let parts = std::mem::take(&mut script.unheard.0);
                let is_old =
                    |known: &pdpb::Region| !parts.iter().any(|part| id_of(part) == id_of(known));
                script.regions.retain(is_old);
                script.regions.extend(parts);
            }
        }
        Ok(found(known))
    }

    async fn scan_regions(
        &self,
        request: Request<pdpb::ScanRegionsRequest>,
    ) -> Result<Response<pdpb::ScanRegionsResponse>, Status> {
        let request = request.into_inner();
        let mut script = self.script.lock();
        script.scans += 1;
        let ends_behind = |known: &&pdpb::Region| {
            let end = known.region.as_ref().map(|region| &region.end_key);
            end.is_some_and(|end| end.is_empty() || *end > request.start_key)
        };
        let limit = usize::try_from(request.limit).unwrap_or(0);
        let regions = script.regions.iter().filter(ends_behind).take(limit).cloned().collect();
        Ok(Response::new(pdpb::ScanRegionsResponse {
            header: header(),
            regions,
            ..Default::default()
        }))
    }
}

#[tonic::async_trait]
impl Admin for Fake {
    async fn split_region(
        &self,
        request: Request<wire::SplitRegionRequest>,
    ) -> Result<Response<wire::SplitRegionResponse>, Status> {
        let request = request.into_inner();
        let mut script = self.script.lock();
        script.changes += 1;
        let region_error = script.refusals.pop_front().map(Box::new);
        let old = script
            .find(request.region_id)
            .and_then(|known| known.region.clone())
            .unwrap_or_default();
        let bounds: Vec<_> =
            [old.start_key.clone()].into_iter().chain(request.keys).chain([old.end_key]).collect();
        let last = bounds.len() - 2;
        let epoch = request.region_epoch;
        let region_epoch =
            epoch.map(|epoch| metapb::RegionEpoch { version: epoch.version + 1, ..epoch });
        let regions = bounds.windows(2).enumerate().map(|(at, range)| metapb::Region {
            // The last part keeps the id.
            id: request.region_id + if at == last { 0 } else { 1_000 + at as u64 },
            start_key: range[0].clone(),
            end_key: range[1].clone(),
            region_epoch,
            peers: old.peers.clone(),
        });
        let regions: Vec<_> = if region_error.is_none() { regions.collect() } else { vec![] };
        let reported = |region: &metapb::Region| pdpb::Region {
            region: Some(region.clone()),
            leader: Some(peer(1)),
            ..Default::default()
        };
        script.unheard.0 = regions.iter().map(reported).collect();
        Ok(Response::new(wire::SplitRegionResponse { region_error, regions }))
    }

    async fn transfer_leader(
        &self,
        request: Request<wire::TransferLeaderRequest>,
    ) -> Result<Response<wire::TransferLeaderResponse>, Status> {
        let request = request.into_inner();
        let mut script = self.script.lock();
        script.changes += 1;
        let region_error = script.refusals.pop_front().map(Box::new);
        let happens = region_error.is_none() && !script.transfers_fail;
        if let Some(region) = script.find(request.region_id).filter(|_| happens) {
            region.leader = Some(peer(request.to_store));
        }
        Ok(Response::new(wire::TransferLeaderResponse { region_error, ..Default::default() }))
    }

    async fn region_detail(
        &self,
        request: Request<wire::RegionDetailRequest>,
    ) -> Result<Response<wire::RegionDetailResponse>, Status> {
        let role = wire::Role::Leader as i32;
        let known = self.script.lock().find(request.get_ref().region_id).is_some();
        let region_error = (!known).then(Box::default);
        Ok(Response::new(wire::RegionDetailResponse {
            region_error,
            role,
            term: 5,
            ..Default::default()
        }))
    }
}

#[tonic::async_trait]
impl Founding for Fake {
    async fn stage(
        &self,
        _: Request<wire::MemberStageRequest>,
    ) -> Result<Response<wire::MemberStage>, Status> {
        Err(Status::unimplemented("nobody joins"))
    }

    async fn replace(
        &self,
        _: Request<wire::ReplaceMemberRequest>,
    ) -> Result<Response<wire::ReplaceMemberResponse>, Status> {
        match self.script.lock().replacements.pop_front().flatten() {
            Some(refusal) => {
                Ok(Response::new(wire::ReplaceMemberResponse { refusal, ..Default::default() }))
            }
            None => Err(Status::unavailable("it hung up")),
        }
    }
}
