//! A cluster of stores in one thread's hands.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use esker_engine::{Cf, EngineOptions, Environment, KvEngine, LogEngine, MemoryEnv};
use esker_model::{
    Clock, Epoch, KeyRange, LogIndex, NewRegion, Peer, PeerChange, PeerId, Region, RegionId, Role,
    Seat, StoreId, Time,
};
use esker_raftstore::envelope::Address;
use esker_raftstore::state::bootstrap_region;
use esker_raftstore::{
    Admin, AdminResult, Answer, Envelope, Mutation, Parts, ReceivedSnapshot, RegionSnapshot,
    RegionStatus, ReplicaRole, RequestContext, RequestError, SnapshotReceiver, Store, StoreConfig,
    WriteResult, WriteTag,
};
use tokio::sync::oneshot::error::TryRecvError;

use crate::sent::Sent;

/// A clock that moves when the test says so.
#[derive(Default)]
pub struct VirtualClock(AtomicU64);

impl Clock for VirtualClock {
    fn now(&self) -> Time {
        Time(self.0.load(Ordering::SeqCst))
    }

    fn wall_ms(&self) -> u64 {
        self.now().millis_since(Time(0))
    }
}

/// One simulated machine: a disk that outlives its store.
pub struct Machine {
    pub id: StoreId,
    env: MemoryEnv,
    pub store: Option<Store>,
    pub sent: Arc<Sent>,
    /// The disk answers no log write while it is stuck.
    pub stuck_disk: bool,
    /// Committed entries wait, as if the apply worker were slow.
    pub stuck_apply: bool,
}

pub struct Cluster {
    pub clock: Arc<VirtualClock>,
    pub machines: BTreeMap<StoreId, Machine>,
    /// Pairs of stores, in one direction, between which nothing passes.
    pub cut: BTreeSet<(StoreId, StoreId)>,
    pub config: StoreConfig,
    next_id: u64,
    pub snapshots_carried: usize,
    /// Regions whose snapshots are long under way.
    pub slow_snapshots: BTreeSet<RegionId>,
    /// Whether the files of snapshots are lost when they have been received.
    pub lost_files: bool,
    /// What the network carried and to whom, where a test wants to know.
    pub carried: Option<Vec<Envelope>>,
}

pub fn config() -> StoreConfig {
    StoreConfig {
        workers: 2,
        apply_workers: 2,
        log_gc_interval: Duration::from_secs(1),
        log_gc_threshold: 20,
        log_gc_max_lag: 50,
        flush_after: Duration::from_secs(2),
        flush_files_after: Duration::from_secs(1),
        seed: 42,
        ..StoreConfig::default()
    }
}

pub const TICK: Duration = Duration::from_millis(20);

impl Cluster {
    /// Stores 1 to `stores`; region 1 lives on the first alone.
    pub fn new(stores: u64) -> Self {
        Cluster::with(stores, config())
    }

    pub fn with(stores: u64, config: StoreConfig) -> Self {
        let clock = Arc::new(VirtualClock(AtomicU64::new(1_000_000_000)));
        let mut cluster = Cluster {
            clock,
            machines: BTreeMap::new(),
            cut: BTreeSet::new(),
            config,
            next_id: 100,
            snapshots_carried: 0,
            slow_snapshots: BTreeSet::new(),
            lost_files: false,
            carried: None,
        };
        for id in 1..=stores {
            let id = StoreId(id);
            let machine = Machine {
                id,
                env: MemoryEnv::new(),
                store: None,
                sent: Arc::default(),
                stuck_disk: false,
                stuck_apply: false,
            };
            cluster.machines.insert(id, machine);
            if id.0 == 1 {
                let (kv, log) = cluster.engines(id);
                let first = Region {
                    id: RegionId(1),
                    range: KeyRange::all(),
                    epoch: Epoch::FIRST,
                    peers: vec![peer(2, 1)],
                };
                bootstrap_region(&kv, &log, StoreId(1), &first).unwrap();
                kv.close_like_a_crash();
            }
            cluster.start(id);
        }
        cluster
    }

