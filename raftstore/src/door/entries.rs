//! Entries of an append: each is what the apply worker can carry out.
//!
//! An entry that reached the log is applied by every start of the store from then
//! on. What the apply worker could not read would stop the store, and stop it again
//! each time; so it is read here, once more, before it gets there.

use std::ops::RangeInclusive;

use bytes::Bytes;
use esker_model::limits::{MAX_COMMAND_BYTES, MAX_ID, MAX_PEERS, MAX_SPLIT_KEYS};
use esker_model::{Epoch, PeerChange, Region};
use esker_raft::{ConfChange, Entries, Entry, LeaveJoint, LogIndex, Payload};

use super::{Fault, check_bound, check_key};
use crate::command::{Body, Command, CommandError, Keys, Mutation, Split};
use crate::message::Admin;
use crate::region::conf_change;

/// The largest command in an entry: the largest that a client may give, and what
/// describes it.
const MAX_ENTRY_BYTES: usize = MAX_COMMAND_BYTES + (1 << 20);

const IDS: RangeInclusive<u64> = 1..=MAX_ID;

/// The keys that the entries of one message speak of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reach(Option<Keyed>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Keyed {
    /// The oldest version of the region that one of the entries was made for.
    version: u64,
    lowest: Bytes,
    highest: Bytes,
    /// The highest end of a range, which lies in no range itself.
    end: Bytes,
    /// A range without an end is among them.
    is_open: bool,
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
        if !region.is_initialized() || keys.version < region.epoch.version {
            return true;
        }
        let range = &region.range;
        keys.lowest >= *range.start()
            && match range.end() {
                None => true,
                Some(end) => !keys.is_open && keys.highest < *end && keys.end <= *end,
            }
    }

    fn take(&mut self, version: u64, touched: Keys<'_>) {
        let lowest = match touched {
            Keys::One(key) => key,
            Keys::Range(range) => range.start(),
        };
        let keys = self.0.get_or_insert_with(|| Keyed {
            version,
            lowest: lowest.clone(),
            highest: Bytes::new(),
            end: Bytes::new(),
            is_open: false,
        });
        keys.version = keys.version.min(version);
        if *lowest < keys.lowest {
            keys.lowest = lowest.clone();
        }
        match touched {
            Keys::One(key) if *key > keys.highest => keys.highest = key.clone(),
            Keys::One(_) => {}
            Keys::Range(range) => match range.end() {
                None => keys.is_open = true,
                Some(end) if *end > keys.end => keys.end = end.clone(),
                Some(_) => {}
            },
        }
    }
}

fn check_entry(entry: &Entry, reach: &mut Reach) -> Result<(), Fault> {
    match &entry.payload {
        Payload::Noop => Ok(()),
        Payload::Command(command) => {
            let Command { epoch, body } = decode(entry.index, command)?;
            match body {
                Body::Write(write) => check_mutations(epoch, &write.mutations, reach),
                Body::Split(split) => {
                    check_split(&split)?;
                    for key in &split.keys {
                        reach.take(epoch.version, Keys::One(key));
                    }
                    Ok(())
                }
                Body::Compact { index, term } => {
                    if index >= entry.index || term > entry.term {
                        return Err(Fault::Impossible { what: "end of the log", value: index.0 });
                    }
                    Ok(())
                }
                // Travels in a change of members, not by itself.
                Body::ChangePeers(_) => Err(Fault::Missing("kind of command that is known here")),
            }
        }
        Payload::Change(change) => check_change(entry.index, change),
    }
}

fn decode(index: LogIndex, command: &Bytes) -> Result<Command, Fault> {
    if command.len() > MAX_ENTRY_BYTES {
        return Err(Fault::TooLarge { size: command.len(), limit: MAX_ENTRY_BYTES });
    }
    Command::decode(command.clone()).map_err(|error| match error {
        CommandError::Format { found, known } => Fault::Format { index, found, known },
        error => Fault::Entry { index, why: error.to_string() },
    })
}

fn check_mutations(epoch: Epoch, mutations: &[Mutation], reach: &mut Reach) -> Result<(), Fault> {
    for mutation in mutations {
        let keys = mutation.keys();
        if let Keys::One(key) = keys {
            if key.is_empty() {
                return Err(Fault::Missing("key"));
            }
            check_key(key)?;
        }
        reach.take(epoch.version, keys);
    }
    Ok(())
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
    let peers = split.regions[0].peers.len();
    if !(1..=MAX_PEERS).contains(&peers) || split.regions.iter().any(|new| new.peers.len() != peers)
    {
        return Err(Fault::Contradiction("the ids of its new regions"));
    }
    check_ids(split.regions.iter().map(|new| new.id.0))?;
    check_ids(split.regions.iter().flat_map(|new| new.peers.iter().map(|peer| peer.0)))
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
        let seat = change.seat();
        if !IDS.contains(&seat.peer.0) || seat.store.0 == 0 {
            return Err(Fault::Impossible { what: "peer", value: seat.peer.0 });
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
    check_split(split).is_ok()
        && region.range.split_at(&split.keys).is_some()
        && split
            .regions
            .iter()
            .all(|new| new.id != region.id && new.peers.len() == region.peers.len())
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
    let Body::ChangePeers(changes) = decode(index, &change.context)?.body else {
        return Err(Fault::Missing("change of members that is known here"));
    };
    check_peers(&changes)?;
    if conf_change(&changes, Bytes::new()).steps != change.steps {
        return Err(Fault::Contradiction("a change of members and what goes with it"));
    }
    Ok(())
}
