//! What a broken promise looks like.

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
    /// A vote, or the wish for one, is durable before anybody hears of it.
    VotesAreDurable,
    /// An index and a term stand for one entry, with one entry before it.
    LogsMatch,
    /// What is acknowledged is on the disk, and is what the leader has.
    AcknowledgedIsDurable,
    /// What is committed is on the disks of every majority that is needed.
    CommittedIsOnMajorities,
    /// A leader counts only entries of its own term.
    CommitsOwnTermOnly,
    /// One entry is committed at an index.
    OneEntryCommitted,
    /// The commit index does not fall while a peer runs.
    CommitNeverFalls,
    /// A leader has everything that was committed in earlier terms.
    LeaderIsComplete,
    /// What is handed out to be applied is committed, and durable here.
    AppliedIsDurable,
    /// All state machines apply one history.
    OneHistory,
    /// A write that was acknowledged stays.
    AcknowledgedStays,
    /// No operation sees less than one that ended before it began.
    Linearizable,
    /// A read waits for everything that was committed when it began.
    ReadsAreFresh,
    /// While a leader holds a lease, nobody else commits.
    LeaseExcludesOthers,
    /// Majorities of neighbouring configurations meet, and all peers see the same.
    ConfigurationsOverlap,
    /// One change of members at a time.
    OneChangeAtATime,
    /// Who may win an election is at most one change behind.
    CandidatesKnowMembers,
    /// A snapshot stands for committed state.
    SnapshotsAreCommitted,
    /// A peer takes what a correct peer sends.
    MessagesAreTaken,
    /// What is sent can be read.
    MessagesAreReadable,
    /// When faults stop, the group works again before long.
    Recovers,
    /// Nothing panics: where it did, and the first line of what it said.
    NoPanic {
        /// File and line.
        place: String,
    },
}

impl Promise {
    /// What it is called, without the place of a panic.
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

/// What most of this package returns.
pub type Checked<T = ()> = Result<T, Violation>;

/// Fails with this sentence unless the promise is kept.
pub fn ensure(kept: bool, promise: Promise, sentence: impl FnOnce() -> String) -> Checked {
    if kept { Ok(()) } else { Err(Violation { promise, sentence: sentence() }) }
}

thread_local! {
    /// What this thread's latest caught panic said; `None` while none is caught.
    static CAUGHT: RefCell<Option<Option<Violation>>> = const { RefCell::new(None) };
}

/// Runs `body`; a panic in it, of the core or of what drives it, is a violation
/// like any other, and is not printed.
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
