//! The checks after every step, which must hold however the world treats the peers.
//!
//! The checks know everything that any peer ever did, and compare it with what Raft promises.
//! `election` watches terms and votes, `log` watches entries and commits, `members` watches
//! configurations, and `history` watches what clients saw. Each looks only at what changed, so that
//! a step costs the same at the end of a run as at its beginning.

mod election;
mod history;
mod log;
mod members;

use bytes::Bytes;
use esker_raft::{
    AppendOutcome, Configuration, Entry, LogIndex, Message, MessageBody, Payload, RoleKind, Term,
};

pub use members::is_majority;

use super::driver::{Event, Node};
use super::summary::Summary;
use super::violation::{Checked, Promise, ensure};
use super::world::Clocks;

/// The record of everything that was ever seen.
pub struct Checks {
    elections: election::Elections,
    logs: log::Logs,
    members: members::Members,
    history: history::History,
    /// Whether a disk has lost what it had promised. Then no promise holds any more, and none is
    /// checked.
    pub suspended: bool,
    pub summary: Summary,
}

impl Checks {
    pub fn new(nodes: &[Node], founders: &Configuration) -> Checks {
        let start = nodes.iter().map(|node| node.machine.index).max().unwrap_or_default();
        let term = nodes.iter().map(|node| node.machine.term).max().unwrap_or_default();
        Checks {
            elections: election::Elections::new(nodes.len()),
            logs: log::Logs::new(nodes.len(), start, term),
            members: members::Members::new(start, founders),
            history: history::History::new(nodes.len()),
            suspended: false,
            summary: Summary::default(),
        }
    }

    /// The highest index that any peer has ever known to be committed.
    pub fn max_committed(&self) -> LogIndex {
        self.logs.max_committed()
    }

    /// The index up to which a peer's log equals the committed entries.
    pub fn agrees_up_to(&self, node: &Node) -> LogIndex {
        self.logs.agrees_up_to(node)
    }

    /// Checks a message that enters the network. What it promises must be true.
    pub fn sent(&mut self, nodes: &[Node], at: usize, message: &Message) -> Checked {
        if self.suspended {
            return Ok(());
        }
        let node = &nodes[at];
        match message.body {
            MessageBody::Vote { last_index, last_term, .. } => {
                self.elections.asked(node, at, message.term, (last_index, last_term))
            }
            MessageBody::VoteReply { granted: true, .. } => {
                self.elections.granted(node, at, message.term, message.to)
            }
            MessageBody::AppendReply {
                outcome: AppendOutcome::Accepted { match_index }, ..
            } => {
                let leader = self.elections.leader_of(message.term);
                let leader = leader.and_then(|id| nodes.iter().find(|node| node.id == id));
                self.logs.acknowledged(node, message.term, match_index, leader)
            }
            MessageBody::InstallSnapshot { ref meta, .. } => {
                self.logs.is_committed(meta.index, meta.term)?;
                self.members.snapshot(meta)
            }
            _ => Ok(()),
        }
    }

    /// Checks an event of a peer. `fresh` means that it happened just now, and not some inputs ago.
    pub fn saw(&mut self, nodes: &[Node], at: usize, event: &Event, fresh: bool) -> Checked {
        if self.suspended {
            return Ok(());
        }
        let node = &nodes[at];
        match event {
            Event::Role(change) if change.role == RoleKind::Leader => {
                if !self.elections.elected(nodes, at, change.term, fresh)? {
                    return Ok(());
                }
                self.summary.leaders += 1;
                if node.machine.configuration.is_witness(node.id) {
                    self.summary.witnesses_led += 1;
                }
                self.logs.leader_is_complete(node, change.term)?;
                if fresh {
                    self.members.elected(node, change.term)?;
                    self.members.rivals(nodes, at, &self.logs)?;
                }
                Ok(())
            }
            Event::Role(change) if change.role == RoleKind::Candidate && fresh => {
                self.members.candidate(node)?;
                self.members.rivals(nodes, at, &self.logs)
            }
            Event::Handed(index, term) => self.logs.handed(node, *index, *term),
            Event::Read(id, index) => {
                self.history.read_allowed(node, at, *id, *index, &mut self.summary)
            }
            Event::ReadFailed(id) => {
                self.history.read_failed(at, *id);
                self.summary.reads_failed += 1;
                Ok(())
            }
            Event::Installed(_) => {
                self.summary.snapshots += 1;
                self.logs.installed(node)?;
                self.members.adopted(node)?;
                self.history.caught_up(node, at, None, &mut self.summary)
            }
            Event::Role(_) | Event::Appended(_) | Event::Applied(_) | Event::SnapshotWanted(_) => {
                Ok(())
            }
        }
    }

