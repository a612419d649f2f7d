//! Raw scans and checksums: ranges of keys in one region.
//!
//! A range may reach beyond the region: it is answered for the part inside, and the client goes
//! on with the next region. That is safe where the scan *begins* inside. Where it would begin
//! elsewhere, the region has other keys than the first ones asked for, and answers none.

use bytes::Bytes;
use esker_engine::{Cf, KvIter};
use esker_raftstore::config::KEYS_TOP;
use esker_raftstore::{RegionExt, RegionSnapshot, RequestError};
use esker_rpc::display_key;
use esker_rpc::proto::kvrpcpb::{ChecksumAlgorithm, KeyRange, KvPair};
use esker_rpc::proto::metapb::Region;
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

/// A range as keys are stored; an empty upper bound is none.
struct Range {
    lower: Bytes,
    upper: Bytes,
}

impl Range {
    fn new(layout: KeyLayout, lower: &Bytes, upper: &Bytes) -> Self {
        Range { lower: layout.bound(lower), upper: layout.bound(upper) }
    }

    fn is_empty(&self) -> bool {
        !self.upper.is_empty() && self.lower >= self.upper
    }

    /// The part of the range that lies in the region.
    fn within(&self, region: &Region) -> Range {
        let upper = match (self.upper.is_empty(), region.end_key.is_empty()) {
            (true, _) => &region.end_key,
            (false, true) => &self.upper,
            (false, false) => (&self.upper).min(&region.end_key),
        };
        Range { lower: (&self.lower).max(&region.start_key).clone(), upper: upper.clone() }
    }

    fn iter(&self, view: &RegionSnapshot, cf: Cf) -> KvIter {
        view.kv.iter(cf, &self.lower, (!self.upper.is_empty()).then_some(&self.upper[..]))
    }

    /// Whether a scan upwards begins in the region.
    fn begins_in(&self, region: &Region) -> Result<(), RawError> {
        match region.contains_key(&self.lower) {
            true => Ok(()),
            false => Err(elsewhere(region, &self.lower)),
        }
    }

    /// Whether a scan downwards does.
    fn ends_in(&self, region: &Region) -> Result<(), RawError> {
        let ends_above = match (self.upper.is_empty(), region.end_key.is_empty()) {
            (_, true) => false,
            (true, false) => !holds_the_last_key(region),
            (false, false) => self.upper > region.end_key,
        };
        if ends_above {
            // Not a region error: the client knows the region as it is, and would only repeat.
            return Err(RawError::Refused(format!(
                "a reverse scan from above region {}, which ends at {}: such a scan begins in the \
                 region that holds its upper bound; where the client cannot do that, keep to \
                 ranges within one region, or scan forward",
                region.region_id(),
                display_key(&region.end_key)
            )));
        }
        match !self.upper.is_empty() && self.upper <= region.start_key {
            true => Err(elsewhere(region, &self.upper)),
            false => Ok(()),
        }
    }
}

/// Whether no key can be in any later region.
fn holds_the_last_key(region: &Region) -> bool {
    region.end_key.is_empty() || *region.end_key == KEYS_TOP
}

/// The client's idea of the region is older than this region.
fn elsewhere(region: &Region, key: &Bytes) -> RawError {
    RequestError::KeyNotInRegion {
        region: region.region_id(),
        key: key.clone(),
        start: region.start_key.clone(),
        end: region.end_key.clone(),
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
    let range = Range::new(shape.layout, lower, upper);
    if range.is_empty() || shape.limit == 0 {
        return Ok(Vec::new());
    }
    if shape.limit > MAX_SCAN_LIMIT {
        let asked = shape.limit;
        return Err(RawError::Refused(format!(
            "a scan of {asked} pairs is more than the limit of {MAX_SCAN_LIMIT}"
        )));
    }
    let region = &view.descriptor;
    if shape.reverse {
        range.ends_in(region)?
    } else {
        range.begins_in(region)?
    }
    let mut iter = range.within(region).iter(view, cf);
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
    ranges: &[KeyRange],
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
    let id = region.region_id();
    if !has_upper_bound && !holds_the_last_key(region) {
        return Err(RawError::Refused(format!(
            "this client ends a scan without an upper bound at the end of its first region, and \
             region {id} ends at {}: give the scan an upper bound (docs/clients.md)",
            display_key(&region.end_key)
        )));
    }
    if has_upper_bound && region.end_key.is_empty() {
        return Err(RawError::Refused(format!(
            "this client goes on at the first key where region {id} has no end: give the scan an \
             upper bound of at most {} bytes (docs/clients.md)",
            esker_raftstore::config::MAX_KEY_BYTES
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
    ranges: &[KeyRange],
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
        let range = Range::new(layout, &range.start_key, &range.end_key);
        if range.is_empty() {
            continue;
        }
        range.begins_in(&view.descriptor)?;
        let Range { lower, upper } = range.within(&view.descriptor);
        let upper = (!upper.is_empty()).then_some(&upper[..]);
        let mut iter = view.kv.iter_uncached(cf, &lower, upper);
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
