//! How a node starts: socket, directories, placement member, server, store.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use esker_client::{ClientError, PlacementClient};
use esker_engine::{DataDir, EngineOptions, Kind};
use esker_model::{StoreId, SystemClock};
use esker_placement::{Leadership, PlacementConfig, PlacementServer, ReplicatedState};
use esker_rpc::channel::Dialer;
use esker_rpc::proto::esker::admin_server::AdminServer;
use esker_rpc::proto::esker::founding_server::FoundingServer;
use esker_rpc::repeat::Repeated;
use esker_rpc::server::{self, TikvService};
use esker_rpc::transport::TransportService;
use esker_storage::Storage;
use parking_lot::Mutex;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tonic::service::Routes;

use super::address::{self, Address};
use super::descriptors::{self, Share};
use super::{Node, NodeBuilder, NodeConfig, PLACEMENT_FOLDER, Roles, STORE_FOLDER, damage, vital};
use crate::Error;
use crate::cluster;
use crate::server::admin::AdminService;
use crate::server::assembly::{OpenStore, Plan};
use crate::server::bootstrap::Introduced;
use crate::server::founding::{self, Adoption, Candidate};
use crate::server::health::{Health, Part};
use crate::server::known_stores::KnownStores;
use crate::server::late::LateStore;
use crate::server::member::{MemberDirectory, MemberStore, Members};
use crate::server::newcomer::{FoundingService, LateMember};
use crate::server::outbox::{Audience, MAX_WAITING_REPORTS, PlacementAddresses};
use crate::server::recall::{self, Recall};
use crate::server::split_ids::PlacementIds;
use crate::server::traffic::Traffic;
use crate::server::{bootstrap, heartbeats, pages};

/// How long one search for placement lasts before it is logged and repeated.
const PLACEMENT_SEARCH: Duration = Duration::from_secs(10);

/// The same for the first search, so that a person who starts a node soon sees what it waits for.
const FIRST_PLACEMENT_SEARCH: Duration = Duration::from_secs(2);

/// A running store. The code that stops the store takes it out.
pub(super) type StoreSlot = Arc<Mutex<Option<OpenStore>>>;

/// The member's store, when it is open. A node that stops takes it out.
pub(super) type MemberSlot = Arc<Mutex<Option<RunningMember>>>;

/// A member's store, and the task that watches it for damage.
pub(super) struct RunningMember {
    pub store: MemberStore,
    pub watch: JoinHandle<()>,
}

/// A node that is starting. Dropping this undoes what was started.
struct Starting {
    address: String,
    traffic: Arc<Traffic>,
    store_service: Arc<LateStore>,
    health: Health,
    shutdown: watch::Sender<bool>,
    tasks: Vec<JoinHandle<()>>,
    server: Option<JoinHandle<()>>,
    member: MemberSlot,
}

impl Drop for Starting {
    fn drop(&mut self) {
        for task in self.tasks.iter().chain(&self.server) {
            task.abort();
        }
        // The member of a node that is up has been moved to the node.
        if let Some(member) = self.member.lock().take() {
            member.watch.abort();
        }
    }
}

