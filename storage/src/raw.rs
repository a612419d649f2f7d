//! Requests on raw keys: a user's keys and values against one region.

pub mod scan;

use bytes::Bytes;
use esker_engine::Cf;
use esker_model::KeyRange;
use esker_mutants::broken;
use esker_raftstore::raw_value::RawValue;
use esker_raftstore::{CompareAndSwap, Mutation, RegionSnapshot, RequestError, Swap, WriteResult};
use esker_rpc::convert::bound;
use esker_rpc::display_key;
use esker_rpc::proto::kvrpcpb::*;

use crate::target::Target;
use crate::{Storage, StorageError};

/// The most bytes of keys and values that one answer holds: the limit of a message, less room for
/// everything around them.
pub const MAX_ANSWER_BYTES: u64 = 48 << 20;

/// An answer of many small pairs is mostly this.
const _: () = assert!(size_of::<KvPair>() <= 96);

/// What is left of [`MAX_ANSWER_BYTES`] for one request.
struct Budget(u64);

impl Default for Budget {
    fn default() -> Self {
        Budget(MAX_ANSWER_BYTES)
    }
}

impl Budget {
    /// What a pair takes in memory: a key of one byte without a value is no small thing.
    fn spend_pair(&mut self, key: &Bytes, value: &Bytes) -> Result<(), StorageError> {
        self.spend(size_of::<KvPair>() + key.len() + value.len())
    }

    /// Refuses a request for too much as a whole. A client would take fewer pairs than it asked for
    /// to mean that there are no more.
    fn spend(&mut self, bytes: usize) -> Result<(), StorageError> {
        self.0 = self.0.checked_sub(bytes as u64).ok_or_else(|| {
            StorageError::Refused(format!(
                "the answer is larger than {} MiB; ask for fewer keys at once",
                MAX_ANSWER_BYTES >> 20
            ))
        })?;
        Ok(())
    }
}

/// The column family that a request names. An empty name stands for the default family.
fn family(name: &str) -> Result<Cf, StorageError> {
    match name {
        "" | "default" => Ok(Cf::Default),
        "lock" => Ok(Cf::Lock),
        "write" => Ok(Cf::Write),
        other => Err(StorageError::Refused(format!(
            "unknown column family {other:?}; there are default, lock and write"
        ))),
    }
}

fn decode(stored: Bytes, key: &[u8]) -> Result<RawValue, StorageError> {
    RawValue::decode(stored).map_err(|error| {
        StorageError::Damaged(format!("value of key {}: {error}", display_key(key)))
    })
}

fn live_value(
    view: &RegionSnapshot,
    cf: Cf,
    key: &Bytes,
    now_s: u64,
) -> Result<Option<RawValue>, StorageError> {
    let region = view.descriptor();
    if !region.contains(key) {
        return Err(RequestError::KeyNotInRegion {
            region: region.id,
            key: key.clone(),
            range: region.range.clone(),
        }
        .into());
    }
    let Some(stored) = view.get(cf, key)? else { return Ok(None) };
    let value = decode(stored.into(), key)?;
    Ok(Some(value).filter(|value| value.is_live(now_s) || broken!(ExpiredValueIsGone)))
}

/// A key's value, and the time at which it was found to be alive, in seconds: a second look at the
/// clock might find it expired.
async fn found(
    storage: &Storage,
    context: Option<&Context>,
    cf: &str,
    key: &Bytes,
) -> Result<Option<(RawValue, u64)>, StorageError> {
    let target = storage.target(context)?;
    let cf = family(cf)?;
    let stored = target.layout.stored(key)?;
    let view = storage.view(target).await?;
    let now_s = storage.now_s();
    Ok(live_value(&view, cf, &stored, now_s)?.map(|value| (value, now_s)))
}

async fn write(
    storage: &Storage,
    target: Target,
    mutations: Vec<Mutation>,
) -> Result<WriteResult, StorageError> {
    Ok(storage.store.write(target.region, target.context, mutations).await?)
}

