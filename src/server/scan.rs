//! Raw scans and checksums: ranges of keys in one region.
//!
//! A range may reach beyond the region: it is answered for the part inside, and the client goes
//! on with the next region. That is safe where the scan *begins* inside. Where it would begin
//! elsewhere, the region has other keys than the first ones asked for, and answers none.

use bytes::Bytes;
use esker_engine::{Cf, KvIter};
use esker_model::limits::{KEYS_TOP, MAX_KEY_BYTES};
use esker_model::{KeyRange, Region};
use esker_raftstore::state::bounds;
use esker_raftstore::{RegionSnapshot, RequestError};
use esker_rpc::convert::{bound, end_key};
use esker_rpc::display_key;
use esker_rpc::proto::kvrpcpb::{self, ChecksumAlgorithm, KvPair};
use esker_rpc::service::ScanHabit;

use super::keys::KeyLayout;
use super::raw::{Budget, RawError, decode, now_seconds};

/// The most pairs that one scan of a region returns; a client that wants more asks again.
pub const MAX_SCAN_LIMIT: u32 = 100_000;

/// What a scan of one region returns.
#[derive(Clone, Copy, Debug)]
pub struct ScanShape {
    pub layout: KeyLayout,
    pub limit: u32,
    pub key_only: bool,
    pub reverse: bool,
}

/// A range that was asked for, as keys are stored; `None` for one without a key.
fn asked(layout: KeyLayout, lower: &Bytes, upper: &Bytes) -> Option<KeyRange> {
    KeyRange::new(layout.bound(lower), bound(layout.bound(upper))).ok()
}

/// An iterator over the part of a range that lies in the region; `None` where none does.
fn iter_within(range: &KeyRange, view: &RegionSnapshot, cf: Cf) -> Option<KvIter> {
    let part = range.intersection(&view.descriptor.range)?;
    let (start, end) = bounds(&part);
    Some(view.kv.iter(cf, start, end))
}

/// Whether a scan upwards begins in the region.
fn begins_in(range: &KeyRange, region: &Region) -> Result<(), RawError> {
    match region.contains(range.start()) {
        true => Ok(()),
        false => Err(elsewhere(region, range.start())),
    }
}

