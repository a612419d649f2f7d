//! One replica of one region: the Raft group, what waits for it, and the region it describes.
//!
//! In: requests, messages and notices, called by the worker that owns the peer.
//! Out: everything gathers in the [`Outputs`] of the worker's turn. Nothing here
//! blocks, reads a clock or touches a socket; the disk is read only for log
//! entries that the group no longer holds in memory.
//!
//! What a peer holds is kept in rooms: [`Writes`], [`Reads`], the [`StoredLog`], [`Snapshots`],
//! [`Reports`] and [`Members`]. A room knows neither the peer nor the other rooms. It states
//! beside its fields what is always true of them, and changes them. What happens, and in which
//! order, is decided here, in the parts of the `impl Peer`:
//!
//! ```text
//!  requests, admin   requests, checked against the region as it is now
//!  messages          messages of the region's other peers, and messages to them
//!  ready             what the group wants after a turn
//!  notices           what was done of it
//!  upkeep            what is done when it is time
//! ```

mod admin;
mod log;
mod members;
mod messages;
mod notices;
mod outputs;
mod reads;
mod ready;
mod reports;
mod requests;
mod snapshots;
mod upkeep;
mod writes;

use std::sync::Arc;

use esker_model::{Peer as PeerMeta, Region, RegionId, StoreId};
use esker_mutants::broken;
use esker_raft::{Group, GroupId, Identity, LogIndex, PeerId, Restored, RoleKind, Term, Time};

use self::log::{GroupLog, StoredLog};
use self::members::Members;
use self::reads::Reads;
use self::reports::Reports;
use self::snapshots::Snapshots;
use self::writes::Writes;
use crate::error::{RequestError, StoreError};
use crate::message::{PeerProgress, RegionStatus, ReplicaRole};
use crate::read::ReadDelegate;
use crate::region::configuration;
use crate::state::{Applied, RaftState};
use crate::worker::Shared;

pub use outputs::Outputs;
pub use ready::Held;

/// What a peer is made from.
pub struct PeerSeed {
    pub descriptor: Region,
    pub me: PeerMeta,
    pub raft_state: RaftState,
    pub last_term: Term,
    pub applied: Applied,
    /// Tells notices for this peer from notices for an earlier one of the same region.
    pub generation: u64,
    /// It never ran before, here or anywhere.
    pub fresh: bool,
}

/// Below every peer that is sound.
const RETIRED_PRIORITY: i32 = i32::MIN;
/// Of a peer whose store has a slow disk: it campaigns one election timeout later than others.
const SLOW_PRIORITY: i32 = -1;

/// What a peer is here for. It only moves on in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Life {
    /// It serves as its role allows.
    Serving,
    /// It serves nobody, because what it reads may be damaged, and takes part in its group so that
    /// others can: see [`Peer::retire`].
    Retired,
    /// Its data is being removed: see [`Peer::begin_destroy`]. Its group is not driven any more,
    /// and to all who ask the region is not here. The worker drops it when the data is gone.
    Destroying,
}

pub struct Peer {
    id: RegionId,
    store: StoreId,
    generation: u64,
    /// This peer as the descriptor names it, or as its leader named it where there is none yet.
    /// The id never changes.
    me: PeerMeta,
    /// The region as of the last entry that changed it, whose effects the worker has carried out.
    /// The delegate has the same, until the peer is destroyed. The members are always those of the
    /// group's configuration.
    descriptor: Arc<Region>,
    group: Group<GroupLog>,
    /// How far the apply worker is, as far as it has said so. The data may be further.
    applied: Applied,
    /// What readers on other threads see. A lease is in it only between a [`Peer::publish_lease`]
    /// that found one and whatever ends the lease, which withdraws it before any message leaves.
    delegate: Arc<ReadDelegate>,
    /// Whether the worker was told last that this peer leads.
    was_leader: bool,
    /// What the followers had made durable that is not durable here, and since when: see
    /// [`crate::disk`]. Only a leader knows.
    behind: Option<(LogIndex, Time)>,
    /// The last index that was durable here at the last look.
    was_durable: LogIndex,
    life: Life,

    writes: Writes,
    reads: Reads,
    log: StoredLog,
    snapshots: Snapshots,
    reports: Reports,
    members: Members,
}

impl Peer {
    pub fn new(seed: PeerSeed, shared: &Shared, now: Time) -> Result<Self, StoreError> {
        let PeerSeed { descriptor, me, raft_state, last_term, applied, generation, fresh } = seed;
        let id = descriptor.id;
        let identity = Identity { group: GroupId(id.0), peer: me.id };
        let restored = Restored {
            hard_state: raft_state.hard_state,
            configuration: configuration(&descriptor),
            compacted: raft_state.truncated,
            last: (raft_state.last, last_term),
            applied: applied.index,
        };
        let log = GroupLog::new(shared.log.clone(), id);
        // A peer that ran before may have promised a leader not to vote for another.
        let make = if fresh { Group::create } else { Group::new };
        let group = make(identity, shared.raft.clone(), log, restored, now);
        let group = group.map_err(|e| StoreError::Corrupt {
            what: format!("the state of region {id}"),
            why: e.to_string(),
        })?;
        let descriptor = Arc::new(descriptor);
        let delegate = Arc::new(ReadDelegate::new(descriptor.clone(), me.id));
        Ok(Peer {
            id,
            store: shared.store,
            generation,
            me,
            descriptor,
            group,
            applied,
            delegate,
            was_leader: false,
            behind: None,
            was_durable: LogIndex(0),
            life: Life::Serving,
            writes: Writes::new(id),
            reads: Reads::new(),
            log: StoredLog::new(id, raft_state, now + shared.config.log_gc_interval),
            snapshots: Snapshots::new(id),
            reports: Reports::new(now),
            members: Members::new(now),
        })
    }

