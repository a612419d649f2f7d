//! The journal of shapes: what a store has acted on, and its key-value engine may still lose.
//!
//! The key-value engine has no WAL, so a crash takes its newest writes back. What was data comes
//! back from the Raft log. But a split, a change of members, an installed snapshot and a removed
//! peer are acted on: new peers vote, messages are acknowledged, logs are dropped. A crash must not
//! take those back, so each has a [`Note`] in the log engine, which is synced before anybody acts.
//! That costs the fsync of one small record, and no flush of the key-value engine.
//!
//! After a crash the key-value engine holds the state after some prefix of its writes, and perhaps
//! files that were ingested later. [`crate::recovery`] carries out again, in their order, the notes
//! that are not in that state. A note is dropped when a flush has made durable what it speaks of.

use std::collections::BTreeSet;

use bytes::{Buf, BufMut, Bytes};
use esker_engine::{LogBatch, LogEngine};
use esker_model::{Region, RegionId};
use esker_mutants::broken;
use esker_raft::{LogIndex, PeerId, Term};
use esker_rpc::proto::metapb;
use parking_lot::Mutex;
use prost::Message as _;

use crate::error::StoreError;
use crate::snapshot::ReceivedSnapshot;
use crate::state::Applied;

const FORMAT: u8 = 1;
const COMMITTED: u8 = 0;
const INSTALLING: u8 = 1;
const REMOVED: u8 = 2;

/// Notes that may wait for a flush before one is asked for.
pub const MAX_NOTES: u64 = 1 << 10;

/// What happened to the shape of a store's regions.
#[derive(Clone, Debug, PartialEq)]
pub enum Note {
    /// The region's shape changed with this entry, which is committed and in the log. What leads
    /// there is in the log, too.
    Committed { region: RegionId, index: LogIndex },
    /// A snapshot takes the place of the region's data. Its files stay until the note is dropped.
    Installing {
        region: Region,
        applied: Applied,
        files: String,
        /// What the region remembers of tagged writes, as the snapshot's message carried it.
        remembered: Bytes,
    },
    /// The region's peer left the store.
    Removed {
        /// The range that the peer had.
        region: Region,
        peer: PeerId,
        /// The region as the tombstone has it.
        tombstone: Region,
        applied: Applied,
    },
}

impl Note {
    pub fn region(&self) -> RegionId {
        match self {
            Note::Committed { region, .. } => *region,
            Note::Installing { region, .. } | Note::Removed { region, .. } => region.id,
        }
    }

    fn encode(&self) -> Vec<u8> {
        fn put(out: &mut Vec<u8>, part: &[u8]) {
            out.put_u32(u32::try_from(part.len()).expect("a part of a note is short"));
            out.put_slice(part);
        }
        let put_region = |out: &mut Vec<u8>, region: &Region| {
            put(out, &metapb::Region::from(region).encode_to_vec());
        };
        let mut out = vec![FORMAT];
        match self {
            Note::Committed { region, index } => {
                out.put_u8(COMMITTED);
                out.put_u64(region.0);
                out.put_u64(index.0);
            }
            Note::Installing { region, applied, files, remembered } => {
                out.put_u8(INSTALLING);
                put_region(&mut out, region);
                out.put_u64(applied.index.0);
                out.put_u64(applied.term.0);
                put(&mut out, files.as_bytes());
                put(&mut out, remembered);
            }
            Note::Removed { region, peer, tombstone, applied } => {
                out.put_u8(REMOVED);
                put_region(&mut out, region);
                out.put_u64(peer.0);
                put_region(&mut out, tombstone);
                out.put_u64(applied.index.0);
                out.put_u64(applied.term.0);
            }
        }
        out
    }

