//! One replica of one region: the Raft group, what waits for it, and the region it describes.
//!
//! In: requests, messages and notices, called by the worker that owns the peer.
//! Out: everything gathers in the [`Outputs`] of the worker's turn. Nothing here
//! blocks, reads a clock or touches a socket; the disk is read only for log
//! entries that the group no longer holds in memory.

mod outputs;
mod ready;
mod requests;

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use esker_engine::{KvSnapshot, LogEngine};
use esker_model::{DownPeer, Peer as PeerMeta, Region, RegionId, RegionReport, StoreId, Traffic};
use esker_raft::{
    Entry, Group, GroupId, Identity, LogIndex, LogReadError, LogReader, MAX_INDEX_LEAP, Message,
    MessageBody, PeerId, ProgressState, Restored, RoleKind, StepError, Term, Time,
};
use esker_rpc::repeat::Repeated;
use parking_lot::Mutex;

use crate::envelope::{Address, Consensus, Content, Envelope};
use crate::error::{RequestError, StoreError};
use crate::message::{
    PeerProgress, Proposal, ReadRequest, RegionStatus, ReplicaRole, WriteRequest,
};
use crate::read::ReadDelegate;
use crate::region::configuration;
use crate::snapshot::{ReceivedSnapshot, RegionSnapshotSource};
use crate::state::{Applied, RaftState, decode_entry};
use crate::worker::Shared;

pub use outputs::Outputs;

/// Reads entries that the group no longer keeps in memory.
#[derive(Clone)]
pub struct GroupLog {
    log: LogEngine,
    region: RegionId,
}

impl LogReader for GroupLog {
    fn entries(
        &self,
        low: LogIndex,
        high: LogIndex,
        max_bytes: usize,
    ) -> Result<Vec<Entry>, LogReadError> {
        let failed = |reason: String| LogReadError::Failed { index: low, reason };
        let stored = self
            .log
            .entries(self.region.0, low.0, high.0, max_bytes)
            .map_err(|e| failed(e.to_string()))?;
        stored
            .into_iter()
            .map(|(index, bytes)| {
                decode_entry(self.region, index, bytes).map_err(|e| failed(e.to_string()))
            })
            .collect()
    }

    fn term(&self, index: LogIndex) -> Result<Option<Term>, LogReadError> {
        let failed = |reason: String| LogReadError::Failed { index, reason };
        let stored = self.log.entry(self.region.0, index.0).map_err(|e| failed(e.to_string()))?;
        stored
            .map(|bytes| decode_entry(self.region, index.0, bytes).map(|entry| entry.term))
            .transpose()
            .map_err(|e| failed(e.to_string()))
    }
}

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

/// How long a learner hears of nobody before it asks whether it is still a member.
const QUESTION_AFTER: Duration = Duration::from_secs(10);

pub struct Peer {
    id: RegionId,
    store: StoreId,
    pub(crate) me: PeerMeta,
    descriptor: Arc<Region>,
    group: Group<GroupLog>,
    log: GroupLog,
    pub(crate) generation: u64,
    raft_state: RaftState,
    applied: Applied,
    delegate: Arc<ReadDelegate>,
    /// Where peers live that the descriptor does not name yet: the senders of messages.
    senders: HashMap<PeerId, PeerMeta>,

    writes: Vec<WriteRequest>,
    proposals: VecDeque<Proposal>,
    /// Reads of this turn, which one confirmation will serve.
    reads: Vec<ReadRequest>,
    /// Reads whose confirmation is under way.
    confirming: HashMap<u64, Vec<ReadRequest>>,
    next_read: u64,
    /// Reads with the index that they must see.
    confirmed: VecDeque<(LogIndex, Vec<ReadRequest>)>,
    /// A follower's reads, with a view that has what they must see, and how far
    /// that view is: they wait until the leader is known to be as far.
    ahead: VecDeque<(LogIndex, KvSnapshot, Vec<ReadRequest>)>,
    /// How far the leaders of this region are known to have applied.
    leader_applied: LogIndex,

    /// A split proposed in this term and not applied yet. Another store may apply
    /// it first and let the new region be written there: until it is applied here,
    /// this leader answers no reads under its lease.
    splitting: Option<LogIndex>,
    /// The snapshot that was handed to the group, until the group accepts it.
    received: Option<ReceivedSnapshot>,
    installing: bool,
    pub(crate) destroying: bool,

