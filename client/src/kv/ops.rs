//! The operations on keys.

use std::future::ready;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use esker_model::Region;
use esker_mutants::broken;
use esker_rpc::convert::end_key;
use esker_rpc::proto::kvrpcpb::*;
use futures_util::{StreamExt, stream};

use super::attempt::{At, check_size};
use super::cache::Route;
use super::fence::{Fence, unknown};
use super::request::{Effect, RegionRequest};
use super::{Attempts, Failure, KvClient, MAX_CONCURRENT_REGIONS};
use crate::error::ClientError;

/// Pairs asked for in one request of a scan.
pub(super) const MAX_SCAN_PAGE: u32 = 1024;

/// Keys and values of one request of a batch, so that it fits in a log entry.
const MAX_BATCH_BYTES: usize = 256 << 10;

/// A key and its value.
pub type Pair = (Bytes, Bytes);

/// What a compare-and-swap did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Swap {
    /// Whether the value was the expected one, and is now the new one.
    pub swapped: bool,
    /// The value before the swap; `None` if there was none.
    pub previous: Option<Bytes>,
}

/// How long a key has left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyTtl {
    /// The key does not exist.
    NotFound,
    /// The value stays.
    Never,
    /// The value disappears after so long, in whole seconds.
    Left(Duration),
}

impl KvClient {
    /// A key's value; `None` if there is none. Sees every write that was acknowledged before. A
    /// value may be empty.
    pub async fn get(&self, key: impl Into<Bytes>) -> Result<Option<Bytes>, ClientError> {
        let key = key.into();
        let request = RawGetRequest { key: key.clone(), ..Default::default() };
        let response = self.ask(&key, request).await?;
        Ok((!response.not_found).then_some(response.value))
    }

    /// Writes a value that stays, in place of any value that the key has.
    pub async fn put(
        &self,
        key: impl Into<Bytes>,
        value: impl Into<Bytes>,
    ) -> Result<(), ClientError> {
        self.put_with_ttl(key, value, 0).await
    }

    /// Writes a value that disappears after `ttl` seconds; 0 means never. The time begins when a
    /// store takes the request, by that store's clock.
    pub async fn put_with_ttl(
        &self,
        key: impl Into<Bytes>,
        value: impl Into<Bytes>,
        ttl: u64,
    ) -> Result<(), ClientError> {
        let (key, value) = (key.into(), value.into());
        let request = RawPutRequest { key: key.clone(), value, ttl, ..Default::default() };
        self.ask(&key, request).await.map(|_| ())
    }

    /// Removes a key, whether it exists or not.
    pub async fn delete(&self, key: impl Into<Bytes>) -> Result<(), ClientError> {
        let key = key.into();
        let request = RawDeleteRequest { key: key.clone(), ..Default::default() };
        self.ask(&key, request).await.map(|_| ())
    }

    /// How long a key has left.
    pub async fn get_ttl(&self, key: impl Into<Bytes>) -> Result<KeyTtl, ClientError> {
        let key = key.into();
        let request = RawGetKeyTtlRequest { key: key.clone(), ..Default::default() };
        let response = self.ask(&key, request).await?;
        Ok(match response {
            RawGetKeyTtlResponse { not_found: true, .. } => KeyTtl::NotFound,
            RawGetKeyTtlResponse { ttl: 0, .. } => KeyTtl::Never,
            RawGetKeyTtlResponse { ttl, .. } => KeyTtl::Left(Duration::from_secs(ttl)),
        })
    }

