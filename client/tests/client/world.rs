//! A cluster without consensus. All stores share one map of keys. Each answers for the regions that
//! it leads, with the region errors that a real store would return.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Bound;
use std::sync::Arc;

use bytes::Bytes;
use esker_model::StoreId;
use esker_rpc::proto::errorpb::{
    self, EpochNotMatch, Forgotten, KeyNotInRegion, NotLeader, RegionNotFound,
};
use esker_rpc::proto::kvrpcpb::*;
use esker_rpc::proto::metapb::{Peer, Region, RegionEpoch};
use esker_rpc::server::TikvService;
use esker_rpc::service::{Answer, Caller, Reply, Request, StoreService, unimplemented};
use parking_lot::Mutex;
use tokio::sync::watch;
use tonic::service::Routes;

use crate::support::Server;

/// The calls that our client tags.
const WRITES: [&str; 5] = ["put", "delete", "batch put", "batch delete", "delete range"];

/// A region and the store that leads it.
pub type Led = (Region, u64);

/// Shared by all stores and the placement driver of a test.
#[derive(Clone)]
pub struct World {
    state: Arc<Mutex<State>>,
    /// While true, stores do what they are asked and never answer.
    pub mute: Arc<watch::Sender<bool>>,
    /// Requests that a store has acted on.
    pub acted: Arc<watch::Sender<usize>>,
}

#[derive(Default)]
struct State {
    stores: u64,
    regions: BTreeMap<Bytes, Led>,
    /// What placement answers while it lags behind.
    stale: Option<BTreeMap<Bytes, Led>>,
    addresses: BTreeMap<u64, String>,
    data: BTreeMap<Bytes, (Bytes, u64)>,
    next_region: u64,
    /// Errors for the next requests, of any kind.
    errors: VecDeque<Option<errorpb::Error>>,
    calls: Vec<(u64, &'static str)>,
    /// Entries of the log that all regions share.
    index: u64,
    /// Tagged writes that were carried out, unless the stores are of another kind.
    remembered: BTreeSet<(u64, u64)>,
    /// Writes up to this index are forgotten.
    forgotten: u64,
    oblivious: bool,
    /// The tags of the writes, in the order in which they came.
    tags: Vec<Option<WriteTag>>,
    /// Whether the current request is to be carried out: it is not the repetition of a remembered
    /// write.
    is_new: bool,
}

impl World {
    /// One region over everything, with a peer on each store, led by the first.
    pub fn new(stores: u64) -> Self {
        let mut state = State { stores, next_region: 2, ..Default::default() };
        let region = Region {
            id: 1,
            region_epoch: Some(RegionEpoch { conf_ver: 1, version: 1 }),
            peers: peers(1, stores),
            ..Default::default()
        };
        state.regions.insert(Bytes::new(), (region, 1));
        World {
            state: Arc::new(Mutex::new(state)),
            mute: Arc::new(watch::Sender::new(false)),
            acted: Arc::new(watch::Sender::new(0)),
        }
    }

    pub fn store(&self, id: u64) -> FakeStore {
        FakeStore { id, world: self.clone() }
    }

    /// Serves a store and gives placement its address.
    pub async fn serve(&self, store: u64) -> Server {
        let server = Server::start(self.routes(store)).await;
        self.set_address(store, server.address.to_string());
        server
    }

    pub fn routes(&self, store: u64) -> Routes {
        Routes::new(TikvService::new(Arc::new(self.store(store))).into_server())
    }

    pub fn set_address(&self, store: u64, address: String) {
        self.state.lock().addresses.insert(store, address);
    }

    pub fn address(&self, store: u64) -> Option<String> {
        self.state.lock().addresses.get(&store).cloned()
    }

    /// Splits at a key. The right part is new, and `leader` leads it.
    pub fn split(&self, key: &'static str, leader: u64) {
        self.state.lock().split(key.into(), Some(leader));
    }

    pub fn lead(&self, key: &str, store: u64) {
        let mut state = self.state.lock();
        let start = state.region(key.as_bytes()).0.start_key.clone();
        state.regions.get_mut(&start).expect("a region").1 = store;
    }

    /// From now on placement does not learn of changes.
    pub fn freeze_placement(&self) {
        let mut state = self.state.lock();
        state.stale = Some(state.regions.clone());
    }

