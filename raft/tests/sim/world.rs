//! The peers, the network between them, their clocks, and what befalls them.

use std::collections::BTreeSet;
use std::time::Duration;

use bytes::Bytes;
use esker_raft::{
    ChangeStep, ConfChange, Config, Configuration, HardState, LeaveJoint, LogIndex, Message,
    MessageBody, PeerId, RoleKind, SnapshotOutcome, Term, Time,
};
use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use crate::checks::Checks;
use crate::cluster::{Disk, Event, Machine, Node, Settings};

const PEERS: u64 = 7;
const MILLISECOND: u64 = 1_000_000;

/// How likely each misfortune is, in one step, in thousandths; losses and
/// duplicates per message.
#[derive(Clone, Copy)]
pub struct Faults {
    loss: u32,
    duplicate: u32,
    long_delay: u32,
    partition: u32,
    crash: u32,
    change: u32,
    transfer: u32,
    compact: u32,
    campaign: u32,
}

impl Faults {
    pub const NONE: Faults = Faults {
        loss: 0,
        duplicate: 0,
        long_delay: 0,
        partition: 0,
        crash: 0,
        change: 0,
        transfer: 0,
        compact: 2,
        campaign: 0,
    };
    pub const NETWORK_AND_CRASHES: Faults = Faults {
        loss: 30,
        duplicate: 30,
        long_delay: 20,
        partition: 4,
        crash: 4,
        change: 0,
        transfer: 3,
        compact: 5,
        campaign: 2,
    };
    pub const EVERYTHING: Faults = Faults { change: 20, ..Faults::NETWORK_AND_CRASHES };
}

struct Parcel {
    due: u64,
    message: Message,
}

/// A clock that runs a little fast or slow and began at some other time.
struct Clock {
    offset: u64,
    /// Local nanoseconds per thousand of the world's.
    rate: u64,
}

pub struct World {
    random: ChaCha8Rng,
    faults: Faults,
    now: u64,
    nodes: Vec<Node>,
    clocks: Vec<Clock>,
    network: Vec<Parcel>,
    cut: BTreeSet<(PeerId, PeerId)>,
    next_command: u64,
    next_read: u64,
    /// How likely a disk finishes something in one step.
    disk_speed: f64,
    pub checks: Checks,
}

impl World {
    pub fn new(seed: u64, faults: Faults) -> World {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let voters = [1, 3, 3, 4, 5, 5][random.random_range(0..6)];
        let disk_speed = [0.05, 0.2, 0.5][random.random_range(0..3)];
        let configuration = Configuration::of_voters((1..=voters).map(PeerId));
        // Members are part of what a newcomer needs, so the log begins behind an
        // index that only a snapshot brings.
        let start = (LogIndex(1), Term(1));
        let machine = Machine { index: start.0, term: start.1, digest: 0, configuration };
        let hard_state = HardState { term: start.1, vote: None, commit: start.0 };
        let founder = Disk { hard_state, compacted: start, machine, ..Disk::default() };
        let config = Config {
            election_timeout: Duration::from_millis(100),
            heartbeat_interval: Duration::from_millis(20),
            max_append_bytes: [1, 200, 1 << 20][random.random_range(0..3)],
            max_inflight_messages: [1, 3, 64][random.random_range(0..3)],
            max_entry_cache_bytes: [0, 300, 1 << 20][random.random_range(0..3)],
            max_uncommitted_bytes: 4000,
            pre_vote: random.random_bool(0.8),
            ..Config::default()
        };
        let mut nodes = Vec::new();
        let mut clocks = Vec::new();
        for id in 1..=PEERS {
            let disk = if id <= voters { founder.clone() } else { Disk::default() };
            let offset = random.random_range(0..10_000) * MILLISECOND;
            // Within the 10 % that leases allow for, between any two clocks.
            clocks.push(Clock { offset, rate: random.random_range(960..=1040) });
            let priority = -i32::from(id == 2);
            let settings = Settings { config: config.clone(), priority, seed: random.random() };
            nodes.push(Node::create(PeerId(id), settings, disk, Time(offset)));
        }
        World {
            random,
            faults,
            now: 0,
            nodes,
            clocks,
            network: Vec::new(),
            cut: BTreeSet::new(),
            next_command: 0,
            next_read: 0,
            disk_speed,
            checks: Checks::default(),
        }
    }

    fn chance(&mut self, thousandths: u32) -> bool {
        self.random.random_range(0..1000) < thousandths
    }

    fn local(&self, at: usize) -> Time {
        let clock = &self.clocks[at];
        Time(clock.offset + self.now / 1000 * clock.rate)
    }

    fn any(&mut self) -> usize {
        self.random.random_range(0..self.nodes.len())
    }

