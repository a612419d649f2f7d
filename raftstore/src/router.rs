//! The way into a store: finds the worker that owns a region, refuses what it cannot take.
//!
//! A request is sent and answered in `request`, and held in `hold` while it is refused for a
//! reason that is over soon.

mod hold;
mod request;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crossbeam_channel::{Sender, TrySendError};
use esker_engine::{KvEngine, LogEngine};
use esker_model::{Clock, Epoch, KeyRange, RegionId, StoreId};
use esker_raft::{PeerId, Term};
use esker_rpc::proto::esker::RaftMessage;
use prost::Message as _;
use tokio::sync::SetOnce;

use self::hold::HeldRoom;
use self::request::{Administer, Read, Status, Write};
use crate::budget::{Budget, Taken};
use crate::command::Mutation;
use crate::config::SMALL_MESSAGE_BYTES;
use crate::disk::DiskWatch;
use crate::door::{Arrived, Checked, Claimed, Fault, complain};
use crate::error::RequestError;
use crate::message::{Admin, Input, Notice, RequestContext};
use crate::ranges::Ranges;
use crate::read::ReadDelegates;
use crate::snapshot::{ReceivedSnapshot, SnapshotReceiver};

pub use request::{Call, Request};

/// The worker that owns a region, of so many.
pub(crate) fn worker_of(region: RegionId, workers: usize) -> usize {
    // Ids are handed out one after another: the remainder spreads them evenly.
    (region.0 % workers as u64) as usize
}

/// A store, as the rest of the node sees it. Cheap to clone.
#[derive(Clone)]
pub struct StoreHandle {
    pub(crate) store: StoreId,
    /// Where requests go.
    pub(crate) inboxes: Arc<[Sender<Input>]>,
    /// Where other stores' messages go: a flood of requests costs no heartbeat.
    pub(crate) raft_inboxes: Arc<[Sender<Input>]>,
    pub(crate) notices: Arc<[Sender<Notice>]>,
    pub(crate) ranges: Arc<Ranges>,
    pub(crate) delegates: Arc<ReadDelegates>,
    pub(crate) kv: KvEngine,
    pub(crate) log: LogEngine,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) stopped: Arc<AtomicBool>,
    /// What was found damaged.
    pub(crate) damage: Arc<SetOnce<String>>,
    pub(crate) held: HeldRoom,
    /// Bytes of writes that are not answered, and of messages that no worker has taken.
    pub(crate) writes: Arc<Budget>,
    pub(crate) messages: Arc<Budget>,
    pub(crate) disk: Arc<DiskWatch>,
}

impl std::fmt::Debug for StoreHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "store {}", self.store)
    }
}

impl StoreHandle {
    pub fn store_id(&self) -> StoreId {
        self.store
    }

    pub fn engine(&self) -> &KvEngine {
        &self.kv
    }

    /// The store's clock.
    pub fn clock(&self) -> &dyn Clock {
        &*self.clock
    }

    /// What of the store's data was found damaged, by file or entry. Such a store hands its
    /// regions over and serves nobody; whoever runs it stops it soon.
    pub fn damage(&self) -> Option<&str> {
        self.damage.get().map(String::as_str)
    }

    /// Completes when something is found damaged.
    pub async fn damaged(&self) -> String {
        self.damage.wait().await.clone()
    }

    /// Whether the disk of the log is slower than those of other stores, so that this store hands its
    /// regions over.
    pub fn has_slow_disk(&self) -> bool {
        self.disk.gives_way()
    }

    /// Completes when [`has_slow_disk`](Self::has_slow_disk) has changed. For one caller.
    pub async fn disk_changed(&self) {
        self.disk.changed().await;
    }

    /// How many changes the log holds durably: it only grows.
    pub fn log_sequence(&self) -> u64 {
        self.log.sequence()
    }

    pub fn delegates(&self) -> &ReadDelegates {
        &self.delegates
    }