    /// From now on placement does not know the region that begins at this key, and does not learn
    /// of changes. It answers with the region before the gap.
    pub fn hide_from_placement(&self, start: &str) {
        self.freeze_placement();
        let mut state = self.state.lock();
        let known = state.stale.as_mut().expect("placement is frozen");
        known.remove(start.as_bytes()).expect("a region begins there");
    }

    /// The regions as placement knows them.
    pub fn known_regions(&self) -> Vec<Led> {
        let state = self.state.lock();
        state.stale.as_ref().unwrap_or(&state.regions).values().cloned().collect()
    }

    pub fn fail_next(&self, error: errorpb::Error) {
        self.state.lock().errors.push_back(Some(error));
    }

    /// A request is served before the next one fails.
    pub fn serve_next(&self) {
        self.state.lock().errors.push_back(None);
    }

    /// The next requests are served again.
    pub fn stop_failing(&self) {
        self.state.lock().errors.clear();
    }

    pub fn set_value(&self, key: &'static str, value: &'static str) {
        self.state.lock().data.insert(key.into(), (value.into(), 0));
    }

    /// From now on the stores ignore tags, as other makers' stores do.
    pub fn forget_about_tags(&self) {
        self.state.lock().oblivious = true;
    }

    /// Forgets every write so far.
    pub fn forget_writes(&self) {
        let mut state = self.state.lock();
        state.remembered.clear();
        state.forgotten = state.index;
    }

    /// The tags of the writes since the last call.
    pub fn take_tags(&self) -> Vec<Option<WriteTag>> {
        std::mem::take(&mut self.state.lock().tags)
    }

    /// The calls since the last call of this function, with the stores that got them.
    pub fn take_calls(&self) -> Vec<(u64, &'static str)> {
        std::mem::take(&mut self.state.lock().calls)
    }

    pub fn value(&self, key: &str) -> Option<Bytes> {
        self.state.lock().data.get(key.as_bytes()).map(|(value, _)| value.clone())
    }
}

fn peers(region: u64, stores: u64) -> Vec<Peer> {
    let peer = |store_id| Peer { id: region * 100 + store_id, store_id, ..Default::default() };
    (1..=stores).map(peer).collect()
}

pub fn peer_on(region: &Region, store: u64) -> Option<Peer> {
    region.peers.iter().find(|peer| peer.store_id == store).copied()
}

impl State {
    fn region(&self, key: &[u8]) -> &Led {
        self.regions
            .range::<[u8], _>((Bound::Unbounded, Bound::Included(key)))
            .next_back()
            .map(|(_, led)| led)
            .expect("some region begins at the empty key")
    }

    fn split(&mut self, key: Bytes, leader: Option<u64>) -> Vec<Region> {
        let (mut left, left_leader) = self.region(&key).clone();
        assert!(left.start_key < key, "a split at a key inside a region");
        let epoch = left.region_epoch.as_mut().expect("every region has one");
        epoch.version += 1;
        let id = self.next_region;
        self.next_region += 1;
        let peers = peers(id, self.stores);
        let right = Region { id, start_key: key.clone(), peers, ..left.clone() };
        left.end_key = key.clone();
        self.regions.insert(left.start_key.clone(), (left.clone(), left_leader));
        self.regions.insert(key, (right.clone(), leader.unwrap_or(left_leader)));
        vec![left, right]
    }

    /// What a store checks before it serves a request.
    fn check(
        &mut self,
        store: u64,
        call: &'static str,
        context: Option<&Context>,
        keys: &[&Bytes],
    ) -> Result<Region, Box<errorpb::Error>> {
        self.calls.push((store, call));
        if let Some(error) = self.errors.pop_front().flatten() {
            return Err(Box::new(error));
        }
        let context = context.cloned().unwrap_or_default();
        let region_id = context.region_id;
        let Some((region, leader)) =
            self.regions.values().find(|(region, _)| region.id == region_id).cloned()
        else {
            let region_not_found = Some(RegionNotFound { region_id });
            return Err(Box::new(errorpb::Error { region_not_found, ..Default::default() }));
        };
        if leader != store {
            let not_leader = Some(NotLeader { region_id, leader: peer_on(&region, leader) });
            return Err(Box::new(errorpb::Error { not_leader, ..Default::default() }));
        }
        if context.region_epoch != region.region_epoch {
            let start = &region.start_key;
            let current_regions =
                self.regions.range(start.clone()..).take(2).map(|(_, led)| led.0.clone()).collect();
            let epoch_not_match = Some(EpochNotMatch { current_regions });
            return Err(Box::new(errorpb::Error { epoch_not_match, ..Default::default() }));
        }
        for &key in keys {
            if *key < region.start_key || (!region.end_key.is_empty() && *key >= region.end_key) {
                let (start_key, end_key) = (region.start_key.clone(), region.end_key.clone());
                let key = key.clone();
                let key_not_in_region = Some(KeyNotInRegion { key, region_id, start_key, end_key });
                return Err(Box::new(errorpb::Error { key_not_in_region, ..Default::default() }));
            }
        }
        self.is_new = true;
        if !WRITES.contains(&call) {
            return Ok(region);
        }
        self.index += 1;
        self.tags.push(context.write_tag);
        if let Some(tag) = context.write_tag.filter(|_| !self.oblivious) {
            let id = (tag.client, tag.sequence);
            if self.remembered.contains(&id) {
                self.is_new = false;
            } else if tag.horizon < self.forgotten {
                let forgotten = Some(Forgotten { region_id, applied_index: self.index });
                return Err(Box::new(errorpb::Error { forgotten, ..Default::default() }));
            } else {
                self.remembered.insert(id);
            }
        }
        Ok(region)
    }

