//! The replica checker: brings every region to `max_replicas` healthy voters.
//!
//! It looks at one region and proposes the next operator, or nothing. It reads only the present
//! state, so it also finishes what an earlier operator left half done. It takes a region out of a
//! joint configuration, and promotes or removes a learner that was left over.
//!
//! Two rules hold in every proposal. A replica that answers loses its vote only when as many others
//! as wanted keep theirs, or in the same change in which a caught-up replica gets it. And the
//! leader is moved away before its replica is touched.

use esker_model::{Peer, PeerId, RegionReport, Role, Seat, StoreId};
use esker_mutants::broken;

use super::View;
use crate::map::StoreHealth;
use crate::operator::{Operator, OperatorKind, Step};

/// Below this fraction of free disk (one in so many), a store gets no replica.
const MIN_FREE_ONE_IN: u64 = 20;

/// Proposes what `report`'s region needs next. `fresh_peer` draws the id of a new replica, and
/// returns `None` when no id is at hand.
pub fn check(
    view: &View<'_>,
    report: &RegionReport,
    fresh_peer: &mut dyn FnMut() -> Option<PeerId>,
) -> Option<Operator> {
    if report.region.in_joint() {
        return Some(operator(
            view,
            report,
            "its configuration is still joint",
            vec![Step::LeaveJoint],
        ));
    }
    let replicas = Replicas::of(view, report);
    replicas.surplus().or_else(|| replicas.learner()).or_else(|| replicas.missing(fresh_peer))
}

fn operator(view: &View<'_>, report: &RegionReport, why: &str, steps: Vec<Step>) -> Operator {
    let reason = format!("region {}: {why}", report.region.id);
    Operator::plan(report, OperatorKind::Replica, reason, steps, view.now)
}

fn seat(peer: &Peer) -> Seat {
    Seat { peer: peer.id, store: peer.store }
}

/// A replica and the state of its store.
#[derive(Clone, Copy)]
struct Replica {
    peer: Peer,
    health: StoreHealth,
    is_caught_up: bool,
}

/// One region's replicas, sorted by role.
struct Replicas<'a> {
    view: &'a View<'a>,
    report: &'a RegionReport,
    voters: Vec<Replica>,
    learners: Vec<Replica>,
    wanted: usize,
}

impl<'a> Replicas<'a> {
    fn of(view: &'a View<'a>, report: &'a RegionReport) -> Self {
        let worth = |peer: &Peer| {
            let down_for = report
                .down
                .iter()
                .find(|down| down.peer == peer.id)
                .map_or(0, |down| down.seconds.saturating_mul(1_000));
            let health = match view.health(peer.store) {
                // The replica's store lives, but the replica does not answer.
                StoreHealth::Good if down_for >= view.config.stores.down_after_ms => {
                    StoreHealth::Down
                }
                StoreHealth::Good if down_for > 0 => StoreHealth::Silent,
                health => health,
            };
            Replica { peer: *peer, health, is_caught_up: report.is_caught_up(peer.id) }
        };
        let (learners, voters) = report
            .region
            .peers
            .iter()
            .map(worth)
            .partition(|replica| replica.peer.role == Role::Learner);
        Self { view, report, voters, learners, wanted: view.config.max_replicas }
    }

    /// A voter that has to be replaced. One that does not answer comes before one that does.
    fn bad_voter(&self) -> Option<&Replica> {
        self.voters
            .iter()
            .filter(|voter| voter.health.must_be_left() && !broken!(LostStoreIsLeft))
            .min_by_key(|voter| (voter.health.is_live(), voter.peer.id))
    }

    fn live_voters(&self) -> usize {
        self.voters.iter().filter(|voter| voter.health.is_live()).count()
    }

    fn is_leader(&self, replica: &Replica) -> bool {
        replica.peer.id == self.report.leader.id
    }

