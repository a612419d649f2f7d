//! The six core workloads of YCSB, and one of updates alone: which kinds of request, in which
//! shares, for which records.
//!
//! [`Transactions`] turns a seed into the sequence of one client's requests. Given the seed, the
//! client's number and the records that exist, the sequence is the same on every platform.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use rand::rngs::Xoshiro256PlusPlus;
use rand::{RngExt, SeedableRng};

use super::generator::{ScrambledZipfian, SkewedLatest, Uniform, fnv_hash};

/// The longest scan of workload E, in records.
pub const MAX_SCAN_LENGTH: u64 = 100;

/// How far inserts may run ahead of the oldest one that is not acknowledged.
pub const MAX_INSERTS_AHEAD: u64 = 1 << 20;

/// One of YCSB's core workloads, or [`U`](Workload::U).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum Workload {
    /// Update heavy: 50 % reads, 50 % updates, zipfian
    A,
    /// Read mostly: 95 % reads, 5 % updates, zipfian
    B,
    /// Read only: 100 % reads, zipfian
    C,
    /// Read latest: 95 % reads, 5 % inserts, the newest records are the most popular
    D,
    /// Short ranges: 95 % scans of 1 to 100 records, 5 % inserts, zipfian
    E,
    /// Read-modify-write: 50 % reads, 50 % read-modify-writes, zipfian
    F,
    /// Updates only, not one of YCSB's: 100 % updates, every record as likely as any other
    U,
}

/// Shares of the kinds of request, in percent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mix {
    pub read: u32,
    pub update: u32,
    pub insert: u32,
    pub scan: u32,
    pub read_modify_write: u32,
}

impl Mix {
    const NONE: Mix = Mix { read: 0, update: 0, insert: 0, scan: 0, read_modify_write: 0 };
}

impl Workload {
    pub fn letter(self) -> &'static str {
        match self {
            Workload::A => "a",
            Workload::B => "b",
            Workload::C => "c",
            Workload::D => "d",
            Workload::E => "e",
            Workload::F => "f",
            Workload::U => "u",
        }
    }

    pub fn mix(self) -> Mix {
        match self {
            Workload::A => Mix { read: 50, update: 50, ..Mix::NONE },
            Workload::B => Mix { read: 95, update: 5, ..Mix::NONE },
            Workload::C => Mix { read: 100, ..Mix::NONE },
            Workload::D => Mix { read: 95, insert: 5, ..Mix::NONE },
            Workload::E => Mix { scan: 95, insert: 5, ..Mix::NONE },
            Workload::F => Mix { read: 50, read_modify_write: 50, ..Mix::NONE },
            Workload::U => Mix { update: 100, ..Mix::NONE },
        }
    }
}

/// A client's next request, with the numbers of its records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transaction {
    Read {
        record: u64,
    },
    Update {
        record: u64,
    },
    /// The record's number comes from the [`InsertSequence`].
    Insert,
    Scan {
        record: u64,
        length: u64,
    },
    ReadModifyWrite {
        record: u64,
    },
}

/// Numbers for new records, shared by all clients.
///
/// A record may be requested only when it and all records before it were inserted. Otherwise a
/// client could look for a record that another client is still about to write.
#[derive(Debug)]
pub struct InsertSequence {
    unacknowledged: Mutex<Unacknowledged>,
    /// How many records exist without a gap.
    acknowledged: AtomicU64,
}

#[derive(Debug)]
struct Unacknowledged {
    next: u64,
    /// Numbers that are acknowledged, with a gap below.
    above_gap: BTreeSet<u64>,
}

impl InsertSequence {
    /// Begins after `records` records that exist already.
    pub fn new(records: u64) -> Self {
        InsertSequence {
            unacknowledged: Mutex::new(Unacknowledged {
                next: records,
                above_gap: BTreeSet::new(),
            }),
            acknowledged: AtomicU64::new(records),
        }
    }

    /// The number of a new record; `None` when [`MAX_INSERTS_AHEAD`] others were given out since
    /// the oldest one that is still unanswered.
    pub fn begin(&self) -> Option<u64> {
        let mut state = self.unacknowledged.lock();
        if state.next - self.records() >= MAX_INSERTS_AHEAD {
            return None;
        }
        state.next += 1;
        Some(state.next - 1)
    }

    /// Notes that the insert of record `number` ended. A failed insert ends, too, as in YCSB,
    /// because it must not keep later records from being requested.
    pub fn acknowledge(&self, number: u64) {
        let mut state = self.unacknowledged.lock();
        assert!(number < state.next, "only a number that was given out is acknowledged");
        state.above_gap.insert(number);
        let mut acknowledged = self.records();
        while state.above_gap.remove(&acknowledged) {
            acknowledged += 1;
        }
        self.acknowledged.store(acknowledged, Ordering::Release);
    }

