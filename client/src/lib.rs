//! The client of a cluster: for Esker's own tools, and for programs that embed or reach a node.
//!
//! | module | what flows in | what flows out |
//! |---|---|---|
//! | [`kv`] | operations on keys | their results, from the stores that lead the regions |
//! | [`placement`] | calls | answers of the member that leads |
//! | [`admin`] | questions and changes of an operator | answers of placement and of single stores |
//! | [`error`] | | what a client can fail with, one line each |
//!
//! ```no_run
//! # use esker_client::{AdminClient, ClientError, KvClient, PlacementClient};
//! # async fn example() -> Result<(), ClientError> {
//! let placement = PlacementClient::connect(vec!["127.0.0.1:2379".into()]).await?;
//!
//! let kv = KvClient::new(placement.clone(), []);
//! kv.put("fruit/apple", "red").await?;
//! assert_eq!(kv.get("fruit/apple").await?.as_deref(), Some(&b"red"[..]));
//!
//! let admin = AdminClient::new(placement);
//! for found in admin.regions().await? {
//!     println!("region {} is led by {:?}", found.region.id, found.leader);
//! }
//! # Ok(())
//! # }
//! ```
//!
//! The crate decides what the wire (`esker-rpc`) only carries: which server to ask, when to ask
//! again, and what an answer means. It promises that
//!
//! - every call ends, with a result or with a [`ClientError`] that gives the reason in one line;
//! - a write of keys which ends with any error but [`ClientError::OutcomeUnknown`] has not happened
//!   and never will;
//! - what it keeps in memory is within the bounds that its modules name.
//!
//! Clients are cheap to clone, and must be made and used within a tokio runtime whose time and I/O
//! are enabled.
//!
//! Regions, reports, orders and timestamps are types of `esker_model`. Other messages in arguments
//! and results are those of the protocol, [`proto`]. A program that embeds a node finds this crate
//! as `esker::client`, and `esker_model` as `esker::model`.

#![warn(missing_docs)]

pub mod admin;
pub mod error;
pub mod kv;
pub mod placement;

pub use admin::AdminClient;
pub use error::ClientError;
/// What [`ClientError::Address`] says of a text.
pub use esker_rpc::channel::AddressError;
/// How a client opens its connections: over TCP by default, and in a simulation in another way.
pub use esker_rpc::channel::Dialer;
/// The messages of the protocol, TiKV's and Esker's own, where methods take or return them as they
/// are.
pub use esker_rpc::proto;
/// A store in this process, which [`KvClient::new`] takes to send it requests by function calls.
/// `esker::Node::client` does that for the node's own store.
pub use esker_rpc::service::StoreService;
pub use kv::KvClient;
pub use placement::{PlacementClient, RegionInfo};
