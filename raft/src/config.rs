//! Settings.

use std::time::Duration;

use crate::configuration::ConfigError;
use crate::rules::broken;

/// How many election timeouts the least preferred candidate waits before the
/// usual random one.
pub const MAX_PRIORITY_WAIT: u32 = 4;

/// How many election timeouts a witness waits at least, so that a peer with data goes first.
pub const WITNESS_WAIT: u32 = 1;

/// Settings that the groups of a node share. All peers of a group should agree on the times and on
/// `check_quorum`. Leases rely on that agreement, also while a new value is being rolled out.
#[derive(Clone, PartialEq, Debug)]
pub struct Config {
    /// A follower campaigns after one to two of these without a leader.
    pub election_timeout: Duration,
    /// How often a leader sends heartbeats.
    pub heartbeat_interval: Duration,
    /// How far the clocks of two peers may differ in speed. While one clock measures a second, no
    /// other measures less than one minus this many seconds. A lease is shorter by this share.
    pub max_clock_drift: f64,
    /// Bytes of one proposal, header included: see [`crate::Payload::bytes`].
    pub max_entry_bytes: usize,
    /// Bytes of entries in one append, at least one entry.
    pub max_append_bytes: usize,
    /// Appends to one follower that have not been answered.
    pub max_inflight_messages: usize,
    /// Bytes of entries in these appends.
    pub max_inflight_bytes: usize,
    /// Bytes of proposals that are not committed; at least one proposal fits.
    pub max_uncommitted_bytes: usize,
    /// Bytes of entries that stay in memory after they were persisted and applied,
    /// for followers that lag a little.
    pub max_entry_cache_bytes: usize,
    /// A peer asks whether it could win an election before it raises the term.
    pub pre_vote: bool,
    /// A leader that hears from no quorum steps down, and followers of a live leader elect no
    /// other. Leases need this setting.
    pub check_quorum: bool,
    /// All of a peer's randomness follows from this seed and the peer's identity.
    pub seed: u64,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            election_timeout: Duration::from_millis(1000),
            heartbeat_interval: Duration::from_millis(100),
            max_clock_drift: 0.1,
            max_entry_bytes: 64 << 20,
            max_append_bytes: 1 << 20,
            max_inflight_messages: 256,
            max_inflight_bytes: 16 << 20,
            max_uncommitted_bytes: 64 << 20,
            max_entry_cache_bytes: 1 << 20,
            pre_vote: true,
            check_quorum: true,
            seed: 0,
        }
    }
}

impl Config {
    pub(crate) fn validate(&self) -> Result<(), ConfigError> {
        let refuse = |name, reason| Err(ConfigError::Setting { name, reason });
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
        // With a limit of zero, nothing could ever be sent.
        let sizes = [
            ("max_entry_bytes", self.max_entry_bytes),
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
        if broken!(LeaseAllowsForDrift) {
            return self.election_timeout;
        }
        self.election_timeout.mul_f64(1.0 - self.max_clock_drift)
    }
}
