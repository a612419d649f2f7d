//! What can go wrong in an engine, each with a message of one line.

use std::fmt;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::damage::Damage;

/// Which of the two RocksDB instances of a store an error comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EngineName {
    /// What the log's entries were applied to.
    Kv,
    /// The Raft log of all regions of a store.
    Log,
}

impl fmt::Display for EngineName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            EngineName::Kv => "key-value engine",
            EngineName::Log => "raft log",
        })
    }
}

/// Why an engine does not open, read or write.
#[derive(Debug, Error)]
pub enum EngineError {
    /// RocksDB does not open the files in a directory.
    #[error("cannot open the {engine} in {}: {reason}", dir.display())]
    Open {
        /// Which of the store's engines.
        engine: EngineName,
        /// Its directory.
        dir: PathBuf,
        /// RocksDB's own message.
        reason: String,
    },
    /// Data on disk is not what was written. The store must stop, because further reads could
    /// return wrong data.
    #[error(
        "the {engine} in {} is damaged, found by {action}: {reason}; \
         take this store out of the cluster and let its replicas be rebuilt",
        dir.display()
    )]
    Corruption {
        /// Which of the store's engines.
        engine: EngineName,
        /// Its directory.
        dir: PathBuf,
        /// What the engine was doing when it found the damage.
        action: &'static str,
        /// RocksDB's own message. For a failed checksum it names the file and the offset.
        reason: String,
    },
    /// The disk or RocksDB refused, for want of space, say. After a failed write nothing of its
    /// batch can be relied on.
    #[error("{action} failed in the {engine} in {}: {reason}", dir.display())]
    Storage {
        /// Which of the store's engines.
        engine: EngineName,
        /// Its directory.
        dir: PathBuf,
        /// What the engine was doing.
        action: &'static str,
        /// RocksDB's own message.
        reason: String,
    },
    /// An entry was asked for that the log has not got, or no longer.
    #[error("the raft log of group {group} has no entry {index}")]
    Gap {
        /// The id of the group, which is that of its region.
        group: u64,
        /// The entry's place in the log.
        index: u64,
    },
    /// A file of sorted pairs, of a snapshot that is received, cannot be written or used.
    #[error("cannot {action} the SST file {}: {reason}", path.display())]
    Sst {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// RocksDB's own message.
        reason: String,
    },
}

impl EngineError {
    /// Whether the stored bytes themselves are wrong, so that the store must stop.
    pub fn is_corruption(&self) -> bool {
        matches!(self, EngineError::Corruption { .. })
    }
}

/// Where an engine's files are. Turns RocksDB's errors into ours.
pub(crate) struct Location {
    pub engine: EngineName,
    pub dir: PathBuf,
    /// Every corruption that is turned into an error here is reported to it.
    pub damage: Damage,
}

impl Location {
    pub fn new(engine: EngineName, dir: &Path) -> Location {
        Location { engine, dir: dir.to_path_buf(), damage: Damage::default() }
    }

    pub fn open_error(&self, error: rocksdb::Error) -> EngineError {
        EngineError::Open {
            engine: self.engine,
            dir: self.dir.clone(),
            reason: error.into_string(),
        }
    }

    /// For `map_err`. `action` is a noun for what was being done.
    pub fn error(&self, action: &'static str) -> impl Fn(rocksdb::Error) -> EngineError + '_ {
        move |error| {
            if error.kind() == rocksdb::ErrorKind::Corruption {
                self.corruption(action, error.into_string())
            } else {
                self.storage(action, error.into_string())
            }
        }
    }

    pub fn storage(&self, action: &'static str, reason: String) -> EngineError {
        EngineError::Storage { engine: self.engine, dir: self.dir.clone(), action, reason }
    }

    pub fn corruption(&self, action: &'static str, reason: String) -> EngineError {
        self.damage.report(&format!("{} in {}: {reason}", self.engine, self.dir.display()));
        EngineError::Corruption { engine: self.engine, dir: self.dir.clone(), action, reason }
    }
}
