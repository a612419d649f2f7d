//! Faults, and schemes in several acts that are aimed at one particular rule.

use bytes::Bytes;
use esker_raft::{ChangeStep, ConfChange, Configuration, LeaveJoint, Term};
use rand::RngExt as _;

use super::super::action::Action;
use super::super::world::{Kind, World};
use super::profile::{MICROSECOND, MILLISECOND, may_form, pick};
use super::{Deposed, Due, Generator};

/// The share of the changes with too many witnesses that are asked for.
const ILL_FORMED: f64 = 0.0;

/// A fault, or a request at the wrong moment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// The nodes are parted into two sides, perhaps only in one direction.
    Partition,
    /// One link is cut.
    CutLink,
    /// A peer is away long enough to need a snapshot.
    LongCut,
    /// The leader is cut off, alone or with a minority, right after proposals.
    IsolateLeader,
    Heal,
    Crash,
    /// The leader crashes right after a proposal, before its disk or its followers have it.
    CrashLeader,
    CrashAll,
    /// The next peer that gives a vote crashes when the vote is sent.
    CrashVoter,
    Campaign,
    /// Two peers campaign at once.
    CampaignTwo,
    Transfer,
    /// A transfer, and reads at the old leader while the new one is elected.
    TransferTrap,
    Change,
    /// Two changes, one right after the other.
    ChangeTwice,
    Compact,
    Save,
    /// A driver is busy.
    Hold,
    /// A peer gets no ticks.
    Stall,
    /// A disk or a machine changes its speed.
    Slow,
    Unreachable,
    /// Elects another leader at the first possible moment.
    LeaseTrap,
    /// Makes voters restart while they are bound by a promise.
    LoyaltyTrap,
    /// The next peer that sends some kind of message crashes at once, before anything of the same
    /// step is on its disk.
    CrashSender,
    /// A leader is to be removed, and is slow to apply that.
    Farewell,
    /// A link is cut for very long.
    LongLink,
    /// A leader that was deposed keeps one follower, and its appends reach that follower late.
    DeposedTrap,
}

