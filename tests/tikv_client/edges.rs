//! Cases in which clients go wrong: clusters that are fresh or empty, ranges without an end, keys
//! at both ends of the key space, and requests that are refused.

use std::time::Duration;

use bytes::Bytes;
use esker::Cluster;
use esker_model::limits::{KEYS_TOP, MAX_KEY_BYTES};
use tikv_client::{Config, Error, KvPair, RawClient, Result};

use crate::Layout;
use crate::common::alone;
use crate::common::operator::Operator;
use crate::common::process::PATIENCE;

async fn start(stores: u32) -> (Cluster, Operator) {
    let options = esker::ClusterOptions { stores, ..esker::ClusterOptions::default() };
    let cluster = Cluster::start(options).await.expect("the cluster starts");
    let operator = Operator::connect(&[cluster.placement_address().to_owned()]).await;
    (cluster, operator)
}

/// The keys of an answer, which must come.
async fn keys(answer: impl Future<Output = Result<Vec<KvPair>>>) -> Vec<Vec<u8>> {
    let found = soon(answer).await.expect("an answer");
    found.into_iter().map(|pair| pair.into_key().into()).collect()
}

async fn soon<T>(answer: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, answer).await.expect("the client comes to an end")
}

/// The error that the client's caller gets from a refused scan.
async fn refusal<T: std::fmt::Debug>(answer: impl Future<Output = Result<T>>) -> String {
    match soon(answer).await.expect_err("it is refused") {
        Error::GrpcAPI(status) => status.message().to_owned(),
        other => panic!("{other:?}"),
    }
}

