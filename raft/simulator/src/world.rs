//! A cluster to which [`Action`]s happen. Nothing here is random: the same
//! [`Setup`] and the same actions give the same world.

use std::collections::VecDeque;

use bytes::Bytes;
use esker_raft::{
    ConfigError, LogIndex, Message, MessageBody, PeerId, ProposeError, ReadError, SnapshotOutcome,
    StepError, Term, Time, TransferError,
};

use super::action::Action;
use super::checks::Checks;
use super::driver::{Event, Node};
use super::setup::{EPOCH, Setup, TRUE_RATE};
use super::violation::{Checked, Promise, Violation, ensure};

/// One in this many messages is encoded and decoded on its way. That tests the codec as well as all
/// messages would, and is cheaper.
const ENCODED: u64 = 16;

/// A message under way.
pub struct Parcel {
    /// A number that rises with every message of a world.
    pub serial: u64,
    pub message: Message,
}

/// A message that was just sent, for the generator, which decides its fate.
pub struct Posted {
    pub from: PeerId,
    pub to: PeerId,
    pub serial: u64,
    pub kind: Kind,
}

/// The kinds of messages that a generator distinguishes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    Vote,
    VoteGranted,
    Append,
    Accepted,
    Heartbeat,
    HeartbeatReply,
    Snapshot,
    TimeoutNow,
    Other,
}

impl Kind {
    fn of(body: &MessageBody) -> Kind {
        match body {
            MessageBody::Vote { .. } => Kind::Vote,
            MessageBody::VoteReply { granted: true, .. } => Kind::VoteGranted,
            MessageBody::Append { .. } => Kind::Append,
            MessageBody::AppendReply { .. } => Kind::Accepted,
            MessageBody::Heartbeat { .. } => Kind::Heartbeat,
            MessageBody::HeartbeatReply { .. } => Kind::HeartbeatReply,
            MessageBody::InstallSnapshot { .. } => Kind::Snapshot,
            MessageBody::TimeoutNow => Kind::TimeoutNow,
            _ => Kind::Other,
        }
    }
}

/// A clock that runs a little fast or slow and began at another time.
struct Clock {
    start: u64,
    rate: u64,
}

/// The world's time, and how each node sees it.
pub struct Clocks {
    /// Nanoseconds since the beginning.
    now: u64,
    clocks: Vec<Clock>,
}

impl Clocks {
    /// What a node's clock shows.
    pub fn local(&self, at: usize) -> Time {
        let Clock { start, rate } = self.clocks[at];
        Time(start + self.now / TRUE_RATE * rate + self.now % TRUE_RATE * rate / TRUE_RATE)
    }

    /// The first moment of the world at which a node's clock shows `local`.
    fn world_time(&self, at: usize, local: Time) -> u64 {
        let Clock { start, rate } = self.clocks[at];
        let passed = local.0.saturating_sub(start);
        (passed / rate).saturating_mul(TRUE_RATE) + (passed % rate * TRUE_RATE).div_ceil(rate)
    }
}

/// The effect of an action that is not an [`Event`] of a peer.
#[derive(Clone, PartialEq, Debug)]
pub enum Effect {
    /// Nothing to report.
    None,
    /// The action did not apply.
    Nothing,
    Proposed(LogIndex, Term),
    Refused(ProposeError),
    ReadRefused(ReadError),
    /// A lease read was answered, or waits, at this index.
    Leased(LogIndex),
    Transferring(PeerId),
    TransferRefused(TransferError),
    /// A message arrived, and was perhaps refused.
    Delivered(Message, Result<(), StepError>),
    /// A message was lost.
    Lost(Message),
    /// The state on the peer's disk contradicts itself.
    DoesNotStart(ConfigError),
}

/// A cluster.
pub struct World {
    time: Clocks,
    pub nodes: Vec<Node>,
    /// Peers with a busy driver, and the term that each led when that began.
    held: Vec<Option<Option<Term>>>,
    /// The messages under way from each peer to each, in the order of sending.
    queues: Vec<VecDeque<Parcel>>,
    serials: u64,
    /// The messages that were sent since this was last emptied.
    pub posted: Vec<Posted>,
    /// The events since this was last emptied, if they are recorded.
    pub heard: Option<Vec<(PeerId, Event)>>,
    /// Whether a message that is refused breaks a promise. A story may send messages that no
    /// correct peer would send.
    pub strict: bool,
    pub checks: Checks,
}