impl Generator {
    pub(super) fn misfortune(&mut self, world: &World) {
        let sum: u32 = self.profile.weights.iter().map(|(_, weight)| weight).sum();
        let mut choice = self.random.random_range(0..sum);
        let chosen = self.profile.weights.iter().find(|(_, weight)| {
            let found = choice < *weight;
            choice = choice.wrapping_sub(*weight);
            found
        });
        let Some((fault, _)) = chosen.copied() else { return };
        let at = self.any();
        let leader = world.leader();
        match fault {
            Fault::Partition => self.partition(world),
            Fault::CutLink => {
                let other = self.any();
                let both = self.random.random_bool(0.5);
                self.begin_partition(world, (10, 200));
                self.cut_link(at, other, both);
            }
            Fault::LongCut => {
                self.begin_partition(world, (100, 800));
                self.cut_off(&[at], true, true);
                let compact = Action::Compact { peer: self.id(at), index: self.behind(world, at) };
                self.at_once.push_back(compact);
            }
            Fault::IsolateLeader => self.isolate_leader(world),
            Fault::Heal => self.heal(),
            Fault::Crash => self.crash_for_a_while(world, at, 0),
            Fault::CrashLeader => {
                let Some(at) = leader else { return };
                (0..self.random.random_range(1..4)).for_each(|_| self.write(at));
                let within = pick(&mut self.random, &[0, MILLISECOND, 5 * MILLISECOND]);
                self.crash_for_a_while(world, at, within);
            }
            Fault::CrashAll => {
                for at in 0..self.work.len() {
                    self.crash_for_a_while(world, at, 0);
                }
            }
            Fault::CrashVoter => self.crash_voter = true,
            Fault::Campaign => self.at_once.push_back(Action::Campaign(self.id(at))),
            Fault::CampaignTwo => {
                let other = self.any();
                self.at_once.push_back(Action::Campaign(self.id(at)));
                self.at_once.push_back(Action::Campaign(self.id(other)));
            }
            Fault::Transfer => {
                let to = self.any();
                let to = self.random.random_bool(0.8).then(|| self.id(to));
                let peer = self.id(leader.unwrap_or(at));
                self.at_once.push_back(Action::Transfer { peer, to });
            }
            Fault::TransferTrap => self.transfer_trap(world),
            Fault::Change => self.change(world),
            Fault::ChangeTwice => {
                self.change(world);
                self.change(world);
            }
            Fault::Compact => {
                let index = self.behind(world, at);
                self.at_once.push_back(Action::Compact { peer: self.id(at), index });
            }
            Fault::Save => self.at_once.push_back(Action::Save(self.id(at))),
            Fault::Hold => {
                let at = leader.filter(|_| self.random.random_bool(0.4)).unwrap_or(at);
                self.at_once.push_back(Action::Hold(self.id(at)));
                let end = self.soon(world, 30 * MILLISECOND);
                self.enter(end, Due::Release(at));
            }
            Fault::Stall => {
                let at = leader.filter(|_| self.random.random_bool(0.6)).unwrap_or(at);
                self.work[at].stalled = self.soon(world, 250 * MILLISECOND);
                self.work[at].deadline = None;
                self.look(world, at);
            }
            Fault::Slow => self.change_speed(at),
            Fault::Unreachable => {
                let other = self.any();
                let (peer, other) = (self.id(at), self.id(other));
                self.at_once.push_back(Action::Unreachable { peer, other });
            }
            Fault::LeaseTrap => self.lease_trap(world),
            Fault::LoyaltyTrap => self.loyalty_trap(world),
            Fault::CrashSender => {
                let kinds = [Kind::HeartbeatReply, Kind::Accepted, Kind::VoteGranted, Kind::Other];
                self.crash_sender = Some(pick(&mut self.random, &kinds));
            }
            Fault::Farewell => self.farewell(world),
            Fault::LongLink => {
                // One end is often a witness, because it suffers most from a missing link.
                let witness = self.setup.members.witnesses.iter().next();
                let witness = witness.and_then(|peer| world.at(*peer));
                let one = witness.filter(|_| self.random.random_bool(0.5)).unwrap_or(at);
                let other = self.any();
                self.broken = (one != other).then(|| (one.min(other), one.max(other)));
                self.broken_links += 1;
                let end = world.now() + self.random.random_range(200..2_000) * MILLISECOND;
                self.enter(end, Due::Mend(self.broken_links));
            }
            Fault::DeposedTrap => self.deposed_trap(world),
        }
    }

    fn begin_partition(&mut self, world: &World, (low, high): (u64, u64)) {
        self.cut.fill(false);
        self.partition += 1;
        self.partitions += 1;
        self.hoard = self.random.random_bool(0.4);
        self.heals_at = world.now() + self.random.random_range(low..high) * MILLISECOND;
        self.enter(self.heals_at, Due::Heal(self.partition));
    }

    pub(super) fn heal(&mut self) {
        self.deposed = None;
        self.cut.fill(false);
    }

    fn cut_link(&mut self, from: usize, to: usize, both: bool) {
        let nodes = self.work.len();
        self.cut[from * nodes + to] = true;
        if both {
            self.cut[to * nodes + from] = true;
        }
    }

    /// Parts `side` from all others: the messages that it sends, those that it receives, or both.
    fn cut_off(&mut self, side: &[usize], sends: bool, hears: bool) {
        let nodes = self.work.len();
        for from in 0..nodes {
            for to in 0..nodes {
                let (out, other) = (side.contains(&from), side.contains(&to));
                if out && !other && sends || !out && other && hears {
                    self.cut[from * nodes + to] = true;
                }
            }
        }
    }

    fn partition(&mut self, world: &World) {
        self.begin_partition(world, (20, 400));
        let nodes = self.work.len();
        let side: Vec<_> = (0..nodes).filter(|_| self.random.random_bool(0.5)).collect();
        let one_way = self.random.random_bool(0.3);
        self.cut_off(&side, true, !one_way);
    }

