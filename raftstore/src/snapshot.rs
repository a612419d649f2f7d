//! A region's data on its way to another store.
//!
//! The sender reads a view of its engine as of one applied index and streams it
//! as blocks of sorted pairs, straight from the engine: nothing is written on its
//! disk. The receiver writes the pairs into SST files of its own, makes them
//! durable, and hands them to the apply worker, which puts them in the place of
//! whatever the range held before.

use std::fs::File;
use std::path::{Path, PathBuf};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use esker_engine::{Cf, KvEngine, KvIter, KvSnapshot, SstBuilder, SstFile};
use esker_model::{KeyRange, Region};
use esker_raft::SnapshotMeta;

use crate::door::PairCheck;
use crate::error::StoreError;
use crate::state::bounds;

/// Pairs are gathered up to this many bytes before they are sent as one block.
pub const SNAPSHOT_BLOCK_BYTES: usize = 512 << 10;

/// A sorted run of one column family's pairs, each with its length before it.
#[derive(Clone, Debug)]
pub struct SnapshotBlock {
    pub cf: Cf,
    pub pairs: Bytes,
    /// How many pairs these are.
    pub count: u64,
}

/// A region as of one applied index, to be streamed to a follower.
pub struct RegionSnapshotSource {
    pub descriptor: Region,
    pub meta: SnapshotMeta,
    /// What the message that goes with the pairs carries: the descriptor, and the tagged commands
    /// that the region remembers.
    pub data: Bytes,
    kv: KvSnapshot,
    /// Column families still to be sent, and where in the first of them the stream is.
    remaining: &'static [Cf],
    iter: Option<KvIter>,
}

impl std::fmt::Debug for RegionSnapshotSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "snapshot of region {} at {}", self.descriptor.id, self.meta.index)
    }
}

impl RegionSnapshotSource {
    pub fn new(descriptor: Region, meta: SnapshotMeta, data: Bytes, kv: KvSnapshot) -> Self {
        RegionSnapshotSource { descriptor, meta, data, kv, remaining: &Cf::DATA, iter: None }
    }

    /// The next sorted run of pairs, at most about `SNAPSHOT_BLOCK_BYTES` and never
    /// empty; nothing after the last. Reads the disk.
    pub fn next_block(&mut self) -> Result<Option<SnapshotBlock>, StoreError> {
        while let Some((&cf, rest)) = self.remaining.split_first() {
            let iter = self.iter.get_or_insert_with(|| {
                let (start, end) = bounds(&self.descriptor.range);
                let mut iter = self.kv.iter_uncached(cf, start, end);
                iter.seek_to_first();
                iter
            });
            let mut block = BytesMut::new();
            let mut count = 0;
            while block.len() < SNAPSHOT_BLOCK_BYTES && iter.valid()? {
                for part in [iter.key(), iter.value()] {
                    let length = u32::try_from(part.len()).map_err(|_| StoreError::Corrupt {
                        what: format!("a pair of region {}", self.descriptor.id),
                        why: "longer than 4 GiB".into(),
                    })?;
                    block.put_u32(length);
                    block.put_slice(part);
                }
                count += 1;
                iter.next();
            }
            if !block.is_empty() {
                return Ok(Some(SnapshotBlock { cf, pairs: block.freeze(), count }));
            }
            self.iter = None;
            self.remaining = rest;
        }
        Ok(None)
    }
}

/// A snapshot whose data lies in durable SST files beside the engine.
#[derive(Clone, Debug)]
pub struct ReceivedSnapshot {
    stem: String,
    files: Vec<SstFile>,
}

fn file_path(directory: &Path, stem: &str, cf: Cf) -> PathBuf {
    directory.join(format!("{stem}-{cf}.sst"))
}

impl ReceivedSnapshot {
    pub fn files(&self) -> Vec<SstFile> {
        self.files.clone()
    }

    /// Pairs in all files together.
    pub fn pairs(&self) -> u64 {
        self.files.iter().map(|file| file.entries).sum()
    }

    /// How the journal names the files, so that an interrupted installation is resumed.
    pub fn record(&self) -> String {
        let families: Vec<String> =
            self.files.iter().map(|file| file.cf.number().to_string()).collect();
        format!("{}:{}", self.stem, families.join(","))
    }

    /// The files that an interrupted installation names.
    pub fn from_record(directory: &Path, record: &str) -> Result<Self, StoreError> {
        let damaged = || StoreError::Corrupt {
            what: "the record of a snapshot under installation".into(),
            why: format!("cannot read {record:?}"),
        };
        let (stem, families) = record.split_once(':').ok_or_else(damaged)?;
        let files = families
            .split(',')
            .filter(|number| !number.is_empty())
            .map(|number| {
                let cf = number.parse().ok().and_then(Cf::from_number).ok_or_else(damaged)?;
                let path = file_path(directory, stem, cf);
                Ok(SstFile { cf, path, entries: 0, bytes: 0 })
            })
            .collect::<Result<_, StoreError>>()?;
        Ok(ReceivedSnapshot { stem: stem.to_owned(), files })
    }

