//! The crate over real sockets on loopback, with small fakes behind its traits.

mod batch_commands;
mod connections;
mod serve;
mod support;
mod transport;
