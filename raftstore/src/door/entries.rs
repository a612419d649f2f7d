//! Entries of an append: each is what the apply worker can carry out.
//!
//! An entry that reached the log is applied by every start of the store from then
//! on. What the apply worker could not read would stop the store, and stop it again
//! each time; so it is read here, once more, before it gets there.

use std::ops::RangeInclusive;

use bytes::Bytes;
use esker_engine::Cf;
use esker_raft::{ConfChange, Entries, Entry, LeaveJoint, LogIndex, MAX_PEERS, Payload};
use esker_rpc::proto::esker::command::{
    AdminCommand, CompactLog, Mutation, RaftCommand, Split, admin_command, mutation,
};
use esker_rpc::proto::metapb::{Region, RegionEpoch};
use prost::Message as _;

use super::{Fault, MAX_ID, check_bound, check_epoch, check_key};
use crate::apply::check_tagged;
use crate::config::{MAX_COMMAND_BYTES, MAX_SPLIT_KEYS};
use crate::message::Admin;
use crate::peer::{COMMAND_FORMAT, TAGGED_FORMAT};
use crate::region::{PeerChange, RegionExt, conf_change};

/// The largest command in an entry: the largest that a client may give, and what
/// describes it.
const MAX_ENTRY_BYTES: usize = MAX_COMMAND_BYTES + (1 << 20);

const IDS: RangeInclusive<u64> = 1..=MAX_ID;

/// The keys that the entries of one message speak of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reach(Option<Keys>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Keys {
    /// The oldest version of the region that one of the entries was made for.
    version: u64,
    lowest: Bytes,
    highest: Bytes,
    /// The highest end of a range, which lies in no range itself.
    end: Bytes,
}

impl Reach {
    /// Checks all entries.
    ///
    /// # Errors
    /// What cannot be applied.
    pub(super) fn of(entries: &Entries) -> Result<Reach, Fault> {
        let mut reach = Reach::default();
        for entry in entries {
            check_entry(entry, &mut reach).map_err(|fault| match fault {
                fault @ (Fault::Format { .. } | Fault::Entry { .. }) => fault,
                fault => Fault::Entry { index: entry.index, why: fault.to_string() },
            })?;
        }
        Ok(reach)
    }

    /// Whether all keys lie in `region`, as far as that can be told: a region's range only
    /// shrinks, so what is made for its present version or a later one lies inside. What is
    /// older is not carried out anyway.
    pub(crate) fn lies_in(&self, region: &Region) -> bool {
        let Some(keys) = &self.0 else { return true };
        if !region.is_initialized() || keys.version < region.epoch().version {
            return true;
        }
        let end = &region.end_key;
        keys.lowest >= region.start_key
            && (end.is_empty() || (keys.highest < *end && keys.end <= *end))
    }

    fn take(&mut self, version: u64, key: &Bytes, end: Option<&Bytes>) {
        let keys = self.0.get_or_insert_with(|| Keys {
            version,
            lowest: key.clone(),
            highest: Bytes::new(),
            end: Bytes::new(),
        });
        keys.version = keys.version.min(version);
        if *key < keys.lowest {
            keys.lowest = key.clone();
        }
        match end {
            None if *key > keys.highest => keys.highest = key.clone(),
            Some(end) if *end > keys.end => keys.end = end.clone(),
            _ => {}
        }
    }
}

fn check_entry(entry: &Entry, reach: &mut Reach) -> Result<(), Fault> {
    match &entry.payload {
        Payload::Noop => Ok(()),
        Payload::Command(command) => {
            let (epoch, command) = decode(entry.index, command)?;
            match command.admin {
                Some(_) if !command.mutations.is_empty() => {
                    Err(Fault::Contradiction("its changes of data and of the region"))
                }
                Some(admin) => check_admin(entry, epoch, &admin, reach),
                None => check_mutations(epoch, &command.mutations, reach),
            }
        }
        Payload::Change(change) => check_change(entry.index, change),
    }
}

fn decode(index: LogIndex, command: &Bytes) -> Result<(RegionEpoch, RaftCommand), Fault> {
    if command.len() > MAX_ENTRY_BYTES {
        return Err(Fault::TooLarge { size: command.len(), limit: MAX_ENTRY_BYTES });
    }
    let command = RaftCommand::decode(command.clone())
        .map_err(|error| Fault::Entry { index, why: error.to_string() })?;
    let expected = if command.tagged.is_empty() { COMMAND_FORMAT } else { TAGGED_FORMAT };
    if command.format != expected {
        let (found, known) = (command.format, TAGGED_FORMAT);
        return Err(Fault::Format { index, found, known });
    }
    check_tagged(&command).map_err(Fault::Tags)?;
    let epoch = command.epoch.ok_or(Fault::Missing("epoch"))?;
    check_epoch(&epoch)?;
    Ok((epoch, command))
}

fn check_family(number: u32) -> Result<(), Fault> {
    match Cf::from_number(number) {
        Some(cf) if cf != Cf::Meta => Ok(()),
        _ => Err(Fault::Impossible { what: "column family", value: number.into() }),
    }
}

