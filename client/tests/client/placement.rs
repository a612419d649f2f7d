//! The placement client against members that lead, do not lead, and change their minds.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use esker_client::placement::NOT_LEADER;
use esker_client::{ClientError, PlacementClient};
use esker_model::{
    Epoch, KeyRange, Peer, PeerId, Region, RegionId, RegionReport, StoreId, Traffic,
};
use esker_rpc::members::BEAT_INTERVAL;
use esker_rpc::proto::metapb::Store;
use esker_rpc::proto::pdpb::pd_server::{Pd, PdServer};
use esker_rpc::proto::pdpb::{self, *};
use esker_rpc::server::MAX_MESSAGE_BYTES;
use parking_lot::Mutex;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::codegen::BoxStream;
use tonic::service::Routes;
use tonic::{Request, Response, Status, Streaming};

use crate::support::{Server, closed_address, soon};
use crate::world::{Led, World, peer_on};

pub const CLUSTER: u64 = 4242;

/// How long anything may take while a member is silent and another member leads.
const WITHIN: Duration = Duration::from_secs(3);

/// A report of this region by its only peer.
fn report(region: u64) -> RegionReport {
    let leader = Peer::voter(PeerId(region + 1), StoreId(1));
    RegionReport {
        region: Region {
            id: RegionId(region),
            range: KeyRange::all(),
            epoch: Epoch::FIRST,
            peers: vec![leader],
        },
        leader,
        term: None,
        down: Vec::new(),
        pending: Vec::new(),
        traffic: Traffic::default(),
        approximate_size: 0,
        approximate_keys: 0,
    }
}

/// The state that the members of one placement driver share.
pub struct Members {
    world: World,
    addresses: Mutex<Vec<SocketAddr>>,
    leader: watch::Sender<usize>,
    /// Members that are frozen: they accept everything, and answer nothing.
    frozen: watch::Sender<BTreeSet<usize>>,
    next_id: Mutex<u64>,
    clock: Mutex<i64>,
    /// Requests for timestamps, in the order in which they came.
    tso_requests: Mutex<usize>,
    heartbeats: mpsc::UnboundedSender<(usize, u64)>,
    regions_asked: Mutex<usize>,
}

/// One member.
struct FakeMember {
    index: usize,
    members: Arc<Members>,
}

impl FakeMember {
    fn header(&self) -> Option<ResponseHeader> {
        Some(ResponseHeader { cluster_id: CLUSTER, error: None })
    }

    fn lead(&self, header: Option<&RequestHeader>) -> Result<(), Status> {
        assert_eq!(header.map(|header| header.cluster_id), Some(CLUSTER));
        if *self.members.leader.borrow() == self.index {
            return Ok(());
        }
        Err(Status::unavailable(format!("{NOT_LEADER}: member {} is not it", self.index)))
    }

    fn found(&self, led: Option<Led>) -> GetRegionResponse {
        *self.members.regions_asked.lock() += 1;
        let (region, leader) = match led {
            Some((region, store)) => (Some(region.clone()), peer_on(&region, store)),
            None => (None, None),
        };
        GetRegionResponse { header: self.header(), region, leader, ..Default::default() }
    }

    /// Waits while this member is frozen.
    async fn thawed(&self) {
        let mut frozen = self.members.frozen.subscribe();
        let _ = frozen.wait_for(|frozen| !frozen.contains(&self.index)).await;
    }

    /// Ends a stream when this member no longer leads.
    async fn deposed(&self) -> Status {
        let mut leader = self.members.leader.subscribe();
        let _ = leader.wait_for(|leader| *leader != self.index).await;
        Status::unavailable(NOT_LEADER)
    }
}

#[tonic::async_trait]
impl Pd for FakeMember {
    async fn get_members(
        &self,
        _: Request<GetMembersRequest>,
    ) -> Result<Response<GetMembersResponse>, Status> {
        self.thawed().await;
        let member = |(index, address): (usize, &SocketAddr)| Member {
            name: format!("m{index}"),
            member_id: index as u64 + 1,
            client_urls: vec![format!("http://{address}")],
            ..Default::default()
        };
        let addresses = self.members.addresses.lock().clone();
        let members: Vec<Member> = addresses.iter().enumerate().map(member).collect();
        let leader = members.get(*self.members.leader.borrow()).cloned();
        let header = self.header();
        Ok(Response::new(GetMembersResponse { header, members, leader, ..Default::default() }))
    }

