use bytes::Bytes;
use esker_engine::Cf;
use esker_model::limits::MAX_EPOCH_LEAP;
use esker_model::{Epoch, Peer, may_follow};
use esker_raft::{Entry, GroupId, Message, Payload, PeerId, Stamp, Term};
use esker_rpc::proto::esker::raft_message;
use esker_rpc::proto::metapb;
use proptest::prelude::*;

use super::*;
use crate::command::{Body, Command, Mutation, Write};

const HERE: StoreId = StoreId(2);

fn peer(id: u64, store: u64) -> Peer {
    Peer::voter(PeerId(id), StoreId(store))
}

fn entry(index: u64, epoch: Epoch, mutations: Vec<Mutation>) -> Entry {
    let body = Body::Write(Write { mutations, ..Write::default() });
    let payload = Payload::Command(Command { epoch, body }.encode());
    Entry { term: Term(5), index: LogIndex(index), payload }
}

/// From the peer on store 1 to the one on store 2.
fn append(prev_index: u64, entries: Vec<Entry>) -> RaftMessage {
    let body = MessageBody::Append {
        prev_index: LogIndex(prev_index),
        prev_term: Term(5),
        entries: entries.into(),
        commit: LogIndex(prev_index),
        stamp: Stamp::default(),
    };
    let message =
        Message { group: GroupId(7), from: PeerId(11), to: PeerId(12), term: Term(5), body };
    let consensus = Consensus { message, applied: LogIndex(0), creates: None };
    let address = Address {
        region: RegionId(7),
        from: peer(11, 1),
        to: peer(12, 2),
        epoch: Epoch { conf_ver: 1, version: 3 },
    };
    address.with(Content::Consensus(Box::new(consensus)))
}

/// Entries of puts.
fn puts(keys: &[&'static [u8]]) -> RaftMessage {
    let entries = keys.iter().zip(6..).map(|(key, index)| {
        let (key, value) = (Bytes::from_static(key), Bytes::from_static(b"v"));
        let epoch = Epoch { conf_ver: 1, version: 3 };
        entry(index, epoch, vec![Mutation::Put { cf: Cf::Default, key, value }])
    });
    append(5, entries.collect())
}

/// The part of a message that is for the group.
fn inside(message: &mut RaftMessage) -> &mut esker_rpc::proto::esker::Consensus {
    match &mut message.content {
        Some(raft_message::Content::Consensus(consensus)) => consensus,
        _ => panic!("it is for the group"),
    }
}

/// A peer as the wire may have it.
fn raw(id: u64, store_id: u64) -> Option<metapb::Peer> {
    Some(metapb::Peer { id, store_id, ..Default::default() })
}

/// A range up to a key of this length; without an end where that is none.
fn bounds(length: usize) -> esker_rpc::proto::esker::KeyBounds {
    let end_key = vec![0; length].into();
    esker_rpc::proto::esker::KeyBounds { end_key, ..Default::default() }
}

fn region(start: &'static [u8], end: &'static [u8], version: u64) -> Region {
    let end = Some(Bytes::from_static(end)).filter(|end| !end.is_empty());
    Region {
        id: RegionId(7),
        range: KeyRange::new(Bytes::from_static(start), end).unwrap(),
        epoch: Epoch { conf_ver: 1, version },
        peers: vec![peer(11, 1), peer(12, 2)],
    }
}

#[test]
fn what_a_correct_store_sends_is_taken_and_names_its_keys() {
    let message = puts(&[b"m", b"c", b"p"]);
    let Checked::Raft(_, reach) = Arrived::check(HERE, message).unwrap().content else {
        panic!("it is for the group");
    };
    assert!(reach.lies_in(&region(b"c", b"q", 3)));
    assert!(!reach.lies_in(&region(b"d", b"q", 3)));
    assert!(!reach.lies_in(&region(b"", b"p", 3)));
    assert!(reach.lies_in(&region(b"", b"", 3)));
    // Made for what the region was before: not carried out, wherever it lies.
    assert!(reach.lies_in(&region(b"x", b"", 4)));
}

#[test]
fn an_envelope_that_lacks_or_contradicts_something_is_refused_with_the_reason() {
    type Change = fn(&mut RaftMessage);
    let cases: [(Change, &str); 15] = [
        (|m| m.from = None, "it has no sender"),
        (|m| m.to = None, "it has no receiver"),
        (|m| m.epoch = None, "the message has no epoch"),
        (|m| m.content = None, "it has no content that is known here"),
        (|m| m.region_id = 0, "its region cannot be 0"),
        (|m| m.region_id = 8, "the addresses on and in it contradict each other"),
        (|m| m.from = raw(0, 1), "its peer cannot be 0"),
        (|m| m.from = raw(13, 1), "the addresses on and in it contradict each other"),
        (|m| m.from = raw(12, 1), "its sender and its receiver contradict each other"),
        (|m| m.from = raw(11, 0), "its peer's store cannot be 0"),
        (|m| m.to = raw(12, 3), "it is for store 3; is an address used twice?"),
        (|m| m.to = raw(u64::MAX, 2), "its peer cannot be 18446744073709551615"),
        (|m| inside(m).creates = Some(bounds(0)), "its parts contradict each other"),
        (|m| inside(m).creates = Some(bounds(1 << 20)), "a bound of 1048576 bytes is in it"),
        (|m| inside(m).applied_index = u64::MAX, "its applied index cannot be 184467440737095516"),
    ];
    for (change, reason) in cases {
        let mut message = puts(&[b"k"]);
        change(&mut message);
        let said = Arrived::check(HERE, message).unwrap_err().to_string();
        assert!(said.starts_with(reason), "{said}, not {reason}");
    }
}

#[test]
fn a_region_is_followed_only_by_a_part_of_itself() {
    let known = region(b"d", b"p", 3);
    assert!(may_follow(&known, &region(b"d", b"p", 3)));
    assert!(may_follow(&known, &region(b"e", b"p", 4)));
    assert!(!may_follow(&known, &region(b"e", b"p", 3)), "smaller at the same version");
    assert!(!may_follow(&known, &region(b"d", b"p", 4)), "the same at a later version");
    assert!(!may_follow(&known, &region(b"c", b"p", 4)), "larger");
    assert!(!may_follow(&known, &region(b"e", b"", 4)), "without an end");
    assert!(!may_follow(&known, &region(b"d", b"p", 2)), "older");
    assert!(!may_follow(&known, &region(b"e", b"p", 4 + MAX_EPOCH_LEAP)), "far ahead");
}

proptest! {
    /// Whatever bytes come, they are read without a panic, and those that pass hold entries
    /// that the apply worker can read.
    #[test]
    fn any_bytes_are_refused_or_can_be_applied(
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in proptest::option::of(any::<prop::sample::Index>()),
    ) {
        let mut message = puts(&[b"a", b"b", b"c"]);
        let mut bytes = inside(&mut message).message.to_vec();
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()).max(1));
        }
        inside(&mut message).message = bytes.into();
        let _ = Arrived::check_snapshot(HERE, message.clone());
        let Ok(arrived) = Arrived::check(HERE, message) else { return Ok(()) };
        let Checked::Raft(consensus, _) = arrived.content else { return Ok(()) };
        if let MessageBody::Append { entries, .. } = consensus.message.body {
            for entry in &entries {
                if let Payload::Command(command) = &entry.payload {
                    prop_assert!(Command::decode(command.clone()).is_ok());
                }
            }
        }
    }
}

