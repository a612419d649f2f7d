//! Raft messages and snapshots between two stores.

use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use esker_rpc::proto::esker::snapshot_chunk::Part;
use esker_rpc::proto::esker::transport_client::TransportClient;
use esker_rpc::proto::esker::{
    RaftBatch, RaftMessage, SnapshotBlock, SnapshotChunk, SnapshotHead, SnapshotTail,
};
use esker_rpc::proto::metapb::Peer;
use esker_rpc::transport::{
    AddressResolver, MAX_CONCURRENT_SNAPSHOTS, MAX_QUEUED_MESSAGES, MAX_WAITING_SNAPSHOTS,
    RaftHandler, RaftTransport, SentSnapshot, SnapshotError, SnapshotOutcome, SnapshotPart,
    SnapshotSink, SnapshotSource, TransportEvents, TransportService,
};
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tonic::service::Routes;
use tonic::{Code, Status};

use crate::support::{Server, soon};

const CLUSTER: u64 = 77;
const SENDER: u64 = 1;
const RECEIVER: u64 = 2;

/// What the receiving store got.
#[derive(Debug, PartialEq)]
enum Seen {
    Raft {
        from: u64,
        region: u64,
    },
    Head {
        region: u64,
    },
    Finished {
        blocks: Vec<(u32, Bytes)>,
        pairs: u64,
    },
    /// A sink was dropped before its end.
    Aborted,
}

struct Receiver {
    seen: mpsc::UnboundedSender<Seen>,
    refuses: bool,
}

impl RaftHandler for Receiver {
    fn cluster_id(&self, store: u64) -> Option<u64> {
        (store == RECEIVER).then_some(CLUSTER)
    }

    fn on_raft(&self, from: u64, to: u64, message: RaftMessage) {
        assert_eq!(to, RECEIVER);
        let _ = self.seen.send(Seen::Raft { from, region: message.region_id });
    }

    fn begin_snapshot(&self, head: SnapshotHead) -> Result<Box<dyn SnapshotSink>, SnapshotError> {
        if self.refuses {
            return Err("the disk is full".into());
        }
        let region = head.message.expect("a message").region_id;
        let _ = self.seen.send(Seen::Head { region });
        Ok(Box::new(Sink { seen: self.seen.clone(), blocks: Vec::new(), finished: false }))
    }
}

struct Sink {
    seen: mpsc::UnboundedSender<Seen>,
    blocks: Vec<(u32, Bytes)>,
    finished: bool,
}

impl SnapshotSink for Sink {
    fn block(&mut self, cf: u32, pairs: Bytes) -> Result<(), SnapshotError> {
        self.blocks.push((cf, pairs));
        Ok(())
    }

    fn finish(mut self: Box<Self>, tail: SnapshotTail) -> Result<(), SnapshotError> {
        self.finished = true;
        let blocks = std::mem::take(&mut self.blocks);
        let _ = self.seen.send(Seen::Finished { blocks, pairs: tail.pairs });
        Ok(())
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        if !self.finished {
            let _ = self.seen.send(Seen::Aborted);
        }
    }
}

fn receiver(refuses: bool) -> (Routes, mpsc::UnboundedReceiver<Seen>) {
    let (seen, sees) = mpsc::unbounded_channel();
    let service = TransportService::new(Arc::new(Receiver { seen, refuses }));
    (Routes::new(service.into_server()), sees)
}

/// Knows one address, or none, or never answers, or does so for one store alone.
enum Resolver {
    At(Mutex<SocketAddr>),
    Only(u64, SocketAddr),
    Nowhere,
    Silent,
}

impl AddressResolver for Resolver {
    fn address(&self, store: u64) -> BoxFuture<'_, Result<String, String>> {
        match self {
            Resolver::At(address) => {
                let address = address.lock().to_string();
                Box::pin(std::future::ready(Ok(address)))
            }
            Resolver::Nowhere => {
                Box::pin(std::future::ready(Err(format!("store {store} is not known"))))
            }
            Resolver::Only(known, address) if *known == store => {
                Box::pin(std::future::ready(Ok(address.to_string())))
            }
            Resolver::Only(..) | Resolver::Silent => Box::pin(std::future::pending()),
        }
    }
}

#[derive(Debug, PartialEq)]
enum Event {
    Unreachable(u64),
    Snapshot(SentSnapshot, SnapshotOutcome),
}

struct Events(mpsc::UnboundedSender<Event>);

impl TransportEvents for Events {
    fn unreachable(&self, store: u64) {
        let _ = self.0.send(Event::Unreachable(store));
    }

    fn snapshot_outcome(&self, snapshot: SentSnapshot, outcome: SnapshotOutcome) {
        let _ = self.0.send(Event::Snapshot(snapshot, outcome));
    }
}

