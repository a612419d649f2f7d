//! Wrong input is refused with a sentence, and nothing else happens.

mod common;

use std::net::TcpListener;
use std::path::Path;

use bytes::Bytes;
use common::eventually;
use common::operator::Operator;
use common::process::{Finished, PATIENCE, Process, free_address, run, run_with};
use esker::{Cluster, ClusterOptions};
use esker_client::RegionInfo;
use esker_rpc::proto::kvrpcpb::{
    ApiVersion, Context, KeyRange, KvPair, RawBatchDeleteRequest, RawBatchGetRequest,
    RawBatchPutRequest, RawBatchScanRequest, RawCasRequest, RawChecksumRequest,
    RawDeleteRangeRequest, RawDeleteRequest, RawGetKeyTtlRequest, RawGetRequest, RawPutRequest,
    RawPutResponse, RawScanRequest, SplitRegionRequest,
};
use esker_rpc::proto::metapb::RegionEpoch;
use esker_rpc::proto::tikvpb::batch_commands_request::Request;
use esker_rpc::proto::tikvpb::batch_commands_response::response::Cmd as Reply;
use esker_rpc::proto::tikvpb::tikv_client::TikvClient;
use esker_rpc::proto::tikvpb::{BatchCommandsRequest, batch_commands_request};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;
use tonic::transport::Channel;

/// The longest key, and the largest entry of the log.
const MAX_KEY: usize = 8 << 10;
const MAX_ENTRY: usize = 8 << 20;

/// Clients that hang up, one after another, and the requests that each leaves behind.
const HANG_UPS: u64 = 20;
const REQUESTS_LEFT_BEHIND: u64 = 200;

/// Checks that a command was refused, with a single sentence if the status is 1. Returns the
/// sentence.
fn refused(finished: &Finished, status: i32) -> String {
    assert_eq!(finished.status.code(), Some(status), "{finished:?}");
    assert_eq!(finished.output, "", "something was printed");
    let mut lines = finished.errors.lines();
    let sentence = lines.next().and_then(|line| line.strip_prefix("error: "));
    let sentence = sentence.unwrap_or_else(|| panic!("no error is named: {finished:?}"));
    // After wrong usage, more lines show how to get help.
    if status == 1 {
        assert_eq!(lines.next(), None, "one line is enough: {finished:?}");
    }
    sentence.to_owned()
}

/// Runs a command that must be refused with a sentence that has all these parts.
async fn is_refused(arguments: &[&str], status: i32, parts: &[&str]) {
    let sentence = refused(&run(arguments).await, status);
    for part in parts {
        assert!(sentence.contains(part), "`{part}` is not in: {sentence}");
    }
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a temporary directory has a plain name")
}

fn entries(path: &Path) -> usize {
    std::fs::read_dir(path).expect("the directory can be read").count()
}

async fn starts_not(data_dir: &Path, listen: &str, status: i32, parts: &[&str]) {
    let arguments = ["start", "--data-dir", text(data_dir), "--listen", listen, "--join", listen];
    is_refused(&arguments, status, parts).await;
}

#[tokio::test]
async fn a_malformed_address_is_refused_and_nothing_is_created() {
    let root = tempfile::tempdir().expect("a temporary directory");
    let data_dir = root.path().join("data");
    for (address, fault) in [
        ("nonsense", "port is missing"),
        ("http://127.0.0.1:2379", "leave out the scheme"),
        ("127.0.0.1:0", "is not a port"),
        ("127.0.0.1:65536", "is not a port"),
        (":2379", "host is missing"),
    ] {
        starts_not(&data_dir, address, 2, &[address, fault]).await;
        is_refused(&["kv", "get", "a", "--placement", address], 2, &[address, fault]).await;
    }
    let join = ["start", "--data-dir", text(&data_dir), "--listen", "127.0.0.1:1", "--join", "a,b"];
    is_refused(&join, 2, &["port is missing"]).await;
    assert!(!data_dir.exists(), "a data directory was created");
}

