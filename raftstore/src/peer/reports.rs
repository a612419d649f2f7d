//! What placement is told of a region by the peer that leads it, and when.

use std::time::Duration;

use esker_model::{DownPeer, Peer as PeerMeta, Region, RegionReport, Traffic};
use esker_raft::{Group, LogIndex, PeerId, ProgressState, Time};

use super::log::GroupLog;
use crate::message::AppliedNotice;

/// How soon a leader looks again whether its pending peers have caught up.
const LOOK_AGAIN: Duration = Duration::from_millis(50);
/// The same when none of them answers: they may come back.
const LOOK_AT_SILENT: Duration = Duration::from_secs(1);
/// A peer is caught up when it lacks no more entries than may be on their way to it.
const CAUGHT_UP_WITHIN: u64 = 256;
/// How long a peer is silent before it is reported as down.
const DOWN_AFTER: Duration = Duration::from_secs(10);

pub struct Reports {
    /// When the region is reported next, if it is led here then. In the past after every change
    /// of the descriptor or of the leadership; one interval after the last report otherwise.
    next: Time,
    /// When to look whether the peers that were pending at the last look have caught
    /// up: placement's next step waits for that. `None` when there were none.
    next_look: Option<Time>,
    /// What entries have written here since the last report, or since this peer has led: for as
    /// long as another leads, that is another's to report.
    written_bytes: u64,
    written_keys: u64,
}

/// A region as its leader sees it.
pub struct Led<'a> {
    pub group: &'a Group<GroupLog>,
    pub descriptor: &'a Region,
    pub applied: LogIndex,
}

impl Reports {
    pub fn new(now: Time) -> Self {
        Reports { next: now, next_look: None, written_bytes: 0, written_keys: 0 }
    }

    /// There is news.
    pub fn report_soon(&mut self) {
        self.next = Time(0);
    }

    /// This peer has become the leader.
    pub fn begin_to_lead(&mut self) {
        self.written_bytes = 0;
        self.written_keys = 0;
    }

    pub fn count_writes(&mut self, notice: &AppliedNotice) {
        self.written_bytes += notice.written_bytes;
        self.written_keys += notice.written_keys;
    }

    /// When a leader has a report to make, or has to look whether it has.
    pub fn deadline(&self) -> Time {
        self.next_look.map_or(self.next, |look| look.min(self.next))
    }

    /// Whether it is time for a report; then the next time is set.
    pub fn is_due(&mut self, now: Time, region: &Led<'_>, interval: Duration) -> bool {
        if let Some(look) = self.next_look
            && now >= look
        {
            let (pending, look) = region.pending();
            self.next_look = look.map(|soon| now + soon);
            if pending.is_empty() {
                self.next = now;
            }
        }
        let due = now >= self.next;
        if due {
            self.next = now + interval;
        }
        due
    }

    /// The report. The counts of what was written begin again.
    pub fn report(
        &mut self,
        now: Time,
        region: &Led<'_>,
        leader: PeerMeta,
        (bytes_read, keys_read): (u64, u64),
        approximate_size: u64,
    ) -> RegionReport {
        let (pending, look) = region.pending();
        self.next_look = look.map(|soon| now + soon);
        RegionReport {
            region: region.descriptor.clone(),
            leader,
            term: Some(region.group.term()),
            down: region.down(now),
            pending,
            traffic: Traffic {
                bytes_written: std::mem::take(&mut self.written_bytes),
                bytes_read,
                keys_written: std::mem::take(&mut self.written_keys),
                keys_read,
            },
            approximate_size,
            // Not counted: it would cost a look at every file.
            approximate_keys: 0,
        }
    }
}

impl Led<'_> {
    /// Whether placement knows of this peer, and it is not the leader.
    fn is_follower(&self, peer: PeerId) -> bool {
        peer != self.group.id() && self.descriptor.peer(peer).is_some()
    }

    /// Peers that are not caught up, and how soon to look at them again.
    fn pending(&self) -> (Vec<PeerId>, Option<Duration>) {
        let first = self.group.first_index();
        let (mut pending, mut coming) = (Vec::new(), false);
        for (peer, progress) in self.group.progress() {
            if !self.is_follower(peer) {
                continue;
            }
            let matched = progress.match_index;
            if progress.state == ProgressState::Snapshot
                || matched.0 == 0
                || matched.next() < first
                || matched.0 + CAUGHT_UP_WITHIN < self.applied.0
            {
                pending.push(peer);
                coming |= progress.recently_active;
            }
        }
        let soon = if coming { LOOK_AGAIN } else { LOOK_AT_SILENT };
        let look = (!pending.is_empty()).then_some(soon);
        (pending, look)
    }

    fn down(&self, now: Time) -> Vec<DownPeer> {
        let mut down = Vec::new();
        for (peer, progress) in self.group.progress() {
            let silent = now - progress.last_ack;
            if silent > DOWN_AFTER && self.is_follower(peer) {
                down.push(DownPeer { peer, seconds: silent.as_secs() });
            }
        }
        down
    }
}
