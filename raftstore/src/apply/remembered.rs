//! What a region remembers of the tagged commands that it applied, so that each takes effect once
//! however often it is in the log.
//!
//! A client that does not learn what became of a write sends it again. Both attempts may be
//! applied, the first of them long after the second and after what others, or the client itself,
//! wrote later; and then an old value stands where a newer one was acknowledged. So all attempts
//! of one write carry one *tag*: who sends it, which of his writes it is, and a *horizon*, an
//! index that the region's log had applied before the first attempt was sent. The write can be
//! nowhere in the log up to its horizon. When an entry is applied, each of its tagged commands is
//!
//! - a **duplicate**, if the region remembers its client and sequence. It changes nothing and is
//!   answered as what it repeats was;
//! - **forgotten**, if the region no longer remembers everything behind the command's horizon. It
//!   may have been applied and may not have been, so it changes nothing and is refused;
//! - otherwise **new**: everything applied since its horizon is known, and it is not among that.
//!
//! The third is exact, not likely: it asks no clock. How much is remembered decides only how often
//! the second is the answer. It is bounded by number, and by age as told by the clock readings that
//! travel in the entries.
//!
//! All of it is a function of the log and of two constants, so that every replica decides alike: it is written in the
//! batch with the entry's effects and the applied index, it is restored with them, and it travels
//! in snapshots. A region that a split creates begins with nothing, since its log begins anew and
//! an index of its parent's means nothing in it.
//!
//! In the `kv` engine, column family `meta`:
//!
//! ```text
//! 'd' region 0      → format, everything up to this index may be forgotten
//! 'd' region index  → format, clock reading, the tagged commands that this entry applied
//! ```

use std::collections::{HashSet, VecDeque};

use bytes::{Buf, BufMut, Bytes};
use esker_engine::{Cf, KvBatch, KvEngine, KvSnapshot};
use esker_model::{Region, RegionId};
use esker_mutants::broken;
use esker_raft::LogIndex;
use esker_rpc::convert;
use esker_rpc::proto::esker::command::{RegionSnapshot as SnapshotData, RememberedEntry};
use prost::Message as _;

use crate::command::TaggedCommand;
use crate::config::REMEMBERED_SECONDS;
use crate::error::StoreError;

const PREFIX: u8 = b'd';
const FORMAT: u8 = 1;
const KEY_BYTES: usize = 17;
/// A client and a sequence.
const COMMAND_BYTES: usize = 16;

/// The format of what a snapshot's message carries.
const SNAPSHOT_FORMAT: u32 = 1;

/// Names a write: its client, and which of that client's writes it is.
type CommandId = (u64, u64);

/// What a tagged command is to the region that applies it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    New,
    Duplicate,
    Forgotten,
}

/// One entry's tagged commands.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    index: LogIndex,
    at_s: u64,
    commands: Vec<CommandId>,
}

/// A region's memory of tagged commands as of its applied index.
#[derive(Clone, Debug, Default)]
pub(crate) struct Remembered {
    /// Commands applied at this index or before it may be forgotten; those after it are known.
    forgotten: LogIndex,
    /// In the order of the log.
    entries: VecDeque<Entry>,
    known: HashSet<CommandId>,
}

fn key(region: RegionId, index: LogIndex) -> [u8; KEY_BYTES] {
    let mut key = [PREFIX; KEY_BYTES];
    key[1..9].copy_from_slice(&region.0.to_be_bytes());
    key[9..].copy_from_slice(&index.0.to_be_bytes());
    key
}

/// The first key behind all of a region's.
fn end(region: RegionId) -> [u8; KEY_BYTES] {
    let mut end = key(region, LogIndex(u64::MAX));
    // Its last index is no entry's: logs do not grow that long.
    end[KEY_BYTES - 1] = 0xff;
    end
}

fn corrupt(region: RegionId, why: impl ToString) -> StoreError {
    StoreError::Corrupt {
        what: format!("the memory of writes of region {region}"),
        why: why.to_string(),
    }
}

fn encode(commands: &[CommandId], out: &mut Vec<u8>) {
    for (client, sequence) in commands {
        out.put_u64(*client);
        out.put_u64(*sequence);
    }
}

