//! The requests that go to one region, and what they have in common.

use esker_rpc::proto::errorpb;
use esker_rpc::proto::kvrpcpb::*;
use esker_rpc::service::Procedure;
use prost::Message;

/// What a request does to a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Effect {
    /// Nothing, so it is repeated as it is.
    Read,
    /// It sets keys to given values. It is repeated under its tag, or not at all.
    Write,
    /// A second execution changes nothing, so it is repeated as it is.
    Settle,
    /// Its effect depends on the value that it finds, so it is never repeated.
    Swap,
}

/// A request for one region, as the client makes it.
pub(super) trait RegionRequest: Procedure + Message + Clone {
    /// The request's name in errors and logs.
    const CALL: &'static str;

    /// Its effect, which decides what is done when an attempt may have been applied.
    const EFFECT: Effect;

    fn region_error(response: &mut Self::Response) -> Option<errorpb::Error>;

    /// How far the region's log had been applied, if the region remembers writes; otherwise 0.
    fn applied_index(_: &Self::Response) -> u64 {
        0
    }

    /// The store's own complaint about the request; empty if it has none.
    fn complaint(response: &Self::Response) -> String;
}

fn first_pair_error(pairs: &[KvPair]) -> String {
    match pairs.iter().find_map(|pair| pair.error.as_ref()) {
        Some(error) if !error.abort.is_empty() => error.abort.clone(),
        Some(error) => format!("{error:?}"),
        None => String::new(),
    }
}

macro_rules! region_request {
    (
        $request:ident -> $response:ident, $call:literal, $effect:ident, $complaint:expr
        $(, applied $applied:expr)?
    ) => {
        impl RegionRequest for $request {
            const CALL: &'static str = $call;
            const EFFECT: Effect = Effect::$effect;

            fn region_error(response: &mut $response) -> Option<errorpb::Error> {
                response.region_error.take().map(|error| *error)
            }

            $(fn applied_index(response: &$response) -> u64 {
                let applied: fn(&$response) -> u64 = $applied;
                applied(response)
            })?

            fn complaint(response: &$response) -> String {
                let complaint: fn(&$response) -> String = $complaint;
                complaint(response)
            }
        }
    };
}

macro_rules! write {
    ($request:ident -> $response:ident, $call:literal) => {
        region_request!(
            $request -> $response, $call, Write, |r| r.error.clone(), applied |r| r.applied_index
        );
    };
}

region_request!(RawGetRequest -> RawGetResponse, "get", Read, |r| r.error.clone());
region_request!(RawBatchGetRequest -> RawBatchGetResponse, "batch get", Read, |r| {
    first_pair_error(&r.pairs)
});
region_request!(RawScanRequest -> RawScanResponse, "scan", Read, |r| first_pair_error(&r.kvs));
region_request!(RawGetKeyTtlRequest -> RawGetKeyTtlResponse, "get ttl", Read, |r| r.error.clone());
write!(RawPutRequest -> RawPutResponse, "put");
write!(RawBatchPutRequest -> RawBatchPutResponse, "batch put");
write!(RawDeleteRequest -> RawDeleteResponse, "delete");
write!(RawBatchDeleteRequest -> RawBatchDeleteResponse, "batch delete");
write!(RawDeleteRangeRequest -> RawDeleteRangeResponse, "delete range");
region_request!(RawCasRequest -> RawCasResponse, "compare and swap", Swap, |r| r.error.clone());
// Splitting again at a key that is a boundary already changes nothing.
region_request!(SplitRegionRequest -> SplitRegionResponse, "split", Settle, |r| {
    r.errors.first().map(|error| format!("{error:?}")).unwrap_or_default()
});
