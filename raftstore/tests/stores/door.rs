//! What no honest store sends: it changes nothing, and above all nothing that a
//! start would have to read.

use std::collections::BTreeSet;
use std::time::Duration;

use bytes::Bytes;
use esker_model::{Epoch, KeyRange, Peer, PeerId, Region, RegionId, StoreId, Term};
use esker_raft::{
    AppendOutcome, ChangeStep, CommitPoint, ConfChange, Entry, GroupId, LeaveJoint, LogIndex,
    Message, MessageBody, Payload, Stamp,
};
use esker_raftstore::config::MAX_EMPTY_PEERS;
use esker_raftstore::envelope::{Address, Consensus, Content};
use esker_raftstore::{SnapshotReceiver, configuration};
use esker_rpc::proto::esker::command::{
    AdminCommand, ChangePeer, ChangePeers, CompactLog, CompareAndSwap, Delete, DeleteRange,
    Mutation, NewRegion, Put, RaftCommand, RegionSnapshot, Split, TaggedCommand, admin_command,
    mutation,
};
use esker_rpc::proto::esker::{KeyBounds, RaftMessage, raft_message};
use esker_rpc::proto::{esker as wire, metapb};
use prost::Message as _;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::cluster::{Cluster, bytes, peer};

/// Three replicas, led by store 1, with some data and nothing under way.
fn quiet() -> Cluster {
    let mut cluster = Cluster::replicated();
    cluster.transfer(1, 1);
    for n in 0..20 {
        cluster.put(&format!("key-{n:02}"), "kept");
    }
    cluster.await_agreement(&[1, 2, 3]);
    cluster
}

/// All stores run, have what they had, and have it after a start, too.
#[track_caller]
fn is_unharmed(cluster: &mut Cluster) {
    cluster.put("after", "works");
    cluster.await_agreement(&[1, 2, 3]);
    for id in [1, 2, 3] {
        cluster.crash(id);
    }
    for id in [1, 2, 3] {
        cluster.start(StoreId(id));
    }
    cluster.put("after a start", "works");
    for n in 0..20 {
        assert_eq!(cluster.get(&format!("key-{n:02}")).as_deref(), Some("kept"));
    }
    cluster.await_agreement(&[1, 2, 3]);
}

/// A message of store `from`'s peer to store `to`'s.
fn envelope(
    cluster: &mut Cluster,
    from: u64,
    to: u64,
    term: u64,
    body: MessageBody,
) -> RaftMessage {
    let region = cluster.region_on(1, 1).unwrap();
    let (from, to) =
        (*region.peer_on(StoreId(from)).unwrap(), *region.peer_on(StoreId(to)).unwrap());
    said(&region, from, to, term, body)
}

fn said(region: &Region, from: Peer, to: Peer, term: u64, body: MessageBody) -> RaftMessage {
    let group = GroupId(region.id.0);
    let message = Message { group, from: from.id, to: to.id, term: Term(term), body };
    let consensus = Consensus { message, applied: LogIndex(0), creates: None };
    address(region, from, to).with(Content::Consensus(Box::new(consensus)))
}

fn address(region: &Region, from: Peer, to: Peer) -> Address {
    Address { region: region.id, from, to, epoch: region.epoch }
}

/// The part of a message that is for the group.
fn inside(message: &mut RaftMessage) -> Option<&mut wire::Consensus> {
    match &mut message.content {
        Some(raft_message::Content::Consensus(consensus)) => Some(consensus),
        _ => None,
    }
}

/// The message, from a sender whose region has the range `[start, end)`: it may create its
/// receiver.
fn creating(mut message: RaftMessage, start: Bytes, end: Bytes) -> RaftMessage {
    let bounds = KeyBounds { start_key: start, end_key: end };
    inside(&mut message).expect("it is for the group").creates = Some(bounds);
    message
}

fn term(cluster: &mut Cluster) -> u64 {
    cluster.status(1, 1).unwrap().term.0
}

