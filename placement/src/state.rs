//! The durable state of the placement driver: a few plain keys in a replicated key space, and the
//! values under them.
//!
//! Durable are the cluster's id, whether it is bootstrapped, the stores, the bounds of the windows
//! of ids and timestamps, and the GC safe points. Regions and heartbeats are not durable: see
//! [`crate::map`].

use bytes::Bytes;
use esker_model::MemberId;
use esker_rpc::proto::metapb;
use futures_util::future::BoxFuture;
use prost::Message;
use thiserror::Error;
use tokio::sync::watch;

/// One change of the replicated key space.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StateWrite {
    Put { key: Vec<u8>, value: Vec<u8> },
    Delete { key: Vec<u8> },
}

/// Which member leads the placement driver, as this member knows it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Leadership {
    pub term: u64,
    pub leader: Option<MemberId>,
    pub is_self: bool,
}

/// One member of the placement driver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemberInfo {
    pub id: MemberId,
    pub name: String,
    /// `host:port`, without a scheme.
    pub address: String,
}

/// Why the replicated key space did not carry out a request.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum StateError {
    /// The write was not done and never will be.
    #[error("this member does not lead the placement driver{}", named(*leader))]
    NotLeader { leader: Option<MemberId> },
    /// The write may have been done, or may still be.
    #[error("the outcome of a write to the placement driver's state is unknown")]
    Unknown,
}

fn named(leader: Option<MemberId>) -> String {
    leader.map_or_else(String::new, |leader| format!("; member {leader} does"))
}

/// Pairs of keys and values, in key order.
pub type Pairs = Vec<(Vec<u8>, Vec<u8>)>;

/// The replicated key space in which the placement driver keeps its state. It is implemented over a
/// raftstore of one region that is never split.
pub trait ReplicatedState: Send + Sync + 'static {
    /// Writes atomically. Succeeds only when the entry was proposed *and* committed by this member
    /// as leader in exactly `term`. A deposed leader's write must not succeed, because its window
    /// of timestamps would overlap its successor's.
    fn write(
        &self,
        writes: Vec<StateWrite>,
        term: u64,
    ) -> BoxFuture<'static, Result<(), StateError>>;

    /// A linearizable read of all keys with `prefix`. It includes every write that was
    /// acknowledged, by any member, before the call.
    fn scan(&self, prefix: Vec<u8>) -> BoxFuture<'static, Result<Pairs, StateError>>;

    /// What this member has applied, however old. Works on any member, and without the others. For
    /// facts that never change after they were written.
    fn scan_stale(&self, prefix: Vec<u8>) -> BoxFuture<'static, Result<Pairs, StateError>>;

    /// Which member leads, and every change of that. The term in it is the one to pass to
    /// [`ReplicatedState::write`].
    fn leadership(&self) -> watch::Receiver<Leadership>;

    /// Notes that a request was for this cluster, which is not zero. A member that is not part of a
    /// group yet may make use of that.
    fn heard_of_cluster(&self, _cluster: u64) {}

    /// This member's own id. A member that is replaced has another id from then on.
    fn me(&self) -> MemberId;

    /// All members of the group, including this one, as this member knows them now. A member that
    /// is replaced has another id and address from then on.
    fn members(&self) -> Vec<MemberInfo>;

    /// The term in which this member leads *and* holds a valid lease at this moment, so that no
    /// other member can have become leader. Called for everything that is handed out, so it must be
    /// cheap. It returns the term, because a member that was deposed and elected again in between
    /// has a lease, too, but its memory of the earlier term is void.
    fn lease(&self) -> Option<u64>;
}

/// The first byte of every value.
const FORMAT: u8 = 1;

/// All keys begin with this, so that the key space has room for other uses.
pub const PREFIX: &[u8] = b"pd/";
const CLUSTER_ID: &[u8] = b"pd/cluster_id";
const BOOTSTRAPPED: &[u8] = b"pd/bootstrapped";
const ID_BOUND: &[u8] = b"pd/id_bound";
const TIMESTAMP_BOUND: &[u8] = b"pd/timestamp_bound";
const MAX_REPLICAS: &[u8] = b"pd/max_replicas";
const GC_SAFE_POINT: &[u8] = b"pd/gc/safe_point";
const GC_SERVICE: &[u8] = b"pd/gc/service/";
const STORE: &[u8] = b"pd/store/";

/// The prefix under which the cluster's id alone is found.
pub const CLUSTER_ID_PREFIX: &[u8] = CLUSTER_ID;

/// A stored value that cannot be read. The data is damaged or from a later release. Going on would
/// lose the content of the value.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error(
    "the placement driver's stored value at {} is not readable: {why}",
    esker_rpc::display_key(key)
)]
pub struct DamagedState {
    pub key: Vec<u8>,
    pub why: String,
}

/// A GC safe point that a service holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceSafePoint {
    pub safe_point: u64,
    /// Wall clock, seconds; `i64::MAX` never expires.
    pub expires_at_s: i64,
}

/// Everything durable, as it is loaded by a new leader.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DurableState {
    pub cluster_id: Option<u64>,
    pub bootstrapped: bool,
    pub id_bound: Option<u64>,
    pub timestamp_bound: Option<u64>,
    pub max_replicas: Option<u64>,
    pub gc_safe_point: u64,
    pub services: Vec<(Vec<u8>, ServiceSafePoint)>,
    pub stores: Vec<metapb::Store>,
}

