//! The key-value client against stores that lead, do not lead, split, die and stay silent.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use esker_client::kv::{KeyTtl, Pair, Swap};
use esker_client::{ClientError, KvClient, PlacementClient};
use esker_model::RegionId;
use esker_model::limits::MAX_COMMAND_BYTES;
use esker_rpc::proto::errorpb::{
    self, NotLeader, RaftEntryTooLarge, ServerIsBusy, UndeterminedResult,
};
use esker_rpc::server::MAX_MESSAGE_BYTES;
use esker_rpc::service::StoreService;

use crate::placement::Placement;
use crate::support::{Server, closed_address, soon};
use crate::world::World;

const NO_LOCAL: [Arc<dyn StoreService>; 0] = [];

/// Three stores, five regions, and a client that knows none of them yet.
struct Cluster {
    world: World,
    placement: Placement,
    stores: Vec<Server>,
    client: KvClient,
}

impl Cluster {
    async fn start() -> Self {
        let world = World::new(3);
        for (key, leader) in [("d", 2), ("h", 3), ("m", 1), ("t", 2)] {
            world.split(key, leader);
        }
        let mut stores = Vec::new();
        for store in 1..=3 {
            stores.push(world.serve(store).await);
        }
        let placement = Placement::start(&world, 1).await;
        let client = KvClient::new(placement.connect().await, NO_LOCAL);
        Cluster { world, placement, stores, client }
    }
}

fn pair(key: &'static str, value: &'static str) -> Pair {
    (key.into(), value.into())
}

/// One key in each region, and one more in the last.
fn six() -> Vec<Pair> {
    vec![
        pair("a", "1"),
        pair("e", "2"),
        pair("k", "3"),
        pair("n", "4"),
        pair("u", "5"),
        pair("z", "6"),
    ]
}

fn keys(pairs: &[Pair]) -> Vec<Bytes> {
    pairs.iter().map(|(key, _)| key.clone()).collect()
}

#[tokio::test]
async fn single_keys_are_written_read_swapped_and_removed_wherever_they_live() {
    let cluster = Cluster::start().await;
    let client = &cluster.client;
    for (key, value) in six() {
        assert_eq!(client.get(key.clone()).await.expect("read"), None);
        client.put(key.clone(), value.clone()).await.expect("written");
        assert_eq!(client.get(key.clone()).await.expect("read"), Some(value.clone()));
        let swap = client.compare_and_swap(key.clone(), None, "x").await.expect("answered");
        assert_eq!(swap, Swap { swapped: false, previous: Some(value.clone()) });
        let swap = client.compare_and_swap(key.clone(), Some(value.clone()), "x").await;
        assert_eq!(swap.expect("answered"), Swap { swapped: true, previous: Some(value) });
        assert_eq!(client.get_ttl(key.clone()).await.expect("answered"), KeyTtl::Never);
        client.put_with_ttl(key.clone(), "y", 60).await.expect("written");
        let ttl = client.get_ttl(key.clone()).await.expect("answered");
        assert_eq!(ttl, KeyTtl::Left(Duration::from_secs(60)));
        client.delete(key.clone()).await.expect("removed");
        assert_eq!(client.get_ttl(key.clone()).await.expect("answered"), KeyTtl::NotFound);
        let swap = client.compare_and_swap(key, None, "z").await.expect("answered");
        assert_eq!(swap, Swap { swapped: true, previous: None });
    }
}

#[tokio::test]
async fn batches_are_cut_up_by_region_and_put_together_again() {
    let cluster = Cluster::start().await;
    let client = &cluster.client;
    client.batch_put(six()).await.expect("written");
    let calls = cluster.world.take_calls();
    assert_eq!(calls.len(), 5, "one request for each region: {calls:?}");
    let mut asked = keys(&six());
    asked.reverse();
    asked.push("missing".into());
    assert_eq!(client.batch_get(asked).await.expect("read"), six());
    client.batch_delete(vec!["a".into(), "z".into()]).await.expect("removed");
    assert_eq!(client.batch_get(keys(&six())).await.expect("read"), six()[1..5]);
    client.batch_put(vec![pair("a", "old"), pair("a", "new")]).await.expect("written");
    assert_eq!(cluster.world.value("a").as_deref(), Some(&b"new"[..]), "the later one counts");
    client.batch_put(Vec::new()).await.expect("nothing to do");
}

