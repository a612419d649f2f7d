//! Building SST files beside an engine, which then ingests them whole.
//!
//! A region's snapshot arrives as sorted pairs. Writing them to a file of the
//! engine's own format and ingesting the file costs neither memtable nor
//! compaction.

use std::fs;
use std::mem;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rocksdb::{Options, SstFileWriter};

use crate::environment::Environment;
use crate::error::EngineError;
use crate::family::Cf;
use crate::kv::{KvEngine, KvShared};

/// A finished file for [`KvEngine::ingest`], durable under its path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SstFile {
    pub cf: Cf,
    pub path: PathBuf,
    pub entries: u64,
    pub bytes: u64,
}

/// Writes one file, key by key in ascending order. The file is made with the
/// first pair. A builder that is dropped unfinished removes it again.
pub struct SstBuilder {
    engine: Arc<KvShared>,
    cf: Cf,
    path: PathBuf,
    entries: u64,
    open: Option<OpenFile>,
}

/// The fields drop in this order: the writer borrows the options.
struct OpenFile {
    writer: SstFileWriter<'static>,
    _options: Box<Options>,
}

impl SstBuilder {
    /// `path` is in the engine's environment. Its folder must exist, and the
    /// file must not.
    pub fn new(engine: &KvEngine, path: &Path, cf: Cf) -> SstBuilder {
        SstBuilder {
            engine: Arc::clone(engine.shared()),
            cf,
            path: path.to_path_buf(),
            entries: 0,
            open: None,
        }
    }

    /// Returns an error for a key that is not above the one before.
    pub fn put(&mut self, key: &[u8], value: &[u8]) -> Result<(), EngineError> {
        let error = sst_error("write", &self.path);
        let file = match &mut self.open {
            Some(file) => file,
            None => {
                let options = self.engine.options.kv_family(self.cf);
                self.open.insert(OpenFile::create(options, &self.path)?)
            }
        };
        file.writer.put(key, value).map_err(error)?;
        self.entries += 1;
        Ok(())
    }

    pub fn entries(&self) -> u64 {
        self.entries
    }

    /// The file's size so far, without the block that is being filled.
    pub fn bytes(&self) -> u64 {
        self.open.as_ref().map_or(0, |file| file.writer.file_size())
    }

    /// Makes the file durable. Returns `None` if there was no pair, and so no
    /// file.
    pub fn finish(mut self) -> Result<Option<SstFile>, EngineError> {
        let Some(file) = &mut self.open else {
            return Ok(None);
        };
        file.writer.finish().map_err(sst_error("finish", &self.path))?;
        let bytes = file.writer.file_size();
        self.open = None;
        Ok(Some(SstFile {
            cf: self.cf,
            path: mem::take(&mut self.path),
            entries: self.entries,
            bytes,
        }))
    }
}

impl Drop for SstBuilder {
    fn drop(&mut self) {
        if self.open.take().is_none() {
            return;
        }
        if let Environment::Disk = self.engine.options.environment
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "an unfinished SST file stays");
        }
    }
}

impl OpenFile {
    fn create(options: Options, path: &Path) -> Result<OpenFile, EngineError> {
        let options = Box::new(options);
        let writer = SstFileWriter::create(&options);
        writer.open(path).map_err(sst_error("create", path))?;
        // Safety: the writer borrows the options, which the box keeps at one
        // address and alive until after the writer's drop.
        let writer = unsafe { mem::transmute::<SstFileWriter<'_>, SstFileWriter<'static>>(writer) };
        Ok(OpenFile { writer, _options: options })
    }
}

fn sst_error(action: &'static str, path: &Path) -> impl Fn(rocksdb::Error) -> EngineError + use<> {
    let path = path.to_path_buf();
    move |error| EngineError::Sst { action, path: path.clone(), reason: error.into_string() }
}