    pub fn step(&mut self) {
        self.now += self.random.random_range(0..3 * MILLISECOND);
        self.misfortune();
        self.clients();
        self.deliver_due();
        for at in 0..self.nodes.len() {
            self.progress(at);
        }
    }

    /// Lets one peer do some of what it has to do, and looks at it.
    fn progress(&mut self, at: usize) {
        if !self.nodes[at].is_up() {
            return;
        }
        let now = self.local(at);
        if self.nodes[at].group().next_deadline().is_some_and(|deadline| deadline <= now) {
            self.nodes[at].group().tick(now);
        }
        self.collect(at);
        if self.random.random_bool(self.disk_speed) {
            let count = self.nodes[at].writes_under_way();
            let count = self.random.random_range(0..=count);
            self.nodes[at].finish_writes(now, count);
        }
        if self.random.random_bool(0.5) {
            let count = self.nodes[at].applies_under_way();
            let count = self.random.random_range(0..=count);
            self.nodes[at].apply(now, count);
        }
        if self.random.random_bool(0.2) {
            self.nodes[at].install(now);
        }
        if self.random.random_bool(0.05) {
            self.nodes[at].sync_machine();
        }
        self.collect(at);
    }

    fn collect(&mut self, at: usize) {
        let now = self.local(at);
        let node = &mut self.nodes[at];
        node.collect();
        let outgoing = std::mem::take(&mut node.outgoing);
        let events = std::mem::take(&mut node.events);
        for message in outgoing {
            self.post(message);
        }
        for event in events {
            if let Event::SnapshotWanted(peer) = event
                && let Some(message) = self.nodes[at].snapshot_for(peer)
            {
                self.post(message);
            }
            self.checks.look(&self.nodes[at], &event);
        }
        self.checks.inspect(&self.nodes[at], now);
    }

    fn post(&mut self, message: Message) {
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        let copies = 1 + usize::from(self.chance(self.faults.duplicate));
        for _ in 0..copies {
            let slow = self.chance(self.faults.long_delay);
            let most = if slow { 400 * MILLISECOND } else { 6 * MILLISECOND };
            let due = self.now + self.random.random_range(0..most);
            let message = Message::decode(Bytes::from(bytes.clone()));
            let message = message.expect("what was encoded can be decoded");
            self.network.push(Parcel { due, message });
        }
    }

    fn deliver_due(&mut self) {
        let mut at = 0;
        while at < self.network.len() {
            if self.network[at].due > self.now {
                at += 1;
                continue;
            }
            // Swapping the last one in reorders what is under way.
            let message = self.network.swap_remove(at).message;
            self.deliver(message);
        }
    }

    fn deliver(&mut self, message: Message) {
        let (from, to) = (message.from, message.to);
        let snapshot = matches!(message.body, MessageBody::InstallSnapshot { .. });
        let target = usize::try_from(to.0 - 1).expect("a small id");
        let lost = self.cut.contains(&(from, to))
            || !self.nodes[target].is_up()
            || self.chance(self.faults.loss);
        if !lost {
            let now = self.local(target);
            let taken = self.nodes[target].group().step(now, message);
            taken.unwrap_or_else(|error| panic!("peer {to} refused a message: {error}"));
            self.collect(target);
        }
        let source = usize::try_from(from.0 - 1).expect("a small id");
        if snapshot && let Some(group) = &mut self.nodes[source].group {
            let outcome = if lost { SnapshotOutcome::Failed } else { SnapshotOutcome::Delivered };
            group.snapshot_sent(to, outcome);
        }
    }

    fn clients(&mut self) {
        if self.chance(300) {
            let at = self.any();
            let now = self.local(at);
            self.next_command += 1;
            let size = self.random.random_range(0..200);
            let mut command = self.next_command.to_le_bytes().to_vec();
            command.resize(8 + size, 0);
            if let Some(group) = &mut self.nodes[at].group {
                let _ = group.propose(now, Bytes::from(command));
            }
        }
        if self.chance(100) {
            let at = self.any();
            let now = self.local(at);
            if let Some(group) = &mut self.nodes[at].group {
                self.next_read += 1;
                if group.read_index(now, self.next_read).is_ok() {
                    self.checks.read_begins(self.next_read);
                }
            }
        }
    }

