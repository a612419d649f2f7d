//! What placement and operators ask of a region: splits, changes of members, transfers.

use bytes::Bytes;
use esker_model::limits::{MAX_SPLIT_KEYS, MAX_STORED_KEY_BYTES};
use esker_model::{Epoch, NewRegion, PeerChange, Region};
use esker_mutants::broken;
use esker_raft::{ConfChange, LeaveJoint, PeerId, Time};

use super::{Life, Peer};
use crate::command::{Body, Split};
use crate::error::RequestError;
use crate::message::{Admin, AdminRequest, AdminResult, Reply, Waiters};
use crate::region;

impl Peer {
    pub fn on_admin(&mut self, now: Time, request: AdminRequest) {
        let AdminRequest { epoch, admin, reply, .. } = request;
        if let Err(error) = self.check_admin(epoch, &admin) {
            let _ = reply.send(Err(error));
            return;
        }
        match admin {
            Admin::Split { keys, regions } => self.split(now, keys, regions, reply),
            Admin::ChangePeers(changes) => self.change_peers(now, &changes, reply),
            Admin::TransferLeader(to) => {
                let _ = reply.send(self.transfer_leader(now, to));
            }
        }
    }

    fn check_admin(&self, epoch: Epoch, admin: &Admin) -> Result<(), RequestError> {
        self.check_here()?;
        if !self.is_leader() {
            return Err(self.not_leader());
        }
        // Who leads is no matter of the epoch, and a peer on damaged data is to be succeeded.
        if matches!(admin, Admin::TransferLeader(_)) {
            return Ok(());
        }
        if self.life == Life::Retired {
            return Err(self.not_leader());
        }
        if epoch != self.descriptor.epoch {
            return Err(RequestError::epoch_not_match(&self.descriptor));
        }
        Ok(())
    }

    /// The region as it is, for a request that has taken effect.
    fn unchanged(&self) -> AdminResult {
        AdminResult { regions: vec![(*self.descriptor).clone()] }
    }

    fn split(
        &mut self,
        now: Time,
        keys: Vec<Bytes>,
        regions: Vec<NewRegion>,
        reply: Reply<AdminResult>,
    ) {
        let split = self.may_split().and_then(|()| checked_split(&self.descriptor, keys, regions));
        match split {
            Ok(split) => {
                let command = self.command(Body::Split(split));
                // Before the message leaves: see `Writes::splitting`.
                if !broken!(LeaseEndsWithSplit) {
                    self.delegate.withdraw_lease();
                }
                if let Some(index) = self.propose(now, command, Waiters::Admin(reply)) {
                    self.writes.split_proposed(index);
                }
            }
            Err(error) => {
                let _ = reply.send(Err(error));
            }
        }
    }

    fn may_split(&self) -> Result<(), RequestError> {
        let refused = |reason: &str| RequestError::Split { region: self.id, reason: reason.into() };
        if self.writes.is_splitting() {
            return Err(refused("an earlier split is not applied yet; try again"));
        }
        if self.group.configuration().is_joint() {
            return Err(refused("its members are being changed; try again"));
        }
        Ok(())
    }

    fn change_peers(&mut self, now: Time, changes: &[PeerChange], reply: Reply<AdminResult>) {
        let change = if changes.is_empty() {
            if !self.group.configuration().is_joint() {
                let _ = reply.send(Ok(self.unchanged()));
                return;
            }
            ConfChange { steps: Vec::new(), leave: LeaveJoint::Auto, context: Bytes::new() }
        } else {
            if let Err(error) = region::changed(&self.descriptor, changes) {
                let _ = reply.send(Err(error.into()));
                return;
            }
            let command = self.command(Body::ChangePeers(changes.to_vec()));
            region::conf_change(changes, command.encode())
        };
        let outcome = self.group.propose_change(now, change);
        self.await_outcome(outcome, Waiters::Admin(reply));
    }

    fn transfer_leader(
        &mut self,
        now: Time,
        to: Option<PeerId>,
    ) -> Result<AdminResult, RequestError> {
        match self.group.transfer_leader(now, to) {
            Ok(_) => Ok(self.unchanged()),
            Err(refused) => {
                Err(RequestError::Transfer { region: self.id, reason: refused.to_string() })
            }
        }
    }
}

