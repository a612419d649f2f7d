//! The two phases, with many clients at once. Each client is a task that makes one request after
//! another.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::task::JoinSet;

use super::database::{Database, DatabaseError};
use super::measure::{Kind, Measurements};
use super::record::{self, RecordShape};
use super::report::{Phase, PhaseReport};
use super::workload::{InsertSequence, Transaction, Transactions, Workload, stream};

/// The number of the first client of the warm-up. It keeps the randomness of the warm-up apart from
/// that of the measured clients, so that a run makes the same requests with and without a warm-up.
const WARMUP_CLIENTS: u64 = 1 << 32;

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
}

/// How many operations have ended, for a task that draws the progress.
#[derive(Debug, Default)]
pub struct Progress {
    ended: AtomicU64,
}

impl Progress {
    pub fn ended(&self) -> u64 {
        self.ended.load(Ordering::Relaxed)
    }

    fn add(&self, operations: u64) {
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
    for client in 0..options.threads {
        let mut loader = Client::new(database, options, progress);
        let numbers = share(options.records, options.threads, client);
        let batch = options.batch as u64;
        let mut random = stream(options.seed, client as u64);
        clients.spawn(async move {
            let mut next = numbers.start;
            while next < numbers.end {
                let end = numbers.end.min(next + batch);
                let records = (next..end)
                    .map(|number| (record::key(number), loader.shape.fill(&mut random)))
                    .collect();
                let outcome = loader.insert(records).await;
                loader.end(end - next, outcome.is_ok());
                next = end;
            }
            loader.measured
        });
    }
    let measured = join(clients).await;
    report(Phase::Load, options, start, &measured)
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
        clients(database, options, &unseen, &transactions, length, WARMUP_CLIENTS).await;
    }
    let start = Instant::now();
    let measured = clients(database, options, progress, &transactions, options.length, 0).await;
    report(Phase::Run, options, start, &measured)
}

/// Runs all clients to their end. They have the randomness of the clients from number `first` on.
async fn clients<D: Database>(
    database: &Arc<D>,
    options: &Options,
    progress: &Arc<Progress>,
    transactions: &Transactions,
    length: Length,
    first: u64,
) -> Measurements {
    let start = Instant::now();
    let mut clients = JoinSet::new();
    for number in 0..options.threads {
        let mut client = Client::new(database, options, progress);
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
                if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                    break;
                }
                let outcome = client.transact(&mut transactions).await;
                client.end(1, outcome.is_ok());
            }
            client.measured
        });
    }
    join(clients).await
}

async fn join(mut clients: JoinSet<Measurements>) -> Measurements {
    let mut all = Measurements::default();
    while let Some(client) = clients.join_next().await {
        match client {
            Ok(measured) => all.add(measured),
            Err(panic) => std::panic::resume_unwind(panic.into_panic()),
        }
    }
    all
}

fn report(phase: Phase, options: &Options, start: Instant, measured: &Measurements) -> PhaseReport {
    let elapsed = start.elapsed();
    PhaseReport::new(phase, options.workload, options.records, options.threads, elapsed, measured)
}

/// The part of `0..all` that client number `number` of `clients` gets. The first clients take the
/// remainder.
fn share(all: u64, clients: usize, number: usize) -> Range<u64> {
    let (clients, number) = (clients as u64, number as u64);
    let (each, rest) = (all / clients, all % clients);
    let start = number * each + number.min(rest);
    start..start + each + u64::from(number < rest)
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
        self.progress.add(operations);
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
