//! The changes that a batch collects, before RocksDB sees them.
//!
//! RocksDB's own batch needs the open engine to name a column family. A batch of ours is plain
//! data, so it can be built, merged and reused anywhere. This costs one more copy of the bytes,
//! which is little beside the insertion into the memtable.

use rocksdb::{ColumnFamily, WriteBatch};

use crate::family::Cf;

/// An upper bound for every key, which stands for "no end" where RocksDB requires an end. It is
/// longer than any key (see [`MAX_KEY_BYTES`]).
pub(crate) static KEYS_END: [u8; MAX_KEY_BYTES + 1] = [0xff; MAX_KEY_BYTES + 1];

/// The longest key that an engine stores. The limit for users is lower: the key that is stored is
/// longer than the user's key, and the end of a range may be longer still.
pub const MAX_KEY_BYTES: usize = 10 << 10;

/// What RocksDB's batch adds to each operation at most: kind, family, lengths.
const OVERHEAD_BYTES: usize = 16;

#[derive(Clone, Copy, Debug)]
enum Kind {
    Put,
    Delete,
    DeleteRange,
}

#[derive(Clone, Copy, Debug)]
struct Operation {
    kind: Kind,
    cf: Cf,
    /// Where the key starts in the arena; the value or range end follows it.
    at: usize,
    key_len: usize,
    rest_len: usize,
}

/// An ordered list of changes. A later change wins over an earlier one.
#[derive(Clone, Debug, Default)]
pub(crate) struct Operations {
    arena: Vec<u8>,
    list: Vec<Operation>,
}

impl Operations {
    pub fn put(&mut self, cf: Cf, key: &[u8], value: &[u8]) {
        self.push(Kind::Put, cf, key, value);
    }

    pub fn delete(&mut self, cf: Cf, key: &[u8]) {
        self.push(Kind::Delete, cf, key, &[]);
    }

    /// `end` is exclusive. An empty range is no operation: RocksDB would refuse
    /// the whole batch for a reversed one.
    pub fn delete_range(&mut self, cf: Cf, start: &[u8], end: &[u8]) {
        if start < end {
            self.push(Kind::DeleteRange, cf, start, end);
        }
    }

    fn push(&mut self, kind: Kind, cf: Cf, key: &[u8], rest: &[u8]) {
        assert!(
            key.len() <= MAX_KEY_BYTES,
            "a key of {} bytes reached the engine, which stores at most {MAX_KEY_BYTES}",
            key.len()
        );
        let at = self.arena.len();
        self.arena.extend_from_slice(key);
        self.arena.extend_from_slice(rest);
        self.list.push(Operation { kind, cf, at, key_len: key.len(), rest_len: rest.len() });
    }

    /// Adds the operations of `other` after these.
    pub fn append(&mut self, other: &Operations) {
        let shift = self.arena.len();
        self.arena.extend_from_slice(&other.arena);
        self.list.extend(
            other.list.iter().map(|operation| Operation { at: operation.at + shift, ..*operation }),
        );
    }

    pub fn len(&self) -> usize {
        self.list.len()
    }

    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// About the bytes that the batch will take in RocksDB.
    pub fn bytes(&self) -> usize {
        self.arena.len() + self.list.len() * OVERHEAD_BYTES
    }

    /// Keeps the memory for the next batch.
    pub fn clear(&mut self) {
        self.arena.clear();
        self.list.clear();
    }

    pub fn to_write_batch<'db>(&self, handle: impl Fn(Cf) -> &'db ColumnFamily) -> WriteBatch {
        let mut batch = WriteBatch::with_capacity_bytes(self.bytes());
        for operation in &self.list {
            let bytes = &self.arena[operation.at..][..operation.key_len + operation.rest_len];
            let (key, rest) = bytes.split_at(operation.key_len);
            let cf = handle(operation.cf);
            match operation.kind {
                Kind::Put => batch.put_cf(cf, key, rest),
                Kind::Delete => batch.delete_cf(cf, key),
                Kind::DeleteRange => batch.delete_range_cf(cf, key, rest),
            }
        }
        batch
    }
}
