//! Seeded histories of whole stores under everything at once: crashes that lose
//! what was not synced, cut links, stuck disks and slow apply workers, splits,
//! transfers and changes of members, with writes and reads throughout.
//!
//! Every key has one writer, who writes growing numbers and goes on when the
//! outcome of his last write is known or will never be. So a read must find at
//! least what was acknowledged, or read, before it began, and at most what was
//! written at all. At the end everything heals, and all replicas must hold the same.
//!
//! `ESKER_STORE_SEED=n` replays one seed, `ESKER_STORE_SEEDS=n` runs that many.

use std::collections::BTreeMap;
use std::time::Duration;

use esker_raftstore::{
    Admin, NewRegion, PeerChange, PeerId, RegionExt, RegionId, RegionSnapshot, RequestContext,
    RequestError, StoreConfig, StoreId, WriteResult,
};
use esker_rpc::proto::metapb::{Peer, PeerRole, Region};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tokio::sync::oneshot::{Receiver, error::TryRecvError};

use crate::cluster::{Cluster, bytes, config, peer, value};

const SEEDS: u64 = 60;
const ACTIONS: usize = 400;
const KEYS: usize = 12;
const STORES: u64 = 4;

#[derive(Default)]
struct Register {
    issued: u64,
    /// The least that a read that begins now may find.
    floor: u64,
    writing: Option<(u64, Receiver<Result<WriteResult, RequestError>>)>,
}

struct Read {
    key: usize,
    floor: u64,
    answer: Receiver<Result<RegionSnapshot, RequestError>>,
}

struct Chaos {
    seed: u64,
    rng: ChaCha8Rng,
    cluster: Cluster,
    registers: Vec<Register>,
    reads: Vec<Read>,
    counts: BTreeMap<&'static str, usize>,
}

fn name(key: usize) -> String {
    format!("key-{key:02}")
}

impl Chaos {
    fn new(seed: u64) -> Self {
        let config = StoreConfig { seed, log_gc_threshold: 10, log_gc_max_lag: 20, ..config() };
        let mut cluster = Cluster::with(STORES, config);
        cluster.await_leader(1);
        cluster.add_replica(1, 2);
        cluster.add_replica(1, 3);
        Chaos {
            seed,
            rng: ChaCha8Rng::seed_from_u64(seed),
            cluster,
            registers: (0..KEYS).map(|_| Register::default()).collect(),
            reads: Vec::new(),
            counts: BTreeMap::new(),
        }
    }

    fn count(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }

    fn any_store(&mut self) -> Option<u64> {
        let running = self.cluster.running();
        (!running.is_empty()).then(|| running[self.rng.random_range(0..running.len())])
    }

    /// A store that says that it leads the region, if one does; else any.
    fn likely_leader(&mut self, region: u64) -> Option<u64> {
        if self.rng.random_bool(0.8) { self.cluster.leader(region) } else { self.any_store() }
    }

    fn act(&mut self) {
        let key = self.rng.random_range(0..KEYS);
        match self.rng.random_range(0..100) {
            0..30 => self.write(key),
            30..55 => self.read(key),
            55..75 => {
                let time = self.rng.random_range(1..400);
                self.cluster.run(Duration::from_millis(time));
            }
            75..78 => self.crash_or_start(),
            78..82 => self.cut(),
            82..86 => {
                self.cluster.heal();
                for machine in self.cluster.machines.values_mut() {
                    machine.stuck_disk = false;
                    machine.stuck_apply = false;
                }
            }
            86..88 => {
                let store = StoreId(self.rng.random_range(1..=STORES));
                self.cluster.machines.get_mut(&store).unwrap().stuck_disk = true;
            }
            88..90 => {
                let store = StoreId(self.rng.random_range(1..=STORES));
                self.cluster.machines.get_mut(&store).unwrap().stuck_apply = true;
            }
            90..93 => self.split(key),
            93..96 => self.transfer(key),
            _ => self.change_members(key),
        }
        // Part of the time everything is only half done when the next thing happens.
        if self.rng.random_bool(0.5) {
            self.cluster.settle();
        } else {
            for _ in 0..self.rng.random_range(0..4) {
                self.cluster.step();
            }
        }
        self.collect();
    }

