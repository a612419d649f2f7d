//! ReadIndex: reads that are linearizable without a clock and without an entry
//! (dissertation §6.4).
//!
//! A leader notes its commit index and asks every follower once whether it
//! still follows. When a quorum has confirmed that, the index is as fresh as
//! the read. All reads that wait share a round. A read that comes while a round
//! is under way waits for the next round, because replies of the current round
//! may be older than the read. Followers pass their reads on to the leader,
//! also in batches.

use std::collections::VecDeque;

use thiserror::Error;

use crate::types::{LogIndex, PeerId, Time};

/// Reads that may wait for one group.
pub const MAX_PENDING_READS: usize = 1 << 16;

/// Rounds that may be under way at once.
pub const MAX_READ_ROUNDS: usize = 8;

/// Why a read was refused at once.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum ReadError {
    /// There is no leader to ask.
    #[error("peer {peer} knows no leader to confirm a read with")]
    NoLeader {
        /// The peer.
        peer: PeerId,
    },
    /// A witness has no data to read.
    #[error("peer {peer} is a witness and holds no data to read")]
    Witness {
        /// The peer.
        peer: PeerId,
    },
    /// Too many reads are waiting.
    #[error("{MAX_PENDING_READS} reads are waiting at peer {peer} already")]
    TooMany {
        /// The peer.
        peer: PeerId,
    },
}

/// The origin of a read that waits for an index.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Reader {
    /// The driver, under its own id.
    Here(u64),
    /// A batch of a follower's reads.
    There { peer: PeerId, batch: u64 },
}

#[derive(Debug)]
struct Round {
    number: u64,
    index: LogIndex,
    readers: Vec<Reader>,
}

/// The leader's side. Boxed, because most groups have no reads that wait.
#[derive(Debug, Default)]
pub(crate) struct ReadRounds(Option<Box<Rounds>>);

#[derive(Debug, Default)]
struct Rounds {
    waiting: Vec<Reader>,
    under_way: VecDeque<Round>,
    pending: usize,
}

impl ReadRounds {
    pub fn is_full(&self) -> bool {
        self.0.as_ref().is_some_and(|rounds| rounds.pending >= MAX_PENDING_READS)
    }

    pub fn add(&mut self, reader: Reader) {
        let rounds = self.0.get_or_insert_default();
        rounds.pending += 1;
        rounds.waiting.push(reader);
    }

    pub fn is_idle(&self) -> bool {
        self.0.as_ref().is_none_or(|rounds| rounds.pending == 0)
    }

    /// Whether reads wait for a new round and it may begin.
    pub fn may_begin(&self) -> bool {
        self.0.as_ref().is_some_and(|rounds| {
            !rounds.waiting.is_empty() && rounds.under_way.len() < MAX_READ_ROUNDS
        })
    }

    pub fn begin(&mut self, number: u64, index: LogIndex) {
        let rounds = self.0.get_or_insert_default();
        let readers = std::mem::take(&mut rounds.waiting);
        rounds.under_way.push_back(Round { number, index, readers });
    }

    /// Ends round `number` and every earlier one, because a quorum has
    /// confirmed them.
    pub fn confirmed(&mut self, number: u64, mut answer: impl FnMut(Reader, LogIndex)) {
        let Some(rounds) = &mut self.0 else { return };
        while let Some(round) = rounds.under_way.pop_front_if(|round| round.number <= number) {
            rounds.pending -= round.readers.len();
            round.readers.into_iter().for_each(|reader| answer(reader, round.index));
        }
    }

    /// The ids of this peer's reads, when leadership is lost.
    pub fn into_ids(self) -> impl Iterator<Item = u64> {
        let rounds = self.0.map(|rounds| *rounds).unwrap_or_default();
        let under_way = rounds.under_way.into_iter().flat_map(|round| round.readers);
        under_way.chain(rounds.waiting).filter_map(|reader| match reader {
            Reader::Here(id) => Some(id),
            Reader::There { .. } => None,
        })
    }

    pub fn shrink(&mut self) {
        self.0 = self.0.take().filter(|rounds| rounds.pending > 0);
    }
}

#[derive(Debug)]
struct Batch {
    number: u64,
    expires: Time,
    ids: Vec<u64>,
}

/// The follower's side. Boxed for the same reason.
#[derive(Debug, Default)]
pub(crate) struct ForwardedReads(Option<Box<Forwarded>>);

#[derive(Debug, Default)]
struct Forwarded {
    waiting: Vec<u64>,
    batches: VecDeque<Batch>,
    pending: usize,
}

impl ForwardedReads {
    pub fn is_full(&self) -> bool {
        self.0.as_ref().is_some_and(|reads| reads.pending >= MAX_PENDING_READS)
    }

    pub fn add(&mut self, id: u64) {
        let reads = self.0.get_or_insert_default();
        reads.pending += 1;
        reads.waiting.push(id);
    }

    pub fn has_waiting(&self) -> bool {
        self.0.as_ref().is_some_and(|reads| !reads.waiting.is_empty())
    }

    pub fn begin(&mut self, number: u64, expires: Time) {
        let reads = self.0.get_or_insert_default();
        let ids = std::mem::take(&mut reads.waiting);
        reads.batches.push_back(Batch { number, expires, ids });
    }

    /// The ids in batch `number`; empty if the batch was answered before.
    pub fn answered(&mut self, number: u64) -> Vec<u64> {
        let Some(reads) = &mut self.0 else { return Vec::new() };
        let Some(at) = reads.batches.iter().position(|batch| batch.number == number) else {
            return Vec::new();
        };
        let ids = reads.batches.remove(at).map_or(Vec::new(), |batch| batch.ids);
        reads.pending -= ids.len();
        ids
    }

    /// When the oldest batch expires.
    pub fn deadline(&self) -> Option<Time> {
        self.0.as_ref()?.batches.front().map(|batch| batch.expires)
    }

    /// The ids of expired batches: their request or reply must have been lost.
    pub fn expired(&mut self, now: Time) -> Vec<u64> {
        let mut ids = Vec::new();
        let Some(reads) = &mut self.0 else { return ids };
        while let Some(batch) = reads.batches.pop_front_if(|batch| batch.expires <= now) {
            ids.extend(batch.ids);
        }
        reads.pending -= ids.len();
        ids
    }

    /// All ids, when there is no longer a leader that could answer.
    pub fn into_ids(self) -> impl Iterator<Item = u64> {
        let all = self.0.map(|reads| *reads).unwrap_or_default();
        all.batches.into_iter().flat_map(|batch| batch.ids).chain(all.waiting)
    }

    pub fn shrink(&mut self) {
        self.0 = self.0.take().filter(|reads| reads.pending > 0);
    }
}
