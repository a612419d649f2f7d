//! Writes and reads: checked against the region as it is now, gathered, and proposed or confirmed
//! at the end of the turn.

use esker_model::Epoch;
use esker_mutants::broken;
use esker_raft::{LogIndex, PeerId, ProposeError, Term, Time};

use super::{Life, Peer, writes};
use crate::command::{Body, Command, Keys};
use crate::error::RequestError;
use crate::message::{ReadRequest, RequestContext, Waiters, WriteRequest};
use crate::worker::Shared;

impl Peer {
    pub fn on_write(&mut self, request: WriteRequest) {
        match self.check_write(&request) {
            Ok(()) => self.writes.push(request),
            Err(error) => {
                let _ = request.reply.send(Err(error));
            }
        }
    }

    fn check_write(&self, request: &WriteRequest) -> Result<(), RequestError> {
        let RequestContext { epoch, peer, term, .. } = request.context;
        self.check_here()?;
        self.check_peer(peer)?;
        if !self.is_leader() || self.life == Life::Retired {
            return Err(self.not_leader());
        }
        if term.is_some_and(|term| term != self.group.term()) {
            return Err(RequestError::StaleCommand(self.id));
        }
        if broken!(StaleRequestIsRefused) {
            return Ok(());
        }
        self.check_range(epoch)?;
        if self.writes.is_full() {
            let reason = format!("region {} has too many writes under way", self.id);
            return Err(RequestError::ServerIsBusy { reason });
        }
        let range = &self.descriptor.range;
        let Some(outside) = request.mutations.iter().find(|mutation| !mutation.lies_in(range))
        else {
            return Ok(());
        };
        let key = match outside.keys() {
            Keys::One(key) => key,
            Keys::Range(range) => range.start(),
        };
        let (key, range) = (key.clone(), range.clone());
        Err(RequestError::KeyNotInRegion { region: self.id, key, range })
    }

    pub fn on_read(&mut self, request: ReadRequest) {
        match self.check_read(&request.context) {
            Ok(()) => self.reads.push(request),
            Err(error) => {
                let _ = request.reply.send(Err(error));
            }
        }
    }

    fn check_read(&self, context: &RequestContext) -> Result<(), RequestError> {
        self.check_here()?;
        let may_serve = self.is_leader() || context.replica_read;
        if !may_serve || self.life == Life::Retired {
            return Err(self.not_leader());
        }
        if self.reads.is_full() {
            let reason = format!("region {} has too many reads waiting", self.id);
            return Err(RequestError::ServerIsBusy { reason });
        }
        self.check_peer(context.peer)?;
        self.check_range(context.epoch)
    }

    /// Whether the region is here at all.
    pub(super) fn check_here(&self) -> Result<(), RequestError> {
        if self.is_initialized() && !self.is_destroying() {
            Ok(())
        } else {
            Err(RequestError::RegionNotFound(self.id))
        }
    }

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
            Err(RequestError::epoch_not_match(&self.descriptor))
        }
    }

    pub(super) fn not_leader(&self) -> RequestError {
        // A leader that this one follows in the current term; a guess would send
        // clients back and forth.
        let leader = self.leader().filter(|leader| leader.id != self.me.id);
        RequestError::NotLeader { region: self.id, leader }
    }

    /// Proposes what waits, as far as there is room in the log's backlog besides `beside` bytes.
    pub(super) fn propose_waiting(&mut self, now: Time, shared: &Shared, beside: usize) {
        if !self.writes.is_waiting() {
            return;
        }
        // They may have waited while the region was split, or got another leader.
        let (descriptor, term) = (&self.descriptor, self.group.term());
        let not_leader = (!self.is_leader()).then(|| self.not_leader());
        self.writes.refuse(|request| {
            if not_leader.is_some() {
                return not_leader.clone();
            }
            let RequestContext { epoch, term: wanted, .. } = request.context;
            if wanted.is_some_and(|wanted| wanted != term) {
                return Some(RequestError::StaleCommand(descriptor.id));
            }
            if broken!(StaleRequestIsRefused) {
                return None;
            }
            let fits = epoch.is_same_range(descriptor.epoch) || broken!(HeldWriteIsCheckedAgain);
            (!fits).then(|| RequestError::epoch_not_match(descriptor))
        });
        let has_room = |peer: &Peer, handed: usize| {
            peer.log.has_room_beside(handed, &shared.config)
                && shared.log_backlog.has_room_beside(beside + handed)
        };
        if !has_room(self, 0) {
            return;
        }
        let mut batches = self.writes.take_batches();
        let mut handed = 0;
        while has_room(self, handed)
            && let Some((write, waiters, bytes)) = batches.next()
        {
            let command = self.command(Body::Write(write));
            self.propose(now, command, Waiters::Write(waiters));
            handed += bytes;
        }
        self.writes.put_back(batches);
    }

    /// A command for the region as it is now.
    pub(super) fn command(&self, body: Body) -> Command {
        Command { epoch: self.descriptor.epoch, body }
    }

    pub(super) fn propose(
        &mut self,
        now: Time,
        command: Command,
        waiters: Waiters,
    ) -> Option<LogIndex> {
        let outcome = self.group.propose(now, command.encode());
        self.await_outcome(outcome, waiters)
    }

    /// Keeps who waits for an entry that the group has taken, and returns its index. Tells them
    /// why, where the group has refused it.
    pub(super) fn await_outcome(
        &mut self,
        outcome: Result<(LogIndex, Term), ProposeError>,
        waiters: Waiters,
    ) -> Option<LogIndex> {
        match outcome {
            Ok((index, term)) => {
                self.writes.await_outcome(index, term, waiters);
                Some(index)
            }
            Err(refused) => {
                waiters.fail(&writes::refusal(self.id, &refused, || self.not_leader()));
                None
            }
        }
    }

    pub(super) fn confirm_waiting_reads(&mut self, now: Time) {
        let Some((number, reads)) = self.reads.next_round() else { return };
        match self.group.read_index(now, number) {
            Ok(()) => self.reads.await_confirmation(number, reads),
            Err(_) => self.refuse_reads(reads),
        }
    }

    pub(super) fn refuse_reads(&self, reads: Vec<ReadRequest>) {
        let error = if self.is_leader() || self.leader().is_none() {
            RequestError::ReadIndexNotReady(self.id)
        } else {
            self.not_leader()
        };
        for read in reads {
            // A leader that lost its place says so; a follower asked for a
            // replica read may be asked again.
            let _ = read.reply.send(Err(error.clone()));
        }
    }
}
