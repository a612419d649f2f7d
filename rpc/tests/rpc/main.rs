//! The crate over real sockets on loopback, with small fakes behind its traits.

mod batch_commands;
mod connections;
mod kv;
mod placement;
mod serve;
mod support;
mod transport;
mod world;