    /// How many records exist: their numbers are `0..records()`.
    pub fn records(&self) -> u64 {
        self.acknowledged.load(Ordering::Acquire)
    }
}

#[derive(Debug, Clone)]
enum Popularity {
    Uniform(Uniform),
    Zipfian(ScrambledZipfian),
    Latest(SkewedLatest),
}

/// The sequence of one client's requests.
#[derive(Debug, Clone)]
pub struct Transactions {
    mix: Mix,
    popularity: Popularity,
    scan_length: Uniform,
    inserts: Arc<InsertSequence>,
    random: Xoshiro256PlusPlus,
}

impl Transactions {
    /// `operations` is how many requests all clients together are expected to make. The popular
    /// records are spread over the records at the end, not at the start, so that inserts do not
    /// change which records are popular.
    pub fn new(
        workload: Workload,
        inserts: Arc<InsertSequence>,
        operations: u64,
        seed: u64,
    ) -> Self {
        let mix = workload.mix();
        let records = inserts.records();
        let popularity = match workload {
            Workload::D => Popularity::Latest(SkewedLatest::new(records)),
            Workload::U => Popularity::Uniform(Uniform::new(0, records.saturating_sub(1))),
            _ => {
                // Twice what the shares give, as in YCSB, because chance may give more.
                let new_records = operations.saturating_mul(u64::from(mix.insert)) / 100 * 2;
                Popularity::Zipfian(ScrambledZipfian::new(records.saturating_add(new_records)))
            }
        };
        Transactions {
            mix,
            popularity,
            scan_length: Uniform::new(1, MAX_SCAN_LENGTH),
            inserts,
            random: stream(seed, 0),
        }
    }

    /// The same distributions with the randomness of client number `client`.
    pub fn for_client(&self, seed: u64, client: u64) -> Self {
        Transactions { random: stream(seed, client), ..self.clone() }
    }

    /// The randomness of this client, for the values that it writes.
    pub fn random(&mut self) -> &mut Xoshiro256PlusPlus {
        &mut self.random
    }

    pub fn inserts(&self) -> &InsertSequence {
        &self.inserts
    }

    pub fn next(&mut self) -> Transaction {
        let Mix { read, update, insert, scan, read_modify_write } = self.mix;
        let mut dice =
            self.random.random_range(0..read + update + insert + scan + read_modify_write);
        let mut falls_on = |share: u32| {
            let hit = dice < share;
            dice = dice.wrapping_sub(share);
            hit
        };
        if falls_on(read) {
            Transaction::Read { record: self.record() }
        } else if falls_on(update) {
            Transaction::Update { record: self.record() }
        } else if falls_on(insert) {
            Transaction::Insert
        } else if falls_on(scan) {
            Transaction::Scan {
                record: self.record(),
                length: self.scan_length.next(&mut self.random),
            }
        } else {
            Transaction::ReadModifyWrite { record: self.record() }
        }
    }

    /// A record that exists, by popularity.
    fn record(&mut self) -> u64 {
        let records = self.inserts.records();
        match &mut self.popularity {
            Popularity::Uniform(uniform) => uniform.next(&mut self.random),
            Popularity::Latest(latest) => latest.next(records, &mut self.random),
            Popularity::Zipfian(zipfian) => loop {
                let record = zipfian.next(&mut self.random);
                if record < records {
                    return record;
                }
            },
        }
    }
}

/// A stream of randomness of its own for each client of one seed.
pub fn stream(seed: u64, client: u64) -> Xoshiro256PlusPlus {
    Xoshiro256PlusPlus::seed_from_u64(seed ^ fnv_hash(client))
}

#[cfg(test)]
mod tests {
    use super::*;

    const RECORDS: u64 = 10_000;
    const DRAWS: usize = 100_000;

    fn transactions(workload: Workload, seed: u64) -> Transactions {
        let inserts = Arc::new(InsertSequence::new(RECORDS));
        Transactions::new(workload, inserts, DRAWS as u64, seed)
    }

    fn draw(workload: Workload, seed: u64) -> Vec<Transaction> {
        let mut source = transactions(workload, seed).for_client(seed, 3);
        (0..DRAWS).map(|_| source.next()).collect()
    }

