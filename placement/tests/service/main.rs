//! The placement driver's services over real connections, on a group that the tests elect, depose
//! and damage.

mod door;
mod group;
mod real_client;
mod server;

use std::sync::Arc;

use bytes::Bytes;
use esker_placement::timestamp::WINDOW_MS;
use esker_rpc::members::BEAT_INTERVAL;
use esker_rpc::proto::eraftpb::ConfChangeType;
use esker_rpc::proto::{esker as wire, keyspacepb, metapb, pdpb};
use group::{Fault, Group, TestClock};
use server::{Served, error_of, listeners, region_message, store_message};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;

const NOON: u64 = 1_700_000_000_000;

/// One member that leads.
async fn alone() -> (Group, Arc<TestClock>, Served) {
    let group = Group::default();
    let clock = TestClock::new(NOON);
    let (mut listening, members) = listeners(1).await;
    group.introduce(members);
    let listener = listening.remove(0);
    let served = Served::start(listener, 1, group.member(1), clock.clone()).await;
    group.elect(1);
    served.server.serving().await;
    (group, clock, served)
}

/// Two members, of which the first leads.
async fn pair() -> (Group, Arc<TestClock>, Served, Served) {
    let group = Group::default();
    let clock = TestClock::new(NOON);
    let (mut listening, members) = listeners(2).await;
    group.introduce(members);
    let (second, first) = (listening.remove(1), listening.remove(0));
    let first = Served::start(first, 1, group.member(1), clock.clone()).await;
    let second = Served::start(second, 2, group.member(2), clock.clone()).await;
    group.elect(1);
    first.server.serving().await;
    (group, clock, first, second)
}

/// A bootstrapped cluster: store 1, region 2, peer 3.
async fn bootstrapped() -> (Group, Arc<TestClock>, Served) {
    let (group, clock, mut pd) = alone().await;
    assert_eq!(pd.alloc(3).await, 3);
    assert_eq!(error_of(&pd.bootstrap(1, 2, 3).await.header), None);
    (group, clock, pd)
}

fn heartbeat(pd: &Served, region: &metapb::Region, leader: usize) -> pdpb::RegionHeartbeatRequest {
    pdpb::RegionHeartbeatRequest {
        header: pd.header(),
        region: Some(region.clone()),
        leader: Some(region.peers[leader]),
        term: 5,
        approximate_size: 1 << 20,
        ..Default::default()
    }
}

/// Opens a heartbeat stream and reports `region` on it.
async fn report(
    pd: &mut Served,
    region: &metapb::Region,
) -> (mpsc::Sender<pdpb::RegionHeartbeatRequest>, tonic::Streaming<pdpb::RegionHeartbeatResponse>) {
    let (reports, outgoing) = mpsc::channel(8);
    reports.send(heartbeat(pd, region, 0)).await.unwrap();
    let orders = pd
        .client
        .region_heartbeat(ReceiverStream::new(outgoing))
        .await
        .expect("a stream")
        .into_inner();
    (reports, orders)
}

/// The next order, or the end of the stream. Skips the signs of life.
async fn next_order(
    orders: &mut tonic::Streaming<pdpb::RegionHeartbeatResponse>,
) -> Result<pdpb::RegionHeartbeatResponse, tonic::Status> {
    loop {
        let order = orders.message().await?.expect("an order");
        if order.region_id != 0 {
            return Ok(order);
        }
    }
}

#[tokio::test]
async fn the_first_bootstrap_wins_and_a_second_is_told_so() {
    let (_, _, mut pd) = bootstrapped().await;
    let again = pd.bootstrap(1, 2, 3).await;
    let (kind, _) = error_of(&again.header).expect("an error");
    assert_eq!(kind, pdpb::ErrorType::AlreadyBootstrapped);
    let request = pdpb::IsBootstrappedRequest { header: pd.header() };
    let answer = pd.client.is_bootstrapped(request).await.unwrap();
    assert!(answer.into_inner().bootstrapped);
}

#[tokio::test]
async fn before_the_bootstrap_lookups_and_stores_are_refused_with_the_reason() {
    let (_, _, mut pd) = alone().await;
    let (kind, _) = error_of(&pd.region_of(b"a").await.header).expect("an error");
    assert_eq!(kind, pdpb::ErrorType::NotBootstrapped);
    let id = pd.alloc(1).await;
    let (kind, _) = pd.put_store(store_message(id)).await.expect("an error");
    assert_eq!(kind, pdpb::ErrorType::NotBootstrapped);
    // A first region that is not on the first store.
    let request = pdpb::BootstrapRequest {
        header: pd.header(),
        store: Some(store_message(id)),
        region: Some(region_message(7, &[(8, 99)], 1)),
    };
    let answer = pd.client.bootstrap(request).await.unwrap().into_inner();
    let (kind, _) = error_of(&answer.header).expect("an error");
    assert_eq!(kind, pdpb::ErrorType::InvalidValue);
}

