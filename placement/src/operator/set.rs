//! The operators that run, the limits that they run under, and the last ones that ended.

use std::collections::{BTreeMap, HashMap, VecDeque};

use esker_model::{Order, RegionId, RegionReport, StoreId, Time};
use esker_mutants::broken;
use thiserror::Error;

use super::{Advance, Operator, OperatorKind, Status, Step};

/// Ended operators that are remembered, for a question about how one ended.
const MAX_FINISHED: usize = 1_024;
/// A step is ordered again after this long without a report that shows it done.
pub const RESEND_AFTER_MS: u64 = 2_000;

/// How many operators may run at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OperatorLimits {
    /// Operators in the whole cluster.
    pub total: usize,
    /// Operators of kind `Replica` that one store takes part in.
    pub replica_per_store: usize,
    /// Operators of the kinds that move leaders that one store takes part in.
    pub leader_per_store: usize,
}

impl Default for OperatorLimits {
    fn default() -> Self {
        Self {
            total: 256,
            // Each may be a snapshot.
            replica_per_store: 8,
            leader_per_store: 16,
        }
    }
}

/// Why an operator was not admitted.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Admission {
    #[error("region {region} has an operator already: {running}")]
    Busy { region: RegionId, running: String },
    #[error("{limit} operators run already, which is the limit")]
    Full { limit: usize },
    #[error("store {store} takes part in {limit} {kind} operators already, which is its limit")]
    StoreLimit { store: StoreId, limit: usize, kind: OperatorKind },
}

/// An operator that ended.
#[derive(Clone, Debug)]
pub struct Finished {
    pub operator: Operator,
    pub status: Status,
    pub at: Time,
}

struct Running {
    operator: Operator,
    /// The step that was ordered last, and when. Only used to hold back repetitions.
    told: Option<(Step, Time)>,
}

/// All operators, at most one for each region.
pub struct OperatorSet {
    limits: OperatorLimits,
    running: BTreeMap<RegionId, Running>,
    replica_load: HashMap<StoreId, usize>,
    leader_load: HashMap<StoreId, usize>,
    finished: VecDeque<Finished>,
}

impl OperatorSet {
    /// An empty set under `limits`.
    pub fn new(limits: OperatorLimits) -> Self {
        Self {
            limits,
            running: BTreeMap::new(),
            replica_load: HashMap::new(),
            leader_load: HashMap::new(),
            finished: VecDeque::new(),
        }
    }

    /// The running operator of a region.
    pub fn get(&self, region: RegionId) -> Option<&Operator> {
        self.running.get(&region).map(|running| &running.operator)
    }

    /// How the last operator of a region ended.
    pub fn last_finished(&self, region: RegionId) -> Option<&Finished> {
        self.finished.iter().rev().find(|finished| finished.operator.region == region)
    }

    /// All running operators, by region.
    pub fn iter(&self) -> impl Iterator<Item = &Operator> {
        self.running.values().map(|running| &running.operator)
    }

    /// The operators that ended, oldest first.
    pub fn finished(&self) -> impl Iterator<Item = &Finished> {
        self.finished.iter()
    }

    /// Whether `store` may take part in one more operator of this kind.
    pub fn has_room(&self, store: StoreId, kind: OperatorKind) -> bool {
        let (load, limit) = self.load(kind);
        load.get(&store).copied().unwrap_or(0) < limit
    }

    /// Whether the cluster may have one more operator.
    pub fn is_full(&self) -> bool {
        self.running.len() >= self.limits.total
    }

    fn load(&self, kind: OperatorKind) -> (&HashMap<StoreId, usize>, usize) {
        match kind {
            OperatorKind::Replica => (&self.replica_load, self.limits.replica_per_store),
            OperatorKind::Leader | OperatorKind::Scatter => {
                (&self.leader_load, self.limits.leader_per_store)
            }
        }
    }

    fn load_mut(&mut self, kind: OperatorKind) -> &mut HashMap<StoreId, usize> {
        match kind {
            OperatorKind::Replica => &mut self.replica_load,
            OperatorKind::Leader | OperatorKind::Scatter => &mut self.leader_load,
        }
    }

    /// Starts an operator, unless its region has one or a limit forbids it.
    pub fn admit(&mut self, operator: Operator) -> Result<(), Admission> {
        if let Some(running) = self.running.get(&operator.region) {
            return Err(Admission::Busy {
                region: operator.region,
                running: running.operator.to_string(),
            });
        }
        if self.is_full() {
            return Err(Admission::Full { limit: self.limits.total });
        }
        let kind = operator.kind;
        let stores = operator.stores();
        if let Some(store) = stores.iter().find(|store| !self.has_room(**store, kind)) {
            return Err(Admission::StoreLimit { store: *store, limit: self.load(kind).1, kind });
        }
        for store in stores {
            *self.load_mut(kind).entry(store).or_default() += 1;
        }
        let told = None;
        self.running.insert(operator.region, Running { operator, told });
        Ok(())
    }

