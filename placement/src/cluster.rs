//! What the leader of the placement driver holds in memory of the cluster, and what it does with
//! each heartbeat and each tick. There is no I/O and no clock. The time is an argument, and the
//! orders for regions' leaders are the result.

use bytes::Bytes;
use esker_model::{
    KeyRange, Order, PeerId, Region, RegionId, RegionReport, StoreId, Time, Traffic,
};
use tracing::{debug, info};

use crate::map::{RefusedReport, RegionMap, StoreMap};
use crate::operator::{Operator, OperatorLimits, OperatorSet};
use crate::schedule::leaders::ScatterError;
use crate::schedule::{ScheduleConfig, View, leaders, replicas};

/// Regions that one tick looks at, so that a tick takes a bounded time.
const PATROL_BATCH: usize = 512;

/// Draws the id of a new replica; `None` when no id is at hand.
pub type FreshPeer<'a> = &'a mut dyn FnMut() -> Option<PeerId>;

/// The cluster map and the operators on it.
pub struct Cluster {
    pub stores: StoreMap,
    pub regions: RegionMap,
    pub operators: OperatorSet,
    pub config: ScheduleConfig,
    /// Where the patrol continues.
    patrol_from: Bytes,
}

impl Cluster {
    /// A cluster without regions, and with the stores that are durable.
    pub fn new(stores: StoreMap, config: ScheduleConfig, limits: OperatorLimits) -> Self {
        Self {
            stores,
            regions: RegionMap::default(),
            operators: OperatorSet::new(limits),
            config,
            patrol_from: Bytes::new(),
        }
    }