#[tokio::test]
async fn a_lookup_in_a_gap_waits_for_the_heartbeat_and_without_one_is_a_retryable_error() {
    let (_, _, mut pd) = bootstrapped().await;
    let (kind, message) = error_of(&pd.region_of(b"a").await.header).expect("an error");
    assert_eq!(kind, pdpb::ErrorType::RegionNotFound);
    assert!(message.contains("ask again"), "{message}");

    let mut client = pd.client.clone();
    let request = pdpb::GetRegionRequest { header: pd.header(), ..Default::default() };
    let waiting = tokio::spawn(async move { client.get_region(request).await });
    let (_reports, _orders) = report(&mut pd, &region_message(2, &[(3, 1)], 1)).await;
    let answer = waiting.await.unwrap().unwrap().into_inner();
    assert_eq!(error_of(&answer.header), None);
    assert_eq!(answer.region.unwrap().id, 2);
    assert_eq!(answer.leader.unwrap().store_id, 1);
}

#[tokio::test]
async fn a_region_grows_to_three_voters_by_the_orders_on_its_leaders_stream() {
    let (_, _, mut pd) = bootstrapped().await;
    for _ in 0..2 {
        let id = pd.alloc(1).await;
        assert_eq!(pd.put_store(store_message(id)).await, None);
    }
    let mut region = region_message(2, &[(3, 1)], 1);
    let (reports, mut orders) = report(&mut pd, &region).await;
    while region.peers.iter().filter(|peer| peer.role == 0).count() < 3 {
        let order = next_order(&mut orders).await.unwrap();
        assert_eq!(error_of(&order.header), None);
        assert_eq!((order.region_id, order.region_epoch), (2, region.region_epoch));
        assert_eq!(order.target_peer.unwrap().id, 3);
        let changes = order.change_peer_v2.expect("a change of peers").changes;
        assert_eq!(changes.len(), 1, "growing needs no joint change");
        let peer = changes[0].peer.unwrap();
        match changes[0].change_type() {
            ConfChangeType::AddLearnerNode => region.peers.push(peer),
            ConfChangeType::AddNode => {
                let known = region.peers.iter_mut().find(|known| known.id == peer.id);
                known.expect("only a learner is promoted").role = 0;
            }
            ConfChangeType::RemoveNode => panic!("nothing is to be removed: {peer:?}"),
        }
        region.region_epoch.as_mut().unwrap().conf_ver += 1;
        reports.send(heartbeat(&pd, &region, 0)).await.unwrap();
    }
    let stores: Vec<_> = region.peers.iter().map(|peer| peer.store_id).collect();
    assert_eq!(stores, [1, 4, 5]);
    // When the operator is shown as done, the last report has been taken in.
    loop {
        let request = pdpb::GetOperatorRequest { header: pd.header(), region_id: 2 };
        let operator = pd.client.get_operator(request).await.unwrap().into_inner();
        if operator.status() == pdpb::OperatorStatus::Success {
            let text = String::from_utf8(operator.desc.to_vec()).unwrap();
            assert!(text.contains("2 voters where 3 are wanted"), "{text}");
            break;
        }
        tokio::task::yield_now().await;
    }
    let found = pd.region_of(b"any").await;
    assert_eq!(found.region.unwrap().peers.len(), 3);
}

