//! A peer with everything around it that a driver would be: a disk with writes
//! under way, a state machine, and the means to crash and come back. The traces
//! and the simulation both drive it, each with a network of its own.

#![allow(dead_code, unused_imports, reason = "each test program uses its own part")]

mod disk;
mod node;

pub use disk::{Borrowed, Disk, Machine};
pub use node::{Event, GROUP, Node, Settings};
