//! A cluster that a script drives, and that says what happens.

mod words;

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::fmt::Write as _;
use std::time::Duration;

use bytes::Bytes;
use esker_raft::{
    ChangeStep, ConfChange, Config, Configuration, HardState, LeaveJoint, LogIndex, Message,
    MessageBody, PeerId, SnapshotOutcome, Term, Time,
};
use goldenscript::{Block, Command, Context, Runner};

use crate::cluster::{Disk, Event, Machine, Node, Settings};

type Outcome = Result<(), Box<dyn Error>>;

/// A cluster and the story so far. The network keeps the order of messages
/// between two peers, and delivers them only when it is told to.
#[derive(Default)]
pub struct Story {
    nodes: BTreeMap<PeerId, Node>,
    now: Time,
    network: Vec<Message>,
    cut: BTreeSet<(PeerId, PeerId)>,
    /// Peers whose disk finishes nothing until it is told to.
    slow_disks: BTreeSet<PeerId>,
    /// Peers whose state machine applies nothing until it is told to.
    slow_machines: BTreeSet<PeerId>,
    told: String,
    quiet: bool,
}

impl Runner for Story {
    type Command = Command;

    fn run(&mut self, command: &Command, _: &Context) -> Result<String, Box<dyn Error>> {
        self.told.clear();
        self.command(command)?;
        Ok(std::mem::take(&mut self.told))
    }

    fn start_block(&mut self, _: &Block) -> Result<String, Box<dyn Error>> {
        self.quiet = false;
        Ok(String::new())
    }
}

fn peer(text: &str) -> Result<PeerId, Box<dyn Error>> {
    Ok(PeerId(text.parse()?))
}

fn peers(text: &str) -> Result<Vec<PeerId>, Box<dyn Error>> {
    text.split('/').filter(|part| !part.is_empty()).map(peer).collect()
}

fn duration(text: &str) -> Result<Duration, Box<dyn Error>> {
    let number = text.strip_suffix("ms").ok_or("a duration looks like 20ms")?;
    Ok(Duration::from_millis(number.parse()?))
}

