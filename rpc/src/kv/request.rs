//! The requests that go to one region, and what they have in common.

use crate::proto::errorpb;
use crate::proto::kvrpcpb::*;
use crate::service::{Command, Reply};

/// A request as it is handed to a store: batched where the protocol can, by itself where not.
#[derive(Debug)]
pub(super) enum Outgoing {
    Batched(Box<Command>),
    CompareAndSwap(Box<RawCasRequest>),
    KeyTtl(Box<RawGetKeyTtlRequest>),
    Split(Box<SplitRegionRequest>),
}

/// A store's answer to the same.
#[derive(Debug)]
pub(super) enum Incoming {
    Batched(Box<Reply>),
    CompareAndSwap(Box<RawCasResponse>),
    KeyTtl(Box<RawGetKeyTtlResponse>),
    Split(Box<SplitRegionResponse>),
}

/// A request for one region.
pub(super) trait RegionRequest: Clone + Send + Sync {
    type Response: Send;

    /// For errors and logs.
    const CALL: &'static str;

    /// Whether it may be repeated when an attempt may have been applied.
    const REPEATABLE: bool;

    fn outgoing(self, context: Context) -> Outgoing;

    /// `None` for the answer to another kind of request.
    fn response(incoming: Incoming) -> Option<Self::Response>;

    fn region_error(response: &mut Self::Response) -> Option<errorpb::Error>;

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

macro_rules! batched {
    ($request:ident -> $response:ident, $variant:ident, $call:literal, $complaint:expr) => {
        impl RegionRequest for $request {
            type Response = $response;
            const CALL: &'static str = $call;
            const REPEATABLE: bool = true;

            fn outgoing(mut self, context: Context) -> Outgoing {
                self.context = Some(context);
                Outgoing::Batched(Box::new(Command::$variant(self)))
            }

            fn response(incoming: Incoming) -> Option<$response> {
                match incoming {
                    Incoming::Batched(reply) => match *reply {
                        Reply::$variant(response) => Some(response),
                        _ => None,
                    },
                    _ => None,
                }
            }

            fn region_error(response: &mut $response) -> Option<errorpb::Error> {
                response.region_error.take()
            }

            fn complaint(response: &$response) -> String {
                let complaint: fn(&$response) -> String = $complaint;
                complaint(response)
            }
        }
    };
}

macro_rules! alone {
    ($request:ident -> $response:ident, $variant:ident, $call:literal, $repeatable:literal, $complaint:expr) => {
        impl RegionRequest for $request {
            type Response = $response;
            const CALL: &'static str = $call;
            const REPEATABLE: bool = $repeatable;

            fn outgoing(mut self, context: Context) -> Outgoing {
                self.context = Some(context);
                Outgoing::$variant(Box::new(self))
            }

            fn response(incoming: Incoming) -> Option<$response> {
                match incoming {
                    Incoming::$variant(response) => Some(*response),
                    _ => None,
                }
            }

            fn region_error(response: &mut $response) -> Option<errorpb::Error> {
                response.region_error.take()
            }

            fn complaint(response: &$response) -> String {
                let complaint: fn(&$response) -> String = $complaint;
                complaint(response)
            }
        }
    };
}

batched!(RawGetRequest -> RawGetResponse, RawGet, "get", |r| r.error.clone());
batched!(RawBatchGetRequest -> RawBatchGetResponse, RawBatchGet, "batch get", |r| {
    first_pair_error(&r.pairs)
});
batched!(RawPutRequest -> RawPutResponse, RawPut, "put", |r| r.error.clone());
batched!(RawBatchPutRequest -> RawBatchPutResponse, RawBatchPut, "batch put", |r| r.error.clone());
batched!(RawDeleteRequest -> RawDeleteResponse, RawDelete, "delete", |r| r.error.clone());
batched!(
    RawBatchDeleteRequest -> RawBatchDeleteResponse, RawBatchDelete, "batch delete",
    |r| r.error.clone()
);
batched!(RawScanRequest -> RawScanResponse, RawScan, "scan", |r| first_pair_error(&r.kvs));
batched!(
    RawDeleteRangeRequest -> RawDeleteRangeResponse, RawDeleteRange, "delete range",
    |r| r.error.clone()
);
alone!(
    RawCasRequest -> RawCasResponse, CompareAndSwap, "compare and swap", false,
    |r| r.error.clone()
);
alone!(RawGetKeyTtlRequest -> RawGetKeyTtlResponse, KeyTtl, "get ttl", true, |r| r.error.clone());
// Splitting again at a key that is a boundary already changes nothing.
alone!(SplitRegionRequest -> SplitRegionResponse, Split, "split", true, |r| {
    r.errors.first().map(|error| format!("{error:?}")).unwrap_or_default()
});
