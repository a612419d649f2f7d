//! The pages of a node: its metrics and its state, for programs and for curl.

use std::path::Path;
use std::sync::{Arc, OnceLock};

use axum::Json;
use axum::Router;
use axum::routing::get;
#[cfg(feature = "cli")]
use metrics_exporter_prometheus::PrometheusBuilder;
use metrics_exporter_prometheus::PrometheusHandle;
use serde::Serialize;

use super::late::LateStore;

/// Space of a file system, in bytes.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct DiskSpace {
    pub total: u64,
    pub available: u64,
}

/// How full the file system of a directory is; zeros if the system does not report it.
pub fn disk_space(directory: &Path) -> DiskSpace {
    rustix::fs::statvfs(directory).map_or_else(
        |_| DiskSpace::default(),
        |space| DiskSpace {
            total: space.f_blocks.saturating_mul(space.f_frsize),
            available: space.f_bavail.saturating_mul(space.f_frsize),
        },
    )
}

/// The metrics of this process, if it collects them.
pub fn collected_metrics() -> Option<PrometheusHandle> {
    METRICS.get().cloned().flatten()
}

static METRICS: OnceLock<Option<PrometheusHandle>> = OnceLock::new();

/// Begins to collect this process's metrics, once. `None` if the embedding program collects them
/// itself.
#[cfg(feature = "cli")]
pub fn collect_metrics() -> Option<PrometheusHandle> {
    METRICS.get_or_init(|| PrometheusBuilder::new().install_recorder().ok()).clone()
}

#[derive(Serialize)]
struct Status {
    version: &'static str,
    address: String,
    store_id: Option<u64>,
    regions: usize,
}

/// `/metrics` in Prometheus' format, `/status` as JSON.
pub fn router(address: String, store: Arc<LateStore>, metrics: Option<PrometheusHandle>) -> Router {
    let status = move || {
        let service = store.get();
        let status = Status {
            version: env!("CARGO_PKG_VERSION"),
            address: address.clone(),
            store_id: service.as_ref().map(|service| service.store().store_id().0),
            regions: service.map_or(0, |service| service.store().delegates().count()),
        };
        std::future::ready(Json(status))
    };
    let render = move || {
        let text = metrics.as_ref().map_or_else(
            || "# metrics are collected by `esker start` and `esker playground`\n".to_owned(),
            PrometheusHandle::render,
        );
        std::future::ready(text)
    };
    Router::new().route("/status", get(status)).route("/metrics", get(render))
}
