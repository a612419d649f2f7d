//! Messages that no correct peer sends, and calls that no sensible caller makes. They are refused
//! with an error that says what was wrong, or ignored as the protocol requires, and never cause a
//! panic.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use esker_raft::{
    AppendOutcome, ChangeStep, CommitPoint, ConfChange, Config, ConfigError, Configuration,
    DecodeError, Entry, Group, GroupId, HardState, Identity, LogIndex, MAX_INDEX_LEAP,
    MAX_TERM_LEAP, Message, MessageBody, Payload, PeerId, ProposeError, Restored, RoleKind,
    SnapshotMeta, Stamp, StepError, Term, Time,
};
use esker_raft_simulator::driver::{Borrowed, Disk, GROUP, Machine};

const NOW: Time = Time(1_000_000_000);
const TERM: Term = Term(4);

fn members(voters: &[u64]) -> Configuration {
    Configuration::of_voters(voters.iter().copied().map(PeerId))
}

fn restored() -> Restored {
    Restored {
        hard_state: HardState { term: TERM, vote: None, commit: LogIndex(5) },
        configuration: members(&[1, 2, 3]),
        compacted: (LogIndex(5), Term(2)),
        last: (LogIndex(5), Term(2)),
        applied: LogIndex(5),
    }
}

fn create(config: Config, restored: Restored) -> Result<Group<Borrowed>, ConfigError> {
    let reader = Borrowed(Disk { machine: Machine::default(), ..Disk::default() }.shared());
    Group::create(
        Identity { group: GROUP, peer: PeerId(1) },
        Arc::new(config),
        reader,
        restored,
        NOW,
    )
}

/// Peer 1 of 1, 2 and 3, with everything up to index 5 applied, in term 4.
fn follower() -> Group<Borrowed> {
    create(Config::default(), restored()).expect("a sensible group")
}

fn carry_out(group: &mut Group<Borrowed>) {
    while let Some(ready) = group.ready() {
        group.persisted(NOW, ready.number);
        if let Some(entry) = ready.committed.last() {
            group.applied(entry.index);
        }
    }
}

/// The same as leader of term 5, with its first entry at index 6 committed.
fn leader() -> Group<Borrowed> {
    let config = Config { pre_vote: false, ..Config::default() };
    let mut group = create(config, restored()).expect("a sensible group");
    group.campaign(NOW);
    carry_out(&mut group);
    let commit = CommitPoint::default();
    let taken = "it is taken";
    group.step(NOW, message(MessageBody::VoteReply { granted: true, commit }, 5)).expect(taken);
    carry_out(&mut group);
    let outcome = AppendOutcome::Accepted { match_index: LogIndex(6) };
    let stamp = Stamp { round: 0, sent: NOW };
    group.step(NOW, message(MessageBody::AppendReply { outcome, stamp }, 5)).expect(taken);
    carry_out(&mut group);
    assert_eq!((group.role(), group.applied_index()), (RoleKind::Leader, LogIndex(6)));
    group
}

fn message(body: MessageBody, term: u64) -> Message {
    Message { group: GROUP, from: PeerId(2), to: PeerId(1), term: Term(term), body }
}

fn entry(index: u64, term: u64) -> Entry {
    let payload = Payload::Command(Bytes::from_static(b"x"));
    Entry { term: Term(term), index: LogIndex(index), payload }
}

fn append(prev: (u64, u64), entries: Vec<Entry>) -> MessageBody {
    MessageBody::Append {
        prev_index: LogIndex(prev.0),
        prev_term: Term(prev.1),
        entries: entries.into(),
        commit: LogIndex(5),
        stamp: Stamp::default(),
    }
}

fn snapshot(index: u64, configuration: Configuration) -> MessageBody {
    let meta = SnapshotMeta { index: LogIndex(index), term: TERM, configuration };
    MessageBody::InstallSnapshot { meta: Box::new(meta), data: Bytes::new() }
}

fn refusal(group: &mut Group<Borrowed>, message: Message) -> String {
    let before = (group.last_index(), group.commit_index(), group.configuration().clone());
    let error = group.step(NOW, message).expect_err("it is refused");
    let after = (group.last_index(), group.commit_index(), group.configuration().clone());
    assert_eq!(before, after, "a refused message changed something");
    error.to_string()
}

#[test]
fn messages_that_went_astray_are_refused() {
    let heartbeat = MessageBody::Heartbeat { commit: LogIndex(5), stamp: Stamp::default() };
    let right = message(heartbeat, 4);
    let astray = [
        (
            Message { group: GroupId(9), ..right.clone() },
            "a message of group 9 was given to peer 1 of group 1",
        ),
        (Message { to: PeerId(7), ..right.clone() }, "a message for peer 7 was given to peer 1"),
        (Message { from: PeerId(1), ..right.clone() }, "peer 1 was given a message from itself"),
        (Message { from: PeerId(0), ..right.clone() }, "peer 0 sent a malformed sender"),
    ];
    for (message, reason) in astray {
        assert_eq!(refusal(&mut follower(), message), reason);
    }
    follower().step(NOW, right).expect("what is for this peer is taken");
}

