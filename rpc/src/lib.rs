//! The wire: types, services and sockets, never decisions.
//!
//! | module | what flows in | what flows out |
//! |---|---|---|
//! | [`proto`] | the schemas in `proto/` | messages, clients and server traits |
//! | [`convert`] | messages | values of `esker-model`, or typed errors; and back |
//! | [`procedures`] | the table of a store's procedures | a request and a reply type for all of them |
//! | [`service`] | | the trait by which a store answers requests |
//! | [`server`] | a listener and services | one port that speaks gRPC and HTTP; `Tikv` and `BatchCommands` over a store |
//! | [`transport`] | Raft messages and snapshots, from any thread | the same on another store, in order or not at all |
//! | [`channel`] | an address | a connection with the settings that all of them share |
//! | [`members`] | questions of one placement member to another | their answers |
//! | [`backoff`] | failures in a row | how long to wait after each |
//! | [`repeat`] | failures of one kind | those that deserve a line in the log |
//! | [`text`] | bytes | text that people can read, and that reads back as the same bytes |
//!
//! The crate promises that no client or store can make it hold more than the bounds that its
//! modules name, that every wait ends, and that work whose client has gone is dropped. It knows
//! nothing of consensus, storage or scheduling. Those layers use it, and it calls them through
//! traits.

pub mod backoff;
pub mod channel;
pub mod convert;
pub mod members;
pub mod procedures;
pub mod proto;
pub mod repeat;
pub mod server;
pub mod service;
pub mod text;
pub mod transport;

pub use text::display_key;
