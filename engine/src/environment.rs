//! Where the files of an engine live: on the disk, or in memory for simulated
//! stores.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;

#[derive(Clone, Default)]
pub enum Environment {
    #[default]
    Disk,
    Memory(MemoryEnv),
}

/// A file system in memory. Clones share the files. The files stay when an
/// engine is closed, so one `MemoryEnv` is the disk of a simulated store, or of
/// a whole simulated cluster.
///
/// Nothing is made on the real disk: a path is only a name here.
#[derive(Clone)]
pub struct MemoryEnv {
    env: rocksdb::Env,
    /// Each directory's number, which stands for the directory inside RocksDB.
    directories: Arc<Mutex<HashMap<PathBuf, usize>>>,
}

/// Bits in a directory's number: the most directories that one environment has.
const DIRECTORY_BITS: u32 = 16;

impl MemoryEnv {
    pub fn new() -> MemoryEnv {
        let env = match rocksdb::Env::mem_env() {
            Ok(env) => env,
            Err(error) => unreachable!("RocksDB always has an environment in memory: {error}"),
        };
        MemoryEnv { env, directories: Arc::default() }
    }

    pub(crate) fn env(&self) -> &rocksdb::Env {
        &self.env
    }

    /// The path by which RocksDB opens `dir`.
    ///
    /// The Rust binding makes a database's directory on the real disk before
    /// RocksDB asks the environment. So a directory is renamed to a spelling of
    /// the root, such as `/././..`, which exists everywhere. The environment
    /// compares names letter by letter, so it keeps the spellings apart. All
    /// spellings have the same number of parts, so none is inside another.
    pub(crate) fn spelling(&self, dir: &Path) -> PathBuf {
        let mut directories = self.directories.lock();
        let next = directories.len();
        let number = *directories.entry(dir.to_path_buf()).or_insert(next);
        assert!(
            number < 1 << DIRECTORY_BITS,
            "more than {} directories in one memory environment",
            1 << DIRECTORY_BITS
        );
        let mut spelling = String::new();
        for bit in 0..DIRECTORY_BITS {
            spelling.push_str(if number >> bit & 1 == 0 { "/." } else { "/.." });
        }
        PathBuf::from(spelling)
    }
}

impl Default for MemoryEnv {
    fn default() -> Self {
        MemoryEnv::new()
    }
}

impl Environment {
    pub(crate) fn database_path(&self, dir: &Path) -> PathBuf {
        match self {
            Environment::Disk => dir.to_path_buf(),
            Environment::Memory(memory) => memory.spelling(dir),
        }
    }
}