    /// What is on the disk of a store that does not run.
    pub fn engines(&self, id: StoreId) -> (KvEngine, LogEngine) {
        let options = EngineOptions::in_memory(self.machines[&id].env.clone());
        assert!(matches!(options.environment, Environment::Memory(_)));
        let kv = KvEngine::open(Path::new("/kv"), &options).unwrap();
        let log = LogEngine::open(Path::new("/log"), &options).unwrap();
        (kv, log)
    }

    pub fn start(&mut self, id: StoreId) {
        let (kv, log) = self.engines(id);
        let machine = self.machines.get_mut(&id).unwrap();
        assert!(machine.store.is_none(), "store {id} runs already");
        machine.sent = Arc::default();
        let store = Store::open(Parts {
            store: id,
            kv,
            log,
            snapshots: "/snap".into(),
            config: StoreConfig { seed: self.config.seed ^ id.0, ..self.config.clone() },
            outbox: machine.sent.clone(),
            clock: self.clock.clone(),
        })
        .unwrap();
        machine.store = Some(store);
    }

    /// Ends a store as a power failure would: log writes that were not done, and
    /// everything that the key-value engine held in memory, are lost.
    pub fn crash(&mut self, id: u64) {
        let machine = self.machines.get_mut(&StoreId(id)).unwrap();
        machine.stuck_disk = false;
        machine.stuck_apply = false;
        machine.sent = Arc::default();
        let store = machine.store.take().unwrap();
        let kv = store.handle.engine().clone();
        drop(store);
        kv.close_like_a_crash();
    }

    /// Lets everything that is ready happen: turns of all parts, deliveries.
    pub fn settle(&mut self) {
        while self.step() {}
    }

    /// One turn of every part, then everything sent is delivered.
    pub fn step(&mut self) -> bool {
        let mut busy = false;
        for machine in self.machines.values_mut() {
            let Some(store) = &mut machine.store else { continue };
            for worker in &mut store.workers {
                busy |= worker.turn(&*self.clock).unwrap();
            }
            if !machine.stuck_disk {
                busy |= store.log_writer.turn().unwrap();
            }
            if !machine.stuck_apply {
                for applier in &mut store.appliers {
                    busy |= applier.turn().unwrap();
                }
            }
            busy |= store.flusher.turn(self.clock.now()).unwrap();
        }
        busy | self.deliver()
    }

    fn deliver(&mut self) -> bool {
        let ids: Vec<StoreId> = self.machines.keys().copied().collect();
        let mut busy = false;
        for from in ids {
            let sent = self.machines[&from].sent.clone();
            for message in sent.take_messages() {
                busy = true;
                if let Some(carried) = &mut self.carried {
                    carried.push(message.clone());
                }
                if let Some(store) = self.reachable(from, message.address.to.store) {
                    store.handle.raft_message(message.into_wire());
                }
            }
            for (message, mut source) in sent.take_snapshots(&self.slow_snapshots) {
                busy = true;
                let Address { region, to, .. } = message.address;
                let delivered = match self.reachable(from, to.store) {
                    Some(store) => {
                        let stem = format!("{region}-{}-{}", source.meta.term, source.meta.index);
                        let kv = store.handle.engine().clone();
                        let mut receiver = SnapshotReceiver::new(kv, Path::new("/snap"), stem);
                        while let Some(block) = source.next_block().unwrap() {
                            receiver.block(block.cf, block.pairs).unwrap();
                        }
                        let mut files = receiver.finish().unwrap();
                        if self.lost_files {
                            let lost = ReceivedSnapshot::from_record(Path::new("/snap"), "lost:0");
                            files = lost.unwrap();
                        }
                        store.handle.snapshot_received(message.into_wire(), files).is_ok()
                    }
                    None => false,
                };
                self.snapshots_carried += usize::from(delivered);
                drop(source);
                if let Some(store) = &self.machines[&from].store {
                    store.handle.snapshot_sent(region, to.id, delivered);
                }
            }
        }
        busy
    }

    fn reachable(&self, from: StoreId, to: StoreId) -> Option<&Store> {
        if self.cut.contains(&(from, to)) {
            return None;
        }
        self.machines.get(&to).and_then(|machine| machine.store.as_ref())
    }