impl Story {
    /// The language:
    ///
    /// - `cluster voters=1/2/3 witnesses=3 learners=4 new=5 …` founds a group behind
    ///   index 1 of term 1; `new` peers are empty. Settings: `append=BYTES entry=BYTES
    ///   inflight=N inflightbytes=BYTES uncommitted=BYTES cache=BYTES prevote=no
    ///   checkquorum=no priority=2/-1`. Election timeout 100 ms, heartbeats every 20 ms.
    /// - `campaign N`, `propose N WORD…`, `change N add=4/5 remove=3 learner=2 witness=6
    ///   [leave=explicit]` (nothing: leave), `transfer N [M]`, `read N ID…`,
    ///   `compact N INDEX`, `unreachable N M`
    /// - `deliver [FROM TO [COUNT]]`: delivers what is under way, without the
    ///   answers; `drop FROM TO` loses it; `again FROM TO` doubles it;
    ///   `settle [quiet]`: delivers everything until nothing happens
    /// - `run 200ms [quiet]`: time passes, everything is delivered at once;
    ///   `wait 200ms`: time passes for everybody and nothing is delivered;
    ///   `sleep 200ms`: time passes and nobody is told (a suspended process)
    /// - `isolate N`, `cut N M`, `block FROM TO` (one way), `heal`, `crash N [KEPT]`,
    ///   `restart N`, `lose N INDEX` (a peer that is down loses its log after INDEX)
    /// - `slowdisk N` / `sync N [COUNT]` / `fastdisk N`, `slowapply N` / `apply N`
    ///   / `fastapply N`
    /// - `status`, `log N`, `progress N`, `lease N`, `members N`
    fn command(&mut self, command: &Command) -> Outcome {
        match command.name.as_str() {
            "cluster" => return self.found(command),
            "change" => return self.change(command),
            _ => {}
        }
        let mut arguments = command.consume_args();
        let mut word = || arguments.next_pos().ok_or("a word is missing");
        match command.name.as_str() {
            "campaign" => {
                let id = peer(word()?)?;
                let now = self.now;
                self.node(id)?.group().campaign(now);
                self.collect(id);
            }
            "propose" => {
                let id = peer(word()?)?;
                while let Ok(text) = word() {
                    let now = self.now;
                    let command = Bytes::copy_from_slice(text.as_bytes());
                    match self.node(id)?.group().propose(now, command) {
                        Ok((index, term)) => {
                            self.tell(format!("{id} proposes {text} as {index}@{term}"));
                        }
                        Err(refusal) => self.tell(format!("{id} refuses {text}: {refusal}")),
                    }
                }
                self.collect(id);
            }
            "transfer" => {
                let id = peer(word()?)?;
                let to = word().ok().map(peer).transpose()?;
                let now = self.now;
                match self.node(id)?.group().transfer_leader(now, to) {
                    Ok(target) => self.tell(format!("{id} takes {target} for the next leader")),
                    Err(refusal) => self.tell(format!("{id} refuses the transfer: {refusal}")),
                }
                self.collect(id);
            }
            "read" => {
                let id = peer(word()?)?;
                while let Ok(read) = word() {
                    let (now, number) = (self.now, read.parse()?);
                    if let Err(refusal) = self.node(id)?.group().read_index(now, number) {
                        self.tell(format!("{id} refuses read {read}: {refusal}"));
                    }
                }
                self.collect(id);
            }
            "compact" => {
                let (id, index) = (peer(word()?)?, LogIndex(word()?.parse()?));
                self.node(id)?.compact(index);
                let first = self.node(id)?.group().first_index();
                self.tell(format!("{id} keeps its log from {first} on"));
            }
            "unreachable" => {
                let (id, other) = (peer(word()?)?, peer(word()?)?);
                self.node(id)?.group().unreachable(other);
                self.collect(id);
            }
            "deliver" => match word() {
                Ok(from) => {
                    let (from, to) = (peer(from)?, peer(word()?)?);
                    let count = word().map_or(Ok(usize::MAX), str::parse)?;
                    self.deliver(|message| (message.from, message.to) == (from, to), count);
                }
                Err(_) => self.deliver(|_| true, usize::MAX),
            },
            "drop" => {
                let (from, to) = (peer(word()?)?, peer(word()?)?);
                let lost = |message: &Message| (message.from, message.to) == (from, to);
                for message in self.take(lost, usize::MAX) {
                    self.tell(format!("{} (lost)", words::message(&message)));
                    self.report_snapshot(&message, SnapshotOutcome::Failed);
                }
            }
            "again" => {
                let (from, to) = (peer(word()?)?, peer(word()?)?);
                let same = |message: &&Message| (message.from, message.to) == (from, to);
                let copies: Vec<_> = self.network.iter().filter(same).cloned().collect();
                self.network.extend(copies);
            }
            "settle" => {
                self.quiet = word().is_ok();
                self.settle();
            }
            "run" | "wait" | "sleep" => {
                let time = duration(word()?)?;
                self.quiet = word().is_ok();
                self.pass(time, command.name.as_str());
            }
            "isolate" => {
                let id = peer(word()?)?;
                for other in self.nodes.keys().filter(|other| **other != id) {
                    self.cut.extend([(id, *other), (*other, id)]);
                }
            }
            "cut" => {
                let (one, other) = (peer(word()?)?, peer(word()?)?);
                self.cut.extend([(one, other), (other, one)]);
            }
            "block" => {
                self.cut.insert((peer(word()?)?, peer(word()?)?));
            }
            "heal" => self.cut.clear(),
            "crash" => {
                let id = peer(word()?)?;
                let kept = word().map_or(Ok(0), str::parse)?;
                self.node(id)?.crash(kept);
                self.network.retain(|message| message.from != id);
                self.tell(format!("{id} is down"));
            }
            "restart" => {
                let (id, now) = (peer(word()?)?, self.now);
                let node = self.nodes.get_mut(&id).ok_or("there is no such peer")?;
                match node.try_restart(now) {
                    Ok(()) => self.tell_status(id),
                    Err(refusal) => self.tell(format!("{id} does not start: {refusal}")),
                }
                self.work(id);
            }
            "lose" => {
                let (id, index) = (peer(word()?)?, LogIndex(word()?.parse()?));
                let node = self.nodes.get(&id).filter(|node| !node.is_up());
                node.ok_or("only a peer that is down loses data")?.disk.borrow_mut().lose(index);
            }
            "slowdisk" => self.slow_disks.extend([peer(word()?)?]),
            "fastdisk" => {
                let id = peer(word()?)?;
                self.slow_disks.remove(&id);
                self.work(id);
            }
            "sync" => {
                let id = peer(word()?)?;
                let count = word().map_or(Ok(usize::MAX), str::parse)?;
                let now = self.now;
                self.node(id)?.finish_writes(now, count);
                self.collect(id);
            }
            "slowapply" => self.slow_machines.extend([peer(word()?)?]),
            "fastapply" => {
                let id = peer(word()?)?;
                self.slow_machines.remove(&id);
                self.work(id);
            }
            "apply" => {
                let (id, now) = (peer(word()?)?, self.now);
                self.node(id)?.apply(now, usize::MAX);
                self.collect(id);
            }
            "status" => {
                let ids: Vec<_> = self.nodes.keys().copied().collect();
                ids.into_iter().for_each(|id| self.tell_status(id));
            }
            "log" => {
                let id = peer(word()?)?;
                let node = self.nodes.get(&id).ok_or("there is no such peer")?;
                let entries: Vec<_> = node.mirror.values().map(words::entry).collect();
                self.tell(format!("{id}: {}", entries.join(" ")));
            }
            "progress" => {
                let id = peer(word()?)?;
                let lines: Vec<_> = self.node(id)?.group().progress().collect();
                for (other, progress) in lines {
                    self.tell(words::progress(other, &progress));
                }
            }
            "lease" => {
                let (id, now) = (peer(word()?)?, self.now);
                let lease = self.node(id)?.group().lease_until();
                self.tell(match lease {
                    Some(until) if until > now => {
                        format!("{id} may read alone for {:?}", until - now)
                    }
                    Some(_) => format!("{id}'s lease has run out"),
                    None => format!("{id} has no lease"),
                });
            }
            "members" => {
                let id = peer(word()?)?;
                let members = words::members(self.node(id)?.group().configuration());
                self.tell(format!("{id}: {members}"));
            }
            other => return Err(format!("there is no command {other}").into()),
        }
        arguments.reject_next()
    }