/// A split of the region as it is, if it can be cut so.
fn checked_split(
    region: &Region,
    keys: Vec<Bytes>,
    regions: Vec<NewRegion>,
) -> Result<Split, RequestError> {
    let refused = |reason: String| RequestError::Split { region: region.id, reason };
    if keys.is_empty() || keys.len() > MAX_SPLIT_KEYS {
        return Err(refused(format!(
            "{} keys; 1 to {MAX_SPLIT_KEYS} are possible at once",
            keys.len()
        )));
    }
    if keys.len() != regions.len() {
        return Err(refused(format!(
            "{} keys but ids for {} new regions",
            keys.len(),
            regions.len()
        )));
    }
    if !keys.is_sorted_by(|a, b| a < b) {
        return Err(refused("the keys are not in ascending order".into()));
    }
    for key in &keys {
        if key.len() > MAX_STORED_KEY_BYTES {
            let limit = MAX_STORED_KEY_BYTES;
            return Err(refused(format!("a key of {} bytes is longer than {limit}", key.len())));
        }
        if !region.contains(key) || key == region.range.start() {
            return Err(refused(format!(
                "key {} is not inside the region",
                esker_rpc::display_key(key)
            )));
        }
    }
    let peers = region.peers.len();
    if regions.iter().any(|region| region.peers.len() != peers) {
        return Err(refused(format!("every new region needs ids for {peers} peers")));
    }
    // The old id stays with the right part: appends at the end of the key
    // space, the commonest cause of splits, then stay where they are.
    Ok(Split { keys, regions, right_derive: true })
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use esker_engine::{EngineOptions, KvEngine, LogEngine, MemoryEnv};
    use esker_model::{Clock, KeyRange, Peer as PeerMeta, RegionId, RegionReport, StoreId, Term};

    use super::*;
    use crate::envelope::Envelope;
    use crate::message::{Notice, RegionStatus, ReplicaRole};
    use crate::snapshot::RegionSnapshotSource;
    use crate::state::bootstrap_region;
    use crate::{Outbox, Parts, Store, StoreConfig};

    const STORE: StoreId = StoreId(1);

    struct Nowhere;

    impl Outbox for Nowhere {
        fn send(&self, _: Envelope) {}
        fn send_snapshot(&self, _: Envelope, _: RegionSnapshotSource) {}
        fn report_region(&self, _: RegionReport) {}
        fn report_split(&self, _: Vec<Region>) {}
        fn leadership(&self, _: RegionId, _: Term, _: Option<PeerMeta>, _: bool) {}
        fn knows_store(&self, _: StoreId) -> bool {
            true
        }
    }

    #[derive(Default)]
    struct Ticking(AtomicU64);

    impl Clock for Ticking {
        fn now(&self) -> Time {
            Time(self.0.load(Ordering::Relaxed))
        }

        fn wall_ms(&self) -> u64 {
            0
        }
    }

    /// A store with one region, of which it has the only peer.
    struct Alone {
        store: Store,
        clock: Arc<Ticking>,
        region: Region,
    }

    impl Alone {
        fn new() -> Self {
            let options = EngineOptions::in_memory(MemoryEnv::new());
            let kv = KvEngine::open(Path::new("/kv"), &options).expect("an engine");
            let log = LogEngine::open(Path::new("/log"), &options).expect("an engine");
            let peers = vec![PeerMeta::voter(PeerId(2), STORE)];
            let range = KeyRange::all();
            let region = Region { id: RegionId(1), range, epoch: Epoch::FIRST, peers };
            bootstrap_region(&kv, &log, STORE, &region).expect("a region");
            let clock = Arc::new(Ticking::default());
            let parts = Parts {
                store: STORE,
                kv,
                log,
                snapshots: "/snap".into(),
                config: StoreConfig { workers: 1, apply_workers: 1, ..StoreConfig::default() },
                outbox: Arc::new(Nowhere),
                clock: clock.clone(),
            };
            let mut alone = Alone { store: Store::open(parts).expect("a store"), clock, region };
            alone.run();
            assert_eq!(alone.status().role, ReplicaRole::Leader);
            alone
        }

        /// Longer than any election takes.
        fn run(&mut self) {
            for _ in 0..100 {
                self.clock.0.fetch_add(50_000_000, Ordering::Relaxed);
                self.store.workers[0].turn(&*self.clock).expect("a turn");
                self.store.log_writer.turn().expect("a turn");
                self.store.appliers[0].turn().expect("a turn");
            }
        }

        fn status(&mut self) -> RegionStatus {
            let mut answer = self.store.handle.status(self.region.id).start().expect("sent");
            self.run();
            answer.try_recv().expect("an answer").expect("the region is here")
        }

        fn ask(&mut self, admin: Admin) -> Result<AdminResult, RequestError> {
            let Region { id, epoch, .. } = self.region;
            let mut answer = self.store.handle.admin(id, epoch, admin).start().expect("sent");
            self.run();
            answer.try_recv().expect("an answer")
        }
    }

    #[test]
    fn a_leader_on_damaged_data_changes_nothing_of_its_region_and_may_still_be_succeeded() {
        let split = Admin::Split {
            keys: vec![Bytes::from_static(b"m")],
            regions: vec![NewRegion { id: RegionId(7), peers: vec![PeerId(8)] }],
        };
        let learner = esker_model::Seat { peer: PeerId(9), store: StoreId(2) };
        let change = Admin::ChangePeers(vec![PeerChange::AddLearner(learner)]);
        let not_led = Err(RequestError::NotLeader { region: RegionId(1), leader: None });
        for admin in [split, change] {
            let mut alone = Alone::new();
            alone.store.shared.notices[0].send(Notice::Retire).expect("a worker");
            alone.run();
            assert_eq!(alone.status().role, ReplicaRole::Leader, "nobody else could lead");
            assert_eq!(alone.ask(admin), not_led);
            assert_eq!(alone.status().region, alone.region);
            // It is carried out, as far as that is possible.
            let transfer = alone.ask(Admin::TransferLeader(None));
            assert!(matches!(transfer, Err(RequestError::Transfer { .. })), "{transfer:?}");
        }
    }
}