    /// Writes `value` if the key's value is `expected` (`None`: if there is none), in one step. The
    /// new value stays, even where the previous one had a time to live.
    ///
    /// It is not sent again once it may have been applied, because the repetition could find the
    /// value that the first attempt wrote. So [`ClientError::OutcomeUnknown`] is to be expected
    /// more often than from other writes. Where no value is written twice, a second swap
    /// settles it, unless somebody else has written since:
    ///
    /// ```no_run
    /// # use esker_client::{ClientError, KvClient};
    /// use bytes::Bytes;
    ///
    /// /// Whether the key's value became `next`, which no other write of the key ever contains.
    /// /// `None` if that cannot be said any more, because the key has a third value by now.
    /// async fn swap(
    ///     client: &KvClient,
    ///     now: Bytes,
    ///     next: Bytes,
    /// ) -> Result<Option<bool>, ClientError> {
    ///     match client.compare_and_swap("counter", Some(now.clone()), next.clone()).await {
    ///         Ok(swap) => Ok(Some(swap.swapped)),
    ///         Err(ClientError::OutcomeUnknown { .. }) => {
    ///             // Of the two attempts at most one takes effect, in whatever order they come. An
    ///             // error here leaves the outcome unknown, whichever error it is.
    ///             let again = client.compare_and_swap("counter", Some(now), next.clone()).await?;
    ///             // Otherwise another value came instead of `next`, or after it.
    ///             let is_next = again.swapped || again.previous == Some(next);
    ///             Ok(is_next.then_some(true))
    ///         }
    ///         Err(error) => Err(error),
    ///     }
    /// }
    /// ```
    pub async fn compare_and_swap(
        &self,
        key: impl Into<Bytes>,
        expected: Option<Bytes>,
        value: impl Into<Bytes>,
    ) -> Result<Swap, ClientError> {
        let key = key.into();
        let request = RawCasRequest {
            key: key.clone(),
            value: value.into(),
            previous_not_exist: expected.is_none(),
            previous_value: expected.unwrap_or_default(),
            ..Default::default()
        };
        let response = self.ask(&key, request).await?;
        let previous = (!response.previous_not_exist).then_some(response.previous_value);
        Ok(Swap { swapped: response.succeed, previous })
    }

    /// The pairs of those keys that exist, in key order. The keys of different regions are read at
    /// the same time, and not at one moment.
    pub async fn batch_get(&self, keys: Vec<Bytes>) -> Result<Vec<Pair>, ClientError> {
        let answers = self
            .by_region(
                keys,
                |key| key,
                Bytes::len,
                |keys| RawBatchGetRequest { keys, ..Default::default() },
            )
            .await?;
        let pairs = answers.into_iter().flat_map(|answer| answer.pairs);
        let mut pairs: Vec<Pair> = pairs.map(|pair| (pair.key, pair.value)).collect();
        pairs.sort_unstable_by(|a, b| a.0.cmp(&b.0));
        Ok(pairs)
    }

    /// Writes pairs. Of two pairs with the same key, the later is written. The writes are atomic
    /// only within a region, and only up to what fits in one request. So
    /// [`ClientError::OutcomeUnknown`] may also mean that some pairs were written. Any other error
    /// means that none was.
    pub async fn batch_put(&self, mut pairs: Vec<Pair>) -> Result<(), ClientError> {
        // The parts of a batch are sent at the same time, so no part may hold an earlier value of a
        // key.
        pairs.reverse();
        pairs.sort_by(|a, b| a.0.cmp(&b.0));
        pairs.dedup_by(|later, kept| later.0 == kept.0);
        self.by_region(
            pairs,
            |(key, _)| key,
            |(key, value)| key.len() + value.len(),
            |pairs| {
                let pair = |(key, value)| KvPair { key, value, ..Default::default() };
                RawBatchPutRequest {
                    pairs: pairs.into_iter().map(pair).collect(),
                    ..Default::default()
                }
            },
        )
        .await
        .map(|_| ())
    }

    /// Removes keys, whether they exist or not. As atomic as [`batch_put`](Self::batch_put), and
    /// with the same meaning of its errors.
    pub async fn batch_delete(&self, keys: Vec<Bytes>) -> Result<(), ClientError> {
        self.by_region(
            keys,
            |key| key,
            Bytes::len,
            |keys| RawBatchDeleteRequest { keys, ..Default::default() },
        )
        .await
        .map(|_| ())
    }

