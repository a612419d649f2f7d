use bytes::Bytes;

use super::*;
use crate::cli::fake::{Script, peer, region, serve};

fn key(text: &'static str) -> Text {
    Text(Bytes::from_static(text.as_bytes()))
}

fn not_leader() -> errorpb::Error {
    errorpb::Error {
        message: "not leader".to_owned(),
        not_leader: Some(errorpb::NotLeader::default()),
        ..Default::default()
    }
}

fn one_region() -> Script {
    Script { regions: vec![region(2, "g", "")], stores: vec![1, 2, 3, 4], ..Script::default() }
}

#[tokio::test]
async fn more_regions_than_one_page_are_listed_once_and_in_order() {
    let bound = |number: u32| match number {
        0 | 2_500 => String::new(),
        _ => format!("k{number:05}"),
    };
    let regions = (0..2_500)
        .map(|number| region(u64::from(number) + 1, &bound(number), &bound(number + 1)))
        .collect();
    let (cluster, script) = serve(Script { regions, ..Script::default() }).await;
    let listed = cluster.regions().await.expect("the cluster answers");
    assert!(listed.iter().map(|region| region.id).eq(1..=2_500));
    assert_eq!(script.lock().scans, 3);
}

#[tokio::test]
async fn a_split_at_keys_answers_the_regions_that_came_of_it() {
    let (cluster, _) = serve(one_region()).await;
    let keys = [key("m"), key("t")];
    let parts = split(&cluster, 2, &keys, 2).await.expect("the leader agrees");
    let starts: Vec<_> = parts.iter().map(|region| region.start_key.to_string()).collect();
    assert_eq!(starts, ["g", "m", "t"]);
}

#[tokio::test]
async fn a_split_is_sent_again_when_the_leader_has_moved_and_not_when_it_is_refused() {
    let script = Script { refusals: [not_leader(), not_leader()].into(), ..one_region() };
    let (cluster, script) = serve(script).await;
    split(&cluster, 2, &[key("m")], 2).await.expect("the third leader agrees");
    assert_eq!(script.lock().changes, 3);

    let full = errorpb::Error { message: "no room".to_owned(), ..Default::default() };
    script.lock().refusals = [full].into();
    let error = split(&cluster, 2, &[key("m")], 2).await.expect_err("there is no room");
    assert!(error.to_string().starts_with("region 2 refused: no room; "), "{error}");
    assert_eq!(script.lock().changes, 4);
}

#[tokio::test]
async fn a_split_key_outside_the_region_is_refused_with_its_range_before_anything_is_sent() {
    let (cluster, script) = serve(one_region()).await;
    for outside in ["a", "g"] {
        let error = split(&cluster, 2, &[key(outside)], 2).await.expect_err("not after g");
        let text = error.to_string();
        assert!(text.contains("region 2") && text.contains("start `g`"), "{text}");
    }
    assert_eq!(script.lock().changes, 0);
}

#[tokio::test]
async fn what_does_not_exist_is_named() {
    let (cluster, _) = serve(one_region()).await;
    let error = split(&cluster, 9, &[], 2).await.expect_err("there is no region 9");
    assert!(error.to_string().starts_with("there is no region 9: "), "{error}");
    let error =
        transfer_leader(&cluster, 2, 9, TRANSFER_DEADLINE).await.expect_err("there is no store 9");
    assert!(error.to_string().starts_with("there is no store 9: "), "{error}");
    let error = transfer_leader(&cluster, 2, 4, TRANSFER_DEADLINE)
        .await
        .expect_err("store 4 has no replica");
    assert!(error.to_string().ends_with("choose one of 1, 2, 3"), "{error}");
}

#[tokio::test]
async fn a_transfer_ends_when_the_new_leader_is_known() {
    let script = Script { refusals: [not_leader()].into(), ..one_region() };
    let (cluster, script) = serve(script).await;
    transfer_leader(&cluster, 2, 3, TRANSFER_DEADLINE).await.expect("store 3 has a replica");
    assert_eq!(script.lock().regions[0].leader, Some(peer(3)));
    let changes = script.lock().changes;
    transfer_leader(&cluster, 2, 3, TRANSFER_DEADLINE).await.expect("it leads already");
    assert_eq!(script.lock().changes, changes, "nothing is asked for twice");
}

#[tokio::test]
async fn a_transfer_that_does_not_happen_is_not_reported_as_done() {
    let (cluster, script) = serve(Script { transfers_fail: true, ..one_region() }).await;
    let error = transfer_leader(&cluster, 2, 3, LOOK_AGAIN * 3).await.expect_err("nothing moves");
    assert!(error.to_string().contains("did not come to store 3 within"), "{error}");
    assert!(script.lock().changes > 1, "it was asked for again");
}

#[tokio::test]
async fn a_region_is_shown_with_the_answers_of_its_stores_and_the_silence_of_others() {
    let (cluster, _) = serve(Script { stores: vec![1, 2], ..one_region() }).await;
    let region = cluster.region(2).await.expect("it exists");
    let text = detail::detail(&cluster, region).await.text();
    assert!(text.contains("leader:  peer 101 on store 1"), "{text}");
    assert!(text.contains("(there is no store 3: "), "{text}");
}

#[test]
fn only_an_outdated_view_is_tried_again() {
    let full = errorpb::Error { disk_full: Some(Default::default()), ..Default::default() };
    assert!(is_outdated_view(&not_leader()) && !is_outdated_view(&full));
}
