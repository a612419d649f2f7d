//! The calls, one method each.

use std::ops::Range;

use bytes::Bytes;
use esker_model::{
    DownPeer, KeyRange, NewRegion, Peer, PeerId, Region, RegionId, StoreId, Timestamp,
};
use esker_rpc::convert::{down_peers, end_key, optional_peer};
use esker_rpc::proto::esker::placement_admin_client::PlacementAdminClient;
use esker_rpc::proto::esker::{StoreState, StoreStatesRequest, StoreStatesResponse};
use esker_rpc::proto::keyspacepb::keyspace_client::KeyspaceClient;
use esker_rpc::proto::keyspacepb::{KeyspaceMeta, LoadKeyspaceRequest, LoadKeyspaceResponse};
use esker_rpc::proto::metapb::{self, Store};
use esker_rpc::proto::pdpb::pd_client::PdClient;
use esker_rpc::proto::pdpb::{self, *};
use esker_rpc::server::MAX_MESSAGE_BYTES;

use super::{Answered, PlacementClient};
use crate::error::ClientError;

/// A region as its leader reported it last. A leader reports at once when the region changes, and
/// otherwise every 10 seconds.
#[derive(Clone, Debug, PartialEq)]
pub struct RegionInfo {
    /// Its range, epoch and peers.
    pub region: Region,
    /// The peer that leads, where placement knows it.
    pub leader: Option<Peer>,
    /// The peers that the leader has not heard from for more than 10 seconds.
    pub down: Vec<DownPeer>,
    /// The peers that still have to catch up with the leader's log.
    pub pending: Vec<PeerId>,
}

macro_rules! answered {
    ($($response:ty),* $(,)?) => {
        $(impl Answered for $response {
            fn header(&self) -> Option<&ResponseHeader> {
                self.header.as_ref()
            }
        })*
    };
}

answered!(
    AllocIdResponse,
    AskBatchSplitResponse,
    BootstrapResponse,
    GetAllStoresResponse,
    GetGcSafePointResponse,
    GetMembersResponse,
    GetMinTsResponse,
    GetOperatorResponse,
    GetRegionResponse,
    GetStoreResponse,
    IsBootstrappedResponse,
    LoadKeyspaceResponse,
    PutStoreResponse,
    ReportBatchSplitResponse,
    ScanRegionsResponse,
    ScatterRegionResponse,
    StoreHeartbeatResponse,
    StoreStatesResponse,
    UpdateGcSafePointResponse,
);

/// Makes one call on the leader. Each attempt gets a fresh request with clones of the fields.
macro_rules! call {
    ($client:expr, $service:ident :: $method:ident, $request:ident { $($field:ident : $value:expr),* $(,)? }) => {
        $client.shared.call(stringify!($method), |channel, header| {
            let request = $request { header: Some(header), $($field: $value.clone(),)* ..Default::default() };
            async move {
                $service::new(channel)
                    .max_decoding_message_size(MAX_MESSAGE_BYTES)
                    .$method(request)
                    .await
            }
        })
    };
}

// Where a call sets every field of its request, the update syntax is superfluous.
#[allow(clippy::needless_update)]
impl PlacementClient {
    /// All members and the one that leads. [`AdminClient::members`](crate::AdminClient::members)
    /// also asks each for its state.
    pub async fn get_members(&self) -> Result<GetMembersResponse, ClientError> {
        call!(self, PdClient::get_members, GetMembersRequest {}).await
    }

    /// Whether the cluster has its first store and its first regions.
    pub async fn is_bootstrapped(&self) -> Result<bool, ClientError> {
        let answer = call!(self, PdClient::is_bootstrapped, IsBootstrappedRequest {}).await?;
        Ok(answer.bootstrapped)
    }

    /// For stores. Makes the cluster: its first store, and the region that covers everything.
    /// Refused with `AlreadyBootstrapped` if another store, or an earlier attempt of this one, was
    /// first.
    pub async fn bootstrap(&self, store: Store, region: &Region) -> Result<(), ClientError> {
        let (store, region) = (Some(store), Some(metapb::Region::from(region)));
        call!(self, PdClient::bootstrap, BootstrapRequest { store: store, region: region }).await?;
        Ok(())
    }