#[tokio::test]
async fn a_batch_too_large_for_one_log_entry_is_cut_into_several_requests() {
    let cluster = Cluster::start().await;
    let value = Bytes::from(vec![7; 100 << 10]);
    let pairs: Vec<Pair> = (0..5).map(|i| (format!("a{i}").into(), value.clone())).collect();
    cluster.client.batch_put(pairs.clone()).await.expect("written");
    assert_eq!(cluster.world.take_calls().len(), 3, "two pairs each fit");
    assert_eq!(cluster.client.scan("a", "b", 10).await.expect("read"), pairs);
}

#[tokio::test]
async fn scans_cross_regions_in_both_directions_and_stop_where_they_are_told() {
    let cluster = Cluster::start().await;
    let client = &cluster.client;
    client.batch_put(six()).await.expect("written");
    let all = six();
    let mut reversed = six();
    reversed.reverse();
    assert_eq!(client.scan("", "", 100).await.expect("read"), all);
    assert_eq!(client.scan("", "", 4).await.expect("read"), all[..4]);
    assert_eq!(client.scan("e", "u", 100).await.expect("read"), all[1..4]);
    assert_eq!(client.scan("b", "c", 100).await.expect("read"), []);
    assert_eq!(client.scan("h", "h", 100).await.expect("read"), []);
    assert_eq!(client.scan("", "", 0).await.expect("read"), []);
    assert_eq!(client.reverse_scan("", "", 100).await.expect("read"), reversed);
    assert_eq!(client.reverse_scan("", "", 2).await.expect("read"), reversed[..2]);
    assert_eq!(client.reverse_scan("u", "e", 100).await.expect("read"), reversed[2..5]);
    assert_eq!(client.reverse_scan("m", "", 100).await.expect("read"), reversed[3..]);
    assert_eq!(client.reverse_scan("a", "", 100).await.expect("read"), []);
}

#[tokio::test]
async fn a_range_is_deleted_in_every_region_that_it_touches() {
    let cluster = Cluster::start().await;
    cluster.client.batch_put(six()).await.expect("written");
    cluster.client.delete_range("e", "u").await.expect("removed");
    let left = cluster.client.scan("", "", 100).await.expect("read");
    assert_eq!(keys(&left), ["a", "u", "z"]);
    cluster.client.delete_range("b", "").await.expect("removed");
    assert_eq!(keys(&cluster.client.scan("", "", 100).await.expect("read")), ["a"]);
}

#[tokio::test]
async fn regions_are_split_at_the_keys_given_and_at_none_twice() {
    let cluster = Cluster::start().await;
    let keys = vec!["b".into(), "c".into(), "d".into(), "x".into(), "".into()];
    let regions = cluster.client.split_region(keys.clone()).await.expect("split");
    let starts: Vec<Bytes> = regions.iter().map(|region| region.range.start().clone()).collect();
    assert_eq!(starts, ["", "b", "c", "t", "x"]);
    assert_eq!(cluster.client.split_region(keys).await.expect("nothing to do"), []);
    cluster.client.batch_put(six()).await.expect("written in the new regions");
}

#[tokio::test]
async fn a_leader_that_has_moved_is_asked_at_its_new_place_without_placement() {
    let cluster = Cluster::start().await;
    cluster.client.put("a", "1").await.expect("written");
    cluster.world.freeze_placement();
    cluster.world.lead("a", 3);
    let asked = cluster.placement.regions_asked();
    cluster.world.take_calls();
    cluster.client.put("a", "2").await.expect("written");
    assert_eq!(cluster.world.take_calls(), [(1, "put"), (3, "put")]);
    cluster.client.put("a", "3").await.expect("written");
    assert_eq!(cluster.world.take_calls(), [(3, "put")], "it is remembered");
    assert_eq!(cluster.placement.regions_asked(), asked);
}

#[tokio::test]
async fn regions_that_were_split_behind_the_clients_back_are_divided_up_again() {
    let cluster = Cluster::start().await;
    cluster.client.batch_put(six()).await.expect("written");
    cluster.world.freeze_placement();
    cluster.world.split("v", 3);
    let pairs = vec![pair("u", "left"), pair("w", "right"), pair("z", "right too")];
    cluster.client.batch_put(pairs.clone()).await.expect("written");
    assert_eq!(cluster.client.scan("u", "", 10).await.expect("read"), pairs);
    cluster.world.split("b", 2);
    assert_eq!(cluster.client.get("a").await.expect("read").as_deref(), Some(&b"1"[..]));
    assert_eq!(cluster.client.get("c").await.expect("read"), None);
}

