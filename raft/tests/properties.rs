//! Properties of pure functions: stored and sent forms, quorums and changes of members.

use std::collections::BTreeSet;

use bytes::Bytes;
use esker_raft::quorum::{Tally, reached, tally};
use esker_raft::{
    AppendOutcome, ChangeStep, CommitPoint, ConfChange, Configuration, Entry, GroupId, HardState,
    LeaveJoint, LogIndex, Message, MessageBody, Payload, PeerId, PeerSet, SnapshotMeta, Stamp,
    Term, Time,
};
use proptest::collection::{btree_set, vec};
use proptest::prelude::*;

fn peer() -> impl Strategy<Value = PeerId> {
    prop_oneof![1..10u64, any::<u64>()].prop_map(PeerId)
}

fn index() -> impl Strategy<Value = LogIndex> {
    prop_oneof![0..1000u64, any::<u64>()].prop_map(LogIndex)
}

fn term() -> impl Strategy<Value = Term> {
    prop_oneof![0..100u64, any::<u64>()].prop_map(Term)
}

fn bytes() -> impl Strategy<Value = Bytes> {
    vec(any::<u8>(), 0..50).prop_map(Bytes::from)
}

fn step() -> impl Strategy<Value = ChangeStep> {
    prop_oneof![
        peer().prop_map(ChangeStep::AddVoter),
        peer().prop_map(ChangeStep::AddLearner),
        peer().prop_map(ChangeStep::AddWitness),
        peer().prop_map(ChangeStep::Remove),
    ]
}

fn change() -> impl Strategy<Value = ConfChange> {
    let leave = prop_oneof![Just(LeaveJoint::Auto), Just(LeaveJoint::Explicit)];
    (vec(step(), 0..6), leave, bytes()).prop_map(|(steps, leave, context)| ConfChange {
        steps,
        leave,
        context,
    })
}

fn payload() -> impl Strategy<Value = Payload> {
    prop_oneof![
        Just(Payload::Noop),
        bytes().prop_map(Payload::Command),
        change().prop_map(|change| Payload::Change(Box::new(change))),
    ]
}

fn some(
    ids: std::ops::Range<u64>,
    count: std::ops::Range<usize>,
) -> impl Strategy<Value = PeerSet> {
    btree_set(ids.prop_map(PeerId), count).prop_map(|peers| peers.into_iter().collect())
}

fn few() -> impl Strategy<Value = PeerSet> {
    some(1..8, 0..6)
}

fn configuration() -> impl Strategy<Value = Configuration> {
    (few(), few(), few(), few(), few(), any::<bool>()).prop_map(|sets| Configuration {
        voters: sets.0,
        voters_outgoing: sets.1,
        learners: sets.2,
        learners_next: sets.3,
        witnesses: sets.4,
        auto_leave: sets.5,
    })
}

fn stamp() -> impl Strategy<Value = Stamp> {
    (any::<u64>(), any::<u64>()).prop_map(|(round, sent)| Stamp { round, sent: Time(sent) })
}

fn point() -> impl Strategy<Value = CommitPoint> {
    (index(), term()).prop_map(|(index, term)| CommitPoint { index, term })
}

fn append() -> impl Strategy<Value = MessageBody> {
    let parts = (0..u64::MAX / 2, term(), vec((term(), payload()), 0..5), index(), stamp());
    parts.prop_map(|(prev, prev_term, entries, commit, stamp)| MessageBody::Append {
        prev_index: LogIndex(prev),
        prev_term,
        entries: (prev + 1..)
            .zip(entries)
            .map(|(index, (term, payload))| Entry { term, index: LogIndex(index), payload })
            .collect(),
        commit,
        stamp,
    })
}

