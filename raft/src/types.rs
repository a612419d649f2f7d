//! The basic types of the protocol: ids, terms, indexes, instants, log entries and the little state
//! that a peer must remember across a crash.

use std::fmt;
use std::ops::{Add, Sub};
use std::time::Duration;

use bytes::Bytes;

use crate::configuration::Configuration;

/// One Raft group. Every message names its group, so that a message which went astray between
/// groups, or between clusters with different ids, is refused.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct GroupId(pub u64);

/// One replica of a group. Never reused: a replica that was removed and added
/// again comes back under a new id.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct PeerId(pub u64);

/// The identity of a peer.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Identity {
    /// The group that the peer belongs to.
    pub group: GroupId,
    /// The peer's id; not 0.
    pub peer: PeerId,
}

/// A period with at most one leader (Raft §5.1).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Term(pub u64);

/// A position in the log. The first entry has index 1; 0 means "before it".
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct LogIndex(pub u64);

const NANOS_PER_MILLI: u64 = 1_000_000;

/// An instant in nanoseconds on the caller's monotonic clock. Only differences
/// between instants of the same process mean anything.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Time(pub u64);

impl fmt::Display for GroupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl fmt::Display for PeerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl fmt::Display for Term {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl fmt::Display for LogIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// How far ahead of its own term a peer accepts another's term. Each term is an election, and one
/// every 100 ms for 13 years makes fewer terms than this. If a false message leads a peer this far
/// ahead, the peer still brings its group along, since the others accept its replies. A message
/// with a higher term is refused, and nothing is lost.
pub const MAX_TERM_LEAP: u64 = 1 << 32;

/// How far beyond the end of its log a peer accepts an index. Each index is an entry, and a hundred
/// thousand each second for 89 years are fewer than this.
pub const MAX_INDEX_LEAP: u64 = 1 << 48;

impl Term {
    /// The highest term that is accepted from another peer at all; see also [`MAX_TERM_LEAP`].
    /// Adding to it does not overflow.
    pub const MAX: Term = Term(u64::MAX >> 1);

    /// The term after this one.
    #[must_use]
    pub fn next(self) -> Term {
        Term(self.0.saturating_add(1))
    }

    /// The term before this one.
    #[must_use]
    pub fn prev(self) -> Term {
        Term(self.0.saturating_sub(1))
    }
}

impl LogIndex {
    /// The highest index that is accepted from another peer at all: see [`MAX_INDEX_LEAP`].
    pub const MAX: LogIndex = LogIndex(u64::MAX >> 1);

    /// The index after this one.
    #[must_use]
    pub fn next(self) -> LogIndex {
        LogIndex(self.0.saturating_add(1))
    }

    /// The index before this one.
    #[must_use]
    pub fn prev(self) -> LogIndex {
        LogIndex(self.0.saturating_sub(1))
    }
}

impl Time {
    /// So many milliseconds after the clock's beginning.
    #[must_use]
    pub const fn from_millis(millis: u64) -> Time {
        Time(millis.saturating_mul(NANOS_PER_MILLI))
    }

    /// Whole milliseconds from `earlier` to this instant; zero when `earlier` is in fact later.
    #[must_use]
    pub const fn millis_since(self, earlier: Time) -> u64 {
        self.0.saturating_sub(earlier.0) / NANOS_PER_MILLI
    }

    /// The instant `millis` milliseconds later.
    #[must_use]
    pub const fn plus_millis(self, millis: u64) -> Time {
        Time(self.0.saturating_add(Time::from_millis(millis).0))
    }
}

impl Add<Duration> for Time {
    type Output = Time;

    fn add(self, duration: Duration) -> Time {
        let nanos = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        Time(self.0.saturating_add(nanos))
    }
}

impl Sub for Time {
    type Output = Duration;

    /// The time since `earlier`; zero when `earlier` is in fact later.
    fn sub(self, earlier: Time) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

/// One slot of the replicated log.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Entry {
    /// The term of the leader that appended it.
    pub term: Term,
    /// Its position.
    pub index: LogIndex,
    /// Its content.
    pub payload: Payload,
}

/// About what an entry costs beyond its payload, in bytes.
const ENTRY_HEADER: usize = 32;

impl Payload {
    /// The bytes that an entry with this payload counts for in a message, in memory and in the
    /// uncommitted budget: the payload and a fixed share for the entry's header.
    #[must_use]
    pub fn bytes(&self) -> usize {
        ENTRY_HEADER
            + match self {
                Payload::Noop => 0,
                Payload::Command(command) => command.len(),
                Payload::Change(change) => change.steps.len() * 16 + change.context.len(),
            }
    }
}

impl Entry {
    /// The bytes that the entry counts for: see [`Payload::bytes`].
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.payload.bytes()
    }
}

/// The content of an entry.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Payload {
    /// The first entry of every new leader. Committing it commits everything before it (Raft §8).
    Noop,
    /// A command of the driver, opaque here.
    Command(Bytes),
    /// A change of the group's members. Boxed, because it is large and rare.
    Change(Box<ConfChange>),
}

/// A change of members. One step that touches at most one voter takes effect directly; anything
/// larger goes through a joint configuration (dissertation §4.3). A change without steps *leaves*
/// the joint configuration.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ConfChange {
    /// What changes, all at once.
    pub steps: Vec<ChangeStep>,
    /// How the joint configuration ends that these steps may lead into.
    pub leave: LeaveJoint,
    /// The driver's own data, carried along.
    pub context: Bytes,
}

/// One step of a change.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ChangeStep {
    /// A peer that votes and campaigns; promotes a learner.
    AddVoter(PeerId),
    /// A peer that only receives the log; demotes a voter.
    AddLearner(PeerId),
    /// A peer that votes and keeps the log, and stores no data. It leads only until
    /// it has brought a voter with data up to date.
    AddWitness(PeerId),
    /// Removes a peer, whatever its role.
    Remove(PeerId),
}

/// Whether the leader or the driver proposes the end of a joint configuration.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum LeaveJoint {
    /// The leader, as soon as it has applied the joint configuration.
    #[default]
    Auto,
    /// The driver, with a [`ConfChange`] without steps.
    Explicit,
}

/// The state that a peer must never forget. It is written with the entries of the same
/// [`crate::Ready`], in one atomic write.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct HardState {
    /// The latest term that this peer has seen.
    pub term: Term,
    /// The peer that it voted for in that term.
    pub vote: Option<PeerId>,
    /// The highest index that this peer knows to be committed.
    pub commit: LogIndex,
}

/// The point in the log that a snapshot stands for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SnapshotMeta {
    /// The last index whose effect the snapshot contains.
    pub index: LogIndex,
    /// The term of the entry at that index.
    pub term: Term,
    /// The members as of that index.
    pub configuration: Configuration,
}
