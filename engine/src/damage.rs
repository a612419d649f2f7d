//! Notice that stored bytes are not what was written.
//!
//! A reader of a block that does not match its checksum gets an error: a client's read, a snapshot
//! being sent, an entry being applied. But the whole store must stop, because the next read could
//! hit the next bad block. So each engine keeps its first such finding and calls the listeners that
//! were registered for it.

use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;

type Listener = Box<dyn FnOnce(&str) + Send>;

/// Whether an engine has found its data damaged. Clones share the finding.
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
    /// The first finding, which names the file or entry.
    pub fn found(&self) -> Option<&str> {
        self.inner.found.get().map(String::as_str)
    }

    /// Calls `listener` once, with what was found: immediately, if damage was found before.
    /// Otherwise the thread that finds the damage calls it. The listener must not block.
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

    /// Keeps only the first finding.
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
