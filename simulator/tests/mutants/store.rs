//! One store in a test's hands. Its parts get their turns here, and the test plays all others.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use esker::parts::{
    MemberBook, MemberState, Members, RegionLeader, first_region, founded, store_of,
};
use esker_engine::{Cf, EngineOptions, KvEngine, LogEngine, MemoryEnv};
use esker_model::{
    Clock, Epoch, KeyRange, LogIndex, NewRegion, Peer, PeerId, Region, RegionId, RegionReport,
    StoreId, Term, Time,
};
use esker_placement::{MemberId, MemberInfo, ReplicatedState, StateWrite};
use esker_raft::{AppendOutcome, CommitPoint, GroupId, Message, MessageBody, Stamp};
use esker_raftstore::config::{INITIAL_INDEX, INITIAL_TERM};
use esker_raftstore::envelope::{Address, Consensus, Content};
use esker_raftstore::raw_value::RawValue;
use esker_raftstore::state::{Applied, applied, bootstrap_region};
use esker_raftstore::{
    Admin, Answer, CompareAndSwap, Envelope, Mutation, Outbox, Parts, ReadDelegate, ReadDelegates,
    RegionSnapshotSource, RequestContext, Store, StoreConfig, StoreError, Swap, WriteResult,
};
use parking_lot::Mutex;
use tokio::sync::watch;

const REGION: RegionId = RegionId(7);

/// A clock that stands still until it is moved.
#[derive(Clone)]
struct Noon(Arc<AtomicU64>);

impl Clock for Noon {
    fn now(&self) -> Time {
        Time::from_millis(self.0.load(Ordering::SeqCst))
    }

    fn wall_ms(&self) -> u64 {
        1_700_000_000_000
    }
}

/// What the store has sent.
#[derive(Default)]
struct Sent {
    messages: Mutex<Vec<Envelope>>,
    snapshots: AtomicUsize,
}

impl Outbox for Sent {
    fn send(&self, message: Envelope) {
        self.messages.lock().push(message);
    }

    fn send_snapshot(&self, _: Envelope, _: RegionSnapshotSource) {
        self.snapshots.fetch_add(1, Ordering::SeqCst);
    }

    fn report_region(&self, _: RegionReport) {}
    fn report_split(&self, _: Vec<Region>) {}
    fn leadership(&self, _: RegionId, _: Term, _: Option<Peer>, _: bool) {}
}

/// A region of these peers.
fn region(peers: &[Peer]) -> Region {
    let (epoch, peers) = (Epoch::FIRST, peers.to_vec());
    Region { id: REGION, range: KeyRange::all(), epoch, peers }
}

fn voter(id: u64) -> Peer {
    Peer::voter(PeerId(id), StoreId(id))
}

/// The store, with one region.
struct Bench {
    store: Store,
    region: Region,
    kv: KvEngine,
    log: LogEngine,
    sent: Arc<Sent>,
    clock: Noon,
}

impl Bench {
    fn new(id: StoreId, region: Region) -> Bench {
        Bench::with(id, region, true)
    }

    /// One that does not have the region.
    fn without(id: StoreId, region: Region) -> Bench {
        Bench::with(id, region, false)
    }

    fn with(id: StoreId, region: Region, has_it: bool) -> Bench {
        let options = EngineOptions::in_memory(MemoryEnv::new());
        let kv = KvEngine::open(Path::new("/kv"), &options).expect("an engine");
        let log = LogEngine::open(Path::new("/log"), &options).expect("an engine");
        if has_it {
            bootstrap_region(&kv, &log, id, &region).expect("it is written");
        }
        let (sent, clock) = (Arc::new(Sent::default()), Noon(Arc::new(AtomicU64::new(1_000))));
        let store = open(id, &kv, &log, &sent, &clock);
        Bench { store, region, kv, log, sent, clock }
    }

    /// Starts again from what is stored.
    fn restart(&mut self) {
        let id = self.store.handle.store_id();
        self.store = open(id, &self.kv, &self.log, &self.sent, &self.clock);
        self.sent.messages.lock().clear();
    }

    fn wait(&self, time: Duration) {
        self.clock.0.fetch_add(time.as_millis() as u64, Ordering::SeqCst);
    }

    /// One that leads a region, of which it has the only vote.
    fn leading(learners: &[Peer]) -> Bench {
        let peers: Vec<Peer> = [voter(1)].iter().chain(learners).copied().collect();
        let mut bench = Bench::new(StoreId(1), region(&peers));
        bench.settle().expect("it is elected");
        assert!(bench.store.handle.holds_lease(REGION), "it leads");
        bench
    }

