//! The clients: each does one thing over and over, and writes down what it saw.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use esker_client::kv::{KeyTtl, Pair};
use esker_client::{ClientError, KvClient, PlacementClient};
use esker_rpc::proto::kvrpcpb::{Context, RawGetRequest};
use esker_rpc::service::{Caller, Reply, Request, StoreService as _};
use parking_lot::Mutex;
use rand::{RngExt as _, SeedableRng as _, seq::IndexedRandom as _};
use rand_chacha::ChaCha8Rng;
use tokio::sync::{OnceCell, watch};
use tokio::time::Instant;

use crate::history::{History, Operation, Ticket, Value, decode, encode, text};
use crate::network::Host;
use crate::operator::connect;
use crate::plan::Actor;
use crate::world::Surroundings;

/// How long one operation may take.
const DEADLINE: Duration = Duration::from_secs(6);
/// How much later than its deadline an operation on keys may end.
const GRACE: Duration = Duration::from_millis(500);
/// What the keys begin with that expire. They come after all others.
pub const EXPIRING: &[u8] = b"t";

/// Numbers that were given out in ranges: the end of each, by its first.
#[derive(Default)]
struct Ranges(BTreeMap<u64, u64>);

impl Ranges {
    fn has(&self, number: u64) -> bool {
        self.0.range(..=number).next_back().is_some_and(|(_, end)| number < *end)
    }

    /// Adds a range, or returns the one that it overlaps.
    fn give(&mut self, given: Range<u64>) -> Result<(), Range<u64>> {
        let before = self.0.range(..given.end).next_back();
        if let Some((start, end)) = before.filter(|(_, end)| **end > given.start) {
            return Err(*start..*end);
        }
        self.0.insert(given.start, given.end);
        Ok(())
    }
}

/// What placement gave out, which must never come twice.
#[derive(Default)]
pub struct Given {
    /// The highest timestamp that anybody has received.
    timestamp: u64,
    timestamps: Ranges,
    ids: Ranges,
}

impl Given {
    /// Whether this id was drawn by a client, so that nothing else may have it.
    pub fn has(&self, id: u64) -> bool {
        self.ids.has(id)
    }
}

/// One actor at work.
pub struct Work {
    pub number: u32,
    pub actor: Actor,
    /// Where the program runs that it is a part of.
    pub host: Host,
    /// The client of that program, as soon as there is one.
    pub client: Arc<OnceCell<KvClient>>,
    pub around: Surroundings,
    pub given: Arc<Mutex<Given>>,
    pub stopped: watch::Receiver<bool>,
    pub seed: u64,
    /// How far two wall clocks may be apart.
    pub skew: Duration,
}

/// What one look at a key that expires found.
#[derive(Clone, Copy, Debug)]
enum Life {
    Gone,
    Here,
    Left(Duration),
    ForEver,
}

/// What a write of several keys came to.
enum Outcome {
    Done,
    Failed,
    Unknown,
}

fn outcome<T>(answer: &Result<T, ClientError>) -> Outcome {
    match answer {
        Ok(_) => Outcome::Done,
        Err(ClientError::OutcomeUnknown { .. }) => Outcome::Unknown,
        Err(_) => Outcome::Failed,
    }
}

impl Work {
    /// Works until told to stop.
    pub async fn run(mut self) {
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed ^ (u64::from(self.number) + 1) << 32);
        let page = rng.random_range(1..=4);
        let connecting = async {
            let placement = connect(&self.around, self.host).await;
            KvClient::new(placement, []).with_deadline(DEADLINE).with_scan_page(page)
        };
        let client = tokio::select! {
            biased;
            _ = self.stopped.wait_for(|stop| *stop) => return,
            client = self.client.get_or_init(|| connecting) => client.clone(),
        };
        let host = self.host;
        let mut client = Client { work: &self, host, client, rng: &mut rng, drawn: 0 };
        while !*self.stopped.borrow() {
            let pause = client.rng.random_range(0..150);
            tokio::time::sleep(Duration::from_millis(pause)).await;
            client.act().await;
        }
    }
}

struct Client<'a> {
    work: &'a Work,
    host: Host,
    client: KvClient,
    rng: &'a mut ChaCha8Rng,
    /// Keys that it has drawn for itself.
    drawn: u32,
}

