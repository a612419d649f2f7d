//! Disks that a simulation can crash.
//!
//! A machine's files are real files, in a directory for temporary ones, and the engines write them
//! as in production. What is simulated is `fsync`: this file takes the place of the C library's
//! functions and notes how long each file was when it was last synced. A loss of power then leaves
//! of each file what was synced, and of a file that never was nothing. That also makes a sync cost
//! nothing.
//!
//! Not simulated: a directory whose entries were not synced, and a sector that was written in part.
//!
//! A crash copies what it leaves into a new directory. Whoever still holds the old one, such as a
//! thread of RocksDB's, can go on writing there.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::fd::{AsRawFd as _, BorrowedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock};

use parking_lot::{Mutex, RwLock};
use rustix::fs::{AtFlags, StatxFlags};

/// All disks of the process, by the directory that holds their generations.
static DISKS: LazyLock<RwLock<HashMap<PathBuf, Arc<Inner>>>> = LazyLock::new(RwLock::default);
/// How many there are, so that programs without one pay nothing.
static COUNT: AtomicUsize = AtomicUsize::new(0);

/// What tells a file from all others, also from one that had its number before.
type FileId = (u64, i64, u32);

#[derive(Default)]
struct Inner {
    /// How much of each file is on the disk.
    synced: Mutex<HashMap<FileId, u64>>,
    /// Whether the disk fails to sync the log.
    fails: AtomicBool,
}

/// What a crash leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Crash {
    /// The process died. What it wrote is there, synced or not.
    Process,
    /// The machine lost power. What was synced is there.
    Power,
}

/// The disk of one simulated machine.
pub struct Disk {
    root: PathBuf,
    generation: u32,
    inner: Arc<Inner>,
}

impl Disk {
    /// An empty disk in `root`, which is made.
    pub fn new(root: PathBuf) -> io::Result<Disk> {
        fs::create_dir_all(root.join("0"))?;
        let root = root.canonicalize()?;
        let inner = Arc::new(Inner::default());
        DISKS.write().insert(root.clone(), inner.clone());
        COUNT.fetch_add(1, Ordering::SeqCst);
        Ok(Disk { root, generation: 0, inner })
    }

    /// Where the machine's files are, until the next crash.
    pub fn path(&self) -> PathBuf {
        self.root.join(self.generation.to_string())
    }

    /// From now on, or no longer, the log cannot be synced.
    pub fn set_failing(&self, fails: bool) {
        self.inner.fails.store(fails, Ordering::SeqCst);
    }

    /// Ends whatever used the disk.
    pub fn crash(&mut self, crash: Crash) -> io::Result<()> {
        self.set_failing(false);
        let from = self.path();
        self.generation += 1;
        self.copy(&from, &self.path(), crash)
    }

    /// The disk is exchanged for an empty one.
    pub fn lose(&mut self) -> io::Result<()> {
        self.set_failing(false);
        self.generation += 1;
        fs::create_dir_all(self.path())
    }

    fn copy(&self, from: &Path, to: &Path, crash: Crash) -> io::Result<()> {
        fs::create_dir_all(to)?;
        for entry in fs::read_dir(from)? {
            let entry = entry?;
            let (from, to) = (entry.path(), to.join(entry.file_name()));
            if entry.file_type()?.is_dir() {
                self.copy(&from, &to, crash)?;
                continue;
            }
            let name = entry.file_name();
            let name = name.to_string_lossy();
            // Nobody reads the engines' own reports, and locks end with their process.
            if name == "LOCK" || name == "LOG" || name.starts_with("LOG.") {
                continue;
            }
            let file = File::open(&from)?;
            let size = file.metadata()?.len();
            let synced = self.inner.synced.lock().get(&file_id(&file)?).copied();
            let left = match (crash, synced) {
                (Crash::Process, _) => size,
                (Crash::Power, Some(synced)) => synced.min(size),
                (Crash::Power, None) => continue,
            };
            if left == size && name.ends_with(".sst") {
                // Such files never change.
                fs::hard_link(&from, &to)?;
                continue;
            }
            let mut copy = File::create(&to)?;
            io::copy(&mut file.take(left), &mut copy)?;
            self.inner.synced.lock().insert(file_id(&copy)?, left);
        }
        Ok(())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        DISKS.write().remove(&self.root);
        COUNT.fetch_sub(1, Ordering::SeqCst);
    }
}

fn file_id(file: &File) -> io::Result<FileId> {
    let wanted = StatxFlags::INO | StatxFlags::BTIME;
    let stat = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, wanted)?;
    Ok((stat.stx_ino, stat.stx_btime.tv_sec, stat.stx_btime.tv_nsec))
}

