//! The placement driver's replicated state: one region, never split, on a store of
//! its own beside the data.

use std::path::Path;
use std::sync::Arc;

use esker_engine::{Cf, DataDir, EngineOptions, Ident, KvEngine, KvSnapshot, LogEngine};
use esker_placement::{
    Leadership, MemberId, MemberInfo, Pairs, ReplicatedState, StateError, StateWrite,
};
use esker_raftstore::state::bootstrap_region;
use esker_raftstore::{
    MonotonicClock, Parts, RegionExt, RegionId, RequestContext, RequestError, RunningStore, Store,
    StoreConfig, StoreHandle, StoreId, Term,
};
use esker_rpc::proto::esker::command::{Delete, Mutation, Put, mutation::Kind};
use esker_rpc::proto::metapb::{Peer, Region, RegionEpoch};
use esker_rpc::transport::RaftTransport;
use futures_util::future::BoxFuture;
use tokio::sync::watch;

use super::outbox::{Audience, Events, MemberAddresses, NodeOutbox, RegionLeader};
use super::traffic::Traffic;
use crate::Error;

/// The one region.
const REGION: RegionId = RegionId(1);
/// Store ids of placement members have the top bit set: they never meet those of data stores.
const MEMBER_STORES: u64 = 1 << 63;

/// Who the members are. The same on each of them, but for `me`.
#[derive(Clone, Debug)]
pub struct Members {
    pub me: MemberId,
    pub all: Vec<MemberInfo>,
    /// Tells this set of members from every other one; kept in the data directory.
    pub tag: u64,
}

fn store_of(member: MemberId) -> StoreId {
    StoreId(MEMBER_STORES | member.0)
}

/// A running member's store.
pub struct MemberStore {
    running: RunningStore,
    _directory: DataDir,
}

impl MemberStore {
    /// Opens the member's store, making it at the first start.
    pub fn open(
        directory: &Path,
        members: &Members,
        traffic: &Traffic,
    ) -> Result<(MemberStore, Arc<MemberState>), Error> {
        let mut data = DataDir::open(directory)?;
        let me = store_of(members.me);
        let ident = Ident { cluster_id: members.tag, store_id: me.0 };
        let known = data.ident();
        if known.is_some_and(|known| known != ident) {
            return Err(Error::OtherMembers { path: directory.to_owned() });
        }
        let options = EngineOptions {
            block_cache_bytes: 16 << 20,
            write_buffer_bytes: 8 << 20,
            log_write_buffer_bytes: 16 << 20,
            ..EngineOptions::default()
        };
        let kv = KvEngine::open(&data.kv(), &options)?;
        let log = LogEngine::open(&data.log(), &options)?;
        if known.is_none() {
            bootstrap_region(&kv, &log, &region(members))?;
            data.write_ident(ident)?;
        }
        let addresses: Vec<(u64, String)> = members
            .all
            .iter()
            .map(|member| (store_of(member.id).0, member.address.clone()))
            .collect();
        let events = Arc::new(Events::default());
        let transport = RaftTransport::new(
            Arc::new(MemberAddresses(addresses.into())),
            me.0,
            members.tag,
            tokio::runtime::Handle::current(),
            events.clone(),
        );
        let (leaders, leader) = watch::channel(RegionLeader::default());
        let outbox = NodeOutbox::new(transport, Audience::Member(leaders));
        let store = Store::open(Parts {
            store: me,
            kv,
            log,
            snapshots: data.snap(),
            config: StoreConfig { workers: 1, apply_workers: 1, ..StoreConfig::default() },
            outbox: Arc::new(outbox),
            clock: Arc::new(MonotonicClock::default()),
        })?;
        data.empty_snapshots()?;
        let running = store.start()?;
        let handle = running.handle().clone();
        events.connect(handle.clone());
        traffic.add(members.tag, handle.clone(), data.snap());
        let state = MemberState::new(handle, members.all.clone(), leader);
        Ok((MemberStore { running, _directory: data }, Arc::new(state)))
    }

    /// Blocks until everything is on disk.
    pub fn stop(self) {
        self.running.stop();
    }
}

