//! Disks that a simulation can crash.
//!
//! A machine's files are real files, in a directory for temporary ones, and the engines write them
//! as in production. What is simulated is `fsync`: this file takes the place of the C library's
//! functions and notes how long each file was when it was last synced. A loss of power then leaves
//! of each file what was synced, and sometimes a part of what was not. That also makes a sync cost
//! nothing. The power can also go at one of the next syncs: that one, and everything after it, is
//! lost.
//!
//! Not simulated: a directory whose entries were not synced, and bytes that were written behind
//! others that were not.
//!
//! A crash copies what it leaves into a new directory. Whoever still holds the old one, such as a
//! thread of RocksDB's, can go on writing there.

use std::cell::Cell;
use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::fd::{AsRawFd as _, BorrowedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock};

use parking_lot::{Mutex, RwLock};
use rand::RngExt as _;
use rand_chacha::ChaCha8Rng;
use rustix::fs::{AtFlags, StatxFlags};

/// All disks of the process, by the directory that holds their generations.
static DISKS: LazyLock<RwLock<HashMap<PathBuf, Arc<Inner>>>> = LazyLock::new(RwLock::default);
/// How many there are, so that programs without one pay nothing.
static COUNT: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    /// Whether this thread's syncs count for [`Disk::cut_power_after`].
    static IS_COUNTED: Cell<bool> = const { Cell::new(false) };
}

/// From now on the syncs of this thread count for [`Disk::cut_power_after`]. Those of RocksDB's own
/// threads do not: they come when they come.
pub fn count_syncs() {
    IS_COUNTED.set(true);
}

/// What tells a file from all others, also from one that had its number before.
type FileId = (u64, i64, u32);

#[derive(Default)]
struct Inner {
    /// How much of each file is on the disk.
    synced: Mutex<HashMap<FileId, u64>>,
    /// Whether the disk fails to sync the log.
    fails: AtomicBool,
    /// The power goes at the sync after so many others, if it is not negative.
    syncs_left: AtomicI64,
    /// Whether it has gone. Whatever is written or sent from here on has not happened: what the
    /// crash will leave was copied at that moment.
    is_dark: Arc<AtomicBool>,
    generation: AtomicU32,
}

impl Inner {
    /// Copies what is left of one generation to the next. With `rng`, some of what was not synced
    /// may be left.
    fn copy(
        &self,
        from: &Path,
        to: &Path,
        crash: Crash,
        mut rng: Option<&mut ChaCha8Rng>,
    ) -> io::Result<()> {
        fs::create_dir_all(to)?;
        let mut entries = fs::read_dir(from)?.collect::<io::Result<Vec<_>>>()?;
        // A directory has no order of its own, and what is left must be the same each time.
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let (from, to) = (entry.path(), to.join(entry.file_name()));
            if entry.file_type()?.is_dir() {
                self.copy(&from, &to, crash, rng.as_deref_mut())?;
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
            let synced = self.synced.lock().get(&file_id(&file)?).copied();
            let certain = synced.unwrap_or(0).min(size);
            let left = match (crash, rng.as_deref_mut()) {
                (Crash::Process, _) => size,
                // Some of the rest may have been written by itself.
                (Crash::Power, Some(rng)) => match rng.random_bool(0.3) {
                    true => rng.random_range(certain..=size),
                    false => certain,
                },
                (Crash::Power, None) => certain,
            };
            if crash == Crash::Power && left == 0 && synced.is_none() {
                continue;
            }
            if left == size && name.ends_with(".sst") {
                // Such files never change.
                fs::hard_link(&from, &to)?;
                continue;
            }
            let mut copy = File::create(&to)?;
            io::copy(&mut file.take(left), &mut copy)?;
            // What was not synced is no more certain because a process died. What is there when
            // the power comes back is what there is.
            match crash {
                Crash::Process if synced.is_none() => {}
                Crash::Process => drop(self.synced.lock().insert(file_id(&copy)?, certain)),
                Crash::Power => drop(self.synced.lock().insert(file_id(&copy)?, left)),
            }
        }
        Ok(())
    }

    /// The power goes, in the directory of all generations.
    fn go_dark(&self, root: &Path) -> io::Result<()> {
        self.is_dark.store(true, Ordering::SeqCst);
        let generation = self.generation.load(Ordering::SeqCst);
        let path = |generation: u32| root.join(generation.to_string());
        self.copy(&path(generation), &path(generation + 1), Crash::Power, None)
    }
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
    inner: Arc<Inner>,
}

impl Disk {
    /// An empty disk in `root`, which is made.
    pub fn new(root: PathBuf) -> io::Result<Disk> {
        fs::create_dir_all(root.join("0"))?;
        let root = root.canonicalize()?;
        let inner = Arc::new(Inner { syncs_left: AtomicI64::new(-1), ..Inner::default() });
        DISKS.write().insert(root.clone(), inner.clone());
        COUNT.fetch_add(1, Ordering::SeqCst);
        Ok(Disk { root, inner })
    }

    /// Where the machine's files are, until the next crash.
    pub fn path(&self) -> PathBuf {
        self.root.join(self.inner.generation.load(Ordering::SeqCst).to_string())
    }

