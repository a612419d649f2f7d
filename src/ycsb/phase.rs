//! The two phases, with many clients at once. Each client is a task that makes one request after
//! another.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::database::{Database, DatabaseError};
use super::measure::{Kind, Measurements};
use super::record::{self, RecordShape};
use super::report::{CutShort, Phase, PhaseReport};
use super::workload::{InsertSequence, Transaction, Transactions, Workload, stream};

/// The number of the first client of the warm-up. It keeps the randomness of the warm-up apart from
/// that of the measured clients, so that a run makes the same requests with and without a warm-up.
const WARMUP_CLIENTS: u64 = 1 << 32;

/// How long no request may succeed before a phase ends: the database is gone. It is longer than an
/// election, and than the deadline of a single request of ours.
pub const GIVE_UP_AFTER: Duration = Duration::from_secs(30);

/// How long a client waits after a request that failed, so that a database which refuses everything
/// is not asked a million times.
const REST_AFTER_FAILURE: Duration = Duration::from_millis(5);

/// How often it is looked whether a request has succeeded.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// When the run phase ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Length {
    Operations(u64),
    Time(Duration),
}

/// What to run.
#[derive(Debug, Clone)]
pub struct Options {
    pub workload: Workload,
    pub records: u64,
    pub length: Length,
    /// How many clients make requests at once.
    pub threads: usize,
    pub shape: RecordShape,
    pub seed: u64,
    /// How long to run the workload before measuring.
    pub warmup: Option<Duration>,
    /// Records in one request of the load phase.
    pub batch: usize,
    /// How long no request may succeed before a phase ends early.
    pub give_up_after: Duration,
}

/// How many operations have ended, for a task that draws the progress.
#[derive(Debug, Default)]
pub struct Progress {
    ended: AtomicU64,
    succeeded: AtomicU64,
}

impl Progress {
    pub fn ended(&self) -> u64 {
        self.ended.load(Ordering::Relaxed)
    }

    fn add(&self, operations: u64, successful: bool) {
        if successful {
            self.succeeded.fetch_add(operations, Ordering::Relaxed);
        }
        self.ended.fetch_add(operations, Ordering::Relaxed);
    }
}

/// Inserts all records.
pub async fn load<D: Database>(
    database: &Arc<D>,
    options: &Options,
    progress: &Arc<Progress>,
) -> PhaseReport {
    let start = Instant::now();
    let mut clients = JoinSet::new();
    let (stop, stopped) = watch::channel(None);
    for client in 0..options.threads {
        let mut loader = Client::new(database, options, progress);
        let mut stop = Stop(stopped.clone());
        let numbers = share(options.records, options.threads, client);
        let batch = options.batch as u64;
        let mut random = stream(options.seed, client as u64);
        clients.spawn(async move {
            let mut next = numbers.start;
            while next < numbers.end && !stop.came() {
                let end = numbers.end.min(next + batch);
                let records = (next..end)
                    .map(|number| (record::key(number), loader.shape.fill(&mut random)))
                    .collect();
                let outcome = stop.or(loader.insert(records)).await;
                loader.end(end - next, outcome.is_ok());
                stop.rest_after(&outcome).await;
                next = end;
            }
            loader.measured
        });
    }
    let (measured, cut_short) = join(clients, progress, options, stop).await;
    report(Phase::Load, options, start, &measured, cut_short)
}

/// Makes the workload's requests on the records that [`load`] inserted.
pub async fn run<D: Database>(
    database: &Arc<D>,
    options: &Options,
    progress: &Arc<Progress>,
) -> PhaseReport {
    let expected = match options.length {
        Length::Operations(operations) => operations,
        // The number is not known. As many as there are records is a guess that keeps the
        // popularity of the records even when many are added.
        Length::Time(_) => options.records,
    };
    let inserts = Arc::new(InsertSequence::new(options.records));
    let transactions = Transactions::new(options.workload, inserts, expected, options.seed);
    if let Some(warmup) = options.warmup {
        let unseen = Arc::new(Progress::default());
        let length = Length::Time(warmup);
        let start = Instant::now();
        let (measured, cut_short) =
            clients(database, options, &unseen, &transactions, length, WARMUP_CLIENTS).await;
        if cut_short.is_some() {
            return report(Phase::Run, options, start, &measured, cut_short);
        }
    }
    let start = Instant::now();
    let (measured, cut_short) =
        clients(database, options, progress, &transactions, options.length, 0).await;
    report(Phase::Run, options, start, &measured, cut_short)
}

