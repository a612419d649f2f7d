//! The data directory of a store: who uses it, and whose it is.
//!
//! ```text
//! LOCK    held by the process that uses the directory
//! IDENT   which store of which cluster it belongs to, once known
//! kv/     the key-value engine
//! log/    the raft log
//! snap/   snapshots under way
//! ```

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use thiserror::Error;

const LOCK: &str = "LOCK";
const IDENT: &str = "IDENT";
const IDENT_NEW: &str = "IDENT.new";
const KV: &str = "kv";
const LOG: &str = "log";
const SNAP: &str = "snap";

/// The version of the directory's layout that this program reads and writes.
const FORMAT: u64 = 1;
/// A longer `IDENT` was not written by any version of this program.
const MAX_IDENT_BYTES: u64 = 4 << 10;

/// Which store of which cluster a directory belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ident {
    pub cluster_id: u64,
    pub store_id: u64,
}

#[derive(Debug, Error)]
pub enum DirError {
    #[error("cannot use the data directory {}: {what} failed: {source}", path.display())]
    Io { path: PathBuf, what: &'static str, source: io::Error },
    #[error("the data directory {} cannot be used: it is not a directory", path.display())]
    NotADirectory { path: PathBuf },
    #[error("the data directory {} is not writable: {source}", path.display())]
    NotWritable { path: PathBuf, source: io::Error },
    #[error("the data directory {} is in use by another process", path.display())]
    Locked { path: PathBuf },
    #[error(
        "the data directory {} has format {found}, but this version of Esker reads only format {FORMAT}",
        path.display()
    )]
    UnknownFormat { path: PathBuf, found: u64 },
    #[error("{} is damaged: {reason}", path.display())]
    BadIdent { path: PathBuf, reason: String },
    #[error(
        "the data directory {} belongs to store {} of cluster {}, not to store {} of cluster {}",
        path.display(), found.store_id, found.cluster_id, wanted.store_id, wanted.cluster_id
    )]
    OtherOwner { path: PathBuf, found: Ident, wanted: Ident },
}

/// An open data directory; it is locked until this is dropped.
#[derive(Debug)]
pub struct DataDir {
    path: PathBuf,
    ident: Option<Ident>,
    _lock: Option<File>,
}

impl DataDir {
    /// Opens a directory, making it and its parents where they are missing, and
    /// locks it. On an error everything is as it was before.
    pub fn open(path: &Path) -> Result<DataDir, DirError> {
        let mut created = Created::default();
        let opened = DataDir::open_recording(path, &mut created);
        if opened.is_err() {
            created.undo();
        }
        opened
    }

    fn open_recording(path: &Path, created: &mut Created) -> Result<DataDir, DirError> {
        create_dirs(path, created).map_err(|source| make_error(path, source))?;
        lock(path, created)?;
        let ident = read_ident(path)?;
        for name in [KV, LOG, SNAP] {
            create_dirs(&path.join(name), created).map_err(|source| make_error(path, source))?;
        }
        Ok(DataDir { path: path.to_path_buf(), ident, _lock: created.lock.take() })
    }

    /// Removes what is left of snapshots that were under way when the directory
    /// was last used. For after the store has finished what it had begun with them.
    pub fn empty_snapshots(&self) -> Result<(), DirError> {
        empty(&self.snap()).map_err(|source| DirError::Io {
            path: self.path.clone(),
            what: "removing old snapshots",
            source,
        })
    }

    /// Whose it is; `None` until [`write_ident`](Self::write_ident).
    pub fn ident(&self) -> Option<Ident> {
        self.ident
    }

    /// Says for good whose the directory is. Saying the same again is no error.
    pub fn write_ident(&mut self, ident: Ident) -> Result<(), DirError> {
        if let Some(found) = self.ident {
            if found == ident {
                return Ok(());
            }
            return Err(DirError::OtherOwner { path: self.path.clone(), found, wanted: ident });
        }
        // A crash leaves no file or the whole one: the new name is made durable
        // only after the content.
        let write = || -> io::Result<()> {
            let new = self.path.join(IDENT_NEW);
            let mut file = File::create(&new)?;
            file.write_all(ident.to_text().as_bytes())?;
            file.sync_all()?;
            fs::rename(&new, self.path.join(IDENT))?;
            File::open(&self.path)?.sync_all()
        };
        write().map_err(|source| DirError::Io {
            path: self.path.clone(),
            what: "writing IDENT",
            source,
        })?;
        self.ident = Some(ident);
        Ok(())
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

impl Ident {
    fn to_text(self) -> String {
        let Ident { cluster_id, store_id } = self;
        format!("format = {FORMAT}\ncluster = {cluster_id}\nstore = {store_id}\n")
    }
}

/// What an attempt to open has made so far.
#[derive(Default)]
struct Created {
    /// Outermost first.
    paths: Vec<PathBuf>,
    /// Held until everything is taken away again.
    lock: Option<File>,
}

impl Created {
    /// Takes it all away, innermost first. A folder in which somebody else has
    /// put something meanwhile stays.
    fn undo(self) {
        for path in self.paths.iter().rev() {
            let removed = if path.file_name() == Some(OsStr::new(LOCK)) {
                fs::remove_file(path)
            } else {
                fs::remove_dir(path)
            };
            if let Err(error) = removed {
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
                // What is acknowledged later lies in it: its name must outlive a
                // power failure, too.
                sync_parent(folder)?;
            }
            // Another process came first; who gets the lock will be seen.
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
    // Another process may have undone its own attempt between our opening of
    // its file and our lock on it: then the lock guards nothing.
    let ours = file.metadata().map_err(failed)?;
    match fs::metadata(&name) {
        Ok(there) if (there.dev(), there.ino()) == (ours.dev(), ours.ino()) => {}
        _ => return Err(locked()),
    }
    // Only now is it ours to take away: a process that made it at the same time
    // would lose the file that it holds the lock of.
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

fn read_ident(path: &Path) -> Result<Option<Ident>, DirError> {
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
    // The format first: another one may have other fields.
    let found = field(&text, "format").map_err(bad)?;
    if found != FORMAT {
        return Err(DirError::UnknownFormat { path: path.to_path_buf(), found });
    }
    Ok(Some(Ident {
        cluster_id: field(&text, "cluster").map_err(bad)?,
        store_id: field(&text, "store").map_err(bad)?,
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