fn sender(
    resolver: Resolver,
    cluster: u64,
) -> (RaftTransport, mpsc::UnboundedReceiver<Event>, Arc<Resolver>) {
    let (events, told) = mpsc::unbounded_channel();
    let resolver = Arc::new(resolver);
    let resolving: Arc<dyn AddressResolver> = resolver.clone();
    let events = Arc::new(Events(events));
    let transport = RaftTransport::new(resolving, SENDER, cluster, Handle::current(), events);
    (transport, told, resolver)
}

fn to(server: &Server) -> Resolver {
    Resolver::At(Mutex::new(server.address))
}

fn message(region_id: u64) -> RaftMessage {
    let to = Some(Peer { id: 20, store_id: RECEIVER, ..Default::default() });
    RaftMessage { region_id, to, ..Default::default() }
}

/// Sends a message again and again until it arrives, because messages to an absent store are lost.
async fn send_until_seen(
    transport: &RaftTransport,
    sees: &mut mpsc::UnboundedReceiver<Seen>,
    region: u64,
) {
    let mut again = tokio::time::interval(std::time::Duration::from_millis(20));
    let arriving = async {
        loop {
            tokio::select! {
                seen = sees.recv() => {
                    if seen == Some(Seen::Raft { from: SENDER, region }) {
                        return;
                    }
                }
                _ = again.tick() => {
                    let _ = transport.send(RECEIVER, message(region));
                }
            }
        }
    };
    soon("the message arrives", arriving).await;
}

#[tokio::test]
async fn messages_of_many_regions_arrive_in_the_order_in_which_they_were_sent() {
    let (routes, mut sees) = receiver(false);
    let server = Server::start(routes).await;
    let (transport, _events, _) = sender(to(&server), CLUSTER);
    for region in 0..5_000 {
        transport.send(RECEIVER, message(region)).expect("there is room");
    }
    for region in 0..5_000 {
        let seen = soon("a message", sees.recv()).await;
        assert_eq!(seen, Some(Seen::Raft { from: SENDER, region }));
    }
    server.stop().await;
}

#[tokio::test]
async fn a_peer_that_comes_back_is_reached_again_and_its_absence_is_told() {
    let (routes, mut sees) = receiver(false);
    let server = Server::start(routes).await;
    let (transport, mut events, _) = sender(to(&server), CLUSTER);
    send_until_seen(&transport, &mut sees, 1).await;
    let address = server.stop().await;
    assert_eq!(soon("an event", events.recv()).await, Some(Event::Unreachable(RECEIVER)));
    let (routes, mut sees) = receiver(false);
    let server = Server::start_at(address, routes).await;
    send_until_seen(&transport, &mut sees, 2).await;
    server.stop().await;
}

#[tokio::test]
async fn a_peer_that_moves_is_found_at_its_new_address() {
    let (routes, mut sees) = receiver(false);
    let server = Server::start(routes).await;
    let (transport, _events, resolver) = sender(to(&server), CLUSTER);
    send_until_seen(&transport, &mut sees, 1).await;
    let (routes, mut sees) = receiver(false);
    let moved = Server::start(routes).await;
    if let Resolver::At(address) = &*resolver {
        *address.lock() = moved.address;
    }
    server.stop().await;
    send_until_seen(&transport, &mut sees, 2).await;
    moved.stop().await;
}

#[tokio::test]
async fn a_queue_that_nobody_drains_says_that_it_is_full_and_others_are_not_affected() {
    let (transport, _events, _) = sender(Resolver::Silent, CLUSTER);
    for region in 0..MAX_QUEUED_MESSAGES as u64 {
        transport.send(RECEIVER, message(region)).expect("there is room");
    }
    let full = transport.send(RECEIVER, message(0)).expect_err("there is none");
    assert_eq!((full.store, full.messages), (RECEIVER, MAX_QUEUED_MESSAGES));
    transport.send(3, message(0)).expect("each store has a queue of its own");
}

#[tokio::test]
async fn what_waits_for_a_store_that_cannot_be_reached_is_dropped_and_told() {
    let (transport, mut events, _) = sender(Resolver::Nowhere, CLUSTER);
    for region in 0..MAX_QUEUED_MESSAGES as u64 {
        // Some messages may be refused, because those before them were just dropped.
        let _ = transport.send(RECEIVER, message(region));
    }
    assert_eq!(soon("an event", events.recv()).await, Some(Event::Unreachable(RECEIVER)));
    transport.send(RECEIVER, message(1)).expect("there is room again");
}

