//! The client of a cluster: for Esker's own tools, and for programs that embed or reach a node.
//!
//! | module | what flows in | what flows out |
//! |---|---|---|
//! | [`kv`] | operations on keys | their results, from whichever stores lead the regions |
//! | [`placement`] | calls | answers of whichever member leads |
//! | [`error`] | | what a client can fail with, one line each |
//!
//! ```no_run
//! # use esker_client::{ClientError, KvClient, PlacementClient};
//! # async fn example() -> Result<(), ClientError> {
//! let placement = PlacementClient::connect(vec!["127.0.0.1:2379".into()]).await?;
//!
//! let kv = KvClient::new(placement, []);
//! kv.put("fruit/apple", "red").await?;
//! assert_eq!(kv.get("fruit/apple").await?.as_deref(), Some(&b"red"[..]));
//! # Ok(())
//! # }
//! ```
//!
//! The crate decides what the wire (`esker-rpc`) only carries: whom to ask, when to ask again, and
//! what an answer means. It promises that every call ends, with a [`ClientError`] that says in one
//! line why if not with a result; that a write of keys which ends with any error but
//! [`ClientError::OutcomeUnknown`] has not happened and never will; and that what it keeps in memory
//! is within the bounds that its modules name. Clients are cheap to clone, and must be used within a
//! tokio runtime.
//!
//! Messages in arguments and results are those of the protocol, `esker_rpc::proto`.

pub mod error;
pub mod kv;
pub mod placement;

pub use error::ClientError;
pub use kv::KvClient;
pub use placement::{PlacementClient, RegionInfo};
