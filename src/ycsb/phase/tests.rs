use std::collections::BTreeMap;

use clap::ValueEnum as _;
use parking_lot::Mutex;

use super::*;

/// A table in memory that fails each request whose number is a multiple of `fails`.
#[derive(Default)]
struct Memory {
    table: Mutex<BTreeMap<Bytes, Bytes>>,
    requests: AtomicU64,
    fails: Option<u64>,
}

impl Memory {
    fn answer(&self, key: &Bytes) -> Result<(), DatabaseError> {
        let number = 1 + self.requests.fetch_add(1, Ordering::Relaxed);
        match self.fails {
            Some(each) if number.is_multiple_of(each) => Err(DatabaseError::Request(
                format!("{} was refused", String::from_utf8_lossy(key)).into(),
            )),
            _ => Ok(()),
        }
    }
}

impl Database for Memory {
    async fn read(&self, key: Bytes) -> Result<Option<Bytes>, DatabaseError> {
        self.answer(&key)?;
        Ok(self.table.lock().get(&key).cloned())
    }

    async fn write(&self, key: Bytes, value: Bytes) -> Result<(), DatabaseError> {
        self.answer(&key)?;
        self.table.lock().insert(key, value);
        Ok(())
    }

    async fn write_batch(&self, records: Vec<(Bytes, Bytes)>) -> Result<(), DatabaseError> {
        self.answer(&records[0].0)?;
        self.table.lock().extend(records);
        Ok(())
    }

    async fn scan(&self, start: Bytes, limit: u32) -> Result<Vec<(Bytes, Bytes)>, DatabaseError> {
        self.answer(&start)?;
        let table = self.table.lock();
        let found = table.range(start..).take(limit as usize);
        Ok(found.map(|(key, value)| (key.clone(), value.clone())).collect())
    }
}

fn options(workload: Workload) -> Options {
    Options {
        workload,
        records: 1_000,
        length: Length::Operations(2_003),
        threads: 7,
        shape: RecordShape { fields: 3, field_size: 10 },
        seed: 11,
        warmup: None,
        batch: 1,
        give_up_after: GIVE_UP_AFTER,
    }
}

async fn load_and_run(
    options: &Options,
    database: Memory,
) -> (Arc<Memory>, PhaseReport, PhaseReport) {
    let database = Arc::new(database);
    let progress = Arc::new(Progress::default());
    let loaded = load(&database, options, &progress).await;
    let ran = run(&database, options, &progress).await;
    assert_eq!(progress.ended(), loaded.operations + ran.operations);
    (database, loaded, ran)
}

fn counts(report: &PhaseReport) -> Vec<(Kind, u64)> {
    report.requests.iter().map(|request| (request.kind, request.count)).collect()
}

#[tokio::test]
async fn every_workload_loads_and_runs_to_the_end() {
    for workload in Workload::value_variants().iter().copied() {
        let (database, loaded, ran) = load_and_run(&options(workload), Memory::default()).await;
        assert_eq!(counts(&loaded), [(Kind::Insert, 1_000)]);
        assert_eq!((loaded.operations, loaded.errors), (1_000, 0));
        assert_eq!((ran.operations, ran.errors, ran.first_error), (2_003, 0, None), "{workload:?}");
        let inserted = ran.requests.iter().find(|request| request.kind == Kind::Insert);
        let inserted = inserted.map_or(0, |request| request.count);
        assert_eq!(database.table.lock().len() as u64, 1_000 + inserted);
        assert_eq!(inserted > 0, workload.mix().insert > 0);
    }
}

#[tokio::test]
async fn a_read_modify_write_is_one_operation_and_also_counts_its_parts() {
    let (_, _, ran) = load_and_run(&options(Workload::F), Memory::default()).await;
    let [(Kind::Read, reads), (Kind::Update, updates), (Kind::ReadModifyWrite, both)] =
        counts(&ran)[..]
    else {
        panic!("{:?}", counts(&ran));
    };
    assert_eq!((reads, updates), (2_003, both));
}

#[tokio::test]
async fn batches_load_the_same_records() {
    let mut options = options(Workload::C);
    let (single, _, _) = load_and_run(&options, Memory::default()).await;
    options.batch = 64;
    let (batched, loaded, _) = load_and_run(&options, Memory::default()).await;
    assert_eq!(loaded.operations, 1_000);
    // Seven clients with 142 or 143 records each, so each sends three requests.
    assert_eq!(counts(&loaded), [(Kind::InsertBatch, 21)]);
    assert!(single.table.lock().keys().eq(batched.table.lock().keys()));
}

