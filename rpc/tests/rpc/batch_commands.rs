//! The `Tikv` service over a store that answers when the test lets it.

use std::sync::Arc;

use esker_model::StoreId;
use esker_rpc::procedures::{Batched as Command, BatchedReply};
use esker_rpc::proto::kvrpcpb::{
    GetRequest, RawChecksumRequest, RawGetRequest, RawGetResponse, RawPutRequest, RawScanRequest,
};
use esker_rpc::proto::tikvpb::batch_commands_request::Request;
use esker_rpc::proto::tikvpb::tikv_client::TikvClient;
use esker_rpc::proto::tikvpb::{
    BatchCommandsEmptyRequest, BatchCommandsRequest, BatchCommandsResponse,
};
use esker_rpc::server::{MAX_IN_FLIGHT_PER_STREAM, TikvService};
use esker_rpc::service::{self, Answer, Caller, Reply, StoreService, unimplemented};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::service::Routes;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};

use crate::support::{Server, soon};

/// Answers a get with its own key: at once, or, for keys that begin with `slow`, when a permit
/// comes.
struct Gated {
    open: Arc<Semaphore>,
    /// How many slow gets are being worked on.
    working: watch::Sender<usize>,
}

impl Gated {
    fn new() -> Arc<Self> {
        Arc::new(Gated { open: Arc::new(Semaphore::new(0)), working: watch::Sender::new(0) })
    }
}

/// Counts one piece of work for as long as it exists.
struct Working(watch::Sender<usize>);

impl Working {
    fn begin(count: &watch::Sender<usize>) -> Self {
        count.send_modify(|count| *count += 1);
        Working(count.clone())
    }
}

impl Drop for Working {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count -= 1);
    }
}

impl StoreService for Gated {
    fn store_id(&self) -> StoreId {
        StoreId(1)
    }

    fn handle(&self, request: service::Request, _: Caller) -> Answer {
        let request = match request {
            service::Request::RawGet(request) => request,
            // The store is stopping, whether or not the request has a task of its own.
            service::Request::RawPut(_) | service::Request::RawScan(_) => {
                return Box::pin(std::future::ready(Err(Status::unavailable("stopping"))));
            }
            other => return unimplemented(other.name()),
        };
        let working = request.key.starts_with(b"slow").then(|| Working::begin(&self.working));
        let open = Arc::clone(&self.open);
        Box::pin(async move {
            if working.is_some() {
                open.acquire().await.expect("never closed").forget();
            }
            Ok(Reply::RawGet(RawGetResponse { value: request.key, ..Default::default() }))
        })
    }
}

async fn start(store: &Arc<Gated>) -> (Server, TikvClient<Channel>) {
    let service = TikvService::new(Arc::clone(store)).into_server();
    let server = Server::start(Routes::new(service)).await;
    let client = TikvClient::connect(server.url()).await.expect("the server listens");
    (server, client)
}

type Stream = (mpsc::Sender<BatchCommandsRequest>, Streaming<BatchCommandsResponse>);

async fn open(client: &mut TikvClient<Channel>) -> Stream {
    let (requests, outgoing) = mpsc::channel(64);
    let responses = client.batch_commands(ReceiverStream::new(outgoing)).await.expect("a stream");
    (requests, responses.into_inner())
}

