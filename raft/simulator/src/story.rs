//! A cluster that a script drives, and that records what happens.

mod script;
mod words;

use std::collections::BTreeSet;
use std::error::Error;
use std::fmt::Write as _;
use std::time::Duration;

use esker_raft::{LogIndex, Message, PeerId};
use goldenscript::{Block, Command, Context, Runner};

use super::action::Action;
use super::driver::Node;
use super::settle;
use super::setup::Setup;
use super::violation::Violation;
use super::world::{Effect, World};

use script::{duration, peer};
pub use script::{padded, tell_action, tell_setup};
pub use words::members;

type Outcome<T = ()> = Result<T, Box<dyn Error>>;

/// A cluster and the story so far. The network keeps the order of messages between two peers, and
/// delivers them only on command.
#[derive(Default)]
pub struct Story {
    world: Option<World>,
    setup: Setup,
    cut: BTreeSet<(PeerId, PeerId)>,
    /// Disks and state machines work only on command, time passes without ticks, and messages
    /// outlive their sender.
    manual: bool,
    /// Peers with a disk that finishes writes only on command.
    slow_disks: BTreeSet<PeerId>,
    /// Peers with a state machine that applies entries only on command.
    slow_machines: BTreeSet<PeerId>,
    told: String,
    /// The output of earlier commands.
    before: String,
    quiet: bool,
    /// The promise that was broken, if one was. The story ends there.
    pub violation: Option<Violation>,
}

impl Runner for Story {
    type Command = Command;

    fn run(&mut self, command: &Command, _: &Context) -> Outcome<String> {
        self.told.clear();
        self.command(command)?;
        self.before += &self.told;
        Ok(std::mem::take(&mut self.told))
    }

    fn start_block(&mut self, _: &Block) -> Outcome<String> {
        self.quiet = false;
        Ok(String::new())
    }
}

impl Story {
    /// A story that begins with this cluster, in manual mode.
    pub fn of(setup: &Setup) -> Story {
        let mut story = Story::default();
        story.found(setup.clone(), true);
        story
    }

    /// All output so far, up to where the story broke off.
    pub fn so_far(&self) -> String {
        format!("{}{}", self.before, self.told)
    }

    /// Performs one action. Returns its effects as text.
    ///
    /// # Errors
    /// If it broke a promise.
    pub fn perform(&mut self, action: &Action) -> Result<String, Violation> {
        self.told.clear();
        match self.act(action) {
            Ok(_) => Ok(std::mem::take(&mut self.told)),
            Err(error) => match self.violation.take() {
                Some(violation) => Err(violation),
                None => panic!("an action failed without breaking a promise: {error}"),
            },
        }
    }