/// As [`write`], but returns the index at which the log decided the write, for a client that sent a
/// tag; otherwise 0.
async fn decided(
    storage: &Storage,
    target: Target,
    mutations: Vec<Mutation>,
) -> Result<u64, StorageError> {
    let result = write(storage, target, mutations).await?;
    Ok(target.context.tag.map_or(0, |_| result.index.0))
}

/// When a value that is written now expires. A time to live of zero seconds means never.
fn expires_at(now_s: u64, ttl: u64) -> Option<u64> {
    (ttl != 0 && !broken!(TimeToLiveIsStored)).then(|| now_s.saturating_add(ttl))
}

pub(crate) async fn get(
    storage: &Storage,
    request: RawGetRequest,
) -> Result<RawGetResponse, StorageError> {
    let RawGetRequest { context, key, cf } = request;
    Ok(match found(storage, context.as_ref(), &cf, &key).await? {
        Some((found, _)) => RawGetResponse { value: found.value, ..Default::default() },
        None => RawGetResponse { not_found: true, ..Default::default() },
    })
}

pub(crate) async fn key_ttl(
    storage: &Storage,
    request: RawGetKeyTtlRequest,
) -> Result<RawGetKeyTtlResponse, StorageError> {
    let RawGetKeyTtlRequest { context, key, cf } = request;
    Ok(match found(storage, context.as_ref(), &cf, &key).await? {
        Some((found, now_s)) => {
            RawGetKeyTtlResponse { ttl: found.ttl(now_s), ..Default::default() }
        }
        None => RawGetKeyTtlResponse { not_found: true, ..Default::default() },
    })
}

/// The pairs that were found, in the order in which they were asked for.
pub(crate) async fn batch_get(
    storage: &Storage,
    request: RawBatchGetRequest,
) -> Result<RawBatchGetResponse, StorageError> {
    let target = storage.target(request.context.as_ref())?;
    let cf = family(&request.cf)?;
    let keys = request
        .keys
        .into_iter()
        .map(|key| Ok((target.layout.stored(&key)?, key)))
        .collect::<Result<Vec<_>, RequestError>>()?;
    let view = storage.view(target).await?;
    let now_s = storage.now_s();
    let mut pairs = Vec::new();
    let mut budget = Budget::default();
    for (stored, key) in keys {
        if let Some(found) = live_value(&view, cf, &stored, now_s)? {
            budget.spend_pair(&key, &found.value)?;
            pairs.push(KvPair { key, value: found.value, ..KvPair::default() });
        }
    }
    Ok(RawBatchGetResponse { pairs, ..Default::default() })
}

async fn put_pairs(
    storage: &Storage,
    context: Option<&Context>,
    cf: &str,
    pairs: impl IntoIterator<Item = (Bytes, Bytes, u64)>,
) -> Result<u64, StorageError> {
    let target = storage.target(context)?;
    let (cf, now_s) = (family(cf)?, storage.now_s());
    let mutations = pairs
        .into_iter()
        .map(|(key, value, ttl)| {
            let key = target.layout.stored(&key)?;
            let value = RawValue::new(value, expires_at(now_s, ttl)).encode();
            Ok(Mutation::Put { cf, key, value })
        })
        .collect::<Result<_, RequestError>>()?;
    decided(storage, target, mutations).await
}

pub(crate) async fn put(
    storage: &Storage,
    request: RawPutRequest,
) -> Result<RawPutResponse, StorageError> {
    let RawPutRequest { context, key, value, cf, ttl, .. } = request;
    let applied_index = put_pairs(storage, context.as_ref(), &cf, [(key, value, ttl)]).await?;
    Ok(RawPutResponse { applied_index, ..Default::default() })
}

