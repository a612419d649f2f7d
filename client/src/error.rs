//! What a client of a cluster can fail with.

use std::time::{Duration, Instant};

use esker_rpc::channel::AddressError;
use esker_rpc::proto::pdpb::ErrorType;

/// Why a request did not succeed. Each message is one line that names what to look at.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ClientError {
    #[error(transparent)]
    Address(#[from] AddressError),

    #[error("no placement address was given; write HOST:PORT[,HOST:PORT...]")]
    NoEndpoints,

    #[error("no placement leader found at {endpoints} within {waited:?}: {reason}")]
    PlacementUnreachable { endpoints: String, waited: Duration, reason: String },

    #[error(
        "no placement driver at {endpoints}: what answers there is a node that runs no placement \
         member, or another program; give the addresses of the placement members"
    )]
    NoPlacement { endpoints: String },

    #[error("placement refused {call}: {message} ({kind:?})")]
    PlacementRefused { call: &'static str, kind: ErrorType, message: String },

    #[error("placement answered {call} with {problem}")]
    PlacementAnswer { call: &'static str, problem: &'static str },

    #[error(
        "{address} belongs to cluster {actual}, not to {expected}: check the placement addresses"
    )]
    ClusterMismatch { address: String, expected: u64, actual: u64 },

    #[error("no region holds key {key}: the cluster is not bootstrapped yet")]
    NoRegion { key: String },

    #[error("store {store} is not known to placement")]
    NoStore { store: u64 },

    #[error("{call} of key {key} gave up after {waited:?}: {reason}")]
    Deadline { call: &'static str, key: String, waited: Duration, reason: String },

    #[error(
        "{call} of key {key} may or may not have happened ({reason}): read the key before \
         trying again"
    )]
    OutcomeUnknown { call: &'static str, key: String, reason: String },

    #[error("store {store} refused {call} of key {key} in region {region}: {message}")]
    Refused { call: &'static str, key: String, region: u64, store: u64, message: String },

    #[error(
        "{call} is too large for one log entry of region {region} ({size} bytes): send less at once"
    )]
    TooLarge { call: &'static str, region: u64, size: u64 },

    #[error("the client has been shut down")]
    Closed,
}

/// How long it has been, without the digits that nobody reads.
pub(crate) fn waited_since(started: Instant) -> Duration {
    Duration::from_millis(u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX))
}
