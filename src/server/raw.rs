//! Raw requests: a user's keys and values against one region.
//!
//! A request becomes either one write command or reads of one view of the region.
//! What goes wrong is a [`RawError`], and becomes an answer in one place, [`RawStore::refuse`]:
//! what concerns the region, a region error that clients act on; what is wrong with the
//! request itself, a sentence.

use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use esker_engine::{Cf, EngineError};
use esker_model::{KeyRange, LogIndex, PeerId, RegionId, StoreId, Term};
use esker_raftstore::raw_value::RawValue;
use esker_raftstore::{
    CompareAndSwap, Mutation, RegionSnapshot, RequestContext, RequestError, StoreHandle, Swap,
    WriteResult, WriteTag,
};
use esker_rpc::convert::{self, bound};
use esker_rpc::display_key;
use esker_rpc::proto::errorpb;
use esker_rpc::proto::kvrpcpb::{Context, KvPair};
use tonic::Status;

use super::keys::KeyLayout;

/// The most bytes of keys and values that one answer holds: what a message may
/// carry, less room for everything around them.
pub const MAX_ANSWER_BYTES: u64 = 48 << 20;

/// What is left of [`MAX_ANSWER_BYTES`] for one request.
pub struct Budget(u64);

impl Default for Budget {
    fn default() -> Self {
        Budget(MAX_ANSWER_BYTES)
    }
}

impl Budget {
    /// Fewer pairs than asked for would tell a client that there are no more; so a
    /// request for too much is refused as a whole.
    pub fn spend(&mut self, bytes: usize) -> Result<(), RawError> {
        self.0 = self.0.checked_sub(bytes as u64).ok_or_else(|| {
            RawError::Refused(format!(
                "the answer is larger than {} MiB; ask for fewer keys at once",
                MAX_ANSWER_BYTES >> 20
            ))
        })?;
        Ok(())
    }

    pub fn spent(&self) -> u64 {
        MAX_ANSWER_BYTES - self.0
    }
}

/// Why a raw request was not carried out.
#[derive(Debug)]
pub enum RawError {
    /// For the client's region logic.
    Region(RequestError),
    /// For the user: what is wrong with the request. It would be refused again.
    Refused(String),
    /// The client was told of another cluster, which perhaps had this address once.
    OtherCluster { asked: u64, here: u64 },
    /// The engine cannot read what it should hold.
    Engine(EngineError),
    /// What is stored makes no sense.
    Damaged(String),
}

/// What a client is told instead of an answer.
#[derive(Debug)]
pub enum Refusal {
    /// Inside of the response: the client's region logic acts on it.
    Region(Box<errorpb::Error>),
    /// For the user: in the response where it has a place for a text, and a status otherwise.
    Said(Status),
    /// For the user, always a status: no client that it is for should make anything of a response.
    Status(Status),
}

impl From<RequestError> for RawError {
    fn from(error: RequestError) -> Self {
        match error {
            // Nothing about the region is wrong; asking elsewhere would not help.
            RequestError::EmptyKey | RequestError::KeyTooLarge { .. } => {
                RawError::Refused(error.to_string())
            }
            other => RawError::Region(other),
        }
    }
}

impl From<convert::Malformed> for RawError {
    fn from(error: convert::Malformed) -> Self {
        RawError::Refused(error.to_string())
    }
}

impl From<EngineError> for RawError {
    fn from(error: EngineError) -> Self {
        RawError::Engine(error)
    }
}

pub fn now_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// The column family that a request names; none is the default one.
pub fn family(name: &str) -> Result<Cf, RawError> {
    match name {
        "" | "default" => Ok(Cf::Default),
        "lock" => Ok(Cf::Lock),
        "write" => Ok(Cf::Write),
        other => Err(RawError::Refused(format!(
            "unknown column family {other:?}; there are default, lock and write"
        ))),
    }
}

/// A raw request's view of a store.
#[derive(Clone)]
pub struct RawStore {
    pub store: StoreHandle,
    pub cluster_id: u64,
}

/// What every raw request says about where it goes.
pub struct Target {
    pub region: RegionId,
    pub context: RequestContext,
}

