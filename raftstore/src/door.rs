//! What other stores send, checked before any part of this store believes it.
//!
//! In: bytes from the network, on the thread that received them. Out: an
//! [`Arrived`], whose ids, keys, sizes and every entry are what they can be, or a
//! [`Fault`]. A message that an honest store of this release could not have sent is
//! dropped here, and Raft does without it as without any message that was lost; one
//! that got further could become a log that no start can read any more.
//!
//! What depends on the region as it is here (who is a member, what lies in the
//! range, how far terms and indexes may be ahead) is checked where the region is,
//! in `worker/arrivals.rs` and in the consensus core.

mod entries;
mod snapshot;

use std::time::Instant;

use bytes::Bytes;
use esker_raft::{DecodeError, LogIndex, Message, MessageBody};
use esker_rpc::proto::esker::RaftMessage;
use esker_rpc::proto::metapb::{Peer, Region, RegionEpoch};
use esker_rpc::repeat::Repeated;
use parking_lot::Mutex;

pub use entries::Reach;
pub(crate) use entries::{check_request, split_fits};
pub(crate) use snapshot::{PairCheck, may_follow};

use crate::config::{MAX_BOUND_BYTES, MAX_STORED_KEY_BYTES};
use crate::ids::{RegionId, StoreId};

/// The highest id of a region or a peer; placement counts up from one.
pub const MAX_ID: u64 = u64::MAX >> 1;
/// The highest version, or count of changes of members, that a region can have.
pub const MAX_EPOCH: u64 = 1 << 48;
/// How far ahead of this store's another store's knowledge of a region may be: so many
/// splits or changes of members happen to no region while one of its stores is away.
pub const MAX_EPOCH_LEAP: u64 = 1 << 32;