    pub fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }

    /// Whether this store leads the region under a lease right now.
    pub fn holds_lease(&self, region: RegionId) -> bool {
        let now = self.clock.now();
        self.delegates.get(region).is_some_and(|delegate| delegate.holds_lease(now))
    }

    /// The term in which this store leads the region under a lease right now.
    pub fn lease_term(&self, region: RegionId) -> Option<Term> {
        let now = self.clock.now();
        self.delegates.get(region)?.lease_term(now)
    }

    fn deliver(&self, region: RegionId, input: Input) -> Result<(), RequestError> {
        self.deliver_to(&self.inboxes, region, input)
    }

    fn deliver_to(
        &self,
        inboxes: &[Sender<Input>],
        region: RegionId,
        input: Input,
    ) -> Result<(), RequestError> {
        let worker = worker_of(region, inboxes.len());
        inboxes[worker].try_send(input).map_err(|refused| match refused {
            TrySendError::Full(_) => self.is_busy(),
            TrySendError::Disconnected(_) => self.stopped(region),
        })
    }

    fn is_busy(&self) -> RequestError {
        metrics::counter!("esker_store_busy_total").increment(1);
        let reason = format!("too many requests wait in store {}", self.store);
        RequestError::ServerIsBusy { reason }
    }

    fn stopped(&self, region: RegionId) -> RequestError {
        RequestError::Stopped { store: self.store, region }
    }

    /// Carries out `mutations` on one region, all or nothing; they have happened
    /// on a majority's logs and are visible here when they are answered.
    ///
    /// # Errors
    /// [`RequestError::Undetermined`] when the outcome is unknown; any other error
    /// means that nothing was changed.
    pub fn write(
        &self,
        region: RegionId,
        context: RequestContext,
        mutations: Vec<Mutation>,
    ) -> Request<'_, Write> {
        Request::new(self, region, Write { context, mutations })
    }

    /// The region's data, linearizable: under a lease at once and on this thread,
    /// otherwise after its leader has confirmed that it leads.
    pub fn snapshot(&self, region: RegionId, context: RequestContext) -> Request<'_, Read> {
        Request::new(self, region, Read { context })
    }

    /// Splits, changes members, or moves the leadership; answered when it has
    /// taken effect here (a transfer: when it has begun).
    pub fn admin(&self, region: RegionId, epoch: Epoch, admin: Admin) -> Request<'_, Administer> {
        Request::new(self, region, Administer { epoch, admin })
    }

    /// The region as its replica here sees it.
    pub fn status(&self, region: RegionId) -> Request<'_, Status> {
        Request::new(self, region, Status)
    }

    /// Takes a message of another store. It is dropped when no correct store can have sent it, and
    /// when the worker is too busy: the consensus core sends again what matters. The whole message
    /// is read and checked on the caller's thread.
    pub fn raft_message(&self, message: RaftMessage) {
        // A message without a sender is refused below.
        let from = message.from.map_or(0, |from| from.store_id);
        self.raft_message_from(StoreId(from), message);
    }

    /// The same, from a store that is known to have sent it.
    pub fn raft_message_from(&self, from: StoreId, message: RaftMessage) {
        let said = StoreId(message.from.map_or(0, |from| from.store_id));
        if said != from {
            complain(self.store, Claimed::of(&message), &Fault::OtherSender { said, from });
            return;
        }
        let (sender, bytes) = (Claimed::of(&message), message.encoded_len());
        match Arrived::check(self.store, message) {
            Ok(arrived) => {
                let region = arrived.region();
                // Heartbeats and votes are bounded by the inbox alone: entries that find no room
                // must not cost leases.
                let taken = match bytes <= SMALL_MESSAGE_BYTES {
                    true => Some(Taken::nothing()),
                    false => self.messages.take(bytes),
                };
                let input = taken.map(|taken| Input::Raft(Box::new(arrived), taken));
                let deliver = |input| self.deliver_to(&self.raft_inboxes, region, input);
                if input.is_none_or(|input| deliver(input).is_err()) {
                    metrics::counter!("esker_raft_messages_dropped_total").increment(1);
                }
            }
            Err(fault) => complain(self.store, sender, &fault),
        }
    }

    /// Begins to receive a snapshot into `directory`, if its first part is what a correct
    /// store can have sent. `stem` names its files and must be unique.
    ///
    /// # Errors
    /// Why it is refused.
    pub fn receive_snapshot(
        &self,
        from: StoreId,
        message: &RaftMessage,
        directory: &Path,
        stem: String,
    ) -> Result<SnapshotReceiver, Fault> {
        let said = StoreId(message.from.map_or(0, |from| from.store_id));
        if said != from {
            return Err(Fault::OtherSender { said, from });
        }
        let arrived = Arrived::check_snapshot(self.store, message.clone())?;
        let Checked::Snapshot(_, region) = arrived.content else {
            return Err(Fault::Missing("snapshot"));
        };
        Ok(SnapshotReceiver::new(self.kv.clone(), directory, stem).within(region.range))
    }

    /// A snapshot that has been received whole. Refused when the worker is too busy.
    pub fn snapshot_received(
        &self,
        message: RaftMessage,
        files: ReceivedSnapshot,
    ) -> Result<(), RequestError> {
        let region = RegionId(message.region_id);
        let arrived = Arrived::check_snapshot(self.store, message)
            .map_err(|fault| RequestError::Malformed { region, reason: fault.to_string() })?;
        let input = Input::Snapshot(Box::new(arrived), files);
        self.deliver_to(&self.raft_inboxes, region, input)
    }

    /// Whether a snapshot of this range could not be taken over at present, because
    /// another region of the store has part of it.
    pub fn is_taken(&self, region: RegionId, range: &KeyRange) -> bool {
        self.ranges.overlaps(range, region)
    }

    pub fn snapshot_sent(&self, region: RegionId, to: PeerId, delivered: bool) {
        // Not through the inbox, which may be full: a leader that does not hear
        // of it would wait for ever.
        let worker = worker_of(region, self.notices.len());
        let _ = self.notices[worker].send(Notice::SnapshotSent { region, to, delivered });
    }

    /// Another store did not answer: its followers are asked more gently.
    pub fn unreachable(&self, store: StoreId) {
        for inbox in self.raft_inboxes.iter() {
            let _ = inbox.try_send(Input::Unreachable(store));
        }
    }

    /// Placement knows nothing (it is new, or has a new leader): leaders report at once.
    pub fn report_all(&self) {
        for inbox in self.raft_inboxes.iter() {
            let _ = inbox.try_send(Input::ReportAll);
        }
    }
}
