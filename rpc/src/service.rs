//! A store's one door between sockets and what a request means.
//!
//! Requests flow in as wire types, whether they came by a unary call, in a `BatchCommands` stream,
//! or from a client in the same process; replies flow out as wire types. An implementation
//! promises that a returned future may be dropped at any time: that abandons the reply, not a
//! write that has already been proposed.

use futures_util::future::BoxFuture;
use tonic::{Code, Status};

pub use crate::procedures::{Procedure, Reply, Request};

/// The future that a store answers with. A `Status` is for what the store does not do at all
/// (`UNIMPLEMENTED`), can no longer do (`UNAVAILABLE`, while it stops: this also ends the stream
/// that a batched command came by), or refuses where the response has no place for a text that no
/// client takes for data (`INVALID_ARGUMENT` and the like). Everything else that concerns a region
/// or a key travels inside the reply.
pub type Answer = BoxFuture<'static, Result<Reply, Status>>;

/// What is known of the client that sent a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Caller {
    /// Always the default for a request that came in a batch.
    pub scans: ScanHabit,
}

/// What a client makes of the answer to one raw scan that is not batched, as far as the headers of
/// its request tell. Some published clients need other answers than the rest; which, and why, is
/// in `docs/clients.md`.
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

/// A store's requests.
///
/// Every reply to a write with a `region_error` other than `UndeterminedResult` promises that the
/// write has not been applied and never will be: clients repeat it on the strength of that.
pub trait StoreService: Send + Sync + 'static {
    /// The store that answers.
    fn store_id(&self) -> u64;

    /// Whether the store's regions remember tagged writes (`kvrpcpb.WriteTag`), so that one which
    /// is sent twice takes effect once. Clients that share a process ask here, others by the
    /// command `Empty`.
    fn remembers_writes(&self) -> bool {
        false
    }

    /// Answers a request with the reply of the same name.
    fn handle(&self, request: Request, caller: Caller) -> Answer;
}

/// Whether a status concerns one request: its store has seen it, has not carried it out, and would
/// say the same again. Any other is of the store as a whole.
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
