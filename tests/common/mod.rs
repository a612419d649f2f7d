//! What the whole-system tests share: nodes as processes of their own, an operator who
//! looks at a cluster and changes it, and a load that remembers what was acknowledged.

// Each test file is a program of its own, and uses a part of this.
#![allow(dead_code)]

pub mod http;
pub mod load;
pub mod operator;
pub mod process;

use std::time::{Duration, Instant};

/// Between two looks at something that is about to become true.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// Held by a test whose cluster wants the machine for itself: clients in the field give up
/// after a second and a half without a leader, which the clusters of two tests at once can
/// make of each other on a small machine.
pub async fn alone() -> tokio::sync::MutexGuard<'static, ()> {
    static ALONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
    ALONE.lock().await
}

/// Looks until `look` finds what it is looking for, and fails the test with the last
/// reason why not when that takes longer than `within`.
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
