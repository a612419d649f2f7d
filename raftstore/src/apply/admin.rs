//! Entries and tasks that change the regions themselves. Each is in the synced
//! [journal](crate::journal) before anybody acts on it: what a crash undoes is data,
//! which the log brings back, never the shape of a region.

use esker_engine::{Cf, KvBatch, KvEngine};
use esker_model::{Epoch, KeyRange, Peer, PeerChange, Region, RegionId};
use esker_mutants::broken;
use esker_raft::{ConfChange, PeerId, SnapshotMeta};
use esker_rpc::proto::esker::command::RegionSnapshot as SnapshotData;
use prost::Message as _;

use super::remembered::{self, Remembered};
use super::{Answer, Applier, Progress};
use crate::command::{Body, Command, Split};
use crate::door::split_fits;
use crate::error::{RequestError, StoreError};
use crate::journal::Note;
use crate::message::{AdminResult, AppliedNotice, Effect, Notice, Waiters};
use crate::region;
use crate::snapshot::ReceivedSnapshot;
use crate::state::{self, Applied, RegionState, bounds};

/// Removes a region's data; an uninitialized region has none.
fn delete_data(batch: &mut KvBatch, region: &Region) {
    if region.is_initialized() {
        delete_range(batch, &region.range);
    }
}

fn delete_range(batch: &mut KvBatch, range: &KeyRange) {
    let (start, end) = bounds(range);
    for cf in Cf::DATA {
        batch.delete_range(cf, start, end);
    }
}

/// A snapshot that takes the place of a region's data.
pub(crate) struct Installation<'a> {
    pub descriptor: &'a Region,
    pub applied: Applied,
    pub remembered: &'a SnapshotData,
    pub files: &'a ReceivedSnapshot,
}

impl Installation<'_> {
    /// Puts the snapshot in place. `before` is what the store held of the region. This may be done
    /// again after it was interrupted anywhere.
    pub fn carry_out(&self, kv: &KvEngine, before: Option<&Region>) -> Result<(), StoreError> {
        let id = self.descriptor.id;
        let mut batch = KvBatch::new();
        if !broken!(InstallReplacesOldData) {
            let range = &self.descriptor.range;
            delete_what_is_there(kv, &mut batch, range)?;
            if let Some(before) = before.filter(|before| before.range != *range) {
                delete_what_is_there(kv, &mut batch, &before.range)?;
            }
        }
        kv.write(&batch)?;
        kv.ingest(self.files.files())?;
        batch.clear();
        state::put_region(&mut batch, id, &RegionState::Normal(self.descriptor.clone()));
        if broken!(InstallationIsRecorded) {
            state::put_applied(&mut batch, id, self.applied);
        } else {
            state::put_installed(&mut batch, id, self.applied);
        }
        if !broken!(TagsTravelInSnapshots) {
            remembered::replace(&mut batch, id, self.remembered);
        }
        Ok(kv.write(&batch)?)
    }
}

/// Removes a range's data. Where there is none, the batch stays as it is: a deletion in the
/// memtable would have to be flushed before files are ingested there.
fn delete_what_is_there(
    kv: &KvEngine,
    batch: &mut KvBatch,
    range: &KeyRange,
) -> Result<(), StoreError> {
    let (start, end) = bounds(range);
    let view = kv.snapshot();
    for cf in Cf::DATA {
        let mut iter = view.iter(cf, start, end);
        iter.seek_to_first();
        if iter.valid()? {
            batch.delete_range(cf, start, end);
        }
    }
    Ok(())
}

/// Removes the data of a region's `range` and leaves a tombstone of `peer`, in one write.
pub(crate) fn bury(
    kv: &KvEngine,
    range: &Region,
    peer: PeerId,
    tombstone: Region,
    applied: Applied,
) -> Result<(), StoreError> {
    let id = range.id;
    let mut batch = KvBatch::new();
    if !broken!(RemovedDataIsDeleted) {
        delete_data(&mut batch, range);
    }
    state::put_region(&mut batch, id, &RegionState::Tombstone { region: tombstone, peer, applied });
    state::delete_applied(&mut batch, id);
    remembered::delete(&mut batch, id);
    Ok(kv.write(&batch)?)
}

/// Removes what a split left to no region of the store.
pub(crate) fn clear_range(kv: &KvEngine, range: &KeyRange) -> Result<(), StoreError> {
    let mut batch = KvBatch::new();
    delete_range(&mut batch, range);
    Ok(kv.write(&batch)?)
}

impl Applier {
    fn answer_admin(
        &mut self,
        waiters: Option<Waiters>,
        result: Result<AdminResult, RequestError>,
    ) {
        if let Some(Waiters::Admin(reply)) = waiters {
            self.answers.push(Answer::Admin(reply, result));
        }
    }

