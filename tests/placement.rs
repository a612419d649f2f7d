//! Members of the placement driver as processes that are frozen (SIGSTOP) or killed. A frozen
//! process still has its sockets, so no connection breaks, and nothing answers. Neither new clients
//! nor those that are connected already may wait for it.

mod common;

use std::time::{Duration, Instant};

use common::eventually;
use common::load;
use common::operator::Operator;
use common::process::{self, PATIENCE, Process, free_address};
use esker_client::{KvClient, PlacementClient};
use esker_rpc::proto::pdpb::GetMembersRequest;
use esker_rpc::proto::pdpb::pd_client::PdClient;
use futures_util::future::try_join_all;
use tikv_client::RawClient;

const MEMBERS: usize = 3;
const STORES: usize = 3;
const REGIONS: u64 = 4;

/// How long a client may wait for anything while one member is frozen or gone, an election
/// included.
const WITHIN: Duration = Duration::from_secs(3);

struct Member {
    address: String,
    /// `None` once it has been killed.
    process: Option<Process>,
}

impl Member {
    async fn freeze(&self) {
        self.process.as_ref().expect("it runs").freeze().await;
    }

    async fn thaw(&self) {
        self.process.as_ref().expect("it runs").thaw().await;
    }
}

/// Placement members and stores, each a process of its own.
struct Placed {
    members: Vec<Member>,
    _stores: Vec<Process>,
    operator: Operator,
    _root: tempfile::TempDir,
}

impl Placed {
    async fn start() -> Self {
        let root = tempfile::tempdir().expect("a temporary directory");
        let join: Vec<String> = (0..MEMBERS).map(|_| free_address()).collect();
        let directory = |kind: &str, number: usize| root.path().join(format!("{kind}-{number}"));
        let members = join
            .iter()
            .enumerate()
            .map(|(number, address)| Member {
                address: address.clone(),
                process: Some(Process::node_with(
                    &directory("member", number),
                    address,
                    &join,
                    &["--roles", "placement"],
                )),
            })
            .collect();
        let stores = (0..STORES)
            .map(|number| {
                let directory = directory("store", number);
                Process::node_with(&directory, &free_address(), &join, &["--roles", "store"])
            })
            .collect();
        let operator = Operator::connect(&join).await;
        operator.whole(STORES, PATIENCE).await;
        let made = operator.kv().split_region(load::split_keys(REGIONS)).await;
        made.expect("a whole cluster splits its regions");
        operator.whole(STORES, PATIENCE).await;
        Placed { members, _stores: stores, operator, _root: root }
    }

    /// The member that leads, and one that follows.
    fn leader(&self) -> (usize, usize) {
        let address = self.operator.placement().leader_address();
        let led = self.members.iter().position(|member| address.ends_with(&member.address));
        let leader = led.expect("a member leads");
        (leader, (leader + 1) % MEMBERS)
    }

    fn another(&self, than: usize) -> String {
        self.members[(than + 1) % MEMBERS].address.clone()
    }

    /// The leader's address, as one member reports it.
    async fn leader_says(&self, member: usize) -> Result<String, String> {
        let address = format!("http://{}", self.members[member].address);
        let mut client = PdClient::connect(address).await.map_err(|error| error.to_string())?;
        let answer = client
            .get_members(GetMembersRequest::default())
            .await
            .map_err(|status| status.to_string())?
            .into_inner();
        let leader = answer.leader.ok_or("no leader")?;
        Ok(leader.client_urls[0].trim_start_matches("http://").to_owned())
    }

