//! Intervals and limits of one store. Every queue and batch in this crate is bounded by one of these.

use std::time::Duration;

/// The Raft log of a region starts behind this index, in this term, on every
/// first replica: what bootstrap and split create is "a snapshot at 5".
pub const INITIAL_INDEX: u64 = 5;
/// See [`INITIAL_INDEX`].
pub const INITIAL_TERM: u64 = 5;

/// Commands of one region that wait together become one entry up to this size.
pub const MAX_BATCHED_ENTRY_BYTES: usize = 1 << 20;

/// Commands and messages waiting for one worker; past it callers are told that the store is busy.
pub const WORKER_INBOX: usize = 8 << 10;
/// Requests that a worker takes in one turn before it lets its outputs go; as many messages of
/// other stores; and as many notices of the store's own parts.
pub const WORKER_TURN: usize = 2 << 10;
/// How long a request is held and tried again before its client is told that the store is busy, or
/// that nobody leads the region. There are clients that take the first as final, and most queues
/// are emptied sooner; and clients that ask ten times within a second and a half whoever leads, so
/// that an election on slow disks would be an error to them.
pub const HOLD_PATIENCE: Duration = Duration::from_secs(1);
/// Between two such attempts, at first and at most.
pub const HOLD_RETRY: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(50));
/// Requests that are held so at the same time because the store is busy; past it callers are told
/// at once.
pub const MAX_HELD_REQUESTS: usize = 4 << 10;
/// The same for regions without a leader. Of their own, and fewer than one stream may have: a store
/// that is cut off, or a region that has lost its majority, must not use up what the others need.
pub const MAX_HELD_LEADERLESS: usize = 1 << 10;
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
/// Tagged writes that a region remembers, so that each takes effect once (see
/// `apply::remembered`). A client repeats a write after two seconds without an answer: up to
/// thirty thousand writes a second in one region the repetition is still recognised.
///
/// Another number, here or in [`REMEMBERED_SECONDS`], is another format of entries: replicas that
/// forget at different places decide differently what is a repetition.
pub const MAX_REMEMBERED_WRITES: usize = 64 << 10;
/// They are forgotten after this long, so that what a store remembers follows from the writes of
/// so many seconds and not from how many regions it has. Longer than a client's deadline.
pub const REMEMBERED_SECONDS: u64 = 30;
/// Tagged writes that one apply worker holds in memory, for all its regions.
/// The regions whose last write is longest ago are read again when they need it.
pub const MAX_REMEMBERED_IN_MEMORY: usize = 1 << 20;
/// Peers of one worker that wait for their region's data: more are created when those have it.
pub const MAX_EMPTY_PEERS: usize = 4 << 10;

/// Messages of other stores up to this size do not count in the budget for messages. They are
/// bounded by [`WORKER_INBOX`]. Those that keep leases and elect leaders are smaller.
pub const SMALL_MESSAGE_BYTES: usize = 1 << 10;

/// Writes of the log that take at least so long on average keep a slow disk from being well again.
pub const DISK_WELL_BELOW: Duration = Duration::from_millis(50);
/// How long they may not have done so until a store that gave way seeks to lead again, the first time
/// and at most.
pub const DISK_WELL_AFTER: (Duration, Duration) =
    (Duration::from_secs(10), Duration::from_secs(600));
/// Over how long a disk is judged.
pub const DISK_MEMORY: Duration = Duration::from_millis(2_500);
/// How often a store that gave way writes its log for no other reason than to see how long it takes.
pub const DISK_PROBE: Duration = Duration::from_secs(1);
/// How long a store that gave way waits before it tries again to hand over regions that nobody took,
/// at first and at most.
pub const GIVE_WAY_AGAIN: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(32));
/// Regions that one worker hands over at once. The next follow a little later.
pub const MAX_HANDED_OVER: usize = 1_024;
/// See [`MAX_HANDED_OVER`].
pub const HAND_OVER_NEXT: Duration = Duration::from_millis(50);

/// How often the flusher looks whether there is need for a flush.
pub const FLUSH_LOOK: Duration = Duration::from_secs(1);
/// Looks whose writes may wait for a flush: past it, the next writes count with the last of them.
pub const MAX_POINTS: usize = 4 << 10;

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
    /// Bytes of writes that are not answered yet. Past it clients are told that the store is busy.
    pub write_budget: usize,
    /// Bytes of other stores' messages that no worker has taken yet. Past it those that are not
    /// small are dropped: see [`SMALL_MESSAGE_BYTES`].
    pub message_budget: usize,
    /// Bytes that may wait for the disk, or be on their way to it. Past it entries of other stores
    /// are dropped, which send them again. Past three quarters of it no region proposes writes.
    pub log_backlog: usize,
    /// Bytes of one region in that, past which this region proposes no writes.
    pub region_log_backlog: usize,
    /// Bytes of committed entries that may wait for one apply worker. Past it the regions keep them
    /// in their logs.
    pub apply_backlog: usize,
    /// A store gives way (see `disk`) when its writes of the log take so long on average, and come
    /// later than those of the other stores.
    pub slow_disk: Duration,
    /// And when one has not been answered for so long that the others have.
    pub stalled_disk: Duration,
    /// Data that was applied so long ago is flushed, so that the log need not bring it back.
    pub flush_after: Duration,
    /// The same for a snapshot that was installed, whose files stay until then.
    pub flush_files_after: Duration,
    /// When so many bytes were written to the log since the oldest data that is not flushed, that
    /// is flushed, too.
    pub flush_log_bytes: u64,
    /// See [`MAX_REMEMBERED_WRITES`]. Not to be tuned: tests set it, for all stores alike.
    pub remembered_writes: usize,
    /// See [`MAX_REMEMBERED_IN_MEMORY`].
    pub remembered_in_memory: usize,
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
            write_budget: 256 << 20,
            message_budget: 64 << 20,
            log_backlog: 64 << 20,
            region_log_backlog: 16 << 20,
            apply_backlog: 64 << 20,
            slow_disk: Duration::from_millis(100),
            stalled_disk: Duration::from_secs(1),
            flush_after: Duration::from_secs(300),
            flush_files_after: Duration::from_secs(10),
            flush_log_bytes: 256 << 20,
            remembered_writes: MAX_REMEMBERED_WRITES,
            remembered_in_memory: MAX_REMEMBERED_IN_MEMORY,
            seed: rand::random(),
        }
    }
}
