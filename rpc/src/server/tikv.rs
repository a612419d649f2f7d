//! The `Tikv` service over a [`StoreService`].

use std::sync::Arc;

use tonic::codegen::BoxStream;
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status, Streaming};

use super::{MAX_MESSAGE_BYTES, batch};
use crate::proto::kvrpcpb;
use crate::proto::tikvpb::tikv_server::{Tikv, TikvServer};
use crate::proto::tikvpb::{BatchCommandsRequest, BatchCommandsResponse};
use crate::service::{Command, Reply, ScanHabit, StoreService};

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

/// Tells published clients with habits of their own apart by what they send. Both are built on
/// tonic 0.10, which no other client in the field is; only the later one takes compressed answers.
fn scan_habit(headers: &MetadataMap) -> ScanHabit {
    let of = |name| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
    // An application may put its own name before tonic's.
    let by_tonic_0_10 = of("user-agent").split(' ').any(|part| part.starts_with("tonic/0.10."));
    let takes_gzip = of("grpc-accept-encoding").split(',').any(|kind| kind.trim() == "gzip");
    match (by_tonic_0_10, takes_gzip) {
        (true, true) => ScanHabit::StopsOrWraps,
        (true, false) => ScanHabit::IgnoresRegionErrors,
        (false, _) => ScanHabit::Walks,
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
            async fn raw_scan(
                &self,
                request: Request<kvrpcpb::RawScanRequest>,
            ) -> Result<Response<kvrpcpb::RawScanResponse>, Status> {
                let habit = scan_habit(request.metadata());
                self.service.scan(request.into_inner(), habit).await.map(Response::new)
            }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_with_habits_of_their_own_are_known_by_their_headers() {
        let habit = |agent: &'static str, accepts: Option<&'static str>| {
            let mut headers = MetadataMap::new();
            headers.insert("user-agent", agent.parse().unwrap());
            if let Some(accepts) = accepts {
                headers.insert("grpc-accept-encoding", accepts.parse().unwrap());
            }
            scan_habit(&headers)
        };
        assert_eq!(habit("tonic/0.10.2", Some("gzip,identity")), ScanHabit::StopsOrWraps);
        assert_eq!(habit("app/1 tonic/0.10.2", Some("gzip")), ScanHabit::StopsOrWraps);
        assert_eq!(habit("tonic/0.10.2", None), ScanHabit::IgnoresRegionErrors);
        assert_eq!(habit("tonic/0.14.9", Some("gzip")), ScanHabit::Walks);
        assert_eq!(habit("grpc-go/1.63.2", Some("gzip")), ScanHabit::Walks);
        assert_eq!(scan_habit(&MetadataMap::new()), ScanHabit::Walks);
    }
}
