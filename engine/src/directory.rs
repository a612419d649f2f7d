//! The data directory of a store: which process uses it, and which store owns it.
//!
//! ```text
//! LOCK     held by the process that uses the directory
//! IDENT    which store of which cluster it belongs to, once it was started
//! DAMAGED  what was found damaged, if anything ever was
//! kv/      the key-value engine
//! log/     the raft log
//! snap/    snapshots under way
//! ```
//!
//! `IDENT` is written last, when both engines carry the same mark (see [`crate::mark`]). So a
//! directory with an `IDENT` must have both engines, and a directory without one was never used.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::error::EngineError;
use crate::mark::{Fault, Mark, Part};

const LOCK: &str = "LOCK";
/// Written last when a directory gets an owner.
pub const IDENT: &str = "IDENT";
const DAMAGED: &str = "DAMAGED";
/// The extension of a file that is not yet complete.
const NEW: &str = "new";
/// The file that every RocksDB instance has.
const CURRENT: &str = "CURRENT";
const KV: &str = "kv";
const LOG: &str = "log";
const SNAP: &str = "snap";

/// The version of the directory's layout that this program reads and writes.
const FORMAT: u64 = 2;
/// No version of this program writes a longer `IDENT`.
const MAX_IDENT_BYTES: u64 = 4 << 10;

/// Which store of which cluster a directory belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ident {
    /// The cluster, or, for a placement member, its group.
    pub cluster_id: u64,
    /// The store. A placement member has the top bit set.
    pub store_id: u64,
}

/// What a directory holds, for error messages that advise an operator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Users' data.
    Store,
    /// A placement member's state; a store id with the top bit set.
    Member,
}

impl Kind {
    /// The name of the directory's owner.
    fn name(self, owner: Ident) -> String {
        match self {
            Kind::Store => format!("store {} of cluster {}", owner.store_id, owner.cluster_id),
            Kind::Member => format!("placement member {}", owner.store_id & !(1 << 63)),
        }
    }

    /// What to do when a part of the directory is lost for good.
    fn remedy(self, part: &Path) -> String {
        let then = match self {
            Kind::Store => "and start with --replace",
            Kind::Member => "start, and run `esker placement replace` with this member's name",
        };
        let folder = part.parent().unwrap_or(part).display();
        format!(
            "put the newest back (is a disk not mounted?); if it is lost for good, empty all of \
             {folder}, {then}"
        )
    }
}

/// Why a data directory cannot be used.
#[derive(Debug, Error)]
pub enum DirError {
    /// A part of the directory is missing, new, older than the rest, or another owner's. To be
    /// expected when a disk is not mounted, or when a part was restored from a backup. Put the
    /// newest part back; if it is lost for good, do what the message says.
    #[error(
        "{} is not whole: {} {what}; {}", kind.name(*owner), part.display(), kind.remedy(part)
    )]
    NotWhole {
        /// What the directory is for.
        kind: Kind,
        /// The store or member whose directory it is.
        owner: Ident,
        /// The part that is at fault.
        part: PathBuf,
        /// What is wrong with the part.
        what: String,
    },
    /// The file that names the owner is missing, although there is data. To be dealt with like
    /// [`NotWhole`](Self::NotWhole).
    #[error(
        "{} is missing, although the directory was used: {} holds data; {}",
        path.display(), part.display(), kind.remedy(path)
    )]
    NoIdent {
        /// What the directory is for.
        kind: Kind,
        /// The file that is missing.
        path: PathBuf,
        /// The part that holds data.
        part: PathBuf,
    },
    /// Data in the directory did not match its checksum in an earlier run. Such a directory is
    /// never used again. Look at the disk, then replace the store or the member as the message
    /// says.
    #[error(
        "{} was found damaged and must not be used any more: {what}; empty {} and {}",
        kind.name(*owner), path.display(), match kind {
            Kind::Store => "start with --replace: the other replicas fill it again",
            Kind::Member => "start, and run `esker placement replace` with this member's name",
        }
    )]
    Damaged {
        /// What the directory is for.
        kind: Kind,
        /// The store or member whose directory it is.
        owner: Ident,
        /// The directory.
        path: PathBuf,
        /// What was found.
        what: String,
    },
    /// An engine in the directory cannot be opened or used.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The file system refused. The reason is the system's own.
    #[error("cannot use the data directory {}: {what} failed: {source}", path.display())]
    Io {
        /// The directory, or the file in it.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// The system's reason.
        source: io::Error,
    },
    /// The path is that of a file.
    #[error("the data directory {} cannot be used: it is not a directory", path.display())]
    NotADirectory {
        /// The path as it was given.
        path: PathBuf,
    },
    /// The process has no right to write into the directory, or its file system is read-only.
    #[error("the data directory {} is not writable: {source}", path.display())]
    NotWritable {
        /// The directory.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// Another process, or another node in this one, uses the directory. Wait until it has stopped.
    #[error("the data directory {} is in use by another process", path.display())]
    Locked {
        /// The directory.
        path: PathBuf,
    },
    /// Another version of Esker wrote the directory. Use that version.
    #[error(
        "the data directory {} has format {found}, but this version of Esker reads only format {FORMAT}",
        path.display()
    )]
    UnknownFormat {
        /// The directory.
        path: PathBuf,
        /// The version of the layout that the directory has.
        found: u64,
    },
    /// The file that names the owner cannot be read, or makes no sense.
    #[error("{} is damaged: {reason}", path.display())]
    BadIdent {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The directory was about to be given to another owner than the one that it has.
    #[error(
        "the data directory {} belongs to store {} of cluster {}, not to store {} of cluster {}",
        path.display(), found.store_id, found.cluster_id, wanted.store_id, wanted.cluster_id
    )]
    OtherOwner {
        /// The directory.
        path: PathBuf,
        /// The owner that it has.
        found: Ident,
        /// The owner that it was to get.
        wanted: Ident,
    },
}

