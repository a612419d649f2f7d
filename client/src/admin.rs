//! A client for administration: what an operator looks at, and what an operator changes.
//!
//! Questions and changes flow in. Placement's leader answers from what it knows. What only one
//! store knows or can do is asked of that store's `Admin` service, at the address that placement
//! has for the store. A change of a region goes to the store that leads it. The store may answer
//! that it does not lead, or that the region has changed. Then the client's view of the region was
//! only outdated, and the change is sent again. So it is when the store is busy.
//!
//! It promises that every call ends: connecting to a store within 3 s, the store's answer within
//! 10 s, and a change within the attempts or the time that its method names. A change that may have
//! happened never ends as if it had been refused.

mod members;
mod region;
mod store;

use bytes::Bytes;
use esker_model::{KeyRange, RegionId, StoreId};
use esker_rpc::proto::esker as wire;
use esker_rpc::proto::pdpb::ErrorType;

use crate::error::ClientError;
use crate::placement::{PlacementClient, RegionInfo};

pub use members::{MemberInfo, MemberState, ReplacedMember};
pub use region::{CHANGE_ATTEMPTS, SplitAt};
pub use store::StoreAdmin;

/// Regions asked for in one request.
const REGION_PAGE: u32 = 1_024;

/// A client of one cluster for its operators: it lists regions and members, splits a region, moves
/// its leader, and replaces a member. Cheap to clone: clones share the connections to placement. A
/// connection to a store is made for each call.
///
/// ```no_run
/// use std::time::Duration;
///
/// use esker_client::admin::SplitAt;
/// # use esker_client::{AdminClient, ClientError};
///
/// # async fn example(admin: AdminClient) -> Result<(), ClientError> {
/// // The first region is cut at a key. Its last part keeps the id.
/// let region = admin.regions().await?.remove(0).region.id;
/// let parts = admin.split_region(region, &SplitAt::Keys(vec!["m".into()])).await?;
/// println!("{} regions", parts.len());
///
/// // Another of its replicas is to lead it.
/// let found = admin.region(region).await?;
/// let leads_on = found.leader.map(|leader| leader.store);
/// if let Some(other) = found.region.peers.iter().find(|peer| Some(peer.store) != leads_on) {
///     admin.transfer_leader(region, other.store, Duration::from_secs(10)).await?;
/// }
/// # Ok(())
/// # }
/// ```
///
/// # Errors
///
/// Besides the errors that a method names, each may fail with those of [`PlacementClient`].
#[derive(Clone)]
pub struct AdminClient {
    placement: PlacementClient,
}

impl AdminClient {
    /// A client that finds regions and stores by asking `placement`.
    pub fn new(placement: PlacementClient) -> Self {
        AdminClient { placement }
    }

    /// The client of the placement driver that this client uses.
    pub fn placement(&self) -> &PlacementClient {
        &self.placement
    }

    /// All regions that placement knows, in the order of their keys, each once. They are asked for
    /// in pages of 1,024. Regions may change between two pages. Soon after placement has changed
    /// its leader, regions may be missing whose leaders have not reported yet.
    pub async fn regions(&self) -> Result<Vec<RegionInfo>, ClientError> {
        let mut regions: Vec<RegionInfo> = Vec::new();
        loop {
            // A page starts where the page before it ended. The first page starts at the first key.
            let start = match regions.last() {
                None => Bytes::new(),
                Some(last) => match last.region.range.end() {
                    Some(end) => end.clone(),
                    None => return Ok(regions),
                },
            };
            let range = KeyRange::from(start.clone());
            let page = self.placement.scan_regions(&range, REGION_PAGE).await?;
            let before = regions.len();
            // A region that does not begin where the last page ended or behind it was already
            // returned.
            regions.extend(
                page.into_iter()
                    .filter(|found| before == 0 || *found.region.range.start() >= start),
            );
            if regions.len() == before {
                return Ok(regions);
            }
        }
    }

    /// One region as placement knows it.
    ///
    /// # Errors
    /// [`ClientError::NoSuchRegion`] if placement knows no region with this id.
    pub async fn region(&self, region: RegionId) -> Result<RegionInfo, ClientError> {
        let found = self.placement.region_by_id(region).await?;
        found.ok_or(ClientError::NoSuchRegion { region })
    }

    /// Where a store listens, as `host:port`.
    ///
    /// # Errors
    /// [`ClientError::NoStore`] if placement knows no store with this id.
    pub async fn address(&self, store: StoreId) -> Result<String, ClientError> {
        match self.placement.get_store(store).await {
            Ok((known, _)) => Ok(known.address),
            Err(ClientError::PlacementRefused { kind: ErrorType::EntryNotFound, .. }) => {
                Err(ClientError::NoStore { store })
            }
            Err(error) => Err(error),
        }
    }

    /// Connects to the admin service of a store.
    ///
    /// # Errors
    /// [`ClientError::NoStore`] if placement knows no store with this id, [`ClientError::NoAnswer`]
    /// if no connection is made within 3 s.
    pub async fn store(&self, store: StoreId) -> Result<StoreAdmin, ClientError> {
        StoreAdmin::connect(self.placement.dialer(), store, self.address(store).await?).await
    }

    /// What the replica of `region` on `store` reports of itself and, if it leads, of the others.
    /// For a checksum the store reads all that the region holds.
    ///
    /// # Errors
    /// Those of [`AdminClient::store`], [`ClientError::NoAnswer`] if the answer takes longer than
    /// 10 s, and [`ClientError::RegionRefused`] if the store has no such replica.
    pub async fn replica(
        &self,
        region: RegionId,
        store: StoreId,
        with_checksum: bool,
    ) -> Result<wire::RegionDetailResponse, ClientError> {
        let request = wire::RegionDetailRequest { region_id: region.0, with_checksum };
        let answer = self.store(store).await?.region_detail(request).await?;
        match answer.region_error {
            None => Ok(answer),
            Some(error) => Err(ClientError::RegionRefused { region, reason: error.message }),
        }
    }
}