    /// The steps that move the leadership away from `replica`: none if it does not lead. `None` if
    /// no other replica can lead.
    fn lead_elsewhere(&self, replica: &Replica) -> Option<Vec<Step>> {
        if !self.is_leader(replica) {
            return Some(Vec::new());
        }
        self.voters
            .iter()
            .filter(|voter| voter.health == StoreHealth::Good && voter.is_caught_up)
            .filter(|voter| voter.peer.id != replica.peer.id)
            .min_by_key(|voter| {
                let store = voter.peer.store;
                let is_slow = self.view.stores.get(store).is_some_and(|store| store.stats.is_busy);
                (is_slow, self.view.regions.leader_count(store), store)
            })
            .map(|voter| {
                vec![Step::TransferLeader { from: replica.peer.store, to: seat(&voter.peer) }]
            })
    }

    /// Removes a voter if there are more than wanted.
    fn surplus(&self) -> Option<Operator> {
        if self.voters.len() <= self.wanted {
            return None;
        }
        let chosen = match self.bad_voter() {
            Some(bad) => bad,
            // The voter on the fullest store, but not the leader if that can be avoided.
            None => self.voters.iter().max_by_key(|voter| {
                let store = voter.peer.store;
                let is_follower = !self.is_leader(voter);
                (is_follower, self.view.regions.replica_count(store), store)
            })?,
        };
        // A silent voter may come back. Until it is down, as many voters as wanted must answer.
        if chosen.health.is_live() && self.live_voters() <= self.wanted {
            return None;
        }
        let mut steps = self.lead_elsewhere(chosen)?;
        steps.push(Step::Remove(seat(&chosen.peer)));
        let why = format!("{} voters where {} are wanted", self.voters.len(), self.wanted);
        Some(operator(self.view, self.report, &why, steps))
    }

    /// Promotes or removes an existing learner.
    fn learner(&self) -> Option<Operator> {
        if let Some(lost) = self.learners.iter().find(|learner| learner.health.must_be_left()) {
            let steps = vec![Step::Remove(seat(&lost.peer))];
            return Some(operator(
                self.view,
                self.report,
                "a learner is on a store that is down or gone",
                steps,
            ));
        }
        // A caught-up learner comes first. Any other is waited for.
        let learner =
            self.learners.iter().min_by_key(|learner| (!learner.is_caught_up, learner.peer.id))?;
        // The learner's store went away before the learner was filled, as its leader and placement
        // both see. It holds nothing that would be missed, and the region lacks a voter while it is
        // waited for.
        if !learner.is_caught_up
            && self.report.down.iter().any(|down| down.peer == learner.peer.id)
            && self.view.is_silent(learner.peer.store)
            && self.choose_store().is_some()
        {
            let why = "a learner is on a store that does not answer";
            let steps = vec![Step::Remove(seat(&learner.peer))];
            return Some(operator(self.view, self.report, why, steps));
        }
        let promote = seat(&learner.peer);
        if self.voters.len() < self.wanted {
            let why = format!("{} voters where {} are wanted", self.voters.len(), self.wanted);
            return Some(operator(self.view, self.report, &why, vec![Step::Promote(promote)]));
        }
        match self.bad_voter() {
            Some(bad) => {
                let steps = self.replace(bad, promote)?;
                Some(operator(self.view, self.report, &self.why(bad), steps))
            }
            None => Some(operator(
                self.view,
                self.report,
                "a learner that nobody needs",
                vec![Step::Remove(promote)],
            )),
        }
    }

    /// Adds a replica if there are too few voters, or if a voter has to be replaced.
    fn missing(&self, fresh_peer: &mut dyn FnMut() -> Option<PeerId>) -> Option<Operator> {
        let bad = self.bad_voter();
        if self.voters.len() >= self.wanted && bad.is_none() {
            return None;
        }
        let store = self.choose_store()?;
        // Checked before the id is drawn, so that a plan that cannot be made wastes no id.
        if let Some(bad) = bad {
            self.lead_elsewhere(bad)?;
        }
        let seat = Seat { peer: fresh_peer()?, store };
        let mut steps = vec![Step::AddLearner(seat)];
        let why = if self.voters.len() < self.wanted {
            steps.push(Step::Promote(seat));
            format!("{} voters where {} are wanted", self.voters.len(), self.wanted)
        } else {
            let bad = bad?;
            steps.extend(self.replace(bad, seat)?);
            self.why(bad)
        };
        Some(operator(self.view, self.report, &why, steps))
    }

