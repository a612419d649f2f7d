//! What a leader knows about one other peer's log, and how much it may send.
//!
//! A peer is *probed* with one append at a time until its log is found to agree somewhere. Then
//! appends are *replicated* in a pipeline, without waiting for replies, up to a number of messages
//! and bytes. A peer that needs entries which are gone waits for a *snapshot*.

use std::collections::VecDeque;

use crate::message::Stamp;
use crate::rules::broken;
use crate::types::{LogIndex, Time};

/// A leader's view of one peer, for drivers and operators.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Progress {
    /// The end of the prefix that is durable at the peer and equal to the leader's log.
    pub match_index: LogIndex,
    /// The next index to send.
    pub next_index: LogIndex,
    /// How the peer is being served.
    pub state: ProgressState,
    /// When the leader last heard from the peer in this term, or the term's beginning.
    pub last_ack: Time,
    /// Whether `last_ack` is less than an election timeout ago.
    pub recently_active: bool,
}

/// How a peer is being served.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ProgressState {
    /// One append at a time, to find where the logs agree.
    Probe,
    /// Appends in a pipeline.
    Replicate,
    /// Waiting for a snapshot.
    Snapshot,
}

#[derive(Clone, Copy, Debug)]
enum State {
    Probe { waiting: bool },
    Replicate,
    Snapshot { delivered: bool },
}

/// Appends that have not been answered: their last indexes and sizes.
#[derive(Clone, Debug, Default)]
struct Inflight {
    messages: VecDeque<(LogIndex, usize)>,
    bytes: usize,
}

/// How much a peer may have in flight.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FlowLimits {
    pub messages: usize,
    pub bytes: usize,
}

/// The leader's record of one peer, itself included.
#[derive(Clone, Debug)]
pub(crate) struct Follow {
    match_index: LogIndex,
    next_index: LogIndex,
    state: State,
    /// The appends in the pipeline. Boxed, because most peers are idle.
    inflight: Option<Box<Inflight>>,
    /// The highest commit index that was sent to the peer in the pipeline.
    commit_sent: LogIndex,
    last_ack: Time,
    /// When `match_index` last rose.
    matched_at: Time,
    /// The send time of the latest message that the peer replied to, which leases count from. Zero
    /// if it replied to none.
    acked_sent: Time,
    /// The round of that message, which ReadIndex counts.
    acked_round: u64,
    /// An append without entries is due. The reply would reveal that earlier appends were lost.
    ping: bool,
}

impl Follow {
    pub fn new(next_index: LogIndex, now: Time) -> Self {
        Follow {
            match_index: LogIndex(0),
            next_index,
            state: State::Probe { waiting: false },
            inflight: None,
            commit_sent: LogIndex(0),
            last_ack: now,
            matched_at: now,
            acked_sent: Time(0),
            acked_round: 0,
            ping: false,
        }
    }

    pub fn match_index(&self) -> LogIndex {
        self.match_index
    }

    pub fn next_index(&self) -> LogIndex {
        self.next_index
    }

    pub fn last_ack(&self) -> Time {
        self.last_ack
    }

    pub fn acked_sent(&self) -> Time {
        self.acked_sent
    }

    pub fn acked_round(&self) -> u64 {
        self.acked_round
    }

    pub fn state(&self) -> ProgressState {
        match self.state {
            State::Probe { .. } => ProgressState::Probe,
            State::Replicate => ProgressState::Replicate,
            State::Snapshot { .. } => ProgressState::Snapshot,
        }
    }

    /// The peer replied to a message with this stamp. A reply to no particular message has the
    /// default stamp, which proves nothing about its age.
    #[inline]
    pub fn heard(&mut self, now: Time, round: u64, stamp: Stamp) {
        self.last_ack = self.last_ack.max(now);
        if stamp != Stamp::default() {
            // An echoed stamp cannot be later than now, nor name a later round.
            self.acked_sent = self.acked_sent.max(stamp.sent.min(now));
            self.acked_round = self.acked_round.max(stamp.round.min(round));
        } else if broken!(UnstampedProvesNoAge) {
            self.acked_sent = now;
            self.acked_round = round;
        }
    }

    /// Records the state of the leader's own disk, which counts like any other.
    pub fn own_log(&mut self, persisted: LogIndex, last: LogIndex) {
        self.match_index = self.match_index.max(persisted);
        self.next_index = last.next();
    }

    #[inline]
    pub fn may_send(&self, limits: FlowLimits) -> bool {
        match &self.state {
            State::Probe { waiting } => !waiting,
            State::Replicate => !self.is_full(limits),
            State::Snapshot { .. } => false,
        }
    }

    fn is_full(&self, limits: FlowLimits) -> bool {
        self.inflight.as_ref().is_some_and(|inflight| {
            inflight.messages.len() >= limits.messages || inflight.bytes >= limits.bytes
        })
    }

    /// Entries up to `last` (or none, if it is `None`) were put into a message.
    #[inline]
    pub fn sent(&mut self, last: Option<LogIndex>, bytes: usize, commit: LogIndex) {
        match &mut self.state {
            State::Probe { waiting } => *waiting = true,
            State::Replicate => {
                if let Some(last) = last {
                    let inflight = self.inflight.get_or_insert_default();
                    inflight.messages.push_back((last, bytes));
                    inflight.bytes += bytes;
                    self.next_index = last.next();
                }
                // Only in the pipeline: a probe may be refused, and then its commit index does not
                // count.
                self.told_commit(commit.min(self.next_index.prev()));
            }
            State::Snapshot { .. } => {}
        }
    }

