//! The map from keys to regions, made of what leaders report.
//!
//! Reports arrive late, twice and out of order, from leaders that were deposed and from before
//! splits. Epochs put them in order. A report is refused if its epoch is older than the known one
//! of its region, or if its range is held by a region with a newer version. An accepted report
//! displaces every region that its range overlaps. Displaced ranges, and ranges that were never
//! reported, are gaps: their region is not known until its leader reports.
//!
//! A report takes no more than its region can have come by: see [`may_follow`]. And a report that
//! is not repeated does not count against others for long. A leader reports its region every few
//! seconds, so a region that was not reported for [`CLAIM_MS`] gives way to any report. So a single
//! false report does no lasting harm.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Bound;
use std::sync::Arc;

use bytes::Bytes;
use esker_model::{Epoch, KeyRange, RegionId, RegionReport, StoreId, Time, may_follow};
use esker_mutants::broken;
use thiserror::Error;

/// How long a report holds its range against others without being repeated: three times the
/// interval at which leaders repeat their reports.
pub const CLAIM_MS: u64 = 30_000;
/// A report that is older than what the map knows.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error(
    "region {region} reports epoch {reported}, but region {known_region} is known with {known}"
)]
pub struct StaleReport {
    pub region: RegionId,
    pub reported: Epoch,
    pub known_region: RegionId,
    pub known: Epoch,
}

/// Why a report was not accepted.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum RefusedReport {
    /// This is common. The sender finds out by itself.
    #[error(transparent)]
    Stale(#[from] StaleReport),
    /// No known region can have become what it reports.
    #[error(
        "region {region} reports a range or an epoch ({reported}) that cannot have come out of \
         region {known_region}, which is known with {known}"
    )]
    Impossible { region: RegionId, reported: Epoch, known_region: RegionId, known: Epoch },
}

/// A part of a requested range that no known region covers.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("no region is known for the keys from {}", esker_rpc::display_key(from))]
pub struct Gap {
    pub from: Bytes,
}

/// The replicas and leaders on one store, counted over the whole map.
#[derive(Clone, Debug, Default)]
pub struct StoreLoad {
    pub leaders: BTreeSet<RegionId>,
    pub replicas: BTreeSet<RegionId>,
    /// Bytes of all replicas, as their leaders estimate them.
    pub size: u64,
}

/// All known regions, by id and by start key. They never overlap.
#[derive(Debug, Default)]
pub struct RegionMap {
    by_id: HashMap<RegionId, Arc<RegionReport>>,
    by_start: BTreeMap<Bytes, RegionId>,
    loads: BTreeMap<StoreId, StoreLoad>,
    /// When each region was last reported.
    heard: HashMap<RegionId, Time>,
    now: Time,
}

impl RegionMap {
    /// Sets the time of the reports that come next.
    pub fn advance(&mut self, now: Time) {
        self.now = self.now.max(now);
    }

    /// Whether a region was reported so recently that its report counts against others.
    fn holds(&self, id: RegionId) -> bool {
        let is_recent = |heard: &Time| self.now.millis_since(*heard) < CLAIM_MS;
        self.heard.get(&id).is_some_and(is_recent) && !broken!(NewerEpochWins)
    }

    /// Takes in what a leader reports, and returns the regions that it displaced.
    pub fn report(&mut self, report: RegionReport) -> Result<Vec<RegionId>, RefusedReport> {
        let region = &report.region;
        if let Some(known) = self.by_id.get(&region.id).filter(|_| self.holds(region.id)) {
            let (old, new) = (known.region.epoch, region.epoch);
            let is_older = new.version < old.version || new.conf_ver < old.conf_ver;
            // Within one epoch only the term distinguishes a deposed leader from its successor.
            let is_deposed =
                new == old && report.term.zip(known.term).is_some_and(|(new, old)| new < old);
            if is_older || is_deposed {
                return Err(self.stale(&report, region.id).into());
            }
            if !may_follow(&known.region, region) {
                return Err(self.impossible(&report, region.id));
            }
        }
        let overlapping = self.overlapping(&region.range);
        for id in overlapping.iter().filter(|id| **id != region.id && self.holds(**id)) {
            let known = &self.by_id[id].region;
            if known.epoch.version > region.epoch.version {
                return Err(self.stale(&report, *id).into());
            }
            if !may_follow(known, region) {
                return Err(self.impossible(&report, *id));
            }
        }
        // Removed also if its range moved, because an id is in the map at most once.
        self.remove(region.id);
        let displaced: Vec<_> =
            overlapping.into_iter().filter(|id| *id != report.region.id).collect();
        for id in &displaced {
            self.remove(*id);
        }
        self.insert(report);
        Ok(displaced)
    }