    fn change(&mut self, command: &Command) -> Outcome {
        let mut arguments = command.consume_args();
        let id = peer(arguments.next_pos().ok_or("whom?")?)?;
        let mut change = ConfChange::default();
        while let Some((key, value)) = arguments.next_key() {
            let step = match key {
                "add" => ChangeStep::AddVoter,
                "remove" => ChangeStep::Remove,
                "learner" => ChangeStep::AddLearner,
                "witness" => ChangeStep::AddWitness,
                "leave" if value == "explicit" => {
                    change.leave = LeaveJoint::Explicit;
                    continue;
                }
                other => return Err(format!("{other}={value} is no step").into()),
            };
            change.steps.extend(peers(value)?.into_iter().map(step));
        }
        let now = self.now;
        match self.node(id)?.group().propose_change(now, change) {
            Ok((index, term)) => self.tell(format!("{id} proposes the change as {index}@{term}")),
            Err(refusal) => self.tell(format!("{id} refuses the change: {refusal}")),
        }
        self.collect(id);
        arguments.reject_next()
    }

    fn found(&mut self, command: &Command) -> Outcome {
        let mut arguments = command.consume_args();
        let mut config = Config {
            election_timeout: Duration::from_millis(100),
            heartbeat_interval: Duration::from_millis(20),
            ..Config::default()
        };
        let mut members = Configuration::default();
        let (mut empty, mut slower) = (Vec::new(), None);
        while let Some((key, value)) = arguments.next_key() {
            match key {
                "voters" => members.voters = peers(value)?.into_iter().collect(),
                "witnesses" => members.witnesses = peers(value)?.into_iter().collect(),
                "learners" => members.learners = peers(value)?.into_iter().collect(),
                "new" => empty = peers(value)?,
                "append" => config.max_append_bytes = value.parse()?,
                "entry" => config.max_entry_bytes = value.parse()?,
                "inflight" => config.max_inflight_messages = value.parse()?,
                "inflightbytes" => config.max_inflight_bytes = value.parse()?,
                "uncommitted" => config.max_uncommitted_bytes = value.parse()?,
                "cache" => config.max_entry_cache_bytes = value.parse()?,
                "prevote" => config.pre_vote = value != "no",
                "checkquorum" => config.check_quorum = value != "no",
                "priority" => {
                    let (id, priority) = value.split_once('/').ok_or("PEER/PRIORITY")?;
                    slower = Some((peer(id)?, priority.parse()?));
                }
                other => return Err(format!("there is no setting {other}").into()),
            }
        }
        *self = Story { now: Time(1_000_000_000), ..Story::default() };
        let start = (LogIndex(1), Term(1));
        let machine = Machine { index: start.0, term: start.1, digest: 0, configuration: members };
        let hard_state = HardState { term: start.1, vote: None, commit: start.0 };
        let founders: Vec<_> = machine.configuration.peers().collect();
        let disk = Disk { hard_state, compacted: start, machine, ..Disk::default() };
        for id in founders.into_iter().chain(empty.iter().copied()) {
            let disk = if empty.contains(&id) { Disk::default() } else { disk.clone() };
            let priority = slower.filter(|(slow, _)| *slow == id).map_or(0, |(_, p)| p);
            let settings = Settings { config: config.clone(), priority, seed: id.0 };
            self.nodes.insert(id, Node::create(id, settings, disk, self.now));
        }
        Ok(())
    }