#[tokio::test]
async fn addresses_that_no_other_node_could_use_are_refused_and_nothing_is_created() {
    let root = tempfile::tempdir().expect("a temporary directory");
    let data_dir = root.path().join("data");
    let address = free_address();
    let port = address.rsplit(':').next().expect("an address has a port");
    let start = |listen: &str, join: &str, rest: &[&str]| {
        let words = ["start", "--data-dir", text(&data_dir), "--listen", listen, "--join", join];
        words.iter().chain(rest).map(ToString::to_string).collect::<Vec<_>>()
    };
    let at = |host: &str| format!("{host}:{port}");
    let everywhere = [at("0.0.0.0"), at("[::]")];
    let (localhost, ipv6) = (at("localhost"), at("[::1]"));
    let list = |hosts: &[&str]| hosts.iter().map(|host| at(host)).collect::<Vec<_>>().join(",");
    let mut cases = vec![
        (start(&localhost, &address, &[]), vec![localhost.clone(), address.clone()]),
        (start(&at("LOCALHOST."), &address, &[]), vec![localhost.clone(), address.clone()]),
        (start(&address, &localhost, &[]), vec![localhost.clone(), address.clone()]),
        (start(&address, &ipv6, &[]), vec![ipv6.clone(), address.clone()]),
        (start(&address, &list(&["a", "A.", "b"]), &[]), vec![at("a"), "twice".into()]),
        (
            start(&address, &format!("{address},{localhost},127.0.0.1:1"), &[]),
            vec![localhost.clone(), address.clone()],
        ),
        (start(&address, &address, &["--roles", "store"]), vec![address.clone(), "--roles".into()]),
        (start(&address, &everywhere[0], &[]), vec!["--join".into(), everywhere[0].clone()]),
        (start(&address, "224.0.0.1:1", &[]), vec!["--join 224.0.0.1:1".into()]),
    ];
    for listen in &everywhere {
        cases.push((start(listen, listen, &[]), vec![listen.clone(), "--advertise".into()]));
        cases.push((
            start(&address, &address, &["--advertise", listen]),
            vec!["--advertise".into(), listen.clone()],
        ));
    }
    for members in [2, 4, 6] {
        let join = list(&["127.0.0.1", "b", "c", "d", "e", "f"][..members]);
        let counted = format!("lists {members} placement members");
        cases.push((start(&address, &join, &[]), vec![counted, "1, 3 or 5".into()]));
    }
    for (command, parts) in cases {
        let command: Vec<_> = command.iter().map(String::as_str).collect();
        let parts: Vec<_> = parts.iter().map(String::as_str).collect();
        is_refused(&command, 1, &parts).await;
        assert!(!data_dir.exists(), "{command:?} created a data directory");
    }
}

