//! One machine: a disk, a clock, and a node on it that runs, starts, or does not.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use esker::parts::{
    self, AdminService, Audience, DiskSpace, Introduced, KnownStores, LateStore,
    MAX_WAITING_REPORTS, MemberBook, MemberState, Members, Newcomer, PlacementIds, RegionLeader,
    heartbeats,
};
use esker_client::PlacementClient;
use esker_engine::{DataDir, EngineOptions, Engines, Ident, Kind, LogEngine};
use esker_model::{Clock, StoreId};
use esker_placement::{MemberInfo, PlacementConfig, PlacementServer, ReplicatedState};
use esker_raftstore::state::bootstrap_region;
use esker_raftstore::{Parts, SnapshotReceiver, Store, StoreConfig, StoreError};
use esker_rpc::channel::Dialer;
use esker_rpc::proto::esker::admin_server::AdminServer;
use esker_rpc::server::TikvService;
use esker_storage::Storage;
use futures_util::StreamExt as _;
use rand::{RngExt as _, seq::SliceRandom as _};
use rand_chacha::ChaCha8Rng;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::service::Routes;
use tonic::transport::Server;

use crate::clock::MachineClock;
use crate::disk::{Crash, Disk};
use crate::network::Host;
use crate::wire::{Parcel, ParcelContent, SimulatedOutbox};
use crate::world::Surroundings;

/// How long a node that could not start waits before it is started again.
const START_AGAIN: Duration = Duration::from_secs(1);

/// What a machine is for.
pub enum Role {
    /// A member of the placement driver, with its number from 1.
    Member(u64),
    Store,
}

/// What holds up the parts of a store, and until when.
#[derive(Clone, Copy)]
pub struct Stalls {
    pub disk: Instant,
    pub apply: Instant,
    pub workers: Instant,
}

pub struct Machine {
    pub host: Host,
    pub address: String,
    role: Role,
    disk: Disk,
    pub clock: Arc<MachineClock>,
    pub stalls: Stalls,
    /// Since when the machine is down, it comes up again at.
    up_at: Option<Instant>,
    /// How often it was started.
    life: u64,
    /// The store may take the place of one that has lost its disk.
    replaces: bool,
    node: Node,
    /// The node's tasks.
    tasks: JoinSet<()>,
    pub door: Arc<LateStore>,
    /// How many writes of clients each region remembers.
    remembered_writes: usize,
}

enum Node {
    Off,
    /// Until it knows what it is, or why it cannot start.
    Starting(oneshot::Receiver<Result<Box<Started>, Refusal>>),
    On(Box<On>),
}

/// Why a store does not start.
struct Refusal {
    reason: String,
    /// It may be otherwise at the next attempt, with the same directory.
    may_pass: bool,
}

impl Refusal {
    fn of(error: &esker::Error) -> Refusal {
        // What placement says, or does not say, to a store that asks.
        let may_pass = matches!(error, esker::Error::Client(_));
        Refusal { reason: error.to_string(), may_pass }
    }
}

struct Started {
    data: DataDir,
    introduced: Introduced,
    placement: PlacementClient,
}

pub struct On {
    pub id: StoreId,
    pub store: Store,
    pub log: LogEngine,
    pub data: DataDir,
    /// Snapshots that came in.
    received: AtomicU64,
}

/// How the engines of a simulated machine are opened.
fn options() -> EngineOptions {
    EngineOptions {
        block_cache_bytes: 4 << 20,
        write_buffer_bytes: 16 << 20,
        log_write_buffer_bytes: 16 << 20,
        log_preallocation_bytes: 64 << 10,
        max_background_jobs: 2,
        max_open_files: 4_096,
        lose_memtables_on_close: true,
        compacts: false,
        ..EngineOptions::default()
    }
}

