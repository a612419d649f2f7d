//! The cluster, its surroundings, and the passing of time.

use std::collections::BTreeMap;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use esker::parts::LateStore;
use esker_model::{PeerChange, PeerId, Region, RegionId, Role as PeerRole, Seat, StoreId};
use esker_raftstore::StoreHandle;
use parking_lot::Mutex;
use rand::{RngExt as _, SeedableRng as _, seq::SliceRandom as _};
use rand_chacha::ChaCha8Rng;
use tokio::time::Instant;

use crate::clock::MachineClock;
use crate::disk::{Crash, Disk};
use crate::history::{History, short};
use crate::journal::Journal;
use crate::machine::{Machine, Role};
use crate::network::{Host, Network};
use crate::plan::{Fault, MAX_STORES, Plan};
use crate::wire::{Leaders, ParcelContent, Wire};

/// How often the parts of the stores get a turn.
pub const TICK: Duration = Duration::from_millis(5);

/// What every machine and client has around it.
#[derive(Clone)]
pub struct Surroundings {
    pub journal: Journal,
    pub network: Network,
    pub wire: Arc<Mutex<Wire>>,
    pub hosts: Arc<Mutex<BTreeMap<StoreId, Host>>>,
    /// Of the regions of the data.
    pub leaders: Arc<Mutex<Leaders>>,
    /// Of the placement driver's own region.
    pub member_leaders: Arc<Mutex<Leaders>>,
    /// Where the stores of this moment answer.
    pub doors: Arc<Mutex<BTreeMap<Host, Arc<LateStore>>>>,
    /// The addresses of the placement driver's members.
    pub members: Vec<String>,
    pub history: Arc<Mutex<History>>,
    /// The directory that all disks are in; another one each time.
    pub root: PathBuf,
}

pub struct World {
    pub around: Surroundings,
    pub machines: BTreeMap<Host, Machine>,
    rng: ChaCha8Rng,
    /// When the clocks began, also those of machines that come later.
    began: Instant,
    stores: u32,
    remembered_writes: usize,
    /// How many voters a region has at least when an operator removes one.
    least_voters: usize,
    /// What is done to the cluster from outside.
    operator: crate::operator::Operator,
}

impl World {
    pub fn new(plan: &Plan, root: &Path, journal: Journal) -> std::io::Result<World> {
        let mut rng = ChaCha8Rng::seed_from_u64(plan.seed ^ 0x5eed);
        let began = Instant::now();
        let members: Vec<String> =
            (1..=plan.members).map(|number| format!("member{number}:2379")).collect();
        let around = Surroundings {
            journal,
            network: Network::new(plan.seed ^ 0x0e70, plan.quality),
            wire: Arc::default(),
            hosts: Arc::default(),
            leaders: Arc::default(),
            member_leaders: Arc::default(),
            doors: Arc::default(),
            members,
            history: Arc::new(Mutex::new(History::new(plan.places))),
            root: root.to_owned(),
        };
        let mut machines = BTreeMap::new();
        for number in 0..plan.members {
            let host = Host::member(number);
            let disk = Disk::new(root.join(host.to_string()))?;
            around.network.watch_power(host, disk.power());
            let role = Role::Member(u64::from(number) + 1);
            let address = around.members[number as usize].clone();
            let clock = clock(began, &mut rng);
            let machine = Machine::new(host, address, role, disk, clock, plan.remembered_writes);
            machines.insert(host, machine);
        }
        let operator = crate::operator::Operator::new(&around);
        let remembered_writes = plan.remembered_writes;
        // A disk that is lost while a region comes down to two voters may take data with it.
        let least_voters = if plan.loses_disks() { 4 } else { 3 };
        let mut world = World {
            around,
            machines,
            rng,
            began,
            stores: 0,
            remembered_writes,
            least_voters,
            operator,
        };
        for _ in 0..plan.stores {
            world.add_store()?;
        }
        Ok(world)
    }

