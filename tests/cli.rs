//! Every command of `esker` against a cluster: the tables that people read, and the JSON
//! that programs read.

mod common;

use bytes::Bytes;
use common::eventually;
use common::http::page;
use common::operator::Operator;
use common::process::{PATIENCE, run};
use esker::{Cluster, ClusterOptions};
use serde_json::Value;
use tokio::net::TcpListener;

const STORES: usize = 3;

struct Shell {
    cluster: Cluster,
    operator: Operator,
}

impl Shell {
    async fn start() -> Self {
        let options = ClusterOptions { stores: STORES as u32, ..ClusterOptions::default() };
        let cluster = Cluster::start(options).await.expect("the cluster starts");
        let operator = Operator::connect(&[cluster.placement_address().to_owned()]).await;
        operator.whole(STORES, PATIENCE).await;
        Shell { cluster, operator }
    }

    /// The standard output of a command that must succeed.
    async fn text(&self, command: &[&str]) -> String {
        let placement = ["--placement", self.cluster.placement_address()];
        // The option does not go to the end, which may be after the end of the options.
        let (first, rest) = command.split_at(1);
        let finished = run(&[first, &placement, rest].concat()).await;
        assert!(finished.status.success(), "{command:?}: {finished:?}");
        assert_eq!(finished.errors, "", "{command:?} complains");
        finished.output
    }

    /// The cells of a table, its headers first.
    async fn table(&self, command: &[&str]) -> Vec<Vec<String>> {
        let text = self.text(command).await;
        // Columns are two spaces apart; the cells here have none or one between words.
        let cells = |line: &str| {
            line.split("  ")
                .map(str::trim)
                .filter(|cell| !cell.is_empty())
                .map(str::to_owned)
                .collect()
        };
        text.lines().map(cells).collect()
    }

    async fn json(&self, command: &[&str]) -> Value {
        let text = self.text(&[command, &["--json"]].concat()).await;
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{command:?}: {error}: {text}"))
    }

    /// The region of a key, and the store that leads it.
    async fn region(&self, key: &str) -> (u64, u64, Vec<u64>) {
        let key = Bytes::copy_from_slice(key.as_bytes());
        let found = self.operator.placement().region_by_key(key).await;
        let found = found.expect("placement answers").expect("the cluster is bootstrapped");
        let leader = found.leader.expect("a whole region has a leader");
        let stores = found.region.peers.iter().map(|peer| peer.store.0).collect();
        (found.region.id.0, leader.store.0, stores)
    }

    async fn stop(self) {
        drop(self.operator);
        self.cluster.stop().await;
    }
}

fn list(value: &Value) -> &[Value] {
    value.as_array().unwrap_or_else(|| panic!("not a list: {value}"))
}