#[tokio::test]
async fn leaders_are_spread_and_a_scatter_that_cannot_be_done_is_refused() {
    let (_, _, mut pd) = bootstrapped().await;
    for _ in 0..2 {
        let id = pd.alloc(1).await;
        assert_eq!(pd.put_store(store_message(id)).await, None);
    }
    assert_eq!(pd.alloc(8).await, 13);
    let mut left = region_message(2, &[(3, 1), (6, 4), (7, 5)], 3);
    left.end_key = "m".into();
    let mut right = region_message(10, &[(11, 1), (12, 4), (13, 5)], 3);
    right.start_key = "m".into();
    let (reports, mut orders) = report(&mut pd, &left).await;
    reports.send(heartbeat(&pd, &right, 0)).await.unwrap();
    let order = next_order(&mut orders).await.unwrap();
    let to = order.transfer_leader.expect("a transfer").peer.unwrap();
    assert_eq!(to.store_id, 4);
    let header = pd.header();
    let request = |region_id| pdpb::ScatterRegionRequest {
        header: header.clone(),
        region_id,
        ..Default::default()
    };
    let busy = pd.client.scatter_region(request(order.region_id)).await.unwrap();
    assert!(error_of(&busy.into_inner().header).is_some());
    let unknown = pd.client.scatter_region(request(99)).await.unwrap();
    let (_, why) = error_of(&unknown.into_inner().header).expect("an error");
    assert!(why.contains("region 99 is not known"), "{why}");
}

#[tokio::test]
async fn a_split_gets_fresh_ids_and_a_stale_one_is_refused() {
    let (_, _, mut pd) = bootstrapped().await;
    let mut region = region_message(2, &[(3, 1)], 1);
    region.region_epoch.as_mut().unwrap().version = 4;
    let (_reports, _orders) = report(&mut pd, &region).await;
    assert_eq!(error_of(&pd.region_of(b"a").await.header), None);
    let header = pd.header();
    let request = |region: &metapb::Region| pdpb::AskBatchSplitRequest {
        header: header.clone(),
        region: Some(region.clone()),
        split_count: 3,
        ..Default::default()
    };
    let answer = pd.client.ask_batch_split(request(&region)).await.unwrap();
    let mut ids: Vec<_> = answer
        .into_inner()
        .ids
        .into_iter()
        .flat_map(|id| std::iter::once(id.new_region_id).chain(id.new_peer_ids))
        .collect();
    assert_eq!(ids.len(), 6);
    assert!(ids.iter().all(|id| *id > 3));
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), 6, "all different");

    region.region_epoch.as_mut().unwrap().version = 3;
    let stale = pd.client.ask_batch_split(request(&region)).await.unwrap();
    assert!(error_of(&stale.into_inner().header).is_some());
}

#[tokio::test]
async fn a_store_needs_an_id_of_this_cluster_and_an_address_of_its_own() {
    let (_, _, mut pd) = bootstrapped().await;
    let second = pd.alloc(1).await;
    let same_address =
        metapb::Store { address: "store-1:20160".to_owned(), ..store_message(second) };
    let (kind, why) = pd.put_store(same_address).await.expect("an error");
    assert_eq!(kind, pdpb::ErrorType::DuplicatedEntry);
    assert!(why.contains("belongs to store 1"), "{why}");
    let (kind, why) = pd.put_store(store_message(5_000_000)).await.expect("an error");
    assert_eq!(kind, pdpb::ErrorType::InvalidValue);
    assert!(why.contains("never handed out"), "{why}");
    assert_eq!(pd.put_store(store_message(second)).await, None);

    let header = pd.header();
    let request = |store_id| pdpb::GetStoreRequest { header: header.clone(), store_id };
    let known = pd.client.get_store(request(second)).await.unwrap();
    assert_eq!(
        known.into_inner().store,
        Some(store_message(second))
            .map(|store| metapb::Store { node_state: metapb::NodeState::Serving.into(), ..store })
    );
    let unknown = pd.client.get_store(request(77)).await.unwrap().into_inner();
    assert!(error_of(&unknown.header).is_some());
}

#[tokio::test]
async fn a_request_for_another_cluster_is_an_error_on_a_connection_that_stays() {
    let (_, _, mut pd) = bootstrapped().await;
    let wrong = Some(pdpb::RequestHeader {
        cluster_id: pd.header().unwrap().cluster_id ^ 1,
        ..Default::default()
    });
    let request = pdpb::GetAllStoresRequest { header: wrong.clone(), ..Default::default() };
    let refused = pd.client.get_all_stores(request).await.unwrap().into_inner();
    let (_, why) = error_of(&refused.header).expect("an error");
    assert!(why.contains("is for cluster"), "{why}");
    // On one stream: a wrong request, then a right one.
    let requests = [wrong, pd.header()].map(|header| pdpb::TsoRequest {
        header,
        count: 1,
        ..Default::default()
    });
    let stream = pd.client.tso(tokio_stream::iter(requests)).await.unwrap();
    let mut answers = stream.into_inner();
    let first = answers.message().await.unwrap().unwrap();
    assert!(error_of(&first.header).is_some() && first.timestamp.is_none());
    let second = answers.message().await.unwrap().unwrap();
    assert!(error_of(&second.header).is_none() && second.timestamp.is_some());
}

