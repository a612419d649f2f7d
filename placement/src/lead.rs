//! One term of office of the placement driver's leader.
//!
//! [`office`] begins it: it loads the durable state and secures fresh windows before anything is
//! served. Then it keeps the windows ahead, runs the schedulers, and ends the term of office. A
//! [`Lead`] is what the services work with in between. It belongs to one Raft term and is never
//! revived.
//!
//! The rule for everything that is handed out: first read from memory, then check that
//! [`ReplicatedState::lease`] still names this very term, then answer. If it does, no other member
//! could have answered anything newer at that moment.

pub mod office;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use esker_model::{Action, Clock, Order, PeerId, RegionReport, StoreId, Timestamp};
use esker_mutants::broken;
use esker_rpc::proto::pdpb;
use parking_lot::{Mutex, RwLock};
use thiserror::Error;
use tokio::sync::{Notify, mpsc, watch};
use tonic::Status;
use tracing::{debug, warn};

use crate::cluster::Cluster;
use crate::ids::{IdAllocator, IdError};
use crate::server::convert;
use crate::state::{Fact, ReplicatedState, ServiceSafePoint, StateError};
use crate::timestamp::{TimestampError, TimestampOracle};

/// How long a request waits for a window, a lease or a new leader. Less than the two seconds after
/// which published clients give up an attempt.
pub const PATIENCE: Duration = Duration::from_millis(1_500);
/// How often a missing lease is looked for again, because its return is not announced.
const LEASE_POLL: Duration = Duration::from_millis(5);
/// Attempts at one durable write whose outcome is unknown. A fact does not depend on the state
/// before it, so writing it twice in the same term has the effect of writing it once.
const WRITE_ATTEMPTS: usize = 3;

/// The stream on which a store receives the orders for its leaders.
pub type OrderStream = mpsc::Sender<Result<pdpb::RegionHeartbeatResponse, Status>>;

/// Why a leader did not answer.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum LeadError {
    #[error("this member does not lead the placement driver in term {term} any more")]
    Deposed { term: u64 },
    #[error("the placement driver could not reserve more in time; ask again")]
    Slow,
    #[error(transparent)]
    Ids(IdError),
    #[error(transparent)]
    Timestamps(TimestampError),
}

/// The two sequences. They share a lock, because both only count.
struct Counters {
    timestamps: TimestampOracle,
    ids: IdAllocator,
}

/// Durable facts other than stores and windows, as they were last written.
#[derive(Debug, Default)]
pub struct Facts {
    pub gc_safe_point: u64,
    pub services: HashMap<Vec<u8>, ServiceSafePoint>,
}

/// One term of office.
pub struct Lead {
    pub term: u64,
    pub cluster_id: u64,
    state: Arc<dyn ReplicatedState>,
    pub clock: Arc<dyn Clock>,
    counters: Mutex<Counters>,
    /// Counts the windows that became durable.
    windows: watch::Sender<u64>,
    window_wanted: Notify,
    /// The cluster map. Never held across an await.
    pub cluster: RwLock<Cluster>,
    /// Counts the reports taken in. Lookups in a gap wait for the next one.
    heard: watch::Sender<u64>,
    bootstrapped: AtomicBool,
    /// Held from the check of a durable change until memory shows it, so that two conflicting
    /// changes never both pass their check.
    pub facts: tokio::sync::Mutex<Facts>,
    /// Held by the task that has key spaces cut, because others would ask for the same cuts.
    pub cutting: tokio::sync::Mutex<()>,
    streams: Mutex<HashMap<StoreId, OrderStream>>,
    ended: watch::Sender<bool>,
}

impl Lead {
    /// Whether this member leads in this term, right now.
    pub fn is_current(&self) -> bool {
        !*self.ended.borrow() && self.state.lease() == Some(self.term)
    }

    /// Waits a moment for a lease that is late. Fails when the term of office is over.
    pub async fn current(&self) -> Result<(), LeadError> {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        while !self.is_current() {
            if *self.ended.borrow() || tokio::time::Instant::now() >= deadline {
                return Err(self.deposed());
            }
            tokio::time::sleep(LEASE_POLL).await;
        }
        Ok(())
    }

    pub(crate) fn deposed(&self) -> LeadError {
        LeadError::Deposed { term: self.term }
    }

    /// Ends the term of office. All waits on it fail, and all streams close.
    pub(crate) fn end(&self) {
        self.ended.send_replace(true);
        self.streams.lock().clear();
    }

    /// Completes when the term of office is over.
    pub async fn ended(&self) {
        // The sender is a field of `self`, so the wait ends only with a value.
        let _ = self.ended.subscribe().wait_for(|ended| *ended).await;
    }

