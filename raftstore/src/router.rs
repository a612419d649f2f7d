//! The way into a store: finds the worker that owns a region, refuses what it cannot take.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crossbeam_channel::{Sender, TrySendError};
use esker_engine::{KvEngine, LogEngine};
use esker_model::limits::{MAX_BOUND_BYTES, MAX_COMMAND_BYTES, MAX_STORED_KEY_BYTES};
use esker_model::{Clock, Epoch, KeyRange, RegionId, StoreId};
use esker_raft::{PeerId, Term};
use esker_rpc::proto::esker::RaftMessage;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, SetOnce, oneshot};

use crate::command::{Keys, Mutation};
use crate::config::{HOLD_PATIENCE, HOLD_RETRY, MAX_HELD_LEADERLESS, MAX_HELD_REQUESTS};
use crate::door::{Arrived, Checked, Claimed, Fault, check_request, complain};
use crate::error::{Passing, RequestError};
use crate::message::{
    Admin, AdminRequest, AdminResult, Input, Notice, ReadRequest, RegionStatus, Reply,
    RequestContext, WriteRequest, WriteResult,
};
use crate::ranges::Ranges;
use crate::read::{ReadDelegates, RegionSnapshot};
use crate::snapshot::{ReceivedSnapshot, SnapshotReceiver};

/// The worker that owns a region, of so many.
pub(crate) fn worker_of(region: RegionId, workers: usize) -> usize {
    // Ids are handed out one after another: the remainder spreads them evenly.
    (region.0 % workers as u64) as usize
}

/// A store, as the rest of the node sees it. Cheap to clone.
#[derive(Clone)]
pub struct StoreHandle {
    pub(crate) store: StoreId,
    pub(crate) inboxes: Arc<[Sender<Input>]>,
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
}

/// Room for requests that wait until the store is less busy, and for those that wait until a
/// region has a leader.
#[derive(Clone)]
pub(crate) struct HeldRoom {
    busy: Arc<Semaphore>,
    leaderless: Arc<Semaphore>,
}

impl Default for HeldRoom {
    fn default() -> Self {
        HeldRoom {
            busy: Arc::new(Semaphore::new(MAX_HELD_REQUESTS)),
            leaderless: Arc::new(Semaphore::new(MAX_HELD_LEADERLESS)),
        }
    }
}

/// A request that is tried again for a while before its client is told what will soon be over.
#[derive(Default)]
struct Held {
    since: Option<(tokio::time::Instant, Passing, OwnedSemaphorePermit)>,
    wait: Duration,
}