    /// The index that a store which remembers writes returns with the answer to a write.
    fn applied_index(&self) -> u64 {
        if self.oblivious { 0 } else { self.index }
    }

    fn range(&self, region: &Region, low: &Bytes, high: &Bytes) -> Vec<KvPair> {
        let low = low.max(&region.start_key);
        let below = |key: &Bytes, end: &Bytes| end.is_empty() || key < end;
        self.data
            .range(low.clone()..)
            .filter(|(key, _)| below(key, high) && below(key, &region.end_key))
            .map(|(key, (value, _))| KvPair {
                key: key.clone(),
                value: value.clone(),
                ..Default::default()
            })
            .collect()
    }
}

/// One store of the world.
pub struct FakeStore {
    id: u64,
    world: World,
}

macro_rules! served {
    ($state:ident, $store:ident, $call:literal, $request:ident, $keys:expr, $response:ident, |$region:ident| $body:expr) => {{
        match $state.check($store, $call, $request.context.as_ref(), $keys) {
            Ok($region) => $body,
            Err(error) => $response { region_error: Some(error), ..Default::default() },
        }
    }};
}

impl FakeStore {
    /// Answers, unless the world is mute.
    fn answer(&self, response: Reply) -> Answer {
        self.world.acted.send_modify(|acted| *acted += 1);
        if *self.world.mute.borrow() {
            return Box::pin(std::future::pending());
        }
        Box::pin(std::future::ready(Ok(response)))
    }
}

impl StoreService for FakeStore {
    fn store_id(&self) -> StoreId {
        StoreId(self.id)
    }

    fn remembers_writes(&self) -> bool {
        !self.world.state.lock().oblivious
    }