#[tokio::test]
async fn timestamps_grow_over_a_change_of_leader_whose_clock_is_behind() {
    let (group, clock, mut first, mut second) = pair().await;
    let mut last = 0;
    for count in [1, 100, 1] {
        let given = first.timestamp(count).await.unwrap();
        assert!(given >= last + u64::from(count));
        last = given;
    }
    clock.set_wall_ms(NOON - 3_600_000);
    group.elect(2);
    second.server.serving().await;
    let given = second.timestamp(1).await.unwrap();
    assert!(given > last, "{given} after {last}");
    assert!(given >> 18 >= NOON + WINDOW_MS, "behind the whole window of the first");
    // Leadership goes back to the first member, which uses nothing from its first term.
    group.elect(1);
    first.server.serving().await;
    assert!(first.timestamp(1).await.unwrap() > given);
}

#[tokio::test]
async fn a_deposed_leader_that_has_not_heard_of_it_gives_no_timestamp() {
    let (group, _, mut first, mut second) = pair().await;
    let last = first.timestamp(1).await.unwrap();
    group.elect_silently(2);
    let refused = first.timestamp(1).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable);
    // The first member is elected again, in a third term, before it heard of the second term. Its
    // memory of the first term is void, although it has a lease.
    group.elect_silently(1);
    let refused = first.timestamp(1).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable);
    group.announce();
    // It begins the new term of office, and only then serves.
    let given = loop {
        if let Ok(given) = first.timestamp(1).await {
            break given;
        }
    };
    assert!(given >> 18 >= (last >> 18) + WINDOW_MS);
    assert_eq!(second.timestamp(1).await.unwrap_err().code(), Code::Unavailable);
}

#[tokio::test]
async fn without_a_lease_nothing_is_answered_and_with_it_again_everything() {
    let (group, _, mut pd) = bootstrapped().await;
    group.set_lease(false);
    assert_eq!(pd.timestamp(1).await.unwrap_err().code(), Code::Unavailable);
    let request = pdpb::GetAllStoresRequest { header: pd.header(), ..Default::default() };
    let refused = pd.client.get_all_stores(request.clone()).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable);
    group.set_lease(true);
    assert!(pd.timestamp(1).await.is_ok());
    assert!(pd.client.get_all_stores(request).await.is_ok());
}

#[tokio::test]
async fn every_member_names_the_cluster_and_its_leader() {
    let (group, _, mut first, mut second) = pair().await;
    for (elected, name) in [(1, "pd-1"), (2, "pd-2")] {
        if elected == 2 {
            group.elect(2);
        }
        let mut cluster_ids = Vec::new();
        for pd in [&mut first, &mut second] {
            // The follower learns the cluster's id from what it applied.
            let answer = loop {
                match pd.client.get_members(pdpb::GetMembersRequest::default()).await {
                    Ok(answer) => break answer.into_inner(),
                    Err(status) => assert_eq!(status.code(), Code::Unavailable),
                }
            };
            assert_eq!(error_of(&answer.header), None);
            cluster_ids.push(answer.header.unwrap().cluster_id);
            let leader = answer.leader.expect("a leader");
            assert_eq!(leader.name, name);
            assert!(leader.client_urls[0].starts_with("http://127.0.0.1:"));
            assert_eq!(answer.members.len(), 2);
            assert!(answer.members.contains(&leader));
        }
        assert_ne!(cluster_ids[0], 0);
        assert_eq!(cluster_ids[0], cluster_ids[1]);
    }
}

#[tokio::test]
async fn a_member_that_does_not_lead_refuses_and_sends_pages_to_the_leader() {
    let (_, _, first, mut second) = pair().await;
    let request = pdpb::AllocIdRequest { header: first.header(), count: 1 };
    let refused = second.client.alloc_id(request).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable);
    assert!(refused.message().contains("pd-1"), "{}", refused.message());
    let (status, response) = second.page("/pd/api/v1/regions").await;
    assert_eq!(status, 307);
    let target = format!("http://{}/pd/api/v1/regions", first.address);
    assert!(response.contains(&target), "{response}");
}

