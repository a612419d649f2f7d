//! The published `tikv-client`, as it is, against a cluster. Its results equal those of a map in
//! memory, whatever happens to the regions meanwhile.

mod common;

#[path = "tikv_client/edges.rs"]
mod edges;
#[path = "tikv_client/model.rs"]
mod model;
#[path = "tikv_client/moves.rs"]
mod moves;

use esker_model::KeyRange;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use common::operator::Operator;
use common::process::PATIENCE;
use common::{alone, eventually};
use esker::{Cluster, ClusterOptions};
use model::Subject;
use tikv_client::{Config, RawClient};

const STORES: usize = 3;

/// How many regions are cut for the keys of a test before it begins: none beside those of a fresh
/// cluster, a few, and many.
const REGIONS: [usize; 3] = [0, 24, 100];

/// Regions of each worker where several work at the same time.
const REGIONS_OF_A_WORKER: usize = 6;

/// Operations of a client that is alone with the cluster.
const OPERATIONS: usize = 500;

/// Clients of each kind that work at the same time.
const WORKERS: usize = 4;

/// The least number of operations of each client, and of changes to the regions meanwhile.
const OPERATIONS_UNDER_MOVES: usize = 100;
const SPLITS: usize = 40;
const TRANSFERS: usize = 80;

/// How a client sees the key space.
#[derive(Debug, Clone, Copy)]
enum Layout {
    Plain,
    Keyspace,
}

impl Layout {
    const ALL: [Layout; 2] = [Layout::Plain, Layout::Keyspace];

    fn config(self) -> Config {
        match self {
            Layout::Plain => Config::default(),
            Layout::Keyspace => Config::default().with_default_keyspace(),
        }
    }

    /// The key that stands for a key of the client in the bounds of regions.
    /// The keys from `start` to `end`, as placement knows them.
    fn range(self, start: &[u8], end: &[u8]) -> KeyRange {
        KeyRange::new(self.bound(start), Some(self.bound(end))).expect("a range")
    }

    fn bound(self, key: &[u8]) -> Bytes {
        match self {
            Layout::Plain => Bytes::copy_from_slice(key),
            Layout::Keyspace => memcomparable(&[b"r\0\0\0", key].concat()).into(),
        }
    }

    async fn client(self, cluster: &Cluster) -> RawClient {
        let endpoints = vec![cluster.placement_address().to_owned()];
        RawClient::new_with_config(endpoints, self.config()).await.expect("the client connects")
    }
}

/// Groups of eight bytes, the last one padded. Each is followed by 0xFF less its padding.
fn memcomparable(key: &[u8]) -> Vec<u8> {
    let padding = 8 - key.len() % 8;
    let padded = [key, &[0; 8][..padding]].concat();
    let mut groups: Vec<_> = padded.chunks(8).map(|group| [group, &[0xFF]].concat()).collect();
    let last = groups.last_mut().and_then(|group| group.last_mut()).expect("there is a group");
    *last -= padding as u8;
    groups.concat()
}

async fn start() -> (Cluster, Operator) {
    let options = ClusterOptions { stores: STORES as u32, ..ClusterOptions::default() };
    let cluster = Cluster::start(options).await.expect("the cluster starts");
    let operator = Operator::connect(&[cluster.placement_address().to_owned()]).await;
    (cluster, operator)
}

