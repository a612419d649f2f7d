//! What the store's other parts have done of what the group wanted.

use esker_model::Region;
use esker_mutants::broken;
use esker_raft::{ConfChange, ReadyNumber, SnapshotMeta, Time};

use super::{Outputs, Peer};
use crate::error::StoreError;
use crate::message::{AppliedNotice, Effect};
use crate::region::configuration;
use crate::state::Applied;

impl Peer {
    pub fn on_persisted(&mut self, now: Time, number: ReadyNumber) {
        self.log.written(number);
        self.group.persisted(now, number);
    }

    /// Entries are applied. Effects on the region's shape are the worker's to carry out first.
    pub fn on_applied(&mut self, notice: &AppliedNotice) {
        self.applied = notice.applied;
        self.reports.count_writes(notice);
        for effect in &notice.effects {
            match effect {
                Effect::MayTruncate { index, term } => self.log.may_truncate(*index, *term),
                Effect::SplitRefused { .. } if broken!(RefusedSplitIsOver) => {}
                Effect::Split { index, .. } | Effect::SplitRefused { index } => {
                    self.writes.split_is_over(*index);
                }
                Effect::Changed { .. } | Effect::ChangeRefused { .. } => {}
            }
        }
        self.group.applied(notice.applied.index);
    }

    /// A split of this region is applied, of which this is the part that keeps the id.
    pub fn on_split(&mut self, descriptor: Region) {
        self.set_descriptor(descriptor);
    }

    /// A change of members is applied. Returns whether this peer is still a member.
    pub fn on_changed(
        &mut self,
        now: Time,
        change: &ConfChange,
        descriptor: Region,
    ) -> Result<bool, StoreError> {
        let members = self.group.apply_change(now, change).map_err(|e| StoreError::Corrupt {
            what: format!("a change of members of region {}", self.id),
            why: e.to_string(),
        })?;
        assert_eq!(
            members,
            configuration(&descriptor),
            "the descriptor of region {} and its Raft configuration must say the same",
            self.id
        );
        self.set_descriptor(descriptor);
        match self.descriptor.peer(self.me.id).copied() {
            Some(me) => {
                self.me = me;
                Ok(true)
            }
            None => Ok(false),
        }
    }

    pub fn on_change_refused(&mut self) {
        self.group.ignore_change();
    }

    /// The snapshot's data is in place; what the log still holds is obsolete.
    pub fn on_installed(
        &mut self,
        now: Time,
        descriptor: Region,
        meta: &SnapshotMeta,
        out: &mut Outputs,
    ) {
        self.snapshots.installed();
        self.log.replaced_by(meta, &mut out.log.batch);
        self.applied = Applied { index: meta.index, term: meta.term };
        if let Some(me) = descriptor.peer(self.me.id) {
            self.me = *me;
        }
        self.set_descriptor(descriptor);
        self.group.snapshot_installed(now, meta.index);
    }
}
