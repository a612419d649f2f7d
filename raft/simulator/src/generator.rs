//! Chooses at random what happens next in a simulated world, from one seed.
//!
//! A [`Generator`] keeps an agenda of what is due when, in the world's time: each message's
//! arrival, each disk's and each machine's progress, clients, and faults. It looks at the world and
//! chooses the next [`Action`]. It changes nothing itself, so that the same actions make the same
//! run without it.

mod fault;
mod profile;

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

use esker_raft::{Configuration, LogIndex, PeerId};
use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use super::action::Action;
use super::setup::{Setup, TRUE_RATE};
use super::story::padded;
use super::world::{Kind, Posted, World};

use profile::{MICROSECOND, Profile};
pub use profile::{MILLISECOND, Theme};

/// An entry of the agenda.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Due {
    /// A message's fate.
    Arrive {
        from: usize,
        to: usize,
        serial: u64,
        fate: Fate,
    },
    /// A disk, a machine or an installation makes progress. The number is the node's incarnation,
    /// so that a crash cancels the work.
    Disk(usize, u64),
    Machine(usize, u64),
    Install(usize, u64),
    Clients,
    Fault,
    Crash(usize),
    /// A crash in which no write under way reaches the disk.
    CrashEmpty(usize),
    Restart(usize),
    Release(usize),
    Campaign(usize),
    /// Proposals at the current leader.
    Write(u32),
    Read(usize),
    /// The end of this partition.
    Heal(u64),
    /// A later act of a trap.
    LeaseTrap(usize),
    LoyaltyTrap {
        leader: usize,
        candidate: usize,
        act: u8,
    },
    DeposedTrap(Deposed, u8),
    /// The end of this broken link.
    Mend(u64),
}

/// The peers in the scheme of [`fault::Fault::DeposedTrap`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Deposed {
    /// The peer that leads before, and again afterwards.
    first: usize,
    /// The peer that leads in between, and does not learn that it was deposed.
    deposed: usize,
    /// The peer that follows the deposed leader to the end.
    follower: usize,
}

/// What becomes of a message.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Fate {
    Arrives { twice: bool, from_leader: bool },
    Lost,
}

/// What is under way at a node.
#[derive(Clone, Default)]
struct Work {
    incarnation: u64,
    disk: bool,
    machine: bool,
    install: bool,
    /// The core's next deadline, and when it will be ticked.
    deadline: Option<u64>,
    tick_at: Option<u64>,
    /// When the node last heard from a leader.
    heard: u64,
    /// Until then the node gets no ticks.
    stalled: u64,
    /// Until then the node's disk or its machine makes no progress.
    disk_stalled: u64,
    machine_stalled: u64,
    led: bool,
}

/// Chooses what happens.
pub struct Generator {
    random: ChaCha8Rng,
    setup: Setup,
    profile: Profile,
    agenda: BinaryHeap<Reverse<(u64, u64, Due)>>,
    entered: u64,
    /// What happens now, before anything else.
    at_once: VecDeque<Action>,
    work: Vec<Work>,
    /// Whether messages from each node to each are cut off.
    cut: Vec<bool>,
    /// The number of the current partition, and when it ends.
    partition: u64,
    heals_at: u64,
    /// Messages that meet a partition wait for its end.
    hoard: bool,
    /// A link that is cut for long, beside any partition, and the number of such links so far.
    broken: Option<(usize, usize)>,
    broken_links: u64,
    /// The earliest time at which appends from each node to each arrive.
    late_appends: Vec<u64>,
    /// Until then no other fault disturbs a scheme.
    scheming: u64,
    deposed: Option<Deposed>,
    /// Clients are silent until then.
    silent: u64,
    /// The next vote makes its voter crash.
    crash_voter: bool,
    /// The next message of this kind makes its sender crash.
    crash_sender: Option<Kind>,
    /// The members that each peer knew at the last look.
    known: Vec<Configuration>,
    /// Whether each peer was ever meant to be a witness, and so never has data again.
    tainted: Vec<bool>,
    ids: u64,
    recovering: bool,
    pub partitions: u64,
    pub schemes: u64,
}

