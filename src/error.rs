//! What keeps a node from starting or from carrying out a request, in one line each.

use std::path::PathBuf;

use esker_client::ClientError;
use esker_engine::{DirError, EngineError};
use esker_placement::DamagedState;
use esker_raftstore::StoreError;
use esker_rpc::server::ServeError;

use crate::cluster::MAX_STORES;
use crate::node::{AddressesError, ConfigError, SettingError};

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
    #[error(
        "data directory {} is an older copy of store {store}: the cluster has seen more of it; put \
         the newest back; if it is lost for good, empty the directory and start with --replace",
        path.display()
    )]
    OlderCopy { path: PathBuf, store: u64 },
    #[error(
        "data directory {} is empty, but {address} is the address of store {store}: use its \
         directory (is a disk not mounted?), or, if that is lost for good, start with --replace",
        path.display()
    )]
    AddressTaken { path: PathBuf, address: String, store: u64 },
    #[error(
        "the directory {} of this node's placement member is empty, although the node's store is \
         in use; put the directory back (is a disk not mounted?): no other member has the state",
        path.display()
    )]
    MemberLost { path: PathBuf },
    #[error(
        "the directory {} of this node's placement member is empty, although cluster {cluster} is \
         asked for at its address; put the directory back (is a disk not mounted?); if that \
         cluster is given up, stop its stores and clients, remove {}, and start again",
        path.display(), path.display()
    )]
    ClusterLost { path: PathBuf, cluster: u64 },
    #[error(
        "the directory {} of placement member {name} is an older copy: {told_by} has seen it later; \
         put the newest back; if it is lost for good, empty the directory, start again, and run \
         `esker placement replace {name}`", path.display()
    )]
    OlderMember { path: PathBuf, name: String, told_by: String },
    #[error(
        "{} is the directory of member {found}, and this node runs member {wanted}: give each \
         member its own directory and address back", path.display()
    )]
    OtherMember { path: PathBuf, found: String, wanted: String },
    #[error(
        "{} holds a playground of several nodes: start it with `esker playground --data-dir {}`",
        path.display(), path.display()
    )]
    Playground { path: PathBuf },
    #[error(
        "{} is lost, although this playground was complete: put it back (is a disk not mounted?), \
         or start with an empty --data-dir", path.display()
    )]
    PlaygroundPart { path: PathBuf },
    #[error(
        "{} is the data directory of a single node: start it with `esker start --data-dir {}`, or \
         choose another directory", path.display(), path.display()
    )]
    SingleNode { path: PathBuf },
    #[error("{} cannot be used: {reason}", path.display())]
    Record { path: PathBuf, reason: String },
    #[error("this should not happen, please report it: {reason}")]
    Internal { reason: String },
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Setting(#[from] SettingError),
    #[error(transparent)]
    Addresses(#[from] AddressesError),
    #[error("{} is damaged: {reason}", path.display())]
    Damaged { path: PathBuf, reason: String },
    #[error("{what} {}: {source}", path.display())]
    File { what: &'static str, path: PathBuf, source: std::io::Error },
    #[error("cannot start the runtime: {0}")]
    Runtime(std::io::Error),
    #[error(
        "this process may have {limit} open files, but needs {needed}; \
         raise its limit (`ulimit -n`, or `LimitNOFILE=` in systemd)"
    )]
    FewDescriptors { limit: u64, needed: u64 },
    #[error("a node that runs neither a store nor placement has nothing to do; give it a role")]
    NoRole,
    #[error(
        "this node is a placement member, but its address {address} is not in --join {members}"
    )]
    NotAMember { address: String, members: String },
    #[error("no data directory given; a node needs one of its own")]
    NoDataDir,
    #[error("a cluster on one machine has 1 to {MAX_STORES} stores, not {stores}")]
    Stores { stores: u32 },
    #[error(
        "a placement driver has 1, 3 or 5 members, at most one for each store: \
         not {placements} on {stores} stores"
    )]
    Placements { placements: u32, stores: u32 },
    #[error(
        "{} holds a cluster of {found} {what}, not of {wanted}: give {option} {found}, \
         or another data directory", path.display()
    )]
    OtherSize { path: PathBuf, what: &'static str, option: &'static str, found: u32, wanted: u32 },
    #[error("store {store} is not ready: {reason}")]
    NotReady { store: u64, reason: String },
    #[error("the cluster was not ready within {seconds} s: {reason}")]
    Slow { seconds: u64, reason: String },
}

impl Error {
    /// Whether only the memory of one store is at fault, so that the rest of the node is not
    /// affected.
    pub(crate) fn concerns_one_store(&self) -> bool {
        match self {
            Error::Directory(error) => matches!(
                error,
                DirError::NotWhole { .. }
                    | DirError::NoIdent { .. }
                    | DirError::Damaged { .. }
                    | DirError::Engine(_)
                    | DirError::BadIdent { .. }
            ),
            Error::Engine(_)
            | Error::Store(_)
            | Error::AddressTaken { .. }
            | Error::OlderCopy { .. } => true,
            Error::Client(ClientError::PlacementRefused { call, .. }) => *call == "put_store",
            _ => false,
        }
    }
}
