//! What survives a crash.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use bytes::Bytes;
use esker_raft::{
    Configuration, Entries, Entry, HardState, LogIndex, LogReadError, LogReader, Restored, Term,
};

/// A state machine that remembers only a digest of everything it applied: two
/// that applied different histories differ forever.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Machine {
    pub index: LogIndex,
    pub term: Term,
    pub digest: u64,
    pub configuration: Configuration,
}

impl Machine {
    pub fn apply(&mut self, entry: &Entry) {
        assert_eq!(entry.index, self.index.next(), "entries are applied once and in order");
        let mut bytes = Vec::new();
        entry.payload.encode(&mut bytes);
        bytes.extend(entry.term.0.to_le_bytes());
        // FNV-1a, continued from the history before.
        let mut digest = self.digest ^ 0xcbf2_9ce4_8422_2325;
        for byte in bytes {
            digest = (digest ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
        self.digest = digest;
        self.index = entry.index;
        self.term = entry.term;
    }

    pub fn encode(&self) -> Bytes {
        Bytes::copy_from_slice(&self.digest.to_le_bytes())
    }
}

/// The durable state of one peer.
#[derive(Clone, Debug, Default)]
pub struct Disk {
    pub hard_state: HardState,
    pub log: BTreeMap<LogIndex, Entry>,
    pub compacted: (LogIndex, Term),
    /// The state machine as of its last sync, which may be long ago.
    pub machine: Machine,
}

impl Disk {
    pub fn shared(self) -> Rc<RefCell<Disk>> {
        Rc::new(RefCell::new(self))
    }

    pub fn restored(&self) -> Restored {
        let last = self.log.values().next_back();
        Restored {
            hard_state: self.hard_state,
            configuration: self.machine.configuration.clone(),
            compacted: self.compacted,
            last: last.map_or(self.compacted, |entry| (entry.index, entry.term)),
            applied: self.machine.index,
        }
    }

    /// One atomic write.
    pub fn write(&mut self, hard_state: Option<HardState>, entries: Entries) {
        if let Some(state) = hard_state {
            self.hard_state = state;
        }
        if let Some(first) = entries.first() {
            self.log.split_off(&first.index);
        }
        for entry in entries.iter().cloned() {
            let before = entry.index.prev();
            assert!(
                before == self.compacted.0 || self.log.contains_key(&before),
                "entry {} would leave a hole in the log",
                entry.index
            );
            self.log.insert(entry.index, entry);
        }
    }

    pub fn compact(&mut self, index: LogIndex) -> Option<Term> {
        assert!(index <= self.machine.index, "only what the machine has synced may be dropped");
        let term = self.log.get(&index)?.term;
        self.log = self.log.split_off(&index.next());
        self.compacted = (index, term);
        Some(term)
    }

    /// Breaks its promise: what was durable after `index` is gone.
    pub fn lose(&mut self, index: LogIndex) {
        self.log.split_off(&index.next());
    }

    pub fn install(&mut self, machine: Machine) {
        self.log.clear();
        self.compacted = (machine.index, machine.term);
        self.machine = machine;
    }
}

/// The disk as the core borrows it: durable entries and no others, so that a core
/// that reads back what it never saved is found out.
#[derive(Clone, Debug)]
pub struct Borrowed(pub Rc<RefCell<Disk>>);

impl LogReader for Borrowed {
    fn entries(
        &self,
        low: LogIndex,
        high: LogIndex,
        max_bytes: usize,
    ) -> Result<Vec<Entry>, LogReadError> {
        let disk = self.0.borrow();
        if low <= disk.compacted.0 {
            return Err(LogReadError::Compacted { index: low });
        }
        let (mut bytes, mut found) = (0, Vec::new());
        for (_, entry) in disk.log.range(low..high) {
            bytes += entry.bytes();
            if bytes > max_bytes && !found.is_empty() {
                break;
            }
            found.push(entry.clone());
        }
        Ok(found)
    }

    fn term(&self, index: LogIndex) -> Result<Option<Term>, LogReadError> {
        let disk = self.0.borrow();
        if index == disk.compacted.0 {
            return Ok(Some(disk.compacted.1));
        }
        Ok(disk.log.get(&index).map(|entry| entry.term))
    }
}
