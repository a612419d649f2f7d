//! Esker: a sharded, replicated key-value storage engine that speaks TiKV's client
//! protocol, as one binary and as one crate to embed.
//!
//! | to | use |
//! |---|---|
//! | run a node in this process, alone or as one of many | [`Node`], with [`NodeConfig`] and [`Roles`] |
//! | run a whole cluster in this process, for tests and for a first look | [`Cluster`] |
//! | read and write keys | [`KvClient`], from [`Node::client`] or [`Cluster::client`] |
//! | look up regions and stores, take ids and timestamps | [`PlacementClient`], from [`Node::placement`] |
//! | split regions, move their leaders, replace placement members | [`AdminClient`] |
//! | reach a cluster that runs elsewhere | [`PlacementClient::connect`], and a client made of it |
//! | know what an error asks for | [`Error`] of a start, [`ClientError`] of a client |
//!
//! A node's own client makes requests to regions that are led on that node by function calls, not
//! RPCs. A whole program:
//!
//! ```no_run
//! use esker::Node;
//!
//! #[tokio::main]
//! async fn main() -> Result<(), esker::Error> {
//!     let node = Node::builder().data_dir("data").start().await?;
//!     let client = node.client().await?;
//!     client.put("hello", "world").await?;
//!     assert_eq!(client.get("hello").await?.as_deref(), Some(&b"world"[..]));
//!     node.stop().await;
//!     Ok(())
//! }
//! ```
//!
//! The command line, the benchmark, and what they alone need, are behind the feature `cli`, which
//! is on by default. A program that embeds a node turns it off with `default-features = false`.

#![warn(missing_docs)]

#[cfg(feature = "cli")]
pub mod cli;
mod cluster;
pub mod error;
pub mod node;
#[cfg_attr(feature = "simulation", allow(missing_docs, reason = "only the simulator sees it"))]
mod server;
#[cfg(feature = "cli")]
#[doc(hidden)]
pub mod ycsb;

/// What a node is put together from, for the simulator, which puts it together in another way. No
/// promise is made about anything in it.
#[cfg(feature = "simulation")]
#[doc(hidden)]
pub mod parts {
    pub use crate::server::admin::AdminService;
    pub use crate::server::bootstrap::{Introduced, Newcomer, introduce};
    pub use crate::server::founding::{Record, founded};
    pub use crate::server::heartbeats;
    pub use crate::server::known_stores::KnownStores;
    pub use crate::server::late::LateStore;
    pub use crate::server::member::{
        MemberBook, MemberState, Members, first_region, store_config, store_of,
    };
    pub use crate::server::outbox::{Audience, MAX_WAITING_REPORTS, RegionLeader};
    pub use crate::server::pages::DiskSpace;
    pub use crate::server::split_ids::PlacementIds;
}

/// Keys and values, cheap to clone. `String`, `Vec<u8>` and `&'static str` turn into it.
pub use bytes::Bytes;
pub use cluster::{Cluster, ClusterOptions, MAX_STORES};
pub use error::Error;
/// The clients of a cluster: everything that [`KvClient`], [`PlacementClient`] and [`AdminClient`]
/// take and return. It is the crate `esker_client`.
#[doc(inline)]
pub use esker_client as client;
#[doc(inline)]
pub use esker_client::{AdminClient, ClientError, KvClient, PlacementClient};
/// The types that stores, placement and clients share, such as regions and ids. It is the crate
/// `esker_model`.
#[doc(inline)]
pub use esker_model as model;
pub use node::{Node, NodeBuilder, NodeConfig, Roles};
