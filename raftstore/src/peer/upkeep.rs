//! What a peer does without being asked, when it is time: elections and heartbeats, reports,
//! shortening the log, asking whether it is still a member.

use esker_model::RegionReport;
use esker_raft::Time;

use super::reports::Led;
use super::{Outputs, Peer, log};
use crate::command::Body;
use crate::config::StoreConfig;
use crate::error::StoreError;
use crate::state::bounds;
use crate::worker::Shared;

impl Peer {
    /// When this peer next has something to do without being asked.
    pub fn next_deadline(&self) -> Option<Time> {
        if self.is_destroying() {
            return None;
        }
        let leads = self.is_leader();
        let deadlines = [
            self.group.next_deadline(),
            leads.then(|| self.reports.deadline()),
            self.log.deadline(leads),
            (!leads && self.is_learner()).then(|| self.members.deadline()),
        ];
        deadlines.into_iter().flatten().min()
    }

    pub fn tick(&mut self, now: Time) {
        self.group.tick(now);
    }

    pub fn campaign(&mut self, now: Time) {
        self.group.campaign(now);
    }

    pub fn report_soon(&mut self) {
        self.reports.report_soon();
    }

    /// Reports and shortens the log when it is time.
    pub fn housekeep(
        &mut self,
        now: Time,
        shared: &Shared,
        out: &mut Outputs,
    ) -> Result<Option<RegionReport>, StoreError> {
        let Shared { kv, config, points, .. } = shared;
        if self.is_destroying() {
            return Ok(None);
        }
        if self.log.is_due(now, config) {
            if self.is_leader() {
                self.propose_truncation(now, config);
            }
            if let Some((index, term)) = self.log.truncate(points, self.applied, &mut out.log.batch)
            {
                self.group.compacted(index, term);
            }
        }
        if self.is_learner() && self.members.must_ask(now) {
            self.ask_for_membership(out);
        }
        if !self.is_leader() {
            return Ok(None);
        }
        let region =
            Led { group: &self.group, descriptor: &self.descriptor, applied: self.applied.index };
        if !self.reports.is_due(now, &region, config.region_report_interval) {
            return Ok(None);
        }
        let (start, end) = bounds(&self.descriptor.range);
        let size = kv.approximate_size(start, end)?;
        let read = self.delegate.take_read_load();
        Ok(Some(self.reports.report(now, &region, self.me, read, size)))
    }

    /// Proposes that everybody may forget the log up to what all useful followers hold.
    fn propose_truncation(&mut self, now: Time, config: &StoreConfig) {
        let dispensable = log::dispensable(&self.group, &self.log, self.applied.index, config);
        let Some((index, term)) = dispensable else { return };
        let command = self.command(Body::Compact { index, term });
        // Nobody waits for it; a refusal is made good at the next look.
        let _ = self.group.propose(now, command.encode());
    }
}
