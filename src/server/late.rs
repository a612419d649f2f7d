//! A store's door while the store is not open: not yet, or no longer.
//!
//! A node serves its port from the beginning, because placement, which the store
//! needs in order to open, may be behind the same port. And clients in this process
//! may outlive the node, whose data directory must be free when it has stopped.

use std::sync::Arc;

use arc_swap::ArcSwapOption;
use esker_model::RegionId;
use esker_raftstore::RequestError;
use esker_rpc::proto::kvrpcpb::{
    RawCasRequest, RawCasResponse, RawChecksumRequest, RawChecksumResponse, RawGetKeyTtlRequest,
    RawGetKeyTtlResponse, RawScanRequest, RawScanResponse, SplitRegionRequest, SplitRegionResponse,
};
use esker_rpc::service::{Answer, Command, Reply, ScanHabit, StoreService};
use tonic::Status;

use super::regions::RegionService;

/// Answers `UNAVAILABLE` while the store is not there, or, where clients would take that as
/// final, that it does not lead.
#[derive(Default)]
pub struct LateStore {
    service: ArcSwapOption<RegionService>,
}

impl LateStore {
    pub fn open(&self, service: Arc<RegionService>) {
        self.service.store(Some(service));
    }

    /// Lets go of the store.
    pub fn close(&self) {
        self.service.store(None);
    }

    pub fn get(&self) -> Option<Arc<RegionService>> {
        self.service.load_full()
    }

    fn ask<T: Send + 'static>(&self, ask: impl FnOnce(&RegionService) -> Answer<T>) -> Answer<T> {
        match &*self.service.load() {
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
        self.service.load().as_ref().map_or(0, |service| service.store_id())
    }

    fn remembers_writes(&self) -> bool {
        true
    }

    fn handle(&self, command: Command) -> Answer<Reply> {
        self.ask(|service| service.handle(command))
    }

    /// Published clients repeat what cannot be sent, but not a scan: they are told to look
    /// elsewhere as by a store that is open.
    fn scan(&self, request: RawScanRequest, habit: ScanHabit) -> Answer<RawScanResponse> {
        match &*self.service.load() {
            Some(service) => service.scan(request, habit),
            None if habit == ScanHabit::IgnoresRegionErrors => {
                Box::pin(std::future::ready(Err(not_open())))
            }
            None => {
                let region = RegionId(request.context.unwrap_or_default().region_id);
                let error = RequestError::NotLeader { region, leader: None };
                let region_error = Some(error.to_proto());
                let answer = RawScanResponse { region_error, ..Default::default() };
                Box::pin(std::future::ready(Ok(answer)))
            }
        }
    }

    fn checksum(&self, request: RawChecksumRequest) -> Answer<RawChecksumResponse> {
        self.ask(|service| service.checksum(request))
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
