//! The admin service of one store.

use std::time::Duration;

use esker_model::StoreId;
use esker_rpc::channel::Dialer;
use esker_rpc::proto::esker as wire;
use esker_rpc::proto::esker::admin_client::AdminClient;
use tonic::transport::{Channel, Endpoint};

use crate::error::ClientError;

/// How long a store may take to accept a connection, and to answer.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Connects to one of the cluster's servers, or returns why that failed.
pub(super) async fn connect(
    dialer: &Dialer,
    address: &str,
    adjusted: impl FnOnce(Endpoint) -> Endpoint,
) -> Result<Channel, String> {
    let patient = |endpoint: Endpoint| adjusted(endpoint.connect_timeout(CONNECT_TIMEOUT));
    dialer.connect_as(address, patient).await
}

/// A connection to the admin service of one store, for one request. A request ends within 10 s. An
/// error that concerns a region (the store does not lead it, say) is a `region_error` in the
/// answer. If the store does not answer in time, or answers with a status, the call fails with
/// [`ClientError::NoAnswer`].
pub struct StoreAdmin {
    store: StoreId,
    address: String,
    client: AdminClient<Channel>,
}

impl StoreAdmin {
    pub(super) async fn connect(
        dialer: &Dialer,
        store: StoreId,
        address: String,
    ) -> Result<Self, ClientError> {
        match connect(dialer, &address, |endpoint| endpoint.timeout(ANSWER_TIMEOUT)).await {
            Ok(channel) => Ok(StoreAdmin { store, address, client: AdminClient::new(channel) }),
            Err(reason) => Err(ClientError::NoAnswer { store, address, reason }),
        }
    }

    /// Splits a region that the store leads, once.
    pub async fn split_region(
        mut self,
        request: wire::SplitRegionRequest,
    ) -> Result<wire::SplitRegionResponse, ClientError> {
        let answer = self.client.split_region(request).await;
        self.answer(answer)
    }

    /// Asks the store to hand over a region that it leads, once. Placement knows whether another
    /// store leads then.
    pub async fn transfer_leader(
        mut self,
        request: wire::TransferLeaderRequest,
    ) -> Result<wire::TransferLeaderResponse, ClientError> {
        let answer = self.client.transfer_leader(request).await;
        self.answer(answer)
    }

    /// What the store's replica of a region reports of itself.
    pub async fn region_detail(
        mut self,
        request: wire::RegionDetailRequest,
    ) -> Result<wire::RegionDetailResponse, ClientError> {
        let answer = self.client.region_detail(request).await;
        self.answer(answer)
    }

    fn answer<T>(
        self,
        answer: Result<tonic::Response<T>, tonic::Status>,
    ) -> Result<T, ClientError> {
        match answer {
            Ok(answer) => Ok(answer.into_inner()),
            Err(status) => Err(ClientError::NoAnswer {
                store: self.store,
                address: self.address,
                reason: status.message().to_owned(),
            }),
        }
    }
}
