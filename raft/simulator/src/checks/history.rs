//! What clients saw. Every operation has a place in the log, so checking
//! linearizability needs no search: an operation's place must not lie before
//! the place of any operation that had ended when it began.

use bytes::Bytes;
use esker_raft::{Entry, LogIndex, Payload, Term};

use super::super::driver::Node;
use super::super::summary::Summary;
use super::super::violation::{Checked, Promise, ensure};

/// A write that waits until the peer that proposed it has applied it.
struct Write {
    index: LogIndex,
    term: Term,
    command: Bytes,
    /// The furthest place of any operation that had ended when this one began.
    floor: LogIndex,
}

/// A read that waits for its index, or until that index is applied.
struct Read {
    id: Option<u64>,
    /// The highest commit index of any peer when the read began.
    committed: LogIndex,
    floor: LogIndex,
    index: Option<LogIndex>,
}

/// All operations that have not ended, by the node at which they wait.
pub struct History {
    writes: Vec<Vec<Write>>,
    reads: Vec<Vec<Read>>,
    /// The furthest place of any operation that has ended.
    ended: LogIndex,
    /// The term of every acknowledged write, by index.
    acknowledged: Vec<Option<Term>>,
}

impl History {
    pub fn new(nodes: usize) -> Self {
        History {
            writes: (0..nodes).map(|_| Vec::new()).collect(),
            reads: (0..nodes).map(|_| Vec::new()).collect(),
            ended: LogIndex(0),
            acknowledged: Vec::new(),
        }
    }

    pub fn write_begins(&mut self, at: usize, index: LogIndex, term: Term, command: &Bytes) {
        let (command, floor) = (command.clone(), self.ended);
        self.writes[at].push(Write { index, term, command, floor });
    }

    pub fn read_begins(&mut self, at: usize, id: u64, committed: LogIndex) {
        let (id, floor) = (Some(id), self.ended);
        self.reads[at].push(Read { id, committed, floor, index: None });
    }

    /// Checks a read at a leader with a lease, at its commit index.
    pub fn lease_read(
        &mut self,
        node: &Node,
        at: usize,
        index: LogIndex,
        committed: LogIndex,
        summary: &mut Summary,
    ) -> Checked {
        ensure(index >= committed, Promise::ReadsAreFresh, || {
            format!(
                "peer {} reads by its lease at {index}, but {committed} is committed elsewhere",
                node.id
            )
        })?;
        let (id, floor, index) = (None, self.ended, Some(index));
        self.reads[at].push(Read { id, committed, floor, index });
        self.answer_reads(node, at, summary)
    }

    /// Checks the index from which on a read may be served, as ReadIndex
    /// returned it.
    pub fn read_allowed(
        &mut self,
        node: &Node,
        at: usize,
        id: u64,
        index: LogIndex,
        summary: &mut Summary,
    ) -> Checked {
        let mut reads = self.reads[at].iter_mut();
        let waiting = reads.find(|read| read.id == Some(id) && read.index.is_none());
        let Some(read) = waiting else {
            let (promise, id) = (Promise::Linearizable, node.id);
            return ensure(false, promise, || format!("a read at peer {id} was answered twice"));
        };
        let committed = read.committed;
        read.index = Some(index);
        ensure(index >= committed, Promise::ReadsAreFresh, || {
            let at = node.id;
            format!(
                "read {id} at peer {at} may be served at {index}, but {committed} was committed when it began"
            )
        })?;
        self.answer_reads(node, at, summary)
    }

    pub fn read_failed(&mut self, at: usize, id: u64) {
        self.reads[at].retain(|read| read.id != Some(id));
    }

    pub fn crashed(&mut self, at: usize) {
        self.writes[at].clear();
        self.reads[at].clear();
    }

    /// Ends the operations that waited for a node's machine, which has applied
    /// this entry or a snapshot.
    pub fn caught_up(
        &mut self,
        node: &Node,
        at: usize,
        entry: Option<&Entry>,
        summary: &mut Summary,
    ) -> Checked {
        if let Some(entry) = entry {
            self.stays(node, entry)?;
        }
        if !self.writes[at].is_empty() {
            self.acknowledge_writes(node, at, entry, summary)?;
        }
        self.answer_reads(node, at, summary)
    }

    fn stays(&self, node: &Node, entry: &Entry) -> Checked {
        let known = self.acknowledged.get(entry.index.0 as usize).copied().flatten();
        ensure(known.is_none_or(|term| term == entry.term), Promise::AcknowledgedStays, || {
            let (index, term) = (entry.index, entry.term);
            format!(
                "the write at {index} was acknowledged, and peer {} applied {index}@{term}",
                node.id
            )
        })
    }

    fn acknowledge_writes(
        &mut self,
        node: &Node,
        at: usize,
        entry: Option<&Entry>,
        summary: &mut Summary,
    ) -> Checked {
        let reached = node.machine.index;
        let mut acknowledged = None;
        self.writes[at].retain(|write| {
            let ours = entry.is_some_and(|entry| {
                (entry.index, entry.term) == (write.index, write.term)
                    && matches!(&entry.payload, Payload::Command(it) if *it == write.command)
            });
            if ours {
                acknowledged = Some((write.index, write.term, write.floor));
            }
            write.index > reached
        });
        let Some((index, term, floor)) = acknowledged else { return Ok(()) };
        summary.writes += 1;
        let place = index.0 as usize;
        if self.acknowledged.len() <= place {
            self.acknowledged.resize(place + 1, None);
        }
        self.acknowledged[place] = Some(term);
        self.ended = self.ended.max(index);
        ensure(index > floor, Promise::Linearizable, || {
            format!(
                "a write at peer {} took effect at {index}, but {floor} was seen before it began",
                node.id
            )
        })
    }

    fn answer_reads(&mut self, node: &Node, at: usize, summary: &mut Summary) -> Checked {
        if self.reads[at].is_empty() {
            return Ok(());
        }
        let result = node.machine.index;
        let mut broken = None;
        let ready = |read: &Read| read.index.is_some_and(|index| index <= result);
        let mut ended = false;
        self.reads[at].retain(|read| {
            if !ready(read) {
                return true;
            }
            // A peer that has become a witness has no data to read.
            if node.machine.has_data {
                ended = true;
                match read.id {
                    Some(_) if node.leads() => summary.reads_at_leaders += 1,
                    Some(_) => summary.reads_at_followers += 1,
                    None => summary.lease_reads += 1,
                }
                if result < read.floor {
                    broken = Some(read.floor);
                }
            }
            false
        });
        if ended {
            self.ended = self.ended.max(result);
        }
        ensure(broken.is_none(), Promise::Linearizable, || {
            let floor = broken.unwrap_or_default();
            format!("a read at peer {} saw {result}, but {floor} was seen before it began", node.id)
        })
    }
}
