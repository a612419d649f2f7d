//! Why a request was not carried out, in the terms that clients act on.

use bytes::Bytes;
use esker_model::{KeyRange, LogIndex, Peer, PeerId, Region, RegionId, StoreId};
use esker_mutants::broken;
use esker_rpc::convert::end_key;
use esker_rpc::proto::errorpb;

use crate::region::ChangeError;

/// Why a request to a region was not carried out.
///
/// Every variant but [`RequestError::Undetermined`] promises that the request had
/// no effect and never will.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum RequestError {
    #[error("region {region} is not led here")]
    NotLeader { region: RegionId, leader: Option<Peer> },
    #[error("region {0} is not on this store")]
    RegionNotFound(RegionId),
    #[error("region {region} has changed since the request was made")]
    EpochNotMatch { region: RegionId, current: Vec<Region> },
    #[error("key {} is not in region {region}", esker_rpc::display_key(key))]
    KeyNotInRegion { region: RegionId, key: Bytes, range: KeyRange },
    #[error("request is for store {asked}, this is store {actual}")]
    StoreNotMatch { asked: StoreId, actual: StoreId },
    #[error("request is for peer {asked} of region {region}, here is peer {actual}")]
    PeerNotMatch { region: RegionId, asked: PeerId, actual: PeerId },
    #[error("store is busy: {reason}")]
    ServerIsBusy { reason: String },
    #[error("region {0} has changed its leader; the command was dropped")]
    StaleCommand(RegionId),
    #[error("command of {size} bytes for region {region} is larger than {limit} bytes")]
    EntryTooLarge { region: RegionId, size: u64, limit: u64 },
    #[error("region {0} cannot confirm reads yet")]
    ReadIndexNotReady(RegionId),
    #[error("region {0} stopped before the outcome of the command was known")]
    Undetermined(RegionId),
    #[error(
        "region {region} has forgotten whether it applied this write before; nothing was changed"
    )]
    Forgotten { region: RegionId, applied: LogIndex },
    #[error("key of {size} bytes is longer than {limit} bytes")]
    KeyTooLarge { size: usize, limit: usize },
    #[error("empty key")]
    EmptyKey,
    #[error("{0}")]
    Change(#[from] ChangeError),
    #[error("cannot split region {region}: {reason}")]
    Split { region: RegionId, reason: String },
    #[error("cannot transfer the leadership of region {region}: {reason}")]
    Transfer { region: RegionId, reason: String },
    #[error("what was asked or told of region {region} cannot be: {reason}")]
    Malformed { region: RegionId, reason: String },
    #[error("store {store} is stopping")]
    Stopped { store: StoreId, region: RegionId },
}

/// A reason to refuse a request that is over soon, as a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Passing {
    Busy,
    Leaderless,
}

impl RequestError {
    /// The request was made for another range than the region has now.
    pub(crate) fn epoch_not_match(region: &Region) -> Self {
        RequestError::EpochNotMatch { region: region.id, current: vec![region.clone()] }
    }

    /// Why the same request may well be carried out here, or be sent to a leader, within a
    /// moment, if so. It has had no effect.
    pub(crate) fn passing(&self) -> Option<Passing> {
        match self {
            RequestError::ServerIsBusy { .. } => Some(Passing::Busy),
            RequestError::NotLeader { leader: None, .. } | RequestError::ReadIndexNotReady(_) => {
                Some(Passing::Leaderless)
            }
            _ => None,
        }
    }

