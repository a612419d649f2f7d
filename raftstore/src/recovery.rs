//! What a store does when it opens: brings its two engines and its journal into agreement.
//!
//! The key-value engine holds the state after some prefix of its writes. First the notes of the
//! [journal](crate::journal) that it lacks are carried out again, in their order, so that no region
//! is behind what this store acted on. Then every region's descriptor, applied index and Raft state
//! are compared. What does not fit, and cannot be the work of a crash, stops the store.

use std::collections::HashMap;
use std::path::Path;

use bytes::Bytes;
use crossbeam_channel::unbounded;
use esker_engine::{LogBatch, LogEngine};
use esker_model::{Region, RegionId};
use esker_mutants::broken;
use esker_raft::{Entries, LogIndex, PeerId, Term};
use esker_rpc::proto::esker::command::RegionSnapshot as SnapshotData;
use prost::Message as _;

use crate::apply::{Applier, Installation, bury, clear_range};
use crate::config::APPLY_BATCH_BYTES;
use crate::error::StoreError;
use crate::journal::Note;
use crate::message::Effect;
use crate::peer::PeerSeed;
use crate::snapshot::ReceivedSnapshot;
use crate::state::{self, Applied, RaftState, RegionState, decode_entry};
use crate::worker::Shared;

/// Carries out again what the notes say and the key-value engine has lost. Afterwards all of it is
/// durable there, and the journal is empty.
fn redo(shared: &Shared, notes: Vec<Note>, snapshots: &Path) -> Result<(), StoreError> {
    if notes.is_empty() {
        return Ok(());
    }
    let kv = &shared.kv;
    // Where a region's log was dropped later, the log no longer leads to an earlier note, and the
    // key-value engine has the splits of that region.
    let mut dropped: HashMap<RegionId, usize> = HashMap::new();
    // The places and indexes of each region's snapshots.
    let mut installed: HashMap<RegionId, Vec<(usize, LogIndex)>> = HashMap::new();
    for (place, note) in notes.iter().enumerate() {
        if !matches!(note, Note::Committed { .. }) {
            dropped.insert(note.region(), place);
        }
        if let Note::Installing { region, applied, .. } = note {
            installed.entry(region.id).or_default().push((place, applied.index));
        }
    }
    let (_, no_tasks) = unbounded();
    let mut applier = Applier::new(shared, no_tasks, shared.apply_backlogs[0].clone());
    let mut files = Vec::new();
    for (place, note) in notes.into_iter().enumerate() {
        match note {
            Note::Committed { region, index } => {
                if dropped.get(&region).is_none_or(|dropped| *dropped < place) {
                    catch_up(shared, &mut applier, region, index)?;
                }
            }
            Note::Installing { region, applied, files: record, remembered } => {
                let received = ReceivedSnapshot::from_record(snapshots, &record)?;
                if must_install(shared, &region, applied)? {
                    tracing::info!(region = %region.id, "installing a snapshot again");
                    received.require(kv)?;
                    let remembered = remembered_of(region.id, remembered)?;
                    let before = match state::region_state(kv, region.id)? {
                        Some(RegionState::Normal(before)) => Some(before),
                        Some(RegionState::Tombstone { .. }) | None => None,
                    };
                    let snapshot = Installation {
                        descriptor: &region,
                        applied,
                        remembered: &remembered,
                        files: &received,
                    };
                    snapshot.carry_out(kv, before.as_ref())?;
                }
                files.push(received);
            }
            Note::Removed { region, peer, tombstone, applied } => {
                let is_done = match state::region_state(kv, region.id)? {
                    Some(RegionState::Tombstone { peer: buried, .. }) => buried >= peer,
                    // The data may be a later peer's, which got it by a later snapshot. The
                    // descriptor does not say whose the data is: one change can remove a peer of
                    // this store and add the next.
                    Some(RegionState::Normal(_)) => {
                        let has = state::installed(kv, region.id)?.map(|snapshot| snapshot.index);
                        let later = installed.get(&region.id).into_iter().flatten();
                        let next = later.copied().find(|(at, _)| *at > place);
                        has.zip(next).is_some_and(|(has, (_, next))| has >= next)
                    }
                    None => false,
                };
                if !is_done {
                    tracing::info!(region = %region.id, "removing a replica again");
                    bury(kv, &region, peer, tombstone, applied)?;
                }
            }
        }
    }
    kv.persist()?;
    shared.journal.forget(shared.journal.covered())?;
    if !broken!(InstalledFilesAreRemoved) {
        files.iter().for_each(ReceivedSnapshot::discard);
    }
    Ok(())
}

