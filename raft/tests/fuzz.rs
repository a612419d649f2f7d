//! Any messages, in any order, from any sender. A peer refuses or accepts them, and its promises
//! hold in either case.
//!
//! One real peer gets random false messages: from leaders that were never elected, with votes that
//! no peer gave, acknowledgements of nothing, and snapshots that were not asked for. In between
//! come the peer's own disk, state machine, crashes and callers. Numbers are mostly near those that
//! matter to the peer at that moment, so that the messages are credible. `PROPTEST_CASES=n` runs
//! more cases.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use esker_raft::{
    AppendOutcome, ChangeStep, CommitPoint, ConfChange, Config, Configuration, Entry, GroupId,
    HardState, LeaveJoint, LogIndex, MAX_INDEX_LEAP, MAX_TERM_LEAP, Message, MessageBody, Payload,
    PeerId, PeerSet, RoleKind, SnapshotMeta, SnapshotOutcome, Stamp, Term, Time,
};
use esker_raft_simulator::driver::{Disk, EntryLog, Event, GROUP, Machine, Node, Settings};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

/// A number near one that matters to the peer.
#[derive(Clone, Copy, Debug)]
enum Near {
    Term(i64),
    Commit(i64),
    Last(i64),
    Any(u64),
}

#[derive(Clone, Debug)]
enum Lie {
    PreVote { last: (Near, Near), commit: (Near, Near) },
    PreVoteReply { granted: bool, commit: (Near, Near) },
    Vote { last: (Near, Near), transfer: bool, commit: (Near, Near) },
    VoteReply { granted: bool, commit: (Near, Near) },
    Append { prev: (Near, Near), terms: Vec<(Near, Payload)>, commit: Near, sent: i64 },
    Accepted { index: Near, sent: i64, round: u64 },
    Rejected { prev: Near, hint: (Near, Near), sent: i64 },
    Commit { commit: (Near, Near) },
    Heartbeat { commit: Near, sent: i64, round: u64 },
    HeartbeatReply { sent: i64, round: u64 },
    Snapshot { index: (Near, Near), members: Configuration },
    TimeoutNow,
    ReadIndex { batch: u64 },
    ReadIndexReply { batch: u64, index: Near },
    TransferRequest { target: u64 },
}

#[derive(Clone, Debug)]
enum Deed {
    Said { group: u64, from: u64, to: u64, term: Near, lie: Lie },
    TimePasses(u64),
    Propose(usize),
    Change(ConfChange),
    Read(u64),
    Transfer(Option<u64>),
    Campaign,
    Sync(usize),
    Apply(usize),
    Install,
    Compact(u64),
    Unreachable(u64),
    SnapshotSent(u64, bool),
    Crash(usize),
}

fn near() -> impl Strategy<Value = Near> {
    prop_oneof![
        4 => (-2..3i64).prop_map(Near::Term),
        4 => (-3..4i64).prop_map(Near::Commit),
        4 => (-3..4i64).prop_map(Near::Last),
        2 => (0..20u64).prop_map(Near::Any),
        1 => any::<u64>().prop_map(Near::Any),
        1 => proptest::sample::select(EDGES).prop_map(Near::Any),
    ]
}

/// The numbers at which refusal begins, and at which counting on would overflow.
const EDGES: &[u64] = &[
    MAX_TERM_LEAP - 1,
    MAX_TERM_LEAP,
    MAX_TERM_LEAP + 1,
    MAX_INDEX_LEAP - 1,
    MAX_INDEX_LEAP,
    MAX_INDEX_LEAP + 1,
    (1 << 63) - 1,
    1 << 63,
    u64::MAX - 1,
    u64::MAX,
];

fn term() -> impl Strategy<Value = Near> {
    prop_oneof![8 => (-1..2i64).prop_map(Near::Term), 1 => near()]
}

fn point() -> impl Strategy<Value = (Near, Near)> {
    (near(), term())
}

fn peer() -> impl Strategy<Value = u64> {
    prop_oneof![12 => 1..6u64, 1 => Just(0), 1 => any::<u64>()]
}

fn peers() -> impl Strategy<Value = PeerSet> {
    vec(0..6u64, 0..4).prop_map(|ids| ids.into_iter().map(PeerId).collect())
}

