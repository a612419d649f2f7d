//! The news that stored bytes are not what was written.
//!
//! Whoever reads the block that does not match its checksum, a client's read, a snapshot
//! on its way, an entry being applied, gets an error. But it is the store that must stop:
//! the next read would find the next block. So each engine keeps the first such finding,
//! and tells those who asked to be told.

use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;

type Listener = Box<dyn FnOnce(&str) + Send>;

/// Whether an engine has found its data damaged; clones are the same finding.
#[derive(Clone, Default)]
pub struct Damage {
    inner: Arc<Inner>,
}

#[derive(Default)]
struct Inner {
    found: OnceLock<String>,
    listeners: Mutex<Vec<Listener>>,
}

impl Damage {
    /// What was found first, by file or entry.
    pub fn found(&self) -> Option<&str> {
        self.inner.found.get().map(String::as_str)
    }

    /// Calls `listener` once, with what was found: now, if that was before. It is called on
    /// the thread of whoever found it and must not block.
    pub fn on_found(&self, listener: impl FnOnce(&str) + Send + 'static) {
        let mut listeners = self.inner.listeners.lock();
        match self.inner.found.get() {
            Some(what) => {
                drop(listeners);
                listener(what);
            }
            None => listeners.push(Box::new(listener)),
        }
    }

    /// The first finding counts.
    pub(crate) fn report(&self, what: &str) {
        let listeners = {
            let mut listeners = self.inner.listeners.lock();
            if self.inner.found.set(what.to_owned()).is_err() {
                return;
            }
            std::mem::take(&mut *listeners)
        };
        for listener in listeners {
            listener(what);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everybody_who_asked_is_told_once_of_the_first_finding() {
        let damage = Damage::default();
        let told = Arc::new(Mutex::new(Vec::new()));
        let listen = |name: &'static str| {
            let told = told.clone();
            damage.on_found(move |what| told.lock().push(format!("{name}: {what}")));
        };
        listen("early");
        assert_eq!(damage.found(), None);
        damage.report("7.sst");
        damage.report("8.sst");
        listen("late");
        assert_eq!(damage.found(), Some("7.sst"));
        assert_eq!(*told.lock(), ["early: 7.sst", "late: 7.sst"]);
    }
}
