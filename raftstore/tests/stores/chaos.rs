//! Seeded histories of whole stores under everything at once: crashes that lose
//! what was not synced, cut links, stuck disks and slow apply workers, splits,
//! transfers and changes of members, with writes and reads throughout.
//!
//! Every key has one writer, who writes growing numbers and goes on when the
//! outcome of his last write is known or will never be. So a read must find at
//! least what was acknowledged, or read, before it began, and at most what was
//! written at all. At the end everything heals, and all replicas must hold the same.
//!
//! In half of the histories the writers are patient: they send a write again until they know what
//! became of it, as our client does, while attempts that they have given up are still under way
//! and arrive long after, or twice. Tags keep that from being seen; the same histories without
//! them must show it, which proves that they would.
//!
//! `ESKER_STORE_SEED=n` replays one seed, `ESKER_STORE_SEEDS=n` runs that many.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use esker_model::{LogIndex, NewRegion, Peer, PeerChange, PeerId, Region, RegionId, Role, StoreId};
use esker_raftstore::{
    Admin, Answer, RegionSnapshot, RequestContext, RequestError, StoreConfig, WriteResult,
    WriteTag, remembered_records,
};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tokio::sync::oneshot::error::TryRecvError;

use crate::cluster::{Cluster, bytes, config, peer, value};

const SEEDS: u64 = 60;
const ACTIONS: usize = 400;
const KEYS: usize = 12;
const STORES: u64 = 4;

/// Requests that the network holds back at the same time.
const MAX_HELD_BACK: usize = 32;

/// What a writer does when he does not know the outcome of a write.
#[derive(Clone, Copy, PartialEq)]
enum Writers {
    /// He goes on to the next.
    Hasty,
    /// He sends it again, under the same tag.
    Patient,
    /// He sends it again, and the store cannot know that it is the same.
    Careless,
}

#[derive(Default)]
struct Register {
    issued: u64,
    /// The least that a read that begins now may find.
    floor: u64,
    writing: Option<Writing>,
    /// Writes whose outcome nobody will ever know, and which may still happen.
    abandoned: BTreeSet<u64>,
}

impl Register {
    /// Whether a read that began when `floor` was known may find this.
    fn allows(&self, floor: u64, found: u64) -> bool {
        (floor..=self.issued).contains(&found) || self.abandoned.contains(&found)
    }
}

/// A write that is not over.
struct Writing {
    number: u64,
    answer: Option<Answer<WriteResult>>,
    /// The region that it was sent to last.
    region: u64,
    tag: Option<WriteTag>,
    /// Whether an attempt may have been applied, or may be yet.
    unknown: bool,
}

/// A request that the network holds back.
struct HeldBack {
    region: Region,
    context: RequestContext,
    key: usize,
    number: u64,
}

struct Read {
    key: usize,
    floor: u64,
    answer: Answer<RegionSnapshot>,
}

struct Chaos {
    seed: u64,
    rng: ChaCha8Rng,
    cluster: Cluster,
    writers: Writers,
    registers: Vec<Register>,
    held_back: Vec<HeldBack>,
    /// How far each region's log had been applied when a writer last heard of it.
    horizons: BTreeMap<u64, LogIndex>,
    next_tag: u64,
    /// What a read found that it must not find.
    violation: Option<String>,
    reads: Vec<Read>,
    counts: BTreeMap<&'static str, usize>,
}

fn name(key: usize) -> String {
    format!("key-{key:02}")
}