fn members() -> impl Strategy<Value = Configuration> {
    let plausible =
        vec(1..6u64, 1..4).prop_map(|ids| Configuration::of_voters(ids.into_iter().map(PeerId)));
    let any = (peers(), peers(), peers(), peers(), peers(), any::<bool>()).prop_map(
        |(voters, voters_outgoing, learners, learners_next, witnesses, auto_leave)| Configuration {
            voters,
            voters_outgoing,
            learners,
            learners_next,
            witnesses,
            auto_leave,
        },
    );
    prop_oneof![3 => plausible, 1 => any]
}

fn change() -> impl Strategy<Value = ConfChange> {
    let step = prop_oneof![
        peer().prop_map(|id| ChangeStep::AddVoter(PeerId(id))),
        peer().prop_map(|id| ChangeStep::AddLearner(PeerId(id))),
        peer().prop_map(|id| ChangeStep::AddWitness(PeerId(id))),
        peer().prop_map(|id| ChangeStep::Remove(PeerId(id))),
    ];
    (vec(step, 0..4), any::<bool>()).prop_map(|(steps, explicit)| ConfChange {
        steps,
        leave: if explicit { LeaveJoint::Explicit } else { LeaveJoint::Auto },
        context: Bytes::new(),
    })
}

fn payload() -> impl Strategy<Value = Payload> {
    prop_oneof![
        4 => Just(Payload::Command(Bytes::from_static(b"lie"))),
        1 => Just(Payload::Noop),
        1 => change().prop_map(|change| Payload::Change(Box::new(change))),
    ]
}

fn lie() -> impl Strategy<Value = Lie> {
    let sent = || -300..50i64;
    prop_oneof![
        2 => (point(), point()).prop_map(|(last, commit)| Lie::PreVote { last, commit }),
        3 => (any::<bool>(), point()).prop_map(|(granted, commit)| Lie::PreVoteReply { granted, commit }),
        3 => (point(), any::<bool>(), point())
            .prop_map(|(last, transfer, commit)| Lie::Vote { last, transfer, commit }),
        6 => (prop::bool::weighted(0.8), point()).prop_map(|(granted, commit)| Lie::VoteReply { granted, commit }),
        8 => (point(), vec((term(), payload()), 0..5), near(), sent())
            .prop_map(|(prev, terms, commit, sent)| Lie::Append { prev, terms, commit, sent }),
        6 => (near(), sent(), 0..4u64).prop_map(|(index, sent, round)| Lie::Accepted { index, sent, round }),
        3 => (near(), point(), sent()).prop_map(|(prev, hint, sent)| Lie::Rejected { prev, hint, sent }),
        2 => point().prop_map(|commit| Lie::Commit { commit }),
        3 => (near(), sent(), 0..4u64).prop_map(|(commit, sent, round)| Lie::Heartbeat { commit, sent, round }),
        3 => (sent(), 0..4u64).prop_map(|(sent, round)| Lie::HeartbeatReply { sent, round }),
        2 => (point(), members()).prop_map(|(index, members)| Lie::Snapshot { index, members }),
        1 => Just(Lie::TimeoutNow),
        1 => (0..3u64).prop_map(|batch| Lie::ReadIndex { batch }),
        1 => (any::<u64>(), near()).prop_map(|(batch, index)| Lie::ReadIndexReply { batch, index }),
        1 => peer().prop_map(|target| Lie::TransferRequest { target }),
    ]
}

fn deed() -> impl Strategy<Value = Deed> {
    let said = (
        prop_oneof![60 => Just(1), 1 => any::<u64>()],
        peer(),
        term(),
        lie(),
        prop::bool::weighted(0.01),
    );
    prop_oneof![
        20 => said.prop_map(|(group, from, term, lie, astray)| Deed::Said {
            group, from, to: if astray { 2 } else { 1 }, term, lie
        }),
        3 => (0..250u64).prop_map(Deed::TimePasses),
        2 => (0..200usize).prop_map(Deed::Propose),
        2 => change().prop_map(Deed::Change),
        1 => (0..1000u64).prop_map(Deed::Read),
        1 => proptest::option::of(peer()).prop_map(Deed::Transfer),
        3 => Just(Deed::Campaign),
        6 => (1..5usize).prop_map(Deed::Sync),
        6 => (1..5usize).prop_map(Deed::Apply),
        3 => Just(Deed::Install),
        1 => (0..30u64).prop_map(Deed::Compact),
        1 => peer().prop_map(Deed::Unreachable),
        1 => (peer(), any::<bool>()).prop_map(|(peer, delivered)| Deed::SnapshotSent(peer, delivered)),
        1 => (0..4usize).prop_map(Deed::Crash),
    ]
}