#[tokio::test]
async fn messages_of_another_cluster_or_for_another_store_are_refused() {
    let (routes, mut sees) = receiver(false);
    let server = Server::start(routes).await;
    let (stranger, mut events, _) = sender(to(&server), CLUSTER + 1);
    stranger.send(RECEIVER, message(1)).expect("there is room");
    assert_eq!(soon("an event", events.recv()).await, Some(Event::Unreachable(RECEIVER)));
    let (lost, mut events, _) = sender(to(&server), CLUSTER);
    lost.send(9, message(2)).expect("there is room");
    assert_eq!(soon("an event", events.recv()).await, Some(Event::Unreachable(9)));

    let mut client = TransportClient::connect(server.url()).await.expect("it listens");
    let batch = RaftBatch {
        cluster_id: CLUSTER + 1,
        from_store: SENDER,
        to_store: RECEIVER,
        messages: vec![message(3)],
    };
    let status = client.raft(tokio_stream::once(batch)).await.expect_err("refused");
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().contains("cluster 77, not to 78"), "{}", status.message());

    server.stop().await;
    assert_eq!(sees.recv().await, None, "nothing was handed on");
}

/// Returns parts, and fails at the end if the test asks for that.
struct Source {
    parts: Vec<SnapshotPart>,
    fails: bool,
}

impl Source {
    fn new(parts: usize, fails: bool) -> Box<Self> {
        let part = |index: usize| SnapshotPart {
            cf: (index / 2) as u32,
            pairs: vec![index as u8; 100_000].into(),
            count: 10,
        };
        Box::new(Source { parts: (0..parts).rev().map(part).collect(), fails })
    }
}

impl SnapshotSource for Source {
    fn next_part(&mut self) -> Result<Option<SnapshotPart>, SnapshotError> {
        match self.parts.pop() {
            None if self.fails => Err("the iterator failed".into()),
            part => Ok(part),
        }
    }
}

fn outcome(region: u64, outcome: SnapshotOutcome) -> Option<Event> {
    let snapshot = SentSnapshot { to_store: RECEIVER, region, to_peer: 20 };
    Some(Event::Snapshot(snapshot, outcome))
}

#[tokio::test]
async fn a_snapshot_arrives_whole_and_in_order() {
    let (routes, mut sees) = receiver(false);
    let server = Server::start(routes).await;
    let (transport, mut events, _) = sender(to(&server), CLUSTER);
    transport.send_snapshot(RECEIVER, message(5), Source::new(20, false));
    assert_eq!(soon("the head", sees.recv()).await, Some(Seen::Head { region: 5 }));
    let expected = (0..20u8).map(|i| (u32::from(i / 2), Bytes::from(vec![i; 100_000]))).collect();
    let seen = soon("the end", sees.recv()).await;
    assert_eq!(seen, Some(Seen::Finished { blocks: expected, pairs: 200 }));
    assert_eq!(soon("it", events.recv()).await, outcome(5, SnapshotOutcome::Delivered));
    server.stop().await;
}

#[tokio::test]
async fn a_snapshot_without_data_arrives_too() {
    let (routes, mut sees) = receiver(false);
    let server = Server::start(routes).await;
    let (transport, mut events, _) = sender(to(&server), CLUSTER);
    transport.send_snapshot(RECEIVER, message(5), Source::new(0, false));
    assert_eq!(soon("it", events.recv()).await, outcome(5, SnapshotOutcome::Delivered));
    assert_eq!(sees.recv().await, Some(Seen::Head { region: 5 }));
    assert_eq!(sees.recv().await, Some(Seen::Finished { blocks: vec![], pairs: 0 }));
    server.stop().await;
}

#[tokio::test]
async fn many_snapshots_at_once_each_have_one_outcome() {
    let (routes, _sees) = receiver(false);
    let server = Server::start(routes).await;
    let (transport, mut events, _) = sender(to(&server), CLUSTER);
    for region in 0..12 {
        transport.send_snapshot(RECEIVER, message(region), Source::new(3, false));
    }
    let mut delivered = Vec::new();
    for _ in 0..12 {
        match soon("an outcome", events.recv()).await {
            Some(Event::Snapshot(sent, SnapshotOutcome::Delivered)) => delivered.push(sent.region),
            other => panic!("not delivered: {other:?}"),
        }
    }
    delivered.sort_unstable();
    assert!(delivered.into_iter().eq(0..12));
    server.stop().await;
}

