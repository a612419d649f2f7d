//! Raw scans and checksums: ranges of keys in one region.
//!
//! A range may reach beyond the region. The answer covers the part inside, and the client goes on
//! with the next region. That is safe where the scan *begins* inside. Where it would begin
//! elsewhere, the region's keys are not the first keys of the range, so the scan is refused.

use bytes::Bytes;
use esker_engine::Cf;
use esker_model::limits::{KEYS_TOP, MAX_KEY_BYTES};
use esker_model::{KeyRange, Region};
use esker_raftstore::{Cache, RegionIter, RegionSnapshot, RequestError};
use esker_rpc::convert::{bound, end_key};
use esker_rpc::display_key;
use esker_rpc::proto::kvrpcpb::{self, *};
use esker_rpc::service::ScanHabit;

use super::{Budget, decode, family};
use crate::keys::KeyLayout;
use crate::target::Target;
use crate::{Storage, StorageError};

/// The most pairs that one scan of a region returns. A client that wants more asks again.
pub const MAX_SCAN_LIMIT: u32 = 100_000;

/// What a scan of one region returns.
#[derive(Clone, Copy, Debug)]
struct ScanShape {
    layout: KeyLayout,
    limit: u32,
    key_only: bool,
    reverse: bool,
    /// By the wall clock after the view was taken: what was dead before a write that the view
    /// shows is not alive beside it.
    now_s: u64,
}

/// The range that was asked for, in the stored form of keys; `None` for a range without a key.
fn asked(layout: KeyLayout, lower: &Bytes, upper: &Bytes) -> Option<KeyRange> {
    KeyRange::new(layout.bound(lower), bound(layout.bound(upper))).ok()
}

/// Checks that a scan upwards begins in the region.
fn begins_in(range: &KeyRange, region: &Region) -> Result<(), StorageError> {
    match region.contains(range.start()) {
        true => Ok(()),
        false => Err(elsewhere(region, range.start())),
    }
}

/// Checks that a scan downwards begins in the region.
fn ends_in(range: &KeyRange, region: &Region) -> Result<(), StorageError> {
    let ends_above = match (range.end(), region.range.end()) {
        (_, None) => false,
        (None, Some(_)) => !holds_the_last_key(region),
        (Some(upper), Some(end)) => upper > end,
    };
    if ends_above {
        // Not a region error, because the client's view of the region is right, and the client
        // would only repeat the request.
        return Err(StorageError::Refused(format!(
            "a reverse scan from above region {}, which ends at {}: such a scan begins in the \
             region that holds its upper bound; where the client cannot do that, keep to \
             ranges within one region, or scan forward",
            region.id,
            display_key(&end_key(&region.range))
        )));
    }
    match range.end() {
        Some(upper) if upper <= region.range.start() => Err(elsewhere(region, upper)),
        _ => Ok(()),
    }
}

/// Whether this region holds the last key: no key can be in a later region.
fn holds_the_last_key(region: &Region) -> bool {
    region.range.end().is_none_or(|end| **end == KEYS_TOP)
}

/// The error for a client whose view of the region is outdated.
fn elsewhere(region: &Region, key: &Bytes) -> StorageError {
    RequestError::KeyNotInRegion {
        region: region.id,
        key: key.clone(),
        range: region.range.clone(),
    }
    .into()
}

/// Scans the part of a range that lies in the region: forward from `start` up to `end` (exclusive),
/// or in reverse from `start` (exclusive) down to `end` (inclusive).
fn scan_region(
    view: &RegionSnapshot,
    cf: Cf,
    start: &Bytes,
    end: &Bytes,
    shape: ScanShape,
    budget: &mut Budget,
) -> Result<Vec<KvPair>, StorageError> {
    let (lower, upper) = if shape.reverse { (end, start) } else { (start, end) };
    let Some(range) = asked(shape.layout, lower, upper).filter(|_| shape.limit != 0) else {
        return Ok(Vec::new());
    };
    if shape.limit > MAX_SCAN_LIMIT {
        let asked = shape.limit;
        return Err(StorageError::Refused(format!(
            "a scan of {asked} pairs is more than the limit of {MAX_SCAN_LIMIT}"
        )));
    }
    let region = view.descriptor();
    if shape.reverse {
        ends_in(&range, region)?
    } else {
        begins_in(&range, region)?
    }
    let Some(mut iter) = view.iter(cf, &range, Cache::Fill) else {
        return Ok(Vec::new());
    };
    if shape.reverse {
        iter.seek_to_last();
    } else {
        iter.seek_to_first();
    }
    collect(&mut iter, shape, budget)
}

fn collect(
    iter: &mut RegionIter,
    shape: ScanShape,
    budget: &mut Budget,
) -> Result<Vec<KvPair>, StorageError> {
    let mut pairs = Vec::new();
    while pairs.len() < shape.limit as usize && iter.valid()? {
        let value = decode(Bytes::copy_from_slice(iter.value()), iter.key())?;
        // A key that was stored in another layout is not among the client's keys.
        if value.is_live(shape.now_s)
            && let Some(key) = shape.layout.of_client(iter.key())
        {
            let value = if shape.key_only { Bytes::new() } else { value.value };
            budget.spend_pair(&key, &value)?;
            pairs.push(KvPair { key, value, ..KvPair::default() });
        }
        if shape.reverse {
            iter.prev();
        } else {
            iter.next();
        }
    }
    Ok(pairs)
}