    /// Lets everything happen that waits.
    fn settle(&mut self) -> Result<(), StoreError> {
        /// Many more than it takes.
        const TURNS: usize = 1_000;
        for _ in 0..TURNS {
            let Store { workers, log_writer, appliers, .. } = &mut self.store;
            let mut is_busy = false;
            for worker in workers {
                is_busy |= worker.turn(&self.clock)?;
            }
            is_busy |= log_writer.turn()?;
            for applier in appliers {
                is_busy |= applier.turn()?;
            }
            if !is_busy {
                return Ok(());
            }
        }
        panic!("the store does not come to rest");
    }

    fn write(&self, mutation: Mutation) -> Answer<WriteResult> {
        let context = RequestContext { epoch: self.region.epoch, ..RequestContext::default() };
        let writing = self.store.handle.write(self.region.id, context, vec![mutation]);
        writing.start().expect("there is room")
    }

    /// Writes a value as it is stored.
    fn put(&mut self, key: &Bytes, value: Bytes) {
        let put = Mutation::Put { cf: Cf::Default, key: key.clone(), value };
        let mut answer = self.write(put);
        self.settle().expect("it is written");
        assert!(matches!(answer.try_recv(), Ok(Ok(_))), "it is answered");
    }

    fn applied(&self) -> Applied {
        let stored = applied(&self.kv, self.region.id).expect("it can be read");
        stored.expect("the region is here")
    }

    /// A message of another peer's group arrives.
    fn hear(&self, address: Address, term: Term, body: MessageBody, creates: Option<KeyRange>) {
        let Address { region, from, to, .. } = address;
        let group = GroupId(region.0);
        let message = Message { group, from: from.id, to: to.id, term, body };
        let consensus = Consensus { message, applied: LogIndex(0), creates };
        let content = Content::Consensus(Box::new(consensus));
        self.store.handle.raft_message(address.with(content));
    }

    fn has_sent(&self, to: PeerId, is_meant: impl Fn(&MessageBody) -> bool) -> bool {
        self.sent.messages.lock().iter().any(|sent| match &sent.content {
            Content::Consensus(consensus) => {
                sent.address.to.id == to && is_meant(&consensus.message.body)
            }
            Content::Gone | Content::Question => false,
        })
    }

    fn voted_for(&self, candidate: PeerId) -> bool {
        self.has_sent(candidate, |body| {
            matches!(body, MessageBody::VoteReply { granted: true, .. })
        })
    }

    /// The term and the beginning of the newest append.
    fn append(&self) -> (Term, LogIndex) {
        let messages = self.sent.messages.lock();
        let newest = messages.iter().rev().find_map(|sent| match &sent.content {
            Content::Consensus(consensus) => match &consensus.message.body {
                MessageBody::Append { prev_index, .. } => {
                    Some((consensus.message.term, *prev_index))
                }
                _ => None,
            },
            Content::Gone | Content::Question => None,
        });
        newest.expect("there is one")
    }
}

fn open(id: StoreId, kv: &KvEngine, log: &LogEngine, sent: &Arc<Sent>, clock: &Noon) -> Store {
    let config = StoreConfig { workers: 1, apply_workers: 1, seed: 1, ..StoreConfig::default() };
    let parts = Parts {
        store: id,
        kv: kv.clone(),
        log: log.clone(),
        snapshots: "/snap".into(),
        config,
        outbox: sent.clone(),
        clock: Arc::new(clock.clone()),
    };
    Store::open(parts).expect("the store opens")
}

/// A request for a vote, whose sender has nothing.
fn ask_for_vote(last_index: LogIndex, last_term: Term) -> MessageBody {
    MessageBody::Vote { last_index, last_term, transfer: false, commit: CommitPoint::default() }
}

/// Whether a peer that a leader has not filled yet votes for two candidates of one term, with a
/// restart in between.
pub fn an_empty_peer_votes_twice() -> bool {
    const TERM: Term = Term(8);
    let mut bench = Bench::without(StoreId(1), region(&[1, 2, 3].map(voter)));
    let range = || Some(KeyRange::all());
    let epoch = bench.region.epoch;
    let asked_by = |id| Address { region: REGION, from: voter(id), to: voter(1), epoch };
    bench.hear(asked_by(2), TERM, ask_for_vote(LogIndex(9), TERM.prev()), range());
    bench.settle().expect("it votes");
    assert!(bench.voted_for(PeerId(2)), "it has no reason to refuse");
    bench.restart();
    for _ in 0..2 {
        // The first finds it loyal to a leader that there may have been.
        bench.hear(asked_by(3), TERM, ask_for_vote(LogIndex(9), TERM.prev()), range());
        bench.settle().expect("it is asked");
        bench.wait(Duration::from_secs(60));
    }
    bench.voted_for(PeerId(3))
}