/// What the door costs beside the rest of what a follower does with an append. Figures for
/// docs/performance.md: `cargo test -p esker-raftstore the_door_costs -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement, which shows nothing on a busy machine"]
fn the_door_costs_a_follower_little() {
    use esker_engine::{EngineOptions, KvBatch, KvEngine, LogBatch, LogEngine, MemoryEnv};
    const ROUNDS: u32 = 2_000;
    // 16 entries of 8 puts of 128 bytes, as a loaded leader sends them.
    let puts = |entry: u64| {
        (0..8).map(move |n| Mutation::Put {
            cf: Cf::Default,
            key: format!("user-{:08}", entry * 7919 + n).into(),
            value: vec![b'v'; 128].into(),
        })
    };
    let entries: Vec<Entry> =
        (1..=16).map(|index| entry(index, Epoch::FIRST, puts(index).collect())).collect();
    let mut envelope = append(0, entries.clone());
    let encoded = inside(&mut envelope).message.clone();
    let time = |mut work: Box<dyn FnMut() + '_>| {
        let began = Instant::now();
        (0..ROUNDS).for_each(|_| work());
        began.elapsed() / ROUNDS
    };
    let options = EngineOptions::in_memory(MemoryEnv::new());
    let kv = KvEngine::open("/kv".as_ref(), &options).unwrap();
    let log = LogEngine::open("/log".as_ref(), &options).unwrap();
    let decoding = time(Box::new(|| drop(Message::decode(encoded.clone()).unwrap())));
    let checking = time(Box::new(|| drop(Arrived::check(HERE, envelope.clone()).unwrap())));
    let logging = time(Box::new(|| {
        let (mut batch, mut bytes) = (LogBatch::new(), Vec::new());
        for entry in &entries {
            crate::state::encode_entry(entry, &mut bytes);
            batch.append(7, entry.index.0, &bytes);
        }
        log.write(&batch).unwrap();
    }));
    let applying = time(Box::new(|| {
        let mut batch = KvBatch::new();
        for entry in &entries {
            let Payload::Command(command) = &entry.payload else { unreachable!("all are") };
            let Body::Write(write) = Command::decode(command.clone()).unwrap().body else {
                unreachable!("all are")
            };
            for mutation in write.mutations {
                let Mutation::Put { cf, key, value } = mutation else { unreachable!("all are") };
                batch.put(cf, &key, &value);
            }
        }
        kv.write(&batch).unwrap();
    }));
    let added = checking.saturating_sub(decoding);
    let rest = decoding + logging + applying;
    println!(
        "128 puts: {decoding:?} to decode, {added:?} more to check; {logging:?} to log and \
         {applying:?} to apply, without a disk: {:.1} % more work",
        added.as_secs_f64() / rest.as_secs_f64() * 100.0
    );
}
