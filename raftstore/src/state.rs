//! What a store remembers of its regions, and how it is written.
//!
//! In the `kv` engine, column family `meta`, beside the data it describes:
//!
//! ```text
//! 'r' region  → format, state, descriptor      what the region is
//! 'a' region  → format, applied index and term how far the data is
//! 'i' region  → the same                       the snapshot that was installed last
//! ```
//!
//! In the `log` engine, one record a group beside its entries: whose it is, term, vote,
//! commit index, the end of the truncated prefix, and the last index.
//!
//! The `kv` engine may lose what it was last told; what is left is a consistent
//! earlier state, and the log holds all that is needed to redo the rest. Three
//! rules make that true. The applied index is written with the data it speaks of.
//! A change of the regions themselves (split, membership, snapshot, removal) is in
//! the journal (`journal.rs`) before anything acts on it. And the log is shortened
//! only behind an applied index that is durable.

use bytes::{Buf, BufMut, Bytes};
use esker_engine::{Cf, KvBatch, KvEngine, KvSnapshot, LogBatch, LogEngine};
use esker_model::{KeyRange, Region, RegionId, StoreId};
use esker_raft::{Entry, HardState, LogIndex, Payload, PeerId, Term};
use esker_rpc::proto::metapb;
use prost::Message as _;

use crate::config::{INITIAL_INDEX, INITIAL_TERM};
use crate::error::StoreError;

const FORMAT: u8 = 2;
const REGION_PREFIX: u8 = b'r';
const APPLY_PREFIX: u8 = b'a';
const INSTALLED_PREFIX: u8 = b'i';
const KEY_BYTES: usize = 9;

fn key(prefix: u8, region: RegionId) -> [u8; KEY_BYTES] {
    let mut key = [prefix; KEY_BYTES];
    key[1..].copy_from_slice(&region.0.to_be_bytes());
    key
}

fn corrupt(what: &str, region: RegionId, why: impl ToString) -> StoreError {
    StoreError::Corrupt { what: format!("the {what} of region {region}"), why: why.to_string() }
}

fn check_format(what: &str, region: RegionId, stored: &mut &[u8]) -> Result<(), StoreError> {
    match stored.first() {
        Some(&FORMAT) => {
            stored.advance(1);
            Ok(())
        }
        Some(&found) => Err(StoreError::Format {
            what: format!("the {what} of region {region}"),
            found: found.into(),
            known: FORMAT.into(),
        }),
        None => Err(corrupt(what, region, "it is empty")),
    }
}

/// A range's bounds as the engine takes them.
pub fn bounds(range: &KeyRange) -> (&[u8], Option<&[u8]>) {
    (range.start(), range.end().map(|end| &end[..]))
}

/// What a store holds of a region.
#[derive(Clone, Debug, PartialEq)]
pub enum RegionState {
    Normal(Region),
    /// The peer was removed. The record outlives the data, so that a message
    /// that was long under way does not bring the peer back, and so that a peer
    /// which waits for the vote of this one learns how far it knew to be committed.
    Tombstone {
        region: Region,
        /// The peer that was removed. A region's peers on one store have ever larger ids.
        peer: PeerId,
        applied: Applied,
    },
}

impl RegionState {
    fn encode(&self) -> Vec<u8> {
        let mut out = vec![FORMAT];
        let region = match self {
            RegionState::Normal(region) => {
                out.push(0);
                region
            }
            RegionState::Tombstone { region, peer, applied } => {
                out.push(2);
                out.put_u64(applied.index.0);
                out.put_u64(applied.term.0);
                out.put_u64(peer.0);
                region
            }
        };
        out.extend_from_slice(&metapb::Region::from(region).encode_to_vec());
        out
    }

    fn decode(id: RegionId, mut stored: &[u8]) -> Result<Self, StoreError> {
        const WHAT: &str = "descriptor";
        check_format(WHAT, id, &mut stored)?;
        let short = || corrupt(WHAT, id, "it is cut short");
        let kind = stored.try_get_u8().map_err(|_| short())?;
        let mut removed = None;
        if kind == 2 {
            let index = LogIndex(stored.try_get_u64().map_err(|_| short())?);
            let term = Term(stored.try_get_u64().map_err(|_| short())?);
            let peer = PeerId(stored.try_get_u64().map_err(|_| short())?);
            removed = Some((peer, Applied { index, term }));
        }
        let region = metapb::Region::decode(stored).map_err(|e| corrupt(WHAT, id, e))?;
        let region = Region::try_from(region).map_err(|e| corrupt(WHAT, id, e))?;
        match (kind, removed) {
            (0, None) => Ok(RegionState::Normal(region)),
            (2, Some((peer, applied))) => Ok(RegionState::Tombstone { region, peer, applied }),
            _ => Err(corrupt(WHAT, id, format!("unknown state {kind}"))),
        }
    }
}

