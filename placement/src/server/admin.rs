//! The gRPC service `esker.PlacementAdmin`: what operators ask for beyond what clients do.

use std::sync::Arc;

use esker_rpc::proto::esker as wire;
use esker_rpc::proto::esker::placement_admin_server::PlacementAdmin;
use tonic::{Request, Response, Status};

use super::{Refusal, Shared, convert, pd};
use crate::lead::Lead;
use crate::map::{Liveness, StoreMap};

/// `esker.PlacementAdmin` over one member of the placement driver.
pub struct AdminService {
    shared: Arc<Shared>,
}

impl AdminService {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }
}

#[tonic::async_trait]
impl PlacementAdmin for AdminService {
    async fn store_states(
        &self,
        request: Request<wire::StoreStatesRequest>,
    ) -> Result<Response<wire::StoreStatesResponse>, Status> {
        pd::unary(&self.shared, request, store_states).await
    }
}

/// All ages are by this member's own clock, by which it also judges the stores. The caller's clock
/// may differ.
async fn store_states(
    lead: Arc<Lead>,
    _: wire::StoreStatesRequest,
) -> Result<wire::StoreStatesResponse, Refusal> {
    let now = lead.clock.awake();
    let cluster = lead.cluster.read();
    let stores = cluster.stores.iter().map(|store| wire::StoreState {
        store: Some(convert::store_message(store)),
        liveness: match StoreMap::liveness(store, &cluster.config.stores, now) {
            Liveness::Alive => wire::StoreLiveness::Alive,
            Liveness::Disconnected => wire::StoreLiveness::Disconnected,
            Liveness::Down => wire::StoreLiveness::Down,
        }
        .into(),
        silent_ms: store.silent_ms(now),
        is_heard: store.is_heard && store.last_heartbeat_ms != 0,
        damaged: store.stats.damage.clone(),
    });
    Ok(wire::StoreStatesResponse { stores: stores.collect(), ..Default::default() })
}