/// The peer, its messages and actions, and the promises that follow from them.
struct Witnessed {
    node: Node,
    now: Time,
    term: Term,
    commit: LogIndex,
    committed: BTreeMap<LogIndex, Term>,
    votes: BTreeMap<Term, PeerId>,
}

impl Witnessed {
    fn new(founders: Configuration, settings: Settings) -> Witnessed {
        let now = Time(1_000_000_000);
        let start = (LogIndex(1), Term(1));
        let (index, term) = start;
        let configuration = founders;
        let machine = Machine { index, term, digest: 0, has_data: true, configuration };
        let hard_state = HardState { term: start.1, vote: None, commit: start.0 };
        let disk = Disk { hard_state, log: EntryLog::after(start), machine };
        Witnessed {
            node: Node::create(PeerId(1), settings, disk, now),
            now,
            term: start.1,
            commit: start.0,
            committed: BTreeMap::new(),
            votes: BTreeMap::new(),
        }
    }

    fn number(&mut self, near: Near) -> u64 {
        let group = self.node.group();
        let (base, offset) = match near {
            Near::Term(offset) => (group.term().0, offset),
            Near::Commit(offset) => (group.commit_index().0, offset),
            Near::Last(offset) => (group.last_index().0, offset),
            Near::Any(number) => return number,
        };
        base.saturating_add_signed(offset)
    }

    fn term_of(&mut self, near: Near) -> Term {
        Term(self.number(near))
    }

    fn index_of(&mut self, near: Near) -> LogIndex {
        LogIndex(self.number(near))
    }

    fn point_of(&mut self, (index, term): (Near, Near)) -> CommitPoint {
        CommitPoint { index: self.index_of(index), term: self.term_of(term) }
    }

    fn stamp(&self, sent: i64, round: u64) -> Stamp {
        Stamp { round, sent: Time(self.now.0.saturating_add_signed(sent * 1_000_000)) }
    }

    fn body(&mut self, lie: Lie) -> MessageBody {
        match lie {
            Lie::PreVote { last, commit } => {
                let CommitPoint { index: last_index, term: last_term } = self.point_of(last);
                MessageBody::PreVote { last_index, last_term, commit: self.point_of(commit) }
            }
            Lie::PreVoteReply { granted, commit } => {
                MessageBody::PreVoteReply { granted, commit: self.point_of(commit) }
            }
            Lie::Vote { last, transfer, commit } => {
                let CommitPoint { index: last_index, term: last_term } = self.point_of(last);
                let commit = self.point_of(commit);
                MessageBody::Vote { last_index, last_term, transfer, commit }
            }
            Lie::VoteReply { granted, commit } => {
                MessageBody::VoteReply { granted, commit: self.point_of(commit) }
            }
            Lie::Append { prev, terms, commit, sent } => {
                let CommitPoint { index: prev_index, term: prev_term } = self.point_of(prev);
                let entries = terms.into_iter().zip(1..).map(|((term, payload), offset)| Entry {
                    term: self.term_of(term),
                    index: LogIndex(prev_index.0.saturating_add(offset)),
                    payload,
                });
                let entries = entries.collect();
                let (commit, stamp) = (self.index_of(commit), self.stamp(sent, 0));
                MessageBody::Append { prev_index, prev_term, entries, commit, stamp }
            }
            Lie::Accepted { index, sent, round } => {
                let outcome = AppendOutcome::Accepted { match_index: self.index_of(index) };
                MessageBody::AppendReply { outcome, stamp: self.stamp(sent, round) }
            }
            Lie::Rejected { prev, hint, sent } => {
                let CommitPoint { index: hint_index, term: hint_term } = self.point_of(hint);
                let prev_index = self.index_of(prev);
                let outcome = AppendOutcome::Rejected { prev_index, hint_index, hint_term };
                MessageBody::AppendReply { outcome, stamp: self.stamp(sent, 0) }
            }
            Lie::Commit { commit } => MessageBody::Commit { commit: self.point_of(commit) },
            Lie::Heartbeat { commit, sent, round } => {
                let commit = self.index_of(commit);
                MessageBody::Heartbeat { commit, stamp: self.stamp(sent, round) }
            }
            Lie::HeartbeatReply { sent, round } => {
                MessageBody::HeartbeatReply { stamp: self.stamp(sent, round) }
            }
            Lie::Snapshot { index, members: configuration } => {
                let CommitPoint { index, term } = self.point_of(index);
                let meta = Box::new(SnapshotMeta { index, term, configuration });
                MessageBody::InstallSnapshot { meta, data: Machine::default().encode() }
            }
            Lie::TimeoutNow => MessageBody::TimeoutNow,
            Lie::ReadIndex { batch } => MessageBody::ReadIndex { batch },
            Lie::ReadIndexReply { batch, index } => {
                MessageBody::ReadIndexReply { batch, index: self.index_of(index) }
            }
            Lie::TransferRequest { target } => {
                MessageBody::TransferRequest { target: PeerId(target) }
            }
        }
    }

