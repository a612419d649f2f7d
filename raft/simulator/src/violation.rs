//! The promises, and how a broken one is reported.

use std::cell::RefCell;
use std::fmt;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Once;

/// A promise of the protocol, or of this core.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Promise {
    /// A term has at most one leader.
    OneLeaderPerTerm,
    /// A leader has the durable votes of every majority it needs.
    ElectedByMajorities,
    /// A peer gives one vote in a term.
    OneVotePerTerm,
    /// A vote, or a candidacy, is durable before its message is sent.
    VotesAreDurable,
    /// An index and a term stand for one entry, which follows one entry.
    LogsMatch,
    /// An acknowledged entry is on the disk, and equals the leader's.
    AcknowledgedIsDurable,
    /// A committed entry is on the disks of every majority that is needed.
    CommittedIsOnMajorities,
    /// A leader counts replicas only of entries of its own term.
    CommitsOwnTermOnly,
    /// One entry is committed at an index.
    OneEntryCommitted,
    /// The commit index does not fall while a peer runs.
    CommitNeverFalls,
    /// A leader has everything that was committed in earlier terms.
    LeaderIsComplete,
    /// An entry that is handed out to be applied is committed, and durable on that peer.
    AppliedIsDurable,
    /// All state machines apply one history.
    OneHistory,
    /// A write that was acknowledged stays.
    AcknowledgedStays,
    /// No operation sees less than one that ended before it began.
    Linearizable,
    /// A read waits for everything that was committed when it began.
    ReadsAreFresh,
    /// While a leader holds a lease, no other leader commits.
    LeaseExcludesOthers,
    /// Majorities of neighbouring configurations share a voter, and all peers see the same
    /// configurations.
    ConfigurationsOverlap,
    /// One change of members at a time.
    OneChangeAtATime,
    /// A peer that may win an election is at most one change behind.
    CandidatesKnowMembers,
    /// A snapshot stands for committed state.
    SnapshotsAreCommitted,
    /// A peer accepts every message of a correct peer.
    MessagesAreTaken,
    /// Every message that is sent can be decoded.
    MessagesAreReadable,
    /// When faults stop, the group works again within a bounded time.
    Recovers,
    /// Nothing panics. The violation has the place of the panic and the first line of its message.
    NoPanic {
        /// File and line.
        place: String,
    },
}

impl Promise {
    /// The promise's name, without the place of a panic.
    pub fn name(&self) -> String {
        let name = format!("{self:?}");
        name.split(' ').next().unwrap_or_default().to_owned()
    }
}

/// A broken promise, in a sentence.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Violation {
    pub promise: Promise,
    pub sentence: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.promise.name(), self.sentence)
    }
}

impl std::error::Error for Violation {}

/// The result of most functions in this package.
pub type Checked<T = ()> = Result<T, Violation>;

/// Returns a violation with this sentence unless the promise is kept.
pub fn ensure(kept: bool, promise: Promise, sentence: impl FnOnce() -> String) -> Checked {
    if kept { Ok(()) } else { Err(Violation { promise, sentence: sentence() }) }
}

thread_local! {
    /// This thread's latest caught panic; `None` while panics are not caught.
    static CAUGHT: RefCell<Option<Option<Violation>>> = const { RefCell::new(None) };
}

/// Runs `body`. A panic in it, of the core or of its driver, is a violation like any other, and is
/// not printed.
pub fn catching<T>(body: impl FnOnce() -> Checked<T>) -> Checked<T> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let usual = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            let ours = CAUGHT.with_borrow_mut(|caught| match caught {
                Some(slot) => {
                    *slot = Some(panicked(info));
                    true
                }
                None => false,
            });
            if !ours {
                usual(info);
            }
        }));
    });
    let before = CAUGHT.replace(Some(None));
    let result = panic::catch_unwind(AssertUnwindSafe(body));
    let caught = CAUGHT.replace(before).flatten();
    result.unwrap_or_else(|_| {
        let place = "an unknown place".into();
        let unknown = Violation { promise: Promise::NoPanic { place }, sentence: "?".into() };
        Err(caught.unwrap_or(unknown))
    })
}

fn panicked(info: &panic::PanicHookInfo<'_>) -> Violation {
    let said = info.payload();
    let said = said.downcast_ref::<&str>().copied().map(str::to_owned);
    let said = said.or_else(|| info.payload().downcast_ref::<String>().cloned());
    let said = said.unwrap_or_default();
    let sentence = said.lines().next().unwrap_or_default().to_owned();
    let place = info.location().map(ToString::to_string).unwrap_or_default();
    let sentence = format!("{sentence} ({place})");
    Violation { promise: Promise::NoPanic { place }, sentence }
}
