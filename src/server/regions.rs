//! The store's door: every client command of the wire protocol, answered.

use std::sync::Arc;

use bytes::Bytes;
use esker_client::PlacementClient;
use esker_engine::Cf;
use esker_model::{Epoch, Region, RegionId};
use esker_raftstore::raw_value::RawValue;
use esker_raftstore::{Admin, ReplicaRole, RequestError, StoreHandle};
use esker_rpc::proto::errorpb;
use esker_rpc::proto::kvrpcpb::*;
use esker_rpc::proto::pdpb::SplitReason;
use esker_rpc::proto::tikvpb::BatchCommandsEmptyResponse;
use esker_rpc::service::{Answer, Command, Reply, ScanHabit, StoreService, unimplemented};
use tokio::sync::Semaphore;
use tonic::Status;

use super::keys::KeyLayout;
use super::raw::{self, RawError, RawStore, Refusal, now_seconds};
use super::scan::{self, ScanShape};

/// A store's requests, answered from its regions.
pub struct RegionService {
    raw: RawStore,
    placement: PlacementClient,
    checksums: Arc<Semaphore>,
}

/// Checksums that a store computes at the same time; others wait.
const MAX_CHECKSUMS: usize = 4;

/// Puts what went wrong where the response has a place for it.
macro_rules! refuse {
    ($raw:ident, $response:ident, $error:expr) => {
        match $raw.refuse($error) {
            Refusal::Region(error) => {
                Ok($response { region_error: Some(*error), ..Default::default() })
            }
            Refusal::Said(why) => {
                Ok($response { error: why.message().to_owned(), ..Default::default() })
            }
            Refusal::Status(status) => Err(status),
        }
    };
}

/// For responses that have no text of their own. Those of reads of several keys have a place
/// for an error in each pair, where published clients take it for data.
macro_rules! refuse_region {
    ($raw:ident, $response:ident, $error:expr) => {
        match $raw.refuse($error) {
            Refusal::Region(error) => {
                Ok($response { region_error: Some(*error), ..Default::default() })
            }
            Refusal::Said(status) | Refusal::Status(status) => Err(status),
        }
    };
}

impl RegionService {
    pub fn new(store: StoreHandle, placement: PlacementClient) -> Self {
        let raw = RawStore { store, cluster_id: placement.cluster_id() };
        RegionService { raw, placement, checksums: Arc::new(Semaphore::new(MAX_CHECKSUMS)) }
    }

    pub fn placement(&self) -> &PlacementClient {
        &self.placement
    }

    pub fn store(&self) -> &StoreHandle {
        &self.raw.store
    }

    /// What went wrong, for a response that has a place for nothing else.
    pub fn region_error(&self, error: RawError) -> errorpb::Error {
        match self.raw.refuse(error) {
            Refusal::Region(error) => *error,
            Refusal::Said(status) | Refusal::Status(status) => {
                errorpb::Error { message: status.message().to_owned(), ..Default::default() }
            }
        }
    }

    /// Cuts a region at keys that lie inside it, with ids from placement.
    pub async fn split_at(
        store: &StoreHandle,
        placement: &PlacementClient,
        region: RegionId,
        epoch: Epoch,
        keys: Vec<Bytes>,
    ) -> Result<Vec<Region>, RawError> {
        let refused = |reason: String| RequestError::Split { region, reason };
        let status = store.status(region).await?;
        if status.role != ReplicaRole::Leader {
            let leader = status.leader.and_then(|leader| status.region.peer(leader).copied());
            return Err(RequestError::NotLeader { region, leader }.into());
        }
        if status.region.epoch != epoch {
            let current = vec![status.region];
            return Err(RequestError::EpochNotMatch { region, current }.into());
        }
        let count = u32::try_from(keys.len()).map_err(|_| refused("too many keys".into()))?;
        let regions = placement
            .ask_batch_split(&status.region, count, SplitReason::Admin)
            .await
            .map_err(|error| refused(error.to_string()))?;
        Ok(store.admin(region, epoch, Admin::Split { keys, regions }).await?.regions)
    }
}

async fn get(raw: RawStore, request: RawGetRequest) -> Result<RawGetResponse, Status> {
    match raw.get(request.context.as_ref(), &request.cf, &request.key).await {
        Ok(Some(found)) => Ok(RawGetResponse { value: found.value, ..Default::default() }),
        Ok(None) => Ok(RawGetResponse { not_found: true, ..Default::default() }),
        Err(error) => refuse!(raw, RawGetResponse, error),
    }
}

async fn batch_get(
    raw: RawStore,
    request: RawBatchGetRequest,
) -> Result<RawBatchGetResponse, Status> {
    match raw.batch_get(request.context.as_ref(), &request.cf, request.keys).await {
        Ok(pairs) => Ok(RawBatchGetResponse { pairs, ..Default::default() }),
        Err(error) => refuse_region!(raw, RawBatchGetResponse, error),
    }
}