impl Held {
    /// Waits before the next attempt; `false` when there should be none.
    async fn wait(&mut self, room: &HeldRoom, error: &RequestError) -> bool {
        let (first, longest) = HOLD_RETRY;
        let Some(passing) = error.passing() else { return false };
        let since = match &self.since {
            Some((since, held_for, _)) if *held_for == passing => *since,
            earlier => {
                let room = match passing {
                    Passing::Busy => &room.busy,
                    Passing::Leaderless => &room.leaderless,
                };
                let Ok(permit) = Arc::clone(room).try_acquire_owned() else { return false };
                let since = match earlier {
                    // In the other room by now, and for no longer in all.
                    Some((since, ..)) => *since,
                    None => {
                        metrics::counter!("esker_requests_held_total").increment(1);
                        self.wait = first;
                        tokio::time::Instant::now()
                    }
                };
                self.since = Some((since, passing, permit));
                since
            }
        };
        if since.elapsed() + self.wait > HOLD_PATIENCE {
            return false;
        }
        tokio::time::sleep(self.wait).await;
        self.wait = (self.wait * 2).min(longest);
        true
    }
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
        let worker = worker_of(region, self.inboxes.len());
        self.inboxes[worker].try_send(input).map_err(|refused| match refused {
            TrySendError::Full(_) => {
                metrics::counter!("esker_store_busy_total").increment(1);
                RequestError::ServerIsBusy {
                    reason: format!("too many requests wait in store {}", self.store),
                }
            }
            TrySendError::Disconnected(_) => self.stopped(region),
        })
    }

    fn stopped(&self, region: RegionId) -> RequestError {
        RequestError::Stopped { store: self.store, region }
    }

    /// Asks for what changes nothing.
    async fn ask<T>(
        &self,
        region: RegionId,
        input: impl Fn(Reply<T>) -> Input,
    ) -> Result<T, RequestError> {
        let mut held = Held::default();
        loop {
            let (reply, answer) = oneshot::channel();
            let answer = match self.deliver(region, input(reply)) {
                // The worker drops a reply only when the store stops.
                Ok(()) => answer.await.unwrap_or_else(|_| Err(self.stopped(region))),
                Err(refused) => Err(refused),
            };
            match answer {
                Err(error) if held.wait(&self.held, &error).await => {}
                answer => return answer,
            }
        }
    }

    /// Carries out `mutations` on one region, all or nothing; they have happened
    /// on a majority's logs and are visible here when this returns.
    ///
    /// # Errors
    /// [`RequestError::Undetermined`] when the outcome is unknown; any other error
    /// means that nothing was changed.
    pub async fn write(
        &self,
        region: RegionId,
        context: RequestContext,
        mutations: Vec<Mutation>,
    ) -> Result<WriteResult, RequestError> {
        let mut held = Held::default();
        loop {
            let written = match self.start_write(region, context, mutations.clone()) {
                Ok(answer) => answer.await.unwrap_or(Err(RequestError::Undetermined(region))),
                Err(refused) => Err(refused),
            };
            match written {
                // As every error but an unknown outcome, this one promises that nothing was done.
                Err(error) if held.wait(&self.held, &error).await => {}
                written => return written,
            }
        }
    }

    /// As [`StoreHandle::write`], for callers without an executor: the answer comes through the channel.
    pub fn start_write(
        &self,
        region: RegionId,
        context: RequestContext,
        mutations: Vec<Mutation>,
    ) -> Result<oneshot::Receiver<Result<WriteResult, RequestError>>, RequestError> {
        /// What a tag adds to its entry.
        const TAG_BYTES: usize = 40;
        let mut bytes = check_mutations(region, &mutations)?;
        if context.tag.is_some() {
            bytes += TAG_BYTES;
        }
        let (reply, answer) = oneshot::channel();
        self.deliver(
            region,
            Input::Write(WriteRequest { region, context, mutations, bytes, reply }),
        )?;
        Ok(answer)
    }

    /// The region's data, linearizable: under a lease at once and on this thread,
    /// otherwise after its leader has confirmed that it leads.
    pub async fn snapshot(
        &self,
        region: RegionId,
        context: RequestContext,
    ) -> Result<RegionSnapshot, RequestError> {
        if let Some(snapshot) =
            self.delegates.lease_read(&self.kv, region, &context, self.clock.now())
        {
            metrics::counter!("esker_reads_total", "path" => "lease").increment(1);
            return Ok(snapshot);
        }
        metrics::counter!("esker_reads_total", "path" => "confirmed").increment(1);
        self.ask(region, |reply| Input::Read(ReadRequest { region, context, reply })).await
    }

    /// As [`StoreHandle::snapshot`], for callers without an executor.
    pub fn start_snapshot(
        &self,
        region: RegionId,
        context: RequestContext,
    ) -> Result<oneshot::Receiver<Result<RegionSnapshot, RequestError>>, RequestError> {
        let (reply, answer) = oneshot::channel();
        match self.delegates.lease_read(&self.kv, region, &context, self.clock.now()) {
            Some(snapshot) => {
                let _ = reply.send(Ok(snapshot));
            }
            None => self.deliver(region, Input::Read(ReadRequest { region, context, reply }))?,
        }
        Ok(answer)
    }

    /// Splits, changes members, or moves the leadership; returns when it has
    /// taken effect here (a transfer: when it has begun).
    pub async fn admin(
        &self,
        region: RegionId,
        epoch: Epoch,
        admin: Admin,
    ) -> Result<AdminResult, RequestError> {
        self.start_admin(region, epoch, admin)?
            .await
            .unwrap_or(Err(RequestError::Undetermined(region)))
    }

    /// As [`StoreHandle::admin`], for callers without an executor.
    pub fn start_admin(
        &self,
        region: RegionId,
        epoch: Epoch,
        admin: Admin,
    ) -> Result<oneshot::Receiver<Result<AdminResult, RequestError>>, RequestError> {
        check_admin(region, &admin)?;
        let (reply, answer) = oneshot::channel();
        self.deliver(region, Input::Admin(AdminRequest { region, epoch, admin, reply }))?;
        Ok(answer)
    }

    pub async fn status(&self, region: RegionId) -> Result<RegionStatus, RequestError> {
        self.ask(region, |reply| Input::Status { region, reply }).await
    }

    /// As [`StoreHandle::status`], for callers without an executor.
    pub fn start_status(
        &self,
        region: RegionId,
    ) -> Result<oneshot::Receiver<Result<RegionStatus, RequestError>>, RequestError> {
        let (reply, answer) = oneshot::channel();
        self.deliver(region, Input::Status { region, reply })?;
        Ok(answer)
    }

    /// A message of another store. Dropped when no honest store can have sent it, and when
    /// the worker is too busy: the consensus core sends again what matters. Reads all that is
    /// in the message, on the caller's thread.
    pub fn raft_message(&self, message: RaftMessage) {
        // Without a sender there is nobody to be mistaken for.
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
        let sender = Claimed::of(&message);
        match Arrived::check(self.store, message) {
            Ok(arrived) => {
                let region = arrived.region();
                if self.deliver(region, Input::Raft(Box::new(arrived))).is_err() {
                    metrics::counter!("esker_raft_messages_dropped_total").increment(1);
                }
            }
            Err(fault) => complain(self.store, sender, &fault),
        }
    }

    /// Begins to receive a snapshot into `directory`, if its first part is what an honest
    /// store can have sent; `stem` names its files and must be unique.
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
        self.deliver(region, Input::Snapshot(Box::new(arrived), files))
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
        for inbox in self.inboxes.iter() {
            let _ = inbox.try_send(Input::Unreachable(store));
        }
    }

    /// Placement knows nothing (it is new, or has a new leader): leaders report at once.
    pub fn report_all(&self) {
        for inbox in self.inboxes.iter() {
            let _ = inbox.try_send(Input::ReportAll);
        }
    }
}