/// Makes a seed's cluster and its generator.
pub fn begin(seed: u64, theme: Option<Theme>) -> (Setup, Generator) {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let themes = Theme::ALL.len() as u64;
    let theme = theme.unwrap_or(Theme::ALL[(seed % themes) as usize]);
    let setup = profile::setup(&mut random, theme);
    let profile = profile::profile(&mut random, theme, setup.peers.len());
    let generator = Generator::new(random, setup.clone(), profile);
    (setup, generator)
}

impl Generator {
    fn new(random: ChaCha8Rng, setup: Setup, profile: Profile) -> Generator {
        let nodes = setup.peers.len();
        let tainted = setup.peers.iter().map(|peer| setup.members.is_witness(peer.id)).collect();
        let mut generator = Generator {
            random,
            setup,
            profile,
            agenda: BinaryHeap::new(),
            entered: 0,
            at_once: VecDeque::new(),
            work: vec![Work::default(); nodes],
            cut: vec![false; nodes * nodes],
            partition: 0,
            heals_at: 0,
            hoard: false,
            broken: None,
            broken_links: 0,
            late_appends: vec![0; nodes * nodes],
            scheming: 0,
            deposed: None,
            silent: 0,
            crash_voter: false,
            crash_sender: None,
            known: vec![Configuration::default(); nodes],
            tainted,
            ids: 0,
            recovering: false,
            partitions: 0,
            schemes: 0,
        };
        generator.enter(0, Due::Clients);
        generator.enter(30 * MILLISECOND, Due::Fault);
        generator
    }

    /// Makes a generator without faults, for the recovery at the end: all peers come back, all
    /// partitions end, and disks are fast. One link may stay cut.
    pub fn calm(
        seed: u64,
        setup: &Setup,
        world: &World,
        broken: Option<(usize, usize)>,
    ) -> Generator {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let nodes = setup.peers.len();
        let mut profile = profile::profile(&mut random, Theme::Leases, nodes);
        profile.loss = 0;
        profile.doubled = 0;
        profile.late_answers = 0;
        profile.greeting = 0;
        profile.tick_lateness = 1;
        profile.machine.fill((10, 150));
        profile.compacts = 0;
        profile.change_restarts = 0;
        let mut calm = Generator::new(random, setup.clone(), profile);
        calm.recovering = true;
        calm.broken = broken;
        calm.agenda.clear();
        for from in 0..nodes {
            for to in 0..nodes {
                for parcel in world.queue(from, to) {
                    let fate = Fate::Arrives { twice: false, from_leader: false };
                    let due = calm.soon(world, MILLISECOND);
                    calm.enter(due, Due::Arrive { from, to, serial: parcel.serial, fate });
                }
            }
            if !world.nodes[from].is_up() {
                calm.at_once.push_back(Action::Restart(world.nodes[from].id));
            }
            if world.is_held(from) {
                calm.at_once.push_back(Action::Release(world.nodes[from].id));
            }
            calm.look(world, from);
        }
        calm
    }

    fn enter(&mut self, at: u64, due: Due) {
        self.entered += 1;
        self.agenda.push(Reverse((at, self.entered, due)));
    }

    fn chance(&mut self, of_a_thousand: u32) -> bool {
        of_a_thousand > 0 && self.random.random_range(0..1000) < of_a_thousand
    }

    fn among(&mut self, (low, high): (u64, u64)) -> u64 {
        self.random.random_range(low..=high) * MICROSECOND
    }

    /// A random time from now on, at most `most` later.
    fn soon(&mut self, world: &World, most: u64) -> u64 {
        world.now() + self.random.random_range(0..=most / MICROSECOND) * MICROSECOND
    }

    fn any(&mut self) -> usize {
        self.random.random_range(0..self.work.len())
    }

    fn id(&self, at: usize) -> PeerId {
        self.setup.peers[at].id
    }

    /// Chooses what happens next.
    pub fn next(&mut self, world: &World) -> Action {
        loop {
            if let Some(action) = self.at_once.pop_front() {
                return action;
            }
            let ticks = self.work.iter().enumerate();
            let tick = ticks.filter_map(|(at, work)| work.tick_at.map(|due| (due, at))).min();
            let next = self.agenda.peek().map(|Reverse((due, ..))| *due);
            let due = [tick.map(|(due, _)| due), next].into_iter().flatten().min();
            let Some(due) = due else { return Action::Pass(MILLISECOND) };
            if due > world.now() {
                return Action::Pass(due - world.now());
            }
            match tick {
                Some((at, node)) if at == due => {
                    self.work[node].tick_at = None;
                    self.work[node].deadline = None;
                    return Action::Tick(self.id(node));
                }
                _ => {
                    let Some(Reverse((_, _, due))) = self.agenda.pop() else { continue };
                    self.happens(world, due);
                }
            }
        }
    }

