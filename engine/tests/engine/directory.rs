use std::fs;
use std::path::Path;

use esker_engine::{Cf, DataDir, DirError, EngineOptions, Engines, Ident, Kind, KvBatch, LogBatch};

const OURS: Ident = Ident { cluster_id: 7_000_000_000_000_000_001, store_id: 4 };

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().expect("a temporary folder")
}

fn open(path: &Path) -> Result<DataDir, DirError> {
    DataDir::open(path, Kind::Store)
}

/// What a store does at its start.
fn started(path: &Path) -> Result<(DataDir, Engines), DirError> {
    let mut directory = open(path)?;
    let engines = directory.open_engines(&EngineOptions::default())?;
    if directory.ident().is_none() {
        directory.found(OURS, 9, &engines)?;
    }
    directory.begin(&engines)?;
    Ok((directory, engines))
}

/// Starts a store `times` times, each time with a write that is acknowledged.
fn used(path: &Path, times: u64) {
    for n in 0..times {
        let (_directory, engines) = started(path).expect("a start");
        let mut log = LogBatch::new();
        log.append(1, n, b"entry");
        engines.log.write(&log).expect("a write");
        let mut kv = KvBatch::new();
        kv.put(Cf::Default, b"key", b"value");
        engines.kv.write(&kv).expect("a write");
        engines.kv.note_log_sequence(engines.log.sequence()).expect("a write");
        engines.kv.persist().expect("a flush");
    }
}

fn copy(from: &Path, to: &Path) {
    if to.exists() {
        fs::remove_dir_all(to).expect("a folder");
    }
    fs::create_dir_all(to).expect("a folder");
    for entry in fs::read_dir(from).expect("a folder") {
        let entry = entry.expect("an entry");
        let target = to.join(entry.file_name());
        match entry.file_type().expect("a type").is_dir() {
            true => copy(&entry.path(), &target),
            false => drop(fs::copy(entry.path(), target).expect("a file")),
        }
    }
}

/// Expects that a start is refused, with one line that says which part is at fault and what to do.
/// Returns the line.
fn not_whole(path: &Path, part: &str) -> String {
    let line =
        started(path).err().unwrap_or_else(|| panic!("{part} at fault was not seen")).to_string();
    assert!(line.contains("store 4 of cluster 7000000000000000001"), "{line}");
    assert!(line.contains(&path.join(part).display().to_string()), "{line}");
    assert!(line.contains("--replace") && !line.contains('\n'), "{line}");
    line
}

/// Expects a refusal whose message is one line with the path in it.
fn refused(path: &Path) -> DirError {
    let error = open(path).expect_err("a refusal");
    let line = error.to_string();
    assert!(line.contains(&path.display().to_string()), "{line}");
    assert!(!line.contains('\n'), "{line}");
    error
}

#[test]
fn a_missing_directory_is_made_and_found_again() {
    let folder = folder();
    let path = folder.path().join("deep/er/data");
    let mut directory = open(&path).expect("a new directory");
    assert_eq!(directory.ident(), None);
    for sub in [directory.kv(), directory.log(), directory.snap()] {
        assert!(sub.is_dir(), "{}", sub.display());
    }
    let engines = directory.open_engines(&EngineOptions::default()).expect("two engines");
    directory.found(OURS, 9, &engines).expect("a first owner");
    assert!(!directory.was_started());
    directory.begin(&engines).expect("a start");
    drop((directory, engines));
    let directory = open(&path).expect("the directory");
    assert!(directory.was_started());
    assert_eq!(directory.ident(), Some(OURS));
    assert_eq!(directory.path(), path);
}

#[test]
fn a_directory_has_one_owner_for_good() {
    let folder = folder();
    let (mut directory, engines) = started(folder.path()).expect("a start");
    let other = Ident { store_id: 5, ..OURS };
    let error = directory.found(other, 9, &engines).expect_err("another owner");
    assert!(matches!(error, DirError::OtherOwner { found, .. } if found == OURS));
    assert_eq!(directory.ident(), Some(OURS));
}