/// The leader's next entry for store 2, with this payload.
fn next_entry(cluster: &mut Cluster, payload: Payload) -> RaftMessage {
    let last = cluster.status(2, 1).unwrap().last;
    let term = term(cluster);
    let body = MessageBody::Append {
        prev_index: last,
        prev_term: Term(term),
        entries: vec![Entry { term: Term(term), index: last.next(), payload }].into(),
        commit: last.next(),
        stamp: Stamp::default(),
    };
    envelope(cluster, 1, 2, term, body)
}

fn command(command: &RaftCommand) -> Payload {
    Payload::Command(command.encode_to_vec().into())
}

fn plain(epoch: Epoch) -> RaftCommand {
    RaftCommand { format: 1, epoch: Some(epoch.into()), ..RaftCommand::default() }
}

fn put(cf: u32, key: Bytes) -> Mutation {
    Mutation { kind: Some(mutation::Kind::Put(Put { cf, key, value: bytes("v") })) }
}

/// Everything that cannot be applied, each in its own words.
fn malformed_payloads(region: &Region) -> Vec<(&'static str, Payload)> {
    let epoch = region.epoch;
    let with = |mutations| command(&RaftCommand { mutations, ..plain(epoch) });
    let admin = |kind| {
        let admin = Some(AdminCommand { kind: Some(kind) });
        command(&RaftCommand { admin, ..plain(epoch) })
    };
    let split = |keys: &[&str], regions: &[(u64, &[u64])]| {
        admin(admin_command::Kind::Split(Split {
            keys: keys.iter().map(|key| bytes(key)).collect(),
            regions: regions
                .iter()
                .map(|(id, peers)| NewRegion { id: *id, peer_ids: peers.to_vec() })
                .collect(),
            right_derive: true,
        }))
    };
    let change = |steps: Vec<ChangeStep>, leave, context: &RaftCommand| {
        let context = context.encode_to_vec().into();
        Payload::Change(Box::new(ConfChange { steps, leave, context }))
    };
    let changes = |changes| RaftCommand {
        admin: Some(AdminCommand {
            kind: Some(admin_command::Kind::Change(ChangePeers { changes, leave: false })),
        }),
        ..plain(epoch)
    };
    let add = ChangePeer { kind: 2, peer: Some(peer(900, 9).into()) };
    let step = || vec![ChangeStep::AddLearner(PeerId(900))];
    let cas = || Mutation {
        kind: Some(mutation::Kind::Cas(CompareAndSwap { key: bytes("k"), ..Default::default() })),
    };
    let long = Bytes::from(vec![b'k'; 64 << 10]);
    vec![
        ("bytes that are no command", Payload::Command(bytes("\u{1}\u{2}\u{3} nonsense"))),
        ("no bytes at all", Payload::Command(Bytes::new())),
        ("a command cut short", {
            let whole = RaftCommand { mutations: vec![put(0, bytes("k"))], ..plain(epoch) };
            let whole = Bytes::from(whole.encode_to_vec());
            Payload::Command(whole.slice(..whole.len() - 1))
        }),
        ("a later format", command(&RaftCommand { format: 99, ..plain(epoch) })),
        ("a tag in an untagged entry", {
            let tagged = vec![TaggedCommand { first: 0, count: 1, ..Default::default() }];
            let mutations = vec![put(0, bytes("k"))];
            command(&RaftCommand { tagged, mutations, ..plain(epoch) })
        }),
        ("a tag of what is not there", {
            let tagged = vec![TaggedCommand { first: 7, count: 1, ..Default::default() }];
            let mutations = vec![put(0, bytes("k"))];
            command(&RaftCommand { format: 2, tagged, mutations, ..plain(epoch) })
        }),
        ("no epoch", command(&RaftCommand { epoch: None, ..plain(epoch) })),
        ("a change of no kind", with(vec![Mutation { kind: None }])),
        ("the store's own column family", with(vec![put(3, bytes("k"))])),
        ("a column family that there is not", with(vec![put(77, bytes("k"))])),
        ("no key", with(vec![put(0, Bytes::new())])),
        ("a key that no engine takes", with(vec![put(0, long.clone())])),
        ("a delete of a key that no engine takes", {
            let kind = mutation::Kind::Delete(Delete { cf: 0, key: long.clone() });
            with(vec![Mutation { kind: Some(kind) }])
        }),
        ("a range that no engine takes", {
            let range = DeleteRange { cf: 0, start: long.clone(), end: Bytes::new() };
            with(vec![Mutation { kind: Some(mutation::Kind::DeleteRange(range)) }])
        }),
        ("a compare-and-swap in company", with(vec![put(0, bytes("k")), cas()])),
        ("data and a command", {
            let kind = admin_command::Kind::Compact(CompactLog { index: 1, term: 1 });
            let admin = Some(AdminCommand { kind: Some(kind) });
            command(&RaftCommand { admin, mutations: vec![put(0, bytes("k"))], ..plain(epoch) })
        }),
        ("a command of no kind", {
            let admin = Some(AdminCommand { kind: None });
            command(&RaftCommand { admin, ..plain(epoch) })
        }),
        (
            "a change of members where none may be",
            admin(admin_command::Kind::Change(ChangePeers { changes: vec![add], leave: false })),
        ),
        (
            "a log that ends in the future",
            admin(admin_command::Kind::Compact(CompactLog { index: u64::MAX, term: 1 })),
        ),
        ("a split without keys", split(&[], &[])),
        ("a split in no order", split(&["m", "a"], &[(900, &[1, 2, 3]), (901, &[4, 5, 6])])),
        ("a split with too few ids", split(&["a", "m"], &[(900, &[1, 2, 3])])),
        ("a split into region zero", split(&["m"], &[(0, &[901, 902, 903])])),
        ("a split with an id twice", split(&["m"], &[(900, &[901, 901, 903])])),
        ("a change without its reason", change(step(), LeaveJoint::Auto, &plain(epoch))),
        (
            "a change with another's reason",
            change(vec![ChangeStep::Remove(PeerId(2))], LeaveJoint::Auto, &changes(vec![add])),
        ),
        ("a change that cannot be read", {
            let context = bytes("\u{7}nonsense");
            Payload::Change(Box::new(ConfChange { steps: step(), context, ..Default::default() }))
        }),
        (
            "a change of an unknown kind",
            change(step(), LeaveJoint::Auto, &changes(vec![ChangePeer { kind: 9, ..add }])),
        ),
        (
            "a way out that no store takes",
            change(step(), LeaveJoint::Explicit, &changes(vec![add])),
        ),
        (
            "a peer without an id",
            change(
                vec![ChangeStep::AddLearner(PeerId(0))],
                LeaveJoint::Auto,
                &changes(vec![ChangePeer { kind: 2, peer: Some(peer(0, 9).into()) }]),
            ),
        ),
    ]
}

