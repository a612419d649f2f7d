//! How a node comes up: socket, directories, placement member, server, store.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use esker_engine::{DataDir, KvEngine, LogEngine};
use esker_placement::{PlacementConfig, PlacementServer, ReplicatedState, SystemClock};
use esker_raftstore::{MonotonicClock, Parts, RunningStore, Store, StoreHandle, StoreId};
use esker_rpc::error::ClientError;
use esker_rpc::placement::PlacementClient;
use esker_rpc::proto::esker::admin_server::AdminServer;
use esker_rpc::proto::metapb;
use esker_rpc::server::{self, TikvService};
use esker_rpc::transport::{RaftTransport, TransportService};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tonic::service::Routes;

use super::{Node, NodeBuilder, NodeConfig, Roles};
use crate::Error;
use crate::server::admin::AdminService;
use crate::server::late::LateStore;
use crate::server::member::{MemberState, MemberStore, Members};
use crate::server::outbox::{
    Audience, Events, MAX_WAITING_REPORTS, NodeOutbox, PlacementAddresses,
};
use crate::server::regions::RegionService;
use crate::server::traffic::Traffic;
use crate::server::{bootstrap, heartbeats, pages};

/// How long one search for placement lasts before it is mentioned and repeated.
const PLACEMENT_SEARCH: Duration = Duration::from_secs(10);

const STORE_FOLDER: &str = "store";
const PLACEMENT_FOLDER: &str = "placement";

/// A node on its way up. What is in it is undone when it is dropped.
struct Starting {
    address: String,
    traffic: Arc<Traffic>,
    store_service: Arc<LateStore>,
    shutdown: watch::Sender<bool>,
    tasks: Vec<JoinHandle<()>>,
    server: Option<JoinHandle<()>>,
    member: Option<MemberStore>,
}

impl Drop for Starting {
    fn drop(&mut self) {
        for task in self.tasks.iter().chain(&self.server) {
            task.abort();
        }
    }
}

pub(super) async fn start(mut builder: NodeBuilder) -> Result<Node, Error> {
    let directory = builder.data_dir.clone().ok_or(Error::NoDataDir)?;
    let listener = builder.bind().await?;
    let address = advertised(&builder.listen, &listener)?;
    let members = builder.placement_members(&address)?;
    let runs_store = builder.roles.is_none_or(|roles: Roles| roles.store);
    if members.is_none() && !runs_store {
        return Err(Error::NoRole);
    }
    // Both are locked before anything is made in either.
    let data = match runs_store {
        true => Some(DataDir::open(&directory.join(STORE_FOLDER))?),
        false => None,
    };
    let (shutdown, _) = watch::channel(false);
    let mut starting = Starting {
        address: address.clone(),
        traffic: Arc::default(),
        store_service: Arc::default(),
        shutdown,
        tasks: Vec::new(),
        server: None,
        member: None,
    };
    let state = match &members {
        Some(members) => {
            let folder = directory.join(PLACEMENT_FOLDER);
            let (member, state) = MemberStore::open(&folder, members, &starting.traffic)?;
            starting.member = Some(member);
            Some((members, state))
        }
        None => None,
    };
    serve(&mut starting, &directory, listener, state, &builder.config);

    let endpoints = match builder.join.is_empty() {
        true => vec![address.clone()],
        false => builder.join.clone(),
    };
    let placement = find_placement(&endpoints).await?;
    let mut node = Node {
        address,
        store_id: None,
        placement,
        store_service: starting.store_service.clone(),
        traffic: starting.traffic.clone(),
        shutdown: starting.shutdown.clone(),
        server: starting.server.take(),
        tasks: std::mem::take(&mut starting.tasks),
        store: None,
        directory: None,
        member: starting.member.take(),
    };
    if let Some(data) = data {
        open_store(&mut node, data, &builder).await?;
    }
    Ok(node)
}

/// The address by which others reach the node: what was asked for, with the port that was bound.
fn advertised(listen: &str, listener: &TcpListener) -> Result<String, Error> {
    let bound = listener
        .local_addr()
        .map_err(|source| Error::Listen { address: listen.to_owned(), source })?;
    let host = listen.rsplit_once(':').map_or(listen, |(host, _)| host);
    Ok(format!("{host}:{}", bound.port()))
}