/// How far a region's data is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Applied {
    pub index: LogIndex,
    pub term: Term,
}

impl Applied {
    /// What a region starts with.
    pub const INITIAL: Applied =
        Applied { index: LogIndex(INITIAL_INDEX), term: Term(INITIAL_TERM) };

    fn encode(self) -> [u8; 17] {
        let mut out = [FORMAT; 17];
        out[1..9].copy_from_slice(&self.index.0.to_be_bytes());
        out[9..].copy_from_slice(&self.term.0.to_be_bytes());
        out
    }

    fn decode(id: RegionId, mut stored: &[u8]) -> Result<Self, StoreError> {
        const WHAT: &str = "applied index";
        check_format(WHAT, id, &mut stored)?;
        let mut next = || stored.try_get_u64().map_err(|e| corrupt(WHAT, id, e));
        Ok(Applied { index: LogIndex(next()?), term: Term(next()?) })
    }
}

pub fn put_region(batch: &mut KvBatch, id: RegionId, state: &RegionState) {
    batch.put(Cf::Meta, &key(REGION_PREFIX, id), &state.encode());
}

pub fn put_applied(batch: &mut KvBatch, id: RegionId, applied: Applied) {
    batch.put(Cf::Meta, &key(APPLY_PREFIX, id), &applied.encode());
}

/// The region's data came whole, as of `applied`: the log need not have what led there.
pub fn put_installed(batch: &mut KvBatch, id: RegionId, applied: Applied) {
    batch.put(Cf::Meta, &key(INSTALLED_PREFIX, id), &applied.encode());
    put_applied(batch, id, applied);
}

/// Where the snapshot was that was installed last, if ever one was.
pub fn installed(kv: &KvEngine, id: RegionId) -> Result<Option<Applied>, StoreError> {
    let stored = kv.get(Cf::Meta, &key(INSTALLED_PREFIX, id))?;
    stored.map(|stored| Applied::decode(id, &stored)).transpose()
}

pub fn delete_applied(batch: &mut KvBatch, id: RegionId) {
    batch.delete(Cf::Meta, &key(APPLY_PREFIX, id));
    batch.delete(Cf::Meta, &key(INSTALLED_PREFIX, id));
}

pub fn region_state(kv: &KvEngine, id: RegionId) -> Result<Option<RegionState>, StoreError> {
    let stored = kv.get(Cf::Meta, &key(REGION_PREFIX, id))?;
    stored.map(|stored| RegionState::decode(id, &stored)).transpose()
}

/// What a crash now would leave of a region.
pub fn durable_region_state(
    kv: &KvEngine,
    id: RegionId,
) -> Result<Option<RegionState>, StoreError> {
    let stored = kv.get_durable(Cf::Meta, &key(REGION_PREFIX, id))?;
    stored.map(|stored| RegionState::decode(id, &stored)).transpose()
}

/// The applied index as of a view of the engine.
pub fn applied_in(kv: &KvSnapshot, id: RegionId) -> Result<Option<Applied>, StoreError> {
    let stored = kv.get(Cf::Meta, &key(APPLY_PREFIX, id))?;
    stored.map(|stored| Applied::decode(id, &stored)).transpose()
}

pub fn applied(kv: &KvEngine, id: RegionId) -> Result<Option<Applied>, StoreError> {
    let stored = kv.get(Cf::Meta, &key(APPLY_PREFIX, id))?;
    stored.map(|stored| Applied::decode(id, &stored)).transpose()
}

/// Every region that this store holds or has held.
pub fn region_states(kv: &KvEngine) -> Result<Vec<(RegionId, RegionState)>, StoreError> {
    let mut found = Vec::new();
    let mut iter = kv.snapshot().iter(Cf::Meta, &[REGION_PREFIX], Some(&[REGION_PREFIX + 1]));
    iter.seek_to_first();
    while iter.valid()? {
        let id: [u8; 8] = iter
            .key()
            .get(1..)
            .and_then(|id| id.try_into().ok())
            .ok_or_else(|| corrupt("descriptor", RegionId(0), "its key is malformed"))?;
        let id = RegionId(u64::from_be_bytes(id));
        found.push((id, RegionState::decode(id, iter.value())?));
        iter.next();
    }
    Ok(found)
}

/// A group's record in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RaftState {
    /// Whose state this is: a store may hold one peer of a region after another, and what
    /// the one promised must neither be forgotten nor be taken for the other's.
    pub peer: PeerId,
    pub hard_state: HardState,
    /// The last entry of the prefix that is no longer in the log.
    pub truncated: (LogIndex, Term),
    pub last: LogIndex,
}

impl RaftState {
    /// What the first replicas of a region start with.
    pub fn initial(peer: PeerId) -> Self {
        RaftState {
            peer,
            hard_state: HardState {
                term: Term(INITIAL_TERM),
                vote: None,
                commit: LogIndex(INITIAL_INDEX),
            },
            truncated: (LogIndex(INITIAL_INDEX), Term(INITIAL_TERM)),
            last: LogIndex(INITIAL_INDEX),
        }
    }