    /// Lets time pass.
    pub fn run(&mut self, time: Duration) {
        let mut left = time;
        self.settle();
        while left > Duration::ZERO {
            let step = TICK.min(left);
            self.clock.0.fetch_add(u64::try_from(step.as_nanos()).unwrap(), Ordering::SeqCst);
            left -= step;
            self.settle();
        }
    }

    /// Lets time pass until something holds.
    /// What every store knows of every region, for a person who looks for a cause.
    pub fn describe(&mut self) -> String {
        use std::fmt::Write;
        let mut text = String::new();
        for store in self.running() {
            for descriptor in self.store(store).handle.delegates().descriptors() {
                let Some(status) = self.status(store, descriptor.id.0) else { continue };
                let peers: Vec<String> = descriptor
                    .peers
                    .iter()
                    .map(|peer| format!("{}@{} {:?}", peer.id, peer.store, peer.role))
                    .collect();
                let epoch = descriptor.epoch;
                let _ = writeln!(
                    text,
                    "store {store} region {} {:?} epoch {} {} term {} leader {:?} log {}..{} commit {} applied {} peers {} {:?}",
                    descriptor.id,
                    descriptor.range,
                    epoch,
                    status.role.name(),
                    status.term,
                    status.leader,
                    status.first,
                    status.last,
                    status.commit,
                    status.applied,
                    peers.join(", "),
                    status.progress,
                );
            }
        }
        text
    }

    #[track_caller]
    pub fn run_until(&mut self, what: &str, mut holds: impl FnMut(&mut Self) -> bool) {
        const PATIENCE: u32 = 3000;
        self.settle();
        for _ in 0..PATIENCE {
            if holds(self) {
                return;
            }
            self.run(TICK);
        }
        let state = self.describe();
        panic!(
            "{} s of virtual time were not enough for: {what}\n{state}",
            (TICK * PATIENCE).as_secs()
        );
    }

    /// Cuts a store off from all others, in both directions.
    pub fn isolate(&mut self, id: u64) {
        for other in 1..=self.machines.len() as u64 {
            if other != id {
                self.cut.insert((StoreId(id), StoreId(other)));
                self.cut.insert((StoreId(other), StoreId(id)));
            }
        }
    }

    pub fn heal(&mut self) {
        self.cut.clear();
    }

    pub fn store(&self, id: u64) -> &Store {
        self.machines[&StoreId(id)].store.as_ref().expect("the store runs")
    }

    pub fn region_on(&self, store: u64, region: u64) -> Option<Region> {
        let store = self.machines[&StoreId(store)].store.as_ref()?;
        store
            .handle
            .delegates()
            .get(RegionId(region))
            .map(|delegate| (*delegate.descriptor()).clone())
    }

    /// The region that holds `key`, as the newest of the stores knows it.
    pub fn region_of(&self, key: &[u8]) -> Region {
        self.machines
            .values()
            .filter_map(|machine| machine.store.as_ref())
            .flat_map(|store| store.handle.delegates().descriptors())
            .filter(|region| region.contains(key))
            .max_by_key(|region| (region.epoch.version, region.epoch.conf_ver))
            .map(|region| (*region).clone())
            .expect("every key is in a region")
    }

    pub fn status(&mut self, store: u64, region: u64) -> Option<RegionStatus> {
        let mut answer = self.store(store).handle.status(RegionId(region)).start().unwrap();
        self.settle();
        answer.try_recv().ok()?.ok()
    }

    /// The store that leads a region in the highest term.
    pub fn leader(&mut self, region: u64) -> Option<u64> {
        let ids: Vec<u64> = self.running();
        ids.into_iter()
            .filter_map(|id| Some((id, self.status(id, region)?)))
            .filter(|(_, status)| status.role == ReplicaRole::Leader)
            .max_by_key(|(_, status)| status.term)
            .map(|(id, _)| id)
    }

    pub fn running(&self) -> Vec<u64> {
        self.machines.values().filter(|m| m.store.is_some()).map(|m| m.id.0).collect()
    }

    #[track_caller]
    pub fn await_leader(&mut self, region: u64) -> u64 {
        let mut found = None;
        self.run_until(&format!("a leader of region {region}"), |cluster| {
            found = cluster.leader(region);
            found.is_some()
        });
        found.unwrap()
    }