impl Machine {
    pub fn new(
        host: Host,
        address: String,
        role: Role,
        disk: Disk,
        clock: MachineClock,
        remembered_writes: usize,
    ) -> Machine {
        let now = Instant::now();
        Machine {
            host,
            address,
            role,
            disk,
            clock: Arc::new(clock),
            stalls: Stalls { disk: now, apply: now, workers: now },
            up_at: Some(now),
            life: 0,
            replaces: false,
            node: Node::Off,
            tasks: JoinSet::new(),
            door: Arc::default(),
            remembered_writes,
        }
    }

    pub fn is_store(&self) -> bool {
        matches!(self.role, Role::Store)
    }

    pub fn on(&self) -> Option<&On> {
        match &self.node {
            Node::On(on) => Some(on),
            Node::Off | Node::Starting(_) => None,
        }
    }

    pub fn disk(&self) -> &Disk {
        &self.disk
    }

    /// Comes up at once.
    pub fn hurry(&mut self) {
        if let Some(up_at) = &mut self.up_at {
            *up_at = Instant::now();
        }
    }

    /// Ends the node, and starts it again after a while.
    pub fn crash(
        &mut self,
        around: &Surroundings,
        rng: &mut ChaCha8Rng,
        crash: Crash,
        down: Duration,
    ) {
        around.journal.note(self.host, format_args!("crashes: {crash:?}"));
        match crash {
            Crash::Process => around.network.close(self.host),
            Crash::Power => around.network.fall_silent(self.host),
        }
        self.end(around, down);
        if let Err(error) = self.disk.crash(crash, rng) {
            around.journal.violated("the simulation works", format!("a crash: {error}"));
        }
    }

    /// Ends the node and empties its disk.
    pub fn lose_disk(&mut self, around: &Surroundings, down: Duration) {
        around.journal.count("disks lost");
        around.journal.note(self.host, "loses its disk");
        around.network.fall_silent(self.host);
        self.end(around, down);
        self.replaces = true;
        if let Err(error) = self.disk.lose() {
            around.journal.violated("the simulation works", format!("an empty disk: {error}"));
        }
    }

    fn end(&mut self, around: &Surroundings, down: Duration) {
        let now = Instant::now();
        around.leaders.lock().end(self.host);
        around.member_leaders.lock().end(self.host);
        self.tasks.abort_all();
        self.tasks = JoinSet::new();
        self.door.close();
        self.door = Arc::default();
        self.node = Node::Off;
        self.up_at = Some(now + down);
        self.stalls = Stalls { disk: now, apply: now, workers: now };
    }

    /// Whatever the machine does at this moment.
    pub fn turn(&mut self, around: &Surroundings, rng: &mut ChaCha8Rng) {
        self.heed_power(around, rng);
        if self.up_at.is_some_and(|up_at| Instant::now() >= up_at) {
            self.up_at = None;
            self.life += 1;
            self.start(around);
        }
        if let Node::Starting(started) = &mut self.node {
            match started.try_recv() {
                Ok(Ok(started)) => {
                    if let Err(error) = self.open(around, *started) {
                        around.journal.violated("a store starts again", error.to_string());
                    }
                }
                Ok(Err(Refusal { reason, may_pass })) => {
                    let said = reason.replace(&*around.root.to_string_lossy(), "");
                    around.journal.note(self.host, format_args!("does not start: {said}"));
                    if !may_pass && !self.disk.is_dark() {
                        let what = format!("{}: {said}", self.host);
                        around.journal.violated("a store starts again", what);
                    }
                    around.network.close(self.host);
                    self.end(around, START_AGAIN);
                }
                Err(oneshot::error::TryRecvError::Empty) => {}
                Err(oneshot::error::TryRecvError::Closed) => {
                    around.journal.violated("a store starts again", "it panicked");
                }
            }
        }
        if let Node::On(on) = &mut self.node
            && let Err(error) = on.turn(&self.clock, &self.stalls, rng)
        {
            // A store whose disk fails ends its process.
            if !matches!(error, StoreError::Engine(_)) || !self.disk.is_failing() {
                around.journal.violated("a store goes on", format!("{}: {error}", self.host));
            }
            let said = error.to_string().replace(&*around.root.to_string_lossy(), "");
            around.journal.count("disks failed");
            around.journal.note(self.host, format_args!("stops: {said}"));
            self.crash(around, rng, Crash::Power, Duration::from_secs(2));
        }
        self.heed_power(around, rng);
    }

