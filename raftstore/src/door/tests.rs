use esker_raft::{Entry, GroupId, Payload, PeerId, Stamp, Term};
use esker_rpc::proto::esker::command::{Mutation, Put, RaftCommand, mutation};
use proptest::prelude::*;
use prost::Message as _;

use super::*;

const HERE: StoreId = StoreId(2);

fn peer(id: u64, store_id: u64) -> Peer {
    Peer { id, store_id, ..Peer::default() }
}

/// Entries of puts, from the peer on store 1 to the one on store 2.
fn append(keys: &[&'static [u8]]) -> RaftMessage {
    let entries = keys.iter().zip(6..).map(|(key, index)| {
        let put = Put { cf: 0, key: Bytes::from_static(key), value: Bytes::from_static(b"v") };
        let command = RaftCommand {
            format: crate::peer::COMMAND_FORMAT,
            epoch: Some(RegionEpoch { conf_ver: 1, version: 3 }),
            mutations: vec![Mutation { kind: Some(mutation::Kind::Put(put)) }],
            ..RaftCommand::default()
        };
        let payload = Payload::Command(command.encode_to_vec().into());
        Entry { term: Term(5), index: LogIndex(index), payload }
    });
    let body = MessageBody::Append {
        prev_index: LogIndex(5),
        prev_term: Term(5),
        entries: entries.collect::<Vec<_>>().into(),
        commit: LogIndex(5),
        stamp: Stamp::default(),
    };
    let mut message = Vec::new();
    Message { group: GroupId(7), from: PeerId(11), to: PeerId(12), term: Term(5), body }
        .encode(&mut message);
    RaftMessage {
        region_id: 7,
        from: Some(peer(11, 1)),
        to: Some(peer(12, 2)),
        epoch: Some(RegionEpoch { conf_ver: 1, version: 3 }),
        message: message.into(),
        ..RaftMessage::default()
    }
}

fn region(start: &'static [u8], end: &'static [u8], version: u64) -> Region {
    Region {
        id: 7,
        start_key: Bytes::from_static(start),
        end_key: Bytes::from_static(end),
        region_epoch: Some(RegionEpoch { conf_ver: 1, version }),
        peers: vec![peer(11, 1), peer(12, 2)],
    }
}

#[test]
fn what_an_honest_store_sends_is_taken_and_says_which_keys_it_reaches() {
    let Content::Raft(_, reach) =
        Arrived::check(HERE, append(&[b"m", b"c", b"p"])).unwrap().content
    else {
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
    let cases: [(Change, &str); 14] = [
        (|m| m.from = None, "it has no sender"),
        (|m| m.to = None, "it has no receiver"),
        (|m| m.epoch = None, "it has no epoch"),
        (|m| m.region_id = 0, "its region cannot be 0"),
        (|m| m.region_id = 8, "the addresses on and in it contradict each other"),
        (|m| m.from = Some(peer(0, 1)), "its sender's id cannot be 0"),
        (|m| m.from = Some(peer(13, 1)), "the addresses on and in it contradict each other"),
        (|m| m.from = Some(peer(11, 0)), "its sender and its receiver contradict each other"),
        (|m| m.to = Some(peer(12, 3)), "it is for store 3; is an address used twice?"),
        (|m| m.to = Some(peer(u64::MAX, 2)), "its receiver's id cannot be 18446744073709551615"),
        (|m| m.gone = true, "its parts contradict each other"),
        (|m| m.is_initial = true, "its parts contradict each other"),
        (|m| m.end_key = Bytes::from(vec![0; 1 << 20]), "a key or value of 1048576 bytes is in it"),
        (|m| m.applied_index = u64::MAX, "its applied index cannot be 18446744073709551615"),
    ];
    for (change, reason) in cases {
        let mut message = append(&[b"k"]);
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
    let empty = Region { id: 7, ..Region::default() };
    assert!(may_follow(&empty, &known), "what is empty is filled");
}

proptest! {
    /// Whatever bytes come, they are read without a panic, and those that pass hold entries
    /// that the apply worker can read.
    #[test]
    fn any_bytes_are_refused_or_can_be_applied(
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in proptest::option::of(any::<prop::sample::Index>()),
    ) {
        let mut envelope = append(&[b"a", b"b", b"c"]);
        let mut bytes = envelope.message.to_vec();
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()).max(1));
        }
        envelope.message = bytes.into();
        let _ = Arrived::check_snapshot(HERE, envelope.clone());
        let Ok(arrived) = Arrived::check(HERE, envelope) else { return Ok(()) };
        let Content::Raft(message, _) = arrived.content else { return Ok(()) };
        if let MessageBody::Append { entries, .. } = message.body {
            for entry in &entries {
                if let Payload::Command(command) = &entry.payload {
                    let command = RaftCommand::decode(command.clone());
                    let is_whole = command.is_ok_and(|command| {
                        command.format == crate::peer::COMMAND_FORMAT
                            && command.mutations.iter().all(|mutation| mutation.kind.is_some())
                    });
                    prop_assert!(is_whole);
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
    use esker_engine::{Cf, EngineOptions, KvBatch, KvEngine, LogBatch, LogEngine, MemoryEnv};
    const ROUNDS: u32 = 2_000;
    // 16 entries of 8 puts of 128 bytes, as a loaded leader sends them.
    let puts = |entry: u64| {
        (0..8).map(move |n| Mutation {
            kind: Some(mutation::Kind::Put(Put {
                cf: 0,
                key: format!("user-{:08}", entry * 7919 + n).into(),
                value: vec![b'v'; 128].into(),
            })),
        })
    };
    let entries: Vec<Entry> = (1..=16)
        .map(|index| {
            let command = RaftCommand {
                format: crate::peer::COMMAND_FORMAT,
                epoch: Some(RegionEpoch { conf_ver: 1, version: 1 }),
                mutations: puts(index).collect(),
                ..RaftCommand::default()
            };
            let payload = Payload::Command(command.encode_to_vec().into());
            Entry { term: Term(5), index: LogIndex(index), payload }
        })
        .collect();
    let mut envelope = append(&[]);
    let mut message = Message::decode(envelope.message.clone()).unwrap();
    message.body = MessageBody::Append {
        prev_index: LogIndex(0),
        prev_term: Term(5),
        entries: entries.clone().into(),
        commit: LogIndex(0),
        stamp: Stamp::default(),
    };
    let mut encoded = Vec::new();
    message.encode(&mut encoded);
    envelope.message = encoded.into();
    let time = |mut work: Box<dyn FnMut() + '_>| {
        let began = Instant::now();
        (0..ROUNDS).for_each(|_| work());
        began.elapsed() / ROUNDS
    };
    let options = EngineOptions::in_memory(MemoryEnv::new());
    let kv = KvEngine::open("/kv".as_ref(), &options).unwrap();
    let log = LogEngine::open("/log".as_ref(), &options).unwrap();
    let decoding = time(Box::new(|| drop(Message::decode(envelope.message.clone()).unwrap())));
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
            for mutation in RaftCommand::decode(command.clone()).unwrap().mutations {
                let Some(mutation::Kind::Put(put)) = mutation.kind else { unreachable!("all are") };
                batch.put(Cf::Default, &put.key, &put.value);
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
