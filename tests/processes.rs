//! Nodes as processes of their own, killed in the middle of their work. Acknowledged writes stay,
//! and the other nodes carry on.

mod common;

use std::path::Path;
use std::time::{Duration, Instant};

use common::eventually;
use common::http::metric;
use common::load::{self, Load, Outcome};
use common::operator::Operator;
use common::process::{PATIENCE, Process, free_address};
use esker_client::{KvClient, RegionInfo};
use futures_util::future::try_join_all;

const NODES: usize = 3;
const REGIONS: u64 = 6;
const WRITERS: u64 = 6;

/// Writes that a load makes before something happens to the cluster, and after.
const SOME_WRITES: u64 = 300;

/// The time after the death of a node within which every region serves again.
const FAILOVER: Duration = Duration::from_secs(5);

/// Three processes, each with a directory and an address of its own.
struct Nodes {
    root: tempfile::TempDir,
    addresses: Vec<String>,
    /// The members of the placement driver.
    join: Vec<String>,
    processes: Vec<Option<Process>>,
    operator: Operator,
}

impl Nodes {
    /// Starts the nodes, and waits until they are one cluster with some regions.
    async fn start(placements: usize) -> Self {
        let root = tempfile::tempdir().expect("a temporary directory");
        let addresses: Vec<String> = (0..NODES).map(|_| free_address()).collect();
        let join = addresses[..placements].to_vec();
        let processes = addresses
            .iter()
            .enumerate()
            .map(|(node, address)| {
                Some(Process::node(&root.path().join(node.to_string()), address, &join))
            })
            .collect();
        let operator = Operator::connect(&join).await;
        operator.whole(NODES, PATIENCE).await;
        let made = operator.kv().split_region(load::split_keys(REGIONS)).await;
        made.expect("a whole cluster splits its regions");
        operator.whole(NODES, PATIENCE).await;
        Nodes { root, addresses, join, processes, operator }
    }

    async fn kill(&mut self, node: usize) {
        self.processes[node].take().expect("it runs").kill().await;
    }

    fn start_again(&mut self, node: usize) {
        let data_dir = self.root.path().join(node.to_string());
        let process = Process::node(&data_dir, &self.addresses[node], &self.join);
        self.processes[node] = Some(process);
    }

    /// Moves leaders to a node until it leads its share, because the loss of a node without leaders
    /// has little effect.
    async fn let_lead(&self, node: usize) {
        let store = self.operator.store_at(&self.addresses[node]).await;
        eventually("the node leads regions", PATIENCE, async || {
            let regions = self.operator.regions().await;
            let leads =
                |region: &&RegionInfo| region.leader.is_some_and(|leader| leader.store.0 == store);
            let led = regions.iter().filter(leads).count();
            if led >= regions.len() / NODES {
                return Ok(());
            }
            if let Some(other) = regions.iter().find(|region| !leads(region)) {
                self.operator.transfer_leader(other, store).await?;
            }
            Err(format!("it leads {led} of {} regions", regions.len()))
        })
        .await;
    }
}

/// Writes to every region. Returns how long it took until all have accepted the write.
async fn all_regions_write(client: &KvClient) -> Duration {
    let started = Instant::now();
    let probes = load::probe_keys(REGIONS);
    let writes = probes.into_iter().map(|key| client.put(key, "probe"));
    try_join_all(writes).await.expect("the cluster answers");
    started.elapsed()
}