fn decode(mut stored: &[u8]) -> Option<Vec<CommandId>> {
    if stored.is_empty() || !stored.len().is_multiple_of(COMMAND_BYTES) {
        return None;
    }
    let mut commands = Vec::with_capacity(stored.len() / COMMAND_BYTES);
    while stored.has_remaining() {
        commands.push((stored.get_u64(), stored.get_u64()));
    }
    Some(commands)
}

impl Remembered {
    /// What the region remembers as of this view of the engine.
    pub(super) fn load(kv: &KvSnapshot, region: RegionId) -> Result<Self, StoreError> {
        let mut remembered = Remembered::default();
        if let Some(stored) = kv.get(Cf::Meta, &key(region, LogIndex(0)))? {
            let mut stored = &stored[..];
            let format = stored.try_get_u8().map_err(|e| corrupt(region, e))?;
            check_format(region, format)?;
            let index = stored.try_get_u64().map_err(|e| corrupt(region, e))?;
            remembered.forgotten = LogIndex(index);
        }
        // Behind the deletions of what was forgotten, not across them.
        let first = key(region, remembered.forgotten.next());
        let mut iter = kv.iter(Cf::Meta, &first, Some(&end(region)));
        iter.seek_to_first();
        while iter.valid()? {
            let index = iter.key().get(9..).and_then(|index| index.try_into().ok());
            let index = index.ok_or_else(|| corrupt(region, "a key of it is malformed"))?;
            let mut stored = iter.value();
            let format = stored.try_get_u8().map_err(|e| corrupt(region, e))?;
            check_format(region, format)?;
            let at_s = stored.try_get_u64().map_err(|e| corrupt(region, e))?;
            let commands =
                decode(stored).ok_or_else(|| corrupt(region, "a record of it is cut short"))?;
            let index = LogIndex(u64::from_be_bytes(index));
            remembered.push(Entry { index, at_s, commands });
            iter.next();
        }
        Ok(remembered)
    }

    fn push(&mut self, entry: Entry) {
        self.known.extend(&entry.commands);
        self.entries.push_back(entry);
    }

    /// How many commands are remembered.
    pub(super) fn len(&self) -> usize {
        self.known.len()
    }

    /// What a tagged command is, if it is applied next.
    pub(super) fn judge(&self, tagged: &TaggedCommand) -> Verdict {
        let is_known = self.known.contains(&(tagged.client, tagged.sequence));
        if is_known && !broken!(DuplicateChangesNothing) {
            Verdict::Duplicate
        } else if tagged.horizon < self.forgotten.0 {
            Verdict::Forgotten
        } else {
            Verdict::New
        }
    }

    /// Remembers that the entry at `index`, which is being applied, has applied this command too.
    pub(super) fn add(&mut self, index: LogIndex, at_s: u64, tagged: &TaggedCommand) {
        let id = (tagged.client, tagged.sequence);
        self.known.insert(id);
        match self.entries.back_mut() {
            Some(last) if last.index == index => last.commands.push(id),
            last => {
                // Clocks of leaders differ; the region's goes forward.
                let at_s = last.map_or(at_s, |last| last.at_s.max(at_s));
                self.entries.push_back(Entry { index, at_s, commands: vec![id] });
            }
        }
    }

    /// Writes what the entry at `index` added, and forgets what is too much or too old for it.
    pub(super) fn finish(
        &mut self,
        batch: &mut KvBatch,
        region: RegionId,
        index: LogIndex,
        limit: usize,
    ) {
        let Some(last) = self.entries.back().filter(|last| last.index == index) else { return };
        let mut stored = Vec::with_capacity(9 + last.commands.len() * COMMAND_BYTES);
        stored.put_u8(FORMAT);
        stored.put_u64(last.at_s);
        encode(&last.commands, &mut stored);
        batch.put(Cf::Meta, &key(region, index), &stored);
        let oldest = last.at_s.saturating_sub(REMEMBERED_SECONDS);
        let before = self.forgotten;
        while let Some(first) = self.entries.front()
            && (first.at_s < oldest || self.known.len() > limit)
        {
            for command in &first.commands {
                self.known.remove(command);
            }
            batch.delete(Cf::Meta, &key(region, first.index));
            self.forgotten = first.index;
            self.entries.pop_front();
        }
        if self.forgotten != before {
            put_forgotten(batch, region, self.forgotten);
        }
    }