    pub fn id(&self) -> RegionId {
        self.id
    }

    pub fn me(&self) -> PeerMeta {
        self.me
    }

    pub fn generation(&self) -> u64 {
        self.generation
    }

    pub fn descriptor(&self) -> &Arc<Region> {
        &self.descriptor
    }

    pub fn delegate(&self) -> &Arc<ReadDelegate> {
        &self.delegate
    }

    pub fn raft_state(&self) -> &RaftState {
        self.log.state()
    }

    pub fn is_initialized(&self) -> bool {
        self.descriptor.is_initialized()
    }

    pub fn is_installing(&self) -> bool {
        self.snapshots.is_installing()
    }

    pub fn is_destroying(&self) -> bool {
        self.life == Life::Destroying
    }

    pub fn term(&self) -> Term {
        self.group.term()
    }

    pub fn is_leader(&self) -> bool {
        self.group.role() == RoleKind::Leader
    }

    fn is_learner(&self) -> bool {
        self.is_initialized() && !self.group.configuration().is_voter(self.group.id())
    }

    /// The peer of the region that leads it, as far as this one knows.
    fn leader(&self) -> Option<PeerMeta> {
        self.group.leader().and_then(|leader| self.meta_of(leader))
    }

    fn meta_of(&self, peer: PeerId) -> Option<PeerMeta> {
        if peer == self.me.id {
            return Some(self.me);
        }
        self.descriptor.peer(peer).or_else(|| self.members.sender(peer)).copied()
    }

    fn set_descriptor(&mut self, descriptor: Region) {
        self.descriptor = Arc::new(descriptor);
        if !self.is_destroying() {
            self.delegate.set_descriptor(self.descriptor.clone());
        }
        self.reports.report_soon();
    }

    /// Lets readers on other threads know until when they may read here.
    fn publish_lease(&self) {
        let lease = self.group.lease_until();
        let is_splitting = self.writes.is_splitting() && !broken!(LeaseEndsWithSplit);
        // Until an entry of this term is applied, what earlier leaders committed may not be
        // visible here.
        let sees_commits = self.applied.term == self.group.term();
        match lease {
            Some(until)
                if !is_splitting
                    && !self.is_installing()
                    && self.life == Life::Serving
                    && sees_commits =>
            {
                self.delegate.publish_lease(self.applied.term, until);
            }
            None if broken!(LeaseEndsWithTransfer) && self.group.transfer_target().is_some() => {}
            _ => self.delegate.withdraw_lease(),
        }
    }

    /// From now on this peer serves nobody: what it reads may be damaged. It hands its
    /// leadership over where it has one, and does not seek another.
    pub fn retire(&mut self, now: Time) {
        self.life = self.life.max(Life::Retired);
        self.delegate.withdraw_lease();
        self.group.set_priority(RETIRED_PRIORITY);
        // Their clients ask another replica.
        let error = self.not_leader();
        self.reads.fail_all(&error);
        if self.is_leader() {
            // Nobody to hand over to: then nobody else could serve, either.
            let _ = self.group.transfer_leader(now, None);
        }
    }

    /// Ends everything that waits for this peer, whose region leaves the store.
    pub fn begin_destroy(&mut self) {
        self.life = Life::Destroying;
        self.delegate.withdraw_lease();
        // Readers that hold the delegate must see that the range is no longer here
        // before the data goes.
        if !broken!(RemovedPeerIsUnseen) {
            self.delegate.set_descriptor(Arc::new(Region::uninitialized(self.id)));
        }
        self.fail_all(&RequestError::RegionNotFound(self.id));
    }

    /// Answers everybody who waits. Proposals may still be committed by others.
    pub fn fail_all(&mut self, error: &RequestError) {
        self.writes.fail_all(error);
        self.reads.fail_all(error);
    }

    /// # Errors
    /// When the region is not here, or not here any more.
    pub fn status(&self) -> Result<RegionStatus, RequestError> {
        self.check_here()?;
        let role = match self.group.role() {
            RoleKind::Leader => ReplicaRole::Leader,
            RoleKind::Candidate | RoleKind::PreCandidate => ReplicaRole::Candidate,
            RoleKind::Follower if self.group.configuration().is_learner(self.group.id()) => {
                ReplicaRole::Learner
            }
            RoleKind::Follower => ReplicaRole::Follower,
        };
        let progress = if self.is_leader() {
            self.group
                .progress()
                .map(|(peer, progress)| PeerProgress {
                    peer,
                    matched: progress.match_index,
                    next: progress.next_index,
                    state: progress.state,
                    recently_active: progress.recently_active,
                })
                .collect()
        } else {
            Vec::new()
        };
        Ok(RegionStatus {
            region: (*self.descriptor).clone(),
            peer: self.me,
            role,
            term: self.group.term(),
            leader: self.group.leader(),
            first: self.group.first_index(),
            last: self.group.last_index(),
            commit: self.group.commit_index(),
            applied: self.applied.index,
            progress,
        })
    }
}