pub(super) async fn start(mut builder: NodeBuilder) -> Result<Node, Error> {
    let directory = builder.data_dir.clone().ok_or(Error::NoDataDir)?;
    builder.config.check()?;
    if directory.join(cluster::SIZE_FILE).is_file() {
        return Err(Error::Playground { path: directory });
    }
    let addresses = address::check(&builder.listen, builder.advertise.as_deref(), &builder.join)?;
    builder.listen = addresses.listen.to_string();
    builder.join = addresses.join.iter().map(Address::to_string).collect();
    // If the caller gave a socket, or the system chooses the port, no other node can know the
    // address.
    let is_findable = builder.listener.is_none() && !addresses.listen.is_any_port();
    let listener = builder.bind().await?;
    let bound = builder.bound(&listener)?;
    addresses.recognise(bound, builder.roles.map(|roles| roles.placement)).await?;
    let address = addresses.own(bound).to_string();
    let members = builder.placement_members(&address)?;
    let runs_store = builder.roles.is_none_or(|roles: Roles| roles.store);
    if members.is_none() && !runs_store {
        return Err(Error::NoRole);
    }
    let share = Share::of(builder.max_descriptors.unwrap_or_else(descriptors::current));
    // Both directories are locked before anything is made in either.
    let data = runs_store.then(|| DataDir::open(&directory.join(STORE_FOLDER), Kind::Store));
    let member = match &members {
        Some(members) => {
            let folder = directory.join(PLACEMENT_FOLDER);
            Some(MemberDirectory::open(&folder, members, share)?)
        }
        None => None,
    };
    // A member that is in use, or one of several, goes on without the store beside it. The group
    // may need the member, and the store's disk may be another one.
    let is_one_of_many = members.as_ref().is_some_and(|members| members.all.len() > 1);
    let goes_on =
        member.as_ref().is_some_and(|member| is_one_of_many || member.adoption().is_some());
    let (data, store_failure) = match data.transpose().map_err(Error::from) {
        Ok(data) => (data, None),
        Err(error) if goes_on && error.concerns_one_store() => (None, Some(error)),
        Err(error) => return Err(error),
    };
    let (shutdown, _) = watch::channel(false);
    let mut starting = Starting {
        address: address.clone(),
        traffic: Arc::default(),
        store_service: Arc::default(),
        health: Health::new(runs_store, members.is_some()),
        shutdown,
        tasks: Vec::new(),
        server: None,
        member: MemberSlot::default(),
    };
    let late = members.clone().map(|members| Arc::new(LateMember::new(members)));
    serve(&mut starting, &directory, listener, share, late.clone(), &builder.config);
    let (failed, member_failed) = oneshot::channel();
    if let (Some(members), Some(member), Some(late)) = (members, member, late) {
        // A store that is in use, or that was in use and is damaged, has belonged to a group. Then
        // the member's empty directory does not belong to a new cluster.
        let is_used =
            store_failure.is_some() || data.as_ref().is_some_and(|data| data.ident().is_some());
        let newcomer = Newcomer { members, member, late, is_used, is_findable, failed };
        newcomer.start(&mut starting).await?;
    }

    let endpoints = match builder.join.is_empty() {
        true => vec![address.clone()],
        false => builder.join.clone(),
    };
    let belongs_to = data.as_ref().and_then(DataDir::ident).map(|ident| ident.cluster_id);
    let placement = tokio::select! {
        biased;
        Ok(error) = member_failed => return Err(error),
        placement = find_placement(&endpoints, belongs_to) => placement?,
    };
    let mut node = Node {
        address,
        store_id: None,
        placement,
        store_service: starting.store_service.clone(),
        health: starting.health.clone(),
        traffic: starting.traffic.clone(),
        shutdown: starting.shutdown.clone(),
        server: starting.server.take(),
        tasks: std::mem::take(&mut starting.tasks),
        store: StoreSlot::default(),
        directory: None,
        member: std::mem::take(&mut starting.member),
        store_failure,
    };
    if let Some(data) = data {
        match open_store(&mut node, data, &builder, share).await {
            Ok(()) => {}
            Err(error) if goes_on && error.concerns_one_store() => {
                node.store_failure = Some(error);
            }
            Err(error) => return Err(error),
        }
    }
    if let Some(error) = &node.store_failure {
        tracing::error!("only the placement member of this node runs, not its store: {error}");
    }
    Ok(node)
}

/// The placement member that is starting.
struct Newcomer {
    members: Members,
    member: MemberDirectory,
    late: Arc<LateMember>,
    /// Whether the store beside it is in use.
    is_used: bool,
    /// Whether another process may have known this node's address before it started.
    is_findable: bool,
    /// For errors after [`Newcomer::start`] has returned.
    failed: oneshot::Sender<Error>,
}

