//! The way into a store: finds the worker that owns a region, refuses what it cannot take.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use crossbeam_channel::{Sender, TrySendError};
use esker_engine::{KvEngine, LogEngine};
use esker_raft::{PeerId, Term, Time};
use esker_rpc::proto::esker::RaftMessage;
use esker_rpc::proto::esker::command::{Mutation, mutation::Kind};
use esker_rpc::proto::metapb::RegionEpoch;
use rustix::time::{ClockId, clock_gettime};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, SetOnce, oneshot};

use crate::config::{
    HOLD_PATIENCE, HOLD_RETRY, MAX_BOUND_BYTES, MAX_COMMAND_BYTES, MAX_HELD_LEADERLESS,
    MAX_HELD_REQUESTS, MAX_STORED_KEY_BYTES,
};
use crate::door::{Arrived, Fault, check_request, complain};
use crate::error::{Passing, RequestError};
use crate::ids::{RegionId, StoreId};
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

/// The clock of a store's leases: monotonic, never standing still, and the same for
/// workers and readers.
pub trait Clock: Send + Sync + 'static {
    fn now(&self) -> Time;
}

/// Production's clock. It goes on while the machine sleeps: a leader that slept through
/// its lease must find it over when it wakes, for the others have not slept.
///
/// On Linux and Android that is `CLOCK_BOOTTIME`. Elsewhere it is `CLOCK_MONOTONIC`, which
/// goes on during sleep on macOS and stands still on some BSDs: there, a machine that
/// sleeps must not run a store.
#[derive(Debug)]
pub struct MonotonicClock {
    start: u64,
}

impl MonotonicClock {
    #[cfg(any(target_os = "linux", target_os = "android"))]
    const ID: ClockId = ClockId::Boottime;
    #[cfg(not(any(target_os = "linux", target_os = "android")))]
    const ID: ClockId = ClockId::Monotonic;

    fn nanos() -> u64 {
        let time = clock_gettime(Self::ID);
        let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
        seconds * 1_000_000_000 + u64::try_from(time.tv_nsec).unwrap_or(0)
    }
}

impl Default for MonotonicClock {
    fn default() -> Self {
        MonotonicClock { start: Self::nanos() }
    }
}