    pub fn told_commit(&mut self, commit: LogIndex) {
        self.commit_sent = self.commit_sent.max(commit);
    }

    /// Whether a peer in the pipeline has been sent the entries up to `commit`, but not that they
    /// are committed.
    #[inline]
    pub fn lacks_commit(&self, commit: LogIndex) -> bool {
        // A peer that has not been sent the entry learns of the commit with the entries.
        matches!(self.state, State::Replicate)
            && commit > self.commit_sent
            && commit < self.next_index
    }

    /// The peer's log agrees up to `index`. Returns whether that is further than known before.
    #[inline]
    pub fn accepted(&mut self, now: Time, index: LogIndex, first_index: LogIndex) -> bool {
        let news = index > self.match_index;
        if news {
            self.match_index = index;
            self.matched_at = now;
        }
        self.next_index = self.next_index.max(self.match_index.next());
        match self.state {
            State::Probe { .. } => {
                self.next_index = self.match_index.next();
                self.pipeline();
            }
            State::Replicate => {
                if let Some(inflight) = &mut self.inflight {
                    inflight.answered(index);
                }
            }
            State::Snapshot { .. } => {
                // However the peer got its entries, the log continues what it has now.
                if self.match_index.next() >= first_index {
                    self.next_index = self.match_index.next();
                    self.pipeline();
                }
            }
        }
        news
    }

    fn pipeline(&mut self) {
        self.state = State::Replicate;
        self.inflight = None;
    }

    /// If the refusal of an append after `prev` proves that the peer has lost entries that it
    /// acknowledged, returns the last index that it acknowledged. A refusal proves that only if the
    /// append was sent after the acknowledgement had come.
    pub fn has_lost(&self, prev: LogIndex, stamp: Stamp) -> Option<LogIndex> {
        let lost = prev <= self.match_index && stamp.sent > self.matched_at;
        lost.then_some(self.match_index)
    }

    /// The peer refused an append after `prev`; the logs may agree at `hint`. Returns `false` if
    /// the refusal is an old one.
    pub fn rejected(&mut self, prev: LogIndex, hint: LogIndex) -> bool {
        match &mut self.state {
            State::Replicate if prev <= self.match_index => return false,
            State::Probe { .. } if prev != self.next_index.prev() => return false,
            State::Snapshot { .. } => return false,
            _ => {}
        }
        let lower = prev.min(hint.next());
        self.next_index = lower.max(self.match_index.next());
        self.state = State::Probe { waiting: false };
        true
    }

    /// The peer replied to a heartbeat, so a reply that the leader still waits for may be lost.
    pub fn nudged(&mut self, first_index: LogIndex, last: LogIndex, limits: FlowLimits) {
        match &mut self.state {
            State::Probe { waiting } => *waiting = false,
            State::Replicate => {
                if self.is_full(limits)
                    && let Some(inflight) = &mut self.inflight
                {
                    inflight.free_first();
                }
                self.ping = self.match_index < last;
            }
            State::Snapshot { delivered: true } => self.probe(first_index),
            State::Snapshot { delivered: false } => {}
        }
    }

    /// Whether an append without entries is due, once.
    pub fn take_ping(&mut self) -> bool {
        std::mem::take(&mut self.ping) && matches!(self.state, State::Replicate)
    }

    /// An append was lost or the peer went away, so the pipeline stops.
    pub fn lost(&mut self) {
        if matches!(self.state, State::Replicate) {
            self.next_index = self.match_index.next();
            self.state = State::Probe { waiting: false };
        }
    }

    pub fn needs_snapshot(&mut self) {
        self.state = State::Snapshot { delivered: false };
    }

    /// The snapshot arrived. The peer will reply to its installation as to an append.
    pub fn snapshot_delivered(&mut self) {
        if let State::Snapshot { delivered } = &mut self.state {
            *delivered = true;
        }
    }

    /// The snapshot was lost. The next reply to a heartbeat starts another attempt, so a peer that
    /// cannot take a snapshot costs at most one per heartbeat.
    pub fn snapshot_failed(&mut self) {
        if matches!(self.state, State::Snapshot { .. }) {
            self.next_index = self.match_index.next();
            self.state = State::Probe { waiting: true };
        }
    }

    fn probe(&mut self, first_index: LogIndex) {
        self.next_index = self.match_index.next().max(first_index);
        self.state = State::Probe { waiting: false };
    }

    pub fn shrink(&mut self) {
        self.inflight = self.inflight.take().filter(|inflight| !inflight.messages.is_empty());
    }
}

impl Inflight {
    fn answered(&mut self, index: LogIndex) {
        while self.messages.front().is_some_and(|(last, _)| *last <= index) {
            self.free_first();
        }
    }

    fn free_first(&mut self) {
        if let Some((_, bytes)) = self.messages.pop_front() {
            self.bytes -= bytes;
        }
    }
}
