//! Leader balance: moves leaders from the store that leads most to the store that leads least, as
//! long as they differ by so much that one move does not turn the difference around.
//!
//! A transfer that is under way counts as done, so that two rounds do not both move a leader for
//! the same difference. A region whose leader was moved is left alone for a while.

use std::collections::BTreeMap;

use esker_model::{Peer, RegionId, RegionReport, Role, Seat, StoreId};
use thiserror::Error;

use super::View;
use crate::map::StoreHealth;
use crate::operator::{Operator, OperatorKind, Step};

/// Leaders of each store as they will be when all running operators have succeeded. Only stores
/// that can lead more are candidates to receive.
struct Counts(BTreeMap<StoreId, usize>);

impl Counts {
    fn of(view: &View<'_>) -> Self {
        let mut counts: BTreeMap<_, _> = view
            .stores
            .iter()
            .map(|store| {
                let id = store.descriptor.id;
                (id, view.regions.leader_count(id))
            })
            .collect();
        for operator in view.operators.iter() {
            let Some(to) = operator.moves_leader_to() else {
                continue;
            };
            if let Some(report) = view.regions.get(operator.region) {
                Self::shift(&mut counts, report.leader.store, to);
            }
        }
        Self(counts)
    }

    fn shift(counts: &mut BTreeMap<StoreId, usize>, from: StoreId, to: StoreId) {
        if from != to {
            counts.entry(from).and_modify(|count| *count = count.saturating_sub(1));
            counts.entry(to).and_modify(|count| *count += 1);
        }
    }

    fn get(&self, store: StoreId) -> usize {
        self.0.get(&store).copied().unwrap_or(0)
    }
}

/// Proposes up to `leader_batch` transfers.
pub fn balance(view: &View<'_>) -> Vec<Operator> {
    let mut counts = Counts::of(view);
    let mut proposed: Vec<Operator> = Vec::new();
    let mut at_stores: BTreeMap<StoreId, usize> = BTreeMap::new();
    let difference = view.config.leader_difference.max(2);
    while proposed.len() < view.config.leader_batch {
        let taken: Vec<RegionId> = proposed.iter().map(|operator| operator.region).collect();
        let Some((report, to)) = next_transfer(view, &counts, difference, &taken, &at_stores)
        else {
            break;
        };
        let from = report.leader.store;
        let reason = format!(
            "region {}: store {from} leads {} regions, store {} only {}",
            report.region.id,
            counts.get(from),
            to.store,
            counts.get(to.store)
        );
        proposed.push(transfer(view, report, &to, OperatorKind::Leader, reason));
        Counts::shift(&mut counts.0, from, to.store);
        for store in [from, to.store] {
            *at_stores.entry(store).or_default() += 1;
        }
    }
    proposed
}

/// The transfer that evens out most. Its source is the store that leads most among those with a
/// region whose leader may move. Its target is the store that leads least among those that are
/// worth a transfer.
fn next_transfer<'a>(
    view: &'a View<'_>,
    counts: &Counts,
    difference: usize,
    taken: &[RegionId],
    at_stores: &BTreeMap<StoreId, usize>,
) -> Option<(&'a RegionReport, Peer)> {
    let has_room = |store: StoreId| {
        // The proposals of this round are not in the set yet. One store takes part in at most half
        // of a batch, so that a round stays spread out.
        let share = (view.config.leader_batch / 2).max(1);
        view.has_room(store, OperatorKind::Leader)
            && at_stores.get(&store).copied().unwrap_or(0) < share
    };
    let mut sources: Vec<_> = counts.0.iter().map(|(store, count)| (*count, *store)).collect();
    sources.sort_unstable_by(|a, b| b.cmp(a));
    let mut targets: Vec<_> = view
        .good_stores()
        .map(|store| store.descriptor.id)
        .filter(|store| has_room(*store))
        .map(|store| (counts.get(store), store))
        .collect();
    targets.sort_unstable();
    // The regions of a store that does not answer elect new leaders by themselves.
    let may_give = |store: StoreId| has_room(store) && view.health(store).is_live();
    for (led, source) in sources.iter().filter(|(_, store)| may_give(*store)) {
        let worthy: Vec<_> = targets
            .iter()
            .take_while(|(count, _)| count + difference <= *led)
            .map(|(_, store)| *store)
            .collect();
        if worthy.is_empty() {
            // Every other source leads even less.
            return None;
        }
        let movable: Vec<_> = view
            .regions
            .load(*source)
            .into_iter()
            .flat_map(|load| &load.leaders)
            .filter(|id| !taken.contains(id) && may_move(view, **id))
            .filter_map(|id| view.regions.get(*id))
            .collect();
        let best = worthy.iter().find_map(|target| {
            movable
                .iter()
                .find_map(|report| can_lead(view, report, *target).map(|peer| (*report, peer)))
        });
        if let Some((report, peer)) = best {
            return Some((report, peer));
        }
    }
    None
}

