use esker_engine::{Cf, KvBatch, KvEngine};

use crate::everywhere;

/// Pairs with values that do not compress, so that sizes on disk are known.
fn fill(engine: &KvEngine, cf: Cf, prefix: &str, pairs: u32, value_bytes: usize) {
    let mut batch = KvBatch::new();
    let mut noise = 1_u64;
    for number in 0..pairs {
        let value: Vec<u8> = (0..value_bytes)
            .map(|_| {
                noise = noise.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                (noise >> 56) as u8
            })
            .collect();
        batch.put(cf, format!("{prefix}{number:06}").as_bytes(), &value);
    }
    engine.write(&batch).expect("a write");
}

fn bytes_between(engine: &KvEngine, start: &[u8], end: Option<&[u8]>) -> usize {
    let snapshot = engine.snapshot();
    let mut bytes = 0;
    for cf in Cf::DATA {
        let mut iter = snapshot.iter(cf, start, end);
        iter.seek_to_first();
        while iter.valid().expect("a scan") {
            bytes += iter.key().len() + iter.value().len();
            iter.next();
        }
    }
    bytes
}

#[test]
fn split_keys_cut_all_data_families_into_about_equal_parts() {
    everywhere(|place| {
        let engine = place.kv();
        // More pairs than the sampler keeps, in sizes that differ.
        fill(&engine, Cf::Default, "k", 9000, 50);
        fill(&engine, Cf::Write, "k0010", 90, 4000);
        fill(&engine, Cf::Meta, "k", 1000, 100);
        engine.persist().expect("a flush");
        fill(&engine, Cf::Lock, "k", 500, 10);

        let start = b"k000100".as_slice();
        let end = Some(b"k008900".as_slice());
        let keys = engine.split_keys(start, end, 4).expect("split keys");
        assert_eq!(keys.len(), 3);
        assert!(keys.is_sorted());
        assert!(keys[0].as_slice() > start && Some(keys[2].as_slice()) < end);

        let mut borders = vec![start];
        borders.extend(keys.iter().map(Vec::as_slice));
        borders.push(b"k008900");
        let whole = bytes_between(&engine, start, end);
        for part in borders.windows(2) {
            let bytes = bytes_between(&engine, part[0], Some(part[1]));
            assert!(
                bytes * 4 > whole * 9 / 10 && bytes * 4 < whole * 11 / 10,
                "a part of {bytes} in {whole}"
            );
        }
    });
}

#[test]
fn what_cannot_be_cut_gives_fewer_keys() {
    everywhere(|place| {
        let engine = place.kv();
        assert!(engine.split_keys(b"", None, 4).expect("no keys").is_empty());
        fill(&engine, Cf::Default, "a", 1, 1_000_000);
        assert!(engine.split_keys(b"", None, 4).expect("no keys").is_empty());
        fill(&engine, Cf::Default, "b", 1, 100);
        assert_eq!(engine.split_keys(b"", None, 4).expect("one key"), [b"b000000"]);
        assert!(engine.split_keys(b"", None, 1).expect("no keys").is_empty());
    });
}

#[test]
fn the_approximate_size_counts_memtables_and_files_of_the_range_only() {
    everywhere(|place| {
        let engine = place.kv();
        let size = |start: &str, end: Option<&str>| {
            engine.approximate_size(start.as_bytes(), end.map(str::as_bytes)).expect("a size")
        };
        fill(&engine, Cf::Meta, "a", 1000, 1000);
        engine.persist().expect("a flush");
        assert_eq!(size("", None), 0);

        fill(&engine, Cf::Default, "a", 2000, 1000);
        let about = |bytes: u64, expected: u64| {
            assert!(
                bytes > expected / 2 && bytes < expected * 2,
                "{bytes} is not about {expected}"
            );
        };
        about(size("a", Some("b")), 2_000_000);
        engine.persist().expect("a flush");
        about(size("a", Some("b")), 2_000_000);
        about(size("a001000", Some("b")), 1_000_000);
        fill(&engine, Cf::Write, "b", 2000, 1000);
        about(size("", None), 4_000_000);
        about(size("b", None), 2_000_000);
        assert_eq!(size("c", None), 0);
        assert_eq!(size("b", Some("a")), 0);
    });
}