    /// Whether the files of an interrupted installation are still there.
    ///
    /// # Errors
    /// Which one is not.
    pub fn require(&self, kv: &KvEngine) -> Result<(), StoreError> {
        match self.files.iter().find(|file| kv.is_on_disk() && !file.path.exists()) {
            None => Ok(()),
            Some(lost) => Err(StoreError::Corrupt {
                what: lost.path.display().to_string(),
                why: "a snapshot was being installed from it, and it is missing; put it back, or \
                      empty the whole directory and start with --replace"
                    .into(),
            }),
        }
    }

    /// Removes the files; for a snapshot that was installed, or is not wanted.
    pub fn discard(&self) {
        for file in &self.files {
            // An in-memory environment has no such path, and what is left on a
            // disk is removed when the store opens.
            let _ = std::fs::remove_file(&file.path);
        }
    }
}

/// Writes the blocks of one incoming snapshot into SST files.
pub struct SnapshotReceiver {
    kv: KvEngine,
    directory: PathBuf,
    stem: String,
    builder: Option<(Cf, SstBuilder)>,
    files: Vec<SstFile>,
    /// The last column family of which something came.
    began: Option<Cf>,
    check: PairCheck,
}

impl SnapshotReceiver {
    /// `stem` names the files and must be unique among the snapshots being received.
    pub fn new(kv: KvEngine, directory: &Path, stem: String) -> Self {
        SnapshotReceiver {
            kv,
            directory: directory.to_owned(),
            stem,
            builder: None,
            files: Vec::new(),
            began: None,
            check: PairCheck::default(),
        }
    }

    /// Takes no pairs outside of `range`.
    #[must_use]
    pub fn within(mut self, range: KeyRange) -> Self {
        self.check = PairCheck::within(range);
        self
    }

    /// Takes one block. Column families come one after another, keys ascending.
    ///
    /// # Errors
    /// When the block is malformed or out of order, or the disk refuses it.
    pub fn block(&mut self, cf: Cf, mut pairs: Bytes) -> Result<(), StoreError> {
        if self.builder.as_ref().is_none_or(|(current, _)| *current != cf) {
            // A column family that came before would write its file again.
            if self.began.is_some_and(|began| cf <= began) || cf == Cf::Meta {
                return Err(refused("its column families are out of order"));
            }
            self.began = Some(cf);
            self.finish_file()?;
            let path = file_path(&self.directory, &self.stem, cf);
            self.builder = Some((cf, SstBuilder::new(&self.kv, &path, cf)));
        }
        let (_, builder) = self.builder.as_mut().expect("a builder was just made");
        while pairs.has_remaining() {
            let key = take(&mut pairs)?;
            let value = take(&mut pairs)?;
            self.check.next(cf, &key, &value).map_err(refused)?;
            builder.put(&key, &value)?;
        }
        Ok(())
    }

    fn finish_file(&mut self) -> Result<(), StoreError> {
        if let Some((_, builder)) = self.builder.take() {
            self.files.extend(builder.finish()?);
        }
        Ok(())
    }

    /// All blocks are here: makes the files durable.
    pub fn finish(mut self) -> Result<ReceivedSnapshot, StoreError> {
        self.finish_file()?;
        if self.kv.is_on_disk() && !self.files.is_empty() {
            // The files' names, too, before anything durable speaks of them.
            let synced = File::open(&self.directory).and_then(|directory| directory.sync_all());
            synced.map_err(|error| StoreError::Corrupt {
                what: self.directory.display().to_string(),
                why: format!("it cannot be synced: {error}"),
            })?;
        }
        Ok(ReceivedSnapshot {
            stem: std::mem::take(&mut self.stem),
            files: std::mem::take(&mut self.files),
        })
    }
}

impl Drop for SnapshotReceiver {
    fn drop(&mut self) {
        for file in &self.files {
            let _ = std::fs::remove_file(&file.path);
        }
    }
}

fn refused(why: impl ToString) -> StoreError {
    StoreError::Corrupt { what: "a block of a snapshot".into(), why: why.to_string() }
}

fn take(pairs: &mut Bytes) -> Result<Bytes, StoreError> {
    let short = || refused("it is cut short");
    let length = pairs.try_get_u32().map_err(|_| short())? as usize;
    if pairs.len() < length {
        return Err(short());
    }
    Ok(pairs.split_to(length))
}