    fn isolate_leader(&mut self, world: &World) {
        let Some(leader) = world.leader() else { return };
        self.begin_partition(world, (30, 350));
        let nodes = self.work.len();
        let mut side = vec![leader];
        let most = (nodes - 1) / 2;
        while side.len() <= most && self.random.random_bool(0.4) {
            side.push(self.any());
        }
        (0..self.random.random_range(0..4)).for_each(|_| self.write(leader));
        let (sends, hears) =
            pick(&mut self.random, &[(true, true), (true, true), (true, false), (false, true)]);
        self.cut_off(&side, sends, hears);
        // One peer may still get what was just proposed.
        if self.random.random_bool(0.4) {
            let lucky = self.any();
            self.cut[leader * nodes + lucky] = false;
        }
        if self.random.random_bool(0.4) {
            // Peers on the other side campaign as soon as they may.
            for at in (0..nodes).filter(|at| !side.contains(at)) {
                let due = self.loyal_until(at).max(world.now());
                self.enter(due, Due::Campaign(at));
            }
        }
    }

    pub(super) fn crash(&mut self, world: &World, at: usize) {
        let under_way = world.nodes[at].writes_under_way() + 1;
        let kept =
            if self.random.random_bool(0.5) { 0 } else { self.random.random_range(0..=under_way) };
        self.at_once.push_back(Action::Crash { peer: self.id(at), kept });
    }

    pub(super) fn crash_empty(&mut self, at: usize) {
        self.at_once.push_back(Action::Crash { peer: self.id(at), kept: 0 });
    }

    fn crash_for_a_while(&mut self, world: &World, at: usize, within: u64) {
        let due = self.soon(world, within);
        self.enter(due, Due::Crash(at));
        let away = pick(&mut self.random, &[MICROSECOND, 5 * MILLISECOND, 300 * MILLISECOND]);
        let away = self.random.random_range(0..=away / MICROSECOND) * MICROSECOND;
        self.enter(due + away + MICROSECOND, Due::Restart(at));
    }

    fn change_speed(&mut self, at: usize) {
        let speed =
            pick(&mut self.random, &[(10, 100), (100, 1_000), (1_000, 10_000), (10_000, 60_000)]);
        if self.random.random_bool(0.5) {
            self.profile.disk[at] = speed;
        } else {
            self.profile.machine[at] = speed;
        }
    }

    /// Asks a new leader for things that it must not do yet.
    pub(super) fn greet(&mut self, world: &World, at: usize) {
        match self.random.random_range(0..6) {
            0 => {
                self.read(at);
                self.lease_read(at);
            }
            1 => self.change_at(world, at),
            2 => {
                // The leader leads for a moment only.
                self.write(at);
                let within = pick(&mut self.random, &[0, MILLISECOND, 10 * MILLISECOND]);
                self.crash_for_a_while(world, at, within);
            }
            3 => {
                self.begin_partition(world, (30, 300));
                self.cut_off(&[at], true, true);
                let lucky = self.any();
                let nodes = self.work.len();
                self.cut[at * nodes + lucky] = false;
            }
            4 => (0..3).for_each(|_| self.write(at)),
            _ => {
                let to = self.any();
                let to = Some(self.id(to));
                self.at_once.push_back(Action::Transfer { peer: self.id(at), to });
            }
        }
    }

    /// Cuts the leader off, so that the promises of its followers run out.
    fn lease_trap(&mut self, world: &World) {
        let Some(leader) = world.leader() else { return };
        self.schemes += 1;
        self.begin_partition(world, (180, 260));
        if self.random.random_bool(0.5) {
            self.scheming = world.now() + 180 * MILLISECOND;
        }
        self.hoard = self.random.random_bool(0.3);
        let deaf = self.random.random_bool(0.7);
        self.cut_off(&[leader], true, deaf);
        self.silent = world.now() + 150 * MILLISECOND;
        let due = world.now() + 2 * MILLISECOND;
        self.enter(due, Due::LeaseTrap(leader));
    }