    /// The steps that give the vote of `bad` to `promote` in one joint change, and then remove
    /// `bad`.
    fn replace(&self, bad: &Replica, promote: Seat) -> Option<Vec<Step>> {
        let mut steps = self.lead_elsewhere(bad)?;
        let demote = seat(&bad.peer);
        if broken!(SuccessorVotesFirst) {
            steps.extend([Step::Remove(demote), Step::Promote(promote)]);
            return Some(steps);
        }
        steps.extend([Step::Swap { promote, demote }, Step::LeaveJoint, Step::Remove(demote)]);
        Some(steps)
    }

    fn why(&self, bad: &Replica) -> String {
        let store = bad.peer.store;
        match bad.health {
            StoreHealth::Draining => format!("store {store} is being emptied"),
            StoreHealth::Gone => format!("store {store} is gone"),
            _ => format!("replica {} on store {store} is down", bad.peer.id),
        }
    }

    /// The store with the fewest replicas that holds none of this region yet, and has free disk and
    /// room under its limit.
    fn choose_store(&self) -> Option<StoreId> {
        let coming = |store: StoreId| {
            self.view
                .operators
                .iter()
                .filter(|operator| operator.adds_replica_on() == Some(store))
                .count()
        };
        self.view
            .good_stores()
            .filter(|store| {
                let stats = &store.stats;
                stats.capacity == 0 || stats.available >= stats.capacity / MIN_FREE_ONE_IN
            })
            .map(|store| (store.stats.is_busy, store.descriptor.id))
            .filter(|(_, store)| {
                let is_free = self.report.region.peer_on(*store).is_none();
                if broken!(OneReplicaOnAStore) { !is_free } else { is_free }
            })
            .filter(|(_, store)| self.view.has_room(*store, OperatorKind::Replica))
            // A slow disk is better than a replica less.
            .min_by_key(|(is_busy, store)| {
                let count = self.view.regions.replica_count(*store) + coming(*store);
                (*is_busy, count, *store)
            })
            .map(|(_, store)| store)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::map::{RegionMap, StoreDescriptor, StoreMap, StoreState, StoreStats};
    use crate::operator::{OperatorLimits, OperatorSet};
    use crate::schedule::ScheduleConfig;
    use crate::testing::{ReportBuilder, report, stores};
    use esker_model::{Action, PeerChange, Time};

    const NOW: Time = Time::from_millis(10_000_000);
    const NEW_PEER: PeerId = PeerId(7_777);

    /// Five stores. Each is up and alive if `marks` does not name it.
    fn five_stores(marks: &[(u64, StoreState)]) -> StoreMap {
        let mut map = stores(5, NOW);
        for (id, state) in marks {
            let known = map.get(StoreId(*id)).unwrap().descriptor.clone();
            map.put(StoreDescriptor { state: *state, ..known }, NOW);
        }
        map
    }

    fn checked(stores: &StoreMap, report: ReportBuilder) -> String {
        let report = report.build();
        let mut regions = RegionMap::default();
        regions.report(report.clone()).unwrap();
        let operators = OperatorSet::new(OperatorLimits::default());
        let view = View {
            stores,
            regions: &regions,
            operators: &operators,
            config: &ScheduleConfig::default(),
            now: NOW,
        };
        check(&view, &report, &mut || Some(NEW_PEER))
            .map_or_else(|| "nothing".to_owned(), |operator| operator.to_string())
    }

    #[test]
    fn a_learner_whose_store_went_away_before_it_was_filled_is_not_waited_for() {
        let mut stores = stores(5, Time(NOW.0 - Time::from_millis(60_000).0));
        for id in [1, 2, 4, 5] {
            stores.heartbeat(StoreId(id), StoreStats::default(), NOW, 1);
        }
        let region = || report(1, "", "").voters(&[1, 2]).with(3, Role::Learner);
        let unfilled = || region().pending(3).down(3, 30);
        let removed =
            "region 1: a learner is on a store that does not answer: remove 103 on store 3";
        assert_eq!(checked(&stores, unfilled()), removed);
        let promoted = "region 1: 2 voters where 3 are wanted: promote 103 on store 3";
        assert_eq!(checked(&stores, region()), promoted, "it has all");
        let filled = region().pending(3);
        assert_eq!(checked(&stores, filled), promoted, "its leader hears of it");
        stores.heartbeat(StoreId(3), StoreStats::default(), NOW, 1);
        assert_eq!(checked(&stores, unfilled()), promoted, "its store answers");
    }

    /// What is wrong with a region, and what the checker does about it.
    #[test]
    fn every_defect_of_a_region_has_its_remedy() {
        use StoreState::{Offline, Tombstone};
        let region = || report(1, "", "");
        type Case = (&'static [(u64, StoreState)], ReportBuilder, &'static str);
        let cases: Vec<Case> = vec![
            (&[], region().voters(&[1, 2, 3]), "nothing"),
            (
                &[],
                region(),
                "region 1: 1 voters where 3 are wanted: \
                 add learner 7777 on store 2, promote 7777 on store 2",
            ),
            (
                &[],
                region().with(2, Role::Learner),
                "region 1: 1 voters where 3 are wanted: promote 102 on store 2",
            ),
            (
                &[],
                region().voters(&[1, 2, 3]).with(4, Role::Learner),
                "region 1: a learner that nobody needs: remove 104 on store 4",
            ),
            (
                &[(4, Tombstone)],
                region().voters(&[1, 2]).with(4, Role::Learner),
                "region 1: a learner is on a store that is down or gone: remove 104 on store 4",
            ),
            (
                &[(2, Tombstone)],
                region().voters(&[1, 2, 3]),
                "region 1: store 2 is gone: add learner 7777 on store 4, \
                 promote 7777 on store 4 and demote 102 on store 2, \
                 leave the joint configuration, remove 102 on store 2",
            ),
            (
                &[(2, Tombstone)],
                region().voters(&[1, 2, 3]).with(4, Role::Learner),
                "region 1: store 2 is gone: promote 104 on store 4 and demote 102 on store 2, \
                 leave the joint configuration, remove 102 on store 2",
            ),
            (
                &[(1, Offline)],
                region().voters(&[1, 2, 3]),
                "region 1: store 1 is being emptied: add learner 7777 on store 4, \
                 move the leader from store 1 to 102 on store 2, \
                 promote 7777 on store 4 and demote 101 on store 1, \
                 leave the joint configuration, remove 101 on store 1",
            ),
            // There is no other store, and a draining replica is better than none.
            (&[(2, Offline), (4, Offline), (5, Offline)], region().voters(&[1, 2, 3]), "nothing"),
            (
                &[],
                region().voters(&[1, 2, 3]).down(3, 3_600),
                "region 1: replica 103 on store 3 is down: add learner 7777 on store 4, \
                 promote 7777 on store 4 and demote 103 on store 3, \
                 leave the joint configuration, remove 103 on store 3",
            ),
            // A replica that is silent for a minute is not down yet.
            (&[], region().voters(&[1, 2, 3]).down(3, 60), "nothing"),
            (
                &[],
                region().voters(&[1, 2, 3, 4]),
                "region 1: 4 voters where 3 are wanted: remove 104 on store 4",
            ),
            (
                &[(2, Tombstone)],
                region().voters(&[1, 2, 3, 4]),
                "region 1: 4 voters where 3 are wanted: remove 102 on store 2",
            ),
            // One of four is silent. No other may be removed before it is back or down.
            (&[], region().voters(&[1, 2, 3, 4]).down(2, 60), "nothing"),
            (
                &[],
                region().voters(&[1, 2]).with(3, Role::DemotingVoter).with(4, Role::IncomingVoter),
                "region 1: its configuration is still joint: leave the joint configuration",
            ),
        ];
        for (marks, report, expected) in cases {
            let found = checked(&five_stores(marks), report);
            assert_eq!(found, expected, "with stores {marks:?}");
        }
    }

    #[test]
    fn a_store_without_free_disk_takes_no_replica_and_one_without_time_only_if_no_other_can() {
        let mut map = stores(4, NOW);
        let stats = |capacity, available, is_busy| crate::map::StoreStats {
            capacity,
            available,
            is_busy,
            ..crate::map::StoreStats::default()
        };
        map.heartbeat(StoreId(2), stats(1_000, 10, false), NOW, 0);
        map.heartbeat(StoreId(3), stats(1_000, 900, true), NOW, 0);
        map.heartbeat(StoreId(4), stats(1_000, 10, false), NOW, 0);
        assert!(checked(&map, report(1, "", "")).contains("add learner 7777 on store 3"));
        map.heartbeat(StoreId(4), stats(1_000, 900, false), NOW, 0);
        assert!(checked(&map, report(1, "", "")).contains("add learner 7777 on store 4"));
        map.heartbeat(StoreId(3), stats(1_000, 10, true), NOW, 0);
        map.heartbeat(StoreId(4), stats(1_000, 10, false), NOW, 0);
        assert_eq!(checked(&map, report(1, "", "")), "nothing");
    }

    #[test]
    fn repair_reaches_three_voters_and_never_has_fewer_live_ones_on_the_way() {
        // Store 3 is gone for good. The region's leader carries out its orders.
        let stores = five_stores(&[(3, StoreState::Tombstone)]);
        let mut region = report(1, "", "").voters(&[1, 2, 3]).build();
        let mut operators = OperatorSet::new(OperatorLimits::default());
        let config = ScheduleConfig::default();
        let mut next_peer = 1_000;
        let mut live_voters = 2;
        for round in 0..20 {
            let now = NOW.plus_millis(round);
            let mut regions = RegionMap::default();
            regions.report(region.clone()).unwrap();
            let view = View {
                stores: &stores,
                regions: &regions,
                operators: &operators,
                config: &config,
                now,
            };
            if operators.get(region.region.id).is_none() {
                let proposed = check(&view, &region, &mut || {
                    next_peer += 1;
                    Some(PeerId(next_peer))
                });
                match proposed {
                    Some(operator) => operators.admit(operator).unwrap(),
                    None => break,
                }
            }
            if let Some(order) = operators.on_report(&region, now) {
                obey(&mut region, &order.action);
            }
            let live = region
                .region
                .peers
                .iter()
                .filter(|peer| matches!(peer.role, Role::Voter | Role::IncomingVoter))
                .filter(|peer| peer.store != StoreId(3))
                .count();
            assert!(live >= live_voters, "round {round}: {live} live voters");
            live_voters = live;
        }
        let mut left: Vec<_> = region.region.peers.iter().map(|peer| peer.store.0).collect();
        left.sort_unstable();
        assert_eq!(left, [1, 2, 4]);
        assert!(region.region.peers.iter().all(|peer| peer.role == Role::Voter));
    }

    /// Does what a region's leader does with an order.
    fn obey(report: &mut RegionReport, action: &Action) {
        let region = &mut report.region;
        let changes = match action {
            Action::TransferLeader(to) => {
                report.leader = *region.peer(to.peer).expect("the target is a peer");
                return;
            }
            Action::ChangePeers(changes) => changes,
            Action::Split(_) => unreachable!("no scheduler splits"),
        };
        region.epoch.conf_ver += 1;
        if changes.is_empty() {
            for peer in &mut region.peers {
                peer.role = match peer.role {
                    Role::IncomingVoter => Role::Voter,
                    Role::DemotingVoter => Role::Learner,
                    role => role,
                };
            }
        }
        let joint = changes.len() > 1;
        for change in changes {
            let seat = change.seat();
            let (role, joint_role) = match change {
                PeerChange::AddVoter(_) => (Role::Voter, Role::IncomingVoter),
                PeerChange::AddLearner(_) => (Role::Learner, Role::DemotingVoter),
                PeerChange::Remove(_) => {
                    region.peers.retain(|peer| peer.id != seat.peer);
                    continue;
                }
            };
            let role = if joint { joint_role } else { role };
            match region.peers.iter_mut().find(|peer| peer.id == seat.peer) {
                Some(peer) => peer.role = role,
                None => region.peers.push(seat.with(role)),
            }
        }
    }
}