/// Whether a scan downwards begins in the region.
fn ends_in(range: &KeyRange, region: &Region) -> Result<(), RawError> {
    let ends_above = match (range.end(), region.range.end()) {
        (_, None) => false,
        (None, Some(_)) => !holds_the_last_key(region),
        (Some(upper), Some(end)) => upper > end,
    };
    if ends_above {
        // Not a region error: the client knows the region as it is, and would only repeat.
        return Err(RawError::Refused(format!(
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

/// Whether no key can be in any later region.
fn holds_the_last_key(region: &Region) -> bool {
    region.range.end().is_none_or(|end| **end == KEYS_TOP)
}

/// The client's idea of the region is older than this region.
fn elsewhere(region: &Region, key: &Bytes) -> RawError {
    RequestError::KeyNotInRegion {
        region: region.id,
        key: key.clone(),
        range: region.range.clone(),
    }
    .into()
}

/// Scans the part of a range that lies in the region. Forward from `start` up to
/// `end`; in reverse from `start`, exclusive, down to `end`, inclusive.
pub fn scan(
    view: &RegionSnapshot,
    cf: Cf,
    start: &Bytes,
    end: &Bytes,
    shape: ScanShape,
    budget: &mut Budget,
) -> Result<Vec<KvPair>, RawError> {
    let (lower, upper) = if shape.reverse { (end, start) } else { (start, end) };
    let Some(range) = asked(shape.layout, lower, upper).filter(|_| shape.limit != 0) else {
        return Ok(Vec::new());
    };
    if shape.limit > MAX_SCAN_LIMIT {
        let asked = shape.limit;
        return Err(RawError::Refused(format!(
            "a scan of {asked} pairs is more than the limit of {MAX_SCAN_LIMIT}"
        )));
    }
    let region = &view.descriptor;
    if shape.reverse {
        ends_in(&range, region)?
    } else {
        begins_in(&range, region)?
    }
    let Some(mut iter) = iter_within(&range, view, cf) else {
        return Ok(Vec::new());
    };
    if shape.reverse {
        iter.seek_to_last();
    } else {
        iter.seek_to_first();
    }
    let before = budget.spent();
    let pairs = collect(&mut iter, shape, budget)?;
    view.count_read(pairs.len() as u64, budget.spent() - before);
    Ok(pairs)
}

fn collect(
    iter: &mut KvIter,
    shape: ScanShape,
    budget: &mut Budget,
) -> Result<Vec<KvPair>, RawError> {
    let now = now_seconds();
    let mut pairs = Vec::new();
    while pairs.len() < shape.limit as usize && iter.valid()? {
        let value = decode(Bytes::copy_from_slice(iter.value()), iter.key())?;
        // What was stored under a key of another layout is not among the client's keys.
        if value.is_live(now)
            && let Some(key) = shape.layout.of_client(iter.key())
        {
            let value = if shape.key_only { Bytes::new() } else { value.value };
            budget.spend(key.len() + value.len())?;
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

/// Scans several ranges of one region.
pub fn batch_scan(
    view: &RegionSnapshot,
    cf: Cf,
    ranges: &[kvrpcpb::KeyRange],
    shape: ScanShape,
) -> Result<Vec<KvPair>, RawError> {
    let mut pairs = Vec::new();
    let mut budget = Budget::default();
    for range in ranges {
        pairs.extend(scan(view, cf, &range.start_key, &range.end_key, shape, &mut budget)?);
    }
    Ok(pairs)
}

/// Whether a client with this habit does right by an answer of so many pairs. It never asks for
/// the rest where it should, so it gets an error instead.
pub fn check_habit(
    habit: ScanHabit,
    region: &Region,
    has_upper_bound: bool,
    shape: ScanShape,
    found: usize,
) -> Result<(), RawError> {
    // A client that has as many pairs as it wants goes nowhere.
    if habit != ScanHabit::StopsOrWraps || found >= shape.limit as usize {
        return Ok(());
    }
    let id = region.id;
    if !has_upper_bound && !holds_the_last_key(region) {
        return Err(RawError::Refused(format!(
            "this client ends a scan without an upper bound at the end of its first region, and \
             region {id} ends at {}: give the scan an upper bound (docs/clients.md)",
            display_key(&end_key(&region.range))
        )));
    }
    if has_upper_bound && region.range.end().is_none() {
        return Err(RawError::Refused(format!(
            "this client goes on at the first key where region {id} has no end: give the scan an \
             upper bound of at most {} bytes (docs/clients.md)",
            MAX_KEY_BYTES
        )));
    }
    Ok(())
}

/// What stands for all pairs of some ranges.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Checksum {
    /// The CRC-64 (XZ) of each pair's key and value, one after the other, all combined by
    /// exclusive or: in any order, and across regions, it comes to the same.
    pub crc64_xor: u64,
    pub pairs: u64,
    /// Of keys and values.
    pub bytes: u64,
}

/// The checksum of the parts of ranges that lie in the region, over the keys and values that a
/// scan would return.
pub fn checksum(
    view: &RegionSnapshot,
    cf: Cf,
    algorithm: i32,
    ranges: &[kvrpcpb::KeyRange],
    layout: KeyLayout,
) -> Result<Checksum, RawError> {
    if algorithm != i32::from(ChecksumAlgorithm::Crc64Xor) {
        return Err(RawError::Refused(format!(
            "unknown checksum algorithm {algorithm}; there is Crc64_Xor, which is 0"
        )));
    }
    let now = now_seconds();
    let mut sum = Checksum::default();
    for range in ranges {
        let Some(range) = asked(layout, &range.start_key, &range.end_key) else { continue };
        begins_in(&range, &view.descriptor)?;
        let Some(part) = range.intersection(&view.descriptor.range) else { continue };
        let (start, end) = bounds(&part);
        let mut iter = view.kv.iter_uncached(cf, start, end);
        iter.seek_to_first();
        while iter.valid()? {
            let value = decode(Bytes::copy_from_slice(iter.value()), iter.key())?;
            if value.is_live(now)
                && let Some(key) = layout.of_client(iter.key())
            {
                let mut digest = crc64fast::Digest::new();
                digest.write(&key);
                digest.write(&value.value);
                sum.crc64_xor ^= digest.sum64();
                sum.pairs += 1;
                sum.bytes += (key.len() + value.value.len()) as u64;
            }
            iter.next();
        }
    }
    view.count_read(sum.pairs, sum.bytes);
    Ok(sum)
}