    fn add_store(&mut self) -> std::io::Result<()> {
        let host = Host::store(self.stores);
        self.stores += 1;
        let disk = Disk::new(self.around.root.join(host.to_string()))?;
        let address = format!("{host}:20160");
        self.around.network.watch_power(host, disk.power());
        let clock = clock(self.began, &mut self.rng);
        let machine = Machine::new(host, address, Role::Store, disk, clock, self.remembered_writes);
        self.machines.insert(host, machine);
        Ok(())
    }

    /// Lets time pass until the future is ready.
    pub async fn drive<F: Future>(&mut self, future: F) -> F::Output {
        let mut future = pin!(future);
        loop {
            tokio::select! {
                biased;
                output = &mut future => return output,
                () = tokio::time::sleep(TICK) => self.tick(),
            }
        }
    }

    fn tick(&mut self) {
        self.deliver();
        let mut hosts: Vec<Host> = self.machines.keys().copied().collect();
        hosts.shuffle(&mut self.rng);
        for host in hosts {
            let Some(machine) = self.machines.get_mut(&host) else { continue };
            machine.turn(&self.around, &mut self.rng);
            if machine.is_store() {
                self.around.doors.lock().insert(host, machine.door.clone());
            }
        }
    }

    fn deliver(&mut self) {
        let due = self.around.wire.lock().due(Instant::now());
        for mut parcel in due {
            let there = self.around.hosts.lock().get(&parcel.to).copied();
            let delivered = there.is_some_and(|there| {
                self.around.network.arrives(parcel.from, there)
                    && self.machines[&there].receive(&mut parcel)
            });
            if matches!(parcel.content, ParcelContent::Snapshot(..))
                && let Some(sender) = self.machines.get(&parcel.from)
            {
                sender.snapshot_sent(&parcel, delivered);
            }
        }
    }

    /// The stores that run.
    pub fn running(&self) -> impl Iterator<Item = (Host, &StoreHandle)> {
        self.machines
            .values()
            .filter(|machine| machine.is_store())
            .filter_map(|machine| Some((machine.host, &machine.on()?.store.handle)))
    }

    /// The running stores without a replica of the region.
    fn free_stores(&self, region: &Region) -> Vec<StoreId> {
        let stores = self.running().map(|(_, store)| store.store_id());
        stores.filter(|store| region.peer_on(*store).is_none()).collect()
    }

    /// The region at a place, as its newest replica knows it.
    fn region_at(&self, place: usize) -> Option<Region> {
        let key = self.around.history.lock().key(place);
        let region = self
            .running()
            .flat_map(|(_, store)| store.delegates().descriptors())
            .filter(|region| region.contains(&key))
            .max_by_key(|region| (region.epoch.version, region.epoch.conf_ver))?;
        Some((*region).clone())
    }

    /// A machine ends, and starts again after a while.
    pub fn crash(&mut self, host: Host, crash: Crash, down: Duration) {
        if let Some(machine) = self.machines.get_mut(&host) {
            self.around.journal.count("crashes");
            machine.crash(&self.around, &mut self.rng, crash, down);
        }
    }

    /// All machines lose power.
    pub fn black_out(&mut self, down: Duration) {
        for machine in self.machines.values_mut() {
            machine.crash(&self.around, &mut self.rng, Crash::Power, down);
        }
    }