#[tokio::test]
async fn the_end_of_an_office_ends_its_streams() {
    let (group, _, mut first, _second) = pair().await;
    assert_eq!(first.alloc(3).await, 3);
    first.bootstrap(1, 2, 3).await;
    let (_reports, mut orders) = report(&mut first, &region_message(2, &[(3, 1)], 1)).await;
    assert_eq!(error_of(&first.region_of(b"a").await.header), None);
    group.elect(2);
    let ended = next_order(&mut orders).await.unwrap_err();
    assert_eq!(ended.code(), Code::Unavailable);
}

#[tokio::test]
async fn a_restart_repeats_no_id_and_remembers_the_stores() {
    let (group, clock, mut pd) = bootstrapped().await;
    let last = pd.alloc(10).await;
    let timestamp = pd.timestamp(1).await.unwrap();
    drop(pd);
    let (mut listening, members) = listeners(1).await;
    group.introduce(members);
    let state = group.member(1);
    let mut pd = Served::start(listening.remove(0), 1, state, clock).await;
    group.elect(1);
    pd.server.serving().await;
    assert!(pd.alloc(1).await > last);
    assert!(pd.timestamp(1).await.unwrap() > timestamp);
    let again = pd.bootstrap(1, 2, 3).await;
    let (kind, _) = error_of(&again.header).expect("an error");
    assert_eq!(kind, pdpb::ErrorType::AlreadyBootstrapped);
    assert_eq!(pd.json("/pd/api/v1/stores").await["count"], 1);
}

#[tokio::test]
async fn writes_without_a_known_outcome_neither_lose_nor_repeat_anything() {
    let (group, _, mut pd) = bootstrapped().await;
    let mut last = pd.alloc(1).await;
    for faults in [
        vec![Fault::LostAnswer],
        vec![Fault::LostRequest, Fault::LostAnswer],
        // More faults than there are attempts. The term of office ends and begins again.
        vec![Fault::LostRequest; 5],
    ] {
        group.inject(&faults);
        while !group.has_met_all_faults() {
            let request = pdpb::AllocIdRequest { header: pd.header(), count: 900 };
            if let Ok(answer) = pd.client.alloc_id(request).await {
                let id = answer.into_inner().id;
                assert!(id >= last + 900, "{id} after {last}");
                last = id;
            }
        }
    }
    assert!(pd.alloc(1).await > last);
}

#[tokio::test]
async fn a_damaged_state_stops_the_member_with_the_key_that_is_damaged() {
    let group = Group::default();
    group.damage(b"pd/id_bound", b"\x01short");
    let (mut listening, members) = listeners(1).await;
    group.introduce(members);
    let clock = TestClock::new(NOON);
    let state = group.member(1);
    let mut pd = Served::start(listening.remove(0), 1, state, clock).await;
    group.elect(1);
    let stopped = pd.task.join_next().await.unwrap().unwrap();
    assert!(stopped.unwrap_err().to_string().contains("pd/id_bound"));
}

#[tokio::test]
async fn gc_safe_points_only_move_forward_and_outlive_the_leader() {
    let (group, _, mut first, mut second) = pair().await;
    let update = |header, safe_point| pdpb::UpdateGcSafePointRequest { header, safe_point };
    let header = first.header();
    for (asked, holds) in [(10, 10), (5, 10), (12, 12)] {
        let request = update(header.clone(), asked);
        let answer = first.client.update_gc_safe_point(request).await.unwrap();
        assert_eq!(answer.into_inner().new_safe_point, holds);
    }
    let service = |id: &'static str, ttl, safe_point| pdpb::UpdateServiceGcSafePointRequest {
        header: header.clone(),
        service_id: id.into(),
        ttl,
        safe_point,
    };
    for (request, smallest) in [
        (service("backup", 100, 20), 20),
        (service("worker", i64::MAX, 30), 20),
        // A safe point below what is promised to be kept is not accepted.
        (service("late", 100, 15), 20),
        (service("backup", 0, 0), 30),
    ] {
        let answer = first.client.update_service_gc_safe_point(request).await.unwrap();
        let answer = answer.into_inner();
        assert_eq!(answer.min_safe_point, smallest);
    }
    group.elect(2);
    second.server.serving().await;
    let request = pdpb::GetGcSafePointRequest { header: header.clone() };
    let answer = second.client.get_gc_safe_point(request).await.unwrap();
    assert_eq!(answer.into_inner().safe_point, 12);
}

fn load_key_space(pd: &Served, name: &str) -> keyspacepb::LoadKeyspaceRequest {
    keyspacepb::LoadKeyspaceRequest { header: pd.header(), name: name.to_owned() }
}