    /// Lets clients of every kind work at the same time. Some know only a member that is well,
    /// others also the victim. `what` is printed beside the figures.
    async fn everybody_gets_on(&self, what: &str, victim: usize) {
        let well = self.another(victim);
        let endpoints = vec![self.members[victim].address.clone(), well.clone()];
        let placement = self.operator.placement();
        let keys = load::probe_keys(REGIONS);
        let a_tikv_client = async {
            let client = RawClient::new(vec![well.as_str()]).await.map_err(said)?;
            client.put("tikv".to_owned(), what.to_owned()).await.map_err(said)?;
            let value = client.get("tikv".to_owned()).await.map_err(said)?;
            assert_eq!(value.as_deref(), Some(what.as_bytes()));
            Ok(())
        };
        let a_command = async {
            let arguments = ["kv", "put", "command", "value", "--placement", well.as_str()];
            let finished = process::run(&arguments).await;
            if finished.status.success() { Ok(()) } else { Err(finished.errors) }
        };
        let a_new_client = async {
            let placement = PlacementClient::connect(endpoints).await.map_err(said)?;
            KvClient::new(placement, []).put("new", what.to_owned()).await.map_err(said)
        };
        let cached = async {
            let writes =
                keys.iter().map(|key| self.operator.kv().put(key.clone(), what.to_owned()));
            try_join_all(writes).await.map(|_| ()).map_err(said)
        };
        let uncached = async {
            let client = KvClient::new(placement.clone(), []);
            let writes = keys.iter().map(|key| client.put(key.clone(), what.to_owned()));
            try_join_all(writes).await.map(|_| ()).map_err(said)
        };
        let timestamps = async { placement.tso(1).await.map(|_| ()).map_err(said) };
        let took = tokio::join!(
            timed(a_tikv_client),
            timed(a_command),
            timed(a_new_client),
            timed(cached),
            timed(uncached),
            timed(timestamps),
        );
        let took = [
            ("a new tikv-client", took.0),
            ("esker kv put", took.1),
            ("a new client", took.2),
            ("cached regions", took.3),
            ("uncached regions", took.4),
            ("a timestamp", took.5),
        ];
        for (who, (took, outcome)) in &took {
            println!("{what}: {who}: {took:?}");
            assert_eq!(outcome, &Ok(()), "{what}: {who}");
        }
        for (who, (took, _)) in &took {
            assert!(*took < WITHIN, "{what}: {who} took {took:?}");
        }
    }

    /// Waits until a member that was away follows the others' leader.
    async fn follows(&self, member: usize) {
        let (leader, _) = self.leader();
        eventually("the member is back", PATIENCE, async || {
            let says = self.leader_says(member).await?;
            if says == self.members[leader].address { Ok(()) } else { Err(says) }
        })
        .await;
    }
}

fn said(error: impl std::fmt::Display) -> String {
    error.to_string()
}

async fn timed(event: impl Future<Output = Result<(), String>>) -> (Duration, Result<(), String>) {
    let started = Instant::now();
    // A hang is distinguished from slowness, and both fail the test.
    let outcome = tokio::time::timeout(PATIENCE, event).await;
    (started.elapsed(), outcome.unwrap_or_else(|_| Err("it hangs".to_owned())))
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_waits_for_a_placement_member_that_is_frozen_or_killed() {
    let mut placed = Placed::start().await;
    let placement = placed.operator.placement().clone();
    placed.everybody_gets_on("all are well", 0).await;

    let (_, follower) = placed.leader();
    placed.members[follower].freeze().await;
    placed.everybody_gets_on("a follower is frozen", follower).await;
    placed.members[follower].thaw().await;
    placed.follows(follower).await;

    let (frozen, _) = placed.leader();
    let before = placement.tso(1).await.expect("a timestamp");
    placed.members[frozen].freeze().await;
    placed.everybody_gets_on("the leader is frozen", frozen).await;
    let (leader, _) = placed.leader();
    assert_ne!(leader, frozen, "somebody else leads");
    let after = placement.tso(1).await.expect("a timestamp");
    placed.members[frozen].thaw().await;
    // When it wakes, it believes that it leads. It must not answer so, and no client may return to
    // it.
    let says = placed.leader_says(frozen).await.expect("it answers");
    assert_eq!(says, placed.members[leader].address);
    placed.everybody_gets_on("the old leader is back", frozen).await;
    assert_eq!(placed.leader().0, leader, "the clients stay where they are");
    let last = placement.tso(1).await.expect("a timestamp");
    let order = [before, after, last];
    assert!(order.is_sorted(), "{order:?}");
    placed.follows(frozen).await;

    let (killed, _) = placed.leader();
    placed.members[killed].process.take().expect("it runs").kill().await;
    placed.everybody_gets_on("the leader is killed", killed).await;
}