/// Runs all clients to their end. They have the randomness of the clients from number `first` on.
async fn clients<D: Database>(
    database: &Arc<D>,
    options: &Options,
    progress: &Arc<Progress>,
    transactions: &Transactions,
    length: Length,
    first: u64,
) -> (Measurements, Option<CutShort>) {
    let start = Instant::now();
    let mut clients = JoinSet::new();
    let (stop, stopped) = watch::channel(None);
    for number in 0..options.threads {
        let mut client = Client::new(database, options, progress);
        let mut stop = Stop(stopped.clone());
        let mut transactions = transactions.for_client(options.seed, first + number as u64);
        let (operations, deadline) = match length {
            Length::Operations(all) => {
                let share = share(all, options.threads, number);
                (share.end - share.start, None)
            }
            Length::Time(time) => (u64::MAX, Some(start + time)),
        };
        clients.spawn(async move {
            for _ in 0..operations {
                if deadline.is_some_and(|deadline| Instant::now() >= deadline) || stop.came() {
                    break;
                }
                let outcome = stop.or(client.transact(&mut transactions)).await;
                client.end(1, outcome.is_ok());
                stop.rest_after(&outcome).await;
            }
            client.measured
        });
    }
    join(clients, progress, options, stop).await
}

/// Waits for all clients, and stops them when none has succeeded for too long.
async fn join(
    mut clients: JoinSet<Measurements>,
    progress: &Progress,
    options: &Options,
    stop: watch::Sender<Option<CutShort>>,
) -> (Measurements, Option<CutShort>) {
    let mut all = Measurements::default();
    let mut look = tokio::time::interval(LOOK_AGAIN);
    let mut last = (progress.succeeded.load(Ordering::Relaxed), Instant::now());
    loop {
        tokio::select! {
            client = clients.join_next() => match client {
                Some(Ok(measured)) => all.add(measured),
                Some(Err(panic)) => std::panic::resume_unwind(panic.into_panic()),
                None => break,
            },
            _ = look.tick() => {
                let succeeded = progress.succeeded.load(Ordering::Relaxed);
                if succeeded != last.0 {
                    last = (succeeded, Instant::now());
                } else if last.1.elapsed() >= options.give_up_after {
                    let silent = CutShort::Silent { seconds: options.give_up_after.as_secs() };
                    stop.send_if_modified(|stopped| stopped.replace(silent).is_none());
                }
            }
        }
    }
    let cut_short = *stop.borrow();
    (all, cut_short)
}

fn report(
    phase: Phase,
    options: &Options,
    start: Instant,
    measured: &Measurements,
    cut_short: Option<CutShort>,
) -> PhaseReport {
    let elapsed = start.elapsed();
    let (records, threads) = (options.records, options.threads);
    PhaseReport::new(phase, options.workload, records, threads, elapsed, measured, cut_short)
}

/// The part of `0..all` that client number `number` of `clients` gets. The first clients take the
/// remainder.
fn share(all: u64, clients: usize, number: usize) -> Range<u64> {
    let (clients, number) = (clients as u64, number as u64);
    let (each, rest) = (all / clients, all % clients);
    let start = number * each + number.min(rest);
    start..start + each + u64::from(number < rest)
}

/// Whether the phase ends early, as each client sees it.
struct Stop(watch::Receiver<Option<CutShort>>);

impl Stop {
    fn came(&self) -> bool {
        self.0.borrow().is_some()
    }

    /// Waits a little after a request that failed.
    async fn rest_after(&self, outcome: &Result<(), DatabaseError>) {
        if outcome.is_err() && !self.came() {
            tokio::time::sleep(REST_AFTER_FAILURE).await;
        }
    }

    /// Waits for `request`, but no longer than until the phase is stopped.
    async fn or(
        &mut self,
        request: impl Future<Output = Result<(), DatabaseError>>,
    ) -> Result<(), DatabaseError> {
        tokio::select! {
            biased;
            outcome = request => outcome,
            // The phase holds the sender until all its clients have ended.
            _ = self.0.wait_for(Option::is_some) => Err(DatabaseError::Silent),
        }
    }
}

/// One client, which has one request under way at a time.
struct Client<D> {
    database: Arc<D>,
    shape: RecordShape,
    measured: Measurements,
    progress: Arc<Progress>,
}

