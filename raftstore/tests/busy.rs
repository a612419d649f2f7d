//! A store that has more to do than room: what a client is told, and when.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use esker_engine::{EngineOptions, KvEngine, LogEngine, MemoryEnv};
use esker_raftstore::config::{BUSY_PATIENCE, WORKER_INBOX};
use esker_raftstore::{
    MonotonicClock, Outbox, Parts, PeerId, RegionId, RegionReport, RegionSnapshotSource,
    RequestContext, RequestError, Store, StoreConfig, StoreId,
};
use esker_rpc::proto::esker::RaftMessage;
use esker_rpc::proto::metapb::{Peer, Region};

const REGION: RegionId = RegionId(7);

/// Nobody hears this store.
struct Nowhere;

impl Outbox for Nowhere {
    fn send(&self, _: StoreId, _: RaftMessage) {}
    fn send_snapshot(&self, _: StoreId, _: PeerId, _: RaftMessage, _: RegionSnapshotSource) {}
    fn report_region(&self, _: RegionReport) {}
    fn report_split(&self, _: Vec<Region>) {}
    fn leadership(&self, _: RegionId, _: u64, _: Option<Peer>, _: bool) {}
}

/// A store without regions, none of whose parts runs yet, and whose worker's inbox is full.
fn full() -> Store {
    let options = EngineOptions::in_memory(MemoryEnv::new());
    let store = Store::open(Parts {
        store: StoreId(1),
        kv: KvEngine::open(Path::new("/kv"), &options).expect("an engine"),
        log: LogEngine::open(Path::new("/log"), &options).expect("an engine"),
        snapshots: "/snap".into(),
        config: StoreConfig { workers: 1, apply_workers: 1, ..StoreConfig::default() },
        outbox: Arc::new(Nowhere),
        clock: Arc::new(MonotonicClock::default()),
    })
    .expect("the store opens");
    for _ in 0..WORKER_INBOX {
        // Whatever becomes of it, it takes a place.
        drop(store.handle.start_status(REGION).expect("there is room"));
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
    let refused = store.handle.start_write(REGION, RequestContext::default(), Vec::new());
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
    assert!(waited > BUSY_PATIENCE / 2, "it was told after {waited:?}");
    let error = answer.expect_err("checked").to_proto();
    assert!(error.server_is_busy.is_some(), "{error:?}");
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
