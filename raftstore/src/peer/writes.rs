//! Writes and other commands between their request and the apply worker: what waits for this
//! turn's entries, and what waits for the outcome of an entry.

use std::collections::VecDeque;
use std::iter::Peekable;

use esker_model::RegionId;
use esker_mutants::broken;
use esker_raft::{Entries, Entry, LogIndex, ProposeError, Term};

use crate::command::{Mutation, TaggedCommand, Write};
use crate::config::{MAX_BATCHED_ENTRY_BYTES, MAX_WAITING_PROPOSALS};
use crate::error::RequestError;
use crate::message::{Proposal, Waiter, Waiters, WriteRequest};

pub struct Writes {
    region: RegionId,
    /// Writes that are not proposed yet, each checked against the region when it came, and again
    /// when it is proposed: it may wait until the log writer has room. Their bytes are taken from
    /// the store's budget, and their number counts with that of the proposals.
    waiting: Vec<WriteRequest>,
    /// Entries of this peer whose outcome somebody waits for. Their terms never fall, and within
    /// a term their indexes rise. From one term to the next the indexes may fall. An entry is
    /// added when the group has taken it. It leaves
    ///
    /// - with the committed entry of the same index and term, to the apply worker;
    /// - with a committed entry which shows that it can never be committed;
    /// - when a snapshot covers it, or the peer ends: nobody can tell what became of it.
    ///
    /// Every waiter is answered once. No more writes are taken when there are
    /// [`MAX_WAITING_PROPOSALS`].
    proposals: VecDeque<Proposal>,
    /// A split that this peer has proposed since it became the leader, and has not applied yet.
    /// Another store may apply it first and let the new region be written there: until it is
    /// applied here, this leader answers no reads under its lease, and proposes no other split.
    splitting: Option<LogIndex>,
}

impl Writes {
    pub fn new(region: RegionId) -> Self {
        Writes { region, waiting: Vec::new(), proposals: VecDeque::new(), splitting: None }
    }

    /// Whether more than enough wait for their outcome.
    pub fn is_full(&self) -> bool {
        self.proposals.len() + self.waiting.len() >= MAX_WAITING_PROPOSALS
    }

    /// Takes a write that has been checked.
    pub fn push(&mut self, request: WriteRequest) {
        self.waiting.push(request);
    }

    pub fn is_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Refuses those of the writes that waited which do not fit any more.
    pub fn refuse(&mut self, why: impl Fn(&WriteRequest) -> Option<RequestError>) {
        if self.waiting.iter().all(|request| why(request).is_none()) {
            return;
        }
        for request in std::mem::take(&mut self.waiting) {
            match why(&request) {
                None => self.waiting.push(request),
                Some(error) => {
                    // A caller that is gone needs no answer.
                    let _ = request.reply.send(Err(error));
                }
            }
        }
    }

    /// Everything that waits: as few entries as their size allows.
    pub fn take_batches(&mut self) -> Batches {
        Batches(std::mem::take(&mut self.waiting).into_iter().peekable())
    }

    /// For what is left there is no room.
    pub fn put_back(&mut self, left: Batches) {
        self.waiting = left.0.collect();
    }

    /// The group has taken an entry for which somebody waits.
    pub fn await_outcome(&mut self, index: LogIndex, term: Term, waiters: Waiters) {
        self.proposals.push_back(Proposal { index, term, waiters });
    }

    /// The proposals among the committed entries, for the apply worker to answer. Fails those that
    /// can never be committed any more.
    pub fn take_committed(&mut self, committed: &Entries) -> Vec<Proposal> {
        let mut taken = Vec::new();
        for entry in committed {
            self.fail_superseded(entry);
            if self.proposals.front().is_some_and(|front| is_proposed_as(front, entry)) {
                taken.extend(self.proposals.pop_front());
            }
        }
        taken
    }

    /// Fails what can never be committed any more: a committed entry of a later
    /// term means that nothing of an earlier one follows it in any log to come.
    ///
    /// It stops at the first proposal that may still follow the committed entry. The proposals
    /// behind that one are of the same term with higher indexes, or of later terms, so none of
    /// them is the committed entry. One of a later term may be dead, if its index is taken now.
    /// It waits until the proposal that was stopped at is committed or fails.
    fn fail_superseded(&mut self, committed: &Entry) {
        while let Some(front) = self.proposals.front() {
            if front.term >= committed.term && front.index > committed.index {
                break;
            }
            if is_proposed_as(front, committed) {
                break;
            }
            if let Some(dead) = self.proposals.pop_front() {
                dead.fail(&RequestError::StaleCommand(self.region));
            }
        }
    }