#[test]
fn an_entry_that_cannot_be_applied_reaches_no_log() {
    let mut cluster = quiet();
    let region = cluster.region_on(1, 1).unwrap();
    for (what, payload) in malformed_payloads(&region) {
        let before = cluster.status(2, 1).unwrap().last;
        let message = next_entry(&mut cluster, payload);
        cluster.store(2).handle.raft_message(message);
        cluster.settle();
        let after = cluster.status(2, 1).unwrap().last;
        assert_eq!(before, after, "{what} was taken into the log");
    }
    // An entry that can be applied is taken, so that the above says something.
    let before = cluster.status(2, 1).unwrap().last;
    let right = RaftCommand { mutations: vec![put(0, bytes("k"))], ..plain(region.epoch) };
    let message = next_entry(&mut cluster, command(&right));
    cluster.store(2).handle.raft_message(message);
    cluster.settle();
    assert_eq!(cluster.status(2, 1).unwrap().last, before.next());
}

#[test]
fn a_store_that_was_sent_entries_that_cannot_be_applied_starts_again() {
    let mut cluster = quiet();
    let region = cluster.region_on(1, 1).unwrap();
    for (_, payload) in malformed_payloads(&region) {
        let message = next_entry(&mut cluster, payload);
        cluster.store(2).handle.raft_message(message);
        cluster.settle();
    }
    is_unharmed(&mut cluster);
}