/// Splits a worker's keys into regions, the last of which ends where they do.
async fn split(operator: &Operator, layout: Layout, worker: usize, regions: usize) {
    let parts = (0..regions).map(|part| model::key(worker, part * model::KEYS / regions));
    let keys = parts.chain([model::end(worker)]).map(|key| layout.bound(&key)).collect();
    operator.kv().split_region(keys).await.expect("the regions split");
    let range = layout.range(&model::start(worker), &model::end(worker));
    eventually("placement hears of the regions", PATIENCE, async || {
        let made = operator.regions_in(&range).await.len();
        if made >= regions { Ok(()) } else { Err(format!("{made} of {regions}")) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_raw_operation_answers_as_a_map_would() {
    let _alone = alone().await;
    let (cluster, operator) = start().await;
    for regions in REGIONS {
        for layout in Layout::ALL {
            // No bound is cut before the first client of a key space.
            let client = layout.client(&cluster).await;
            if regions > 0 {
                split(&operator, layout, 0, regions).await;
            }
            client.delete_range(model::start(0)..model::end(0)).await.expect("an empty range");
            let mut subject = Subject::new(client, 0, 42, regions == 0);
            for _ in 0..OPERATIONS {
                subject.step().await;
            }
            subject.check_all().await;
            subject.assert_every_operation_was_used();
        }
    }
    operator.replicas_are_equal(STORES, PATIENCE).await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_error_reaches_a_client_while_regions_split_and_leaders_move() {
    let _alone = alone().await;
    let (cluster, operator) = start().await;
    let operator = Arc::new(operator);
    let stop = Arc::new(AtomicBool::new(false));
    let mut workers = Vec::new();
    for (kind, layout) in Layout::ALL.into_iter().enumerate() {
        for worker in 0..WORKERS {
            split(&operator, layout, worker, REGIONS_OF_A_WORKER).await;
            let seed = (kind * WORKERS + worker) as u64;
            let mut subject = Subject::new(layout.client(&cluster).await, worker, seed, false);
            let stop = Arc::clone(&stop);
            workers.push(tokio::spawn(async move {
                let mut steps = 0;
                while steps < OPERATIONS_UNDER_MOVES || !stop.load(Ordering::Relaxed) {
                    subject.step().await;
                    steps += 1;
                }
                println!("{layout:?} {worker}: {steps} operations");
                subject
            }));
        }
    }
    moves::split_and_transfer(&operator, WORKERS, SPLITS, TRANSFERS).await;
    stop.store(true, Ordering::Relaxed);
    for worker in workers {
        let mut subject = worker.await.expect("no worker fails");
        subject.check_all().await;
    }
    operator.replicas_are_equal(STORES, PATIENCE).await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_value_is_gone_when_its_time_to_live_is_over() {
    let _alone = alone().await;
    let options = ClusterOptions { stores: 1, ..ClusterOptions::default() };
    let cluster = Cluster::start(options).await.expect("the cluster starts");
    for layout in Layout::ALL {
        let client = layout.client(&cluster).await;
        let bound = vec![layout.bound(b"u")];
        cluster.client().await.expect("a client").split_region(bound).await.expect("it splits");
        let gone = ["t/a".to_owned(), "t/b".to_owned(), "t/c".to_owned()];
        client.put_with_ttl(gone[0].clone(), "1", 2).await.expect("a put");
        let pairs = gone[1..].iter().map(|key| (key.clone(), "2"));
        client.batch_put_with_ttl(pairs, [2, 2]).await.expect("a batch put");
        client.put("t/d".to_owned(), "3").await.expect("a put");
        let left = client.get_key_ttl_secs(gone[0].clone()).await.expect("a ttl");
        assert!(left.is_some_and(|left| (1..=2).contains(&left)), "{left:?} seconds are left");

        for key in &gone {
            eventually("the value expires", Duration::from_secs(10), async || {
                match client.get(key.clone()).await.expect("a get") {
                    None => Ok(()),
                    Some(value) => Err(format!("{value:?}")),
                }
            })
            .await;
        }
        let left = client.get_key_ttl_secs(gone[0].clone()).await.expect("a ttl");
        assert_eq!(left, None, "what is gone has no time left");
        let found = client.scan("t/".to_owned().."u".to_owned(), 10).await.expect("a scan");
        assert_eq!(found, [("t/d".to_owned(), "3").into()]);
        let found = client.batch_get(gone.clone()).await.expect("a batch get");
        assert_eq!(found, []);
        let swapped = client
            .with_atomic_for_cas()
            .compare_and_swap(gone[0].clone(), None, "new")
            .await
            .expect("a swap");
        assert_eq!(swapped, (None, true), "what is gone does not exist");
    }
    cluster.stop().await;
}
