//! What a group holds in memory. An idle group holds next to nothing, because a node may have a
//! hundred thousand groups. A group that applies slowly holds a bounded amount.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use esker_raft::{
    AppendOutcome, Config, Configuration, Group, HardState, Identity, LogIndex, MAX_APPLYING_BYTES,
    Message, MessageBody, PeerId, Restored, RoleKind, Stamp, Term, Time, UNAPPLIED_CACHES,
};
use esker_raft_simulator::driver::{Borrowed, Disk, GROUP, Machine};

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

/// The bytes that an idle peer may hold, on the heap and in the `Group` itself.
const LIMIT: usize = 1024;

struct Bench {
    /// Shared by all groups of a node, like the settings.
    reader: Borrowed,
    config: Arc<Config>,
}

impl Bench {
    fn group(&self, now: Time) -> Group<Borrowed> {
        self.group_of(Configuration::of_voters([1, 2, 3].map(PeerId)), now)
    }

    fn alone(&self, now: Time) -> Group<Borrowed> {
        self.group_of(Configuration::of_voters([PeerId(1)]), now)
    }

    fn group_of(&self, configuration: Configuration, now: Time) -> Group<Borrowed> {
        let restored = Restored {
            hard_state: HardState { term: TERM, vote: None, commit: LogIndex(1) },
            configuration,
            compacted: (LogIndex(1), Term(1)),
            last: (LogIndex(1), Term(1)),
            applied: LogIndex(1),
        };
        let me = Identity { group: GROUP, peer: PeerId(1) };
        let (config, reader) = (Arc::clone(&self.config), self.reader.clone());
        Group::create(me, config, reader, restored, now).expect("a sensible group")
    }
}

fn from(peer: u64, term: Term, body: MessageBody) -> Message {
    Message { group: GROUP, from: PeerId(peer), to: PeerId(1), term, body }
}

/// Carries out every Ready at once. Returns the stamps that were sent.
fn work(group: &mut Group<Borrowed>, now: Time) -> Vec<Stamp> {
    let mut stamps = Vec::new();
    while let Some(ready) = group.ready() {
        for message in &ready.messages {
            if let MessageBody::Heartbeat { stamp, .. } | MessageBody::Append { stamp, .. } =
                message.body
            {
                stamps.push(stamp);
            }
        }
        group.persisted(now, ready.number);
        if let Some(entry) = ready.committed.last() {
            group.applied(entry.index);
        }
    }
    stamps
}

/// Makes the peer the leader of a group of three, and does some work until every peer has every
/// entry.
fn lead(group: &mut Group<Borrowed>, mut now: Time) -> Time {
    let taken = "an answer is taken";
    group.campaign(now);
    work(group, now);
    let vote = MessageBody::VoteReply { granted: true, commit: Default::default() };
    group.step(now, from(2, TERM.next(), vote)).expect(taken);
    assert_eq!(group.role(), RoleKind::Leader);
    for _ in 0..50 {
        group.propose(now, Bytes::from_static(&[7; 1000])).expect("a leader proposes");
        let stamps = work(group, now);
        for peer in [2, 3] {
            let outcome = AppendOutcome::Accepted { match_index: group.last_index() };
            for &stamp in &stamps {
                let reply = MessageBody::AppendReply { outcome, stamp };
                group.step(now, from(peer, TERM.next(), reply)).expect(taken);
            }
        }
        work(group, now);
        now = now + Duration::from_millis(1);
    }
    assert_eq!(group.applied_index(), group.last_index());
    now
}

/// The counters belong to the process, so the parts of this test run one after the other.
#[test]
fn a_group_holds_little_when_it_is_idle_and_not_much_more_when_it_applies_slowly() {
    an_idle_group_of_three_costs_at_most_a_kibibyte_for_each_peer_and_allocates_nothing();
    what_is_durable_and_not_applied_is_not_all_kept();
}

/// Entries that are durable are not all kept in memory, while a gibibyte is proposed and none of it
/// is applied.
fn what_is_durable_and_not_applied_is_not_all_kept() {
    const ENTRY: usize = 1 << 20;
    let bench = Bench {
        reader: Borrowed(Disk { machine: Machine::default(), ..Disk::default() }.shared()),
        config: Arc::new(Config { pre_vote: false, ..Config::default() }),
    };
    let held = HELD.load(Ordering::Relaxed);
    let mut alone = bench.alone(Time(1));
    alone.campaign(Time(1));
    let mut handed_out = 0;
    for _ in 0..1024 {
        while let Some(ready) = alone.ready() {
            alone.persisted(Time(1), ready.number);
            handed_out += ready.committed.bytes();
        }
        alone.propose(Time(1), Bytes::from(vec![7; ENTRY])).expect("it leads, and commits");
    }
    let kept = HELD.load(Ordering::Relaxed) - held;
    let limit = bench.config.max_entry_cache_bytes * UNAPPLIED_CACHES + 4 * ENTRY;
    println!("of 1024 MiB, {} MiB were handed out and {} MiB kept", handed_out >> 20, kept >> 20);
    assert!(handed_out <= MAX_APPLYING_BYTES + 2 * ENTRY, "{handed_out} bytes were handed out");
    assert!(kept <= limit, "{kept} bytes are kept");
}

fn an_idle_group_of_three_costs_at_most_a_kibibyte_for_each_peer_and_allocates_nothing() {
    let bench = Bench {
        reader: Borrowed(Disk { machine: Machine::default(), ..Disk::default() }.shared()),
        config: Arc::new(Config { pre_vote: false, ..Config::default() }),
    };
    let held = HELD.load(Ordering::Relaxed);
    let mut follower = bench.group(Time(1));
    let cost = HELD.load(Ordering::Relaxed) - held + size_of::<Group<Borrowed>>();
    println!("an idle follower of three costs {cost} bytes");
    assert!(cost <= LIMIT, "an idle follower costs {cost} bytes");

    let allocations = ALLOCATIONS.load(Ordering::Relaxed);
    for millisecond in 0..900 {
        follower.tick(Time(1) + Duration::from_millis(millisecond));
        assert_eq!(follower.ready(), None);
    }
    assert_eq!(ALLOCATIONS.load(Ordering::Relaxed), allocations, "an idle follower allocated");

    let now = Time(0) + Duration::from_secs(60);
    let held = HELD.load(Ordering::Relaxed);
    let mut leader = bench.group(now);
    let now = lead(&mut leader, now);
    let busy = HELD.load(Ordering::Relaxed) - held + size_of::<Group<Borrowed>>();
    // No call asks for it: between two heartbeats without work the group frees memory.
    let mut later = now;
    for _ in 0..3 {
        later = later + Duration::from_millis(100);
        leader.tick(later);
        for stamp in work(&mut leader, later) {
            let reply = MessageBody::HeartbeatReply { stamp };
            leader.step(later, from(2, TERM.next(), reply.clone())).expect("it is taken");
            leader.step(later, from(3, TERM.next(), reply)).expect("it is taken");
        }
        assert_eq!(leader.ready(), None);
    }
    let cost = HELD.load(Ordering::Relaxed) - held + size_of::<Group<Borrowed>>();
    println!("a busy leader of three costs {busy} bytes, an idle one {cost} bytes");
    assert!(cost <= LIMIT, "an idle leader of three costs {cost} bytes");

    let allocations = ALLOCATIONS.load(Ordering::Relaxed);
    for millisecond in 0..90 {
        leader.tick(later + Duration::from_millis(millisecond));
        assert_eq!(leader.ready(), None);
    }
    assert_eq!(ALLOCATIONS.load(Ordering::Relaxed), allocations, "an idle leader allocated");
}