impl<D: Database> Client<D> {
    fn new(database: &Arc<D>, options: &Options, progress: &Arc<Progress>) -> Self {
        Client {
            database: Arc::clone(database),
            shape: options.shape,
            measured: Measurements::default(),
            progress: Arc::clone(progress),
        }
    }

    /// Counts operations that ended.
    fn end(&mut self, operations: u64, successful: bool) {
        self.measured.operations += operations;
        if !successful {
            self.measured.failed_operations += operations;
        }
        self.progress.add(operations, successful);
    }

    async fn transact(&mut self, transactions: &mut Transactions) -> Result<(), DatabaseError> {
        match transactions.next() {
            Transaction::Read { record } => {
                self.read(record).await?;
            }
            Transaction::Update { record } => {
                let value = self.shape.fill(transactions.random());
                self.update(record, value).await?;
            }
            Transaction::Insert => self.insert_next(transactions).await?,
            Transaction::Scan { record, length } => self.scan(record, length).await?,
            Transaction::ReadModifyWrite { record } => {
                let start = Instant::now();
                let outcome = self.read_modify_write(record, transactions).await;
                self.measured.record(Kind::ReadModifyWrite, start, outcome)?;
            }
        }
        Ok(())
    }

    async fn read(&mut self, record: u64) -> Result<Bytes, DatabaseError> {
        let key = record::key(record);
        let start = Instant::now();
        let outcome = match self.database.read(key.clone()).await {
            Ok(Some(value)) => self.shape.check(&key, &value).map(|()| value),
            Ok(None) => Err(DatabaseError::NotFound { key }),
            Err(error) => Err(error),
        };
        self.measured.record(Kind::Read, start, outcome)
    }

    async fn update(&mut self, record: u64, value: Bytes) -> Result<(), DatabaseError> {
        let start = Instant::now();
        let outcome = self.database.write(record::key(record), value).await;
        self.measured.record(Kind::Update, start, outcome)
    }

    async fn read_modify_write(
        &mut self,
        record: u64,
        transactions: &mut Transactions,
    ) -> Result<(), DatabaseError> {
        let before = self.read(record).await?;
        let after = self.shape.replace_field(&before, transactions.random());
        self.update(record, after).await
    }

    async fn insert_next(&mut self, transactions: &mut Transactions) -> Result<(), DatabaseError> {
        let Some(number) = transactions.inserts().begin() else {
            // A client that has to wait for the others lets them run meanwhile.
            tokio::task::yield_now().await;
            return self.measured.record(
                Kind::Insert,
                Instant::now(),
                Err(DatabaseError::InsertsAhead),
            );
        };
        let value = self.shape.fill(transactions.random());
        let outcome = self.insert(vec![(record::key(number), value)]).await;
        transactions.inserts().acknowledge(number);
        outcome
    }

    async fn insert(&mut self, mut records: Vec<(Bytes, Bytes)>) -> Result<(), DatabaseError> {
        let start = Instant::now();
        if records.len() > 1 {
            let outcome = self.database.write_batch(records).await;
            return self.measured.record(Kind::InsertBatch, start, outcome);
        }
        let Some((key, value)) = records.pop() else {
            return Ok(());
        };
        let outcome = self.database.write(key, value).await;
        self.measured.record(Kind::Insert, start, outcome)
    }

    async fn scan(&mut self, record: u64, length: u64) -> Result<(), DatabaseError> {
        let key = record::key(record);
        let start = Instant::now();
        let outcome = match self.database.scan(key.clone(), length as u32).await {
            Ok(found) => self.check_scan(&key, &found, length),
            Err(error) => Err(error),
        };
        self.measured.record(Kind::Scan, start, outcome)
    }

    /// A scan starts at a record that exists, and every record has all its fields.
    fn check_scan(
        &self,
        start: &Bytes,
        found: &[(Bytes, Bytes)],
        length: u64,
    ) -> Result<(), DatabaseError> {
        if found.first().is_none_or(|(key, _)| key != start) {
            return Err(DatabaseError::NotFound { key: start.clone() });
        }
        if found.len() as u64 > length {
            return Err(DatabaseError::ScanLimit {
                key: start.clone(),
                limit: length,
                found: found.len(),
            });
        }
        found.iter().try_for_each(|(key, value)| self.shape.check(key, value))
    }
}

#[cfg(test)]
mod tests;