impl RawStore {
    /// The answer to what went wrong. Whatever is to happen besides, happens here.
    pub fn refuse(&self, error: RawError) -> Refusal {
        match error {
            RawError::Region(error) => Refusal::Region(Box::new(error.to_proto())),
            RawError::Refused(why) => Refusal::Said(Status::invalid_argument(why)),
            RawError::OtherCluster { asked, here } => {
                Refusal::Status(Status::failed_precondition(format!(
                    "the request is for cluster {asked}, this store belongs to cluster {here}: \
                     check the client's placement addresses"
                )))
            }
            // The store has begun to hand its regions over: another replica has the data. The
            // client is sent there, as when a store stops.
            RawError::Engine(error) if error.is_corruption() => {
                let (store, region) = (self.store.store_id(), RegionId(0));
                self.refuse(RawError::Region(RequestError::Stopped { store, region }))
            }
            RawError::Engine(error) => Refusal::Said(Status::data_loss(error.to_string())),
            RawError::Damaged(what) => Refusal::Said(Status::data_loss(what)),
        }
    }

    /// Where a request goes, once it is known to be meant for this store. The first thing that
    /// every request does.
    pub fn target(&self, context: Option<&Context>) -> Result<Target, RawError> {
        let context = context.cloned().unwrap_or_default();
        // Most clients do not say.
        if context.cluster_id != 0 && context.cluster_id != self.cluster_id {
            let (asked, here) = (context.cluster_id, self.cluster_id);
            return Err(RawError::OtherCluster { asked, here });
        }
        let region = RegionId(context.region_id);
        let Some(epoch) = context.region_epoch else {
            // Nothing that a client believes is as old as nothing: it is told what is here.
            let known = self.store.delegates().get(region).map(|known| known.descriptor());
            return Err(match known {
                Some(known) => {
                    let current = vec![(*known).clone()];
                    RequestError::EpochNotMatch { region, current }.into()
                }
                None => RequestError::RegionNotFound(region).into(),
            });
        };
        let peer = context.peer.filter(|peer| peer.id != 0);
        if let Some(asked) = context.peer.map(|peer| StoreId(peer.store_id))
            && asked.0 != 0
            && asked != self.store.store_id()
        {
            let actual = self.store.store_id();
            return Err(RequestError::StoreNotMatch { asked, actual }.into());
        }
        Ok(Target {
            region,
            context: RequestContext {
                epoch: epoch.try_into()?,
                peer: peer.map(|peer| PeerId(peer.id)),
                term: (context.term != 0).then_some(Term(context.term)),
                replica_read: context.replica_read,
                tag: context.write_tag.map(|tag| WriteTag {
                    client: tag.client,
                    sequence: tag.sequence,
                    horizon: LogIndex(tag.horizon),
                    now_s: now_seconds(),
                }),
            },
        })
    }

    pub async fn view(&self, target: Target) -> Result<RegionSnapshot, RawError> {
        Ok(self.store.snapshot(target.region, target.context).await?)
    }

    pub async fn write(
        &self,
        target: Target,
        mutations: Vec<Mutation>,
    ) -> Result<WriteResult, RawError> {
        Ok(self.store.write(target.region, target.context, mutations).await?)
    }

    /// As [`Self::write`]; returns where in the log it was decided, for who sent a tag.
    async fn decided(&self, target: Target, mutations: Vec<Mutation>) -> Result<u64, RawError> {
        let tagged = target.context.tag.is_some();
        let result = self.write(target, mutations).await?;
        Ok(if tagged { result.index.0 } else { 0 })
    }

    pub async fn get(
        &self,
        context: Option<&Context>,
        cf: &str,
        key: &Bytes,
    ) -> Result<Option<RawValue>, RawError> {
        let target = self.target(context)?;
        let cf = family(cf)?;
        let stored = KeyLayout::of(context).stored(key)?;
        let view = self.view(target).await?;
        let found = live_value(&view, cf, &stored, now_seconds())?;
        let bytes = key.len() + found.as_ref().map_or(0, |value| value.value.len());
        view.count_read(1, bytes as u64);
        Ok(found)
    }

    /// The pairs found, in the order in which they were asked for.
    pub async fn batch_get(
        &self,
        context: Option<&Context>,
        cf: &str,
        keys: Vec<Bytes>,
    ) -> Result<Vec<KvPair>, RawError> {
        let target = self.target(context)?;
        let cf = family(cf)?;
        let layout = KeyLayout::of(context);
        let keys = keys
            .into_iter()
            .map(|key| Ok((layout.stored(&key)?, key)))
            .collect::<Result<Vec<_>, RequestError>>()?;
        let view = self.view(target).await?;
        let now = now_seconds();
        let mut pairs = Vec::new();
        let mut budget = Budget::default();
        for (stored, key) in keys {
            if let Some(found) = live_value(&view, cf, &stored, now)? {
                budget.spend(key.len() + found.value.len())?;
                pairs.push(KvPair { key, value: found.value, ..KvPair::default() });
            }
        }
        view.count_read(pairs.len() as u64, budget.spent());
        Ok(pairs)
    }

