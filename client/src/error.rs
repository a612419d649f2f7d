//! The errors of a client of a cluster.

use std::time::Duration;

use bytes::Bytes;
use esker_model::{RegionId, StoreId};
use esker_rpc::channel::AddressError;
use esker_rpc::display_key;
use esker_rpc::proto::pdpb::ErrorType;
use tokio::time::Instant;

/// Why a request did not succeed. Each message is one line that names what to look at.
///
/// A write of keys that ends with any variant but [`OutcomeUnknown`](ClientError::OutcomeUnknown)
/// has not happened and never will. So a caller may repeat it whenever it likes. The clients have
/// repeated by themselves what can be repeated, until the deadline of the call.
///
/// | what to do | variants |
/// |---|---|
/// | correct the addresses | [`Address`](Self::Address), [`NoEndpoints`](Self::NoEndpoints), [`NoPlacement`](Self::NoPlacement), [`ClusterMismatch`](Self::ClusterMismatch) |
/// | correct the request | [`Refused`](Self::Refused), [`TooLarge`](Self::TooLarge), [`NoStore`](Self::NoStore), [`NoSuchRegion`](Self::NoSuchRegion), [`NoReplica`](Self::NoReplica), [`KeyOutside`](Self::KeyOutside), [`TopRegion`](Self::TopRegion), and, as the reason in it says, [`RegionRefused`](Self::RegionRefused), [`NotReplaced`](Self::NotReplaced) and [`PlacementRefused`](Self::PlacementRefused) |
/// | try again later, and look at the cluster if that does not help | [`PlacementUnreachable`](Self::PlacementUnreachable), [`ReplicaDown`](Self::ReplicaDown), [`Deadline`](Self::Deadline), [`NoRegion`](Self::NoRegion), [`NoLeader`](Self::NoLeader) |
/// | find out what happened, then decide | [`OutcomeUnknown`](Self::OutcomeUnknown), and after a change by an operator [`NoAnswer`](Self::NoAnswer), [`ChangeUnknown`](Self::ChangeUnknown), [`NotTransferred`](Self::NotTransferred), [`ReplacementUnknown`](Self::ReplacementUnknown) |
/// | report a bug, or look for a server that is not Esker's | [`PlacementAnswer`](Self::PlacementAnswer) |
///
/// Keys are shown as text of at most 64 bytes of the key, by [`esker_rpc::display_key`], unless
/// they are [`Bytes`].
#[derive(Clone, Debug, thiserror::Error)]
pub enum ClientError {
    /// Something that was given as an address is not one. Nothing was asked.
    #[error(transparent)]
    Address(#[from] AddressError),

    /// The list of placement addresses is empty. Nothing was asked.
    #[error("no placement address was given; write HOST:PORT[,HOST:PORT...]")]
    NoEndpoints,

    /// No leading member was found, or no leader that was found answered the call in time. To be
    /// expected while a majority of the members is down or cut off.
    #[error("no placement leader found at {endpoints} within {waited:?}: {reason}")]
    PlacementUnreachable {
        /// The addresses that were asked, with commas between them.
        endpoints: String,
        /// For how long the client tried.
        waited: Duration,
        /// What the members answered.
        reason: String,
    },

    /// There is an answer from every address, and none from a placement member. Only
    /// [`PlacementClient::connect`](crate::PlacementClient::connect) and its variants return this.
    #[error(
        "no placement driver at {endpoints}: what answers there is a node that runs no placement \
         member, or another program; give the addresses of the placement members"
    )]
    NoPlacement {
        /// The addresses that were asked, with commas between them.
        endpoints: String,
    },

    /// The placement leader refuses the request, and would refuse it again. The methods of
    /// [`PlacementClient`](crate::PlacementClient) name the kinds that their callers should expect.
    #[error("placement refused {call}: {message} ({kind:?})")]
    PlacementRefused {
        /// The method of the protocol that was called.
        call: &'static str,
        /// The reason, for programs.
        kind: ErrorType,
        /// The reason, for people.
        message: String,
    },

    /// The placement leader's answer makes no sense.
    #[error("placement answered {call} with {problem}")]
    PlacementAnswer {
        /// The method of the protocol that was called.
        call: &'static str,
        /// What is wrong with the answer.
        problem: String,
    },

    /// The addresses belong to members of different clusters: one member named a leader which
    /// answers that it belongs to another cluster. A client that is connected never turns to
    /// another cluster, and reports [`PlacementUnreachable`](Self::PlacementUnreachable) instead.
    #[error(
        "{address} belongs to cluster {actual}, not to {expected}: check the placement addresses"
    )]
    ClusterMismatch {
        /// The member's address.
        address: String,
        /// The id of the cluster of the member that was asked first.
        expected: u64,
        /// The id of the member's cluster.
        actual: u64,
    },

    /// The cluster has no regions yet, because no store has started in it. Esker's own placement
    /// driver answers with [`PlacementRefused`](Self::PlacementRefused) and
    /// [`ErrorType::NotBootstrapped`] instead.
    #[error("no region holds key {key}: the cluster is not bootstrapped yet")]
    NoRegion {
        /// The key that was looked up.
        key: String,
    },

    /// Placement knows no store with this id. A store that has left the cluster is still known.
    #[error("store {store} is not known to placement")]
    NoStore {
        /// The id that was looked up.
        store: StoreId,
    },

    /// The deadline of an operation on keys has passed, and nothing was written. To be expected
    /// while a region has no majority, or while the cluster is overloaded.
    #[error("{call} of key {key} gave up after {waited:?}: {reason}")]
    Deadline {
        /// The operation, such as `put`.
        call: &'static str,
        /// Its first key.
        key: String,
        /// For how long the client tried.
        waited: Duration,
        /// Why the last attempt failed.
        reason: String,
    },

    /// A write may have happened, in part or as a whole, or may happen yet. To be expected when a
    /// store dies, or stops answering, while it has the request.
    ///
    /// A read of the key does not settle it, because the write may come after the read. What
    /// settles it is a write that is right in either case, or a compare-and-swap between values
    /// that are written only once:
    /// [`KvClient::compare_and_swap`](crate::KvClient::compare_and_swap) has an example.
    #[error(
        "{call} of key {key} may or may not have happened ({reason}): read the key before \
         trying again"
    )]
    OutcomeUnknown {
        /// The operation, such as `put`.
        call: &'static str,
        /// Its first key.
        key: String,
        /// Why the outcome is not known.
        reason: String,
    },

    /// A store refuses the request, and would refuse it again: for an empty key, a key of more than
    /// 8 KiB, or an answer of more than 48 MiB.
    #[error("store {store} refused {call} of key {key} in region {region}: {message}")]
    Refused {
        /// The operation, such as `put`.
        call: &'static str,
        /// Its first key.
        key: String,
        /// The id of the region that the key is in.
        region: RegionId,
        /// The id of the store that was asked.
        store: StoreId,
        /// The store's reason.
        message: String,
    },

    /// A request is larger than a store takes. A write has to fit in one entry of a log, which has
    /// room for 8 MiB of keys and values, with 32 bytes for each pair. Send smaller values.
    #[error("{call} is too large for region {region} ({size} bytes): send less at once")]
    TooLarge {
        /// The operation, such as `put`.
        call: &'static str,
        /// The id of the region that the keys are in.
        region: RegionId,
        /// The size of the request, or of its entry, in bytes.
        size: u64,
    },

    /// The client's task has ended, because the runtime in which the client was made has ended.
    #[error("the client has been shut down")]
    Closed,

    /// Placement knows no region with this id. A region that a split has just made is known when
    /// its leader has reported it.
    #[error("there is no region {region}")]
    NoSuchRegion {
        /// The id that was looked up.
        region: RegionId,
    },

    /// Placement never named a leader of a region that took a change, in all attempts.
    #[error(
        "region {region} has no leader that the placement driver knows of: wait for an election, \
         or start more stores"
    )]
    NoLeader {
        /// The id of the region.
        region: RegionId,
    },

    /// A region cannot be led by a store that has no replica of it.
    #[error("store {store} has no replica of region {region}: choose one of {}", list(.replicas))]
    NoReplica {
        /// The id of the region.
        region: RegionId,
        /// The id of the store that was to lead.
        store: StoreId,
        /// The ids of the stores that have replicas, in ascending order.
        replicas: Vec<StoreId>,
    },

    /// A leader agreed to hand over, or could not be asked, and the other replica did not lead in
    /// time. It may still become the leader.
    #[error("leadership of region {region} did not come to store {store} within {waited:?}")]
    NotTransferred {
        /// The id of the region.
        region: RegionId,
        /// The id of the store that was to lead it.
        store: StoreId,
        /// For how long the client waited.
        waited: Duration,
    },

    /// A replica that its region's leader does not hear of cannot become the leader. Nothing was
    /// asked.
    #[error(
        "the leader of region {region} has not heard of the replica on store {store} for {silent:?}: \
         it cannot lead"
    )]
    ReplicaDown {
        /// The id of the region.
        region: RegionId,
        /// The id of the store that was to lead it.
        store: StoreId,
        /// For how long the leader has not heard of the replica.
        silent: Duration,
    },

    /// The region above all keys is not split.
    #[error("region {region} lies above all keys and stays empty: it cannot be split")]
    TopRegion {
        /// The id of the region.
        region: RegionId,
    },

    /// A region is not split by a key at or before its start, or at or behind its end.
    #[error(
        "key {} does not split region {region}, which goes from {} to {}",
        display_key(key),
        display_key(start),
        display_key(end)
    )]
    KeyOutside {
        /// The id of the region.
        region: RegionId,
        /// The first of the given keys that does not split the region.
        key: Bytes,
        /// The region's first key.
        start: Bytes,
        /// The first key behind the region; empty if there is none.
        end: Bytes,
    },

    /// A store could not be reached, or did not answer in time. If it was to change something, the
    /// change may have been made.
    #[error("store {store} at {address} did not answer: {reason}")]
    NoAnswer {
        /// The id of the store.
        store: StoreId,
        /// Where the store listens, as placement knows it.
        address: String,
        /// What happened instead of an answer.
        reason: String,
    },

    /// A region's replica refuses the request of an operator. The reason says whether the request
    /// is impossible, or came at a bad moment. A leader that is busy was asked several times.
    #[error("region {region} refused: {reason}")]
    RegionRefused {
        /// The id of the region.
        region: RegionId,
        /// The reason that the store gave.
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
        region: RegionId,
        /// Why the outcome is not known.
        reason: String,
    },

    /// A placement member was not replaced. If the leader's reason is that something is not
    /// finished, the call may be repeated, and goes on from there.
    #[error("the member was not replaced: {reason}")]
    NotReplaced {
        /// The leader's reason, or why it could not be asked.
        reason: String,
    },

    /// It is not known whether a placement member was replaced: a leader was asked, and no answer
    /// of it arrived.
    #[error(
        "{name} may or may not have been replaced ({reason}): look at the members before trying \
         again"
    )]
    ReplacementUnknown {
        /// The member's name.
        name: String,
        /// What was said last.
        reason: String,
    },
}

/// Ids in a list for people.
fn list(ids: &[StoreId]) -> String {
    let names: Vec<_> = ids.iter().map(StoreId::to_string).collect();
    names.join(", ")
}

/// The time since `started`, in whole milliseconds.
pub(crate) fn waited_since(started: Instant) -> Duration {
    Duration::from_millis(u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX))
}
