//! Disks that fail and directories that vanish, with real processes. Acknowledged writes are never
//! forgotten without an error, and the operator learns which part is lost and what to do.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::eventually;
use common::http::try_page;
use common::operator::Operator;
use common::process::{PATIENCE, Process, free_address, run};
use esker_rpc::proto::metapb::StoreState;

/// Nodes with directories of their own. They can be stopped, damaged and started again.
struct Machines {
    root: tempfile::TempDir,
    addresses: Vec<String>,
    join: Vec<String>,
    running: Vec<Option<Process>>,
}

impl Machines {
    /// Makes `count` nodes, of which the first `placements` are placement members. Nothing runs
    /// yet.
    fn new(count: usize, placements: usize) -> Self {
        let addresses: Vec<String> = (0..count).map(|_| free_address()).collect();
        let join = addresses[..placements].to_vec();
        let root = tempfile::tempdir().expect("a temporary directory");
        Machines { root, addresses, join, running: (0..count).map(|_| None).collect() }
    }

    async fn all_started(count: usize, placements: usize) -> (Self, Operator) {
        let mut machines = Machines::new(count, placements);
        for node in 0..count {
            machines.start(node);
        }
        let operator = Operator::connect(&machines.join).await;
        (machines, operator)
    }

    fn folder(&self, node: usize) -> PathBuf {
        self.root.path().join(format!("n{}", node + 1))
    }

    fn process(&self, node: usize, more: &[&str]) -> Process {
        Process::node_with(&self.folder(node), &self.addresses[node], &self.join, more)
    }

    fn start(&mut self, node: usize) {
        self.running[node] = Some(self.process(node, &[]));
    }

    async fn kill(&mut self, node: usize) {
        self.running[node].take().expect("it runs").kill().await;
    }

    async fn terminate(&mut self, node: usize) {
        self.running[node].take().expect("it runs").terminate().await;
    }

    /// Starts a node that must refuse. Returns the line that gives the reason.
    async fn refusal(&self, node: usize, more: &[&str]) -> String {
        let (status, log) = self.process(node, more).ended().await;
        let line = log.lines().last().unwrap_or_default().to_owned();
        assert!(status.code() == Some(1) && line.starts_with("error: "), "{status}: {log}");
        line
    }
}

fn copy(from: &Path, to: &Path) {
    if to.exists() {
        fs::remove_dir_all(to).expect("a folder");
    }
    fs::create_dir_all(to).expect("a folder");
    for entry in fs::read_dir(from).expect("a folder") {
        let entry = entry.expect("an entry");
        let target = to.join(entry.file_name());
        match entry.file_type().expect("a type").is_dir() {
            true => copy(&entry.path(), &target),
            false => drop(fs::copy(entry.path(), target).expect("a file")),
        }
    }
}

/// Puts keys that are acknowledged, and remembers them.
async fn put(operator: &Operator, prefix: &str, count: usize) -> Vec<String> {
    let keys: Vec<String> = (0..count).map(|n| format!("{prefix}{n}")).collect();
    for key in &keys {
        operator.kv().put(key.clone(), "kept").await.expect("a write");
    }
    keys
}

async fn all_there(operator: &Operator, keys: &[String]) {
    for key in keys {
        let found = operator.kv().get(key.clone()).await.expect("a read");
        assert_eq!(found.as_deref(), Some(&b"kept"[..]), "{key} is lost");
    }
}

/// The stores that placement knows and that were not removed.
async fn stores(operator: &Operator) -> Vec<(u64, String)> {
    let stores = operator.placement().get_stores(true).await.expect("placement answers");
    stores.into_iter().map(|store| (store.id, store.address)).collect()
}