    pub(super) fn apply_admin(
        &mut self,
        progress: &mut Progress,
        at: Applied,
        epoch: Epoch,
        admin: Body,
        waiters: Option<Waiters>,
        notice: &mut AppliedNotice,
    ) -> Result<(), StoreError> {
        let id = progress.region.id;
        match admin {
            Body::Split(split) => {
                if epoch != progress.region.epoch {
                    notice.effects.push(Effect::SplitRefused { index: at.index });
                    let error = RequestError::epoch_not_match(&progress.region);
                    self.answer_admin(waiters, Err(error));
                    return Ok(());
                }
                // Was checked when it was proposed. Should that ever fail, every replica
                // refuses alike what would leave regions that overlap or have no peer.
                if !split_fits(&progress.region, &split) {
                    notice.effects.push(Effect::SplitRefused { index: at.index });
                    let reason = "its keys or its new ids do not fit the region".into();
                    self.answer_admin(waiters, Err(RequestError::Split { region: id, reason }));
                    return Ok(());
                }
                self.split(progress, at, &split, waiters, notice)
            }
            Body::Compact { index, term } => {
                notice.effects.push(Effect::MayTruncate { index, term });
                Ok(())
            }
            Body::ChangePeers(_) | Body::Write(_) => Err(StoreError::Corrupt {
                what: format!("entry {} of region {id}", at.index),
                why: "it holds no command that an entry of its kind may hold".into(),
            }),
        }
    }

    fn split(
        &mut self,
        progress: &mut Progress,
        at: Applied,
        split: &Split,
        waiters: Option<Waiters>,
        notice: &mut AppliedNotice,
    ) -> Result<(), StoreError> {
        let (parent, children) = split_descriptors(&progress.region, split);
        let mut regions = children.clone();
        regions.push(parent.clone());
        regions.sort_by(|a, b| a.range.start().cmp(b.range.start()));
        let (mut here, mut left) = (Vec::new(), Vec::new());
        for child in children {
            let place = if self.has_place_for(&child)? { &mut here } else { &mut left };
            place.push(child);
        }
        let id = parent.id;
        state::put_region(&mut self.batch, id, &RegionState::Normal(parent.clone()));
        for child in &here {
            let child_id = child.id;
            state::put_region(&mut self.batch, child_id, &RegionState::Normal(child.clone()));
            state::put_applied(&mut self.batch, child_id, Applied::INITIAL);
        }
        if broken!(TagsOutliveSplit) {
            self.in_memory -= progress.remembered.take().map_or(0, |known| known.len());
            remembered::delete(&mut self.batch, id);
        }
        self.note_at(progress, at)?;
        progress.region = parent.clone();
        self.answer_admin(waiters, Ok(AdminResult { regions }));
        notice.effects.push(Effect::Split { index: at.index, parent, children: here, left });
        Ok(())
    }

    /// Whether a region that a split creates gets its peer on this store. A store that got the
    /// parent by a snapshot from before the split may have had the child already: made by a
    /// message, filled by its leader, and removed or followed by a later peer.
    fn has_place_for(&self, child: &Region) -> Result<bool, StoreError> {
        let Some(me) = child.peer_on(self.store) else { return Ok(false) };
        self.ranges.fill(child.id, me.id, || {
            let state = state::region_state(&self.kv, child.id)?;
            let has_left =
                matches!(state, Some(RegionState::Tombstone { peer, .. }) if peer >= me.id);
            // The vote of a later peer that has no data, and was emptied by a restart.
            let promised = state::raft_state(&self.log, child.id)?;
            Ok(has_left || promised.is_some_and(|later| later.peer > me.id))
        })
    }

    /// Removes what a split has left to no region of this store. The parent's worker has seen the
    /// split: its readers do not look for this data any more. After a crash before that, the data
    /// stays, unseen, until a region is installed in its place.
    pub(super) fn clear(&mut self, region: RegionId, range: KeyRange) -> Result<(), StoreError> {
        clear_range(&self.kv, &range)?;
        self.tell(region, Notice::Cleared { range });
        Ok(())
    }

    pub(super) fn apply_change(
        &mut self,
        progress: &mut Progress,
        at: Applied,
        change: ConfChange,
        waiters: Option<Waiters>,
        notice: &mut AppliedNotice,
    ) -> Result<(), StoreError> {
        let next = if change.steps.is_empty() {
            let left = region::left_joint(&progress.region);
            (left.epoch != progress.region.epoch).then_some(left)
        } else {
            let wished = decode_change(progress.region.id, at, &change)?;
            match wished {
                (epoch, changes) if epoch == progress.region.epoch => {
                    region::changed(&progress.region, &changes).ok()
                }
                _ => None,
            }
        };
        let Some(next) = next else {
            let error = RequestError::epoch_not_match(&progress.region);
            self.answer_admin(waiters, Err(error));
            notice.effects.push(Effect::ChangeRefused { change });
            return Ok(());
        };
        state::put_region(&mut self.batch, next.id, &RegionState::Normal(next.clone()));
        self.note_at(progress, at)?;
        progress.region = next.clone();
        self.answer_admin(waiters, Ok(AdminResult { regions: vec![next.clone()] }));
        notice.effects.push(Effect::Changed { change, descriptor: next });
        Ok(())
    }

