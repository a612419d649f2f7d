//! The wire: types, services and sockets, never decisions.
//!
//! | module | what flows in | what flows out |
//! |---|---|---|
//! | [`proto`] | the schemas in `proto/` | messages, clients and server traits |
//! | [`service`] | | the trait by which a store answers requests |
//! | [`server`] | a listener and services | one port that speaks gRPC and HTTP; `Tikv` and `BatchCommands` over a store |
//! | [`transport`] | Raft messages and snapshots, from any thread | the same on another store, in order or not at all |
//! | [`placement`] | calls | answers of whichever member leads |
//! | [`kv`] | operations on keys | their results, from whichever stores lead the regions |
//! | [`repeat`] | failures, one after another | those that are worth a line in the log |
//! | [`text`] | bytes | text that people can read, and that reads back as the same bytes |
//! | [`error`] | | what a client can fail with, one line each |
//!
//! The crate promises that no peer can make it hold more than the bounds that its modules name,
//! that every wait ends, and that work whose client has gone is dropped. It knows nothing of
//! consensus, storage or scheduling: it is used by them, and by way of traits calls back.

mod backoff;
mod channel;
pub mod error;
pub mod kv;
pub mod placement;
pub mod proto;
pub mod repeat;
pub mod server;
pub mod service;
pub mod text;
pub mod transport;

pub use channel::endpoint;
pub use error::{ClientError, display_key};
pub use kv::KvClient;
pub use placement::PlacementClient;
