//! What a request means on a region.
//!
//! A request flows in as a wire type, through the one entrance, [`StoreService`]. It becomes reads
//! of one view of a region, or one atomic write to it. The reply flows out. Nothing here knows a
//! socket, a schedule or another store.
//!
//! | module | what it owns |
//! |---|---|
//! | [`raw`] | requests on raw keys: one function for each, with its meaning |
//! | [`split`] | the request to cut a region |
//! | [`keys`] | under which key a client's key is stored |
//! | [`target`] | which region a request is for, and what its client knows of that region |
//! | [`error`] | why a request was not carried out, and how its client learns of that |
//!
//! A new request is a function in one of the first two, and a line in `Storage::answer`.

pub mod error;
pub mod keys;
pub mod raw;
pub mod split;
pub mod target;

use std::sync::Arc;

use esker_model::{RegionId, StoreId};
use esker_raftstore::{RequestError, StoreHandle};
use esker_rpc::service::{Answer, Caller, Reply, Request, StoreService, unimplemented};
use tokio::sync::Semaphore;

pub use error::StorageError;
pub use split::SplitIds;

/// Checksums that a store computes at the same time. Others wait.
pub const MAX_CHECKSUMS: usize = 4;

/// Answers the requests to a store from its regions. Cheap to clone.
#[derive(Clone)]
pub struct Storage {
    store: StoreHandle,
    cluster_id: u64,
    ids: Arc<dyn SplitIds>,
    checksums: Arc<Semaphore>,
    has_other_threads: bool,
}

impl Storage {
    /// Answers the requests to `store`, which belongs to this cluster. New regions get their ids
    /// from `ids`.
    pub fn new(store: StoreHandle, cluster_id: u64, ids: Arc<dyn SplitIds>) -> Self {
        let checksums = Arc::new(Semaphore::new(MAX_CHECKSUMS));
        Storage { store, cluster_id, ids, checksums, has_other_threads: true }
    }

    /// The same on no other thread than that of its caller, whatever a request reads.
    pub fn on_one_thread(self) -> Self {
        Storage { has_other_threads: false, ..self }
    }

    pub fn store(&self) -> &StoreHandle {
        &self.store
    }

    pub fn cluster_id(&self) -> u64 {
        self.cluster_id
    }

    /// Runs what reads too much for a thread that serves others, too: a whole region, or ranges of
    /// it.
    pub async fn blocking<T: Send + 'static>(
        &self,
        region: RegionId,
        read: impl FnOnce() -> Result<T, StorageError> + Send + 'static,
    ) -> Result<T, StorageError> {
        if !self.has_other_threads {
            return read();
        }
        let stopped = RequestError::Stopped { store: self.store.store_id(), region };
        tokio::task::spawn_blocking(read).await.unwrap_or_else(|_| Err(stopped.into()))
    }

    fn now_s(&self) -> u64 {
        self.store.clock().wall_s()
    }

    /// Answers a request that is served here; `None` for any other.
    fn answer(self, request: Request, caller: Caller) -> Option<Answer> {
        macro_rules! reply {
            ($variant:ident, $answer:expr) => {{
                Box::pin(async move {
                    let answer = $answer.await;
                    error::told(&self, answer).map(Reply::$variant)
                })
            }};
        }
        Some(match request {
            Request::RawGet(request) => reply!(RawGet, raw::get(&self, request)),
            Request::RawBatchGet(request) => reply!(RawBatchGet, raw::batch_get(&self, request)),
            Request::RawPut(request) => reply!(RawPut, raw::put(&self, request)),
            Request::RawBatchPut(request) => reply!(RawBatchPut, raw::batch_put(&self, request)),
            Request::RawDelete(request) => reply!(RawDelete, raw::delete(&self, request)),
            Request::RawBatchDelete(request) => {
                reply!(RawBatchDelete, raw::batch_delete(&self, request))
            }
            Request::RawDeleteRange(request) => {
                reply!(RawDeleteRange, raw::delete_range(&self, request))
            }
            Request::RawGetKeyTtl(request) => reply!(RawGetKeyTtl, raw::key_ttl(&self, request)),
            Request::RawCompareAndSwap(request) => {
                reply!(RawCompareAndSwap, raw::compare_and_swap(&self, request))
            }
            Request::RawScan(request) => Box::pin(async move {
                let answer = raw::scan::scan(&self, request, caller.scans).await;
                let answer = error::told(&self, answer);
                error::for_habit(answer, caller.scans).map(Reply::RawScan)
            }),
            Request::RawBatchScan(request) => {
                reply!(RawBatchScan, raw::scan::batch_scan(&self, request))
            }
            Request::RawChecksum(request) => {
                reply!(RawChecksum, raw::scan::checksum(&self, request))
            }
            Request::SplitRegion(request) => reply!(SplitRegion, split::split(&self, request)),
            _ => return None,
        })
    }
}

impl StoreService for Storage {
    fn store_id(&self) -> StoreId {
        self.store.store_id()
    }

    fn remembers_writes(&self) -> bool {
        true
    }

    fn handle(&self, request: Request, caller: Caller) -> Answer {
        let name = request.name();
        self.clone().answer(request, caller).unwrap_or_else(|| unimplemented(name))
    }
}