    /// Up to `limit` pairs in key order, from `start` up to `end` (exclusive; empty means the last
    /// key). An empty `start` means the first key. The answer holds all pairs in memory: to go on
    /// after `limit` pairs, begin at the last key with a zero byte appended.
    ///
    /// The pairs are asked for in pages. Each page shows its region at one moment, and a later page
    /// a later moment.
    pub async fn scan(
        &self,
        start: impl Into<Bytes>,
        end: impl Into<Bytes>,
        limit: u32,
    ) -> Result<Vec<Pair>, ClientError> {
        let (mut cursor, end) = (start.into(), end.into());
        let mut pairs = Vec::new();
        while (pairs.len() as u32) < limit && (end.is_empty() || cursor < end) {
            let wanted = (limit - pairs.len() as u32).min(self.scan_page);
            let request = |route: &Route| RawScanRequest {
                start_key: cursor.clone(),
                end_key: lower_end(&end, &end_key(&route.region.range)),
                limit: wanted,
                ..Default::default()
            };
            let (route, answer) = self.ask_at(At::Key, &cursor, request).await?;
            // The region returned fewer than were asked for, so it has no more.
            let region_done = (answer.kvs.len() as u32) < wanted;
            let last = answer.kvs.last().map(|pair| pair.key.clone());
            let skipped = usize::from(broken!(PagesLeaveNoGap) && !pairs.is_empty());
            let found = answer.kvs.into_iter().skip(skipped);
            pairs.extend(found.map(|pair| (pair.key, pair.value)));
            cursor = match last {
                _ if region_done => match route.region.range.end() {
                    Some(end) if broken!(ScanGoesOnAtTheBound) => after(end),
                    Some(end) => end.clone(),
                    None => break,
                },
                Some(last) => after(&last),
                None => break,
            };
        }
        pairs.truncate(limit as usize);
        Ok(pairs)
    }

    /// Up to `limit` pairs in descending order, from below `start` (exclusive; empty means the last
    /// key) down to `end` (inclusive). To go on after `limit` pairs, begin at the last key, which
    /// is not returned again. Otherwise as [`scan`](Self::scan).
    pub async fn reverse_scan(
        &self,
        start: impl Into<Bytes>,
        end: impl Into<Bytes>,
        limit: u32,
    ) -> Result<Vec<Pair>, ClientError> {
        let (mut cursor, end) = (start.into(), end.into());
        let mut pairs = Vec::new();
        while (pairs.len() as u32) < limit && (cursor.is_empty() || cursor > end) {
            let wanted = (limit - pairs.len() as u32).min(self.scan_page);
            let request = |route: &Route| {
                let lowest = end.clone().max(route.region.range.start().clone());
                let skips = broken!(ReverseScanReachesTheBound);
                RawScanRequest {
                    start_key: cursor.clone(),
                    end_key: if skips { after(&lowest) } else { lowest },
                    limit: wanted,
                    reverse: true,
                    ..Default::default()
                }
            };
            let (route, answer) = self.ask_at(At::Below, &cursor, request).await?;
            let region_done = (answer.kvs.len() as u32) < wanted;
            let last = answer.kvs.last().map(|pair| pair.key.clone());
            pairs.extend(answer.kvs.into_iter().map(|pair| (pair.key, pair.value)));
            cursor = match last {
                _ if region_done => route.region.range.start().clone(),
                Some(last) => last,
                None => break,
            };
            // An empty cursor would mean the last key again.
            if cursor.is_empty() {
                break;
            }
        }
        pairs.truncate(limit as usize);
        Ok(pairs)
    }

    /// Removes every key from `start` up to `end` (exclusive; empty means the last), one region
    /// after another. Each region's part is atomic. After [`ClientError::OutcomeUnknown`] a part
    /// may be gone. It is safe to repeat as long as no other client writes into the range.
    pub async fn delete_range(
        &self,
        start: impl Into<Bytes>,
        end: impl Into<Bytes>,
    ) -> Result<(), ClientError> {
        let (mut cursor, end) = (start.into(), end.into());
        let mut begun = false;
        while end.is_empty() || cursor < end {
            let request = |route: &Route| RawDeleteRangeRequest {
                start_key: cursor.clone(),
                end_key: lower_end(&end, &end_key(&route.region.range)),
                ..Default::default()
            };
            let (route, _) = self.ask_at(At::Key, &cursor, request).await.map_err(|error| {
                match begun && !broken!(PartOfRangeIsUnknown) {
                    true => unknown(RawDeleteRangeRequest::CALL, &cursor, error),
                    false => error,
                }
            })?;
            let Some(reached) = route.region.range.end() else { break };
            begun = true;
            cursor =
                if broken!(DeleteRangeGoesOnAtTheBound) { after(reached) } else { reached.clone() };
        }
        Ok(())
    }

