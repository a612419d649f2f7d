//! The store's door: every client command of the wire protocol, answered.

use bytes::Bytes;
use esker_raftstore::raw_value::RawValue;
use esker_raftstore::{Admin, NewRegion, PeerId, RegionExt, RegionId, RequestError, StoreHandle};
use esker_rpc::placement::PlacementClient;
use esker_rpc::proto::errorpb;
use esker_rpc::proto::esker::command::CompareAndSwap;
use esker_rpc::proto::kvrpcpb::*;
use esker_rpc::proto::metapb::{Region, RegionEpoch};
use esker_rpc::proto::pdpb::SplitReason;
use esker_rpc::proto::tikvpb::BatchCommandsEmptyResponse;
use esker_rpc::service::{Answer, Command, Reply, StoreService, unimplemented};

use super::keys::KeyLayout;
use super::raw::{self, RawError, RawStore, ScanShape, now_seconds};

/// A store's requests, answered from its regions.
pub struct RegionService {
    raw: RawStore,
    placement: PlacementClient,
}

/// Puts an error where the response has a place for it.
macro_rules! refuse {
    ($response:ident, $error:expr) => {
        match $error {
            RawError::Region(error) => {
                $response { region_error: Some(error.to_proto()), ..Default::default() }
            }
            RawError::Text(error) => $response { error, ..Default::default() },
        }
    };
}

/// For responses that have no text of their own.
macro_rules! refuse_region {
    ($response:ident, $error:expr) => {
        $response { region_error: Some(region_error($error)), ..Default::default() }
    };
}

/// For responses whose place for a text is a pair: clients take it there as final,
/// where a region error would be repeated.
macro_rules! refuse_pairs {
    ($response:ident, $pairs:ident, $error:expr) => {
        match $error {
            RawError::Region(error) => {
                $response { region_error: Some(error.to_proto()), ..Default::default() }
            }
            RawError::Text(abort) => {
                let error = Some(KeyError { abort, ..Default::default() });
                let pair = KvPair { error, ..Default::default() };
                $response { $pairs: vec![pair], ..Default::default() }
            }
        }
    };
}

fn region_error(error: RawError) -> errorpb::Error {
    match error {
        RawError::Region(error) => error.to_proto(),
        RawError::Text(message) => errorpb::Error { message, ..Default::default() },
    }
}

impl RegionService {
    pub fn new(store: StoreHandle, placement: PlacementClient) -> Self {
        RegionService { raw: RawStore { store }, placement }
    }

    pub fn placement(&self) -> &PlacementClient {
        &self.placement
    }

    pub fn store(&self) -> &StoreHandle {
        &self.raw.store
    }

    /// Cuts a region at keys that lie inside it, with ids from placement.
    pub async fn split_at(
        store: &StoreHandle,
        placement: &PlacementClient,
        region: RegionId,
        epoch: RegionEpoch,
        keys: Vec<Bytes>,
    ) -> Result<Vec<Region>, RawError> {
        let refused = |reason: String| RequestError::Split { region, reason };
        let status = store.status(region).await?;
        if status.role != "leader" {
            let leader = status.leader.and_then(|leader| status.region.peer(leader).copied());
            return Err(RequestError::NotLeader { region, leader }.into());
        }
        if status.region.epoch() != epoch {
            let current = vec![status.region];
            return Err(RequestError::EpochNotMatch { region, current }.into());
        }
        let count = u32::try_from(keys.len()).map_err(|_| refused("too many keys".into()))?;
        let ids = placement
            .ask_batch_split(status.region, count, SplitReason::Admin)
            .await
            .map_err(|error| refused(error.to_string()))?;
        let regions = ids
            .into_iter()
            .map(|id| NewRegion {
                id: RegionId(id.new_region_id),
                peers: id.new_peer_ids.into_iter().map(PeerId).collect(),
            })
            .collect();
        Ok(store.admin(region, epoch, Admin::Split { keys, regions }).await?.regions)
    }
}

async fn get(raw: RawStore, request: RawGetRequest) -> RawGetResponse {
    match raw.get(request.context.as_ref(), &request.cf, &request.key).await {
        Ok(Some(found)) => RawGetResponse { value: found.value, ..Default::default() },
        Ok(None) => RawGetResponse { not_found: true, ..Default::default() },
        Err(error) => refuse!(RawGetResponse, error),
    }
}

