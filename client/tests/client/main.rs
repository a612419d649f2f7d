//! The crate over real sockets on loopback, with small fakes of stores and placement members.

mod admin;
mod kv;
mod placement;
mod support;
mod world;
