//! What the parts of a store say to each other.
//!
//! [`Input`]s come from outside (clients, the network, placement) through a bounded
//! inbox that refuses when full. [`Notice`]s come from the store's own log writer
//! and apply workers; there is at most one for each task that a worker handed out.
//! Tasks have no bound of their own in number: their bytes have one, see
//! `backlog.rs`.

use bytes::Bytes;
use esker_engine::LogBatch;
use esker_model::{Epoch, KeyRange, NewRegion, Peer, PeerChange, Region, RegionId, StoreId};
use esker_raft::{Entries, LogIndex, PeerId, ProgressState, ReadyNumber, SnapshotMeta, Term};
use esker_rpc::proto::esker::command::RegionSnapshot as SnapshotData;
use tokio::sync::oneshot;

use crate::budget::Taken;
use crate::command::Mutation;
use crate::door::Arrived;
use crate::envelope::Envelope;
use crate::error::RequestError;
use crate::raw_value::RawValue;
use crate::read::RegionSnapshot;
use crate::snapshot::ReceivedSnapshot;
use crate::state::Applied;

/// What a client knew of the region when it made a request.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RequestContext {
    pub epoch: Epoch,
    /// The peer asked, where the client named one.
    pub peer: Option<PeerId>,
    /// The term in which a write must be proposed and committed; any, where none is named.
    pub term: Option<Term>,
    /// A follower may answer too, after asking the leader for the index to wait for.
    pub replica_read: bool,
    /// For a write that may be sent again: what the region shall know it by.
    pub tag: Option<WriteTag>,
}

/// What a region knows a write by, so that it takes effect once however often it is sent. All
/// attempts of one write have the same client, sequence and horizon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WriteTag {
    pub client: u64,
    pub sequence: u64,
    /// An index that this region had applied before the first attempt was sent, or 0.
    pub horizon: LogIndex,
    /// The time at the store that is asked, in seconds since 1970.
    pub now_s: u64,
}

/// What became of a write.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct WriteResult {
    /// For a compare-and-swap.
    pub swap: Option<SwapResult>,
    /// The entry in which the write was, which is applied: a horizon for later ones.
    pub index: LogIndex,
}

/// What became of one compare-and-swap.
#[derive(Clone, Debug, PartialEq)]
pub struct SwapResult {
    pub swapped: bool,
    /// The live value found.
    pub previous: Option<RawValue>,
}

/// Where the answer to a request goes.
pub type Reply<T> = oneshot::Sender<Result<T, RequestError>>;
/// Where it comes out: to be awaited, or looked at from time to time.
pub type Answer<T> = oneshot::Receiver<Result<T, RequestError>>;

/// A write of one region, all or nothing.
#[derive(Debug)]
pub struct WriteRequest {
    pub region: RegionId,
    pub context: RequestContext,
    pub mutations: Vec<Mutation>,
    /// Size of the mutations' keys and values.
    pub bytes: usize,
    /// What it has of the store's budget, until it is answered.
    pub taken: Taken,
    pub reply: Reply<WriteResult>,
}

/// A read that cannot be answered under a lease on the caller's thread.
#[derive(Debug)]
pub struct ReadRequest {
    pub region: RegionId,
    pub context: RequestContext,
    pub reply: Reply<RegionSnapshot>,
}

/// What an operator or placement asks of a region.
#[derive(Clone, Debug, PartialEq)]
pub enum Admin {
    /// Cuts the region at `keys`; one new region (its id, its peers' ids in the
    /// order of the region's peers) for each key.
    Split {
        keys: Vec<Bytes>,
        regions: Vec<NewRegion>,
    },
    ChangePeers(Vec<PeerChange>),
    /// To the named peer, or to the best target.
    TransferLeader(Option<PeerId>),
}

#[derive(Debug)]
pub struct AdminRequest {
    pub region: RegionId,
    pub epoch: Epoch,
    pub admin: Admin,
    pub reply: Reply<AdminResult>,
}

/// The regions as they are after an [`Admin`] request: several after a split.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AdminResult {
    pub regions: Vec<Region>,
}

/// A region seen from one of its replicas, for operators.
#[derive(Clone, Debug, PartialEq)]
pub struct RegionStatus {
    pub region: Region,
    pub peer: Peer,
    pub role: ReplicaRole,
    pub term: Term,
    pub leader: Option<PeerId>,
    pub first: LogIndex,
    pub last: LogIndex,
    pub commit: LogIndex,
    pub applied: LogIndex,
    /// For a leader: how far each peer is.
    pub progress: Vec<PeerProgress>,
}

/// What a replica is doing in its group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplicaRole {
    Leader,
    Candidate,
    Follower,
    /// A follower without a vote.
    Learner,
}

impl ReplicaRole {
    /// The field's name for it.
    pub fn name(self) -> &'static str {
        match self {
            ReplicaRole::Leader => "leader",
            ReplicaRole::Candidate => "candidate",
            ReplicaRole::Follower => "follower",
            ReplicaRole::Learner => "learner",
        }
    }
}

/// How far a peer is, as its leader knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerProgress {
    pub peer: PeerId,
    pub matched: LogIndex,
    pub next: LogIndex,
    /// How its leader serves it.
    pub state: ProgressState,
    pub recently_active: bool,
}