fn body() -> impl Strategy<Value = MessageBody> {
    let outcome = prop_oneof![
        index().prop_map(|match_index| AppendOutcome::Accepted { match_index }),
        (index(), index(), term()).prop_map(|(prev_index, hint_index, hint_term)| {
            AppendOutcome::Rejected { prev_index, hint_index, hint_term }
        }),
    ];
    prop_oneof![
        (index(), term(), point()).prop_map(|(last_index, last_term, commit)| {
            MessageBody::PreVote { last_index, last_term, commit }
        }),
        (any::<bool>(), point())
            .prop_map(|(granted, commit)| MessageBody::PreVoteReply { granted, commit }),
        (index(), term(), any::<bool>(), point()).prop_map(
            |(last_index, last_term, transfer, commit)| MessageBody::Vote {
                last_index,
                last_term,
                transfer,
                commit
            }
        ),
        (any::<bool>(), point())
            .prop_map(|(granted, commit)| MessageBody::VoteReply { granted, commit }),
        append(),
        (outcome, stamp()).prop_map(|(outcome, stamp)| MessageBody::AppendReply { outcome, stamp }),
        (index(), stamp()).prop_map(|(commit, stamp)| MessageBody::Heartbeat { commit, stamp }),
        stamp().prop_map(|stamp| MessageBody::HeartbeatReply { stamp }),
        (index(), term(), configuration(), bytes()).prop_map(
            |(index, term, configuration, data)| MessageBody::InstallSnapshot {
                meta: Box::new(SnapshotMeta { index, term, configuration }),
                data
            }
        ),
        Just(MessageBody::TimeoutNow),
        any::<u64>().prop_map(|batch| MessageBody::ReadIndex { batch }),
        point().prop_map(|commit| MessageBody::Commit { commit }),
        (any::<u64>(), index())
            .prop_map(|(batch, index)| MessageBody::ReadIndexReply { batch, index }),
        peer().prop_map(|target| MessageBody::TransferRequest { target }),
    ]
}

fn message() -> impl Strategy<Value = Message> {
    (any::<u64>(), peer(), peer(), term(), body()).prop_map(|(group, from, to, term, body)| {
        Message { group: GroupId(group), from, to, term, body }
    })
}

fn encoded(encode: impl Fn(&mut Vec<u8>)) -> Bytes {
    let mut out = Vec::new();
    encode(&mut out);
    Bytes::from(out)
}

/// A majority, counted the slow way: the highest value that more than half of the
/// voters have reached.
fn reached_slowly(voters: &PeerSet, value: impl Fn(PeerId) -> u64) -> Option<u64> {
    let candidates = voters.iter().map(|peer| value(*peer));
    let holds = |at: &u64| {
        let there = voters.iter().filter(|peer| value(**peer) >= *at).count();
        there * 2 > voters.len()
    };
    candidates.filter(holds).max()
}