impl Chaos {
    fn new(seed: u64, writers: Writers) -> Self {
        let config = StoreConfig {
            seed,
            log_gc_threshold: 10,
            log_gc_max_lag: 20,
            // Often too few, so that they are forgotten, and read again from the engine.
            remembered_writes: [3, 20, 1000][seed as usize % 3],
            remembered_in_memory: [0, 1000][seed as usize % 2],
            ..config()
        };
        let mut cluster = Cluster::with(STORES, config);
        cluster.await_leader(1);
        cluster.add_replica(1, 2);
        cluster.add_replica(1, 3);
        Chaos {
            seed,
            rng: ChaCha8Rng::seed_from_u64(seed),
            cluster,
            writers,
            held_back: Vec::new(),
            horizons: BTreeMap::new(),
            next_tag: 0,
            violation: None,
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
        if !self.held_back.is_empty() && self.rng.random_bool(0.15) {
            let late = self.rng.random_range(0..self.held_back.len());
            let late = self.held_back.swap_remove(late);
            self.arrive(&late);
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
        if self.writers != Writers::Hasty {
            return self.write_patiently(key);
        }
        if self.registers[key].writing.is_some() {
            return;
        }
        let region = self.cluster.region_of(name(key).as_bytes());
        let Some(store) = self.likely_leader(region.id.0) else { return };
        let number = self.registers[key].issued + 1;
        if let Ok(answer) = self.cluster.start_put(store, &region, &name(key), &number.to_string())
        {
            let writing = Writing {
                number,
                answer: Some(answer),
                region: region.id.0,
                tag: None,
                unknown: false,
            };
            self.registers[key].issued = number;
            self.registers[key].writing = Some(writing);
            self.count("writes");
        }
    }

    /// Begins a write, or sends again what is not answered.
    fn write_patiently(&mut self, key: usize) {
        let region = self.cluster.region_of(name(key).as_bytes());
        let Some(store) = self.likely_leader(region.id.0) else { return };
        let tired = self.rng.random_bool(0.3);
        let register = &mut self.registers[key];
        let writing = match &mut register.writing {
            None => {
                register.issued += 1;
                *self.counts.entry("writes").or_default() += 1;
                register.writing.insert(Writing {
                    number: register.issued,
                    answer: None,
                    region: region.id.0,
                    tag: None,
                    unknown: false,
                })
            }
            Some(writing) if writing.answer.is_none() => writing,
            Some(writing) if tired => {
                // Nobody waits for that attempt any more, but it is not undone.
                writing.answer = None;
                writing.unknown = true;
                writing
            }
            Some(_) => return,
        };
        if self.writers == Writers::Patient && writing.region != region.id.0 && writing.unknown {
            // Another log: what this one applied is not known there.
            let number = writing.number;
            register.writing = None;
            register.abandoned.insert(number);
            return self.count("abandoned");
        }
        if self.writers == Writers::Patient
            && (writing.tag.is_none() || writing.region != region.id.0)
        {
            self.next_tag += 1;
            let horizon = self.horizons.get(&region.id.0).copied().unwrap_or_default();
            writing.tag = Some(self.cluster.tag(self.next_tag, horizon));
        }
        writing.region = region.id.0;
        let context = RequestContext { tag: writing.tag, ..Cluster::context(&region) };
        let request = HeldBack { region, context, key, number: writing.number };
        let luck = self.rng.random_range(0..100);
        if luck < 25 {
            // The attempt is somewhere on its way when its sender gives up.
            writing.unknown = true;
            self.hold_back(request);
            return self.count("held back");
        }
        let HeldBack { region, number, .. } = &request;
        let sent =
            self.cluster.start_put_with(store, region, context, &name(key), &number.to_string());
        if let Ok(answer) = sent {
            writing.answer = Some(answer);
            if luck < 40 {
                // The same arrives once more, some day.
                self.hold_back(request);
                self.count("doubled");
            }
        }
    }

    fn hold_back(&mut self, request: HeldBack) {
        if self.held_back.len() >= MAX_HELD_BACK {
            self.held_back.remove(0);
        }
        self.held_back.push(request);
    }

    /// A request reaches a store after its sender gave it up.
    fn arrive(&mut self, late: &HeldBack) {
        let Some(store) = self.likely_leader(late.region.id.0) else { return };
        let (key, number) = (name(late.key), late.number.to_string());
        let _ = self.cluster.start_put_with(store, &late.region, late.context, &key, &number);
        self.count("late arrivals");
    }

    fn read(&mut self, key: usize) {
        let region = self.cluster.region_of(name(key).as_bytes());
        let Some(store) = self.likely_leader(region.id.0) else { return };
        let replica_read = self.rng.random_bool(0.3);
        let context = RequestContext { replica_read, ..Cluster::context(&region) };
        let floor = self.registers[key].floor;
        let answer = self.cluster.start_read(store, &region, context);
        self.reads.push(Read { key, floor, answer });
    }

    /// Takes what has been answered.
    fn collect(&mut self) {
        for register in &mut self.registers {
            let Some(writing) = &mut register.writing else { continue };
            let Some(answer) = &mut writing.answer else { continue };
            let answer = match answer.try_recv() {
                Err(TryRecvError::Empty) => continue,
                Err(TryRecvError::Closed) => {
                    Err(RequestError::Undetermined(RegionId(writing.region)))
                }
                Ok(answer) => answer,
            };
            writing.answer = None;
            let horizon = self.horizons.entry(writing.region).or_default();
            match answer {
                Ok(done) => {
                    *horizon = done.index.max(*horizon);
                    register.floor = register.floor.max(writing.number);
                    register.writing = None;
                    *self.counts.entry("acknowledged").or_default() += 1;
                }
                // Unknown, or certainly not done: either way nobody waits any more.
                Err(_) if self.writers == Writers::Hasty => register.writing = None,
                Err(RequestError::Forgotten { applied, .. }) => {
                    *horizon = applied.max(*horizon);
                    writing.tag = None;
                    *self.counts.entry("forgotten").or_default() += 1;
                    if writing.unknown {
                        register.abandoned.insert(writing.number);
                        register.writing = None;
                    }
                }
                Err(RequestError::Undetermined(_)) => writing.unknown = true,
                Err(_) => {}
            }
        }
        let mut waiting = Vec::new();
        for mut read in std::mem::take(&mut self.reads) {
            match read.answer.try_recv() {
                Ok(Ok(snapshot)) => {
                    let key = name(read.key);
                    let found = value(&snapshot, &key).map_or(0, |text| text.parse().unwrap());
                    let register = &mut self.registers[read.key];
                    if !register.allows(read.floor, found) {
                        let (seed, floor, issued) = (self.seed, read.floor, register.issued);
                        self.violation.get_or_insert(format!(
                            "seed {seed}: {key} read as {found}, but {floor} was acknowledged before and {issued} is the last written"
                        ));
                    }
                    register.floor = found.max(register.floor);
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
        let Some(store) = self.likely_leader(region.id.0) else { return };
        let handle = self.cluster.store(store).handle.clone();
        let _ = handle.admin(region.id, region.epoch, admin).start();
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
        self.ask(&region, Admin::TransferLeader(Some(to.id)));
        self.count("transfers");
    }

    /// One sensible step: a learner where there is none, else promote or swap or remove.
    fn change_members(&mut self, key: usize) {
        let region = self.cluster.region_of(name(key).as_bytes());
        let voters = region.peers.iter().filter(|peer| peer.role == Role::Voter).count();
        let learner = region.peers.iter().find(|peer| peer.role == Role::Learner).copied();
        let free = (1..=STORES).find(|store| region.peer_on(StoreId(*store)).is_none());
        let any = region.peers[self.rng.random_range(0..region.peers.len())];
        let changes = match (learner, free) {
            (Some(learner), _) if voters < 3 => vec![PeerChange::AddVoter(learner.into())],
            (Some(learner), _) if self.rng.random_bool(0.7) && any.role == Role::Voter => {
                vec![PeerChange::AddVoter(learner.into()), PeerChange::AddLearner(any.into())]
            }
            (Some(learner), _) => vec![PeerChange::Remove(learner.into())],
            (None, Some(store)) => {
                let id = self.cluster.allocate();
                let learner = Peer { role: Role::Learner, ..peer(id, store) };
                vec![PeerChange::AddLearner(learner.into())]
            }
            (None, None) => vec![PeerChange::Remove(any.into())],
        };
        self.ask(&region, Admin::ChangePeers(changes));
        self.count("changes of members");
    }

    /// Everything heals; nothing that was acknowledged may be missing anywhere.
    fn conclude(mut self) -> Result<BTreeMap<&'static str, usize>, String> {
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
        for late in std::mem::take(&mut self.held_back) {
            self.arrive(&late);
            self.cluster.settle();
        }
        self.collect();
        for key in 0..KEYS {
            let found = self.cluster.get(&name(key)).map_or(0, |text| text.parse::<u64>().unwrap());
            let register = &self.registers[key];
            if !register.allows(register.floor, found) {
                let (seed, key, Register { issued, floor, .. }) = (self.seed, name(key), register);
                self.violation.get_or_insert(format!(
                    "seed {seed}: {key} ended as {found}; {floor} was acknowledged, {issued} written"
                ));
            }
        }
        if let Some(violation) = self.violation {
            return Err(violation);
        }
        self.replicas_agree();
        Ok(self.counts)
    }

    /// Every replica of every region holds what the region's leader holds.
    fn replicas_agree(&mut self) {
        let seed = self.seed;
        self.cluster.run_until(&format!("agreement (seed {seed})"), |cluster| {
            (0..KEYS).all(|key| {
                let key = name(key);
                let region = cluster.region_of(key.as_bytes());
                let Some(leader) = cluster.leader(region.id.0) else { return false };
                let expected = cluster.local(leader, &key);
                let settled = |role| matches!(role, Role::Voter | Role::Learner);
                let remembered = |cluster: &Cluster, store| {
                    let kv = cluster.store(store).handle.engine().clone();
                    remembered_records(&kv, region.id).unwrap()
                };
                let known = remembered(cluster, leader);
                region.peers.iter().all(|peer| {
                    settled(peer.role)
                        && cluster.region_on(peer.store.0, region.id.0).as_ref() == Some(&region)
                        && cluster.local(peer.store.0, &key) == expected
                        && remembered(cluster, peer.store.0) == known
                })
            })
        });
    }
}

/// The seeds to run: those that were asked for, or so many.
fn seeds(usual: u64) -> std::ops::Range<u64> {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    match number("ESKER_STORE_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("ESKER_STORE_SEEDS").unwrap_or(usual),
    }
}

fn history(seed: u64, writers: Writers) -> Result<BTreeMap<&'static str, usize>, String> {
    let mut chaos = Chaos::new(seed, writers);
    for _ in 0..ACTIONS {
        chaos.act();
        if let Some(violation) = chaos.violation {
            return Err(violation);
        }
    }
    chaos.conclude()
}

fn histories(writers: Writers) -> BTreeMap<&'static str, usize> {
    let mut totals = BTreeMap::<&str, usize>::new();
    for seed in seeds(SEEDS) {
        for (what, count) in
            history(seed, writers).unwrap_or_else(|violation| panic!("{violation}"))
        {
            *totals.entry(what).or_default() += count;
        }
    }
    println!("{totals:?}");
    totals
}

#[test]
fn histories_under_everything_at_once_are_linearizable_and_lose_nothing() {
    let totals = histories(Writers::Hasty);
    assert!(totals["acknowledged"] * 4 > totals["writes"], "most writes failed: {totals:?}");
}

#[test]
fn histories_whose_writes_are_sent_again_and_arrive_late_are_so_too() {
    let totals = histories(Writers::Patient);
    assert!(totals["acknowledged"] * 2 > totals["writes"], "most writes failed: {totals:?}");
    let whole = seeds(SEEDS).count() as u64 >= SEEDS;
    for fault in ["held back", "doubled", "late arrivals", "forgotten", "abandoned"] {
        assert!(!whole || totals.contains_key(fault), "{fault} never happened: {totals:?}");
    }
}

#[test]
fn the_same_histories_without_tags_lose_writes_that_were_acknowledged() {
    let found = (0..20).filter_map(|seed| history(seed, Writers::Careless).err()).count();
    assert!(found >= 5, "only {found} of 20 histories showed it");
}