/// What comes to a worker from outside.
#[derive(Debug)]
pub enum Input {
    Write(WriteRequest),
    Read(ReadRequest),
    Admin(AdminRequest),
    /// With what the message has of the store's budget until the worker has taken it.
    Raft(Box<Arrived>, Taken),
    /// A snapshot whose blocks are all here.
    Snapshot(Box<Arrived>, ReceivedSnapshot),
    /// A store did not answer.
    Unreachable(StoreId),
    Status {
        region: RegionId,
        reply: Reply<RegionStatus>,
    },
    /// Leaders shall report to placement at once: it knows nothing yet.
    ReportAll,
}

/// What the store's own parts tell a worker.
#[derive(Debug)]
pub enum Notice {
    Persisted {
        region: RegionId,
        generation: u64,
        number: ReadyNumber,
    },
    Applied(AppliedNotice),
    SnapshotTaken {
        region: RegionId,
        generation: u64,
        to: PeerId,
        taken: Box<crate::snapshot::RegionSnapshotSource>,
    },
    Installed {
        region: RegionId,
        generation: u64,
        descriptor: Region,
        meta: SnapshotMeta,
    },
    Destroyed {
        region: RegionId,
        generation: u64,
    },
    /// The data of a range that is no region's here is gone.
    Cleared {
        range: KeyRange,
    },
    /// What became of a snapshot that was asked for: one for each.
    SnapshotSent {
        region: RegionId,
        to: PeerId,
        delivered: bool,
    },
    /// A split that another worker's region applied created this region.
    Create {
        descriptor: Region,
        campaign: bool,
    },
    /// The log writer or an apply worker has room again.
    Room,
    /// The store's data was found damaged: its regions are handed over, and it serves no
    /// more.
    Retire,
    Stop,
}

#[derive(Debug)]
pub struct AppliedNotice {
    pub region: RegionId,
    pub generation: u64,
    pub applied: Applied,
    pub effects: Vec<Effect>,
    /// Bytes that the entries wrote, for placement's picture of the load.
    pub written_bytes: u64,
    pub written_keys: u64,
}

/// What an applied entry changes besides data.
#[derive(Clone, Debug)]
pub enum Effect {
    Split {
        index: LogIndex,
        parent: Region,
        /// The new regions whose data and descriptors are here.
        children: Vec<Region>,
        /// The new regions that have no place here any more: their peer has left, or a later one
        /// has come, before the split was applied. Their data is still here.
        left: Vec<Region>,
    },
    Changed {
        change: esker_raft::ConfChange,
        descriptor: Region,
    },
    /// The change did not fit the region any more: it took no effect.
    ChangeRefused {
        change: esker_raft::ConfChange,
    },
    MayTruncate {
        index: LogIndex,
        term: Term,
    },
    /// A split that took no effect.
    SplitRefused {
        index: LogIndex,
    },
}

/// One worker's appends of one turn, of all its regions.
#[derive(Debug, Default)]
pub struct LogTask {
    pub batch: LogBatch,
    pub persisted: Vec<Persisted>,
}

/// What follows when a [`LogTask`] is durable.
#[derive(Debug)]
pub struct Persisted {
    pub region: RegionId,
    pub generation: u64,
    pub number: ReadyNumber,
    /// Promises that only a durable log may make: votes and acknowledgements.
    pub messages: Vec<Envelope>,
}

/// Who waits for an entry.
#[derive(Debug)]
pub enum Waiters {
    Write(Vec<Waiter>),
    Admin(Reply<AdminResult>),
}

/// Who waits for one of an entry's commands.
#[derive(Debug)]
pub struct Waiter {
    pub reply: Reply<WriteResult>,
    /// Which of the entry's tagged commands it is.
    pub tagged: Option<usize>,
    /// What the command has of the store's budget.
    pub taken: Taken,
}

impl Waiters {
    pub fn fail(self, error: &RequestError) {
        match self {
            // A caller that is gone needs no answer.
            Waiters::Write(waiters) => {
                for waiter in waiters {
                    let _ = waiter.reply.send(Err(error.clone()));
                }
            }
            Waiters::Admin(reply) => {
                let _ = reply.send(Err(error.clone()));
            }
        }
    }
}

/// A proposal whose outcome somebody waits for.
#[derive(Debug)]
pub struct Proposal {
    pub index: LogIndex,
    pub term: Term,
    pub waiters: Waiters,
}

impl Proposal {
    pub fn fail(self, error: &RequestError) {
        self.waiters.fail(error);
    }
}

/// Work for an apply worker.
#[derive(Debug)]
pub enum ApplyTask {
    /// From now on tasks of this region will come, from a peer of this generation.
    Register {
        region: Region,
        generation: u64,
        applied: Applied,
    },
    Entries {
        region: RegionId,
        generation: u64,
        entries: Entries,
        proposals: Vec<Proposal>,
    },
    TakeSnapshot {
        region: RegionId,
        generation: u64,
        to: PeerId,
    },
    Install {
        region: RegionId,
        generation: u64,
        meta: SnapshotMeta,
        descriptor: Region,
        /// The tagged commands that the region remembers.
        remembered: Box<SnapshotData>,
        files: ReceivedSnapshot,
    },
    /// Removes the data of a range that a split of this region left to nobody here.
    Clear {
        region: RegionId,
        range: KeyRange,
    },
    /// The tombstone refuses messages of this membership and all before it.
    Destroy {
        region: RegionId,
        generation: u64,
        peer: PeerId,
        tombstone_conf_ver: u64,
    },
}