    may_truncate: Option<(LogIndex, Term)>,
    next_log_gc: Time,
    next_report: Time,
    last_heard: Time,
    next_question: Time,
    /// When to look whether the peers that were reported as pending have caught
    /// up: placement's next step waits for that.
    next_look: Option<Time>,
    written_bytes: u64,
    written_keys: u64,
    was_leader: bool,
    /// See [`Peer::retire`].
    pub(super) retired: bool,
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
        let log = GroupLog { log: shared.log.clone(), region: id };
        // A peer that ran before may have promised a leader not to vote for another.
        let make = if fresh { Group::create } else { Group::new };
        let group = make(identity, shared.raft.clone(), log.clone(), restored, now);
        let group = group.map_err(|e| StoreError::Corrupt {
            what: format!("the state of region {id}"),
            why: e.to_string(),
        })?;
        let descriptor = Arc::new(descriptor);
        let delegate = Arc::new(ReadDelegate::new(descriptor.clone(), me.id));
        Ok(Peer {
            id,
            store: shared.store,
            me,
            descriptor,
            group,
            log,
            generation,
            raft_state,
            applied,
            delegate,
            senders: HashMap::new(),
            writes: Vec::new(),
            proposals: VecDeque::new(),
            reads: Vec::new(),
            confirming: HashMap::new(),
            next_read: 1,
            confirmed: VecDeque::new(),
            ahead: VecDeque::new(),
            leader_applied: LogIndex(0),
            splitting: None,
            received: None,
            installing: false,
            destroying: false,
            may_truncate: None,
            next_log_gc: now + shared.config.log_gc_interval,
            next_report: now,
            last_heard: now,
            next_question: now + QUESTION_AFTER,
            next_look: None,
            written_bytes: 0,
            written_keys: 0,
            was_leader: false,
            retired: false,
        })
    }

    pub fn id(&self) -> RegionId {
        self.id
    }

    pub fn descriptor(&self) -> &Arc<Region> {
        &self.descriptor
    }

    pub fn delegate(&self) -> &Arc<ReadDelegate> {
        &self.delegate
    }

    pub fn raft_state(&self) -> &RaftState {
        &self.raft_state
    }

    pub fn is_initialized(&self) -> bool {
        self.descriptor.is_initialized()
    }

    pub fn term(&self) -> Term {
        self.group.term()
    }

    pub fn is_leader(&self) -> bool {
        self.group.role() == RoleKind::Leader
    }

    /// When this peer next has something to do without being asked.
    pub fn next_deadline(&self) -> Option<Time> {
        if self.destroying {
            return None;
        }
        let mut deadline = self.group.next_deadline();
        let mut consider = |time: Time| deadline = Some(deadline.map_or(time, |d| d.min(time)));
        if self.is_leader() {
            consider(self.next_report);
            consider(self.next_log_gc);
            if let Some(look) = self.next_look {
                consider(look);
            }
        } else {
            if self.may_truncate.is_some() {
                consider(self.next_log_gc);
            }
            if self.is_learner() {
                consider(self.next_question);
            }
        }
        deadline
    }

    fn is_learner(&self) -> bool {
        self.is_initialized() && !self.group.configuration().is_voter(self.group.id())
    }

    pub fn tick(&mut self, now: Time) {
        self.group.tick(now);
    }

    /// From now on this peer serves nobody: what it reads may be damaged. It hands its
    /// leadership over where it has one, and does not seek another.
    pub fn retire(&mut self, now: Time) {
        self.retired = true;
        self.delegate.withdraw_lease();
        self.group.set_priority(RETIRED_PRIORITY);
        // Their clients ask another replica.
        self.fail_reads(&self.not_leader());
        if self.is_leader() {
            // Nobody to hand over to: then nobody else could serve, either.
            let _ = self.group.transfer_leader(now, None);
        }
    }

    /// Ends all reads that wait.
    fn fail_reads(&mut self, error: &RequestError) {
        let waiting = self
            .reads
            .drain(..)
            .chain(self.confirming.drain().flat_map(|(_, reads)| reads))
            .chain(self.confirmed.drain(..).flat_map(|(_, reads)| reads))
            .chain(self.ahead.drain(..).flat_map(|(_, _, reads)| reads));
        for read in waiting {
            let _ = read.reply.send(Err(error.clone()));
        }
    }

    pub fn campaign(&mut self, now: Time) {
        self.group.campaign(now);
    }

    pub fn set_descriptor(&mut self, descriptor: Region) {
        self.descriptor = Arc::new(descriptor);
        if !self.destroying {
            self.delegate.set_descriptor(self.descriptor.clone());
        }
        self.next_report = Time(0);
    }

    pub fn report_soon(&mut self) {
        self.next_report = Time(0);
    }

    /// The peer of the region that leads it, as far as this one knows.
    pub fn leader(&self) -> Option<PeerMeta> {
        self.group.leader().and_then(|leader| self.meta_of(leader))
    }

    fn meta_of(&self, peer: PeerId) -> Option<PeerMeta> {
        if peer == self.me.id {
            return Some(self.me);
        }
        self.descriptor.peer(peer).or_else(|| self.senders.get(&peer)).copied()
    }

    fn not_leader(&self) -> RequestError {
        // A leader that this one follows in the current term; a guess would send
        // clients back and forth.
        let leader = self.leader().filter(|leader| leader.id != self.me.id);
        RequestError::NotLeader { region: self.id, leader }
    }

    /// Takes a message of the group's own protocol.
    pub fn step(
        &mut self,
        now: Time,
        address: &Address,
        consensus: Consensus,
    ) -> Result<(), StoreError> {
        let sender = address.from;
        if self.descriptor.peer(sender.id).is_none() {
            const MAX_SENDERS: usize = 16;
            if self.senders.len() >= MAX_SENDERS {
                self.senders.clear();
            }
            self.senders.insert(sender.id, sender);
        }
        self.last_heard = now;
        let Consensus { message, applied, .. } = consensus;
        match self.group.step(now, message) {
            Ok(()) => {
                // Others than the leader have nothing to say of it, and nobody has applied
                // what no log can hold yet.
                let possible = self.group.last_index().0.saturating_add(MAX_INDEX_LEAP);
                if self.group.leader() == Some(sender.id) && applied.0 <= possible {
                    self.leader_applied = self.leader_applied.max(applied);
                }
                Ok(())
            }
            // Going on would lose data or make replicas differ.
            Err(
                broken @ (StepError::Log(_)
                | StepError::CommittedConflict { .. }
                | StepError::LostEntries { .. }
                | StepError::TwoLeaders { .. }),
            ) => {
                let what = format!("the log of region {}", self.id);
                Err(StoreError::Corrupt { what, why: broken.to_string() })
            }
            Err(broken @ StepError::PeerLostEntries { .. }) => {
                // The peer says so again with every message.
                static LOSSES: Mutex<Repeated<Instant>> = Mutex::new(Repeated::new());
                metrics::counter!("esker_raft_peers_lost_entries_total").increment(1);
                if let Some(times) = LOSSES.lock().failed(Instant::now()) {
                    tracing::error!(
                        region = %self.id, store = %self.store, times, %broken, "message refused"
                    );
                }
                Ok(())
            }
            Err(refused) => {
                metrics::counter!("esker_raft_messages_refused_total").increment(1);
                tracing::debug!(region = %self.id, store = %self.store, %refused, "message refused");
                Ok(())
            }
        }
    }

    /// Takes a snapshot whose files are on this store's disk already.
    pub fn step_snapshot(
        &mut self,
        now: Time,
        address: &Address,
        consensus: Consensus,
        files: ReceivedSnapshot,
    ) -> Result<(), StoreError> {
        if let Some(earlier) = self.received.replace(files) {
            earlier.discard();
        }
        self.step(now, address, consensus)
    }

    pub fn unreachable(&mut self, store: StoreId) {
        if let Some(peer) = self.descriptor.peer_on(store) {
            self.group.unreachable(peer.id);
        }
    }

    pub fn snapshot_sent(&mut self, to: PeerId, delivered: bool) {
        let outcome = if delivered {
            esker_raft::SnapshotOutcome::Delivered
        } else {
            esker_raft::SnapshotOutcome::Failed
        };
        self.group.snapshot_sent(to, outcome);
    }

    /// The message that goes with a snapshot to a follower; nothing if it cannot be sent any more.
    pub fn snapshot_message(
        &mut self,
        to: PeerId,
        taken: &RegionSnapshotSource,
    ) -> Option<Envelope> {
        let target = self.meta_of(to).filter(|_| self.is_leader());
        let Some(target) = target else {
            self.snapshot_sent(to, false);
            return None;
        };
        let message = Message {
            group: GroupId(self.id.0),
            from: self.group.id(),
            to,
            term: self.group.term(),
            body: MessageBody::InstallSnapshot {
                meta: Box::new(taken.meta.clone()),
                data: taken.data.clone(),
            },
        };
        let address =
            Address { region: self.id, from: self.me, to: target, epoch: taken.descriptor.epoch };
        let creates = Some(taken.descriptor.range.clone());
        let consensus = Consensus { message, applied: LogIndex(0), creates };
        Some(Envelope { address, content: Content::Consensus(Box::new(consensus)) })
    }

    /// Ends everything that waits for this peer, whose region leaves the store.
    pub fn begin_destroy(&mut self) {
        self.destroying = true;
        self.delegate.withdraw_lease();
        // Readers that hold the delegate must see that the range is no longer here
        // before the data goes.
        self.delegate.set_descriptor(Arc::new(Region::uninitialized(self.id)));
        self.fail_all(&RequestError::RegionNotFound(self.id));
    }

    /// Answers everybody who waits. Proposals may still be committed by others.
    pub fn fail_all(&mut self, error: &RequestError) {
        for proposal in self.proposals.drain(..) {
            proposal.fail(&RequestError::Undetermined(self.id));
        }
        for write in self.writes.drain(..) {
            let _ = write.reply.send(Err(error.clone()));
        }
        self.fail_reads(error);
    }

    pub fn status(&self) -> RegionStatus {
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
        RegionStatus {
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
        }
    }

    /// Peers that are not caught up, and how soon to look at them again.
    fn pending(&self) -> (Vec<PeerId>, Option<Duration>) {
        /// A peer is caught up when it lacks no more entries than may be on their way to it.
        const CAUGHT_UP_WITHIN: u64 = 256;
        let first = self.group.first_index();
        let (mut pending, mut coming) = (Vec::new(), false);
        for (peer, progress) in self.group.progress() {
            if peer == self.group.id() || self.descriptor.peer(peer).is_none() {
                continue;
            }
            let matched = progress.match_index;
            if progress.state == ProgressState::Snapshot
                || matched.0 == 0
                || matched.next() < first
                || matched.0 + CAUGHT_UP_WITHIN < self.applied.index.0
            {
                pending.push(peer);
                coming |= progress.recently_active;
            }
        }
        let soon = if coming { ready::LOOK_AGAIN } else { ready::LOOK_AT_SILENT };
        let look = (!pending.is_empty()).then_some(soon);
        (pending, look)
    }

    /// What placement is told of a region that is led here.
    fn report(&mut self, now: Time, approximate_size: u64) -> RegionReport {
        const DOWN_AFTER: Duration = Duration::from_secs(10);
        let (pending, look) = self.pending();
        self.next_look = look.map(|soon| now + soon);
        let mut down = Vec::new();
        for (peer, progress) in self.group.progress() {
            let silent = now - progress.last_ack;
            if peer != self.group.id()
                && silent > DOWN_AFTER
                && self.descriptor.peer(peer).is_some()
            {
                down.push(DownPeer { peer, seconds: silent.as_secs() });
            }
        }
        let (read_bytes, read_keys) = self.delegate.take_read_load();
        RegionReport {
            region: (*self.descriptor).clone(),
            leader: self.me,
            term: Some(self.group.term()),
            down,
            pending,
            traffic: Traffic {
                bytes_written: std::mem::take(&mut self.written_bytes),
                bytes_read: read_bytes,
                keys_written: std::mem::take(&mut self.written_keys),
                keys_read: read_keys,
            },
            approximate_size,
            // Not counted: it would cost a look at every file.
            approximate_keys: 0,
        }
    }
}
