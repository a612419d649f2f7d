//! What happened, in order, and the first promise that was broken.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::time::Instant;

/// Something that must not happen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Which promise, in a few words that are the same whenever it is broken.
    pub promise: &'static str,
    pub what: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.promise, self.what)
    }
}

/// What happened in one simulation. Clones are the same journal.
#[derive(Clone)]
pub struct Journal(Arc<Mutex<Inner>>);

struct Inner {
    began: Instant,
    /// Whether each line is printed.
    tells: bool,
    /// Of all lines.
    hash: u64,
    violation: Option<Violation>,
    counts: Counts,
}

/// How often things happened, by what they are.
pub type Counts = BTreeMap<String, u64>;

impl Journal {
    /// Prints what happens, or does not.
    pub fn new(began: Instant, tells: bool) -> Journal {
        let counts = Counts::new();
        let inner = Inner { began, tells, hash: 0, violation: None, counts };
        Journal(Arc::new(Mutex::new(inner)))
    }

    pub fn note(&self, who: impl fmt::Display, what: impl fmt::Display) {
        let mut inner = self.0.lock();
        let at = inner.began.elapsed();
        let line =
            format!("{:>4}.{:03} {:<9} {what}", at.as_secs(), at.subsec_millis(), who.to_string());
        // FNV-1a: the same on every machine.
        let mut hash = inner.hash ^ 0xcbf2_9ce4_8422_2325;
        for byte in line.bytes() {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
        inner.hash = hash;
        if inner.tells {
            println!("{line}");
        }
    }

    /// The first one is remembered.
    pub fn violated(&self, promise: &'static str, what: impl Into<String>) {
        let what = what.into();
        self.note("VIOLATION", format_args!("{promise}: {what}"));
        self.0.lock().violation.get_or_insert(Violation { promise, what });
    }

    /// Something took effect without which a simulation would prove less.
    pub fn count(&self, what: &str) {
        *self.0.lock().counts.entry(what.to_owned()).or_default() += 1;
    }

    pub fn counts(&self) -> Counts {
        self.0.lock().counts.clone()
    }

    pub fn violation(&self) -> Option<Violation> {
        self.0.lock().violation.clone()
    }

    /// A number that is the same for the same lines.
    pub fn hash(&self) -> u64 {
        self.0.lock().hash
    }
}

thread_local! {
    /// The first panic of this thread, of whatever task.
    static PANIC: RefCell<Option<String>> = const { RefCell::new(None) };
    static WATCHED: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// From now on panics of this thread are remembered instead of printed: a task that panics ends
/// without a word to anybody.
pub fn watch_panics() {
    static HOOK: std::sync::Once = std::sync::Once::new();
    HOOK.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if !WATCHED.get() {
                return usual(panic);
            }
            PANIC.with_borrow_mut(|first| {
                first.get_or_insert_with(|| panic.to_string());
            });
        }));
    });
    WATCHED.set(true);
    PANIC.with_borrow_mut(Option::take);
}

/// The first panic since, if there was one.
pub fn panicked() -> Option<String> {
    PANIC.with_borrow(Clone::clone)
}