    /// From now on, or no longer, the log cannot be synced.
    pub fn set_failing(&self, fails: bool) {
        self.inner.fails.store(fails, Ordering::SeqCst);
    }

    pub fn is_failing(&self) -> bool {
        self.inner.fails.load(Ordering::SeqCst)
    }

    /// The power goes at the sync after so many others.
    pub fn cut_power_after(&self, syncs: u32) {
        self.inner.syncs_left.store(i64::from(syncs), Ordering::SeqCst);
    }

    /// Whether the power has gone, so that the machine must crash before it does anything else.
    pub fn power(&self) -> Arc<AtomicBool> {
        self.inner.is_dark.clone()
    }

    pub fn is_dark(&self) -> bool {
        self.inner.is_dark.load(Ordering::SeqCst)
    }

    /// Ends whatever used the disk.
    pub fn crash(&mut self, crash: Crash, rng: &mut ChaCha8Rng) -> io::Result<()> {
        let (from, was_dark) = (self.path(), self.is_dark());
        self.inner.generation.fetch_add(1, Ordering::SeqCst);
        self.mend();
        match was_dark {
            true => Ok(()),
            false => self.inner.copy(&from, &self.path(), crash, Some(rng)),
        }
    }

    /// The disk is exchanged for an empty one.
    pub fn lose(&mut self) -> io::Result<()> {
        // Behind what may have been copied already.
        self.inner.generation.fetch_add(2, Ordering::SeqCst);
        self.mend();
        fs::create_dir_all(self.path())
    }

    /// No more faults. Power that has gone has gone.
    pub fn calm(&self) {
        self.set_failing(false);
        self.inner.syncs_left.store(-1, Ordering::SeqCst);
    }

    fn mend(&self) {
        self.set_failing(false);
        self.inner.syncs_left.store(-1, Ordering::SeqCst);
        self.inner.is_dark.store(false, Ordering::SeqCst);
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
    let found = path.ancestors().find_map(|above| Some((above, disks.get(above)?.clone())));
    let Some((root, disk)) = found else {
        return Sync::NotOurs;
    };
    drop(disks);
    if IS_COUNTED.get()
        && disk.syncs_left.load(Ordering::SeqCst) >= 0
        && disk.syncs_left.fetch_sub(1, Ordering::SeqCst) == 0
        && let Err(error) = disk.go_dark(root)
    {
        panic!("what a loss of power leaves cannot be copied: {error}");
    }
    if disk.is_dark.load(Ordering::SeqCst) {
        return Sync::Done;
    }
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

    use rand::SeedableRng as _;

    use super::*;

    #[test]
    fn a_loss_of_power_takes_what_was_not_synced() {
        let rng = &mut ChaCha8Rng::seed_from_u64(1);
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
        let mut seen = std::collections::BTreeSet::new();
        for _ in 0..100 {
            let root = tempfile::tempdir().expect("a directory");
            let mut disk = Disk::new(root.path().join("machine")).expect("a disk");
            write(&disk, "half", &[("one", true), ("two", false)]);
            write(&disk, "whole", &[("one", true), ("two", true)]);
            write(&disk, "never", &[("one", false)]);
            disk.crash(Crash::Process, rng).expect("it crashes");
            assert_eq!(read(&disk, "half").as_deref(), Some("onetwo"));
            assert_eq!(read(&disk, "never").as_deref(), Some("one"));
            // That a process has died in between makes nothing more certain.
            disk.crash(Crash::Power, rng).expect("it crashes");
            assert_eq!(read(&disk, "whole").as_deref(), Some("onetwo"));
            seen.extend(["half", "never"].map(|name| read(&disk, name)));
            disk.lose().expect("an empty disk");
            assert_eq!(read(&disk, "whole"), None);
        }
        let seen: Vec<_> = seen.iter().map(Option::as_deref).collect();
        let parts = [None, Some("on"), Some("one"), Some("onet"), Some("onetw"), Some("onetwo")];
        assert!(seen.contains(&None) && seen.contains(&Some("one")), "{seen:?}");
        assert!(parts.iter().all(|part| *part == Some("on") || seen.contains(part)), "{seen:?}");
    }

    #[test]
    fn nothing_is_synced_when_the_power_has_gone() {
        count_syncs();
        for seed in 0..10 {
            let root = tempfile::tempdir().expect("a directory");
            let mut disk = Disk::new(root.path().join("machine")).expect("a disk");
            disk.cut_power_after(1);
            for (name, is_dark) in [("first", false), ("second", true), ("third", true)] {
                let mut file = File::create(disk.path().join(name)).expect("it is made");
                file.write_all(b"x").expect("it is written");
                file.sync_data().expect("nobody notices");
                assert_eq!(disk.is_dark(), is_dark, "{name}");
            }
            disk.crash(Crash::Power, &mut ChaCha8Rng::seed_from_u64(seed)).expect("it crashes");
            assert!(disk.path().join("first").exists() && !disk.is_dark());
            assert!(!disk.path().join("second").exists() && !disk.path().join("third").exists());
        }
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