async fn batch_get(raw: RawStore, request: RawBatchGetRequest) -> RawBatchGetResponse {
    match raw.batch_get(request.context.as_ref(), &request.cf, request.keys).await {
        Ok(pairs) => RawBatchGetResponse { pairs, ..Default::default() },
        Err(error) => refuse_pairs!(RawBatchGetResponse, pairs, error),
    }
}

async fn put(raw: RawStore, request: RawPutRequest) -> RawPutResponse {
    let pairs = vec![(request.key, request.value, request.ttl)];
    match raw.put(request.context.as_ref(), &request.cf, pairs).await {
        Ok(()) => RawPutResponse::default(),
        Err(error) => refuse!(RawPutResponse, error),
    }
}

async fn batch_put(raw: RawStore, request: RawBatchPutRequest) -> RawBatchPutResponse {
    // One time to live for all pairs, or one for each.
    let ttl_of = |at: usize| match &request.ttls[..] {
        [] => request.ttl,
        [all] => *all,
        each => each.get(at).copied().unwrap_or(0),
    };
    if request.ttls.len() > 1 && request.ttls.len() != request.pairs.len() {
        let error = format!("{} pairs but {} ttls", request.pairs.len(), request.ttls.len());
        return RawBatchPutResponse { error, ..Default::default() };
    }
    let pairs = request
        .pairs
        .iter()
        .enumerate()
        .map(|(at, pair)| (pair.key.clone(), pair.value.clone(), ttl_of(at)))
        .collect();
    match raw.put(request.context.as_ref(), &request.cf, pairs).await {
        Ok(()) => RawBatchPutResponse::default(),
        Err(error) => refuse!(RawBatchPutResponse, error),
    }
}

async fn delete(raw: RawStore, request: RawDeleteRequest) -> RawDeleteResponse {
    match raw.delete(request.context.as_ref(), &request.cf, vec![request.key]).await {
        Ok(()) => RawDeleteResponse::default(),
        Err(error) => refuse!(RawDeleteResponse, error),
    }
}

async fn batch_delete(raw: RawStore, request: RawBatchDeleteRequest) -> RawBatchDeleteResponse {
    match raw.delete(request.context.as_ref(), &request.cf, request.keys).await {
        Ok(()) => RawBatchDeleteResponse::default(),
        Err(error) => refuse!(RawBatchDeleteResponse, error),
    }
}

async fn delete_range(raw: RawStore, request: RawDeleteRangeRequest) -> RawDeleteRangeResponse {
    let RawDeleteRangeRequest { context, cf, start_key, end_key } = request;
    match raw.delete_range(context.as_ref(), &cf, start_key, end_key).await {
        Ok(()) => RawDeleteRangeResponse::default(),
        Err(error) => refuse!(RawDeleteRangeResponse, error),
    }
}

async fn scan(raw: RawStore, request: RawScanRequest) -> RawScanResponse {
    let shape = ScanShape {
        layout: KeyLayout::of(request.context.as_ref()),
        limit: request.limit,
        key_only: request.key_only,
        reverse: request.reverse,
    };
    let scanned = async {
        let cf = raw::family(&request.cf)?;
        let view = raw.view(request.context.as_ref()).await?;
        let mut budget = raw::Budget::default();
        raw::scan(&view, cf, &request.start_key, &request.end_key, shape, &mut budget)
    };
    match scanned.await {
        Ok(kvs) => RawScanResponse { kvs, ..Default::default() },
        Err(error) => refuse_pairs!(RawScanResponse, kvs, error),
    }
}

async fn batch_scan(raw: RawStore, request: RawBatchScanRequest) -> RawBatchScanResponse {
    let shape = ScanShape {
        layout: KeyLayout::of(request.context.as_ref()),
        limit: request.each_limit,
        key_only: request.key_only,
        reverse: request.reverse,
    };
    let scanned = async {
        let cf = raw::family(&request.cf)?;
        let view = raw.view(request.context.as_ref()).await?;
        raw::batch_scan(&view, cf, &request.ranges, shape)
    };
    match scanned.await {
        Ok(kvs) => RawBatchScanResponse { kvs, ..Default::default() },
        Err(error) => refuse_pairs!(RawBatchScanResponse, kvs, error),
    }
}

async fn key_ttl(raw: RawStore, request: RawGetKeyTtlRequest) -> RawGetKeyTtlResponse {
    match raw.get(request.context.as_ref(), &request.cf, &request.key).await {
        Ok(Some(found)) => {
            RawGetKeyTtlResponse { ttl: found.ttl(now_seconds()), ..Default::default() }
        }
        Ok(None) => RawGetKeyTtlResponse { not_found: true, ..Default::default() },
        Err(error) => refuse!(RawGetKeyTtlResponse, error),
    }
}

