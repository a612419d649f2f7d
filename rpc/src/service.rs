//! What a store answers, as a trait: the one door between sockets and the region logic.
//!
//! Requests flow in as wire types, whether they came by a unary call, in a `BatchCommands` stream,
//! or from a client in the same process; responses flow out as wire types. An implementation
//! promises that a returned future may be dropped at any time: that abandons the answer, not a
//! write that has already been proposed.

use futures_util::future::BoxFuture;
use tonic::{Code, Status};

pub use crate::proto::tikvpb::batch_commands_request::request::Cmd as Command;
pub use crate::proto::tikvpb::batch_commands_response::response::Cmd as Reply;

use crate::proto::kvrpcpb::{
    RawCasRequest, RawCasResponse, RawChecksumRequest, RawChecksumResponse, RawGetKeyTtlRequest,
    RawGetKeyTtlResponse, RawScanRequest, RawScanResponse, ReadIndexRequest, ReadIndexResponse,
    SplitRegionRequest, SplitRegionResponse,
};

/// The future that a store answers with. A `Status` is for what the store does not do at all
/// (`UNIMPLEMENTED`), can no longer do (`UNAVAILABLE`, while it stops: this also ends the stream
/// that a batched command came by), or refuses where the response has no place for a text that no
/// client takes for data (`INVALID_ARGUMENT` and the like). Everything else that concerns a region
/// or a key travels inside the response.
pub type Answer<T> = BoxFuture<'static, Result<T, Status>>;

/// What a client makes of the answer to one raw scan that is not batched, as far as it is told by
/// the headers of its request. Some published clients need other answers than the rest; which, and
/// why, is in `docs/clients.md`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ScanHabit {
    /// Goes on where the region ends, until there is no region or the range ends.
    #[default]
    Walks,
    /// `tikv-client` 0.4: stops where the first region ends if the range has no end, and takes a
    /// region without an end for "go on at the beginning" if it has one.
    StopsOrWraps,
    /// What is in the Python package `tikv-client` 0.0.4: takes a region error for an empty region.
    IgnoresRegionErrors,
}

/// A store's requests. Those that the protocol can batch come through [`StoreService::handle`];
/// the rest have a method each.
///
/// Every response to a write with a `region_error` other than `UndeterminedResult` promises that
/// the write has not been applied and never will be: clients repeat it on the strength of that.
pub trait StoreService: Send + Sync + 'static {
    /// The store that answers.
    fn store_id(&self) -> u64;

    /// Whether the store's regions remember tagged writes (`kvrpcpb.WriteTag`), so that one which
    /// is sent twice takes effect once. Clients that share a process ask here, others by the
    /// command `Empty`.
    fn remembers_writes(&self) -> bool {
        false
    }

    /// Answers one command with the reply of the same name.
    fn handle(&self, command: Command) -> Answer<Reply>;

    /// A scan that came by itself; one in a batch comes through [`StoreService::handle`].
    fn scan(&self, request: RawScanRequest, habit: ScanHabit) -> Answer<RawScanResponse> {
        let _ = habit;
        let answer = self.handle(Command::RawScan(request));
        Box::pin(async {
            match answer.await? {
                Reply::RawScan(response) => Ok(response),
                _ => Err(Status::internal("the store answered a scan with another reply")),
            }
        })
    }

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

/// Whether a status concerns one request: its store has seen it, has not carried it out, and would
/// say the same again. Any other is of the store as a whole.
pub fn is_refusal(status: &Status) -> bool {
    matches!(
        status.code(),
        Code::Unimplemented | Code::InvalidArgument | Code::FailedPrecondition | Code::DataLoss
    )
}

/// The answer of a store that does not serve a method.
pub fn unimplemented<T: Send + 'static>(method: &str) -> Answer<T> {
    let status = Status::unimplemented(format!("{method} is not served by this store"));
    Box::pin(std::future::ready(Err(status)))
}
