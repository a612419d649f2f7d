//! The crate over real sockets on loopback, with small fakes of stores and placement members.

mod kv;
mod placement;
mod support;
mod world;