async fn compare_and_swap(raw: RawStore, request: RawCasRequest) -> RawCasResponse {
    let cas = CompareAndSwap {
        key: request.key,
        expect_absent: request.previous_not_exist,
        expected: request.previous_value,
        value: request.value,
        delete: request.delete,
        ..Default::default()
    };
    match raw.compare_and_swap(request.context.as_ref(), &request.cf, cas, request.ttl).await {
        Ok(result) => {
            let swap = result.swap.expect("a compare-and-swap answers with its result");
            let previous = swap.previous.map(|previous: RawValue| previous.value);
            RawCasResponse {
                succeed: swap.swapped,
                previous_not_exist: previous.is_none(),
                previous_value: previous.unwrap_or_default(),
                ..Default::default()
            }
        }
        Err(error) => refuse!(RawCasResponse, error),
    }
}

impl StoreService for RegionService {
    fn store_id(&self) -> u64 {
        self.raw.store.store_id().0
    }

    fn handle(&self, command: Command) -> Answer<Reply> {
        let raw = self.raw.clone();
        match command {
            Command::RawGet(r) => Box::pin(async { Ok(Reply::RawGet(get(raw, r).await)) }),
            Command::RawBatchGet(r) => {
                Box::pin(async { Ok(Reply::RawBatchGet(batch_get(raw, r).await)) })
            }
            Command::RawPut(r) => Box::pin(async { Ok(Reply::RawPut(put(raw, r).await)) }),
            Command::RawBatchPut(r) => {
                Box::pin(async { Ok(Reply::RawBatchPut(batch_put(raw, r).await)) })
            }
            Command::RawDelete(r) => Box::pin(async { Ok(Reply::RawDelete(delete(raw, r).await)) }),
            Command::RawBatchDelete(r) => {
                Box::pin(async { Ok(Reply::RawBatchDelete(batch_delete(raw, r).await)) })
            }
            Command::RawScan(r) => Box::pin(async { Ok(Reply::RawScan(scan(raw, r).await)) }),
            Command::RawDeleteRange(r) => {
                Box::pin(async { Ok(Reply::RawDeleteRange(delete_range(raw, r).await)) })
            }
            Command::RawBatchScan(r) => {
                Box::pin(async { Ok(Reply::RawBatchScan(batch_scan(raw, r).await)) })
            }
            Command::Empty(r) => {
                let reply = BatchCommandsEmptyResponse { test_id: r.test_id };
                Box::pin(async move { Ok(Reply::Empty(reply)) })
            }
            other => unimplemented(name(&other)),
        }
    }

    fn compare_and_swap(&self, request: RawCasRequest) -> Answer<RawCasResponse> {
        let raw = self.raw.clone();
        Box::pin(async { Ok(compare_and_swap(raw, request).await) })
    }

    fn key_ttl(&self, request: RawGetKeyTtlRequest) -> Answer<RawGetKeyTtlResponse> {
        let raw = self.raw.clone();
        Box::pin(async { Ok(key_ttl(raw, request).await) })
    }

    fn split_region(&self, request: SplitRegionRequest) -> Answer<SplitRegionResponse> {
        let (raw, placement) = (self.raw.clone(), self.placement.clone());
        Box::pin(async move {
            let split = async {
                let target = raw.target(request.context.as_ref())?;
                let mut keys = request.split_keys;
                if keys.is_empty() {
                    keys.push(request.split_key);
                }
                let layout = match request.is_raw_kv {
                    true => KeyLayout::of(request.context.as_ref()),
                    false => KeyLayout::Memcomparable,
                };
                keys = keys.iter().map(|key| layout.stored(key)).collect::<Result<_, _>>()?;
                keys.sort();
                keys.dedup();
                let (region, epoch) = (target.region, target.context.epoch);
                RegionService::split_at(&raw.store, &placement, region, epoch, keys).await
            };
            Ok(match split.await {
                Ok(regions) => SplitRegionResponse {
                    left: regions.first().cloned(),
                    right: regions.last().cloned(),
                    regions,
                    ..Default::default()
                },
                Err(error) => refuse_region!(SplitRegionResponse, error),
            })
        })
    }
}

fn name(command: &Command) -> &'static str {
    match command {
        Command::Get(_) => "KvGet",
        Command::Scan(_) => "KvScan",
        Command::Prewrite(_) => "KvPrewrite",
        Command::Commit(_) => "KvCommit",
        Command::BatchGet(_) => "KvBatchGet",
        _ => "this command",
    }
}
