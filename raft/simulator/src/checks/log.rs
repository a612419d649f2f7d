//! Checks of entries: logs match, committed entries are safe and stay, and all state machines apply
//! the same entries.

use esker_raft::{Entry, LogIndex, Payload, PeerId, Term};

use super::super::driver::Node;
use super::super::summary::Summary;
use super::super::violation::{Checked, Promise, ensure};
use super::members::is_majority;

/// An entry that was in some log, and the term of the entry before it.
struct Appended {
    term: Term,
    payload: Payload,
    before: Option<Term>,
}

/// An entry that is committed.
#[derive(Clone, Copy)]
struct Committed {
    term: Term,
    /// The term of the leader that committed it. An entry of an older term is committed by the
    /// leader of a later one.
    by: Term,
}

/// Every entry ever seen, by index.
pub struct Logs {
    appended: Vec<Vec<Appended>>,
    /// Every committed entry.
    committed: Vec<Option<Committed>>,
    max_committed: LogIndex,
    /// The state machine's digest at every applied index.
    digests: Vec<Option<u64>>,
    /// The commit index that each node had last.
    commits: Vec<LogIndex>,
}

fn position(index: LogIndex) -> usize {
    usize::try_from(index.0).expect("a run's log is short")
}

fn slot<T: Default>(list: &mut Vec<T>, index: LogIndex) -> &mut T {
    let at = position(index);
    if list.len() <= at {
        list.resize_with(at + 1, T::default);
    }
    &mut list[at]
}

impl Logs {
    pub fn new(nodes: usize, start: LogIndex, term: Term) -> Self {
        let mut logs = Logs {
            appended: Vec::new(),
            committed: Vec::new(),
            max_committed: start,
            digests: Vec::new(),
            commits: vec![LogIndex(0); nodes],
        };
        *slot(&mut logs.committed, start) = Some(Committed { term, by: term });
        *slot(&mut logs.digests, start) = Some(0);
        logs
    }

    pub fn max_committed(&self) -> LogIndex {
        self.max_committed
    }

    pub fn commit_of(&self, at: usize) -> LogIndex {
        self.commits[at]
    }

    fn commit(&self, index: LogIndex) -> Option<Committed> {
        self.committed.get(position(index)).copied().flatten()
    }

    fn committed(&self, index: LogIndex) -> Option<Term> {
        self.commit(index).map(|committed| committed.term)
    }

    /// Log matching, by induction: an index and a term stand for one entry with
    /// one entry before it.
    pub fn appended(&mut self, node: &Node, entry: &Entry) -> Checked {
        let before = node.mirror.term(entry.index.prev());
        let known = slot(&mut self.appended, entry.index);
        let Some(known) = known.iter_mut().find(|known| known.term == entry.term) else {
            let Entry { term, ref payload, .. } = *entry;
            known.push(Appended { term, payload: payload.clone(), before });
            return Ok(());
        };
        ensure(known.payload == entry.payload, Promise::LogsMatch, || {
            format!(
                "two entries are called {}@{}, one at peer {}",
                entry.index, entry.term, node.id
            )
        })?;
        let agree = known.before.is_none() || before.is_none() || known.before == before;
        ensure(agree, Promise::LogsMatch, || {
            let name = format!("{}@{}", entry.index, entry.term);
            format!("entry {name} follows different entries, one of them at peer {}", node.id)
        })
    }

    /// Checks a commit index that has changed.
    pub fn commit_moved(
        &mut self,
        node: &Node,
        at: usize,
        commit: LogIndex,
        summary: &mut Summary,
    ) -> Checked {
        let before = std::mem::replace(&mut self.commits[at], commit);
        ensure(commit >= before, Promise::CommitNeverFalls, || {
            format!("the commit index of peer {} fell from {before} to {commit}", node.id)
        })?;
        // The first peer to know of a commit is the leader, which counts only entries of its own
        // term.
        let by = node.mirror.term(commit).unwrap_or_default();
        for index in (before.0 + 1..=commit.0).map(LogIndex) {
            // Entries that came with a snapshot are checked by its digest.
            let Some(term) = node.mirror.term(index) else { continue };
            let known = slot(&mut self.committed, index);
            if known.is_none() {
                summary.committed += 1;
            }
            let known = known.get_or_insert(Committed { term, by }).term;
            ensure(known == term, Promise::OneEntryCommitted, || {
                let id = node.id;
                format!("{index}@{known} is committed, and at peer {id} {index}@{term} is")
            })?;
        }
        self.max_committed = self.max_committed.max(commit);
        Ok(())
    }

    /// Checks the node that is the first to know that `commit` is committed. It must lead, and the
    /// entry must be of its own term and durable on every majority.
    pub fn counted_well(&self, nodes: &[Node], at: usize, commit: LogIndex) -> Checked {
        let node = &nodes[at];
        let (id, term) = (node.id, self.committed(commit).unwrap_or_default());
        let own = node.leads() && node.group.as_ref().is_some_and(|group| group.term() == term);
        ensure(own, Promise::CommitsOwnTermOnly, || {
            format!(
                "{commit}@{term} was first committed by peer {id}, which did not lead that term"
            )
        })?;
        let has = |peer: PeerId| {
            let holder = nodes.iter().find(|node| node.id == peer);
            holder.is_some_and(|node| holds(node, commit, term))
        };
        ensure(
            is_majority(&node.machine.configuration, has),
            Promise::CommittedIsOnMajorities,
            || format!("peer {id} committed {commit}@{term}, which no majority has on its disks"),
        )
    }