pub(crate) async fn batch_put(
    storage: &Storage,
    request: RawBatchPutRequest,
) -> Result<RawBatchPutResponse, StorageError> {
    let RawBatchPutRequest { context, pairs, cf, ttl, ttls, .. } = request;
    // One time to live for all pairs, or one for each pair.
    if ttls.len() > 1 && ttls.len() != pairs.len() {
        let (pairs, ttls) = (pairs.len(), ttls.len());
        return Err(StorageError::Refused(format!("{pairs} pairs but {ttls} ttls")));
    }
    let ttl_of = |at: usize| match &ttls[..] {
        [] => ttl,
        [all] => *all,
        each => each[at],
    };
    let pairs = pairs.into_iter().enumerate();
    let pairs = pairs.map(|(at, pair)| (pair.key, pair.value, ttl_of(at)));
    let applied_index = put_pairs(storage, context.as_ref(), &cf, pairs).await?;
    Ok(RawBatchPutResponse { applied_index, ..Default::default() })
}

async fn delete_keys(
    storage: &Storage,
    context: Option<&Context>,
    cf: &str,
    keys: &[Bytes],
) -> Result<u64, StorageError> {
    let target = storage.target(context)?;
    let cf = family(cf)?;
    let mutations = keys
        .iter()
        .map(|key| Ok(Mutation::Delete { cf, key: target.layout.stored(key)? }))
        .collect::<Result<_, RequestError>>()?;
    decided(storage, target, mutations).await
}

pub(crate) async fn delete(
    storage: &Storage,
    request: RawDeleteRequest,
) -> Result<RawDeleteResponse, StorageError> {
    let RawDeleteRequest { context, key, cf, .. } = request;
    let applied_index = delete_keys(storage, context.as_ref(), &cf, &[key]).await?;
    Ok(RawDeleteResponse { applied_index, ..Default::default() })
}

pub(crate) async fn batch_delete(
    storage: &Storage,
    request: RawBatchDeleteRequest,
) -> Result<RawBatchDeleteResponse, StorageError> {
    let RawBatchDeleteRequest { context, keys, cf, .. } = request;
    let applied_index = delete_keys(storage, context.as_ref(), &cf, &keys).await?;
    Ok(RawBatchDeleteResponse { applied_index, ..Default::default() })
}

pub(crate) async fn delete_range(
    storage: &Storage,
    request: RawDeleteRangeRequest,
) -> Result<RawDeleteRangeResponse, StorageError> {
    let RawDeleteRangeRequest { context, cf, start_key: start, end_key: end } = request;
    let target = storage.target(context.as_ref())?;
    let cf = family(&cf)?;
    if !end.is_empty() && start == end {
        return Ok(RawDeleteRangeResponse::default());
    }
    let (start, end) = (target.layout.bound(&start), bound(target.layout.bound(&end)));
    let range = KeyRange::new(start, end)
        .map_err(|_| StorageError::Refused("the start of the range is after its end".into()))?;
    let applied_index = decided(storage, target, vec![Mutation::DeleteRange { cf, range }]).await?;
    Ok(RawDeleteRangeResponse { applied_index, ..Default::default() })
}

/// Writes the value, or removes the key, if the key's current value is the expected one, or if no
/// value was expected and there is none.
pub(crate) async fn compare_and_swap(
    storage: &Storage,
    request: RawCasRequest,
) -> Result<RawCasResponse, StorageError> {
    let target = storage.target(request.context.as_ref())?;
    let now_s = storage.now_s();
    let swap = CompareAndSwap {
        cf: family(&request.cf)?,
        key: target.layout.stored(&request.key)?,
        expected: (!request.previous_not_exist).then_some(request.previous_value),
        then: match request.delete {
            true => Swap::Delete,
            false => Swap::Put { value: request.value, expires_at: expires_at(now_s, request.ttl) },
        },
        now_s,
    };
    let result = write(storage, target, vec![Mutation::CompareAndSwap(swap)]).await?;
    let swap = result.swap.expect("a compare-and-swap answers with its result");
    let previous = swap.previous.map(|previous| previous.value);
    Ok(RawCasResponse {
        succeed: swap.swapped,
        previous_not_exist: previous.is_none(),
        previous_value: previous.unwrap_or_default(),
        ..Default::default()
    })
}