    fn node(&mut self, id: PeerId) -> Result<&mut Node, Box<dyn Error>> {
        let node = self.nodes.get_mut(&id).ok_or("there is no such peer")?;
        if node.is_up() { Ok(node) } else { Err(format!("{id} is down").into()) }
    }

    fn tell(&mut self, line: String) {
        writeln!(self.told, "{line}").expect("a string takes everything");
    }

    fn tell_status(&mut self, id: PeerId) {
        let line = match &self.nodes[&id].group {
            Some(group) => words::status(group),
            None => format!("{id}: down"),
        };
        self.tell(line);
    }

    /// Collects what a peer wants, and lets its disk and its state machine work.
    fn collect(&mut self, id: PeerId) {
        let Some(node) = self.nodes.get_mut(&id) else { return };
        node.collect();
        let outgoing = std::mem::take(&mut node.outgoing);
        let events = std::mem::take(&mut node.events);
        self.network.extend(outgoing);
        for event in events {
            if let Event::SnapshotWanted(to) = event {
                let snapshot = self.nodes[&id].snapshot_for(to);
                self.network.extend(snapshot);
            }
            if let Some(line) = words::event(id, &event) {
                self.tell(line);
            }
        }
    }

    /// The disk and the state machine of one peer work until they are done.
    fn work(&mut self, id: PeerId) {
        loop {
            self.collect(id);
            let now = self.now;
            let Some(node) = self.nodes.get_mut(&id).filter(|node| node.is_up()) else { return };
            let fast_disk = !self.slow_disks.contains(&id);
            let fast_machine = !self.slow_machines.contains(&id);
            if fast_disk && node.writes_under_way() > 0 {
                node.finish_writes(now, usize::MAX);
            } else if fast_machine && node.applies_under_way() > 0 {
                node.apply(now, usize::MAX);
            } else if fast_disk && fast_machine && node.is_installing() {
                node.install(now);
            } else {
                return;
            }
        }
    }

    fn take(&mut self, wanted: impl Fn(&Message) -> bool, count: usize) -> Vec<Message> {
        let mut taken = Vec::new();
        self.network.retain(|message| {
            let take = taken.len() < count && wanted(message);
            if take {
                taken.push(message.clone());
            }
            !take
        });
        taken
    }

    /// Delivers what is under way now; what that leads to stays under way.
    fn deliver(&mut self, wanted: impl Fn(&Message) -> bool, count: usize) {
        let ids: Vec<_> = self.nodes.keys().copied().collect();
        ids.iter().for_each(|id| self.work(*id));
        for message in self.take(wanted, count) {
            let (from, to) = (message.from, message.to);
            let up = self.nodes.get(&to).is_some_and(Node::is_up);
            if !up || self.cut.contains(&(from, to)) {
                self.report_snapshot(&message, SnapshotOutcome::Failed);
                continue;
            }
            if !self.quiet {
                self.tell(words::message(&message));
            }
            let now = self.now;
            let taken = match self.nodes.get_mut(&to).and_then(|node| node.group.as_mut()) {
                Some(group) => group.step(now, message.clone()),
                None => Ok(()),
            };
            if let Err(error) = taken {
                self.tell(format!("{to} refuses: {error}"));
            }
            self.report_snapshot(&message, SnapshotOutcome::Delivered);
            self.work(to);
        }
    }

    fn report_snapshot(&mut self, message: &Message, outcome: SnapshotOutcome) {
        if matches!(message.body, MessageBody::InstallSnapshot { .. })
            && let Some(group) = self.nodes.get_mut(&message.from).and_then(|n| n.group.as_mut())
        {
            group.snapshot_sent(message.to, outcome);
        }
    }

    fn settle(&mut self) {
        const ROUNDS: usize = 1000;
        for _ in 0..ROUNDS {
            self.deliver(|_| true, usize::MAX);
            if self.network.is_empty() {
                return;
            }
        }
        panic!("the network does not come to rest");
    }

    /// Time passes, millisecond by millisecond.
    fn pass(&mut self, time: Duration, how: &str) {
        const STEP: Duration = Duration::from_millis(1);
        let end = self.now + time;
        while self.now < end {
            self.now = self.now + STEP;
            if how == "sleep" {
                continue;
            }
            let ids: Vec<_> = self.nodes.keys().copied().collect();
            for id in ids {
                let now = self.now;
                let Some(group) = self.nodes.get_mut(&id).and_then(|n| n.group.as_mut()) else {
                    continue;
                };
                if group.next_deadline().is_some_and(|deadline| deadline <= now) {
                    group.tick(now);
                    self.work(id);
                }
            }
            if how == "run" {
                self.settle();
            }
        }
    }
}