    pub fn happen(&mut self, fault: Fault) {
        let around = self.around.clone();
        let now = Instant::now();
        around.journal.note("fault", fault);
        let until = |ms| now + Duration::from_millis(ms);
        match fault {
            Fault::Crash { host, crash, down_ms } => {
                self.crash(host, crash, Duration::from_millis(down_ms));
            }
            Fault::Blackout { down_ms } => {
                around.journal.count("blackouts");
                self.black_out(Duration::from_millis(down_ms));
            }
            Fault::CutPower { host, syncs } => {
                if let Some(machine) = self.machines.get(&host) {
                    machine.disk().cut_power_after(syncs);
                }
            }
            Fault::Cut { from, to } => around.network.cut(from, to),
            Fault::Isolate { host } => {
                for other in self.machines.keys().filter(|other| **other != host) {
                    around.network.cut(host, *other);
                    around.network.cut(*other, host);
                }
            }
            Fault::Heal => around.network.heal(),
            Fault::HangUp { host } => around.network.hang_up(host),
            Fault::StallDisk { host, ms } => {
                if let Some(machine) = self.machines.get_mut(&host) {
                    machine.stalls.disk = until(ms);
                }
            }
            Fault::StallApply { host, ms } => {
                if let Some(machine) = self.machines.get_mut(&host) {
                    machine.stalls.apply = until(ms);
                }
            }
            Fault::StallWorkers { host, ms } => {
                if let Some(machine) = self.machines.get_mut(&host) {
                    machine.stalls.workers = until(ms);
                }
            }
            Fault::FailDisk { host } => {
                if let Some(machine) =
                    self.machines.get_mut(&host).filter(|machine| machine.on().is_some())
                {
                    machine.disk().set_failing(true);
                }
            }
            Fault::LoseDisk { host, down_ms } => {
                if self.can_lose(host)
                    && let Some(machine) = self.machines.get_mut(&host)
                {
                    machine.lose_disk(&around, Duration::from_millis(down_ms));
                }
            }
            Fault::StepClock { host, ahead_ms } => {
                if let Some(machine) = self.machines.get_mut(&host) {
                    machine.clock.set_ahead_ms(ahead_ms);
                }
            }
            Fault::Weather(quality) => around.network.set_quality(quality),
            Fault::AddStore => {
                if self.stores < MAX_STORES
                    && let Err(error) = self.add_store()
                {
                    around.journal.violated("the simulation works", error.to_string());
                }
            }
            Fault::Split { place } => {
                let key = around.history.lock().key(place);
                self.operator.split(key);
            }
            Fault::Transfer { place, choice } => {
                if let Some(region) = self.region_at(place) {
                    let to = region.peers[choice % region.peers.len()];
                    self.operator.transfer(region.id, to.store);
                }
            }
            Fault::AddReplica { place, choice } => self.change(place, |world, region| {
                let free = world.free_stores(region);
                let learner = region.peers.iter().find(|peer| peer.role == PeerRole::Learner);
                match learner {
                    Some(learner) => Some(vec![PeerChange::AddVoter((*learner).into())]),
                    None if free.is_empty() => None,
                    // Its id comes from placement.
                    None => {
                        let seat = Seat { peer: PeerId(0), store: free[choice % free.len()] };
                        Some(vec![PeerChange::AddLearner(seat)])
                    }
                }
            }),
            Fault::RemoveReplica { place, choice } => self.change(place, |world, region| {
                let peer = region.peers[choice % region.peers.len()];
                let voters =
                    region.peers.iter().filter(|peer| peer.role == PeerRole::Voter).count();
                (peer.role == PeerRole::Learner || voters >= world.least_voters)
                    .then(|| vec![PeerChange::Remove(peer.into())])
            }),
            Fault::SwapReplicas { place, choice } => {
                let Some(region) = self.region_at(place) else { return };
                let leaving = region.peers[choice % region.peers.len()];
                let free = self.free_stores(&region);
                let learner = region.peers.iter().find(|peer| peer.role == PeerRole::Learner);
                let joining = match learner {
                    Some(learner) => (*learner).into(),
                    None if free.is_empty() => return,
                    None => Seat { peer: PeerId(0), store: free[choice % free.len()] },
                };
                self.operator.swap(region.id, joining, leaving.into());
            }
        }
    }

    fn change(
        &mut self,
        place: usize,
        decide: impl FnOnce(&World, &Region) -> Option<Vec<PeerChange>>,
    ) {
        let Some(region) = self.region_at(place) else { return };
        let Some(changes) = decide(self, &region) else { return };
        self.operator.change(region.id, changes);
    }