impl World {
    pub fn new(setup: &Setup) -> World {
        let clock =
            |peer: &super::setup::PeerSetup| Clock { start: EPOCH + peer.ahead, rate: peer.rate };
        let clocks: Vec<_> = setup.peers.iter().map(clock).collect();
        let create = |(peer, clock): (&super::setup::PeerSetup, &Clock)| {
            Node::create(peer.id, setup.settings(peer), setup.disk(peer.id), Time(clock.start))
        };
        let nodes: Vec<_> = setup.peers.iter().zip(&clocks).map(create).collect();
        let count = nodes.len();
        World {
            time: Clocks { now: 0, clocks },
            checks: Checks::new(&nodes, &setup.members),
            nodes,
            held: vec![None; count],
            queues: (0..count * count).map(|_| VecDeque::new()).collect(),
            serials: 0,
            posted: Vec::new(),
            heard: None,
            strict: true,
        }
    }

    /// The position of a peer among the nodes.
    pub fn at(&self, peer: PeerId) -> Option<usize> {
        // Ids are mostly 1, 2, 3…
        let guess = usize::try_from(peer.0.wrapping_sub(1)).ok()?;
        if self.nodes.get(guess).is_some_and(|node| node.id == peer) {
            return Some(guess);
        }
        self.nodes.iter().position(|node| node.id == peer)
    }

    pub fn node(&self, peer: PeerId) -> Option<&Node> {
        self.at(peer).map(|at| &self.nodes[at])
    }

    fn running(&self, peer: PeerId) -> Option<usize> {
        self.at(peer).filter(|at| self.nodes[*at].is_up())
    }

    /// Nanoseconds since the beginning.
    pub fn now(&self) -> u64 {
        self.time.now
    }

    /// The time on a node's clock.
    pub fn local(&self, at: usize) -> Time {
        self.time.local(at)
    }

    /// The first moment of the world at which a node's clock shows `local`.
    pub fn world_time(&self, at: usize, local: Time) -> u64 {
        self.time.world_time(at, local)
    }

    /// When a node needs its next tick.
    pub fn deadline(&self, at: usize) -> Option<u64> {
        let deadline = self.nodes[at].group.as_ref()?.next_deadline()?;
        Some(self.world_time(at, deadline))
    }

    pub fn is_held(&self, at: usize) -> bool {
        self.held[at].is_some()
    }

    /// The term that a node leads.
    fn leads_term(&self, at: usize) -> Option<Term> {
        let node = &self.nodes[at];
        node.group.as_ref().filter(|_| node.leads()).map(|group| group.term())
    }

    /// Whether the checks know the node's current state. They do not while its driver is busy,
    /// except for a peer that leads the same term all the time: its log only grows, and not by
    /// committed entries.
    fn is_known(&self, at: usize) -> bool {
        self.held[at].is_none_or(|led| led.is_some() && led == self.leads_term(at))
    }

    /// The messages under way between two nodes.
    pub fn queue(&self, from: usize, to: usize) -> &VecDeque<Parcel> {
        &self.queues[from * self.nodes.len() + to]
    }

    fn queue_mut(&mut self, from: PeerId, to: PeerId) -> Option<&mut VecDeque<Parcel>> {
        let (from, to) = (self.at(from)?, self.at(to)?);
        let count = self.nodes.len();
        self.queues.get_mut(from * count + to)
    }

    /// The leader of the highest term, if there is a leader.
    pub fn leader(&self) -> Option<usize> {
        let term = |at: &usize| self.nodes[*at].group.as_ref().map(|group| group.term());
        (0..self.nodes.len()).filter(|at| self.nodes[*at].leads()).max_by_key(term)
    }

    /// Performs an action.
    ///
    /// # Errors
    /// If it broke a promise.
    pub fn execute(&mut self, action: &Action) -> Checked<Effect> {
        let Some(peer) = action.peer() else {
            if let Action::Pass(time) = action {
                self.time.now += time;
            }
            return Ok(Effect::None);
        };
        match action {
            Action::Deliver { from, to, at } => return self.deliver(*from, *to, *at),
            Action::Drop { from, to, at } => return Ok(self.lose(*from, *to, *at)),
            Action::Again { from, to, at } => return Ok(self.double(*from, *to, *at)),
            Action::Restart(_) => return self.restart(peer),
            _ => {}
        }
        let Some(at) = self.running(peer) else { return Ok(Effect::Nothing) };
        let effect = self.act(at, action)?;
        self.look(at)?;
        Ok(effect)
    }