    fn write(&mut self, key: usize) {
        if self.registers[key].writing.is_some() {
            return;
        }
        let region = self.cluster.region_of(name(key).as_bytes());
        let Some(store) = self.likely_leader(region.id) else { return };
        let number = self.registers[key].issued + 1;
        if let Ok(answer) = self.cluster.start_put(store, &region, &name(key), &number.to_string())
        {
            self.registers[key].issued = number;
            self.registers[key].writing = Some((number, answer));
            self.count("writes");
        }
    }

    fn read(&mut self, key: usize) {
        let region = self.cluster.region_of(name(key).as_bytes());
        let Some(store) = self.likely_leader(region.id) else { return };
        let replica_read = self.rng.random_bool(0.3);
        let context = RequestContext { replica_read, ..Cluster::context(&region) };
        let floor = self.registers[key].floor;
        let answer = self.cluster.start_read(store, &region, context);
        self.reads.push(Read { key, floor, answer });
    }

    /// Takes what has been answered.
    fn collect(&mut self) {
        for register in &mut self.registers {
            let Some((number, answer)) = &mut register.writing else { continue };
            match answer.try_recv() {
                Ok(Ok(_)) => {
                    register.floor = register.floor.max(*number);
                    *self.counts.entry("acknowledged").or_default() += 1;
                }
                // Unknown, or certainly not done: either way nobody waits any more.
                Ok(Err(_)) | Err(TryRecvError::Closed) => {}
                Err(TryRecvError::Empty) => continue,
            }
            register.writing = None;
        }
        let mut waiting = Vec::new();
        for mut read in std::mem::take(&mut self.reads) {
            match read.answer.try_recv() {
                Ok(Ok(snapshot)) => {
                    let key = name(read.key);
                    let found = value(&snapshot, &key).map_or(0, |text| text.parse().unwrap());
                    let issued = self.registers[read.key].issued;
                    assert!(
                        (read.floor..=issued).contains(&found),
                        "seed {}: {key} read as {found}, but {} was acknowledged before and {issued} is the last written",
                        self.seed,
                        read.floor,
                    );
                    let floor = &mut self.registers[read.key].floor;
                    *floor = found.max(*floor);
                    self.count("answered reads");
                }
                Ok(Err(_)) | Err(TryRecvError::Closed) => {}
                Err(TryRecvError::Empty) => waiting.push(read),
            }
        }
        self.reads = waiting;
    }

    fn crash_or_start(&mut self) {
        let stores: Vec<u64> = (1..=STORES).collect();
        let running = self.cluster.running();
        match stores.iter().find(|store| !running.contains(store)) {
            Some(down) => {
                self.cluster.start(StoreId(*down));
                self.count("restarts");
            }
            None => {
                let victim = self.rng.random_range(1..=STORES);
                // Views of a dead store's engine end with it.
                self.reads.clear();
                self.cluster.crash(victim);
                self.count("crashes");
            }
        }
    }

    fn cut(&mut self) {
        let from = StoreId(self.rng.random_range(1..=STORES));
        if self.rng.random_bool(0.3) {
            self.cluster.isolate(from.0);
        } else {
            let to = StoreId(self.rng.random_range(1..=STORES));
            self.cluster.cut.insert((from, to));
        }
        self.count("cuts");
    }

    fn ask(&mut self, region: &Region, admin: Admin) {
        let Some(store) = self.likely_leader(region.id) else { return };
        let handle = self.cluster.store(store).handle.clone();
        let _ = handle.start_admin(RegionId(region.id), region.epoch(), admin);
    }

    fn split(&mut self, key: usize) {
        let region = self.cluster.region_of(name(key).as_bytes());
        let regions = vec![NewRegion {
            id: RegionId(self.cluster.allocate()),
            peers: region.peers.iter().map(|_| PeerId(self.cluster.allocate())).collect(),
        }];
        self.ask(&region, Admin::Split { keys: vec![bytes(&name(key))], regions });
        self.count("splits");
    }

