//! The requests that go to one region, and what they have in common.

use esker_rpc::proto::errorpb;
use esker_rpc::proto::kvrpcpb::*;
use esker_rpc::service::{Command, Reply};

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

/// What a request does to a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Effect {
    /// Nothing: it is repeated as it is.
    Read,
    /// It changes keys to what it says: repeated under its tag, or not at all.
    Write,
    /// A second time it changes nothing: repeated as it is.
    Settle,
    /// What it does depends on what it finds: never repeated.
    Swap,
}

/// A request for one region.
pub(super) trait RegionRequest: Clone + Send + Sync {
    type Response: Send;

    /// For errors and logs.
    const CALL: &'static str;

    /// What it does, and so what is to be done when an attempt may have been applied.
    const EFFECT: Effect;

    fn outgoing(self, context: Context) -> Outgoing;

    /// `None` for the answer to another kind of request.
    fn response(incoming: Incoming) -> Option<Self::Response>;

    fn region_error(response: &mut Self::Response) -> Option<errorpb::Error>;

    /// How far the region's log had been applied, from one that remembers writes; otherwise 0.
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

macro_rules! batched {
    (
        $request:ident -> $response:ident, $variant:ident, $call:literal, $effect:ident,
        $applied:expr, $complaint:expr
    ) => {
        impl RegionRequest for $request {
            type Response = $response;
            const CALL: &'static str = $call;
            const EFFECT: Effect = Effect::$effect;

            fn applied_index(response: &$response) -> u64 {
                let applied: fn(&$response) -> u64 = $applied;
                applied(response)
            }

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
    ($request:ident -> $response:ident, $variant:ident, $call:literal, $effect:ident, $complaint:expr) => {
        impl RegionRequest for $request {
            type Response = $response;
            const CALL: &'static str = $call;
            const EFFECT: Effect = Effect::$effect;

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

macro_rules! read {
    ($request:ident -> $response:ident, $variant:ident, $call:literal, $complaint:expr) => {
        batched!($request -> $response, $variant, $call, Read, |_| 0, $complaint);
    };
}

macro_rules! write {
    ($request:ident -> $response:ident, $variant:ident, $call:literal) => {
        batched!(
            $request -> $response, $variant, $call, Write,
            |r| r.applied_index, |r| r.error.clone()
        );
    };
}

read!(RawGetRequest -> RawGetResponse, RawGet, "get", |r| r.error.clone());
read!(RawBatchGetRequest -> RawBatchGetResponse, RawBatchGet, "batch get", |r| {
    first_pair_error(&r.pairs)
});
read!(RawScanRequest -> RawScanResponse, RawScan, "scan", |r| first_pair_error(&r.kvs));
write!(RawPutRequest -> RawPutResponse, RawPut, "put");
write!(RawBatchPutRequest -> RawBatchPutResponse, RawBatchPut, "batch put");
write!(RawDeleteRequest -> RawDeleteResponse, RawDelete, "delete");
write!(RawBatchDeleteRequest -> RawBatchDeleteResponse, RawBatchDelete, "batch delete");
write!(RawDeleteRangeRequest -> RawDeleteRangeResponse, RawDeleteRange, "delete range");
alone!(
    RawCasRequest -> RawCasResponse, CompareAndSwap, "compare and swap", Swap,
    |r| r.error.clone()
);
alone!(RawGetKeyTtlRequest -> RawGetKeyTtlResponse, KeyTtl, "get ttl", Read, |r| r.error.clone());
// Splitting again at a key that is a boundary already changes nothing.
alone!(SplitRegionRequest -> SplitRegionResponse, Split, "split", Settle, |r| {
    r.errors.first().map(|error| format!("{error:?}")).unwrap_or_default()
});
