//! The engines on real RocksDB, on disk and in memory. These tests are one
//! binary, because each binary that links RocksDB is large.

mod directory;
mod kv;
mod log;
mod ranges;
mod space;
mod sst;

use std::path::PathBuf;

use esker_engine::{EngineOptions, KvEngine, LogEngine, MemoryEnv};
use tempfile::TempDir;

/// A store's place on disk or in memory. Closing an engine in it is a crash.
pub struct Place {
    pub options: EngineOptions,
    folder: PathBuf,
    _temporary: Option<TempDir>,
}

impl Place {
    pub fn on_disk() -> Place {
        let temporary = tempfile::tempdir().expect("a temporary folder");
        Place {
            options: EngineOptions {
                lose_memtables_on_close: true,
                block_cache_bytes: 8 << 20,
                ..EngineOptions::default()
            },
            folder: temporary.path().to_path_buf(),
            _temporary: Some(temporary),
        }
    }

    pub fn in_memory() -> Place {
        Place {
            options: EngineOptions::in_memory(MemoryEnv::new()),
            folder: PathBuf::from("/a/store"),
            _temporary: None,
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    pub fn kv(&self) -> KvEngine {
        KvEngine::open(&self.path("kv"), &self.options).expect("the key-value engine opens")
    }

    pub fn log(&self) -> LogEngine {
        LogEngine::open(&self.path("log"), &self.options).expect("the log opens")
    }
}

/// Runs a test in both environments.
pub fn everywhere(test: impl Fn(&Place)) {
    test(&Place::on_disk());
    test(&Place::in_memory());
}