/// One durable fact to be written.
#[derive(Clone, Debug)]
pub enum Fact {
    ClusterId(u64),
    Bootstrapped,
    IdBound(u64),
    /// Milliseconds.
    TimestampBound(u64),
    MaxReplicas(u64),
    GcSafePoint(u64),
    Service(Vec<u8>, ServiceSafePoint),
    ServiceGone(Vec<u8>),
    Store(Box<metapb::Store>),
}

impl Fact {
    /// The write that makes the fact durable.
    pub fn into_write(self) -> StateWrite {
        match self {
            Self::ClusterId(id) => put(CLUSTER_ID, &id.to_be_bytes()),
            Self::Bootstrapped => put(BOOTSTRAPPED, &[]),
            Self::IdBound(bound) => put(ID_BOUND, &bound.to_be_bytes()),
            Self::TimestampBound(bound) => put(TIMESTAMP_BOUND, &bound.to_be_bytes()),
            Self::MaxReplicas(count) => put(MAX_REPLICAS, &count.to_be_bytes()),
            Self::GcSafePoint(point) => put(GC_SAFE_POINT, &point.to_be_bytes()),
            Self::Service(id, point) => {
                let mut value = point.safe_point.to_be_bytes().to_vec();
                value.extend(point.expires_at_s.to_be_bytes());
                put(&[GC_SERVICE, &id].concat(), &value)
            }
            Self::ServiceGone(id) => StateWrite::Delete { key: [GC_SERVICE, &id].concat() },
            Self::Store(store) => {
                put(&[STORE, &store.id.to_be_bytes()].concat(), &store.encode_to_vec())
            }
        }
    }
}

fn put(key: &[u8], payload: &[u8]) -> StateWrite {
    let mut value = vec![FORMAT];
    value.extend_from_slice(payload);
    StateWrite::Put { key: key.to_vec(), value }
}

impl DurableState {
    /// Reads the pairs under [`PREFIX`]. Keys that this release does not know are ignored. Values
    /// that it cannot read are errors.
    pub fn decode(pairs: Pairs) -> Result<Self, DamagedState> {
        let mut state = Self::default();
        for (key, value) in pairs {
            state.take(&key, &value).map_err(|why| DamagedState { key, why })?;
        }
        Ok(state)
    }

    fn take(&mut self, key: &[u8], value: &[u8]) -> Result<(), String> {
        let payload = match value.split_first() {
            Some((&FORMAT, payload)) => payload,
            Some((format, _)) => {
                return Err(format!("format {format}, this release reads {FORMAT}"));
            }
            None => return Err("it is empty".to_owned()),
        };
        match key {
            CLUSTER_ID => self.cluster_id = Some(number(payload)?),
            BOOTSTRAPPED => self.bootstrapped = true,
            ID_BOUND => self.id_bound = Some(number(payload)?),
            TIMESTAMP_BOUND => self.timestamp_bound = Some(number(payload)?),
            MAX_REPLICAS => self.max_replicas = Some(number(payload)?),
            GC_SAFE_POINT => self.gc_safe_point = number(payload)?,
            _ => {
                if let Some(id) = key.strip_prefix(GC_SERVICE) {
                    let (point, expiry) =
                        payload.split_at_checked(size_of::<u64>()).ok_or("it is too short")?;
                    let point = ServiceSafePoint {
                        safe_point: number(point)?,
                        expires_at_s: number(expiry)?.cast_signed(),
                    };
                    self.services.push((id.to_vec(), point));
                } else if key.starts_with(STORE) {
                    let store = metapb::Store::decode(Bytes::copy_from_slice(payload))
                        .map_err(|error| error.to_string())?;
                    self.stores.push(store);
                }
            }
        }
        Ok(())
    }
}

fn number(payload: &[u8]) -> Result<u64, String> {
    payload
        .try_into()
        .map(u64::from_be_bytes)
        .map_err(|_| format!("{} bytes instead of 8", payload.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_what_a_new_leader_reads() {
        let point = ServiceSafePoint { safe_point: 8, expires_at_s: i64::MAX };
        let store = metapb::Store { id: 4, address: "a:1".to_owned(), ..Default::default() };
        let facts = [
            Fact::ClusterId(7),
            Fact::Bootstrapped,
            Fact::IdBound(1_001),
            Fact::TimestampBound(99),
            Fact::MaxReplicas(5),
            Fact::GcSafePoint(6),
            Fact::Service(b"backup".to_vec(), point.clone()),
            Fact::Store(Box::new(store.clone())),
        ];
        let pairs = facts
            .into_iter()
            .map(|fact| match fact.into_write() {
                StateWrite::Put { key, value } => (key, value),
                StateWrite::Delete { .. } => unreachable!("every fact here is a put"),
            })
            .collect();
        let expected = DurableState {
            cluster_id: Some(7),
            bootstrapped: true,
            id_bound: Some(1_001),
            timestamp_bound: Some(99),
            max_replicas: Some(5),
            gc_safe_point: 6,
            services: vec![(b"backup".to_vec(), point)],
            stores: vec![store],
        };
        assert_eq!(DurableState::decode(pairs), Ok(expected));
    }

    #[test]
    fn a_value_of_a_later_format_or_a_damaged_one_is_an_error_that_names_its_key() {
        for value in [vec![], vec![FORMAT + 1, 0], vec![FORMAT, 1, 2]] {
            let damaged = DurableState::decode(vec![(CLUSTER_ID.to_vec(), value)]);
            assert!(damaged.unwrap_err().to_string().contains("pd/cluster_id"));
        }
    }
}