/// The regions that a region becomes when it is cut at keys; the last one keeps its id.
fn cut(whole: &metapb::Region, keys: &[Bytes], first_id: u64) -> Vec<metapb::Region> {
    let starts = [std::slice::from_ref(&whole.start_key), keys].concat();
    let ends = [keys, std::slice::from_ref(&whole.end_key)].concat();
    let version = whole.region_epoch.unwrap().version + keys.len() as u64;
    let parts = starts.into_iter().zip(ends).zip(first_id..);
    let mut parts: Vec<_> = parts
        .map(|((start_key, end_key), id)| metapb::Region {
            id,
            start_key,
            end_key,
            region_epoch: Some(metapb::RegionEpoch { conf_ver: 1, version }),
            ..whole.clone()
        })
        .collect();
    parts.last_mut().expect("there is one").id = whole.id;
    parts
}

#[tokio::test]
async fn a_key_space_is_loaded_once_the_regions_are_cut_at_its_bounds() {
    let (_, _, mut pd) = bootstrapped().await;
    // The parts below have ids that were given.
    pd.alloc(100).await;
    let whole = region_message(2, &[(3, 1)], 1);
    let (reports, mut orders) = report(&mut pd, &whole).await;

    // No leader cuts. The client gets an error after which it asks again, and the regions stay
    // whole.
    let late = pd.keyspaces.load_keyspace(load_key_space(&pd, "DEFAULT")).await;
    assert_eq!(late.expect_err("nothing was cut").code(), tonic::Code::Unavailable);

    let mut keyspaces = pd.keyspaces.clone();
    let request = load_key_space(&pd, "DEFAULT");
    let loading = tokio::spawn(async move { keyspaces.load_keyspace(request).await });
    let order = next_order(&mut orders).await.unwrap();
    assert_eq!((order.region_id, order.region_epoch), (2, whole.region_epoch));
    assert_eq!(order.target_peer.unwrap().id, 3);
    let split = order.split_region.expect("a split");
    assert_eq!(split.policy(), pdpb::CheckPolicy::Usekey);
    assert_eq!(split.keys.len(), 4, "the bounds of raw and of transactional keys: {split:?}");
    assert!(split.keys.is_sorted(), "{split:?}");

    // Two cuts come first, as if the leader had died halfway. The rest is asked for again.
    let parts = cut(&whole, &split.keys[..2], 10);
    for part in &parts {
        reports.send(heartbeat(&pd, part, 0)).await.unwrap();
    }
    let rest = loop {
        let order = next_order(&mut orders).await.unwrap();
        let keys = order.split_region.expect("a split").keys;
        if order.region_epoch == parts[2].region_epoch {
            break keys;
        }
    };
    assert_eq!(rest, split.keys[2..]);
    for part in &cut(&parts[2], &rest, 20) {
        reports.send(heartbeat(&pd, part, 0)).await.unwrap();
    }
    let found = loading.await.unwrap().expect("an answer").into_inner();
    assert_eq!(error_of(&found.header), None);
    assert_eq!(found.keyspace.expect("the key space").id, Some(0));
}

#[tokio::test]
async fn the_default_key_space_exists_and_no_other() {
    let (_, _, mut pd) = bootstrapped().await;
    // The parts below have ids that were given.
    pd.alloc(100).await;
    let bounds = [&b"r\0\0\0"[..], b"r\0\0\x01", b"x\0\0\0", b"x\0\0\x01"]
        .map(|bound| Bytes::from([bound, b"\0\0\0\0\xfb"].concat()));
    let parts = cut(&region_message(2, &[(3, 1)], 1), &bounds, 10);
    let (reports, _orders) = report(&mut pd, &parts[0]).await;
    for part in &parts[1..] {
        reports.send(heartbeat(&pd, part, 0)).await.unwrap();
    }
    let found = pd.keyspaces.load_keyspace(load_key_space(&pd, "DEFAULT")).await.unwrap();
    let found = found.into_inner();
    assert_eq!(error_of(&found.header), None);
    let keyspace = found.keyspace.unwrap();
    assert_eq!(keyspace.id, Some(0));
    assert_eq!(keyspace.state(), keyspacepb::KeyspaceState::Enabled);
    let unknown = pd.keyspaces.load_keyspace(load_key_space(&pd, "OTHER")).await.unwrap();
    let unknown = unknown.into_inner();
    assert!(error_of(&unknown.header).is_some() && unknown.keyspace.is_none());
}