    pub fn context(region: &Region) -> RequestContext {
        RequestContext { epoch: region.epoch, ..RequestContext::default() }
    }

    fn put_of(key: &str, value: &str) -> Mutation {
        Mutation::Put { cf: Cf::Default, key: bytes(key), value: bytes(value) }
    }

    pub fn start_put(
        &self,
        store: u64,
        region: &Region,
        key: &str,
        value: &str,
    ) -> Result<Answer<WriteResult>, RequestError> {
        self.start_put_with(store, region, Self::context(region), key, value)
    }

    pub fn start_put_with(
        &self,
        store: u64,
        region: &Region,
        context: RequestContext,
        key: &str,
        value: &str,
    ) -> Result<Answer<WriteResult>, RequestError> {
        let mutations = vec![Self::put_of(key, value)];
        self.store(store).handle.write(region.id, context, mutations).start()
    }

    /// A tag of the only client there is.
    pub fn tag(&self, sequence: u64, horizon: LogIndex) -> WriteTag {
        let now_s = self.clock.wall_s();
        WriteTag { client: 1, sequence, horizon, now_s }
    }

    /// Puts through whoever leads, as a client would, until it is acknowledged.
    #[track_caller]
    pub fn put(&mut self, key: &str, value: &str) {
        self.acknowledged(key, Self::put_of(key, value));
    }

    #[track_caller]
    pub fn delete(&mut self, key: &str) {
        self.acknowledged(key, Mutation::Delete { cf: Cf::Default, key: bytes(key) });
    }

    #[track_caller]
    fn acknowledged(&mut self, key: &str, mutation: Mutation) {
        let mut last = None;
        for _ in 0..500 {
            let region = self.region_of(key.as_bytes());
            if let Some(leader) = self.leader(region.id.0) {
                let mutations = vec![mutation.clone()];
                let context = Self::context(&region);
                let handle = self.store(leader).handle.clone();
                let mut answer = handle.write(region.id, context, mutations).start().unwrap();
                for _ in 0..100 {
                    self.settle();
                    match answer.try_recv() {
                        Ok(Ok(_)) => return,
                        Ok(Err(error)) => {
                            last = Some(error);
                            break;
                        }
                        Err(TryRecvError::Empty) => self.run(TICK),
                        Err(TryRecvError::Closed) => break,
                    }
                }
            }
            self.run(TICK);
        }
        panic!("the write of {key} was never acknowledged; the last refusal: {last:?}");
    }

    pub fn start_read(
        &self,
        store: u64,
        region: &Region,
        context: RequestContext,
    ) -> Answer<RegionSnapshot> {
        self.store(store).handle.snapshot(region.id, context).start().unwrap()
    }

    /// Reads from whoever leads.
    #[track_caller]
    pub fn get(&mut self, key: &str) -> Option<String> {
        for _ in 0..500 {
            let region = self.region_of(key.as_bytes());
            if let Some(leader) = self.leader(region.id.0) {
                let mut answer = self.start_read(leader, &region, Self::context(&region));
                self.settle();
                if let Ok(Ok(snapshot)) = answer.try_recv() {
                    return value(&snapshot, key);
                }
            }
            self.run(TICK);
        }
        panic!("no read of {key} was ever answered");
    }

    /// What a replica holds on its own, whatever its role.
    pub fn local(&self, store: u64, key: &str) -> Option<String> {
        let stored = self.store(store).handle.engine().get(Cf::Default, key.as_bytes()).unwrap();
        stored.map(|stored| String::from_utf8(stored).unwrap())
    }

    /// All pairs that a replica holds.
    pub fn contents(&self, store: u64) -> BTreeMap<String, String> {
        let mut iter = self.store(store).handle.engine().snapshot().iter(Cf::Default, b"", None);
        iter.seek_to_first();
        let mut pairs = BTreeMap::new();
        while iter.valid().unwrap() {
            let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
            pairs.insert(text(iter.key()), text(iter.value()));
            iter.next();
        }
        pairs
    }