    /// The error as clients expect it inside a response.
    pub fn to_proto(&self) -> errorpb::Error {
        let mut error = errorpb::Error { message: self.to_string(), ..Default::default() };
        match self {
            RequestError::NotLeader { region, leader } => {
                error.not_leader = Some(errorpb::NotLeader {
                    region_id: region.0,
                    leader: leader.map(Into::into),
                });
            }
            RequestError::RegionNotFound(region) => {
                error.region_not_found = Some(errorpb::RegionNotFound { region_id: region.0 });
            }
            RequestError::EpochNotMatch { current, .. } => {
                error.epoch_not_match = Some(errorpb::EpochNotMatch {
                    current_regions: current.iter().map(Into::into).collect(),
                });
            }
            RequestError::KeyNotInRegion { region, key, range } => {
                error.key_not_in_region = Some(errorpb::KeyNotInRegion {
                    key: key.clone(),
                    region_id: region.0,
                    start_key: range.start().clone(),
                    end_key: end_key(range),
                });
            }
            RequestError::StoreNotMatch { asked, actual } => {
                error.store_not_match = Some(errorpb::StoreNotMatch {
                    request_store_id: asked.0,
                    actual_store_id: actual.0,
                });
            }
            RequestError::PeerNotMatch { asked, actual, .. } => {
                error.mismatch_peer_id = Some(errorpb::MismatchPeerId {
                    request_peer_id: asked.0,
                    store_peer_id: actual.0,
                });
            }
            RequestError::ServerIsBusy { reason } => {
                error.server_is_busy =
                    Some(errorpb::ServerIsBusy { reason: reason.clone(), ..Default::default() });
            }
            RequestError::StaleCommand(_) => {
                error.stale_command = Some(errorpb::StaleCommand::default());
            }
            RequestError::EntryTooLarge { region, size, .. } => {
                error.raft_entry_too_large =
                    Some(errorpb::RaftEntryTooLarge { region_id: region.0, entry_size: *size });
            }
            RequestError::ReadIndexNotReady(region) => {
                error.read_index_not_ready = Some(errorpb::ReadIndexNotReady {
                    reason: self.to_string(),
                    region_id: region.0,
                });
            }
            RequestError::Undetermined(_) if broken!(UnknownIsToldAsUnknown) => {
                error.stale_command = Some(errorpb::StaleCommand::default());
            }
            RequestError::Undetermined(_) => {
                error.undetermined_result =
                    Some(errorpb::UndeterminedResult { message: self.to_string() });
            }
            RequestError::Forgotten { region, applied } => {
                error.forgotten =
                    Some(errorpb::Forgotten { region_id: region.0, applied_index: applied.0 });
            }
            // Not busy, which some clients take as final: another store leads soon, and a client
            // that is told of no leader looks for it.
            RequestError::Stopped { region, .. } => {
                error.not_leader = Some(errorpb::NotLeader { region_id: region.0, leader: None });
            }
            RequestError::KeyTooLarge { .. }
            | RequestError::EmptyKey
            | RequestError::Change(_)
            | RequestError::Split { .. }
            | RequestError::Malformed { .. }
            | RequestError::Transfer { .. } => {}
        }
        error
    }
}

/// What stops a store, or keeps it from starting.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// An engine does not read or write.
    #[error(transparent)]
    Engine(#[from] esker_engine::EngineError),
    /// What is on disk contradicts itself: a record that cannot be read, a log that ends too early,
    /// regions that overlap. The store must be replaced.
    #[error("{what} is damaged: {why}")]
    Corrupt {
        /// The record or the region.
        what: String,
        /// What is wrong with it.
        why: String,
    },
    /// A newer version of Esker wrote a record. Use that version.
    #[error("{what} has format {found}, this version reads format {known}; use a newer esker")]
    Format {
        /// The record.
        what: String,
        /// Its format.
        found: u32,
        /// The latest format that this version reads.
        known: u32,
    },
    /// The system refuses a thread. Raise the process's limits, or set fewer workers.
    #[error("cannot start a thread: {0}")]
    Thread(#[source] std::io::Error),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_is_told_whether_a_write_had_no_effect_or_may_have_had_one() {
        let unknown = RequestError::Undetermined(RegionId(7)).to_proto();
        assert!(unknown.undetermined_result.is_some() && unknown.stale_command.is_none());
        let without_effect = RequestError::StaleCommand(RegionId(7)).to_proto();
        assert!(without_effect.stale_command.is_some());
        assert!(without_effect.undetermined_result.is_none());
    }
}
