//! The source of ids for the regions that a split makes.

use esker_client::PlacementClient;
use esker_model::{NewRegion, Region};
use esker_rpc::proto::pdpb::SplitReason;
use esker_storage::SplitIds;
use futures_util::future::BoxFuture;

/// Ids from the placement driver.
pub struct PlacementIds(pub PlacementClient);

impl SplitIds for PlacementIds {
    fn split_ids(
        &self,
        region: Region,
        count: u32,
    ) -> BoxFuture<'static, Result<Vec<NewRegion>, String>> {
        let placement = self.0.clone();
        Box::pin(async move {
            let ids = placement.ask_batch_split(&region, count, SplitReason::Admin).await;
            ids.map_err(|error| error.to_string())
        })
    }
}