/// Why a message is not believed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    #[error("it has no {0}")]
    Missing(&'static str),
    #[error("its {what} cannot be {value}")]
    Impossible { what: &'static str, value: u64 },
    #[error("a key or value of {size} bytes is in it, and {limit} are possible")]
    TooLarge { size: usize, limit: usize },
    #[error("its snapshot: {0}")]
    Snapshot(String),
    #[error("{0} contradict each other")]
    Contradiction(&'static str),
    #[error("{0}")]
    Tags(&'static str),
    #[error("it is for store {0}; is an address used twice?")]
    OtherStore(StoreId),
    #[error("it says to come from store {said} and comes from store {from}")]
    OtherSender { said: StoreId, from: StoreId },
    #[error("{0}")]
    Decode(#[from] DecodeError),
    #[error("entry {index}: {why}")]
    Entry { index: LogIndex, why: String },
    #[error(
        "entry {index} has format {found}, and this version reads format {known}; use a newer esker"
    )]
    Format { index: LogIndex, found: u32, known: u32 },
    #[error("store {0} is not one that this cluster knows, nor a member of the region")]
    UnknownStore(StoreId),
    #[error("peer {0} is not a member of the region")]
    NotAMember(u64),
    #[error("its keys are not in the region")]
    OutsideOfRegion,
    #[error("too many regions wait here to be filled")]
    TooManyEmpty,
}

/// A message of another store, checked.
#[derive(Clone, Debug)]
pub struct Arrived {
    /// Sender, receiver and epoch are there, and what they say is possible.
    pub envelope: RaftMessage,
    pub content: Content,
}

#[derive(Clone, Debug)]
pub enum Content {
    /// The receiver is no member any more.
    Gone,
    /// Is the sender still a member?
    Question,
    /// For the peer's Raft group; with the keys that its entries speak of.
    Raft(Message, Reach),
    /// A snapshot's first part: the region as it is in the snapshot.
    Snapshot(Message, Region),
}

impl Arrived {
    pub fn region(&self) -> RegionId {
        RegionId(self.envelope.region_id)
    }

    /// Checks a message that came for `store`.
    ///
    /// # Errors
    /// Why no honest store can have sent it.
    pub fn check(store: StoreId, envelope: RaftMessage) -> Result<Arrived, Fault> {
        let (from, to, _) = check_envelope(store, &envelope)?;
        let content = if envelope.gone {
            if !envelope.message.is_empty() || envelope.is_initial {
                return Err(Fault::Contradiction("its parts"));
            }
            Content::Gone
        } else if envelope.message.is_empty() {
            Content::Question
        } else {
            let message = decode(&envelope, from, to)?;
            let reach = match &message.body {
                // What may wait for a region that is yet to come must be small.
                MessageBody::Append { entries, .. }
                    if envelope.is_initial && !entries.is_empty() =>
                {
                    return Err(Fault::Contradiction("its parts"));
                }
                MessageBody::Append { entries, .. } => Reach::of(entries)?,
                // A snapshot comes with its files, by another way, or not at all.
                MessageBody::InstallSnapshot { .. } => {
                    return Err(Fault::Missing("data for its snapshot"));
                }
                _ => Reach::default(),
            };
            Content::Raft(message, reach)
        };
        Ok(Arrived { envelope, content })
    }

    /// Checks the first part of a snapshot that came for `store`.
    ///
    /// # Errors
    /// See [`Arrived::check`].
    pub fn check_snapshot(store: StoreId, envelope: RaftMessage) -> Result<Arrived, Fault> {
        let (from, to, epoch) = check_envelope(store, &envelope)?;
        if envelope.gone {
            return Err(Fault::Contradiction("its parts"));
        }
        let message = decode(&envelope, from, to)?;
        let MessageBody::InstallSnapshot { meta, data } = &message.body else {
            return Err(Fault::Missing("snapshot"));
        };
        let region = snapshot::check_region(data.clone(), meta)?;
        let is_same = region.id == envelope.region_id
            && region.region_epoch == Some(epoch)
            && region.start_key == envelope.start_key
            && region.end_key == envelope.end_key;
        if !is_same {
            return Err(Fault::Contradiction("the region of the snapshot and of its message"));
        }
        if !region.peers.iter().any(|peer| peer.id == to.id && peer.store_id == to.store_id) {
            return Err(Fault::Missing("peer of this store in its region"));
        }
        if meta.term > message.term {
            return Err(Fault::Impossible { what: "term", value: meta.term.0 });
        }
        Ok(Arrived { envelope, content: Content::Snapshot(message, region) })
    }
}

fn check_envelope(
    store: StoreId,
    envelope: &RaftMessage,
) -> Result<(Peer, Peer, RegionEpoch), Fault> {
    let from = envelope.from.ok_or(Fault::Missing("sender"))?;
    let to = envelope.to.ok_or(Fault::Missing("receiver"))?;
    let epoch = envelope.epoch.ok_or(Fault::Missing("epoch"))?;
    if to.store_id != store.0 {
        return Err(Fault::OtherStore(StoreId(to.store_id)));
    }
    for (what, value) in
        [("region", envelope.region_id), ("sender's id", from.id), ("receiver's id", to.id)]
    {
        if !(1..=MAX_ID).contains(&value) {
            return Err(Fault::Impossible { what, value });
        }
    }
    if from.store_id == 0 || from.id == to.id {
        return Err(Fault::Contradiction("its sender and its receiver"));
    }
    check_epoch(&epoch)?;
    check_range(&envelope.start_key, &envelope.end_key)?;
    if envelope.applied_index > LogIndex::MAX.0 {
        return Err(Fault::Impossible { what: "applied index", value: envelope.applied_index });
    }
    Ok((from, to, epoch))
}

fn check_epoch(epoch: &RegionEpoch) -> Result<(), Fault> {
    for (what, value) in [("version", epoch.version), ("count of changes", epoch.conf_ver)] {
        if value > MAX_EPOCH {
            return Err(Fault::Impossible { what, value });
        }
    }
    Ok(())
}

fn check_key(key: &[u8]) -> Result<(), Fault> {
    if key.len() > MAX_STORED_KEY_BYTES {
        return Err(Fault::TooLarge { size: key.len(), limit: MAX_STORED_KEY_BYTES });
    }
    Ok(())
}

/// A bound of a range, which may lie above all keys.
fn check_bound(bound: &[u8]) -> Result<(), Fault> {
    if bound.len() > MAX_BOUND_BYTES {
        return Err(Fault::TooLarge { size: bound.len(), limit: MAX_BOUND_BYTES });
    }
    Ok(())
}

fn check_range(start: &Bytes, end: &Bytes) -> Result<(), Fault> {
    check_bound(start)?;
    check_bound(end)?;
    if !end.is_empty() && start >= end {
        return Err(Fault::Contradiction("the ends of its range"));
    }
    Ok(())
}

fn decode(envelope: &RaftMessage, from: Peer, to: Peer) -> Result<Message, Fault> {
    let message = Message::decode(envelope.message.clone())?;
    let is_same =
        message.group.0 == envelope.region_id && message.from.0 == from.id && message.to.0 == to.id;
    if !is_same {
        return Err(Fault::Contradiction("the addresses on and in it"));
    }
    Ok(message)
}

/// Says that a message was refused: once, and then at most once in a while, however
/// many come.
pub(crate) fn complain(store: StoreId, envelope: &RaftMessage, fault: &Fault) {
    static REFUSALS: Mutex<Repeated<Instant>> = Mutex::new(Repeated::new());
    metrics::counter!("esker_raft_messages_refused_total").increment(1);
    let times = REFUSALS.lock().failed(Instant::now());
    if let Some(times) = times {
        let from = envelope.from.unwrap_or_default();
        tracing::warn!(
            %store, region = envelope.region_id, from_store = from.store_id, from_peer = from.id,
            times, "refused a Raft message: {fault}"
        );
    }
}

#[cfg(test)]
mod tests;
