//! Impossible input from outside, to every service, including those between stores, on nodes with
//! real disks and sockets. Whatever is sent, a node lives, has its data and its regions, and starts
//! again with them.
//!
//! `ESKER_DOOR_CASES=n` sends more cases, `ESKER_DOOR_SEED=n` other ones.

mod common;

use std::collections::HashSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes};
use common::eventually;
use common::operator::Operator;
use common::process::PATIENCE;
use esker::{Cluster, ClusterOptions, Node};
use esker_client::RegionInfo;
use esker_raft::{
    AppendOutcome, CommitPoint, Entry, GroupId, LogIndex, Message as RaftBody, MessageBody,
    Payload, PeerId, SnapshotMeta, Stamp, Term,
};
use esker_rpc::proto::esker::admin_client::AdminClient;
use esker_rpc::proto::esker::command::RegionSnapshot;
use esker_rpc::proto::esker::snapshot_chunk::Part;
use esker_rpc::proto::esker::transport_client::TransportClient;
use esker_rpc::proto::esker::{
    Consensus, Gone, KeyBounds, MemberStageRequest, MemberStatusRequest, MembershipQuestion,
    RaftBatch, RaftMessage, RegionDetailRequest, ReplaceMemberRequest, SnapshotBlock,
    SnapshotChunk, SnapshotHead, SnapshotTail, SplitRegionRequest, StoreDetailRequest,
    StoreStatesRequest, TransferLeaderRequest, raft_message,
};
use esker_rpc::proto::grpc::health::v1::HealthCheckRequest;
use esker_rpc::proto::metapb::{self, Peer, Region};
use esker_rpc::proto::tikvpb::BatchCommandsRequest;
use esker_rpc::proto::tikvpb::batch_commands_request::{Request as Batched, request::Cmd};
use esker_rpc::proto::{keyspacepb, kvrpcpb, pdpb};
use prost::Message;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tokio::task::JoinSet;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};

/// The id of a store that is unknown to the cluster.
const STRANGER: u64 = 999;
/// The number of keys that were acknowledged before anything else was sent.
const KEPT: usize = 200;
/// How long the test waits for an answer. Some requests are never answered.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);
/// Requests on their way at once.
const AT_ONCE: usize = 32;

/// Bytes as they are, in place of messages.
#[derive(Clone, Copy, Default)]
struct Raw;

impl Codec for Raw {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Raw;
    type Decoder = Raw;

    fn encoder(&mut self) -> Raw {
        Raw
    }

    fn decoder(&mut self) -> Raw {
        Raw
    }
}

impl Encoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, out: &mut EncodeBuf<'_>) -> Result<(), Status> {
        out.put(item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(from.copy_to_bytes(from.remaining())))
    }
}

/// Sends messages to a method, and reads its answers. Each service may refuse them in its own way.
async fn call(channel: Channel, path: &'static str, messages: Vec<Bytes>) -> Result<(), Status> {
    let mut client = tonic::client::Grpc::new(channel);
    let talk = async {
        client.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
        let request = Request::new(tokio_stream::iter(messages));
        let answers = client.streaming(request, PathAndQuery::from_static(path), Raw).await?;
        let mut answers = answers.into_inner();
        while answers.message().await?.is_some() {}
        Ok(())
    };
    // A stream goes on for as long as its client wants.
    tokio::time::timeout(ANSWER_WITHIN, talk).await.unwrap_or(Ok(()))
}

fn channel(address: &str) -> Channel {
    Endpoint::from_shared(format!("http://{address}")).expect("an address").connect_lazy()
}

fn consensus_message(
    region: &Region,
    from: Peer,
    to: Peer,
    term: u64,
    body: MessageBody,
) -> RaftMessage {
    let mut message = Vec::new();
    let (from_id, to_id) = (PeerId(from.id), PeerId(to.id));
    RaftBody { group: GroupId(region.id), from: from_id, to: to_id, term: Term(term), body }
        .encode(&mut message);
    let consensus = Consensus { message: message.into(), ..Consensus::default() };
    RaftMessage {
        region_id: region.id,
        from: Some(from),
        to: Some(to),
        epoch: region.region_epoch,
        content: Some(raft_message::Content::Consensus(consensus)),
    }
}

