//! A node's port as its neighbours see it: which connections get in, which are dropped, and whether
//! the node reports that it serves.

mod common;

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::{Duration, Instant};

use common::eventually;
use common::http::metric;
use common::load::Load;
use common::operator::Operator;
use common::process::{PATIENCE, Process, free_address};
use esker::Node;
use esker::node::Roles;
use esker_rpc::proto::grpc::health::v1::HealthCheckRequest;
use esker_rpc::proto::grpc::health::v1::health_check_response::ServingStatus;
use esker_rpc::proto::grpc::health::v1::health_client::HealthClient;
use futures_util::future::join_all;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tonic::Code;
use tonic::transport::Channel;

/// The longest that a client waits.
const AT_ONCE: Duration = Duration::from_secs(1);

/// Neighbours of one node, unless the environment sets another number.
const NEIGHBOURS: usize = 3000;
const NEIGHBOURS_VARIABLE: &str = "ESKER_NEIGHBOURS";

/// How many neighbours connect at the same moment.
const AT_A_TIME: usize = 500;

const WRITERS: u64 = 8;
const SOME_WRITES: u64 = 500;

/// Values that together are larger than the node's memtable.
const LARGE_VALUES: usize = 64;
const LARGE_VALUE: usize = 64 << 10;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const EMPTY_SETTINGS: &[u8] = &[0, 0, 0, 4, 0, 0, 0, 0, 0];
const FRAME_HEADER: usize = 9;
const SETTINGS: u8 = 4;
const PING: u8 = 6;

/// What a neighbour sends before it becomes idle.
#[derive(Clone, Copy, Debug)]
enum Manner {
    Silent,
    HalfPreface,
    NoSettings,
    HalfHead,
    OnePage,
    Greets,
    GreetsAndAnswersPings,
}

impl Manner {
    const ALL: [Manner; 7] = [
        Manner::Silent,
        Manner::HalfPreface,
        Manner::NoSettings,
        Manner::HalfHead,
        Manner::OnePage,
        Manner::Greets,
        Manner::GreetsAndAnswersPings,
    ];

    fn words(self) -> Vec<u8> {
        match self {
            Manner::Silent => Vec::new(),
            Manner::HalfPreface => PREFACE[..10].to_vec(),
            Manner::NoSettings => PREFACE.to_vec(),
            Manner::HalfHead => b"GET /status HTTP/1.1\r\nHost:".to_vec(),
            Manner::OnePage => b"GET /status HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(),
            Manner::Greets | Manner::GreetsAndAnswersPings => [PREFACE, EMPTY_SETTINGS].concat(),
        }
    }
}

