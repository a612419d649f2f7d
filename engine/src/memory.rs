//! A data directory's two engines, opened only if they belong together.

use std::path::PathBuf;

use esker_mutants::broken;

use crate::directory::{DataDir, DirError, Ident};
use crate::kv::KvEngine;
use crate::log::LogEngine;
use crate::mark::{Mark, check};
use crate::options::EngineOptions;

/// The engines of one data directory.
#[derive(Clone)]
pub struct Engines {
    pub kv: KvEngine,
    pub log: LogEngine,
}

impl DataDir {
    /// Opens both engines. In a directory that was used, both engines must carry its mark. In a new
    /// directory, both must be blank.
    ///
    /// # Errors
    /// When an engine does not open, or when a part is new, older than the others, or another
    /// store's.
    pub fn open_engines(&self, options: &EngineOptions) -> Result<Engines, DirError> {
        let kv = KvEngine::open(&self.kv(), options)?;
        let log = LogEngine::open(&self.log(), options)?;
        match self.mark() {
            Some(ident) => {
                let (kv_mark, log_mark) = (kv.mark()?, log.mark()?);
                let whole = check(&ident, kv_mark.as_ref(), log_mark.as_ref(), log.sequence());
                if !broken!(OldPartIsRefused) {
                    whole.map_err(|(part, fault)| self.not_whole(ident.owner, part, fault))?;
                }
            }
            None => {
                // A first use that a crash interrupted left a mark of no generation.
                let used = |mark: Option<Mark>| mark.is_some_and(|mark| mark.generation > 0);
                let parts: [(PathBuf, bool); 2] = [
                    (self.kv(), used(kv.mark()?) || !kv.is_blank()?),
                    (self.log(), used(log.mark()?) || !log.is_blank()?),
                ];
                if let Some((part, _)) = parts.into_iter().find(|(_, holds)| *holds) {
                    return Err(self.no_ident(part));
                }
            }
        }
        Ok(Engines { kv, log })
    }

    /// Makes `owner` the directory's owner, for good. `lineage` is drawn at random.
    ///
    /// # Errors
    /// When the disk fails, or the directory is another owner's.
    pub fn found(&mut self, owner: Ident, lineage: u64, engines: &Engines) -> Result<(), DirError> {
        let mark = Mark { owner, lineage, generation: 0, log_sequence: 0 };
        self.mark_all(mark, engines)
    }

    /// Begins the next generation of a directory that has an owner. After this the store may send
    /// messages.
    ///
    /// # Errors
    /// When the disk fails.
    ///
    /// # Panics
    /// When the directory has no owner.
    pub fn begin(&mut self, engines: &Engines) -> Result<Mark, DirError> {
        let Some(ident) = self.mark() else {
            panic!("the directory {} is started before it has an owner", self.path().display());
        };
        // A start that was interrupted has sent nothing, so its generation is used again. A new
        // generation for each attempt would leave a part further behind than one crash can.
        let left = [engines.kv.mark()?, engines.log.mark()?];
        let begun = left.iter().flatten().map(|mark| mark.generation).max().unwrap_or(0);
        let generation = begun.max(ident.generation + 1);
        let next = Mark { generation, log_sequence: engines.log.sequence(), ..ident };
        self.mark_all(next, engines)?;
        Ok(next)
    }

    /// Writes the marks in the order that [`crate::mark`] requires.
    fn mark_all(&mut self, mark: Mark, engines: &Engines) -> Result<(), DirError> {
        engines.log.put_mark(&mark)?;
        engines.kv.put_mark(&mark)?;
        engines.kv.persist()?;
        self.write_mark(mark)
    }
}

impl KvEngine {
    /// Records how far the log has come, so that an older copy of the log is detected. The record
    /// is durable with the next [`persist`](Self::persist). Engines without a directory have no
    /// mark and need none. Returns whether there was anything to record.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn note_log_sequence(&self, sequence: u64) -> Result<bool, crate::EngineError> {
        match self.mark()? {
            Some(mark) if mark.log_sequence < sequence => {
                self.put_mark(&Mark { log_sequence: sequence, ..mark })?;
                Ok(true)
            }
            _ => Ok(false),
        }
    }
}