/// Whether a peer that has just acknowledged a leader's heartbeat, so that the leader holds a lease,
/// elects another one after a restart.
pub fn a_promise_to_a_leader_is_forgotten() -> bool {
    let leads = Term(INITIAL_TERM + 1);
    let mut bench = Bench::new(StoreId(1), region(&[1, 2, 3].map(voter)));
    bench.settle().expect("it follows");
    let epoch = bench.region.epoch;
    let heard_of = |id| Address { region: REGION, from: voter(id), to: voter(1), epoch };
    let stamp = Stamp { sent: bench.clock.now(), ..Stamp::default() };
    let commit = LogIndex(INITIAL_INDEX);
    bench.hear(heard_of(2), leads, MessageBody::Heartbeat { commit, stamp }, None);
    bench.settle().expect("it answers");
    let is_acknowledgement =
        |body: &MessageBody| matches!(body, MessageBody::HeartbeatReply { .. });
    assert!(bench.has_sent(PeerId(2), is_acknowledgement), "it promises");
    bench.restart();
    let ask = ask_for_vote(LogIndex(INITIAL_INDEX), Term(INITIAL_TERM));
    bench.hear(heard_of(3), leads.next(), ask, None);
    bench.settle().expect("it is asked");
    bench.voted_for(PeerId(3))
}

/// Whether a compare-and-swap that cannot be decided counts as applied, so that the next start
/// would go on behind it.
pub fn a_swap_that_stops_the_store_counts_as_applied() -> bool {
    let (mut bench, key) = (Bench::leading(&[]), Bytes::from_static(b"k"));
    // Nothing that a value could begin with.
    bench.put(&key, Bytes::from_static(b"\x07"));
    let before = bench.applied();
    let swap =
        CompareAndSwap { cf: Cf::Default, key, expected: None, then: Swap::Delete, now_s: 1 };
    let _answer = bench.write(Mutation::CompareAndSwap(swap));
    bench.settle().expect_err("the value cannot be read");
    bench.applied() != before
}

/// Whether a compare-and-swap that expects no value fails because of one that has expired.
pub fn a_swap_finds_an_expired_value() -> bool {
    let (mut bench, key) = (Bench::leading(&[]), Bytes::from_static(b"k"));
    bench.put(&key, RawValue::new(Bytes::from_static(b"old"), Some(10)).encode());
    let then = Swap::Put { value: Bytes::from_static(b"new"), expires_at: None };
    let swap = CompareAndSwap { cf: Cf::Default, key, expected: None, then, now_s: 20 };
    let mut answer = bench.write(Mutation::CompareAndSwap(swap));
    bench.settle().expect("it is decided");
    let result = answer.try_recv().expect("it is answered").expect("it is carried out");
    !result.swap.expect("it was a swap").swapped
}

/// Whether nobody answers a candidate of a region whose split is applied here after the candidate
/// has asked for a vote.
pub fn an_early_message_is_lost() -> bool {
    let mut bench = Bench::leading(&[]);
    let (here, there) = (Peer::voter(PeerId(21), StoreId(1)), Peer::voter(PeerId(22), StoreId(2)));
    let (child, key) = (RegionId(9), Bytes::from_static(b"m"));
    // The candidate knows of a change of members that is not known here.
    let epoch = Epoch { conf_ver: 2, version: 2 };
    let address = Address { region: child, from: there, to: here, epoch };
    let body = ask_for_vote(LogIndex(INITIAL_INDEX), Term(INITIAL_TERM));
    let range = KeyRange::new(Bytes::new(), Some(key.clone())).expect("a range");
    bench.hear(address, Term(INITIAL_TERM + 2), body, Some(range));
    bench.settle().expect("it arrives");
    let regions = vec![NewRegion { id: child, peers: vec![here.id] }];
    let split = Admin::Split { keys: vec![key], regions };
    let splitting = bench.store.handle.admin(REGION, bench.region.epoch, split).start();
    let mut answer = splitting.expect("there is room");
    bench.settle().expect("it is split");
    assert!(matches!(answer.try_recv(), Ok(Ok(_))), "it is answered");
    let messages = bench.sent.messages.lock();
    !messages.iter().any(|sent| sent.address.to.id == there.id)
}