    fn transfer(&mut self, key: usize) {
        let region = self.cluster.region_of(name(key).as_bytes());
        let to = region.peers[self.rng.random_range(0..region.peers.len())];
        self.ask(&region, Admin::TransferLeader(Some(PeerId(to.id))));
        self.count("transfers");
    }

    /// One sensible step: a learner where there is none, else promote or swap or remove.
    fn change_members(&mut self, key: usize) {
        let region = self.cluster.region_of(name(key).as_bytes());
        let voters = region.peers.iter().filter(|peer| peer.role() == PeerRole::Voter).count();
        let learner = region.peers.iter().find(|peer| peer.role() == PeerRole::Learner).copied();
        let free = (1..=STORES).find(|store| region.peer_on(StoreId(*store)).is_none());
        let any = region.peers[self.rng.random_range(0..region.peers.len())];
        let changes = match (learner, free) {
            (Some(learner), _) if voters < 3 => vec![PeerChange::AddVoter(learner)],
            (Some(learner), _) if self.rng.random_bool(0.7) && any.role() == PeerRole::Voter => {
                vec![PeerChange::AddVoter(learner), PeerChange::AddLearner(any)]
            }
            (Some(learner), _) => vec![PeerChange::Remove(learner)],
            (None, Some(store)) => {
                let id = self.cluster.allocate();
                let learner = Peer { role: PeerRole::Learner.into(), ..peer(id, store) };
                vec![PeerChange::AddLearner(learner)]
            }
            (None, None) => vec![PeerChange::Remove(any)],
        };
        self.ask(&region, Admin::ChangePeers(changes));
        self.count("changes of members");
    }

    /// Everything heals; nothing that was acknowledged may be missing anywhere.
    fn conclude(mut self) -> BTreeMap<&'static str, usize> {
        self.cluster.heal();
        for machine in self.cluster.machines.values_mut() {
            machine.stuck_disk = false;
            machine.stuck_apply = false;
        }
        for store in 1..=STORES {
            if !self.cluster.running().contains(&store) {
                self.cluster.start(StoreId(store));
            }
        }
        self.cluster.run(Duration::from_secs(15));
        self.collect();
        for key in 0..KEYS {
            let found = self.cluster.get(&name(key)).map_or(0, |text| text.parse::<u64>().unwrap());
            let Register { issued, floor, .. } = self.registers[key];
            assert!(
                (floor..=issued).contains(&found),
                "seed {}: {} ended as {found}; {floor} was acknowledged, {issued} written",
                self.seed,
                name(key),
            );
        }
        self.replicas_agree();
        self.counts
    }

    /// Every replica of every region holds what the region's leader holds.
    fn replicas_agree(&mut self) {
        let seed = self.seed;
        self.cluster.run_until(&format!("agreement (seed {seed})"), |cluster| {
            (0..KEYS).all(|key| {
                let key = name(key);
                let region = cluster.region_of(key.as_bytes());
                let Some(leader) = cluster.leader(region.id) else { return false };
                let expected = cluster.local(leader, &key);
                let settled = |role| matches!(role, PeerRole::Voter | PeerRole::Learner);
                region.peers.iter().all(|peer| {
                    settled(peer.role())
                        && cluster.region_on(peer.store_id, region.id).as_ref() == Some(&region)
                        && cluster.local(peer.store_id, &key) == expected
                })
            })
        });
    }
}

#[test]
fn histories_under_everything_at_once_are_linearizable_and_lose_nothing() {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let seeds = match number("ESKER_STORE_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("ESKER_STORE_SEEDS").unwrap_or(SEEDS),
    };
    let mut totals = BTreeMap::<&str, usize>::new();
    for seed in seeds {
        let mut chaos = Chaos::new(seed);
        for _ in 0..ACTIONS {
            chaos.act();
        }
        for (what, count) in chaos.conclude() {
            *totals.entry(what).or_default() += count;
        }
    }
    println!("{totals:?}");
    assert!(totals["acknowledged"] * 4 > totals["writes"], "most writes failed: {totals:?}");
}
