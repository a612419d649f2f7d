//! A client of the key-value service, for Esker's own tools and for programs that embed a node.
//!
//! Operations on keys flow in. Each operation is divided by region, each part is sent to the store
//! that leads its region, and the answers are combined. The client's view of the regions is kept in
//! a bounded cache, which the stores' answers correct: when a store does not serve a region, the
//! client looks for the region again and repeats the request. Requests to a store in the same
//! process are function calls. Requests to other stores share one `BatchCommands` stream for each
//! store.
//!
//! It promises that an operation ends within the deadline, with one of three outcomes: it happened,
//! it did not and will not, or [`ClientError::OutcomeUnknown`]. An operation on many keys also ends
//! with the third when only a part of it happened. Reads, puts and deletes are repeated until they
//! succeed. A write whose outcome is unknown is repeated under a tag that its region recognises. So
//! the write happens once, however often it arrives and in whatever order (`kv/fence.rs`). Where a
//! store does not remember tags, the write is not repeated. A compare-and-swap is never repeated
//! once it may have been applied.

mod attempt;
mod batch;
mod cache;
mod fence;
mod ops;
mod request;
mod stores;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use esker_model::StoreId;
use esker_rpc::backoff::Backoff;
use esker_rpc::display_key;
use esker_rpc::proto::pdpb::ErrorType;
use esker_rpc::service::StoreService;
use tokio::time::Instant;

use crate::error::{ClientError, waited_since};
use crate::placement::PlacementClient;

pub use batch::{MAX_IN_FLIGHT, MAX_REQUESTS_PER_BATCH};
pub use cache::MAX_CACHED_REGIONS;
pub use ops::{KeyTtl, Pair, Swap};

/// How long one operation may take, retries included, unless
/// [`with_deadline`](KvClient::with_deadline) sets another time. An operation that goes
/// through regions in turn (a scan, a delete of a range, a split) may take as long for each region.
pub const DEFAULT_DEADLINE: Duration = Duration::from_secs(20);

/// How long one attempt may take before the client looks for the leader again.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(2);

const FIRST_RETRY: Duration = Duration::from_millis(5);
const LONGEST_RETRY: Duration = Duration::from_millis(500);

/// Attempts that are repeated at once, because a store named another store. Further ones wait, so
/// that two stores that name each other are not asked in a fast loop.
const PROMPT_RETRIES: u32 = 2;

/// Regions that one operation asks at the same time.
const MAX_CONCURRENT_REGIONS: usize = 16;

/// A client of one cluster's keys. Cheap to clone: clones share the cache and the connections.
///
/// Keys and values are bytes. A key has 1 byte to 8 KiB. Keys are ordered by their bytes. A write
/// that succeeded is on the disks of a majority of its region's replicas, and every operation that
/// begins afterwards sees it.
///
/// ```no_run
/// use esker_client::kv::KeyTtl;
/// # use esker_client::{ClientError, KvClient};
///
/// # async fn example(client: KvClient) -> Result<(), ClientError> {
/// client.put("fruit/apple", "green").await?;
/// let apple = client.get("fruit/apple").await?;
/// assert_eq!(apple.as_deref(), Some(&b"green"[..]));
///
/// // Only if no other client has changed it since.
/// let swap = client.compare_and_swap("fruit/apple", apple, "red").await?;
/// if !swap.swapped {
///     println!("it is {:?} by now", swap.previous);
/// }
///
/// // Gone after a minute.
/// client.put_with_ttl("session/7", "alice", 60).await?;
/// if let KeyTtl::Left(left) = client.get_ttl("session/7").await? {
///     println!("{} s are left", left.as_secs());
/// }
///
/// // All keys that begin with `fruit/`: `0` is the character after `/`.
/// for (key, value) in client.scan("fruit/", "fruit0", 100).await? {
///     println!("{key:?}: {value:?}");
/// }
/// client.delete_range("session/", "session0").await?;
/// # Ok(())
/// # }
/// ```
///
/// A write has three outcomes:
///
/// ```no_run
/// # use esker_client::{ClientError, KvClient};
/// # async fn example(client: KvClient) {
/// match client.put("fruit/apple", "red").await {
///     Ok(()) => println!("written"),
///     Err(ClientError::OutcomeUnknown { reason, .. }) => println!("perhaps written: {reason}"),
///     Err(error) => println!("not written, now or later: {error}"),
/// }
/// # }
/// ```
///
/// # Errors
///
/// Every operation ends within its deadline ([`DEFAULT_DEADLINE`]). It fails
///
/// - with [`ClientError::Deadline`] if there was no answer until then;
/// - with [`ClientError::Refused`] or [`ClientError::TooLarge`] if a store refuses it, for an empty
///   key, say, or for a key of more than 8 KiB. The request is to be corrected;
/// - with [`ClientError::TooLarge`] before anything is sent, if one request would have more than 8
///   MiB of keys and values. Operations on many keys are cut into smaller requests;
/// - with [`ClientError::NoRegion`], or [`ClientError::PlacementRefused`] with
///   [`ErrorType::NotBootstrapped`], in a cluster in which no store has started yet;
/// - with an error of placement's if placement cannot be asked;
/// - with [`ClientError::OutcomeUnknown`] if a write may have happened. Each other error of a write
///   means that the write has not happened and will not.
#[derive(Clone)]
pub struct KvClient {
    shared: Arc<Shared>,
    deadline: Duration,
    scan_page: u32,
}

struct Shared {
    placement: PlacementClient,
    cache: cache::RegionCache,
    tags: fence::Tags,
    /// Stores in this process, by id.
    local: HashMap<StoreId, Arc<dyn StoreService>>,
    remote: stores::Stores,
}