    /// Crashes if the power has gone since the last look.
    fn heed_power(&mut self, around: &Surroundings, rng: &mut ChaCha8Rng) {
        if self.disk.is_dark() {
            around.journal.count("power lost between two steps");
            let down = Duration::from_millis(rng.random_range(50..4_000));
            self.crash(around, rng, Crash::Power, down);
        }
    }

    fn start(&mut self, around: &Surroundings) {
        around.journal.note(self.host, "starts");
        match self.role {
            Role::Store => self.start_store(around),
            Role::Member(number) => {
                if let Err(error) = self.start_member(around, number) {
                    around.journal.violated("a member starts again", error);
                }
            }
        }
    }

    fn serve(&mut self, around: &Surroundings, routes: Routes) {
        let arriving = around.network.listen(self.host, &self.address);
        let arriving = UnboundedReceiverStream::new(arriving).map(Ok::<_, std::io::Error>);
        let server = Server::builder().add_routes(routes).serve_with_incoming(arriving);
        self.tasks.spawn(async move {
            let _ = server.await;
        });
    }

    fn start_store(&mut self, around: &Surroundings) {
        let service = TikvService::new(self.door.clone()).into_server();
        let admin = AdminService { store: self.door.clone(), directory: self.disk.path() };
        self.serve(around, Routes::new(service).add_service(AdminServer::new(admin)));
        let (tell, started) = oneshot::channel();
        let dialer = Dialer::new(around.network.from(self.host));
        let endpoints = around.members.clone();
        let (path, address, replace) = (self.disk.path(), self.address.clone(), self.replaces);
        self.tasks.spawn(async move {
            let starting = async {
                let mut data = DataDir::open(&path, Kind::Store)
                    .map_err(|error| Refusal::of(&error.into()))?;
                let cluster = data.ident().map(|ident| ident.cluster_id);
                let patience = Duration::from_secs(10);
                let found = PlacementClient::connect_as_of(dialer, endpoints, cluster, patience);
                let placement = found.await.map_err(|error| Refusal::of(&error.into()))?;
                let newcomer = Newcomer { address: &address, labels: &[], replace };
                let introduced = parts::introduce(&mut data, &placement, &options(), newcomer)
                    .await
                    .map_err(|error| Refusal::of(&error))?;
                Ok(Box::new(Started { data, introduced, placement }))
            };
            let _ = tell.send(starting.await);
        });
        self.node = Node::Starting(started);
    }

    fn open(&mut self, around: &Surroundings, started: Started) -> Result<(), StoreError> {
        let Started { data, introduced, placement } = started;
        let Introduced { ident, engines, memory } = introduced;
        self.replaces = false;
        let (reports, waiting) = mpsc::channel(MAX_WAITING_REPORTS);
        let audience = Audience::Placement(reports, KnownStores::of(placement.clone()));
        let id = StoreId(ident.store_id);
        let config = StoreConfig {
            log_gc_interval: Duration::from_secs(1),
            log_gc_threshold: 20,
            log_gc_max_lag: 60,
            // Some stores have a short log to send to others, some much to do again after a crash.
            flush_after: Duration::from_secs(1 + id.0 % 3 * 2),
            // Less than a few writes, so that regions have to hold what they have.
            log_backlog: 2_000,
            region_log_backlog: 600,
            apply_backlog: 1_000,
            flush_files_after: Duration::from_secs(2),
            region_report_interval: Duration::from_secs(5),
            remembered_writes: self.remembered_writes,
            remembered_in_memory: self.remembered_writes.min(8),
            ..StoreConfig::default()
        };
        let on = self.open_parts(around, id, data, engines, audience, config)?;
        let handle = on.store.handle.clone();
        let ids = Arc::new(PlacementIds(placement.clone()));
        let storage = Storage::new(handle.clone(), placement.cluster_id(), ids).on_one_thread();
        self.door.open(Arc::new(storage));
        let space = || DiskSpace { total: 100 << 30, available: 60 << 30 };
        self.tasks.spawn(heartbeats::run(handle, placement, waiting, space, memory));
        around.journal.note(self.host, format_args!("is store {id}"));
        self.node = Node::On(on);
        Ok(())
    }

