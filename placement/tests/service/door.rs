//! Reports that no correct store sends. They are refused, and placement goes on with what it knew.

use std::sync::Arc;

use esker_rpc::proto::{metapb, pdpb};
use tokio::sync::mpsc;
use tonic::Streaming;

use crate::group::{Group, TestClock};
use crate::server::{Served, error_of, region_message, store_message};
use crate::{bootstrapped, heartbeat, report};

const CLAIM_MS: u64 = esker_placement::map::CLAIM_MS;

type Reports = mpsc::Sender<pdpb::RegionHeartbeatRequest>;
type Orders = Streaming<pdpb::RegionHeartbeatResponse>;

/// Regions 2, up to `m`, and 10. Store 1 leads and reports both. Stores 4 and 5 hold nothing.
struct Scene {
    pd: Served,
    clock: Arc<TestClock>,
    left: metapb::Region,
    right: metapb::Region,
    reports: Reports,
    orders: Orders,
    _group: Group,
}

/// The message of the next error on a stream, past the signs of life.
async fn refusal(orders: &mut Orders) -> String {
    loop {
        let answer = orders.message().await.unwrap().expect("an answer");
        if let Some((_, message)) = error_of(&answer.header) {
            return message;
        }
    }
}

impl Scene {
    async fn new() -> Scene {
        let (_group, clock, mut pd) = bootstrapped().await;
        // One replica is enough here, so that no order comes.
        let request = pdpb::PutClusterConfigRequest {
            header: pd.header(),
            cluster: Some(metapb::Cluster { id: 0, max_peer_count: 1 }),
        };
        let answer = pd.client.put_cluster_config(request).await.unwrap().into_inner();
        assert_eq!(error_of(&answer.header), None);
        assert_eq!(pd.alloc(8).await, 11);
        for id in [4, 5] {
            assert_eq!(pd.put_store(store_message(id)).await, None);
        }
        let mut left = region_message(2, &[(3, 1)], 3);
        left.end_key = "m".into();
        let mut right = region_message(10, &[(11, 1)], 3);
        right.start_key = "m".into();
        let (reports, orders) = report(&mut pd, &left).await;
        reports.send(heartbeat(&pd, &right, 0)).await.unwrap();
        let mut scene = Scene { pd, clock, left, right, reports, orders, _group };
        scene.is_as_it_was().await;
        scene
    }

    /// Both regions are found, whole and with their leaders.
    async fn is_as_it_was(&mut self) {
        for (key, region) in [(&b"a"[..], &self.left), (b"z", &self.right)] {
            let found = self.pd.region_of(key).await;
            assert_eq!(error_of(&found.header), None);
            assert_eq!(found.region.as_ref(), Some(region));
            assert_eq!(found.leader, Some(region.peers[0]));
        }
    }

    /// Sends a report on the store's own stream. The answer must be an error.
    async fn is_refused(&mut self, report: pdpb::RegionHeartbeatRequest, why: &str) {
        self.reports.send(report).await.unwrap();
        let message = refusal(&mut self.orders).await;
        assert!(message.contains(why), "`{why}` is not in: {message}");
    }
}

#[tokio::test]
async fn a_heartbeat_with_an_absurd_size_does_not_panic_placement() {
    let mut scene = Scene::new().await;
    type Change = fn(&mut pdpb::RegionHeartbeatRequest);
    let absurd: [(Change, &str); 9] = [
        (|report| report.approximate_size = u64::MAX, "more bytes or keys"),
        (|report| report.approximate_keys = u64::MAX, "more bytes or keys"),
        (|report| report.bytes_written = u64::MAX, "more bytes or keys"),
        (|report| report.keys_read = u64::MAX, "more bytes or keys"),
        (|report| report.term = u64::MAX, "a term"),
        (
            |report| report.region.as_mut().unwrap().start_key = vec![b'k'; 1 << 20].into(),
            "a bound",
        ),
        (
            |report| {
                let epoch = report.region.as_mut().unwrap().region_epoch.as_mut().unwrap();
                epoch.conf_ver = u64::MAX;
            },
            "an epoch",
        ),
        (
            |report| {
                let peers = &mut report.region.as_mut().unwrap().peers;
                let more = (100..5_000).map(|id| metapb::Peer { id, store_id: id, ..peers[0] });
                peers.extend(more.collect::<Vec<_>>());
            },
            "more peers",
        ),
        (|report| report.region.as_mut().unwrap().peers[0].id = 0, "without ids"),
    ];
    for (change, why) in absurd {
        for region in [scene.left.clone(), scene.right.clone()] {
            let mut report = heartbeat(&scene.pd, &region, 0);
            change(&mut report);
            scene.is_refused(report, why).await;
        }
        scene.is_as_it_was().await;
    }
    // The largest size that is accepted, several times, so that it adds up.
    for _ in 0..3 {
        for region in [&scene.left, &scene.right] {
            let mut report = heartbeat(&scene.pd, region, 0);
            report.approximate_size = 1 << 50;
            scene.reports.send(report).await.unwrap();
        }
    }
    // A refused report after them shows that they were taken in.
    let absurd =
        pdpb::RegionHeartbeatRequest { term: u64::MAX, ..heartbeat(&scene.pd, &scene.left, 0) };
    scene.is_refused(absurd, "a term").await;
    scene.is_as_it_was().await;
}