fn region(members: &Members) -> Region {
    Region {
        id: REGION.0,
        region_epoch: Some(RegionEpoch { conf_ver: 1, version: 1 }),
        peers: members
            .all
            .iter()
            .map(|member| Peer {
                id: member.id.0,
                store_id: store_of(member.id).0,
                ..Peer::default()
            })
            .collect(),
        ..Region::default()
    }
}

/// The state as the placement driver uses it.
pub struct MemberState {
    store: StoreHandle,
    members: Vec<MemberInfo>,
    leadership: watch::Receiver<Leadership>,
}

impl MemberState {
    fn new(
        store: StoreHandle,
        members: Vec<MemberInfo>,
        mut leaders: watch::Receiver<RegionLeader>,
    ) -> Self {
        let translate = |leader: &RegionLeader| Leadership {
            term: leader.term,
            leader: leader.leader.map(|peer| MemberId(peer.id)),
            is_self: leader.here,
        };
        let (sender, leadership) = watch::channel(translate(&leaders.borrow_and_update()));
        tokio::spawn(async move {
            while leaders.changed().await.is_ok() {
                sender.send_replace(translate(&leaders.borrow_and_update()));
            }
        });
        MemberState { store, members, leadership }
    }

    fn context(&self) -> RequestContext {
        let region = self.store.delegates().get(REGION);
        RequestContext {
            epoch: region.map(|region| region.descriptor().epoch()).unwrap_or_default(),
            ..RequestContext::default()
        }
    }
}

fn refused(error: RequestError) -> StateError {
    match error {
        // What is refused for the moment only may be tried again: an unknown
        // outcome is, and does no harm where there was none.
        RequestError::Undetermined(_)
        | RequestError::ServerIsBusy { .. }
        | RequestError::ReadIndexNotReady(_) => StateError::Unknown,
        RequestError::NotLeader { leader, .. } => {
            StateError::NotLeader { leader: leader.map(|peer| MemberId(peer.id)) }
        }
        other => {
            // No other refusal leaves an effect, and all of them end a term of office.
            tracing::warn!("placement state: {other}");
            StateError::NotLeader { leader: None }
        }
    }
}

fn with_prefix(kv: &KvSnapshot, prefix: &[u8]) -> Result<Pairs, StateError> {
    let failed = |error: esker_engine::EngineError| {
        tracing::error!("placement state: {error}");
        StateError::Unknown
    };
    let mut iter = kv.iter(Cf::Default, prefix, None);
    iter.seek_to_first();
    let mut pairs = Vec::new();
    while iter.valid().map_err(failed)? && iter.key().starts_with(prefix) {
        pairs.push((iter.key().to_vec(), iter.value().to_vec()));
        iter.next();
    }
    Ok(pairs)
}

impl ReplicatedState for MemberState {
    fn write(
        &self,
        writes: Vec<StateWrite>,
        term: u64,
    ) -> BoxFuture<'static, Result<(), StateError>> {
        let store = self.store.clone();
        let context = RequestContext { term: Some(Term(term)), ..self.context() };
        let mutations = writes
            .into_iter()
            .map(|write| match write {
                StateWrite::Put { key, value } => {
                    Kind::Put(Put { cf: 0, key: key.into(), value: value.into() })
                }
                StateWrite::Delete { key } => Kind::Delete(Delete { cf: 0, key: key.into() }),
            })
            .map(|kind| Mutation { kind: Some(kind) })
            .collect();
        Box::pin(async move {
            store.write(REGION, context, mutations).await.map(|_| ()).map_err(refused)
        })
    }

    fn scan(&self, prefix: Vec<u8>) -> BoxFuture<'static, Result<Pairs, StateError>> {
        let (store, context) = (self.store.clone(), self.context());
        Box::pin(async move {
            let view = store.snapshot(REGION, context).await.map_err(refused)?;
            with_prefix(&view.kv, &prefix)
        })
    }

    fn scan_stale(&self, prefix: Vec<u8>) -> BoxFuture<'static, Result<Pairs, StateError>> {
        let kv = self.store.engine().snapshot();
        Box::pin(async move { with_prefix(&kv, &prefix) })
    }

    fn leadership(&self) -> watch::Receiver<Leadership> {
        self.leadership.clone()
    }

    fn members(&self) -> Vec<MemberInfo> {
        self.members.clone()
    }

    fn lease(&self) -> Option<u64> {
        self.store.lease_term(REGION).map(|term| term.0)
    }
}
