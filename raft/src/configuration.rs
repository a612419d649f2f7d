//! The members of a group, and how they change.
//!
//! A change of at most one voter takes effect in one step, because any majority
//! of the members before meets any majority after. Everything else goes through
//! a *joint* configuration, in which elections and commits need a majority of
//! the old voters **and** one of the new (Raft §6), so that at no moment two
//! disjoint groups of peers can decide.

use thiserror::Error;

use crate::peer_set::PeerSet;
use crate::rules::broken;
use crate::types::{ChangeStep, ConfChange, LeaveJoint, LogIndex, PeerId, Term};

/// How many peers a configuration may name. The number is small, because quorums of few peers are
/// counted on the stack and every leader tracks all peers.
pub const MAX_PEERS: usize = 64;

/// The members of a group.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Configuration {
    /// The voters; in a joint configuration those of the new one.
    pub voters: PeerSet,
    /// The old voters while the configuration is joint, else empty.
    pub voters_outgoing: PeerSet,
    /// Peers that receive the log and have no vote.
    pub learners: PeerSet,
    /// Voters of the old configuration that become learners when it is left.
    pub learners_next: PeerSet,
    /// Which of the voters, old and new, are witnesses: they vote, and lead only to
    /// hand over.
    pub witnesses: PeerSet,
    /// Whether the leader ends the joint configuration by itself.
    pub auto_leave: bool,
}

/// Why a configuration, a setting or restored state is refused.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum ConfigError {
    /// A leave without a joint configuration.
    #[error("there is no joint configuration to leave")]
    NotJoint,
    /// Steps on top of a joint configuration.
    #[error("the configuration is joint already: leave it first")]
    AlreadyJoint,
    /// No peer could lead afterwards.
    #[error("the change would leave no voter that can lead")]
    NoVoters,
    /// Two steps about one peer have no clear meaning.
    #[error("the change names peer {0} twice")]
    NamedTwice(PeerId),
    /// A peer has two roles of which it can have only one.
    #[error("peer {0} has two roles that exclude each other")]
    TwoRoles(PeerId),
    /// Peer 0 stands for "none" in stored forms.
    #[error("peer id 0 is not a peer")]
    InvalidPeer,
    /// A witness stores no data, so it cannot become a replica in place.
    #[error("peer {0} is a witness and holds no data: remove it and add a new peer")]
    WitnessHasNoData(PeerId),
    /// With a majority of witnesses, an entry could be committed that no peer has applied to any
    /// data.
    #[error("{witnesses} of {voters} voters would be witnesses: they must be no majority")]
    WitnessMajority {
        /// How many of the old or the new voters are witnesses.
        witnesses: usize,
        /// How many voters that configuration has.
        voters: usize,
    },
    /// Too many members.
    #[error("{0} peers are more than the limit of {MAX_PEERS}")]
    TooManyPeers(usize),
    /// A timing or a size that cannot work.
    #[error("the setting {name} is out of range: {reason}")]
    Setting {
        /// The field of [`crate::Config`].
        name: &'static str,
        /// What it must be.
        reason: &'static str,
    },
    /// Applied, compacted or committed state beyond the end of the log.
    #[error("peer {peer} restored {what} {index} but its log ends at {last}")]
    BeyondLog {
        /// The peer.
        peer: PeerId,
        /// Which index.
        what: &'static str,
        /// Its value.
        index: LogIndex,
        /// Where the log ends.
        last: LogIndex,
    },
    /// The log has entries of a term that the hard state has not seen.
    #[error("peer {peer} restored term {term} but its log ends in term {last}")]
    TermBehindLog {
        /// The peer.
        peer: PeerId,
        /// The hard state's term.
        term: Term,
        /// The term of the last entry.
        last: Term,
    },
    /// The state machine lacks what the log has dropped.
    #[error("peer {peer} restored applied index {applied} but its log begins after {compacted}")]
    AppliedBehindLog {
        /// The peer.
        peer: PeerId,
        /// The applied index.
        applied: LogIndex,
        /// The last index that the log no longer has.
        compacted: LogIndex,
    },
}

impl Configuration {
    /// A configuration of plain voters.
    pub fn of_voters(voters: impl IntoIterator<Item = PeerId>) -> Self {
        Configuration { voters: voters.into_iter().collect(), ..Configuration::default() }
    }

    /// Whether two majorities are needed.
    #[must_use]
    pub fn is_joint(&self) -> bool {
        !self.voters_outgoing.is_empty()
    }