    /// A snapshot, whose last entry is of `term`, takes the place of the log up to `index`. What
    /// became of the proposals there will not be known here. Those behind it that are of an earlier
    /// term are dead, because terms do not go back in a log. Every proposal is looked at: one of a
    /// later term may wait behind one with a higher index, which another leader has cut off.
    pub fn replaced_up_to(&mut self, index: LogIndex, term: Term) {
        let outcome = if broken!(SkippedProposalIsUnknown) {
            RequestError::StaleCommand(self.region)
        } else {
            RequestError::Undetermined(self.region)
        };
        for proposal in std::mem::take(&mut self.proposals) {
            if proposal.index <= index {
                proposal.fail(&outcome);
            } else if proposal.term < term {
                proposal.fail(&RequestError::StaleCommand(self.region));
            } else {
                self.proposals.push_back(proposal);
            }
        }
    }

    /// Answers everybody who waits. Proposals may still be committed by others.
    pub fn fail_all(&mut self, error: &RequestError) {
        let unknown = RequestError::Undetermined(self.region);
        let outcome = if broken!(RemovedPeersProposalIsUnknown) { error } else { &unknown };
        for proposal in self.proposals.drain(..) {
            proposal.fail(outcome);
        }
        for write in self.waiting.drain(..) {
            let _ = write.reply.send(Err(error.clone()));
        }
    }

    pub fn is_splitting(&self) -> bool {
        self.splitting.is_some()
    }

    /// The group has taken a split.
    pub fn split_proposed(&mut self, index: LogIndex) {
        self.splitting = Some(index);
    }

    /// A split is applied here, or was refused when it was to be applied.
    pub fn split_is_over(&mut self, index: LogIndex) {
        if self.splitting.is_some_and(|splitting| splitting <= index) {
            self.splitting = None;
        }
    }

    /// The leadership was won or lost: a split of an earlier term is no longer this peer's.
    pub fn forget_split(&mut self) {
        self.splitting = None;
    }
}

/// Writes that wait, as the entries that they become.
pub struct Batches(Peekable<std::vec::IntoIter<WriteRequest>>);

impl Iterator for Batches {
    /// What one entry holds, who waits for it, and its size.
    type Item = (Write, Vec<Waiter>, usize);

    fn next(&mut self) -> Option<Self::Item> {
        let first = self.0.next()?;
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
            waiters.push(Waiter { reply: request.reply, tagged: number, taken: request.taken });
            mutations.extend(request.mutations);
        };
        let alone = is_swap(&first);
        take(first);
        while !alone
            && let Some(next) = self.0.next_if(|next| {
                bytes + next.bytes <= MAX_BATCHED_ENTRY_BYTES
                    && next.context.term == term
                    && !is_swap(next)
            })
        {
            bytes += next.bytes;
            take(next);
        }
        metrics::histogram!("esker_commands_per_entry").record(waiters.len() as f64);
        Some((Write { mutations, tagged, now_s }, waiters, bytes))
    }
}

/// Whether the request decides on what it finds: it is alone in its entry.
fn is_swap(request: &WriteRequest) -> bool {
    request.mutations.iter().any(Mutation::is_swap) && !broken!(SwapIsAlone)
}

/// Whether a committed entry is the one that was proposed.
fn is_proposed_as(proposal: &Proposal, entry: &Entry) -> bool {
    proposal.index == entry.index
        && (proposal.term == entry.term || broken!(ProposalIsAnsweredByItsEntry))
}

/// A place among the mutations of one entry, of which there are as many as its size allows.
fn position(of: usize) -> u32 {
    u32::try_from(of).expect("an entry has fewer than 2^32 mutations")
}