/// Whether the key-value engine has lost that this snapshot was installed.
fn must_install(shared: &Shared, region: &Region, snapshot: Applied) -> Result<bool, StoreError> {
    let kv = &shared.kv;
    match state::region_state(kv, region.id)? {
        Some(RegionState::Normal(_)) => {
            // A region's later peers get later snapshots.
            let applied = state::applied(kv, region.id)?;
            Ok(applied.is_none_or(|applied| applied.index < snapshot.index))
        }
        // Whether the snapshot came before the removal, or was a later peer's.
        Some(RegionState::Tombstone { peer, .. }) => {
            Ok(region.peer_on(shared.store).is_some_and(|me| me.id > peer))
        }
        None => Ok(true),
    }
}

fn remembered_of(region: RegionId, stored: Bytes) -> Result<SnapshotData, StoreError> {
    SnapshotData::decode(stored).map_err(|error| StoreError::Corrupt {
        what: format!("the note of a snapshot of region {region}"),
        why: error.to_string(),
    })
}

/// Applies the region's log up to an entry that changed its shape.
fn catch_up(
    shared: &Shared,
    applier: &mut Applier,
    id: RegionId,
    index: LogIndex,
) -> Result<(), StoreError> {
    let (kv, log) = (&shared.kv, &shared.log);
    let corrupt =
        |why: String| StoreError::Corrupt { what: format!("the state of region {id}"), why };
    loop {
        let region = match state::region_state(kv, id)? {
            Some(RegionState::Normal(region)) => region,
            // The peer of the note left, and what it did is durable.
            Some(RegionState::Tombstone { .. }) => return Ok(()),
            None => return Err(corrupt("the journal has it, and the data has not".into())),
        };
        let applied = state::applied(kv, id)?
            .ok_or_else(|| corrupt("it has data but no applied index".into()))?;
        if applied.index >= index {
            return Ok(());
        }
        let (from, to) = (applied.index.0 + 1, index.0 + 1);
        let entries = log.entries(id.0, from, to, APPLY_BATCH_BYTES)?;
        let entries = entries
            .into_iter()
            .map(|(index, stored)| decode_entry(id, index, stored))
            .collect::<Result<Vec<_>, _>>()?;
        for effect in applier.replay(&region, applied, Entries::from(entries))? {
            let Effect::Split { children, left, .. } = effect else { continue };
            for child in children {
                shared.ranges.settle(child.id);
            }
            for region in left {
                clear_range(kv, &region.range)?;
            }
        }
    }
}