#[test]
fn a_message_of_a_future_version_is_refused_by_name() {
    let mut bytes = Vec::new();
    message(MessageBody::TimeoutNow, 4).encode(&mut bytes);
    bytes[0] += 1;
    let error = Message::decode(Bytes::from(bytes)).expect_err("it cannot be read");
    assert_eq!(error, DecodeError::Version { found: 3, known: 2 });
    assert_eq!(error.to_string(), "format version 3 is unknown, this release reads 2");
}

#[test]
fn numbers_that_would_overflow_are_refused() {
    let huge = u64::MAX;
    let index = LogIndex(huge);
    let point = CommitPoint { index, term: Term(1) };
    let zero = CommitPoint::default();
    let bodies = [
        MessageBody::Vote { last_index: index, last_term: TERM, transfer: false, commit: zero },
        MessageBody::PreVote { last_index: LogIndex(9), last_term: TERM, commit: point },
        MessageBody::PreVoteReply { granted: true, commit: point },
        MessageBody::Commit { commit: point },
        append((huge, 4), vec![]),
        append((huge - 1, 4), vec![entry(huge, 4)]),
        MessageBody::Heartbeat { commit: index, stamp: Stamp::default() },
        snapshot(huge, members(&[1, 2])),
        MessageBody::ReadIndexReply { batch: 1, index },
        MessageBody::AppendReply {
            outcome: AppendOutcome::Accepted { match_index: index },
            stamp: Stamp::default(),
        },
    ];
    for body in bodies {
        let said = refusal(&mut follower(), message(body, 4));
        assert_eq!(said, format!("peer 2 sent the impossible index {huge}"));
    }
    let said = refusal(&mut follower(), message(MessageBody::TimeoutNow, huge));
    assert_eq!(said, format!("peer 2 sent the impossible term {huge}"));
}

#[test]
fn a_term_that_no_election_can_have_reached_ends_no_group() {
    let furthest = TERM.0 + MAX_TERM_LEAP;
    let of_every_kind = |term: u64| {
        let (last_term, commit) = (TERM, CommitPoint::default());
        let last_index = LogIndex(9);
        [
            MessageBody::Vote { last_index, last_term, transfer: true, commit },
            MessageBody::PreVote { last_index, last_term, commit },
            MessageBody::VoteReply { granted: true, commit },
            MessageBody::Heartbeat { commit: LogIndex(5), stamp: Stamp::default() },
            append((5, 2), vec![]),
            snapshot(9, members(&[1, 2])),
            MessageBody::TimeoutNow,
            MessageBody::HeartbeatReply { stamp: Stamp::default() },
        ]
        .map(|body| message(body, term))
    };
    for term in [furthest + 1, 1 << 62, Term::MAX.0, 1 << 63, u64::MAX] {
        for message in of_every_kind(term) {
            let mut group = follower();
            let said = refusal(&mut group, message);
            assert_eq!(said, format!("peer 2 sent the impossible term {term}"));
            assert_eq!(group.term(), TERM);
        }
    }
    // A peer that false messages led as far as possible goes on counting. It brings a leader along
    // that never got such a message, because the leader accepts its replies.
    let mut misled = follower();
    misled.step(NOW, message(append((5, 2), vec![]), furthest)).expect("it is believed");
    let later = NOW + Duration::from_secs(60);
    misled.tick(later);
    carry_out(&mut misled);
    assert_eq!(misled.role(), RoleKind::PreCandidate);
    let mut behind = leader();
    let answer = MessageBody::HeartbeatReply { stamp: Stamp::default() };
    behind.step(NOW, message(answer, furthest)).expect("it is believed");
    assert_eq!((behind.role(), behind.term()), (RoleKind::Follower, Term(furthest)));
}

#[test]
fn an_index_that_no_log_can_have_reached_is_refused() {
    let furthest = 5 + MAX_INDEX_LEAP;
    for index in [furthest + 1, LogIndex::MAX.0, u64::MAX] {
        let heartbeat = MessageBody::Heartbeat { commit: LogIndex(index), stamp: Stamp::default() };
        for body in [heartbeat, snapshot(index, members(&[1, 2])), append((index, 4), vec![])] {
            let said = refusal(&mut follower(), message(body, 4));
            assert_eq!(said, format!("peer 2 sent the impossible index {index}"));
        }
    }
    let far = message(snapshot(furthest, members(&[1, 2])), 4);
    follower().step(NOW, far).expect("a snapshot may be far ahead");
}