    /// Splits regions so that each of the keys begins one. Returns the regions that result from the
    /// splits. Keys that begin a region already add none. After [`ClientError::OutcomeUnknown`]
    /// some of the regions may have been split, and the call may be repeated.
    ///
    /// A program may do this before it writes much into a new part of the key space, so that
    /// several stores take the load.
    /// [`AdminClient::split_region`](crate::AdminClient::split_region) splits one region by its id.
    pub async fn split_region(&self, keys: Vec<Bytes>) -> Result<Vec<Region>, ClientError> {
        let mut regions = Vec::new();
        let mut left = keys;
        left.sort_unstable();
        left.dedup();
        // The first region begins at the empty key already.
        left.retain(|key| !key.is_empty());
        let Some(first) = left.first().cloned() else {
            return Ok(regions);
        };
        let call = SplitRegionRequest::CALL;
        let mut attempts = Attempts::new(call, first, self.deadline);
        let mut fence = Fence::default();
        let mut begun = false;
        while let Some(key) = left.first().cloned() {
            let asked = async {
                let route = attempts.look_up(self.route(&key)).await?;
                let inside = left.iter().take_while(|key| route.contains(key)).count();
                let split_keys: Vec<Bytes> = left[..inside]
                    .iter()
                    .filter(|key| *key != route.region.range.start())
                    .cloned()
                    .collect();
                if split_keys.is_empty() {
                    return Ok((inside, Vec::<Region>::new()));
                }
                let request =
                    SplitRegionRequest { split_keys, is_raw_kv: true, ..Default::default() };
                let timeout = attempts.timeout();
                let answer = self.attempt(&route, &key, request, timeout, &mut fence).await?;
                self.shared.cache.remove(&route);
                // A part that cannot be read is treated as one that the answer leaves out.
                let made = answer.regions.into_iter().filter_map(|made| made.try_into().ok());
                Ok::<_, Failure>((inside, made.collect()))
            };
            let ended = match asked.await {
                Ok((inside, made)) => {
                    begun |= !made.is_empty() || fence.unknown().is_some();
                    left.drain(..inside);
                    regions.extend(made);
                    let next = left.first().cloned().unwrap_or_default();
                    attempts = Attempts::new(call, next, self.deadline);
                    fence = Fence::default();
                    continue;
                }
                Err(Failure::Final(error)) => error,
                Err(Failure::Again(retry)) => match attempts.next(retry).await {
                    Ok(()) => continue,
                    Err(error) => error,
                },
            };
            return Err(match begun {
                true => unknown(call, &key, ended),
                false => fence.conclude(call, &key, ended),
            });
        }
        Ok(regions)
    }