#[test]
fn a_part_that_is_missing_or_empty_or_new_is_named() {
    let folder = folder();
    let path = folder.path().join("store");
    used(&path, 2);
    let whole = folder.path().join("whole");
    copy(&path, &whole);
    for part in ["kv", "log"] {
        fs::remove_dir_all(path.join(part)).expect("a folder");
        assert!(not_whole(&path, part).contains("is missing"));
        assert!(!path.join(part).exists(), "a refusal made the part anew");
        // A mount point without its disk.
        fs::create_dir(path.join(part)).expect("a folder");
        assert!(not_whole(&path, part).contains("is empty"));
        copy(&whole, &path);
        // A part that was made anew by hand, or by an older program.
        fs::remove_dir_all(path.join(part)).expect("a folder");
        let strange = folder.path().join("strange");
        let _ = fs::remove_dir_all(&strange);
        drop(open(&strange).and_then(|d| d.open_engines(&EngineOptions::default())).expect("new"));
        copy(&strange.join(part), &path.join(part));
        assert!(not_whole(&path, part).contains("is new"));
        copy(&whole, &path);
    }
    // Both at once: the error names the first that is seen.
    for part in ["kv", "log"] {
        fs::remove_dir_all(path.join(part)).expect("a folder");
    }
    assert!(not_whole(&path, "kv").contains("is missing"));
    copy(&whole, &path);
    started(&path).expect("what is whole again starts");
}

#[test]
fn a_missing_ident_is_named_while_an_engine_is_there() {
    let folder = folder();
    let path = folder.path().join("store");
    used(&path, 1);
    let whole = folder.path().join("whole");
    copy(&path, &whole);
    for also in [None, Some("kv"), Some("log")] {
        fs::remove_file(path.join("IDENT")).expect("the ident");
        if let Some(part) = also {
            fs::remove_dir_all(path.join(part)).expect("a folder");
        }
        let line = started(&path).err().expect("a refusal").to_string();
        assert!(line.contains("IDENT is missing") && line.contains("holds data"), "{line}");
        copy(&whole, &path);
    }
}

#[test]
fn an_old_copy_of_a_part_is_named_also_of_the_same_start() {
    let folder = folder();
    let path = folder.path().join("store");
    let yesterday = folder.path().join("yesterday");
    used(&path, 2);
    copy(&path, &yesterday);
    used(&path, 2);
    let whole = folder.path().join("whole");
    copy(&path, &whole);
    for (part, says) in [("kv", "2nd of 4 starts"), ("log", "2nd of 4 starts")] {
        copy(&yesterday.join(part), &path.join(part));
        assert!(not_whole(&path, part).contains(says));
        copy(&whole, &path);
    }
    fs::copy(yesterday.join("IDENT"), path.join("IDENT")).expect("the ident");
    assert!(not_whole(&path, "IDENT").contains("2nd of 4 starts"));
    copy(&whole, &path);

    // Copied while the store ran, and put back before it was started again.
    let (directory, engines) = started(&path).expect("a start");
    copy(&path.join("log"), &folder.path().join("earlier"));
    for n in 0..100 {
        let mut log = LogBatch::new();
        log.append(1, 100 + n, b"entry");
        engines.log.write(&log).expect("a write");
    }
    engines.kv.note_log_sequence(engines.log.sequence()).expect("a write");
    engines.kv.persist().expect("a flush");
    drop((directory, engines));
    copy(&folder.path().join("earlier"), &path.join("log"));
    assert!(not_whole(&path, "log").contains("it ends at change"));
}

#[test]
fn another_stores_part_is_named_with_its_owner() {
    let folder = folder();
    let (ours, theirs) = (folder.path().join("ours"), folder.path().join("theirs"));
    used(&ours, 1);
    let mut directory = open(&theirs).expect("a directory");
    let engines = directory.open_engines(&EngineOptions::default()).expect("two engines");
    directory.found(Ident { store_id: 5, ..OURS }, 10, &engines).expect("an owner");
    directory.begin(&engines).expect("a start");
    drop((directory, engines));
    let whole = folder.path().join("whole");
    copy(&ours, &whole);
    for part in ["kv", "log"] {
        copy(&theirs.join(part), &ours.join(part));
        assert!(not_whole(&ours, part).contains("belongs to store 5"));
        copy(&whole, &ours);
    }
}

#[test]
fn a_first_start_that_a_crash_interrupted_is_begun_again() {
    let folder = folder();
    let path = folder.path().join("store");
    // Engines, and marks without IDENT.
    drop(open(&path).and_then(|d| d.open_engines(&EngineOptions::default())).expect("engines"));
    let mut directory = open(&path).expect("a directory");
    let engines = directory.open_engines(&EngineOptions::default()).expect("two engines");
    directory.found(OURS, 9, &engines).expect("an owner");
    drop((directory, engines));
    fs::remove_file(path.join("IDENT")).expect("the ident");
    used(&path, 1);
    // Marks of the next start, but not IDENT's, several times in a row: a full disk does that.
    let before = fs::read(path.join("IDENT")).expect("the ident");
    for _ in 0..3 {
        used(&path, 1);
        fs::write(path.join("IDENT"), &before).expect("the ident");
    }
    used(&path, 1);
}