    /// Leader completeness from the other side: a peer that leads a later term at the moment of the
    /// commit has the entry.
    pub fn other_leaders_have_it(&self, nodes: &[Node], at: usize, commit: LogIndex) -> Checked {
        let others = nodes.iter().enumerate().filter(|(other, node)| *other != at && node.leads());
        for (_, node) in others {
            let term = node.group.as_ref().map_or(Term(0), |group| group.term());
            if term > self.committed(commit).unwrap_or_default() {
                self.leader_is_complete(node, term)?;
            }
        }
        Ok(())
    }

    /// Leader completeness. By log matching it is enough to look at the last entry that was
    /// committed in an earlier term. A leader may be elected by votes that were long under way. It
    /// need not have the entries that a later leader has committed.
    pub fn leader_is_complete(&self, node: &Node, term: Term) -> Checked {
        let mut index = self.max_committed;
        let known = loop {
            match self.commit(index) {
                Some(known) if known.by < term => break known.term,
                Some(_) => index = index.prev(),
                None => return Ok(()),
            }
        };
        let here = match node.mirror.term(index) {
            None if index <= node.machine.index => return Ok(()),
            here => here,
        };
        ensure(here == Some(known), Promise::LeaderIsComplete, || {
            format!(
                "peer {} leads term {term} without {index}@{known}, which is committed",
                node.id
            )
        })
    }

    /// Whether a peer's log has everything that is committed.
    pub fn is_complete(&self, node: &Node) -> bool {
        let index = self.max_committed;
        node.machine.index >= index || node.mirror.term(index) == self.committed(index)
    }

    /// The index up to which a peer's log equals the committed entries.
    pub fn agrees_up_to(&self, node: &Node) -> LogIndex {
        let mut index = self.max_committed.min(node.mirror.last().0);
        while index > node.machine.index && node.mirror.term(index) != self.committed(index) {
            index = index.prev();
        }
        index
    }

    /// Checks an acknowledgement that is sent: the entry must be on the disk, and equal the entry
    /// of that term's leader.
    pub fn acknowledged(
        &self,
        node: &Node,
        term: Term,
        index: LogIndex,
        leader: Option<&Node>,
    ) -> Checked {
        let disk = node.disk.borrow();
        let id = node.id;
        // A reply to an old leader may be sent together with the next leader's term. It may
        // acknowledge entries that the next leader has replaced. That does no harm: the peers that
        // elected the next leader had none of these entries, so acknowledgements to the old leader
        // come from no majority.
        if index < disk.log.compacted().0 || disk.hard_state.term > term {
            return Ok(());
        }
        let here = disk.log.term(index);
        ensure(here.is_some(), Promise::AcknowledgedIsDurable, || {
            format!("peer {id} acknowledges {index}, but its disk ends at {}", disk.log.last().0)
        })?;
        let leads = |leader: &&Node| {
            leader.leads() && leader.group.as_ref().is_some_and(|group| group.term() == term)
        };
        let there = leader.filter(leads).and_then(|leader| leader.mirror.term(index));
        ensure(there.is_none() || there == here, Promise::AcknowledgedIsDurable, || {
            let (here, there) = (here.unwrap_or_default(), there.unwrap_or_default());
            format!("peer {id} acknowledges {index}@{there}, but its disk has {index}@{here}")
        })
    }

    /// Checks an entry that is handed out to be applied.
    pub fn handed(&self, node: &Node, index: LogIndex, term: Term) -> Checked {
        let durable = node.disk.borrow().log.term(index);
        // By now the entry may already be applied and dropped.
        let durable = durable.is_none_or(|durable| durable == term)
            && (durable.is_some() || index <= node.disk.borrow().log.compacted().0);
        ensure(durable, Promise::AppliedIsDurable, || {
            format!("peer {} is to apply {index}@{term}, which is not on its disk", node.id)
        })?;
        self.is_committed(index, term)
    }

    pub fn is_committed(&self, index: LogIndex, term: Term) -> Checked {
        ensure(self.committed(index) == Some(term), Promise::SnapshotsAreCommitted, || {
            format!("{index}@{term} is taken for committed, and is not")
        })
    }

    pub fn applied(&mut self, node: &Node, entry: &Entry) -> Checked {
        self.is_committed(entry.index, entry.term)?;
        self.same_history(node)
    }

    pub fn installed(&mut self, node: &Node) -> Checked {
        self.is_committed(node.machine.index, node.machine.term)?;
        self.same_history(node)
    }

    fn same_history(&mut self, node: &Node) -> Checked {
        let machine = &node.machine;
        if !machine.has_data {
            return Ok(());
        }
        let known = *slot(&mut self.digests, machine.index).get_or_insert(machine.digest);
        ensure(known == machine.digest, Promise::OneHistory, || {
            format!("peer {} applied another history up to {}", node.id, machine.index)
        })
    }

    pub fn restarted(&mut self, node: &Node, at: usize) -> Checked {
        self.commits[at] = LogIndex(0);
        self.same_history(node)
    }
}

/// Whether a peer has the entry on its disk, or before the beginning of the log there.
fn holds(node: &Node, index: LogIndex, term: Term) -> bool {
    let disk = node.disk.borrow();
    index < disk.log.compacted().0 || disk.log.term(index) == Some(term)
}
