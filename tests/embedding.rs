//! Nodes and clusters inside this process, on real disks and sockets.

mod common;

use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use common::eventually;
use common::operator::Operator;
use esker::node::{NodeConfig, Roles};
use esker::{Cluster, ClusterOptions, KvClient, Node};
use metrics_exporter_prometheus::PrometheusBuilder;

const PATIENCE: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread")]
async fn a_nodes_own_client_needs_no_socket_and_its_data_outlives_it() {
    let metrics = PrometheusBuilder::new().install_recorder().expect("the only recorder");
    let folder = tempfile::tempdir().expect("a folder");
    let node = Node::builder().data_dir(folder.path()).start().await.expect("a node");
    let client = node.client().await.expect("a client");
    for n in 0..100 {
        client.put(format!("k{n:02}"), format!("v{n}")).await.expect("a write");
    }
    let found = client.scan("k", "l", 1000).await.expect("a scan");
    assert_eq!(found.len(), 100);
    // Both ends of every batched request that passes a socket count it.
    let passed_a_socket = || metrics.render().contains("esker_client_batch_requests");
    assert!(!passed_a_socket(), "a local request went through a socket");
    let remote = KvClient::new(node.placement().clone(), []);
    assert_eq!(remote.get("k07").await.expect("a read").as_deref(), Some(&b"v7"[..]));
    assert!(passed_a_socket(), "the count counts nothing");
    node.stop().await;

    let node = Node::builder().data_dir(folder.path()).start().await.expect("the node again");
    let client = node.client().await.expect("a client");
    assert_eq!(client.get("k42").await.expect("a read").as_deref(), Some(&b"v42"[..]));
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_missed_more_than_the_log_keeps_comes_back_by_snapshot() {
    let config = NodeConfig {
        log_gc_threshold: Some(20),
        log_gc_max_lag: Some(40),
        log_gc_interval_ms: Some(100),
        // The log keeps what a crash could take from the data.
        flush_after_ms: Some(1_000),
        ..NodeConfig::default()
    };
    let folder = tempfile::tempdir().expect("a folder");
    let options = ClusterOptions {
        data_dir: Some(folder.path().to_owned()),
        config: config.clone(),
        ..ClusterOptions::default()
    };
    let mut cluster = Cluster::start(options).await.expect("a cluster");
    let client = cluster.client().await.expect("a client");
    let operator = Operator::connect(&[cluster.placement_address().to_owned()]).await;
    client.put("kept", "from before").await.expect("a write");
    let away = cluster.take_node(2);
    let (address, store) = (away.address().to_owned(), away.store_id().expect("a store"));
    away.stop().await;

    // Some megabytes, in more entries than a leader keeps for a store that is
    // away.
    let value = vec![b'x'; 64 << 10];
    for n in 0..120 {
        client.put(format!("k{n:03}"), value.clone()).await.expect("a write");
    }
    eventually("the leader has forgotten what the store needs", PATIENCE, async || {
        let found = operator.placement().region_by_key("k000".into()).await;
        let region = found.map_err(|error| error.to_string())?.ok_or("no region")?;
        let leader = region.leader.ok_or("no leader")?;
        let detail = operator.replica(region.region.id.0, leader.store.0, false).await?;
        let behind = detail.progress.iter().find(|p| p.peer.is_some_and(|p| p.store_id == store.0));
        match behind {
            Some(progress) if progress.match_index + 1 < detail.first_index => Ok(()),
            other => Err(format!("the log begins at {}, {other:?}", detail.first_index)),
        }
    })
    .await;

    let again = Node::builder()
        .data_dir(folder.path().join("node-3"))
        .listen(address)
        .join([cluster.placement_address()])
        .roles(Roles { placement: false, store: true })
        .config(config)
        .start()
        .await
        .expect("the node again");
    assert_eq!(operator.replicas_are_equal(3, PATIENCE).await, 121);
    again.stop().await;
    cluster.stop().await;
}

/// The bytes that a directory takes on the disk, preallocated ones included.
fn allocated(path: &std::path::Path) -> u64 {
    const BLOCK: u64 = 512;
    let metadata = std::fs::symlink_metadata(path).expect("it is there");
    let below: u64 = match metadata.is_dir() {
        true => std::fs::read_dir(path)
            .expect("a directory")
            .map(|entry| allocated(&entry.expect("an entry").path()))
            .sum(),
        false => 0,
    };
    metadata.blocks() * BLOCK + below
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_store_and_an_empty_member_take_a_few_megabytes() {
    const A_FEW: u64 = 8 << 20;
    let folder = tempfile::tempdir().expect("a folder");
    let cluster = Cluster::start(ClusterOptions {
        stores: 1,
        data_dir: Some(folder.path().to_owned()),
        ..ClusterOptions::default()
    })
    .await
    .expect("a cluster");
    let client = cluster.client().await.expect("a client");
    client.put("one", "write").await.expect("a write");
    for part in ["store", "placement"] {
        let bytes = allocated(&folder.path().join("node-1").join(part));
        println!("{part}: {} KiB", bytes >> 10);
        assert!(bytes <= A_FEW, "{part} takes {bytes} bytes");
    }
    cluster.stop().await;
}