/// Whether balance may move the leader of a region now.
fn may_move(view: &View<'_>, region: RegionId) -> bool {
    if view.operators.get(region).is_some() {
        return false;
    }
    view.operators.last_finished(region).is_none_or(|finished| {
        finished.operator.kind == OperatorKind::Replica
            || view.now.millis_since(finished.at) >= view.config.leader_rest_ms
    })
}

/// The replica on `store`, if it could lead the region at once.
fn can_lead(view: &View<'_>, report: &RegionReport, store: StoreId) -> Option<Peer> {
    let peer = *report.region.peer_on(store)?;
    let is_able = peer.role == Role::Voter
        && !peer.witness
        && peer.id != report.leader.id
        && !report.region.in_joint()
        && report.is_caught_up(peer.id)
        && view.health(store) == StoreHealth::Good
        // Its disk is slow: it would hand the region over at once.
        && !view.stores.get(store).is_some_and(|store| store.stats.is_busy);
    is_able.then_some(peer)
}

fn transfer(
    view: &View<'_>,
    report: &RegionReport,
    to: &Peer,
    kind: OperatorKind,
    reason: String,
) -> Operator {
    let step = Step::TransferLeader {
        from: report.leader.store,
        to: Seat { peer: to.id, store: to.store },
    };
    Operator::plan(report, kind, reason, vec![step], view.now)
}

/// Why a region could not be scattered.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ScatterError {
    #[error("region {region} is not known")]
    Unknown { region: RegionId },
    #[error("region {region} has an operator already")]
    Busy { region: RegionId },
}

