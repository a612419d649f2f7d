//! Requests: checked against the region as it is now, gathered, proposed.

use bytes::Bytes;
use esker_model::limits::{MAX_SPLIT_KEYS, MAX_STORED_KEY_BYTES};
use esker_model::{Epoch, NewRegion, PeerChange};
use esker_raft::{
    ConfChange, Entry, LeaveJoint, LogIndex, LogReader as _, PeerId, ProposeError, Time,
};

use super::Peer;
use crate::command::{Body, Command, Keys, Mutation, Split, TaggedCommand, Write};
use crate::config::{MAX_BATCHED_ENTRY_BYTES, MAX_WAITING_PROPOSALS, MAX_WAITING_READS};
use crate::error::RequestError;
use crate::message::{
    Admin, AdminRequest, AdminResult, Proposal, ReadRequest, RequestContext, Waiter, Waiters,
    WriteRequest,
};
use crate::region;

/// Whether the request decides on what it finds: it is alone in its entry.
fn is_swap(request: &WriteRequest) -> bool {
    request.mutations.iter().any(Mutation::is_swap)
}

/// A place among the mutations of one entry, of which there are as many as its size allows.
fn position(of: usize) -> u32 {
    u32::try_from(of).expect("an entry has fewer than 2^32 mutations")
}

impl Peer {
    fn check_peer(&self, asked: Option<PeerId>) -> Result<(), RequestError> {
        match asked {
            Some(asked) if asked != self.me.id && asked.0 != 0 => {
                Err(RequestError::PeerNotMatch { region: self.id, asked, actual: self.me.id })
            }
            _ => Ok(()),
        }
    }

    fn check_range(&self, epoch: Epoch) -> Result<(), RequestError> {
        if epoch.is_same_range(self.descriptor.epoch) {
            Ok(())
        } else {
            Err(self.epoch_not_match())
        }
    }

    pub(super) fn epoch_not_match(&self) -> RequestError {
        RequestError::EpochNotMatch { region: self.id, current: vec![(*self.descriptor).clone()] }
    }

    fn check_write(&self, context: &RequestContext) -> Result<(), RequestError> {
        if !self.is_initialized() || self.destroying {
            return Err(RequestError::RegionNotFound(self.id));
        }
        self.check_peer(context.peer)?;
        if !self.is_leader() || self.retired {
            return Err(self.not_leader());
        }
        if context.term.is_some_and(|term| term != self.group.term()) {
            return Err(RequestError::StaleCommand(self.id));
        }
        self.check_range(context.epoch)
    }

    pub fn on_write(&mut self, request: WriteRequest) {
        let refused = self.check_write(&request.context).err().or_else(|| {
            if self.proposals.len() >= MAX_WAITING_PROPOSALS {
                let reason = format!("region {} has too many writes under way", self.id);
                return Some(RequestError::ServerIsBusy { reason });
            }
            let range = &self.descriptor.range;
            let outside = request.mutations.iter().find(|mutation| !mutation.lies_in(range))?;
            let key = match outside.keys() {
                Keys::One(key) => key,
                Keys::Range(range) => range.start(),
            };
            Some(RequestError::KeyNotInRegion {
                region: self.id,
                key: key.clone(),
                range: range.clone(),
            })
        });
        match refused {
            Some(error) => {
                let _ = request.reply.send(Err(error));
            }
            None => self.writes.push(request),
        }
    }

    fn waiting_reads(&self) -> usize {
        let confirming: usize = self.confirming.values().map(Vec::len).sum();
        let confirmed: usize = self.confirmed.iter().map(|(_, reads)| reads.len()).sum();
        let ahead: usize = self.ahead.iter().map(|(_, _, reads)| reads.len()).sum();
        self.reads.len() + confirming + confirmed + ahead
    }

