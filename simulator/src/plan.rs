//! What a seed decides: the cluster, its clients, and what happens to it.

use std::collections::BTreeSet;
use std::fmt;
use std::time::Duration;

use rand::seq::IndexedRandom as _;
use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use crate::disk::Crash;
use crate::network::{Host, Quality};

/// One client, which does one thing over and over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Actor {
    Put,
    Get,
    Swap,
    Delete,
    DeleteRange,
    Batch,
    Scan,
    TimeToLive,
    /// Draws timestamps and ids from placement.
    Oracle,
    /// Reads from any replica.
    FollowerRead,
}

impl Actor {
    const ALL: [Actor; 10] = [
        Actor::Put,
        Actor::Get,
        Actor::Swap,
        Actor::Delete,
        Actor::DeleteRange,
        Actor::Batch,
        Actor::Scan,
        Actor::TimeToLive,
        Actor::Oracle,
        Actor::FollowerRead,
    ];
}

/// One thing that happens to the cluster, or that an operator does to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    Crash {
        host: Host,
        crash: Crash,
        down_ms: u64,
    },
    /// The machine loses power at one of its next writes to the disk: after so many.
    CutPower {
        host: Host,
        syncs: u32,
    },
    /// Every machine loses power at once.
    Blackout {
        down_ms: u64,
    },
    /// Messages do not pass in one direction.
    Cut {
        from: Host,
        to: Host,
    },
    /// The host is cut off from all others, in both directions.
    Isolate {
        host: Host,
    },
    Heal,
    /// All connections of a host end.
    HangUp {
        host: Host,
    },
    StallDisk {
        host: Host,
        ms: u64,
    },
    StallApply {
        host: Host,
        ms: u64,
    },
    StallWorkers {
        host: Host,
        ms: u64,
    },
    /// The log cannot be synced any more, until the node was started again.
    FailDisk {
        host: Host,
    },
    LoseDisk {
        host: Host,
        down_ms: u64,
    },
    StepClock {
        host: Host,
        ahead_ms: i64,
    },
    Weather(Quality),
    AddStore,
    Split {
        place: usize,
    },
    Transfer {
        place: usize,
        choice: usize,
    },
    AddReplica {
        place: usize,
        choice: usize,
    },
    RemoveReplica {
        place: usize,
        choice: usize,
    },
    SwapReplicas {
        place: usize,
        choice: usize,
    },
}

/// The kinds of faults, so that each seed has some of them and not others: a run in which
/// everything happens at once never comes to the rarer states.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Crashes,
    Blackouts,
    Cuts,
    Stalls,
    FailingDisks,
    LostDisks,
    Clocks,
    Weather,
    Splits,
    Transfers,
    Replicas,
}

impl Kind {
    const ALL: [Kind; 11] = [
        Kind::Crashes,
        Kind::Blackouts,
        Kind::Cuts,
        Kind::Stalls,
        Kind::FailingDisks,
        Kind::LostDisks,
        Kind::Clocks,
        Kind::Weather,
        Kind::Splits,
        Kind::Transfers,
        Kind::Replicas,
    ];
}

/// The farthest that a wall clock is set, in milliseconds.
pub const MAX_STEP_MS: i64 = 2_000;
/// How long the cluster is under faults.
const LENGTH_MS: u64 = 20_000;
/// The first moment of a fault: the cluster comes up in peace.
const PEACE_MS: u64 = 3_000;
/// A store that is added while the simulation runs comes after these.
pub const MAX_STORES: u32 = 6;

/// A whole run.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    pub seed: u64,
    pub members: u32,
    pub stores: u32,
    /// Places in the key space that have a key.
    pub places: usize,
    /// How many writes of clients each region remembers.
    pub remembered_writes: usize,
    /// So many programs are clients, each with several actors.
    pub programs: u32,
    pub quality: Quality,
    /// Each with its number.
    pub actors: Vec<(usize, Actor)>,
    /// By the millisecond at which they happen.
    pub faults: Vec<(u64, Fault)>,
    pub length_ms: u64,
    /// What is broken on purpose in all that is simulated.
    #[cfg(feature = "mutants")]
    pub bug: Option<esker_mutants::Bug>,
}

impl Plan {
    /// How far two wall clocks may be apart.
    pub fn skew(&self) -> Duration {
        /// What the drift of two clocks adds.
        const DRIFT_MS: u64 = 1_500;
        let is_set = |(_, fault): &(u64, Fault)| matches!(fault, Fault::StepClock { .. });
        let step = if self.faults.iter().any(is_set) { MAX_STEP_MS.unsigned_abs() } else { 0 };
        Duration::from_millis(2 * step + DRIFT_MS)
    }

    /// Whether a disk may be lost, so that no region may do with two voters.
    pub fn loses_disks(&self) -> bool {
        self.faults.iter().any(|(_, fault)| matches!(fault, Fault::LoseDisk { .. }))
    }