    /// Draws `count` timestamps and returns the last.
    pub async fn timestamps(&self, count: u32) -> Result<Timestamp, LeadError> {
        let last = self
            .draw(|counters| {
                counters.timestamps.allocate(count, self.clock.wall_ms()).map_err(|error| {
                    match error {
                        TimestampError::WindowExhausted => None,
                        other => Some(LeadError::Timestamps(other)),
                    }
                })
            })
            .await?;
        metrics::counter!("esker_placement_timestamps_total").increment(u64::from(count));
        Ok(last)
    }

    /// Draws `count` consecutive ids and returns the last.
    pub async fn ids(&self, count: u32) -> Result<u64, LeadError> {
        self.draw(|counters| {
            counters.ids.allocate(count).map_err(|error| match error {
                IdError::WindowExhausted => None,
                other => Some(LeadError::Ids(other)),
            })
        })
        .await
    }

    /// Draws from the counters, and checks the lease before it returns the result. Waits for the
    /// next window where the present one is used up (`take` returns `Err(None)`).
    async fn draw<T>(
        &self,
        mut take: impl FnMut(&mut Counters) -> Result<T, Option<LeadError>>,
    ) -> Result<T, LeadError> {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        let mut windows = self.windows.subscribe();
        loop {
            windows.mark_unchanged();
            let taken = take(&mut self.counters.lock());
            match taken {
                Ok(value) => {
                    if !broken!(HandedOutUnderLease) {
                        self.current().await?;
                    }
                    return Ok(value);
                }
                Err(Some(error)) => return Err(error),
                Err(None) => {}
            }
            self.window_wanted.notify_one();
            tokio::select! {
                changed = tokio::time::timeout_at(deadline, windows.changed()) => {
                    if changed.is_err() {
                        return Err(LeadError::Slow);
                    }
                }
                () = self.ended() => return Err(self.deposed()),
            }
        }
    }

    /// An id for a new replica, if one is at hand.
    pub fn fresh_peer(&self) -> Option<PeerId> {
        match self.counters.lock().ids.allocate(1) {
            Ok(id) => Some(PeerId(id)),
            Err(_) => {
                self.window_wanted.notify_one();
                None
            }
        }
    }

    /// Whether this cluster may have handed out `id`.
    pub fn may_have_given(&self, id: u64) -> bool {
        self.counters.lock().ids.may_have_given(id)
    }

    /// Whether the first store and region exist.
    pub fn is_bootstrapped(&self) -> bool {
        self.bootstrapped.load(Ordering::Acquire)
    }

    pub(crate) fn set_bootstrapped(&self) {
        self.bootstrapped.store(true, Ordering::Release);
    }

    /// Makes facts durable in this term. When the outcome stays unknown, memory and disk may
    /// differ. So the term of office ends, and the next one reads the disk.
    pub async fn commit(&self, facts: Vec<Fact>) -> Result<(), LeadError> {
        let writes: Vec<_> = facts.into_iter().map(Fact::into_write).collect();
        for _ in 0..WRITE_ATTEMPTS {
            let written = tokio::select! {
                written = self.state.write(writes.clone(), self.term) => written,
                () = self.ended() => return Err(self.deposed()),
            };
            match written {
                Ok(()) => return Ok(()),
                Err(StateError::NotLeader { .. }) => {
                    self.end();
                    return Err(self.deposed());
                }
                Err(StateError::Unknown) => {
                    debug!(term = self.term, "a durable write has no known outcome yet");
                }
            }
        }
        warn!(
            term = self.term,
            "a durable write's outcome stays unknown; the placement driver reloads its state"
        );
        self.end();
        Err(self.deposed())
    }

    /// Wakes all lookups that wait for the map to change.
    pub fn map_changed(&self) {
        self.heard.send_modify(|count| *count += 1);
    }

    /// Counts changes of the map.
    pub fn map_changes(&self) -> watch::Receiver<u64> {
        self.heard.subscribe()
    }

    /// Sends the orders for `store` to this stream from now on.
    pub fn connect(&self, store: StoreId, stream: OrderStream) {
        let replaced = self.streams.lock().insert(store, stream);
        debug!(%store, again = replaced.is_some(), "a store reports its regions");
        // The end of the term of office clears the streams once. A stream that connects in that
        // moment must not stay.
        if *self.ended.borrow() {
            self.streams.lock().clear();
        }
    }

    /// As [`Lead::connect`], but only if `store` has no open stream. Another stream may have sent a
    /// report in the store's name and closed, and must not leave the store without orders.
    pub fn stay_connected(&self, store: StoreId, stream: &OrderStream) {
        let is_open = |known: &OrderStream| !known.is_closed();
        if !self.streams.lock().get(&store).is_some_and(is_open) {
            self.connect(store, stream.clone());
        }
    }