    async fn alloc_id(
        &self,
        request: Request<AllocIdRequest>,
    ) -> Result<Response<AllocIdResponse>, Status> {
        self.thawed().await;
        let request = request.into_inner();
        self.lead(request.header.as_ref())?;
        let mut next = self.members.next_id.lock();
        *next += u64::from(request.count);
        let (id, count) = (*next, request.count);
        Ok(Response::new(AllocIdResponse { header: self.header(), id, count }))
    }

    async fn bootstrap(
        &self,
        request: Request<BootstrapRequest>,
    ) -> Result<Response<BootstrapResponse>, Status> {
        self.lead(request.into_inner().header.as_ref())?;
        let message = "store 1 was first".into();
        let error = Some(pdpb::Error { r#type: ErrorType::AlreadyBootstrapped.into(), message });
        let header = Some(ResponseHeader { cluster_id: CLUSTER, error });
        Ok(Response::new(BootstrapResponse { header }))
    }

    async fn get_store(
        &self,
        request: Request<GetStoreRequest>,
    ) -> Result<Response<GetStoreResponse>, Status> {
        let request = request.into_inner();
        self.lead(request.header.as_ref())?;
        let id = request.store_id;
        let store = self.members.world.address(id);
        let store = store.map(|address| Store { id, address, ..Default::default() });
        Ok(Response::new(GetStoreResponse { header: self.header(), store, ..Default::default() }))
    }

    async fn get_region(
        &self,
        request: Request<GetRegionRequest>,
    ) -> Result<Response<GetRegionResponse>, Status> {
        self.thawed().await;
        let request = request.into_inner();
        self.lead(request.header.as_ref())?;
        let key = request.region_key;
        let mut regions = self.members.world.known_regions().into_iter().rev();
        Ok(Response::new(self.found(regions.find(|(region, _)| region.start_key <= key))))
    }

    async fn get_prev_region(
        &self,
        request: Request<GetRegionRequest>,
    ) -> Result<Response<GetRegionResponse>, Status> {
        self.thawed().await;
        let request = request.into_inner();
        self.lead(request.header.as_ref())?;
        let key = request.region_key;
        let mut regions = self.members.world.known_regions().into_iter().rev();
        regions.find(|(region, _)| region.start_key <= key);
        Ok(Response::new(self.found(regions.next())))
    }

    async fn scan_regions(
        &self,
        request: Request<ScanRegionsRequest>,
    ) -> Result<Response<ScanRegionsResponse>, Status> {
        let request = request.into_inner();
        self.lead(request.header.as_ref())?;
        let regions = self.members.world.known_regions().into_iter();
        let regions = regions.map(|(region, store)| pdpb::Region {
            leader: peer_on(&region, store),
            region: Some(region),
            ..Default::default()
        });
        let regions = regions.collect();
        let header = self.header();
        Ok(Response::new(ScanRegionsResponse { header, regions, ..Default::default() }))
    }

    async fn tso(
        &self,
        request: Request<Streaming<TsoRequest>>,
    ) -> Result<Response<BoxStream<TsoResponse>>, Status> {
        let mut requests = request.into_inner();
        let (responses, outgoing) = mpsc::channel(16);
        let member = FakeMember { index: self.index, members: Arc::clone(&self.members) };
        tokio::spawn(async move {
            loop {
                let request = tokio::select! {
                    request = requests.next() => request,
                    status = member.deposed() => {
                        member.thawed().await;
                        let _ = responses.send(Err(status)).await;
                        return;
                    }
                };
                let Some(Ok(request)) = request else { return };
                member.thawed().await;
                if let Err(status) = member.lead(request.header.as_ref()) {
                    let _ = responses.send(Err(status)).await;
                    return;
                }
                *member.members.tso_requests.lock() += 1;
                let logical = {
                    let mut clock = member.members.clock.lock();
                    *clock += i64::from(request.count);
                    *clock
                };
                let timestamp = Some(Timestamp { physical: 1, logical, suffix_bits: 0 });
                let header = member.header();
                let response = TsoResponse { header, count: request.count, timestamp };
                if responses.send(Ok(response)).await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(outgoing))))
    }

    async fn region_heartbeat(
        &self,
        request: Request<Streaming<RegionHeartbeatRequest>>,
    ) -> Result<Response<BoxStream<RegionHeartbeatResponse>>, Status> {
        let mut requests = request.into_inner();
        let (responses, outgoing) = mpsc::channel(16);
        let member = FakeMember { index: self.index, members: Arc::clone(&self.members) };
        tokio::spawn(async move {
            let mut beats = tokio::time::interval(BEAT_INTERVAL);
            loop {
                let request = tokio::select! {
                    request = requests.next() => request,
                    status = member.deposed() => {
                        member.thawed().await;
                        let _ = responses.send(Err(status)).await;
                        return;
                    }
                    _ = beats.tick() => {
                        member.thawed().await;
                        let header = member.header();
                        let beat = RegionHeartbeatResponse { header, ..Default::default() };
                        if responses.send(Ok(beat)).await.is_err() {
                            return;
                        }
                        continue;
                    }
                };
                let Some(Ok(request)) = request else { return };
                member.thawed().await;
                if let Err(status) = member.lead(request.header.as_ref()) {
                    let _ = responses.send(Err(status)).await;
                    return;
                }
                let region = request.region.unwrap_or_default();
                let _ = member.members.heartbeats.send((member.index, region.id));
                let step = RegionHeartbeatResponse {
                    header: member.header(),
                    region_id: region.id,
                    region_epoch: region.region_epoch,
                    target_peer: request.leader,
                    transfer_leader: Some(pdpb::TransferLeader {
                        peer: request.leader,
                        peers: Vec::new(),
                    }),
                    ..Default::default()
                };
                if responses.send(Ok(step)).await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(outgoing))))
    }
}

/// A running placement driver.
pub struct Placement {
    pub members: Arc<Members>,
    servers: Vec<Server>,
    heartbeats: mpsc::UnboundedReceiver<(usize, u64)>,
}

impl Placement {
    pub async fn start(world: &World, count: usize) -> Self {
        let (heartbeats, told) = mpsc::unbounded_channel();
        let members = Arc::new(Members {
            world: world.clone(),
            addresses: Mutex::default(),
            leader: watch::Sender::new(0),
            frozen: watch::Sender::default(),
            next_id: Mutex::new(100),
            clock: Mutex::default(),
            tso_requests: Mutex::default(),
            heartbeats,
            regions_asked: Mutex::default(),
        });
        let mut servers = Vec::new();
        for index in 0..count {
            let member = FakeMember { index, members: Arc::clone(&members) };
            let service = PdServer::new(member).max_decoding_message_size(MAX_MESSAGE_BYTES);
            let server = Server::start(Routes::new(service)).await;
            members.addresses.lock().push(server.address);
            servers.push(server);
        }
        Placement { members, servers, heartbeats: told }
    }

    pub fn endpoint(&self, index: usize) -> String {
        self.servers[index].address.to_string()
    }

    pub async fn connect(&self) -> PlacementClient {
        PlacementClient::connect(vec![self.endpoint(0)]).await.expect("it is served")
    }

    fn elect(&self, index: usize) {
        self.members.leader.send_replace(index);
    }

    pub fn freeze(&self, index: usize) {
        self.members.frozen.send_modify(|frozen| {
            frozen.insert(index);
        });
    }

    fn thaw(&self, index: usize) {
        self.members.frozen.send_modify(|frozen| {
            frozen.remove(&index);
        });
    }

    pub fn regions_asked(&self) -> usize {
        *self.members.regions_asked.lock()
    }
}

#[tokio::test]
async fn the_leader_is_found_by_way_of_any_member() {
    let placement = Placement::start(&World::new(1), 3).await;
    placement.elect(2);
    let endpoints = vec![closed_address().await, placement.endpoint(0)];
    let client = PlacementClient::connect(endpoints).await.expect("a leader");
    assert_eq!(client.cluster_id(), CLUSTER);
    assert_eq!(client.leader_address(), placement.endpoint(2));
    assert_eq!(client.alloc_id(5).await.expect("ids"), 101..106);
    assert_eq!(client.alloc_id(1).await.expect("ids"), 106..107);
}

#[tokio::test]
async fn calls_follow_the_leader_when_it_changes_and_when_it_dies() {
    let mut placement = Placement::start(&World::new(1), 3).await;
    let client = placement.connect().await;
    assert_eq!(client.alloc_id(1).await.expect("ids"), 101..102);
    placement.elect(1);
    assert_eq!(client.alloc_id(1).await.expect("ids"), 102..103);
    assert_eq!(client.leader_address(), placement.endpoint(1));
    placement.elect(2);
    placement.servers.remove(1).stop().await;
    assert_eq!(client.alloc_id(1).await.expect("ids"), 103..104);
}

#[tokio::test]
async fn a_refusal_is_told_with_its_kind_and_not_repeated() {
    let placement = Placement::start(&World::new(1), 1).await;
    let client = placement.connect().await;
    let refused = client.bootstrap(Store::default(), &report(1).region).await;
    match refused.expect_err("refused") {
        ClientError::PlacementRefused { kind, message, .. } => {
            assert_eq!(kind, ErrorType::AlreadyBootstrapped);
            assert_eq!(message, "store 1 was first");
        }
        other => panic!("{other}"),
    }
    let missing = client.is_bootstrapped().await.expect_err("not served by the fake");
    assert!(matches!(missing, ClientError::PlacementRefused { .. }), "{missing}");
}

#[tokio::test]
async fn timestamps_are_unique_and_grow_though_callers_share_requests() {
    const CALLERS: usize = 500;
    let placement = Placement::start(&World::new(1), 2).await;
    let client = placement.connect().await;
    let ask = |count: u32| {
        let client = client.clone();
        async move { (count, client.tso(count).await.expect("a timestamp").logical()) }
    };
    let calls = (0..CALLERS).map(|caller| ask(1 + (caller % 3) as u32));
    let mut answers = futures_util::future::join_all(calls).await;
    answers.sort_by_key(|(_, last)| *last);
    let mut before = 0;
    for (count, last) in answers {
        assert!(last + 1 - u64::from(count) > before, "{last} overlaps with {before}");
        before = last;
    }
    let requests = *placement.members.tso_requests.lock();
    assert!(requests < CALLERS / 2, "{requests} requests for {CALLERS} callers");
    placement.elect(1);
    assert!(client.tso(1).await.expect("from the next leader").logical() > before);
}

#[tokio::test]
async fn heartbeats_go_on_to_the_next_leader_and_bring_back_its_steps() {
    let mut placement = Placement::start(&World::new(1), 2).await;
    let client = placement.connect().await;
    let (heartbeats, outgoing) = mpsc::channel(8);
    let (opened, mut opens) = mpsc::unbounded_channel();
    let mut steps = client.region_heartbeats(outgoing, move || {
        let _ = opened.send(());
    });
    heartbeats.send(report(7)).await.expect("open");
    assert_eq!(soon("a step", steps.recv()).await.map(|step| step.region.0), Some(7));
    assert_eq!(placement.heartbeats.recv().await, Some((0, 7)));
    assert_eq!(opens.recv().await, Some(()), "the first stream is told of");
    placement.elect(1);
    let reopened = soon("a new stream, though nobody has anything to say", opens.recv()).await;
    assert_eq!(reopened, Some(()), "whoever leads now is to hear of all regions");
    // A heartbeat may be lost with the old stream. The next one is sent soon.
    let mut again = tokio::time::interval(Duration::from_millis(20));
    let reaching = async {
        loop {
            tokio::select! {
                step = steps.recv() => return step.map(|step| step.region.0),
                _ = again.tick() => heartbeats.send(report(8)).await.expect("open"),
            }
        }
    };
    assert_eq!(soon("a step of the new leader", reaching).await, Some(8));
    assert_eq!(placement.heartbeats.recv().await, Some((1, 8)));
    drop(heartbeats);
    let ending = async { while steps.recv().await.is_some() {} };
    soon("the stream ends with its caller", ending).await;
}

#[tokio::test]
async fn regions_are_found_by_key_by_what_is_before_and_in_order() {
    let world = World::new(3);
    world.split("g", 2);
    world.split("p", 3);
    let placement = Placement::start(&world, 1).await;
    let client = placement.connect().await;
    let found = client.region_by_key(Bytes::from("h")).await.expect("answered").expect("found");
    assert_eq!(found.region.range.start(), "g");
    assert_eq!(found.leader.map(|leader| leader.store.0), Some(2));
    let before = client.previous_region(Bytes::from("h")).await.expect("answered").expect("found");
    assert_eq!(before.region.range.end(), Some(&Bytes::from("g")));
    assert_eq!(client.previous_region(Bytes::from("a")).await.expect("answered"), None);
    let all = client.scan_regions(&KeyRange::all(), 0).await.expect("answered");
    let starts: Vec<Bytes> =
        all.into_iter().map(|info| info.region.range.start().clone()).collect();
    assert_eq!(starts, ["", "g", "p"]);
    let missing = client.get_store(StoreId(9)).await.expect_err("no such store");
    assert!(matches!(missing, ClientError::NoStore { store: StoreId(9) }), "{missing}");
}

#[tokio::test]
async fn no_placement_is_an_error_of_one_line_that_names_the_addresses() {
    let (first, second) = (closed_address().await, closed_address().await);
    let endpoints = vec![first.clone(), second.clone()];
    let error = PlacementClient::connect_within(endpoints, Duration::from_millis(200)).await;
    let message = error.err().expect("nothing listens").to_string();
    assert!(message.contains(&first) && message.contains(&second), "{message}");
    assert!(message.contains("refused") && !message.contains('\n'), "{message}");

    let error = PlacementClient::connect(vec!["nonsense".into()]).await.err().expect("malformed");
    assert_eq!(
        error.to_string(),
        "`nonsense` is not an address: the port is missing; write HOST:PORT"
    );
    let error = PlacementClient::connect(Vec::new()).await.err().expect("none");
    assert!(matches!(error, ClientError::NoEndpoints));
}

#[tokio::test]
async fn a_store_is_no_placement_driver() {
    let server = World::new(1).serve(1).await;
    let endpoints = vec![server.address.to_string()];
    let error = PlacementClient::connect_within(endpoints, Duration::from_millis(100)).await;
    let message = error.err().expect("not placement").to_string();
    assert!(message.contains("runs no placement member"), "{message}");
    server.stop().await;
}

/// An address at which the system accepts connections for a process that is frozen.
async fn frozen_address() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("a bound address").to_string();
    (listener, address)
}

/// Returns the result of `event`, which must come in time.
async fn in_time<T>(what: &str, event: impl Future<Output = T>) -> T {
    let started = Instant::now();
    let value = soon(what, event).await;
    let took = started.elapsed();
    assert!(took < WITHIN, "{what}: {took:?}");
    value
}

#[tokio::test]
async fn an_address_that_accepts_and_never_answers_does_not_delay_the_search() {
    let placement = Placement::start(&World::new(1), 3).await;
    placement.elect(2);
    placement.freeze(1);
    let (_frozen, address) = frozen_address().await;
    let endpoints = vec![address, placement.endpoint(1), placement.endpoint(0)];
    let connecting = PlacementClient::connect(endpoints);
    let client = in_time("it connects", connecting).await.expect("one of them answers");
    assert_eq!(client.leader_address(), placement.endpoint(2));
}

#[tokio::test]
async fn without_an_answer_the_search_ends_in_time_and_says_why() {
    let (_frozen, address) = frozen_address().await;
    let within = Duration::from_millis(300);
    let searching = PlacementClient::connect_within(vec![address.clone()], within);
    let error = in_time("it gives up", searching).await.err().expect("nobody answers");
    let message = error.to_string();
    assert!(message.contains(&address) && message.contains("no answer within"), "{message}");
}

#[tokio::test]
async fn everything_leaves_a_leader_that_is_silent_for_the_one_that_took_its_place() {
    let mut placement = Placement::start(&World::new(1), 3).await;
    let client = placement.connect().await;
    let (heartbeats, outgoing) = mpsc::channel(8);
    let (opened, mut opens) = mpsc::unbounded_channel();
    let _steps = client.region_heartbeats(outgoing, move || {
        let _ = opened.send(());
    });
    heartbeats.send(report(7)).await.expect("open");
    assert_eq!(placement.heartbeats.recv().await, Some((0, 7)));
    assert_eq!(opens.recv().await, Some(()));
    assert!(client.tso(1).await.expect("a timestamp").logical() > 0);

    placement.freeze(0);
    let asked = async {
        let ids = tokio::spawn({
            let client = client.clone();
            async move { client.alloc_id(1).await }
        });
        let timestamp = tokio::spawn({
            let client = client.clone();
            async move { client.tso(1).await }
        });
        placement.elect(1);
        (ids.await.expect("no panic"), timestamp.await.expect("no panic"))
    };
    let (ids, timestamp) = in_time("calls are answered", asked).await;
    assert_eq!(ids.expect("of the next leader"), 101..102);
    assert!(timestamp.expect("of the next leader").logical() > 1);
    assert_eq!(client.leader_address(), placement.endpoint(1));
    in_time("the next leader is to hear of all regions", opens.recv()).await;

    // A member that comes back no longer leads.
    placement.thaw(0);
    for _ in 0..10 {
        client.alloc_id(1).await.expect("ids");
        assert_eq!(client.leader_address(), placement.endpoint(1));
    }
}

#[tokio::test]
async fn callers_that_give_up_soon_leave_a_silent_leader_too() {
    let placement = Placement::start(&World::new(1), 3).await;
    let client = placement.connect().await;
    client.alloc_id(1).await.expect("ids");
    placement.freeze(0);
    placement.elect(1);
    let asked = async {
        let hasty = Duration::from_millis(200);
        while tokio::time::timeout(hasty, client.alloc_id(1)).await.is_err() {}
    };
    in_time("the next leader is asked", asked).await;
    assert_eq!(client.leader_address(), placement.endpoint(1));
}

#[tokio::test]
async fn a_leader_that_was_silent_for_a_moment_keeps_its_clients() {
    let placement = Placement::start(&World::new(1), 3).await;
    let client = placement.connect().await;
    let (heartbeats, outgoing) = mpsc::channel(8);
    let (opened, mut opens) = mpsc::unbounded_channel();
    let mut steps = client.region_heartbeats(outgoing, move || {
        let _ = opened.send(());
    });
    heartbeats.send(report(7)).await.expect("open");
    assert_eq!(soon("a step", steps.recv()).await.map(|step| step.region.0), Some(7));
    placement.freeze(0);
    // Long enough that the other members are asked which one leads.
    let waiting = async {
        let answered = client.alloc_id(1);
        let thawing = async {
            tokio::time::sleep(Duration::from_millis(1_200)).await;
            placement.thaw(0);
        };
        tokio::join!(answered, thawing).0
    };
    assert_eq!(in_time("it answers late", waiting).await.expect("ids"), 101..102);
    heartbeats.send(report(7)).await.expect("open");
    assert_eq!(soon("a step", steps.recv()).await.map(|step| step.region.0), Some(7));
    assert_eq!(opens.recv().await, Some(()));
    assert!(opens.try_recv().is_err(), "the stream is the same");
}

/// Passes connections on, until it is told to hang. From then on the existing connections stay
/// open, but nothing goes through them, as when a router has forgotten them.
struct Relay {
    address: SocketAddr,
    hung: watch::Sender<u64>,
}

impl Relay {
    async fn start(to: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("a bound address");
        let hung = watch::Sender::new(0);
        let hangs = hung.clone();
        tokio::spawn(async move {
            while let Ok((mut near, _)) = listener.accept().await {
                let mut hung = hangs.subscribe();
                tokio::spawn(async move {
                    let mut far = TcpStream::connect(to).await.expect("it is served");
                    let generation = *hung.borrow_and_update();
                    let passed = tokio::select! {
                        _ = tokio::io::copy_bidirectional(&mut near, &mut far) => true,
                        () = async {
                            let _ = hung.wait_for(|now| *now != generation).await;
                        } => false,
                    };
                    if !passed {
                        std::future::pending::<()>().await;
                    }
                });
            }
        });
        Relay { address, hung }
    }

    fn hang(&self) {
        self.hung.send_modify(|generation| *generation += 1);
    }
}

#[tokio::test]
async fn a_connection_that_is_dead_at_one_end_is_replaced() {
    let placement = Placement::start(&World::new(1), 1).await;
    let relay = Relay::start(placement.servers[0].address).await;
    placement.members.addresses.lock()[0] = relay.address;
    let client = PlacementClient::connect(vec![relay.address.to_string()]).await.expect("a leader");
    let (heartbeats, outgoing) = mpsc::channel(8);
    let (opened, mut opens) = mpsc::unbounded_channel();
    let _steps = client.region_heartbeats(outgoing, move || {
        let _ = opened.send(());
    });
    heartbeats.send(report(7)).await.expect("open");
    assert_eq!(opens.recv().await, Some(()));
    assert_eq!(client.alloc_id(1).await.expect("ids"), 101..102);
    relay.hang();
    assert_eq!(in_time("a new connection", client.alloc_id(1)).await.expect("ids"), 102..103);
    assert_eq!(soon("a new stream", opens.recv()).await, Some(()));
}
