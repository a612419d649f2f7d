//! What an operator may set in a file; everything has a default.

use std::path::Path;
use std::time::Duration;

use esker_engine::EngineOptions;
use esker_raftstore::StoreConfig;
use serde::Deserialize;

use crate::Error;

/// A node's settings, read from TOML. Unknown names are refused.
///
/// ```toml
/// block-cache-mib = 1024
/// election-timeout-ms = 1000
/// ```
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct NodeConfig {
    /// Memory for blocks read from disk.
    pub block_cache_mib: Option<u64>,
    /// Memory for writes that are not flushed yet, for each column family.
    pub write_buffer_mib: Option<u64>,
    /// Threads that run regions.
    pub workers: Option<usize>,
    /// Threads that apply committed entries.
    pub apply_workers: Option<usize>,
    /// How long a follower waits for its leader, at least.
    pub election_timeout_ms: Option<u64>,
    pub heartbeat_interval_ms: Option<u64>,
    /// Entries kept in a region's log behind its slowest useful follower.
    pub log_gc_threshold: Option<u64>,
    /// Entries after which a follower is no longer waited for and will need a snapshot.
    pub log_gc_max_lag: Option<u64>,
    pub log_gc_interval_ms: Option<u64>,
    /// How often the placement driver looks for something to do.
    pub schedule_interval_ms: Option<u64>,
}

impl NodeConfig {
    /// # Errors
    /// When the file cannot be read, or says what no setting is.
    pub fn read(path: &Path) -> Result<Self, Error> {
        let failed = |reason: String| Error::Config { path: path.to_owned(), reason };
        let text = std::fs::read_to_string(path).map_err(|error| failed(error.to_string()))?;
        let one_line = |error: toml::de::Error| {
            let line = error.span().map_or(1, |span| text[..span.start].matches('\n').count() + 1);
            failed(format!("line {line}: {}", error.message()))
        };
        let config: NodeConfig = toml::from_str(&text).map_err(one_line)?;
        config.check().map_err(failed)?;
        Ok(config)
    }

    fn check(&self) -> Result<(), String> {
        let store = self.store();
        if store.heartbeat_interval.is_zero()
            || store.heartbeat_interval * 2 > store.election_timeout
        {
            return Err(format!(
                "election-timeout-ms ({}) must be at least twice heartbeat-interval-ms ({}), which must not be 0",
                store.election_timeout.as_millis(),
                store.heartbeat_interval.as_millis()
            ));
        }
        Ok(())
    }

    pub(crate) fn store(&self) -> StoreConfig {
        let default = StoreConfig::default();
        let milliseconds = |set: Option<u64>, default| set.map_or(default, Duration::from_millis);
        StoreConfig {
            workers: self.workers.unwrap_or(default.workers).clamp(1, 64),
            apply_workers: self.apply_workers.unwrap_or(default.apply_workers).clamp(1, 64),
            election_timeout: milliseconds(self.election_timeout_ms, default.election_timeout),
            heartbeat_interval: milliseconds(
                self.heartbeat_interval_ms,
                default.heartbeat_interval,
            ),
            log_gc_threshold: self.log_gc_threshold.unwrap_or(default.log_gc_threshold),
            log_gc_max_lag: self.log_gc_max_lag.unwrap_or(default.log_gc_max_lag),
            log_gc_interval: milliseconds(self.log_gc_interval_ms, default.log_gc_interval),
            ..default
        }
    }

    pub(crate) fn engine(&self) -> EngineOptions {
        let default = EngineOptions::default();
        let mib = |set: Option<u64>, default| {
            set.map_or(default, |mib| usize::try_from(mib << 20).unwrap_or(usize::MAX))
        };
        EngineOptions {
            block_cache_bytes: mib(self.block_cache_mib, default.block_cache_bytes),
            write_buffer_bytes: mib(self.write_buffer_mib, default.write_buffer_bytes),
            ..default
        }
    }

    pub(crate) fn schedule_interval(&self) -> Option<Duration> {
        self.schedule_interval_ms.map(Duration::from_millis)
    }
}
