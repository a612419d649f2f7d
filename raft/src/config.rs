//! The settings of one peer.

use std::time::Duration;

use crate::configuration::ConfigError;
use crate::types::PeerId;

/// How many election timeouts the least preferred candidate waits before the
/// usual random one.
pub const MAX_PRIORITY_WAIT: u32 = 4;

/// The settings of one peer. All peers of a group should agree on the times and
/// on `check_quorum`: leases count on it.
#[derive(Clone, Debug)]
pub struct Config {
    /// This peer.
    pub id: PeerId,
    /// A follower campaigns after one to two of these without a leader.
    pub election_timeout: Duration,
    /// How often a leader that has nothing else to say says so.
    pub heartbeat_interval: Duration,
    /// By which fraction two clocks may differ in speed; a lease is shorter by it.
    pub max_clock_drift: f64,
    /// Bytes of entries in one append, at least one entry.
    pub max_append_bytes: usize,
    /// Appends to one follower that have not been answered.
    pub max_inflight_messages: usize,
    /// Bytes of entries in them.
    pub max_inflight_bytes: usize,
    /// Bytes of proposals that are not committed; at least one proposal fits.
    pub max_uncommitted_bytes: usize,
    /// Bytes of entries that stay in memory after they were persisted and applied,
    /// for followers that lag a little.
    pub max_entry_cache_bytes: usize,
    /// Zero or more: campaigns as usual. Below zero: waits that many election
    /// timeouts longer, up to [`MAX_PRIORITY_WAIT`], so that others go first.
    pub priority: i32,
    /// Ask whether an election could be won before raising the term.
    pub pre_vote: bool,
    /// A leader that hears from no quorum steps down, and followers of a live
    /// leader elect no other. Leases need it.
    pub check_quorum: bool,
    /// From which all of this peer's randomness follows.
    pub seed: u64,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            id: PeerId(0),
            election_timeout: Duration::from_millis(1000),
            heartbeat_interval: Duration::from_millis(100),
            max_clock_drift: 0.1,
            max_append_bytes: 1 << 20,
            max_inflight_messages: 256,
            max_inflight_bytes: 16 << 20,
            max_uncommitted_bytes: 64 << 20,
            max_entry_cache_bytes: 1 << 20,
            priority: 0,
            pre_vote: true,
            check_quorum: true,
            seed: 0,
        }
    }
}

impl Config {
    pub(crate) fn validate(&self) -> Result<(), ConfigError> {
        let refuse = |name, reason| Err(ConfigError::Setting { name, reason });
        if self.id.0 == 0 {
            return Err(ConfigError::InvalidPeer);
        }
        if self.heartbeat_interval.is_zero() {
            return refuse("heartbeat_interval", "it must not be zero");
        }
        if self.election_timeout <= self.heartbeat_interval {
            return refuse("election_timeout", "it must be longer than heartbeat_interval");
        }
        if self.election_timeout > Duration::from_secs(24 * 60 * 60) {
            return refuse("election_timeout", "it must be at most a day");
        }
        if !(0.0..1.0).contains(&self.max_clock_drift) {
            return refuse("max_clock_drift", "it must be at least 0 and below 1");
        }
        // With none of these could anything ever be sent.
        let sizes = [
            ("max_append_bytes", self.max_append_bytes),
            ("max_inflight_messages", self.max_inflight_messages),
            ("max_inflight_bytes", self.max_inflight_bytes),
        ];
        for (name, size) in sizes {
            if size == 0 {
                return refuse(name, "it must not be zero");
            }
        }
        Ok(())
    }

    /// How long a lease lasts from the moment that its round was sent.
    pub(crate) fn lease(&self) -> Duration {
        self.election_timeout.mul_f64(1.0 - self.max_clock_drift)
    }
}