    fn stale(&self, report: &RegionReport, known: RegionId) -> StaleReport {
        StaleReport {
            region: report.region.id,
            reported: report.region.epoch,
            known_region: known,
            known: self.by_id[&known].region.epoch,
        }
    }

    fn impossible(&self, report: &RegionReport, known: RegionId) -> RefusedReport {
        RefusedReport::Impossible {
            region: report.region.id,
            reported: report.region.epoch,
            known_region: known,
            known: self.by_id[&known].region.epoch,
        }
    }

    fn insert(&mut self, report: RegionReport) {
        let id = report.region.id;
        self.heard.insert(id, self.now);
        for peer in &report.region.peers {
            let load = self.loads.entry(peer.store).or_default();
            load.replicas.insert(id);
            load.size = load.size.saturating_add(report.approximate_size);
        }
        self.loads.entry(report.leader.store).or_default().leaders.insert(id);
        self.by_start.insert(report.region.range.start().clone(), id);
        self.by_id.insert(id, Arc::new(report));
    }

    fn remove(&mut self, id: RegionId) {
        let Some(known) = self.by_id.remove(&id) else {
            return;
        };
        self.heard.remove(&id);
        self.by_start.remove(known.region.range.start());
        for peer in &known.region.peers {
            if let Some(load) = self.loads.get_mut(&peer.store) {
                load.replicas.remove(&id);
                load.size = load.size.saturating_sub(known.approximate_size);
            }
        }
        if let Some(load) = self.loads.get_mut(&known.leader.store) {
            load.leaders.remove(&id);
        }
    }

    /// Ids of the regions that share a key with `range`, in key order.
    fn overlapping(&self, range: &KeyRange) -> Vec<RegionId> {
        self.starting_at(range.start())
            .take_while(|report| range.is_above(report.region.range.start()))
            .map(|report| report.region.id)
            .collect()
    }

    /// Regions in key order, from the region that holds `key` or, in a gap, from the next one.
    fn starting_at<'a>(&'a self, key: &'a [u8]) -> impl Iterator<Item = &'a Arc<RegionReport>> {
        let holder = self.by_key(key);
        let after = holder.map_or(Bound::Included(key), |holder| {
            Bound::Excluded(holder.region.range.start().as_ref())
        });
        holder.into_iter().chain(
            self.by_start
                .range::<[u8], _>((after, Bound::Unbounded))
                .map(|(_, id)| &self.by_id[id]),
        )
    }

    /// The region with this id.
    pub fn get(&self, id: RegionId) -> Option<&Arc<RegionReport>> {
        self.by_id.get(&id)
    }

    /// The region that holds `key`.
    pub fn by_key(&self, key: &[u8]) -> Option<&Arc<RegionReport>> {
        let (_, id) =
            self.by_start.range::<[u8], _>((Bound::Unbounded, Bound::Included(key))).next_back()?;
        let report = &self.by_id[id];
        report.region.contains(key).then_some(report)
    }

    /// The region that ends where the region that holds `key` starts; `None` when either is
    /// unknown. Clients ask with a region's start key and rely on getting its direct neighbour.
    pub fn previous(&self, key: &[u8]) -> Option<&Arc<RegionReport>> {
        let holder = self.by_key(key)?;
        let (_, id) = self
            .by_start
            .range::<[u8], _>((
                Bound::Unbounded,
                Bound::Excluded(holder.region.range.start().as_ref()),
            ))
            .next_back()?;
        let previous = &self.by_id[id];
        (previous.region.range.end() == Some(holder.region.range.start())).then_some(previous)
    }

    /// Up to `limit` regions that share a key with `range`, in key order. Gaps are stepped over.
    pub fn scan(&self, range: &KeyRange, limit: usize) -> Vec<Arc<RegionReport>> {
        self.starting_at(range.start())
            .take_while(|report| range.is_above(report.region.range.start()))
            .take(limit)
            .cloned()
            .collect()
    }

    /// Up to `limit` regions that share a key with any of `ranges`, which the caller gives in key
    /// order. A region that shares keys with two ranges is returned once. With `need_all`, a gap
    /// before the limit is an error.
    pub fn scan_ranges(
        &self,
        ranges: &[KeyRange],
        limit: usize,
        need_all: bool,
    ) -> Result<Vec<Arc<RegionReport>>, Gap> {
        let mut found: Vec<Arc<RegionReport>> = Vec::new();
        for range in ranges {
            if found.len() >= limit {
                break;
            }
            let room = limit - found.len();
            // One more than there is room for, because the region found last may come first again.
            let mut part = self.scan(range, room.saturating_add(1));
            let last = found.last().map(|report| report.region.id);
            let again =
                usize::from(part.first().is_some_and(|first| Some(first.region.id) == last));
            if need_all {
                covers(range, &part, room.saturating_add(again))?;
            }
            found.extend(part.drain(..).skip(again).take(room));
        }
        Ok(found)
    }