    /// Whether there is no member. A new replica that knows nothing of its group yet has such a
    /// configuration.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.voters.is_empty()
    }

    /// Whether the peer is a member in any capacity.
    #[must_use]
    pub fn contains(&self, peer: PeerId) -> bool {
        self.is_voter(peer) || self.is_learner(peer)
    }

    /// Whether the peer's vote counts in the old or the new configuration.
    #[must_use]
    pub fn is_voter(&self, peer: PeerId) -> bool {
        self.voters.contains(&peer) || self.voters_outgoing.contains(&peer)
    }

    /// Whether the peer only receives the log.
    #[must_use]
    pub fn is_learner(&self, peer: PeerId) -> bool {
        self.learners.contains(&peer)
    }

    /// Whether the peer votes but stores no data.
    #[must_use]
    pub fn is_witness(&self, peer: PeerId) -> bool {
        self.witnesses.contains(&peer)
    }

    /// Every member, in order, each once.
    pub fn peers(&self) -> impl Iterator<Item = PeerId> + '_ {
        let outgoing = self.voters_outgoing.iter().filter(|peer| !self.voters.contains(peer));
        self.voters.iter().chain(outgoing).chain(self.learners.iter()).copied()
    }

    /// The configuration after `change`, if it is possible from this one.
    ///
    /// # Errors
    /// See [`ConfigError`]; the configuration itself is never changed.
    pub fn changed(&self, change: &ConfChange) -> Result<Configuration, ConfigError> {
        if change.steps.is_empty() { self.left() } else { self.entered(change) }
    }

    fn left(&self) -> Result<Configuration, ConfigError> {
        if !self.is_joint() {
            return Err(ConfigError::NotJoint);
        }
        let mut next = self.clone();
        next.voters_outgoing = PeerSet::default();
        let learners = next.learners.iter().chain(&next.learners_next);
        next.learners = learners.copied().collect();
        next.learners_next = PeerSet::default();
        next.auto_leave = false;
        next.witnesses.retain(|peer| self.voters.contains(peer));
        Ok(next)
    }

    fn entered(&self, change: &ConfChange) -> Result<Configuration, ConfigError> {
        if self.is_joint() {
            return Err(ConfigError::AlreadyJoint);
        }
        let mut next = self.clone();
        let mut named = PeerSet::default();
        for &step in &change.steps {
            let (ChangeStep::AddVoter(peer)
            | ChangeStep::AddLearner(peer)
            | ChangeStep::AddWitness(peer)
            | ChangeStep::Remove(peer)) = step;
            if peer.0 == 0 {
                return Err(ConfigError::InvalidPeer);
            }
            if !named.insert(peer) {
                return Err(ConfigError::NamedTwice(peer));
            }
            next.take_step(step)?;
        }
        let added = next.voters.iter().filter(|peer| !self.voters.contains(peer)).count();
        let moved = added + self.voters.len() + added - next.voters.len();
        let jointly = moved > 1 && !broken!(ManyVotersJointly);
        if jointly || change.leave == LeaveJoint::Explicit {
            next.voters_outgoing.clone_from(&self.voters);
            next.auto_leave = change.leave == LeaveJoint::Auto;
            // A voter that becomes a learner keeps its old vote until the end.
            let outgoing = &next.voters_outgoing;
            let demoted = next.learners.iter().filter(|peer| outgoing.contains(peer));
            next.learners_next = demoted.copied().collect();
            next.learners.retain(|peer| !outgoing.contains(peer));
        }
        let (voters, outgoing) = (&next.voters, &next.voters_outgoing);
        next.witnesses.retain(|peer| voters.contains(peer) || outgoing.contains(peer));
        next.validate()?;
        Ok(next)
    }

    /// Checks that this is a configuration that a group can have. A configuration from a disk or
    /// another peer may be none.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn validate(&self) -> Result<(), ConfigError> {
        let Configuration { voters, voters_outgoing, learners, learners_next, witnesses, .. } =
            self;
        if voters.iter().all(|peer| witnesses.contains(peer)) {
            return Err(ConfigError::NoVoters);
        }
        for half in [voters, voters_outgoing] {
            let count = half.iter().filter(|peer| witnesses.contains(peer)).count();
            if count > half.len() / 2 {
                return Err(ConfigError::WitnessMajority { witnesses: count, voters: half.len() });
            }
        }
        let peers = self.peers().count();
        if peers > MAX_PEERS {
            return Err(ConfigError::TooManyPeers(peers));
        }
        for &peer in
            [voters, voters_outgoing, learners, learners_next, witnesses].into_iter().flatten()
        {
            if peer.0 == 0 {
                return Err(ConfigError::InvalidPeer);
            }
        }
        if let Some(peer) = learners.iter().find(|peer| self.is_voter(**peer)) {
            return Err(ConfigError::TwoRoles(*peer));
        }
        // A peer that is yet to become a learner votes in the old configuration only.
        let yet = |peer: &&PeerId| !voters_outgoing.contains(peer) || voters.contains(peer);
        if let Some(peer) = learners_next.iter().find(yet) {
            return Err(ConfigError::TwoRoles(*peer));
        }
        match witnesses.iter().find(|peer| !self.is_voter(**peer)) {
            Some(peer) => Err(ConfigError::TwoRoles(*peer)),
            None => Ok(()),
        }
    }

    fn take_step(&mut self, step: ChangeStep) -> Result<(), ConfigError> {
        match step {
            ChangeStep::AddVoter(peer) | ChangeStep::AddLearner(peer) if self.is_witness(peer) => {
                return Err(ConfigError::WitnessHasNoData(peer));
            }
            ChangeStep::AddVoter(peer) => {
                self.learners.remove(&peer);
                self.voters.insert(peer);
            }
            ChangeStep::AddLearner(peer) => {
                self.voters.remove(&peer);
                self.learners.insert(peer);
            }
            ChangeStep::AddWitness(peer) => {
                self.learners.remove(&peer);
                self.voters.insert(peer);
                self.witnesses.insert(peer);
            }
            ChangeStep::Remove(peer) => {
                // A witness keeps its flag as long as its old vote counts.
                self.voters.remove(&peer);
                self.learners.remove(&peer);
            }
        }
        Ok(())
    }
}
