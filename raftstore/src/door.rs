//! Checks what other stores send, before any part of this store uses it.
//!
//! In: bytes from the network, on the thread that received them. Out: an [`Arrived`], whose ids,
//! keys, sizes and entries are all possible, or a [`Fault`]. A message that a correct store of this
//! release could not have sent is dropped here. Raft treats it like any message that was lost. If
//! such a message got further, it could become a log that no start can read any more.
//!
//! Some checks need the region as it is here: which peers are its members, what lies in its range,
//! how far terms and indexes may be ahead. Those are in `worker/arrivals.rs` and in the consensus
//! core.

mod entries;
mod snapshot;

use std::time::Instant;

use esker_model::limits::{MAX_BOUND_BYTES, MAX_STORED_KEY_BYTES};
use esker_model::{KeyRange, PeerId, Region, RegionId, StoreId};
use esker_raft::{DecodeError, LogIndex, MessageBody};
use esker_rpc::convert::Malformed;
use esker_rpc::proto::esker::RaftMessage;
use esker_rpc::repeat::Repeated;
use parking_lot::Mutex;

pub use entries::Reach;
pub(crate) use entries::{check_request, split_fits};
pub(crate) use snapshot::PairCheck;

use crate::envelope::{Address, Consensus, Content, Envelope};

/// Why a message is refused.
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
    Malformed(#[from] Malformed),
    #[error("it is for store {0}; is an address used twice?")]
    OtherStore(StoreId),
    #[error("it names store {said} as its sender and comes from store {from}")]
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
    NotAMember(PeerId),
    #[error("its keys are not in the region")]
    OutsideOfRegion,
    #[error("too many regions wait here to be filled")]
    TooManyEmpty,
}

/// A message of another store that was checked: everything in it is possible.
#[derive(Clone, Debug)]
pub struct Arrived {
    pub address: Address,
    pub content: Checked,
}

/// What a checked message is.
#[derive(Clone, Debug)]
pub enum Checked {
    /// The receiver is no member any more.
    Gone,
    /// Is the sender still a member?
    Question,
    /// For the peer's Raft group, with the range of keys that its entries name.
    Raft(Box<Consensus>, Reach),
    /// A snapshot's first part: the region as it is in the snapshot.
    Snapshot(Box<Consensus>, Region),
}

impl Arrived {
    pub fn region(&self) -> RegionId {
        self.address.region
    }

    /// Checks a message that came for `store`.
    ///
    /// # Errors
    /// Why no correct store can have sent it.
    pub fn check(store: StoreId, message: RaftMessage) -> Result<Arrived, Fault> {
        let Envelope { address, content } = open(store, message)?;
        let content = match content {
            Content::Gone => Checked::Gone,
            Content::Question => Checked::Question,
            Content::Consensus(consensus) => {
                let reach = match &consensus.message.body {
                    // What may wait for a region that is yet to come must be small.
                    MessageBody::Append { entries, .. }
                        if consensus.creates.is_some() && !entries.is_empty() =>
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
                Checked::Raft(consensus, reach)
            }
        };
        Ok(Arrived { address, content })
    }

    /// Checks the first part of a snapshot that came for `store`.
    ///
    /// # Errors
    /// See [`Arrived::check`].
    pub fn check_snapshot(store: StoreId, message: RaftMessage) -> Result<Arrived, Fault> {
        let Envelope { address, content } = open(store, message)?;
        let Content::Consensus(consensus) = content else {
            return Err(Fault::Missing("snapshot"));
        };
        let MessageBody::InstallSnapshot { meta, data } = &consensus.message.body else {
            return Err(Fault::Missing("snapshot"));
        };
        let region = snapshot::check_region(data.clone(), meta)?;
        let is_same = region.id == address.region
            && region.epoch == address.epoch
            && consensus.creates.as_ref() == Some(&region.range);
        if !is_same {
            return Err(Fault::Contradiction("the region of the snapshot and of its message"));
        }
        let to = address.to;
        if !region.peers.iter().any(|peer| peer.id == to.id && peer.store == to.store) {
            return Err(Fault::Missing("peer of this store in its region"));
        }
        if meta.term > consensus.message.term {
            return Err(Fault::Impossible { what: "term", value: meta.term.0 });
        }
        Ok(Arrived { address, content: Checked::Snapshot(consensus, region) })
    }
}

/// The range of the region that a snapshot's first part announces.
///
/// # Errors
/// When the message announces none.
pub fn announced_range(message: &RaftMessage) -> Result<KeyRange, Fault> {
    match Envelope::from_wire(message.clone())?.content {
        Content::Consensus(consensus) => consensus.creates.ok_or(Fault::Missing("range")),
        Content::Gone | Content::Question => Err(Fault::Missing("snapshot")),
    }
}

fn open(store: StoreId, message: RaftMessage) -> Result<Envelope, Fault> {
    let envelope = Envelope::from_wire(message)?;
    if envelope.address.to.store != store {
        return Err(Fault::OtherStore(envelope.address.to.store));
    }
    Ok(envelope)
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

/// Who a refused message says that it is from: for the log only, and not checked.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Claimed {
    region: u64,
    store: u64,
    peer: u64,
}

impl Claimed {
    /// As an unchecked message names it.
    pub fn of(message: &RaftMessage) -> Claimed {
        let (peer, store) = message.from.map_or((0, 0), |from| (from.id, from.store_id));
        Claimed { region: message.region_id, store, peer }
    }
}

impl From<&Address> for Claimed {
    fn from(address: &Address) -> Claimed {
        let Address { region, from, .. } = address;
        Claimed { region: region.0, store: from.store.0, peer: from.id.0 }
    }
}

/// Logs that a message was refused: once, and then at most once in a while, however many come.
pub(crate) fn complain(store: StoreId, from: impl Into<Claimed>, fault: &Fault) {
    static REFUSALS: Mutex<Repeated<Instant>> = Mutex::new(Repeated::new());
    metrics::counter!("esker_raft_messages_refused_total").increment(1);
    let times = REFUSALS.lock().failed(Instant::now());
    if let Some(times) = times {
        let Claimed { region, store: from_store, peer: from_peer } = from.into();
        tracing::warn!(
            %store, region, from_store, from_peer, times, "refused a Raft message: {fault}"
        );
    }
}

#[cfg(test)]
mod tests;