/// An open data directory. It is locked until this value is dropped.
#[derive(Debug)]
pub struct DataDir {
    path: PathBuf,
    kind: Kind,
    mark: Option<Mark>,
    /// Removed again if the directory is never used.
    created: Created,
}

impl Drop for DataDir {
    fn drop(&mut self) {
        if self.mark.is_none() && !self.holds_engines() {
            std::mem::take(&mut self.created).undo();
        }
    }
}

impl DataDir {
    /// Opens a directory and locks it. The directory and its parents are made where they are
    /// missing. After an error everything is as it was before, and also when the directory is
    /// dropped before it was used.
    ///
    /// # Errors
    /// See [`DirError`]. A directory that was used is refused when a part of it is missing or
    /// damaged.
    pub fn open(path: &Path, kind: Kind) -> Result<DataDir, DirError> {
        let mut created = Created::default();
        match DataDir::open_recording(path, kind, &mut created) {
            Ok(mark) => Ok(DataDir { path: path.to_path_buf(), kind, mark, created }),
            Err(error) => {
                created.undo();
                Err(error)
            }
        }
    }

    fn open_recording(
        path: &Path,
        kind: Kind,
        created: &mut Created,
    ) -> Result<Option<Mark>, DirError> {
        create_dirs(path, created).map_err(|source| make_error(path, source))?;
        lock(path, created)?;
        let mark = read_mark(path)?;
        if let Some(mark) = mark {
            require_parts(path, kind, mark.owner)?;
        }
        for name in [KV, LOG, SNAP] {
            create_dirs(&path.join(name), created).map_err(|source| make_error(path, source))?;
        }
        Ok(mark)
    }

    /// Removes what is left of snapshots that were under way when the directory was last used. To
    /// be called when the store has finished the work that it had begun with them.
    pub fn empty_snapshots(&self) -> Result<(), DirError> {
        empty(&self.snap()).map_err(|source| DirError::Io {
            path: self.path.clone(),
            what: "removing old snapshots",
            source,
        })
    }

    /// The directory's owner; `None` until it was used for the first time.
    pub fn ident(&self) -> Option<Ident> {
        self.mark.map(|mark| mark.owner)
    }

    /// Whether the directory's owner was ever started. Until then the owner has promised nothing.
    pub fn was_started(&self) -> bool {
        self.mark.is_some_and(|mark| mark.generation > 0)
    }

    /// Whether there are engines in the directory, of any owner.
    pub fn holds_engines(&self) -> bool {
        [self.kv(), self.log()].iter().any(|engine| engine.join(CURRENT).exists())
    }

    /// The mark of the last start; `None` until the directory was used for the first time.
    pub fn mark(&self) -> Option<Mark> {
        self.mark
    }

