//! Whole stores driven by one thread: the parts that run in production, a virtual
//! clock, a scripted network, RocksDB in memory. No thread, no sleep: what happens
//! is what the test makes happen, and happens the same way each time.

mod chaos;
mod cluster;
mod door;
mod fence;
mod life;
mod memory;
mod moves;
mod pressure;
mod reads;
mod reports;
mod sent;
mod slow_disk;