    /// Consecutive ids that no other caller gets: `count` of them, at least one. Refused above
    /// 65,536. Regions, stores and peers have ids of the same sequence. A program may take ids for
    /// its own use, too. A call that is repeated inside may leave ids unused.
    pub async fn alloc_id(&self, count: u32) -> Result<Range<u64>, ClientError> {
        let count = count.max(1);
        let answer = call!(self, PdClient::alloc_id, AllocIdRequest { count: count }).await?;
        let end = answer.id + 1;
        let first = end.checked_sub(u64::from(count)).filter(|first| *first > 0);
        let problem = "ids from before the first";
        let start = first.ok_or(wrong("alloc_id", problem))?;
        Ok(start..end)
    }

    /// The last of `count` consecutive timestamps, newer than all that were handed out before this
    /// call: milliseconds since 1970 (`physical`), and a number among those of the same millisecond
    /// (`logical`). Concurrent callers share a request. A count outside of 1 to
    /// [`MAX_TIMESTAMPS_PER_REQUEST`](super::MAX_TIMESTAMPS_PER_REQUEST) is replaced by the nearer
    /// limit.
    pub async fn tso(&self, count: u32) -> Result<Timestamp, ClientError> {
        self.shared.timestamps.get(count).await
    }

    /// A timestamp that is no newer than any that will be handed out.
    pub async fn min_ts(&self) -> Result<Timestamp, ClientError> {
        let answer = call!(self, PdClient::get_min_ts, GetMinTsRequest {}).await?;
        let timestamp = answer.timestamp.ok_or_else(|| wrong("get_min_ts", "no timestamp"))?;
        Timestamp::try_from(timestamp).map_err(|error| wrong("get_min_ts", error))
    }

    /// For stores. Adds a store or updates what is known of it: its address, labels and version.
    /// Refused with `StoreTombstone` for a store that has left the cluster, with `DuplicatedEntry`
    /// for the address of another store, and with `InvalidValue` for an older copy of a store.
    pub async fn put_store(&self, store: Store) -> Result<(), ClientError> {
        let store = Some(store);
        call!(self, PdClient::put_store, PutStoreRequest { store: store }).await?;
        Ok(())
    }

    /// For stores. Adds a store in the place of the store that had its address and lost its memory
    /// for good. Refused with `DuplicatedEntry` until the old store has been silent for 10 seconds,
    /// and with `InvalidValue` for the only store of a cluster.
    pub async fn replace_store(&self, store: Store) -> Result<(), ClientError> {
        let store = Some(store);
        let request =
            call!(self, PdClient::put_store, PutStoreRequest { store: store, esker_replace: true });
        request.await?;
        Ok(())
    }

    /// One store and its last report.
    ///
    /// # Errors
    /// For a store that does not exist, [`ClientError::PlacementRefused`] with `EntryNotFound` from
    /// Esker's placement driver, and [`ClientError::NoStore`] where the answer has no store in it.
    pub async fn get_store(&self, id: StoreId) -> Result<(Store, StoreStats), ClientError> {
        let answer = call!(self, PdClient::get_store, GetStoreRequest { store_id: id.0 }).await?;
        let store = answer.store.ok_or(ClientError::NoStore { store: id })?;
        Ok((store, answer.stats.unwrap_or_default()))
    }

    /// All stores in any state, or, with `exclude_tombstones`, only those that have not left the
    /// cluster for good. [`store_states`](Self::store_states) also says which of them are alive.
    pub async fn get_stores(&self, exclude_tombstones: bool) -> Result<Vec<Store>, ClientError> {
        let answer = call!(
            self,
            PdClient::get_all_stores,
            GetAllStoresRequest { exclude_tombstone_stores: exclude_tombstones }
        )
        .await?;
        Ok(answer.stores)
    }

