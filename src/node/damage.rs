//! What a node does when the data of one of its stores is found damaged.
//!
//! The store has begun to hand its regions over by itself. The node reports that it does not serve,
//! and records the finding, so that the directory does not open again. It gives the regions a
//! moment, and stops the store. The node itself lives on. It reports the damage to placement and to
//! the operator, and a placement member beside the store goes on.

use std::path::PathBuf;
use std::time::Duration;

use esker_engine::DataDir;
use esker_raftstore::StoreHandle;

use crate::server::health::{Health, Part};

/// How long a damaged store may take to hand its regions over. The remaining regions then elect a
/// leader by themselves.
const HANDOVER: Duration = Duration::from_secs(2);

/// Waits for damage, and then stops the store by calling `stop`, which blocks.
pub(super) async fn watch(
    store: StoreHandle,
    directory: PathBuf,
    (health, part): (Health, Part),
    stop: impl FnOnce() + Send + 'static,
) {
    let what = store.damaged().await;
    health.fail(part);
    let name = store.store_id();
    eprintln!("esker: store {name} stops serving, its data is damaged: {what}");
    let condemned = tokio::task::spawn_blocking(move || DataDir::condemn(&directory, &what)).await;
    if let Ok(Err(error)) = condemned {
        tracing::error!(store = %name, "the damage could not be written down: {error}");
    }
    drop(store);
    tokio::time::sleep(HANDOVER).await;
    let _ = tokio::task::spawn_blocking(stop).await;
    tracing::error!(store = %name, "this store is stopped, its data is damaged");
}