/// What a client is told when the group does not take its command.
pub fn refusal(
    region: RegionId,
    refused: &ProposeError,
    not_leader: impl FnOnce() -> RequestError,
) -> RequestError {
    match refused {
        ProposeError::NotLeader { .. } => not_leader(),
        // The client waits a moment and asks again, perhaps the new leader.
        ProposeError::TransferInProgress { .. } => RequestError::NotLeader { region, leader: None },
        // Of its own size, so that it would be refused again.
        ProposeError::TooLarge { bytes, limit } => {
            RequestError::EntryTooLarge { region, size: *bytes as u64, limit: *limit as u64 }
        }
        other => RequestError::ServerIsBusy { reason: format!("region {region}: {other}") },
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use esker_engine::Cf;
    use esker_raft::Payload;
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;
    use tokio::sync::oneshot;
    use tokio::sync::oneshot::error::TryRecvError;

    use super::*;
    use crate::budget::Taken;
    use crate::command::{CompareAndSwap, Swap};
    use crate::message::{Answer, RequestContext, WriteResult};

    const REGION: RegionId = RegionId(7);

    fn write(mutation: Mutation, term: Option<Term>, bytes: usize) -> WriteRequest {
        let context = RequestContext { term, ..RequestContext::default() };
        let (reply, _) = oneshot::channel();
        let taken = Taken::nothing();
        WriteRequest { region: REGION, context, mutations: vec![mutation], bytes, taken, reply }
    }

    fn put() -> Mutation {
        Mutation::Put { cf: Cf::Default, key: "k".into(), value: Bytes::new() }
    }

    fn swap() -> Mutation {
        Mutation::CompareAndSwap(CompareAndSwap {
            cf: Cf::Default,
            key: "k".into(),
            expected: None,
            then: Swap::Delete,
            now_s: 0,
        })
    }

    /// How many commands are in each entry.
    fn entries(requests: Vec<WriteRequest>) -> Vec<usize> {
        let mut writes = Writes::new(REGION);
        requests.into_iter().for_each(|request| writes.push(request));
        let entries = writes.take_batches().map(|(_, waiters, _)| waiters.len()).collect();
        assert!(writes.take_batches().next().is_none(), "they are taken once");
        entries
    }

    #[test]
    fn writes_of_one_turn_share_an_entry_unless_they_are_large_or_disagree() {
        assert_eq!(entries(vec![]), [0; 0]);
        assert_eq!(entries((0..3).map(|_| write(put(), None, 10)).collect()), [3]);
        let half = MAX_BATCHED_ENTRY_BYTES / 2;
        assert_eq!(entries((0..3).map(|_| write(put(), None, half)).collect()), [2, 1]);
        let terms = [None, Some(Term(5)), Some(Term(5)), None];
        assert_eq!(entries(terms.into_iter().map(|t| write(put(), t, 10)).collect()), [1, 2, 1]);
        let swaps = [put(), put(), swap(), put()];
        assert_eq!(entries(swaps.into_iter().map(|m| write(m, None, 10)).collect()), [2, 1, 1]);
    }

    #[test]
    fn writes_that_waited_are_refused_if_they_do_not_fit_any_more_and_the_others_stay() {
        let mut writes = Writes::new(REGION);
        let mut answers = Vec::new();
        for term in [3, 4, 3] {
            let (reply, answer) = oneshot::channel();
            writes.push(WriteRequest { reply, ..write(put(), Some(Term(term)), 10) });
            answers.push(answer);
        }
        let stale = RequestError::StaleCommand(REGION);
        writes.refuse(|request| (request.context.term != Some(Term(4))).then(|| stale.clone()));
        assert_eq!(answers[0].try_recv().unwrap(), Err(stale.clone()));
        assert!(answers[1].try_recv().is_err(), "it waits");
        assert_eq!(answers[2].try_recv().unwrap(), Err(stale));
        assert_eq!(writes.take_batches().count(), 1);
        assert!(!writes.is_waiting());
    }

    /// Somebody waits for an entry of this index and term.
    fn propose(writes: &mut Writes, index: u64, term: u64) -> Answer<WriteResult> {
        let (reply, answer) = oneshot::channel();
        let waiters = Waiters::Write(vec![Waiter { reply, tagged: None, taken: Taken::nothing() }]);
        writes.await_outcome(LogIndex(index), Term(term), waiters);
        answer
    }

    fn committed(index: u64, term: u64) -> Entries {
        let entry = Entry { index: LogIndex(index), term: Term(term), payload: Payload::Noop };
        vec![entry].into()
    }

    #[test]
    fn a_proposal_is_answered_by_what_is_committed_in_its_place() {
        let mut writes = Writes::new(REGION);
        let mut answers: Vec<_> = (8..=10).map(|index| propose(&mut writes, index, 3)).collect();
        assert_eq!(writes.take_committed(&committed(7, 3)).len(), 0);
        let taken = writes.take_committed(&committed(8, 3));
        assert_eq!(taken.iter().map(|proposal| proposal.index.0).collect::<Vec<_>>(), [8]);
        assert!(answers[0].try_recv().is_err(), "the apply worker answers it");
        // Another leader's entry: what this one had behind it is gone from every log.
        assert_eq!(writes.take_committed(&committed(9, 4)).len(), 0);
        for answer in &mut answers[1..] {
            assert_eq!(answer.try_recv().unwrap(), Err(RequestError::StaleCommand(REGION)));
        }
    }

    #[test]
    fn nobody_knows_what_became_of_a_proposal_that_a_snapshot_covers() {
        let mut writes = Writes::new(REGION);
        let mut covered = propose(&mut writes, 8, 3);
        let mut later = propose(&mut writes, 9, 3);
        writes.replaced_up_to(LogIndex(8), Term(3));
        assert_eq!(covered.try_recv().unwrap(), Err(RequestError::Undetermined(REGION)));
        assert!(later.try_recv().is_err(), "it may still be committed");
        writes.fail_all(&RequestError::RegionNotFound(REGION));
        assert_eq!(later.try_recv().unwrap(), Err(RequestError::Undetermined(REGION)));
    }

    #[test]
    fn a_snapshot_covers_a_proposal_that_waits_behind_one_with_a_higher_index() {
        let mut writes = Writes::new(REGION);
        // Another leader cut off what this peer had proposed in term 3. Then it led again. Nothing
        // need be committed for the answer: the region may be idle.
        let mut lost = propose(&mut writes, 12, 3);
        let mut covered = propose(&mut writes, 9, 5);
        writes.replaced_up_to(LogIndex(10), Term(5));
        assert_eq!(covered.try_recv().unwrap(), Err(RequestError::Undetermined(REGION)));
        assert_eq!(lost.try_recv().unwrap(), Err(RequestError::StaleCommand(REGION)));
    }

    /// A log that comes to be, with a snapshot in the place of a part of it, and what a peer of it
    /// has proposed in the terms in which it led: the log has the beginning of what was proposed
    /// in such a term, or nothing of it.
    #[test]
    fn nobody_is_told_that_a_write_without_effect_had_one_or_the_reverse() {
        for seed in 0..2_000 {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            let mut writes = Writes::new(REGION);
            let (mut log, mut answers) = (Vec::new(), Vec::new());
            for term in 1..=6 {
                let (kept, cut_off) = (rng.random_range(0..4), rng.random_range(0..4));
                let before = if kept > 0 { log.len() } else { rng.random_range(0..=log.len() + 3) };
                if rng.random() {
                    for index in (before as u64 + 1..).take(kept + cut_off) {
                        answers.push((index, term, propose(&mut writes, index, term)));
                    }
                }
                log.extend(std::iter::repeat_n(term, kept));
            }
            let last = log.len() as u64;
            let before = rng.random_range(0..=last);
            let snapshot = rng.random_range(before..=last);
            let mut taken = Vec::new();
            for (index, term) in (1..).zip(&log) {
                if index == before + 1 {
                    let term = snapshot.checked_sub(1).map_or(0, |last| log[last as usize]);
                    writes.replaced_up_to(LogIndex(snapshot), Term(term));
                }
                if index <= before || index > snapshot {
                    let proposals = writes.take_committed(&committed(index, *term));
                    taken.extend(proposals.iter().map(|taken| (taken.index.0, taken.term.0)));
                }
            }
            for (index, term, mut answer) in answers {
                let happened = log.get(index as usize - 1) == Some(&term);
                let applied_here = happened && (index <= before || index > snapshot);
                let what = format!("seed {seed}, index {index} of term {term}");
                assert_eq!(taken.contains(&(index, term)), applied_here, "{what}");
                match answer.try_recv() {
                    Ok(Err(RequestError::StaleCommand(_))) => assert!(!happened, "{what}"),
                    Ok(Err(RequestError::Undetermined(_))) => assert!(index <= snapshot, "{what}"),
                    // The apply worker has it.
                    Err(TryRecvError::Closed) => assert!(applied_here, "{what}"),
                    Err(TryRecvError::Empty) => assert!(!happened, "{what}"),
                    Ok(other) => panic!("{what}: {other:?}"),
                }
            }
        }
    }
}