    /// Compares a region's operator with its leader's report, and returns the order for the leader.
    pub fn on_report(&mut self, report: &RegionReport, now: Time) -> Option<Order> {
        let running = self.running.get_mut(&report.region.id)?;
        match running.operator.advance(report, now) {
            Advance::Wait => None,
            Advance::Ended(status) => {
                self.end(report.region.id, status, now);
                None
            }
            Advance::Send(step) => {
                let is_repetition = running.told.as_ref().is_some_and(|(told, at)| {
                    let is_recent = now.millis_since(*at) < RESEND_AFTER_MS;
                    *told == step && (is_recent || broken!(OrderIsSentAgain))
                });
                if is_repetition {
                    return None;
                }
                running.told = Some((step.clone(), now));
                Some(Order {
                    region: report.region.id,
                    epoch: report.region.epoch,
                    leader: report.leader,
                    action: step.action(),
                })
            }
        }
    }

    /// Ends operators that took too long, also where reports no longer come.
    pub fn expire(&mut self, now: Time) {
        let late: Vec<_> = self
            .running
            .values()
            .filter(|running| running.operator.is_late(now))
            .map(|running| running.operator.region)
            .collect();
        for region in late {
            self.end(region, Status::Timeout, now);
        }
    }

    /// Ends a region's operator without success. Returns false when the region has none.
    pub fn cancel(&mut self, region: RegionId, why: &str, now: Time) -> bool {
        self.end(region, Status::Cancelled(why.to_owned()), now)
    }

    fn end(&mut self, region: RegionId, status: Status, now: Time) -> bool {
        let Some(Running { operator, .. }) = self.running.remove(&region) else {
            return false;
        };
        for store in operator.stores() {
            let load = self.load_mut(operator.kind);
            let count =
                load.get_mut(&store).expect("a running operator is counted at each of its stores");
            *count -= 1;
            if *count == 0 {
                load.remove(&store);
            }
        }
        if self.finished.len() == MAX_FINISHED {
            self.finished.pop_front();
        }
        self.finished.push_back(Finished { operator, status, at: now });
        true
    }
}

#[cfg(test)]
mod tests {
    use esker_model::{Action, Seat};

    use super::super::Progress;
    use super::*;
    use crate::testing::{peer_id, report};
    use esker_model::Role;

    fn seat(region: u64, store: u64) -> Seat {
        Seat { peer: peer_id(region, store), store: StoreId(store) }
    }

    fn set() -> OperatorSet {
        OperatorSet::new(OperatorLimits::default())
    }

    fn add_replica(region: u64, store: u64) -> Operator {
        Operator::plan(
            &report(region, "", "").build(),
            OperatorKind::Replica,
            "one replica of two".to_owned(),
            vec![Step::AddLearner(seat(region, store)), Step::Promote(seat(region, store))],
            Time::from_millis(0),
        )
    }

    fn action_of(order: Option<Order>) -> Option<Action> {
        order.map(|order| order.action)
    }

    #[test]
    fn an_operator_goes_from_step_to_step_as_reports_show_them_done() {
        let mut set = set();
        set.admit(add_replica(1, 2)).unwrap();
        let empty = report(1, "", "").build();
        assert_eq!(
            action_of(set.on_report(&empty, Time::from_millis(1))),
            Some(Step::AddLearner(seat(1, 2)).action())
        );
        assert_eq!(set.on_report(&empty, Time::from_millis(2)), None, "told just now");
        assert_eq!(
            action_of(set.on_report(&empty, Time::from_millis(1 + RESEND_AFTER_MS))),
            Some(Step::AddLearner(seat(1, 2)).action()),
            "told again, for the message may be lost"
        );
        let catching_up = report(1, "", "").with(2, Role::Learner).conf_ver(2).pending(2);
        assert_eq!(set.on_report(&catching_up.build(), Time::from_millis(3_000)), None);
        let caught_up = report(1, "", "").with(2, Role::Learner).conf_ver(2).build();
        let order = set.on_report(&caught_up, Time::from_millis(4_000)).unwrap();
        assert_eq!(order.action, Step::Promote(seat(1, 2)).action());
        assert_eq!(order.epoch.conf_ver, 2);
        let done = report(1, "", "").voters(&[1, 2]).conf_ver(3).build();
        assert_eq!(set.on_report(&done, Time::from_millis(5_000)), None);
        assert!(set.get(RegionId(1)).is_none());
        assert_eq!(set.last_finished(RegionId(1)).unwrap().status, Status::Success);
    }

