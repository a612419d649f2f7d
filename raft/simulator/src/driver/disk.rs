//! What survives a crash.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;

use bytes::Bytes;
use esker_raft::{
    Configuration, Entries, Entry, HardState, LogIndex, LogReadError, LogReader, Payload, Restored,
    Term,
};

/// Consecutive entries, after the point up to which the log was dropped.
#[derive(Clone, Debug, Default)]
pub struct EntryLog {
    compacted: (LogIndex, Term),
    entries: VecDeque<Entry>,
}

impl EntryLog {
    /// An empty log that continues after this index and its term.
    pub fn after(compacted: (LogIndex, Term)) -> Self {
        EntryLog { compacted, entries: VecDeque::new() }
    }

    /// The last index that the log no longer has, and its term.
    pub fn compacted(&self) -> (LogIndex, Term) {
        self.compacted
    }

    /// The last index, and its term.
    pub fn last(&self) -> (LogIndex, Term) {
        self.entries.back().map_or(self.compacted, |entry| (entry.index, entry.term))
    }

    /// The position of `index` among the entries, which may be past their end.
    fn position(&self, index: LogIndex) -> Option<usize> {
        usize::try_from(index.0.checked_sub(self.compacted.0.0 + 1)?).ok()
    }

    /// The entry at `index`.
    pub fn get(&self, index: LogIndex) -> Option<&Entry> {
        self.entries.get(self.position(index)?)
    }

    /// The term at `index`, also at the point up to which entries were dropped.
    pub fn term(&self, index: LogIndex) -> Option<Term> {
        if index == self.compacted.0 {
            return Some(self.compacted.1);
        }
        self.get(index).map(|entry| entry.term)
    }

    /// Every entry, in order.
    pub fn iter(&self) -> impl Iterator<Item = &Entry> {
        self.entries.iter()
    }

    /// Entries from `low` on.
    fn from(&self, low: LogIndex) -> impl Iterator<Item = &Entry> {
        let skipped = self.position(low).unwrap_or(0).min(self.entries.len());
        self.entries.range(skipped..)
    }

    /// Appends entries. They replace the entries from the first one's index on.
    pub fn write(&mut self, entries: impl IntoIterator<Item = Entry>) {
        for entry in entries {
            let keep = self.position(entry.index);
            let keep = keep.expect("what was dropped from the log is not written again");
            assert!(
                keep <= self.entries.len(),
                "entry {} would leave a hole in the log",
                entry.index
            );
            self.entries.truncate(keep);
            self.entries.push_back(entry);
        }
    }

    /// Drops everything after `index`.
    fn truncate(&mut self, index: LogIndex) {
        self.entries.truncate(self.position(index.next()).unwrap_or(0));
    }

    /// Drops everything up to `index`; the entry there must exist.
    fn drop_to(&mut self, index: LogIndex) -> Option<Term> {
        let term = self.get(index)?.term;
        let dropped = self.position(index)? + 1;
        self.entries.drain(..dropped);
        self.compacted = (index, term);
        Some(term)
    }
}

/// A state machine that remembers only a digest of everything that it applied. Two machines that
/// applied different histories differ forever.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Machine {
    pub index: LogIndex,
    pub term: Term,
    pub digest: u64,
    /// A witness has no data, and nor has a peer that was one.
    pub has_data: bool,
    pub configuration: Configuration,
}

impl Machine {
    pub fn apply(&mut self, entry: &Entry) {
        assert_eq!(entry.index, self.index.next(), "entries are applied once and in order");
        self.index = entry.index;
        self.term = entry.term;
        if self.has_data {
            self.digest = digest(self.digest ^ entry.term.0, &entry.payload);
        }
    }

    /// The data of a snapshot.
    pub fn encode(&self) -> Bytes {
        Bytes::copy_from_slice(&self.digest.to_le_bytes())
    }
}

/// The digest of a history that continues with this entry.
fn digest(before: u64, payload: &Payload) -> u64 {
    match payload {
        Payload::Command(command) => mix_all(before, command),
        other => {
            let mut bytes = Vec::new();
            other.encode(&mut bytes);
            mix_all(before ^ 1, &bytes)
        }
    }
}

fn mix_all(before: u64, bytes: &[u8]) -> u64 {
    let mut digest = mix(before, bytes.len() as u64);
    let mut words = bytes.chunks_exact(8);
    for word in &mut words {
        digest = mix(digest, u64::from_le_bytes(word.try_into().expect("eight bytes")));
    }
    words.remainder().iter().fold(digest, |digest, byte| mix(digest, u64::from(*byte)))
}

/// Mixes one word into the digest of the history before, by multiplying and folding.
fn mix(before: u64, word: u64) -> u64 {
    let wide = u128::from(before ^ 0x9e37_79b9_7f4a_7c15)
        .wrapping_mul(u128::from(word ^ 0xa076_1d64_78bd_642f) | 1);
    (wide as u64) ^ ((wide >> 64) as u64).rotate_left(23)
}

/// The durable state of one peer.
#[derive(Clone, Debug, Default)]
pub struct Disk {
    pub hard_state: HardState,
    pub log: EntryLog,
    /// The state machine as of its last sync, which may be long ago.
    pub machine: Machine,
}

impl Disk {
    pub fn shared(self) -> Rc<RefCell<Disk>> {
        Rc::new(RefCell::new(self))
    }

    /// The restored state that the core gets at a start.
    pub fn restored(&self) -> Restored {
        Restored {
            hard_state: self.hard_state,
            configuration: self.machine.configuration.clone(),
            compacted: self.log.compacted(),
            last: self.log.last(),
            applied: self.machine.index,
        }
    }

    /// Writes everything atomically.
    pub fn write(&mut self, hard_state: Option<HardState>, entries: &Entries) {
        if let Some(state) = hard_state {
            self.hard_state = state;
        }
        self.log.write(entries.iter().cloned());
    }

    /// Breaks the disk's promise: the durable entries after `index` are gone.
    pub fn lose(&mut self, index: LogIndex) {
        self.log.truncate(index);
    }

    pub fn compact(&mut self, index: LogIndex) -> Option<Term> {
        assert!(index <= self.machine.index, "only what the machine has synced may be dropped");
        self.log.drop_to(index)
    }

    pub fn install(&mut self, machine: Machine) {
        self.log = EntryLog::after((machine.index, machine.term));
        self.machine = machine;
    }
}

/// The disk as the core borrows it. It has only durable entries, so that a core that reads back
/// entries which it never saved is detected.
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
        if low <= disk.log.compacted().0 {
            return Err(LogReadError::Compacted { index: low });
        }
        let (mut bytes, mut found) = (0, Vec::new());
        for entry in disk.log.from(low).take_while(|entry| entry.index < high) {
            bytes += entry.bytes();
            if bytes > max_bytes && !found.is_empty() {
                break;
            }
            found.push(entry.clone());
        }
        Ok(found)
    }

    fn term(&self, index: LogIndex) -> Result<Option<Term>, LogReadError> {
        Ok(self.0.borrow().log.term(index))
    }
}
