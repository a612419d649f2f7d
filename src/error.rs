//! What keeps a node from starting or from doing what it was asked, in one line each.

use std::path::PathBuf;

use esker_engine::{DirError, EngineError};
use esker_placement::DamagedState;
use esker_raftstore::StoreError;
use esker_rpc::error::ClientError;
use esker_rpc::server::ServeError;

/// Why a node or a cluster did not start, or stopped.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot listen on {address}: {source}; is another process using the port?")]
    Listen { address: String, source: std::io::Error },
    #[error(transparent)]
    Directory(#[from] DirError),
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error(transparent)]
    Serve(#[from] ServeError),
    #[error("{0}")]
    Placement(#[from] DamagedState),
    #[error(
        "data directory {} belongs to cluster {found}, but placement at {placement} is cluster {wanted}; \
         use another data directory, or join the right cluster", path.display()
    )]
    OtherCluster { path: PathBuf, found: u64, wanted: u64, placement: String },
    #[error(
        "data directory {} belongs to a placement member of another set of members; \
         start it with the same --join as before", path.display()
    )]
    OtherMembers { path: PathBuf },
    #[error("cannot read configuration {}: {reason}", path.display())]
    Config { path: PathBuf, reason: String },
    #[error("{what} {}: {source}", path.display())]
    File { what: &'static str, path: PathBuf, source: std::io::Error },
    #[error("cannot start the runtime: {0}")]
    Runtime(std::io::Error),
    #[error("a node that runs neither a store nor placement has nothing to do; give it a role")]
    NoRole,
    #[error(
        "this node is a placement member, but its address {address} is not in --join {members}"
    )]
    NotAMember { address: String, members: String },
    #[error("no data directory given; a node needs one of its own")]
    NoDataDir,
    #[error("store {store} is not ready: {reason}")]
    NotReady { store: u64, reason: String },
    #[error("the cluster was not ready within {seconds} s: {reason}")]
    Slow { seconds: u64, reason: String },
    #[error("stopped before it was ready")]
    Stopped,
}