    /// Plans what follows from an action that was just executed.
    pub fn observe(&mut self, world: &mut World, action: &Action) {
        let mut posted = std::mem::take(&mut world.posted);
        for message in posted.drain(..) {
            self.dispatch(world, &message);
        }
        world.posted = posted;
        let Some(at) = action.peer().and_then(|peer| world.at(peer)) else { return };
        if matches!(action, Action::Apply { .. }) {
            self.after_applying(world, at);
        }
        if matches!(action, Action::Crash { .. }) {
            let incarnation = self.work[at].incarnation + 1;
            self.work[at] = Work { incarnation, ..Work::default() };
        }
        self.look(world, at);
        if let Action::Deliver { from, .. } = action
            && let Some(from) = world.at(*from)
        {
            self.look(world, from);
        }
    }

    /// Plans what may follow once something is applied: the driver drops the log, or crashes.
    fn after_applying(&mut self, world: &World, at: usize) {
        if self.chance(self.profile.compacts) {
            let index = world.nodes[at].machine.index;
            self.at_once.push_back(Action::Compact { peer: self.id(at), index });
        }
        let members = &world.nodes[at].machine.configuration;
        if self.known[at] == *members {
            return;
        }
        self.known[at] = members.clone();
        if self.chance(self.profile.change_restarts * 10) {
            if self.random.random_bool(0.7) {
                self.at_once.push_back(Action::Save(self.id(at)));
            }
            self.crash(world, at);
            self.at_once.push_back(Action::Restart(self.id(at)));
            self.at_once.push_back(Action::Campaign(self.id(at)));
        }
    }

    /// Plans what a node has to do.
    fn look(&mut self, world: &World, at: usize) {
        let node = &world.nodes[at];
        if !node.is_up() {
            self.work[at].tick_at = None;
            self.work[at].deadline = None;
            return;
        }
        let incarnation = self.work[at].incarnation;
        if node.writes_under_way() > 0 && !self.work[at].disk {
            self.work[at].disk = true;
            let due = world.now() + self.among(self.profile.disk[at]);
            let due = due.max(self.work[at].disk_stalled);
            self.enter(due, Due::Disk(at, incarnation));
        }
        if node.applies_under_way() > 0 && !self.work[at].machine {
            self.work[at].machine = true;
            let due = world.now() + self.among(self.profile.machine[at]);
            let due = due.max(self.work[at].machine_stalled);
            self.enter(due, Due::Machine(at, incarnation));
        }
        if node.may_install() && !self.work[at].install {
            self.work[at].install = true;
            let due = world.now() + 4 * self.among(self.profile.machine[at]);
            self.enter(due, Due::Install(at, incarnation));
        }
        let deadline = world.deadline(at);
        if deadline != self.work[at].deadline {
            self.work[at].deadline = deadline;
            let late = self.random.random_range(0..self.profile.tick_lateness) * MICROSECOND;
            let stalled = self.work[at].stalled;
            self.work[at].tick_at = deadline.map(|due| (due + late).max(stalled).max(world.now()));
        }
        let leads = node.leads();
        if leads && !self.work[at].led {
            let scheme = self.deposed.filter(|scheme| scheme.deposed == at);
            if let Some(scheme) = scheme {
                self.depose(world, scheme);
            } else if world.now() >= self.scheming && self.chance(self.profile.greeting * 10) {
                self.greet(world, at);
            }
        }
        self.work[at].led = leads;
    }