#[tokio::test]
async fn a_heartbeat_with_a_false_range_takes_no_region_off_the_map() {
    let mut scene = Scene::new().await;
    let at = |region: &metapb::Region, start: &'static str, end: &'static str, version: u64| {
        let mut region = region.clone();
        (region.start_key, region.end_key) = (start.into(), end.into());
        region.region_epoch.as_mut().unwrap().version = version;
        region
    };
    let false_ranges = [
        at(&scene.left, "", "", 2),
        at(&scene.left, "", "z", 2),
        at(&scene.right, "a", "", 9),
        at(&scene.right, "a", "b", 9),
        at(&scene.left, "", "c", 1),
        at(&scene.left, "", "m", 2),
        at(&scene.left, "", "c", 1 << 40),
    ];
    for region in &false_ranges {
        scene.reports.send(heartbeat(&scene.pd, region, 0)).await.unwrap();
        // Answers come in order, so the range was looked at before this error.
        let absurd = pdpb::RegionHeartbeatRequest {
            approximate_size: u64::MAX,
            ..heartbeat(&scene.pd, &scene.left, 0)
        };
        scene.is_refused(absurd, "more bytes").await;
        scene.is_as_it_was().await;
        let request = pdpb::ReportBatchSplitRequest {
            header: scene.pd.header(),
            regions: vec![region.clone()],
        };
        scene.pd.client.report_batch_split(request).await.unwrap();
        scene.is_as_it_was().await;
    }
    // A possible range is accepted. It is forgotten when the leader goes on to report otherwise.
    let plausible = at(&scene.left, "", "c", 2);
    scene.reports.send(heartbeat(&scene.pd, &plausible, 0)).await.unwrap();
    while scene.pd.region_of(b"b").await.region.as_ref() != Some(&plausible) {}
    scene.clock.advance_moment(CLAIM_MS);
    for region in [&scene.left, &scene.right] {
        scene.reports.send(heartbeat(&scene.pd, region, 0)).await.unwrap();
    }
    while scene.pd.region_of(b"b").await.region.as_ref() == Some(&plausible) {}
    scene.is_as_it_was().await;
}

#[tokio::test]
async fn a_store_reports_what_it_leads_with_ids_and_stores_of_this_cluster() {
    let mut scene = Scene::new().await;
    let with = |peers: &[(u64, u64)]| {
        let mut region = region_message(2, peers, 4);
        region.end_key = "m".into();
        region
    };
    let cases = [
        // On the stream of store 1, in the name of store 4.
        (with(&[(3, 4)]), "a store that does not lead it"),
        (with(&[(3, 1), (7, 99)]), "a store that this cluster does not know"),
        (with(&[(3, 1), (5_000_000, 4)]), "an id that this cluster never gave"),
    ];
    for (region, why) in cases {
        let false_report = heartbeat(&scene.pd, &region, 0);
        scene.is_refused(false_report, why).await;
        scene.is_as_it_was().await;
    }
    let mut region = scene.right.clone();
    region.id = 5_000_000;
    let of_no_region = heartbeat(&scene.pd, &region, 0);
    scene.is_refused(of_no_region, "an id that this cluster never gave").await;
    // A stream of a store that the cluster does not know.
    let (_reports, mut orders) = report(&mut scene.pd, &with(&[(3, 77)])).await;
    let why = refusal(&mut orders).await;
    assert!(why.contains("a store that is not in the cluster"), "{why}");
    scene.is_as_it_was().await;
}

#[tokio::test]
async fn stores_describe_themselves_within_bounds() {
    let mut scene = Scene::new().await;
    let label = |key: String| metapb::StoreLabel { key, value: "v".to_owned() };
    let long = "x".repeat(1 << 20);
    let absurd = [
        metapb::Store { address: long.clone(), ..store_message(4) },
        metapb::Store { version: long.clone(), ..store_message(4) },
        metapb::Store { deploy_path: long.clone(), ..store_message(4) },
        metapb::Store { labels: vec![label(long)], ..store_message(4) },
        metapb::Store {
            labels: (0..10_000).map(|n| label(n.to_string())).collect(),
            ..store_message(4)
        },
    ];
    for store in absurd {
        let (kind, why) = scene.pd.put_store(store).await.expect("an error");
        assert_eq!(kind, pdpb::ErrorType::InvalidValue, "{why}");
    }
    let request = pdpb::StoreHeartbeatRequest {
        header: scene.pd.header(),
        stats: Some(pdpb::StoreStats { store_id: 4, capacity: u64::MAX, ..Default::default() }),
    };
    let answer = scene.pd.client.store_heartbeat(request).await.unwrap().into_inner();
    assert!(error_of(&answer.header).is_some());
    scene.is_as_it_was().await;
}

#[tokio::test]
async fn a_safe_point_of_the_far_future_is_refused() {
    let mut scene = Scene::new().await;
    for safe_point in [u64::MAX, 1 << 62] {
        let request = pdpb::UpdateGcSafePointRequest { header: scene.pd.header(), safe_point };
        let answer = scene.pd.client.update_gc_safe_point(request).await.unwrap().into_inner();
        let (_, why) = error_of(&answer.header).expect("an error");
        assert!(why.contains("lies in the future"), "{why}");
        let request = pdpb::UpdateServiceGcSafePointRequest {
            header: scene.pd.header(),
            service_id: "backup".into(),
            ttl: 100,
            safe_point,
        };
        let answer =
            scene.pd.client.update_service_gc_safe_point(request).await.unwrap().into_inner();
        assert!(error_of(&answer.header).is_some());
    }
    let request = pdpb::GetGcSafePointRequest { header: scene.pd.header() };
    let answer = scene.pd.client.get_gc_safe_point(request).await.unwrap().into_inner();
    assert_eq!(answer.safe_point, 0);
}
