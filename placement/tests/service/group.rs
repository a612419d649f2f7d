//! A group of placement members without consensus, disks or networks below it: one key space in
//! memory, and a leader that the test chooses.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use esker_model::{Clock, Time};
use esker_placement::state::Pairs;
use esker_placement::{Leadership, MemberId, MemberInfo, ReplicatedState, StateError, StateWrite};
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use tokio::sync::watch;

/// What happens to the next writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The write is done, but there is no answer.
    LostAnswer,
    /// The write is not done, and there is no answer.
    LostRequest,
}

#[derive(Default)]
struct Inner {
    data: BTreeMap<Vec<u8>, Vec<u8>>,
    term: u64,
    leader: Option<MemberId>,
    faults: Vec<Fault>,
    /// Whether the leader may answer from memory.
    has_lease: bool,
}

/// The shared key space.
#[derive(Clone, Default)]
pub struct Group {
    inner: Arc<Mutex<Inner>>,
    members: Arc<Mutex<BTreeMap<MemberId, watch::Sender<Leadership>>>>,
    infos: Arc<Mutex<Vec<MemberInfo>>>,
}

impl Group {
    /// Sets the members.
    pub fn introduce(&self, members: Vec<MemberInfo>) {
        *self.infos.lock() = members;
    }

    /// A member of the group.
    pub fn member(&self, id: u64) -> Arc<Member> {
        let id = MemberId(id);
        let leadership = watch::Sender::new(Leadership::default());
        self.members.lock().insert(id, leadership.clone());
        Arc::new(Member { id, group: self.clone(), leadership })
    }

    /// `id` wins an election, and all members hear of it.
    pub fn elect(&self, id: u64) {
        self.elect_silently(id);
        self.announce();
    }

    /// `id` wins an election that no member has heard of yet.
    pub fn elect_silently(&self, id: u64) {
        let mut inner = self.inner.lock();
        inner.term += 1;
        inner.leader = Some(MemberId(id));
        inner.has_lease = true;
    }

    /// All members hear which one leads.
    pub fn announce(&self) {
        let (term, leader) = {
            let inner = self.inner.lock();
            (inner.term, inner.leader)
        };
        for (id, leadership) in self.members.lock().iter() {
            leadership.send_replace(Leadership { term, leader, is_self: leader == Some(*id) });
        }
    }

    /// The leader's lease runs out, or comes back.
    pub fn set_lease(&self, has_lease: bool) {
        self.inner.lock().has_lease = has_lease;
    }

    /// The next writes meet these faults, the last one first.
    pub fn inject(&self, faults: &[Fault]) {
        self.inner.lock().faults.extend(faults);
    }

    /// Whether every injected fault was met.
    pub fn has_met_all_faults(&self) -> bool {
        self.inner.lock().faults.is_empty()
    }

    /// Overwrites one stored value.
    pub fn damage(&self, key: &[u8], value: &[u8]) {
        self.inner.lock().data.insert(key.to_vec(), value.to_vec());
    }
}

/// One member's view of the group.
pub struct Member {
    id: MemberId,
    group: Group,
    leadership: watch::Sender<Leadership>,
}

impl Member {
    fn pairs(&self, prefix: &[u8]) -> Pairs {
        let inner = self.group.inner.lock();
        inner
            .data
            .range(prefix.to_vec()..)
            .take_while(|(key, _)| key.starts_with(prefix))
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect()
    }

    fn apply(&self, writes: Vec<StateWrite>, term: u64) -> Result<(), StateError> {
        let mut inner = self.group.inner.lock();
        if inner.leader != Some(self.id) || inner.term != term {
            return Err(StateError::NotLeader { leader: inner.leader });
        }
        let fault = inner.faults.pop();
        if fault == Some(Fault::LostRequest) {
            return Err(StateError::Unknown);
        }
        for write in writes {
            match write {
                StateWrite::Put { key, value } => inner.data.insert(key, value),
                StateWrite::Delete { key } => inner.data.remove(&key),
            };
        }
        if fault == Some(Fault::LostAnswer) {
            return Err(StateError::Unknown);
        }
        Ok(())
    }
}

impl ReplicatedState for Member {
    fn write(
        &self,
        writes: Vec<StateWrite>,
        term: u64,
    ) -> BoxFuture<'static, Result<(), StateError>> {
        let outcome = self.apply(writes, term);
        Box::pin(async move {
            tokio::task::yield_now().await;
            outcome
        })
    }

    fn scan(&self, prefix: Vec<u8>) -> BoxFuture<'static, Result<Pairs, StateError>> {
        let leader = self.group.inner.lock().leader;
        let outcome = if leader == Some(self.id) {
            Ok(self.pairs(&prefix))
        } else {
            Err(StateError::NotLeader { leader })
        };
        Box::pin(async move { outcome })
    }

    fn scan_stale(&self, prefix: Vec<u8>) -> BoxFuture<'static, Result<Pairs, StateError>> {
        let pairs = self.pairs(&prefix);
        Box::pin(async move { Ok(pairs) })
    }

    fn leadership(&self) -> watch::Receiver<Leadership> {
        self.leadership.subscribe()
    }

    fn me(&self) -> MemberId {
        self.id
    }

    fn members(&self) -> Vec<MemberInfo> {
        self.group.infos.lock().clone()
    }

    fn lease(&self) -> Option<u64> {
        let inner = self.group.inner.lock();
        (inner.has_lease && inner.leader == Some(self.id)).then_some(inner.term)
    }
}

/// Clocks that stand still until a test moves them.
pub struct TestClock {
    wall_ms: AtomicU64,
    moment: AtomicU64,
}

impl TestClock {
    pub fn new(wall_ms: u64) -> Arc<Self> {
        Arc::new(Self { wall_ms: AtomicU64::new(wall_ms), moment: AtomicU64::new(1_000_000) })
    }

    pub fn set_wall_ms(&self, wall_ms: u64) {
        self.wall_ms.store(wall_ms, Ordering::SeqCst);
    }

    pub fn advance_moment(&self, millis: u64) {
        self.moment.fetch_add(millis, Ordering::SeqCst);
    }
}

impl Clock for TestClock {
    fn wall_ms(&self) -> u64 {
        self.wall_ms.load(Ordering::SeqCst)
    }

    fn now(&self) -> Time {
        Time::from_millis(self.moment.load(Ordering::SeqCst))
    }
}
