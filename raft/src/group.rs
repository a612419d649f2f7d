//! One peer of one group: the state machine that everything else serves.
//!
//! Inputs are methods that return at once. Their effects are collected and come out of
//! [`Group::ready`]. The modules: `step` sorts messages by term, `election` campaigns and votes,
//! `follower` handles a leader's messages, and `leader` replicates and commits. `membership`
//! changes the members, `transfer` hands leadership over, `reads` serves ReadIndex, `timing` owns
//! the deadlines, and `output` makes the Ready.

mod election;
mod follower;
mod leader;
mod membership;
mod output;
mod reads;
mod role;
mod step;
mod timing;
mod transfer;

use std::sync::Arc;

use bytes::Bytes;

pub use leader::ProposeError;
pub use step::StepError;
pub use transfer::TransferError;

use self::output::Outbox;
use self::role::{Follower, Role};
use crate::config::Config;
use crate::configuration::{ConfigError, Configuration};
use crate::log::{Log, LogReader};
use crate::message::{Message, MessageBody};
use crate::progress::{Progress, ProgressState};
use crate::random::Random;
use crate::ready::{ReadyNumber, RoleChange, RoleKind};
use crate::rules::broken;
use crate::types::{HardState, Identity, LogIndex, PeerId, SnapshotMeta, Term, Time};

/// What the driver found on its disk.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Restored {
    /// The hard state that was written last.
    pub hard_state: HardState,
    /// The members as of `applied`.
    pub configuration: Configuration,
    /// The last index that the log no longer has, and its term.
    pub compacted: (LogIndex, Term),
    /// The last index of the log, and its term; `compacted` if the log is empty.
    pub last: (LogIndex, Term),
    /// The last index that the state machine has applied.
    pub applied: LogIndex,
}

/// How sending a snapshot ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SnapshotOutcome {
    /// The receiver has the whole snapshot, and will reply when it is installed.
    Delivered,
    /// The snapshot was lost. The group will ask for one again.
    Failed,
}

/// A snapshot that the driver is installing. The log is frozen until that is done.
#[derive(Debug)]
struct Installing {
    meta: Box<SnapshotMeta>,
    /// Taken by the Ready that asks for it.
    data: Option<Bytes>,
}

/// One peer of one group. See the crate's documentation for how to drive it.
#[derive(Debug)]
pub struct Group<R> {
    me: Identity,
    config: Arc<Config>,
    priority: i32,
    log: Log<R>,
    /// As of the applied index.
    configuration: Configuration,
    term: Term,
    vote: Option<PeerId>,
    role: Role,
    /// The time of the latest input.
    now: Time,
    /// Until then this peer has promised a live leader to elect no other. That leader's lease rests
    /// on the promise. The field is not part of the role, so that no change of role forgets the
    /// promise.
    loyal_until: Time,
    random: Random,
    /// Names the batches of reads passed on to leaders.
    next_batch: u64,
    /// Boxed, because it is rare and large.
    installing: Option<Box<Installing>>,
    outbox: Outbox,
    last_ready: ReadyNumber,
    persisted_ready: ReadyNumber,
    reported_state: HardState,
    /// The Ready that carried the term and vote of `reported_state`.
    vote_ready: ReadyNumber,
    reported_role: RoleChange,
    /// Whether something was written or applied since memory was last freed.
    busy: bool,
    /// The driver has no room for more committed entries.
    holds_committed: bool,
}

impl<R: LogReader> Group<R> {
    /// Makes a peer that has run before. Before it stopped, the peer may have promised a leader to
    /// elect no other, so it gives no vote for one election timeout.
    ///
    /// # Errors
    /// If the settings are impossible, or the restored state contradicts itself.
    pub fn new(
        me: Identity,
        config: Arc<Config>,
        reader: R,
        mut restored: Restored,
        now: Time,
    ) -> Result<Self, ConfigError> {
        if broken!(VoteSurvivesRestart) {
            restored.hard_state.vote = None;
        }
        // A peer is free of such a promise if it is the only voter and has nothing left to apply
        // that could add another. A leader of the earlier members has had no lease since it
        // proposed the change that left this voter alone.
        let alone = restored.configuration.voters.len() == 1
            && restored.configuration.is_voter(me.peer)
            && !restored.configuration.is_joint()
            && (restored.applied == restored.last.0 || broken!(LoneVoterAppliesFirst));
        let mut group = Self::create(me, config, reader, restored, now)?;
        if !alone && !broken!(LoyaltySurvivesRestart) {
            group.loyal_until = now + group.config.election_timeout;
        } else if let (true, Role::Follower(follower)) = (alone, &mut group.role) {
            follower.deadline = now;
        }
        Ok(group)
    }