#[tokio::test]
async fn a_silent_store_is_disconnected_and_then_down_with_its_age_by_the_leaders_own_clock() {
    use wire::StoreLiveness::{Alive, Disconnected, Down};
    let (group, clock, mut pd) = bootstrapped().await;
    let request = wire::StoreStatesRequest { header: pd.header() };
    let unheard = pd.admin.store_states(request.clone()).await.unwrap().into_inner();
    assert_eq!(error_of(&unheard.header), None);
    assert!(!unheard.stores[0].is_heard, "it has only introduced itself: {unheard:?}");

    let stats = Some(pdpb::StoreStats { store_id: 1, ..Default::default() });
    let heartbeat = pdpb::StoreHeartbeatRequest { header: pd.header(), stats };
    pd.client.store_heartbeat(heartbeat).await.unwrap();
    // The wall clock does not matter.
    clock.set_wall_ms(NOON - 3_600_000);
    let mut age = 0;
    for (later, liveness, name) in
        [(19_999, Alive, "Up"), (20_000, Disconnected, "Disconnected"), (1_800_000, Down, "Down")]
    {
        clock.advance_moment(later - age);
        age = later;
        let known = pd.admin.store_states(request.clone()).await.unwrap().into_inner();
        let store = &known.stores[0];
        assert_eq!((store.liveness(), store.silent_ms, store.is_heard), (liveness, age, true));
        let page = pd.json("/pd/api/v1/stores").await;
        assert_eq!(page["stores"][0]["store"]["state_name"], name);
        assert_eq!(page["stores"][0]["status"]["silent_ms"], age);
    }

    let of_another = Some(pdpb::RequestHeader { cluster_id: 1, ..Default::default() });
    let refused = pd.admin.store_states(wire::StoreStatesRequest { header: of_another }).await;
    assert!(error_of(&refused.unwrap().into_inner().header).is_some());
    group.elect(2);
    let refused = pd.admin.store_states(request.clone()).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable, "only the leader knows");
    // A leader that has just begun says that it has heard of nobody, whatever was recorded before.
    group.elect(1);
    pd.server.serving().await;
    let again = pd.admin.store_states(request).await.unwrap().into_inner().stores.remove(0);
    assert!(!again.is_heard, "{again:?}");
}

#[tokio::test]
async fn the_pages_show_regions_stores_members_and_health() {
    let (_, clock, mut pd) = bootstrapped().await;
    let request = pdpb::StoreHeartbeatRequest {
        header: pd.header(),
        stats: Some(pdpb::StoreStats {
            store_id: 1,
            capacity: 4 << 30,
            available: 2 << 30,
            ..Default::default()
        }),
    };
    let answer = pd.client.store_heartbeat(request).await.unwrap().into_inner();
    assert_eq!(answer.state(), metapb::NodeState::Serving);
    let mut region = region_message(2, &[(3, 1)], 1);
    region.start_key = "\u{1}k".into();
    let (_reports, _orders) = report(&mut pd, &region).await;
    assert_eq!(error_of(&pd.region_of(b"z").await.header), None);

    let regions = pd.json("/pd/api/v1/regions").await;
    assert_eq!(regions["count"], 1);
    assert_eq!(regions["regions"][0]["start_key"], "016B");
    assert_eq!(regions["regions"][0]["leader"]["store_id"], 1);
    let stores = pd.json("/pd/api/v1/stores").await;
    assert_eq!(stores["stores"][0]["store"]["state_name"], "Up");
    assert_eq!(stores["stores"][0]["status"]["capacity"], "4.0000GiB");
    assert_eq!(stores["stores"][0]["status"]["leader_count"], 1);
    clock.advance_moment(60_000);
    let stores = pd.json("/pd/api/v1/stores").await;
    assert_eq!(stores["stores"][0]["store"]["state_name"], "Disconnected");
    let members = pd.json("/pd/api/v1/members").await;
    assert_eq!(members["leader"]["name"], "pd-1");
    assert_eq!(members["header"]["cluster_id"], pd.header().unwrap().cluster_id);
    assert_eq!(pd.json("/pd/api/v1/health").await[0]["health"], true);
}

async fn get_members(pd: &mut Served) -> pdpb::GetMembersResponse {
    loop {
        match pd.client.get_members(pdpb::GetMembersRequest::default()).await {
            Ok(answer) => return answer.into_inner(),
            // The cluster's id is learned in a moment.
            Err(status) => assert_eq!(status.code(), Code::Unavailable),
        }
    }
}