/// What became of a request to sync a file.
enum Sync {
    /// It is not on a simulated disk.
    NotOurs,
    Done,
    Failed,
}

fn sync(descriptor: RawFd) -> Sync {
    if COUNT.load(Ordering::SeqCst) == 0 {
        return Sync::NotOurs;
    }
    let Ok(path) = fs::read_link(format!("/proc/self/fd/{descriptor}")) else {
        return Sync::NotOurs;
    };
    // The file is in a generation of the disk, at some depth.
    let disks = DISKS.read();
    let Some(disk) = path.ancestors().find_map(|above| disks.get(above)).cloned() else {
        return Sync::NotOurs;
    };
    drop(disks);
    let is_log = path.extension().is_some_and(|extension| extension == "log");
    if is_log && disk.fails.load(Ordering::SeqCst) {
        return Sync::Failed;
    }
    // SAFETY: the caller of `fsync` holds the descriptor open.
    let borrowed = unsafe { BorrowedFd::borrow_raw(descriptor) };
    let Ok(file) = borrowed.try_clone_to_owned().map(File::from) else { return Sync::Failed };
    match (file.metadata(), file_id(&file)) {
        (Ok(metadata), Ok(id)) => {
            if metadata.is_file() {
                disk.synced.lock().insert(id, metadata.len());
            }
            Sync::Done
        }
        _ => Sync::Failed,
    }
}

fn answer(descriptor: RawFd, call: libc::c_long) -> libc::c_int {
    match sync(descriptor) {
        Sync::Done => 0,
        Sync::Failed => {
            // SAFETY: the address is that of this thread's `errno`.
            unsafe { *libc::__errno_location() = libc::EIO };
            -1
        }
        // SAFETY: a system call with one descriptor as its argument.
        Sync::NotOurs => unsafe { libc::syscall(call, descriptor) as libc::c_int },
    }
}

/// Takes the place of the C library's function of this name.
#[unsafe(no_mangle)]
pub extern "C" fn fsync(descriptor: libc::c_int) -> libc::c_int {
    answer(descriptor, libc::SYS_fsync)
}

/// Takes the place of the C library's function of this name.
#[unsafe(no_mangle)]
pub extern "C" fn fdatasync(descriptor: libc::c_int) -> libc::c_int {
    answer(descriptor, libc::SYS_fdatasync)
}

/// Keeps the functions above in every program that is built with this crate.
pub fn is_ours(file: &File) -> bool {
    DISKS.read().keys().any(|root| {
        fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))
            .is_ok_and(|path| path.starts_with(root))
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn a_loss_of_power_takes_what_was_not_synced() {
        let root = tempfile::tempdir().expect("a directory");
        let mut disk = Disk::new(root.path().join("machine")).expect("a disk");
        let write = |disk: &Disk, name: &str, parts: &[(&str, bool)]| {
            let mut file = File::create(disk.path().join(name)).expect("it is made");
            for (part, is_synced) in parts {
                file.write_all(part.as_bytes()).expect("it is written");
                if *is_synced {
                    file.sync_data().expect("it is synced");
                }
            }
        };
        let read = |disk: &Disk, name: &str| fs::read_to_string(disk.path().join(name)).ok();
        write(&disk, "half", &[("one", true), ("two", false)]);
        write(&disk, "whole", &[("one", true), ("two", true)]);
        write(&disk, "never", &[("one", false)]);
        disk.crash(Crash::Process).expect("it crashes");
        assert_eq!(read(&disk, "half").as_deref(), Some("onetwo"));
        assert_eq!(read(&disk, "never").as_deref(), Some("one"));
        write(&disk, "half", &[("one", true), ("two", false)]);
        write(&disk, "never", &[("one", false)]);
        disk.crash(Crash::Power).expect("it crashes");
        assert_eq!(read(&disk, "half").as_deref(), Some("one"));
        assert_eq!(read(&disk, "whole").as_deref(), Some("onetwo"));
        assert_eq!(read(&disk, "never"), None);
        disk.lose().expect("an empty disk");
        assert_eq!(read(&disk, "whole"), None);
    }

    #[test]
    fn a_failing_disk_refuses_to_sync_the_log() {
        let root = tempfile::tempdir().expect("a directory");
        let disk = Disk::new(root.path().join("machine")).expect("a disk");
        let log = File::create(disk.path().join("000007.log")).expect("it is made");
        assert!(is_ours(&log));
        log.sync_data().expect("it is synced");
        disk.set_failing(true);
        assert_eq!(log.sync_data().map_err(|error| error.raw_os_error()), Err(Some(libc::EIO)));
    }
}