    /// Forgets a stream that closed, unless a newer stream took its place.
    pub fn disconnect(&self, store: StoreId, stream: &OrderStream) {
        let mut streams = self.streams.lock();
        if streams.get(&store).is_some_and(|known| known.same_channel(stream)) {
            streams.remove(&store);
        }
    }

    /// Asks the leader of a region to cut it at keys. As with [`Lead::tell`], the order may be
    /// lost, so the caller looks at the map and asks again.
    pub fn ask_split(&self, report: &RegionReport, keys: Vec<Bytes>) {
        let RegionReport { region, leader, .. } = report;
        let action = Action::Split(keys);
        self.tell([Order { region: region.id, epoch: region.epoch, leader: *leader, action }]);
    }

    /// Sends orders to the leaders they are for. An order that cannot be sent is dropped. The next
    /// report of its region causes it again.
    pub fn tell(&self, orders: impl IntoIterator<Item = Order>) {
        let streams = self.streams.lock();
        for order in orders {
            let Some(stream) = streams.get(&order.leader.store) else {
                debug!(region = %order.region, store = %order.leader.store, "no stream to its store");
                continue;
            };
            let response = convert::order(self.cluster_id, &order);
            if stream.try_send(Ok(response)).is_err() {
                debug!(region = %order.region, store = %order.leader.store, "its stream is full or closed");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use esker_model::{MemberId, SystemClock};
    use futures_util::future::BoxFuture;

    use super::*;
    use crate::map::StoreMap;
    use crate::operator::OperatorLimits;
    use crate::schedule::ScheduleConfig;
    use crate::state::{Leadership, MemberInfo, Pairs, StateWrite};

    const TERM: u64 = 5;

    /// A member of a group, as it is when its lease is looked at.
    struct Member {
        lease: Mutex<Option<u64>>,
    }

    impl ReplicatedState for Member {
        fn write(&self, _: Vec<StateWrite>, _: u64) -> BoxFuture<'static, Result<(), StateError>> {
            unreachable!("everything is at hand")
        }

        fn scan(&self, _: Vec<u8>) -> BoxFuture<'static, Result<Pairs, StateError>> {
            unreachable!("everything is at hand")
        }

        fn scan_stale(&self, _: Vec<u8>) -> BoxFuture<'static, Result<Pairs, StateError>> {
            unreachable!("everything is at hand")
        }

        fn leadership(&self) -> watch::Receiver<Leadership> {
            unreachable!("nobody follows the elections")
        }

        fn me(&self) -> MemberId {
            MemberId(1)
        }

        fn members(&self) -> Vec<MemberInfo> {
            Vec::new()
        }

        fn lease(&self) -> Option<u64> {
            *self.lease.lock()
        }
    }

    /// A term of office with windows that are durable.
    fn lead(state: Arc<Member>) -> Lead {
        let clock = Arc::new(SystemClock::new());
        let mut timestamps = TimestampOracle::resume(None);
        timestamps.bound_is_durable(timestamps.wanted_bound(clock.wall_ms()).expect("the first"));
        let mut ids = IdAllocator::resume(None);
        ids.bound_is_durable(ids.wanted_bound().expect("the first"));
        let (config, limits) = (ScheduleConfig::default(), OperatorLimits::default());
        Lead {
            term: TERM,
            cluster_id: 7,
            state,
            clock,
            counters: Mutex::new(Counters { timestamps, ids }),
            windows: watch::Sender::new(0),
            window_wanted: Notify::new(),
            cluster: RwLock::new(Cluster::new(StoreMap::default(), config, limits)),
            heard: watch::Sender::new(0),
            bootstrapped: AtomicBool::new(true),
            facts: tokio::sync::Mutex::default(),
            cutting: tokio::sync::Mutex::default(),
            streams: Mutex::default(),
            ended: watch::Sender::new(false),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_is_handed_out_without_the_lease_of_this_term() {
        let state = Arc::new(Member { lease: Mutex::new(Some(TERM)) });
        let lead = lead(state.clone());
        assert!(lead.ids(1).await.is_ok() && lead.timestamps(1).await.is_ok());
        for lease in [None, Some(TERM + 2)] {
            *state.lease.lock() = lease;
            let deposed = LeadError::Deposed { term: TERM };
            assert_eq!(lead.ids(1).await, Err(deposed.clone()), "{lease:?}");
            assert_eq!(lead.timestamps(1).await, Err(deposed), "{lease:?}");
        }
    }
}