#[tokio::test]
async fn failures_are_counted_and_the_first_one_is_shown() {
    let database = Memory { fails: Some(10), ..Memory::default() };
    let (_, loaded, ran) = load_and_run(&options(Workload::C), database).await;
    assert_eq!((loaded.operations, loaded.errors), (1_000, 100));
    let first = loaded.first_error.expect("a hundred inserts failed");
    assert!(first.starts_with("user") && first.ends_with(" was refused"), "{first}");
    assert_eq!(loaded.requests[0].count + loaded.requests[0].errors, 1_000);
    assert!(ran.errors >= 200, "requests fail and records are missing");
}

#[tokio::test]
async fn running_without_loading_says_what_to_do() {
    let progress = Arc::new(Progress::default());
    let ran = run(&Arc::new(Memory::default()), &options(Workload::C), &progress).await;
    assert_eq!(ran.errors, ran.operations);
    let error = ran.first_error.expect("nothing is there");
    assert!(error.contains("esker ycsb load"), "{error}");
}

#[tokio::test]
async fn the_same_seed_leaves_the_same_data_for_one_client() {
    let options = Options { threads: 1, ..options(Workload::A) };
    let (one, _, _) = load_and_run(&options, Memory::default()).await;
    let (two, _, _) = load_and_run(&options, Memory::default()).await;
    let (other, _, _) = load_and_run(&Options { seed: 12, ..options }, Memory::default()).await;
    assert_eq!(*one.table.lock(), *two.table.lock());
    assert_ne!(*one.table.lock(), *other.table.lock());
}

#[tokio::test]
async fn a_run_of_no_time_ends_at_once_and_a_warm_up_is_not_measured() {
    let options = Options {
        length: Length::Time(Duration::ZERO),
        warmup: Some(Duration::from_millis(100)),
        ..options(Workload::C)
    };
    let (database, _, ran) = load_and_run(&options, Memory::default()).await;
    assert_eq!(ran.operations, 0);
    assert!(database.requests.load(Ordering::Relaxed) > 1_000, "the warm-up made requests");
}

#[test]
fn shares_cover_everything_once() {
    for (all, clients) in [(10, 3), (2, 5), (0, 1), (64, 64)] {
        let mut end = 0;
        for number in 0..clients {
            let share = share(all, clients, number);
            assert_eq!(share.start, end);
            end = share.end;
        }
        assert_eq!(end, all);
    }
}

/// Answers so many requests, and never another one.
struct Silent {
    table: Memory,
    answers: u64,
}

impl Silent {
    async fn answer(&self) {
        if self.table.requests.load(Ordering::Relaxed) >= self.answers {
            std::future::pending().await
        }
    }
}

impl Database for Silent {
    async fn read(&self, key: Bytes) -> Result<Option<Bytes>, DatabaseError> {
        self.answer().await;
        self.table.read(key).await
    }

    async fn write(&self, key: Bytes, value: Bytes) -> Result<(), DatabaseError> {
        self.answer().await;
        self.table.write(key, value).await
    }

    async fn write_batch(&self, records: Vec<(Bytes, Bytes)>) -> Result<(), DatabaseError> {
        self.answer().await;
        self.table.write_batch(records).await
    }

    async fn scan(&self, start: Bytes, limit: u32) -> Result<Vec<(Bytes, Bytes)>, DatabaseError> {
        self.answer().await;
        self.table.scan(start, limit).await
    }
}

#[tokio::test]
async fn a_database_that_goes_away_ends_the_phase_with_what_was_measured() {
    let give_up_after = Duration::from_millis(100);
    let options = Options { give_up_after, ..options(Workload::U) };
    let progress = Arc::new(Progress::default());
    let database = Arc::new(Silent { table: Memory::default(), answers: 500 });
    let loaded = load(&database, &options, &progress).await;
    assert_eq!(loaded.operations - loaded.errors, 500);
    // One request of each client that had not loaded its share yet.
    assert!((1..=7).contains(&loaded.errors), "{}", loaded.errors);
    let reason = loaded.cut_short.expect("it did not load all");
    assert!(reason.starts_with("no request succeeded for "), "{reason}");

    // A warm-up that is not answered is not followed by a measurement.
    let options = Options { warmup: Some(Duration::from_secs(600)), ..options };
    let ran = run(&database, &options, &progress).await;
    assert!(ran.cut_short.is_some());

    // Refusals alone do not keep it running either.
    let length = Length::Time(Duration::from_secs(600));
    let options = Options { warmup: None, length, ..options };
    let database = Arc::new(Memory { fails: Some(1), ..Memory::default() });
    let ran = run(&database, &options, &progress).await;
    assert!(ran.cut_short.is_some() && ran.errors > 0);
}
