//! The errors of a client of a cluster.

use std::time::Duration;

use bytes::Bytes;
use esker_rpc::channel::AddressError;
use esker_rpc::display_key;
use esker_rpc::proto::pdpb::ErrorType;
use tokio::time::Instant;

/// Why a request did not succeed. Each message is one line that names what to look at.
///
/// A write of keys that ends with any variant but [`OutcomeUnknown`](ClientError::OutcomeUnknown)
/// has not happened and never will. Keys are shown as text of at most 64 bytes of the key, by
/// [`esker_rpc::display_key`], unless they are [`Bytes`].
#[derive(Clone, Debug, thiserror::Error)]
pub enum ClientError {
    /// Something that was given as an address is not one.
    #[error(transparent)]
    Address(#[from] AddressError),

    /// The list of placement addresses is empty.
    #[error("no placement address was given; write HOST:PORT[,HOST:PORT...]")]
    NoEndpoints,

    /// No leading member was found, or no leader that was found answered the call in time.
    #[error("no placement leader found at {endpoints} within {waited:?}: {reason}")]
    PlacementUnreachable {
        /// The addresses that were asked, with commas between them.
        endpoints: String,
        /// For how long the client tried.
        waited: Duration,
        /// What the members answered.
        reason: String,
    },

    /// There is an answer from every address, and none from a placement member.
    #[error(
        "no placement driver at {endpoints}: what answers there is a node that runs no placement \
         member, or another program; give the addresses of the placement members"
    )]
    NoPlacement {
        /// The addresses that were asked, with commas between them.
        endpoints: String,
    },

    /// The placement leader refuses the request, and would refuse it again.
    #[error("placement refused {call}: {message} ({kind:?})")]
    PlacementRefused {
        /// The call.
        call: &'static str,
        /// The reason, for programs.
        kind: ErrorType,
        /// The reason, for people.
        message: String,
    },

    /// The placement leader's answer makes no sense.
    #[error("placement answered {call} with {problem}")]
    PlacementAnswer {
        /// The call.
        call: &'static str,
        /// What is wrong with the answer.
        problem: String,
    },

    /// A member of another cluster answered. The call was not sent to it.
    #[error(
        "{address} belongs to cluster {actual}, not to {expected}: check the placement addresses"
    )]
    ClusterMismatch {
        /// The member's address.
        address: String,
        /// The id of the cluster that this client belongs to.
        expected: u64,
        /// The id of the member's cluster.
        actual: u64,
    },

    /// Placement knows no region for a key.
    #[error("no region holds key {key}: the cluster is not bootstrapped yet")]
    NoRegion {
        /// The key.
        key: String,
    },

    /// Placement knows no store with this id.
    #[error("store {store} is not known to placement")]
    NoStore {
        /// The id.
        store: u64,
    },

    /// The deadline of an operation on keys has passed.
    #[error("{call} of key {key} gave up after {waited:?}: {reason}")]
    Deadline {
        /// The operation.
        call: &'static str,
        /// Its first key.
        key: String,
        /// For how long the client tried.
        waited: Duration,
        /// Why the last attempt failed.
        reason: String,
    },

    /// A write may have happened, in part or as a whole, or may happen yet.
    #[error(
        "{call} of key {key} may or may not have happened ({reason}): read the key before \
         trying again"
    )]
    OutcomeUnknown {
        /// The operation.
        call: &'static str,
        /// Its first key.
        key: String,
        /// Why the outcome is not known.
        reason: String,
    },

    /// A store refuses the request, and would refuse it again.
    #[error("store {store} refused {call} of key {key} in region {region}: {message}")]
    Refused {
        /// The operation.
        call: &'static str,
        /// Its first key.
        key: String,
        /// The region that the key is in.
        region: u64,
        /// The store that leads it.
        store: u64,
        /// The store's reason.
        message: String,
    },

    /// A request is larger than a store takes. A write has to fit in one entry of a log.
    #[error("{call} is too large for region {region} ({size} bytes): send less at once")]
    TooLarge {
        /// The operation.
        call: &'static str,
        /// The region.
        region: u64,
        /// The size of the request, or of its entry, in bytes.
        size: u64,
    },

    /// The client's task has ended, because its runtime has ended.
    #[error("the client has been shut down")]
    Closed,

    /// Placement knows no region with this id.
    #[error("there is no region {region}")]
    NoSuchRegion {
        /// The id.
        region: u64,
    },

    /// Placement never named a leader of a region that took a change, in all attempts.
    #[error(
        "region {region} has no leader that the placement driver knows of: wait for an election, \
         or start more stores"
    )]
    NoLeader {
        /// The region.
        region: u64,
    },

    /// A region cannot be led by a store that has no replica of it.
    #[error("store {store} has no replica of region {region}: choose one of {}", list(.replicas))]
    NoReplica {
        /// The region.
        region: u64,
        /// The store.
        store: u64,
        /// The stores that have replicas.
        replicas: Vec<u64>,
    },

    /// A leader agreed to hand over, or could not be asked, and the other replica did not lead in
    /// time. It may still become the leader.
    #[error("leadership of region {region} did not come to store {store} within {waited:?}")]
    NotTransferred {
        /// The region.
        region: u64,
        /// The store that was to lead it.
        store: u64,
        /// For how long the client waited.
        waited: Duration,
    },

    /// A region is not split by a key at or before its start, or at or behind its end.
    #[error(
        "key {} does not split region {region}, which goes from {} to {}",
        display_key(key),
        display_key(start),
        display_key(end)
    )]
    KeyOutside {
        /// The region.
        region: u64,
        /// The key.
        key: Bytes,
        /// The region's first key.
        start: Bytes,
        /// The first key behind the region; empty if there is none.
        end: Bytes,
    },

    /// A store could not be reached, or could not be asked.
    #[error("store {store} at {address} did not answer: {reason}")]
    NoAnswer {
        /// The store.
        store: u64,
        /// Where the store listens, as placement knows it.
        address: String,
        /// What happened instead of an answer.
        reason: String,
    },

    /// The leader of a region refuses the request, and would refuse it again. A leader that is busy
    /// was asked several times.
    #[error("region {region} refused: {reason}")]
    RegionRefused {
        /// The region.
        region: u64,
        /// The leader's reason.
        reason: String,
    },

    /// A change of a region may have been made, or may be made yet.
    #[error(
        "{change} of region {region} may or may not have happened ({reason}): look at the region \
         before trying again"
    )]
    ChangeUnknown {
        /// The change: "the split" or "the transfer of leadership".
        change: &'static str,
        /// The region, as it was called before the change.
        region: u64,
        /// Why the outcome is not known.
        reason: String,
    },

    /// A placement member was not replaced. If the reason is that the leader could not be asked, it
    /// is not known whether the member will be replaced.
    #[error("the member was not replaced: {reason}")]
    NotReplaced {
        /// The leader's reason, or why it could not be asked.
        reason: String,
    },
}

/// Ids in a list for people.
fn list(ids: &[u64]) -> String {
    let names: Vec<_> = ids.iter().map(u64::to_string).collect();
    names.join(", ")
}

/// The time since `started`, in whole milliseconds.
pub(crate) fn waited_since(started: Instant) -> Duration {
    Duration::from_millis(u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX))
}