    /// Writes a small record of the owner's, beside the engines. It is durable when this returns. A
    /// crash leaves the old or the new record.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn write_record(&self, name: &str, record: &[u8]) -> Result<(), DirError> {
        self.write_file(name, record, "writing a record")
    }

    /// What [`DataDir::write_record`] wrote under this name, if anything.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn read_record(&self, name: &str) -> Result<Option<Vec<u8>>, DirError> {
        let path = self.path.join(name);
        match fs::read(&path) {
            Ok(record) => Ok(Some(record)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(DirError::Io { path, what: "reading it", source }),
        }
    }

    /// Removes a record; one that is not there is no error.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn remove_record(&self, name: &str) -> Result<(), DirError> {
        let remove = || match fs::remove_file(self.path.join(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => File::open(&self.path)?.sync_all(),
        };
        remove().map_err(|source| DirError::Io {
            path: self.path.join(name),
            what: "removing it",
            source,
        })
    }

    /// The last step of a first use, and of every start.
    pub(crate) fn write_mark(&mut self, mark: Mark) -> Result<(), DirError> {
        if let Some(found) = self.ident()
            && found != mark.owner
        {
            let (path, wanted) = (self.path.clone(), mark.owner);
            return Err(DirError::OtherOwner { path, found, wanted });
        }
        self.write_file(IDENT, to_text(&mark).as_bytes(), "writing IDENT")?;
        self.mark = Some(mark);
        Ok(())
    }

    /// Records for good that the directory's content cannot be relied on: the directory does not
    /// open again. `what` names the file or the entry.
    ///
    /// # Errors
    /// When the disk fails here, too.
    pub fn condemn(path: &Path, what: &str) -> Result<(), DirError> {
        let line = what.replace('\n', " ");
        replace_file(path, DAMAGED, line.as_bytes()).map_err(|source| DirError::Io {
            path: path.to_path_buf(),
            what: "writing DAMAGED",
            source,
        })
    }

    fn write_file(&self, name: &str, content: &[u8], what: &'static str) -> Result<(), DirError> {
        let failed = |source| DirError::Io { path: self.path.clone(), what, source };
        replace_file(&self.path, name, content).map_err(failed)
    }

    /// The error for a part that is at fault.
    pub(crate) fn not_whole(&self, owner: Ident, part: Part, fault: Fault) -> DirError {
        let what = match fault {
            Fault::New => "is new: it holds nothing of what the store wrote".to_owned(),
            Fault::Older { generation, newest } => {
                format!("is an older copy, from the {} of {} starts", ordinal(generation), newest)
            }
            Fault::Behind { sequence, seen } => {
                format!("is an older copy: it ends at change {sequence} of at least {seen}")
            }
            Fault::Foreign { owner: other } if other == owner => {
                "is of an earlier life of the same store".to_owned()
            }
            Fault::Foreign { owner: other } => format!("belongs to {}", self.kind.name(other)),
        };
        let part = match part {
            Part::Ident => self.path.join(IDENT),
            Part::Kv => self.kv(),
            Part::Log => self.log(),
        };
        DirError::NotWhole { kind: self.kind, owner, part, what }
    }

    pub(crate) fn no_ident(&self, part: PathBuf) -> DirError {
        DirError::NoIdent { kind: self.kind, path: self.path.join(IDENT), part }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn kv(&self) -> PathBuf {
        self.path.join(KV)
    }

    pub fn log(&self) -> PathBuf {
        self.path.join(LOG)
    }

    pub fn snap(&self) -> PathBuf {
        self.path.join(SNAP)
    }
}

fn ordinal(number: u64) -> String {
    let ending = match (number % 10, number % 100) {
        (1, tens) if tens != 11 => "st",
        (2, tens) if tens != 12 => "nd",
        (3, tens) if tens != 13 => "rd",
        _ => "th",
    };
    format!("{number}{ending}")
}

fn to_text(mark: &Mark) -> String {
    let Mark { owner: Ident { cluster_id, store_id }, lineage, generation, log_sequence } = mark;
    format!(
        "format = {FORMAT}\ncluster = {cluster_id}\nstore = {store_id}\nlineage = {lineage}\n\
         generation = {generation}\nlog-sequence = {log_sequence}\n"
    )
}

/// Writes a file, which is durable when this returns. A crash leaves the old file or the whole new
/// one, because the new name is made durable only after the content.
///
/// # Errors
/// When the disk fails.
pub fn replace_file(folder: &Path, name: &str, content: &[u8]) -> io::Result<()> {
    let new = folder.join(name).with_extension(NEW);
    let mut file = File::create(&new)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(&new, folder.join(name))?;
    File::open(folder)?.sync_all()
}

