//! Terms, votes and leaders.

use esker_raft::{LogIndex, PeerId, RoleKind, Term};

use super::super::driver::Node;
use super::super::violation::{Checked, Promise, ensure};

/// The leader, and every peer's vote, in every term.
pub struct Elections {
    /// By term.
    leaders: Vec<Option<PeerId>>,
    /// By node, then by term.
    votes: Vec<Vec<Option<PeerId>>>,
}

fn slot(list: &mut Vec<Option<PeerId>>, term: Term) -> &mut Option<PeerId> {
    let at = usize::try_from(term.0).expect("a run has few terms");
    if list.len() <= at {
        list.resize(at + 1, None);
    }
    &mut list[at]
}

impl Elections {
    pub fn new(nodes: usize) -> Self {
        Elections { leaders: Vec::new(), votes: vec![Vec::new(); nodes] }
    }

    pub fn leader_of(&self, term: Term) -> Option<PeerId> {
        self.leaders.get(usize::try_from(term.0).ok()?).copied().flatten()
    }

    /// Checks a candidate that asks for votes: its own vote and the log that it names must be
    /// durable.
    pub fn asked(&mut self, node: &Node, at: usize, term: Term, last: (LogIndex, Term)) -> Checked {
        self.vote_is_durable(node, term, node.id)?;
        let disk = node.disk.borrow();
        let there = disk.log.term(last.0);
        // A candidate that found a leader in the meantime has taken that leader's log. Replies then
        // have no effect. With the term on its disk, the peer never asks for votes in that term
        // again.
        let stands = node.role() == Some(RoleKind::Candidate) && disk.hard_state.term == term;
        ensure(!stands || there == Some(last.1), Promise::VotesAreDurable, || {
            format!("peer {} asks for votes with {}@{} not on its disk", node.id, last.0, last.1)
        })?;
        self.voted(node, at, term, node.id)
    }

    /// Checks a vote that is sent.
    pub fn granted(&mut self, node: &Node, at: usize, term: Term, to: PeerId) -> Checked {
        self.vote_is_durable(node, term, to)?;
        self.voted(node, at, term, to)
    }

    /// A peer with a later term on its disk can no longer break its vote.
    fn vote_is_durable(&self, node: &Node, term: Term, to: PeerId) -> Checked {
        let durable = node.disk.borrow().hard_state;
        ensure(
            durable.term > term || (durable.term, durable.vote) == (term, Some(to)),
            Promise::VotesAreDurable,
            || {
                let id = node.id;
                format!(
                    "peer {id} sends its vote for {to} in term {term}, but its disk has {durable:?}"
                )
            },
        )
    }

    fn voted(&mut self, node: &Node, at: usize, term: Term, to: PeerId) -> Checked {
        let known = *slot(&mut self.votes[at], term).get_or_insert(to);
        ensure(known == to, Promise::OneVotePerTerm, || {
            format!("peer {} voted for {known} and for {to} in term {term}", node.id)
        })
    }

    /// Checks the vote of a peer that comes back.
    pub fn restarted(&mut self, node: &Node, at: usize) -> Checked {
        let Some(group) = &node.group else { return Ok(()) };
        let state = group.hard_state();
        match state.vote {
            Some(to) => self.voted(node, at, state.term, to),
            None => Ok(()),
        }
    }

    /// Checks a peer that leads. Returns whether it is newly elected: a leader may report its role
    /// more than once.
    pub fn elected(&mut self, nodes: &[Node], at: usize, term: Term, fresh: bool) -> Checked<bool> {
        let node = &nodes[at];
        let leader = slot(&mut self.leaders, term);
        let news = leader.is_none();
        let known = *leader.get_or_insert(node.id);
        ensure(known == node.id, Promise::OneLeaderPerTerm, || {
            format!("term {term} has two leaders, {known} and {}", node.id)
        })?;
        if news && fresh {
            self.has_majorities(nodes, at, term)?;
        }
        Ok(news)
    }

    /// Whether the peer has the votes of all majorities in the configuration that it has applied.
    fn has_majorities(&self, nodes: &[Node], at: usize, term: Term) -> Checked {
        let node = &nodes[at];
        let members = &node.machine.configuration;
        let durable = node.disk.borrow().hard_state;
        let own = durable.term > term || (durable.term, durable.vote) == (term, Some(node.id));
        let voted = |peer: PeerId| {
            if peer == node.id {
                return own;
            }
            let voter = nodes.iter().position(|node| node.id == peer);
            let votes = voter.map(|voter| &self.votes[voter]);
            let vote = votes.and_then(|votes| votes.get(term.0 as usize)).copied().flatten();
            vote == Some(node.id)
        };
        ensure(super::members::is_majority(members, voted), Promise::ElectedByMajorities, || {
            format!("peer {} leads term {term} without the durable votes for it", node.id)
        })
    }
}