    #[test]
    fn each_workload_has_its_shares_of_requests() {
        // Reads, updates, inserts, scans, read-modify-writes: the core workloads of the YCSB paper
        // (Cooper et al., SoCC 2010) and workload F of its code.
        let expected = [
            (Workload::A, [0.5, 0.5, 0.0, 0.0, 0.0]),
            (Workload::B, [0.95, 0.05, 0.0, 0.0, 0.0]),
            (Workload::C, [1.0, 0.0, 0.0, 0.0, 0.0]),
            (Workload::D, [0.95, 0.0, 0.05, 0.0, 0.0]),
            (Workload::E, [0.0, 0.0, 0.05, 0.95, 0.0]),
            (Workload::F, [0.5, 0.0, 0.0, 0.0, 0.5]),
            (Workload::U, [0.0, 1.0, 0.0, 0.0, 0.0]),
        ];
        for (workload, shares) in expected {
            let mut counts = [0_u32; 5];
            for transaction in draw(workload, 1) {
                counts[match transaction {
                    Transaction::Read { .. } => 0,
                    Transaction::Update { .. } => 1,
                    Transaction::Insert => 2,
                    Transaction::Scan { .. } => 3,
                    Transaction::ReadModifyWrite { .. } => 4,
                }] += 1;
            }
            for (count, share) in counts.iter().zip(shares) {
                let measured = f64::from(*count) / DRAWS as f64;
                assert!((measured - share).abs() < 0.006, "{workload:?}: {counts:?}");
                assert!(share > 0.0 || *count == 0, "{workload:?}: {counts:?}");
            }
        }
    }

    #[test]
    fn the_same_seed_gives_the_same_requests_and_another_seed_others() {
        for workload in [Workload::A, Workload::D, Workload::E] {
            assert_eq!(draw(workload, 7), draw(workload, 7));
            assert_ne!(draw(workload, 7), draw(workload, 8));
        }
        let source = transactions(Workload::A, 7);
        let (mut one, mut two) = (source.for_client(7, 1), source.for_client(7, 2));
        assert_ne!(one.next_hundred(), two.next_hundred(), "clients do not march in step");
    }

    impl Transactions {
        fn next_hundred(&mut self) -> Vec<Transaction> {
            (0..100).map(|_| self.next()).collect()
        }
    }

    #[test]
    fn only_records_that_exist_are_asked_for() {
        for workload in [Workload::A, Workload::D, Workload::E, Workload::F, Workload::U] {
            for transaction in draw(workload, 2) {
                let record = match transaction {
                    Transaction::Insert => 0,
                    Transaction::Read { record }
                    | Transaction::Update { record }
                    | Transaction::ReadModifyWrite { record } => record,
                    Transaction::Scan { record, length } => {
                        assert!((1..=MAX_SCAN_LENGTH).contains(&length));
                        record
                    }
                };
                assert!(record < RECORDS);
            }
        }
    }

    #[test]
    fn the_latest_workload_asks_mostly_for_the_records_just_inserted() {
        let mut source = transactions(Workload::D, 5).for_client(5, 0);
        let mut newest = 0;
        let mut reads = 0;
        for _ in 0..DRAWS {
            match source.next() {
                Transaction::Insert => {
                    let number = source.inserts().begin().expect("few are unanswered");
                    source.inserts().acknowledge(number);
                }
                Transaction::Read { record } => {
                    reads += 1;
                    newest += u32::from(record + 10 >= source.inserts().records());
                }
                other => panic!("workload D makes no {other:?}"),
            }
        }
        assert!(source.inserts().records() > RECORDS + 4_000);
        // The ten newest of 10,000 to 15,000 have 2.95 / 9.9 of the zipfian mass.
        let share = f64::from(newest) / f64::from(reads);
        assert!((0.26..0.33).contains(&share), "{share}");
    }

    #[test]
    fn updates_alone_are_spread_evenly() {
        let mut counts = vec![0_u32; RECORDS as usize];
        for transaction in draw(Workload::U, 4) {
            let Transaction::Update { record } = transaction else {
                panic!("workload U makes no {transaction:?}");
            };
            counts[record as usize] += 1;
        }
        // Ten each on average. A popular record would have hundreds.
        assert!(counts.iter().all(|count| *count < 40));
        assert!(counts.iter().filter(|count| **count > 0).count() > RECORDS as usize * 99 / 100);
    }

    #[test]
    fn a_record_counts_only_when_all_before_it_were_acknowledged() {
        let inserts = InsertSequence::new(5);
        let numbers: Vec<_> = (0..3).map(|_| inserts.begin()).collect();
        assert_eq!(numbers, [Some(5), Some(6), Some(7)]);
        inserts.acknowledge(7);
        inserts.acknowledge(6);
        assert_eq!(inserts.records(), 5);
        inserts.acknowledge(5);
        assert_eq!(inserts.records(), 8);
    }

    #[test]
    fn inserts_stop_when_too_many_are_unanswered() {
        let inserts = InsertSequence::new(0);
        for number in 0..MAX_INSERTS_AHEAD {
            assert_eq!(inserts.begin(), Some(number));
        }
        assert_eq!(inserts.begin(), None);
        inserts.acknowledge(0);
        assert_eq!(inserts.begin(), Some(MAX_INSERTS_AHEAD));
    }
}
