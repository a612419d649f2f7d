use std::fs;
use std::path::Path;

use esker_engine::{DataDir, DirError, Ident};

const OURS: Ident = Ident { cluster_id: 7_000_000_000_000_000_001, store_id: 4 };

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().expect("a temporary folder")
}

/// A refusal: one line with the path in it.
fn refused(path: &Path) -> DirError {
    let error = DataDir::open(path).expect_err("a refusal");
    let line = error.to_string();
    assert!(line.contains(&path.display().to_string()), "{line}");
    assert!(!line.contains('\n'), "{line}");
    error
}

#[test]
fn a_missing_directory_is_made_and_found_again() {
    let folder = folder();
    let path = folder.path().join("deep/er/data");
    let mut directory = DataDir::open(&path).expect("a new directory");
    assert_eq!(directory.ident(), None);
    for sub in [directory.kv(), directory.log(), directory.snap()] {
        assert!(sub.is_dir(), "{}", sub.display());
    }
    directory.write_ident(OURS).expect("a first ident");
    directory.write_ident(OURS).expect("the same ident");
    drop(directory);
    let directory = DataDir::open(&path).expect("the directory");
    assert_eq!(directory.ident(), Some(OURS));
    assert_eq!(directory.path(), path);
}

#[test]
fn a_directory_has_one_owner_for_good() {
    let folder = folder();
    let mut directory = DataDir::open(folder.path()).expect("a directory");
    directory.write_ident(OURS).expect("a first ident");
    let other = Ident { store_id: 5, ..OURS };
    let error = directory.write_ident(other).expect_err("another ident");
    assert!(matches!(error, DirError::OtherOwner { found, .. } if found == OURS));
    assert_eq!(directory.ident(), Some(OURS));
}

#[test]
fn a_directory_is_used_by_one_at_a_time() {
    let folder = folder();
    let directory = DataDir::open(folder.path()).expect("a directory");
    assert!(matches!(refused(folder.path()), DirError::Locked { .. }));
    assert!(directory.kv().is_dir(), "the refusal took the owner's folders");
    drop(directory);
    DataDir::open(folder.path()).expect("the directory is free again");
}

#[test]
fn old_snapshots_are_removed_and_the_rest_is_kept() {
    let folder = folder();
    let directory = DataDir::open(folder.path()).expect("a directory");
    fs::create_dir(directory.snap().join("region-1")).expect("a folder");
    fs::write(directory.snap().join("region-1/1.sst"), b"half").expect("a file");
    fs::write(directory.snap().join("2.sst"), b"half").expect("a file");
    fs::write(directory.kv().join("data"), b"whole").expect("a file");
    drop(directory);
    let directory = DataDir::open(folder.path()).expect("the directory");
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
        with(b"format = 2\nowner = someone\n"),
        DirError::UnknownFormat { found: 2, .. }
    ));
    for damaged in [
        b"".as_slice(),
        b"format = 1\ncluster = 1\n",
        b"format = 1\ncluster = 1\nstore = four\n",
        b"format = 1\ncluster = -1\nstore = 1\n",
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
    drop(DataDir::open(folder.path()).expect("a directory"));
    fs::write(folder.path().join("IDENT.new"), b"format = 1\nclu").expect("half a file");
    let mut directory = DataDir::open(folder.path()).expect("the directory");
    assert_eq!(directory.ident(), None);
    directory.write_ident(OURS).expect("an ident");
    drop(directory);
    let directory = DataDir::open(folder.path()).expect("the directory");
    assert_eq!(directory.ident(), Some(OURS));
}
