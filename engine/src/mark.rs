//! Whether the parts of a data directory belong together.
//!
//! `IDENT`, `kv/` and `log/` may lie on different disks, and be lost, restored from a copy or
//! exchanged one by one. A store that went on with only a part of its memory would break its
//! promises: votes and acknowledged writes. So each part carries a mark. The mark holds the owner,
//! a number drawn when the directory was first used, and the **generation**: how often the
//! directory was started. A start writes the next generation
//!
//! ```text
//! 1. into log/   (synced)      2. into kv/   (made durable)      3. into IDENT
//! ```
//!
//! so a crash between two steps leaves a part that is one generation *ahead* of `IDENT`, never a
//! part that is behind. A part that is behind is an old copy. Within a generation, `kv/` also
//! records how far the log had come when `kv/` was last made durable ([`Mark::log_sequence`]). A
//! log that ends before that is an old copy, too.
//!
//! No mark can show that a copy of the whole directory was put back. Only placement and the other
//! replicas, which remember the store, can find that out.

use bytes::{Buf, BufMut};

use crate::directory::Ident;

/// The first byte of a stored mark.
const FORMAT: u8 = 1;
const BYTES: usize = 1 + 5 * 8;

/// The record that one part of a data directory holds about itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    pub owner: Ident,
    /// Drawn at random when the directory was first used: two directories never share it.
    pub lineage: u64,
    /// How often the directory was started.
    pub generation: u64,
    /// The log's sequence number when the mark was written. The log reached at least this number.
    pub log_sequence: u64,
}

impl Mark {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(BYTES);
        out.push(FORMAT);
        for field in [
            self.owner.cluster_id,
            self.owner.store_id,
            self.lineage,
            self.generation,
            self.log_sequence,
        ] {
            out.put_u64(field);
        }
        out
    }

    /// Returns `None` for bytes that are no mark of this version.
    pub(crate) fn decode(mut stored: &[u8]) -> Option<Mark> {
        if stored.len() != BYTES || stored.get_u8() != FORMAT {
            return None;
        }
        let mut next = || stored.get_u64();
        Some(Mark {
            owner: Ident { cluster_id: next(), store_id: next() },
            lineage: next(),
            generation: next(),
            log_sequence: next(),
        })
    }
}

/// What is wrong with a part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The part holds nothing of the owner's: it was made anew.
    New,
    /// The part is from an earlier start than the rest.
    Older { generation: u64, newest: u64 },
    /// The log ends before a sequence number that a mark has recorded of it.
    Behind { sequence: u64, seen: u64 },
    /// The part was taken from another directory.
    Foreign { owner: Ident },
}

/// The parts of a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    Ident,
    Kv,
    Log,
}

/// Checks that three marks belong to one directory, and that no part is old. `sequence` is the
/// log's own.
pub(crate) fn check(
    ident: &Mark,
    kv: Option<&Mark>,
    log: Option<&Mark>,
    sequence: u64,
) -> Result<(), (Part, Fault)> {
    let log = log.ok_or((Part::Log, Fault::New))?;
    let kv = kv.ok_or((Part::Kv, Fault::New))?;
    for (part, mark) in [(Part::Log, log), (Part::Kv, kv)] {
        if (mark.owner, mark.lineage) != (ident.owner, ident.lineage) {
            return Err((part, Fault::Foreign { owner: mark.owner }));
        }
    }
    let newest = ident.generation.max(kv.generation).max(log.generation);
    let older = |generation| Fault::Older { generation, newest };
    // In the order in which a start writes them: log, kv, IDENT.
    if log.generation < newest {
        return Err((Part::Log, older(log.generation)));
    }
    if kv.generation < ident.generation || kv.generation + 1 < newest {
        return Err((Part::Kv, older(kv.generation)));
    }
    if ident.generation + 1 < newest {
        return Err((Part::Ident, older(ident.generation)));
    }
    let seen = kv.log_sequence.max(log.log_sequence).max(ident.log_sequence);
    if sequence < seen {
        return Err((Part::Log, Fault::Behind { sequence, seen }));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWNER: Ident = Ident { cluster_id: 7, store_id: 3 };

    fn mark(generation: u64) -> Mark {
        Mark { owner: OWNER, lineage: 9, generation, log_sequence: 0 }
    }

    fn at(ident: u64, kv: u64, log: u64) -> Result<(), (Part, Fault)> {
        check(&mark(ident), Some(&mark(kv)), Some(&mark(log)), 0)
    }

    #[test]
    fn a_start_that_a_crash_interrupted_is_whole_and_an_old_part_is_not() {
        for whole in [(4, 4, 4), (4, 4, 5), (4, 5, 5), (0, 0, 0), (0, 0, 1)] {
            assert_eq!(at(whole.0, whole.1, whole.2), Ok(()), "{whole:?}");
        }
        let older = |generation, newest| Fault::Older { generation, newest };
        assert_eq!(at(5, 5, 4), Err((Part::Log, older(4, 5))));
        assert_eq!(at(4, 5, 4), Err((Part::Log, older(4, 5))));
        assert_eq!(at(5, 4, 5), Err((Part::Kv, older(4, 5))));
        assert_eq!(at(5, 4, 6), Err((Part::Kv, older(4, 6))));
        assert_eq!(at(4, 4, 6), Err((Part::Kv, older(4, 6))));
        assert_eq!(at(3, 5, 5), Err((Part::Ident, older(3, 5))));
    }

    #[test]
    fn a_new_or_a_strangers_part_is_named() {
        let ours = mark(4);
        let stranger = Ident { cluster_id: 7, store_id: 5 };
        let foreign = Mark { owner: stranger, ..ours };
        assert_eq!(check(&ours, None, Some(&ours), 0), Err((Part::Kv, Fault::New)));
        assert_eq!(check(&ours, Some(&ours), None, 0), Err((Part::Log, Fault::New)));
        assert_eq!(
            check(&ours, Some(&ours), Some(&foreign), 0),
            Err((Part::Log, Fault::Foreign { owner: stranger }))
        );
        // The same ids, but another directory: an earlier life of the store.
        let earlier = Mark { lineage: 8, ..ours };
        assert_eq!(
            check(&ours, Some(&earlier), Some(&ours), 0),
            Err((Part::Kv, Fault::Foreign { owner: OWNER }))
        );
    }

    #[test]
    fn a_log_that_ends_before_what_was_seen_of_it_is_an_old_copy() {
        let seen = Mark { log_sequence: 100, ..mark(4) };
        assert_eq!(check(&mark(4), Some(&seen), Some(&mark(4)), 100), Ok(()));
        assert_eq!(
            check(&mark(4), Some(&seen), Some(&mark(4)), 99),
            Err((Part::Log, Fault::Behind { sequence: 99, seen: 100 }))
        );
    }

    #[test]
    fn a_mark_reads_back_and_other_bytes_are_none() {
        let stored = mark(4).encode();
        assert_eq!(Mark::decode(&stored), Some(mark(4)));
        assert_eq!(Mark::decode(&stored[1..]), None);
        assert_eq!(Mark::decode(b""), None);
    }
}