fn check_mutations(
    epoch: RegionEpoch,
    mutations: &[Mutation],
    reach: &mut Reach,
) -> Result<(), Fault> {
    for mutation in mutations {
        let (cf, key) = match &mutation.kind {
            Some(mutation::Kind::Put(put)) => (put.cf, &put.key),
            Some(mutation::Kind::Delete(delete)) => (delete.cf, &delete.key),
            Some(mutation::Kind::Cas(cas)) if mutations.len() == 1 => (cas.cf, &cas.key),
            Some(mutation::Kind::Cas(_)) => {
                return Err(Fault::Contradiction("a compare-and-swap and the changes beside it"));
            }
            Some(mutation::Kind::DeleteRange(range)) => {
                check_family(range.cf)?;
                check_bound(&range.start)?;
                check_bound(&range.end)?;
                reach.take(epoch.version, &range.start, Some(&range.end));
                continue;
            }
            None => return Err(Fault::Missing("kind of change that is known here")),
        };
        check_family(cf)?;
        if key.is_empty() {
            return Err(Fault::Missing("key"));
        }
        check_key(key)?;
        reach.take(epoch.version, key, None);
    }
    Ok(())
}

fn check_admin(
    entry: &Entry,
    epoch: RegionEpoch,
    admin: &AdminCommand,
    reach: &mut Reach,
) -> Result<(), Fault> {
    match &admin.kind {
        Some(admin_command::Kind::Split(split)) => {
            check_split(split)?;
            for key in &split.keys {
                reach.take(epoch.version, key, None);
            }
            Ok(())
        }
        Some(admin_command::Kind::Compact(CompactLog { index, term })) => {
            if *index >= entry.index.0 || *term > entry.term.0 {
                return Err(Fault::Impossible { what: "end of the log", value: *index });
            }
            Ok(())
        }
        // Travels in a change of members, not by itself.
        Some(admin_command::Kind::Change(_)) | None => {
            Err(Fault::Missing("kind of command that is known here"))
        }
    }
}

fn check_split(split: &Split) -> Result<(), Fault> {
    let count = split.keys.len();
    if !(1..=MAX_SPLIT_KEYS).contains(&count) || split.regions.len() != count {
        return Err(Fault::Impossible { what: "number of parts", value: count as u64 });
    }
    for key in &split.keys {
        check_bound(key)?;
    }
    if split.keys[0].is_empty() || !split.keys.is_sorted_by(|a, b| a < b) {
        return Err(Fault::Contradiction("the keys of its split"));
    }
    let peers = split.regions[0].peer_ids.len();
    if !(1..=MAX_PEERS).contains(&peers)
        || split.regions.iter().any(|new| new.peer_ids.len() != peers)
    {
        return Err(Fault::Contradiction("the ids of its new regions"));
    }
    check_ids(split.regions.iter().map(|new| new.id))?;
    check_ids(split.regions.iter().flat_map(|new| new.peer_ids.iter().copied()))
}

/// Each must be possible, and there only once.
fn check_ids(ids: impl Iterator<Item = u64>) -> Result<(), Fault> {
    let mut ids: Vec<u64> = ids.collect();
    if let Some(id) = ids.iter().find(|id| !IDS.contains(id)) {
        return Err(Fault::Impossible { what: "new id", value: *id });
    }
    ids.sort_unstable();
    match ids.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(Fault::Impossible { what: "new id, given twice,", value: pair[0] }),
        None => Ok(()),
    }
}

/// Whether a request to change a region makes a command that every store takes.
///
/// # Errors
/// What no entry may hold.
pub(crate) fn check_request(admin: &Admin) -> Result<(), Fault> {
    match admin {
        Admin::Split { regions, .. } => {
            // The keys are compared with the region's, where the region is.
            check_ids(regions.iter().map(|new| new.id.0))?;
            check_ids(regions.iter().flat_map(|new| new.peers.iter().map(|peer| peer.0)))
        }
        Admin::ChangePeers(changes) => check_peers(changes),
        Admin::TransferLeader(_) => Ok(()),
    }
}

fn check_peers(changes: &[PeerChange]) -> Result<(), Fault> {
    for change in changes {
        let peer = change.peer();
        if !IDS.contains(&peer.id) || peer.store_id == 0 {
            return Err(Fault::Impossible { what: "peer", value: peer.id });
        }
    }
    if changes.len() > MAX_PEERS {
        let value = changes.len() as u64;
        return Err(Fault::Impossible { what: "number of changes", value });
    }
    Ok(())
}

/// Whether a split can be carried out on `region`; decided alike on every replica.
pub(crate) fn split_fits(region: &Region, split: &Split) -> bool {
    let inside = |key: &Bytes| region.contains_key(key) && *key != region.start_key;
    check_split(split).is_ok()
        && split.keys.iter().all(inside)
        && split
            .regions
            .iter()
            .all(|new| new.id != region.id && new.peer_ids.len() == region.peers.len())
}

fn check_change(index: LogIndex, change: &ConfChange) -> Result<(), Fault> {
    // Stores leave joint configurations by themselves: another wish would make the
    // group's configuration differ from what the descriptor can say.
    if change.leave != LeaveJoint::Auto {
        return Err(Fault::Impossible { what: "way out of a joint configuration", value: 1 });
    }
    if change.steps.is_empty() {
        if !change.context.is_empty() {
            return Err(Fault::Contradiction("a change of members and what goes with it"));
        }
        return Ok(());
    }
    let (_, command) = decode(index, &change.context)?;
    let Some(admin_command::Kind::Change(named)) = command.admin.and_then(|admin| admin.kind)
    else {
        return Err(Fault::Missing("change of members that is known here"));
    };
    let changes: Option<Vec<PeerChange>> =
        named.changes.iter().map(PeerChange::from_proto).collect();
    let changes = changes.ok_or(Fault::Missing("kind of change that is known here"))?;
    check_peers(&changes)?;
    if !command.mutations.is_empty() || conf_change(&changes, Bytes::new()).steps != change.steps {
        return Err(Fault::Contradiction("a change of members and what goes with it"));
    }
    Ok(())
}