    /// Every store, whether placement has heard from it, and whether its data is damaged;
    /// tombstones, too. Only Esker's placement driver answers this.
    pub async fn store_states(&self) -> Result<Vec<StoreState>, ClientError> {
        let answer = call!(self, PlacementAdminClient::store_states, StoreStatesRequest {}).await?;
        Ok(answer.stores)
    }

    /// For stores. Reports the state of a store: that it is alive, and how full it is.
    pub async fn store_heartbeat(
        &self,
        stats: StoreStats,
    ) -> Result<StoreHeartbeatResponse, ClientError> {
        let stats = Some(stats);
        call!(self, PdClient::store_heartbeat, StoreHeartbeatRequest { stats: stats }).await
    }

    /// The region that holds a key. Waits for a moment if the region's leader has not reported it
    /// to this leader of placement yet.
    ///
    /// # Errors
    /// [`ClientError::PlacementRefused`] with [`ErrorType::RegionNotFound`] if the wait was in vain
    /// (ask again), and with [`ErrorType::NotBootstrapped`] in a cluster that has no regions yet.
    /// Other placement drivers answer the latter with `None`.
    pub async fn region_by_key(&self, key: Bytes) -> Result<Option<RegionInfo>, ClientError> {
        let answer =
            call!(self, PdClient::get_region, GetRegionRequest { region_key: key }).await?;
        RegionInfo::from_response("get_region", answer)
    }

    /// The region before the one that holds a key; `None` for the first.
    ///
    /// # Errors
    /// Those of [`region_by_key`](Self::region_by_key).
    pub async fn previous_region(&self, key: Bytes) -> Result<Option<RegionInfo>, ClientError> {
        let answer =
            call!(self, PdClient::get_prev_region, GetRegionRequest { region_key: key }).await?;
        RegionInfo::from_response("get_prev_region", answer)
    }