    pub async fn put(
        &self,
        context: Option<&Context>,
        cf: &str,
        pairs: Vec<(Bytes, Bytes, u64)>,
    ) -> Result<u64, RawError> {
        let target = self.target(context)?;
        let cf = family(cf)?;
        let (layout, now) = (KeyLayout::of(context), now_seconds());
        let mutations = pairs
            .into_iter()
            .map(|(key, value, ttl)| {
                let key = layout.stored(&key)?;
                let expires_at = (ttl != 0).then(|| now.saturating_add(ttl));
                let value = RawValue::new(value, expires_at).encode();
                Ok(Mutation::Put { cf, key, value })
            })
            .collect::<Result<_, RequestError>>()?;
        self.decided(target, mutations).await
    }

    pub async fn delete(
        &self,
        context: Option<&Context>,
        cf: &str,
        keys: Vec<Bytes>,
    ) -> Result<u64, RawError> {
        let target = self.target(context)?;
        let cf = family(cf)?;
        let layout = KeyLayout::of(context);
        let mutations = keys
            .iter()
            .map(|key| {
                let key = layout.stored(key)?;
                Ok(Mutation::Delete { cf, key })
            })
            .collect::<Result<_, RequestError>>()?;
        self.decided(target, mutations).await
    }

    pub async fn delete_range(
        &self,
        context: Option<&Context>,
        cf: &str,
        start: Bytes,
        end: Bytes,
    ) -> Result<u64, RawError> {
        let target = self.target(context)?;
        let cf = family(cf)?;
        if !end.is_empty() && start >= end {
            return match start == end {
                true => Ok(0),
                false => Err(RawError::Refused("the start of the range is after its end".into())),
            };
        }
        let layout = KeyLayout::of(context);
        let range = KeyRange::new(layout.bound(&start), bound(layout.bound(&end)));
        let range = range.map_err(|error| RawError::Refused(error.to_string()))?;
        self.decided(target, vec![Mutation::DeleteRange { cf, range }]).await
    }

    /// Writes a value (with its time to live in seconds, zero for none), or removes the key where
    /// there is no value to write, if the key has the value `expected`, or none.
    pub async fn compare_and_swap(
        &self,
        context: Option<&Context>,
        cf: &str,
        key: &Bytes,
        expected: Option<Bytes>,
        value: Option<(Bytes, u64)>,
    ) -> Result<WriteResult, RawError> {
        let target = self.target(context)?;
        let (cf, key) = (family(cf)?, KeyLayout::of(context).stored(key)?);
        let now_s = now_seconds();
        let then = match value {
            None => Swap::Delete,
            Some((value, ttl)) => {
                Swap::Put { value, expires_at: (ttl != 0).then(|| now_s.saturating_add(ttl)) }
            }
        };
        let swap = CompareAndSwap { cf, key, expected, then, now_s };
        self.write(target, vec![Mutation::CompareAndSwap(swap)]).await
    }
}

/// Runs what reads too much for a thread that serves others, too: a whole region, or ranges of it.
pub async fn blocking<T: Send + 'static>(
    store: &StoreHandle,
    region: RegionId,
    read: impl FnOnce() -> Result<T, RawError> + Send + 'static,
) -> Result<T, RawError> {
    let stopped = RequestError::Stopped { store: store.store_id(), region };
    tokio::task::spawn_blocking(read).await.unwrap_or_else(|_| Err(stopped.into()))
}

pub fn decode(stored: Bytes, key: &[u8]) -> Result<RawValue, RawError> {
    RawValue::decode(stored)
        .map_err(|error| RawError::Damaged(format!("value of key {}: {error}", display_key(key))))
}

fn live_value(
    view: &RegionSnapshot,
    cf: Cf,
    key: &Bytes,
    now: u64,
) -> Result<Option<RawValue>, RawError> {
    if !view.descriptor.contains(key) {
        return Err(RequestError::KeyNotInRegion {
            region: view.descriptor.id,
            key: key.clone(),
            range: view.descriptor.range.clone(),
        }
        .into());
    }
    let Some(stored) = view.kv.get(cf, key)? else { return Ok(None) };
    let value = decode(stored.into(), key)?;
    Ok(Some(value).filter(|value| value.is_live(now)))
}