/// Kills a node under load, and starts it again once the others have carried on.
async fn kill_and_start_again(nodes: &mut Nodes, victim: usize) -> Outcome {
    nodes.let_lead(victim).await;
    let client = nodes.operator.kv().clone();
    let load = Load::start(&client, WRITERS);
    load.acknowledges(SOME_WRITES).await;

    nodes.kill(victim).await;
    let outage = all_regions_write(&client).await;
    assert!(outage <= FAILOVER, "some region was not writable for {outage:?}");

    load.acknowledges(SOME_WRITES).await;
    nodes.start_again(victim);
    load.acknowledges(SOME_WRITES).await;
    let outcome = load.stop().await;
    assert_eq!(outcome.errors, [""; 0], "an error reached a writer");
    assert!(outcome.longest <= FAILOVER, "a write took {:?}", outcome.longest);
    outcome.assert_kept(&client).await;
    let Outcome { acknowledged, longest, .. } = &outcome;
    println!("{outage:?} until all regions wrote; {acknowledged} writes, one of {longest:?}");
    outcome
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_killed_under_load_is_replaced_within_seconds_and_catches_up_when_it_is_back() {
    let mut nodes = Nodes::start(1).await;
    // The first node runs the placement driver, so another one is killed.
    let outcome = kill_and_start_again(&mut nodes, NODES - 1).await;
    let pairs = nodes.operator.replicas_are_equal(NODES, PATIENCE).await;
    assert!(pairs >= outcome.kept_keys() + REGIONS, "the replicas hold {pairs} pairs");
}

#[tokio::test(flavor = "multi_thread")]
async fn with_three_placement_members_no_node_is_indispensable() {
    let mut nodes = Nodes::start(NODES).await;
    // The member that leads the placement driver is the hardest to lose.
    let leader = nodes.operator.placement().leader_address();
    let listens = |address: &String| leader.ends_with(address.as_str());
    let victim = nodes.addresses.iter().position(listens).expect("a member leads");
    let outcome = kill_and_start_again(&mut nodes, victim).await;
    let pairs = nodes.operator.replicas_are_equal(NODES, PATIENCE).await;
    assert!(pairs >= outcome.kept_keys() + REGIONS, "the replicas hold {pairs} pairs");
}

async fn operator_of_playground(data_dir: &Path) -> (Process, Operator) {
    let (process, placement) = Process::playground(data_dir).await;
    let operator = Operator::connect(&[placement]).await;
    (process, operator)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_playground_killed_under_load_has_every_acknowledged_write_on_every_replica() {
    let data_dir = tempfile::tempdir().expect("a temporary directory");
    let (process, operator) = operator_of_playground(data_dir.path()).await;
    let made = operator.kv().split_region(load::split_keys(REGIONS)).await;
    made.expect("a whole cluster splits its regions");
    let load = Load::start(operator.kv(), WRITERS);
    load.acknowledges(2 * SOME_WRITES).await;
    process.kill().await;
    let outcome = load.abandon().await;

    let (_process, operator) = operator_of_playground(data_dir.path()).await;
    outcome.assert_kept(operator.kv()).await;
    let pairs = operator.replicas_are_equal(NODES, PATIENCE).await;
    assert!(pairs >= outcome.kept_keys(), "the replicas hold {pairs} pairs");
    // The cluster is not only readable.
    let outage = all_regions_write(operator.kv()).await;
    assert!(outage <= FAILOVER, "some region was not writable for {outage:?}");
}

/// Attempts to reach a store that is away, after which the log must still have one line.
const ATTEMPTS: f64 = 6.0;

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_is_away_is_one_line_in_the_log_and_one_more_when_it_is_back() {
    let mut nodes = Nodes::start(1).await;
    let victim = NODES - 1;
    nodes.let_lead(victim).await;
    let store = nodes.operator.store_at(&nodes.addresses[victim]).await;
    nodes.kill(victim).await;
    for other in 0..victim {
        eventually("the node is missed", PATIENCE, async || {
            let breaks = metric(&nodes.addresses[other], "esker_transport_breaks_total").await;
            let breaks = breaks.unwrap_or(0.0);
            match breaks >= ATTEMPTS {
                true => Ok(()),
                false => Err(format!("{breaks} attempts")),
            }
        })
        .await;
    }
    nodes.start_again(victim);
    let lines = |nodes: &Nodes, node: usize, what: &str| {
        let log = nodes.processes[node].as_ref().expect("it runs").log();
        let about = format!("store={store} ");
        log.lines().filter(|line| line.contains(what) && line.contains(&about)).count()
    };
    for other in 0..victim {
        eventually("the node is back", PATIENCE, async || {
            match lines(&nodes, other, "the stream to a store is back") {
                1 => Ok(()),
                count => Err(format!("{count} lines")),
            }
        })
        .await;
        assert_eq!(lines(&nodes, other, "the stream to a store broke"), 1);
    }
}