    /// Performs an action on one peer that is up.
    fn act(&mut self, at: usize, action: &Action) -> Checked<Effect> {
        let now = self.local(at);
        let node = &mut self.nodes[at];
        match action {
            Action::Tick(_) => node.tick(now),
            Action::Sync { count, .. } => self.sync(at, *count)?,
            Action::Apply { count, .. } => self.apply(at, *count)?,
            Action::Install(_) => node.install(now),
            Action::Save(_) => node.sync_machine(),
            Action::Compact { index, .. } => node.compact(*index),
            Action::Hold(_) => {
                let led = self.leads_term(at);
                self.held[at].get_or_insert(led);
            }
            Action::Release(_) => {
                // The events that are seen now may be long past.
                self.collect(at, self.held[at].is_none())?;
                self.held[at] = None;
            }
            Action::Propose { command, .. } => return Ok(self.propose(at, command)),
            Action::Read { id, .. } => {
                let witness = node.machine.configuration.is_witness(node.id);
                if !node.machine.has_data && !witness {
                    return Ok(Effect::Nothing);
                }
                match node.read_index(now, *id) {
                    Ok(()) => self.checks.read_begins(at, *id),
                    Err(refusal) => return Ok(Effect::ReadRefused(refusal)),
                }
            }
            Action::LeaseRead(_) => {
                if !node.machine.has_data || !node.has_lease(now) {
                    return Ok(Effect::Nothing);
                }
                let index = node.group().commit_index();
                self.checks.lease_read(&self.nodes, at, index)?;
                return Ok(Effect::Leased(index));
            }
            Action::Change { change, .. } => {
                return Ok(match node.change(now, change.clone()) {
                    Ok((index, term)) => Effect::Proposed(index, term),
                    Err(refusal) => Effect::Refused(refusal),
                });
            }
            Action::Transfer { to, .. } => {
                return Ok(match node.transfer(now, *to) {
                    Ok(target) => Effect::Transferring(target),
                    Err(refusal) => Effect::TransferRefused(refusal),
                });
            }
            Action::Campaign(_) => node.campaign(now),
            Action::Crash { kept, .. } => {
                node.crash(*kept);
                self.held[at] = None;
                self.checks.crashed(at);
            }
            Action::Unreachable { other, .. } => node.unreachable(*other),
            Action::Pass(_)
            | Action::Deliver { .. }
            | Action::Drop { .. }
            | Action::Again { .. }
            | Action::Restart(_) => {}
        }
        Ok(Effect::None)
    }

    fn propose(&mut self, at: usize, command: &Bytes) -> Effect {
        let now = self.local(at);
        match self.nodes[at].propose(now, command.clone()) {
            Ok((index, term)) => {
                self.checks.write_begins(at, index, term, command);
                Effect::Proposed(index, term)
            }
            Err(refusal) => Effect::Refused(refusal),
        }
    }

    fn sync(&mut self, at: usize, count: usize) -> Checked {
        let now = self.local(at);
        let mut last = None;
        for _ in 0..count {
            let Some(number) = self.nodes[at].finish_write() else { break };
            last = Some(number);
            self.post(at)?;
        }
        if let Some(number) = last {
            self.nodes[at].report_written(now, number);
        }
        Ok(())
    }

    fn apply(&mut self, at: usize, count: usize) -> Checked {
        let now = self.local(at);
        for _ in 0..count {
            if !self.nodes[at].apply(now) {
                break;
            }
            self.checks.applied(&self.nodes, at)?;
            if self.is_known(at) {
                self.checks.inspect(&self.nodes, at, &self.time, true)?;
            }
        }
        Ok(())
    }

    fn restart(&mut self, peer: PeerId) -> Checked<Effect> {
        let Some(at) = self.at(peer).filter(|at| !self.nodes[*at].is_up()) else {
            return Ok(Effect::Nothing);
        };
        let now = self.local(at);
        if self.checks.suspended {
            if let Err(refusal) = self.nodes[at].try_restart(now) {
                return Ok(Effect::DoesNotStart(refusal));
            }
        } else {
            self.nodes[at].restart(now);
        }
        self.checks.restarted(&self.nodes[at], at)?;
        self.look(at)?;
        Ok(Effect::None)
    }

    /// Makes the disk of a peer that is down break its promise: the durable entries after `index`
    /// are gone. From here on nothing is checked.
    pub fn lose_disk(&mut self, peer: PeerId, index: LogIndex) {
        if let Some(at) = self.at(peer) {
            self.nodes[at].disk.borrow_mut().lose(index);
            self.checks.suspended = true;
        }
    }

    fn take(&mut self, from: PeerId, to: PeerId, at: usize) -> Option<Message> {
        Some(self.queue_mut(from, to)?.remove(at)?.message)
    }