#[test]
fn entries_for_keys_of_other_regions_are_not_taken() {
    let mut cluster = quiet();
    // Region 1 keeps the right part.
    cluster.split(1, &["key-10"]);
    cluster.transfer(1, 1);
    cluster.await_agreement(&[1, 2, 3]);
    let region = cluster.region_on(1, 1).unwrap();
    let whole = DeleteRange { cf: 0, start: Bytes::new(), end: Bytes::new() };
    let kinds =
        [put(0, bytes("key-05")), Mutation { kind: Some(mutation::Kind::DeleteRange(whole)) }];
    for mutation in kinds {
        let before = cluster.status(2, 1).unwrap().last;
        let wrong = RaftCommand { mutations: vec![mutation], ..plain(region.epoch) };
        let message = next_entry(&mut cluster, command(&wrong));
        cluster.store(2).handle.raft_message(message);
        cluster.settle();
        assert_eq!(cluster.status(2, 1).unwrap().last, before, "it was taken");
    }
    is_unharmed(&mut cluster);
}

#[test]
fn a_term_of_two_to_the_63_ends_no_region() {
    let mut cluster = quiet();
    let before = term(&mut cluster);
    let commit = CommitPoint::default();
    for absurd in [1 << 40, 1 << 62, (1 << 63) - 1, 1 << 63, u64::MAX] {
        for body in [
            MessageBody::Heartbeat { commit: LogIndex(0), stamp: Stamp::default() },
            MessageBody::Vote {
                last_index: LogIndex(1 << 20),
                last_term: Term(before),
                transfer: true,
                commit,
            },
            MessageBody::HeartbeatReply { stamp: Stamp::default() },
            MessageBody::VoteReply { granted: false, commit },
            MessageBody::TimeoutNow,
        ] {
            for (from, to) in [(1, 2), (2, 1), (3, 2)] {
                let message = envelope(&mut cluster, from, to, absurd, body.clone());
                cluster.store(to).handle.raft_message(message);
            }
        }
    }
    cluster.run(Duration::from_secs(5));
    assert_eq!(term(&mut cluster), before, "somebody believed it");
    is_unharmed(&mut cluster);
}

#[test]
fn a_store_that_nobody_knows_is_not_heard() {
    let mut cluster = quiet();
    let stranger = peer(999, 66);
    for machine in cluster.machines.values() {
        machine.sent.strangers.lock().insert(StoreId(66));
    }
    let region = cluster.region_on(1, 1).unwrap();
    let to = *region.peer_on(StoreId(2)).unwrap();
    let term = term(&mut cluster);
    // As a member that store 2 has not heard of, and for a region that it has not.
    let newer = Region { epoch: Epoch { conf_ver: 1_000, ..region.epoch }, ..region.clone() };
    let beat = || MessageBody::Heartbeat { commit: LogIndex(0), stamp: Stamp::default() };
    cluster.store(2).handle.raft_message(said(&newer, stranger, to, term + 5, beat()));
    let other = Region { id: RegionId(5_000), ..newer.clone() };
    let first = said(&other, stranger, peer(5_001, 2), 9, beat());
    let first = creating(first, bytes("zz"), Bytes::new());
    cluster.store(2).handle.raft_message(first);
    let gone = address(&newer, stranger, to).with(Content::Gone);
    cluster.store(2).handle.raft_message(gone);
    cluster.run(Duration::from_millis(100));
    assert_eq!(cluster.status(2, 1).unwrap().term.0, term);
    assert!(cluster.status(2, 5_000).is_none());
    // Nor is it where it says to be a member, whose store is known.
    let member = *region.peer_on(StoreId(3)).unwrap();
    let elsewhere = Peer { store: StoreId(66), ..member };
    cluster.store(2).handle.raft_message(said(&region, elsewhere, to, term + 5, beat()));
    cluster.run(Duration::from_millis(100));
    assert_eq!(cluster.status(2, 1).unwrap().term.0, term);
    // A store that is known may be a member that was not heard of.
    let newcomer = peer(999, 4);
    cluster.store(2).handle.raft_message(said(&newer, newcomer, to, term + 5, beat()));
    cluster.settle();
    assert_eq!(cluster.status(2, 1).unwrap().term.0, term + 5);
    is_unharmed(&mut cluster);
}