    /// What goes with a snapshot of the region as it is now.
    pub(super) fn snapshot_data(&self, region: &Region) -> SnapshotData {
        let remembered = self.entries.iter().map(|entry| {
            let mut commands = Vec::with_capacity(entry.commands.len() * COMMAND_BYTES);
            encode(&entry.commands, &mut commands);
            RememberedEntry { index: entry.index.0, at_s: entry.at_s, commands: commands.into() }
        });
        SnapshotData {
            format: SNAPSHOT_FORMAT,
            region: Some(region.into()),
            forgotten: self.forgotten.0,
            remembered: remembered.collect(),
        }
    }
}

fn put_forgotten(batch: &mut KvBatch, region: RegionId, forgotten: LogIndex) {
    let mut stored = vec![FORMAT];
    stored.put_u64(forgotten.0);
    batch.put(Cf::Meta, &key(region, LogIndex(0)), &stored);
}

fn check_format(region: RegionId, found: u8) -> Result<(), StoreError> {
    if found == FORMAT {
        return Ok(());
    }
    Err(StoreError::Format {
        what: format!("the memory of writes of region {region}"),
        found: found.into(),
        known: FORMAT.into(),
    })
}

/// Removes what a region remembers: it leaves this store.
pub(super) fn delete(batch: &mut KvBatch, region: RegionId) {
    batch.delete_range(Cf::Meta, &key(region, LogIndex(0)), Some(&end(region)));
}

/// What a snapshot's message carries, checked: the region, and what it remembers.
pub(crate) fn decode_snapshot(data: Bytes) -> Result<(Region, SnapshotData), String> {
    let mut data = SnapshotData::decode(data).map_err(|e| e.to_string())?;
    if data.format != SNAPSHOT_FORMAT {
        return Err(format!("it has format {}, not {SNAPSHOT_FORMAT}", data.format));
    }
    let region = convert::region(data.region.take()).map_err(|e| e.to_string())?;
    let mut last = data.forgotten;
    for entry in &data.remembered {
        if entry.index <= last || decode(&entry.commands).is_none() {
            return Err("the writes that it remembers are malformed".into());
        }
        last = entry.index;
    }
    Ok((region, data))
}

/// Puts what came with a snapshot in the place of what was remembered.
pub(super) fn replace(batch: &mut KvBatch, region: RegionId, data: &SnapshotData) {
    delete(batch, region);
    if data.forgotten != 0 {
        put_forgotten(batch, region, LogIndex(data.forgotten));
    }
    for entry in &data.remembered {
        let mut stored = Vec::with_capacity(9 + entry.commands.len());
        stored.put_u8(FORMAT);
        stored.put_u64(entry.at_s);
        stored.put_slice(&entry.commands);
        batch.put(Cf::Meta, &key(region, LogIndex(entry.index)), &stored);
    }
}

/// Keys and values, as they are stored.
pub type Records = Vec<(Vec<u8>, Vec<u8>)>;

