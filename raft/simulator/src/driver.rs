//! A peer with everything that a driver has around it: a disk with writes under
//! way, a state machine, and the means to crash and come back. Stories and
//! simulated worlds both use it. `node` is the only file here that calls the
//! core.

mod disk;
mod node;

pub use disk::{Borrowed, Disk, EntryLog, Machine};
pub use node::{Event, GROUP, Node, Settings};