impl KvClient {
    /// A client that finds regions by asking `placement`. Requests to regions led by one of the
    /// `local` stores are function calls. Without any (`[]`), all requests use the network.
    pub fn new(
        placement: PlacementClient,
        local: impl IntoIterator<Item = Arc<dyn StoreService>>,
    ) -> Self {
        let local = local.into_iter().map(|store| (store.store_id(), store)).collect();
        let remote = stores::Stores::new(placement.clone());
        let cache = cache::RegionCache::default();
        KvClient {
            shared: Arc::new(Shared {
                placement,
                cache,
                tags: fence::Tags::default(),
                local,
                remote,
            }),
            deadline: DEFAULT_DEADLINE,
            scan_page: ops::MAX_SCAN_PAGE,
        }
    }

    /// The same client with another deadline for each operation: see [`DEFAULT_DEADLINE`]. Clones
    /// that were made before keep theirs.
    pub fn with_deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// The same client that asks for at most so many pairs at a time in a scan. The nearest of 1 to
    /// 1,024 is taken, and 1,024 is the default. Smaller pages suit large values, because an answer
    /// has at most 48 MiB.
    pub fn with_scan_page(mut self, pairs: u32) -> Self {
        self.scan_page = pairs.clamp(1, ops::MAX_SCAN_PAGE);
        self
    }

    /// The client of the placement driver that this client finds regions and stores with.
    pub fn placement(&self) -> &PlacementClient {
        &self.shared.placement
    }
}

/// The attempts of one operation: when to stop, and how long to wait between two.
struct Attempts {
    call: &'static str,
    key: Bytes,
    started: Instant,
    deadline: Duration,
    backoff: Backoff,
    prompt: u32,
    /// Why the last attempt failed that was not cut short by the deadline.
    said: Option<String>,
}

impl Attempts {
    fn new(call: &'static str, key: Bytes, deadline: Duration) -> Self {
        let backoff = Backoff::new(FIRST_RETRY, LONGEST_RETRY);
        Attempts { call, key, started: Instant::now(), deadline, backoff, prompt: 0, said: None }
    }

    /// What is left for the next attempt.
    fn timeout(&self) -> Duration {
        ATTEMPT_TIMEOUT.min(self.deadline.saturating_sub(self.started.elapsed()))
    }

    /// Waits for the lookup of a region until the operation's deadline. The failure of a lookup that
    /// the deadline cuts short ends the operation in [`next`](Self::next).
    async fn look_up<T>(
        &self,
        lookup: impl Future<Output = Result<T, Failure>>,
    ) -> Result<T, Failure> {
        let left = self.deadline.saturating_sub(self.started.elapsed());
        tokio::time::timeout(left, lookup).await.unwrap_or_else(|_| {
            let reason = format!("placement did not answer within {left:?}");
            Err(Failure::Again(Retry { wait: Wait::Backoff, reason }))
        })
    }

    /// Waits before the next attempt, or returns why there will be none.
    async fn next(&mut self, retry: Retry) -> Result<(), ClientError> {
        let wait = match retry.wait {
            Wait::None if self.prompt < PROMPT_RETRIES => {
                self.prompt += 1;
                Duration::ZERO
            }
            Wait::None | Wait::Backoff => self.backoff.step(),
            Wait::AtLeast(asked) => self.backoff.step().max(asked.min(LONGEST_RETRY)),
        };
        // The failure of an attempt that the deadline cut short is no useful reason.
        let cut_off = self.started.elapsed() >= self.deadline;
        let reason = self.said.take().filter(|_| cut_off).unwrap_or(retry.reason);
        if self.started.elapsed() + wait >= self.deadline {
            return Err(ClientError::Deadline {
                call: self.call,
                key: display_key(&self.key),
                waited: waited_since(self.started),
                reason,
            });
        }
        tracing::debug!(call = self.call, reason, ?wait, "trying again");
        self.said = Some(reason);
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
        }
        Ok(())
    }
}

/// Why an attempt is to be repeated, and when.
#[derive(Clone, Debug)]
struct Retry {
    wait: Wait,
    reason: String,
}

#[derive(Clone, Copy, Debug)]
enum Wait {
    /// The store named the place to go to.
    None,
    Backoff,
    AtLeast(Duration),
}

/// How an attempt failed.
#[derive(Debug)]
enum Failure {
    Again(Retry),
    Final(ClientError),
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        match error {
            // A new leader of placement knows a region only after the region's leader has reported.
            ClientError::PlacementRefused { kind: ErrorType::RegionNotFound, message, .. } => {
                Failure::Again(Retry { wait: Wait::Backoff, reason: message })
            }
            error => Failure::Final(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_attempt_that_the_deadline_cut_off_does_not_hide_why_the_one_before_it_failed() {
        let deadline = Duration::from_millis(60);
        let mut attempts = Attempts::new("get", Bytes::from("k"), deadline);
        let retry = |reason: &str| Retry { wait: Wait::None, reason: reason.to_owned() };
        attempts.next(retry("store 1 is busy")).await.expect("there is time left");
        while !attempts.timeout().is_zero() {
            tokio::time::sleep(attempts.timeout()).await;
        }
        let error =
            attempts.next(retry("no answer within 1ms")).await.expect_err("no time is left");
        assert!(error.to_string().ends_with(": store 1 is busy"), "{error}");

        // Where there was only one attempt, its reason is better than none.
        let mut attempts = Attempts::new("get", Bytes::from("k"), Duration::ZERO);
        let error = attempts.next(retry("no answer")).await.expect_err("no time is left");
        assert!(error.to_string().ends_with(": no answer"), "{error}");
    }
}
