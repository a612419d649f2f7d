//! What must hold after every step, however the world treats the peers.

use std::collections::{BTreeMap, HashMap};

use esker_raft::{Entry, LogIndex, PeerId, RoleKind, Term, Time};

use crate::cluster::{Event, Node};

/// How much a run has exercised: a simulation in which nothing happens proves
/// nothing.
#[derive(Clone, Debug, Default)]
pub struct Summary {
    pub runs: u64,
    pub leaders: u64,
    pub committed: u64,
    pub reads: u64,
    pub failed_reads: u64,
    pub lease_checks: u64,
    pub changes: u64,
    pub snapshots: u64,
    pub crashes: u64,
}

impl Summary {
    pub fn add(&mut self, other: &Summary) {
        self.runs += 1;
        self.leaders += other.leaders;
        self.committed += other.committed;
        self.reads += other.reads;
        self.failed_reads += other.failed_reads;
        self.lease_checks += other.lease_checks;
        self.changes += other.changes;
        self.snapshots += other.snapshots;
        self.crashes += other.crashes;
    }
}

/// Everything that was ever seen.
#[derive(Default)]
pub struct Checks {
    leaders: BTreeMap<Term, PeerId>,
    /// Every entry ever appended anywhere, and the term of the one before it.
    appended: HashMap<(LogIndex, Term), (Entry, Option<Term>)>,
    /// The term of every committed entry.
    committed: BTreeMap<LogIndex, Term>,
    /// The state machine's digest at every applied index.
    digests: HashMap<LogIndex, u64>,
    /// The commit index that each peer had last.
    commits: HashMap<PeerId, LogIndex>,
    /// What was committed anywhere when a read began.
    reads: HashMap<u64, LogIndex>,
    pub summary: Summary,
}

impl Checks {
    pub fn max_committed(&self) -> LogIndex {
        self.committed.keys().next_back().copied().unwrap_or_default()
    }

    pub fn read_begins(&mut self, id: u64) {
        self.reads.insert(id, self.max_committed());
    }

    /// Looks at one peer after something happened to it.
    pub fn look(&mut self, node: &Node, event: &Event) {
        match event {
            Event::Role(change) if change.role == RoleKind::Leader => {
                self.one_leader_per_term(change.term, node.id);
                self.leader_is_complete(node);
            }
            Event::Role(_) | Event::SnapshotWanted(_) => {}
            Event::Appended(entry) => self.logs_match(node, entry),
            Event::Applied(entry) => {
                if matches!(entry.payload, esker_raft::Payload::Change(_)) {
                    self.summary.changes += 1;
                }
            }
            Event::Read(id, index) => self.read_is_fresh(*id, *index),
            Event::ReadFailed(id) => {
                self.reads.remove(id);
                self.summary.failed_reads += 1;
            }
            Event::Installed(_) => self.summary.snapshots += 1,
        }
    }

    /// Looks at what a peer is, rather than at what happened.
    pub fn inspect(&mut self, node: &Node, local_now: Time) {
        let Some(group) = &node.group else { return };
        let commit = group.commit_index();
        let before = self.commits.insert(node.id, commit).unwrap_or_default();
        for index in (before.0 + 1..=commit.0).map(LogIndex) {
            // What a snapshot brought is checked by its digest.
            let Some(entry) = node.mirror.get(&index) else { continue };
            let known = *self.committed.entry(index).or_insert_with(|| {
                self.summary.committed += 1;
                entry.term
            });
            assert_eq!(
                known, entry.term,
                "peers committed different entries at {index}, one of them peer {}",
                node.id
            );
        }
        let machine = &node.machine;
        let known = *self.digests.entry(machine.index).or_insert(machine.digest);
        assert_eq!(
            known, machine.digest,
            "peer {} applied another history up to {}",
            node.id, machine.index
        );
        if group.lease_until().is_some_and(|until| local_now < until) {
            self.summary.lease_checks += 1;
            assert!(
                commit >= self.max_committed(),
                "peer {} holds a lease in term {} but has committed only {commit} of {}",
                node.id,
                group.term(),
                self.max_committed()
            );
        }
    }

    pub fn forget_commit(&mut self, node: PeerId) {
        self.commits.remove(&node);
    }

    fn one_leader_per_term(&mut self, term: Term, leader: PeerId) {
        self.summary.leaders += 1;
        let known = *self.leaders.entry(term).or_insert(leader);
        assert_eq!(known, leader, "term {term} has two leaders");
    }

    /// By log matching it is enough to look at the last committed entry.
    fn leader_is_complete(&self, node: &Node) {
        let Some((index, term)) = self.committed.iter().next_back() else { return };
        if *index <= node.disk.borrow().compacted.0 {
            return;
        }
        let here = node.mirror.get(index).map(|entry| entry.term);
        assert_eq!(
            here,
            Some(*term),
            "leader {} lacks entry {index}, which was committed",
            node.id
        );
    }

    /// Log matching, by induction: an index and a term stand for one entry with
    /// one entry before it.
    fn logs_match(&mut self, node: &Node, entry: &Entry) {
        let before = entry.index.prev();
        let previous = node.mirror.get(&before).map(|entry| entry.term);
        let known = self.appended.entry((entry.index, entry.term));
        let known = known.or_insert_with(|| (entry.clone(), previous));
        assert_eq!(known.0, *entry, "two entries with one index and term");
        if let (Some(one), Some(other)) = (known.1, previous) {
            assert_eq!(one, other, "entry {} follows different entries", entry.index);
        }
    }

    fn read_is_fresh(&mut self, id: u64, index: LogIndex) {
        let Some(committed) = self.reads.remove(&id) else {
            panic!("read {id} was answered twice")
        };
        self.summary.reads += 1;
        assert!(
            index >= committed,
            "read {id} was allowed at {index}, but {committed} was committed when it began"
        );
    }
}
