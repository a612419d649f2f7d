//! A store that cannot serve for the moment: what a client is told, and when.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use esker_engine::{Cf, EngineOptions, KvEngine, LogEngine, MemoryEnv};
use esker_model::{
    Epoch, KeyRange, Peer, PeerId, Region, RegionId, RegionReport, StoreId, SystemClock, Term,
};
use esker_raftstore::config::{HOLD_PATIENCE, WORKER_INBOX};
use esker_raftstore::state::bootstrap_region;
use esker_raftstore::{
    Envelope, Mutation, Outbox, Parts, RegionSnapshotSource, RequestContext, RequestError, Store,
    StoreConfig,
};

const REGION: RegionId = RegionId(7);

/// Nobody hears this store.
struct Nowhere;

impl Outbox for Nowhere {
    fn send(&self, _: Envelope) {}
    fn send_snapshot(&self, _: Envelope, _: RegionSnapshotSource) {}
    fn report_region(&self, _: RegionReport) {}
    fn report_split(&self, _: Vec<Region>) {}
    fn leadership(&self, _: RegionId, _: Term, _: Option<Peer>, _: bool) {}
}

/// A store none of whose parts runs yet, with a region of these peers on as many stores.
fn store(peers: u64) -> Store {
    let options = EngineOptions::in_memory(MemoryEnv::new());
    let kv = KvEngine::open(Path::new("/kv"), &options).expect("an engine");
    let log = LogEngine::open(Path::new("/log"), &options).expect("an engine");
    if peers > 0 {
        let region = Region {
            id: REGION,
            range: KeyRange::all(),
            epoch: Epoch::FIRST,
            peers: (1..=peers).map(|id| Peer::voter(PeerId(id), StoreId(id))).collect(),
        };
        bootstrap_region(&kv, &log, StoreId(1), &region).expect("it is written");
    }
    Store::open(Parts {
        store: StoreId(1),
        kv,
        log,
        snapshots: "/snap".into(),
        config: StoreConfig {
            workers: 1,
            apply_workers: 1,
            election_timeout: HOLD_PATIENCE / 5,
            heartbeat_interval: HOLD_PATIENCE / 50,
            ..StoreConfig::default()
        },
        outbox: Arc::new(Nowhere),
        clock: Arc::new(SystemClock::new()),
    })
    .expect("the store opens")
}

/// A store without regions, none of whose parts runs yet, and whose worker's inbox is full.
fn full() -> Store {
    let store = store(0);
    for _ in 0..WORKER_INBOX {
        // Whatever becomes of it, it takes a place.
        drop(store.handle.status(REGION).start().expect("there is room"));
    }
    store
}

fn ask(store: &Store) -> impl Future<Output = Result<(), RequestError>> + Send + 'static {
    let handle = store.handle.clone();
    async move { handle.write(REGION, RequestContext::default(), Vec::new()).await.map(|_| ()) }
}

#[tokio::test]
async fn a_request_that_finds_no_room_is_held_until_there_is() {
    let store = full();
    let refused = store.handle.write(REGION, RequestContext::default(), Vec::new()).start();
    assert!(matches!(refused, Err(RequestError::ServerIsBusy { .. })), "there is room");
    let mut asking = Box::pin(ask(&store));
    // It has tried once, and waits.
    assert!(futures_util::poll!(&mut asking).is_pending(), "it was told at once");
    let running = store.start().expect("threads");
    assert_eq!(asking.await, Err(RequestError::RegionNotFound(REGION)), "it was asked at last");
    running.stop();
}

#[tokio::test]
async fn a_request_is_not_held_for_ever() {
    let store = full();
    let began = Instant::now();
    let answer = ask(&store).await;
    assert!(matches!(answer, Err(RequestError::ServerIsBusy { .. })), "{answer:?}");
    let waited = began.elapsed();
    assert!(waited > HOLD_PATIENCE / 2, "it was told after {waited:?}");
    let error = answer.expect_err("checked").to_proto();
    assert!(error.server_is_busy.is_some(), "{error:?}");
}

fn to_the_region() -> RequestContext {
    let epoch = Epoch::FIRST;
    RequestContext { epoch, ..RequestContext::default() }
}

#[tokio::test]
async fn requests_wait_for_an_election() {
    let running = store(1).start().expect("threads");
    let put = Mutation::Put { cf: Cf::Default, key: "k".into(), value: "v".into() };
    let written = running.handle().write(REGION, to_the_region(), vec![put]).await;
    assert!(written.is_ok(), "{written:?}");
    running.stop();
    let running = store(1).start().expect("threads");
    let read = running.handle().snapshot(REGION, to_the_region()).await;
    assert!(read.is_ok(), "{:?}", read.err());
    running.stop();
}

#[tokio::test]
async fn a_region_that_finds_no_leader_says_so() {
    let running = store(3).start().expect("threads");
    let began = Instant::now();
    let read = running.handle().snapshot(REGION, to_the_region()).await;
    let written = running.handle().write(REGION, to_the_region(), Vec::new()).await;
    assert!(began.elapsed() > HOLD_PATIENCE, "after {:?}", began.elapsed());
    for error in [read.err(), written.err()] {
        assert_eq!(error, Some(RequestError::NotLeader { region: REGION, leader: None }));
    }
    running.stop();
}

#[tokio::test]
async fn a_store_that_stops_says_that_it_does_not_lead_and_never_that_it_is_busy() {
    let running = full().start().expect("threads");
    let handle = running.handle().clone();
    running.stop();
    for _ in 0..2 {
        let context = RequestContext::default();
        let written = handle.write(REGION, context, Vec::new()).await.expect_err("it has stopped");
        let read = handle.snapshot(REGION, context).await.expect_err("it has stopped");
        for error in [written.to_proto(), read.to_proto()] {
            assert!(error.server_is_busy.is_none(), "{error:?}");
            let not_leader = error.not_leader.expect("clients look for another leader");
            assert_eq!((not_leader.region_id, not_leader.leader), (REGION.0, None));
        }
    }
}