#[tokio::test]
async fn a_setting_out_of_its_range_is_refused_and_nothing_is_created() {
    let root = tempfile::tempdir().expect("a temporary directory");
    let (data_dir, file) = (root.path().join("data"), root.path().join("esker.toml"));
    let address = free_address();
    let command = [
        "start",
        "--data-dir",
        text(&data_dir),
        "--listen",
        &address,
        "--join",
        &address,
        "--config",
        text(&file),
    ];
    for (setting, range) in [
        ("schedule-interval-ms = 0", "from 10 to 3600000"),
        ("block-cache-mib = 1152921504606846976", "from 1 to 1048576"),
        ("workers = 10000", "from 1 to 64"),
        ("workers = -1", "from 1 to 64"),
        ("election-timeout-ms = \"1s\"", "from 100 to 60000"),
    ] {
        std::fs::write(&file, setting).expect("the directory can be written");
        is_refused(&command, 1, &[text(&file), "line 1", setting, range]).await;
    }
    std::fs::remove_file(&file).expect("it was written");
    is_refused(&command, 1, &[text(&file), "No such file"]).await;
    assert!(!data_dir.exists(), "a data directory was created");

    let config = esker::node::NodeConfig { heartbeat_interval_ms: Some(0), ..Default::default() };
    let options = ClusterOptions { config, data_dir: Some(data_dir.clone()), ..Default::default() };
    let refused = Cluster::start(options).await.err().expect("an interval of nothing").to_string();
    assert!(refused.contains("heartbeat-interval-ms = 0"), "{refused}");
    for (stores, placements) in [(0, 1), (33, 1), (3, 0), (3, 2), (2, 3), (4, 4), (3, 5)] {
        let data_dir = Some(data_dir.clone());
        let options = ClusterOptions { stores, placements, data_dir, ..Default::default() };
        assert!(Cluster::start(options).await.is_err(), "{placements} on {stores}");
    }
    assert!(!data_dir.exists(), "a data directory was created");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_of_another_number_of_stores_says_so_at_once() {
    let root = tempfile::tempdir().expect("a temporary directory");
    let data_dir = root.path().join("data");
    let options =
        ClusterOptions { stores: 2, data_dir: Some(data_dir.clone()), ..Default::default() };
    Cluster::start(options).await.expect("the cluster starts").stop().await;
    for (stores, placements, parts) in
        [("1", "1", ["2 stores", "--stores 2"]), ("3", "1", ["2 stores", "--stores 2"])]
    {
        let command = [
            "playground",
            "--port",
            "0",
            "--data-dir",
            text(&data_dir),
            "--stores",
            stores,
            "--placements",
            placements,
        ];
        is_refused(&command, 1, &[&parts[..], &[text(&data_dir)]].concat()).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_tells_others_the_address_that_it_is_to_advertise() {
    let root = tempfile::tempdir().expect("a temporary directory");
    let address = free_address();
    let listen = address.replace("127.0.0.1", "0.0.0.0");
    let mut node = Process::spawn(&[
        "start",
        "--data-dir",
        text(root.path()),
        "--listen",
        &listen,
        "--advertise",
        &address,
        "--join",
        &address,
    ]);
    let ready = node.line_after("ready: node at ").await;
    assert!(ready.starts_with(&address), "{ready}");
    let operator = Operator::connect(std::slice::from_ref(&address)).await;
    // The store and the placement member are both found by that address.
    operator.store_at(&address).await;
    assert_eq!(operator.placement().leader_address(), address);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_without_a_placement_member_is_named_where_one_is_looked_for() {
    let root = tempfile::tempdir().expect("a temporary directory");
    let [member, store, listen] = [(); 3].map(|()| free_address());
    let _member = Process::node(&root.path().join("1"), &member, std::slice::from_ref(&member));
    let mut other = Process::node(&root.path().join("2"), &store, std::slice::from_ref(&member));
    other.line_after("ready: ").await;
    let third = root.path().join("3");
    let start = ["start", "--data-dir", text(&third), "--listen", &listen, "--join", &store];
    is_refused(&start, 1, &[&store, "no placement member"]).await;
    is_refused(&["kv", "get", "a", "--placement", &store], 1, &[&store, "no placement member"])
        .await;
    // An address without a placement member does no harm beside one with a member.
    let both = format!("{store},{member}");
    is_refused(&["kv", "get", "a", "--placement", &both], 3, &["no key"]).await;
    let joined = format!("{store},{member}");
    let finished = run_with(&["store", "list"], &[("ESKER_PLACEMENT", &joined)]).await;
    assert!(finished.status.success(), "{finished:?}");
    let finished = run_with(&["store", "list"], &[("ESKER_PLACEMENT", "nowhere")]).await;
    assert!(refused(&finished, 2).contains("nowhere"), "{finished:?}");
    assert!(finished.errors.contains("ESKER_PLACEMENT"), "{finished:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_while_placement_has_no_leader_says_so() {
    let root = tempfile::tempdir().expect("a temporary directory");
    let join: Vec<_> = (0..3).map(|_| free_address()).collect();
    let mut nodes = Vec::new();
    for (number, address) in join.iter().enumerate() {
        nodes.push(Process::node(&root.path().join(number.to_string()), address, &join));
    }
    for node in &mut nodes {
        node.line_after("ready: ").await;
    }
    for node in nodes.drain(1..) {
        node.kill().await;
    }
    let put = ["kv", "put", "a", "1", "--placement", &join.join(",")];
    // The member that is left may lead for as long as its lease holds.
    let finished = eventually("placement has no leader", PATIENCE, async || {
        let finished = run(&put).await;
        (!finished.status.success()).then_some(finished).ok_or_else(|| "it is written".to_owned())
    })
    .await;
    let sentence = refused(&finished, 1);
    assert!(!sentence.contains("within 0ns"), "{sentence}");
    assert!(join.iter().all(|address| sentence.contains(address)), "{sentence}");
    assert!(sentence.contains("refused") || sentence.contains("leader"), "{sentence}");
}

#[tokio::test]
async fn a_node_that_is_told_to_end_while_it_starts_ends_well() {
    /// The files that a start makes on disk, stage after stage.
    const STAGES: [&str; 4] =
        ["store/LOCK", "placement/kv/CURRENT", "store/IDENT", "store/log/CURRENT"];
    for (signal, waits) in [("TERM", true), ("INT", true), ("TERM", false), ("INT", false)] {
        for stage in STAGES.iter().take(if waits { 1 } else { STAGES.len() }) {
            let root = tempfile::tempdir().expect("a temporary directory");
            let (listen, nobody) = (free_address(), free_address());
            let join = if waits { &nobody } else { &listen };
            let node = Process::node(root.path(), &listen, std::slice::from_ref(join));
            eventually(stage, PATIENCE, async || match root.path().join(stage).exists() {
                true => Ok(()),
                false => Err(node.log()),
            })
            .await;
            if waits {
                eventually("it serves", PATIENCE, async || {
                    let connected = tokio::net::TcpStream::connect(&listen).await;
                    connected.map(drop).map_err(|error| error.to_string())
                })
                .await;
            }
            let status = node.end_by(signal).await;
            assert_eq!(status, Some(0), "{signal} at {stage}, waiting: {waits}");
        }
    }
    for stage in ["node-1/store/LOCK", "node-3/store/IDENT"] {
        let root = tempfile::tempdir().expect("a temporary directory");
        let data_dir = text(root.path());
        let playground = Process::spawn(&["playground", "--port", "0", "--data-dir", data_dir]);
        eventually(stage, PATIENCE, async || match root.path().join(stage).exists() {
            true => Ok(()),
            false => Err(playground.log()),
        })
        .await;
        assert_eq!(playground.end_by("TERM").await, Some(0), "{stage}");
    }
}

#[tokio::test]
async fn a_malformed_escape_is_refused() {
    for arguments in
        [&["kv", "get", "\\xZZ"][..], &["kv", "put", "a", "\\q"], &["region", "key", "a\\"]]
    {
        is_refused(arguments, 2, &["escape"]).await;
    }
}

#[tokio::test]
async fn a_data_directory_that_cannot_be_written_is_refused_and_nothing_is_created() {
    let root = tempfile::tempdir().expect("a temporary directory");
    let file = root.path().join("file");
    std::fs::write(&file, "not a directory").expect("the directory can be written");
    // Even root can create nothing below a file, or in the kernel's own tree.
    for data_dir in [file.join("below"), file.clone(), "/proc/esker".into()] {
        starts_not(&data_dir, &free_address(), 1, &[text(&data_dir)]).await;
        let playground = ["playground", "--port", "0", "--data-dir", text(&data_dir)];
        is_refused(&playground, 1, &[text(&data_dir)]).await;
    }
    assert_eq!(entries(root.path()), 1, "something was created");
    // The playground needs the node that is refused, and its other nodes do not wait for it.
    let (data_dir, store) = (root.path().join("data"), root.path().join("data/node-1/store"));
    std::fs::create_dir_all(data_dir.join("node-1")).expect("the directory can be written");
    std::fs::write(&store, "not a directory").expect("the directory can be written");
    let playground = ["playground", "--port", "0", "--data-dir", text(&data_dir)];
    is_refused(&playground, 1, &[text(&store)]).await;
    let kept = std::fs::read_to_string(&file).expect("the file can be read");
    assert_eq!(kept, "not a directory");
}

#[tokio::test]
async fn a_port_in_use_is_refused_and_nothing_is_created() {
    let root = tempfile::tempdir().expect("a temporary directory");
    let data_dir = root.path().join("data");
    let listener = TcpListener::bind("127.0.0.1:0").expect("loopback has a free port");
    let address = listener.local_addr().expect("it is bound").to_string();
    starts_not(&data_dir, &address, 1, &[&address, "in use"]).await;
    let port = address.rsplit(':').next().expect("an address has a port");
    let playground = ["playground", "--port", port, "--data-dir", text(&data_dir)];
    is_refused(&playground, 1, &[&address, "in use"]).await;
    assert!(!data_dir.exists(), "a data directory was created");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_data_directory_in_use_or_of_another_cluster_is_refused_and_left_alone() {
    let root = tempfile::tempdir().expect("a temporary directory");
    let (ours, theirs) = (root.path().join("ours"), root.path().join("theirs"));
    let address = free_address();
    let node = Process::node(&ours, &address, std::slice::from_ref(&address));
    let operator = Operator::connect(std::slice::from_ref(&address)).await;
    operator.whole(1, PATIENCE).await;
    operator.kv().put("a", "1").await.expect("a whole cluster takes writes");

    starts_not(&ours, &free_address(), 1, &[text(&ours), "in use"]).await;
    let kept = operator.kv().get("a").await.expect("the first process is not disturbed");
    assert_eq!(kept, Some(Bytes::from("1")));
    node.kill().await;

    // A second cluster. The first one's directory is now to join it.
    let other = free_address();
    let _other = Process::node(&theirs, &other, std::slice::from_ref(&other));
    Operator::connect(std::slice::from_ref(&other)).await.whole(1, PATIENCE).await;
    let listen = free_address();
    let join = ["start", "--data-dir", text(&ours), "--listen", &listen, "--join", &other];
    is_refused(&join, 1, &[text(&ours), "belongs to"]).await;

    let _node = Process::node(&ours, &address, std::slice::from_ref(&address));
    let operator = Operator::connect(std::slice::from_ref(&address)).await;
    operator.whole(1, PATIENCE).await;
    let kept = operator.kv().get("a").await.expect("the directory is what it was");
    assert_eq!(kept, Some(Bytes::from("1")));
}

async fn one_store() -> (Cluster, Operator) {
    let options = ClusterOptions { stores: 1, ..ClusterOptions::default() };
    let cluster = Cluster::start(options).await.expect("the cluster starts");
    let operator = Operator::connect(&[cluster.placement_address().to_owned()]).await;
    (cluster, operator)
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_name_the_region_store_or_key_that_does_not_exist() {
    let (cluster, operator) = one_store().await;
    let placement = cluster.placement_address();
    let region = operator.regions().await[0].region.id.to_string();
    let long = "k".repeat(MAX_KEY + 1);
    let cases: [(i32, &[&str], &[&str]); 13] = [
        (1, &["kv", "scan", "--from", "z", "--to", "a"], &["`z`", "`a`"]),
        (2, &["kv", "scan", "--limit", "many"], &["many", "a whole number from 1 to 1000000"]),
        (1, &["region", "show", "987654"], &["region 987654"]),
        (1, &["region", "split", "987654"], &["region 987654"]),
        (2, &["region", "split", &region, "--parts", "1"], &["a whole number from 2 to 128"]),
        (1, &["region", "transfer-leader", "987654", "--to", "1"], &["region 987654"]),
        (1, &["region", "transfer-leader", &region, "--to", "987654"], &["store 987654"]),
        (1, &["region", "split", &region, "--key", ""], &[&region]),
        (3, &["kv", "get", "no such key"], &["no such key"]),
        (2, &["kv", "put", "", "value"], &["a key has at least one byte"]),
        (2, &["kv", "get", ""], &["a key has at least one byte"]),
        (2, &["kv", "put", &long, "value"], &["8193", "8192"]),
        (2, &["kv", "delete", &long], &["8193", "8192"]),
    ];
    for (status, command, parts) in cases {
        let arguments = [command, &["--placement", placement]].concat();
        is_refused(&arguments, status, parts).await;
    }
    cluster.stop().await;
}

#[tokio::test]
async fn a_cluster_that_is_not_there_is_named() {
    let nobody = free_address();
    is_refused(&["kv", "get", "a", "--placement", &nobody], 1, &[&nobody]).await;
}

/// The store's own service, without a client that would correct what is wrong.
struct Raw {
    client: TikvClient<Channel>,
    region: RegionInfo,
}

impl Raw {
    /// Connects to the leader of the region that holds `a`.
    async fn connect(operator: &Operator) -> Self {
        let found = operator.placement().region_by_key(Bytes::from("a")).await;
        let region = found.expect("placement answers").expect("the cluster is bootstrapped");
        let leader = region.leader.expect("a whole region has a leader");
        let address = operator.address(leader.store.0).await.expect("placement answers");
        let client = TikvClient::connect(format!("http://{address}")).await;
        Raw { client: client.expect("the store listens"), region }
    }

    fn context(&self) -> Context {
        Context {
            region_id: self.region.region.id.0,
            region_epoch: Some(self.region.region.epoch.into()),
            peer: self.region.leader.map(Into::into),
            ..Default::default()
        }
    }

    async fn put(&mut self, context: Context, key: Bytes, value: Bytes) -> RawPutResponse {
        let request = RawPutRequest { context: Some(context), key, value, ..Default::default() };
        let answer = self.client.raw_put(request).await;
        answer.expect("what is wrong is said in the response").into_inner()
    }

    async fn assert_works(&mut self) {
        let answer = self.put(self.context(), "a".into(), "works".into()).await;
        assert_eq!(answer, RawPutResponse::default());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_and_values_out_of_bounds_are_errors_in_the_response() {
    let (cluster, operator) = one_store().await;
    let mut raw = Raw::connect(&operator).await;
    let context = Some(raw.context());
    let long = Bytes::from(vec![b'k'; MAX_KEY + 1]);
    for (key, fault) in [(Bytes::new(), "empty key"), (long, "8193")] {
        let mut errors = vec![raw.put(raw.context(), key.clone(), "v".into()).await.error];
        let get =
            RawGetRequest { context: context.clone(), key: key.clone(), ..Default::default() };
        errors.push(raw.client.raw_get(get).await.expect("an answer").into_inner().error);
        let delete =
            RawDeleteRequest { context: context.clone(), key: key.clone(), ..Default::default() };
        errors.push(raw.client.raw_delete(delete).await.expect("an answer").into_inner().error);
        let swap = RawCasRequest {
            context: context.clone(),
            key: key.clone(),
            previous_not_exist: true,
            ..Default::default()
        };
        let swap = raw.client.raw_compare_and_swap(swap).await;
        errors.push(swap.expect("an answer").into_inner().error);
        let pair = esker_rpc::proto::kvrpcpb::KvPair { key, ..Default::default() };
        let batch = RawBatchPutRequest {
            context: context.clone(),
            pairs: vec![pair],
            ..Default::default()
        };
        errors.push(raw.client.raw_batch_put(batch).await.expect("an answer").into_inner().error);
        for error in errors {
            assert!(error.contains(fault), "`{fault}` is not in: {error:?}");
        }
    }

    // The longest key, and a value that just fits with it.
    let key = Bytes::from(vec![b'k'; MAX_KEY]);
    let fits = Bytes::from(vec![b'v'; MAX_ENTRY - 2 * MAX_KEY]);
    let answer = raw.put(raw.context(), key.clone(), fits).await;
    assert_eq!(answer, RawPutResponse::default());
    // In a key space the same key takes more room, but the client's limit is the same.
    let context_of_v2 = Context { api_version: ApiVersion::V2.into(), ..raw.context() };
    let answer = raw.put(context_of_v2, key.clone(), "v".into()).await;
    assert_eq!(answer, RawPutResponse::default());
    let answer = raw.put(raw.context(), key, Bytes::from(vec![b'v'; MAX_ENTRY + 1])).await;
    let error = answer.region_error.expect("clients expect a region error");
    let too_large = error.raft_entry_too_large.expect("that says so");
    assert_eq!(too_large.region_id, raw.region.region.id.0);
    assert!(too_large.entry_size > MAX_ENTRY as u64, "{too_large:?}");

    let delete = RawDeleteRangeRequest {
        context: context.clone(),
        start_key: "z".into(),
        end_key: "a".into(),
        ..Default::default()
    };
    let answer = raw.client.raw_delete_range(delete).await.expect("an answer").into_inner();
    assert!(!answer.error.is_empty(), "a range from its end to its start was deleted");
    raw.assert_works().await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_of_several_keys_that_is_refused_answers_nothing_that_looks_like_data() {
    let (cluster, operator) = one_store().await;
    let mut raw = Raw::connect(&operator).await;
    raw.assert_works().await;
    let context = Some(raw.context());
    let scan = RawScanRequest {
        context: context.clone(),
        start_key: "a".into(),
        limit: 10,
        ..Default::default()
    };
    let unknown = "no such family";
    let scans = [
        (RawScanRequest { cf: unknown.into(), ..scan.clone() }, unknown),
        (RawScanRequest { limit: 100_001, ..scan.clone() }, "100000"),
        (RawScanRequest { reverse: true, cf: unknown.into(), ..scan.clone() }, unknown),
    ];
    for (request, fault) in scans {
        let refused = raw.client.raw_scan(request.clone()).await.expect_err("it is refused");
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
        assert!(refused.message().contains(fault), "{refused}");
    }
    let get =
        RawBatchGetRequest { context: context.clone(), keys: vec!["a".into()], cf: unknown.into() };
    let refused = raw.client.raw_batch_get(get.clone()).await.expect_err("it is refused");
    assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
    let ranges = RawBatchScanRequest {
        context: context.clone(),
        ranges: vec![KeyRange { start_key: "a".into(), ..Default::default() }],
        each_limit: 10,
        cf: unknown.into(),
        ..Default::default()
    };
    let refused = raw.client.raw_batch_scan(ranges).await.expect_err("it is refused");
    assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");

    // In a stream the other requests are answered, and a refusal is the region error that is final.
    use batch_commands_request::request::Cmd;
    let fine = RawGetRequest { context, key: "a".into(), ..Default::default() };
    let refused = RawScanRequest { cf: unknown.into(), ..scan };
    let batch = BatchCommandsRequest {
        requests: [Cmd::RawScan(refused), Cmd::RawBatchGet(get), Cmd::RawGet(fine)]
            .map(|cmd| Request { cmd: Some(cmd) })
            .into(),
        request_ids: vec![1, 2, 3],
        ..Default::default()
    };
    let (requests, outgoing) = mpsc::channel(2);
    let stream = raw.client.batch_commands(ReceiverStream::new(outgoing)).await;
    let mut answers = stream.expect("the store takes a stream").into_inner();
    for _ in 0..2 {
        requests.send(batch.clone()).await.expect("the stream stays open");
        let mut answered = 0;
        while answered < 3 {
            let part = answers.message().await.expect("the stream lives").expect("an answer");
            for (response, id) in part.responses.into_iter().zip(part.request_ids) {
                answered += 1;
                let error = match response.cmd.expect("every answer says something") {
                    Reply::RawScan(scan) if scan.kvs.is_empty() => scan.region_error,
                    Reply::RawBatchGet(get) if get.pairs.is_empty() => get.region_error,
                    Reply::RawGet(get) => {
                        assert_eq!((id, &get.value[..]), (3, &b"works"[..]));
                        continue;
                    }
                    other => panic!("{id}: {other:?}"),
                };
                let error = error.expect("a refusal");
                assert!(error.message.contains(unknown), "{error:?}");
                assert!(error.raft_entry_too_large.is_some(), "clients repeat {error:?}");
            }
        }
    }
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_of_another_cluster_is_refused_whatever_it_asks() {
    let (cluster, operator) = one_store().await;
    let mut raw = Raw::connect(&operator).await;
    let here = operator.placement().cluster_id();
    let ours = Context { cluster_id: here, ..raw.context() };
    assert_eq!(raw.put(ours, "a".into(), "works".into()).await, RawPutResponse::default());

    let theirs = Some(Context { cluster_id: here ^ 1, ..raw.context() });
    let key = || Bytes::from("a");
    macro_rules! refused {
        ($($call:ident($request:ident { $($field:ident: $value:expr),* });)*) => {
            $(
                let request = $request {
                    context: theirs.clone(), $($field: $value,)* ..Default::default()
                };
                let answer = raw.client.$call(request).await;
                let refused = answer.expect_err(concat!(stringify!($call), " was served"));
                assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
                let said = refused.message();
                assert!(
                    [here, here ^ 1].iter().all(|id| said.contains(&id.to_string())),
                    "{refused}"
                );
            )*
        };
    }
    refused! {
        raw_get(RawGetRequest { key: key() });
        raw_batch_get(RawBatchGetRequest { keys: vec![key()] });
        raw_put(RawPutRequest { key: key() });
        raw_batch_put(RawBatchPutRequest { pairs: vec![KvPair { key: key(), ..KvPair::default() }] });
        raw_delete(RawDeleteRequest { key: key() });
        raw_batch_delete(RawBatchDeleteRequest { keys: vec![key()] });
        raw_scan(RawScanRequest { limit: 1 });
        raw_batch_scan(RawBatchScanRequest { each_limit: 1 });
        raw_delete_range(RawDeleteRangeRequest { start_key: key(), end_key: key() });
        raw_compare_and_swap(RawCasRequest { key: key() });
        raw_get_key_ttl(RawGetKeyTtlRequest { key: key() });
        raw_checksum(RawChecksumRequest {});
        split_region(SplitRegionRequest { split_key: key() });
    }
    // No part of the refused write happened.
    let get = RawGetRequest { context: Some(raw.context()), key: key(), ..Default::default() };
    let kept = raw.client.raw_get(get).await.expect("an answer").into_inner();
    assert_eq!(&kept.value[..], b"works");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_of_another_cluster_at_a_known_address_is_named_in_one_line() {
    let (cluster, operator) = one_store().await;
    let (other, _) = one_store().await;
    let placement = operator.placement();
    let mut store = placement.get_stores(true).await.expect("placement answers").remove(0);
    // As if the machine had been given to another cluster.
    store.address = other.placement_address().to_owned();
    placement.put_store(store).await.expect("stores may move");

    let error = operator.kv().get("a").await.expect_err("it is another cluster's store");
    let (line, here) = (error.to_string(), placement.cluster_id());
    let there = other.placement().cluster_id();
    assert!([here, there].iter().all(|id| line.contains(&id.to_string())), "{line}");
    assert!(line.contains("check the client's placement addresses"), "{line}");
    assert!(!line.contains('\n'), "{line}");
    cluster.stop().await;
    other.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_for_what_is_not_here_gets_the_region_error_that_clients_act_on() {
    let (cluster, operator) = one_store().await;
    let outdated = Raw::connect(&operator).await.context();
    operator.kv().split_region(vec!["b".into()]).await.expect("it splits");
    eventually("placement hears of the split", PATIENCE, async || {
        let range = esker_model::KeyRange::new("a".into(), Some("b".into())).expect("a range");
        let regions = operator.regions_in(&range).await;
        if regions[0].region.range.end().is_some_and(|end| end == "b") {
            Ok(())
        } else {
            Err(format!("{regions:?}"))
        }
    })
    .await;
    let mut raw = Raw::connect(&operator).await;
    let (region, peer) = (raw.region.region.clone(), raw.region.leader.expect("a leader"));

    for epoch in [outdated.region_epoch, None, Some(RegionEpoch { version: 99, conf_ver: 99 })] {
        let context =
            Context { region_epoch: epoch, region_id: outdated.region_id, ..raw.context() };
        let context = Context { peer: outdated.peer, ..context };
        let error = raw.put(context, "a".into(), "v".into()).await.region_error;
        let mismatch = error.and_then(|error| error.epoch_not_match).expect("an epoch mismatch");
        let epochs: Vec<_> =
            mismatch.current_regions.iter().map(|region| region.region_epoch).collect();
        assert!(!epochs.contains(&None), "clients unwrap the epochs: {mismatch:?}");
    }

    let context = Context { region_id: 987_654, ..raw.context() };
    let error = raw.put(context, "a".into(), "v".into()).await.region_error;
    let not_found = error.and_then(|error| error.region_not_found).expect("no such region");
    assert_eq!(not_found.region_id, 987_654);

    let other_store = esker_rpc::proto::metapb::Peer { store_id: 987_654, ..peer.into() };
    let context = Context { peer: Some(other_store), ..raw.context() };
    let error = raw.put(context, "a".into(), "v".into()).await.region_error;
    let mismatch = error.and_then(|error| error.store_not_match).expect("another store");
    assert_eq!((mismatch.request_store_id, mismatch.actual_store_id), (987_654, peer.store.0));

    let context = raw.context();
    let answer = raw.put(context, "b".into(), "v".into()).await;
    let outside = answer.region_error.as_ref().and_then(|error| error.key_not_in_region.as_ref());
    let outside = outside.unwrap_or_else(|| panic!("{answer:?} about {region:?}"));
    assert_eq!(outside.region_id, region.id.0);

    raw.assert_works().await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_names_the_leader() {
    let cluster = Cluster::start(ClusterOptions::default()).await.expect("the cluster starts");
    let operator = Operator::connect(&[cluster.placement_address().to_owned()]).await;
    operator.whole(3, PATIENCE).await;
    // Placement may move the leader at any time, so that who was a follower takes the write.
    let (follower, region, error) = eventually("a follower is asked", PATIENCE, async || {
        let mut raw = Raw::connect(&operator).await;
        let RegionInfo { region, leader, .. } = raw.region.clone();
        let leader = leader.expect("a whole region has a leader");
        let follower = *region.peers.iter().find(|peer| **peer != leader).expect("three");
        let address = operator.address(follower.store.0).await.expect("placement answers");
        raw.client = TikvClient::connect(format!("http://{address}")).await.expect("it listens");
        let context = Context { peer: Some(follower.into()), ..raw.context() };
        let error = raw.put(context, "a".into(), "v".into()).await.region_error;
        let error = error.ok_or_else(|| format!("peer {} leads by now", follower.id))?;
        Ok((follower, region, error))
    })
    .await;
    let not_leader = error.not_leader.expect("a follower takes no writes");
    assert_eq!(not_leader.region_id, region.id.0);
    if let Some(named) = not_leader.leader {
        assert_ne!(named.id, follower.id.0, "a follower sends nobody back to itself");
    }
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_hang_up_with_requests_under_way_disturb_nobody_and_leave_nothing() {
    let (cluster, operator) = one_store().await;
    let mut raw = Raw::connect(&operator).await;
    raw.assert_works().await;
    // The whole cluster runs on this test's own runtime.
    let tasks = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
    let before = tasks();
    let context = raw.context();
    for client in 0..HANG_UPS {
        let (requests, outgoing) = mpsc::channel(1);
        let mut other = Raw::connect(&operator).await;
        let stream = other.client.batch_commands(ReceiverStream::new(outgoing)).await;
        let stream = stream.expect("the store takes a stream").into_inner();
        let put = |number: u64| {
            let key = format!("a/{client}/{number}").into();
            let value = Bytes::from(vec![b'v'; 10_000]);
            let context = Some(context.clone());
            let put = RawPutRequest { context, key, value, ..Default::default() };
            Request { cmd: Some(batch_commands_request::request::Cmd::RawPut(put)) }
        };
        let batch = BatchCommandsRequest {
            requests: (0..REQUESTS_LEFT_BEHIND).map(put).collect(),
            request_ids: (0..REQUESTS_LEFT_BEHIND).collect(),
            ..Default::default()
        };
        requests.send(batch).await.expect("the stream is open");
        // Nobody reads an answer.
        drop(stream);
    }
    raw.assert_works().await;
    // A new connection is served like the old one.
    Raw::connect(&operator).await.assert_works().await;
    eventually("nothing runs for those who are gone", PATIENCE, async || {
        let now = tasks();
        if now <= before { Ok(()) } else { Err(format!("{now} tasks, {before} before")) }
    })
    .await;
    cluster.stop().await;
}