    pub fn of(seed: u64) -> Plan {
        let rng = &mut ChaCha8Rng::seed_from_u64(seed);
        let kinds: Vec<Kind> = Kind::ALL.into_iter().filter(|_| rng.random_bool(0.55)).collect();
        // Replicas that move need somewhere to go.
        let moves = kinds.iter().any(|kind| matches!(kind, Kind::Replicas | Kind::LostDisks));
        let stores = rng.random_range(if moves { 4 } else { 3 }..=5);
        let members = if rng.random_bool(0.5) { 3 } else { 1 };
        let places = rng.random_range(8..=16);
        let remembered_writes = [3, 20, 200, 1_000][rng.random_range(0..4)];
        let quality = quality(rng, false);
        // Each of most of them, and some twice.
        let mut actors: Vec<Actor> =
            Actor::ALL.into_iter().filter(|_| rng.random_bool(0.85)).collect();
        actors.extend([Actor::Put, Actor::Get, Actor::Oracle]);
        for _ in 0..rng.random_range(0..3) {
            actors.push(Actor::ALL[rng.random_range(0..Actor::ALL.len())]);
        }
        let programs = rng.random_range(2..=actors.len() as u32);
        let actors = actors.into_iter().enumerate().collect();
        let mut plan = Plan {
            seed,
            members,
            stores,
            places,
            remembered_writes,
            programs,
            quality,
            actors,
            faults: Vec::new(),
            length_ms: LENGTH_MS,
            #[cfg(feature = "mutants")]
            bug: None,
        };
        // Something to move before the faults begin.
        for at in [1_500, 2_000] {
            let place = rng.random_range(0..places);
            plan.faults.push((at, Fault::Split { place }));
        }
        let pace = rng.random_range(150..1_200);
        let mut at = PEACE_MS;
        while at < LENGTH_MS {
            at += rng.random_range(20..2 * pace);
            let Some(kind) = kinds.choose(rng) else { break };
            let faults = plan.draw(rng, *kind);
            plan.faults.extend(faults.into_iter().map(|(after, fault)| (at + after, fault)));
        }
        plan.faults.sort_by_key(|(at, _)| *at);
        plan
    }

    /// The same without some of the faults and actors, by their numbers. The others do what they
    /// did.
    pub fn without(mut self, faults: &BTreeSet<usize>, actors: &BTreeSet<usize>) -> Plan {
        let mut numbered = self.faults.drain(..).enumerate().collect::<Vec<_>>();
        numbered.retain(|(number, _)| !faults.contains(number));
        self.faults = numbered.into_iter().map(|(_, fault)| fault).collect();
        self.actors.retain(|(number, _)| !actors.contains(number));
        self
    }

    /// A store; sometimes the next one to be added, if it was.
    fn store(&self, rng: &mut ChaCha8Rng) -> Host {
        let added = u32::from(rng.random_bool(0.1));
        Host::store(rng.random_range(0..self.stores) + added)
    }

    /// The program that this actor is a part of.
    pub fn program(&self, actor: usize) -> u32 {
        actor as u32 % self.programs
    }

    /// Any machine, or a client's.
    fn anybody(&self, rng: &mut ChaCha8Rng) -> Host {
        match rng.random_bool(0.2) {
            true => Host::client(rng.random_range(0..self.programs)),
            false => self.host(rng),
        }
    }

    /// Any machine, mostly a store's.
    fn host(&self, rng: &mut ChaCha8Rng) -> Host {
        match rng.random_bool(0.75) {
            true => self.store(rng),
            false => Host::member(rng.random_range(0..self.members)),
        }
    }

