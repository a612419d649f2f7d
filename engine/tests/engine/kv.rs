use std::fs;

use esker_engine::{Cf, EngineOptions, KvBatch, KvEngine};

use crate::{Place, everywhere};

fn put(engine: &KvEngine, cf: Cf, key: &[u8], value: &[u8]) {
    let mut batch = KvBatch::new();
    batch.put(cf, key, value);
    engine.write(&batch).expect("a write");
}

fn get(engine: &KvEngine, cf: Cf, key: &[u8]) -> Option<Vec<u8>> {
    engine.get(cf, key).expect("a read")
}

#[test]
fn a_crash_loses_memtables_but_keeps_what_was_persisted() {
    everywhere(|place| {
        let engine = place.kv();
        put(&engine, Cf::Default, b"early", b"1");
        put(&engine, Cf::Meta, b"applied", b"1");
        engine.persist().expect("a flush");
        put(&engine, Cf::Default, b"late", b"2");
        put(&engine, Cf::Meta, b"applied", b"2");
        assert_eq!(get(&engine, Cf::Default, b"late"), Some(b"2".to_vec()));
        engine.close_like_a_crash();

        let engine = place.kv();
        assert_eq!(get(&engine, Cf::Default, b"early"), Some(b"1".to_vec()));
        assert_eq!(get(&engine, Cf::Meta, b"applied"), Some(b"1".to_vec()));
        assert_eq!(get(&engine, Cf::Default, b"late"), None);
    });
}

#[test]
fn a_clean_close_keeps_everything() {
    for mut place in [Place::on_disk(), Place::in_memory()] {
        place.options.lose_memtables_on_close = false;
        let engine = place.kv();
        put(&engine, Cf::Write, b"key", b"value");
        drop(engine);
        assert_eq!(get(&place.kv(), Cf::Write, b"key"), Some(b"value".to_vec()));
    }
}

#[test]
fn what_a_crash_leaves_is_one_prefix_of_the_writes_across_all_families() {
    for mut place in [Place::on_disk(), Place::in_memory()] {
        // So small that RocksDB flushes many times by itself, each time because
        // of one family only.
        place.options.write_buffer_bytes = 64 << 10;
        let engine = place.kv();
        let value = [7; 1024];
        const WRITES: u32 = 2000;
        for number in 1..=WRITES {
            let mut batch = KvBatch::new();
            batch.put(Cf::Default, &number.to_be_bytes(), &value);
            batch.put(Cf::Lock, &number.to_be_bytes(), b"");
            batch.put(Cf::Meta, b"applied", &number.to_be_bytes());
            engine.write(&batch).expect("a write");
        }
        engine.close_like_a_crash();

        let engine = place.kv();
        let applied = get(&engine, Cf::Meta, b"applied").expect("some writes were flushed");
        let applied = u32::from_be_bytes(applied.try_into().expect("four bytes"));
        for number in 1..=WRITES {
            for cf in [Cf::Default, Cf::Lock] {
                assert_eq!(
                    get(&engine, cf, &number.to_be_bytes()).is_some(),
                    number <= applied,
                    "write {number} of {applied} applied in {cf}"
                );
            }
        }
    }
}

#[test]
fn a_durable_read_sees_only_what_a_crash_would_leave() {
    everywhere(|place| {
        let engine = place.kv();
        let durable = |key: &[u8]| engine.get_durable(Cf::Meta, key).expect("a read");
        put(&engine, Cf::Meta, b"applied", b"1");
        assert_eq!(durable(b"applied"), None);
        engine.persist().expect("a flush");
        put(&engine, Cf::Meta, b"applied", b"2");
        assert_eq!(durable(b"applied"), Some(b"1".to_vec()));
        assert_eq!(get(&engine, Cf::Meta, b"applied"), Some(b"2".to_vec()));
        engine.persist().expect("a flush");
        assert_eq!(durable(b"applied"), Some(b"2".to_vec()));
    });
}