    /// What the schedulers look at.
    pub fn view(&self, now: Time) -> View<'_> {
        View {
            stores: &self.stores,
            regions: &self.regions,
            operators: &self.operators,
            config: &self.config,
            now,
        }
    }

    /// Takes in a leader's report, and returns the order for that leader.
    pub fn heartbeat(
        &mut self,
        report: RegionReport,
        now: Time,
        fresh: FreshPeer<'_>,
    ) -> Result<Option<Order>, RefusedReport> {
        let id = report.region.id;
        self.regions.advance(now);
        for displaced in self.regions.report(report)? {
            info!(region = %displaced, by = %id, "a newer region took this one's range");
            self.operators.cancel(displaced, "another region holds its range", now);
        }
        Ok(self.attend(id, now, fresh))
    }

    /// Continues a region's operator, or plans one if the region needs one.
    fn attend(&mut self, id: RegionId, now: Time, fresh: FreshPeer<'_>) -> Option<Order> {
        let report = self.regions.get(id)?.clone();
        if let Some(lost) = self.lost_store_of(id, now) {
            // The operator would wait for that store until its time is over, and nothing else is
            // planned for the region meanwhile.
            self.operators.cancel(id, &format!("store {lost} is down or gone"), now);
            self.log_end(id);
        }
        if self.operators.get(id).is_some() {
            let order = self.operators.on_report(&report, now);
            if self.operators.get(id).is_some() {
                return order;
            }
            self.log_end(id);
        }
        if self.operators.is_full() {
            return None;
        }
        let proposed = replicas::check(&self.view(now), &report, fresh)?;
        self.start(proposed, now)
    }

    /// The store that the region's operator counts on, if no replica should be on it any more.
    fn lost_store_of(&self, id: RegionId, now: Time) -> Option<StoreId> {
        let store = self.operators.get(id)?.counts_on()?;
        self.view(now).health(store).must_be_left().then_some(store)
    }

    fn log_end(&self, id: RegionId) {
        if let Some(ended) = self.operators.last_finished(id) {
            info!(region = %id, status = ?ended.status, operator = %ended.operator, "operator ended");
        }
    }

    /// Admits an operator that a scheduler proposes, and returns its first step.
    fn start(&mut self, operator: Operator, now: Time) -> Option<Order> {
        let region = operator.region;
        let told = operator.to_string();
        if let Err(refused) = self.operators.admit(operator) {
            debug!(%region, %refused, operator = told, "operator not admitted");
            return None;
        }
        info!(%region, operator = told, "operator starts");
        let report = self.regions.get(region)?.clone();
        self.operators.on_report(&report, now)
    }

    /// Looks at the next part of the regions, and balances leaders once all regions are known. If
    /// only a part of the map were counted, leaders would move to stores that merely have not
    /// reported yet.
    pub fn tick(&mut self, now: Time, fresh: FreshPeer<'_>) -> Vec<Order> {
        self.operators.expire(now);
        let from = KeyRange::from(self.patrol_from.clone());
        let part = self.regions.scan(&from, PATROL_BATCH);
        self.patrol_from =
            part.last().and_then(|last| last.region.range.end().cloned()).unwrap_or_default();
        let mut orders: Vec<_> = part
            .iter()
            .filter_map(|report| self.attend(report.region.id, now, &mut *fresh))
            .collect();
        if self.covers_all_keys() {
            for proposed in leaders::balance(&self.view(now)) {
                orders.extend(self.start(proposed, now));
            }
        }
        orders
    }

    /// Whether every key has a region with a known leader.
    pub fn covers_all_keys(&self) -> bool {
        let mut reached = Some(Bytes::new());
        for report in self.regions.iter() {
            let range = &report.region.range;
            if reached.as_ref() != Some(range.start()) {
                return false;
            }
            reached = range.end().cloned();
        }
        reached.is_none()
    }

    /// Spreads a region's leader on request.
    pub fn scatter(&mut self, id: RegionId, now: Time) -> Result<Option<Order>, ScatterError> {
        let proposed = leaders::scatter(&self.view(now), id)?;
        Ok(proposed.and_then(|operator| self.start(operator, now)))
    }

    /// Takes in the outcome of a split before its regions' own heartbeats come. The store that led
    /// the split region will almost always lead its parts, so they are entered under its replicas.
    /// Where that is wrong, the first heartbeat corrects it. Without this, the map would have no
    /// region for the keys of a new part until its first heartbeat.
    pub fn split_happened(&mut self, regions: Vec<Region>, now: Time) {
        self.regions.advance(now);
        let leader_store = regions
            .iter()
            .find_map(|region| self.regions.get(region.id))
            .map(|known| known.leader.store);
        let Some(store) = leader_store else {
            return;
        };
        let parts = u64::try_from(regions.len()).unwrap_or(u64::MAX).max(1);
        let whole = regions
            .iter()
            .find_map(|region| self.regions.get(region.id))
            .map_or((0, 0), |known| (known.approximate_size, known.approximate_keys));
        for region in regions {
            let Some(leader) = region.peer_on(store).copied() else {
                continue;
            };
            let is_known =
                self.regions.get(region.id).is_some_and(|known| known.region.epoch == region.epoch);
            if is_known {
                continue;
            }
            let id = region.id;
            let report = RegionReport {
                region,
                leader,
                term: None,
                down: Vec::new(),
                pending: Vec::new(),
                traffic: Traffic::default(),
                approximate_size: whole.0 / parts,
                approximate_keys: whole.1 / parts,
            };
            match self.regions.report(report) {
                Ok(displaced) => {
                    for displaced in displaced {
                        self.operators.cancel(displaced, "another region holds its range", now);
                    }
                }
                Err(refused) => debug!(region = %id, %refused, "split does not fit what is known"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::map::{StoreDescriptor, StoreState};
    use crate::testing::{report, stores};
    use esker_model::{Action, PeerChange, Role, Seat};

    fn adds_learner_on(order: Option<Order>, store: u64) -> bool {
        let Some(Order { action: Action::ChangePeers(changes), .. }) = order else { return false };
        matches!(&changes[..], [PeerChange::AddLearner(seat)] if seat.store == StoreId(store))
    }

    fn cluster(count: u64) -> Cluster {
        Cluster::new(
            stores(count, Time::from_millis(0)),
            ScheduleConfig::default(),
            OperatorLimits::default(),
        )
    }

    #[test]
    fn a_heartbeat_is_answered_with_the_next_step_of_its_region() {
        let mut cluster = cluster(3);
        let mut next = 900;
        let mut fresh = || {
            next += 1;
            Some(PeerId(next))
        };
        let alone = report(1, "", "").build();
        let order = cluster.heartbeat(alone, Time::from_millis(1), &mut fresh).unwrap();
        assert!(adds_learner_on(order, 2));
        // The region has two voters of three. The heartbeat that shows the first operator done also
        // starts the next one, for store 3.
        let mut two = report(1, "", "").with(2, Role::Voter).conf_ver(3).build();
        two.region.peers[1].id = PeerId(901);
        let order = cluster.heartbeat(two, Time::from_millis(2), &mut fresh).unwrap();
        assert!(adds_learner_on(order, 3));
    }

    #[test]
    fn an_operator_is_given_up_when_the_store_that_it_counts_on_is_lost() {
        let mut cluster = cluster(4);
        let mut next = 900;
        let mut fresh = || {
            next += 1;
            Some(PeerId(next))
        };
        let now = Time::from_millis(1);
        let two = || report(1, "", "").voters(&[1, 2]);
        let order = cluster.heartbeat(two().build(), now, &mut fresh).unwrap();
        assert!(adds_learner_on(order, 3));
        let mut pending = two().with(3, Role::Learner).conf_ver(4).pending(3).build();
        let learner = PeerId(901);
        pending.region.peers[2].id = learner;
        pending.pending[0] = learner;
        assert_eq!(
            cluster.heartbeat(pending.clone(), now, &mut fresh),
            Ok(None),
            "it is waited for"
        );
        let known = cluster.stores.get(StoreId(3)).unwrap().descriptor.clone();
        cluster.stores.put(StoreDescriptor { state: StoreState::Tombstone, ..known }, now);
        let order = cluster.heartbeat(pending, now, &mut fresh).unwrap().expect("it goes on");
        let remove = PeerChange::Remove(Seat { peer: learner, store: StoreId(3) });
        assert_eq!(order.action, Action::ChangePeers(vec![remove]));
    }

    #[test]
    fn without_a_fresh_id_nothing_is_planned_and_nothing_breaks() {
        let mut cluster = cluster(3);
        let order =
            cluster.heartbeat(report(1, "", "").build(), Time::from_millis(1), &mut || None);
        assert_eq!(order, Ok(None));
        assert_eq!(cluster.operators.iter().count(), 0);
    }

    #[test]
    fn leaders_are_balanced_only_when_every_key_is_accounted_for() {
        let mut cluster = cluster(3);
        let mut none = || None;
        let parts = [(1, "", "b"), (2, "b", "c"), (3, "c", "")];
        for (id, start, end) in &parts[..2] {
            let full = report(*id, start, end).voters(&[1, 2, 3]).build();
            cluster.heartbeat(full, Time::from_millis(1), &mut none).unwrap();
        }
        assert!(!cluster.covers_all_keys());
        assert!(cluster.tick(Time::from_millis(2), &mut none).is_empty());
        let (id, start, end) = parts[2];
        let last = report(id, start, end).voters(&[1, 2, 3]).build();
        cluster.heartbeat(last, Time::from_millis(3), &mut none).unwrap();
        assert!(cluster.covers_all_keys());
        let orders = cluster.tick(Time::from_millis(4), &mut none);
        assert_eq!(orders.len(), 2);
        assert!(orders.iter().all(|order| matches!(order.action, Action::TransferLeader(_))));
    }

    #[test]
    fn the_parts_of_a_split_are_found_before_their_first_heartbeat() {
        let mut cluster = cluster(3);
        let whole = report(1, "", "").voters(&[1, 2, 3]).leader(2).build();
        cluster.heartbeat(whole, Time::from_millis(1), &mut || None).unwrap();
        let parts = [(1, "m", ""), (2, "", "m")].map(|(id, start, end)| {
            report(id, start, end).voters(&[1, 2, 3]).version(2).build().region
        });
        cluster.split_happened(parts.to_vec(), Time::from_millis(2));
        assert!(cluster.covers_all_keys());
        let found = cluster.regions.by_key(b"a").unwrap();
        assert_eq!((found.region.id.0, found.leader.store.0), (2, 2));
        // The split is reported twice, and late. Nothing changes.
        let newer = report(2, "", "g").voters(&[1, 2, 3]).version(3).build();
        cluster.heartbeat(newer, Time::from_millis(3), &mut || None).unwrap();
        cluster.split_happened(parts.to_vec(), Time::from_millis(4));
        assert_eq!(cluster.regions.by_key(b"a").unwrap().region.epoch.version, 3);
    }
}
