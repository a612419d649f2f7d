//! The request to cut a region at keys.

use bytes::Bytes;
use esker_model::{Epoch, NewRegion, Region, RegionId};
use esker_rpc::proto::kvrpcpb::{SplitRegionRequest, SplitRegionResponse};
use futures_util::future::BoxFuture;

use crate::keys::KeyLayout;
use crate::{Storage, StorageError};

/// Where the ids of new regions come from: the placement driver.
pub trait SplitIds: Send + Sync + 'static {
    /// Ids for `count` regions that a split of `region` creates. The error says why there are
    /// none.
    fn split_ids(
        &self,
        region: Region,
        count: u32,
    ) -> BoxFuture<'static, Result<Vec<NewRegion>, String>>;
}

impl Storage {
    /// Cuts a region that this store leads at keys that lie inside it, as they are stored.
    ///
    /// # Errors
    /// When the region is not led here, has changed, or cannot be cut there.
    pub async fn split_at(
        &self,
        region: RegionId,
        epoch: Epoch,
        keys: Vec<Bytes>,
    ) -> Result<Vec<Region>, StorageError> {
        let ids = async |region: &Region, count| self.ids.split_ids(region.clone(), count).await;
        Ok(self.store.split(region, epoch, keys, ids).await?)
    }
}

pub(crate) async fn split(
    storage: &Storage,
    request: SplitRegionRequest,
) -> Result<SplitRegionResponse, StorageError> {
    let target = storage.target(request.context.as_ref())?;
    let mut keys = request.split_keys;
    if keys.is_empty() {
        keys.push(request.split_key);
    }
    let layout = match request.is_raw_kv {
        true => target.layout,
        false => KeyLayout::Memcomparable,
    };
    let keys = keys.iter().map(|key| layout.stored(key)).collect::<Result<_, _>>()?;
    let regions = storage.split_at(target.region, target.context.epoch, keys).await?;
    Ok(SplitRegionResponse {
        left: regions.first().map(Into::into),
        right: regions.last().map(Into::into),
        regions: regions.iter().map(Into::into).collect(),
        ..Default::default()
    })
}