fn serve(
    starting: &mut Starting,
    directory: &Path,
    listener: TcpListener,
    member: Option<(&Members, Arc<MemberState>)>,
    config: &NodeConfig,
) {
    let store = starting.store_service.clone();
    let admin = AdminService { store: store.clone(), directory: directory.to_owned() };
    let mut routes = Routes::new(TikvService::new(store.clone()).into_server())
        .add_service(TransportService::new(starting.traffic.clone()).into_server())
        .add_service(AdminServer::new(admin));
    let mut http = pages::router(starting.address.clone(), store, pages::collected_metrics());
    if let Some((members, state)) = member {
        let me = members.all.iter().find(|member| member.id == members.me);
        let name = me.map_or_else(|| "placement".to_owned(), |me| me.name.clone());
        let mut placement = PlacementConfig::new(name, members.me);
        if let Some(interval) = config.schedule_interval() {
            placement.schedule_interval = interval;
        }
        let clock = Arc::new(SystemClock::new());
        let placement = PlacementServer::new(placement, state as Arc<dyn ReplicatedState>, clock);
        routes =
            routes.add_service(placement.pd_service()).add_service(placement.keyspace_service());
        http = http.merge(placement.http());
        let driver = placement.run();
        starting.tasks.push(tokio::spawn(async move {
            if let Err(error) = driver.await {
                // What the members agreed on cannot be read: going on could give
                // out ids and timestamps twice.
                tracing::error!("placement stops: {error}");
                eprintln!("esker: placement stops: {error}");
                std::process::abort();
            }
        }));
    }
    let mut stopped = starting.shutdown.subscribe();
    starting.server = Some(tokio::spawn(async move {
        let shutdown = async move {
            let _ = stopped.wait_for(|stop| *stop).await;
        };
        if let Err(error) = server::serve(listener, routes, http, shutdown).await {
            tracing::error!("{error}");
        }
    }));
}

async fn find_placement(endpoints: &[String]) -> Result<PlacementClient, Error> {
    loop {
        match PlacementClient::connect_within(endpoints.to_vec(), PLACEMENT_SEARCH).await {
            Ok(client) => return Ok(client),
            // The others may not be up yet.
            Err(error @ ClientError::PlacementUnreachable { .. }) => {
                tracing::warn!("waiting for placement: {error}");
            }
            Err(error) => return Err(error.into()),
        }
    }
}

async fn open_store(
    node: &mut Node,
    mut data: DataDir,
    builder: &NodeBuilder,
) -> Result<(), Error> {
    let placement = node.placement.clone();
    let ident = bootstrap::identify(&mut data, &placement).await?;
    let descriptor = metapb::Store {
        id: ident.store_id,
        address: node.address.clone(),
        labels: builder
            .labels
            .iter()
            .map(|(key, value)| metapb::StoreLabel { key: key.clone(), value: value.clone() })
            .collect(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        ..metapb::Store::default()
    };
    let options = builder.config.engine();
    let kv = KvEngine::open(&data.kv(), &options)?;
    let log = LogEngine::open(&data.log(), &options)?;
    let first = bootstrap::first_region(data.path(), &placement, &descriptor, &kv, &log).await?;
    // Known to placement, so that the others find this store, before it speaks.
    placement.put_store(descriptor).await?;
    let events = Arc::new(Events::default());
    let transport = RaftTransport::new(
        Arc::new(PlacementAddresses(placement.clone())),
        ident.store_id,
        ident.cluster_id,
        tokio::runtime::Handle::current(),
        events.clone(),
    );
    let (reports, waiting_reports) = mpsc::channel(MAX_WAITING_REPORTS);
    let store = Store::open(Parts {
        store: StoreId(ident.store_id),
        kv,
        log,
        snapshots: data.snap(),
        config: builder.config.store(),
        outbox: Arc::new(NodeOutbox::new(transport, Audience::Placement(reports))),
        clock: Arc::new(MonotonicClock::default()),
    })?;
    data.empty_snapshots()?;
    let running: RunningStore = store.start()?;
    let handle: StoreHandle = running.handle().clone();
    events.connect(handle.clone());
    node.store_service.open(Arc::new(RegionService::new(handle.clone(), placement.clone())));
    node.traffic.add(ident.cluster_id, handle.clone(), data.snap());
    node.tasks.push(tokio::spawn(heartbeats::run(
        handle.clone(),
        placement.clone(),
        waiting_reports,
        data.path().to_owned(),
    )));
    if let Some(region) = first {
        let cut = bootstrap::cut_key_spaces(data.path().to_owned(), handle, placement, region);
        node.tasks.push(tokio::spawn(cut));
    }
    node.store_id = Some(ident.store_id);
    node.store = Some(running);
    node.directory = Some(data);
    Ok(())
}