    fn open_parts(
        &self,
        around: &Surroundings,
        id: StoreId,
        data: DataDir,
        engines: Engines,
        audience: Audience,
        config: StoreConfig,
    ) -> Result<Box<On>, StoreError> {
        around.hosts.lock().insert(id, self.host);
        let outbox = SimulatedOutbox {
            host: self.host,
            life: self.life,
            store: id,
            audience,
            wire: around.wire.clone(),
            network: around.network.clone(),
            hosts: around.hosts.clone(),
            leaders: match self.role {
                Role::Store => around.leaders.clone(),
                Role::Member(_) => around.member_leaders.clone(),
            },
            kv: engines.kv.clone(),
            log: engines.log.clone(),
            journal: around.journal.clone(),
        };
        let store = Store::open(Parts {
            store: id,
            kv: engines.kv,
            log: engines.log.clone(),
            snapshots: data.snap(),
            config,
            outbox: Arc::new(outbox),
            clock: self.clock.clone(),
        })?;
        data.empty_snapshots().map_err(|error| StoreError::Corrupt {
            what: "the snapshots' directory".into(),
            why: error.to_string(),
        })?;
        Ok(Box::new(On { id, store, log: engines.log, data, received: AtomicU64::new(0) }))
    }

    fn start_member(&mut self, around: &Surroundings, number: u64) -> Result<(), String> {
        let said = |error: &dyn std::fmt::Display| error.to_string();
        let mut data =
            DataDir::open(&self.disk.path(), Kind::Member).map_err(|error| said(&error))?;
        let engines = data.open_engines(&options()).map_err(|error| said(&error))?;
        let infos = around.members.iter().enumerate().map(|(index, address)| MemberInfo {
            id: esker_placement::MemberId(index as u64 + 1),
            name: format!("member{}", index + 1),
            address: address.clone(),
        });
        let all: Vec<MemberInfo> = infos.collect();
        let me = esker_placement::MemberId(number);
        let nonces = all.iter().map(|member| (member.name.clone(), member.id.0)).collect();
        let members = Members { me, all, tag: 1 };
        let record = parts::founded(&members, &nonces);
        let store = parts::store_of(me);
        if data.ident().is_none() {
            let ident = Ident { cluster_id: record.group, store_id: store.0 };
            data.found(ident, rand::random(), &engines).map_err(|error| said(&error))?;
        }
        if !data.was_started() {
            bootstrap_region(&engines.kv, &engines.log, store, &parts::first_region(&record))
                .map_err(|error| said(&error))?;
        }
        data.begin(&engines).map_err(|error| said(&error))?;
        let book = Arc::new(MemberBook::new(members, record));
        let (leaders, leader) = watch::channel(RegionLeader::default());
        let config = StoreConfig {
            log_gc_interval: Duration::from_secs(1),
            flush_after: Duration::from_secs(4),
            flush_files_after: Duration::from_secs(2),
            ..parts::store_config()
        };
        let audience = Audience::Member(leaders);
        let on = self
            .open_parts(around, store, data, engines, audience, config)
            .map_err(|error| said(&error))?;
        book.open(on.store.handle.clone());
        let state = Arc::new(MemberState::new(on.store.handle.clone(), book, leader));
        let mut config = PlacementConfig::new(format!("member{number}"));
        config.dialer = Dialer::new(around.network.from(self.host));
        config.schedule.leader_rest_ms = 2_000;
        config.schedule.stores.disconnected_after_ms = 4_000;
        config.schedule.stores.down_after_ms = 6_000;
        let state: Arc<dyn ReplicatedState> = state;
        let server = PlacementServer::new(config, state, self.clock.clone());
        let routes = Routes::new(server.pd_service())
            .add_service(server.members_service())
            .add_service(server.keyspace_service())
            .add_service(server.admin_service());
        self.serve(around, routes);
        let (running, journal, host) = (server.run(), around.journal.clone(), self.host);
        self.tasks.spawn(async move {
            if let Err(error) = running.await {
                journal.violated("placement's state can be read", format!("{host}: {error}"));
            }
        });
        self.node = Node::On(on);
        Ok(())
    }

