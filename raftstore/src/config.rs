//! Intervals and limits of one store. Every queue and batch in this crate is bounded by one of these.

use std::time::Duration;

/// The Raft log of a region starts behind this index, in this term, on every
/// first replica: what bootstrap and split create is "a snapshot at 5".
pub const INITIAL_INDEX: u64 = 5;
/// See [`INITIAL_INDEX`].
pub const INITIAL_TERM: u64 = 5;

/// The longest key that a client may use, in bytes.
pub const MAX_KEY_BYTES: usize = 4 << 10;
/// The longest key that is stored: in its memcomparable form a key is longer by a byte for
/// each eight and up to nine more, and a version takes eight.
pub const MAX_STORED_KEY_BYTES: usize = MAX_KEY_BYTES / 8 * 9 + 9 + 8;
/// The largest single write command accepted, in bytes.
pub const MAX_COMMAND_BYTES: usize = 8 << 20;
/// Commands of one region that wait together become one entry up to this size.
pub const MAX_BATCHED_ENTRY_BYTES: usize = 1 << 20;

/// Commands and messages waiting for one worker; past it callers are told that the store is busy.
pub const WORKER_INBOX: usize = 8 << 10;
/// Inputs a worker takes in one turn before it lets its outputs go.
pub const WORKER_TURN: usize = 2 << 10;
/// Log writes that may wait for the disk before the workers wait for them.
pub const LOG_QUEUE: usize = 4 << 10;
/// Tasks that may wait for one apply worker before the worker that feeds it waits.
pub const APPLY_QUEUE: usize = 4 << 10;
/// Tasks an apply worker merges into one write of the key-value engine.
pub const APPLY_TURN: usize = 512;
/// Bytes after which an apply worker writes its batch even in the middle of a turn.
pub const APPLY_BATCH_BYTES: usize = 4 << 20;
/// Requests for confirmed reads that may wait in one region.
pub const MAX_WAITING_READS: usize = 4 << 10;
/// Proposals that may wait for their outcome in one region.
pub const MAX_WAITING_PROPOSALS: usize = 16 << 10;
/// Regions for which messages are kept that came before the split which creates them, and how many of each.
pub const MAX_EARLY_REGIONS: usize = 256;
/// See [`MAX_EARLY_REGIONS`].
pub const MAX_EARLY_MESSAGES: usize = 8;
/// Keys of one split command.
pub const MAX_SPLIT_KEYS: usize = 256;

/// What an operator may tune.
#[derive(Clone, Debug)]
pub struct StoreConfig {
    /// Threads that run the regions' Raft groups.
    pub workers: usize,
    /// Threads that apply committed entries.
    pub apply_workers: usize,
    /// A follower that hears nothing for this long, to twice this long, campaigns.
    pub election_timeout: Duration,
    pub heartbeat_interval: Duration,
    /// Bound on how much faster one store's clock may run than another's, as a fraction.
    pub max_clock_drift: f64,
    /// How often a leader reports its region to placement when nothing changes.
    pub region_report_interval: Duration,
    /// How often a region looks at whether its log may be shortened.
    pub log_gc_interval: Duration,
    /// Entries kept behind the slowest useful follower before the log is shortened.
    pub log_gc_threshold: u64,
    /// A follower this many entries behind is no longer waited for; it will need a snapshot.
    pub log_gc_max_lag: u64,
    /// Seed of election timeouts; the simulator sets it, production draws one.
    pub seed: u64,
}

impl StoreConfig {
    /// The settings of every region's Raft group.
    pub(crate) fn raft(&self) -> esker_raft::Config {
        esker_raft::Config {
            election_timeout: self.election_timeout,
            heartbeat_interval: self.heartbeat_interval,
            max_clock_drift: self.max_clock_drift,
            seed: self.seed,
            ..esker_raft::Config::default()
        }
    }
}

impl Default for StoreConfig {
    fn default() -> Self {
        StoreConfig {
            workers: 2,
            apply_workers: 2,
            election_timeout: Duration::from_millis(1000),
            heartbeat_interval: Duration::from_millis(200),
            max_clock_drift: 0.05,
            region_report_interval: Duration::from_secs(10),
            log_gc_interval: Duration::from_secs(3),
            log_gc_threshold: 4096,
            log_gc_max_lag: 100_000,
            seed: rand::random(),
        }
    }
}