/// Checks that a directory that was used has both engines, and that nothing was found damaged.
fn require_parts(path: &Path, kind: Kind, owner: Ident) -> Result<(), DirError> {
    for name in [KV, LOG] {
        let part = path.join(name);
        let what = if !part.is_dir() {
            "is missing"
        } else if !part.join(CURRENT).exists() {
            "is empty"
        } else {
            continue;
        };
        return Err(DirError::NotWhole { kind, owner, part, what: what.to_owned() });
    }
    match fs::read(path.join(DAMAGED)) {
        Ok(what) => {
            let what = String::from_utf8_lossy(&what).trim().to_owned();
            Err(DirError::Damaged { kind, owner, path: path.to_path_buf(), what })
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(source) => {
            Err(DirError::Io { path: path.to_path_buf(), what: "reading DAMAGED", source })
        }
    }
}

/// The files and folders that the opening of a directory has made.
#[derive(Debug, Default)]
struct Created {
    /// Outermost first.
    paths: Vec<PathBuf>,
    /// Held for as long as the directory is open, and until everything is removed again.
    lock: Option<File>,
}

impl Created {
    /// Removes all of them, innermost first. A folder into which another process has put something
    /// meanwhile stays.
    fn undo(self) {
        for path in self.paths.iter().rev() {
            let removed = if path.file_name() == Some(OsStr::new(LOCK)) {
                fs::remove_file(path)
            } else {
                fs::remove_dir(path)
            };
            if let Err(error) = removed
                && error.kind() != io::ErrorKind::DirectoryNotEmpty
            {
                tracing::warn!(path = %path.display(), %error, "a new data directory is left half made");
            }
        }
    }
}

fn create_dirs(path: &Path, created: &mut Created) -> io::Result<()> {
    let missing: Vec<&Path> = path
        .ancestors()
        .take_while(|ancestor| !ancestor.as_os_str().is_empty() && !ancestor.exists())
        .collect();
    for folder in missing.into_iter().rev() {
        match fs::create_dir(folder) {
            Ok(()) => {
                created.paths.push(folder.to_path_buf());
                // Data that is acknowledged later lies in this folder, so its name must outlive a
                // power failure, too.
                sync_parent(folder)?;
            }
            // Another process made it first. The lock decides which process may use it.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && folder.is_dir() => {}
            Err(error) => return Err(error),
        }
    }
    if path.is_dir() { Ok(()) } else { Err(io::ErrorKind::NotADirectory.into()) }
}

fn sync_parent(path: &Path) -> io::Result<()> {
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    File::open(parent)?.sync_all()
}

fn make_error(path: &Path, source: io::Error) -> DirError {
    let path = path.to_path_buf();
    match source.kind() {
        io::ErrorKind::NotADirectory => DirError::NotADirectory { path },
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            DirError::NotWritable { path, source }
        }
        _ => DirError::Io { path, what: "making it", source },
    }
}

fn lock(path: &Path, created: &mut Created) -> Result<(), DirError> {
    let name = path.join(LOCK);
    let locked = || DirError::Locked { path: path.to_path_buf() };
    let failed = |source| DirError::Io { path: path.to_path_buf(), what: "locking it", source };
    let existed = name.exists();
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&name)
        .map_err(|source| make_error(path, source))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Err(locked()),
        Err(TryLockError::Error(source)) => return Err(failed(source)),
    }
    // Between our opening of the file and our lock on it, another process may have removed the file
    // to undo its own attempt. Then the lock guards nothing.
    let ours = file.metadata().map_err(failed)?;
    match fs::metadata(&name) {
        Ok(there) if (there.dev(), there.ino()) == (ours.dev(), ours.ino()) => {}
        _ => return Err(locked()),
    }
    // Only now may we remove the file: before, that could have been the file of another process
    // that made it at the same time and holds its lock.
    if !existed {
        created.paths.push(name);
    }
    created.lock = Some(file);
    Ok(())
}

fn empty(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())?;
        } else {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

fn read_mark(path: &Path) -> Result<Option<Mark>, DirError> {
    let name = path.join(IDENT);
    let failed = |source| DirError::Io { path: path.to_path_buf(), what: "reading IDENT", source };
    let bad = |reason: String| DirError::BadIdent { path: name.clone(), reason };
    match fs::metadata(&name) {
        Ok(metadata) if metadata.len() > MAX_IDENT_BYTES => {
            return Err(bad(format!("{} bytes are too many", metadata.len())));
        }
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    }
    let text = fs::read(&name).map_err(failed)?;
    let text = String::from_utf8(text).map_err(|_| bad("it is not text".to_owned()))?;
    // The format comes first, because another format may have other fields.
    let found = field(&text, "format").map_err(bad)?;
    if found != FORMAT {
        return Err(DirError::UnknownFormat { path: path.to_path_buf(), found });
    }
    let field = |name| field(&text, name).map_err(bad);
    Ok(Some(Mark {
        owner: Ident { cluster_id: field("cluster")?, store_id: field("store")? },
        lineage: field("lineage")?,
        generation: field("generation")?,
        log_sequence: field("log-sequence")?,
    }))
}

/// The number in the line `name = number`.
fn field(text: &str, name: &str) -> Result<u64, String> {
    text.lines()
        .filter_map(|line| line.split_once('='))
        .find(|(key, _)| key.trim() == name)
        .ok_or_else(|| format!("it says no {name}"))?
        .1
        .trim()
        .parse()
        .map_err(|_| format!("its {name} is not a number"))
}