/// Waits until `count` stores are known, and returns them.
async fn stores_are(operator: &Operator, count: usize) -> Vec<(u64, String)> {
    eventually("the stores are known", PATIENCE, async || {
        let known = stores(operator).await;
        (known.len() == count).then(|| known.clone()).ok_or_else(|| format!("{known:?}"))
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_lost_a_part_of_its_memory_refuses_to_start_and_says_which() {
    // The placement driver on a node of its own, and three stores.
    let (mut machines, operator) = Machines::all_started(4, 1).await;
    stores_are(&operator, 4).await;
    operator.whole(3, PATIENCE).await;
    let keys = put(&operator, "key", 5).await;
    let lost = 3;
    machines.kill(lost).await;
    let folder = machines.folder(lost).join("store");
    let whole = machines.root.path().join("whole");
    copy(&folder, &whole);
    for (parts, named) in [
        (&["log"][..], "log"),
        (&["kv"], "kv"),
        (&["kv", "log"], "kv"),
        (&["IDENT"], "IDENT"),
        (&["IDENT", "kv"], "IDENT"),
    ] {
        for part in parts {
            let part = folder.join(part);
            if part.is_dir() {
                fs::remove_dir_all(part).expect("a folder");
            } else {
                fs::remove_file(part).expect("a file");
            }
        }
        let line = machines.refusal(lost, &[]).await;
        assert!(line.contains(&folder.join(named).display().to_string()), "{parts:?}: {line}");
        assert!(line.contains("--replace"), "{parts:?}: {line}");
        copy(&whole, &folder);
    }
    // The whole directory is lost: it is empty, at an address that is taken. Nothing is made in it.
    fs::remove_dir_all(&folder).expect("a folder");
    let line = machines.refusal(lost, &[]).await;
    assert!(line.contains(&machines.addresses[lost]) && line.contains("--replace"), "{line}");
    assert!(!folder.join("IDENT").exists(), "half made");
    copy(&whole, &folder);
    // When it is whole again, the node starts, and everything is there.
    machines.start(lost);
    operator.whole(3, PATIENCE).await;
    all_there(&operator, &keys).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_of_yesterday_is_refused_and_a_lost_store_is_replaced() {
    let (mut machines, operator) = Machines::all_started(4, 1).await;
    operator.whole(3, PATIENCE).await;
    let lost = 3;
    eventually("the store is known", PATIENCE, async || {
        let known = stores(&operator).await;
        let there = known.iter().any(|(_, address)| *address == machines.addresses[lost]);
        there.then_some(()).ok_or_else(|| format!("{known:?}"))
    })
    .await;
    let old = operator.store_at(&machines.addresses[lost]).await;
    // A copy of a store that was stopped well, which then goes on for a while.
    machines.terminate(lost).await;
    let folder = machines.folder(lost).join("store");
    let yesterday = machines.root.path().join("yesterday");
    copy(&folder, &yesterday);
    let mut process = machines.process(lost, &[]);
    process.line_after("ready: node at ").await;
    process.kill().await;
    copy(&yesterday, &folder);
    let line = machines.refusal(lost, &[]).await;
    assert!(line.contains("older copy") && line.contains(&format!("store {old}")), "{line}");

    // The store is lost for good. Another store takes its place, and the old one is gone forever.
    fs::remove_dir_all(&folder).expect("a folder");
    let mut process = machines.process(lost, &["--replace"]);
    process.line_after("ready: node at ").await;
    let new = operator.store_at(&machines.addresses[lost]).await;
    assert_ne!(new, old, "the new store took the id of the old one");
    let all = operator.placement().get_stores(false).await.expect("placement answers");
    let state = all.iter().find(|store| store.id == old).map(|store| store.state());
    assert_eq!(state, Some(StoreState::Tombstone));
    process.terminate().await;
    copy(&yesterday, &folder);
    let line = machines.refusal(lost, &[]).await;
    assert!(line.contains(&format!("store {old} was removed")), "{line}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_lost_its_directory_never_votes_itself_a_new_group_and_is_replaced() {
    let mut machines = Machines::new(4, 3);
    for member in 0..3 {
        machines.start(member);
    }
    let operator = Operator::connect(&machines.join).await;
    operator.whole(3, PATIENCE).await;
    let keys = put(&operator, "key", 5).await;
    // The fourth node is registered while the second one is away.
    machines.kill(1).await;
    machines.start(3);
    let before = stores_are(&operator, 4).await;
    let timestamp = operator.placement().tso(1).await.expect("a timestamp");
    let id = operator.placement().alloc_id(1).await.expect("an id").start;
    machines.kill(0).await;
    machines.kill(2).await;
    // The third node, which knew of it, loses everything. The second one, which did not, returns.
    fs::remove_dir_all(machines.folder(2)).expect("a folder");
    machines.start(1);
    machines.start(2);
    eventually("the third member says that it waits", PATIENCE, async || {
        let log = machines.running[2].as_ref().map(Process::log).unwrap_or_default();
        let says = log.contains("esker placement replace placement-");
        says.then_some(()).ok_or(log)
    })
    .await;
    // Two of three run, but one of them has no memory: there is no leader.
    let asked = run(&["placement", "tso", "--placement", &machines.join[1]]).await;
    assert_eq!(asked.status.code(), Some(1), "{asked:?}");

    machines.start(0);
    let operator = Operator::connect(&machines.join).await;
    assert_eq!(stores(&operator).await, before, "placement forgot or invented a store");
    let later = operator.placement().tso(1).await.expect("a timestamp");
    assert!(later > timestamp, "timestamps went back");
    let next = operator.placement().alloc_id(1).await.expect("an id").start;
    assert!(next > id, "id {next} after {id}");
    all_there(&operator, &keys).await;

    // With a command the third member joins again, under a new id.
    let members = operator.placement().get_members().await.expect("an answer").members;
    let address = format!("http://{}", machines.addresses[2]);
    let lost = members.iter().find(|m| m.client_urls.contains(&address)).expect("a member");
    let placement = ["--placement", &machines.join[0]];
    let refused = run(&["placement", "replace", "placement-9", placement[0], placement[1]]).await;
    assert!(
        refused.status.code() == Some(1) && refused.errors.contains("placement-9"),
        "{refused:?}"
    );
    let done = run(&["placement", "replace", &lost.name, placement[0], placement[1]]).await;
    assert!(done.status.success(), "{done:?}");
    let members = operator.placement().get_members().await.expect("an answer").members;
    let again = members.iter().find(|m| m.client_urls.contains(&address)).expect("a member");
    assert!(members.len() == 3 && again.name == lost.name && again.member_id > 3, "{members:?}");
    let twice = run(&["placement", "replace", &lost.name, placement[0], placement[1]]).await;
    assert!(twice.status.code() == Some(1), "{twice:?}");

    // It is a full member: with it and one other the group goes on, after restarts, too.
    machines.terminate(0).await;
    machines.kill(2).await;
    machines.start(2);
    let operator = Operator::connect(&machines.join[1..]).await;
    let last = operator.placement().tso(1).await.expect("a timestamp");
    assert!(last > later);
    assert_eq!(stores(&operator).await, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_whose_directory_is_not_whole_refuses_and_a_lone_one_is_never_founded_anew() {
    let (mut machines, operator) = Machines::all_started(1, 1).await;
    operator.whole(1, PATIENCE).await;
    machines.kill(0).await;
    let folder = machines.folder(0).join("placement");
    let whole = machines.root.path().join("whole");
    copy(&folder, &whole);
    for part in ["log", "kv"] {
        fs::remove_dir_all(folder.join(part)).expect("a folder");
        let line = machines.refusal(0, &[]).await;
        assert!(line.contains("placement member 1") && line.contains(part), "{line}");
        assert!(line.contains("esker placement replace"), "{line}");
        copy(&whole, &folder);
    }
    fs::remove_file(folder.join("MEMBERS")).expect("a file");
    assert!(machines.refusal(0, &[]).await.contains("MEMBERS"));
    // Its store was in use: this is no new cluster.
    fs::remove_dir_all(&folder).expect("a folder");
    let line = machines.refusal(0, &[]).await;
    assert!(line.contains(&folder.display().to_string()) && line.contains("empty"), "{line}");
    copy(&whole, &folder);
    machines.start(0);
    operator.whole(1, PATIENCE).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lone_member_whose_disk_vanished_founds_no_second_cluster() {
    let (mut machines, operator) = Machines::all_started(2, 1).await;
    stores_are(&operator, 2).await;
    let keys = put(&operator, "key", 5).await;
    machines.kill(0).await;
    let (folder, whole) = (machines.folder(0), machines.root.path().join("whole"));
    fs::rename(&folder, &whole).expect("a folder");
    // The other store still asks for its cluster.
    let line = machines.refusal(0, &[]).await;
    assert!(line.contains("is asked for at its address") && line.contains("placement"), "{line}");
    // The member remembers that when no store asks any more.
    machines.kill(1).await;
    let line = machines.refusal(0, &[]).await;
    assert!(line.contains("is asked for at its address"), "{line}");
    fs::remove_dir_all(&folder).expect("a folder");
    fs::rename(&whole, &folder).expect("a folder");
    machines.start(0);
    machines.start(1);
    let operator = Operator::connect(&machines.join).await;
    all_there(&operator, &keys).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_older_copy_of_a_members_directory_and_another_members_are_refused() {
    let (mut machines, operator) = Machines::all_started(3, 3).await;
    operator.whole(3, PATIENCE).await;
    machines.terminate(2).await;
    let folder = machines.folder(2).join("placement");
    let (yesterday, newest) =
        (machines.root.path().join("yesterday"), machines.root.path().join("newest"));
    copy(&folder, &yesterday);
    let mut process = machines.process(2, &[]);
    process.line_after("ready: node at ").await;
    process.kill().await;
    copy(&folder, &newest);
    copy(&yesterday, &folder);
    let line = machines.refusal(2, &[]).await;
    assert!(line.contains("older copy") && line.contains("esker placement replace"), "{line}");
    machines.terminate(1).await;
    copy(&machines.folder(1).join("placement"), &folder);
    let line = machines.refusal(2, &[]).await;
    assert!(line.contains("is the directory of member placement-"), "{line}");
    copy(&newest, &folder);
    machines.start(1);
    let mut process = machines.process(2, &[]);
    process.line_after("ready: node at ").await;
    process.terminate().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_whose_copy_was_started_elsewhere_ends() {
    let (mut machines, operator) = Machines::all_started(2, 1).await;
    stores_are(&operator, 2).await;
    let mut original = machines.running[1].take().expect("it runs");
    original.line_after("ready: node at ").await;
    original.freeze().await;
    let elsewhere = machines.root.path().join("elsewhere");
    copy(&machines.folder(1), &elsewhere);
    let mut moved = Process::node_with(&elsewhere, &free_address(), &machines.join, &[]);
    moved.line_after("ready: node at ").await;
    original.thaw().await;
    // Placement may notice first, or a leader that finds its log shorter.
    let (status, log) = original.ended().await;
    let why = ["from a copy of its data directory", "its disk has lost data"];
    assert!(!status.success() && why.iter().any(|why| log.contains(why)), "{log}");
    moved.terminate().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_store_leaves_nothing_behind_and_the_only_one_is_not_replaced() {
    let mut machines = Machines::new(2, 1);
    machines.running[0] = Some(machines.process(0, &["--roles", "placement"]));
    machines.start(1);
    let operator = Operator::connect(&machines.join).await;
    operator.whole(1, PATIENCE).await;
    machines.kill(1).await;
    let store = machines.folder(1).join("store");
    fs::remove_dir_all(&store).expect("a folder");
    for (more, why) in [(&[][..], "is the address of store"), (&["--replace"], "the only one")] {
        let line = machines.refusal(1, more).await;
        assert!(line.contains(why), "{line}");
        assert!(!store.exists(), "{more:?} left something behind");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_whose_data_is_damaged_hands_over_says_what_and_does_not_open_again() {
    let (mut machines, operator) = Machines::all_started(4, 1).await;
    operator.whole(3, PATIENCE).await;
    let keys = put(&operator, "key", 200).await;
    // The data must be on disk, and not in a cache, so the store is stopped cleanly and started
    // again.
    let regions = operator.regions().await;
    let holder = regions[0].region.peers.iter().map(|peer| peer.store.0);
    let mut victim = None;
    for store in holder {
        let address = operator.address(store).await.expect("placement knows it");
        let node = machines.addresses.iter().position(|a| *a == address).expect("one of ours");
        if node != 0 {
            victim = Some((node, store));
        }
    }
    let (node, store) = victim.expect("two of three replicas are not on the first node");
    machines.terminate(node).await;
    let kv = machines.folder(node).join("store/kv");
    let mut spoilt = 0;
    for entry in fs::read_dir(&kv).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.extension().is_none_or(|extension| extension != "sst") {
            continue;
        }
        let mut bytes = fs::read(&path).expect("a file");
        // Only the users' data of the load is damaged. The store's own records stay as they are.
        let marker = b"kept";
        if let Some(at) = bytes.windows(marker.len()).position(|window| window == marker) {
            bytes[at] ^= 0x55;
            fs::write(&path, bytes).expect("a file");
            spoilt += 1;
        }
    }
    assert!(spoilt > 0, "no file of {} holds the keys", kv.display());
    machines.start(node);
    operator.whole(3, PATIENCE).await;
    // The store leads, and gets reads.
    eventually("the damage is met", PATIENCE, async || {
        let region = operator.regions().await.remove(0);
        if region.leader.is_none_or(|leader| leader.store.0 != store) {
            let _ = operator.transfer_leader(&region, store).await;
        }
        all_there(&operator, &keys).await;
        let log = machines.running[node].as_ref().map(Process::log).unwrap_or_default();
        log.contains("stops serving, its data is damaged").then_some(()).ok_or(log)
    })
    .await;
    // No client got wrong data, and another store leads the region.
    all_there(&operator, &keys).await;
    eventually("the operator sees which file", PATIENCE, async || {
        let listed = run(&["store", "list", "--placement", &machines.join[0]]).await;
        let metrics = try_page(&machines.addresses[node], "/metrics").await;
        let metrics = metrics.map_err(|error| error.to_string())?;
        let seen = listed.output.contains("damaged") && metrics.contains("esker_store_damaged 1");
        seen.then_some(()).ok_or_else(|| format!("{}\n{metrics}", listed.output))
    })
    .await;
    machines.terminate(node).await;
    let line = machines.refusal(node, &[]).await;
    assert!(line.contains(".sst") && line.contains("--replace"), "{line}");
    fs::remove_dir_all(machines.folder(node)).expect("a folder");
    let mut process = machines.process(node, &["--replace"]);
    process.line_after("ready: node at ").await;
    machines.running[node] = Some(process);
    operator.whole(3, PATIENCE).await;
    all_there(&operator, &keys).await;
}
