//! The admin client against a cluster that agrees, has moved on, or refuses.

mod fake;

use std::time::Duration;

use bytes::Bytes;
use esker_client::ClientError;
use esker_client::admin::{CHANGE_ATTEMPTS, MemberState, SplitAt};
use esker_model::{RegionId, StoreId};
use esker_rpc::proto::{errorpb, esker as wire, pdpb};
use fake::{Script, peer, region, serve};

/// Longer than a transfer takes here.
const PATIENCE: Duration = Duration::from_secs(10);

fn keys(keys: &[&'static str]) -> SplitAt {
    SplitAt::Keys(keys.iter().map(|key| Bytes::from_static(key.as_bytes())).collect())
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
    let (admin, script) = serve(Script { regions, ..Script::default() }).await;
    let listed = admin.regions().await.expect("the cluster answers");
    assert!(listed.iter().map(|found| found.region.id.0).eq(1..=2_500));
    assert_eq!(script.lock().scans, 3);
}

#[tokio::test]
async fn a_split_at_keys_answers_the_regions_that_came_of_it() {
    let (admin, _) = serve(one_region()).await;
    let parts =
        admin.split_region(RegionId(2), &keys(&["m", "t"])).await.expect("the leader agrees");
    let starts: Vec<_> = parts.into_iter().map(|region| region.range.start().clone()).collect();
    assert_eq!(starts, ["g", "m", "t"]);
}

#[tokio::test]
async fn after_a_split_placement_finds_the_parts_though_it_hears_of_them_late() {
    let script = Script { unheard: (Vec::new(), 3), ..one_region() };
    let (admin, _) = serve(script).await;
    let parts =
        admin.split_region(RegionId(2), &keys(&["m", "t"])).await.expect("the leader agrees");
    let listed = admin.regions().await.expect("the cluster answers");
    let listed: Vec<_> = listed.into_iter().map(|found| found.region).collect();
    assert_eq!(listed, parts);
}

#[tokio::test]
async fn a_split_is_sent_again_when_the_leader_has_moved_and_not_when_it_is_refused() {
    let script = Script { refusals: [not_leader(), not_leader()].into(), ..one_region() };
    let (admin, script) = serve(script).await;
    admin.split_region(RegionId(2), &keys(&["m"])).await.expect("the third leader agrees");
    assert_eq!(script.lock().changes, 3);

    let full = errorpb::Error { message: "no room".to_owned(), ..Default::default() };
    script.lock().refusals = [full].into();
    let error = admin.split_region(RegionId(2), &keys(&["t"])).await.expect_err("there is no room");
    assert_eq!(error.to_string(), "region 2 refused: no room");
    assert_eq!(script.lock().changes, 4);
}

fn busy() -> errorpb::Error {
    errorpb::Error {
        message: "too many requests wait".to_owned(),
        server_is_busy: Some(errorpb::ServerIsBusy::default()),
        ..Default::default()
    }
}

#[tokio::test]
async fn a_busy_leader_is_asked_again_and_named_as_busy_in_the_end() {
    let script = Script { refusals: [busy(), busy()].into(), ..one_region() };
    let (admin, script) = serve(script).await;
    admin.split_region(RegionId(2), &keys(&["m"])).await.expect("the leader has room at last");
    assert_eq!(script.lock().changes, 3);
    script.lock().refusals = [busy()].into();
    admin
        .transfer_leader(RegionId(2), StoreId(3), PATIENCE)
        .await
        .expect("the leader has room at last");
    assert_eq!(script.lock().changes, 5);

    script.lock().refusals = std::iter::repeat_with(busy).take(CHANGE_ATTEMPTS).collect();
    let error = admin.split_region(RegionId(2), &keys(&["t"])).await.expect_err("it stays busy");
    assert_eq!(error.to_string(), "region 2 refused: too many requests wait");
    assert_eq!(script.lock().changes, 5 + CHANGE_ATTEMPTS);
}

#[tokio::test]
async fn a_change_that_may_have_been_made_is_not_reported_as_refused_and_not_sent_again() {
    let lost = |message: &str| errorpb::Error {
        message: message.to_owned(),
        undetermined_result: Some(errorpb::UndeterminedResult { message: "lost track".into() }),
        ..Default::default()
    };
    let script = Script { refusals: [lost("deposed"), lost("")].into(), ..one_region() };
    let (admin, script) = serve(script).await;
    let error = admin.split_region(RegionId(2), &keys(&["m"])).await.expect_err("unknown");
    assert_eq!(
        error.to_string(),
        "the split of region 2 may or may not have happened (deposed): look at the region before \
         trying again"
    );
    let error =
        admin.transfer_leader(RegionId(2), StoreId(3), PATIENCE).await.expect_err("unknown");
    assert!(matches!(error, ClientError::ChangeUnknown { region: RegionId(2), .. }), "{error}");
    assert!(error.to_string().contains("(lost track)"), "{error}");
    assert_eq!(script.lock().changes, 2);
}

#[tokio::test]
async fn a_replacement_that_may_have_been_made_is_not_reported_as_refused() {
    let refused = || Some("nothing is to be replaced".to_owned());
    let replacements = [refused(), None, refused()].into();
    let (admin, _) = serve(Script { replacements, ..one_region() }).await;
    let error = admin.replace_member("placement-1").await.expect_err("it is a member");
    assert_eq!(error.to_string(), "the member was not replaced: nothing is to be replaced");
    // The first answer does not arrive, and the second may be due to what the first call did.
    let error = admin.replace_member("placement-1").await.expect_err("unknown");
    assert_eq!(
        error.to_string(),
        "placement-1 may or may not have been replaced (nothing is to be replaced): look at the \
         members before trying again"
    );
}

#[tokio::test]
async fn a_split_key_outside_the_region_is_refused_with_its_range_before_anything_is_sent() {
    let (admin, script) = serve(one_region()).await;
    for outside in ["a", "g"] {
        let error =
            admin.split_region(RegionId(2), &keys(&[outside])).await.expect_err("not after g");
        let text = error.to_string();
        assert!(text.contains("region 2") && text.contains("from g to"), "{text}");
    }
    assert_eq!(script.lock().changes, 0);
}

#[tokio::test]
async fn what_does_not_exist_is_named() {
    let (admin, _) = serve(one_region()).await;
    let error = admin
        .split_region(RegionId(9), &SplitAt::Parts(2))
        .await
        .expect_err("there is no region 9");
    assert_eq!(error.to_string(), "there is no region 9");
    let error = admin
        .transfer_leader(RegionId(2), StoreId(9), PATIENCE)
        .await
        .expect_err("there is no store 9");
    assert!(matches!(error, ClientError::NoStore { store: StoreId(9) }), "{error}");
    let error = admin
        .transfer_leader(RegionId(2), StoreId(4), PATIENCE)
        .await
        .expect_err("store 4 has no replica");
    assert!(error.to_string().ends_with("choose one of 1, 2, 3"), "{error}");
}

#[tokio::test]
async fn a_transfer_ends_when_the_new_leader_is_known() {
    let script = Script { refusals: [not_leader()].into(), ..one_region() };
    let (admin, script) = serve(script).await;
    admin.transfer_leader(RegionId(2), StoreId(3), PATIENCE).await.expect("store 3 has a replica");
    assert_eq!(script.lock().regions[0].leader, Some(peer(3)));
    let changes = script.lock().changes;
    admin.transfer_leader(RegionId(2), StoreId(3), PATIENCE).await.expect("it leads already");
    assert_eq!(script.lock().changes, changes, "nothing is asked for twice");
}

#[tokio::test]
async fn a_transfer_that_does_not_happen_is_not_reported_as_done() {
    let (admin, script) = serve(Script { transfers_fail: true, ..one_region() }).await;
    let patience = Duration::from_millis(450);
    let error =
        admin.transfer_leader(RegionId(2), StoreId(3), patience).await.expect_err("nothing moves");
    assert!(error.to_string().contains("did not come to store 3 within"), "{error}");
    assert!(script.lock().changes > 1, "it was asked for again");
}

#[tokio::test]
async fn leadership_is_not_asked_for_where_the_replica_is_silent() {
    let (admin, script) = serve(one_region()).await;
    let down = pdpb::PeerStats { peer: Some(peer(3)), down_seconds: 12 };
    script.lock().regions[0].down_peers = vec![down];
    let error =
        admin.transfer_leader(RegionId(2), StoreId(3), PATIENCE).await.expect_err("it is down");
    assert_eq!(
        error.to_string(),
        "the leader of region 2 has not heard of the replica on store 3 for 12s: it cannot lead"
    );
    assert_eq!(script.lock().changes, 0);
    admin.transfer_leader(RegionId(2), StoreId(2), PATIENCE).await.expect("store 2 is up");
}

#[tokio::test]
async fn a_region_is_shown_with_the_answers_of_its_stores_and_the_silence_of_others() {
    let (admin, _) = serve(Script { stores: vec![1, 2], ..one_region() }).await;
    for store in [1, 2] {
        let answer = admin.replica(RegionId(2), StoreId(store), false).await.expect("it answers");
        assert_eq!((answer.term, answer.role), (5, wire::Role::Leader as i32));
        let refused = admin
            .replica(RegionId(9), StoreId(store), false)
            .await
            .expect_err("it has no such replica");
        assert!(
            matches!(refused, ClientError::RegionRefused { region: RegionId(9), .. }),
            "{refused}"
        );
    }
    let silent =
        admin.replica(RegionId(2), StoreId(3), false).await.expect_err("there is no store 3");
    assert!(matches!(silent, ClientError::NoStore { store: StoreId(3) }), "{silent}");
}

#[tokio::test]
async fn members_and_timestamps_come_from_the_cluster() {
    let (admin, _) = serve(Script::default()).await;
    let members = admin.members().await.expect("the cluster answers");
    assert!(members.len() == 1 && members[0].leads, "{members:?}");
    assert_eq!(members[0].state, MemberState::Silent, "it does not say how it is");
    let timestamp = admin.placement().tso(1).await.expect("the cluster answers");
    assert_eq!((timestamp.physical(), timestamp.logical()), (1_000, 9));
}