    /// Sends items to the regions that their keys belong to, several regions at a time, until all
    /// are answered. Items that a region refuses because it has changed are divided again. A part
    /// that may have been written is sent again as it was.
    async fn by_region<T, R>(
        &self,
        mut left: Vec<T>,
        key: fn(&T) -> &Bytes,
        size: fn(&T) -> usize,
        make: fn(Vec<T>) -> R,
    ) -> Result<Vec<R::Response>, ClientError>
    where
        T: Clone + Send,
        R: RegionRequest,
    {
        let mut answers = Vec::new();
        left.sort_by(|a, b| key(a).cmp(key(b)));
        let Some(first) = left.first().map(|item| key(item).clone()) else {
            return Ok(answers);
        };
        let mut attempts = Attempts::new(R::CALL, first.clone(), self.deadline);
        // Parts whose outcome is unknown.
        let mut lost: Vec<Part<T>> = Vec::new();
        // Whether the call ends as soon as the requests that are under way are answered.
        let ending = AtomicBool::new(false);
        while !left.is_empty() || !lost.is_empty() {
            let dividing = self.divide(R::CALL, &mut left, &mut lost, key, size);
            let parts = attempts.look_up(dividing).await;
            let (mut again, mut failed) = (None, None);
            match parts {
                Err(Failure::Again(retry)) => again = Some(retry),
                Err(Failure::Final(error)) => failed = Some(error),
                Ok(parts) => {
                    let attempts = &attempts;
                    let mut asked = stream::iter(parts)
                        .take_while(|_| ready(!ending.load(Ordering::Relaxed)))
                        .map(|(route, mut part)| async move {
                            let first = key(&part.items[0]);
                            let request = make(part.items.clone());
                            let fence = &mut part.fence;
                            // As of now, because a part may have waited for others.
                            let timeout = attempts.timeout();
                            let answer = self.attempt(&route, first, request, timeout, fence).await;
                            (part, answer)
                        })
                        .buffer_unordered(MAX_CONCURRENT_REGIONS);
                    while let Some((part, answer)) = asked.next().await {
                        match answer {
                            Ok(answer) => answers.push(answer),
                            Err(Failure::Final(error)) if R::EFFECT == Effect::Read => {
                                return Err(error);
                            }
                            Err(Failure::Final(error)) => {
                                // The requests under way are waited for, because nothing may be
                                // written after an error that promises that nothing was.
                                ending.store(true, Ordering::Relaxed);
                                // One part that may have been written outweighs another that was
                                // refused.
                                if failed.is_none()
                                    || matches!(error, ClientError::OutcomeUnknown { .. })
                                {
                                    failed = Some(error);
                                }
                                lost.extend(part.fence.unknown().is_some().then_some(part));
                            }
                            Err(Failure::Again(retry)) => {
                                // The first, because those that the deadline cuts off say less.
                                again.get_or_insert(retry);
                                match part.fence.unknown() {
                                    Some(_) => lost.push(part),
                                    None => left.extend(part.items),
                                }
                            }
                        }
                    }
                }
            }
            if failed.is_none()
                && let Some(retry) = again
            {
                left.sort_by(|a, b| key(a).cmp(key(b)));
                failed = attempts.next(retry).await.err();
            }
            if let Some(error) = failed {
                let begun = !answers.is_empty() || !lost.is_empty();
                let begun = begun && !broken!(PartOfBatchIsUnknown);
                return Err(match R::EFFECT != Effect::Read && begun {
                    true => unknown(R::CALL, &first, error),
                    false => error,
                });
            }
        }
        Ok(answers)
    }

    /// Divides sorted items into parts, each of one region and of a bounded size. Fails if an item
    /// alone is too large for a store, before any other item is sent. Also finds the
    /// current regions of the parts that may have been written. On failure, and when this future is
    /// dropped, all items stay where they were.
    async fn divide<T: Clone>(
        &self,
        call: &'static str,
        left: &mut Vec<T>,
        lost: &mut Vec<Part<T>>,
        key: fn(&T) -> &Bytes,
        size: fn(&T) -> usize,
    ) -> Result<Vec<(Arc<Route>, Part<T>)>, Failure> {
        let mut routes = Vec::with_capacity(lost.len());
        for part in &*lost {
            routes.push(self.route(key(&part.items[0])).await?);
        }
        let mut parts: Vec<(Arc<Route>, Vec<T>)> = Vec::new();
        let mut bytes = 0;
        for item in &*left {
            let item_size = size(item);
            if let Some((route, part)) = parts.last_mut()
                && route.contains(key(item))
                && bytes + item_size <= MAX_BATCH_BYTES
            {
                bytes += item_size;
                part.push(item.clone());
                continue;
            }
            let route = self.route(key(item)).await?;
            check_size(call, &route, item_size)?;
            parts.push((route, vec![item.clone()]));
            bytes = item_size;
        }
        left.clear();
        let new = |(route, items)| (route, Part { items, fence: Fence::default() });
        Ok(routes.into_iter().zip(lost.drain(..)).chain(parts.into_iter().map(new)).collect())
    }
}

/// Items that go to one region together.
struct Part<T> {
    items: Vec<T>,
    fence: Fence,
}

/// The lower of two ends, where an empty one means no bound.
fn lower_end(a: &Bytes, b: &Bytes) -> Bytes {
    match (a.is_empty(), b.is_empty()) {
        (true, _) => b.clone(),
        (_, true) => a.clone(),
        _ => a.min(b).clone(),
    }
}

/// The first key after `key`.
fn after(key: &Bytes) -> Bytes {
    let mut next = Vec::with_capacity(key.len() + 1);
    next.extend_from_slice(key);
    next.push(0);
    next.into()
}
