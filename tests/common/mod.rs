//! Helpers of the whole-system tests: nodes as processes of their own, an operator that inspects
//! and changes a cluster, and a load that remembers what was acknowledged.

// Each test file is a program of its own, and uses a part of this.
#![allow(dead_code)]

pub mod http;
pub mod load;
pub mod operator;
pub mod process;

use std::time::{Duration, Instant};

/// The time between two checks of something that is about to become true.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// Held by a test with a cluster that needs the machine for itself. Published clients give up after
/// a second and a half without a leader. On a small machine, the clusters of two tests at once can
/// delay each other that much.
pub async fn alone() -> tokio::sync::MutexGuard<'static, ()> {
    static ALONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
    ALONE.lock().await
}

/// Calls `look` until it succeeds. Fails the test with its last error when that takes longer than
/// `within`.
pub async fn eventually<T>(
    what: &str,
    within: Duration,
    mut look: impl AsyncFnMut() -> Result<T, String>,
) -> T {
    let started = Instant::now();
    loop {
        match look().await {
            Ok(found) => return found,
            Err(reason) => {
                assert!(started.elapsed() < within, "{what}: not within {within:?}: {reason}");
            }
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}
