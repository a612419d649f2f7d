//! Tasks that a node cannot run without.

use std::any::Any;
use std::panic::AssertUnwindSafe;

use futures_util::FutureExt;
use tokio::task::JoinHandle;

/// Spawns a task that the node cannot run without. A node without its scheduler, its port or its
/// heartbeats would look alive. If the task panics, the process ends with a line on standard error,
/// and its supervisor starts it again.
pub(super) fn spawn(
    what: &'static str,
    task: impl Future<Output = ()> + Send + 'static,
) -> JoinHandle<()> {
    tokio::spawn(watch(task, move |panic| {
        eprintln!("esker: {what} stops: an invariant of its own is broken: {panic}");
        std::process::abort();
    }))
}

/// Runs a task. If the task panics, calls `ends` with the panic's message.
async fn watch(task: impl Future<Output = ()>, ends: impl FnOnce(String)) {
    if let Err(panic) = AssertUnwindSafe(task).catch_unwind().await {
        ends(text(&*panic));
    }
}

fn text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(ToString::to_string);
    text.or_else(|| panic.downcast_ref().cloned()).unwrap_or_else(|| "see above".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_panic_in_a_vital_task_does_not_go_unnoticed() {
        let mut said = None;
        watch(async { panic!("period of {} ms", 0) }, |panic| said = Some(panic)).await;
        assert_eq!(said.as_deref(), Some("period of 0 ms"));
        watch(async {}, |panic| panic!("a task that ends is no panic: {panic}")).await;
    }
}