    /// Decides what becomes of a message that was just sent.
    fn dispatch(&mut self, world: &World, posted: &Posted) {
        let (Some(from), Some(to)) = (world.at(posted.from), world.at(posted.to)) else { return };
        let answers = matches!(
            posted.kind,
            Kind::Vote
                | Kind::VoteGranted
                | Kind::Accepted
                | Kind::HeartbeatReply
                | Kind::TimeoutNow
        );
        let late = self.profile.late + if answers { self.profile.late_answers } else { 0 };
        let delay = if self.chance(late) {
            self.random.random_range(0..self.profile.latest * 1000) * MICROSECOND
        } else {
            self.among(self.profile.delay)
        };
        let fate = if self.chance(self.profile.loss) {
            Fate::Lost
        } else {
            let from_leader =
                matches!(posted.kind, Kind::Append | Kind::Heartbeat | Kind::Snapshot);
            Fate::Arrives { twice: self.chance(self.profile.doubled), from_leader }
        };
        let mut due = world.now() + delay;
        if posted.kind == Kind::Append {
            let late_until = self.late_appends[from * self.work.len() + to];
            if world.now() < late_until {
                due = late_until + delay;
            }
        }
        self.enter(due, Due::Arrive { from, to, serial: posted.serial, fate });
        if self.crash_sender == Some(posted.kind) {
            self.crash_sender = None;
            self.enter(world.now(), Due::CrashEmpty(from));
            let away = profile::pick(&mut self.random, &[MICROSECOND, 5 * MILLISECOND]);
            let back = self.soon(world, away) + MICROSECOND;
            self.enter(back, Due::Restart(from));
        }
        if posted.kind == Kind::VoteGranted && std::mem::take(&mut self.crash_voter) {
            self.enter(world.now(), Due::Crash(from));
            let away = profile::pick(&mut self.random, &[MICROSECOND, 5 * MILLISECOND]);
            let back = self.soon(world, away) + MICROSECOND;
            self.enter(back, Due::Restart(from));
        }
    }

    fn happens(&mut self, world: &World, due: Due) {
        match due {
            Due::Arrive { from, to, serial, fate } => self.arrive(world, from, to, serial, fate),
            Due::Disk(at, incarnation)
                if incarnation == self.work[at].incarnation
                    && world.now() < self.work[at].disk_stalled =>
            {
                self.enter(self.work[at].disk_stalled, Due::Disk(at, incarnation));
            }
            Due::Machine(at, incarnation)
                if incarnation == self.work[at].incarnation
                    && world.now() < self.work[at].machine_stalled =>
            {
                self.enter(self.work[at].machine_stalled, Due::Machine(at, incarnation));
            }
            Due::Disk(at, incarnation) if incarnation == self.work[at].incarnation => {
                self.work[at].disk = false;
                let all = world.nodes[at].writes_under_way();
                let count = if self.chance(700) { all } else { self.some(all) };
                self.at_once.push_back(Action::Sync { peer: self.id(at), count });
            }
            Due::Machine(at, incarnation) if incarnation == self.work[at].incarnation => {
                self.work[at].machine = false;
                let all = world.nodes[at].applies_under_way();
                let count = if self.chance(700) { all } else { self.some(all) };
                self.at_once.push_back(Action::Apply { peer: self.id(at), count });
            }
            Due::Install(at, incarnation) if incarnation == self.work[at].incarnation => {
                self.work[at].install = false;
                self.at_once.push_back(Action::Install(self.id(at)));
            }
            Due::Disk(..) | Due::Machine(..) | Due::Install(..) => {}
            Due::Clients => {
                let next = self.soon(world, self.profile.clients * MICROSECOND);
                self.enter(next + MICROSECOND, Due::Clients);
                if world.now() >= self.silent {
                    self.clients(world);
                }
            }
            Due::Fault => {
                let next = self.soon(world, self.profile.faults * MILLISECOND);
                self.enter(next + MICROSECOND, Due::Fault);
                if world.now() >= self.scheming {
                    self.misfortune(world);
                }
            }
            Due::Crash(at) => self.crash(world, at),
            Due::CrashEmpty(at) => self.crash_empty(at),
            Due::Restart(at) => self.at_once.push_back(Action::Restart(self.id(at))),
            Due::Release(at) => self.at_once.push_back(Action::Release(self.id(at))),
            Due::Campaign(at) => self.at_once.push_back(Action::Campaign(self.id(at))),
            Due::Write(count) => {
                if let Some(at) = world.leader() {
                    (0..count).for_each(|_| self.write(at));
                }
            }
            Due::Read(at) => self.read(at),
            Due::Heal(partition) => {
                if partition == self.partition {
                    self.heal();
                }
            }
            Due::LeaseTrap(leader) => self.spring_lease_trap(world, leader),
            Due::LoyaltyTrap { leader, candidate, act: 0 } => {
                self.begin_loyalty_trap(world, leader, candidate);
            }
            Due::LoyaltyTrap { leader, candidate, .. } => {
                self.spring_loyalty_trap(world, leader, candidate);
            }
            Due::DeposedTrap(scheme, act) => self.deposed_trap_goes_on(world, scheme, act),
            Due::Mend(link) => {
                if link == self.broken_links {
                    self.broken = None;
                }
            }
        }
    }