    fn happens(&mut self, deed: Deed, reached: &Reached) {
        let now = self.now;
        match deed {
            Deed::Said { group, from, to, term, lie } => {
                let (term, body) = (self.term_of(term), self.body(lie));
                let (group, from, to) = (GroupId(group), PeerId(from), PeerId(to));
                // The peer may refuse the message or accept it. Both must keep its promises.
                let message = Message { group, from, to, term, body };
                let taken = self.node.group().step(now, message).is_ok();
                count(if taken { &reached.taken } else { &reached.refused }, true);
            }
            Deed::TimePasses(milliseconds) => {
                self.now = now + Duration::from_millis(milliseconds);
                self.node.group().tick(self.now);
            }
            Deed::Propose(size) => {
                let _ = self.node.group().propose(now, Bytes::from(vec![1; size]));
            }
            Deed::Change(change) => {
                let _ = self.node.group().propose_change(now, change);
            }
            Deed::Read(id) => {
                let _ = self.node.group().read_index(now, id);
            }
            Deed::Transfer(to) => {
                let _ = self.node.group().transfer_leader(now, to.map(PeerId));
            }
            Deed::Campaign => self.node.group().campaign(now),
            Deed::Sync(count) => {
                let written = std::iter::from_fn(|| self.node.finish_write()).take(count).last();
                if let Some(number) = written {
                    self.node.report_written(now, number);
                }
            }
            Deed::Apply(count) => {
                for _ in 0..count {
                    self.node.apply(now);
                }
            }
            Deed::Install => self.node.install(now),
            Deed::Compact(index) => self.node.compact(LogIndex(index)),
            Deed::Unreachable(peer) => self.node.group().unreachable(PeerId(peer)),
            Deed::SnapshotSent(peer, delivered) => {
                let failed = SnapshotOutcome::Failed;
                let outcome = if delivered { SnapshotOutcome::Delivered } else { failed };
                self.node.group().snapshot_sent(PeerId(peer), outcome);
            }
            Deed::Crash(kept) => {
                self.node.crash(kept);
                self.node.restart(now);
                // What was not durable bound nobody. After a crash, an entry is known to be
                // committed only up to the stored commit index and the applied index. Above that, a
                // leader's message counts again, and here it may be false.
                (self.term, self.commit) = Default::default();
                let disk = self.node.disk.borrow();
                let durable = disk.hard_state.commit.max(disk.machine.index);
                self.committed.retain(|index, _| *index <= durable);
            }
        }
        self.node.collect();
        self.holds(reached);
    }

    fn holds(&mut self, reached: &Reached) {
        let group = self.node.group();
        let (term, commit, last) = (group.term(), group.commit_index(), group.last_index());
        assert!(group.applied_index() <= commit && commit <= last, "applied, commit, last");
        assert!(group.persisted_index() <= last && group.first_index() <= last.next());
        assert!(term >= self.term, "the term fell from {} to {term}", self.term);
        assert!(commit >= self.commit, "the commit index fell to {commit}");
        assert!(group.configuration().is_empty() || group.configuration().validate().is_ok());
        count(&reached.led, group.role() == RoleKind::Leader);
        count(&reached.joint, group.configuration().is_joint());
        count(&reached.leases, group.lease_until().is_some());
        if group.role() == RoleKind::Leader {
            assert!(group.configuration().is_voter(PeerId(1)), "a leader that does not vote");
            assert_eq!(group.hard_state().vote, Some(PeerId(1)), "a leader without its own vote");
        } else {
            assert_eq!(group.lease_until(), None, "only a leader has a lease");
        }
        (self.term, self.commit) = (term, commit);
        for event in std::mem::take(&mut self.node.events) {
            match event {
                Event::Applied(entry) => {
                    let known = *self.committed.entry(entry.index).or_insert(entry.term);
                    assert_eq!(known, entry.term, "{} was committed twice", entry.index);
                    count(&reached.applied, true);
                }
                // A snapshot is trusted for what is committed, below and above its index.
                Event::Installed(_) => {
                    self.committed.clear();
                    count(&reached.installed, true);
                }
                _ => {}
            }
        }
        for message in std::mem::take(&mut self.node.outgoing) {
            self.may_be_said(&message);
        }
    }