#[test]
fn what_was_found_damaged_does_not_open_again() {
    let folder = folder();
    used(folder.path(), 1);
    DataDir::condemn(folder.path(), "000012.sst: block checksum mismatch\nat 17").expect("a note");
    let error = open(folder.path()).expect_err("a refusal").to_string();
    assert!(error.contains("000012.sst") && error.contains("--replace"), "{error}");
    assert!(!error.contains('\n'), "{error}");
}

#[test]
fn a_directory_is_used_by_one_at_a_time() {
    let folder = folder();
    let directory = open(folder.path()).expect("a directory");
    assert!(matches!(refused(folder.path()), DirError::Locked { .. }));
    assert!(directory.kv().is_dir(), "the refusal took the owner's folders");
    drop(directory);
    open(folder.path()).expect("the directory is free again");
}

#[test]
fn old_snapshots_are_removed_and_the_rest_is_kept() {
    let folder = folder();
    let directory = open(folder.path()).expect("a directory");
    fs::create_dir(directory.snap().join("region-1")).expect("a folder");
    fs::write(directory.snap().join("region-1/1.sst"), b"half").expect("a file");
    fs::write(directory.snap().join("2.sst"), b"half").expect("a file");
    fs::write(directory.kv().join("data"), b"whole").expect("a file");
    drop(directory);
    let directory = open(folder.path()).expect("the directory");
    directory.empty_snapshots().expect("an empty folder");
    let left = fs::read_dir(directory.snap()).expect("the folder").count();
    assert_eq!(left, 0);
    assert!(directory.kv().join("data").exists());
}

#[test]
fn a_file_in_the_way_is_refused_and_nothing_is_left_behind() {
    let folder = folder();
    let file = folder.path().join("file");
    fs::write(&file, b"somebody's").expect("a file");
    assert!(matches!(refused(&file), DirError::NotADirectory { .. }));
    refused(&file.join("below/data"));

    // Refused halfway: what was made before the obstacle is taken away again.
    let data = folder.path().join("data");
    fs::create_dir(&data).expect("a folder");
    fs::write(data.join("snap"), b"somebody's").expect("a file");
    refused(&data);
    let left: Vec<_> = fs::read_dir(&data)
        .expect("the folder")
        .map(|entry| entry.expect("an entry").file_name())
        .collect();
    assert_eq!(left, ["snap"]);
}

#[test]
fn a_place_where_nothing_can_be_made_is_refused() {
    let path = Path::new("/proc/esker-data/deep");
    refused(path);
    assert!(!path.exists());
}

#[test]
fn an_ident_of_another_format_or_a_damaged_one_is_refused() {
    let folder = folder();
    let ident = folder.path().join("IDENT");
    let with = |text: &[u8]| {
        fs::write(&ident, text).expect("an ident");
        let error = refused(folder.path());
        assert!(!folder.path().join("kv").exists(), "half made: {error}");
        assert!(!folder.path().join("LOCK").exists(), "half made: {error}");
        error
    };
    assert!(matches!(
        with(b"format = 3\nowner = someone\n"),
        DirError::UnknownFormat { found: 3, .. }
    ));
    for damaged in [
        b"".as_slice(),
        b"format = 2\ncluster = 1\n",
        b"format = 2\ncluster = 1\nstore = 1\n",
        b"format = 2\ncluster = 1\nstore = four\n",
        b"format = 2\ncluster = -1\nstore = 1\n",
        b"\xff\xfe",
        &[b' '; 10_000],
    ] {
        assert!(matches!(with(damaged), DirError::BadIdent { .. }));
    }
    let found = fs::read(&ident).expect("the ident");
    assert_eq!(found, [b' '; 10_000], "a refusal changed the ident");
}

#[test]
fn a_crash_while_the_ident_is_written_leaves_a_directory_without_one() {
    let folder = folder();
    drop(open(folder.path()).expect("a directory"));
    fs::write(folder.path().join("IDENT.new"), b"format = 2\nclu").expect("half a file");
    let directory = open(folder.path()).expect("the directory");
    assert_eq!(directory.ident(), None);
    drop(directory);
    used(folder.path(), 1);
    let directory = open(folder.path()).expect("the directory");
    assert_eq!(directory.ident(), Some(OURS));
}