#[test]
fn who_is_no_member_of_the_region_has_no_say_in_it() {
    let mut cluster = quiet();
    let region = cluster.region_on(1, 1).unwrap();
    let term = term(&mut cluster);
    let outsider = peer(999, 4);
    for to in [1, 2] {
        let to_peer = *region.peer_on(StoreId(to)).unwrap();
        for body in [
            MessageBody::Heartbeat { commit: LogIndex(0), stamp: Stamp::default() },
            MessageBody::HeartbeatReply { stamp: Stamp::default() },
            MessageBody::TimeoutNow,
        ] {
            let message = said(&region, outsider, to_peer, term + 3, body);
            cluster.store(to).handle.raft_message(message);
        }
    }
    cluster.run(Duration::from_millis(100));
    assert_eq!(cluster.status(1, 1).unwrap().term.0, term);
    assert_eq!(cluster.status(2, 1).unwrap().term.0, term);
    is_unharmed(&mut cluster);
}

#[test]
fn a_removal_that_cannot_have_been_removes_no_peer() {
    let mut cluster = quiet();
    let region = cluster.region_on(1, 1).unwrap();
    let term = term(&mut cluster);
    let from = *region.peer_on(StoreId(3)).unwrap();
    let beat = || MessageBody::Heartbeat { commit: LogIndex(0), stamp: Stamp::default() };
    let at = |conf_ver| Region { epoch: Epoch { conf_ver, ..region.epoch }, ..region.clone() };
    let told = |to: u64, conf_ver: u64| {
        let to = *region.peer_on(StoreId(to)).unwrap();
        let gone = address(&at(conf_ver), from, to).with(Content::Gone);
        let later = Peer { id: PeerId(1 << 40), ..to };
        let later = said(&at(conf_ver), from, later, term, beat());
        [gone, later]
    };
    let now = region.epoch.conf_ver;
    // A membership that is none, one that is not later, and, to the leader, any.
    for (to, conf_ver) in [(2, u64::MAX), (2, 1 << 40), (2, now), (2, now - 1), (1, now + 1)] {
        for message in told(to, conf_ver) {
            cluster.store(to).handle.raft_message(message);
        }
        cluster.settle();
        assert!(cluster.status(to, 1).is_some(), "store {to} gave up its peer at {conf_ver}");
    }
    is_unharmed(&mut cluster);
}

#[test]
fn messages_before_a_split_that_never_comes_harm_nothing() {
    let mut cluster = quiet();
    let region = cluster.region_on(1, 1).unwrap();
    cluster.split(1, &["m"]);
    cluster.await_agreement(&[1, 2, 3]);
    let first = cluster.region_of(b"key-00").id;
    for id in 10_000..30_000 {
        let made_up = Region { id: RegionId(id), ..region.clone() };
        let beat = MessageBody::Heartbeat { commit: LogIndex(0), stamp: Stamp::default() };
        let message = said(&made_up, peer(id + 1, 3), peer(id + 2, 2), 9, beat);
        // Its range is taken here: kept for a split that may come.
        let message = creating(message, bytes("a"), bytes("b"));
        cluster.store(2).handle.raft_message(message);
        cluster.settle();
    }
    assert!(cluster.status(2, first.0).is_some());
    is_unharmed(&mut cluster);
}

