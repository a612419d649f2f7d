//! Esker: a sharded, replicated key-value storage engine that speaks TiKV's client
//! protocol, as one binary and as one crate to embed.
//!
//! There are three ways to use it:
//!
//! - [`Cluster`] runs a whole cluster in this process, for tests and for a first look.
//! - [`Node`] runs one node in this process. Its client's requests to regions that are led here are
//!   function calls.
//! - `cli` is the `esker` binary. The module, and what it alone needs, is behind the feature `cli`,
//!   which is on by default. A program that embeds a node turns it off.
//!
//! ```no_run
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let cluster = esker::Cluster::start(esker::ClusterOptions::default()).await?;
//! let client = cluster.client().await?;
//! client.put("hello", "world").await?;
//! assert_eq!(client.get("hello").await?.as_deref(), Some(&b"world"[..]));
//! cluster.stop().await;
//! # Ok(())
//! # }
//! ```

#[cfg(feature = "cli")]
pub mod cli;
mod cluster;
mod error;
pub mod node;
mod server;
#[cfg(feature = "cli")]
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

pub use cluster::{Cluster, ClusterOptions, MAX_STORES};
pub use error::Error;
pub use esker_client::{ClientError, KvClient, PlacementClient};
pub use node::{Node, NodeBuilder};