pub(crate) async fn scan(
    storage: &Storage,
    request: RawScanRequest,
    habit: ScanHabit,
) -> Result<RawScanResponse, StorageError> {
    let target = storage.target(request.context.as_ref())?;
    let cf = family(&request.cf)?;
    let layout = target.layout;
    let view = storage.view(target).await?;
    let shape = ScanShape {
        layout,
        limit: request.limit,
        key_only: request.key_only,
        reverse: request.reverse,
        now_s: storage.now_s(),
    };
    let (start, end) = (&request.start_key, &request.end_key);
    let kvs = scan_region(&view, cf, start, end, shape, &mut Budget::default())?;
    let upper = if request.reverse { start } else { end };
    check_habit(habit, view.descriptor(), !upper.is_empty(), shape, kvs.len())?;
    Ok(RawScanResponse { kvs, ..Default::default() })
}

/// Scans several ranges of one region.
pub(crate) async fn batch_scan(
    storage: &Storage,
    request: RawBatchScanRequest,
) -> Result<RawBatchScanResponse, StorageError> {
    let target = storage.target(request.context.as_ref())?;
    let cf = family(&request.cf)?;
    let layout = target.layout;
    let view = storage.view(target).await?;
    let shape = ScanShape {
        layout,
        limit: request.each_limit,
        key_only: request.key_only,
        reverse: request.reverse,
        now_s: storage.now_s(),
    };
    let mut kvs = Vec::new();
    let mut budget = Budget::default();
    for range in &request.ranges {
        let (start, end) = (&range.start_key, &range.end_key);
        kvs.extend(scan_region(&view, cf, start, end, shape, &mut budget)?);
    }
    Ok(RawBatchScanResponse { kvs, ..Default::default() })
}

/// Checks that a client with this habit comes to the right result with an answer of so many pairs.
/// Where it would not ask for the rest although it should, it gets an error instead.
fn check_habit(
    habit: ScanHabit,
    region: &Region,
    has_upper_bound: bool,
    shape: ScanShape,
    found: usize,
) -> Result<(), StorageError> {
    // A client that has as many pairs as it wants does not go on.
    if habit != ScanHabit::StopsOrWraps || found >= shape.limit as usize {
        return Ok(());
    }
    let id = region.id;
    if !has_upper_bound && !holds_the_last_key(region) {
        return Err(StorageError::Refused(format!(
            "this client ends a scan without an upper bound at the end of its first region, and \
             region {id} ends at {}: give the scan an upper bound (docs/clients.md)",
            display_key(&end_key(&region.range))
        )));
    }
    if has_upper_bound && region.range.end().is_none() {
        return Err(StorageError::Refused(format!(
            "this client goes on at the first key where region {id} has no end: give the scan an \
             upper bound of at most {} bytes (docs/clients.md)",
            MAX_KEY_BYTES
        )));
    }
    Ok(())
}

/// The checksum of the parts of ranges that lie in the region, over the keys and values that a scan
/// would return.
///
/// It is the CRC-64 (XZ) of each pair's key followed by its value, and all of these are combined by
/// exclusive or. So the result does not depend on the order of the pairs, and checksums of regions
/// can be combined.
pub(crate) async fn checksum(
    storage: &Storage,
    request: RawChecksumRequest,
) -> Result<RawChecksumResponse, StorageError> {
    let RawChecksumRequest { context, algorithm, ranges } = request;
    let target = storage.target(context.as_ref())?;
    if algorithm != i32::from(ChecksumAlgorithm::Crc64Xor) {
        return Err(StorageError::Refused(format!(
            "unknown checksum algorithm {algorithm}; there is Crc64_Xor, which is 0"
        )));
    }
    let room = storage.checksums.clone().acquire_owned().await;
    let view = storage.view(target).await?;
    let now_s = storage.now_s();
    let sum = move || {
        let _room = room;
        sum(&view, &ranges, target, now_s)
    };
    storage.blocking(target.region, sum).await
}

fn sum(
    view: &RegionSnapshot,
    ranges: &[kvrpcpb::KeyRange],
    target: Target,
    now_s: u64,
) -> Result<RawChecksumResponse, StorageError> {
    let mut sum = RawChecksumResponse::default();
    for range in ranges {
        let asked = asked(target.layout, &range.start_key, &range.end_key);
        let Some(range) = asked else { continue };
        begins_in(&range, view.descriptor())?;
        let Some(mut iter) = view.iter(Cf::Default, &range, Cache::Bypass) else { continue };
        iter.seek_to_first();
        while iter.valid()? {
            let value = decode(Bytes::copy_from_slice(iter.value()), iter.key())?;
            if value.is_live(now_s)
                && let Some(key) = target.layout.of_client(iter.key())
            {
                let mut digest = crc64fast::Digest::new();
                digest.write(&key);
                digest.write(&value.value);
                sum.checksum ^= digest.sum64();
                sum.total_kvs += 1;
                sum.total_bytes += (key.len() + value.value.len()) as u64;
            }
            iter.next();
        }
    }
    Ok(sum)
}
