//! The crate `raft` (TiKV's raft-rs), driven as the section "Processing the `Ready` State" of its
//! documentation describes, step by step, with `advance` at the end of each [`raft::Ready`] and the
//! [`raft::LightReady`] handled like it.
//!
//! Where the documentation leaves a choice, the cheaper one is taken. A storage of our own ("you
//! will likely want your own") moves entries where `MemStorage` would copy them and take a lock.
//! Proposals that come together are proposed together, as a follower would pass them on. That is
//! cheaper than as many calls of `propose` followed by `batch_append`. And nothing is logged.

use std::collections::VecDeque;

use raft::eraftpb::{ConfState, Entry, HardState, Message, MessageType, Snapshot};
use raft::{
    Config, Error, GetEntriesContext, LightReady, NO_LIMIT, RaftState, RawNode, Result, StateRole,
    Storage, StorageError,
};
use slog::{Discard, Logger, o};

use crate::workload::{COMPACT_EVERY, Cluster, KEEP, Load, NODES, Tally, verify};

pub const NAME: &str =
    if cfg!(feature = "protobuf-codec") { "raft-rs (protobuf)" } else { "raft-rs (prost)" };

/// The position of the node that is elected.
const LEADER: usize = 0;

#[derive(Default)]
struct Log {
    hard_state: HardState,
    conf_state: ConfState,
    /// Index and term of the last entry that was dropped.
    compacted: (u64, u64),
    entries: VecDeque<Entry>,
}

impl Log {
    fn position(&self, index: u64) -> usize {
        (index - self.compacted.0 - 1) as usize
    }

    fn append(&mut self, entries: Vec<Entry>) {
        if let Some(first) = entries.first() {
            self.entries.truncate(self.position(first.index));
        }
        self.entries.extend(entries);
    }

    fn compact(&mut self, applied: u64) {
        if applied - self.compacted.0 >= COMPACT_EVERY + KEEP {
            let mut dropped = self.entries.drain(..=self.position(applied - KEEP));
            let last = dropped.next_back().expect("what is applied is in the log");
            drop(dropped);
            self.compacted = (last.index, last.term);
        }
    }
}

impl Storage for Log {
    fn initial_state(&self) -> Result<RaftState> {
        Ok(RaftState::new(self.hard_state.clone(), self.conf_state.clone()))
    }

    fn entries(
        &self,
        low: u64,
        high: u64,
        max_size: impl Into<Option<u64>>,
        _context: GetEntriesContext,
    ) -> Result<Vec<Entry>> {
        if low <= self.compacted.0 {
            return Err(Error::Store(StorageError::Compacted));
        }
        let range = self.entries.range(self.position(low)..self.position(high));
        let mut entries = range.cloned().collect();
        raft::util::limit_size(&mut entries, max_size.into());
        Ok(entries)
    }

    fn term(&self, index: u64) -> Result<u64> {
        if index <= self.compacted.0 {
            let known = (index == self.compacted.0).then_some(self.compacted.1);
            return known.ok_or(Error::Store(StorageError::Compacted));
        }
        let entry = self.entries.get(self.position(index));
        entry.map(|entry| entry.term).ok_or(Error::Store(StorageError::Unavailable))
    }

    fn first_index(&self) -> Result<u64> {
        Ok(self.compacted.0 + 1)
    }

    fn last_index(&self) -> Result<u64> {
        Ok(self.compacted.0 + self.entries.len() as u64)
    }

    fn snapshot(&self, _request_index: u64, _to: u64) -> Result<Snapshot> {
        unreachable!("no node lags behind what others keep")
    }
}

struct Node {
    raft: RawNode<Log>,
    machine: Tally,
    /// Whether the node got any input since it last worked.
    busy: bool,
}

impl Node {
    fn new(id: u64) -> Node {
        let voters = (1..=NODES as u64).collect::<Vec<_>>();
        let log = Log { conf_state: ConfState::from((voters, vec![])), ..Log::default() };
        // All new entries are sent in one message. By default each message has one entry.
        let config = Config { max_size_per_msg: NO_LIMIT, ..Config::new(id) };
        config.validate().expect("these settings make sense");
        let logger = Logger::root(Discard, o!());
        let raft = RawNode::new(&config, log, &logger).expect("an empty log makes sense");
        Node { raft, machine: Tally::default(), busy: false }
    }

    fn apply(&mut self, committed: Vec<Entry>) {
        for entry in committed {
            // A new leader's first entry is empty, and no command is empty.
            if !entry.data.is_empty() {
                self.machine.apply(&entry.data);
            }
        }
    }
}

/// The proposals that come together, in one message.
#[allow(clippy::useless_conversion, reason = "the other codec has collections of its own")]
fn proposals(load: Load) -> Message {
    let entry = |_| Entry { data: load.command().into(), ..Entry::default() };
    let entries: Vec<_> = (0..load.proposals).map(entry).collect();
    let mut message = Message::default();
    message.set_msg_type(MessageType::MsgPropose);
    message.set_entries(entries.into());
    message
}

pub struct RaftRs {
    nodes: [Node; NODES],
    expected: Tally,
}

impl RaftRs {
    pub fn start() -> RaftRs {
        let mut cluster = RaftRs { nodes: [1, 2, 3].map(Node::new), expected: Tally::default() };
        cluster.nodes[LEADER].raft.campaign().expect("a voter may campaign");
        cluster.nodes[LEADER].busy = true;
        cluster.pump();
        let role = cluster.nodes[LEADER].raft.raft.state;
        assert_eq!(role, StateRole::Leader, "nobody contests it");
        cluster
    }

    /// Lets the nodes work by turns, until none has anything to do.
    fn pump(&mut self) {
        while self.nodes.iter().any(|node| node.busy) {
            for at in 0..NODES {
                if !std::mem::take(&mut self.nodes[at].busy) {
                    continue;
                }
                while self.nodes[at].raft.has_ready() {
                    self.carry_out(at);
                }
            }
        }
    }

    fn carry_out(&mut self, at: usize) {
        let mut ready = self.nodes[at].raft.ready();
        self.deliver(ready.take_messages());
        let node = &mut self.nodes[at];
        node.apply(ready.take_committed_entries());
        let log = node.raft.mut_store();
        log.append(ready.take_entries());
        if let Some(state) = ready.hs() {
            log.hard_state = state.clone();
        }
        self.deliver(ready.take_persisted_messages());
        let light = self.nodes[at].raft.advance(ready);
        self.carry_out_light(at, light);
        let node = &mut self.nodes[at];
        node.raft.advance_apply();
        let applied = node.raft.raft.raft_log.applied;
        node.raft.mut_store().compact(applied);
    }

    fn carry_out_light(&mut self, at: usize, mut light: LightReady) {
        if let Some(commit) = light.commit_index() {
            self.nodes[at].raft.mut_store().hard_state.commit = commit;
        }
        self.deliver(light.take_messages());
        self.nodes[at].apply(light.take_committed_entries());
    }

    fn deliver(&mut self, messages: Vec<Message>) {
        for message in messages {
            let to = &mut self.nodes[(message.to - 1) as usize];
            to.raft.step(message).expect("peers are correct");
            to.busy = true;
        }
    }
}

impl Cluster for RaftRs {
    fn run(&mut self, steps: u64, load: Load) {
        for _ in 0..steps {
            let leader = &mut self.nodes[LEADER];
            leader.raft.step(proposals(load)).expect("it leads");
            leader.busy = true;
            self.pump();
            self.expected = load.after(1, self.expected);
            verify(self.nodes.each_ref().map(|node| node.machine), self.expected);
        }
    }
}
