//! Which stores the cluster has, in a form that a worker can read in the middle of its turn.
//!
//! The answer comes from a list that placement returned. A store that is not in the list is looked
//! for in the background, and refused until it is found. It will send its messages again. However
//! many unknown stores send messages, placement is asked for its list at most once in
//! [`ASK_EVERY`], and nothing is remembered of these stores.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use esker_client::{ClientError, PlacementClient};
use esker_model::StoreId;
use esker_rpc::proto::metapb::Store;
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::time::Instant;

/// The shortest time between two questions to placement.
const ASK_EVERY: Duration = Duration::from_millis(500);

/// Where the list comes from.
pub trait StoreList: Send + Sync + 'static {
    /// All stores except those that have left for good.
    fn stores(&self) -> BoxFuture<'static, Result<Vec<Store>, ClientError>>;
}

impl StoreList for PlacementClient {
    fn stores(&self) -> BoxFuture<'static, Result<Vec<Store>, ClientError>> {
        let client = self.clone();
        Box::pin(async move { client.get_stores(true).await })
    }
}

/// The stores of the cluster. Cheap to clone.
#[derive(Clone)]
pub struct KnownStores {
    list: Arc<dyn StoreList>,
    runtime: Handle,
    inner: Arc<Mutex<Inner>>,
}

#[derive(Default)]
struct Inner {
    known: HashSet<u64>,
    /// When placement was last asked. While `asking`, it has not answered yet.
    asked: Option<Instant>,
    asking: bool,
}

impl KnownStores {
    /// Asks for the list at once. Must be called within a runtime.
    pub fn of(list: impl StoreList) -> Self {
        let stores =
            KnownStores { list: Arc::new(list), runtime: Handle::current(), inner: Arc::default() };
        stores.look();
        stores
    }

    /// Whether the store was in the list that placement returned last. Never blocks.
    pub fn knows(&self, store: StoreId) -> bool {
        let known = self.inner.lock().known.contains(&store.0);
        if !known {
            self.look();
        }
        known
    }

    fn look(&self) {
        {
            let mut inner = self.inner.lock();
            let recently = inner.asked.is_some_and(|asked| asked.elapsed() < ASK_EVERY);
            if inner.asking || recently {
                return;
            }
            (inner.asked, inner.asking) = (Some(Instant::now()), true);
        }
        let (answer, inner) = (self.list.stores(), self.inner.clone());
        self.runtime.spawn(async move {
            let answer = answer.await;
            let mut inner = inner.lock();
            inner.asking = false;
            match answer {
                Ok(stores) => inner.known = stores.into_iter().map(|store| store.id).collect(),
                // The stores of the last list stay known.
                Err(error) => {
                    tracing::debug!(%error, "placement did not say which stores there are")
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::sync::Notify;

    use super::*;

    #[derive(Clone, Default)]
    struct List {
        asked: Arc<AtomicUsize>,
        stores: Arc<Mutex<Vec<u64>>>,
        answered: Arc<Notify>,
    }

    impl StoreList for List {
        fn stores(&self) -> BoxFuture<'static, Result<Vec<Store>, ClientError>> {
            self.asked.fetch_add(1, Ordering::SeqCst);
            let ids = self.stores.lock().clone();
            let answered = self.answered.clone();
            Box::pin(async move {
                answered.notify_one();
                Ok(ids.into_iter().map(|id| Store { id, ..Store::default() }).collect())
            })
        }
    }

    #[tokio::test]
    async fn a_burst_of_strangers_asks_placement_once_and_a_new_store_is_found() {
        let list = List::default();
        list.stores.lock().push(1);
        let known = KnownStores::of(list.clone());
        list.answered.notified().await;
        while !known.knows(StoreId(1)) {
            tokio::task::yield_now().await;
        }
        for stranger in 1_000..100_000 {
            assert!(!known.knows(StoreId(stranger)));
        }
        let asked = list.asked.load(Ordering::SeqCst);
        assert!(asked <= 2, "a burst of strangers asked placement {asked} times");
        assert_eq!(known.inner.lock().known.len(), 1, "strangers were remembered");
        list.stores.lock().push(2);
        // The store's messages come again and again.
        while !known.knows(StoreId(2)) {
            tokio::task::yield_now().await;
        }
        assert!(known.knows(StoreId(1)));
    }
}