    /// One of the followers campaigns each time that a promise has just ended.
    pub(super) fn spring_lease_trap(&mut self, world: &World, leader: usize) {
        let nodes = self.work.len();
        let others: Vec<_> = (0..nodes).filter(|at| *at != leader).collect();
        if others.is_empty() {
            return;
        }
        let mut ends: Vec<_> = others.iter().map(|at| self.loyal_until(*at)).collect();
        ends.sort_unstable();
        // The peer whose own promise ends first. No peer campaigns before that.
        let first = others.iter().copied().min_by_key(|at| self.loyal_until(*at));
        let candidate = first.filter(|_| self.random.random_bool(0.7));
        let candidate = candidate.unwrap_or_else(|| pick(&mut self.random, &others));
        for end in ends {
            for late in [0, 100 * MICROSECOND, 2 * MILLISECOND] {
                self.enter(end.max(world.now()) + late, Due::Campaign(candidate));
            }
            self.enter(end.max(world.now()) + 4 * MILLISECOND, Due::Read(leader));
        }
    }

    /// Keeps one peer from hearing the leader until that peer is free to campaign, while the others
    /// renew their promises.
    fn loyalty_trap(&mut self, world: &World) {
        let Some(leader) = world.leader() else { return };
        let candidate = self.any();
        if candidate == leader {
            return;
        }
        self.schemes += 1;
        let nodes = &world.nodes;
        let term = |at: usize| nodes[at].group.as_ref().map_or(Term(0), |group| group.term());
        let members = &nodes[leader].machine.configuration;
        let strange = |at: &usize| term(*at) == Term(0) && !members.contains(nodes[*at].id);
        let newcomer = (0..nodes.len()).filter(|at| !self.tainted[*at]).find(strange);
        let mut wait = 0;
        if let Some(newcomer) = newcomer.filter(|_| self.random.random_bool(0.7)) {
            // A peer that never heard of the group becomes a voter, and has no time to write
            // anything to its disk.
            let change = ConfChange {
                steps: vec![ChangeStep::AddVoter(self.id(newcomer))],
                ..ConfChange::default()
            };
            self.at_once.push_back(Action::Change { peer: self.id(leader), change });
            self.work[newcomer].disk_stalled = world.now() + 300 * MILLISECOND;
            wait = self.random.random_range(1..20);
        } else if self.random.random_bool(0.3) {
            for at in (0..self.work.len()).filter(|at| *at != leader && *at != candidate) {
                self.work[at].disk_stalled = world.now() + 200 * MILLISECOND;
            }
        }
        self.scheming = world.now() + (wait + 200) * MILLISECOND;
        let due = world.now() + wait * MILLISECOND;
        self.enter(due, Due::LoyaltyTrap { leader, candidate, act: 0 });
    }

    pub(super) fn begin_loyalty_trap(&mut self, world: &World, leader: usize, candidate: usize) {
        self.begin_partition(world, (190, 250));
        self.hoard = false;
        self.cut_link(leader, candidate, true);
        self.silent = world.now() + 180 * MILLISECOND;
        let due = world.now() + self.random.random_range(112_000..150_000) * MICROSECOND;
        self.enter(due, Due::LoyaltyTrap { leader, candidate, act: 1 });
    }

    /// Restarts all others at once, and asks for their votes.
    pub(super) fn spring_loyalty_trap(&mut self, world: &World, leader: usize, candidate: usize) {
        for at in (0..self.work.len()).filter(|at| *at != leader && *at != candidate) {
            if self.random.random_bool(0.8) {
                self.crash(world, at);
                self.at_once.push_back(Action::Restart(self.id(at)));
            }
        }
        if self.random.random_bool(0.5) {
            // The leader does not learn of the election.
            self.cut_off(&[leader], true, true);
        }
        for late in [100, 1_000, 5_000] {
            self.enter(world.now() + late * MICROSECOND, Due::Campaign(candidate));
        }
    }