    /// Makes a peer that never ran, on any disk. It has promised nothing, so it may vote and
    /// campaign at once.
    ///
    /// # Errors
    /// If the settings are impossible, or the restored state contradicts itself.
    pub fn create(
        me: Identity,
        config: Arc<Config>,
        reader: R,
        restored: Restored,
        now: Time,
    ) -> Result<Self, ConfigError> {
        config.validate()?;
        let Restored { hard_state, configuration, compacted, last, applied } = restored;
        let peer = me.peer;
        if peer.0 == 0 {
            return Err(ConfigError::InvalidPeer);
        }
        if !configuration.is_empty() {
            configuration.validate()?;
        }
        let beyond = [
            ("applied index", applied),
            ("commit index", hard_state.commit),
            ("compacted index", compacted.0),
        ];
        for (what, index) in beyond {
            if index > last.0 {
                return Err(ConfigError::BeyondLog { peer, what, index, last: last.0 });
            }
        }
        if applied < compacted.0 {
            return Err(ConfigError::AppliedBehindLog { peer, applied, compacted: compacted.0 });
        }
        if hard_state.term < last.1 {
            let term = hard_state.term;
            return Err(ConfigError::TermBehindLog { peer, term, last: last.1 });
        }
        // A commit index alone need not be synced, so the stored one may lag behind the applied
        // index.
        let commit = hard_state.commit.max(applied);
        let log = Log::new(reader, compacted, last, commit, applied, config.max_entry_cache_bytes);
        let seed = config.seed ^ peer.0.rotate_left(32) ^ now.0.rotate_left(17);
        let mut random = Random::new(seed);
        // A reply that was under way when this peer stopped must not be taken for the reply to a
        // batch that it asks for now.
        let next_batch = random.next() >> 1;
        let HardState { term, vote, .. } = hard_state;
        let mut group = Group {
            me,
            priority: 0,
            log,
            configuration,
            term,
            vote,
            role: Role::Follower(Follower::new(None, now)),
            now,
            loyal_until: now,
            random,
            next_batch,
            installing: None,
            outbox: Outbox::default(),
            last_ready: ReadyNumber(0),
            persisted_ready: ReadyNumber(0),
            reported_state: hard_state,
            vote_ready: ReadyNumber(0),
            reported_role: RoleChange { role: RoleKind::Follower, term, leader: None },
            busy: false,
            holds_committed: false,
            config,
        };
        let deadline = group.election_deadline();
        group.role = Role::Follower(Follower::new(None, deadline));
        Ok(group)
    }

    /// Sets how willing this peer is to lead. With zero, the default, or more, it campaigns as
    /// usual. Below zero it waits that many election timeouts longer, up to [`MAX_PRIORITY_WAIT`],
    /// so that others go first. Without [`Config::pre_vote`] an impatient peer that cannot win may
    /// keep raising the term of one that could.
    ///
    /// [`MAX_PRIORITY_WAIT`]: crate::MAX_PRIORITY_WAIT
    pub fn set_priority(&mut self, priority: i32) {
        if priority == self.priority {
            return;
        }
        self.priority = priority;
        let deadline = self.election_deadline();
        if let Role::Follower(follower) = &mut self.role {
            follower.deadline = deadline;
        }
    }

    /// Reports that Ready `ready` and all Readies before it are durable.
    ///
    /// # Panics
    /// If there was no such Ready, because a driver that loses count loses data.
    pub fn persisted(&mut self, now: Time, ready: ReadyNumber) {
        assert!(
            ready <= self.last_ready,
            "Ready {} of peer {} is reported durable, but the last was {}",
            ready.0,
            self.me.peer,
            self.last_ready.0
        );
        self.advance(now);
        self.persisted_ready = self.persisted_ready.max(ready);
        self.log.write_finished(ready.0);
        self.count_own_vote();
        self.count_own_log();
    }

    /// Reports that the driver has applied everything up to `index`.
    pub fn applied(&mut self, index: LogIndex) {
        self.log.applied_to(index);
        self.leave_joint_if_due();
        self.campaign_if_asked();
    }