proptest! {
    #[test]
    fn a_message_survives_its_journey(message in message()) {
        let bytes = encoded(|out| message.encode(out));
        prop_assert_eq!(Message::decode(bytes), Ok(message));
    }

    #[test]
    fn a_payload_survives_its_storage(payload in payload()) {
        let bytes = encoded(|out| payload.encode(out));
        prop_assert_eq!(Payload::decode(bytes), Ok(payload));
    }

    #[test]
    fn members_survive_their_storage(members in configuration()) {
        let bytes = encoded(|out| members.encode(out));
        prop_assert_eq!(Configuration::decode(bytes), Ok(members));
    }

    #[test]
    fn a_hard_state_survives_its_storage(term in term(), vote in proptest::option::of(peer()),
                                         commit in index()) {
        let vote = vote.filter(|peer| peer.0 != 0);
        let state = HardState { term, vote, commit };
        let bytes = encoded(|out| state.encode(out));
        prop_assert_eq!(HardState::decode(bytes), Ok(state));
    }

    #[test]
    fn garbage_is_refused_and_does_no_harm(garbage in vec(any::<u8>(), 0..200), version in any::<bool>()) {
        let mut garbage = garbage;
        if version && !garbage.is_empty() {
            garbage[0] = 1 + (garbage.len() % 2) as u8;
        }
        let bytes = Bytes::from(garbage);
        let _ = Message::decode(bytes.clone());
        let _ = Payload::decode(bytes.clone());
        let _ = Configuration::decode(bytes.clone());
        let _ = HardState::decode(bytes);
    }

    #[test]
    fn damaged_messages_never_panic(message in message(), at in any::<prop::sample::Index>(),
                                    bit in 0..8u32, cut in any::<prop::sample::Index>()) {
        let mut bytes = encoded(|out| message.encode(out)).to_vec();
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        let _ = Message::decode(Bytes::from(bytes.clone()));
        bytes.truncate(cut.index(bytes.len()));
        prop_assert!(Message::decode(Bytes::from(bytes)) != Ok(message));
    }

    #[test]
    fn a_quorum_is_what_counting_by_hand_says(voters in some(1..20, 1..14),
                                              outgoing in few(),
                                              values in vec(0..10u64, 20)) {
        let members = Configuration {
            voters: voters.clone(),
            voters_outgoing: outgoing.clone(),
            ..Configuration::default()
        };
        let value = |peer: PeerId| values[usize::try_from(peer.0).unwrap_or(0)];
        let incoming = reached_slowly(&voters, value);
        let both = incoming.min(reached_slowly(&outgoing, value).or(incoming));
        prop_assert_eq!(Some(reached(&members, value)), both);
    }

    #[test]
    fn an_election_ends_when_counting_by_hand_says(voters in some(1..8, 1..7),
                                                   outgoing in few(),
                                                   votes in vec(proptest::option::of(any::<bool>()), 8)) {
        let vote = |peer: PeerId| votes[usize::try_from(peer.0).unwrap_or(0)];
        let wins = |set: &PeerSet, open: bool| {
            let yes = set.iter().filter(|peer| vote(**peer).unwrap_or(open)).count();
            set.is_empty() || yes * 2 > set.len()
        };
        let expected = if wins(&voters, false) && wins(&outgoing, false) {
            Tally::Won
        } else if wins(&voters, true) && wins(&outgoing, true) {
            Tally::Open
        } else {
            Tally::Lost
        };
        let members = Configuration {
            voters, voters_outgoing: outgoing, ..Configuration::default()
        };
        prop_assert_eq!(tally(&members, vote), expected);
    }

    /// A change of members is safe because any majority before it and any majority after it have a
    /// voter in common, so that they cannot decide differently.
    #[test]
    fn majorities_before_and_after_a_change_overlap(voters in some(1..6, 1..5),
                                                    steps in vec((0..4u8, 1..7u64), 1..5),
                                                    explicit in any::<bool>()) {
        let before = Configuration { voters, ..Configuration::default() };
        let steps = steps.into_iter().map(|(kind, peer)| match kind {
            0 => ChangeStep::AddVoter(PeerId(peer)),
            1 => ChangeStep::AddLearner(PeerId(peer)),
            2 => ChangeStep::AddWitness(PeerId(peer)),
            _ => ChangeStep::Remove(PeerId(peer)),
        }).collect();
        let leave = if explicit { LeaveJoint::Explicit } else { LeaveJoint::Auto };
        let change = ConfChange { steps, leave, context: Bytes::new() };
        let Ok(after) = before.changed(&change) else { return Ok(()) };
        assert_overlap(&before, &after);
        if after.is_joint() {
            let left = after.changed(&ConfChange::default()).expect("a joint configuration can be left");
            assert_overlap(&after, &left);
            prop_assert_eq!(&left.voters, &after.voters);
            prop_assert!(left.learners_next.is_empty());
        }
        for one in [&before, &after] {
            let mut seen = BTreeSet::new();
            prop_assert!(one.peers().all(|peer| seen.insert(peer)), "a peer is named twice");
        }
    }
}

/// Tries every way to divide the peers into two camps. The camps must never both win.
fn assert_overlap(one: &Configuration, other: &Configuration) {
    for camp in 0..1u32 << 7 {
        let ours = |peer: PeerId| camp & (1 << peer.0) != 0;
        let one_wins = tally(one, |peer| Some(ours(peer))) == Tally::Won;
        let other_wins = tally(other, |peer| Some(!ours(peer))) == Tally::Won;
        assert!(!(one_wins && other_wins), "two camps win: {camp:b} {one:?} {other:?}");
    }
}