async fn put(raw: RawStore, request: RawPutRequest) -> Result<RawPutResponse, Status> {
    let pairs = vec![(request.key, request.value, request.ttl)];
    match raw.put(request.context.as_ref(), &request.cf, pairs).await {
        Ok(applied_index) => Ok(RawPutResponse { applied_index, ..Default::default() }),
        Err(error) => refuse!(raw, RawPutResponse, error),
    }
}

async fn batch_put(
    raw: RawStore,
    request: RawBatchPutRequest,
) -> Result<RawBatchPutResponse, Status> {
    // One time to live for all pairs, or one for each.
    let ttl_of = |at: usize| match &request.ttls[..] {
        [] => request.ttl,
        [all] => *all,
        each => each.get(at).copied().unwrap_or(0),
    };
    if request.ttls.len() > 1 && request.ttls.len() != request.pairs.len() {
        let error = format!("{} pairs but {} ttls", request.pairs.len(), request.ttls.len());
        return refuse!(raw, RawBatchPutResponse, RawError::Refused(error));
    }
    let pairs = request
        .pairs
        .iter()
        .enumerate()
        .map(|(at, pair)| (pair.key.clone(), pair.value.clone(), ttl_of(at)))
        .collect();
    match raw.put(request.context.as_ref(), &request.cf, pairs).await {
        Ok(applied_index) => Ok(RawBatchPutResponse { applied_index, ..Default::default() }),
        Err(error) => refuse!(raw, RawBatchPutResponse, error),
    }
}

async fn delete(raw: RawStore, request: RawDeleteRequest) -> Result<RawDeleteResponse, Status> {
    match raw.delete(request.context.as_ref(), &request.cf, vec![request.key]).await {
        Ok(applied_index) => Ok(RawDeleteResponse { applied_index, ..Default::default() }),
        Err(error) => refuse!(raw, RawDeleteResponse, error),
    }
}

async fn batch_delete(
    raw: RawStore,
    request: RawBatchDeleteRequest,
) -> Result<RawBatchDeleteResponse, Status> {
    match raw.delete(request.context.as_ref(), &request.cf, request.keys).await {
        Ok(applied_index) => Ok(RawBatchDeleteResponse { applied_index, ..Default::default() }),
        Err(error) => refuse!(raw, RawBatchDeleteResponse, error),
    }
}

async fn delete_range(
    raw: RawStore,
    request: RawDeleteRangeRequest,
) -> Result<RawDeleteRangeResponse, Status> {
    let RawDeleteRangeRequest { context, cf, start_key, end_key } = request;
    match raw.delete_range(context.as_ref(), &cf, start_key, end_key).await {
        Ok(applied_index) => Ok(RawDeleteRangeResponse { applied_index, ..Default::default() }),
        Err(error) => refuse!(raw, RawDeleteRangeResponse, error),
    }
}

async fn scan(
    raw: RawStore,
    request: RawScanRequest,
    habit: ScanHabit,
) -> Result<RawScanResponse, Status> {
    let shape = ScanShape {
        layout: KeyLayout::of(request.context.as_ref()),
        limit: request.limit,
        key_only: request.key_only,
        reverse: request.reverse,
    };
    let scanned = async {
        let target = raw.target(request.context.as_ref())?;
        let cf = raw::family(&request.cf)?;
        let view = raw.view(target).await?;
        let mut budget = raw::Budget::default();
        let (start, end) = (&request.start_key, &request.end_key);
        let kvs = scan::scan(&view, cf, start, end, shape, &mut budget)?;
        let upper = if request.reverse { start } else { end };
        scan::check_habit(habit, &view.descriptor, !upper.is_empty(), shape, kvs.len())?;
        Ok(kvs)
    };
    match scanned.await {
        Ok(kvs) => Ok(RawScanResponse { kvs, ..Default::default() }),
        Err(error) => match refuse_region!(raw, RawScanResponse, error) {
            Ok(RawScanResponse { region_error: Some(error), .. })
                if habit == ScanHabit::IgnoresRegionErrors =>
            {
                Err(Status::unavailable(error.message))
            }
            refused => refused,
        },
    }
}

async fn batch_scan(
    raw: RawStore,
    request: RawBatchScanRequest,
) -> Result<RawBatchScanResponse, Status> {
    let shape = ScanShape {
        layout: KeyLayout::of(request.context.as_ref()),
        limit: request.each_limit,
        key_only: request.key_only,
        reverse: request.reverse,
    };
    let scanned = async {
        let target = raw.target(request.context.as_ref())?;
        let cf = raw::family(&request.cf)?;
        let view = raw.view(target).await?;
        scan::batch_scan(&view, cf, &request.ranges, shape)
    };
    match scanned.await {
        Ok(kvs) => Ok(RawBatchScanResponse { kvs, ..Default::default() }),
        Err(error) => refuse_region!(raw, RawBatchScanResponse, error),
    }
}