    /// What a replica that is yet to receive everything starts with.
    pub fn empty(peer: PeerId) -> Self {
        RaftState {
            peer,
            hard_state: HardState { term: Term(0), vote: None, commit: LogIndex(0) },
            truncated: (LogIndex(0), Term(0)),
            last: LogIndex(0),
        }
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(1 + 7 * 8);
        out.push(FORMAT);
        for field in [
            self.peer.0,
            self.hard_state.term.0,
            self.hard_state.vote.map_or(0, |peer| peer.0),
            self.hard_state.commit.0,
            self.truncated.0.0,
            self.truncated.1.0,
            self.last.0,
        ] {
            out.put_u64(field);
        }
        out
    }

    pub fn decode(id: RegionId, mut stored: &[u8]) -> Result<Self, StoreError> {
        const WHAT: &str = "Raft state";
        check_format(WHAT, id, &mut stored)?;
        let mut next = || stored.try_get_u64().map_err(|e| corrupt(WHAT, id, e));
        let peer = PeerId(next()?);
        let term = Term(next()?);
        let vote = next()?;
        Ok(RaftState {
            peer,
            hard_state: HardState {
                term,
                vote: (vote != 0).then_some(PeerId(vote)),
                commit: LogIndex(next()?),
            },
            truncated: (LogIndex(next()?), Term(next()?)),
            last: LogIndex(next()?),
        })
    }
}

pub fn raft_state(log: &LogEngine, id: RegionId) -> Result<Option<RaftState>, StoreError> {
    log.state(id.0)?.map(|stored| RaftState::decode(id, &stored)).transpose()
}

/// An entry as the log stores it: its term, then its payload.
pub fn encode_entry(entry: &Entry, out: &mut Vec<u8>) {
    out.clear();
    out.put_u64(entry.term.0);
    entry.payload.encode(out);
}

pub fn decode_entry(id: RegionId, index: u64, mut stored: Bytes) -> Result<Entry, StoreError> {
    let what = || format!("entry {index} of region {id}");
    let term = stored
        .try_get_u64()
        .map_err(|e| StoreError::Corrupt { what: what(), why: e.to_string() })?;
    let payload = Payload::decode(stored)
        .map_err(|e| StoreError::Corrupt { what: what(), why: e.to_string() })?;
    Ok(Entry { term: Term(term), index: LogIndex(index), payload })
}

/// Writes the first replica of a region that comes into being with `region`, as `store`
/// holds it, durably in both engines. For the bootstrap of a cluster and of a placement group.
///
/// # Errors
/// When the disk fails, or the region has no peer on the store.
pub fn bootstrap_region(
    kv: &KvEngine,
    log: &LogEngine,
    store: StoreId,
    region: &Region,
) -> Result<(), StoreError> {
    let id = region.id;
    let me = region.peer_on(store).ok_or_else(|| {
        corrupt("first descriptor", id, format!("it has no peer on store {store}"))
    })?;
    let mut entries = LogBatch::new();
    entries.put_state(id.0, &RaftState::initial(me.id).encode());
    log.write(&entries)?;
    let mut batch = KvBatch::new();
    put_region(&mut batch, id, &RegionState::Normal(region.clone()));
    put_applied(&mut batch, id, Applied::INITIAL);
    kv.write(&batch)?;
    kv.persist()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn region_states_read_back_as_written() {
        let range = KeyRange::new(Bytes::new(), Some(Bytes::from_static(b"m"))).unwrap();
        let region = Region { range, ..Region::uninitialized(RegionId(7)) };
        for state in [
            RegionState::Normal(region.clone()),
            RegionState::Tombstone {
                region,
                peer: PeerId(3),
                applied: Applied { index: LogIndex(9), term: Term(7) },
            },
        ] {
            assert_eq!(RegionState::decode(RegionId(7), &state.encode()).unwrap(), state);
        }
    }

    #[test]
    fn a_record_of_another_format_is_refused_by_name() {
        let initial = RaftState::initial(PeerId(3));
        let mut stored = initial.encode();
        assert_eq!(RaftState::decode(RegionId(7), &stored).unwrap(), initial);
        stored[0] = 9;
        let error = RaftState::decode(RegionId(7), &stored).unwrap_err().to_string();
        assert!(error.contains("Raft state of region 7 has format 9"), "{error}");
        let error = RaftState::decode(RegionId(7), &stored[..1]).unwrap_err().to_string();
        assert!(error.contains("format 9"), "{error}");
        let error = RaftState::decode(RegionId(7), &[FORMAT, 0]).unwrap_err().to_string();
        assert!(error.contains("damaged"), "{error}");
    }
}
