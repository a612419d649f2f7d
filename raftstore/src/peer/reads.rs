//! Reads that were not answered under a lease on the caller's thread, from the request until the
//! answer.
//!
//! A read passes through four places: it waits for the end of the turn, then for the leader's
//! confirmation, then for this replica to be far enough, then for the leader to be as far as the
//! view that was taken for it.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use esker_engine::{KvEngine, KvSnapshot};
use esker_model::{Region, RegionId};
use esker_mutants::broken;
use esker_raft::LogIndex;

use crate::config::MAX_WAITING_READS;
use crate::error::{RequestError, StoreError};
use crate::message::ReadRequest;
use crate::read::{ReadDelegate, RegionSnapshot};
use crate::state::{Applied, applied_in};

/// Every read is in one of the four places, and all together are at most [`MAX_WAITING_READS`].
/// Each is answered once.
pub struct Reads {
    /// Reads of this turn, which one confirmation will serve. Empty after every `collect`.
    waiting: Vec<ReadRequest>,
    /// Reads whose confirmation is under way, by the number under which the group was asked. The
    /// group names each number once: confirmed, or failed.
    confirming: HashMap<u64, Vec<ReadRequest>>,
    /// Larger than every number in `confirming`: none is used twice.
    next_number: u64,
    /// Reads with the index that they must see, in the order of their confirmation. After a
    /// `collect` the index of the first is not applied here yet, or a snapshot is being installed.
    confirmed: VecDeque<(LogIndex, Vec<ReadRequest>)>,
    /// A follower's reads, with a view that has what they must see, and how far
    /// that view is: they wait until the leader is known to be as far. A leader has none after a
    /// `collect`.
    ahead: VecDeque<(LogIndex, KvSnapshot, Vec<ReadRequest>)>,
    /// How far the leaders of this region are known to have applied. It only grows.
    leader_applied: LogIndex,
}

impl Reads {
    pub fn new() -> Self {
        Reads {
            waiting: Vec::new(),
            confirming: HashMap::new(),
            next_number: 1,
            confirmed: VecDeque::new(),
            ahead: VecDeque::new(),
            leader_applied: LogIndex(0),
        }
    }

    pub fn is_full(&self) -> bool {
        let confirming: usize = self.confirming.values().map(Vec::len).sum();
        let confirmed: usize = self.confirmed.iter().map(|(_, reads)| reads.len()).sum();
        let ahead: usize = self.ahead.iter().map(|(_, _, reads)| reads.len()).sum();
        self.waiting.len() + confirming + confirmed + ahead >= MAX_WAITING_READS
    }

    /// Takes a read that has been checked.
    pub fn push(&mut self, request: ReadRequest) {
        self.waiting.push(request);
    }

    /// The reads of this turn, and the number under which the group is asked to confirm them.
    pub fn next_round(&mut self) -> Option<(u64, Vec<ReadRequest>)> {
        if self.waiting.is_empty() {
            return None;
        }
        let number = self.next_number;
        self.next_number += 1;
        Some((number, std::mem::take(&mut self.waiting)))
    }

    /// The group was asked to confirm these.
    pub fn await_confirmation(&mut self, number: u64, reads: Vec<ReadRequest>) {
        self.confirming.insert(number, reads);
    }

    /// The reads of this number must see what is applied up to `index`.
    pub fn confirmed(&mut self, number: u64, index: LogIndex) {
        if let Some(reads) = self.confirming.remove(&number) {
            self.confirmed.push_back((index, reads));
        }
    }

    /// The reads of this number cannot be confirmed; the caller refuses them.
    pub fn take_failed(&mut self, number: u64) -> Option<Vec<ReadRequest>> {
        self.confirming.remove(&number)
    }

    /// Reads that wait for this replica or for its leader; the caller refuses them.
    pub fn take_confirmed(&mut self) -> Vec<ReadRequest> {
        let confirmed = self.confirmed.drain(..).map(|(_, reads)| reads);
        confirmed.chain(self.ahead.drain(..).map(|(_, _, reads)| reads)).flatten().collect()
    }

    /// The region's leader says how far it has applied.
    pub fn leader_is_at(&mut self, index: LogIndex) {
        self.leader_applied = self.leader_applied.max(index);
    }

