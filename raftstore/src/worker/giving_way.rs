//! What a worker does while its store's disk is slower than those of the others: see [`crate::disk`].

use std::time::Duration;

use esker_raft::Time;

use super::Worker;
use crate::config::{DISK_PROBE, GIVE_WAY_AGAIN, HAND_OVER_NEXT, MAX_HANDED_OVER};
use crate::disk::Change;

/// What a worker has still to do while its store gives way.
pub(super) struct GivingWay {
    /// When it looks for regions that it still leads, or leads again because nobody else could.
    hand_over_at: Time,
    /// How long it waits after that.
    again: Duration,
    /// When it looks what has changed.
    pub look_at: Time,
}

impl Worker {
    /// Follows what is known of the disk: hands over this worker's regions where the disk is slow.
    pub(super) fn watch_disk(&mut self, now: Time) {
        let seen = std::mem::take(&mut self.out.disk);
        if let Some(change) = self.shared.disk.observe(now, seen) {
            self.tell_of_disk(change);
        }
        let gives_way = self.shared.disk.gives_way();
        match &mut self.giving_way {
            None if !gives_way => return,
            None => {
                let again = GIVE_WAY_AGAIN.0;
                self.giving_way =
                    Some(GivingWay { hand_over_at: now, again, look_at: now + DISK_PROBE });
            }
            Some(_) if !gives_way => {
                self.giving_way = None;
                for peer in self.peers.values_mut() {
                    peer.yield_elections(false);
                }
                return;
            }
            Some(giving) if now < giving.look_at => return,
            Some(giving) => giving.look_at = now + DISK_PROBE,
        }
        self.hand_regions_over(now);
        self.probe_disk();
    }

    fn hand_regions_over(&mut self, now: Time) {
        let Some(giving) = &mut self.giving_way else { return };
        if now < giving.hand_over_at {
            return;
        }
        let mut given = 0;
        for (region, peer) in &mut self.peers {
            if peer.is_handing_over() {
                peer.yield_elections(true);
            } else if given < MAX_HANDED_OVER && peer.give_way(now) {
                self.touched.insert(*region);
                given += 1;
            }
        }
        if given == MAX_HANDED_OVER {
            giving.hand_over_at = now + HAND_OVER_NEXT;
            giving.look_at = giving.hand_over_at;
        } else {
            giving.hand_over_at = now + giving.again;
            giving.again = (giving.again * 2).min(GIVE_WAY_AGAIN.1);
        }
        if given > 0 {
            let store = self.shared.store;
            tracing::warn!(%store, regions = given, "regions are handed over because of the slow disk");
            metrics::counter!("esker_store_leaders_given_up_total").increment(given as u64);
        }
    }

    /// Writes what is in the log already, if the log writer has nothing to do: a store that gives way
    /// has perhaps nothing else to write, and how long its disk takes must be seen.
    fn probe_disk(&mut self) {
        let disk = &self.shared.disk;
        if let Some((region, peer)) = self.peers.iter().next() {
            if disk.is_idle() {
                self.out.log.batch.put_state(region.0, &peer.raft_state().encode());
            }
        } else if self.shared.delegates.count() == 0
            && let Some(change) = disk.leads_nothing()
        {
            self.tell_of_disk(change);
        }
    }

    fn tell_of_disk(&self, change: Change) {
        let store = self.shared.store;
        match change {
            Change::Stalled(since) => tracing::warn!(
                %store,
                "the disk of the log has not answered for {since:?}, and those of other stores have: \
                 this store leads no regions until its disk is well"
            ),
            Change::Slow(takes) => tracing::warn!(
                %store,
                "a write of the log takes {takes:?} here, and less on other stores: this store leads no \
                 regions until its disk is well"
            ),
            Change::Well => tracing::warn!(%store, "the disk of the log is well again"),
        }
    }
}