    /// Asks whoever leads the region, until it has taken effect.
    #[track_caller]
    pub fn admin(&mut self, region: u64, admin: &Admin) -> AdminResult {
        let mut last = None;
        for _ in 0..300 {
            if let Some(leader) = self.leader(region) {
                let epoch = self.region_on(leader, region).unwrap().epoch;
                let handle = self.store(leader).handle.clone();
                let mut answer =
                    handle.admin(RegionId(region), epoch, admin.clone()).start().unwrap();
                for _ in 0..100 {
                    self.settle();
                    match answer.try_recv() {
                        Ok(Ok(result)) => return result,
                        Ok(Err(error)) => {
                            last = Some(error);
                            break;
                        }
                        Err(TryRecvError::Empty) => self.run(TICK),
                        Err(TryRecvError::Closed) => break,
                    }
                }
            }
            self.run(TICK);
        }
        panic!("{admin:?} of region {region} never took effect; the last refusal: {last:?}");
    }

    pub fn allocate(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    /// Learner first, then voter, as placement does it.
    #[track_caller]
    pub fn add_replica(&mut self, region: u64, store: u64) -> Peer {
        let seat = Seat { peer: PeerId(self.allocate()), store: StoreId(store) };
        self.admin(region, &Admin::ChangePeers(vec![PeerChange::AddLearner(seat)]));
        self.run_until("the learner has caught up", |cluster| {
            let Some(leader) = cluster.leader(region) else { return false };
            let Some(status) = cluster.status(leader, region) else { return false };
            status.progress.iter().any(|p| p.peer == seat.peer && p.matched >= status.applied)
        });
        self.admin(region, &Admin::ChangePeers(vec![PeerChange::AddVoter(seat)]));
        seat.with(Role::Voter)
    }

    /// Region 1 on stores 1, 2 and 3.
    pub fn replicated() -> Self {
        Cluster::replicated_with(config())
    }

    pub fn replicated_with(config: StoreConfig) -> Self {
        let mut cluster = Cluster::with(3, config);
        cluster.await_leader(1);
        cluster.add_replica(1, 2);
        cluster.add_replica(1, 3);
        cluster
    }

    #[track_caller]
    pub fn split(&mut self, region: u64, keys: &[&str]) -> Vec<Region> {
        let leader = self.await_leader(region);
        let peers = self.region_on(leader, region).unwrap().peers.len();
        let regions = keys
            .iter()
            .map(|_| NewRegion {
                id: RegionId(self.allocate()),
                peers: (0..peers).map(|_| PeerId(self.allocate())).collect(),
            })
            .collect();
        let keys = keys.iter().map(|key| bytes(key)).collect();
        self.admin(region, &Admin::Split { keys, regions }).regions
    }

    #[track_caller]
    pub fn transfer(&mut self, region: u64, to: u64) {
        self.run_until(&format!("store {to} leads region {region}"), |cluster| {
            let Some(leader) = cluster.leader(region) else { return false };
            if leader == to {
                return true;
            }
            let descriptor = cluster.region_on(leader, region).unwrap();
            let target = descriptor.peer_on(StoreId(to)).unwrap().id;
            let handle = cluster.store(leader).handle.clone();
            let asked = Admin::TransferLeader(Some(target));
            let _ = handle.admin(RegionId(region), descriptor.epoch, asked).start();
            false
        });
    }

    /// Until all running replicas of all regions have applied the same.
    #[track_caller]
    pub fn await_agreement(&mut self, stores: &[u64]) {
        self.run_until("the replicas hold the same", |cluster| {
            let first = cluster.contents(stores[0]);
            stores[1..].iter().all(|store| cluster.contents(*store) == first)
        });
    }
}

pub fn bytes(text: &str) -> Bytes {
    Bytes::copy_from_slice(text.as_bytes())
}

pub fn peer(id: u64, store: u64) -> Peer {
    Peer::voter(PeerId(id), StoreId(store))
}

pub fn value(snapshot: &RegionSnapshot, key: &str) -> Option<String> {
    let stored = snapshot.get(Cf::Default, key.as_bytes()).unwrap();
    stored.map(|stored| String::from_utf8(stored).unwrap())
}
