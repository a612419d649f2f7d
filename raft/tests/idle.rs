//! An idle group costs next to nothing: a node may hold a hundred thousand.

mod cluster;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use cluster::{Borrowed, Disk, Machine};
use esker_raft::{
    Config, Configuration, Group, HardState, LogIndex, Message, MessageBody, PeerId, Restored,
    RoleKind, Stamp, Term, Time,
};

/// Counts what is allocated and what is held.
struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);
static HELD: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is passed on to the system's allocator as it is.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        HELD.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

const TERM: Term = Term(3);

fn group(reader: Borrowed, now: Time) -> Group<Borrowed> {
    let restored = Restored {
        hard_state: HardState { term: TERM, vote: None, commit: LogIndex(1) },
        configuration: Configuration::of_voters([1, 2, 3].map(PeerId)),
        compacted: (LogIndex(1), Term(1)),
        last: (LogIndex(1), Term(1)),
        applied: LogIndex(1),
    };
    let config = Config { id: PeerId(1), pre_vote: false, ..Config::default() };
    Group::create(config, reader, restored, now).expect("a sensible group")
}

/// One test for all of it: the counters belong to the process.
#[test]
fn an_idle_group_allocates_nothing_and_is_small() {
    let reader = Borrowed(Disk { machine: Machine::default(), ..Disk::default() }.shared());
    let held = HELD.load(Ordering::Relaxed);
    let mut follower = group(reader.clone(), Time(0));
    let cost = HELD.load(Ordering::Relaxed) - held + size_of::<Group<Borrowed>>();
    assert!(cost <= 1024, "an idle follower costs {cost} bytes");

    let allocations = ALLOCATIONS.load(Ordering::Relaxed);
    for millisecond in 0..900 {
        follower.tick(Time(0) + Duration::from_millis(millisecond));
        assert_eq!(follower.ready(), None);
    }
    assert_eq!(ALLOCATIONS.load(Ordering::Relaxed), allocations, "an idle follower allocated");

    // A leader whose followers have everything, between two heartbeats.
    let now = Time(0) + Duration::from_secs(60);
    let held = HELD.load(Ordering::Relaxed);
    let mut leader = group(reader, now);
    leader.campaign(now);
    let candidacy = leader.ready().expect("a candidate has something to say");
    leader.persisted(now, candidacy.number);
    let commit = Default::default();
    let answer =
        |from, body| Message { from: PeerId(from), to: PeerId(1), term: TERM.next(), body };
    let vote = MessageBody::VoteReply { granted: true, commit };
    leader.step(now, answer(2, vote)).expect("a vote is taken");
    assert_eq!(leader.role(), RoleKind::Leader);
    let begun = leader.ready().expect("a leader begins its term");
    leader.persisted(now, begun.number);
    for from in [2, 3] {
        let outcome = esker_raft::AppendOutcome::Accepted { match_index: LogIndex(2) };
        let stamp = Stamp { round: 0, sent: now };
        leader
            .step(now, answer(from, MessageBody::AppendReply { outcome, stamp }))
            .expect("an acknowledgement is taken");
    }
    while let Some(ready) = leader.ready() {
        leader.persisted(now, ready.number);
        if let Some(entry) = ready.committed.last() {
            leader.applied(entry.index);
        }
    }
    drop((candidacy, begun));
    leader.shrink();
    let cost = HELD.load(Ordering::Relaxed) - held + size_of::<Group<Borrowed>>();
    assert!(cost <= 2048, "an idle leader of three costs {cost} bytes");
    println!("an idle leader of three costs {cost} bytes");

    let allocations = ALLOCATIONS.load(Ordering::Relaxed);
    for millisecond in 0..90 {
        leader.tick(now + Duration::from_millis(millisecond));
        assert_eq!(leader.ready(), None);
    }
    assert_eq!(ALLOCATIONS.load(Ordering::Relaxed), allocations, "an idle leader allocated");
}