fn names(answer: &pdpb::GetMembersResponse) -> Vec<&str> {
    answer.members.iter().map(|member| member.name.as_str()).collect()
}

/// Three members, of which the second is frozen. The system accepts connections for it, but there
/// is no answer.
async fn with_a_frozen_one() -> (Group, Served, tokio::net::TcpListener, Served) {
    let group = Group::default();
    let clock = TestClock::new(NOON);
    let (mut listening, members) = listeners(3).await;
    group.introduce(members);
    let (third, frozen, first) = (listening.remove(2), listening.remove(1), listening.remove(0));
    let first = Served::start(first, 1, group.member(1), clock.clone()).await;
    let third = Served::start(third, 3, group.member(3), clock.clone()).await;
    (group, first, frozen, third)
}

#[tokio::test]
async fn the_leader_is_listed_first_and_a_frozen_member_last() {
    let (group, mut first, _frozen, mut third) = with_a_frozen_one().await;
    group.elect(3);
    third.server.serving().await;
    for pd in [&mut first, &mut third] {
        let answer = get_members(pd).await;
        assert_eq!(names(&answer), ["pd-3", "pd-1", "pd-2"]);
        assert_eq!(answer.leader.expect("a leader").name, "pd-3");
    }
    let health = first.json("/pd/api/v1/health").await;
    let healths = health.as_array().expect("a list").iter();
    let healthy: Vec<_> =
        healths.map(|member| (member["name"].as_str().unwrap(), &member["health"])).collect();
    assert_eq!(
        healthy.iter().filter(|(_, health)| health.as_bool() == Some(true)).count(),
        2,
        "{healthy:?}"
    );
    assert!(
        healthy.iter().any(|(name, health)| *name == "pd-2" && health.as_bool() == Some(false))
    );
}

#[tokio::test]
async fn a_leader_that_is_silent_is_not_named_and_the_next_one_is_waited_for() {
    let (group, mut first, frozen, _third) = with_a_frozen_one().await;
    // So that the cluster has an id.
    group.elect(1);
    first.server.serving().await;
    group.elect(2);
    let asked = tokio::select! {
        biased;
        answer = get_members(&mut first) => panic!("pd-2 says nothing: {answer:?}"),
        asked = frozen.accept() => asked,
    };
    assert!(asked.is_ok(), "the silent leader was asked");
    group.elect(3);
    let answer = get_members(&mut first).await;
    assert_eq!(names(&answer), ["pd-3", "pd-1", "pd-2"]);
}

#[tokio::test]
async fn a_leader_that_has_slept_does_not_name_itself_before_its_lease_is_back() {
    let (group, mut first, frozen, _third) = with_a_frozen_one().await;
    group.elect(1);
    first.server.serving().await;
    group.set_lease(false);
    let asked = tokio::select! {
        biased;
        answer = get_members(&mut first) => panic!("who knows who leads by now: {answer:?}"),
        asked = frozen.accept() => asked,
    };
    assert!(asked.is_ok(), "the others were asked");
    group.set_lease(true);
    assert_eq!(get_members(&mut first).await.leader.expect("a leader").name, "pd-1");
}

#[tokio::test]
async fn without_a_leader_that_answers_none_is_named() {
    let (group, mut first, _frozen, _third) = with_a_frozen_one().await;
    group.elect(1);
    first.server.serving().await;
    group.elect(2);
    let answer = get_members(&mut first).await;
    assert_eq!(answer.leader, None);
    assert_eq!(answer.members.last().expect("three members").name, "pd-2");
}

#[tokio::test]
async fn a_leader_says_on_every_stream_that_it_leads_while_its_lease_holds() {
    let (group, _, mut pd) = bootstrapped().await;
    let (_reports, mut orders) = report(&mut pd, &region_message(2, &[(3, 1)], 1)).await;
    for _ in 0..3 {
        let beat = orders.message().await.unwrap().expect("a beat");
        assert_eq!(error_of(&beat.header), None);
        assert_eq!(beat.region_id, 0);
    }
    group.set_lease(false);
    // One beat may be under way.
    let mut late = 0;
    while let Ok(Ok(Some(_))) = tokio::time::timeout(3 * BEAT_INTERVAL, orders.message()).await {
        late += 1;
    }
    assert!(late <= 1, "{late} beats without a lease");
    group.set_lease(true);
    assert_eq!(orders.message().await.unwrap().expect("a beat").region_id, 0);
}