    fn some(&mut self, all: usize) -> usize {
        if all == 0 { 0 } else { self.random.random_range(1..=all) }
    }

    fn arrive(&mut self, world: &World, from: usize, to: usize, serial: u64, fate: Fate) {
        let queue = world.queue(from, to);
        let Ok(at) = queue.binary_search_by_key(&serial, |parcel| parcel.serial) else { return };
        let (from_id, to_id) = (self.id(from), self.id(to));
        let lost = Action::Drop { from: from_id, to: to_id, at };
        let Fate::Arrives { twice, from_leader } = fate else {
            self.at_once.push_back(lost);
            return;
        };
        let broken = self.broken == Some((from.min(to), from.max(to)));
        if broken || self.cut[from * self.work.len() + to] {
            if self.hoard && !broken {
                // Messages that are this late arrive soon after the partition ends, and out of
                // order.
                let wait = self.random.random_range(1..20_000) * MICROSECOND;
                let due = self.heals_at.max(world.now()) + wait;
                self.enter(due, Due::Arrive { from, to, serial, fate });
            } else {
                self.at_once.push_back(lost);
            }
            return;
        }
        if twice {
            self.at_once.push_back(Action::Again { from: from_id, to: to_id, at });
        }
        if from_leader {
            self.work[to].heard = world.now();
        }
        self.at_once.push_back(Action::Deliver { from: from_id, to: to_id, at });
    }

    fn write(&mut self, at: usize) {
        self.ids += 1;
        let size = if self.random.random_bool(0.5) { 0 } else { self.random.random_range(0..200) };
        let command = padded(&format!("w{}", self.ids), size);
        self.at_once.push_back(Action::Propose { peer: self.id(at), command });
    }

    fn read(&mut self, at: usize) {
        self.ids += 1;
        self.at_once.push_back(Action::Read { peer: self.id(at), id: self.ids });
    }

    fn lease_read(&mut self, at: usize) {
        self.at_once.push_back(Action::LeaseRead(self.id(at)));
    }

    fn clients(&mut self, world: &World) {
        let leaders: Vec<_> = (0..self.work.len()).filter(|at| world.nodes[*at].leads()).collect();
        // Clients ask a peer that believes to lead, above all if it is deposed.
        let at = match leaders.len() {
            0 => self.any(),
            count if self.random.random_bool(0.8) => leaders[self.random.random_range(0..count)],
            _ => self.any(),
        };
        if self.random.random_range(0..100) >= self.profile.reads {
            let count =
                if self.random.random_bool(0.2) { self.random.random_range(2..5) } else { 1 };
            (0..count).for_each(|_| self.write(at));
            return;
        }
        if leaders.len() > 1 {
            for at in leaders {
                self.read(at);
                self.lease_read(at);
            }
        } else if self.random.random_bool(0.3) {
            self.lease_read(at);
        } else {
            self.read(at);
        }
    }

    /// When a node's promise ends to the leader that it last heard from.
    fn loyal_until(&self, at: usize) -> u64 {
        let timeout = self.setup.config.election_timeout.as_nanos() as u64;
        let rate = self.setup.peers[at].rate;
        (self.work[at].heard + timeout * TRUE_RATE / rate) / MICROSECOND * MICROSECOND + MICROSECOND
    }

    /// Whether the faults have ended.
    pub fn is_recovering(&self) -> bool {
        self.recovering
    }

    /// An index some way behind what a node has applied.
    fn behind(&mut self, world: &World, at: usize) -> LogIndex {
        let applied = world.nodes[at].machine.index.0;
        LogIndex(applied.saturating_sub(self.random.random_range(0..10)))
    }
}