    /// Something arrives from another store.
    pub fn receive(&self, parcel: &mut Parcel) -> bool {
        let Node::On(on) = &self.node else { return false };
        if on.id != parcel.to {
            return false;
        }
        match &mut parcel.content {
            ParcelContent::Message(message) => {
                on.store.handle.raft_message_from(parcel.sender, message.clone());
                true
            }
            ParcelContent::Snapshot(message, source) => {
                on.receive_snapshot(parcel.sender, message, source).is_some()
            }
        }
    }

    /// Hears what became of a snapshot that it sent.
    pub fn snapshot_sent(&self, parcel: &Parcel, delivered: bool) {
        let ParcelContent::Snapshot(message, _) = &parcel.content else { return };
        let Node::On(on) = &self.node else { return };
        if self.life != parcel.life {
            return;
        }
        let Some(to) = &message.to else { return };
        on.store.handle.snapshot_sent(
            esker_model::RegionId(message.region_id),
            esker_model::PeerId(to.id),
            delivered,
        );
    }
}

impl On {
    fn receive_snapshot(
        &self,
        sender: StoreId,
        message: &esker_rpc::proto::esker::RaftMessage,
        source: &mut esker_raftstore::RegionSnapshotSource,
    ) -> Option<()> {
        let handle = &self.store.handle;
        // Unique, as in a node: the same snapshot may come twice.
        let number = self.received.fetch_add(1, Ordering::Relaxed);
        let stem = format!("{}-from-{sender}-{number}", message.region_id);
        let mut receiver: SnapshotReceiver =
            handle.receive_snapshot(sender, message, &self.data.snap(), stem).ok()?;
        while let Some(block) = source.next_block().ok()? {
            receiver.block(block.cf, block.pairs).ok()?;
        }
        let files = receiver.finish().ok()?;
        handle.snapshot_received(message.clone(), files.clone()).map_err(|_| files.discard()).ok()
    }

    /// A turn of every part that is not held up, in any order; some have two, some none.
    fn turn(
        &mut self,
        clock: &MachineClock,
        stalls: &Stalls,
        rng: &mut ChaCha8Rng,
    ) -> Result<(), StoreError> {
        let now = Instant::now();
        let Store { workers, log_writer, appliers, flusher, .. } = &mut self.store;
        let mut turns: Vec<usize> = (0..2 * (workers.len() + appliers.len() + 2)).collect();
        turns.shuffle(rng);
        let parts = turns.len() / 2;
        for turn in turns {
            if rng.random_range(0..100) < 15 {
                continue;
            }
            match turn % parts {
                0 if now >= stalls.disk => {
                    log_writer.turn()?;
                }
                1 if now >= stalls.disk => {
                    flusher.turn(Clock::now(clock))?;
                }
                0 | 1 => {}
                part if part < 2 + workers.len() => {
                    if now >= stalls.workers {
                        workers[part - 2].turn(clock)?;
                    }
                }
                part => {
                    if now >= stalls.apply {
                        appliers[part - 2 - workers.len()].turn()?;
                    }
                }
            }
        }
        Ok(())
    }
}