    pub fn on_read(&mut self, request: ReadRequest) {
        let allowed = if !self.is_initialized() || self.destroying {
            Err(RequestError::RegionNotFound(self.id))
        } else if self.retired || (!self.is_leader() && !request.context.replica_read) {
            Err(self.not_leader())
        } else if self.waiting_reads() >= MAX_WAITING_READS {
            Err(RequestError::ServerIsBusy {
                reason: format!("region {} has too many reads waiting", self.id),
            })
        } else {
            self.check_peer(request.context.peer)
                .and_then(|()| self.check_range(request.context.epoch))
        };
        match allowed {
            Ok(()) => self.reads.push(request),
            Err(error) => {
                let _ = request.reply.send(Err(error));
            }
        }
    }

    /// Everything that came in this turn and waits: as few entries as their size allows.
    pub(super) fn propose_waiting(&mut self, now: Time) {
        if self.writes.is_empty() {
            return;
        }
        let mut waiting = std::mem::take(&mut self.writes).into_iter().peekable();
        while let Some(first) = waiting.next() {
            // The term decides for a whole entry, so only commands that agree share one.
            let term = first.context.term;
            let mut bytes = first.bytes;
            let mut mutations: Vec<Mutation> = Vec::new();
            let mut waiters = Vec::new();
            let mut tagged: Vec<TaggedCommand> = Vec::new();
            let mut now_s = 0;
            let mut take = |request: WriteRequest| {
                // A write of nothing may happen twice.
                let tag = request.context.tag.filter(|_| !request.mutations.is_empty());
                let number = tag.map(|tag| {
                    now_s = tag.now_s.max(now_s);
                    tagged.push(TaggedCommand {
                        client: tag.client,
                        sequence: tag.sequence,
                        horizon: tag.horizon.0,
                        first: position(mutations.len()),
                        count: position(request.mutations.len()),
                    });
                    tagged.len() - 1
                });
                waiters.push(Waiter { reply: request.reply, tagged: number });
                mutations.extend(request.mutations);
            };
            let alone = is_swap(&first);
            take(first);
            while !alone
                && let Some(next) = waiting.next_if(|next| {
                    bytes + next.bytes <= MAX_BATCHED_ENTRY_BYTES
                        && next.context.term == term
                        && !is_swap(next)
                })
            {
                bytes += next.bytes;
                take(next);
            }
            let command = self.command(Body::Write(Write { mutations, tagged, now_s }));
            metrics::histogram!("esker_commands_per_entry").record(waiters.len() as f64);
            self.propose(now, command, Waiters::Write(waiters));
        }
    }

    fn propose(&mut self, now: Time, command: Command, waiters: Waiters) -> Option<LogIndex> {
        let outcome = self.group.propose(now, command.encode());
        self.await_outcome(outcome, waiters)
    }

    fn await_outcome(
        &mut self,
        outcome: Result<(LogIndex, esker_raft::Term), ProposeError>,
        waiters: Waiters,
    ) -> Option<LogIndex> {
        match outcome {
            Ok((index, term)) => {
                self.proposals.push_back(Proposal { index, term, waiters });
                Some(index)
            }
            Err(refused) => {
                let error = self.refusal(refused);
                let zero = LogIndex(0);
                Proposal { index: zero, term: self.group.term(), waiters }.fail(&error);
                None
            }
        }
    }

    fn refusal(&self, refused: ProposeError) -> RequestError {
        match refused {
            ProposeError::NotLeader { .. } => self.not_leader(),
            // The client waits a moment and asks again, perhaps the new leader.
            ProposeError::TransferInProgress { .. } => {
                RequestError::NotLeader { region: self.id, leader: None }
            }
            // Of its own size, so that it would be refused again.
            ProposeError::TooLarge { bytes, limit } => RequestError::EntryTooLarge {
                region: self.id,
                size: bytes as u64,
                limit: limit as u64,
            },
            other => RequestError::ServerIsBusy { reason: format!("region {}: {other}", self.id) },
        }
    }