#[test]
fn regions_that_nobody_fills_take_no_more_than_their_room() {
    let mut cluster = Cluster::new(2);
    cluster.await_leader(1);
    let room = cluster.config.workers * MAX_EMPTY_PEERS;
    let ids: Vec<u64> = (10_000..).take(room + room / 2).collect();
    cluster.carried = Some(Vec::new());
    for ids in ids.chunks(64) {
        for id in ids.iter().copied() {
            let region = Region { id: RegionId(id), ..cluster.region_on(1, 1).unwrap() };
            let beat = MessageBody::Heartbeat { commit: LogIndex(0), stamp: Stamp::default() };
            let message = said(&region, peer(id + 1, 1), peer(id + 2, 2), 9, beat);
            let message = creating(message, Bytes::new(), Bytes::new());
            cluster.store(2).handle.raft_message(message);
        }
        cluster.settle();
    }
    // A peer that was made answers the one that it takes for its leader.
    let carried = cluster.carried.take().unwrap_or_default();
    let answers = carried.iter().map(|answer| answer.address);
    let made: BTreeSet<u64> = answers
        .filter(|address| address.to.store == StoreId(1) && ids.contains(&address.region.0))
        .map(|address| address.region.0)
        .collect();
    assert_eq!(made.len(), room);
}

/// The head of a snapshot of region 1 for the peer on store 3, and the region in it.
fn snapshot_head(cluster: &mut Cluster, change: impl Fn(&mut metapb::Region)) -> RaftMessage {
    let region = cluster.region_on(1, 1).unwrap();
    let meta = esker_raft::SnapshotMeta {
        index: cluster.status(3, 1).unwrap().last.next(),
        term: Term(term(cluster)),
        configuration: configuration(&region),
    };
    let (from, to) = (*region.peer_on(StoreId(1)).unwrap(), *region.peer_on(StoreId(3)).unwrap());
    let mut changed = metapb::Region::from(&region);
    change(&mut changed);
    let (start, end) = (changed.start_key.clone(), changed.end_key.clone());
    let (id, epoch) = (changed.id, changed.region_epoch);
    let data = RegionSnapshot { format: 1, region: Some(changed), ..Default::default() };
    let data = Bytes::from(data.encode_to_vec());
    let body = MessageBody::InstallSnapshot { meta: Box::new(meta), data };
    let region = Region { id: RegionId(id), ..region };
    let head = said(&region, from, to, term(cluster), body);
    RaftMessage { epoch, ..creating(head, start, end) }
}

#[test]
fn a_snapshot_of_what_cannot_be_the_region_is_not_installed() {
    let mut cluster = quiet();
    cluster.split(1, &["key-10"]);
    cluster.await_leader(1);
    cluster.transfer(1, 1);
    cluster.await_agreement(&[1, 2, 3]);
    type Change = fn(&mut metapb::Region);
    let changes: [(&str, Change); 9] = [
        ("another region", |region| region.id = 77),
        ("a range turned around", |region| {
            region.start_key = Bytes::from_static(b"x");
            region.end_key = Bytes::from_static(b"k");
        }),
        ("more than the region ever had", |region| {
            region.start_key = Bytes::new();
            region.region_epoch.as_mut().unwrap().version += 1;
        }),
        ("another range at the same version", |region| {
            region.start_key = Bytes::from_static(b"key-15");
        }),
        ("a version from the far future", |region| {
            region.start_key = Bytes::from_static(b"key-15");
            region.region_epoch.as_mut().unwrap().version = 1 << 40;
        }),
        ("no peer for this store", |region| region.peers.retain(|peer| peer.store_id != 3)),
        ("two peers on one store", |region| region.peers[0].store_id = 3),
        ("no epoch", |region| region.region_epoch = None),
        ("a role that there is not", |region| region.peers[1].role = 9),
    ];
    for (what, change) in changes {
        let head = snapshot_head(&mut cluster, change);
        let handle = cluster.store(3).handle.clone();
        let stem = "false".to_owned();
        let receiver = SnapshotReceiver::new(handle.engine().clone(), "/snap".as_ref(), stem);
        let files = receiver.finish().unwrap();
        let _ = handle.snapshot_received(head, files);
        cluster.run(Duration::from_millis(100));
        let held = cluster.region_on(3, 1).unwrap();
        assert_eq!(held, cluster.region_on(1, 1).unwrap(), "{what} was installed");
    }
    is_unharmed(&mut cluster);
}

