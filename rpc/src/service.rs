//! The one entrance to a store's requests, between the sockets and what a request means.
//!
//! Requests flow in as wire types, from a unary call, from a `BatchCommands` stream, or from a
//! client in the same process. Replies flow out as wire types. An implementation promises that a
//! returned future may be dropped at any time. Dropping it abandons the reply, but not a write that
//! has already been proposed.

use esker_model::StoreId;
use futures_util::future::BoxFuture;
use tonic::{Code, Status};

pub use crate::procedures::{Procedure, Reply, Request};

/// The future of a store's answer. A `Status` is for three cases:
///
/// - a procedure that the store does not serve at all (`UNIMPLEMENTED`);
/// - a store that stops (`UNAVAILABLE`), which also ends the stream that a batched command came by;
/// - a refusal where the response has no place for a text that no client takes for data
///   (`INVALID_ARGUMENT` and the like).
///
/// Everything else about a region or a key is inside the reply.
pub type Answer = BoxFuture<'static, Result<Reply, Status>>;

/// What is known of the client that sent a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Caller {
    /// Always the default for a request that came in a batch.
    pub scans: ScanHabit,
}

/// How a client treats the answer to one raw scan that is not batched, as far as the headers of its
/// request show. Some published clients need other answers than the rest. `docs/clients.md` lists
/// them with the reasons.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ScanHabit {
    /// Goes on where the region ends, until there are no more regions or the range ends.
    #[default]
    Walks,
    /// `tikv-client` 0.4. Without an end of the range, it stops where the first region ends. With
    /// an end, it takes a region without an end for "go on at the beginning".
    StopsOrWraps,
    /// The client in the Python package `tikv-client` 0.0.4. It takes a region error for an empty
    /// region.
    IgnoresRegionErrors,
}

/// A store that answers requests.
///
/// A reply to a write with a `region_error` other than `UndeterminedResult` promises that the write
/// has not been applied and never will be. Clients rely on that when they repeat the write.
pub trait StoreService: Send + Sync + 'static {
    /// The id of the store that answers.
    fn store_id(&self) -> StoreId;

    /// Whether the store's regions remember tagged writes (`kvrpcpb.WriteTag`), so that a write
    /// which is sent twice takes effect once. Clients in the same process call this, others send
    /// the command `Empty`.
    fn remembers_writes(&self) -> bool {
        false
    }

    /// Answers a request. The reply has the name of the request.
    fn handle(&self, request: Request, caller: Caller) -> Answer;
}

/// Whether a status is about one request: the store has seen the request, has not carried it out,
/// and would refuse it again. Any other status is about the store as a whole.
pub fn is_refusal(status: &Status) -> bool {
    matches!(
        status.code(),
        Code::Unimplemented | Code::InvalidArgument | Code::FailedPrecondition | Code::DataLoss
    )
}

/// The answer of a store that does not serve a procedure.
pub fn unimplemented(procedure: &str) -> Answer {
    let status = Status::unimplemented(format!("{procedure} is not served by this store"));
    Box::pin(std::future::ready(Err(status)))
}