/// Every peer that this store holds, its log and its data brought into agreement.
///
/// # Errors
/// When the disk fails, or what is on it contradicts itself.
pub fn restore(
    shared: &Shared,
    notes: Vec<Note>,
    snapshots: &Path,
) -> Result<Vec<PeerSeed>, StoreError> {
    let (kv, log) = (&shared.kv, &shared.log);
    redo(shared, notes, snapshots)?;
    let mut seeds = Vec::new();
    let mut buried = false;
    let mut obsolete = LogBatch::new();
    for (id, found) in state::region_states(kv)? {
        let descriptor = match found {
            RegionState::Normal(descriptor) => descriptor,
            RegionState::Tombstone { peer, .. } => {
                // What a later peer of the region has promised stays, although nobody has
                // filled it yet: an empty voter that forgot its vote could vote twice.
                if state::raft_state(log, id)?.is_some_and(|left| left.peer <= peer) {
                    obsolete.remove(id.0);
                }
                continue;
            }
        };
        if descriptor.peer_on(shared.store).is_none() {
            // The removal was applied, and the crash came before the data went.
            let applied = state::applied(kv, id)?.unwrap_or(Applied::INITIAL);
            let peer = state::raft_state(log, id)?.map_or(PeerId(0), |left| left.peer);
            bury(kv, &descriptor, peer, descriptor.clone(), applied)?;
            buried = true;
            obsolete.remove(id.0);
            continue;
        }
        seeds.push(restore_peer(shared, id, descriptor, &mut obsolete)?);
    }
    if buried {
        // Before the logs go.
        kv.persist()?;
    }
    if !obsolete.is_empty() {
        log.write(&obsolete)?;
    }
    Ok(seeds)
}

fn restore_peer(
    shared: &Shared,
    id: RegionId,
    descriptor: Region,
    repairs: &mut LogBatch,
) -> Result<PeerSeed, StoreError> {
    let (kv, log) = (&shared.kv, &shared.log);
    let corrupt =
        |why: String| StoreError::Corrupt { what: format!("the state of region {id}"), why };
    let Some(me) = descriptor.peer_on(shared.store).copied() else {
        return Err(corrupt(format!("it has no peer on store {}", shared.store)));
    };
    let applied = state::applied(kv, id)?
        .ok_or_else(|| corrupt("it has data but no applied index".into()))?;
    let stored = state::raft_state(log, id)?;
    // Even without a record: it may have answered a heartbeat, and so promised its
    // leader not to vote for another, before its first record was written.
    let fresh = broken!(PromiseOutlivesRestart);
    let mut raft = stored.unwrap_or(RaftState::empty(me.id));
    if applied.index < raft.truncated.0 {
        return Err(corrupt(format!(
            "its data is at index {} but its log begins after {}",
            applied.index, raft.truncated.0
        )));
    }
    if term_at(log, id, &raft, applied.index)? != Some(applied.term) {
        // Entries are applied when they are durable in the log, so the log has them. Only
        // a split or a snapshot puts data in place before the log is told.
        let came_whole = applied == Applied::INITIAL
            || state::installed(kv, id)?.is_some_and(|installed| installed == applied);
        if !came_whole {
            return Err(corrupt(format!(
                "its data is at index {}, but its log ends at {}; the log has lost entries",
                applied.index, raft.last
            )));
        }
        // Everything up to the applied index is in the data; what the log has beyond it
        // contradicts a committed entry.
        repairs.cut(id.0, 0, raft.last.0.saturating_add(1));
        raft.truncated = (applied.index, applied.term);
        raft.last = applied.index;
        if raft.hard_state.term < applied.term {
            raft.hard_state.term = applied.term;
            raft.hard_state.vote = None;
        }
        repairs.put_state(id.0, &raft.encode());
    }
    raft.hard_state.commit = raft.hard_state.commit.max(applied.index);
    if raft.last < raft.hard_state.commit {
        return Err(corrupt(format!(
            "its log ends at {} but index {} was committed; the log has lost entries",
            raft.last, raft.hard_state.commit
        )));
    }
    let last_term = term_at(log, id, &raft, raft.last)?
        .ok_or_else(|| corrupt(format!("its last log entry {} is missing", raft.last)))?;
    Ok(PeerSeed { descriptor, me, raft_state: raft, last_term, applied, generation: 0, fresh })
}

fn term_at(
    log: &LogEngine,
    id: RegionId,
    raft: &RaftState,
    index: LogIndex,
) -> Result<Option<Term>, StoreError> {
    if index == raft.truncated.0 {
        return Ok(Some(raft.truncated.1));
    }
    if index > raft.last {
        return Ok(None);
    }
    let stored = log.entry(id.0, index.0)?;
    stored.map(|bytes| decode_entry(id, index.0, bytes).map(|entry| entry.term)).transpose()
}