#[tokio::test]
async fn when_a_leader_dies_its_peers_are_asked_though_placement_knows_nothing_yet() {
    let mut cluster = Cluster::start().await;
    cluster.client.put("a", "1").await.expect("written");
    cluster.world.freeze_placement();
    cluster.stores.remove(0).stop().await;
    cluster.world.lead("a", 3);
    let reading = cluster.client.get("a");
    let value = soon("the new leader answers", reading).await.expect("read");
    assert_eq!(value.as_deref(), Some(&b"1"[..]));
}

#[tokio::test]
async fn a_store_that_comes_back_elsewhere_is_found_again() {
    let mut cluster = Cluster::start().await;
    cluster.client.put("e", "1").await.expect("written");
    cluster.stores.remove(1).stop().await;
    let moved = cluster.world.serve(2).await;
    let value = soon("the store answers", cluster.client.get("e")).await.expect("read");
    assert_eq!(value.as_deref(), Some(&b"1"[..]));
    moved.stop().await;
}

#[tokio::test]
async fn requests_to_a_region_led_here_are_function_calls() {
    let world = World::new(1);
    world.split("m", 1);
    // Nothing listens at the address that placement has for the store.
    world.set_address(1, closed_address().await);
    let placement = Placement::start(&world, 1).await;
    let local: Arc<dyn StoreService> = Arc::new(world.store(1));
    let client = KvClient::new(placement.connect().await, [local]);
    client.batch_put(six()).await.expect("written");
    assert_eq!(client.scan("", "", 100).await.expect("read"), six());
    assert!(client.compare_and_swap("q", None, "1").await.expect("answered").swapped);
    assert_eq!(client.get_ttl("q").await.expect("answered"), KeyTtl::Never);
    assert_eq!(client.split_region(vec!["f".into()]).await.expect("split").len(), 2);
    assert_eq!(client.get("a").await.expect("read").as_deref(), Some(&b"1"[..]));
}

#[tokio::test]
async fn a_busy_store_and_an_election_are_waited_out() {
    let cluster = Cluster::start().await;
    let busy = Some(ServerIsBusy { backoff_ms: 5, ..Default::default() });
    let electing = Some(NotLeader { region_id: 1, leader: None });
    for _ in 0..3 {
        cluster
            .world
            .fail_next(errorpb::Error { server_is_busy: busy.clone(), ..Default::default() });
        cluster.world.fail_next(errorpb::Error { not_leader: electing, ..Default::default() });
    }
    cluster.client.put("a", "1").await.expect("written in the end");
    assert_eq!(cluster.world.take_calls().len(), 7);
}

#[tokio::test]
async fn two_stores_that_name_each_other_are_not_asked_in_a_loop() {
    let cluster = Cluster::start().await;
    let client = cluster.client.clone().with_deadline(Duration::from_millis(500));
    let stores = [1, 2].map(|store_id| esker_rpc::proto::metapb::Peer {
        id: 100 + store_id,
        store_id,
        ..Default::default()
    });
    for turn in 0..10_000 {
        let leader = Some(stores[(turn + 1) % 2]);
        let not_leader = Some(NotLeader { region_id: 1, leader });
        cluster.world.fail_next(errorpb::Error { not_leader, ..Default::default() });
    }
    let error = client.put("a", "1").await.expect_err("nobody leads");
    assert!(matches!(error, ClientError::Deadline { .. }), "{error}");
    let calls = cluster.world.take_calls().len();
    assert!(calls < 50, "asked {calls} times in half a second");
}

#[tokio::test]
async fn an_operation_that_cannot_succeed_ends_with_one_line_that_says_why() {
    let mut cluster = Cluster::start().await;
    let error = cluster.client.put("", "1").await.expect_err("refused");
    assert_eq!(
        error.to_string(),
        "store 1 refused put of key \"\" in region 1: a key must not be empty"
    );

    let raft_entry_too_large = Some(RaftEntryTooLarge { region_id: 1, entry_size: 9_000_000 });
    cluster.world.fail_next(errorpb::Error { raft_entry_too_large, ..Default::default() });
    let error = cluster.client.put("a", "1").await.expect_err("too large");
    assert!(
        matches!(error, ClientError::TooLarge { region: RegionId(1), size: 9_000_000, .. }),
        "{error}"
    );

    let hasty = cluster.client.clone().with_deadline(Duration::from_millis(300));
    let address = cluster.stores.remove(1).stop().await.to_string();
    let error = hasty.put("e\n", "1").await.expect_err("its store is gone");
    let message = error.to_string();
    assert!(message.starts_with("put of key e\\x0A gave up after "), "{message}");
    assert!(message.contains(&address) || message.contains("leader"), "{message}");
    assert!(!message.contains('\n'), "{message}");
}