    /// Whether everything that was acknowledged survives the loss of this disk: each region with a
    /// replica there has two others that are whole and run.
    fn can_lose(&self, host: Host) -> bool {
        let Some(lost) = self.machines.get(&host).and_then(Machine::on).map(|on| on.id) else {
            return false;
        };
        let running: BTreeMap<StoreId, &StoreHandle> =
            self.running().map(|(_, store)| (store.store_id(), store)).collect();
        if running.len() < self.stores as usize {
            return false;
        }
        let mut newest: BTreeMap<RegionId, Arc<Region>> = BTreeMap::new();
        for store in running.values() {
            for region in store.delegates().descriptors() {
                let known = newest.entry(region.id).or_insert_with(|| region.clone());
                if (region.epoch.version, region.epoch.conf_ver)
                    > (known.epoch.version, known.epoch.conf_ver)
                {
                    *known = region;
                }
            }
        }
        newest.values().all(|region| {
            let voters: Vec<_> =
                region.peers.iter().filter(|peer| peer.role != PeerRole::Learner).collect();
            let is_steady = region
                .peers
                .iter()
                .all(|peer| matches!(peer.role, PeerRole::Voter | PeerRole::Learner));
            let is_whole = |store: StoreId| {
                running.get(&store).is_some_and(|store| {
                    store
                        .delegates()
                        .get(region.id)
                        .is_some_and(|replica| replica.descriptor().epoch == region.epoch)
                })
            };
            let here = region.peer_on(lost).is_some();
            !here
                || is_steady
                    && voters.len() >= 3
                    && voters.iter().all(|peer| peer.store == lost || is_whole(peer.store))
        })
    }

    /// The faults are over.
    pub fn calm(&mut self, plan: &Plan) {
        self.around.journal.note("fault", "no more");
        self.around.network.heal();
        self.around.network.set_quality(crate::network::Quality {
            delay_ms: plan.quality.delay_ms,
            loss_percent: 0,
        });
        let now = Instant::now();
        for machine in self.machines.values_mut() {
            machine.stalls = crate::machine::Stalls { disk: now, apply: now, workers: now };
            machine.clock.set_ahead_ms(0);
            machine.disk().calm();
            machine.hurry();
        }
    }

    /// What every store knows of every region, for a person who looks for a cause.
    pub async fn describe(&mut self) -> String {
        let mut lines = Vec::new();
        let stores: Vec<StoreHandle> = self.running().map(|(_, store)| store.clone()).collect();
        for store in stores {
            let mut regions = store.delegates().descriptors();
            regions.sort_by_key(|region| region.range.start().clone());
            for region in regions {
                let asked = tokio::time::timeout(Duration::from_secs(1), store.status(region.id));
                let status = match self.drive(asked).await {
                    Ok(Ok(status)) => status,
                    Ok(Err(error)) => {
                        lines.push(format!("store {}: {error}", store.store_id()));
                        continue;
                    }
                    Err(_) => {
                        lines.push(format!("store {} does not answer", store.store_id()));
                        continue;
                    }
                };
                lines.push(format!(
                    "store {} region {} is {} in term {}, leader {:?}, log {}..{} commit {} applied {} {:?}",
                    store.store_id(),
                    region.id,
                    status.role.name(),
                    status.term,
                    status.leader.map(|leader| leader.0),
                    status.first,
                    status.last,
                    status.commit,
                    status.applied,
                    status.progress,
                ));
            }
        }
        for machine in self.machines.values() {
            let Some(on) = machine.on() else {
                lines.push(format!("{} is down", machine.host));
                continue;
            };
            let mut regions = on.store.handle.delegates().descriptors();
            regions.sort_by_key(|region| region.range.start().clone());
            for region in regions {
                let applied = esker_raftstore::state::applied(on.store.handle.engine(), region.id);
                let peers: Vec<String> = region
                    .peers
                    .iter()
                    .map(|peer| format!("{}@{} {:?}", peer.id, peer.store, peer.role))
                    .collect();
                lines.push(format!(
                    "{} store {} region {} [{}, {}) epoch {} lease {} applied {:?} peers {}",
                    machine.host,
                    on.id,
                    region.id,
                    short(region.range.start()),
                    region.range.end().map_or_else(|| "∞".into(), |end| short(end)),
                    region.epoch,
                    on.store.handle.holds_lease(region.id),
                    applied.ok().flatten().map(|applied| applied.index.0),
                    peers.join(", ")
                ));
            }
        }
        lines.join("\n")
    }
}

/// A clock that is a little too fast or too slow.
fn clock(began: Instant, rng: &mut ChaCha8Rng) -> MachineClock {
    MachineClock::new(began, rng.random_range(-20_000..=20_000))
}