/// The records of what a region remembers, as they are stored: equal on all replicas that have
/// applied the same entries.
pub fn records(kv: &KvEngine, region: RegionId) -> Result<Records, StoreError> {
    let mut iter = kv.snapshot().iter(Cf::Meta, &key(region, LogIndex(0)), Some(&end(region)));
    iter.seek_to_first();
    let mut found = Vec::new();
    while iter.valid()? {
        found.push((iter.key().to_vec(), iter.value().to_vec()));
        iter.next();
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use esker_engine::{EngineOptions, MemoryEnv};

    const REGION: RegionId = RegionId(7);

    fn tagged(sequence: u64, horizon: u64) -> TaggedCommand {
        TaggedCommand { client: 1, sequence, horizon, first: 0, count: 1 }
    }

    fn engine() -> KvEngine {
        let options = EngineOptions::in_memory(MemoryEnv::new());
        KvEngine::open(std::path::Path::new("/kv"), &options).unwrap()
    }

    /// One command in an entry of its own.
    fn apply(of: &mut Remembered, kv: &KvEngine, index: u64, at_s: u64, limit: usize) {
        let mut batch = KvBatch::new();
        of.add(LogIndex(index), at_s, &tagged(index, 0));
        of.finish(&mut batch, REGION, LogIndex(index), limit);
        kv.write(&batch).unwrap();
    }

    fn same(a: &Remembered, b: &Remembered) -> bool {
        (a.forgotten, &a.entries, &a.known) == (b.forgotten, &b.entries, &b.known)
    }

    #[test]
    fn what_is_too_much_is_forgotten_and_nothing_behind_the_horizon_is_taken_for_new() {
        let (kv, mut remembered) = (engine(), Remembered::default());
        for index in 6..10 {
            apply(&mut remembered, &kv, index, 100, 3);
        }
        assert_eq!(remembered.judge(&tagged(9, 0)), Verdict::Duplicate);
        assert_eq!(remembered.judge(&tagged(7, 0)), Verdict::Duplicate);
        assert_eq!(remembered.judge(&tagged(6, 5)), Verdict::Forgotten, "it was applied at 6");
        assert_eq!(remembered.judge(&tagged(77, 6)), Verdict::New, "it is nowhere up to 6");
        assert_eq!(remembered.judge(&tagged(77, 0)), Verdict::Forgotten);
        assert!(same(&Remembered::load(&kv.snapshot(), REGION).unwrap(), &remembered));
        assert_eq!(records(&kv, REGION).unwrap().len(), 4, "three entries, and what is forgotten");
    }

    #[test]
    fn what_is_too_old_is_forgotten_by_the_clock_in_the_entries_which_only_goes_forward() {
        let (kv, mut remembered) = (engine(), Remembered::default());
        apply(&mut remembered, &kv, 6, 100, 99);
        apply(&mut remembered, &kv, 7, 50, 99);
        apply(&mut remembered, &kv, 8, 100 + REMEMBERED_SECONDS, 99);
        assert_eq!(remembered.len(), 3, "50 counts as 100: it came after it");
        apply(&mut remembered, &kv, 9, 101 + REMEMBERED_SECONDS, 99);
        assert_eq!(remembered.len(), 2);
        assert_eq!(remembered.judge(&tagged(7, 6)), Verdict::Forgotten);
        assert!(same(&Remembered::load(&kv.snapshot(), REGION).unwrap(), &remembered));
    }

    #[test]
    fn a_snapshot_carries_all_of_it_and_replaces_what_was_there() {
        let (kv, mut remembered) = (engine(), Remembered::default());
        for index in 6..10 {
            apply(&mut remembered, &kv, index, 100, 3);
        }
        let region = Region::uninitialized(REGION);
        let data = remembered.snapshot_data(&region).encode_to_vec();
        let (found, data) = decode_snapshot(data.into()).unwrap();
        assert_eq!(found, region);
        let (other, mut stale) = (engine(), Remembered::default());
        for index in 2..5 {
            apply(&mut stale, &other, index, 100, 99);
        }
        let mut batch = KvBatch::new();
        replace(&mut batch, REGION, &data);
        other.write(&batch).unwrap();
        assert!(same(&Remembered::load(&other.snapshot(), REGION).unwrap(), &remembered));
        let mut batch = KvBatch::new();
        delete(&mut batch, REGION);
        other.write(&batch).unwrap();
        assert_eq!(records(&other, REGION).unwrap(), []);
    }

    #[test]
    fn malformed_snapshots_are_refused() {
        let region = Some((&Region::uninitialized(REGION)).into());
        let good = SnapshotData {
            format: SNAPSHOT_FORMAT,
            region,
            forgotten: 5,
            remembered: vec![RememberedEntry { index: 6, at_s: 1, commands: vec![0; 16].into() }],
        };
        let refused = |data: &SnapshotData| decode_snapshot(data.encode_to_vec().into()).is_err();
        assert!(!refused(&good));
        assert!(refused(&SnapshotData { format: 9, ..good.clone() }));
        assert!(refused(&SnapshotData { region: None, ..good.clone() }));
        assert!(refused(&SnapshotData { forgotten: 6, ..good.clone() }));
        let mut bad = good;
        bad.remembered[0].commands = vec![0; 15].into();
        assert!(refused(&bad));
    }
}