#[test]
fn entries_with_a_gap_or_out_of_order_are_refused() {
    let malformed = [
        vec![entry(7, 4)],
        vec![entry(6, 4), entry(8, 4)],
        vec![entry(6, 4), entry(6, 4)],
        vec![entry(6, 4), entry(7, 3)],
        vec![entry(6, 1)],
        vec![entry(6, 9)],
    ];
    for entries in malformed {
        let said = refusal(&mut follower(), message(append((5, 2), entries), 4));
        assert_eq!(said, "peer 2 sent a malformed append");
    }
}

#[test]
fn snapshots_of_impossible_groups_are_refused() {
    let voters = |ids: &[u64]| members(ids).voters;
    let configurations = [
        Configuration::default(),
        members(&[0, 1]),
        Configuration { learners: voters(&[2]), ..members(&[1, 2]) },
        Configuration { witnesses: voters(&[1, 2]), ..members(&[1, 2]) },
        Configuration { witnesses: voters(&[9]), ..members(&[1, 2]) },
        Configuration { learners_next: voters(&[9]), ..members(&[1, 2]) },
        Configuration::of_voters((1..=65).map(PeerId)),
    ];
    for configuration in configurations {
        let said = refusal(&mut follower(), message(snapshot(9, configuration), 4));
        assert_eq!(said, "peer 2 sent a malformed snapshot");
    }
    let said = refusal(&mut follower(), message(snapshot(0, members(&[1])), 4));
    assert_eq!(said, "peer 2 sent a malformed snapshot");
}

#[test]
fn a_second_leader_of_a_term_is_not_followed() {
    let mut group = follower();
    group.step(NOW, message(append((5, 2), vec![]), 4)).expect("the first leader is followed");
    let other = Message { from: PeerId(3), ..message(append((5, 2), vec![]), 4) };
    assert_eq!(refusal(&mut group, other), "peer 3 claims to lead term 4, but peer 2 does");
}

#[test]
fn what_contradicts_committed_entries_is_refused() {
    let mut group = follower();
    let body = append((5, 2), vec![entry(6, 4)]);
    group.step(NOW, message(body, 4)).expect("it fits");
    let commit = CommitPoint { index: LogIndex(6), term: Term(4) };
    group.step(NOW, message(MessageBody::Commit { commit }, 4)).expect("it is here");
    carry_out(&mut group);
    let other = message(append((5, 2), vec![entry(6, 5)]), 5);
    let error = group.step(NOW, other).expect_err("6 is committed");
    assert!(matches!(error, StepError::CommittedConflict { index: LogIndex(6), .. }), "{error}");
}

#[test]
fn a_leader_believes_no_impossible_acknowledgement_and_counts_no_stranger() {
    let accepted = |index| MessageBody::AppendReply {
        outcome: AppendOutcome::Accepted { match_index: LogIndex(index) },
        stamp: Stamp { round: 0, sent: NOW },
    };
    let mut group = leader();
    let said = refusal(&mut group, message(accepted(7), 5));
    assert_eq!(said, "peer 2 acknowledges entry 7, but the log ends at 6");
    group.propose(NOW, Bytes::from_static(b"y")).expect("a leader proposes");
    carry_out(&mut group);
    for stranger in [8, 9, u64::MAX] {
        let reply = Message { from: PeerId(stranger), ..message(accepted(7), 5) };
        group.step(NOW, reply).expect("strangers are ignored");
    }
    assert_eq!(group.commit_index(), LogIndex(6), "two strangers were counted as a quorum");
    group.step(NOW, message(accepted(7), 5)).expect("a member is counted");
    assert_eq!(group.commit_index(), LogIndex(7));
}

#[test]
fn changes_that_cannot_be_are_refused() {
    let change = |steps: Vec<ChangeStep>| ConfChange { steps, ..ConfChange::default() };
    let peers = |from: u64, to: u64| (from..=to).map(|id| ChangeStep::AddLearner(PeerId(id)));
    let refused = [
        (change([1, 2, 3].map(|id| ChangeStep::Remove(PeerId(id))).into()), ConfigError::NoVoters),
        (
            change([1, 2, 3].map(|id| ChangeStep::AddLearner(PeerId(id))).into()),
            ConfigError::NoVoters,
        ),
        (
            change([1, 2, 3].map(|id| ChangeStep::AddWitness(PeerId(id))).into()),
            ConfigError::NoVoters,
        ),
        (change(vec![]), ConfigError::NotJoint),
        (change(vec![ChangeStep::AddVoter(PeerId(0))]), ConfigError::InvalidPeer),
        (
            change(vec![ChangeStep::AddVoter(PeerId(4)), ChangeStep::Remove(PeerId(4))]),
            ConfigError::NamedTwice(PeerId(4)),
        ),
        (change(peers(4, 99).collect()), ConfigError::TooManyPeers(99)),
    ];
    let mut group = leader();
    for (change, reason) in refused {
        assert_eq!(group.propose_change(NOW, change), Err(ProposeError::InvalidChange(reason)));
    }
    assert_eq!(group.last_index(), LogIndex(6), "nothing was appended");
}