    fn handle(&self, request: Request, _: Caller) -> Answer {
        let store = self.id;
        let mut guard = self.world.state.lock();
        let state = &mut *guard;
        let reply = match request {
            Request::RawGet(r) => Reply::RawGet(served!(
                state,
                store,
                "get",
                r,
                &[&r.key],
                RawGetResponse,
                |_region| {
                    match state.data.get(&r.key) {
                        Some((value, _)) => {
                            RawGetResponse { value: value.clone(), ..Default::default() }
                        }
                        None => RawGetResponse { not_found: true, ..Default::default() },
                    }
                }
            )),
            Request::RawPut(r) => Reply::RawPut(served!(
                state,
                store,
                "put",
                r,
                &[&r.key],
                RawPutResponse,
                |_region| {
                    if r.key.is_empty() {
                        let error = "a key must not be empty".into();
                        RawPutResponse { error, ..Default::default() }
                    } else {
                        if state.is_new {
                            state.data.insert(r.key.clone(), (r.value.clone(), r.ttl));
                        }
                        let applied_index = state.applied_index();
                        RawPutResponse { applied_index, ..Default::default() }
                    }
                }
            )),
            Request::RawDelete(r) => Reply::RawDelete(served!(
                state,
                store,
                "delete",
                r,
                &[&r.key],
                RawDeleteResponse,
                |_region| {
                    if state.is_new {
                        state.data.remove(&r.key);
                    }
                    let applied_index = state.applied_index();
                    RawDeleteResponse { applied_index, ..Default::default() }
                }
            )),
            Request::RawBatchGet(r) => Reply::RawBatchGet(served!(
                state,
                store,
                "batch get",
                r,
                &r.keys.iter().collect::<Vec<_>>(),
                RawBatchGetResponse,
                |_region| {
                    let pair = |key: &Bytes| {
                        let (value, _) = state.data.get(key)?;
                        let (key, value) = (key.clone(), value.clone());
                        Some(KvPair { key, value, ..Default::default() })
                    };
                    let pairs = r.keys.iter().filter_map(pair).collect();
                    RawBatchGetResponse { pairs, ..Default::default() }
                }
            )),
            Request::RawBatchPut(r) => Reply::RawBatchPut(served!(
                state,
                store,
                "batch put",
                r,
                &r.pairs.iter().map(|p| &p.key).collect::<Vec<_>>(),
                RawBatchPutResponse,
                |_region| {
                    for pair in r.pairs.iter().filter(|_| state.is_new) {
                        state.data.insert(pair.key.clone(), (pair.value.clone(), 0));
                    }
                    let applied_index = state.applied_index();
                    RawBatchPutResponse { applied_index, ..Default::default() }
                }
            )),
            Request::RawBatchDelete(r) => Reply::RawBatchDelete(served!(
                state,
                store,
                "batch delete",
                r,
                &r.keys.iter().collect::<Vec<_>>(),
                RawBatchDeleteResponse,
                |_region| {
                    for key in r.keys.iter().filter(|_| state.is_new) {
                        state.data.remove(key);
                    }
                    let applied_index = state.applied_index();
                    RawBatchDeleteResponse { applied_index, ..Default::default() }
                }
            )),
            Request::RawScan(r) => {
                Reply::RawScan(served!(state, store, "scan", r, &[], RawScanResponse, |region| {
                    let mut kvs = if r.reverse {
                        let mut kvs = state.range(&region, &r.end_key, &r.start_key);
                        kvs.reverse();
                        kvs
                    } else {
                        state.range(&region, &r.start_key, &r.end_key)
                    };
                    kvs.truncate(r.limit as usize);
                    RawScanResponse { kvs, ..Default::default() }
                }))
            }
            Request::RawDeleteRange(r) => Reply::RawDeleteRange(served!(
                state,
                store,
                "delete range",
                r,
                &[&r.start_key],
                RawDeleteRangeResponse,
                |region| {
                    if state.is_new {
                        for pair in state.range(&region, &r.start_key, &r.end_key) {
                            state.data.remove(&pair.key);
                        }
                    }
                    let applied_index = state.applied_index();
                    RawDeleteRangeResponse { applied_index, ..Default::default() }
                }
            )),
            Request::RawCompareAndSwap(r) => Reply::RawCompareAndSwap(served!(
                state,
                store,
                "cas",
                r,
                &[&r.key],
                RawCasResponse,
                |_region| {
                    let previous = state.data.get(&r.key).map(|(value, _)| value.clone());
                    let expected = (!r.previous_not_exist).then(|| r.previous_value.clone());
                    let succeed = previous == expected;
                    if succeed {
                        state.data.insert(r.key.clone(), (r.value.clone(), r.ttl));
                    }
                    RawCasResponse {
                        succeed,
                        previous_not_exist: previous.is_none(),
                        previous_value: previous.unwrap_or_default(),
                        ..Default::default()
                    }
                }
            )),
            Request::RawGetKeyTtl(r) => Reply::RawGetKeyTtl(served!(
                state,
                store,
                "ttl",
                r,
                &[&r.key],
                RawGetKeyTtlResponse,
                |_region| {
                    match state.data.get(&r.key) {
                        Some((_, ttl)) => RawGetKeyTtlResponse { ttl: *ttl, ..Default::default() },
                        None => RawGetKeyTtlResponse { not_found: true, ..Default::default() },
                    }
                }
            )),
            Request::SplitRegion(r) => {
                let keys: Vec<&Bytes> = r.split_keys.iter().collect();
                Reply::SplitRegion(served!(
                    state,
                    store,
                    "split",
                    r,
                    &keys,
                    SplitRegionResponse,
                    |region| {
                        for key in &r.split_keys {
                            state.split(key.clone(), None);
                        }
                        let regions = state
                            .regions
                            .range(region.start_key.clone()..)
                            .take(r.split_keys.len() + 1)
                            .map(|(_, led)| led.0.clone())
                            .collect();
                        SplitRegionResponse { regions, ..Default::default() }
                    }
                ))
            }
            other => return unimplemented(other.name()),
        };
        drop(guard);
        self.answer(reply)
    }
}
