use esker_engine::{Cf, KvBatch, SstBuilder, SstFile};

use crate::{Place, everywhere};

fn build(
    place: &Place,
    engine: &esker_engine::KvEngine,
    name: &str,
    cf: Cf,
    keys: &[&str],
) -> SstFile {
    let mut builder = SstBuilder::new(engine, &place.path(name), cf);
    for key in keys {
        builder.put(key.as_bytes(), b"ingested").expect("a pair");
    }
    assert_eq!(builder.entries(), keys.len() as u64);
    builder.finish().expect("a finished file").expect("a file with pairs")
}

#[test]
fn ingested_files_replace_a_deleted_range_and_survive_a_crash() {
    everywhere(|place| {
        let engine = place.kv();
        let mut batch = KvBatch::new();
        batch.put(Cf::Default, b"a", b"old");
        batch.put(Cf::Default, b"gone", b"old");
        batch.put(Cf::Default, b"z", b"neighbour");
        engine.write(&batch).expect("a write");
        let before = engine.snapshot();
        batch.clear();
        batch.delete_range(Cf::Default, b"a", Some(b"m"));
        engine.write(&batch).expect("a write");

        let files = vec![
            build(place, &engine, "1.sst", Cf::Default, &["a", "b"]),
            build(place, &engine, "2.sst", Cf::Default, &["c", "d"]),
            build(place, &engine, "3.sst", Cf::Write, &["w"]),
        ];
        assert!(files.iter().all(|file| file.bytes > 0 && file.entries > 0));
        engine.ingest(files).expect("an ingestion");
        assert_eq!(
            before.get(Cf::Default, b"a").expect("a read"),
            Some(b"old".to_vec()),
            "an open snapshot saw the ingestion"
        );
        assert_eq!(before.get(Cf::Default, b"b").expect("a read"), None);
        drop(before);
        engine.close_like_a_crash();

        let engine = place.kv();
        let get = |cf, key: &str| engine.get(cf, key.as_bytes()).expect("a read");
        for (cf, key) in [
            (Cf::Default, "a"),
            (Cf::Default, "b"),
            (Cf::Default, "c"),
            (Cf::Default, "d"),
            (Cf::Write, "w"),
        ] {
            assert_eq!(get(cf, key), Some(b"ingested".to_vec()), "{cf} {key}");
        }
        assert_eq!(get(Cf::Default, "gone"), None);
        assert_eq!(get(Cf::Default, "z"), Some(b"neighbour".to_vec()));
    });
}

#[test]
fn writes_after_an_ingestion_win_over_it() {
    everywhere(|place| {
        let engine = place.kv();
        let file = build(place, &engine, "1.sst", Cf::Default, &["a", "b"]);
        engine.ingest(vec![file]).expect("an ingestion");
        let mut batch = KvBatch::new();
        batch.put(Cf::Default, b"a", b"new");
        batch.delete(Cf::Default, b"b");
        engine.write(&batch).expect("a write");
        assert_eq!(engine.get(Cf::Default, b"a").expect("a read"), Some(b"new".to_vec()));
        assert_eq!(engine.get(Cf::Default, b"b").expect("a read"), None);
    });
}

#[test]
fn an_ingestion_can_be_repeated_and_a_builder_without_pairs_makes_no_file() {
    let place = Place::on_disk();
    let engine = place.kv();
    let file = build(&place, &engine, "1.sst", Cf::Default, &["a"]);
    assert!(file.path.exists());
    engine.ingest(vec![file.clone()]).expect("an ingestion");
    assert!(file.path.exists());
    engine
        .write(&{
            let mut batch = esker_engine::KvBatch::new();
            batch.delete(Cf::Default, b"a");
            batch
        })
        .expect("a write");
    engine.ingest(vec![file.clone()]).expect("the same ingestion again");
    assert!(engine.get(Cf::Default, b"a").expect("a read").is_some());

    let builder = SstBuilder::new(&engine, &place.path("2.sst"), Cf::Default);
    assert_eq!(builder.finish().expect("nothing to finish"), None);
    assert!(!place.path("2.sst").exists());
}

#[test]
fn an_unfinished_file_is_taken_away() {
    let place = Place::on_disk();
    let engine = place.kv();
    let mut builder = SstBuilder::new(&engine, &place.path("1.sst"), Cf::Default);
    builder.put(b"a", b"").expect("a pair");
    assert!(place.path("1.sst").exists());
    drop(builder);
    assert!(!place.path("1.sst").exists());
}

#[test]
fn pairs_out_of_order_are_refused_with_the_files_name() {
    everywhere(|place| {
        let engine = place.kv();
        let mut builder = SstBuilder::new(&engine, &place.path("1.sst"), Cf::Default);
        builder.put(b"b", b"").expect("a pair");
        let error = builder.put(b"a", b"").expect_err("a is below b");
        assert!(error.to_string().contains("1.sst"), "{error}");
    });
}