fn column(table: &[Vec<String>], name: &str) -> usize {
    let at = table[0].iter().position(|header| header == name);
    at.unwrap_or_else(|| panic!("no column {name}: {:?}", table[0]))
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_are_written_read_scanned_and_deleted() {
    let shell = Shell::start().await;
    shell.text(&["kv", "put", "greeting", "hello world"]).await;
    shell.text(&["kv", "put", "g\\x00\\xFF", "\\x01\\\\"]).await;
    assert_eq!(shell.text(&["kv", "get", "greeting"]).await, "hello world\n");
    assert_eq!(shell.text(&["kv", "get", "g\\x00\\xff"]).await, "\\x01\\\\\n");
    let pair = shell.json(&["kv", "get", "greeting"]).await;
    assert_eq!((&pair["key"], &pair["value"]), (&"greeting".into(), &"hello world".into()));
    assert_eq!(shell.json(&["kv", "put", "h", "3"]).await["done"], true);

    let range = ["kv", "scan", "--from", "g", "--to", "h\\x00"];
    let table = shell.table(&range).await;
    assert_eq!(
        table,
        [["KEY", "VALUE"], ["g\\x00\\xFF", "\\x01\\\\"], ["greeting", "hello world"], ["h", "3"]]
    );
    let pairs = shell.json(&[&range[..], &["--limit", "2"]].concat()).await;
    let keys: Vec<_> = list(&pairs).iter().map(|pair| pair["key"].as_str()).collect();
    assert_eq!(keys, [Some("g\\x00\\xFF"), Some("greeting")]);

    assert_eq!(shell.json(&["kv", "delete", "greeting"]).await["done"], true);
    shell.text(&["kv", "delete", "h"]).await;
    assert_eq!(list(&shell.json(&range).await).len(), 1);
    shell.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn regions_are_listed_shown_found_split_and_led_elsewhere() {
    let shell = Shell::start().await;
    let (first, _, _) = shell.region("a").await;
    let id = first.to_string();
    let parts = shell.json(&["region", "split", &id, "--key", "g", "--key", "k"]).await;
    assert_eq!(list(&parts).len(), 3, "{parts}");

    let regions = shell.json(&["region", "list"]).await;
    let mut end = "";
    for region in list(&regions) {
        assert_eq!(region["start_key"], end, "the regions follow each other: {regions}");
        end = region["end_key"].as_str().expect("a key is text");
        assert_eq!(list(&region["peers"]).len(), STORES, "{region}");
    }
    assert_eq!(end, "", "the last region has no end: {regions}");
    let table = shell.table(&["region", "list"]).await;
    assert_eq!(table.len(), list(&regions).len() + 1, "{table:?}");
    let start = column(&table, "START");
    assert!(table.iter().any(|row| row[start] == "g"), "{table:?}");

    let (id, leader, stores) = shell.region("h").await;
    let found = shell.json(&["region", "key", "h"]).await;
    let found = &list(&found)[0];
    assert_eq!((&found["id"], &found["start_key"]), (&id.into(), &"g".into()));
    let table = shell.table(&["region", "key", "h"]).await;
    assert_eq!(table[1][column(&table, "REGION")], id.to_string());

    let to = stores.into_iter().find(|store| *store != leader).expect("three replicas");
    let (id, to_text) = (id.to_string(), to.to_string());
    let moved = shell.json(&["region", "transfer-leader", &id, "--to", &to_text]).await;
    assert_eq!(list(&moved)[0]["leader"]["store"], to, "{moved}");

    let detail = shell.json(&["region", "show", &id]).await;
    let replicas = list(&detail["replicas"]);
    assert_eq!(replicas.len(), STORES, "{detail}");
    for replica in replicas {
        assert!(replica["applied_index"].as_u64().is_some_and(|index| index > 0), "{detail}");
    }
    let text = shell.text(&["region", "show", &id]).await;
    assert!(text.contains(&id) && text.lines().count() > STORES, "{text}");

    let keys = (0..200).map(|number| (format!("h{number:03}").into(), vec![b'v'; 500].into()));
    shell.operator.kv().batch_put(keys.collect()).await.expect("a batch put");
    let table = shell.table(&["region", "split", &id, "--parts", "2"]).await;
    assert_eq!(table.len(), 3, "{table:?}");
    shell.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn stores_and_placement_members_are_listed_and_timestamps_grow() {
    let shell = Shell::start().await;
    let stores = shell.json(&["store", "list"]).await;
    assert_eq!(list(&stores).len(), STORES, "{stores}");
    for store in list(&stores) {
        assert_eq!(store["state"], "up", "{store}");
    }
    let table = shell.table(&["store", "list"]).await;
    assert_eq!(table.len(), STORES + 1, "{table:?}");
    let addresses = column(&table, "ADDRESS");
    assert_eq!(list(&stores)[0]["address"], table[1][addresses].as_str());

    let members = shell.json(&["placement", "members"]).await;
    let leaders = list(&members).iter().filter(|member| member["leader"] == true).count();
    assert_eq!((list(&members).len(), leaders), (1, 1), "{members}");
    let table = shell.table(&["placement", "members"]).await;
    assert_eq!(table[1][column(&table, "ROLE")], "leader");

    let mut last = 0;
    for _ in 0..3 {
        let timestamp = shell.json(&["placement", "tso"]).await;
        let next = timestamp["timestamp"].as_u64().expect("a number");
        assert!(next > last, "{next} comes after {last}");
        last = next;
    }
    assert!(shell.text(&["placement", "tso"]).await.contains("timestamp: "));

    for (path, name) in [("regions", "regions"), ("stores", "stores")] {
        let body = http_get(shell.cluster.placement_address(), &format!("/pd/api/v1/{path}")).await;
        assert!(!list(&body[name]).is_empty(), "{body}");
    }
    shell.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_of_every_language_and_with_dashes_are_printed_as_they_were_typed() {
    let shell = Shell::start().await;
    let pairs = [("-2", "--v"), ("--", "-"), ("clé", "é"), ("ключ", "значение"), ("鍵", "🔑")];
    for (key, value) in pairs {
        shell.text(&["kv", "put", "--json", "--", key, value]).await;
        assert_eq!(shell.text(&["kv", "get", "--json", "--", key]).await.matches(key).count(), 1);
    }
    shell.text(&["kv", "put", "-k", "-v"]).await;
    assert_eq!(shell.text(&["kv", "get", "-k"]).await, "-v\n");
    let table = shell.table(&["kv", "scan", "--from", "-2"]).await;
    for (key, value) in pairs.into_iter().filter(|(key, _)| *key >= "-2") {
        assert!(table.iter().any(|row| *row == [key, value]), "{key}: {table:?}");
    }
    let pairs = shell.json(&["kv", "scan", "--from", "cl", "--to", "cm"]).await;
    assert_eq!((&pairs[0]["key"], &pairs[0]["value"]), (&"clé".into(), &"é".into()));

    // Invisible characters are escaped, and a printed key can be typed to find the same key.
    let hidden = " a\u{202E}b\u{301}\n ";
    shell.text(&["kv", "put", hidden, "v"]).await;
    let table = shell.table(&["kv", "scan", "--from", " ", "--to", "!"]).await;
    assert_eq!(table[1][0], "\\x20a\\xE2\\x80\\xAEb\u{301}\\x0A\\x20");
    assert_eq!(shell.text(&["kv", "get", &table[1][0]]).await, "v\n");

    let (region, _, _) = shell.region("-100").await;
    let found = shell.json(&["region", "key", "-100"]).await;
    assert_eq!(list(&found)[0]["id"], region);
    let parts = shell.json(&["region", "split", &region.to_string(), "--key", "-5"]).await;
    assert_eq!(list(&parts)[1]["start_key"], "-5");
    shell.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_store_is_disconnected_and_its_silence_is_told() {
    let mut shell = Shell::start().await;
    let last = shell.cluster.take_node(STORES - 1);
    let id = last.store_id().expect("every node has a store");
    last.stop().await;
    eventually("the store counts as disconnected", PATIENCE, async || {
        let stores = shell.json(&["store", "list"]).await;
        let store = list(&stores).iter().find(|store| store["id"] == id.0).expect("it is listed");
        match (store["state"].as_str(), store["heartbeat_age_ms"].as_u64()) {
            (Some("disconnected"), Some(20_000..)) => Ok(()),
            (Some("up"), Some(0..20_000)) => Err(store.to_string()),
            _ => panic!("{store}"),
        }
    })
    .await;
    let table = shell.table(&["store", "list"]).await;
    let row = table.iter().find(|row| row[0] == id.to_string()).expect("it is listed");
    assert_eq!(row[column(&table, "STATE")], "disconnected", "{table:?}");
    assert!(row[column(&table, "HEARTBEAT")].ends_with(" s ago"), "{table:?}");
    shell.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_several_placement_members_one_that_answers_is_enough() {
    let options = ClusterOptions { stores: 5, placements: 5, ..ClusterOptions::default() };
    let cluster = Cluster::start(options).await.expect("a cluster with five placement members");
    // A listener that accepts connections and never answers, like a frozen process.
    let frozen = TcpListener::bind("127.0.0.1:0").await.expect("loopback has a free port");
    let frozen = frozen.local_addr().expect("it is bound").to_string();
    let addresses: Vec<_> = cluster.nodes().iter().map(|node| node.address().to_owned()).collect();
    let list_of = |first: &str| format!("{first},{}", addresses[4]);
    for first in [frozen.as_str(), &addresses[1], "127.0.0.1:1"] {
        let placement = list_of(first);
        let finished = run(&["placement", "members", "--json", "--placement", &placement]).await;
        assert!(finished.status.success(), "{placement}: {finished:?}");
        let members: Value = serde_json::from_str(&finished.output).expect("it is JSON");
        assert_eq!(list(&members).len(), 5, "{members}");
    }
    cluster.stop().await;
}

/// The JSON at a path of the node's port.
async fn http_get(address: &str, path: &str) -> Value {
    let answer = page(address, path).await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let (start, end) = (answer.find('{'), answer.rfind('}'));
    let (start, end) = start.zip(end).unwrap_or_else(|| panic!("no JSON: {answer}"));
    serde_json::from_str(&answer[start..=end]).expect("it is JSON")
}

#[tokio::test(flavor = "multi_thread")]
async fn every_workload_of_ycsb_runs_to_its_end() {
    let shell = Shell::start().await;
    let sizes = ["--records", "200", "--operations", "300", "--threads", "4"];
    for (workload, kinds) in [
        ("a", &["read", "update"][..]),
        ("b", &["read", "update"]),
        ("c", &["read"]),
        ("d", &["read", "insert"]),
        ("e", &["scan", "insert"]),
        ("f", &["read", "update"]),
        ("u", &["update"]),
    ] {
        let command = [&["ycsb", "all", "--workload", workload][..], &sizes].concat();
        let benchmark = shell.json(&command).await;
        let phases = list(&benchmark["phases"]);
        let names: Vec<_> = phases.iter().map(|phase| phase["phase"].as_str()).collect();
        assert_eq!(names, [Some("load"), Some("run")]);
        assert_eq!((&phases[0]["operations"], &phases[0]["errors"]), (&200.into(), &0.into()));
        assert_eq!((&phases[1]["operations"], &phases[1]["errors"]), (&300.into(), &0.into()));
        let requests = list(&phases[1]["requests"]);
        for kind in kinds {
            let request = requests.iter().find(|request| request["kind"] == *kind);
            let request = request.unwrap_or_else(|| panic!("no {kind} in {workload}: {benchmark}"));
            assert!(request["p99_us"].as_u64().is_some_and(|micros| micros > 0), "{request}");
        }
    }
    let command = [&["ycsb", "all", "--workload", "a"][..], &sizes].concat();
    // More than any disk has.
    let large = ["--records", "1000000000", "--fields", "7", "--value-size", "1048576"];
    let placement = ["--placement", shell.cluster.placement_address()];
    let refused =
        run(&[&["ycsb", "load", "--workload", "u"][..], &large, &placement].concat()).await;
    let says = refused.errors.contains("on disk, and the fullest disk of the cluster has");
    assert!(!refused.status.success() && says, "{refused:?}");
    let text = shell.text(&command).await;
    assert!(text.contains("P99.9") && text.contains("total: 300 operations"), "{text}");
    shell.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn other_systems_are_measured_in_the_same_way() {
    let folder = tempfile::tempdir().expect("a folder");
    let dir = folder.path().join("bare").display().to_string();
    let sizes = ["--records", "200", "--threads", "4"];
    let of = |phase: &str, more: &[&str]| {
        let all = [&["ycsb", phase, "--target", "rocksdb"][..], &sizes, more].concat();
        all.into_iter().map(str::to_owned).collect::<Vec<_>>()
    };
    for (workload, kind) in [("u", "update"), ("c", "read"), ("e", "scan")] {
        let words =
            of("all", &["--workload", workload, "--operations", "300", "--dir", &dir, "--json"]);
        let words: Vec<_> = words.iter().map(String::as_str).collect();
        let finished = run(&words).await;
        assert!(finished.status.success(), "{finished:?}");
        let benchmark: Value = serde_json::from_str(&finished.output).expect("it is JSON");
        let run = &list(&benchmark["phases"])[1];
        assert_eq!((&run["operations"], &run["errors"]), (&300.into(), &0.into()), "{run}");
        assert!(list(&run["requests"]).iter().any(|request| request["kind"] == kind), "{run}");
    }
    let words = of("run", &["--workload", "c"]);
    let words: Vec<_> = words.iter().map(String::as_str).collect();
    let refused = run(&words).await;
    assert!(!refused.status.success() && refused.errors.contains("--dir"), "{refused:?}");

    // Nobody listens there.
    let nowhere = common::process::free_address();
    let refused =
        run(&["ycsb", "run", "--workload", "c", "--target", "etcd", "--placement", &nowhere]).await;
    let line = refused.errors.lines().count() == 1 && refused.errors.contains("cannot reach etcd");
    assert!(!refused.status.success() && line, "{refused:?}");
    let refused = run(&["ycsb", "run", "--workload", "c", "--target", "cassandra"]).await;
    assert!(refused.errors.contains("esker, tikv, etcd, rocksdb"), "{refused:?}");
}