    /// Checks an entry that was added to a peer's log. Called before everything else that is seen
    /// of the same step.
    pub fn appended(&mut self, node: &Node, entry: &Entry) -> Checked {
        if self.suspended {
            return Ok(());
        }
        self.logs.appended(node, entry)?;
        if matches!(entry.payload, Payload::Change(_)) {
            self.members.appended(node, entry)?;
        }
        Ok(())
    }

    /// Checks a peer that has applied one entry.
    pub fn applied(&mut self, nodes: &[Node], at: usize) -> Checked {
        if self.suspended {
            return Ok(());
        }
        let node = &nodes[at];
        let Some(Event::Applied(entry)) = node.events.last() else { return Ok(()) };
        self.summary.applied += 1;
        self.logs.applied(node, entry)?;
        if matches!(entry.payload, Payload::Change(_)) {
            self.members.applied(node, entry.index, &mut self.summary)?;
        }
        self.history.caught_up(node, at, Some(entry), &mut self.summary)
    }

    /// Checks a peer's state, rather than an event. `fresh` means that there was one input since
    /// the last look. After several, a leader may have counted replicas and no longer lead.
    pub fn inspect(&mut self, nodes: &[Node], at: usize, time: &Clocks, fresh: bool) -> Checked {
        if self.suspended {
            return Ok(());
        }
        let node = &nodes[at];
        let Some(group) = &node.group else { return Ok(()) };
        let commit = group.commit_index();
        let highest = self.logs.max_committed();
        let before = self.logs.commit_of(at);
        if commit != before {
            self.logs.commit_moved(node, at, commit, &mut self.summary)?;
            self.members.committed(node, before, commit);
        }
        if commit > highest {
            if fresh {
                self.logs.counted_well(nodes, at, commit)?;
            }
            self.logs.other_leaders_have_it(nodes, at, commit)?;
            let others = nodes.iter().enumerate().filter(|(other, _)| *other != at);
            for (other, node) in others {
                self.lease_excludes(node, time.local(other))?;
            }
        } else if commit < highest && node.leads() {
            self.lease_excludes(node, time.local(at))?;
        }
        Ok(())
    }

    fn lease_excludes(&mut self, node: &Node, now: esker_raft::Time) -> Checked {
        let highest = self.logs.max_committed();
        let Some(group) = &node.group else { return Ok(()) };
        ensure(
            !node.leads() || group.commit_index() >= highest || !node.has_lease(now),
            Promise::LeaseExcludesOthers,
            || {
                format!(
                    "peer {} holds a lease in term {} and has committed {}, but elsewhere {highest} \
                     is committed",
                    node.id,
                    group.term(),
                    group.commit_index()
                )
            },
        )
    }

    pub fn write_begins(&mut self, at: usize, index: LogIndex, term: Term, command: &Bytes) {
        self.history.write_begins(at, index, term, command);
    }

    pub fn read_begins(&mut self, at: usize, id: u64) {
        self.history.read_begins(at, id, self.logs.max_committed());
    }

    pub fn lease_read(&mut self, nodes: &[Node], at: usize, index: LogIndex) -> Checked {
        if self.suspended {
            return Ok(());
        }
        self.summary.lease_reads_begun += 1;
        self.history.lease_read(&nodes[at], at, index, self.logs.max_committed(), &mut self.summary)
    }

    /// Notes that a peer lost everything that was not on its disk.
    pub fn crashed(&mut self, at: usize) {
        self.summary.crashes += 1;
        self.history.crashed(at);
    }

    /// Checks a peer that came back. It must go on from the state on its disk.
    pub fn restarted(&mut self, node: &Node, at: usize) -> Checked {
        if self.suspended {
            return Ok(());
        }
        self.logs.restarted(node, at)?;
        self.elections.restarted(node, at)
    }
}
