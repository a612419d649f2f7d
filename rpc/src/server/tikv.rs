//! The `Tikv` service over a [`StoreService`].

use std::sync::Arc;

use tonic::codegen::BoxStream;
use tonic::{Request, Response, Status, Streaming};

use super::{MAX_MESSAGE_BYTES, batch};
use crate::proto::kvrpcpb;
use crate::proto::tikvpb::tikv_server::{Tikv, TikvServer};
use crate::proto::tikvpb::{BatchCommandsRequest, BatchCommandsResponse};
use crate::service::{Command, Reply, StoreService};

/// Answers the calls of the `Tikv` service with a store.
#[derive(Debug)]
pub struct TikvService<S> {
    service: Arc<S>,
}

impl<S: StoreService> TikvService<S> {
    pub fn new(service: Arc<S>) -> Self {
        TikvService { service }
    }

    /// The service with the limits of this crate, ready for [`tonic::service::Routes`].
    pub fn into_server(self) -> TikvServer<Self> {
        TikvServer::new(self)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES)
    }
}

/// Writes the service: one line for each unary method that is a command, and for each that the
/// store has a method of its own for.
macro_rules! tikv_service {
    (
        commands { $($call:ident($request:ident) -> $response:ident = $variant:ident,)* }
        methods { $($other:ident($other_request:ident) -> $other_response:ident = $method:ident,)* }
    ) => {
        #[tonic::async_trait]
        impl<S: StoreService> Tikv for TikvService<S> {
            $(
                async fn $call(
                    &self,
                    request: Request<kvrpcpb::$request>,
                ) -> Result<Response<kvrpcpb::$response>, Status> {
                    let command = Command::$variant(request.into_inner());
                    match self.service.handle(command).await? {
                        Reply::$variant(response) => Ok(Response::new(response)),
                        _ => Err(Status::internal(concat!(
                            "the store answered ", stringify!($variant), " with another reply"
                        ))),
                    }
                }
            )*
            $(
                async fn $other(
                    &self,
                    request: Request<kvrpcpb::$other_request>,
                ) -> Result<Response<kvrpcpb::$other_response>, Status> {
                    self.service.$method(request.into_inner()).await.map(Response::new)
                }
            )*
            async fn batch_commands(
                &self,
                request: Request<Streaming<BatchCommandsRequest>>,
            ) -> Result<Response<BoxStream<BatchCommandsResponse>>, Status> {
                let responses =
                    batch::Responses::new(Arc::clone(&self.service), request.into_inner());
                Ok(Response::new(Box::pin(responses)))
            }
        }
    };
}

tikv_service! {
    commands {
        kv_get(GetRequest) -> GetResponse = Get,
        kv_scan(ScanRequest) -> ScanResponse = Scan,
        kv_prewrite(PrewriteRequest) -> PrewriteResponse = Prewrite,
        kv_commit(CommitRequest) -> CommitResponse = Commit,
        kv_cleanup(CleanupRequest) -> CleanupResponse = Cleanup,
        kv_batch_get(BatchGetRequest) -> BatchGetResponse = BatchGet,
        kv_batch_rollback(BatchRollbackRequest) -> BatchRollbackResponse = BatchRollback,
        kv_scan_lock(ScanLockRequest) -> ScanLockResponse = ScanLock,
        kv_resolve_lock(ResolveLockRequest) -> ResolveLockResponse = ResolveLock,
        kv_gc(GcRequest) -> GcResponse = Gc,
        kv_delete_range(DeleteRangeRequest) -> DeleteRangeResponse = DeleteRange,
        kv_pessimistic_lock(PessimisticLockRequest) -> PessimisticLockResponse = PessimisticLock,
        kv_pessimistic_rollback(PessimisticRollbackRequest) -> PessimisticRollbackResponse
            = PessimisticRollback,
        kv_check_txn_status(CheckTxnStatusRequest) -> CheckTxnStatusResponse = CheckTxnStatus,
        kv_txn_heart_beat(TxnHeartBeatRequest) -> TxnHeartBeatResponse = TxnHeartBeat,
        kv_check_secondary_locks(CheckSecondaryLocksRequest) -> CheckSecondaryLocksResponse
            = CheckSecondaryLocks,
        get_health_feedback(GetHealthFeedbackRequest) -> GetHealthFeedbackResponse
            = GetHealthFeedback,
        raw_get(RawGetRequest) -> RawGetResponse = RawGet,
        raw_batch_get(RawBatchGetRequest) -> RawBatchGetResponse = RawBatchGet,
        raw_put(RawPutRequest) -> RawPutResponse = RawPut,
        raw_batch_put(RawBatchPutRequest) -> RawBatchPutResponse = RawBatchPut,
        raw_delete(RawDeleteRequest) -> RawDeleteResponse = RawDelete,
        raw_batch_delete(RawBatchDeleteRequest) -> RawBatchDeleteResponse = RawBatchDelete,
        raw_scan(RawScanRequest) -> RawScanResponse = RawScan,
        raw_delete_range(RawDeleteRangeRequest) -> RawDeleteRangeResponse = RawDeleteRange,
        raw_batch_scan(RawBatchScanRequest) -> RawBatchScanResponse = RawBatchScan,
    }
    methods {
        raw_compare_and_swap(RawCasRequest) -> RawCasResponse = compare_and_swap,
        raw_get_key_ttl(RawGetKeyTtlRequest) -> RawGetKeyTtlResponse = key_ttl,
        raw_checksum(RawChecksumRequest) -> RawChecksumResponse = checksum,
        split_region(SplitRegionRequest) -> SplitRegionResponse = split_region,
        read_index(ReadIndexRequest) -> ReadIndexResponse = read_index,
    }
}
