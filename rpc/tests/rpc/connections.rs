//! Idle connections on a port, and clients that work beside them.

use std::time::{Duration, Instant};

use axum::routing::get;
use esker_rpc::proto::kvrpcpb::RawGetRequest;
use esker_rpc::proto::tikvpb::tikv_client::TikvClient;
use esker_rpc::server::{ConnectionLimits, listen};
use futures_util::future::join_all;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use crate::support::{Server, echo, soon};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const EMPTY_SETTINGS: &[u8] = &[0, 0, 0, 4, 0, 0, 0, 0, 0];

async fn server(limits: ConnectionLimits) -> Server {
    let http = axum::Router::new().route("/status", get(|| async { "all is well" }));
    let listener = listen("127.0.0.1:0").await.expect("a free port");
    Server::start_limited(listener, limits, echo(), http)
}

async fn says(server: &Server, bytes: &[u8]) -> TcpStream {
    let mut socket = TcpStream::connect(server.address).await.expect("it listens");
    socket.write_all(bytes).await.expect("sent");
    socket
}

/// Reads until the server ends the connection.
async fn is_dropped(what: &str, mut socket: TcpStream) {
    let mut rest = Vec::new();
    // A reset is as good as an end.
    let _ = soon(what, socket.read_to_end(&mut rest)).await;
}

#[tokio::test]
async fn who_says_nothing_or_half_a_greeting_is_dropped_and_who_greets_stays() {
    let limits = ConnectionLimits {
        greeting: Duration::from_millis(500),
        http1_idle: Duration::from_millis(500),
        ..ConnectionLimits::default()
    };
    let server = server(limits).await;
    let mut greeted = says(&server, &[PREFACE, EMPTY_SETTINGS].concat()).await;
    let neighbours = [
        ("silence", &b""[..]),
        ("half a preface", &PREFACE[..9]),
        ("no SETTINGS", PREFACE),
        ("half of SETTINGS", &[PREFACE, &EMPTY_SETTINGS[..4]].concat()),
        ("half a head", b"GET /status HTTP/1.1\r\nHost: x\r\n"),
        ("an idle page", b"GET /status HTTP/1.1\r\nHost: x\r\n\r\n"),
        (
            "a body that never comes",
            b"GET /status HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n",
        ),
    ];
    for (what, bytes) in neighbours {
        is_dropped(what, says(&server, bytes).await).await;
    }
    // An HTTP/2 connection outlives all of them, because it answers pings.
    let ping = [&[0, 0, 8, 6, 0, 0, 0, 0, 0][..], b"are you?"].concat();
    greeted.write_all(&ping).await.expect("it is open");
    let mut heard = Vec::new();
    while !heard.windows(8).any(|window| window == b"are you?") {
        let more = soon("an answer to a ping", greeted.read_buf(&mut heard)).await;
        assert!(more.expect("it is open") > 0, "the connection ended");
    }
    drop(greeted);
    server.stop().await;
}

#[tokio::test]
async fn neighbours_who_fill_the_port_lock_nobody_out() {
    let limits = ConnectionLimits { connections: 8, ..ConnectionLimits::default() };
    let server = server(limits).await;
    let mut working = TikvClient::connect(server.url()).await.expect("it listens");
    let (_requests, outgoing) = mpsc::channel(1);
    let mut stream =
        working.batch_commands(ReceiverStream::new(outgoing)).await.expect("a stream").into_inner();
    let mut neighbours = Vec::new();
    for _ in 0..50 {
        neighbours.push(says(&server, &[PREFACE, EMPTY_SETTINGS].concat()).await);
    }
    // A client that connects now is let in, too.
    let mut late = TikvClient::connect(server.url()).await.expect("it listens");
    soon("an answer", late.raw_get(RawGetRequest::default())).await.expect("answered");
    is_dropped("the first neighbour gives way", neighbours.remove(0)).await;
    // The client that has a stream open was never disturbed.
    soon("an answer", working.raw_get(RawGetRequest::default())).await.expect("answered");
    let still_open = tokio::select! {
        biased;
        ended = stream.message() => format!("{ended:?}"),
        () = tokio::task::yield_now() => String::new(),
    };
    assert_eq!(still_open, "");
    drop(neighbours);
    server.stop().await;
}

#[tokio::test]
async fn when_all_connections_have_calls_open_the_next_is_refused_at_once() {
    let limits = ConnectionLimits { connections: 2, ..ConnectionLimits::default() };
    let server = server(limits).await;
    let mut open = Vec::new();
    for _ in 0..2 {
        let mut client = TikvClient::connect(server.url()).await.expect("it listens");
        let (requests, outgoing) = mpsc::channel(1);
        let stream = client.batch_commands(ReceiverStream::new(outgoing)).await.expect("a stream");
        open.push((requests, stream));
    }
    is_dropped("the third is refused", says(&server, PREFACE).await).await;
    // The streams end, and so there is room.
    open.clear();
    let mut late = TikvClient::connect(server.url()).await.expect("it listens");
    soon("an answer", late.raw_get(RawGetRequest::default())).await.expect("answered");
    server.stop().await;
}

#[tokio::test]
async fn a_burst_of_connections_does_not_wait() {
    const BURST: usize = 1500;
    /// A connection request that is lost is repeated after a second, by the system.
    const NO_STALL: Duration = Duration::from_millis(900);
    // The server does not accept, so connections stay in the queue.
    let listener: TcpListener = listen("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("it is bound");
    let started = Instant::now();
    let sockets = join_all((0..BURST).map(|_| TcpStream::connect(address))).await;
    let took = started.elapsed();
    assert!(sockets.iter().all(Result::is_ok), "some were refused");
    assert!(took < NO_STALL, "{BURST} connections took {took:?}");
}