/// What other stores would refuse to take into their logs must not get into this one's.
fn check_admin(region: RegionId, admin: &Admin) -> Result<(), RequestError> {
    check_request(admin).map_err(|fault| match admin {
        Admin::Split { .. } => RequestError::Split { region, reason: fault.to_string() },
        _ => RequestError::Malformed { region, reason: fault.to_string() },
    })
}

fn check_mutations(region: RegionId, mutations: &[Mutation]) -> Result<usize, RequestError> {
    assert!(
        mutations.len() == 1 || !mutations.iter().any(Mutation::is_swap),
        "a compare-and-swap must be alone in its write"
    );
    // What an entry needs for each mutation besides its keys and values: without
    // it a great many small ones would make an entry too large to be sent.
    const MUTATION_BYTES: usize = 32;
    let mut bytes = mutations.len() * MUTATION_BYTES;
    for mutation in mutations {
        // A range may end where the last region begins, above all keys.
        let (limit, longest) = match mutation.keys() {
            Keys::One(key) if key.is_empty() => return Err(RequestError::EmptyKey),
            Keys::One(key) => (MAX_STORED_KEY_BYTES, key.len()),
            Keys::Range(range) => {
                let end = range.end().map_or(0, |end| end.len());
                (MAX_BOUND_BYTES, range.start().len().max(end))
            }
        };
        if longest > limit {
            return Err(RequestError::KeyTooLarge { size: longest, limit });
        }
        bytes += mutation.bytes();
    }
    if bytes > MAX_COMMAND_BYTES {
        return Err(RequestError::EntryTooLarge {
            region,
            size: bytes as u64,
            limit: MAX_COMMAND_BYTES as u64,
        });
    }
    Ok(bytes)
}