    fn deliver(&mut self, from: PeerId, to: PeerId, position: usize) -> Checked<Effect> {
        if self.running(to).is_none() {
            return Ok(self.lose(from, to, position));
        }
        let Some(message) = self.take(from, to, position) else { return Ok(Effect::Nothing) };
        let Some(at) = self.at(to) else { return Ok(Effect::Nothing) };
        let now = self.local(at);
        let snapshot = matches!(message.body, MessageBody::InstallSnapshot { .. });
        self.checks.summary.delivered += 1;
        self.checks.summary.reordered += u64::from(position > 0);
        let listening = self.heard.is_some();
        let copy = listening.then(|| message.clone());
        let taken = self.nodes[at].step(now, message);
        if let Err(refusal) = &taken
            && self.strict
        {
            let sentence = format!("peer {to} refused a message of {from}: {refusal}");
            return Err(Violation { promise: Promise::MessagesAreTaken, sentence });
        }
        if snapshot {
            self.report_snapshot(from, to, SnapshotOutcome::Delivered);
        }
        self.look(at)?;
        Ok(copy.map_or(Effect::None, |message| Effect::Delivered(message, taken)))
    }

    fn lose(&mut self, from: PeerId, to: PeerId, position: usize) -> Effect {
        let Some(message) = self.take(from, to, position) else { return Effect::Nothing };
        self.checks.summary.lost += 1;
        if matches!(message.body, MessageBody::InstallSnapshot { .. }) {
            self.report_snapshot(from, to, SnapshotOutcome::Failed);
        }
        Effect::Lost(message)
    }

    fn double(&mut self, from: PeerId, to: PeerId, position: usize) -> Effect {
        let message = self.queue_mut(from, to).and_then(|queue| queue.get(position));
        let Some(message) = message.map(|parcel| parcel.message.clone()) else {
            return Effect::Nothing;
        };
        self.checks.summary.doubled += 1;
        self.enqueue(message);
        Effect::None
    }

    fn report_snapshot(&mut self, from: PeerId, to: PeerId, outcome: SnapshotOutcome) {
        if let Some(at) = self.at(from) {
            self.nodes[at].snapshot_sent(to, outcome);
        }
    }

    /// Takes a peer's output, and checks the peer.
    fn look(&mut self, at: usize) -> Checked {
        if !self.nodes[at].is_up() {
            return Ok(());
        }
        match self.held[at] {
            None => self.collect(at, true),
            Some(_) if self.is_known(at) => self.checks.inspect(&self.nodes, at, &self.time, true),
            Some(_) => Ok(()),
        }
    }

    /// Takes a peer's output. `fresh` means that the peer had one input since its last output.
    fn collect(&mut self, at: usize, fresh: bool) -> Checked {
        self.nodes[at].collect();
        let mut events = std::mem::take(&mut self.nodes[at].events);
        for event in &events {
            if let Event::Appended(entry) = event {
                self.checks.appended(&self.nodes[at], entry)?;
            }
        }
        self.checks.inspect(&self.nodes, at, &self.time, fresh)?;
        self.post(at)?;
        for event in &events {
            self.checks.saw(&self.nodes, at, event, fresh)?;
            if let Event::SnapshotWanted(to) = *event {
                match self.nodes[at].snapshot_for(to) {
                    Some(message) => self.nodes[at].outgoing.push(message),
                    None => self.nodes[at].snapshot_sent(to, SnapshotOutcome::Failed),
                }
                self.post(at)?;
            }
        }
        match &mut self.heard {
            Some(heard) => heard.extend(events.drain(..).map(|event| (self.nodes[at].id, event))),
            None => events.clear(),
        }
        self.nodes[at].events = events;
        Ok(())
    }

    /// Puts the messages of a peer into the network.
    fn post(&mut self, at: usize) -> Checked {
        if self.nodes[at].outgoing.is_empty() {
            return Ok(());
        }
        let mut outgoing = std::mem::take(&mut self.nodes[at].outgoing);
        for message in outgoing.drain(..) {
            self.checks.sent(&self.nodes, at, &message)?;
            let message = match self.serials.is_multiple_of(ENCODED) {
                true => encoded(message)?,
                false => message,
            };
            self.enqueue(message);
        }
        self.nodes[at].outgoing = outgoing;
        Ok(())
    }

    fn enqueue(&mut self, message: Message) {
        let (from, to) = (message.from, message.to);
        let serial = self.serials;
        let kind = Kind::of(&message.body);
        // A message to a peer that this world does not have is dropped.
        let Some(queue) = self.queue_mut(from, to) else { return };
        queue.push_back(Parcel { serial, message });
        self.serials += 1;
        self.posted.push(Posted { from, to, serial, kind });
    }
}

fn encoded(message: Message) -> Checked<Message> {
    let mut bytes = Vec::new();
    message.encode(&mut bytes);
    let decoded = Message::decode(Bytes::from(bytes));
    ensure(decoded.as_ref() == Ok(&message), Promise::MessagesAreReadable, || {
        format!("{message:?} was encoded, and decoded as {decoded:?}")
    })?;
    Ok(message)
}
