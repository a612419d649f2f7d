//! A store's door before the store is open.
//!
//! A node serves its port from the beginning, because placement, which the store
//! needs in order to open, may be behind the same port.

use std::sync::{Arc, OnceLock};

use esker_rpc::proto::kvrpcpb::{
    RawCasRequest, RawCasResponse, RawGetKeyTtlRequest, RawGetKeyTtlResponse, SplitRegionRequest,
    SplitRegionResponse,
};
use esker_rpc::service::{Answer, Command, Reply, StoreService};
use tonic::Status;

use super::regions::RegionService;

/// Answers `UNAVAILABLE` until the store is there.
#[derive(Default)]
pub struct LateStore {
    service: OnceLock<Arc<RegionService>>,
}

impl LateStore {
    /// The store is open. A second one is ignored: a node has one.
    pub fn open(&self, service: Arc<RegionService>) {
        let _ = self.service.set(service);
    }

    pub fn get(&self) -> Option<&Arc<RegionService>> {
        self.service.get()
    }

    fn ask<T: Send + 'static>(&self, ask: impl FnOnce(&RegionService) -> Answer<T>) -> Answer<T> {
        match self.service.get() {
            Some(service) => ask(service),
            None => Box::pin(std::future::ready(Err(not_open()))),
        }
    }
}

/// The answer of a node whose store is not open (yet).
pub fn not_open() -> Status {
    Status::unavailable("the store of this node is not open yet; try again")
}

impl StoreService for LateStore {
    fn store_id(&self) -> u64 {
        self.service.get().map_or(0, |service| service.store_id())
    }

    fn handle(&self, command: Command) -> Answer<Reply> {
        self.ask(|service| service.handle(command))
    }

    fn compare_and_swap(&self, request: RawCasRequest) -> Answer<RawCasResponse> {
        self.ask(|service| service.compare_and_swap(request))
    }

    fn key_ttl(&self, request: RawGetKeyTtlRequest) -> Answer<RawGetKeyTtlResponse> {
        self.ask(|service| service.key_ttl(request))
    }

    fn split_region(&self, request: SplitRegionRequest) -> Answer<SplitRegionResponse> {
        self.ask(|service| service.split_region(request))
    }
}