    pub fn on_admin(&mut self, now: Time, request: AdminRequest) {
        let AdminRequest { epoch, admin, reply, .. } = request;
        let checked = if !self.is_initialized() || self.destroying {
            Err(RequestError::RegionNotFound(self.id))
        } else if !self.is_leader() {
            Err(self.not_leader())
        } else if epoch != self.descriptor.epoch && !matches!(admin, Admin::TransferLeader(_)) {
            Err(self.epoch_not_match())
        } else {
            Ok(())
        };
        if let Err(error) = checked {
            let _ = reply.send(Err(error));
            return;
        }
        match admin {
            Admin::Split { keys, regions } => match self.checked_split(keys, regions) {
                Ok(split) => {
                    let command = self.command(Body::Split(split));
                    // Before the message leaves: see `Peer::splitting`.
                    self.delegate.withdraw_lease();
                    self.splitting =
                        self.propose(now, command, Waiters::Admin(reply)).or(self.splitting);
                }
                Err(error) => {
                    let _ = reply.send(Err(error));
                }
            },
            Admin::ChangePeers(changes) => self.change_peers(now, &changes, reply),
            Admin::TransferLeader(to) => {
                let answer = match self.group.transfer_leader(now, to) {
                    Ok(_) => Ok(AdminResult { regions: vec![(*self.descriptor).clone()] }),
                    Err(refused) => {
                        Err(RequestError::Transfer { region: self.id, reason: refused.to_string() })
                    }
                };
                let _ = reply.send(answer);
            }
        }
    }

    fn command(&self, body: Body) -> Command {
        Command { epoch: self.descriptor.epoch, body }
    }

    fn checked_split(
        &self,
        keys: Vec<Bytes>,
        regions: Vec<NewRegion>,
    ) -> Result<Split, RequestError> {
        let refused = |reason: String| RequestError::Split { region: self.id, reason };
        if self.splitting.is_some() {
            return Err(refused("an earlier split is not applied yet; try again".into()));
        }
        if self.group.configuration().is_joint() {
            return Err(refused("its members are being changed; try again".into()));
        }
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
                return Err(refused(format!(
                    "a key of {} bytes is longer than {limit}",
                    key.len()
                )));
            }
            if !self.descriptor.contains(key) || key == self.descriptor.range.start() {
                return Err(refused(format!(
                    "key {} is not inside the region",
                    esker_rpc::display_key(key)
                )));
            }
        }
        let peers = self.descriptor.peers.len();
        if regions.iter().any(|region| region.peers.len() != peers) {
            return Err(refused(format!("every new region needs ids for {peers} peers")));
        }
        // The old id stays with the right part: appends at the end of the key
        // space, the commonest cause of splits, then stay where they are.
        Ok(Split { keys, regions, right_derive: true })
    }

    fn change_peers(
        &mut self,
        now: Time,
        changes: &[PeerChange],
        reply: crate::message::Reply<AdminResult>,
    ) {
        let change = if changes.is_empty() {
            if !self.group.configuration().is_joint() {
                let _ = reply.send(Ok(AdminResult { regions: vec![(*self.descriptor).clone()] }));
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

    /// Proposes that everybody may forget the log up to what all useful followers hold.
    pub(super) fn propose_truncation(&mut self, now: Time, threshold: u64, max_lag: u64) {
        let first = self.group.first_index();
        let last = self.group.last_index();
        let mut behind = self.applied.index;
        for (_, progress) in self.group.progress() {
            let useful = last.0.saturating_sub(progress.match_index.0) <= max_lag;
            if useful && progress.match_index < behind {
                behind = progress.match_index;
            }
        }
        // A snapshot that is on its way must find the entries that follow it.
        if behind.0 < first.0.saturating_add(threshold) {
            return;
        }
        let Ok(Some(term)) = self.log.term(behind) else { return };
        let command = self.command(Body::Compact { index: behind, term });
        // Nobody waits for it; a refusal is made good at the next look.
        let _ = self.group.propose(now, command.encode());
    }

    /// Fails what can never be committed any more: a committed entry of a later
    /// term means that nothing of an earlier one follows it in any log to come.
    pub(super) fn fail_superseded(&mut self, committed: &Entry) {
        while let Some(front) = self.proposals.front() {
            if front.term >= committed.term && front.index > committed.index {
                break;
            }
            if front.index == committed.index && front.term == committed.term {
                break;
            }
            if let Some(dead) = self.proposals.pop_front() {
                dead.fail(&RequestError::StaleCommand(self.id));
            }
        }
    }
}
