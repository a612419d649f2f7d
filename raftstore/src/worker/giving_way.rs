//! What a worker does while its store's disk is slower than those of the others: see [`crate::disk`].

use std::time::Duration;

use esker_raft::{ReadyNumber, Time};

use super::Worker;
use crate::config::{DISK_PROBE, GIVE_WAY_AGAIN};
use crate::disk::Change;
use crate::message::Persisted;

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
                    peer.give_way(now, false);
                }
                return;
            }
            Some(giving) if now < giving.look_at => return,
            Some(giving) => giving.look_at = now + DISK_PROBE,
        }
        self.hand_regions_over(now);
        self.probe_disk(now);
    }

    fn hand_regions_over(&mut self, now: Time) {
        let Some(giving) = &mut self.giving_way else { return };
        if now < giving.hand_over_at {
            return;
        }
        let mut leads = 0_u64;
        for (region, peer) in &mut self.peers {
            if peer.give_way(now, true) {
                self.touched.insert(*region);
                leads += 1;
            }
        }
        giving.hand_over_at = now + giving.again;
        giving.again = (giving.again * 2).min(GIVE_WAY_AGAIN.1);
        if leads > 0 {
            let store = self.shared.store;
            tracing::warn!(%store, regions = leads, "regions are handed over because of the slow disk");
            metrics::counter!("esker_store_leaders_given_up_total").increment(leads);
        }
    }

    /// Writes what is in the log already, if it is time and no other worker has done so.
    fn probe_disk(&mut self, now: Time) {
        let Some((region, peer)) = self.peers.iter().next() else { return };
        if !self.shared.disk.must_probe(now) {
            return;
        }
        self.out.log.batch.put_state(region.0, &peer.raft_state().encode());
        // It is of no generation of this peer: only the time that it takes counts.
        self.out.log.persisted.push(Persisted {
            region: *region,
            generation: 0,
            number: ReadyNumber(0),
            since: now,
            messages: Vec::new(),
        });
    }

    fn tell_of_disk(&self, change: Change) {
        let store = self.shared.store;
        match change {
            Change::Stalled(since) => tracing::warn!(
                %store,
                "the disk of the log has not answered for {since:?}, and those of other stores have: \
                 this store leads no regions until its disk is well"
            ),
            Change::Slow(behind) => tracing::warn!(
                %store,
                "the disk of the log is {behind:?} slower than those of other stores: this store \
                 leads no regions until its disk is well"
            ),
            Change::Well => tracing::warn!(%store, "the disk of the log is well again"),
        }
    }
}