#[test]
fn later_changes_of_a_batch_win_and_families_are_apart() {
    everywhere(|place| {
        let engine = place.kv();
        put(&engine, Cf::Lock, b"b", b"lock");
        let mut first = KvBatch::new();
        first.put(Cf::Default, b"a", b"old");
        first.put(Cf::Default, b"b", b"old");
        first.put(Cf::Default, b"c", b"old");
        first.delete_range(Cf::Default, b"b", Some(b"c"));
        let mut second = KvBatch::new();
        second.put(Cf::Default, b"a", b"new");
        second.delete(Cf::Default, b"c");
        first.append(&second);
        assert_eq!(first.len(), 6);
        engine.write(&first).expect("a write");
        let keys: [&[u8]; 3] = [b"c", b"a", b"b"];
        assert_eq!(
            engine.get_many(Cf::Default, &keys).expect("reads"),
            [None, Some(b"new".to_vec()), None]
        );
        assert_eq!(get(&engine, Cf::Lock, b"b"), Some(b"lock".to_vec()));
    });
}

#[test]
fn a_deleted_range_without_end_reaches_the_last_key_and_a_reversed_one_deletes_nothing() {
    everywhere(|place| {
        let engine = place.kv();
        let last = vec![0xff; esker_engine::MAX_KEY_BYTES];
        put(&engine, Cf::Default, b"a", b"");
        put(&engine, Cf::Default, &last, b"");
        let mut batch = KvBatch::new();
        batch.delete_range(Cf::Default, b"z", Some(b"a"));
        assert!(batch.is_empty());
        batch.delete_range(Cf::Default, b"b", None);
        engine.write(&batch).expect("a write");
        assert!(get(&engine, Cf::Default, b"a").is_some());
        assert!(get(&engine, Cf::Default, &last).is_none());
    });
}

#[test]
fn a_snapshot_and_its_iterators_outlive_the_handle_and_see_no_later_write() {
    everywhere(|place| {
        let engine = place.kv();
        put(&engine, Cf::Default, b"a", b"1");
        put(&engine, Cf::Default, b"b", b"1");
        let snapshot = engine.snapshot();
        put(&engine, Cf::Default, b"a", b"2");
        put(&engine, Cf::Default, b"c", b"2");
        drop(engine);
        assert_eq!(snapshot.get(Cf::Default, b"a").expect("a read"), Some(b"1".to_vec()));
        assert_eq!(snapshot.get_with(Cf::Default, b"b", <[u8]>::len).expect("a read"), Some(1));
        let keys: [&[u8]; 2] = [b"c", b"a"];
        assert_eq!(
            snapshot.get_many(Cf::Default, &keys).expect("reads"),
            [None, Some(b"1".to_vec())]
        );
        let mut iter = snapshot.iter(Cf::Default, b"", None);
        drop(snapshot);
        let seen = std::thread::spawn(move || {
            let mut seen = Vec::new();
            iter.seek_to_first();
            while iter.valid().expect("a scan") {
                seen.push((iter.key().to_vec(), iter.value().to_vec()));
                iter.next();
            }
            seen
        });
        assert_eq!(
            seen.join().expect("the scan ends"),
            [(b"a".to_vec(), b"1".to_vec()), (b"b".to_vec(), b"1".to_vec())]
        );
    });
}

#[test]
fn an_iterator_stays_within_its_bounds_in_both_directions() {
    everywhere(|place| {
        let engine = place.kv();
        for key in [b"a", b"c", b"e", b"g"] {
            put(&engine, Cf::Default, key, b"");
        }
        let snapshot = engine.snapshot();
        for mut iter in [
            snapshot.iter(Cf::Default, b"c", Some(b"g")),
            snapshot.iter_uncached(Cf::Default, b"c", Some(b"g")),
        ] {
            let mut forward = Vec::new();
            iter.seek(b"a");
            while iter.valid().expect("a scan") {
                forward.push(iter.key().to_vec());
                iter.next();
            }
            assert_eq!(forward, [b"c", b"e"]);
            let mut backward = Vec::new();
            iter.seek_for_prev(b"z");
            while iter.valid().expect("a scan") {
                backward.push(iter.key().to_vec());
                iter.prev();
            }
            assert_eq!(backward, [b"e", b"c"]);
            iter.seek_for_prev(b"d");
            assert!(iter.valid().expect("a seek"));
            assert_eq!(iter.key(), b"c");
            iter.seek_to_last();
            assert!(iter.valid().expect("a seek"));
            assert_eq!(iter.key(), b"e");
            iter.seek(b"f");
            assert!(!iter.valid().expect("a seek"));
        }
    });
}