    /// The region with an id; `None` if no leader has reported one.
    pub async fn region_by_id(&self, id: RegionId) -> Result<Option<RegionInfo>, ClientError> {
        let answer =
            call!(self, PdClient::get_region_by_id, GetRegionByIdRequest { region_id: id.0 }).await;
        match answer {
            Ok(answer) => RegionInfo::from_response("get_region_by_id", answer),
            // No leader has reported a region with this id.
            Err(ClientError::PlacementRefused { kind: ErrorType::RegionNotFound, .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The regions that hold keys of `range`, in key order, and at most `limit` of them. One answer
    /// has at most 16,384, which 0 also stands for. If a leader has not reported its region even
    /// after a moment, the region is left out.
    /// [`AdminClient::regions`](crate::AdminClient::regions) asks for all regions, page by page.
    pub async fn scan_regions(
        &self,
        range: &KeyRange,
        limit: u32,
    ) -> Result<Vec<RegionInfo>, ClientError> {
        let limit = i32::try_from(limit).unwrap_or(i32::MAX);
        let (start, end) = (range.start().clone(), end_key(range));
        let answer = call!(
            self,
            PdClient::scan_regions,
            ScanRegionsRequest { start_key: start, end_key: end, limit: limit }
        )
        .await?;
        let found = answer.regions.into_iter().filter_map(|found| {
            let pdpb::Region { region, leader, down_peers, pending_peers } = found;
            let region = region?;
            Some(RegionInfo::read("scan_regions", region, leader, down_peers, &pending_peers))
        });
        found.collect()
    }

    /// For stores. Ids for a split that adds `count` regions to the one that is split: 1 to 1,024.
    /// `region` is the region as its leader has it. An older epoch than the known one is refused.
    pub async fn ask_batch_split(
        &self,
        region: &Region,
        count: u32,
        reason: SplitReason,
    ) -> Result<Vec<NewRegion>, ClientError> {
        let (region, reason) = (Some(metapb::Region::from(region)), i32::from(reason));
        let answer = call!(
            self,
            PdClient::ask_batch_split,
            AskBatchSplitRequest { region: region, split_count: count, reason: reason }
        )
        .await?;
        if answer.ids.len() != count as usize {
            let problem = "another number of ids than was asked for";
            return Err(wrong("ask_batch_split", problem));
        }
        let ids = answer.ids.into_iter().map(NewRegion::try_from);
        ids.collect::<Result<_, _>>().map_err(|error| wrong("ask_batch_split", error))
    }

    /// For stores. Reports the regions that a split has left and made, in the order of their keys.
    pub async fn report_batch_split(&self, regions: &[Region]) -> Result<(), ClientError> {
        let regions: Vec<metapb::Region> = regions.iter().map(Into::into).collect();
        call!(self, PdClient::report_batch_split, ReportBatchSplitRequest { regions: regions })
            .await?;
        Ok(())
    }

    /// Begins to spread the leaders of regions over the stores, and returns the ids of the regions
    /// with which it did not begin. If that is all of them, the call is refused with the reason. At
    /// most 16,384 regions.
    pub async fn scatter_regions(
        &self,
        regions: Vec<RegionId>,
    ) -> Result<Vec<RegionId>, ClientError> {
        let regions_id: Vec<u64> = regions.into_iter().map(|region| region.0).collect();
        let answer =
            call!(self, PdClient::scatter_region, ScatterRegionRequest { regions_id: regions_id })
                .await?;
        Ok(answer.failed_regions_id.into_iter().map(RegionId).collect())
    }

    /// The operator (a plan of steps) that placement is carrying out on a region, or the last one
    /// that ended. Refused with `RegionNotFound` if there is none.
    pub async fn get_operator(&self, region: RegionId) -> Result<GetOperatorResponse, ClientError> {
        call!(self, PdClient::get_operator, GetOperatorRequest { region_id: region.0 }).await
    }

    /// The timestamp before which old versions may be removed; 0 at first.
    pub async fn gc_safe_point(&self) -> Result<u64, ClientError> {
        let answer = call!(self, PdClient::get_gc_safe_point, GetGcSafePointRequest {}).await?;
        Ok(answer.safe_point)
    }

    /// Moves the safe point forward. Returns its position after that, which is further ahead if it
    /// was so already. Refused for a point more than a day ahead of the clock.
    pub async fn update_gc_safe_point(&self, safe_point: u64) -> Result<u64, ClientError> {
        let answer = call!(
            self,
            PdClient::update_gc_safe_point,
            UpdateGcSafePointRequest { safe_point: safe_point }
        )
        .await?;
        Ok(answer.new_safe_point)
    }

    /// A key space of API version 2. There is one, `DEFAULT`. The first call makes it ready, which
    /// may take a moment, because regions are split at its bounds. Esker's own clients need no key
    /// space.
    ///
    /// # Errors
    /// [`ClientError::PlacementRefused`] with [`ErrorType::EntryNotFound`] if there is no key space
    /// of that name. Other placement drivers answer that with `None`.
    pub async fn load_keyspace(&self, name: &str) -> Result<Option<KeyspaceMeta>, ClientError> {
        let name = name.to_string();
        let answer =
            call!(self, KeyspaceClient::load_keyspace, LoadKeyspaceRequest { name: name }).await?;
        Ok(answer.keyspace)
    }
}

/// An answer that makes no sense.
pub(super) fn wrong(call: &'static str, problem: impl ToString) -> ClientError {
    ClientError::PlacementAnswer { call, problem: problem.to_string() }
}

impl RegionInfo {
    fn from_response(
        call: &'static str,
        answer: GetRegionResponse,
    ) -> Result<Option<Self>, ClientError> {
        let GetRegionResponse { region, leader, down_peers, pending_peers, .. } = answer;
        let found =
            region.map(|region| RegionInfo::read(call, region, leader, down_peers, &pending_peers));
        found.transpose()
    }

    fn read(
        call: &'static str,
        region: metapb::Region,
        leader: Option<metapb::Peer>,
        down: Vec<PeerStats>,
        pending: &[metapb::Peer],
    ) -> Result<Self, ClientError> {
        Ok(RegionInfo {
            region: region.try_into().map_err(|error| wrong(call, error))?,
            leader: optional_peer(leader).map_err(|error| wrong(call, error))?,
            down: down_peers(down),
            pending: pending.iter().map(|peer| PeerId(peer.id)).collect(),
        })
    }
}
