//! How much data a range holds, and where to cut it.

use std::ffi::{CStr, c_char};
use std::ptr;

use librocksdb_sys as ffi;
use rocksdb::{AsColumnFamilyRef, AsRawPtr};

use crate::error::EngineError;
use crate::family::Cf;
use crate::kv::KvEngine;
use crate::operations::KEYS_END;

/// The most chunks per family that the cuts are chosen from. So the parts
/// differ by at most about `2 / MAX_CHUNKS` of the whole.
const MAX_CHUNKS: usize = 4096;

impl KvEngine {
    /// About the bytes that the users' data in the range takes, memtables
    /// included. Data on disk counts with its compressed size. The call is
    /// cheap: it reads indexes, not data.
    pub fn approximate_size(&self, start: &[u8], end: Option<&[u8]>) -> Result<u64, EngineError> {
        let end = end.unwrap_or(&KEYS_END);
        if start >= end {
            return Ok(0);
        }
        let mut total = 0;
        for cf in Cf::DATA {
            total += self.approximate_family_size(cf, start, end)?;
        }
        Ok(total)
    }

    fn approximate_family_size(
        &self,
        cf: Cf,
        start: &[u8],
        end: &[u8],
    ) -> Result<u64, EngineError> {
        let shared = self.shared();
        let flags = ffi::rocksdb_size_approximation_flags_include_memtable
            | ffi::rocksdb_size_approximation_flags_include_files;
        let mut size = 0;
        let mut message: *mut c_char = ptr::null_mut();
        // Safety: the database and its family are open, and each array has the
        // one element that is announced. The binding's own call leaves out the
        // memtables, so it is not used.
        unsafe {
            ffi::rocksdb_approximate_sizes_cf_with_flags(
                shared.db.as_raw_ptr(),
                shared.family(cf).inner(),
                1,
                &start.as_ptr().cast::<c_char>(),
                &start.len(),
                &end.as_ptr().cast::<c_char>(),
                &end.len(),
                flags as u8,
                &raw mut size,
                &raw mut message,
            );
        }
        if message.is_null() {
            return Ok(size);
        }
        // Safety: RocksDB gives a C string that is ours to free.
        let reason = unsafe {
            let reason = CStr::from_ptr(message).to_string_lossy().into_owned();
            ffi::rocksdb_free(message.cast());
            reason
        };
        Err(shared.at.storage("a size estimate", reason))
    }

    /// Up to `parts - 1` keys, ascending and strictly inside the range, that
    /// cut the users' data in it into about equal parts. The result is shorter
    /// where single pairs are too large to be cut. The keys are as stored.
    /// Where stored keys have a suffix that must not be part of a cut, the
    /// caller removes the suffix.
    ///
    /// Reads the whole range, past the block cache.
    pub fn split_keys(
        &self,
        start: &[u8],
        end: Option<&[u8]>,
        parts: usize,
    ) -> Result<Vec<Vec<u8>>, EngineError> {
        if parts < 2 {
            return Ok(Vec::new());
        }
        let snapshot = self.snapshot();
        let mut chunks = Vec::new();
        for cf in Cf::DATA {
            let mut sampler = Sampler::default();
            let mut iter = snapshot.iter_uncached(cf, start, end);
            iter.seek_to_first();
            while iter.valid()? {
                let bytes = iter.key().len() + iter.value().len();
                sampler.add(iter.key(), bytes as u64);
                iter.next();
            }
            chunks.append(&mut sampler.chunks);
        }
        chunks.sort_by(|a, b| a.key.cmp(&b.key));
        Ok(cuts(chunks, start, parts))
    }
}

/// A run of neighbouring pairs.
struct Chunk {
    key: Vec<u8>,
    bytes: u64,
}

/// Cuts a stream of pairs into chunks of about equal size without knowing the
/// stream's length. When there are too many chunks, neighbours are joined.
#[derive(Default)]
struct Sampler {
    chunks: Vec<Chunk>,
    total: u64,
    /// A chunk of this size takes no more pairs.
    full: u64,
}

impl Sampler {
    fn add(&mut self, key: &[u8], bytes: u64) {
        self.total += bytes;
        if let Some(last) = self.chunks.last_mut()
            && last.bytes < self.full
        {
            last.bytes += bytes;
            return;
        }
        if self.chunks.len() == MAX_CHUNKS {
            self.join_neighbours();
        }
        self.chunks.push(Chunk { key: key.to_vec(), bytes });
    }

    fn join_neighbours(&mut self) {
        let mut joined: Vec<Chunk> = Vec::with_capacity(MAX_CHUNKS);
        for (position, chunk) in self.chunks.drain(..).enumerate() {
            match joined.last_mut() {
                Some(last) if position % 2 == 1 => last.bytes += chunk.bytes,
                _ => joined.push(chunk),
            }
        }
        self.chunks = joined;
        self.full = self.total / (MAX_CHUNKS as u64 / 2);
    }
}

/// For each part but the last, the first key of the next chunk after the part's
/// end.
fn cuts(chunks: Vec<Chunk>, start: &[u8], parts: usize) -> Vec<Vec<u8>> {
    let total: u128 = chunks.iter().map(|chunk| u128::from(chunk.bytes)).sum();
    let parts = parts as u128;
    let mut keys: Vec<Vec<u8>> = Vec::new();
    let mut before: u128 = 0;
    // The part that is being filled, counted from 1.
    let mut part: u128 = 1;
    for chunk in chunks {
        if part < parts && before > 0 && before * parts >= part * total {
            let above_last = keys.last().is_none_or(|last| *last < chunk.key);
            if above_last && chunk.key.as_slice() > start {
                keys.push(chunk.key);
            }
            part = before * parts / total + 1;
        }
        before += u128::from(chunk.bytes);
    }
    keys
}