    fn decode(number: u64, mut stored: Bytes) -> Result<Note, StoreError> {
        let what = || format!("note {number} of the store's journal");
        let corrupt = |why: String| StoreError::Corrupt { what: what(), why };
        let short = |_| corrupt("it is cut short".into());
        let format = stored.try_get_u8().map_err(short)?;
        if format != FORMAT {
            let (found, known) = (format.into(), FORMAT.into());
            return Err(StoreError::Format { what: what(), found, known });
        }
        fn part(stored: &mut Bytes) -> Option<Bytes> {
            let length = stored.try_get_u32().ok()? as usize;
            (stored.len() >= length).then(|| stored.split_to(length))
        }
        let bytes =
            |stored: &mut Bytes| part(stored).ok_or_else(|| corrupt("it is cut short".into()));
        let region = |stored: &mut Bytes| {
            let region =
                metapb::Region::decode(bytes(stored)?).map_err(|e| corrupt(e.to_string()))?;
            Region::try_from(region).map_err(|e| corrupt(e.to_string()))
        };
        let applied = |stored: &mut Bytes| {
            let index = LogIndex(stored.try_get_u64().map_err(short)?);
            Ok::<_, StoreError>(Applied { index, term: Term(stored.try_get_u64().map_err(short)?) })
        };
        let note = match stored.try_get_u8().map_err(short)? {
            COMMITTED => Note::Committed {
                region: RegionId(stored.try_get_u64().map_err(short)?),
                index: LogIndex(stored.try_get_u64().map_err(short)?),
            },
            INSTALLING => Note::Installing {
                region: region(&mut stored)?,
                applied: applied(&mut stored)?,
                files: String::from_utf8(bytes(&mut stored)?.into())
                    .map_err(|e| corrupt(e.to_string()))?,
                remembered: bytes(&mut stored)?,
            },
            REMOVED => Note::Removed {
                region: region(&mut stored)?,
                peer: PeerId(stored.try_get_u64().map_err(short)?),
                tombstone: region(&mut stored)?,
                applied: applied(&mut stored)?,
            },
            unknown => return Err(corrupt(format!("its kind {unknown} is unknown"))),
        };
        Ok(note)
    }
}

/// The store's journal. The apply workers write it, the flusher shortens it.
pub struct Journal {
    log: LogEngine,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    /// The number of the next note.
    next: u64,
    /// The first note that was not dropped.
    first: u64,
    /// Notes that are not written yet, or whose changes of the key-value engine are not all made
    /// yet. No flush makes them durable.
    open: BTreeSet<u64>,
    /// Files of installed snapshots, by the note of the installation.
    files: Vec<(u64, ReceivedSnapshot)>,
}

/// A note whose change of the key-value engine is yet to be made.
#[must_use]
pub struct Intent(u64);

impl Journal {
    /// The journal as it is on the disk, with what it holds.
    ///
    /// # Errors
    /// When the disk fails, or a note cannot be read.
    pub fn open(log: LogEngine) -> Result<(Journal, Vec<Note>), StoreError> {
        let mut stored = Vec::new();
        log.notes(|number, note| stored.push((number, Bytes::copy_from_slice(note))))?;
        let first = stored.first().map_or(0, |(number, _)| *number);
        let next = stored.last().map_or(0, |(number, _)| number + 1);
        let notes = stored
            .into_iter()
            .map(|(number, note)| Note::decode(number, note))
            .collect::<Result<_, _>>()?;
        let inner = Mutex::new(Inner { next, first, ..Inner::default() });
        Ok((Journal { log, inner }, notes))
    }

    fn write_from(&self, first: u64, notes: &[Note]) -> Result<(), StoreError> {
        let is_left_out = |note: &Note| match note {
            Note::Committed { .. } => broken!(ShapeIsDurable),
            Note::Installing { .. } => broken!(InstallationIsNoted),
            Note::Removed { .. } => broken!(RemovalIsNoted),
        };
        let mut batch = LogBatch::new();
        for (number, note) in (first..).zip(notes).filter(|(_, note)| !is_left_out(note)) {
            batch.note(number, &note.encode());
        }
        Ok(self.log.write(&batch)?)
    }

    /// Notes what was written to the key-value engine before this call, durably.
    pub fn write(&self, notes: &[Note]) -> Result<(), StoreError> {
        let numbers = {
            let mut inner = self.inner.lock();
            let first = inner.next;
            inner.next += notes.len() as u64;
            let numbers = first..inner.next;
            // A note that is yet to be written must not be dropped before.
            inner.open.extend(numbers.clone());
            numbers
        };
        self.write_from(numbers.start, notes)?;
        self.inner.lock().open.retain(|number| !numbers.contains(number));
        Ok(())
    }

    /// Notes durably what is about to be done to the key-value engine.
    pub fn intend(&self, note: Note) -> Result<Intent, StoreError> {
        let number = {
            let mut inner = self.inner.lock();
            let number = inner.next;
            inner.next += 1;
            if !broken!(OpenNoteIsKept) {
                inner.open.insert(number);
            }
            number
        };
        self.write_from(number, &[note])?;
        Ok(Intent(number))
    }

