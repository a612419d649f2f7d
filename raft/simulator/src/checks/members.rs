//! Checks of configurations: majorities of neighbours always share a voter, all peers see the same
//! ones, and a peer that may win an election knows enough of them.

use esker_raft::{Configuration, Entry, LogIndex, Payload, PeerId, SnapshotMeta, Term};

use super::super::driver::Node;
use super::super::summary::Summary;
use super::super::violation::{Checked, Promise, ensure};
use super::log::Logs;

/// Every configuration that was applied, and every change that was committed.
pub struct Members {
    /// Each configuration with the index of the entry that led to it, in order.
    configurations: Vec<(LogIndex, Configuration)>,
    /// The indexes of committed changes, in order.
    changes: Vec<LogIndex>,
}

/// Whether the peers for which `has` holds are a majority, or both majorities while the
/// configuration is joint. This does not use the core's own count, because that count is being
/// checked.
pub fn is_majority(members: &Configuration, has: impl Fn(PeerId) -> bool) -> bool {
    let enough = |incoming: bool| {
        let (mut all, mut those) = (0, 0);
        let voters = if incoming { &members.voters } else { &members.voters_outgoing };
        for &peer in voters {
            all += 1;
            those += usize::from(has(peer));
        }
        all == 0 || those * 2 > all
    };
    !members.voters.is_empty() && enough(true) && enough(false)
}

/// Whether any two majorities, one of each configuration, have a voter in common. Tries all of
/// them.
fn overlap(one: &Configuration, other: &Configuration) -> bool {
    let mut voters: Vec<_> = one.voters.iter().chain(&one.voters_outgoing).copied().collect();
    voters.extend(other.voters.iter().chain(&other.voters_outgoing));
    voters.sort_unstable();
    voters.dedup();
    let place = |peer| voters.binary_search(&peer).expect("every voter is listed");
    (0..1u64 << voters.len()).all(|set| {
        let inside = |peer| set & 1 << place(peer) != 0;
        !(is_majority(one, inside) && is_majority(other, |peer| !inside(peer)))
    })
}

impl Members {
    pub fn new(start: LogIndex, founders: &Configuration) -> Self {
        Members { configurations: vec![(start, founders.clone())], changes: Vec::new() }
    }

    /// How many changes a peer has applied.
    fn known(&self, applied: LogIndex) -> usize {
        self.changes.partition_point(|change| *change <= applied)
    }

    /// Checks a change of members that a leader appends.
    pub fn appended(&self, node: &Node, entry: &Entry) -> Checked {
        let Some(group) = node.group.as_ref().filter(|_| node.leads()) else { return Ok(()) };
        if group.term() != entry.term {
            return Ok(());
        }
        let between = (node.machine.index.0 + 1..entry.index.0).map(LogIndex);
        let mut pending = between.filter(|index| {
            let entry = node.mirror.get(*index);
            entry.is_some_and(|entry| matches!(entry.payload, Payload::Change(_)))
        });
        let earlier = pending.next();
        ensure(earlier.is_none(), Promise::OneChangeAtATime, || {
            format!(
                "leader {} appends a change as {}, and has not applied the one at {}",
                node.id,
                entry.index,
                earlier.unwrap_or_default()
            )
        })
    }

    /// Records the changes that a peer's new commit index covers.
    pub fn committed(&mut self, node: &Node, before: LogIndex, commit: LogIndex) {
        let latest = self.changes.last().copied().unwrap_or_default();
        for index in (before.max(latest).0 + 1..=commit.0).map(LogIndex) {
            let entry = node.mirror.get(index);
            if entry.is_some_and(|entry| matches!(entry.payload, Payload::Change(_))) {
                self.changes.push(index);
            }
        }
    }

    /// Checks a peer that has applied the change at `index`.
    pub fn applied(&mut self, node: &Node, index: LogIndex, summary: &mut Summary) -> Checked {
        let Some((latest, before)) = self.configurations.last() else { return Ok(()) };
        if index <= *latest {
            return self.adopted(node);
        }
        let members = &node.machine.configuration;
        ensure(overlap(before, members), Promise::ConfigurationsOverlap, || {
            format!(
                "the configuration at {index} and the one before it can decide apart: \
                 {before:?}, {members:?}"
            )
        })?;
        summary.changes += u64::from(before != members);
        summary.joint += u64::from(!before.is_joint() && members.is_joint());
        self.configurations.push((index, members.clone()));
        Ok(())
    }

    /// The configuration as of this index.
    fn as_of(&self, index: LogIndex) -> &Configuration {
        let after = self.configurations.partition_point(|(since, _)| *since <= index);
        &self.configurations[after.saturating_sub(1)].1
    }

    /// Checks a configuration that a peer has from a change or a snapshot.
    pub fn adopted(&self, node: &Node) -> Checked {
        self.is_the_one(node.machine.index, &node.machine.configuration, node.id)
    }

    /// Checks a snapshot that is sent.
    pub fn snapshot(&self, meta: &SnapshotMeta) -> Checked {
        self.is_the_one(meta.index, &meta.configuration, PeerId(0))
    }

    fn is_the_one(&self, index: LogIndex, members: &Configuration, id: PeerId) -> Checked {
        let known = self.as_of(index);
        ensure(known == members, Promise::ConfigurationsOverlap, || {
            format!("as of {index} the members are {known:?}, but peer {id} has {members:?}")
        })
    }

    /// Checks a peer that asks for votes: it must have applied every change that it knows to be
    /// committed.
    pub fn candidate(&self, node: &Node) -> Checked {
        let Some(group) = &node.group else { return Ok(()) };
        let commit = group.commit_index();
        let (known, applied) = (self.known(commit), self.known(node.machine.index));
        ensure(known <= applied, Promise::CandidatesKnowMembers, || {
            format!(
                "peer {} campaigns with {known} changes committed and {applied} applied",
                node.id
            )
        })
    }

    /// Checks a peer that leads: it must be at most one change behind.
    pub fn elected(&self, node: &Node, term: Term) -> Checked {
        let (all, known) = (self.changes.len(), self.known(node.machine.index));
        ensure(known + 1 >= all, Promise::CandidatesKnowMembers, || {
            format!(
                "peer {} leads term {term} with {known} of {all} committed changes applied",
                node.id
            )
        })
    }

    /// Of all peers that lead or ask for votes and have all committed entries, no two can win by
    /// majorities without a common voter.
    pub fn rivals(&self, nodes: &[Node], at: usize, logs: &Logs) -> Checked {
        let one = &nodes[at];
        if self.configurations.len() < 2 || !logs.is_complete(one) {
            return Ok(());
        }
        let stands = |node: &Node| {
            use esker_raft::RoleKind::{Candidate, Leader};
            matches!(node.role(), Some(Candidate | Leader)) && logs.is_complete(node)
        };
        let others = nodes.iter().enumerate().filter(|(other, node)| *other != at && stands(node));
        for (_, other) in others {
            let (here, there) = (&one.machine.configuration, &other.machine.configuration);
            ensure(here == there || overlap(here, there), Promise::ConfigurationsOverlap, || {
                format!("peers {} and {} can both win: {here:?}, {there:?}", one.id, other.id)
            })?;
        }
        Ok(())
    }
}