    #[test]
    fn a_region_has_one_operator_and_a_store_a_limit() {
        let mut set = OperatorSet::new(OperatorLimits {
            total: 3,
            replica_per_store: 2,
            leader_per_store: 1,
        });
        set.admit(add_replica(1, 2)).unwrap();
        assert!(matches!(set.admit(add_replica(1, 3)), Err(Admission::Busy { .. })));
        set.admit(add_replica(2, 2)).unwrap();
        assert!(matches!(
            set.admit(add_replica(3, 2)),
            Err(Admission::StoreLimit { limit: 2, .. })
        ));
        set.admit(add_replica(3, 3)).unwrap();
        assert_eq!(set.admit(add_replica(4, 4)), Err(Admission::Full { limit: 3 }));
        assert!(set.cancel(RegionId(1), "asked for", Time::from_millis(1)));
        assert!(!set.cancel(RegionId(1), "asked for", Time::from_millis(1)));
        set.admit(add_replica(4, 2)).unwrap();
    }

    #[test]
    fn a_split_cancels_what_was_planned_for_the_old_range() {
        let mut set = set();
        set.admit(add_replica(1, 2)).unwrap();
        let split = report(1, "", "m").version(2).build();
        assert_eq!(set.on_report(&split, Time::from_millis(1)), None);
        assert!(matches!(set.last_finished(RegionId(1)).unwrap().status, Status::Cancelled(_)));
    }

    #[test]
    fn an_operator_ends_when_somebody_else_changes_the_members() {
        let mut set = set();
        let before = report(1, "", "").voters(&[1, 2, 3]).with(4, Role::Learner).build();
        let remove = |set: &mut OperatorSet| {
            set.admit(Operator::plan(
                &before,
                OperatorKind::Replica,
                "a learner that nobody needs".to_owned(),
                vec![Step::Remove(seat(1, 4))],
                Time::from_millis(0),
            ))
            .unwrap();
        };
        remove(&mut set);
        // The learner has become a voter in the place of another.
        let changed = report(1, "", "").voters(&[1, 2, 4]).with(3, Role::Learner);
        assert_eq!(set.on_report(&changed.build(), Time::from_millis(1)), None);
        assert!(matches!(set.last_finished(RegionId(1)).unwrap().status, Status::Cancelled(_)));
        // What the operator itself does is no such change.
        remove(&mut set);
        assert!(set.on_report(&before, Time::from_millis(2)).is_some());
        let done = report(1, "", "").voters(&[1, 2, 3]).build();
        assert_eq!(set.on_report(&done, Time::from_millis(3)), None);
        assert_eq!(set.last_finished(RegionId(1)).unwrap().status, Status::Success);
    }

    #[test]
    fn a_peer_is_not_added_when_another_has_come_and_gone_since_its_id_was_drawn() {
        let mut set = set();
        set.admit(add_replica(1, 2)).unwrap();
        let mut later = report(1, "", "").build();
        later.region.epoch.conf_ver += 2;
        assert_eq!(set.on_report(&later, Time::from_millis(1)), None);
        assert!(matches!(set.last_finished(RegionId(1)).unwrap().status, Status::Cancelled(_)));
    }

    #[test]
    fn an_operator_without_progress_ends_at_its_timeout() {
        let mut set = set();
        set.admit(add_replica(1, 2)).unwrap();
        let late = Time::from_millis(OperatorKind::Replica.timeout_ms());
        set.expire(Time(late.0 - 1));
        assert!(set.get(RegionId(1)).is_some());
        set.expire(late);
        assert!(set.get(RegionId(1)).is_none());
        assert_eq!(set.last_finished(RegionId(1)).unwrap().status, Status::Timeout);
        assert!(set.has_room(StoreId(2), OperatorKind::Replica));
    }

    #[test]
    fn a_leader_is_never_removed_and_a_swap_waits_for_its_learner() {
        let remove = Step::Remove(seat(1, 1));
        let led = report(1, "", "").voters(&[1, 2, 3]).build();
        assert!(matches!(remove.progress(&led), Progress::Impossible(_)));
        let swap = Step::Swap { promote: seat(1, 4), demote: seat(1, 3) };
        let pending = report(1, "", "").voters(&[1, 2, 3]).with(4, Role::Learner).pending(4);
        assert_eq!(swap.progress(&pending.build()), Progress::Wait);
        let ready = report(1, "", "").voters(&[1, 2, 3]).with(4, Role::Learner);
        assert_eq!(swap.progress(&ready.build()), Progress::Send);
        let joint = report(1, "", "")
            .voters(&[1, 2])
            .with(3, Role::DemotingVoter)
            .with(4, Role::IncomingVoter)
            .build();
        assert_eq!(swap.progress(&joint), Progress::Done);
        assert_eq!(Step::LeaveJoint.progress(&joint), Progress::Send);
        assert_eq!(Step::Remove(seat(1, 3)).progress(&joint), Progress::Wait);
    }
}
