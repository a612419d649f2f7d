//! A whole cluster in one thread.
//!
//! Any number of stores on RocksDB, the placement driver's members with their replicated state, and
//! clients with all their routing and repeating: the code that a node runs, put together in another
//! way. What is simulated is what is around it. Time stands still until nobody has anything to do,
//! and then jumps to the next moment at which somebody has ([`clock`], and tokio's paused time). The
//! network delays, loses, overtakes and cuts ([`network`], [`wire`]). Disks lose what was not
//! synced, stall, and fail ([`disk`]). The parts of a store get their turns in any order
//! ([`machine`]).
//!
//! A seed decides everything ([`plan`]), also what the operating system would: [`entropy`]. So it
//! replays word for word.
//!
//! What is checked:
//!
//! - the history of every key is linearizable ([`history`]); scans, times to live, timestamps and
//!   ids are as promised ([`actors`]);
//! - what a message between stores promises is in its sender's log ([`wire`]);
//! - when the faults are over, the cluster comes to rest within a bound, the regions tile the key
//!   space, placement knows them, replicas are equal byte for byte, and nothing is left over
//!   ([`settle`]).

pub mod actors;
pub mod clock;
pub mod disk;
pub mod entropy;
pub mod fleet;
pub mod history;
pub mod journal;
pub mod machine;
pub mod network;
pub mod operator;
pub mod plan;
pub mod run;
pub mod settle;
pub mod shrink;
pub mod wire;
pub mod world;
