//! The procedures of the `Tikv` service, in one table.
//!
//! A line of the table is all that the wire needs to know of a procedure: its name here, its
//! request and response, and its unary method. The table generates
//!
//! - [`Request`] and [`Reply`], the argument and the result of [`StoreService`]'s one method;
//! - the `Tikv` service over that method;
//! - the two ways in which a client sends a request: in a batch, or by itself;
//! - the form of a refusal in a batch.
//!
//! [`StoreService`]: crate::service::StoreService

use tonic::Status;
use tonic::transport::Channel;

use crate::proto::kvrpcpb::*;
use crate::proto::tikvpb::tikv_client::TikvClient;
use crate::proto::{errorpb, tikvpb};

/// A command of a `BatchCommands` stream.
pub type Batched = tikvpb::batch_commands_request::request::Cmd;
/// The response to a command of a `BatchCommands` stream.
pub type BatchedReply = tikvpb::batch_commands_response::response::Cmd;

/// Passes the table to a macro.
macro_rules! with_procedures {
    ($macro:ident) => {
        $macro! {
            // A command of `BatchCommands` as well as a unary method.
            batched {
                Get(GetRequest) -> GetResponse = kv_get,
                Scan(ScanRequest) -> ScanResponse = kv_scan,
                Prewrite(PrewriteRequest) -> PrewriteResponse = kv_prewrite,
                Commit(CommitRequest) -> CommitResponse = kv_commit,
                Cleanup(CleanupRequest) -> CleanupResponse = kv_cleanup,
                BatchGet(BatchGetRequest) -> BatchGetResponse = kv_batch_get,
                BatchRollback(BatchRollbackRequest) -> BatchRollbackResponse = kv_batch_rollback,
                ScanLock(ScanLockRequest) -> ScanLockResponse = kv_scan_lock,
                ResolveLock(ResolveLockRequest) -> ResolveLockResponse = kv_resolve_lock,
                Gc(GcRequest) -> GcResponse = kv_gc,
                DeleteRange(DeleteRangeRequest) -> DeleteRangeResponse = kv_delete_range,
                PessimisticLock(PessimisticLockRequest) -> PessimisticLockResponse
                    = kv_pessimistic_lock,
                PessimisticRollback(PessimisticRollbackRequest) -> PessimisticRollbackResponse
                    = kv_pessimistic_rollback,
                CheckTxnStatus(CheckTxnStatusRequest) -> CheckTxnStatusResponse
                    = kv_check_txn_status,
                TxnHeartBeat(TxnHeartBeatRequest) -> TxnHeartBeatResponse = kv_txn_heart_beat,
                CheckSecondaryLocks(CheckSecondaryLocksRequest) -> CheckSecondaryLocksResponse
                    = kv_check_secondary_locks,
                GetHealthFeedback(GetHealthFeedbackRequest) -> GetHealthFeedbackResponse
                    = get_health_feedback,
                RawGet(RawGetRequest) -> RawGetResponse = raw_get,
                RawBatchGet(RawBatchGetRequest) -> RawBatchGetResponse = raw_batch_get,
                RawPut(RawPutRequest) -> RawPutResponse = raw_put,
                RawBatchPut(RawBatchPutRequest) -> RawBatchPutResponse = raw_batch_put,
                RawDelete(RawDeleteRequest) -> RawDeleteResponse = raw_delete,
                RawBatchDelete(RawBatchDeleteRequest) -> RawBatchDeleteResponse = raw_batch_delete,
                RawScan(RawScanRequest) -> RawScanResponse = raw_scan,
                RawDeleteRange(RawDeleteRangeRequest) -> RawDeleteRangeResponse = raw_delete_range,
                RawBatchScan(RawBatchScanRequest) -> RawBatchScanResponse = raw_batch_scan,
            }
            // A unary method only.
            alone {
                RawCompareAndSwap(RawCasRequest) -> RawCasResponse = raw_compare_and_swap,
                RawGetKeyTtl(RawGetKeyTtlRequest) -> RawGetKeyTtlResponse = raw_get_key_ttl,
                RawChecksum(RawChecksumRequest) -> RawChecksumResponse = raw_checksum,
                SplitRegion(SplitRegionRequest) -> SplitRegionResponse = split_region,
                ReadIndex(ReadIndexRequest) -> ReadIndexResponse = read_index,
            }
        }
    };
}

pub(crate) use with_procedures;

/// A request of one procedure, as a type of its own.
pub trait Procedure: Into<Request> + Send {
    /// Its response.
    type Response: Send;

    /// Sets the context, which names the region that the request is for.
    fn set_context(&mut self, context: Context);

