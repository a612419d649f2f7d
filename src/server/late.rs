//! The entrance to a store that may not be open: not yet, or no longer.
//!
//! A node serves its port from the beginning, because placement, which the store needs in order to
//! open, may be behind the same port. And clients in this process may outlive the node, whose data
//! directory must be free when it has stopped.

use std::sync::Arc;

use arc_swap::ArcSwapOption;
use esker_model::{RegionId, StoreId};
use esker_raftstore::RequestError;
use esker_rpc::proto::kvrpcpb::RawScanResponse;
use esker_rpc::service::{Answer, Caller, Reply, Request, ScanHabit, StoreService};
use esker_storage::Storage;
use tonic::Status;

/// Answers `UNAVAILABLE` while the store is not open. Where clients would take that as final, it
/// answers that the store does not lead.
#[derive(Default)]
pub struct LateStore {
    service: ArcSwapOption<Storage>,
}

impl LateStore {
    pub fn open(&self, service: Arc<Storage>) {
        self.service.store(Some(service));
    }

    /// Releases the store.
    pub fn close(&self) {
        self.service.store(None);
    }

    pub fn get(&self) -> Option<Arc<Storage>> {
        self.service.load_full()
    }
}

/// The status of a node whose store is not open.
pub fn not_open() -> Status {
    Status::unavailable("the store of this node is not open yet; try again")
}

impl StoreService for LateStore {
    fn store_id(&self) -> StoreId {
        self.service.load().as_ref().map_or(StoreId(0), |service| service.store_id())
    }

    fn remembers_writes(&self) -> bool {
        true
    }

    fn handle(&self, request: Request, caller: Caller) -> Answer {
        let answer = match (&*self.service.load(), request) {
            (Some(service), request) => return service.handle(request, caller),
            // Published clients repeat other requests after `UNAVAILABLE`, but not a scan. They get
            // the answer of an open store that does not lead, and look elsewhere.
            (None, Request::RawScan(scan)) if caller.scans != ScanHabit::IgnoresRegionErrors => {
                let region = RegionId(scan.context.map_or(0, |context| context.region_id));
                let error = RequestError::NotLeader { region, leader: None };
                let region_error = Some(error.to_proto().into());
                Ok(Reply::RawScan(RawScanResponse { region_error, ..Default::default() }))
            }
            (None, _) => Err(not_open()),
        };
        Box::pin(std::future::ready(answer))
    }
}