    /// The language:
    ///
    /// - `cluster voters=1/2/3 learners=4 witnesses=3 new=5 …` founds a group behind index 1 of
    ///   term 1; `new` peers are empty. Settings: `append=BYTES entry=BYTES inflight=N
    ///   inflightbytes=BYTES uncommitted=BYTES cache=BYTES heartbeat=20ms prevote=no checkquorum=no
    ///   lazysync=yes`, `fresh=yes` (founders begin in term 0 before index 1), and of single peers
    ///   `priority=2/-1 seed=2/7`, `rate=2/1050` (of its clock, true is 1000), `ahead=2/1.5ms` (its
    ///   clock, at the beginning). Election timeout 100 ms, heartbeats every 20 ms. `cluster manual
    ///   …`: disks and machines work only on command, `wait` ticks no peer, and messages outlive a
    ///   crash of their sender
    /// - `campaign N`, `propose N WORD… [size=BYTES]`, `change N add=4/5 remove=3 learner=2
    ///   witness=6 [leave=explicit]` (without steps: leave), `transfer N [M]`, `read N ID…`,
    ///   `leaseread N`, `compact N INDEX`, `unreachable N M`
    /// - `deliver [FROM TO [COUNT]]`: delivers the messages under way, without their replies; `drop
    ///   FROM TO` loses them; `again FROM TO` doubles them. With `at=P` each command takes the one
    ///   message behind P others. `settle [quiet]`: delivers everything until nothing happens any
    ///   more
    /// - `run 200ms [quiet]`: time passes, everything is delivered at once; `wait 1.25ms`: time
    ///   passes for all peers and nothing is delivered; `sleep 200ms`: time passes without ticks (a
    ///   suspended process); `tick N`: ticks one peer
    /// - `isolate N`, `cut N M`, `block FROM TO` (one way), `heal`, `crash N [KEPT]`, `restart N`,
    ///   `lose N INDEX` (a peer that is down loses its log after INDEX, and checks stop), `hold N`
    ///   (its driver is busy), `release N`
    /// - `slowdisk N` / `sync N [COUNT]` / `fastdisk N`, `slowapply N` / `apply N [COUNT]` /
    ///   `fastapply N`, `install N` installs a snapshot, `save N` syncs the machine
    /// - `recover SEED`: faults end; the group must work again before long
    /// - `status`, `log N`, `progress N`, `lease N`, `members N`
    fn command(&mut self, command: &Command) -> Outcome {
        match command.name.as_str() {
            "cluster" => {
                let (setup, manual) = script::setup(command)?;
                self.found(setup, manual);
                return Ok(());
            }
            "change" => {
                let (peer, change) = script::change(command)?;
                self.running(peer)?;
                return self.act(&Action::Change { peer, change }).map(drop);
            }
            "propose" => return self.propose(command),
            "read" => return self.read(command),
            "deliver" | "drop" | "again" => return self.network(command),
            _ => {}
        }
        let mut arguments = command.consume_args();
        let mut word = || arguments.next_pos().ok_or("a word is missing");
        match command.name.as_str() {
            "settle" => {
                self.quiet = word().is_ok();
                self.settle()?;
            }
            "run" | "wait" | "sleep" => {
                let time = duration(word()?)?;
                self.quiet = word().is_ok();
                self.pass(time, command.name.as_str())?;
            }
            "isolate" => {
                let id = peer(word()?)?;
                for other in self.ids().into_iter().filter(|other| *other != id) {
                    self.cut.extend([(id, other), (other, id)]);
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
            "lose" => {
                let (id, index) = (peer(word()?)?, LogIndex(word()?.parse()?));
                if self.running(id).is_ok() {
                    return Err("only a peer that is down loses data".into());
                }
                self.world.as_mut().ok_or("there is no cluster")?.lose_disk(id, index);
            }
            "recover" => {
                let seed = word()?.parse()?;
                let mut world = self.world.take().ok_or("there is no cluster")?;
                let recovery = settle::recover(&mut world, &self.setup, seed, |_| {});
                self.world = Some(world);
                let time = recovery.inspect_err(|broken| self.violation = Some(broken.clone()))?;
                self.tell(format!("the group has recovered after {} ms", time / 1_000_000));
            }
            "slowdisk" => self.slow_disks.extend([peer(word()?)?]),
            "fastdisk" => {
                let id = peer(word()?)?;
                self.slow_disks.remove(&id);
                self.work(id)?;
            }
            "slowapply" => self.slow_machines.extend([peer(word()?)?]),
            "fastapply" => {
                let id = peer(word()?)?;
                self.slow_machines.remove(&id);
                self.work(id)?;
            }
            "status" => self.ids().into_iter().for_each(|id| self.tell_status(id)),
            "log" => {
                let id = peer(word()?)?;
                let node = self.world()?.node(id).ok_or("there is no such peer")?;
                let entries: Vec<_> = node.mirror.iter().map(words::entry).collect();
                self.tell(format!("{id}: {}", entries.join(" ")));
            }
            "progress" => {
                let group = self.running(peer(word()?)?)?.group.as_ref();
                let lines = group.into_iter().flat_map(|group| group.progress());
                let lines: Vec<_> = lines.map(|(id, it)| words::progress(id, &it)).collect();
                lines.into_iter().for_each(|line| self.tell(line));
            }
            "lease" => self.tell_lease(peer(word()?)?)?,
            "members" => {
                let id = peer(word()?)?;
                let group = self.running(id)?.group.as_ref();
                let members = group.map(|group| words::members(group.configuration()));
                self.tell(format!("{id}: {}", members.unwrap_or_default()));
            }
            name => {
                let id = peer(word()?)?;
                let more = std::iter::from_fn(|| word().ok()).collect::<Vec<_>>();
                self.peer_command(name, id, &more)?;
            }
        }
        arguments.reject_next()
    }

    /// A command that concerns one peer.
    fn peer_command(&mut self, name: &str, id: PeerId, more: &[&str]) -> Outcome {
        let number = |or| more.first().map_or(Ok(or), |word| word.parse::<usize>());
        let mut expected = 0..=0;
        let action = match name {
            "campaign" => Action::Campaign(id),
            "tick" => Action::Tick(id),
            "hold" => Action::Hold(id),
            "release" => Action::Release(id),
            "install" => Action::Install(id),
            "save" => Action::Save(id),
            "leaseread" => Action::LeaseRead(id),
            "restart" => Action::Restart(id),
            _ => {
                expected = 0..=1;
                match name {
                    "sync" => Action::Sync { peer: id, count: number(usize::MAX)? },
                    "apply" => Action::Apply { peer: id, count: number(usize::MAX)? },
                    "crash" => Action::Crash { peer: id, kept: number(0)? },
                    "transfer" => {
                        let to = more.first().map(|word| peer(word)).transpose()?;
                        Action::Transfer { peer: id, to }
                    }
                    _ => {
                        expected = 1..=1;
                        let one = more.first().ok_or("a word is missing")?;
                        match name {
                            "compact" => {
                                Action::Compact { peer: id, index: LogIndex(one.parse()?) }
                            }
                            "unreachable" => Action::Unreachable { peer: id, other: peer(one)? },
                            other => return Err(format!("there is no command {other}").into()),
                        }
                    }
                }
            }
        };
        if !expected.contains(&more.len()) {
            return Err(format!("{name} does not take {} words", more.len()).into());
        }
        if !self.manual && name != "restart" {
            self.running(id)?;
        }
        self.act(&action)?;
        match name {
            "compact" => {
                let group = self.running(id).ok().and_then(|node| node.group.as_ref());
                if let Some(first) = group.map(|group| group.first_index()) {
                    self.tell(format!("{id} keeps its log from {first} on"));
                }
            }
            "crash" if !self.manual => {
                for serial in self.under_way(|message| message.from == id) {
                    self.lose(serial, false)?;
                }
            }
            "restart" if self.running(id).is_ok() => {
                self.tell_status(id);
                self.work(id)?;
            }
            _ => {}
        }
        Ok(())
    }

    fn found(&mut self, setup: Setup, manual: bool) {
        let mut world = World::new(&setup);
        world.heard = Some(Vec::new());
        world.strict = manual;
        *self = Story { world: Some(world), setup, manual, ..Story::default() };
    }

    fn world(&self) -> Outcome<&World> {
        Ok(self.world.as_ref().ok_or("there is no cluster")?)
    }

    fn ids(&self) -> Vec<PeerId> {
        let nodes = self.world.iter().flat_map(|world| &world.nodes);
        nodes.map(|node| node.id).collect()
    }

    fn running(&self, id: PeerId) -> Outcome<&Node> {
        let node = self.world()?.node(id).ok_or("there is no such peer")?;
        if node.is_up() { Ok(node) } else { Err(format!("{id} is down").into()) }
    }

    fn tell(&mut self, line: String) {
        writeln!(self.told, "{line}").expect("a string takes everything");
    }

    fn tell_status(&mut self, id: PeerId) {
        let node = self.world.as_ref().and_then(|world| world.node(id));
        let line = match node.and_then(|node| node.group.as_ref()) {
            Some(group) => words::status(group),
            None => format!("{id}: down"),
        };
        self.tell(line);
    }

    fn tell_lease(&mut self, id: PeerId) -> Outcome {
        let lease = self.running(id)?.group.as_ref().and_then(|group| group.lease_until());
        let world = self.world()?;
        let now = world.at(id).map_or_else(Default::default, |at| world.local(at));
        self.tell(match lease {
            Some(until) if until > now => {
                format!("{id} may read alone for {:?}", until - now)
            }
            Some(_) => format!("{id}'s lease has run out"),
            None => format!("{id} has no lease"),
        });
        Ok(())
    }

    /// Performs an action, and records its effects.
    fn act(&mut self, action: &Action) -> Outcome<Effect> {
        let world = self.world.as_mut().ok_or("there is no cluster")?;
        let effect = match world.execute(action) {
            Ok(effect) => effect,
            Err(violation) => {
                self.violation = Some(violation.clone());
                return Err(violation.into());
            }
        };
        world.posted.clear();
        let heard = world.heard.as_mut().map(std::mem::take).unwrap_or_default();
        if let Some(line) = words::effect(action, &effect) {
            self.tell(line);
        }
        if let Effect::Delivered(message, taken) = &effect {
            if !self.quiet {
                self.tell(words::message(message));
            }
            if let Err(error) = taken {
                self.tell(format!("{} refuses: {error}", message.to));
            }
        }
        for (id, event) in heard {
            if let Some(line) = words::event(id, &event) {
                self.tell(line);
            }
        }
        Ok(effect)
    }

    /// Several words are proposed together, as by a driver that batches.
    fn propose(&mut self, command: &Command) -> Outcome {
        let mut arguments = command.consume_args();
        let peer = peer(arguments.next_pos().ok_or("whom?")?)?;
        let words: Vec<_> = std::iter::from_fn(|| arguments.next_pos()).collect();
        let size = arguments.take_key("size").map_or(Ok(0), str::parse)?;
        arguments.reject_next()?;
        if !self.manual {
            self.running(peer)?;
        }
        let propose = |word| Action::Propose { peer, command: padded(word, size) };
        self.together(peer, words.into_iter().map(propose).collect())
    }

    /// Several reads come together.
    fn read(&mut self, command: &Command) -> Outcome {
        let mut arguments = command.consume_args();
        let peer = peer(arguments.next_pos().ok_or("whom?")?)?;
        let words: Vec<_> = std::iter::from_fn(|| arguments.next_pos()).collect();
        arguments.reject_next()?;
        let ids: Vec<u64> = words.into_iter().map(str::parse).collect::<Result<_, _>>()?;
        if !self.manual {
            self.running(peer)?;
        }
        let actions = ids.into_iter().map(|id| Action::Read { peer, id });
        self.together(peer, actions.collect())
    }

    /// Gives several inputs to the core before the driver takes the next Ready.
    fn together(&mut self, peer: PeerId, actions: Vec<Action>) -> Outcome {
        let together = actions.len() > 1;
        if together {
            self.act(&Action::Hold(peer))?;
        }
        for action in actions {
            self.act(&action)?;
        }
        if together {
            self.act(&Action::Release(peer))?;
        }
        Ok(())
    }

    /// Delivers, loses or doubles messages.
    fn network(&mut self, command: &Command) -> Outcome {
        let mut arguments = command.consume_args();
        let name = command.name.as_str();
        let single = arguments.take_key("at").map(str::parse::<usize>).transpose()?;
        let pair = match (arguments.next_pos(), arguments.next_pos()) {
            (Some(from), Some(to)) => Some((peer(from)?, peer(to)?)),
            (None, None) if name == "deliver" => None,
            _ => return Err("a word is missing".into()),
        };
        let count = arguments.next_pos().map_or(Ok(usize::MAX), str::parse)?;
        arguments.reject_next()?;
        if let (Some((from, to)), Some(at)) = (pair, single) {
            let effect = self.act(&match name {
                "deliver" => Action::Deliver { from, to, at },
                "drop" => Action::Drop { from, to, at },
                _ => Action::Again { from, to, at },
            })?;
            if let Effect::Lost(message) = effect {
                self.tell(format!("{} (lost)", words::message(&message)));
            }
            return Ok(());
        }
        let wanted = |message: &Message| pair.is_none_or(|pair| (message.from, message.to) == pair);
        match name {
            "deliver" => self.deliver(wanted, count),
            "drop" => {
                self.under_way(wanted).into_iter().try_for_each(|serial| self.lose(serial, true))
            }
            _ => {
                for serial in self.under_way(wanted) {
                    if let Some((from, to, at)) = self.place(serial) {
                        self.act(&Action::Again { from, to, at })?;
                    }
                }
                Ok(())
            }
        }
    }

    /// The serials of messages under way, in the order in which they were sent.
    fn under_way(&self, wanted: impl Fn(&Message) -> bool) -> Vec<u64> {
        let Some(world) = &self.world else { return Vec::new() };
        let pairs = (0..world.nodes.len())
            .flat_map(|from| (0..world.nodes.len()).map(move |to| (from, to)));
        let parcels = pairs.flat_map(|(from, to)| world.queue(from, to));
        let wanted = parcels.filter(|parcel| wanted(&parcel.message));
        let mut serials: Vec<_> = wanted.map(|parcel| parcel.serial).collect();
        serials.sort_unstable();
        serials
    }

    /// Where a message is.
    fn place(&self, serial: u64) -> Option<(PeerId, PeerId, usize)> {
        let world = self.world.as_ref()?;
        let count = world.nodes.len();
        (0..count * count).find_map(|pair| {
            let (from, to) = (pair / count, pair % count);
            let mut parcels = world.queue(from, to).iter();
            let at = parcels.position(|parcel| parcel.serial == serial)?;
            Some((world.nodes[from].id, world.nodes[to].id, at))
        })
    }

    fn lose(&mut self, serial: u64, tell: bool) -> Outcome {
        let Some((from, to, at)) = self.place(serial) else { return Ok(()) };
        if let Effect::Lost(message) = self.act(&Action::Drop { from, to, at })?
            && tell
        {
            self.tell(format!("{} (lost)", words::message(&message)));
        }
        Ok(())
    }

    /// Lets the disk and the state machine of one peer work until they are done.
    fn work(&mut self, id: PeerId) -> Outcome {
        if self.manual {
            return Ok(());
        }
        loop {
            let Ok(node) = self.running(id) else { return Ok(()) };
            let fast_disk = !self.slow_disks.contains(&id);
            let fast_machine = !self.slow_machines.contains(&id);
            let action = if fast_disk && node.writes_under_way() > 0 {
                Action::Sync { peer: id, count: usize::MAX }
            } else if fast_machine && node.applies_under_way() > 0 {
                Action::Apply { peer: id, count: usize::MAX }
            } else if fast_disk && fast_machine && node.may_install() {
                Action::Install(id)
            } else {
                return Ok(());
            };
            self.act(&action)?;
        }
    }

    /// Delivers the messages that are under way now. Messages that these cause stay under way.
    fn deliver(&mut self, wanted: impl Fn(&Message) -> bool, count: usize) -> Outcome {
        for id in self.ids() {
            self.work(id)?;
        }
        for serial in self.under_way(wanted).into_iter().take(count) {
            let Some((from, to, at)) = self.place(serial) else { continue };
            if self.running(to).is_err() || self.cut.contains(&(from, to)) {
                self.lose(serial, false)?;
            } else {
                self.act(&Action::Deliver { from, to, at })?;
                self.work(to)?;
            }
        }
        Ok(())
    }

    fn settle(&mut self) -> Outcome {
        const ROUNDS: usize = 1000;
        for _ in 0..ROUNDS {
            self.deliver(|_| true, usize::MAX)?;
            if self.under_way(|_| true).is_empty() {
                return Ok(());
            }
        }
        Err("the network does not come to rest".into())
    }

    /// Lets time pass, millisecond by millisecond.
    fn pass(&mut self, time: Duration, how: &str) -> Outcome {
        const STEP: Duration = Duration::from_millis(1);
        let mut left = time;
        if self.manual {
            let nanos = u64::try_from(time.as_nanos())?;
            return self.act(&Action::Pass(nanos)).map(drop);
        }
        while !left.is_zero() {
            let step = left.min(STEP);
            left -= step;
            self.act(&Action::Pass(u64::try_from(step.as_nanos())?))?;
            if how == "sleep" {
                continue;
            }
            for id in self.ids() {
                let world = self.world()?;
                let deadline = world.at(id).and_then(|at| world.deadline(at));
                if deadline.is_some_and(|deadline| deadline <= world.now()) {
                    self.act(&Action::Tick(id))?;
                    self.work(id)?;
                }
            }
            if how == "run" {
                self.settle()?;
            }
        }
        Ok(())
    }
}
