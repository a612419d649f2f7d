//! What placement and operators ask of a region: splits, changes of members, transfers.

use bytes::Bytes;
use esker_model::limits::{MAX_SPLIT_KEYS, MAX_STORED_KEY_BYTES};
use esker_model::{Epoch, NewRegion, PeerChange, Region};
use esker_mutants::broken;
use esker_raft::{ConfChange, LeaveJoint, PeerId, Time};

use super::Peer;
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
        // Who leads is no matter of the epoch.
        if epoch != self.descriptor.epoch && !matches!(admin, Admin::TransferLeader(_)) {
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