#[test]
fn a_proposal_over_the_limit_is_refused_and_one_at_the_limit_is_not() {
    let config = Config { max_entry_bytes: 132, pre_vote: false, ..Config::default() };
    let alone = Restored { configuration: members(&[1]), ..restored() };
    let mut group = create(config, alone).expect("a sensible group");
    group.campaign(NOW);
    carry_out(&mut group);
    let over = group.propose(NOW, Bytes::from(vec![0; 101]));
    assert_eq!(over, Err(ProposeError::TooLarge { bytes: 133, limit: 132 }));
    group.propose(NOW, Bytes::from(vec![0; 100])).expect("it is at the limit");
}

#[test]
fn a_disk_that_lost_what_it_promised_is_found_out() {
    // At the start, if the log ends before an index that was known to be committed …
    let lost = Restored { applied: LogIndex(7), ..restored() };
    let error = create(Config::default(), lost).expect_err("the log ends too early");
    assert_eq!(error.to_string(), "peer 1 restored applied index 7 but its log ends at 5");
    // … by its leader's heartbeat, if the lost entries are committed …
    let heartbeat = MessageBody::Heartbeat { commit: LogIndex(9), stamp: Stamp::default() };
    let said = refusal(&mut follower(), message(heartbeat, 4));
    assert_eq!(
        said,
        "peer 1 acknowledged entries up to 9 to leader 2, but its log ends at 5: its disk has \
         lost data; remove the peer and add a new one"
    );
    // … and by the leader, if not, when the peer refuses the next entries. A refusal of an append
    // that was sent before the acknowledgement came proves nothing.
    let rejected = |sent| MessageBody::AppendReply {
        outcome: AppendOutcome::Rejected {
            prev_index: LogIndex(6),
            hint_index: LogIndex(5),
            hint_term: Term(2),
        },
        stamp: Stamp { round: 0, sent },
    };
    let mut group = leader();
    group.step(NOW, message(rejected(NOW), 5)).expect("it may be an old one");
    let said = refusal(&mut group, message(rejected(NOW + Duration::from_millis(1)), 5));
    assert_eq!(
        said,
        "peer 2 refuses entries after 6, but has acknowledged all up to 6: its disk has lost \
         data; remove the peer and add a new one"
    );
}

#[test]
fn settings_and_states_that_contradict_themselves_are_refused() {
    let second = Duration::from_secs(1);
    let config = Config::default();
    let settings = [
        (Config { heartbeat_interval: Duration::ZERO, ..config.clone() }, "heartbeat_interval"),
        (
            Config { election_timeout: second, heartbeat_interval: second, ..config.clone() },
            "election_timeout",
        ),
        (Config { election_timeout: second * 90_000, ..config.clone() }, "election_timeout"),
        (Config { max_clock_drift: 1.0, ..config.clone() }, "max_clock_drift"),
        (Config { max_clock_drift: f64::NAN, ..config.clone() }, "max_clock_drift"),
        (Config { max_entry_bytes: 0, ..config.clone() }, "max_entry_bytes"),
        (Config { max_append_bytes: 0, ..config.clone() }, "max_append_bytes"),
        (Config { max_inflight_messages: 0, ..config.clone() }, "max_inflight_messages"),
        (Config { max_inflight_bytes: 0, ..config.clone() }, "max_inflight_bytes"),
    ];
    for (config, setting) in settings {
        let error = create(config, restored()).expect_err("it cannot work");
        assert!(matches!(error, ConfigError::Setting { name, .. } if name == setting), "{error}");
    }
    let at = |hard_state| Restored { hard_state, ..restored() };
    let state = restored().hard_state;
    let error = create(config.clone(), at(HardState { commit: LogIndex(6), ..state }));
    assert!(matches!(error, Err(ConfigError::BeyondLog { .. })));
    let error = create(config.clone(), at(HardState { term: Term(1), ..state }));
    assert!(matches!(error, Err(ConfigError::TermBehindLog { .. })));
    let behind = Restored { applied: LogIndex(4), ..restored() };
    assert!(matches!(create(config.clone(), behind), Err(ConfigError::AppliedBehindLog { .. })));
    let empty = Restored { configuration: members(&[0]), ..restored() };
    assert_eq!(create(config, empty).err(), Some(ConfigError::InvalidPeer));
}