    fn misfortune(&mut self) {
        let at = self.any();
        let now = self.local(at);
        if self.chance(self.faults.partition) {
            self.partition();
        }
        if self.chance(self.faults.crash) {
            self.crash_or_restart(at);
        }
        // Who is down comes back sooner or later.
        if !self.nodes[at].is_up() && self.chance(30) {
            self.nodes[at].restart(now);
        }
        if self.chance(self.faults.transfer)
            && let Some(group) = &mut self.nodes[at].group
        {
            let to = PeerId(self.random.random_range(1..=PEERS));
            let _ = group.transfer_leader(now, Some(to));
        }
        if self.chance(self.faults.campaign)
            && let Some(group) = &mut self.nodes[at].group
        {
            group.campaign(now);
        }
        if self.chance(self.faults.compact) && self.nodes[at].is_up() {
            let applied = self.nodes[at].machine.index.0;
            let index = applied.saturating_sub(self.random.random_range(0..10));
            self.nodes[at].compact(LogIndex(index));
        }
        if self.chance(self.faults.change) {
            self.change_members();
        }
    }

    fn partition(&mut self) {
        self.cut.clear();
        if self.random.random_bool(0.4) {
            return;
        }
        let one_way = self.random.random_bool(0.3);
        let side: Vec<bool> = (0..PEERS).map(|_| self.random.random_bool(0.5)).collect();
        for (from, out) in (1..=PEERS).zip(&side) {
            for (to, other) in (1..=PEERS).zip(&side) {
                if out != other && (!one_way || *out) {
                    self.cut.insert((PeerId(from), PeerId(to)));
                }
            }
        }
    }

    fn crash_or_restart(&mut self, at: usize) {
        if self.nodes[at].is_up() {
            let kept = self.nodes[at].writes_under_way();
            let kept = self.random.random_range(0..=kept);
            self.nodes[at].crash(kept);
            self.checks.summary.crashes += 1;
            self.checks.forget_commit(PeerId(at as u64 + 1));
        } else {
            let now = self.local(at);
            self.nodes[at].restart(now);
        }
    }

    /// Every leader, real or deposed, is asked for some change.
    fn change_members(&mut self) {
        for at in 0..self.nodes.len() {
            let now = self.local(at);
            let mut steps = Vec::new();
            for peer in (1..=PEERS).map(PeerId) {
                match self.random.random_range(0..12) {
                    0 | 1 => steps.push(ChangeStep::AddVoter(peer)),
                    2 => steps.push(ChangeStep::AddLearner(peer)),
                    3 => steps.push(ChangeStep::Remove(peer)),
                    _ => {}
                }
            }
            let leave =
                if self.random.random_bool(0.7) { LeaveJoint::Auto } else { LeaveJoint::Explicit };
            let Some(group) = &mut self.nodes[at].group else { continue };
            if group.role() != RoleKind::Leader {
                continue;
            }
            if group.configuration().is_joint() {
                steps.clear();
            }
            let _ = group.propose_change(now, ConfChange { steps, leave, context: Bytes::new() });
        }
    }

    /// The faults end. The group must find a leader, end its changes, commit what
    /// is proposed, and bring every member to the same state.
    pub fn settle(&mut self) {
        self.faults = Faults::NONE;
        self.cut.clear();
        for at in 0..self.nodes.len() {
            let now = self.local(at);
            if !self.nodes[at].is_up() {
                self.nodes[at].restart(now);
            }
        }
        let mut proposed = None;
        for _ in 0..20_000 {
            self.step();
            let Some(at) = self.leader() else { continue };
            let now = self.local(at);
            let group = self.nodes[at].group();
            if group.configuration().is_joint() && !group.has_pending_change() {
                let _ = group.propose_change(now, ConfChange::default());
                continue;
            }
            let commit = group.commit_index();
            let target = *proposed.get_or_insert(LogIndex(commit.0 + 5));
            if self.members_have(at, target) {
                return;
            }
        }
        let state: Vec<String> = self.nodes.iter().map(|node| self.describe(node)).collect();
        panic!("the group did not settle:\n{}", state.join("\n"));
    }

    fn describe(&self, node: &Node) -> String {
        let Some(group) = &node.group else { return format!("{}: down", node.id) };
        format!(
            "{}: {:?} term {} leader {:?} commit {} applied {} last {} {:?} {:?}",
            node.id,
            group.role(),
            group.term(),
            group.leader(),
            group.commit_index(),
            group.applied_index(),
            group.last_index(),
            group.configuration(),
            group.progress().collect::<Vec<_>>()
        )
    }

    fn leader(&self) -> Option<usize> {
        let leads = |node: &Node| {
            let group = node.group.as_ref()?;
            (group.role() == RoleKind::Leader).then_some(group.term())
        };
        (0..self.nodes.len())
            .filter(|at| leads(&self.nodes[*at]).is_some())
            .max_by_key(|at| leads(&self.nodes[*at]))
    }

    fn members_have(&self, leader: usize, index: LogIndex) -> bool {
        let Some(group) = &self.nodes[leader].group else { return false };
        let members = group.configuration();
        !members.is_joint()
            && members.peers().all(|peer| self.nodes[peer.0 as usize - 1].machine.index >= index)
    }
}
