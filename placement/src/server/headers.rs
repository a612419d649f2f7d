//! Access to the header that every request and response carries.

use esker_rpc::proto::{esker, keyspacepb, pdpb};

/// A request whose header names the cluster that it is for.
pub(crate) trait RequestWithHeader: Send + 'static {
    fn header(&self) -> Option<&pdpb::RequestHeader>;
}

/// A response whose header names the cluster that answers, or the error.
pub(crate) trait ResponseWithHeader: Default + Send + 'static {
    fn set_header(&mut self, header: pdpb::ResponseHeader);
}

macro_rules! requests {
    ($($package:ident::$name:ident),* $(,)?) => {$(
        impl RequestWithHeader for $package::$name {
            fn header(&self) -> Option<&pdpb::RequestHeader> {
                self.header.as_ref()
            }
        }
    )*};
}

macro_rules! responses {
    ($($package:ident::$name:ident),* $(,)?) => {$(
        impl ResponseWithHeader for $package::$name {
            fn set_header(&mut self, header: pdpb::ResponseHeader) {
                self.header = Some(header);
            }
        }
    )*};
}

requests![
    esker::StoreStatesRequest,
    keyspacepb::GetAllKeyspacesRequest,
    keyspacepb::LoadKeyspaceByIdRequest,
    keyspacepb::LoadKeyspaceRequest,
    keyspacepb::LookupKeyspaceRequest,
    keyspacepb::UpdateKeyspaceStateRequest,
    pdpb::AllocIdRequest,
    pdpb::AskBatchSplitRequest,
    pdpb::AskSplitRequest,
    pdpb::BatchScanRegionsRequest,
    pdpb::BootstrapRequest,
    pdpb::GetAllStoresRequest,
    pdpb::GetClusterConfigRequest,
    pdpb::GetGcSafePointRequest,
    pdpb::GetMinTsRequest,
    pdpb::GetOperatorRequest,
    pdpb::GetRegionByIdRequest,
    pdpb::GetRegionRequest,
    pdpb::GetStoreRequest,
    pdpb::IsBootstrappedRequest,
    pdpb::PutClusterConfigRequest,
    pdpb::PutStoreRequest,
    pdpb::ReportBatchSplitRequest,
    pdpb::ScanRegionsRequest,
    pdpb::ScatterRegionRequest,
    pdpb::StoreHeartbeatRequest,
    pdpb::UpdateGcSafePointRequest,
    pdpb::UpdateServiceGcSafePointRequest,
];

responses![
    esker::StoreStatesResponse,
    keyspacepb::GetAllKeyspacesResponse,
    keyspacepb::LoadKeyspaceResponse,
    keyspacepb::LookupKeyspaceResponse,
    keyspacepb::UpdateKeyspaceStateResponse,
    keyspacepb::WatchKeyspacesResponse,
    pdpb::AllocIdResponse,
    pdpb::AskBatchSplitResponse,
    pdpb::AskSplitResponse,
    pdpb::BatchScanRegionsResponse,
    pdpb::BootstrapResponse,
    pdpb::GetAllStoresResponse,
    pdpb::GetClusterConfigResponse,
    pdpb::GetClusterInfoResponse,
    pdpb::GetGcSafePointResponse,
    pdpb::GetMembersResponse,
    pdpb::GetMinTsResponse,
    pdpb::GetOperatorResponse,
    pdpb::GetRegionResponse,
    pdpb::GetStoreResponse,
    pdpb::IsBootstrappedResponse,
    pdpb::PutClusterConfigResponse,
    pdpb::PutStoreResponse,
    pdpb::QueryRegionResponse,
    pdpb::RegionHeartbeatResponse,
    pdpb::ReportBatchSplitResponse,
    pdpb::ScanRegionsResponse,
    pdpb::ScatterRegionResponse,
    pdpb::StoreHeartbeatResponse,
    pdpb::TsoResponse,
    pdpb::UpdateGcSafePointResponse,
    pdpb::UpdateServiceGcSafePointResponse,
];