fn entries(after: u64, term: u64, command: Bytes) -> MessageBody {
    let (after, term) = (LogIndex(after), Term(term));
    MessageBody::Append {
        prev_index: after,
        prev_term: term,
        entries: vec![Entry { term, index: after.next(), payload: Payload::Command(command) }]
            .into(),
        commit: after.next(),
        stamp: Stamp::default(),
    }
}

/// Every kind of message between stores, from a store that does not exist.
fn from_a_stranger(cluster: u64, region: &Region) -> (Vec<Bytes>, Vec<Vec<Bytes>>) {
    let from = Peer { id: STRANGER - 1, store_id: STRANGER, ..Peer::default() };
    let to = region.peers[0];
    let (commit, stamp) = (CommitPoint { index: LogIndex(6), term: Term(6) }, Stamp::default());
    let (last_index, last_term) = (LogIndex(1_000), Term(9));
    let bodies = [
        MessageBody::PreVote { last_index, last_term, commit },
        MessageBody::PreVoteReply { granted: true, commit },
        MessageBody::Vote { last_index, last_term, transfer: true, commit },
        MessageBody::VoteReply { granted: true, commit },
        entries(6, 6, Bytes::from_static(b"\x08\x01\x12\x04\x08\x01\x10\x02")),
        MessageBody::AppendReply {
            outcome: AppendOutcome::Accepted { match_index: LogIndex(9) },
            stamp,
        },
        MessageBody::Heartbeat { commit: LogIndex(9), stamp },
        MessageBody::HeartbeatReply { stamp },
        MessageBody::TimeoutNow,
        MessageBody::ReadIndex { batch: 1 },
        MessageBody::ReadIndexReply { batch: 1, index: LogIndex(9) },
        MessageBody::TransferRequest { target: PeerId(to.id) },
        MessageBody::Commit { commit },
    ];
    let mut messages: Vec<RaftMessage> =
        bodies.into_iter().map(|body| consensus_message(region, from, to, 9, body)).collect();
    let nothing = consensus_message(region, from, to, 9, MessageBody::TimeoutNow);
    let gone = raft_message::Content::Gone(Gone {});
    let question = raft_message::Content::Question(MembershipQuestion {});
    for content in [Some(gone), Some(question), None] {
        messages.push(RaftMessage { content, ..nothing.clone() });
    }
    let batches = messages
        .into_iter()
        .map(|message| RaftBatch {
            cluster_id: cluster,
            from_store: STRANGER,
            to_store: to.store_id,
            messages: vec![message],
        })
        .map(|batch| batch.encode_to_vec().into())
        .collect();
    let known = esker_model::Region::try_from(region.clone()).expect("placement's region");
    let configuration = esker_raftstore::configuration(&known);
    let meta = SnapshotMeta { index: LogIndex(99), term: Term(9), configuration };
    let data = RegionSnapshot { format: 1, region: Some(region.clone()), ..Default::default() };
    let data = Bytes::from(data.encode_to_vec());
    let body = MessageBody::InstallSnapshot { meta: Box::new(meta), data };
    let mut head = consensus_message(region, from, to, 9, body);
    if let Some(raft_message::Content::Consensus(consensus)) = &mut head.content {
        consensus.creates = Some(KeyBounds {
            start_key: region.start_key.clone(),
            end_key: region.end_key.clone(),
        });
    }
    let head = SnapshotHead {
        cluster_id: cluster,
        from_store: STRANGER,
        to_store: to.store_id,
        message: Some(head),
    };
    let pairs = Bytes::from_static(b"\0\0\0\x01k\0\0\0\x01v");
    let crc32 = crc32fast::hash(&pairs);
    let parts = [
        Part::Head(head),
        Part::Block(SnapshotBlock { cf: 0, pairs: pairs.clone(), crc32 }),
        Part::Tail(SnapshotTail { pairs: 1, bytes: pairs.len() as u64, crc32 }),
    ];
    let chunks = parts.map(|part| SnapshotChunk { part: Some(part) }.encode_to_vec().into());
    (batches, vec![chunks.to_vec()])
}