/// Spreads a region that a client names: the leader goes to the voter whose store leads least, at
/// once and without regard to its last move. `None` if there is nothing to do.
pub fn scatter(view: &View<'_>, region: RegionId) -> Result<Option<Operator>, ScatterError> {
    let report = view.regions.get(region).ok_or(ScatterError::Unknown { region })?;
    if view.operators.get(region).is_some() {
        return Err(ScatterError::Busy { region });
    }
    let counts = Counts::of(view);
    let here = counts.get(report.leader.store);
    let target = report
        .region
        .peers
        .iter()
        .filter_map(|peer| can_lead(view, report, peer.store))
        .filter(|peer| counts.get(peer.store) + 1 < here)
        .filter(|peer| view.has_room(peer.store, OperatorKind::Scatter))
        .min_by_key(|peer| (counts.get(peer.store), peer.store));
    Ok(target.map(|to| {
        let reason = format!("region {region}: scattered on request");
        transfer(view, report, &to, OperatorKind::Scatter, reason)
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::map::{RegionMap, StoreMap};
    use crate::operator::{OperatorLimits, OperatorSet};
    use crate::schedule::ScheduleConfig;
    use crate::testing::{ReportBuilder, report, stores};
    use esker_model::Time;

    const NOW: Time = Time::from_millis(10_000_000);

    struct Scene {
        stores: StoreMap,
        regions: RegionMap,
        operators: OperatorSet,
        config: ScheduleConfig,
        now: Time,
    }

    impl Scene {
        /// Three stores, and for each number in `led` that many regions on all
        /// three, led by store 1, 2 and 3.
        fn new(led: [usize; 3]) -> Self {
            let mut scene = Self {
                stores: stores(3, NOW),
                regions: RegionMap::default(),
                operators: OperatorSet::new(OperatorLimits::default()),
                config: ScheduleConfig::default(),
                now: NOW,
            };
            let leaders = (1..=3u64).flat_map(|store| vec![store; led[store as usize - 1]]);
            for (index, leader) in leaders.enumerate() {
                let region = Self::region(index as u64 + 1);
                scene.regions.report(region.leader(leader).build()).unwrap();
            }
            scene
        }

        fn region(id: u64) -> ReportBuilder {
            let key = |n: u64| format!("{n:04}");
            report(id, &key(id), &key(id + 1)).voters(&[1, 2, 3])
        }

        fn view(&self) -> View<'_> {
            View {
                stores: &self.stores,
                regions: &self.regions,
                operators: &self.operators,
                config: &self.config,
                now: self.now,
            }
        }

        fn led(&self) -> [usize; 3] {
            [1, 2, 3].map(|store| self.regions.leader_count(StoreId(store)))
        }

        /// One round of balance, all of whose transfers succeed.
        fn balance_and_obey(&mut self) -> usize {
            let proposed = balance(&self.view());
            let count = proposed.len();
            for operator in proposed {
                let mut report = (**self.regions.get(operator.region).unwrap()).clone();
                let (steps, _) = operator.steps();
                let Step::TransferLeader { to, .. } = steps[0] else {
                    panic!("balance only transfers leaders, not {operator}");
                };
                self.operators.admit(operator).unwrap();
                report.leader = *report.region.peer(to.peer).unwrap();
                self.regions.report(report.clone()).unwrap();
                assert_eq!(self.operators.on_report(&report, self.now), None);
            }
            count
        }
    }

    #[test]
    fn leaders_even_out_and_then_stay() {
        let mut scene = Scene::new([20, 1, 0]);
        for _ in 0..10 {
            scene.balance_and_obey();
            scene.now = scene.now.plus_millis(scene.config.leader_rest_ms);
            scene.stores = stores(3, scene.now);
        }
        assert_eq!(scene.led(), [7, 7, 7]);
        assert_eq!(scene.balance_and_obey(), 0);
    }

    #[test]
    fn a_difference_of_one_is_left_alone() {
        assert!(balance(&Scene::new([3, 2, 2]).view()).is_empty());
        assert_eq!(balance(&Scene::new([4, 2, 3]).view()).len(), 1);
    }

    #[test]
    fn a_transfer_on_its_way_counts_as_done() {
        let mut scene = Scene::new([2, 0, 2]);
        let first = balance(&scene.view());
        assert_eq!(first.len(), 1);
        scene.operators.admit(first[0].clone()).unwrap();
        // One of the two stores that led two regions will lead one, and so will store 2.
        assert!(balance(&scene.view()).is_empty());
    }

    #[test]
    fn a_region_that_was_moved_rests() {
        let mut scene = Scene::new([2, 0, 0]);
        scene.operators.admit(balance(&scene.view())[0].clone()).unwrap();
        let moved = scene.operators.iter().next().unwrap().region;
        scene.operators.cancel(moved, "for the test", scene.now);
        let other = balance(&scene.view());
        assert_eq!(other.len(), 1);
        assert_ne!(other[0].region, moved);
        scene.now = scene.now.plus_millis(scene.config.leader_rest_ms);
        scene.stores = stores(3, scene.now);
        assert_eq!(balance(&scene.view())[0].region, moved);
    }

    #[test]
    fn only_a_caught_up_voter_on_a_living_store_gets_a_leader() {
        let mut scene = Scene::new([0, 0, 0]);
        for id in 1..=4 {
            let behind = Scene::region(id).pending(2).build();
            scene.regions.report(behind).unwrap();
        }
        let to: Vec<_> =
            balance(&scene.view()).iter().filter_map(Operator::moves_leader_to).collect();
        assert_eq!(to, [StoreId(3), StoreId(3)]);
        // Store 3 falls silent.
        scene.now = scene.now.plus_millis(scene.config.stores.disconnected_after_ms);
        scene.stores.heartbeat(StoreId(1), Default::default(), scene.now, 0);
        scene.stores.heartbeat(StoreId(2), Default::default(), scene.now, 0);
        assert!(balance(&scene.view()).is_empty());
    }

    #[test]
    fn a_store_that_does_not_answer_is_not_asked_to_give_leaders() {
        let mut scene = Scene::new([6, 0, 0]);
        scene.now = scene.now.plus_millis(scene.config.stores.disconnected_after_ms);
        for store in [2, 3] {
            scene.stores.heartbeat(StoreId(store), Default::default(), scene.now, 0);
        }
        assert!(balance(&scene.view()).is_empty());
        scene.stores.heartbeat(StoreId(1), Default::default(), scene.now, 0);
        assert!(!balance(&scene.view()).is_empty());
    }

    #[test]
    fn scatter_moves_a_leader_or_says_why_not() {
        let mut scene = Scene::new([5, 1, 3]);
        let view = scene.view();
        let operator = scatter(&view, RegionId(1)).unwrap().unwrap();
        assert_eq!(operator.moves_leader_to(), Some(StoreId(2)));
        assert_eq!(
            scatter(&view, RegionId(99)).unwrap_err(),
            ScatterError::Unknown { region: RegionId(99) }
        );
        // Region 6 is led by store 2, which already leads fewest.
        assert!(scatter(&view, RegionId(6)).unwrap().is_none());
        scene.operators.admit(operator).unwrap();
        assert_eq!(
            scatter(&scene.view(), RegionId(1)).unwrap_err(),
            ScatterError::Busy { region: RegionId(1) }
        );
    }
}