    /// Writes the batch with this entry's applied index. Before anybody hears of the entry, the
    /// journal has it.
    fn note_at(&mut self, progress: &mut Progress, at: Applied) -> Result<(), StoreError> {
        progress.applied = at;
        progress.dirty = true;
        self.write_batch_with(progress)?;
        self.notes.push(Note::Committed { region: progress.region.id, index: at.index });
        Ok(())
    }

    /// A region's log is about to go. The regions that were split off it begin with data that came
    /// from there, so the splits must be durable in the key-value engine.
    fn require_durable_splits(&self, region: &Region) -> Result<(), StoreError> {
        let durable = match state::durable_region_state(&self.kv, region.id)? {
            Some(RegionState::Normal(durable)) => durable.epoch.version,
            Some(RegionState::Tombstone { .. }) | None => 0,
        };
        if durable != region.epoch.version
            && region.is_initialized()
            && !broken!(SplitsOutliveTheirLog)
        {
            self.kv.persist()?;
        }
        Ok(())
    }

    pub(super) fn install(
        &mut self,
        region: RegionId,
        generation: u64,
        meta: SnapshotMeta,
        descriptor: Region,
        remembered: &SnapshotData,
        files: &ReceivedSnapshot,
    ) -> Result<(), StoreError> {
        let Some(progress) = self.regions.get_mut(&region).filter(|p| p.generation == generation)
        else {
            files.discard();
            return Ok(());
        };
        let applied = Applied { index: meta.index, term: meta.term };
        let former = progress.remembered.take();
        let before = std::mem::replace(&mut progress.region, descriptor.clone());
        progress.applied = applied;
        progress.dirty = false;
        self.in_memory -= former.map_or(0, |known| known.len());
        self.require_durable_splits(&before)?;
        let intent = self.journal.intend(Note::Installing {
            region: descriptor.clone(),
            applied,
            files: files.record(),
            remembered: remembered.encode_to_vec().into(),
        })?;
        let snapshot = Installation { descriptor: &descriptor, applied, remembered, files };
        snapshot.carry_out(&self.kv, Some(&before).filter(|before| before.is_initialized()))?;
        self.journal.done(intent, files.clone());
        self.tell(region, Notice::Installed { region, generation, descriptor, meta });
        Ok(())
    }

    pub(super) fn destroy(
        &mut self,
        region: RegionId,
        generation: u64,
        peer: PeerId,
        tombstone_conf_ver: u64,
    ) -> Result<(), StoreError> {
        let Some(progress) = self.regions.remove(&region) else {
            panic!("region {region} is destroyed but was never registered");
        };
        self.in_memory -= progress.remembered.as_ref().map_or(0, Remembered::len);
        assert_eq!(
            progress.generation, generation,
            "region {region} is destroyed by the peer that is there"
        );
        let mut last = progress.region;
        let range = last.clone();
        if last.epoch.conf_ver < tombstone_conf_ver {
            // Others said so; which members there were then is not known here.
            last.epoch.conf_ver = tombstone_conf_ver;
            last.peers.clear();
        }
        self.require_durable_splits(&range)?;
        bury(&self.kv, &range, peer, last.clone(), progress.applied)?;
        let applied = progress.applied;
        self.journal.write(&[Note::Removed { region: range, peer, tombstone: last, applied }])?;
        self.tell(region, Notice::Destroyed { region, generation });
        Ok(())
    }
}

fn decode_change(
    region: RegionId,
    at: Applied,
    change: &ConfChange,
) -> Result<(Epoch, Vec<PeerChange>), StoreError> {
    let Command { epoch, body } = super::decode(region, at, change.context.clone())?;
    match body {
        Body::ChangePeers(changes) => Ok((epoch, changes)),
        _ => Err(StoreError::Corrupt {
            what: format!("entry {} of region {region}", at.index),
            why: "its change of members is unreadable".into(),
        }),
    }
}

/// The parent and its new neighbours, in key order. The keys were checked when the split was
/// proposed, against the epoch that was just compared.
fn split_descriptors(region: &Region, split: &Split) -> (Region, Vec<Region>) {
    let mut epoch = region.epoch;
    epoch.version += split.keys.len() as u64;
    let mut parts = region.range.split_at(&split.keys).expect("the keys lie inside the region");
    let own = if split.right_derive { parts.len() - 1 } else { 0 };
    let kept = parts.remove(own);
    let range = if broken!(PartsOfSplitAreDisjoint) { region.range.clone() } else { kept };
    let parent = Region { range, epoch, ..region.clone() };
    let children = parts
        .into_iter()
        .zip(&split.regions)
        .map(|(range, new)| Region {
            id: new.id,
            range,
            epoch,
            peers: region
                .peers
                .iter()
                .zip(&new.peers)
                .map(|(peer, id)| Peer { id: *id, ..*peer })
                .collect(),
        })
        .collect();
    (parent, children)
}