/// A connection that is open on this side, even if the node has dropped it.
enum Neighbour {
    Still(#[expect(dead_code, reason = "held open")] TcpStream),
    Answering(JoinHandle<()>),
}

impl Drop for Neighbour {
    fn drop(&mut self) {
        if let Neighbour::Answering(task) = self {
            task.abort();
        }
    }
}

/// Connects the `number`th neighbour. Also returns how long that took.
async fn settle(address: SocketAddr, number: usize) -> (Duration, Neighbour) {
    let manner = Manner::ALL[number % Manner::ALL.len()];
    let socket = TcpSocket::new_v4().expect("a socket");
    if cfg!(target_os = "linux") {
        // All of loopback is ours, and each address has its own ports.
        let source = Ipv4Addr::new(127, 0, 1, (number % 8) as u8 + 1);
        socket.bind((source, 0).into()).expect("a free port");
    }
    let started = Instant::now();
    let mut stream = socket.connect(address).await.expect("the node listens");
    let took = started.elapsed();
    // The node may have dropped the connection already, in favour of another.
    let _ = stream.write_all(&manner.words()).await;
    let neighbour = match manner {
        Manner::GreetsAndAnswersPings => Neighbour::Answering(tokio::spawn(answer(stream))),
        _ => Neighbour::Still(stream),
    };
    (took, neighbour)
}

/// Answers the least that HTTP/2 requires of a client.
async fn answer(mut stream: TcpStream) {
    const ACK: u8 = 1;
    let mut header = [0; FRAME_HEADER];
    while stream.read_exact(&mut header).await.is_ok() {
        let length = u32::from_be_bytes([0, header[0], header[1], header[2]]);
        let mut payload = vec![0; length as usize];
        if stream.read_exact(&mut payload).await.is_err() {
            return;
        }
        let reply = match (header[3], header[4]) {
            (SETTINGS, 0) => [0, 0, 0, SETTINGS, ACK, 0, 0, 0, 0].to_vec(),
            (PING, 0) => [&[0, 0, 8, PING, ACK, 0, 0, 0, 0][..], &payload].concat(),
            _ => continue,
        };
        if stream.write_all(&reply).await.is_err() {
            return;
        }
    }
}

fn tables(data_dir: &Path) -> usize {
    let files = std::fs::read_dir(data_dir.join("store/kv")).expect("the store is there");
    let is_table = |name: &std::ffi::OsStr| Path::new(name).extension().is_some_and(|e| e == "sst");
    files.filter(|file| is_table(&file.as_ref().expect("an entry").file_name())).count()
}

/// Starts a new client and makes its first call. Returns how long both take.
async fn newcomer(address: &str) -> Duration {
    let started = Instant::now();
    let answer = timeout(PATIENCE, async {
        let mut client = HealthClient::connect(format!("http://{address}")).await?;
        let answer = client.check(HealthCheckRequest::default()).await?;
        Ok::<_, Box<dyn std::error::Error>>(answer.into_inner().status())
    });
    let status = answer.await.expect("an answer").expect("a newcomer is let in");
    assert_eq!(status, ServingStatus::Serving);
    started.elapsed()
}

/// Raises this process's limit of descriptors, which this side needs, too. Returns the number of
/// neighbours that are possible.
fn make_room_for(neighbours: usize) -> usize {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    const OTHERS: u64 = 500;
    let wanted = neighbours as u64 + OTHERS;
    let have = getrlimit(Resource::Nofile);
    let maximum = have.maximum.map(|maximum| maximum.max(wanted));
    for maximum in [maximum, have.maximum] {
        let limit = Rlimit { current: Some(wanted.min(maximum.unwrap_or(wanted))), maximum };
        if setrlimit(Resource::Nofile, limit).is_ok() {
            break;
        }
    }
    let got = getrlimit(Resource::Nofile).current.unwrap_or(wanted);
    neighbours.min(got.saturating_sub(OTHERS) as usize)
}

#[tokio::test(flavor = "multi_thread")]
async fn thousands_of_idle_neighbours_cost_no_client_its_time_and_the_store_no_file() {
    let asked =
        std::env::var(NEIGHBOURS_VARIABLE).ok().map(|count| count.parse().expect("a number"));
    let neighbours = make_room_for(asked.unwrap_or(NEIGHBOURS));
    // A soft limit of 1,024 is the usual one after a login, and the node raises it. By default the
    // hard limit is low as well, so that fewer neighbours suffice to fill the port.
    let limits = if asked.is_some() { "-Sn 1024" } else { "-Sn 1024 && ulimit -Hn 2048" };
    let root = tempfile::tempdir().expect("a temporary directory");
    let data_dir = root.path().join("data");
    let settings = root.path().join("settings");
    std::fs::write(&settings, "write-buffer-mib = 1\n").expect("written");
    let address = free_address();
    let text = |path: &Path| path.to_str().expect("a plain name").to_owned();
    let (data, config) = (text(&data_dir), text(&settings));
    let start = ["start", "--data-dir", &data, "--listen", &address, "--join", &address];
    let mut node = Process::spawn_limited(limits, &[&start[..], &["--config", &config]].concat());
    node.line_after("ready: node at ").await;
    let operator = Operator::connect(std::slice::from_ref(&address)).await;
    operator.whole(1, PATIENCE).await;
    let flushed = tables(&data_dir);

    let load = Load::start(operator.kv(), WRITERS);
    load.acknowledges(SOME_WRITES).await;
    let target: SocketAddr = address.parse().expect("an address");
    let (mut settled, mut longest) = (Vec::new(), Duration::ZERO);
    let mut newcomers = Duration::ZERO;
    while settled.len() < neighbours {
        let numbers = settled.len()..neighbours.min(settled.len() + AT_A_TIME);
        for (took, neighbour) in join_all(numbers.map(|number| settle(target, number))).await {
            longest = longest.max(took);
            settled.push(neighbour);
        }
        newcomers = newcomers.max(newcomer(&address).await);
    }
    let writes = (0..LARGE_VALUES)
        .map(|number| operator.kv().put(format!("large/{number}"), vec![b'v'; LARGE_VALUE]));
    for written in join_all(writes).await {
        written.expect("large values are written");
    }
    eventually("the engine flushes", PATIENCE, async || match tables(&data_dir) {
        tables if tables > flushed => Ok(()),
        tables => Err(format!("{tables} tables")),
    })
    .await;
    load.acknowledges(SOME_WRITES).await;
    newcomers = newcomers.max(newcomer(&address).await);
    let outcome = load.stop().await;
    let open = metric(&address, "esker_connections_open").await.expect("it is counted");
    println!(
        "{} neighbours, {open} connections open; the slowest connection took {longest:?}, newcomer \
         {newcomers:?}, write {:?} of {}",
        settled.len(),
        outcome.longest,
        outcome.acknowledged
    );
    assert_eq!(outcome.errors, [""; 0], "an error reached a writer");
    assert!(node.is_running(), "the node ended: {}", node.log());
    for (what, took) in
        [("a connection", longest), ("a newcomer", newcomers), ("a write", outcome.longest)]
    {
        assert!(took <= AT_ONCE, "{what} took {took:?}");
    }
    outcome.assert_kept(operator.kv()).await;
    let log = node.log();
    assert!(log.contains("open files") && log.contains("before=1024"), "{log}");
    drop(settled);
    node.kill().await;
}

#[tokio::test]
async fn a_limit_that_is_too_low_for_a_node_is_refused_in_one_line() {
    let root = tempfile::tempdir().expect("a temporary directory");
    let data = root.path().join("data");
    let address = free_address();
    let data_dir = data.to_str().expect("a plain name");
    let start = ["start", "--data-dir", data_dir, "--listen", &address, "--join", &address];
    let mut node = Process::spawn_limited("-n 64", &start);
    eventually("it ends", PATIENCE, async || match node.is_running() {
        true => Err("it runs".to_owned()),
        false => Ok(()),
    })
    .await;
    eventually("it says why", PATIENCE, async || {
        let log = node.log();
        match log.contains("error: this process may have 64 open files, but needs") {
            true => Ok(()),
            false => Err(log),
        }
    })
    .await;
    assert!(!data.exists(), "something was made");
}

async fn health(address: &str) -> HealthClient<Channel> {
    eventually("the port is open", PATIENCE, async || {
        HealthClient::connect(format!("http://{address}")).await.map_err(|error| error.to_string())
    })
    .await
}

async fn check(client: &mut HealthClient<Channel>, service: &str) -> Result<ServingStatus, Code> {
    let request = HealthCheckRequest { service: service.to_owned() };
    let answer = client.check(request).await.map_err(|status| status.code())?;
    Ok(answer.into_inner().status())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_says_that_it_serves_from_when_its_store_is_ready_until_it_stops() {
    let root = tempfile::tempdir().expect("a temporary directory");
    let (address, placement) = (free_address(), free_address());
    let only = |placement, store| Roles { placement, store };
    let builder = Node::builder()
        .data_dir(root.path().join("store"))
        .listen(&address)
        .join([placement.clone()])
        .roles(only(false, true));
    let starting = tokio::spawn(builder.start());

    // The node's placement driver does not run.
    let mut client = health(&address).await;
    for service in ["", "tikvpb.Tikv"] {
        assert_eq!(check(&mut client, service).await, Ok(ServingStatus::NotServing), "{service}");
    }
    for service in ["pdpb.PD", "nonsense"] {
        assert_eq!(check(&mut client, service).await, Err(Code::NotFound), "{service}");
    }
    let watch = |service: &str| HealthCheckRequest { service: service.to_owned() };
    let mut unknown = client.watch(watch("nonsense")).await.expect("a stream").into_inner();
    let first = unknown.message().await.expect("open").expect("a first message");
    assert_eq!(first.status(), ServingStatus::ServiceUnknown);
    let mut watcher = client.watch(watch("")).await.expect("a stream").into_inner();
    let mut next = async || {
        let message = timeout(PATIENCE, watcher.message()).await.expect("a message in time");
        message.expect("the stream is open").expect("there is more to say").status()
    };
    assert_eq!(next().await, ServingStatus::NotServing);

    let driver = Node::builder()
        .data_dir(root.path().join("placement"))
        .listen(&placement)
        .join([placement.clone()])
        .roles(only(true, false));
    let driver = driver.start().await.expect("placement starts");
    let node = starting.await.expect("no panic").expect("the store starts");
    assert_eq!(next().await, ServingStatus::Serving);
    assert_eq!(check(&mut client, "tikvpb.Tikv").await, Ok(ServingStatus::Serving));
    let mut of_driver = health(&placement).await;
    for service in ["", "pdpb.PD"] {
        assert_eq!(check(&mut of_driver, service).await, Ok(ServingStatus::Serving), "{service}");
    }
    assert_eq!(check(&mut of_driver, "tikvpb.Tikv").await, Err(Code::NotFound));

    let (last, ()) = tokio::join!(next(), node.stop());
    assert_eq!(last, ServingStatus::NotServing);
    driver.stop().await;
}