#[test]
fn pairs_that_a_snapshot_cannot_hold_are_refused_before_they_are_kept() {
    use esker_engine::Cf;
    let mut cluster = quiet();
    let engine = cluster.store(3).handle.engine().clone();
    let block = |pairs: &[(&[u8], &[u8])]| {
        let mut block = Vec::new();
        for part in pairs.iter().flat_map(|(key, value)| [key, value]) {
            block.extend((part.len() as u32).to_be_bytes());
            block.extend_from_slice(part);
        }
        Bytes::from(block)
    };
    let long = vec![b'k'; 64 << 10];
    let wrong: [&[(Cf, Bytes)]; 8] = [
        &[(Cf::Default, block(&[(b"a", b"1")]))],
        &[(Cf::Default, block(&[(b"z", b"1")]))],
        &[(Cf::Default, block(&[(b"m", b"1"), (b"l", b"1")]))],
        &[(Cf::Default, block(&[(b"m", b"1")])), (Cf::Default, block(&[(b"m", b"1")]))],
        &[(Cf::Write, block(&[(b"m", b"1")])), (Cf::Default, block(&[(b"m", b"1")]))],
        &[(Cf::Meta, block(&[(b"m", b"1")]))],
        &[(Cf::Default, block(&[(&long, b"1")]))],
        &[(Cf::Default, Bytes::from_static(b"\xff\xff\xff\xffm"))],
    ];
    let within = KeyRange::new(bytes("k"), Some(bytes("z"))).unwrap();
    for (n, blocks) in wrong.into_iter().enumerate() {
        let mut receiver =
            SnapshotReceiver::new(engine.clone(), "/snap".as_ref(), format!("wrong-{n}"))
                .within(within.clone());
        let taken: Result<Vec<()>, _> =
            blocks.iter().map(|(cf, pairs)| receiver.block(*cf, pairs.clone())).collect();
        assert!(taken.is_err(), "case {n} was taken");
    }
    let mut receiver =
        SnapshotReceiver::new(engine, "/snap".as_ref(), "right".into()).within(within.clone());
    receiver.block(Cf::Default, block(&[(b"k", b"1"), (b"l", b"")])).unwrap();
    receiver.block(Cf::Default, block(&[(b"m", b"1")])).unwrap();
    receiver.block(Cf::Write, block(&[(b"k", b"1")])).unwrap();
    assert_eq!(receiver.finish().unwrap().pairs(), 4);
    is_unharmed(&mut cluster);
}

/// Numbers that no honest store has counted to.
const ABSURD: [u64; 5] = [1 << 50, 1 << 62, (1 << 63) - 1, 1 << 63, u64::MAX];