    /// What was intended is in the key-value engine. The files are needed until it is durable.
    pub fn done(&self, intent: Intent, files: ReceivedSnapshot) {
        let mut inner = self.inner.lock();
        inner.open.remove(&intent.0);
        if broken!(FilesWaitForFlush) {
            files.discard();
        }
        inner.files.push((intent.0, files));
    }

    /// The notes below this number speak of what a flush that begins now makes durable.
    pub fn covered(&self) -> u64 {
        let inner = self.inner.lock();
        inner.open.first().copied().unwrap_or(inner.next)
    }

    /// How many notes wait for a flush, and whether files wait with them.
    pub fn waiting(&self) -> (u64, bool) {
        let inner = self.inner.lock();
        (inner.next - inner.first, !inner.files.is_empty())
    }

    /// Drops the notes below a number, and the files that they needed.
    pub fn forget(&self, covered: u64) -> Result<(), StoreError> {
        let (first, files) = {
            let mut inner = self.inner.lock();
            let first = inner.first.min(covered);
            inner.first = inner.first.max(covered);
            let (gone, left): (Vec<_>, Vec<_>) = std::mem::take(&mut inner.files)
                .into_iter()
                .partition(|(number, _)| *number < covered);
            inner.files = left;
            (first, gone)
        };
        self.log.forget_notes(first, covered)?;
        if !broken!(InstalledFilesAreRemoved) {
            for (_, files) in files {
                files.discard();
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use esker_engine::{EngineOptions, MemoryEnv};
    use esker_model::KeyRange;

    use super::*;

    fn journal() -> (LogEngine, Journal) {
        let options = EngineOptions::in_memory(MemoryEnv::new());
        let log = LogEngine::open(Path::new("/log"), &options).unwrap();
        let (journal, notes) = Journal::open(log.clone()).unwrap();
        assert!(notes.is_empty());
        (log, journal)
    }

    fn no_files() -> ReceivedSnapshot {
        ReceivedSnapshot::from_record(Path::new("/snap"), "7:").unwrap()
    }

    fn committed(index: u64) -> Note {
        Note::Committed { region: RegionId(7), index: LogIndex(index) }
    }

    #[test]
    fn a_note_that_is_yet_to_be_carried_out_is_not_covered_by_a_flush_that_begins() {
        let (log, journal) = journal();
        journal.write(&[committed(6)]).unwrap();
        let intent = journal.intend(committed(7)).unwrap();
        journal.write(&[committed(8)]).unwrap();
        let covered = journal.covered();
        journal.done(intent, no_files());
        journal.forget(covered).unwrap();
        let (again, left) = Journal::open(log.clone()).unwrap();
        assert_eq!(left, [committed(7), committed(8)]);
        assert_eq!(again.waiting().0, 2);
        // The files go with the note that needs them.
        assert!(journal.waiting().1);
        journal.forget(journal.covered()).unwrap();
        assert_eq!(journal.waiting(), (0, false));
        assert!(Journal::open(log).unwrap().1.is_empty());
    }

    fn region(id: u64) -> Region {
        let range = KeyRange::new(Bytes::new(), Some(Bytes::from_static(b"m"))).unwrap();
        Region { range, ..Region::uninitialized(RegionId(id)) }
    }

    #[test]
    fn notes_read_back_as_written_and_cut_or_of_another_format_are_refused() {
        let applied = Applied { index: LogIndex(9), term: Term(7) };
        let notes = [
            Note::Committed { region: RegionId(7), index: LogIndex(12) },
            Note::Installing {
                region: region(7),
                applied,
                files: "7-from-2-0:0,2".into(),
                remembered: Bytes::from_static(b"remembered"),
            },
            Note::Removed { region: region(7), peer: PeerId(3), tombstone: region(7), applied },
        ];
        for note in notes {
            let stored = Bytes::from(note.encode());
            assert_eq!(Note::decode(1, stored.clone()).unwrap(), note);
            for length in 0..stored.len() {
                let cut = Note::decode(1, stored.slice(..length)).unwrap_err().to_string();
                assert!(cut.contains("note 1 of the store's journal"), "{cut}");
            }
            let mut other = stored.to_vec();
            other[0] = 9;
            let error = Note::decode(1, other.into()).unwrap_err().to_string();
            assert!(error.contains("format 9"), "{error}");
        }
    }
}