#[tokio::test]
async fn a_request_that_no_store_takes_is_refused_before_it_is_sent() {
    let cluster = Cluster::start().await;
    let client = &cluster.client;
    // What fits in a command is sent.
    let large = Bytes::from(vec![0; MAX_COMMAND_BYTES - 64]);
    client.put("a", large.clone()).await.expect("written");
    cluster.world.take_calls();
    for size in [MAX_COMMAND_BYTES + 1, MAX_MESSAGE_BYTES + 1] {
        let huge = Bytes::from(vec![0; size]);
        let pairs = vec![pair("e", "7"), ("b".into(), huge.clone()), pair("k", "7")];
        let swap = |expected: Option<Bytes>, value: Bytes| async move {
            client.compare_and_swap("b", expected, value).await.map(|_| ())
        };
        let calls: [(&str, futures_util::future::BoxFuture<'_, Result<(), ClientError>>); 5] = [
            ("put", Box::pin(client.put("b", huge.clone()))),
            ("compare and swap", Box::pin(swap(None, huge.clone()))),
            ("compare and swap", Box::pin(swap(Some(huge.clone()), "1".into()))),
            ("compare and swap", Box::pin(swap(Some(large.clone()), large.clone()))),
            ("batch put", Box::pin(client.batch_put(pairs))),
        ];
        for (name, call) in calls {
            let error = soon(name, call).await.expect_err("too large");
            assert!(
                matches!(error, ClientError::TooLarge { region: RegionId(1), .. }),
                "{name}: {error}"
            );
            assert!(error.to_string().starts_with(name), "{error}");
        }
    }
    assert_eq!(cluster.world.take_calls(), [], "no store was asked");
    assert_eq!(cluster.world.value("e"), None, "no part of the batch was sent");
}

/// Lets a store act on a request, and breaks the connection before the store can answer.
async fn cut_off_once_acted(cluster: &mut Cluster) {
    let mut acted = cluster.world.acted.subscribe();
    let before = *acted.borrow_and_update();
    soon("the store acts", acted.wait_for(|now| *now > before)).await.expect("alive");
    let address = cluster.stores.remove(0).stop().await;
    cluster.world.mute.send_replace(false);
    let back = Server::start_at(address, cluster.world.routes(1)).await;
    cluster.stores.insert(0, back);
}

#[tokio::test]
async fn a_put_whose_outcome_is_unknown_is_repeated() {
    let mut cluster = Cluster::start().await;
    cluster.client.put("a", "0").await.expect("written");
    cluster.world.mute.send_replace(true);
    let client = cluster.client.clone();
    let putting = tokio::spawn(async move { client.put("a", "1").await });
    cut_off_once_acted(&mut cluster).await;
    soon("the put ends", putting).await.expect("no panic").expect("written");
    let puts = cluster.world.take_calls().into_iter().filter(|call| *call == (1, "put")).count();
    assert!(puts >= 3, "the first, the one that was cut off, and its repetition: {puts}");
    let tags = cluster.world.take_tags();
    assert_ne!(tags[0], tags[1], "two writes");
    assert!(tags[2..].iter().all(|tag| *tag == tags[1]), "one write, sent again: {tags:?}");
}

#[tokio::test]
async fn the_second_of_two_attempts_that_both_arrive_changes_nothing() {
    let mut cluster = Cluster::start().await;
    cluster.client.put("a", "0").await.expect("written");
    cluster.world.mute.send_replace(true);
    let client = cluster.client.clone();
    let putting = tokio::spawn(async move { client.put("a", "1").await });
    let mut acted = cluster.world.acted.subscribe();
    soon("the store acts", acted.wait_for(|now| *now > 1)).await.expect("alive");
    // Another client's write comes in between.
    cluster.world.set_value("a", "2");
    cluster.world.mute.send_replace(false);
    let address = cluster.stores.remove(0).stop().await;
    let _back = Server::start_at(address, cluster.world.routes(1)).await;
    soon("the put ends", putting).await.expect("no panic").expect("written");
    assert_eq!(cluster.world.value("a").as_deref(), Some(&b"2"[..]), "A, B, and not A again");
}

#[tokio::test]
async fn a_put_whose_outcome_is_unknown_is_not_repeated_where_nobody_would_know_it_again() {
    for oblivious in [true, false] {
        let mut cluster = Cluster::start().await;
        if oblivious {
            cluster.world.forget_about_tags();
        }
        cluster.client.put("a", "0").await.expect("written");
        cluster.world.take_tags();
        cluster.world.mute.send_replace(true);
        let client = cluster.client.clone();
        let putting = tokio::spawn(async move { client.put("a", "1").await });
        let mut acted = cluster.world.acted.subscribe();
        soon("the store acts", acted.wait_for(|now| *now > 1)).await.expect("alive");
        // A store that remembers writes, but not for so long.
        cluster.world.forget_writes();
        cluster.world.mute.send_replace(false);
        let address = cluster.stores.remove(0).stop().await;
        let _back = Server::start_at(address, cluster.world.routes(1)).await;
        let error = soon("the put ends", putting).await.expect("no panic").expect_err("unknown");
        assert!(matches!(error, ClientError::OutcomeUnknown { .. }), "{error}");
        let tags = cluster.world.take_tags();
        assert_eq!(tags.len(), if oblivious { 1 } else { 2 }, "{tags:?}");
        assert_eq!(tags[0].is_none(), oblivious, "{tags:?}");
    }
}

#[tokio::test]
async fn a_write_that_the_store_lost_track_of_is_not_sent_to_a_region_with_another_log() {
    let cluster = Cluster::start().await;
    cluster.client.put("a", "0").await.expect("written");
    let undetermined_result = Some(UndeterminedResult { message: "lost track".into() });
    cluster.world.fail_next(errorpb::Error { undetermined_result, ..Default::default() });
    // The left part keeps the id here, so "c" is in a new region afterwards.
    cluster.world.split("b", 1);
    cluster.world.take_calls();
    let error = cluster.client.put("c", "1").await.expect_err("unknown");
    assert!(matches!(error, ClientError::OutcomeUnknown { .. }), "{error}");
    assert!(error.to_string().contains("lost track"), "{error}");
    assert_eq!(cluster.world.value("c"), None, "the new region was not asked");
    cluster.client.put("c", "2").await.expect("another write, with nothing unknown");
}

#[tokio::test]
async fn a_client_that_was_silent_for_long_learns_how_far_a_region_is_and_goes_on() {
    let cluster = Cluster::start().await;
    cluster.client.put("a", "0").await.expect("written");
    cluster.world.forget_writes();
    let other = KvClient::new(cluster.placement.connect().await, NO_LOCAL);
    other.put("a", "1").await.expect("a client that knows nothing");
    cluster.world.forget_writes();
    cluster.world.take_calls();
    let batch = vec![pair("b", "1"), pair("e", "2")];
    cluster.client.batch_put(batch.clone()).await.expect("written");
    assert_eq!(cluster.client.scan("b", "f", 9).await.expect("read"), batch);
    let puts = cluster.world.take_calls().into_iter().filter(|call| call.1 == "batch put");
    assert_eq!(puts.count(), 4, "each region refused once");
}

#[tokio::test]
async fn a_deadline_says_that_the_outcome_is_unknown_where_it_is_and_only_there() {
    let cluster = Cluster::start().await;
    let client = &cluster.client.clone().with_deadline(Duration::from_millis(300));
    cluster.client.batch_put(six()).await.expect("written");
    let fail = |times: usize, first_is_unknown: bool| {
        let undetermined_result = Some(UndeterminedResult { message: "lost track".into() });
        if first_is_unknown {
            cluster.world.fail_next(errorpb::Error { undetermined_result, ..Default::default() });
        }
        for _ in 0..times {
            let busy = Some(ServerIsBusy { backoff_ms: 100, ..Default::default() });
            cluster.world.fail_next(errorpb::Error { server_is_busy: busy, ..Default::default() });
        }
    };
    for unknown in [false, true] {
        let pairs = || vec![pair("a", "2"), pair("b", "2")];
        let calls: [(&str, futures_util::future::BoxFuture<'_, Result<(), ClientError>>); 6] = [
            ("put", Box::pin(client.put("a", "2"))),
            ("delete", Box::pin(client.delete("a"))),
            ("batch put", Box::pin(client.batch_put(pairs()))),
            ("batch delete", Box::pin(client.batch_delete(vec!["a".into()]))),
            ("delete range", Box::pin(client.delete_range("a", "b"))),
            ("split", Box::pin(async { client.split_region(vec!["b".into()]).await.map(|_| ()) })),
        ];
        for (name, call) in calls {
            fail(50, unknown);
            let error = call.await.expect_err("busy for longer than the deadline");
            cluster.world.stop_failing();
            assert_eq!(matches!(error, ClientError::OutcomeUnknown { .. }), unknown, "{error}");
            assert_eq!(matches!(error, ClientError::Deadline { .. }), !unknown, "{error}");
            let text = error.to_string();
            assert!(text.starts_with(name) && text.contains("is busy"), "{text}");
        }
        fail(50, unknown);
        let error = client.get("a").await.expect_err("busy for longer than the deadline");
        cluster.world.stop_failing();
        assert!(matches!(error, ClientError::Deadline { .. }), "a read changes nothing: {error}");
    }
}

#[tokio::test]
async fn no_operation_waits_for_a_silent_placement_longer_than_its_deadline() {
    let cluster = Cluster::start().await;
    let client = &cluster.client.clone().with_deadline(Duration::from_millis(100));
    cluster.placement.freeze(0);
    let calls: [(&str, futures_util::future::BoxFuture<'_, Result<(), ClientError>>); 9] = [
        ("get", Box::pin(async { client.get("a").await.map(|_| ()) })),
        ("put", Box::pin(client.put("a", "1"))),
        ("compare and swap", {
            Box::pin(async { client.compare_and_swap("a", None, "1").await.map(|_| ()) })
        }),
        ("scan", Box::pin(async { client.scan("a", "f", 9).await.map(|_| ()) })),
        ("scan", Box::pin(async { client.reverse_scan("f", "a", 9).await.map(|_| ()) })),
        ("batch get", Box::pin(async { client.batch_get(keys(&six())).await.map(|_| ()) })),
        ("batch put", Box::pin(client.batch_put(six()))),
        ("delete range", Box::pin(client.delete_range("a", "f"))),
        ("split", Box::pin(async { client.split_region(vec!["b".into()]).await.map(|_| ()) })),
    ];
    for (name, call) in calls {
        let started = Instant::now();
        let error = soon(name, call).await.expect_err("no region is known");
        assert!(matches!(error, ClientError::Deadline { .. }), "{name}: {error}");
        let text = error.to_string();
        assert!(text.starts_with(name) && text.contains("placement did not answer"), "{text}");
        // A call of placement's alone may take 10 s.
        assert!(started.elapsed() < Duration::from_secs(5), "{name}: {:?}", started.elapsed());
    }
    assert_eq!(cluster.world.take_calls(), []);
}

#[tokio::test]
async fn a_batch_of_many_regions_ends_at_the_deadline_when_their_store_is_silent() {
    let world = World::new(1);
    // Far more than are asked at the same time.
    let keys: Vec<&'static str> = (0..100).map(|number| &*format!("k{number:03}").leak()).collect();
    for key in &keys {
        world.split(key, 1);
    }
    let _store = world.serve(1).await;
    let placement = Placement::start(&world, 1).await;
    let client = KvClient::new(placement.connect().await, NO_LOCAL);
    let pairs: Vec<Pair> = keys.into_iter().map(|key| pair(key, "1")).collect();
    client.batch_put(pairs.clone()).await.expect("written, and the regions are known");
    world.mute.send_replace(true);
    let client = client.with_deadline(Duration::from_millis(500));
    let started = Instant::now();
    let error = soon("the batch ends", client.batch_put(pairs)).await.expect_err("no answer");
    assert!(matches!(error, ClientError::OutcomeUnknown { .. }), "{error}");
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
}

#[tokio::test]
async fn a_write_that_may_have_happened_ends_as_unknown_when_its_region_is_not_found_again() {
    let lose_leader = |world: &World| {
        let not_leader = Some(NotLeader { region_id: 1, leader: None });
        world.fail_next(errorpb::Error { not_leader, ..Default::default() });
    };
    let cluster = Cluster::start().await;
    let client = &cluster.client.clone().with_deadline(Duration::from_millis(300));
    client.batch_put(six()).await.expect("written");
    cluster.placement.freeze(0);
    // Each in another region, because the client forgets the region.
    let calls: [(&str, futures_util::future::BoxFuture<'_, Result<(), ClientError>>); 5] = [
        ("put", Box::pin(client.put("a", "2"))),
        ("delete", Box::pin(client.delete("e"))),
        ("batch put", Box::pin(client.batch_put(vec![pair("k", "2")]))),
        ("delete range", Box::pin(client.delete_range("n", "o"))),
        ("split", Box::pin(async { client.split_region(vec!["v".into()]).await.map(|_| ()) })),
    ];
    for (name, call) in calls {
        let undetermined_result = Some(UndeterminedResult { message: "lost track".into() });
        cluster.world.fail_next(errorpb::Error { undetermined_result, ..Default::default() });
        lose_leader(&cluster.world);
        let error = soon(name, call).await.expect_err("its region is not found again");
        assert!(matches!(error, ClientError::OutcomeUnknown { .. }), "{name}: {error}");
        assert!(error.to_string().starts_with(name), "{error}");
    }

    // One part of a batch is written, and the region of the other is not found again.
    let cluster = Cluster::start().await;
    let client = &cluster.client.clone().with_deadline(Duration::from_millis(300));
    client.batch_put(six()).await.expect("written");
    cluster.placement.freeze(0);
    lose_leader(&cluster.world);
    let batch = client.batch_put(vec![pair("a", "2"), pair("e", "2")]);
    let error = soon("the batch ends", batch).await.expect_err("a part was not written");
    assert!(matches!(error, ClientError::OutcomeUnknown { .. }), "{error}");
}

#[tokio::test]
async fn a_region_that_does_not_hold_the_key_is_not_asked_and_its_lookup_is_repeated_with_waits() {
    let cluster = Cluster::start().await;
    let client = &cluster.client.clone().with_deadline(Duration::from_millis(300));
    // Placement answers with the region from d to h.
    cluster.world.hide_from_placement("h");
    let calls: [(&str, futures_util::future::BoxFuture<'_, Result<(), ClientError>>); 4] = [
        ("get", Box::pin(async { client.get("k").await.map(|_| ()) })),
        ("batch put", Box::pin(client.batch_put(vec![pair("k", "1")]))),
        ("delete range", Box::pin(client.delete_range("i", "l"))),
        ("split", Box::pin(async { client.split_region(vec!["k".into()]).await.map(|_| ()) })),
    ];
    for (name, call) in calls {
        let before = cluster.placement.regions_asked();
        let error = soon(name, call).await.expect_err("no region holds the key");
        assert!(matches!(error, ClientError::Deadline { .. }), "{name}: {error}");
        let asked = cluster.placement.regions_asked() - before;
        assert!(asked < 50, "{name}: asked {asked} times in a third of a second");
    }
    assert_eq!(cluster.world.take_calls(), []);
}

#[tokio::test]
async fn a_batch_of_which_a_part_was_written_does_not_end_as_if_nothing_was() {
    let cluster = Cluster::start().await;
    cluster.client.batch_put(six()).await.expect("written");
    // A key that its store refuses, and one in another region.
    let error = cluster.client.batch_put(vec![pair("b", "7"), pair("e", "7")]);
    let raft_entry_too_large = Some(RaftEntryTooLarge { region_id: 1, entry_size: 9_000_000 });
    cluster.world.fail_next(errorpb::Error { raft_entry_too_large, ..Default::default() });
    let error = error.await.expect_err("a part was refused");
    assert!(matches!(error, ClientError::OutcomeUnknown { .. }), "{error}");
    assert!(error.to_string().contains("too large"), "{error}");
    let written = [cluster.world.value("b"), cluster.world.value("e")];
    assert_eq!(written.iter().filter(|value| value.as_deref() == Some(b"7")).count(), 1);
    // If no other part was written, the call fails with the refusal itself.
    let raft_entry_too_large = Some(RaftEntryTooLarge { region_id: 1, entry_size: 9_000_000 });
    cluster.world.fail_next(errorpb::Error { raft_entry_too_large, ..Default::default() });
    let error = cluster.client.batch_put(vec![pair("b", "8")]).await.expect_err("refused");
    assert!(matches!(error, ClientError::TooLarge { .. }), "{error}");
}

#[tokio::test]
async fn a_range_of_which_a_part_is_gone_does_not_end_as_if_nothing_was() {
    let cluster = Cluster::start().await;
    cluster.client.batch_put(six()).await.expect("written");
    let refused = || {
        let raft_entry_too_large = Some(RaftEntryTooLarge { region_id: 1, entry_size: 9_000_000 });
        errorpb::Error { raft_entry_too_large, ..Default::default() }
    };
    // The first region does its part, the second refuses.
    cluster.world.serve_next();
    cluster.world.fail_next(refused());
    let error = cluster.client.delete_range("", "").await.expect_err("a part was refused");
    assert!(matches!(error, ClientError::OutcomeUnknown { .. }), "{error}");
    assert_eq!(cluster.world.value("a"), None);
    assert!(cluster.world.value("z").is_some());
    // If the first region refuses, the call fails with the refusal itself.
    cluster.world.fail_next(refused());
    let error = cluster.client.delete_range("", "").await.expect_err("refused");
    assert!(matches!(error, ClientError::TooLarge { .. }), "{error}");
}

#[tokio::test]
async fn a_part_that_may_have_been_written_outweighs_one_that_was_refused() {
    for refused_first in [true, false] {
        let cluster = Cluster::start().await;
        // So that what is unknown stays unknown.
        cluster.world.forget_about_tags();
        cluster.client.batch_put(six()).await.expect("written");
        let raft_entry_too_large = Some(RaftEntryTooLarge { region_id: 1, entry_size: 9_000_000 });
        let undetermined_result = Some(UndeterminedResult { message: "lost track".into() });
        let mut errors = [
            errorpb::Error { raft_entry_too_large, ..Default::default() },
            errorpb::Error { undetermined_result, ..Default::default() },
        ];
        if !refused_first {
            errors.reverse();
        }
        errors.into_iter().for_each(|error| cluster.world.fail_next(error));
        let batch = vec![pair("b", "7"), pair("e", "7")];
        let error = cluster.client.batch_put(batch).await.expect_err("neither was written");
        assert!(matches!(error, ClientError::OutcomeUnknown { .. }), "{error}");
    }
}

#[tokio::test]
async fn a_swap_whose_outcome_is_unknown_is_not_repeated_and_says_so() {
    let mut cluster = Cluster::start().await;
    cluster.client.put("a", "0").await.expect("written");
    cluster.world.mute.send_replace(true);
    let client = cluster.client.clone();
    let swapping =
        tokio::spawn(async move { client.compare_and_swap("a", Some("0".into()), "1").await });
    cut_off_once_acted(&mut cluster).await;
    let error = soon("the swap ends", swapping).await.expect("no panic").expect_err("unknown");
    assert!(matches!(error, ClientError::OutcomeUnknown { .. }), "{error}");
    assert!(error.to_string().contains("may or may not have happened"), "{error}");
    let swaps = cluster.world.take_calls().into_iter().filter(|call| call.1 == "cas").count();
    assert_eq!(swaps, 1);
    assert_eq!(cluster.world.value("a").as_deref(), Some(&b"1"[..]), "it had happened");
}

#[tokio::test]
async fn a_swap_that_the_store_is_not_sure_of_is_not_repeated_but_one_it_refused_is() {
    let cluster = Cluster::start().await;
    let undetermined_result = Some(UndeterminedResult { message: "lost track".into() });
    cluster.world.fail_next(errorpb::Error { undetermined_result, ..Default::default() });
    let error = cluster.client.compare_and_swap("a", None, "1").await.expect_err("unknown");
    assert!(matches!(error, ClientError::OutcomeUnknown { .. }), "{error}");
    let undetermined_result = Some(UndeterminedResult { message: "lost track".into() });
    cluster.world.fail_next(errorpb::Error { undetermined_result, ..Default::default() });
    cluster.client.put("a", "0").await.expect("a put is repeated");

    cluster.world.lead("a", 2);
    let swap = cluster.client.compare_and_swap("a", Some("0".into()), "1").await;
    assert!(swap.expect("repeated on the leader").swapped);
}

#[tokio::test]
async fn many_callers_at_once_share_a_stream_and_each_gets_its_own_answer() {
    let cluster = Cluster::start().await;
    let put_and_get = |index: usize| {
        let client = cluster.client.clone();
        async move {
            let key = Bytes::from(format!("{}{index}", (b'a' + (index % 26) as u8) as char));
            client.put(key.clone(), key.clone()).await.expect("written");
            assert_eq!(client.get(key.clone()).await.expect("read"), Some(key));
        }
    };
    futures_util::future::join_all((0..2_000).map(put_and_get)).await;
}

#[tokio::test]
async fn a_cluster_that_is_not_bootstrapped_holds_no_key() {
    let placement = Placement::start(&World::new(1), 1).await;
    let client: PlacementClient = placement.connect().await;
    let kv = KvClient::new(client, NO_LOCAL).with_deadline(Duration::from_millis(300));
    // The world has a region, but its store is not known to placement.
    let error = kv.get("a").await.expect_err("no store");
    assert!(error.to_string().contains("store 1 is not known"), "{error}");
}
