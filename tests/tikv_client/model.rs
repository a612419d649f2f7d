//! One client with a part of the key space of its own, and a map with the expected results.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tikv_client::{Key, KvPair, RawClient};

/// Keys of one worker.
pub const KEYS: usize = 240;

/// The most keys of a batch.
const BATCH: usize = 20;

/// A limit above the number of keys.
const NO_LIMIT: u32 = 1_000;

/// gRPC's code for a request that is refused because of its content.
const INVALID_ARGUMENT: i32 = 3;

/// A time to live in seconds, longer than any test runs.
const LONG_TTL: u64 = 100_000;

pub fn start(worker: usize) -> Vec<u8> {
    format!("k{worker}/").into()
}

/// A key above all keys of a worker.
pub fn end(worker: usize) -> Vec<u8> {
    format!("k{worker}0").into()
}

pub fn key(worker: usize, number: usize) -> Vec<u8> {
    format!("k{worker}/{number:03}").into()
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Held {
    value: Vec<u8>,
    expires: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Operation {
    Get,
    TimeToLive,
    Put,
    PutWithTtl,
    Delete,
    BatchGet,
    BatchPut,
    BatchPutWithTtl,
    BatchDelete,
    Scan,
    ScanKeys,
    ReverseScan,
    ReverseScanKeys,
    UnboundedScan,
    BatchScan,
    BatchScanKeys,
    DeleteRange,
    CompareAndSwap,
}

impl Operation {
    const ALL: [Operation; 18] = [
        Operation::Get,
        Operation::TimeToLive,
        Operation::Put,
        Operation::PutWithTtl,
        Operation::Delete,
        Operation::BatchGet,
        Operation::BatchPut,
        Operation::BatchPutWithTtl,
        Operation::BatchDelete,
        Operation::Scan,
        Operation::ScanKeys,
        Operation::ReverseScan,
        Operation::ReverseScanKeys,
        Operation::UnboundedScan,
        Operation::BatchScan,
        Operation::BatchScanKeys,
        Operation::DeleteRange,
        Operation::CompareAndSwap,
    ];
}

pub struct Subject {
    /// Whether one region holds all keys of the worker. Then the client makes fewer errors.
    in_one_region: bool,
    client: RawClient,
    atomic: RawClient,
    worker: usize,
    model: BTreeMap<Vec<u8>, Held>,
    random: ChaCha8Rng,
    values: u64,
    used: BTreeSet<Operation>,
}

impl Subject {
    pub fn new(client: RawClient, worker: usize, seed: u64, in_one_region: bool) -> Self {
        Subject {
            in_one_region,
            atomic: client.with_atomic_for_cas(),
            client,
            worker,
            model: BTreeMap::new(),
            random: ChaCha8Rng::seed_from_u64(seed),
            values: 0,
            used: BTreeSet::new(),
        }
    }

    /// Performs one random operation.
    pub async fn step(&mut self) {
        let operation = Operation::ALL[self.random.random_range(0..Operation::ALL.len())];
        self.used.insert(operation);
        match operation {
            Operation::Get => self.get().await,
            Operation::TimeToLive => self.time_to_live().await,
            Operation::Put => self.put(0).await,
            Operation::PutWithTtl => self.put(LONG_TTL).await,
            Operation::Delete => self.delete().await,
            Operation::BatchGet => self.batch_get().await,
            Operation::BatchPut => self.batch_put(false).await,
            Operation::BatchPutWithTtl => self.batch_put(true).await,
            Operation::BatchDelete => self.batch_delete().await,
            Operation::Scan => self.scan().await,
            Operation::ScanKeys => self.scan_keys().await,
            Operation::ReverseScan => self.reverse_scan().await,
            Operation::ReverseScanKeys => self.reverse_scan_keys().await,
            Operation::UnboundedScan => self.unbounded_scan().await,
            Operation::BatchScan => self.batch_scan().await,
            Operation::BatchScanKeys => self.batch_scan_keys().await,
            Operation::DeleteRange => self.delete_range().await,
            Operation::CompareAndSwap => self.compare_and_swap().await,
        }
    }

    pub fn assert_every_operation_was_used(&self) {
        let missing: Vec<_> =
            Operation::ALL.iter().filter(|operation| !self.used.contains(operation)).collect();
        assert!(missing.is_empty(), "{missing:?} were not used");
    }

    /// Checks everything at once.
    pub async fn check_all(&mut self) {
        let range = start(self.worker)..end(self.worker);
        let found = self.client.scan(range.clone(), NO_LIMIT).await.expect("a scan");
        assert_eq!(plain(found), self.expected(range));
    }

    async fn get(&mut self) {
        let key = self.a_key();
        let found = self.client.get(key.clone()).await.expect("a get");
        assert_eq!(found.as_ref(), self.model.get(&key).map(|held| &held.value), "{key:?}");
    }

    async fn time_to_live(&mut self) {
        let key = self.a_key();
        let left = self.client.get_key_ttl_secs(key.clone()).await.expect("a ttl");
        match self.model.get(&key) {
            None => assert_eq!(left, None, "{key:?} does not exist"),
            Some(held) if !held.expires => assert_eq!(left, Some(0), "{key:?} never expires"),
            Some(_) => {
                let left = left.expect("the key exists");
                assert!((LONG_TTL / 2..=LONG_TTL).contains(&left), "{key:?} has {left} s left");
            }
        }
    }

    async fn put(&mut self, ttl: u64) {
        let (key, value) = (self.a_key(), self.a_value());
        let written = match ttl {
            0 => self.client.put(key.clone(), value.clone()).await,
            ttl => self.client.put_with_ttl(key.clone(), value.clone(), ttl).await,
        };
        written.expect("a put");
        self.model.insert(key, Held { value, expires: ttl != 0 });
    }

    async fn delete(&mut self) {
        let key = self.a_key();
        self.client.delete(key.clone()).await.expect("a delete");
        self.model.remove(&key);
    }

    async fn batch_get(&mut self) {
        let keys = self.some_keys();
        let found = self.client.batch_get(keys.clone()).await.expect("a batch get");
        let mut found = plain(found);
        found.sort();
        let held = |key: &Vec<u8>| Some((key.clone(), self.model.get(key)?.value.clone()));
        assert_eq!(found, keys.iter().filter_map(held).collect::<Vec<_>>());
    }

    async fn batch_put(&mut self, with_ttl: bool) {
        let pairs: Vec<_> = self.some_keys().into_iter().map(|key| (key, self.a_value())).collect();
        // Some pairs expire, others never do.
        let expires = |number: usize| with_ttl && number.is_multiple_of(2);
        let written = if with_ttl {
            let ttls = (0..pairs.len()).map(|number| if expires(number) { LONG_TTL } else { 0 });
            self.client.batch_put_with_ttl(pairs.clone(), ttls).await
        } else {
            self.client.batch_put(pairs.clone()).await
        };
        written.expect("a batch put");
        for (number, (key, value)) in pairs.into_iter().enumerate() {
            self.model.insert(key, Held { value, expires: expires(number) });
        }
    }

    async fn batch_delete(&mut self) {
        let keys = self.some_keys();
        self.client.batch_delete(keys.clone()).await.expect("a batch delete");
        for key in keys {
            self.model.remove(&key);
        }
    }

    async fn scan(&mut self) {
        let (range, limit) = (self.a_range(), self.a_limit());
        let found = self.client.scan(range.clone(), limit).await.expect("a scan");
        let mut expected = self.expected(range);
        expected.truncate(limit as usize);
        assert_eq!(plain(found), expected);
    }

    async fn scan_keys(&mut self) {
        let (range, limit) = (self.a_range(), self.a_limit());
        let found = self.client.scan_keys(range.clone(), limit).await.expect("a scan");
        let mut expected = self.expected_keys(range);
        expected.truncate(limit as usize);
        assert_eq!(keys(found), expected);
    }

    /// The client begins in the region of the lower bound, where the wanted keys may not be. Then
    /// it gets an error, and never other keys.
    async fn reverse_scan(&mut self) {
        let (range, limit) = (self.a_range(), self.a_limit());
        let found = self.client.scan_reverse(range.clone(), limit).await;
        if let Some(found) = self.unless_refused(found) {
            let mut expected = self.expected(range);
            expected.reverse();
            expected.truncate(limit as usize);
            assert_eq!(plain(found), expected);
        }
        // No region has a bound between a key and the next one.
        let key = self.a_key();
        let found = self.client.scan_reverse(key.clone()..=key.clone(), 1).await.expect("a scan");
        assert_eq!(plain(found), self.expected(key.clone()..next(&key)));
    }

    async fn reverse_scan_keys(&mut self) {
        let (range, limit) = (self.a_range(), self.a_limit());
        let found = self.client.scan_keys_reverse(range.clone(), limit).await;
        if let Some(found) = self.unless_refused(found) {
            let mut expected = self.expected_keys(range);
            expected.reverse();
            expected.truncate(limit as usize);
            assert_eq!(keys(found), expected);
        }
    }

    /// The client stops at the end of the first region. It gets an error, unless it has all that it
    /// wants.
    async fn unbounded_scan(&mut self) {
        let from = self.a_key();
        let expected = self.expected(from.clone()..end(self.worker));
        let limit = expected.len() as u32;
        let found = self.client.scan(from.., limit).await;
        if let Some(found) = self.unless_refused(found) {
            assert_eq!(plain(found), expected);
        }
    }

    /// Returns `None` for the error that this client cannot scan several regions in that way.
    fn unless_refused<T>(&self, answer: tikv_client::Result<T>) -> Option<T> {
        match answer {
            Ok(found) => Some(found),
            Err(tikv_client::Error::GrpcAPI(status))
                if !self.in_one_region && status.code() as i32 == INVALID_ARGUMENT =>
            {
                None
            }
            Err(error) => panic!("a scan: {error}"),
        }
    }

    async fn batch_scan(&mut self) {
        let ranges = self.some_ranges();
        let found = self.client.batch_scan(ranges.clone(), NO_LIMIT).await.expect("a batch scan");
        let mut found = plain(found);
        found.sort();
        let expected: Vec<_> = ranges.into_iter().flat_map(|range| self.expected(range)).collect();
        assert_eq!(found, expected);
    }

    async fn batch_scan_keys(&mut self) {
        let ranges = self.some_ranges();
        let found = self.client.batch_scan_keys(ranges.clone(), NO_LIMIT).await;
        let mut found = keys(found.expect("a batch scan"));
        found.sort();
        let expected: Vec<_> =
            ranges.into_iter().flat_map(|range| self.expected_keys(range)).collect();
        assert_eq!(found, expected);
    }

    async fn delete_range(&mut self) {
        let range = self.a_short_range();
        self.client.delete_range(range.clone()).await.expect("a delete of a range");
        self.model.retain(|key, _| !range.contains(key));
    }

    async fn compare_and_swap(&mut self) {
        let (key, value) = (self.a_key(), self.a_value());
        let held = self.model.get(&key).map(|held| held.value.clone());
        // A guess that is sometimes wrong.
        let right = self.random.random_bool(0.7);
        let guess = if right { held.clone() } else { Some(self.a_value()) };
        let (previous, swapped) = self
            .atomic
            .compare_and_swap(key.clone(), guess, value.clone())
            .await
            .expect("a compare-and-swap");
        if !right {
            assert_eq!((previous, swapped), (held, false), "{key:?}");
            return;
        }
        // The client repeats a request without an answer. Then it finds its own value.
        let repeated = previous.as_ref() == Some(&value) && !swapped;
        assert!(repeated || (swapped && previous == held), "{key:?}: {previous:?}, not {held:?}");
        self.model.insert(key, Held { value, expires: false });
    }

    fn a_key(&mut self) -> Vec<u8> {
        key(self.worker, self.random.random_range(0..KEYS))
    }

    /// Different keys, in order.
    fn some_keys(&mut self) -> Vec<Vec<u8>> {
        let count = self.random.random_range(1..=BATCH);
        let keys: BTreeSet<_> = (0..count).map(|_| self.a_key()).collect();
        keys.into_iter().collect()
    }

    /// A value that was never used before.
    fn a_value(&mut self) -> Vec<u8> {
        self.values += 1;
        let length = self.random.random_range(0..200);
        let mut value = format!("{}:", self.values).into_bytes();
        value.resize_with(value.len() + length, || b'x');
        value
    }

    fn a_limit(&mut self) -> u32 {
        if self.random.random_bool(0.5) { NO_LIMIT } else { self.random.random_range(1..40) }
    }

    fn a_range(&mut self) -> Range<Vec<u8>> {
        let (one, other) = (self.a_key(), self.a_key());
        match self.random.random_range(0..4) {
            0 => start(self.worker)..end(self.worker),
            _ if one < other => one..other,
            _ => other..next(&one),
        }
    }

    fn a_short_range(&mut self) -> Range<Vec<u8>> {
        let first = self.random.random_range(0..KEYS);
        let length = self.random.random_range(1..30);
        key(self.worker, first)..key(self.worker, first + length)
    }

    /// Ranges that do not overlap, in order.
    fn some_ranges(&mut self) -> Vec<Range<Vec<u8>>> {
        let bounds = self.some_keys();
        let ranges: Vec<_> =
            bounds.chunks_exact(2).map(|pair| pair[0].clone()..pair[1].clone()).collect();
        if ranges.is_empty() { vec![start(self.worker)..end(self.worker)] } else { ranges }
    }

    fn expected(&self, range: Range<Vec<u8>>) -> Vec<(Vec<u8>, Vec<u8>)> {
        let held = self.model.range(range);
        held.map(|(key, held)| (key.clone(), held.value.clone())).collect()
    }

    fn expected_keys(&self, range: Range<Vec<u8>>) -> Vec<Vec<u8>> {
        self.model.range(range).map(|(key, _)| key.clone()).collect()
    }
}

fn next(key: &[u8]) -> Vec<u8> {
    [key, b"\0"].concat()
}

fn plain(pairs: Vec<KvPair>) -> Vec<(Vec<u8>, Vec<u8>)> {
    pairs.into_iter().map(|pair| (pair.key().clone().into(), pair.value().clone())).collect()
}

fn keys(keys: Vec<Key>) -> Vec<Vec<u8>> {
    keys.into_iter().map(Vec::from).collect()
}