async fn checksum(
    raw: RawStore,
    request: RawChecksumRequest,
    room: Arc<Semaphore>,
) -> Result<RawChecksumResponse, Status> {
    let layout = KeyLayout::of(request.context.as_ref());
    let summed = async {
        let target = raw.target(request.context.as_ref())?;
        let region = target.region;
        let room = room.acquire_owned().await;
        let view = raw.view(target).await?;
        let (algorithm, ranges) = (request.algorithm, request.ranges);
        let sum = move || {
            let _room = room;
            scan::checksum(&view, Cf::Default, algorithm, &ranges, layout)
        };
        raw::blocking(&raw.store, region, sum).await
    };
    match summed.await {
        Ok(sum) => Ok(RawChecksumResponse {
            checksum: sum.crc64_xor,
            total_kvs: sum.pairs,
            total_bytes: sum.bytes,
            ..Default::default()
        }),
        Err(error) => refuse!(raw, RawChecksumResponse, error),
    }
}

async fn key_ttl(
    raw: RawStore,
    request: RawGetKeyTtlRequest,
) -> Result<RawGetKeyTtlResponse, Status> {
    match raw.get(request.context.as_ref(), &request.cf, &request.key).await {
        Ok(Some(found)) => {
            Ok(RawGetKeyTtlResponse { ttl: found.ttl(now_seconds()), ..Default::default() })
        }
        Ok(None) => Ok(RawGetKeyTtlResponse { not_found: true, ..Default::default() }),
        Err(error) => refuse!(raw, RawGetKeyTtlResponse, error),
    }
}

async fn compare_and_swap(raw: RawStore, request: RawCasRequest) -> Result<RawCasResponse, Status> {
    let RawCasRequest { context, cf, key, previous_value, value, ttl, .. } = request;
    let expected = (!request.previous_not_exist).then_some(previous_value);
    let value = (!request.delete).then_some((value, ttl));
    match raw.compare_and_swap(context.as_ref(), &cf, &key, expected, value).await {
        Ok(result) => {
            let swap = result.swap.expect("a compare-and-swap answers with its result");
            let previous = swap.previous.map(|previous: RawValue| previous.value);
            Ok(RawCasResponse {
                succeed: swap.swapped,
                previous_not_exist: previous.is_none(),
                previous_value: previous.unwrap_or_default(),
                ..Default::default()
            })
        }
        Err(error) => refuse!(raw, RawCasResponse, error),
    }
}

impl StoreService for RegionService {
    fn store_id(&self) -> u64 {
        self.raw.store.store_id().0
    }

    fn remembers_writes(&self) -> bool {
        true
    }

    fn handle(&self, command: Command) -> Answer<Reply> {
        let raw = self.raw.clone();
        match command {
            Command::RawGet(r) => Box::pin(async { get(raw, r).await.map(Reply::RawGet) }),
            Command::RawBatchGet(r) => {
                Box::pin(async { batch_get(raw, r).await.map(Reply::RawBatchGet) })
            }
            Command::RawPut(r) => Box::pin(async { put(raw, r).await.map(Reply::RawPut) }),
            Command::RawBatchPut(r) => {
                Box::pin(async { batch_put(raw, r).await.map(Reply::RawBatchPut) })
            }
            Command::RawDelete(r) => Box::pin(async { delete(raw, r).await.map(Reply::RawDelete) }),
            Command::RawBatchDelete(r) => {
                Box::pin(async { batch_delete(raw, r).await.map(Reply::RawBatchDelete) })
            }
            Command::RawScan(r) => {
                Box::pin(async { scan(raw, r, ScanHabit::Walks).await.map(Reply::RawScan) })
            }
            Command::RawDeleteRange(r) => {
                Box::pin(async { delete_range(raw, r).await.map(Reply::RawDeleteRange) })
            }
            Command::RawBatchScan(r) => {
                Box::pin(async { batch_scan(raw, r).await.map(Reply::RawBatchScan) })
            }
            Command::Empty(r) => {
                let reply = BatchCommandsEmptyResponse {
                    test_id: r.test_id,
                    remembers_writes: self.remembers_writes(),
                };
                Box::pin(async move { Ok(Reply::Empty(reply)) })
            }
            other => unimplemented(name(&other)),
        }
    }

    fn compare_and_swap(&self, request: RawCasRequest) -> Answer<RawCasResponse> {
        let raw = self.raw.clone();
        Box::pin(compare_and_swap(raw, request))
    }

    fn key_ttl(&self, request: RawGetKeyTtlRequest) -> Answer<RawGetKeyTtlResponse> {
        let raw = self.raw.clone();
        Box::pin(key_ttl(raw, request))
    }

    fn scan(&self, request: RawScanRequest, habit: ScanHabit) -> Answer<RawScanResponse> {
        Box::pin(scan(self.raw.clone(), request, habit))
    }

    fn checksum(&self, request: RawChecksumRequest) -> Answer<RawChecksumResponse> {
        Box::pin(checksum(self.raw.clone(), request, Arc::clone(&self.checksums)))
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
            match split.await {
                Ok(regions) => Ok(SplitRegionResponse {
                    left: regions.first().map(Into::into),
                    right: regions.last().map(Into::into),
                    regions: regions.iter().map(Into::into).collect(),
                    ..Default::default()
                }),
                Err(error) => refuse_region!(raw, SplitRegionResponse, error),
            }
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