    /// The leader removes or demotes itself, and is the last to apply that. A leader that is the
    /// only voter adds another.
    fn farewell(&mut self, world: &World) {
        let Some(leader) = world.leader() else { return };
        let members = &world.nodes[leader].machine.configuration;
        let peer = self.id(leader);
        let other = self.any();
        let step = if members.voters.len() < 2 && other != leader {
            if self.tainted[other] {
                return;
            }
            ChangeStep::AddVoter(self.id(other))
        } else if self.random.random_bool(0.7) {
            ChangeStep::Remove(peer)
        } else {
            ChangeStep::AddLearner(peer)
        };
        let mut steps = vec![step];
        if self.random.random_bool(0.3) && members.voters.contains(&self.id(other)) {
            steps.push(ChangeStep::Remove(self.id(other)));
        }
        let change = ConfChange { steps, ..ConfChange::default() };
        let Ok(next) = members.changed(&change) else { return };
        let left = next.changed(&ConfChange::default()).unwrap_or_else(|_| next.clone());
        if !self.is_wanted(&next, &left) {
            return;
        }
        self.schemes += 1;
        self.work[leader].machine_stalled =
            world.now() + self.random.random_range(0..120) * MILLISECOND;
        self.at_once.push_back(Action::Change { peer, change });
        if self.random.random_bool(0.5) {
            for late in [1, 3, 10, 30, 60, 90] {
                self.enter(world.now() + late * MILLISECOND, Due::Read(leader));
            }
        }
    }

    /// First act: the leader and one follower are parted from the rest. Only that follower gets
    /// what is written.
    fn deposed_trap(&mut self, world: &World) {
        let Some(first) = world.leader() else { return };
        let members = &world.nodes[first].machine.configuration;
        let mut cast = vec![first];
        for _ in 0..20 {
            let at = self.any();
            if !cast.contains(&at) && members.is_voter(self.id(at)) {
                cast.push(at);
            }
        }
        // One more peer must be left, which goes between the sides.
        let &[first, deposed, follower, _, ..] = cast.as_slice() else { return };
        if members.voters.len() < 5 {
            return;
        }
        let scheme = Deposed { first, deposed, follower };
        self.schemes += 1;
        self.begin_partition(world, (400, 450));
        self.scheming = self.heals_at;
        self.hoard = self.random.random_bool(0.3);
        self.cut_off(&[first, follower], true, true);
        (0..self.random.random_range(1..4)).for_each(|_| self.write(first));
        self.deposed = Some(scheme);
        let free = (0..self.work.len()).map(|at| self.loyal_until(at)).max().unwrap_or_default();
        self.enter(free.max(world.now()) + MILLISECOND, Due::DeposedTrap(scheme, 0));
    }

    /// The rest elects another leader, and its appends are slow to reach the follower.
    pub(super) fn deposed_trap_goes_on(&mut self, world: &World, scheme: Deposed, act: u8) {
        let Deposed { first, deposed, follower } = scheme;
        let nodes = self.work.len();
        if act == 0 {
            let late = self.random.random_range(165..230);
            self.late_appends[deposed * nodes + follower] = world.now() + late * MILLISECOND;
            for late in [0, 3, 10, 20, 30] {
                self.enter(world.now() + late * MILLISECOND, Due::Campaign(deposed));
            }
            return;
        }
        // A peer that knows how far the rest has committed is cut off, too, and asks the follower
        // for a vote.
        let rest = (0..nodes).filter(|at| ![first, deposed, follower].contains(at));
        let rest: Vec<_> = rest.collect();
        let envoy = pick(&mut self.random, &rest);
        self.cut_off(&[envoy], true, true);
        self.cut[envoy * nodes + follower] = false;
        self.cut[follower * nodes + envoy] = false;
        let mut free = self.loyal_until(envoy).max(world.now());
        let applies = world.nodes[envoy].applies_under_way();
        if self.random.random_bool(0.7) {
            // After a crash, that peer remembers only a part of the commits.
            let (peer, count) = (self.id(envoy), self.some(applies.saturating_sub(1)));
            self.at_once.push_back(Action::Apply { peer, count });
            self.at_once.push_back(Action::Save(peer));
            self.crash_empty(envoy);
            self.at_once.push_back(Action::Restart(peer));
            free = world.now() + 106 * MILLISECOND;
        }
        for late in [0, 1, 5, 15] {
            self.enter(free + late * MILLISECOND, Due::Campaign(envoy));
        }
    }