    /// The response in a reply; `None` for the reply to another procedure.
    fn response(reply: Reply) -> Option<Self::Response>;
}

macro_rules! types {
    (
        batched { $($batched:ident($bq:ident) -> $br:ident = $bm:ident,)* }
        alone { $($alone:ident($aq:ident) -> $ar:ident = $am:ident,)* }
    ) => {
        /// A request to a store.
        #[derive(Clone, Debug, PartialEq)]
        #[allow(missing_docs, reason = "each is named after its procedure")]
        pub enum Request {
            $($batched($bq),)*
            $($alone($aq),)*
        }

        /// A store's reply. It has the name of its request.
        #[derive(Clone, Debug, PartialEq)]
        #[allow(missing_docs, reason = "each is named after its procedure")]
        pub enum Reply {
            $($batched($br),)*
            $($alone($ar),)*
        }

        impl Request {
            /// The procedure's name.
            pub fn name(&self) -> &'static str {
                match self {
                    $(Request::$batched(_) => stringify!($batched),)*
                    $(Request::$alone(_) => stringify!($alone),)*
                }
            }

            /// The request of a batched command; `None` for `Empty`, which is no request to a
            /// store.
            pub fn of_batched(command: Batched) -> Option<Request> {
                match command {
                    $(Batched::$batched(request) => Some(Request::$batched(request)),)*
                    Batched::Empty(_) => None,
                }
            }

            /// The request as a command of a batch.
            ///
            /// # Errors
            /// The request itself, if the protocol has it as a unary call only.
            pub fn into_batched(self) -> Result<Batched, Box<Request>> {
                match self {
                    $(Request::$batched(request) => Ok(Batched::$batched(request)),)*
                    $(Request::$alone(_) => Err(Box::new(self)),)*
                }
            }

            /// A function that makes the reply which refuses the request in a batch, from the
            /// reason.
            ///
            /// A batch has no status for each response. So the refusal is a region error that all
            /// clients take as final and show to their callers: an entry that is too large, without
            /// a size. Some clients would take an error in a pair, or an empty response, for data.
            /// After a response without a command, Go clients treat the store as dead for a while.
            pub(crate) fn refusal(&self) -> fn(&str) -> Reply {
                fn error(why: &str) -> Option<Box<errorpb::Error>> {
                    Some(Box::new(errorpb::Error {
                        message: why.to_owned(),
                        raft_entry_too_large: Some(errorpb::RaftEntryTooLarge::default()),
                        ..Default::default()
                    }))
                }
                match self {
                    $(Request::$batched(_) => |why| {
                        Reply::$batched($br { region_error: error(why), ..Default::default() })
                    },)*
                    $(Request::$alone(_) => |why| {
                        Reply::$alone($ar { region_error: error(why), ..Default::default() })
                    },)*
                }
            }

            /// Sends the request by itself.
            ///
            /// # Errors
            /// The status that the store answers instead of a response, or the connection's end.
            pub async fn send_alone(
                self,
                client: &mut TikvClient<Channel>,
            ) -> Result<Reply, Status> {
                match self {
                    $(Request::$batched(request) => {
                        let response = client.$bm(request).await?;
                        Ok(Reply::$batched(response.into_inner()))
                    })*
                    $(Request::$alone(request) => {
                        let response = client.$am(request).await?;
                        Ok(Reply::$alone(response.into_inner()))
                    })*
                }
            }
        }

        impl Reply {
            /// The reply of a batched response; `None` for the response to `Empty`.
            pub fn of_batched(response: BatchedReply) -> Option<Reply> {
                match response {
                    $(BatchedReply::$batched(response) => Some(Reply::$batched(response)),)*
                    BatchedReply::Empty(_) => None,
                }
            }

            /// The reply as a response of a batch; `None` if the protocol has it as the response to
            /// a unary call only.
            pub fn into_batched(self) -> Option<BatchedReply> {
                match self {
                    $(Reply::$batched(response) => Some(BatchedReply::$batched(response)),)*
                    $(Reply::$alone(_) => None,)*
                }
            }
        }

        $(procedure!($batched($bq) -> $br);)*
        $(procedure!($alone($aq) -> $ar);)*
    };
}

macro_rules! procedure {
    ($name:ident($request:ident) -> $response:ident) => {
        impl From<$request> for Request {
            fn from(request: $request) -> Request {
                Request::$name(request)
            }
        }

        impl Procedure for $request {
            type Response = $response;

            fn set_context(&mut self, context: Context) {
                self.context = Some(context);
            }

            fn response(reply: Reply) -> Option<$response> {
                match reply {
                    Reply::$name(response) => Some(response),
                    _ => None,
                }
            }
        }
    };
}

with_procedures!(types);
