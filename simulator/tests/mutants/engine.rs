//! A store's directory.

use std::fs;
use std::path::Path;

use esker_engine::{DataDir, DirError, EngineOptions, Ident, Kind};

use crate::copy;

/// One start of the store that has this directory, up to its first message.
fn start(directory: &Path) -> Result<(), DirError> {
    let options = EngineOptions {
        block_cache_bytes: 4 << 20,
        write_buffer_bytes: 4 << 20,
        log_write_buffer_bytes: 4 << 20,
        log_preallocation_bytes: 64 << 10,
        max_open_files: 64,
        ..EngineOptions::default()
    };
    let mut data = DataDir::open(directory, Kind::Store)?;
    let engines = data.open_engines(&options)?;
    if data.ident().is_none() {
        data.found(Ident { cluster_id: 7, store_id: 3 }, 11, &engines)?;
    }
    data.begin(&engines)?;
    Ok(())
}

/// Whether a store starts with the log as it was one start before.
pub fn an_older_log_is_opened() -> bool {
    let root = tempfile::tempdir().expect("a directory");
    let (directory, aside) = (root.path().join("store"), root.path().join("aside"));
    let log = directory.join("log");
    start(&directory).expect("it starts");
    copy(&log, &aside).expect("it is copied");
    start(&directory).expect("it starts again");
    fs::remove_dir_all(&log).expect("it is removed");
    copy(&aside, &log).expect("it is put back");
    start(&directory).is_ok()
}