async fn put(client: &RawClient, keys: &[&[u8]]) {
    for key in keys {
        client.put(key.to_vec(), "v").await.expect("a put");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn scans_of_a_fresh_cluster_find_what_is_in_their_range_and_come_to_an_end() {
    let _alone = alone().await;
    let (cluster, operator) = start(1).await;
    for layout in Layout::ALL {
        let client = layout.client(&cluster).await;
        let empty: [Vec<u8>; 0] = [];
        assert_eq!(keys(client.scan("y".to_owned().."zz".to_owned(), 10)).await, empty);
        assert_eq!(keys(client.scan(Vec::<u8>::new().., 100)).await, empty);
        assert_eq!(keys(client.scan_reverse(Vec::<u8>::new().., 100)).await, empty);
        assert_eq!(keys(client.scan("b".to_owned().."b".to_owned(), 10)).await, empty);

        put(&client, &[b"apple", b"user1", b"y1", b"zebra"]).await;
        let found = keys(client.scan("y".to_owned().."zz".to_owned(), 10)).await;
        assert_eq!(found, [&b"y1"[..], b"zebra"]);
        let found = keys(client.scan(Vec::<u8>::new().., 100)).await;
        assert_eq!(found, [&b"apple"[..], b"user1", b"y1", b"zebra"]);
        let found = keys(client.scan("b".to_owned().., 100)).await;
        assert_eq!(found, [&b"user1"[..], b"y1", b"zebra"]);
        let found = keys(client.scan_reverse("a".to_owned().."x".to_owned(), 1)).await;
        assert_eq!(found, [b"user1"]);
        let found = keys(client.scan_reverse(Vec::<u8>::new().., 2)).await;
        assert_eq!(found, [&b"zebra"[..], b"y1"]);
        let ranges = ["a".to_owned().."b".to_owned(), "y".to_owned().."z".to_owned()];
        assert_eq!(keys(client.batch_scan(ranges, 10)).await, [&b"apple"[..], b"y1"]);
    }
    // The plain client now meets the keys of others. Esker's own tools are right.
    let found = operator.kv().scan("", "", 100).await.expect("a scan");
    assert_eq!(found.len(), 8, "{found:?}");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_bounds_of_key_spaces_are_cut_for_those_who_use_one_and_only_then() {
    let _alone = alone().await;
    let (cluster, operator) = start(3).await;
    let bounds = async || {
        let regions = operator.whole(3, PATIENCE).await;
        regions
            .into_iter()
            .skip(1)
            .map(|region| region.region.range.start().clone())
            .collect::<Vec<_>>()
    };
    let top = Bytes::from_static(&KEYS_TOP);
    let plain = Layout::Plain.client(&cluster).await;
    put(&plain, &[b"apple", b"user1", b"zebra"]).await;
    assert_eq!(bounds().await, std::slice::from_ref(&top));

    let config = Config::default().with_keyspace("no such key space");
    let endpoints = vec![cluster.placement_address().to_owned()];
    let unknown = RawClient::new_with_config(endpoints, config);
    let pending = tokio::time::timeout(Duration::from_millis(100), unknown).await;
    assert!(!matches!(pending, Ok(Ok(_))), "a key space that does not exist was loaded");
    assert_eq!(bounds().await, std::slice::from_ref(&top));

    // Several clients at once. Each finds its key space as it should be.
    let clients =
        futures_util::future::join_all((0..4).map(|_| Layout::Keyspace.client(&cluster))).await;
    let mut expected: Vec<Bytes> = [&b"r\0\0\0"[..], b"r\0\0\x01", b"x\0\0\0", b"x\0\0\x01"]
        .iter()
        .map(|bound| [bound, &b"\0\0\0\0\xfb"[..]].concat().into())
        .collect();
    expected.push(top);
    assert_eq!(bounds().await, expected);
    for (client, key) in clients.iter().zip(["a", "b", "c", "d"]) {
        put(client, &[key.as_bytes()]).await;
    }
    for client in &clients {
        assert_eq!(keys(client.scan(Vec::<u8>::new().., 100)).await, [b"a", b"b", b"c", b"d"]);
        assert_eq!(keys(client.scan_reverse(Vec::<u8>::new().., 1)).await, [b"d"]);
    }
    // The old keys are still there. A scan without an end is refused, because the client would stop
    // halfway.
    let everything = "a".to_owned()..=format!("{}", char::MAX);
    let found = keys(plain.scan(everything, 100)).await;
    assert_eq!(found.len(), 7, "{found:?}");
    let said = refusal(plain.scan("a".to_owned().., 100)).await;
    assert!(said.contains("upper bound"), "{said}");
    assert_eq!(keys(plain.scan("a".to_owned().., 1)).await, [b"apple"]);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reverse_scan_over_several_regions_is_refused_where_the_client_begins_at_the_wrong_end() {
    let _alone = alone().await;
    let (cluster, operator) = start(1).await;
    let client = Layout::Plain.client(&cluster).await;
    let letters: Vec<Vec<u8>> = (b'a'..=b'h').map(|letter| vec![b'p', b'/', letter]).collect();
    for key in &letters {
        client.put(key.clone(), "v").await.expect("a put");
    }
    operator.kv().split_region(vec!["p/d".into(), "p/f".into()]).await.expect("the regions split");
    let prefix = || b"p/".to_vec()..b"p0".to_vec();
    for limit in [1, 3, 100] {
        let said = refusal(client.scan_reverse(prefix(), limit)).await;
        assert!(said.contains("reverse scan"), "{said}");
        let said = refusal(client.scan_keys_reverse(prefix(), limit)).await;
        assert!(said.contains("reverse scan"), "{said}");
    }
    let said = refusal(client.scan_reverse(b"p/".to_vec().., 3)).await;
    assert!(said.contains("reverse scan"), "{said}");
    // Within one region, to its very end, and forward over all regions.
    let found = keys(client.scan_reverse(b"p/d".to_vec()..b"p/f".to_vec(), 10)).await;
    assert_eq!(found, [b"p/e", b"p/d"]);
    let found = keys(client.scan_reverse(b"p/f".to_vec().., 2)).await;
    assert_eq!(found, [b"p/h", b"p/g"]);
    assert_eq!(keys(client.scan(prefix(), 100)).await, letters);
    // A client that begins a reverse scan in the right region.
    let found = operator.kv().reverse_scan("p0", "p/", 3).await.expect("a reverse scan");
    let found: Vec<_> = found.into_iter().map(|(key, _)| key).collect();
    assert_eq!(found, ["p/h", "p/g", "p/f"]);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_is_too_large_is_an_error_and_not_a_pair() {
    let _alone = alone().await;
    const VALUE: usize = 5 << 20;
    let (cluster, operator) = start(1).await;
    let config = Config::default().with_grpc_max_decoding_message_size(256 << 20);
    let endpoints = vec![cluster.placement_address().to_owned()];
    let client = RawClient::new_with_config(endpoints, config).await.expect("it connects");
    let names: Vec<String> = (0..12).map(|number| format!("large/{number:02}")).collect();
    for name in &names {
        client.put(name.clone(), vec![b'v'; VALUE]).await.expect("a put");
    }
    let range = || "large/".to_owned().."large0".to_owned();
    let said = refusal(client.scan(range(), 100)).await;
    assert!(said.contains("larger than 48 MiB"), "{said}");
    let said = refusal(client.scan_reverse(range(), 100)).await;
    assert!(said.contains("larger than 48 MiB"), "{said}");
    assert!(soon(client.batch_get(names.clone())).await.is_err());
    assert!(soon(client.batch_scan([range()], 100)).await.is_err());
    let few = soon(client.scan(range(), 3)).await.expect("a scan");
    assert!(few.iter().all(|pair| pair.value().len() == VALUE) && few.len() == 3);
    assert_eq!(soon(client.scan_keys(range(), 100)).await.expect("keys").len(), names.len());

    let error = operator.kv().scan("large/", "large0", 100).await.expect_err("it is refused");
    let line = error.to_string();
    assert!(line.contains("48 MiB") && line.contains("scan") && !line.contains('\n'), "{line}");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_at_both_ends_of_the_key_space_are_kept_found_and_removed() {
    let _alone = alone().await;
    let (cluster, operator) = start(1).await;
    for layout in Layout::ALL {
        let client = layout.client(&cluster).await;
        // A key space's name is a part of the key.
        let longest = match layout {
            Layout::Plain => MAX_KEY_BYTES,
            Layout::Keyspace => MAX_KEY_BYTES - 4,
        };
        let mut all: Vec<Vec<u8>> = vec![
            vec![0],
            vec![0, 0],
            vec![0; longest],
            b"k".to_vec(),
            "schlüssel/鍵/🔑".as_bytes().to_vec(),
            vec![0xff],
            vec![0xff; longest - 1],
            vec![0xff; longest],
        ];
        all.sort();
        for key in &all {
            client.put(key.clone(), "").await.expect("a put");
        }
        for key in &all {
            let found = client.get(key.clone()).await.expect("a get");
            assert_eq!(found.as_deref(), Some(&b""[..]), "an empty value is a value");
            let left = client.get_key_ttl_secs(key.clone()).await.expect("a ttl");
            assert_eq!(left, Some(0));
        }
        let upper = vec![0xff; longest];
        let bounded = || vec![0_u8]..=upper.clone();
        assert_eq!(keys(client.scan(bounded(), 100)).await, all);
        let mut reversed = all.clone();
        reversed.reverse();
        assert_eq!(keys(client.scan_reverse(bounded(), 100)).await, reversed);
        assert_eq!(keys(client.scan_reverse(bounded(), 1)).await, reversed[..1]);
        assert_eq!(keys(client.scan(Vec::<u8>::new().., 100)).await, all);
        let found = soon(client.batch_get(all.clone())).await.expect("a batch get");
        assert_eq!(found.len(), all.len());
        assert_eq!(keys(client.batch_scan([bounded()], 100)).await, all);

        let long = vec![0xff; longest + 1];
        for refused in [client.put(long.clone(), "v").await, client.delete(long.clone()).await] {
            let error = refused.expect_err("the key is too long").to_string();
            assert!(error.contains("8193"), "{error}");
        }
        assert!(client.get(long).await.is_err());
        if let Layout::Plain = layout {
            let error = client.put(Vec::<u8>::new(), "v").await.expect_err("an empty key");
            assert!(error.to_string().contains("empty key"), "{error}");
            assert!(client.get(Vec::<u8>::new()).await.is_err());
        } else {
            // In a key space an empty key is a key like any other.
            client.put(Vec::<u8>::new(), "first").await.expect("a put");
            let found = keys(client.scan(Vec::<u8>::new().., 1)).await;
            assert_eq!(found, [Vec::<u8>::new()]);
        }

        // From the middle to the very last key, and then all.
        soon(client.delete_range(b"l".to_vec()..)).await.expect("a delete of a range");
        let left = all.iter().filter(|key| key[..] < b"l"[..]).count();
        let found = keys(client.scan(vec![0_u8].., 100)).await;
        assert_eq!(found.len(), left, "{found:?}");
        soon(client.delete_range(Vec::<u8>::new()..)).await.expect("a delete of a range");
        assert!(keys(client.scan(Vec::<u8>::new().., 100)).await.is_empty());
    }
    assert!(operator.kv().scan("", "", 100).await.expect("a scan").is_empty());
    cluster.stop().await;
}