impl Client<'_> {
    fn history(&self) -> parking_lot::MutexGuard<'_, History> {
        self.work.around.history.lock()
    }

    fn note(&self, what: impl std::fmt::Display) {
        self.work.around.journal.note(self.host, what);
    }

    fn violated(&self, promise: &'static str, what: String) {
        self.work.around.journal.violated(promise, format!("{}: {what}", self.host));
    }

    /// An operation on keys, which must end in time.
    async fn timed<T>(&self, operation: impl Future<Output = T>) -> T {
        let began = Instant::now();
        let answer = operation.await;
        let took = began.elapsed();
        if took > DEADLINE + GRACE {
            let what = format!("{took:?} after it began, of at most {DEADLINE:?}");
            self.violated("an operation ends in time", what);
        }
        answer
    }

    fn place(&mut self) -> usize {
        let places = self.history().places();
        self.rng.random_range(0..places)
    }

    fn key(&mut self) -> Bytes {
        let place = self.place();
        self.history().key(place)
    }

    async fn act(&mut self) {
        match self.work.actor {
            Actor::Put => self.put().await,
            Actor::Get => self.get().await,
            Actor::Swap => self.swap().await,
            Actor::Delete => self.delete().await,
            Actor::DeleteRange => self.delete_range().await,
            Actor::Batch => self.batch().await,
            Actor::Scan => self.scan().await,
            Actor::TimeToLive => self.time_to_live().await,
            Actor::Oracle => self.oracle().await,
            Actor::FollowerRead => self.follower_read().await,
        }
    }

    /// What a read found, as the number of the write that it saw.
    fn value(&self, key: &[u8], found: Option<&Bytes>) -> Option<Value> {
        let bytes = found?;
        let value = decode(bytes);
        if value.is_none() {
            let what = format!("{} is {:?}", text(key), text(bytes));
            self.violated("a value is what somebody wrote", what);
        }
        value
    }

    fn conclude(&self, tickets: Vec<Ticket>, operation: &Operation, outcome: &Outcome) {
        let mut history = self.history();
        for ticket in tickets {
            match outcome {
                Outcome::Done => history.finish(ticket, operation.clone()),
                Outcome::Failed => history.fail(ticket),
                Outcome::Unknown => history.lose_sight(ticket, operation.clone()),
            }
        }
    }

    fn note_write<T>(&self, what: &str, answer: &Result<T, ClientError>) {
        match answer {
            Ok(_) => self.note(what),
            Err(error) => self.note(format_args!("{what}: {error}")),
        }
    }

    async fn put(&mut self) {
        let key = self.key();
        let value = self.history().fresh_value();
        let operation = Operation::Write(Some(value));
        let Some(ticket) = self.history().begin(&key, operation.clone()) else { return };
        let answer = self.timed(self.client.put(key.clone(), encode(value))).await;
        self.note_write(&format!("put {} {value}", text(&key)), &answer);
        self.conclude(vec![ticket], &operation, &outcome(&answer));
    }

    async fn get(&mut self) {
        let key = self.key();
        self.read(&key).await;
    }

    /// Reads a key; nothing if there is no answer.
    async fn read(&mut self, key: &Bytes) -> Option<Option<Value>> {
        let ticket = self.history().begin(key, Operation::Read(None))?;
        let answer = self.timed(self.client.get(key.clone())).await;
        match answer {
            Ok(found) => {
                let value = self.value(key, found.as_ref());
                self.note(format_args!("get {} {value:?}", text(key)));
                self.history().finish(ticket, Operation::Read(value));
                Some(value)
            }
            Err(error) => {
                self.note(format_args!("get {}: {error}", text(key)));
                self.history().fail(ticket);
                None
            }
        }
    }

    async fn swap(&mut self) {
        let key = self.key();
        let Some(expected) = self.read(&key).await else { return };
        // Sometimes of a value that the key does not have.
        let expected = match self.rng.random_range(0..10) {
            0 => None,
            _ => expected,
        };
        let new = self.history().fresh_value();
        let swap = |outcome| Operation::Swap { expected, new, outcome };
        let Some(ticket) = self.history().begin(&key, swap(None)) else { return };
        let asked = expected.map(encode);
        let swapping = self.client.compare_and_swap(key.clone(), asked, encode(new));
        let answer = self.timed(swapping).await;
        let what = format!("swap {} {expected:?} for {new}", text(&key));
        let mut history = match &answer {
            Ok(swapped) => {
                let before = self.value(&key, swapped.previous.as_ref());
                self.note(format_args!("{what}: {} over {before:?}", swapped.swapped));
                let mut history = self.history();
                history.finish(ticket, swap(Some((before, swapped.swapped))));
                return;
            }
            Err(error) => {
                self.note(format_args!("{what}: {error}"));
                self.history()
            }
        };
        match outcome(&answer) {
            Outcome::Unknown => history.lose_sight(ticket, swap(None)),
            Outcome::Failed | Outcome::Done => history.fail(ticket),
        }
    }

    async fn delete(&mut self) {
        let key = self.key();
        let operation = Operation::Write(None);
        let Some(ticket) = self.history().begin(&key, operation.clone()) else { return };
        let answer = self.timed(self.client.delete(key.clone())).await;
        self.note_write(&format!("delete {}", text(&key)), &answer);
        self.conclude(vec![ticket], &operation, &outcome(&answer));
        tokio::time::sleep(Duration::from_millis(self.rng.random_range(0..400))).await;
    }

    /// Bounds that are keys, or between keys.
    fn bounds(&mut self) -> (Bytes, Bytes) {
        let (first, second) = (self.key(), self.key());
        let (start, end) = if first <= second { (first, second) } else { (second, first) };
        let after = |key: &Bytes| Bytes::from([key, &b"\0"[..]].concat());
        match self.rng.random_range(0..5) {
            0 => (start, after(&end)),
            1 => (after(&start), end),
            // From the first key on.
            2 => (Bytes::new(), end),
            _ => (start, end),
        }
    }

    async fn delete_range(&mut self) {
        tokio::time::sleep(Duration::from_millis(self.rng.random_range(500..2_500))).await;
        let (start, end) = self.bounds();
        let ticket = self.history().begin_range(&start, &end, Operation::Write(None));
        let answer = self.client.delete_range(start.clone(), end.clone()).await;
        self.note_write(&format!("delete [{}, {})", text(&start), text(&end)), &answer);
        let is_done = match outcome(&answer) {
            Outcome::Done => Some(true),
            Outcome::Failed => Some(false),
            Outcome::Unknown => None,
        };
        self.history().end_range(&ticket, is_done);
    }

    async fn batch(&mut self) {
        let mut keys: Vec<Bytes> = (0..self.rng.random_range(1..5)).map(|_| self.key()).collect();
        keys.sort();
        keys.dedup();
        match self.rng.random_range(0..5) {
            0 | 1 => return self.batch_get(keys).await,
            2 => return self.batch_delete(keys).await,
            _ => {}
        }
        let mut begun = Vec::new();
        let mut pairs: Vec<Pair> = Vec::new();
        for key in keys {
            let value = self.history().fresh_value();
            let operation = Operation::Write(Some(value));
            let Some(ticket) = self.history().begin(&key, operation.clone()) else { continue };
            begun.push((ticket, operation));
            pairs.push((key, encode(value)));
        }
        let what: Vec<String> = pairs.iter().map(|(key, _)| text(key)).collect();
        let answer = self.timed(self.client.batch_put(pairs)).await;
        self.note_write(&format!("put {}", what.join(", ")), &answer);
        let outcome = outcome(&answer);
        for (ticket, operation) in begun {
            self.conclude(vec![ticket], &operation, &outcome);
        }
    }

    async fn batch_delete(&mut self, keys: Vec<Bytes>) {
        let operation = Operation::Write(None);
        let begun: Vec<Ticket> =
            keys.iter().filter_map(|key| self.history().begin(key, operation.clone())).collect();
        let what: Vec<String> = keys.iter().map(|key| text(key)).collect();
        let answer = self.timed(self.client.batch_delete(keys)).await;
        self.note_write(&format!("delete {}", what.join(", ")), &answer);
        self.conclude(begun, &operation, &outcome(&answer));
    }

    async fn batch_get(&mut self, keys: Vec<Bytes>) {
        let begun: Vec<Ticket> = keys
            .iter()
            .filter_map(|key| self.history().begin(key, Operation::Read(None)))
            .collect();
        let answer = self.timed(self.client.batch_get(keys)).await;
        self.conclude_reads(begun, answer, "get many");
    }

    /// Each key that was asked for is there as the answer says, or not there.
    fn conclude_reads(
        &self,
        begun: Vec<Ticket>,
        answer: Result<Vec<Pair>, ClientError>,
        what: &str,
    ) {
        let pairs = match answer {
            Ok(pairs) => pairs,
            Err(error) => {
                self.note(format_args!("{what}: {error}"));
                let mut history = self.history();
                return begun.into_iter().for_each(|ticket| history.fail(ticket));
            }
        };
        let found: BTreeMap<Bytes, Option<Value>> =
            pairs.iter().map(|(key, value)| (key.clone(), self.value(key, Some(value)))).collect();
        let seen: Vec<String> =
            found.iter().map(|(key, value)| format!("{}={value:?}", text(key))).collect();
        self.note(format_args!("{what}: {}", seen.join(" ")));
        let mut history = self.history();
        for ticket in begun {
            let value = found.get(&ticket.key).copied().flatten();
            history.finish(ticket, Operation::Read(value));
        }
    }

    async fn scan(&mut self) {
        let (start, mut end) = self.bounds();
        if self.rng.random_bool(0.2) {
            // To the last key.
            end = Bytes::new();
        }
        let limit = self.rng.random_range(1..20);
        let reverse = self.rng.random_bool(0.4);
        let begun = self.history().begin_all(&start, &end, &Operation::Read(None));
        let answer = match reverse {
            false => self.client.scan(start.clone(), end.clone(), limit).await,
            true => self.client.reverse_scan(end.clone(), start.clone(), limit).await,
        };
        let direction = if reverse { "backwards " } else { "" };
        let what = format!("scan {direction}[{}, {}) {limit}", text(&start), text(&end));
        let Ok(pairs) = answer else {
            return self.conclude_reads(begun, answer, &what);
        };
        let keys: Vec<&Bytes> = pairs.iter().map(|(key, _)| key).collect();
        let in_order = match reverse {
            false => keys.windows(2).all(|pair| pair[0] < pair[1]),
            true => keys.windows(2).all(|pair| pair[0] > pair[1]),
        };
        let is_inside = keys.iter().all(|key| **key >= start && (end.is_empty() || **key < end));
        if !in_order || !is_inside || keys.len() > limit as usize {
            let keys: Vec<String> = keys.iter().map(|key| text(key)).collect();
            self.violated("a scan is in order", format!("{what}: {}", keys.join(" ")));
        }
        // With as many pairs as were asked for, it says nothing of what comes behind them.
        let covered = match (keys.last(), keys.len() == limit as usize) {
            (Some(last), true) => match reverse {
                false => (start.clone(), Some((*last).clone())),
                true => ((*last).clone(), None),
            },
            _ => (start.clone(), None),
        };
        let is_covered =
            |key: &Bytes| *key >= covered.0 && covered.1.as_ref().is_none_or(|last| key <= last);
        let (inside, outside): (Vec<_>, Vec<_>) =
            begun.into_iter().partition(|ticket| is_covered(&ticket.key));
        {
            let mut history = self.history();
            outside.into_iter().for_each(|ticket| history.fail(ticket));
        }
        // The others have no history here.
        let pairs = pairs.into_iter().filter(|(key, _)| !key.starts_with(EXPIRING)).collect();
        self.conclude_reads(inside, Ok(pairs), &what);
    }

    /// Writes a value that disappears, and looks whether it does.
    async fn time_to_live(&mut self) {
        self.drawn += 1;
        let number = self.work.number;
        let key = Bytes::from([EXPIRING, format!("{number}/{}", self.drawn).as_bytes()].concat());
        let skew = self.work.skew;
        let ttl = skew.as_secs() + self.rng.random_range(2..5);
        let lives = Duration::from_secs(ttl);
        let began = Instant::now();
        let answer = self.timed(self.client.put_with_ttl(key.clone(), "here", ttl)).await;
        let ended = Instant::now();
        self.note_write(&format!("put {} for {ttl} s", text(&key)), &answer);
        if answer.is_err() {
            return;
        }
        let journal = self.work.around.journal.clone();
        let violated = |what: &str| {
            journal.violated("a value lives as long as it was told to", what.to_owned());
        };
        while !*self.work.stopped.borrow() {
            tokio::time::sleep(Duration::from_millis(self.rng.random_range(300..2_000))).await;
            let asked = Instant::now();
            let Some(life) = self.look_at(&key).await else { continue };
            let answered = Instant::now();
            self.note(format_args!("{} is {life:?}", text(&key)));
            match life {
                Life::Gone if answered + skew < began + lives => {
                    violated(&format!("{} is gone too early", text(&key)));
                }
                Life::ForEver => violated(&format!("{} lives for ever", text(&key))),
                Life::Here | Life::Left(_) if asked > ended + lives + skew => {
                    violated(&format!("{} is still there", text(&key)));
                }
                Life::Gone => {
                    tokio::time::sleep_until(ended + lives + skew).await;
                    return self.take_the_place(&key).await;
                }
                Life::Here => {}
                Life::Left(left) => {
                    let latest = (ended + lives + skew).saturating_duration_since(asked);
                    if left > latest {
                        violated(&format!("{} has {left:?} left", text(&key)));
                    }
                }
            }
        }
    }

    /// Looks in one of three ways at a key that expires.
    async fn look_at(&mut self, key: &Bytes) -> Option<Life> {
        let found = match self.rng.random_range(0..3) {
            0 => {
                return match self.client.get_ttl(key.clone()).await.ok()? {
                    KeyTtl::NotFound => Some(Life::Gone),
                    KeyTtl::Never => Some(Life::ForEver),
                    KeyTtl::Left(left) => Some(Life::Left(left)),
                };
            }
            1 => self.client.get(key.clone()).await.ok()?,
            _ => {
                let after = Bytes::from([key, &b"\0"[..]].concat());
                let pairs = self.client.scan(key.clone(), after, 2).await.ok()?;
                pairs.into_iter().next().map(|(_, value)| value)
            }
        };
        match found.as_deref() {
            None => Some(Life::Gone),
            Some(b"here") => Some(Life::Here),
            Some(other) => {
                let what = format!("{} is {:?}", text(key), text(other));
                self.violated("a value is what somebody wrote", what);
                None
            }
        }
    }

    /// Puts a value where there was one that has expired by every clock.
    async fn take_the_place(&mut self, key: &Bytes) {
        let answer = self.client.compare_and_swap(key.clone(), None, "again").await;
        match answer {
            Ok(swapped) if swapped.swapped && swapped.previous.is_none() => {
                self.note(format_args!("swap {} for another", text(key)));
            }
            Ok(swapped) => {
                let what = format!("{} had {:?} for a swap", text(key), swapped.previous);
                self.violated("a value lives as long as it was told to", what);
            }
            Err(error) => self.note(format_args!("swap {} for another: {error}", text(key))),
        }
    }

    async fn oracle(&mut self) {
        let placement: PlacementClient = self.client.placement().clone();
        if self.rng.random_bool(0.3) {
            let count = self.rng.random_range(1..40);
            let Ok(ids) = placement.alloc_id(count).await else { return };
            self.note(format_args!("ids {ids:?}"));
            let overlaps = self.work.given.lock().ids.give(ids.clone());
            if let Err(before) = overlaps {
                self.violated("an id is given once", format!("{ids:?} after {before:?}"));
            }
            return;
        }
        let before = self.work.given.lock().timestamp;
        // Those who ask at the same time share one answer.
        let counts: [u32; 3] = std::array::from_fn(|_| self.rng.random_range(1..100));
        let asking = counts.map(|count| {
            let placement = placement.clone();
            async move { (count, placement.tso(count).await) }
        });
        for (count, answer) in futures_util::future::join_all(asking).await {
            let Ok(last) = answer else { continue };
            let given = (last.0 + 1).saturating_sub(u64::from(count))..last.0 + 1;
            self.note(format_args!("timestamps {given:?}"));
            let overlaps = {
                let mut all = self.work.given.lock();
                all.timestamp = all.timestamp.max(last.0);
                all.timestamps.give(given.clone())
            };
            if let Err(other) = overlaps {
                self.violated("a timestamp is given once", format!("{given:?} after {other:?}"));
            }
            if given.start <= before {
                self.violated("timestamps go forward", format!("{given:?} after {before}"));
            }
        }
    }

    /// Asks any replica of a region, as a client that spares the leader does.
    async fn follower_read(&mut self) {
        let key = self.key();
        let doors: Vec<_> = self.work.around.doors.lock().values().cloned().collect();
        let Some(door) = doors.choose(self.rng).cloned() else { return };
        let Some(storage) = door.get() else { return };
        let store = storage.store().store_id();
        let regions = storage.store().delegates().descriptors();
        drop(storage);
        let Some(region) = regions.iter().find(|region| region.contains(&key)) else { return };
        let Some(peer) = region.peer_on(store) else { return };
        let context = Context {
            region_id: region.id.0,
            region_epoch: Some(region.epoch.into()),
            peer: Some((*peer).into()),
            replica_read: true,
            ..Context::default()
        };
        let request =
            RawGetRequest { context: Some(context), key: key.clone(), ..RawGetRequest::default() };
        let Some(ticket) = self.history().begin(&key, Operation::Read(None)) else { return };
        let asked = door.handle(Request::RawGet(request), Caller::default());
        let answer = tokio::time::timeout(Duration::from_secs(3), asked).await;
        let answer = match answer {
            Ok(Ok(Reply::RawGet(answer)))
                if answer.region_error.is_none() && answer.error.is_empty() =>
            {
                answer
            }
            _ => return self.history().fail(ticket),
        };
        let found = (!answer.not_found).then_some(answer.value);
        let value = self.value(&key, found.as_ref());
        self.note(format_args!("get {} from store {store} {value:?}", text(&key)));
        self.history().finish(ticket, Operation::Read(value));
    }
}