    /// Whether Readies are to carry no committed entries, because the driver has no room for them.
    /// They come when it has.
    pub fn hold_committed(&mut self, hold: bool) {
        self.holds_committed = hold;
    }

    /// Whether there are committed entries that a Ready would carry if it were not for
    /// [`Group::hold_committed`].
    #[must_use]
    pub fn has_held_committed(&self) -> bool {
        self.holds_committed && self.installing.is_none() && self.log.has_emittable()
    }

    /// Reports that the driver has dropped the log up to `index`. The entry at `index` had `term`.
    pub fn compacted(&mut self, index: LogIndex, term: Term) {
        self.log.compact(index, term);
    }

    /// This peer.
    #[must_use]
    pub fn id(&self) -> PeerId {
        self.me.peer
    }

    /// This peer and its group.
    #[must_use]
    pub fn identity(&self) -> Identity {
        self.me
    }

    /// This peer's role.
    #[must_use]
    pub fn role(&self) -> RoleKind {
        self.role.kind()
    }

    /// The latest term that this peer has seen.
    #[must_use]
    pub fn term(&self) -> Term {
        self.term
    }

    /// The leader of that term, if this peer knows it.
    #[must_use]
    pub fn leader(&self) -> Option<PeerId> {
        match &self.role {
            Role::Follower(follower) => follower.leader,
            Role::Candidate(_) => None,
            Role::Leader(_) => Some(self.me.peer),
        }
    }

    /// The highest index that this peer knows to be committed.
    #[must_use]
    pub fn commit_index(&self) -> LogIndex {
        self.log.commit()
    }

    /// The highest index reported as applied.
    #[must_use]
    pub fn applied_index(&self) -> LogIndex {
        self.log.applied()
    }

    /// The highest index known to be durable here.
    #[must_use]
    pub fn persisted_index(&self) -> LogIndex {
        self.log.persisted()
    }

    /// The end of the log, durable or not.
    #[must_use]
    pub fn last_index(&self) -> LogIndex {
        self.log.last_index()
    }

    /// The first index that the log still has.
    #[must_use]
    pub fn first_index(&self) -> LogIndex {
        self.log.first_index()
    }

    /// The members as of the applied index.
    #[must_use]
    pub fn configuration(&self) -> &Configuration {
        &self.configuration
    }

    /// The driver's log, as it was lent.
    #[must_use]
    pub fn reader(&self) -> &R {
        self.log.reader()
    }

    /// The current hard state, durable or not.
    #[must_use]
    pub fn hard_state(&self) -> HardState {
        HardState { term: self.term, vote: self.vote, commit: self.log.commit() }
    }

    /// A leader's view of every member, itself included. On a peer that does not lead it is empty.
    pub fn progress(&self) -> impl Iterator<Item = (PeerId, Progress)> + '_ {
        let follows = match &self.role {
            Role::Leader(leader) => leader.follows.as_slice(),
            _ => &[],
        };
        follows.iter().map(|(peer, follow)| {
            let own = *peer == self.me.peer;
            let last_ack = if own { self.now } else { follow.last_ack() };
            let progress = Progress {
                match_index: follow.match_index(),
                next_index: follow.next_index(),
                state: if own { ProgressState::Replicate } else { follow.state() },
                last_ack,
                recently_active: self.now - last_ack < self.config.election_timeout,
            };
            (*peer, progress)
        })
    }

    /// Frees memory that an idle group does not need. A group does so by itself between two
    /// heartbeats without work.
    pub fn shrink(&mut self) {
        self.log.shrink();
        self.outbox.shrink();
        match &mut self.role {
            Role::Follower(follower) => follower.reads.shrink(),
            Role::Candidate(_) => {}
            Role::Leader(leader) => {
                leader.reads.shrink();
                leader.follows.iter_mut().for_each(|(_, follow)| follow.shrink());
            }
        }
    }

    /// Frees memory if nothing happened since the last call. Called with every heartbeat.
    fn rest(&mut self) {
        if !std::mem::take(&mut self.busy) {
            self.shrink();
        }
    }

    fn advance(&mut self, now: Time) {
        self.now = self.now.max(now);
    }

    fn message(&self, to: PeerId, body: MessageBody) -> Message {
        let Identity { group, peer: from } = self.me;
        Message { group, from, to, term: self.term, body }
    }
}