fn gets(keys: &[(u64, &'static str)]) -> BatchCommandsRequest {
    let get = |key: &'static str| RawGetRequest { key: key.into(), ..Default::default() };
    BatchCommandsRequest {
        requests: keys
            .iter()
            .map(|(_, key)| Request { cmd: Some(Command::RawGet(get(key))) })
            .collect(),
        request_ids: keys.iter().map(|(id, _)| *id).collect(),
        ..Default::default()
    }
}

/// Reads until so many responses have come.
async fn read(stream: &mut Stream, count: usize) -> Vec<(u64, Option<BatchedReply>)> {
    let mut responses = Vec::new();
    while responses.len() < count {
        let batch = soon("responses", stream.1.message()).await.expect("no error").expect("open");
        assert_eq!(batch.responses.len(), batch.request_ids.len());
        responses
            .extend(batch.request_ids.into_iter().zip(batch.responses.into_iter().map(|r| r.cmd)));
    }
    responses
}

fn value(reply: &Option<BatchedReply>) -> &[u8] {
    match reply {
        Some(BatchedReply::RawGet(response)) => &response.value,
        other => panic!("not the answer to a get: {other:?}"),
    }
}

#[tokio::test]
async fn responses_come_in_the_order_in_which_the_work_ends_and_name_what_they_answer() {
    let store = Gated::new();
    let (server, mut client) = start(&store).await;
    let mut stream = open(&mut client).await;
    stream.0.send(gets(&[(7, "slow"), (3, "b"), (9, "c")])).await.expect("open");
    let mut first = read(&mut stream, 2).await;
    first.sort_by_key(|(id, _)| *id);
    assert_eq!((first[0].0, value(&first[0].1)), (3, &b"b"[..]));
    assert_eq!((first[1].0, value(&first[1].1)), (9, &b"c"[..]));
    store.open.add_permits(1);
    let last = read(&mut stream, 1).await;
    assert_eq!((last[0].0, value(&last[0].1)), (7, &b"slow"[..]));
    server.stop().await;
}

#[tokio::test]
async fn a_client_that_hangs_up_drops_the_work_of_its_stream() {
    let store = Gated::new();
    let (server, mut client) = start(&store).await;
    let mut working = store.working.subscribe();
    let stream = open(&mut client).await;
    stream.0.send(gets(&[(1, "slow"), (2, "slow")])).await.expect("open");
    soon("both are begun", working.wait_for(|count| *count == 2)).await.expect("alive");
    drop(stream);
    soon("both are dropped", working.wait_for(|count| *count == 0)).await.expect("alive");
    server.stop().await;
}

#[tokio::test]
async fn a_client_that_gives_up_a_single_call_drops_its_work() {
    let store = Gated::new();
    let (server, mut client) = start(&store).await;
    let mut working = store.working.subscribe();
    let request = RawGetRequest { key: "slow".into(), ..Default::default() };
    let call = tokio::spawn(async move { client.raw_get(request).await });
    soon("it is begun", working.wait_for(|count| *count == 1)).await.expect("alive");
    call.abort();
    soon("it is dropped", working.wait_for(|count| *count == 0)).await.expect("alive");
    server.stop().await;
}

#[tokio::test]
async fn work_that_is_unfinished_when_the_client_stops_sending_is_still_answered() {
    let store = Gated::new();
    let (server, mut client) = start(&store).await;
    let mut working = store.working.subscribe();
    let mut stream = open(&mut client).await;
    stream.0.send(gets(&[(1, "slow")])).await.expect("open");
    soon("it is begun", working.wait_for(|count| *count == 1)).await.expect("alive");
    let (closed, _) = mpsc::channel(1);
    drop(std::mem::replace(&mut stream.0, closed));
    store.open.add_permits(1);
    assert_eq!(read(&mut stream, 1).await[0].0, 1);
    assert!(soon("the end", stream.1.message()).await.expect("no error").is_none());
    server.stop().await;
}

#[tokio::test]
async fn a_stream_with_too_much_unfinished_work_is_not_read() {
    const BATCH: usize = 64;
    let store = Gated::new();
    let (server, mut client) = start(&store).await;
    let mut working = store.working.subscribe();
    let mut stream = open(&mut client).await;
    let total = MAX_IN_FLIGHT_PER_STREAM * 2;
    let requests = stream.0.clone();
    let sending = tokio::spawn(async move {
        for first in (0..total as u64).step_by(BATCH) {
            let keys: Vec<_> = (first..first + BATCH as u64).map(|id| (id, "slow")).collect();
            requests.send(gets(&keys)).await.expect("open");
        }
    });
    let bound = MAX_IN_FLIGHT_PER_STREAM;
    soon("the bound is reached", working.wait_for(|count| *count >= bound)).await.expect("alive");
    // Other calls on the connection go on. They take long enough for the server to read more of the
    // stream, if there were no bound.
    for _ in 0..100 {
        let request = RawGetRequest { key: "fast".into(), ..Default::default() };
        soon("another call", client.raw_get(request)).await.expect("answered");
        assert!(*working.borrow() < bound + BATCH, "{} are unfinished", *working.borrow());
    }
    store.open.add_permits(total);
    let mut ids: Vec<u64> = read(&mut stream, total).await.into_iter().map(|(id, _)| id).collect();
    ids.sort_unstable();
    assert!(ids.into_iter().eq(0..total as u64), "every request is answered once");
    sending.await.expect("all was sent");
    server.stop().await;
}

#[tokio::test]
async fn a_message_of_more_requests_than_the_bound_is_begun_as_earlier_ones_are_answered() {
    let store = Gated::new();
    let (server, mut client) = start(&store).await;
    let mut working = store.working.subscribe();
    let mut stream = open(&mut client).await;
    let bound = MAX_IN_FLIGHT_PER_STREAM;
    let total = bound * 2 + 1;
    let all: Vec<_> = (0..total as u64).map(|id| (id, "slow")).collect();
    stream.0.send(gets(&all)).await.expect("open");
    // The rest of the message is answered after the client has ended its half, too.
    let (closed, _) = mpsc::channel(1);
    drop(std::mem::replace(&mut stream.0, closed));
    soon("the bound is reached", working.wait_for(|count| *count >= bound)).await.expect("alive");
    for _ in 0..100 {
        let request = RawGetRequest { key: "fast".into(), ..Default::default() };
        soon("another call", client.raw_get(request)).await.expect("answered");
        assert_eq!(*working.borrow(), bound);
    }
    // One answer makes room for one request, and is not held up by those that wait.
    store.open.add_permits(1);
    let mut responses = read(&mut stream, 1).await;
    soon("the room is used", working.wait_for(|count| *count == bound)).await.expect("alive");
    store.open.add_permits(total - 1);
    responses.extend(read(&mut stream, total - 1).await);
    let mut ids: Vec<u64> = responses.into_iter().map(|(id, _)| id).collect();
    ids.sort_unstable();
    assert!(ids.into_iter().eq(0..total as u64), "every request is answered once");
    assert!(soon("the end", stream.1.message()).await.expect("no error").is_none());
    server.stop().await;
}

#[tokio::test]
async fn when_a_stream_ends_with_an_error_the_requests_that_wait_are_not_begun() {
    let store = Gated::new();
    let (server, mut client) = start(&store).await;
    let mut stream = open(&mut client).await;
    let mut all: Vec<_> = (0..2 * MAX_IN_FLIGHT_PER_STREAM as u64).map(|id| (id, "slow")).collect();
    all[0].1 = "fast";
    let mut batch = gets(&all);
    batch.requests[1].cmd = Some(Command::RawPut(RawPutRequest::default()));
    stream.0.send(batch).await.expect("open");
    // The answer that was ready leaves first. The error comes after the next look at the work.
    assert_eq!(value(&read(&mut stream, 1).await[0].1), b"fast");
    let status = soon("an error", stream.1.message()).await.expect_err("the store stops");
    assert_eq!(status.code(), Code::Unavailable);
    assert_eq!(*store.working.borrow(), 0, "what was unfinished is dropped");
    server.stop().await;
}

#[tokio::test]
async fn a_command_that_the_store_does_not_serve_is_refused_and_harms_no_other() {
    let store = Gated::new();
    let (server, mut client) = start(&store).await;
    let mut stream = open(&mut client).await;
    let mut batch = gets(&[(1, "a"), (2, "b"), (3, "c"), (4, "d")]);
    batch.requests[1].cmd = None;
    batch.requests[2].cmd = Some(Command::Get(GetRequest::default()));
    let empty = BatchCommandsEmptyRequest { test_id: 42, delay_time: 1 };
    batch.requests[3].cmd = Some(Command::Empty(empty));
    stream.0.send(batch).await.expect("open");
    let mut responses = read(&mut stream, 4).await;
    responses.sort_by_key(|(id, _)| *id);
    assert_eq!(value(&responses[0].1), b"a");
    // This version does not know the command at all.
    assert_eq!(responses[1], (2, None));
    let Some(BatchedReply::Get(refused)) = &responses[2].1 else { panic!("{:?}", responses[2]) };
    let error = refused.region_error.as_ref().expect("a refusal");
    assert!(error.raft_entry_too_large.is_some() && !refused.not_found, "{error:?}");
    assert!(matches!(&responses[3].1, Some(BatchedReply::Empty(reply)) if reply.test_id == 42));
    server.stop().await;
}

#[tokio::test]
async fn a_batch_whose_ids_do_not_match_its_requests_ends_the_stream_with_the_reason() {
    let store = Gated::new();
    let (server, mut client) = start(&store).await;
    let mut stream = open(&mut client).await;
    let mut batch = gets(&[(1, "a"), (2, "b")]);
    batch.request_ids.pop();
    stream.0.send(batch).await.expect("open");
    let status = soon("an error", stream.1.message()).await.expect_err("refused");
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().contains("2 requests came with 1 ids"), "{}", status.message());
    server.stop().await;
}

#[tokio::test]
async fn what_a_store_does_not_serve_is_unimplemented() {
    let store = Gated::new();
    let (server, mut client) = start(&store).await;
    let get = client.kv_get(GetRequest::default()).await.expect_err("not served");
    assert_eq!(get.code(), Code::Unimplemented);
    let sum = client.raw_checksum(RawChecksumRequest::default()).await.expect_err("not served");
    assert_eq!(sum.code(), Code::Unimplemented);
    assert!(sum.message().contains("RawChecksum"), "{}", sum.message());
    server.stop().await;
}

#[tokio::test]
async fn a_store_that_stops_ends_the_stream_so_that_its_client_turns_elsewhere() {
    let store = Gated::new();
    let (server, mut client) = start(&store).await;
    let commands =
        [Command::RawPut(RawPutRequest::default()), Command::RawScan(RawScanRequest::default())];
    for command in commands {
        let mut stream = open(&mut client).await;
        let mut batch = gets(&[(1, "slow"), (2, "b")]);
        batch.requests[1].cmd = Some(command);
        stream.0.send(batch).await.expect("open");
        let status = soon("an error", stream.1.message()).await.expect_err("it stops");
        assert_eq!(status.code(), Code::Unavailable);
        assert_eq!(*store.working.borrow(), 0, "what was unfinished is dropped");
    }
    server.stop().await;
}