/// Whether somebody who holds a peer's delegate sees its region after it was removed.
pub fn a_removed_peer_is_still_seen() -> bool {
    let peers = [1, 2, 3].map(voter);
    let mut bench = Bench::new(StoreId(1), region(&peers));
    bench.settle().expect("it follows");
    let delegate = bench.store.handle.delegates().get(REGION).expect("it is here");
    let epoch = Epoch { conf_ver: 2, version: 1 };
    let address = Address { region: REGION, from: peers[1], to: peers[0], epoch };
    bench.store.handle.raft_message(address.with(Content::Gone));
    bench.settle().expect("it leaves");
    assert!(bench.store.handle.delegates().get(REGION).is_none(), "it has left");
    delegate.descriptor().is_initialized()
}

/// Whether a follower gets another snapshot while it installs the one that it has received.
pub fn a_snapshot_that_arrived_is_sent_again() -> bool {
    let learner = Peer::learner(PeerId(2), StoreId(2));
    let mut bench = Bench::leading(&[learner]);
    let (term, prev_index) = bench.append();
    let epoch = bench.region.epoch;
    let address = Address { region: REGION, from: learner, to: voter(1), epoch };
    // It has nothing at all.
    let (hint_index, hint_term) = (LogIndex(0), Term(0));
    let outcome = AppendOutcome::Rejected { prev_index, hint_index, hint_term };
    let stamp = Stamp::default();
    bench.hear(address, term, MessageBody::AppendReply { outcome, stamp }, None);
    bench.settle().expect("a snapshot is taken");
    assert_eq!(bench.sent.snapshots.load(Ordering::SeqCst), 1, "it is sent");
    bench.store.handle.snapshot_sent(REGION, learner.id, true);
    for _ in 0..3 {
        bench.hear(address, term, MessageBody::HeartbeatReply { stamp }, None);
        bench.settle().expect("it goes on");
    }
    bench.sent.snapshots.load(Ordering::SeqCst) > 1
}

/// Whether a reader under a lease gets its view although the region was split before the view was
/// taken.
pub fn a_lease_read_misses_a_split() -> bool {
    let options = EngineOptions::in_memory(MemoryEnv::new());
    let kv = KvEngine::open(Path::new("/kv"), &options).expect("an engine");
    let (whole, leader) = (region(&[voter(1)]), PeerId(1));
    let epoch = Epoch { version: 2, ..whole.epoch };
    let split = Arc::new(Region { epoch, ..whole.clone() });
    let context = RequestContext { epoch: whole.epoch, ..RequestContext::default() };
    let delegate = Arc::new(ReadDelegate::new(Arc::new(whole), leader));
    delegate.publish_lease(Term(5), Time(100));
    let delegates = ReadDelegates::default();
    delegates.insert(REGION, delegate.clone());
    let read = delegates.lease_read_with(REGION, &context, Time(1), || {
        delegate.set_descriptor(split);
        kv.snapshot()
    });
    read.is_some()
}

/// Whether a member writes placement's state in another term than it was asked to.
pub fn state_is_written_in_another_term() -> bool {
    let me = MemberId(1);
    let address = "member1:2379".to_owned();
    let all = vec![MemberInfo { id: me, name: "member1".to_owned(), address }];
    let nonces = all.iter().map(|member| (member.name.clone(), member.id.0)).collect();
    let members = Members { me, all, tag: 1 };
    let record = founded(&members, &nonces);
    let mut bench = Bench::new(store_of(me), first_region(&record));
    bench.settle().expect("it is elected");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
    runtime.expect("a runtime").block_on(async {
        let handle = bench.store.handle.clone();
        let book = Arc::new(MemberBook::new(members, record));
        book.open(handle.clone());
        let (_leaders, leader) = watch::channel(RegionLeader::default());
        let state = MemberState::new(handle, book, leader);
        let term = state.lease().expect("it leads");
        let put = StateWrite::Put { key: b"pd/k".to_vec(), value: b"v".to_vec() };
        let mut writing = state.write(vec![put], term + 1);
        loop {
            if let Poll::Ready(written) = futures_util::poll!(&mut writing) {
                return written.is_ok();
            }
            bench.settle().expect("it goes on");
        }
    })
}
