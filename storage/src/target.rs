//! Which region a request is for, and what its client knows of that region.

use esker_model::{LogIndex, PeerId, RegionId, StoreId, Term};
use esker_raftstore::{RegionSnapshot, RequestContext, RequestError, WriteTag};
use esker_rpc::proto::kvrpcpb::Context;

use crate::keys::KeyLayout;
use crate::{Storage, StorageError};

/// Which region a request is for.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    pub region: RegionId,
    pub context: RequestContext,
    /// How the keys of the request are stored.
    pub layout: KeyLayout,
}

impl Storage {
    /// Where a request goes, after a check that it is meant for this store. Every request begins
    /// with this.
    ///
    /// # Errors
    /// When the request is for another cluster or store, or has no valid epoch.
    pub fn target(&self, context: Option<&Context>) -> Result<Target, StorageError> {
        let layout = KeyLayout::of(context);
        let Some(context) = context else {
            // Without a context, the request names no region either.
            return Err(RequestError::RegionNotFound(RegionId(0)).into());
        };
        // Most clients leave the cluster's id out.
        if context.cluster_id != 0 && context.cluster_id != self.cluster_id {
            let (asked, here) = (context.cluster_id, self.cluster_id);
            return Err(StorageError::OtherCluster { asked, here });
        }
        let here = self.store.store_id();
        if let Some(asked) = context.peer.map(|peer| StoreId(peer.store_id))
            && asked.0 != 0
            && asked != here
        {
            return Err(RequestError::StoreNotMatch { asked, actual: here }.into());
        }
        let region = RegionId(context.region_id);
        let Some(epoch) = context.region_epoch else {
            // A client that knows no epoch gets the region's descriptor.
            let known = self.store.delegates().get(region).map(|known| known.descriptor());
            return Err(match known {
                Some(known) => {
                    let current = vec![(*known).clone()];
                    RequestError::EpochNotMatch { region, current }.into()
                }
                None => RequestError::RegionNotFound(region).into(),
            });
        };
        let context = RequestContext {
            epoch: epoch.try_into()?,
            peer: context.peer.filter(|peer| peer.id != 0).map(|peer| PeerId(peer.id)),
            term: (context.term != 0).then_some(Term(context.term)),
            replica_read: context.replica_read,
            tag: context.write_tag.map(|tag| WriteTag {
                client: tag.client,
                sequence: tag.sequence,
                horizon: LogIndex(tag.horizon),
                now_s: self.now_s(),
            }),
        };
        Ok(Target { region, context, layout })
    }

    /// A linearizable view of the region's data.
    pub(crate) async fn view(&self, target: Target) -> Result<RegionSnapshot, StorageError> {
        Ok(self.store.snapshot(target.region, target.context).await?)
    }
}