impl Newcomer {
    /// Starts the member. If its directory belongs to a group, this returns when the member is up,
    /// after a check that the member may go on. Otherwise the member comes up when it has learned
    /// from the other members what it is, which may take until an operator replaces it.
    async fn start(self, starting: &mut Starting) -> Result<(), Error> {
        let Newcomer { members, member, late, is_used, is_findable, failed } = self;
        // A node that has ended meanwhile has no slot for the member.
        let (slot, traffic) = (Arc::downgrade(&starting.member), starting.traffic.clone());
        let announced = late.clone();
        let health = starting.health.clone();
        let open = move |member: MemberDirectory, members: &Members, adoption: &Adoption| {
            let folder = member.data().path().to_owned();
            let (store, state) = member.start(members, adoption, &traffic)?;
            let handle = state.store().clone();
            late.open(state);
            let id = handle.store_id().0;
            let damaged = slot.clone();
            let watch = vital::spawn(
                "watching for damage",
                damage::watch(handle, folder, (health, Part::Placement), move || {
                    traffic.remove(id);
                    let member = damaged.upgrade().and_then(|slot| slot.lock().take());
                    if let Some(member) = member {
                        member.store.stop();
                    }
                }),
            );
            match slot.upgrade() {
                Some(slot) => *slot.lock() = Some(RunningMember { store, watch }),
                None => watch.abort(),
            }
            Ok::<(), Error>(())
        };
        let recall = Arc::new(Recall::open(member.data())?);
        announced.remember(recall.clone());
        let folder = member.data().path().to_owned();
        if let (Some(adoption), Some(memory)) = (member.adoption().cloned(), member.memory()) {
            recall.belongs_to(adoption.record.group);
            announced.is_of(adoption.record.clone());
            // There is no placement driver to be found without the members that this one waits for.
            if members.all.len() > 1 {
                recall::check(&members, &memory, &folder).await?;
            }
            return open(member, &members, &adoption);
        }
        let (nonce, lost) = founding::nonce(member.data())?;
        announced.is_empty(lost, is_used);
        let listen_until = match is_findable {
            true => tokio::time::Instant::now() + founding::FIRST_START,
            false => tokio::time::Instant::now(),
        };
        starting.tasks.push(vital::spawn("the placement member", async move {
            let candidate =
                Candidate { members: &members, nonce, directory: &folder, listen_until };
            // The member offers itself only after it has listened, because of several members it
            // may be the only one that is asked.
            let offer = async {
                tokio::time::sleep_until(listen_until).await;
                announced.offer(nonce);
                std::future::pending::<()>().await;
            };
            let settled = tokio::select! {
                settled = candidate.settle(|| announced.lost(&folder)) => settled,
                () = offer => return,
            };
            let opened = settled.and_then(|adoption| {
                recall.belongs_to(adoption.record.group);
                open(member, &members, &adoption)
            });
            report(opened, failed);
        }));
        Ok(())
    }
}

/// Passes to the start of the node why its member does not come up.
fn report(opened: Result<(), Error>, failed: oneshot::Sender<Error>) {
    let Err(error) = opened else { return };
    tracing::error!("the placement member does not start: {error}");
    if let Err(error) = failed.send(error) {
        // The start has returned, and the node would run without its member.
        eprintln!("esker: the placement member stops: {error}");
        std::process::abort();
    }
}

fn serve(
    starting: &mut Starting,
    directory: &Path,
    listener: TcpListener,
    share: Share,
    member: Option<Arc<LateMember>>,
    config: &NodeConfig,
) {
    let store = starting.store_service.clone();
    let admin = AdminService { store: store.clone(), directory: directory.to_owned() };
    let mut routes = Routes::new(TikvService::new(store.clone()).into_server())
        .add_service(TransportService::new(starting.traffic.clone()).into_server())
        .add_service(AdminServer::new(admin))
        .add_service(FoundingServer::new(FoundingService(member.clone())))
        .add_service(starting.health.clone().into_server());
    let mut http = pages::router(starting.address.clone(), store, pages::collected_metrics());
    if let Some(state) = member {
        let mut placement = PlacementConfig::new(state.configured().name());
        placement.schedule_interval = config.schedule_interval();
        starting.tasks.push(tokio::spawn(follow(state.leadership(), starting.health.clone())));
        let clock = Arc::new(SystemClock::new());
        let placement = PlacementServer::new(placement, state as Arc<dyn ReplicatedState>, clock);
        routes = routes
            .add_service(placement.pd_service())
            .add_service(placement.keyspace_service())
            .add_service(placement.members_service())
            .add_service(placement.admin_service());
        http = http.merge(placement.http());
        let driver = placement.run();
        starting.tasks.push(vital::spawn("placement", async move {
            if let Err(error) = driver.await {
                // What the members agreed on cannot be read. Going on could give out ids and
                // timestamps twice.
                tracing::error!("placement stops: {error}");
                eprintln!("esker: placement stops: {error}");
                std::process::abort();
            }
        }));
    }
    let mut stopped = starting.shutdown.subscribe();
    starting.server = Some(vital::spawn("the server of this node", async move {
        let shutdown = async move {
            let _ = stopped.wait_for(|stop| *stop).await;
        };
        let limits = server::ConnectionLimits {
            connections: share.connections,
            ..server::ConnectionLimits::default()
        };
        if let Err(error) = server::serve(listener, limits, routes, http, shutdown).await {
            // It is better to start a node again when it cannot be reached.
            tracing::error!("{error}");
            eprintln!("esker: the server of this node stops: {error}");
            std::process::abort();
        }
    }));
}