    /// As soon as the second peer leads, all but the follower are on the first one's side.
    pub(super) fn depose(&mut self, world: &World, scheme: Deposed) {
        let Deposed { first, deposed, follower } = scheme;
        let nodes = self.work.len();
        self.deposed = None;
        self.cut.fill(false);
        self.cut_off(&[deposed], true, true);
        self.cut[deposed * nodes + follower] = false;
        self.cut[follower * nodes + deposed] = false;
        self.cut_link(first, follower, true);
        (0..self.random.random_range(0..4)).for_each(|_| self.write(deposed));
        for late in [1, 3, 6, 10, 20, 40] {
            self.enter(world.now() + late * MILLISECOND, Due::Campaign(first));
        }
        let next = self.random.random_range(10..40);
        for at in (0..nodes).filter(|at| ![first, deposed, follower].contains(at)) {
            self.work[at].machine_stalled = world.now() + next * MILLISECOND + MICROSECOND;
        }
        self.enter(world.now() + next * MILLISECOND, Due::DeposedTrap(scheme, 1));
    }

    /// Whether a change that leads to these members may be asked for. Of those that must be
    /// refused, only the share [`ILL_FORMED`] is.
    fn is_wanted(&mut self, next: &Configuration, left: &Configuration) -> bool {
        may_form(next) && may_form(left) || self.random.random_bool(ILL_FORMED)
    }

    /// Hands over, and reads at the old leader before that one hears of the new one.
    fn transfer_trap(&mut self, world: &World) {
        let Some(leader) = world.leader() else { return };
        let target = self.any();
        if target == leader {
            return;
        }
        self.schemes += 1;
        self.begin_partition(world, (20, 150));
        self.hoard = self.random.random_bool(0.7);
        let (peer, to) = (self.id(leader), Some(self.id(target)));
        self.read(leader);
        self.at_once.push_back(Action::Transfer { peer, to });
        // Messages of the others no longer reach the old leader, or it gets only old replies.
        for from in (0..self.work.len()).filter(|from| *from != leader) {
            if self.random.random_bool(0.8) {
                self.cut_link(from, leader, false);
            }
        }
        for late in [1, 3, 6, 12, 25, 60, 100] {
            let due = world.now() + late * MILLISECOND;
            self.enter(due, Due::Read(leader));
            if late > 2 {
                self.enter(due, Due::Write(1));
            }
        }
    }

    fn change(&mut self, world: &World) {
        for at in 0..self.work.len() {
            if world.nodes[at].leads() {
                self.change_at(world, at);
            }
        }
    }

    /// Asks a leader, real or deposed, for a change that leaves enough data.
    fn change_at(&mut self, world: &World, at: usize) {
        let members = &world.nodes[at].machine.configuration;
        let mut change = ConfChange { context: Bytes::new(), ..ConfChange::default() };
        if !members.is_joint() {
            if self.random.random_bool(0.3) {
                change.leave = LeaveJoint::Explicit;
            }
            let count = pick(&mut self.random, &[1, 1, 1, 2, 3, 4]);
            for _ in 0..count {
                let whom = self.any();
                let peer = self.id(whom);
                if change.steps.iter().any(|step| step_peer(step) == peer) {
                    continue;
                }
                let step = match self.random.random_range(0..10) {
                    0..=3 => ChangeStep::AddVoter(peer),
                    4 => ChangeStep::AddLearner(peer),
                    5 => ChangeStep::AddWitness(peer),
                    _ => ChangeStep::Remove(peer),
                };
                let data = matches!(step, ChangeStep::AddVoter(_) | ChangeStep::AddLearner(_));
                if !(data && self.tainted[whom]) {
                    change.steps.push(step);
                }
            }
            if change.steps.is_empty() {
                return;
            }
        }
        let Ok(next) = members.changed(&change) else { return };
        let left = next.changed(&ConfChange::default()).unwrap_or_else(|_| next.clone());
        if !self.is_wanted(&next, &left) {
            return;
        }
        for (whom, peer) in self.setup.peers.iter().enumerate() {
            self.tainted[whom] |= next.is_witness(peer.id);
        }
        self.at_once.push_back(Action::Change { peer: self.id(at), change });
    }
}

fn step_peer(step: &ChangeStep) -> esker_raft::PeerId {
    match *step {
        ChangeStep::AddVoter(peer)
        | ChangeStep::AddLearner(peer)
        | ChangeStep::AddWitness(peer)
        | ChangeStep::Remove(peer) => peer,
    }
}