    fn may_be_said(&mut self, message: &Message) {
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        assert_eq!(Message::decode(Bytes::from(bytes)).as_ref(), Ok(message));
        assert_eq!((message.group, message.from), (GROUP, PeerId(1)));
        assert_ne!(message.to, PeerId(1), "a peer does not write to itself");
        let disk = self.node.disk.borrow();
        match &message.body {
            MessageBody::VoteReply { granted: true, .. } => {
                let first = *self.votes.entry(message.term).or_insert(message.to);
                assert_eq!(first, message.to, "two votes in term {}", message.term);
                assert!(disk.hard_state.term >= message.term, "a vote that a crash would forget");
            }
            MessageBody::AppendReply {
                outcome: AppendOutcome::Accepted { match_index }, ..
            } => {
                let end = disk.log.last().0;
                assert!(*match_index <= end, "{match_index} is not durable, only {end}");
            }
            _ => {}
        }
    }
}

/// Counts the effects of the false messages. If all of them were refused, nothing would be tested.
#[derive(Default, Debug)]
struct Reached {
    taken: Cell<u32>,
    refused: Cell<u32>,
    led: Cell<u32>,
    applied: Cell<u32>,
    installed: Cell<u32>,
    joint: Cell<u32>,
    leases: Cell<u32>,
}

fn count(cell: &Cell<u32>, happened: bool) {
    cell.set(cell.get() + u32::from(happened));
}

fn scene() -> impl Strategy<Value = (Configuration, Config, u64)> {
    let founders = prop_oneof![
        Just(vec![1u64]),
        Just(vec![1, 2, 3]),
        Just(vec![1, 2, 3, 4, 5]),
        Just(vec![2, 3]),
        Just(vec![]),
    ];
    let cache = prop_oneof![Just(0usize), Just(100), Just(1 << 20)];
    let append = prop_oneof![Just(1usize), Just(1 << 20)];
    let rest = (prop::bool::weighted(0.2), any::<bool>(), any::<bool>(), cache, append);
    (founders, rest, any::<u64>()).prop_map(|(founders, rest, seed)| {
        let (witness, pre_vote, check_quorum, max_entry_cache_bytes, max_append_bytes) = rest;
        let mut members = Configuration::of_voters(founders.into_iter().map(PeerId));
        if witness && members.voters.len() > 1 && members.is_voter(PeerId(1)) {
            members.witnesses = [PeerId(1)].into_iter().collect();
        }
        let config = Config {
            election_timeout: Duration::from_millis(100),
            heartbeat_interval: Duration::from_millis(20),
            max_entry_cache_bytes,
            max_append_bytes,
            max_inflight_messages: 3,
            max_uncommitted_bytes: 1000,
            pre_vote,
            check_quorum,
            ..Config::default()
        };
        (members, config, seed)
    })
}

#[test]
fn no_lie_makes_a_peer_panic_or_break_its_word() {
    let reached = Reached::default();
    let mut runner = TestRunner::new(ProptestConfig {
        cases: cases(),
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    let story = (scene(), vec(deed(), 1..250));
    let outcome = runner.run(&story, |((members, config, seed), deeds)| {
        let mut peer =
            Witnessed::new(members, Settings { config, priority: 0, seed, lazy_sync: false });
        for deed in deeds {
            peer.happens(deed, &reached);
        }
        Ok(())
    });
    outcome.unwrap_or_else(|failure| panic!("{failure}"));
    println!("{reached:?}");
    let Reached { taken, refused, led, applied, installed, joint, leases } = reached;
    for (what, cell) in [
        ("taken", taken),
        ("refused", refused),
        ("led", led),
        ("applied", applied),
        ("installed", installed),
        ("joint", joint),
        ("leases", leases),
    ] {
        assert!(cell.get() > 100, "too little happened: {what} {}", cell.get());
    }
}

/// The number of cases: some seconds of them, unless `PROPTEST_CASES` asks for more.
fn cases() -> u32 {
    std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(10_000)
}