/// A stream of messages for one method.
type Talk = (&'static str, Vec<Bytes>);

fn one(path: &'static str, message: impl Message) -> Talk {
    (path, vec![message.encode_to_vec().into()])
}

/// Requests of clients for a region without acknowledged writes.
fn client_talks(region: &RegionInfo) -> Vec<Talk> {
    use kvrpcpb::*;
    let context = Some(Context {
        region_id: region.region.id.0,
        region_epoch: Some(region.region.epoch.into()),
        peer: region.leader.map(Into::into),
        ..Context::default()
    });
    let key = Bytes::from_static(b"y-mutated");
    let pair = KvPair { key: key.clone(), value: "v".into(), ..Default::default() };
    let range = KeyRange { start_key: key.clone(), end_key: "y-o".into() };
    let (c, k) = (|| context.clone(), || key.clone());
    let put = RawPutRequest { context: c(), key: k(), value: "v".into(), ..Default::default() };
    let get = RawGetRequest { context: c(), key: k(), ..Default::default() };
    let scan = RawScanRequest { context: c(), start_key: k(), limit: 9, ..Default::default() };
    let delete = RawDeleteRequest { context: c(), key: k(), ..Default::default() };
    let batch = BatchCommandsRequest {
        requests: [
            Cmd::RawPut(put.clone()),
            Cmd::RawGet(get.clone()),
            Cmd::RawScan(scan.clone()),
            Cmd::RawDelete(delete.clone()),
        ]
        .map(|cmd| Batched { cmd: Some(cmd) })
        .to_vec(),
        request_ids: vec![1, 2, 3, 4],
        ..Default::default()
    };
    let swap = RawCasRequest {
        context: c(),
        key: k(),
        value: "w".into(),
        previous_not_exist: true,
        ..Default::default()
    };
    vec![
        one("/tikvpb.Tikv/RawPut", put),
        one("/tikvpb.Tikv/RawGet", get),
        one("/tikvpb.Tikv/RawDelete", delete),
        one("/tikvpb.Tikv/RawScan", scan),
        one("/tikvpb.Tikv/RawCompareAndSwap", swap),
        one(
            "/tikvpb.Tikv/RawBatchGet",
            RawBatchGetRequest { context: c(), keys: vec![k()], ..Default::default() },
        ),
        one(
            "/tikvpb.Tikv/RawBatchPut",
            RawBatchPutRequest { context: c(), pairs: vec![pair], ..Default::default() },
        ),
        one(
            "/tikvpb.Tikv/RawBatchDelete",
            RawBatchDeleteRequest { context: c(), keys: vec![k()], ..Default::default() },
        ),
        one(
            "/tikvpb.Tikv/RawDeleteRange",
            RawDeleteRangeRequest {
                context: c(),
                start_key: k(),
                end_key: "y-o".into(),
                ..Default::default()
            },
        ),
        one(
            "/tikvpb.Tikv/RawBatchScan",
            RawBatchScanRequest {
                context: c(),
                ranges: vec![range],
                each_limit: 3,
                ..Default::default()
            },
        ),
        one(
            "/tikvpb.Tikv/RawGetKeyTTL",
            RawGetKeyTtlRequest { context: c(), key: k(), ..Default::default() },
        ),
        one(
            "/tikvpb.Tikv/RawChecksum",
            RawChecksumRequest {
                context: c(),
                algorithm: 0,
                ranges: vec![KeyRange { start_key: k(), end_key: "y-o".into() }],
            },
        ),
        one(
            "/tikvpb.Tikv/SplitRegion",
            SplitRegionRequest { context: c(), split_keys: vec![k()], ..Default::default() },
        ),
        (
            "/tikvpb.Tikv/BatchCommands",
            vec![batch.encode_to_vec().into(), batch.encode_to_vec().into()],
        ),
    ]
}

fn operator_talks(region: &RegionInfo) -> Vec<Talk> {
    let (id, epoch) = (region.region.id.0, Some(region.region.epoch.into()));
    vec![
        one(
            "/esker.Admin/TransferLeader",
            TransferLeaderRequest { region_id: id, region_epoch: epoch, to_store: 2 },
        ),
        one(
            "/esker.Admin/SplitRegion",
            SplitRegionRequest {
                region_id: id,
                region_epoch: epoch,
                parts: 2,
                keys: vec!["y-cut".into()],
            },
        ),
        one(
            "/esker.Admin/RegionDetail",
            RegionDetailRequest { region_id: id, with_checksum: true },
        ),
        one("/esker.Admin/StoreDetail", StoreDetailRequest {}),
        one("/esker.Founding/Stage", MemberStageRequest::default()),
        one("/esker.Founding/Replace", ReplaceMemberRequest { name: "nobody".into() }),
        one("/esker.Members/MemberStatus", MemberStatusRequest {}),
        one("/esker.PlacementAdmin/StoreStates", StoreStatesRequest { header: None }),
        one("/grpc.health.v1.Health/Check", HealthCheckRequest { service: "store".into() }),
    ]
}

fn placement_talks(cluster_id: u64, region: &RegionInfo, fresh: u64) -> Vec<Talk> {
    use pdpb::*;
    let header = || Some(RequestHeader { cluster_id, ..Default::default() });
    let meta = || Some(metapb::Region::from(&region.region));
    let key = || region.region.range.start().clone();
    let report = RegionHeartbeatRequest {
        header: header(),
        region: meta(),
        leader: region.leader.map(Into::into),
        term: 6,
        approximate_size: 10,
        approximate_keys: 100,
        bytes_written: 1_000,
        ..Default::default()
    };
    let report: Bytes = report.encode_to_vec().into();
    let store = metapb::Store {
        id: fresh,
        address: "127.0.0.1:1".into(),
        labels: vec![metapb::StoreLabel { key: "zone".into(), value: "a".into() }],
        ..Default::default()
    };
    let tso = TsoRequest { header: header(), count: 3, ..Default::default() };
    let query = QueryRegionRequest {
        header: header(),
        keys: vec![key()],
        ids: vec![1],
        ..Default::default()
    };
    let stats = StoreStats { store_id: fresh, capacity: 1 << 30, ..Default::default() };
    vec![
        ("/pdpb.PD/RegionHeartbeat", vec![report.clone(), report]),
        one("/pdpb.PD/Tso", tso),
        one("/pdpb.PD/QueryRegion", query),
        one("/pdpb.PD/GetMembers", GetMembersRequest { header: header() }),
        one("/pdpb.PD/AllocID", AllocIdRequest { header: header(), count: 2 }),
        one(
            "/pdpb.PD/PutStore",
            PutStoreRequest { header: header(), store: Some(store.clone()), ..Default::default() },
        ),
        one("/pdpb.PD/GetStore", GetStoreRequest { header: header(), store_id: fresh }),
        one(
            "/pdpb.PD/GetAllStores",
            GetAllStoresRequest { header: header(), exclude_tombstone_stores: true },
        ),
        one(
            "/pdpb.PD/Bootstrap",
            BootstrapRequest { header: header(), store: Some(store), region: meta() },
        ),
        one("/pdpb.PD/IsBootstrapped", IsBootstrappedRequest { header: header() }),
        one(
            "/pdpb.PD/StoreHeartbeat",
            StoreHeartbeatRequest { header: header(), stats: Some(stats) },
        ),
        one(
            "/pdpb.PD/GetRegion",
            GetRegionRequest { header: header(), region_key: key(), ..Default::default() },
        ),
        one(
            "/pdpb.PD/GetPrevRegion",
            GetRegionRequest { header: header(), region_key: key(), ..Default::default() },
        ),
        one(
            "/pdpb.PD/GetRegionByID",
            GetRegionByIdRequest {
                header: header(),
                region_id: region.region.id.0,
                ..Default::default()
            },
        ),
        one(
            "/pdpb.PD/ScanRegions",
            ScanRegionsRequest {
                header: header(),
                start_key: key(),
                limit: 3,
                ..Default::default()
            },
        ),
        one(
            "/pdpb.PD/BatchScanRegions",
            BatchScanRegionsRequest {
                header: header(),
                ranges: vec![KeyRange { start_key: key(), end_key: Bytes::new() }],
                limit: 3,
                ..Default::default()
            },
        ),
        one("/pdpb.PD/AskSplit", AskSplitRequest { header: header(), region: meta() }),
        one(
            "/pdpb.PD/AskBatchSplit",
            AskBatchSplitRequest {
                header: header(),
                region: meta(),
                split_count: 2,
                ..Default::default()
            },
        ),
        one(
            "/pdpb.PD/ReportBatchSplit",
            ReportBatchSplitRequest {
                header: header(),
                regions: vec![metapb::Region::from(&region.region)],
            },
        ),
        one(
            "/pdpb.PD/ScatterRegion",
            ScatterRegionRequest {
                header: header(),
                region_id: region.region.id.0,
                ..Default::default()
            },
        ),
        one(
            "/pdpb.PD/GetOperator",
            GetOperatorRequest { header: header(), region_id: region.region.id.0 },
        ),
        one("/pdpb.PD/GetClusterConfig", GetClusterConfigRequest { header: header() }),
        one(
            "/pdpb.PD/PutClusterConfig",
            PutClusterConfigRequest {
                header: header(),
                cluster: Some(metapb::Cluster { id: cluster_id, max_peer_count: 3 }),
            },
        ),
        one("/pdpb.PD/GetGCSafePoint", GetGcSafePointRequest { header: header() }),
        one(
            "/pdpb.PD/UpdateGCSafePoint",
            UpdateGcSafePointRequest { header: header(), safe_point: 7 },
        ),
        one(
            "/pdpb.PD/UpdateServiceGCSafePoint",
            UpdateServiceGcSafePointRequest {
                header: header(),
                service_id: "backup".into(),
                ttl: 1,
                safe_point: 7,
            },
        ),
        one(
            "/keyspacepb.Keyspace/LoadKeyspace",
            keyspacepb::LoadKeyspaceRequest { header: header(), name: "DEFAULT".into() },
        ),
        one(
            "/keyspacepb.Keyspace/LoadKeyspaceByID",
            keyspacepb::LoadKeyspaceByIdRequest { header: header(), id: Some(0) },
        ),
        one(
            "/keyspacepb.Keyspace/GetAllKeyspaces",
            keyspacepb::GetAllKeyspacesRequest { header: header(), ..Default::default() },
        ),
        one(
            "/keyspacepb.Keyspace/WatchKeyspaces",
            keyspacepb::WatchKeyspacesRequest { header: header() },
        ),
    ]
}

/// Changes, removes or repeats some of a message's bytes, or replaces a number by an absurd one.
fn mutated(message: &Bytes, random: &mut ChaCha8Rng) -> Bytes {
    const ABSURD: [&[u8]; 4] = [
        // As varints: 2^64 - 1, 2^63, and an invalid one. And an impossible length.
        b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
        b"\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01",
        b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff",
        b"\xff\xff\xff\xff\x0f",
    ];
    let mut bytes = message.to_vec();
    for _ in 0..random.random_range(0..4) {
        if bytes.is_empty() {
            break;
        }
        let at = random.random_range(0..bytes.len());
        match random.random_range(0..6) {
            0 | 1 => bytes[at] = random.random(),
            2 => bytes[at] ^= 1 << random.random_range(0..8),
            3 => bytes.truncate(at),
            4 => drop(bytes.splice(at..=at, ABSURD[random.random_range(0..ABSURD.len())].to_vec())),
            _ => {
                let part = bytes[at..(at + 16).min(bytes.len())].to_vec();
                drop(bytes.splice(at..at, part));
            }
        }
    }
    bytes.into()
}

fn number(variable: &str, otherwise: u64) -> u64 {
    std::env::var(variable).ok().and_then(|n| n.parse().ok()).unwrap_or(otherwise)
}

fn kept(n: usize) -> String {
    format!("acknowledged-long-before-{n:04}")
}

async fn has_its_data(node: &Node) {
    let client = node.client().await.expect("a client");
    for n in 0..KEPT {
        let found = client.get(kept(n)).await.expect("a read");
        assert_eq!(found.as_deref(), Some(&b"kept"[..]), "{}", kept(n));
    }
    client.put("works", "still").await.expect("a write");
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_reaches_a_service_the_node_lives_and_starts_again_with_its_data() {
    static PANICS: AtomicUsize = AtomicUsize::new(0);
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        PANICS.fetch_add(1, Ordering::SeqCst);
        print(panic);
    }));
    let folder = tempfile::tempdir().expect("a folder");
    let node = Node::builder().data_dir(folder.path()).start().await.expect("a node");
    let client = node.client().await.expect("a client");
    for n in 0..KEPT {
        client.put(kept(n), "kept").await.expect("a write");
    }
    let operator = Operator::connect(&[node.address().to_owned()]).await;
    // The writes and splits below are in a region of their own.
    let whole = operator.whole(1, PATIENCE).await.remove(0);
    let cut = SplitRegionRequest {
        region_id: whole.region.id.0,
        region_epoch: Some(whole.region.epoch.into()),
        keys: vec!["x".into()],
        ..Default::default()
    };
    let answer = AdminClient::new(channel(node.address())).split_region(cut).await;
    assert_eq!(answer.expect("an answer").into_inner().region_error, None);
    let regions = eventually("placement hears of the split", PATIENCE, async || {
        let regions = operator.whole(1, PATIENCE).await;
        match regions.iter().any(|region| region.region.range.start() == "x") {
            true => Ok(regions),
            false => Err(format!("{regions:?}")),
        }
    })
    .await;
    let last = regions.iter().find(|region| region.region.range.start() == "x").expect("a region");
    let cluster = operator.placement().cluster_id();
    let fresh = operator.placement().alloc_id(1).await.expect("an id").start;

    let mut talks = Vec::new();
    for region in &regions {
        let (batches, snapshots) = from_a_stranger(cluster, &Region::from(&region.region));
        talks.extend(batches.into_iter().map(|batch| ("/esker.Transport/Raft", vec![batch])));
        talks.extend(snapshots.into_iter().map(|parts| ("/esker.Transport/Snapshot", parts)));
        talks.extend(placement_talks(cluster, region, fresh));
    }
    talks.extend(operator_talks(last));
    for _ in 0..4 {
        talks.extend(client_talks(last));
    }

    let channel = channel(node.address());
    let mut paths = HashSet::new();
    for (path, messages) in talks.iter().filter(|(path, _)| paths.insert(*path)) {
        let answer = call(channel.clone(), path, messages.clone()).await;
        let code = answer.err().map(|status| status.code());
        assert_ne!(code, Some(Code::Unimplemented), "{path} leads nowhere");
    }
    let mut random = ChaCha8Rng::seed_from_u64(number("ESKER_DOOR_SEED", 1));
    let mut under_way = JoinSet::new();
    for case in 0..number("ESKER_DOOR_CASES", 1_500) {
        let (path, messages) = &talks[random.random_range(0..talks.len())];
        // Some messages are sent unchanged, so that not all are refused because of a mutation.
        let messages = match case % 16 {
            0 => messages.clone(),
            _ => messages.iter().map(|message| mutated(message, &mut random)).collect(),
        };
        if under_way.len() >= AT_ONCE {
            under_way.join_next().await;
        }
        under_way.spawn(call(channel.clone(), path, messages));
    }
    under_way.join_all().await;

    has_its_data(&node).await;
    // A false report that could be true gives way within a minute. Replicas on the stores that were
    // registered above, which do not exist, are never filled.
    let store = node.store_id().expect("it has one");
    eventually("every region is on the map, led by the store that has it", PATIENCE, async || {
        let found = operator.placement().scan_regions(&esker_model::KeyRange::all(), 0).await;
        let found = found.map_err(|error| error.to_string())?;
        let mut reached = Some(Bytes::new());
        for info in &found {
            let led_here = info.leader.is_some_and(|leader| leader.store == store);
            if reached.as_ref() != Some(info.region.range.start()) || !led_here {
                return Err(format!("{reached:?}, then {info:?}"));
            }
            reached = info.region.range.end().cloned();
        }
        match reached {
            None if found.len() >= regions.len() => Ok(()),
            _ => Err(format!("{found:?}")),
        }
    })
    .await;
    assert_eq!(PANICS.load(Ordering::SeqCst), 0, "something panicked");
    node.stop().await;
    let node = Node::builder().data_dir(folder.path()).start().await.expect("the node again");
    has_its_data(&node).await;
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_malformed_entry_from_a_real_leader_stops_no_store_neither_now_nor_at_a_start() {
    let folder = tempfile::tempdir().expect("a folder");
    let options =
        || ClusterOptions { data_dir: Some(folder.path().to_owned()), ..ClusterOptions::default() };
    let cluster = Cluster::start(options()).await.expect("a cluster");
    let client = cluster.client().await.expect("a client");
    for n in 0..KEPT {
        client.put(kept(n), "kept").await.expect("a write");
    }
    let operator = Operator::connect(&[cluster.placement_address().to_owned()]).await;
    let cluster_id = operator.placement().cluster_id();
    operator.replicas_are_equal(3, PATIENCE).await;
    for region in operator.regions().await {
        let leader = region.leader.expect("a leader");
        for to in region.region.peers.iter().filter(|peer| peer.id != leader.id) {
            let replica = operator.replica(region.region.id.0, to.store.0, false).await;
            let replica = replica.expect("it answers");
            let (last, term) = (replica.last_index, replica.term);
            let nonsense = [
                Bytes::from_static(b"\x01\x02\x03 nonsense"),
                // An entry of a format that does not exist yet.
                Bytes::from_static(b"\x08\x63\x12\x04\x08\x01\x10\x01"),
            ];
            for command in nonsense {
                let body = entries(last, term, command);
                let message = consensus_message(
                    &Region::from(&region.region),
                    leader.into(),
                    to.into(),
                    term,
                    body,
                );
                let batch = RaftBatch {
                    cluster_id,
                    from_store: leader.store.0,
                    to_store: to.store.0,
                    messages: vec![message],
                };
                let address = operator.address(to.store.0).await.expect("an address");
                TransportClient::new(channel(&address))
                    .raft(tokio_stream::once(batch))
                    .await
                    .expect("the stream is taken");
            }
        }
    }
    client.put("works", "still").await.expect("a write");
    assert_eq!(operator.replicas_are_equal(3, PATIENCE).await as usize, KEPT + 1);
    cluster.stop().await;
    let cluster = Cluster::start(options()).await.expect("the cluster again");
    let client = cluster.client().await.expect("a client");
    for n in 0..KEPT {
        let found = client.get(kept(n)).await.expect("a read");
        assert_eq!(found.as_deref(), Some(&b"kept"[..]));
    }
    cluster.stop().await;
}
