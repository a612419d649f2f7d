//! What one peer of a region sends to another: an address, and one of a few kinds of content.
//!
//! On the wire it is a `RaftMessage`. [`Envelope::from_wire`] is the only way to read one. It refuses
//! what no correct store can have sent, as far as that shows without the region. Entries and
//! snapshots are checked in [`crate::door`].

use bytes::Bytes;
use esker_model::{Epoch, KeyRange, LogIndex, Peer, RegionId};
use esker_raft::Message;
use esker_rpc::convert::{self, end_key};
use esker_rpc::proto::esker::{self as wire, RaftMessage, raft_message};
use esker_rpc::proto::metapb;

use crate::door::Fault;

/// One message from a peer of a region to another.
#[derive(Clone, Debug)]
pub struct Envelope {
    pub address: Address,
    pub content: Content,
}

/// Which peers a message is between, and the sender's epoch. By the epoch a receiver recognises a
/// message from a time when the region had other members or another range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    pub region: RegionId,
    pub from: Peer,
    pub to: Peer,
    pub epoch: Epoch,
}

/// What a message is.
#[derive(Clone, Debug)]
pub enum Content {
    /// For the receiver's Raft group.
    Consensus(Box<Consensus>),
    /// The receiver has been removed from the region: it is to destroy itself.
    Gone,
    /// Is the sender still a member? Answered, by [`Content::Gone`], only if it is not.
    Question,
}

/// A message of the consensus core, and what the store adds to it.
#[derive(Clone, Debug)]
pub struct Consensus {
    pub message: Message,
    /// From a leader: how far it has applied. A follower shows readers nothing that its leader,
    /// which reads from its own data under a lease, may not show yet.
    pub applied: LogIndex,
    /// The receiver may not exist yet, and is to be created empty if the region has no peer there.
    /// With the sender's range the receiving store sees whether one of its other regions still
    /// covers it.
    pub creates: Option<KeyRange>,
}

impl Address {
    /// The way back, from what the receiver of a message knows.
    #[must_use]
    pub fn reversed(&self, epoch: Epoch) -> Address {
        Address { from: self.to, to: self.from, epoch, ..*self }
    }

    /// A message to this address.
    #[must_use]
    pub fn with(self, content: Content) -> RaftMessage {
        Envelope { address: self, content }.into_wire()
    }
}

impl Envelope {
    pub fn into_wire(self) -> RaftMessage {
        let Address { region, from, to, epoch } = self.address;
        let content = match self.content {
            Content::Gone => raft_message::Content::Gone(wire::Gone {}),
            Content::Question => raft_message::Content::Question(wire::MembershipQuestion {}),
            Content::Consensus(consensus) => {
                let mut encoded = Vec::new();
                consensus.message.encode(&mut encoded);
                raft_message::Content::Consensus(wire::Consensus {
                    message: encoded.into(),
                    applied_index: consensus.applied.0,
                    creates: consensus.creates.map(|range| wire::KeyBounds {
                        start_key: range.start().clone(),
                        end_key: end_key(&range),
                    }),
                })
            }
        };
        RaftMessage {
            region_id: region.0,
            from: Some(from.into()),
            to: Some(to.into()),
            epoch: Some(epoch.into()),
            content: Some(content),
        }
    }

    /// # Errors
    /// What is absent in it, cannot be, or contradicts itself.
    pub fn from_wire(message: RaftMessage) -> Result<Envelope, Fault> {
        let peer = |peer: Option<metapb::Peer>, what| -> Result<Peer, Fault> {
            Ok(peer.ok_or(Fault::Missing(what))?.try_into()?)
        };
        let address = Address {
            region: region_id(message.region_id)?,
            from: peer(message.from, "sender")?,
            to: peer(message.to, "receiver")?,
            epoch: convert::epoch(message.epoch)?,
        };
        if address.from.id == address.to.id {
            return Err(Fault::Contradiction("its sender and its receiver"));
        }
        let content = match message.content.ok_or(Fault::Missing("content that is known here"))? {
            raft_message::Content::Gone(_) => Content::Gone,
            raft_message::Content::Question(_) => Content::Question,
            raft_message::Content::Consensus(consensus) => {
                Content::Consensus(Box::new(Consensus::from_wire(&address, consensus)?))
            }
        };
        Ok(Envelope { address, content })
    }
}

impl Consensus {
    fn from_wire(address: &Address, consensus: wire::Consensus) -> Result<Consensus, Fault> {
        let applied = LogIndex(consensus.applied_index);
        if applied > LogIndex::MAX {
            return Err(Fault::Impossible { what: "applied index", value: applied.0 });
        }
        let range = |bounds: wire::KeyBounds| convert::key_range(bounds.start_key, bounds.end_key);
        let creates = consensus.creates.map(range).transpose()?;
        let message = Message::decode(consensus.message)?;
        let is_same = message.group.0 == address.region.0
            && message.from == address.from.id
            && message.to == address.to.id;
        if !is_same {
            return Err(Fault::Contradiction("the addresses on and in it"));
        }
        Ok(Consensus { message, applied, creates })
    }
}

fn region_id(id: u64) -> Result<RegionId, Fault> {
    match id {
        1..=esker_model::limits::MAX_ID => Ok(RegionId(id)),
        value => Err(Fault::Impossible { what: "region", value }),
    }
}

/// The consensus message in a message, still encoded; empty where it is of another kind.
pub fn encoded(message: &RaftMessage) -> Bytes {
    match &message.content {
        Some(raft_message::Content::Consensus(consensus)) => consensus.message.clone(),
        _ => Bytes::new(),
    }
}
