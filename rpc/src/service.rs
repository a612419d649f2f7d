//! What a store answers, as a trait: the one door between sockets and the region logic.
//!
//! Requests flow in as wire types, whether they came by a unary call, in a `BatchCommands` stream,
//! or from a client in the same process; responses flow out as wire types. An implementation
//! promises that a returned future may be dropped at any time: that abandons the answer, not a
//! write that has already been proposed.

use futures_util::future::BoxFuture;
use tonic::Status;

pub use crate::proto::tikvpb::batch_commands_request::request::Cmd as Command;
pub use crate::proto::tikvpb::batch_commands_response::response::Cmd as Reply;

use crate::proto::kvrpcpb::{
    RawCasRequest, RawCasResponse, RawChecksumRequest, RawChecksumResponse, RawGetKeyTtlRequest,
    RawGetKeyTtlResponse, ReadIndexRequest, ReadIndexResponse, SplitRegionRequest,
    SplitRegionResponse,
};

/// The future that a store answers with. A `Status` is for what the store does not do at all
/// (`UNIMPLEMENTED`) or can no longer do (`UNAVAILABLE`, while it stops: this also ends the stream
/// that a batched command came by); everything that concerns a region or a key travels inside the
/// response.
pub type Answer<T> = BoxFuture<'static, Result<T, Status>>;

/// A store's requests. Those that the protocol can batch come through [`StoreService::handle`];
/// the rest have a method each.
///
/// Every response to a write with a `region_error` other than `UndeterminedResult` promises that
/// the write has not been applied and never will be: clients repeat it on the strength of that.
pub trait StoreService: Send + Sync + 'static {
    /// The store that answers.
    fn store_id(&self) -> u64;

    /// Answers one command with the reply of the same name.
    fn handle(&self, command: Command) -> Answer<Reply>;

    fn compare_and_swap(&self, request: RawCasRequest) -> Answer<RawCasResponse> {
        drop(request);
        unimplemented("RawCompareAndSwap")
    }

    fn key_ttl(&self, request: RawGetKeyTtlRequest) -> Answer<RawGetKeyTtlResponse> {
        drop(request);
        unimplemented("RawGetKeyTTL")
    }

    fn checksum(&self, request: RawChecksumRequest) -> Answer<RawChecksumResponse> {
        drop(request);
        unimplemented("RawChecksum")
    }

    fn split_region(&self, request: SplitRegionRequest) -> Answer<SplitRegionResponse> {
        drop(request);
        unimplemented("SplitRegion")
    }

    fn read_index(&self, request: ReadIndexRequest) -> Answer<ReadIndexResponse> {
        drop(request);
        unimplemented("ReadIndex")
    }
}

/// The answer of a store that does not serve a method.
pub fn unimplemented<T: Send + 'static>(method: &str) -> Answer<T> {
    let status = Status::unimplemented(format!("{method} is not served by this store"));
    Box::pin(std::future::ready(Err(status)))
}