#[tokio::test]
async fn snapshots_for_a_store_that_cannot_be_sent_to_leave_room_for_those_of_another() {
    let (routes, _sees) = receiver(false);
    let server = Server::start(routes).await;
    let (transport, mut events, _) = sender(Resolver::Only(RECEIVER, server.address), CLUSTER);
    // More than one store may have, and enough to take every place.
    for region in 0..(MAX_CONCURRENT_SNAPSHOTS + MAX_WAITING_SNAPSHOTS) as u64 {
        transport.send_snapshot(3, message(region), Source::new(1, false));
    }
    transport.send_snapshot(RECEIVER, message(5), Source::new(3, false));
    let delivered = async {
        loop {
            match events.recv().await {
                Some(Event::Snapshot(sent, outcome)) if sent.to_store == RECEIVER => {
                    return outcome;
                }
                Some(_) => {}
                None => panic!("the transport is gone"),
            }
        }
    };
    assert_eq!(soon("an outcome", delivered).await, SnapshotOutcome::Delivered);
    server.stop().await;
}

#[tokio::test]
async fn a_source_that_fails_fails_the_snapshot_on_both_sides() {
    let (routes, mut sees) = receiver(false);
    let server = Server::start(routes).await;
    let (transport, mut events, _) = sender(to(&server), CLUSTER);
    transport.send_snapshot(RECEIVER, message(5), Source::new(3, true));
    assert_eq!(soon("it", events.recv()).await, outcome(5, SnapshotOutcome::Failed));
    assert_eq!(soon("the head", sees.recv()).await, Some(Seen::Head { region: 5 }));
    assert_eq!(soon("the end", sees.recv()).await, Some(Seen::Aborted));
    server.stop().await;
}

#[tokio::test]
async fn a_snapshot_that_is_refused_or_cannot_be_sent_has_failed() {
    let (routes, _sees) = receiver(true);
    let server = Server::start(routes).await;
    let (transport, mut events, _) = sender(to(&server), CLUSTER);
    transport.send_snapshot(RECEIVER, message(5), Source::new(50, false));
    assert_eq!(soon("it", events.recv()).await, outcome(5, SnapshotOutcome::Failed));
    server.stop().await;
    transport.send_snapshot(RECEIVER, message(6), Source::new(1, false));
    assert_eq!(soon("it", events.recv()).await, outcome(6, SnapshotOutcome::Failed));
}

/// Sends chunks as they are, right or wrong.
async fn send_chunks(server: &Server, parts: Vec<Part>) -> Result<(), Status> {
    let mut client = TransportClient::connect(server.url()).await.expect("it listens");
    let chunks = parts.into_iter().map(|part| SnapshotChunk { part: Some(part) });
    let chunks = tokio_stream::iter(chunks.collect::<Vec<_>>());
    soon("an answer", client.snapshot(chunks)).await.map(|_| ())
}

fn head(cluster_id: u64) -> Part {
    let message = Some(message(5));
    Part::Head(SnapshotHead { cluster_id, from_store: SENDER, to_store: RECEIVER, message })
}

fn block(pairs: &'static [u8], crc32: u32) -> Part {
    Part::Block(SnapshotBlock { cf: 0, pairs: pairs.into(), crc32 })
}

#[tokio::test]
async fn a_damaged_snapshot_is_refused_and_nothing_of_it_stays() {
    let (routes, mut sees) = receiver(false);
    let server = Server::start(routes).await;
    let sum = crc32fast::hash(b"pairs");
    let tail = |bytes, crc32| Part::Tail(SnapshotTail { pairs: 1, bytes, crc32 });
    let damaged = [
        ("a wrong sum of a block", vec![head(CLUSTER), block(b"pairs", sum ^ 1), tail(5, sum)]),
        ("a block that is missing", vec![head(CLUSTER), tail(5, sum)]),
        ("a wrong sum of the whole", vec![head(CLUSTER), block(b"pairs", sum), tail(5, sum ^ 1)]),
        ("no tail", vec![head(CLUSTER), block(b"pairs", sum)]),
    ];
    for (damage, parts) in damaged {
        let status = send_chunks(&server, parts).await.expect_err(damage);
        assert_eq!(status.code(), Code::DataLoss, "{damage}: {status}");
        assert_eq!(sees.recv().await, Some(Seen::Head { region: 5 }), "{damage}");
        assert_eq!(sees.recv().await, Some(Seen::Aborted), "{damage}");
    }
    let whole = vec![head(CLUSTER), block(b"pairs", sum), tail(5, sum)];
    send_chunks(&server, whole).await.expect("undamaged");
    server.stop().await;
}

#[tokio::test]
async fn a_snapshot_of_another_cluster_or_without_a_head_is_refused_before_it_begins() {
    let (routes, mut sees) = receiver(false);
    let server = Server::start(routes).await;
    let status = send_chunks(&server, vec![head(CLUSTER + 1)]).await.expect_err("another cluster");
    assert_eq!(status.code(), Code::FailedPrecondition);
    let status = send_chunks(&server, vec![block(b"", 0)]).await.expect_err("no head");
    assert_eq!(status.code(), Code::InvalidArgument);
    server.stop().await;
    assert_eq!(sees.recv().await, None, "no sink was asked for");
}