/// Makes of a message one that no honest store sends; nothing where that is not certain.
fn mutated(message: &RaftMessage, random: &mut ChaCha8Rng) -> Option<RaftMessage> {
    let mut message = message.clone();
    let absurd = ABSURD[(random.random::<u64>() % 5) as usize];
    match random.random::<u64>() % 16 {
        0 => message.region_id = absurd,
        1 => message.from = None,
        2 => message.to = None,
        3 => message.from.as_mut()?.id = if absurd > 1 << 62 { absurd } else { 0 },
        4 => message.to.as_mut()?.id = if absurd > 1 << 62 { absurd } else { 0 },
        5 => message.from.as_mut()?.store_id = absurd,
        6 => message.to.as_mut()?.store_id = absurd,
        7 => message.epoch = None,
        8 => message.epoch.as_mut()?.conf_ver = absurd,
        9 => message.epoch.as_mut()?.version = absurd,
        10 => {
            inside(&mut message)?.creates = Some(KeyBounds {
                start_key: Bytes::from(vec![b'k'; 32 << 10]),
                end_key: Bytes::new(),
            })
        }
        11 => message.content = None,
        12 => {
            // A byte that says what it is, the group, the sender or the receiver.
            let inside = inside(&mut message)?;
            let mut bytes = inside.message.to_vec();
            *bytes.first_mut()? = bytes[0].wrapping_add(1 + (random.random::<u64>() % 250) as u8);
            inside.message = bytes.into();
        }
        13 => {
            let inside = inside(&mut message)?;
            let end = random.random::<u64>() as usize % inside.message.len().max(1);
            inside.message = inside.message.slice(..end);
        }
        14 => {
            let inside = inside(&mut message)?;
            let mut bytes = inside.message.to_vec();
            bytes.extend(std::iter::repeat_n(7, 1 + (random.random::<u64>() % 9) as usize));
            // At the end of an append lies a command, which may be longer by nothing.
            inside.message = bytes.into();
        }
        _ => {
            let inside = inside(&mut message)?;
            let mut inner = Message::decode(inside.message.clone()).ok()?;
            let index = LogIndex(absurd);
            match &mut inner.body {
                _ if random.random::<u64>().is_multiple_of(2) => inner.term = Term(absurd),
                MessageBody::Append { prev_index, .. } => *prev_index = index,
                MessageBody::Heartbeat { commit, .. } => *commit = index,
                MessageBody::AppendReply { outcome, .. } => {
                    *outcome = AppendOutcome::Accepted { match_index: index };
                }
                MessageBody::Vote { last_index, .. } | MessageBody::PreVote { last_index, .. } => {
                    *last_index = index;
                }
                MessageBody::ReadIndexReply { index: at, .. } => *at = index,
                MessageBody::Commit { commit } => commit.index = index,
                _ => inner.term = Term(absurd),
            }
            let mut bytes = Vec::new();
            inner.encode(&mut bytes);
            inside.message = bytes.into();
        }
    }
    Some(message)
}

/// `ESKER_DOOR_SEEDS=n` tries more of them.
#[test]
fn whatever_becomes_of_messages_on_their_way_the_stores_live_and_have_their_data() {
    let seeds = std::env::var("ESKER_DOOR_SEEDS").ok().and_then(|n| n.parse().ok()).unwrap_or(3);
    for seed in 0..seeds {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let mut cluster = quiet();
        cluster.carried = Some(Vec::new());
        let mut sent = 0;
        for round in 0..40 {
            cluster.put(&format!("round-{round:02}"), "kept");
            match round {
                10 => drop(cluster.split(1, &["key-10"])),
                20 => cluster.transfer(1, 2),
                30 => cluster.transfer(1, 1),
                _ => {}
            }
            cluster.run(Duration::from_millis(100));
            let carried = cluster.carried.replace(Vec::new()).unwrap_or_default();
            for message in carried {
                let to = message.address.to.store.0;
                let message = message.into_wire();
                for _ in 0..4 {
                    if let Some(wrong) = mutated(&message, &mut random) {
                        cluster.store(to).handle.raft_message(wrong);
                        sent += 1;
                    }
                }
            }
            // The malformed ones that would be the next to be appended, too.
            let region = cluster.region_on(1, 1).unwrap();
            let all = malformed_payloads(&region);
            let (_, payload) = all[random.random::<u64>() as usize % all.len()].clone();
            let message = next_entry(&mut cluster, payload);
            cluster.store(2).handle.raft_message(message);
            cluster.settle();
        }
        assert!(sent > 1_000, "seed {seed}: too little was tried");
        is_unharmed(&mut cluster);
        for round in 0..40 {
            let key = format!("round-{round:02}");
            assert_eq!(cluster.get(&key).as_deref(), Some("kept"), "seed {seed}");
        }
        let region = RegionId(1);
        assert!(cluster.store(1).handle.delegates().get(region).is_some());
    }
}
