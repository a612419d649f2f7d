//! Conversion between the messages of the wire and the types of `esker-model`. It is the one place
//! where a missing or senseless field becomes a typed error.
//!
//! `TryFrom` converts from the wire, with [`Malformed`] as the error. `From` converts to the wire,
//! and cannot fail. An open end of a range is an empty key on the wire, and nowhere else.

use bytes::Bytes;
use esker_model::limits::{MAX_BOUND_BYTES, MAX_EPOCH, MAX_ID, MAX_PEERS};
use esker_model::timestamp::{LOGICAL_LIMIT, MAX_PHYSICAL};
use esker_model::{
    Action, DownPeer, Epoch, KeyRange, NewRegion, Order, Peer, PeerChange, PeerId, Region,
    RegionId, RegionReport, Role, Seat, StoreId, Term, Timestamp, Traffic,
};
use thiserror::Error;

use crate::proto::{eraftpb, metapb, pdpb};

/// What a message lacks, or what it contradicts itself in.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Malformed {
    #[error("the message has no {0}")]
    Missing(&'static str),
    #[error("its {what} cannot be {value}")]
    Impossible { what: &'static str, value: u64 },
    #[error("a bound of {size} bytes is in it, and {MAX_BOUND_BYTES} are possible")]
    TooLong { size: usize },
    #[error("its range is empty")]
    EmptyRange,
    #[error("region {region}: {what}")]
    Region { region: u64, what: &'static str },
}

/// A range of keys from the two keys of the wire, where an empty end means no end.
///
/// # Errors
/// When the range holds no key, or a bound is longer than any that exists.
pub fn key_range(start: Bytes, end: Bytes) -> Result<KeyRange, Malformed> {
    for bound in [&start, &end] {
        if bound.len() > MAX_BOUND_BYTES {
            return Err(Malformed::TooLong { size: bound.len() });
        }
    }
    let end = bound(end);
    KeyRange::new(start, end).map_err(|_| Malformed::EmptyRange)
}

/// A bound from the wire, where an empty key means no bound.
pub fn bound(bound: Bytes) -> Option<Bytes> {
    Some(bound).filter(|bound| !bound.is_empty())
}

/// The end of a range for the wire: empty for no end.
pub fn end_key(range: &KeyRange) -> Bytes {
    range.end().cloned().unwrap_or_default()
}

impl TryFrom<metapb::RegionEpoch> for Epoch {
    type Error = Malformed;

    fn try_from(epoch: metapb::RegionEpoch) -> Result<Epoch, Malformed> {
        for (what, value) in [("version", epoch.version), ("count of changes", epoch.conf_ver)] {
            if value > MAX_EPOCH {
                return Err(Malformed::Impossible { what, value });
            }
        }
        Ok(Epoch { conf_ver: epoch.conf_ver, version: epoch.version })
    }
}

/// The epoch of a message in which it is optional.
///
/// # Errors
/// When it is absent, or no region can have reached it.
pub fn epoch(epoch: Option<metapb::RegionEpoch>) -> Result<Epoch, Malformed> {
    epoch.ok_or(Malformed::Missing("epoch"))?.try_into()
}

impl From<Epoch> for metapb::RegionEpoch {
    fn from(epoch: Epoch) -> Self {
        metapb::RegionEpoch { conf_ver: epoch.conf_ver, version: epoch.version }
    }
}

impl From<metapb::PeerRole> for Role {
    fn from(role: metapb::PeerRole) -> Role {
        match role {
            metapb::PeerRole::Voter => Role::Voter,
            metapb::PeerRole::Learner => Role::Learner,
            metapb::PeerRole::IncomingVoter => Role::IncomingVoter,
            metapb::PeerRole::DemotingVoter => Role::DemotingVoter,
        }
    }
}

impl From<Role> for metapb::PeerRole {
    fn from(role: Role) -> Self {
        match role {
            Role::Voter => metapb::PeerRole::Voter,
            Role::Learner => metapb::PeerRole::Learner,
            Role::IncomingVoter => metapb::PeerRole::IncomingVoter,
            Role::DemotingVoter => metapb::PeerRole::DemotingVoter,
        }
    }
}

fn peer_id(what: &'static str, id: u64) -> Result<PeerId, Malformed> {
    match id {
        1..=MAX_ID => Ok(PeerId(id)),
        value => Err(Malformed::Impossible { what, value }),
    }
}

impl TryFrom<metapb::Peer> for Peer {
    type Error = Malformed;

    fn try_from(peer: metapb::Peer) -> Result<Peer, Malformed> {
        let id = peer_id("peer", peer.id)?;
        if peer.store_id == 0 {
            return Err(Malformed::Impossible { what: "peer's store", value: 0 });
        }
        let role = metapb::PeerRole::try_from(peer.role).map_err(|_| {
            let value = peer.role.unsigned_abs().into();
            Malformed::Impossible { what: "peer's role", value }
        })?;
        Ok(Peer { id, store: StoreId(peer.store_id), role: role.into(), witness: peer.is_witness })
    }
}

impl From<Peer> for metapb::Peer {
    fn from(peer: Peer) -> Self {
        metapb::Peer {
            id: peer.id.0,
            store_id: peer.store.0,
            role: metapb::PeerRole::from(peer.role).into(),
            is_witness: peer.witness,
        }
    }
}

impl From<&Peer> for metapb::Peer {
    fn from(peer: &Peer) -> Self {
        (*peer).into()
    }
}

impl From<Seat> for metapb::Peer {
    fn from(seat: Seat) -> Self {
        seat.with(Role::Voter).into()
    }
}

impl TryFrom<metapb::Region> for Region {
    type Error = Malformed;

    /// No peers in the message mean that its sender does not know them.
    fn try_from(message: metapb::Region) -> Result<Region, Malformed> {
        let wrong = |what| Malformed::Region { region: message.id, what };
        if !(1..=MAX_ID).contains(&message.id) {
            return Err(match message.id {
                0 => wrong("zero is not an id"),
                _ => wrong("an id that is never given"),
            });
        }
        let epoch = message.region_epoch.ok_or_else(|| wrong("no epoch"))?;
        let epoch =
            Epoch::try_from(epoch).map_err(|_| wrong("an epoch that nothing can have reached"))?;
        let range =
            key_range(message.start_key, message.end_key).map_err(|malformed| match malformed {
                Malformed::EmptyRange => wrong("its range is empty"),
                _ => wrong("a bound longer than any key"),
            })?;
        if message.peers.len() > MAX_PEERS {
            return Err(wrong("more peers than a group can have"));
        }
        let mut peers: Vec<Peer> = Vec::with_capacity(message.peers.len());
        for peer in message.peers {
            let peer = Peer::try_from(peer)
                .map_err(|_| wrong("a peer without ids or with an unknown role"))?;
            if peers.iter().any(|other| other.store == peer.store || other.id == peer.id) {
                return Err(wrong("two of its peers share a store or an id"));
            }
            peers.push(peer);
        }
        Ok(Region { id: RegionId(message.id), range, epoch, peers })
    }
}

impl From<&Region> for metapb::Region {
    fn from(region: &Region) -> Self {
        metapb::Region {
            id: region.id.0,
            start_key: region.range.start().clone(),
            end_key: end_key(&region.range),
            region_epoch: Some(region.epoch.into()),
            peers: region.peers.iter().map(metapb::Peer::from).collect(),
        }
    }
}

impl From<Region> for metapb::Region {
    fn from(region: Region) -> Self {
        (&region).into()
    }
}

/// The region of a message in which it is optional.
///
/// # Errors
/// When it is absent or malformed.
pub fn region(region: Option<metapb::Region>) -> Result<Region, Malformed> {
    region.ok_or(Malformed::Missing("region"))?.try_into()
}

/// The peer of a message in which it is optional. A peer with the id 0 counts as absent.
///
/// # Errors
/// When it is there and malformed.
pub fn optional_peer(peer: Option<metapb::Peer>) -> Result<Option<Peer>, Malformed> {
    peer.filter(|peer| peer.id != 0).map(Peer::try_from).transpose()
}

/// The down peers of a region, from the wire.
pub fn down_peers(messages: Vec<pdpb::PeerStats>) -> Vec<DownPeer> {
    // An entry without a peer has no meaning.
    let named = |down: pdpb::PeerStats| {
        Some(DownPeer { peer: PeerId(down.peer?.id), seconds: down.down_seconds })
    };
    messages.into_iter().filter_map(named).collect()
}

/// The down peers of a region for the wire. Leaves out those that are not peers of the region.
pub fn down_messages(region: &Region, down: &[DownPeer]) -> Vec<pdpb::PeerStats> {
    let named = |down: &DownPeer| {
        let peer = Some(region.peer(down.peer)?.into());
        Some(pdpb::PeerStats { peer, down_seconds: down.seconds })
    };
    down.iter().filter_map(named).collect()
}

/// The peers of a region that lag, for the wire.
pub fn pending_messages(region: &Region, pending: &[PeerId]) -> Vec<metapb::Peer> {
    pending.iter().filter_map(|id| region.peer(*id).map(metapb::Peer::from)).collect()
}

impl TryFrom<pdpb::RegionHeartbeatRequest> for RegionReport {
    type Error = Malformed;

    fn try_from(message: pdpb::RegionHeartbeatRequest) -> Result<RegionReport, Malformed> {
        let region = region(message.region)?;
        let wrong = |what| Malformed::Region { region: region.id.0, what };
        let leader = message.leader.ok_or_else(|| wrong("no leader"))?;
        let leader = *region
            .peer(PeerId(leader.id))
            .ok_or_else(|| wrong("its leader is not one of its peers"))?;
        if message.term > Term::MAX.0 {
            return Err(wrong("a term that no election can have reached"));
        }
        Ok(RegionReport {
            leader,
            term: Some(Term(message.term)).filter(|term| *term != Term(0)),
            down: down_peers(message.down_peers),
            pending: message.pending_peers.iter().map(|peer| PeerId(peer.id)).collect(),
            traffic: Traffic {
                bytes_written: message.bytes_written,
                bytes_read: message.bytes_read,
                keys_written: message.keys_written,
                keys_read: message.keys_read,
            },
            approximate_size: message.approximate_size,
            approximate_keys: message.approximate_keys,
            region,
        })
    }
}

impl From<RegionReport> for pdpb::RegionHeartbeatRequest {
    /// The sender fills in header and interval.
    fn from(report: RegionReport) -> Self {
        pdpb::RegionHeartbeatRequest {
            leader: Some(report.leader.into()),
            down_peers: down_messages(&report.region, &report.down),
            pending_peers: pending_messages(&report.region, &report.pending),
            bytes_written: report.traffic.bytes_written,
            bytes_read: report.traffic.bytes_read,
            keys_written: report.traffic.keys_written,
            keys_read: report.traffic.keys_read,
            approximate_size: report.approximate_size,
            approximate_keys: report.approximate_keys,
            term: report.term.map_or(0, |term| term.0),
            region: Some(report.region.into()),
            ..Default::default()
        }
    }
}

impl TryFrom<pdpb::ChangePeer> for PeerChange {
    type Error = Malformed;

    fn try_from(change: pdpb::ChangePeer) -> Result<PeerChange, Malformed> {
        let peer = Peer::try_from(change.peer.ok_or(Malformed::Missing("peer to change"))?)?;
        let seat = Seat::from(&peer);
        let kind = eraftpb::ConfChangeType::try_from(change.change_type).map_err(|_| {
            let value = change.change_type.unsigned_abs().into();
            Malformed::Impossible { what: "kind of change", value }
        })?;
        Ok(match kind {
            eraftpb::ConfChangeType::AddNode => PeerChange::AddVoter(seat),
            eraftpb::ConfChangeType::AddLearnerNode => PeerChange::AddLearner(seat),
            eraftpb::ConfChangeType::RemoveNode => PeerChange::Remove(seat),
        })
    }
}

impl From<PeerChange> for pdpb::ChangePeer {
    fn from(change: PeerChange) -> Self {
        use eraftpb::ConfChangeType::{AddLearnerNode, AddNode, RemoveNode};
        let (kind, role) = match change {
            PeerChange::AddVoter(_) => (AddNode, Role::Voter),
            PeerChange::AddLearner(_) => (AddLearnerNode, Role::Learner),
            PeerChange::Remove(_) => (RemoveNode, Role::Voter),
        };
        let peer = change.seat().with(role);
        pdpb::ChangePeer { peer: Some(peer.into()), change_type: kind.into() }
    }
}

impl From<&Order> for pdpb::RegionHeartbeatResponse {
    /// The sender fills in the header.
    fn from(order: &Order) -> Self {
        let mut message = pdpb::RegionHeartbeatResponse {
            region_id: order.region.0,
            region_epoch: Some(order.epoch.into()),
            target_peer: Some(order.leader.into()),
            ..Default::default()
        };
        match &order.action {
            Action::ChangePeers(changes) => {
                let changes = changes.iter().map(|change| (*change).into()).collect();
                message.change_peer_v2 = Some(pdpb::ChangePeerV2 { changes });
            }
            Action::TransferLeader(to) => {
                let peer = metapb::Peer::from(*to);
                message.transfer_leader =
                    Some(pdpb::TransferLeader { peer: Some(peer), peers: vec![peer] });
            }
            Action::Split(keys) => {
                message.split_region = Some(pdpb::SplitRegion {
                    policy: pdpb::CheckPolicy::Usekey.into(),
                    keys: keys.clone(),
                });
            }
        }
        message
    }
}

/// An order of placement; `None` for a message without an order, such as a leader's sign of life.
///
/// # Errors
/// When the message contradicts itself, or contains an order that no store carries out.
pub fn order(message: pdpb::RegionHeartbeatResponse) -> Result<Option<Order>, Malformed> {
    let action = if let Some(split) = message.split_region {
        if split.policy != i32::from(pdpb::CheckPolicy::Usekey) || split.keys.is_empty() {
            return Err(Malformed::Missing("key to split at, the only way that is served"));
        }
        Action::Split(split.keys)
    } else if let Some(transfer) = message.transfer_leader {
        let peer = Peer::try_from(transfer.peer.ok_or(Malformed::Missing("peer to lead"))?)?;
        Action::TransferLeader(Seat::from(&peer))
    } else if let Some(several) = message.change_peer_v2 {
        let changes = several.changes.into_iter().map(PeerChange::try_from);
        Action::ChangePeers(changes.collect::<Result<_, _>>()?)
    } else if let Some(change) = message.change_peer {
        Action::ChangePeers(vec![change.try_into()?])
    } else {
        return Ok(None);
    };
    let leader = message.target_peer.ok_or(Malformed::Missing("leader"))?;
    Ok(Some(Order {
        region: RegionId(message.region_id),
        epoch: epoch(message.region_epoch)?,
        leader: leader.try_into()?,
        action,
    }))
}

impl From<Timestamp> for pdpb::Timestamp {
    fn from(timestamp: Timestamp) -> Self {
        pdpb::Timestamp {
            // Both parts are far below 63 bits.
            physical: timestamp.physical().cast_signed(),
            logical: timestamp.logical().cast_signed(),
            suffix_bits: 0,
        }
    }
}

impl TryFrom<pdpb::Timestamp> for Timestamp {
    type Error = Malformed;

    fn try_from(message: pdpb::Timestamp) -> Result<Timestamp, Malformed> {
        let part = |what, value: i64, limit| match u64::try_from(value) {
            Ok(part) if part < limit => Ok(part),
            _ => Err(Malformed::Impossible { what, value: value.unsigned_abs() }),
        };
        Ok(Timestamp::new(
            part("physical part", message.physical, MAX_PHYSICAL + 1)?,
            part("logical part", message.logical, LOGICAL_LIMIT)?,
        ))
    }
}

impl TryFrom<pdpb::SplitId> for NewRegion {
    type Error = Malformed;

    fn try_from(message: pdpb::SplitId) -> Result<NewRegion, Malformed> {
        let peers = message.new_peer_ids.into_iter().map(|id| peer_id("new peer", id));
        match message.new_region_id {
            1..=MAX_ID => Ok(NewRegion {
                id: RegionId(message.new_region_id),
                peers: peers.collect::<Result<_, _>>()?,
            }),
            value => Err(Malformed::Impossible { what: "new region", value }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message() -> metapb::Region {
        metapb::Region {
            id: 7,
            start_key: Bytes::from_static(b"b"),
            end_key: Bytes::new(),
            region_epoch: Some(metapb::RegionEpoch { conf_ver: 3, version: 5 }),
            peers: vec![metapb::Peer { id: 8, store_id: 1, ..Default::default() }],
        }
    }

    fn refused(change: impl FnOnce(&mut metapb::Region)) -> String {
        let mut message = message();
        change(&mut message);
        Region::try_from(message).expect_err("it is malformed").to_string()
    }

    #[test]
    fn a_region_reads_back_as_it_was_written() {
        let region = Region::try_from(message()).expect("it is well formed");
        assert_eq!(region.range, KeyRange::from(Bytes::from_static(b"b")), "an open end");
        assert_eq!(metapb::Region::from(&region), message());
    }

    #[test]
    fn what_is_absent_or_makes_no_sense_is_an_error_that_names_the_region() {
        assert_eq!(refused(|r| r.id = 0), "region 0: zero is not an id");
        assert_eq!(refused(|r| r.region_epoch = None), "region 7: no epoch");
        let end = Bytes::from_static(b"a");
        assert_eq!(refused(|r| r.end_key = end), "region 7: its range is empty");
        let long = Bytes::from(vec![1; MAX_BOUND_BYTES + 1]);
        assert_eq!(refused(|r| r.end_key = long), "region 7: a bound longer than any key");
        for change in [
            (|r| r.peers[0].id = 0) as fn(&mut metapb::Region),
            |r| r.peers[0].store_id = 0,
            |r| r.peers[0].role = 9,
        ] {
            let said = "region 7: a peer without ids or with an unknown role";
            assert_eq!(refused(change), said);
        }
        let said = "region 7: two of its peers share a store or an id";
        assert_eq!(refused(|r| r.peers.push(r.peers[0])), said);
        let far = metapb::RegionEpoch { conf_ver: 1, version: u64::MAX };
        let said = "region 7: an epoch that nothing can have reached";
        assert_eq!(refused(|r| r.region_epoch = Some(far)), said);
    }

    #[test]
    fn orders_read_back_as_they_were_written() {
        let seat = Seat { peer: PeerId(4), store: StoreId(2) };
        for action in [
            Action::TransferLeader(seat),
            Action::ChangePeers(vec![PeerChange::AddVoter(seat), PeerChange::Remove(seat)]),
            Action::ChangePeers(Vec::new()),
            Action::Split(vec![Bytes::from_static(b"k")]),
        ] {
            let order = Order {
                region: RegionId(7),
                epoch: Epoch::FIRST,
                leader: Peer::voter(PeerId(8), StoreId(1)),
                action,
            };
            assert_eq!(super::order((&order).into()), Ok(Some(order)));
        }
        assert_eq!(super::order(Default::default()), Ok(None), "a beat orders nothing");
    }
}