    /// Takes views for the reads for which this replica, which has applied so much, is far enough.
    /// Not to be called while a snapshot replaces the data.
    pub fn take_views(
        &mut self,
        kv: &KvEngine,
        region: RegionId,
        applied: Applied,
    ) -> Result<(), StoreError> {
        let mut shared = None;
        let is_far_enough = |index: LogIndex| index <= applied.index || broken!(ConfirmedReadWaits);
        while self.confirmed.front().is_some_and(|(index, _)| is_far_enough(*index)) {
            let Some((_, reads)) = self.confirmed.pop_front() else { break };
            let (view, index) = match &shared {
                Some((view, index)) => (view, *index),
                None => {
                    // The view may be further than this peer has been told.
                    let view = kv.snapshot();
                    let applied = match applied_in(&view, region)? {
                        Some(seen) if !broken!(ViewTellsHowFarItIs) => seen,
                        _ => applied,
                    };
                    let (view, index) = shared.insert((view, applied.index));
                    (&*view, *index)
                }
            };
            self.ahead.push_back((index, view.clone(), reads));
        }
        Ok(())
    }

    /// Answers reads whose view is no further than the leader, which this peer may be.
    ///
    /// It matters on a follower, which may have applied more than its leader has. A
    /// reader who saw that here and then asked the leader, who reads under a lease
    /// from what it has applied, would see time run backwards.
    pub fn answer(&mut self, leads: bool, descriptor: &Arc<Region>, delegate: &Arc<ReadDelegate>) {
        let may_show = |index: LogIndex, leader: LogIndex| {
            leads || index <= leader || broken!(FollowerReadsNoFurtherThanLeader)
        };
        while let Some((index, ..)) = self.ahead.front()
            && may_show(*index, self.leader_applied)
        {
            let Some((_, view, reads)) = self.ahead.pop_front() else { break };
            for read in reads {
                let answer = if read.context.epoch.is_same_range(descriptor.epoch) {
                    Ok(RegionSnapshot::new(view.clone(), descriptor.clone(), delegate.clone()))
                } else {
                    Err(RequestError::epoch_not_match(descriptor))
                };
                let _ = read.reply.send(answer);
            }
        }
    }

    /// Ends all reads that wait.
    pub fn fail_all(&mut self, error: &RequestError) {
        let waiting = self
            .waiting
            .drain(..)
            .chain(self.confirming.drain().flat_map(|(_, reads)| reads))
            .chain(self.confirmed.drain(..).flat_map(|(_, reads)| reads))
            .chain(self.ahead.drain(..).flat_map(|(_, _, reads)| reads));
        for read in waiting {
            let _ = read.reply.send(Err(error.clone()));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use esker_engine::{EngineOptions, KvBatch, MemoryEnv};
    use esker_model::{Epoch, KeyRange, PeerId, Term};
    use tokio::sync::oneshot;

    use super::*;
    use crate::message::RequestContext;
    use crate::state::put_applied;

    const REGION: RegionId = RegionId(7);

    #[test]
    fn a_followers_read_waits_for_the_leader_when_its_view_is_further_than_its_peer_was_told() {
        let options = EngineOptions::in_memory(MemoryEnv::new());
        let kv = KvEngine::open(Path::new("/kv"), &options).unwrap();
        let at = |index| Applied { index: LogIndex(index), term: Term(5) };
        // The apply worker is at 9, and has told the peer of 8.
        let mut batch = KvBatch::new();
        put_applied(&mut batch, REGION, at(9));
        kv.write(&batch).unwrap();
        let epoch = Epoch::FIRST;
        let region = Region { id: REGION, range: KeyRange::all(), epoch, peers: Vec::new() };
        let region = Arc::new(region);
        let delegate = Arc::new(ReadDelegate::new(region.clone(), PeerId(1)));
        let mut reads = Reads::new();
        let (reply, mut answer) = oneshot::channel();
        let context = RequestContext { epoch, ..RequestContext::default() };
        reads.push(ReadRequest { region: REGION, context, reply });
        let (number, round) = reads.next_round().unwrap();
        reads.await_confirmation(number, round);
        reads.confirmed(number, LogIndex(8));
        reads.take_views(&kv, REGION, at(8)).unwrap();
        reads.leader_is_at(LogIndex(8));
        reads.answer(false, &region, &delegate);
        assert!(answer.try_recv().is_err(), "the leader may not show this yet");
        reads.leader_is_at(LogIndex(9));
        reads.answer(false, &region, &delegate);
        assert!(answer.try_recv().unwrap().is_ok());
    }
}