impl Clock for MonotonicClock {
    fn now(&self) -> Time {
        // A year of nanoseconds is 2^55: this does not overflow in the life of a process.
        // One is added so that zero, "no lease", is before every moment.
        Time(Self::nanos() - self.start + 1)
    }
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
        epoch: RegionEpoch,
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
        epoch: RegionEpoch,
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
        let from = message.from.unwrap_or_default().store_id;
        self.raft_message_from(StoreId(from), message);
    }

    /// The same, from a store that is known to have sent it.
    pub fn raft_message_from(&self, from: StoreId, message: RaftMessage) {
        let said = StoreId(message.from.unwrap_or_default().store_id);
        if said != from {
            complain(self.store, &message, &Fault::OtherSender { said, from });
            return;
        }
        // What a complaint speaks of.
        let envelope =
            RaftMessage { region_id: message.region_id, from: message.from, ..Default::default() };
        match Arrived::check(self.store, message) {
            Ok(arrived) => {
                let region = arrived.region();
                if self.deliver(region, Input::Raft(Box::new(arrived))).is_err() {
                    metrics::counter!("esker_raft_messages_dropped_total").increment(1);
                }
            }
            Err(fault) => complain(self.store, &envelope, &fault),
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
        let said = StoreId(message.from.unwrap_or_default().store_id);
        if said != from {
            return Err(Fault::OtherSender { said, from });
        }
        let arrived = Arrived::check_snapshot(self.store, message.clone())?;
        let Arrived { envelope, .. } = arrived;
        Ok(SnapshotReceiver::new(self.kv.clone(), directory, stem)
            .within(envelope.start_key, envelope.end_key))
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
    pub fn is_taken(&self, region: RegionId, start: &[u8], end: &[u8]) -> bool {
        self.ranges.overlaps(start, end, region)
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

/// The keys that a mutation touches: one, or both ends of a range.
pub(crate) fn keys_of(mutation: &Mutation) -> Option<(&Bytes, Option<&Bytes>)> {
    Some(match mutation.kind.as_ref()? {
        Kind::Put(put) => (&put.key, None),
        Kind::Delete(delete) => (&delete.key, None),
        Kind::DeleteRange(range) => (&range.start, Some(&range.end)),
        Kind::Cas(cas) => (&cas.key, None),
    })
}

/// What other stores would refuse to take into their logs must not get into this one's.
fn check_admin(region: RegionId, admin: &Admin) -> Result<(), RequestError> {
    check_request(admin).map_err(|fault| match admin {
        Admin::Split { .. } => RequestError::Split { region, reason: fault.to_string() },
        _ => RequestError::Malformed { region, reason: fault.to_string() },
    })
}

fn check_mutations(region: RegionId, mutations: &[Mutation]) -> Result<usize, RequestError> {
    let is_swap = |mutation: &Mutation| matches!(mutation.kind, Some(Kind::Cas(_)));
    assert!(
        mutations.len() == 1 || !mutations.iter().any(is_swap),
        "a compare-and-swap must be alone in its write"
    );
    // What an entry needs for each mutation besides its keys and values: without
    // it a great many small ones would make an entry too large to be sent.
    const MUTATION_BYTES: usize = 32;
    let mut bytes = mutations.len() * MUTATION_BYTES;
    for mutation in mutations {
        let (key, end) = keys_of(mutation).ok_or(RequestError::EmptyKey)?;
        if key.is_empty() && end.is_none() {
            return Err(RequestError::EmptyKey);
        }
        // A range may end where the last region begins, above all keys.
        let limit = if end.is_some() { MAX_BOUND_BYTES } else { MAX_STORED_KEY_BYTES };
        for key in [Some(key), end].into_iter().flatten() {
            if key.len() > limit {
                return Err(RequestError::KeyTooLarge { size: key.len(), limit });
            }
            bytes += key.len();
        }
        bytes += match &mutation.kind {
            Some(Kind::Put(put)) => put.value.len(),
            Some(Kind::Cas(cas)) => cas.value.len() + cas.expected.len(),
            _ => 0,
        };
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

#[cfg(test)]
mod tests {
    use super::*;

    /// A test cannot put the machine to sleep, but a time namespace can pretend that it
    /// slept: in it, the clocks that count sleep are ahead of those that do not.
    #[cfg(target_os = "linux")]
    #[test]
    fn the_clock_of_leases_counts_the_time_that_a_machine_slept() {
        const SLEPT: u64 = 1_000_000;
        const INSIDE: &str = "ESKER_TEST_SLEPT";
        let name = "the_clock_of_leases_counts_the_time_that_a_machine_slept";
        if std::env::var_os(INSIDE).is_some() {
            let awake = clock_gettime(ClockId::Monotonic).tv_sec as u64;
            let counted = MonotonicClock { start: 0 }.now().0 / 1_000_000_000;
            assert!(counted >= awake + SLEPT, "{counted} s counted, {awake} s awake");
            println!("it counts");
            return;
        }
        let me = std::env::current_exe().expect("a test is a program");
        let inside = std::process::Command::new("unshare")
            .args(["--time", "--boottime", &SLEPT.to_string()])
            .arg(me)
            .args(["--nocapture", name])
            .env(INSIDE, "1")
            .output();
        let Ok(inside) = inside else { return };
        let said = String::from_utf8_lossy(&inside.stdout);
        if !said.contains("running 1 test") {
            // Only root may make a time namespace.
            eprintln!("not shown here: {}", String::from_utf8_lossy(&inside.stderr));
            return;
        }
        assert!(inside.status.success() && said.contains("it counts"), "{said}");
    }
}
