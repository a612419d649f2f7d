//! A served member and a client connected to it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use esker_model::Clock;
use esker_placement::{MemberId, MemberInfo, PlacementConfig, PlacementServer, ReplicatedState};
use esker_rpc::proto::esker::placement_admin_client::PlacementAdminClient;
use esker_rpc::proto::keyspacepb::keyspace_client::KeyspaceClient;
use esker_rpc::proto::metapb;
use esker_rpc::proto::pdpb;
use esker_rpc::proto::pdpb::pd_client::PdClient;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tonic::transport::Channel;

/// Members at these addresses, numbered from 1.
pub async fn listeners(count: u64) -> (Vec<TcpListener>, Vec<MemberInfo>) {
    let mut listeners = Vec::new();
    let mut members = Vec::new();
    for id in 1..=count {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        members.push(MemberInfo {
            id: MemberId(id),
            name: format!("pd-{id}"),
            address: listener.local_addr().expect("an address").to_string(),
        });
        listeners.push(listener);
    }
    (listeners, members)
}

/// A member that is served until this is dropped.
pub struct Served {
    pub server: PlacementServer,
    pub address: SocketAddr,
    pub client: PdClient<Channel>,
    pub keyspaces: KeyspaceClient<Channel>,
    pub admin: PlacementAdminClient<Channel>,
    pub task: JoinSet<Result<(), esker_placement::DamagedState>>,
    _serving: JoinSet<()>,
}

impl Served {
    pub async fn start(
        listener: TcpListener,
        id: u64,
        state: Arc<dyn ReplicatedState>,
        clock: Arc<dyn Clock>,
    ) -> Self {
        let address = listener.local_addr().expect("an address");
        let mut config = PlacementConfig::new(format!("pd-{id}"));
        config.schedule_interval = Duration::from_millis(20);
        let server = PlacementServer::new(config, state, clock);
        let mut task = JoinSet::new();
        task.spawn(server.run());
        let router = tonic::service::Routes::new(server.pd_service())
            .add_service(server.keyspace_service())
            .add_service(server.members_service())
            .add_service(server.admin_service())
            .into_axum_router()
            .merge(server.http());
        let mut serving = JoinSet::new();
        serving.spawn(async move {
            axum::serve(listener, router).await.expect("the server runs");
        });
        let channel = Channel::from_shared(format!("http://{address}"))
            .expect("a valid address")
            .connect()
            .await
            .expect("the server accepts");
        Self {
            server,
            address,
            client: PdClient::new(channel.clone()),
            keyspaces: KeyspaceClient::new(channel.clone()),
            admin: PlacementAdminClient::new(channel),
            task,
            _serving: serving,
        }
    }

    pub fn header(&self) -> Option<pdpb::RequestHeader> {
        Some(pdpb::RequestHeader {
            cluster_id: self.server.cluster_id().expect("the cluster has an id"),
            ..Default::default()
        })
    }

    /// Draws `count` ids, and returns the last.
    pub async fn alloc(&mut self, count: u32) -> u64 {
        let request = pdpb::AllocIdRequest { header: self.header(), count };
        let response = self.client.alloc_id(request).await.expect("ids").into_inner();
        assert_eq!(error_of(&response.header), None);
        response.id
    }

    /// One timestamp, over a stream of its own, as one number.
    pub async fn timestamp(&mut self, count: u32) -> Result<u64, tonic::Status> {
        let request = pdpb::TsoRequest { header: self.header(), count, ..Default::default() };
        let mut answers = self.client.tso(tokio_stream::once(request)).await?.into_inner();
        let answer = answers
            .message()
            .await?
            .ok_or_else(|| tonic::Status::unavailable("the stream ended"))?;
        assert_eq!(error_of(&answer.header), None);
        assert_eq!(answer.count, count);
        let timestamp = answer.timestamp.expect("a timestamp");
        Ok((timestamp.physical as u64) << 18 | timestamp.logical as u64)
    }

    pub async fn bootstrap(
        &mut self,
        store: u64,
        region: u64,
        peer: u64,
    ) -> pdpb::BootstrapResponse {
        let request = pdpb::BootstrapRequest {
            header: self.header(),
            store: Some(store_message(store)),
            region: Some(region_message(region, &[(peer, store)], 1)),
        };
        self.client.bootstrap(request).await.expect("an answer").into_inner()
    }

    pub async fn put_store(&mut self, store: metapb::Store) -> Option<(pdpb::ErrorType, String)> {
        let request = pdpb::PutStoreRequest {
            header: self.header(),
            store: Some(store),
            ..Default::default()
        };
        let response = self.client.put_store(request).await.expect("an answer");
        error_of(&response.into_inner().header)
    }

    pub async fn region_of(&mut self, key: &'static [u8]) -> pdpb::GetRegionResponse {
        let request = pdpb::GetRegionRequest {
            header: self.header(),
            region_key: Bytes::from_static(key),
            ..Default::default()
        };
        self.client.get_region(request).await.expect("an answer").into_inner()
    }

    /// The status and the body of an HTTP page.
    pub async fn page(&self, path: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(self.address).await.expect("a connection");
        let request = format!("GET {path} HTTP/1.1\r\nHost: pd\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.expect("written");
        let mut response = String::new();
        stream.read_to_string(&mut response).await.expect("read");
        let status = response[9..12].parse().expect("a status");
        (status, response)
    }

    /// The JSON of an HTTP page.
    pub async fn json(&self, path: &str) -> serde_json::Value {
        let (status, response) = self.page(path).await;
        assert_eq!(status, 200, "{response}");
        let (_, body) = response.split_once("\r\n\r\n").expect("a body");
        serde_json::from_str(body).expect("JSON")
    }
}

/// The error in a response's header.
pub fn error_of(header: &Option<pdpb::ResponseHeader>) -> Option<(pdpb::ErrorType, String)> {
    let header = header.as_ref().expect("every response has a header");
    let error = header.error.clone()?;
    Some((error.r#type(), error.message))
}

pub fn store_message(id: u64) -> metapb::Store {
    metapb::Store { id, address: format!("store-{id}:20160"), ..Default::default() }
}

/// A region of all keys with voters `(peer, store)`.
pub fn region_message(id: u64, peers: &[(u64, u64)], conf_ver: u64) -> metapb::Region {
    metapb::Region {
        id,
        region_epoch: Some(metapb::RegionEpoch { conf_ver, version: 1 }),
        peers: peers
            .iter()
            .map(|(id, store_id)| metapb::Peer {
                id: *id,
                store_id: *store_id,
                ..Default::default()
            })
            .collect(),
        ..Default::default()
    }
}
