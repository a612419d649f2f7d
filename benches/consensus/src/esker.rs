//! Esker's own core, `esker-raft`, driven as its documentation asks ("What flows
//! in, what flows out" in its `lib.rs`, and the order stated on [`Ready`]): messages
//! are sent at once, entries are written and reported with `persisted`, then
//! `messages_after_persist` go out, committed entries are applied and reported, and
//! the log is compacted behind them.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use esker_raft::{
    Config, Configuration, Entries, Entry, Group, GroupId, HardState, Identity, LogIndex,
    LogReadError, LogReader, Message, Payload, PeerId, Ready, Restored, RoleKind, Term, Time,
};

use crate::workload::{COMPACT_EVERY, Cluster, KEEP, Load, NODES, Tally, verify};

/// The position of the node that is elected.
const LEADER: usize = 0;

/// A log. A clone of it is lent to the core.
#[derive(Clone, Default)]
struct SharedLog(Rc<RefCell<Log>>);

/// The batches as the core shares them. Followers lag less than the core's own cache reaches back,
/// so the core reads nothing here but the end of the dropped entries.
#[derive(Default)]
struct Log {
    compacted: (LogIndex, Term),
    batches: VecDeque<Entries>,
}

impl Log {
    fn append(&mut self, entries: Entries) {
        let Some(first) = entries.first() else { return };
        let end = self.batches.back().and_then(Entries::last).map_or(self.compacted.0, |e| e.index);
        assert_eq!(first.index, end.next(), "one leader, so nothing is ever replaced");
        self.batches.push_back(entries);
    }

    /// Drops the batches that end at or before this index. Returns where the dropped entries end.
    fn compact(&mut self, index: LogIndex) -> (LogIndex, Term) {
        let ends = |batch: &Entries| batch.last().is_none_or(|last| last.index <= index);
        while let Some(batch) = self.batches.pop_front_if(|batch| ends(batch)) {
            let last = batch.last().expect("a batch has entries");
            self.compacted = (last.index, last.term);
        }
        self.compacted
    }
}

impl LogReader for SharedLog {
    fn entries(
        &self,
        low: LogIndex,
        high: LogIndex,
        max_bytes: usize,
    ) -> Result<Vec<Entry>, LogReadError> {
        let log = self.0.borrow();
        if low <= log.compacted.0 {
            return Err(LogReadError::Compacted { index: low });
        }
        let mut found: Vec<Entry> = Vec::new();
        let mut bytes = 0;
        let entries = log.batches.iter().flatten();
        for entry in entries.filter(|entry| entry.index >= low && entry.index < high) {
            bytes += entry.bytes();
            if bytes > max_bytes && !found.is_empty() {
                break;
            }
            found.push(entry.clone());
        }
        Ok(found)
    }

    fn term(&self, index: LogIndex) -> Result<Option<Term>, LogReadError> {
        let log = self.0.borrow();
        if index <= log.compacted.0 {
            return Ok((index == log.compacted.0).then_some(log.compacted.1));
        }
        let mut entries = log.batches.iter().flatten();
        Ok(entries.find(|entry| entry.index == index).map(|entry| entry.term))
    }
}

struct Node {
    group: Group<SharedLog>,
    log: SharedLog,
    hard_state: HardState,
    compacted: LogIndex,
    machine: Tally,
    /// Whether the node got any input since it last worked.
    busy: bool,
}

impl Node {
    fn new(id: u64) -> Node {
        let log = SharedLog::default();
        let configuration = Configuration::of_voters((1..=NODES as u64).map(PeerId));
        let restored = Restored { configuration, ..Restored::default() };
        let me = Identity { group: GroupId(1), peer: PeerId(id) };
        let config = Arc::new(Config { seed: id, ..Config::default() });
        let group = Group::create(me, config, log.clone(), restored, Time(0));
        let group = group.expect("an empty log makes sense");
        let hard_state = HardState::default();
        Node {
            group,
            log,
            hard_state,
            compacted: LogIndex(0),
            machine: Tally::default(),
            busy: false,
        }
    }

    fn compact(&mut self, applied: LogIndex) {
        if applied.0 - self.compacted.0 >= COMPACT_EVERY + KEEP {
            let (index, term) = self.log.0.borrow_mut().compact(LogIndex(applied.0 - KEEP));
            self.group.compacted(index, term);
            self.compacted = index;
        }
    }
}

pub struct Esker {
    nodes: [Node; NODES],
    /// The Ready that is being carried out. Its memory is used again.
    ready: Ready,
    now: Time,
    expected: Tally,
}

impl Esker {
    pub fn start() -> Esker {
        let mut cluster = Esker {
            nodes: [1, 2, 3].map(Node::new),
            ready: Ready::default(),
            now: Time(0),
            expected: Tally::default(),
        };
        cluster.nodes[LEADER].group.campaign(Time(0));
        cluster.nodes[LEADER].busy = true;
        cluster.pump(Time(0));
        let role = cluster.nodes[LEADER].group.role();
        assert_eq!(role, RoleKind::Leader, "nobody contests it");
        cluster
    }

    /// Lets the nodes work by turns, until none has anything to do.
    fn pump(&mut self, now: Time) {
        let Esker { nodes, ready, .. } = self;
        while nodes.iter().any(|node| node.busy) {
            for at in 0..NODES {
                if !std::mem::take(&mut nodes[at].busy) {
                    continue;
                }
                while nodes[at].group.ready_into(ready) {
                    carry_out(nodes, at, now, ready);
                }
            }
        }
    }
}

fn carry_out(nodes: &mut [Node; NODES], at: usize, now: Time, ready: &mut Ready) {
    deliver(nodes, now, &mut ready.messages);
    let node = &mut nodes[at];
    if !ready.entries.is_empty() {
        node.log.0.borrow_mut().append(std::mem::take(&mut ready.entries));
    }
    if let Some(state) = ready.hard_state {
        node.hard_state = state;
    }
    node.group.persisted(now, ready.number);
    deliver(nodes, now, &mut ready.messages_after_persist);
    let node = &mut nodes[at];
    for entry in &ready.committed {
        if let Payload::Command(command) = &entry.payload {
            node.machine.apply(command);
        }
    }
    if let Some(last) = ready.committed.last().map(|last| last.index) {
        node.group.applied(last);
        node.compact(last);
    }
}

fn deliver(nodes: &mut [Node; NODES], now: Time, messages: &mut Vec<Message>) {
    for message in messages.drain(..) {
        let to = &mut nodes[(message.to.0 - 1) as usize];
        to.group.step(now, message).expect("peers are correct");
        to.busy = true;
    }
}

impl Cluster for Esker {
    fn run(&mut self, steps: u64, load: Load) {
        for _ in 0..steps {
            // Some time passes, but no node is ticked.
            self.now = self.now + Duration::from_micros(1);
            let now = self.now;
            for _ in 0..load.proposals {
                let leader = &mut self.nodes[LEADER].group;
                leader.propose(now, Bytes::from(load.command())).expect("it leads");
            }
            self.nodes[LEADER].busy = true;
            self.pump(now);
            self.expected = load.after(1, self.expected);
            verify(self.nodes.each_ref().map(|node| node.machine), self.expected);
        }
    }
}