/// A placement member serves while it leads, or knows the leader.
async fn follow(mut leadership: watch::Receiver<Leadership>, health: Health) {
    loop {
        let known = leadership.borrow_and_update().leader.is_some();
        health.set(Part::Placement, known);
        if leadership.changed().await.is_err() {
            return;
        }
    }
}

/// Finds the placement driver. `cluster` is the one that the node's store belongs to.
async fn find_placement(
    endpoints: &[String],
    cluster: Option<u64>,
) -> Result<PlacementClient, Error> {
    let mut waiting = Repeated::new();
    let mut patience = FIRST_PLACEMENT_SEARCH;
    loop {
        let endpoints = endpoints.to_vec();
        let found =
            PlacementClient::connect_as_of(Dialer::default(), endpoints, cluster, patience).await;
        patience = PLACEMENT_SEARCH;
        match found {
            Ok(client) => return Ok(client),
            // The other members may not be up yet.
            Err(error @ ClientError::PlacementUnreachable { .. }) => {
                if let Some(times) = waiting.failed(Instant::now()) {
                    tracing::warn!(times, "waiting for placement: {error}");
                }
            }
            Err(error) => return Err(error.into()),
        }
    }
}

async fn open_store(
    node: &mut Node,
    mut data: DataDir,
    builder: &NodeBuilder,
    share: Share,
) -> Result<(), Error> {
    let placement = node.placement.clone();
    let options = EngineOptions { max_open_files: share.engine_files, ..builder.config.engine() };
    let newcomer = bootstrap::Newcomer {
        address: &node.address,
        labels: &builder.labels,
        replace: builder.replace,
    };
    let Introduced { ident, engines, memory } =
        bootstrap::introduce(&mut data, &placement, &options, newcomer).await?;
    let (reports, waiting_reports) = mpsc::channel(MAX_WAITING_REPORTS);
    let plan = Plan {
        store: StoreId(ident.store_id),
        cluster: ident.cluster_id,
        config: builder.config.store(),
        addresses: Arc::new(PlacementAddresses(placement.clone())),
        audience: Audience::Placement(reports, KnownStores::of(placement.clone())),
    };
    let store = OpenStore::open(plan, &data, engines, &node.traffic)?;
    let handle = store.handle().clone();
    let ids = Arc::new(PlacementIds(placement.clone()));
    let storage = Storage::new(handle.clone(), placement.cluster_id(), ids);
    node.store_service.open(Arc::new(storage));
    let folder = data.path().to_owned();
    let space = move || pages::disk_space(&folder);
    let heartbeats = heartbeats::run(handle.clone(), placement, waiting_reports, space, memory);
    node.tasks.push(vital::spawn("reporting to placement", heartbeats));
    node.health.set(Part::Store, true);
    node.store_id = Some(StoreId(ident.store_id));
    *node.store.lock() = Some(store);
    let (slot, traffic, service) =
        (node.store.clone(), node.traffic.clone(), node.store_service.clone());
    let directory = data.path().to_owned();
    let health = (node.health.clone(), Part::Store);
    node.tasks.push(vital::spawn(
        "watching for damage",
        damage::watch(handle, directory, health, move || {
            traffic.remove(ident.store_id);
            service.close();
            if let Some(store) = slot.lock().take() {
                store.stop();
            }
        }),
    ));
    node.directory = Some(data);
    Ok(())
}