    /// The replicas and leaders on `store`.
    pub fn load(&self, store: StoreId) -> Option<&StoreLoad> {
        self.loads.get(&store)
    }

    /// How many regions `store` leads.
    pub fn leader_count(&self, store: StoreId) -> usize {
        self.loads.get(&store).map_or(0, |load| load.leaders.len())
    }

    /// How many replicas `store` holds.
    pub fn replica_count(&self, store: StoreId) -> usize {
        self.loads.get(&store).map_or(0, |load| load.replicas.len())
    }

    /// Every region in key order.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<RegionReport>> {
        self.by_start.values().map(|id| &self.by_id[id])
    }

    /// How many regions are known.
    pub fn len(&self) -> usize {
        self.by_id.len()
    }

    /// Whether no leader has reported yet.
    pub fn is_empty(&self) -> bool {
        self.by_id.is_empty()
    }
}

/// Whether `found`, which was cut at `limit`, covers `range` up to the cut.
fn covers(range: &KeyRange, found: &[Arc<RegionReport>], limit: usize) -> Result<(), Gap> {
    let mut reached = range.start();
    for (index, report) in found.iter().enumerate() {
        if report.region.range.start() > reached {
            return Err(Gap { from: reached.clone() });
        }
        match report.region.range.end() {
            Some(end) if index + 1 < limit => reached = end,
            _ => return Ok(()),
        }
    }
    match range.is_above(reached) {
        true => Err(Gap { from: reached.clone() }),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{range, report};
    use esker_model::limits::MAX_EPOCH_LEAP;
    use proptest::prelude::*;

    fn ids(found: &[Arc<RegionReport>]) -> Vec<u64> {
        found.iter().map(|report| report.region.id.0).collect()
    }

    /// `1: ..d`, `2: d..h`, a gap `h..m`, `3: m..`.
    fn map_with_a_gap() -> RegionMap {
        let mut map = RegionMap::default();
        map.report(report(1, "", "d").build()).unwrap();
        map.report(report(2, "d", "h").build()).unwrap();
        map.report(report(3, "m", "").build()).unwrap();
        map
    }

    #[test]
    fn a_key_is_found_in_its_half_open_range_and_not_in_a_gap() {
        let map = map_with_a_gap();
        let of = |key: &str| map.by_key(key.as_bytes()).map(|found| found.region.id.0);
        assert_eq!(of(""), Some(1));
        assert_eq!(of("czzz"), Some(1));
        assert_eq!(of("d"), Some(2));
        assert_eq!(of("h"), None);
        assert_eq!(of("zzz"), Some(3));
    }

    #[test]
    fn the_previous_region_is_the_direct_neighbour_or_nothing() {
        let map = map_with_a_gap();
        let of = |key: &str| map.previous(key.as_bytes()).map(|found| found.region.id.0);
        assert_eq!(of("d"), Some(1));
        assert_eq!(of("g"), Some(1));
        assert_eq!(of("a"), None);
        assert_eq!(of("i"), None, "the key lies in a gap");
        assert_eq!(of("m"), None, "a gap lies between");
    }

    #[test]
    fn a_scan_starts_at_the_holder_steps_over_gaps_and_keeps_its_limit() {
        let map = map_with_a_gap();
        assert_eq!(ids(&map.scan(&range("", ""), 10)), [1, 2, 3]);
        assert_eq!(ids(&map.scan(&range("e", "m"), 10)), [2]);
        assert_eq!(ids(&map.scan(&range("e", "m1"), 10)), [2, 3]);
        assert_eq!(ids(&map.scan(&range("i", "j"), 10)), [] as [u64; 0]);
        assert_eq!(ids(&map.scan(&range("", ""), 2)), [1, 2]);
    }

    #[test]
    fn ranges_that_share_a_region_get_it_once() {
        let map = map_with_a_gap();
        let ranges = [range("a", "b"), range("c", "e"), range("f", "g"), range("n", "o")];
        assert_eq!(ids(&map.scan_ranges(&ranges, 10, true).unwrap()), [1, 2, 3]);
        assert_eq!(ids(&map.scan_ranges(&ranges, 2, true).unwrap()), [1, 2]);
    }

    #[test]
    fn a_gap_is_an_error_only_for_who_needs_the_whole_range() {
        let map = map_with_a_gap();
        assert_eq!(ids(&map.scan_ranges(&[range("e", "")], 10, false).unwrap()), [2, 3]);
        let gap = map.scan_ranges(&[range("e", "")], 10, true).unwrap_err();
        assert_eq!(gap.from, Bytes::from_static(b"h"));
        // The limit is reached before the gap.
        assert_eq!(ids(&map.scan_ranges(&[range("a", "")], 2, true).unwrap()), [1, 2]);
        assert!(map.scan_ranges(&[range("i", "j")], 10, true).is_err());
    }

    #[test]
    fn a_report_from_before_a_split_is_refused() {
        let mut map = RegionMap::default();
        map.report(report(1, "", "m").version(2).build()).unwrap();
        map.report(report(2, "m", "").version(2).build()).unwrap();
        let stale = map.report(report(1, "", "").version(1).build());
        assert!(matches!(
            stale,
            Err(RefusedReport::Stale(StaleReport { known_region: RegionId(1), .. }))
        ));
        // The region is not known itself, but its range is.
        let stale = map.report(report(9, "a", "z").version(1).build());
        assert!(stale.is_err());
        assert_eq!(map.len(), 2);
    }

    #[test]
    fn the_parts_of_a_split_displace_what_they_came_out_of() {
        let mut map = map_with_a_gap();
        let displaced = map.report(report(9, "m", "q").version(2).build()).unwrap();
        assert_eq!(displaced, [RegionId(3)]);
        map.report(report(3, "q", "").version(2).build()).unwrap();
        map.report(report(8, "h", "m").version(5).build()).unwrap();
        assert_eq!(ids(&map.scan(&range("", ""), 10)), [1, 2, 8, 9, 3]);
        assert_eq!(map.leader_count(StoreId(1)), 5);
    }

    #[test]
    fn a_false_range_takes_no_region_off_the_map() {
        let mut map = map_with_a_gap();
        let before = ids(&map.scan(&range("", ""), 10));
        let false_reports = [
            // More than it had, more than any region had, and what it never had.
            report(2, "c", "n").version(7),
            report(2, "", "").version(7),
            report(9, "", "").version(7),
            report(9, "c", "e").version(7),
            report(2, "m", "n").version(7),
            // Another range at the same version, and the same range at another version.
            report(2, "d", "e"),
            report(2, "d", "h").version(7),
            // With the same version as the region whose range it takes a part of.
            report(9, "a", "b"),
            // Ahead of everything that can have happened.
            report(2, "d", "e").version(2 + MAX_EPOCH_LEAP),
            report(2, "d", "h").conf_ver(2 + MAX_EPOCH_LEAP),
        ];
        for report in false_reports {
            let report = report.build();
            let refused = map.report(report.clone());
            assert!(
                matches!(refused, Err(RefusedReport::Impossible { .. })),
                "{report:?}: {refused:?}"
            );
            assert_eq!(ids(&map.scan(&range("", ""), 10)), before);
        }
    }

    #[test]
    fn what_nobody_repeats_gives_way_to_what_a_leader_says() {
        let mut map = map_with_a_gap();
        // The report is possible, but false.
        map.report(report(2, "e", "f").version(1_000).term(9).build()).unwrap();
        let truth = || report(2, "d", "h").term(5).build();
        map.advance(Time::from_millis(CLAIM_MS - 1));
        assert!(map.report(truth()).is_err());
        map.advance(Time::from_millis(CLAIM_MS));
        map.report(truth()).unwrap();
        assert_eq!(map.by_key(b"d").unwrap().region.id, RegionId(2));
        // A report that is repeated holds.
        map.advance(Time::from_millis(2 * CLAIM_MS - 1));
        map.report(truth()).unwrap();
        map.advance(Time::from_millis(3 * CLAIM_MS - 2));
        assert!(map.report(report(2, "", "z").term(5).build()).is_err());
    }

    #[test]
    fn absurd_sizes_add_up_to_no_panic() {
        let mut map = RegionMap::default();
        for (id, start, end) in [(1, "", "d"), (2, "d", "h"), (3, "h", "")] {
            let mut absurd = report(id, start, end).build();
            absurd.approximate_size = u64::MAX;
            map.report(absurd).unwrap();
        }
        for (id, start, end) in [(1, "", "d"), (2, "d", "h"), (3, "h", "")] {
            map.report(report(id, start, end).build()).unwrap();
        }
        assert_eq!(map.replica_count(StoreId(1)), 3);
    }

    #[test]
    fn a_deposed_leaders_report_does_not_replace_its_successors() {
        let mut map = RegionMap::default();
        let at = |leader, term| report(1, "", "").voters(&[1, 2, 3]).leader(leader).term(term);
        map.report(at(1, 5).build()).unwrap();
        map.report(at(2, 6).build()).unwrap();
        assert!(map.report(at(1, 5).build()).is_err());
        assert_eq!(map.get(RegionId(1)).unwrap().leader.store, StoreId(2));
        assert_eq!(map.leader_count(StoreId(1)), 0);
        assert_eq!(map.replica_count(StoreId(3)), 1);
    }

    /// Keys are single letters, so that a model can hold one entry for each letter.
    const LETTERS: u8 = 8;

    fn letter(n: u8) -> Bytes {
        if n == 0 { Bytes::new() } else { Bytes::from(vec![b'a' + n]) }
    }

    fn letters(start: u8, end: u8) -> KeyRange {
        let end = (end < LETTERS).then(|| letter(end));
        KeyRange::new(letter(start), end).expect("a range")
    }

    proptest! {
        #[test]
        fn the_map_equals_a_brute_force_model(
            reports in proptest::collection::vec(
                (1u64..6, 0..LETTERS, 1..=LETTERS, 1u64..6, 1u64..3, 1u64..4, 0..CLAIM_MS), 1..60)
        ) {
            let mut map = RegionMap::default();
            // The model: all live regions in a list, compared with everything.
            let mut model: Vec<(u64, u8, u8, u64, u64, u64, u64)> = Vec::new();
            let mut now = 0;
            for (id, start, length, version, conf_ver, leader, pause) in reports {
                let end = (start + length).min(LETTERS);
                now += pause;
                map.advance(Time::from_millis(now));
                let refused = model.iter().any(|known| {
                    let overlaps = known.1 < end && start < known.2;
                    let inside = known.1 <= start && end <= known.2;
                    let same = known.1 == start && end == known.2;
                    let cannot_be = if known.0 == id {
                        known.3 > version || known.4 > conf_ver || !inside
                            || same != (known.3 == version)
                    } else {
                        overlaps && (known.3 >= version || !inside)
                    };
                    now - known.6 < CLAIM_MS && cannot_be
                });
                if !refused {
                    model.retain(|known| known.0 != id && !(known.1 < end && start < known.2));
                    model.push((id, start, end, version, conf_ver, leader, now));
                }
                let mut sent = report(id, "", "").version(version).conf_ver(conf_ver)
                    .voters(&[1, 2, 3]).leader(leader).build();
                sent.region.range = letters(start, end);
                prop_assert_eq!(map.report(sent).is_err(), refused);

                model.sort_by_key(|known| known.1);
                let everything = KeyRange::all();
                let expected: Vec<u64> = model.iter().map(|known| known.0).collect();
                prop_assert_eq!(ids(&map.scan(&everything, usize::MAX)), expected);
                for key in 0..LETTERS {
                    let holder = model.iter().position(|known| known.1 <= key && key < known.2);
                    let bytes = letter(key);
                    prop_assert_eq!(
                        map.by_key(&bytes).map(|found| found.region.id.0),
                        holder.map(|at| model[at].0)
                    );
                    let previous = holder.filter(|at| *at > 0 && model[at - 1].2 == model[*at].1);
                    prop_assert_eq!(
                        map.previous(&bytes).map(|found| found.region.id.0),
                        previous.map(|at| model[at - 1].0)
                    );
                    for until in key + 1..=LETTERS {
                        let asked = letters(key, until);
                        let inside: Vec<_> = model.iter()
                            .filter(|known| known.1 < until && key < known.2).collect();
                        let expected: Vec<u64> = inside.iter().map(|known| known.0).collect();
                        prop_assert_eq!(ids(&map.scan(&asked, usize::MAX)), expected.clone());
                        let whole = (key..until).all(|letter| {
                            inside.iter().any(|known| known.1 <= letter && letter < known.2)
                        });
                        let ranges = [asked];
                        let answer = map.scan_ranges(&ranges, usize::MAX, true);
                        prop_assert_eq!(answer.is_ok(), whole);
                    }
                }
                for store in 1..4 {
                    let led = model.iter().filter(|known| known.5 == store).count();
                    prop_assert_eq!(map.leader_count(StoreId(store)), led);
                    prop_assert_eq!(map.replica_count(StoreId(store)), model.len());
                }
            }
        }
    }
}
