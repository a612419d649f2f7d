//! Snapshots to a receiver that takes nothing more, with a patience shorter than the real one. The
//! other tests of snapshots are in `rpc/tests/rpc/transport.rs`.

use std::net::SocketAddr;
use std::sync::mpsc as std_mpsc;

use futures_util::future::BoxFuture;
use tokio::net::TcpListener;
use tokio::runtime::Handle;
use tokio_stream::wrappers::TcpListenerStream;

use super::*;
use crate::transport::{
    AddressResolver, RaftHandler, SnapshotSink, TransportEvents, TransportService,
};

const CLUSTER: u64 = 77;
const RECEIVER: u64 = 2;

/// Far longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(30);

/// A store whose disk hangs until the other end of its channel is dropped. Its runtime goes on.
struct Stuck {
    disk: Mutex<Option<std_mpsc::Receiver<()>>>,
}

impl RaftHandler for Stuck {
    fn cluster_id(&self, _: u64) -> Option<u64> {
        Some(CLUSTER)
    }

    fn on_raft(&self, _: u64, _: u64, _: RaftMessage) {}

    fn begin_snapshot(&self, _: SnapshotHead) -> Result<Box<dyn SnapshotSink>, SnapshotError> {
        let disk = self.disk.lock().take().ok_or("only one snapshot is expected")?;
        Ok(Box::new(StuckSink(disk)))
    }
}

struct StuckSink(std_mpsc::Receiver<()>);

impl SnapshotSink for StuckSink {
    fn block(&mut self, _: u32, _: Bytes) -> Result<(), SnapshotError> {
        self.0.recv()?;
        Ok(())
    }

    fn finish(self: Box<Self>, _: SnapshotTail) -> Result<(), SnapshotError> {
        Ok(())
    }
}

/// More data than any window holds. Tells when it is dropped, as an engine's snapshot is released.
struct Endless(mpsc::UnboundedSender<()>);

impl SnapshotSource for Endless {
    fn next_part(&mut self) -> Result<Option<SnapshotPart>, SnapshotError> {
        Ok(Some(SnapshotPart { cf: 0, pairs: vec![0; 512 << 10].into(), count: 1 }))
    }
}

impl Drop for Endless {
    fn drop(&mut self) {
        let _ = self.0.send(());
    }
}

struct At(SocketAddr);

impl AddressResolver for At {
    fn address(&self, _: u64) -> BoxFuture<'_, Result<String, String>> {
        Box::pin(std::future::ready(Ok(self.0.to_string())))
    }
}

struct Outcomes(mpsc::UnboundedSender<SnapshotOutcome>);

impl TransportEvents for Outcomes {
    fn unreachable(&self, _: u64) {}

    fn snapshot_outcome(&self, _: SentSnapshot, outcome: SnapshotOutcome) {
        let _ = self.0.send(outcome);
    }
}

async fn soon<T>(what: &str, event: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, event).await.unwrap_or_else(|_| panic!("waited in vain: {what}"))
}

fn limits(block_timeout: Duration) -> Limits {
    Limits { block_timeout, ..Limits::new(u64::MAX) }
}

#[tokio::test]
async fn a_receiver_that_takes_no_more_blocks_keeps_neither_a_place_nor_the_data() {
    let (unstick, disk) = std_mpsc::channel();
    let handler = Arc::new(Stuck { disk: Mutex::new(Some(disk)) });
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("a bound address");
    let serving = tonic::transport::Server::builder()
        .add_service(TransportService::new(handler).into_server())
        .serve_with_incoming(TcpListenerStream::new(listener));
    let serving = tokio::spawn(serving);

    let (outcomes, mut outcome) = mpsc::unbounded_channel();
    let shared = Arc::new(Shared {
        resolver: Arc::new(At(address)),
        events: Arc::new(Outcomes(outcomes)),
        self_store: 1,
        cluster_id: CLUSTER,
        runtime: Handle::current(),
        snapshots: limits(Duration::from_millis(200)),
    });
    let (dropped, mut drops) = mpsc::unbounded_channel();
    let message = RaftMessage { region_id: 5, ..Default::default() };
    start(Arc::clone(&shared), RECEIVER, message, Box::new(Endless(dropped)));
    let outcome = soon("the sender gives up", outcome.recv()).await;
    assert_eq!(outcome, Some(SnapshotOutcome::Failed));
    // The thread that read it ended before that.
    assert_eq!(drops.try_recv(), Ok(()));
    assert_eq!(shared.snapshots.running.available_permits(), MAX_CONCURRENT_SNAPSHOTS);
    assert!(shared.snapshots.started.lock().to_stores.is_empty());
    drop(unstick);
    serving.abort();
}

#[tokio::test]
async fn a_receiver_may_take_its_time_for_all_blocks_together() {
    const BLOCKS: usize = 5;
    let block_timeout = Duration::from_secs(1);
    let limits = limits(block_timeout);
    let (parts, read_parts) = mpsc::channel(BLOCKS);
    let (chunks, mut taken) = mpsc::channel(BLOCKS_PASSED_ON);
    for _ in 0..BLOCKS {
        parts.send(Part::Block(SnapshotBlock::default())).await.expect("there is room");
    }
    drop(parts);
    let taking = async {
        let mut count = 0;
        while taken.recv().await.is_some() {
            count += 1;
            tokio::time::sleep(block_timeout / 3).await;
        }
        count
    };
    let (passed_on, count) = tokio::join!(pass_on(&limits, read_parts, chunks), taking);
    passed_on.expect("each block is taken in time");
    assert_eq!(count, BLOCKS);
}

fn admitted(limits: &Limits, store: u64) -> Vec<Admitted<'_>> {
    std::iter::from_fn(|| limits.admit(store)).collect()
}

#[test]
fn one_store_leaves_room_for_others_among_the_snapshots_that_wait() {
    let limits = limits(BLOCK_TIMEOUT);
    let to_one = MAX_CONCURRENT_SNAPSHOTS_PER_STORE + MAX_WAITING_SNAPSHOTS_PER_STORE;
    let first = admitted(&limits, 1);
    assert_eq!(first.len(), to_one);
    let second = admitted(&limits, 2);
    assert_eq!(first.len() + second.len(), MAX_CONCURRENT_SNAPSHOTS + MAX_WAITING_SNAPSHOTS);
    assert!(admitted(&limits, 3).is_empty());
    drop(first);
    assert_eq!(admitted(&limits, 3).len(), to_one);
}