    fn draw(&self, rng: &mut ChaCha8Rng, kind: Kind) -> Vec<(u64, Fault)> {
        let now = |fault| vec![(0, fault)];
        let place = rng.random_range(0..self.places);
        let choice = rng.random_range(0..1_000);
        match kind {
            Kind::Crashes => {
                let crash = if rng.random_bool(0.5) { Crash::Power } else { Crash::Process };
                let down_ms = rng.random_range(50..8_000);
                let host = self.host(rng);
                now(match rng.random_bool(0.4) {
                    true => Fault::CutPower { host, syncs: rng.random_range(0..6) },
                    false => Fault::Crash { host, crash, down_ms },
                })
            }
            // Each costs a start of every machine.
            Kind::Blackouts => match rng.random_bool(0.3) {
                true => now(Fault::Blackout { down_ms: rng.random_range(50..1_000) }),
                false => {
                    let down_ms = rng.random_range(50..8_000);
                    now(Fault::Crash { host: self.host(rng), crash: Crash::Power, down_ms })
                }
            },
            Kind::Cuts => {
                let healed = rng.random_range(200..4_000);
                let fault = match rng.random_range(0..4) {
                    0 => Fault::Isolate { host: self.anybody(rng) },
                    1 => Fault::HangUp { host: self.anybody(rng) },
                    _ => Fault::Cut { from: self.anybody(rng), to: self.anybody(rng) },
                };
                vec![(0, fault), (healed, Fault::Heal)]
            }
            Kind::Stalls => {
                let host = self.host(rng);
                let ms = rng.random_range(50..2_500);
                now(match rng.random_range(0..3) {
                    0 => Fault::StallDisk { host, ms },
                    1 => Fault::StallApply { host, ms },
                    _ => Fault::StallWorkers { host, ms },
                })
            }
            Kind::FailingDisks => now(Fault::FailDisk { host: self.host(rng) }),
            Kind::LostDisks => {
                let down_ms = rng.random_range(50..4_000);
                now(Fault::LoseDisk { host: self.store(rng), down_ms })
            }
            Kind::Clocks => {
                let ahead_ms = rng.random_range(-MAX_STEP_MS..=MAX_STEP_MS);
                now(Fault::StepClock { host: self.host(rng), ahead_ms })
            }
            Kind::Weather => now(Fault::Weather(quality(rng, true))),
            Kind::Splits => match rng.random_bool(0.1) {
                true => now(Fault::AddStore),
                false => now(Fault::Split { place }),
            },
            Kind::Transfers => now(Fault::Transfer { place, choice }),
            Kind::Replicas => now(match rng.random_range(0..3) {
                0 => Fault::AddReplica { place, choice },
                1 => Fault::RemoveReplica { place, choice },
                _ => Fault::SwapReplicas { place, choice },
            }),
        }
    }
}

fn quality(rng: &mut ChaCha8Rng, may_be_bad: bool) -> Quality {
    match may_be_bad && rng.random_bool(0.3) {
        true => {
            Quality { delay_ms: rng.random_range(20..150), loss_percent: rng.random_range(5..30) }
        }
        false => {
            Quality { delay_ms: rng.random_range(1..15), loss_percent: rng.random_range(0..3) }
        }
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Plan { seed, members, stores, places, quality, actors, faults, .. } = self;
        writeln!(
            f,
            "seed {seed}: {members} placement members, {stores} stores, {places} keys, {} writes \
             remembered",
            self.remembered_writes
        )?;
        writeln!(f, "at first {}", Fault::Weather(*quality))?;
        for (number, actor) in actors {
            writeln!(f, "client {} actor {number} {actor:?}", self.program(*number) + 1)?;
        }
        let whole = Plan::of(*seed);
        let numbers = whole.faults.iter().enumerate().filter(|(_, fault)| faults.contains(fault));
        for (number, (at, fault)) in numbers {
            writeln!(f, "fault {number:>3} at {:>2}.{:03} {fault}", at / 1_000, at % 1_000)?;
        }
        Ok(())
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::Crash { host, crash, down_ms } => {
                write!(f, "{host} crashes ({crash:?}) for {down_ms} ms")
            }
            Fault::CutPower { host, syncs } => {
                write!(f, "{host} loses power at its sync after the next {syncs}")
            }
            Fault::Blackout { down_ms } => write!(f, "all lose power for {down_ms} ms"),
            Fault::Cut { from, to } => write!(f, "nothing passes from {from} to {to}"),
            Fault::Isolate { host } => write!(f, "{host} is cut off"),
            Fault::Heal => f.write_str("the network is whole"),
            Fault::HangUp { host } => write!(f, "all connections of {host} end"),
            Fault::StallDisk { host, ms } => write!(f, "the disk of {host} stalls for {ms} ms"),
            Fault::StallApply { host, ms } => write!(f, "{host} does not apply for {ms} ms"),
            Fault::StallWorkers { host, ms } => {
                write!(f, "the workers of {host} stall for {ms} ms")
            }
            Fault::FailDisk { host } => write!(f, "the disk of {host} fails"),
            Fault::LoseDisk { host, down_ms } => {
                write!(f, "{host} loses its disk, and is down for {down_ms} ms")
            }
            Fault::StepClock { host, ahead_ms } => {
                write!(f, "the wall clock of {host} is {ahead_ms} ms ahead")
            }
            Fault::Weather(Quality { delay_ms, loss_percent }) => {
                write!(f, "messages take up to {delay_ms} ms, {loss_percent} % are lost")
            }
            Fault::AddStore => f.write_str("a store is added"),
            Fault::Split { place } => write!(f, "a split at place {place}"),
            Fault::Transfer { place, choice } => {
                write!(f, "the leader at place {place} is moved ({choice})")
            }
            Fault::AddReplica { place, choice } => {
                write!(f, "a replica is added at place {place} ({choice})")
            }
            Fault::RemoveReplica { place, choice } => {
                write!(f, "a replica is removed at place {place} ({choice})")
            }
            Fault::SwapReplicas { place, choice } => {
                write!(f, "a replica is exchanged at place {place} ({choice})")
            }
        }
    }
}