#[test]
fn deleting_files_frees_what_is_wholly_inside_and_spares_the_neighbours_first_key() {
    everywhere(|place| {
        let engine = place.kv();
        for key in [b"a", b"b", b"m"] {
            put(&engine, Cf::Default, key, b"value");
        }
        // One file below level 0, from a to m.
        engine.compact(Cf::Default, b"", None).expect("a compaction");
        let delete = |end| {
            engine.delete_files_in_range(Cf::Default, b"a", end).expect("files are deleted");
        };
        delete(Some(b"m".as_slice()));
        assert!(get(&engine, Cf::Default, b"m").is_some());
        assert!(get(&engine, Cf::Default, b"a").is_some());
        delete(Some(b"m\0"));
        assert!(get(&engine, Cf::Default, b"a").is_none());
        assert!(get(&engine, Cf::Default, b"m").is_none());
    });
}

#[test]
fn a_damaged_file_is_named_and_no_value_is_returned() {
    let place = Place::on_disk();
    let engine = place.kv();
    let value: Vec<u8> = (0..4000_u32).flat_map(u32::to_be_bytes).collect();
    put(&engine, Cf::Default, b"key", &value);
    engine.persist().expect("a flush");
    engine.close_like_a_crash();
    let file = fs::read_dir(place.path("kv"))
        .expect("the engine's folder")
        .map(|entry| entry.expect("an entry").path())
        .find(|path| path.extension().is_some_and(|extension| extension == "sst"))
        .expect("a flushed file");
    let mut bytes = fs::read(&file).expect("the file");
    bytes[100] ^= 1;
    fs::write(&file, bytes).expect("the file is damaged");

    let engine = place.kv();
    let error = engine.get(Cf::Default, b"key").expect_err("a failed checksum");
    assert!(error.is_corruption(), "{error}");
    let name = file.file_name().expect("a name").to_string_lossy().into_owned();
    assert!(error.to_string().contains(&name), "{error}");
    assert!(!error.to_string().contains('\n'), "{error}");

    let mut iter = engine.snapshot().iter(Cf::Default, b"", None);
    iter.seek_to_first();
    assert!(iter.valid().expect_err("a failed checksum").is_corruption());
}

#[test]
fn a_folder_that_cannot_be_opened_is_named() {
    let place = Place::on_disk();
    fs::write(place.path("kv"), b"a file").expect("a file");
    let error =
        KvEngine::open(&place.path("kv"), &place.options).err().expect("a file is no folder");
    let path = place.path("kv").display().to_string();
    assert!(error.to_string().contains(&path), "{error}");
}

#[test]
fn an_open_engine_cannot_be_opened_again() {
    everywhere(|place| {
        let _engine = place.kv();
        assert!(KvEngine::open(&place.path("kv"), &place.options).is_err());
    });
}

#[test]
fn many_stores_in_one_memory_are_apart_and_leave_no_trace_on_the_disk() {
    let place = Place::in_memory();
    let folder = |number: u32| place.path(&number.to_string());
    let open = |number| KvEngine::open(&folder(number), &place.options).expect("a store");
    let stores: Vec<KvEngine> = (0..20).map(open).collect();
    for (number, store) in stores.iter().enumerate() {
        put(store, Cf::Default, b"number", &[number as u8]);
        store.persist().expect("a flush");
    }
    drop(stores);
    for number in 0..20 {
        assert_eq!(get(&open(number), Cf::Default, b"number"), Some(vec![number as u8]));
        assert!(!folder(number).exists());
    }
}

#[test]
fn statistics_count_memtables_and_files() {
    everywhere(|place| {
        let engine = place.kv();
        put(&engine, Cf::Default, b"key", &[1; 100_000]);
        let before = engine.statistics().expect("statistics");
        assert!(before.memtable_bytes >= 100_000, "{before:?}");
        assert_eq!(before.sst_bytes, 0);
        engine.persist().expect("a flush");
        let after = engine.statistics().expect("statistics");
        assert!(after.sst_bytes > 0, "{after:?}");
        assert!(after.memtable_bytes < before.memtable_bytes, "{after:?}");
    });
}

#[test]
fn the_block_cache_is_shared_by_clones_of_the_options() {
    let place = Place::on_disk();
    let clone: EngineOptions = place.options.clone();
    let first = place.kv();
    let second = KvEngine::open(&place.path("other"), &clone).expect("another store");
    put(&first, Cf::Default, b"key", &[1; 50_000]);
    first.persist().expect("a flush");
    assert!(get(&first, Cf::Default, b"key").is_some());
    let cached = |engine: &KvEngine| engine.statistics().expect("statistics").block_cache_bytes;
    assert!(cached(&first) > 0);
    assert_eq!(cached(&first), cached(&second));
}
