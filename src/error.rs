//! What keeps a node or a cluster from starting, in one line each.

use std::path::PathBuf;

#[doc(inline)]
pub use esker_client::ClientError;
#[doc(inline)]
pub use esker_engine::{DirError, EngineError};
#[doc(inline)]
pub use esker_raftstore::StoreError;

use crate::cluster::MAX_STORES;
pub use crate::node::{AddressError, AddressesError, ConfigError, SettingError};
use esker_model::StoreId;

/// Why a node or a cluster did not start.
///
/// Each message is one line that says what failed, why, and what to do. It names options as `esker
/// start` has them. [`NodeBuilder`](crate::NodeBuilder) and
/// [`ClusterOptions`](crate::ClusterOptions) have the same names: `--data-dir` is `data_dir`.
///
/// An error that names a path is about a directory that was used before, as a rule. Nothing is
/// repaired then, because a store or a placement member that goes on with less than it knew breaks
/// its promises. First of all make sure that every disk is mounted. `docs/operations.md` says what
/// to do when a directory is lost for good.
///
/// ```no_run
/// use esker::error::DirError;
/// use esker::{Error, Node};
///
/// # async fn example() -> Result<(), Error> {
/// match Node::builder().data_dir("data").start().await {
///     Ok(node) => node.stop().await,
///     Err(Error::Directory(DirError::Locked { path })) => {
///         println!("this program runs already, with {}", path.display());
///     }
///     Err(error) => return Err(error),
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The port cannot be bound: another process has it, or the address is not one of this machine.
    /// Choose another port, or port 0.
    #[error("cannot listen on {address}: {source}; is another process using the port?")]
    Listen {
        /// `host:port` as it was given.
        address: String,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The data directory cannot be used: it is locked, damaged, not whole, or not writable.
    #[error(transparent)]
    Directory(#[from] DirError),
    /// An engine in the data directory does not open, read or write.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// What is on disk contradicts itself, or the system refuses a thread.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Placement cannot be asked, or refuses the store. [`ClientError`] says what to do.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The store in the directory belongs to another cluster than the one at the addresses of
    /// `join`. One of the two is the wrong one.
    #[error(
        "data directory {} belongs to cluster {found}, but placement at {placement} is cluster {wanted}; \
         use another data directory, or join the right cluster", path.display()
    )]
    OtherCluster {
        /// The store's directory.
        path: PathBuf,
        /// The id of the directory's cluster.
        found: u64,
        /// The id of the cluster that was found.
        wanted: u64,
        /// `host:port` of the placement member that answered.
        placement: String,
    },
    /// The addresses of `join` are not those with which this placement member was founded. The set
    /// of members is fixed at the first start.
    #[error(
        "data directory {} belongs to a placement member of another set of members; \
         start it with the same --join as before", path.display()
    )]
    OtherMembers {
        /// The member's directory.
        path: PathBuf,
    },
    /// The directory was restored from a backup, or copied, and the store has run with a newer one
    /// since. With it the store would break promises that it made.
    #[error(
        "data directory {} is an older copy of store {store}: the cluster has seen more of it; put \
         the newest back; if it is lost for good, empty the directory and start with --replace",
        path.display()
    )]
    OlderCopy {
        /// The store's directory.
        path: PathBuf,
        /// The id of the store.
        store: StoreId,
    },
    /// The directory is empty, and the cluster has a store at this node's address.
    /// [`NodeBuilder::replace`](crate::NodeBuilder::replace) gives the store up for a new one.
    #[error(
        "data directory {} is empty, but {address} is the address of store {store}: use its \
         directory (is a disk not mounted?), or, if that is lost for good, start with --replace",
        path.display()
    )]
    AddressTaken {
        /// The empty directory.
        path: PathBuf,
        /// This node's address.
        address: String,
        /// The id of the store that has the address.
        store: StoreId,
    },
    /// The lone placement member of a cluster has lost its directory. The node's store shows that
    /// there was one.
    #[error(
        "the directory {} of this node's placement member is empty, although the node's store is \
         in use; put the directory back (is a disk not mounted?): no other member has the state",
        path.display()
    )]
    MemberLost {
        /// The member's empty directory.
        path: PathBuf,
    },
    /// The placement members have lost their directories. Stores or clients that ask for their
    /// cluster show that there was one.
    #[error(
        "the directory {} of this node's placement member is empty, although cluster {cluster} is \
         asked for at its address; put the directory back (is a disk not mounted?); if that \
         cluster is given up, stop its stores and clients, remove {}, and start again",
        path.display(), path.display()
    )]
    ClusterLost {
        /// The member's empty directory.
        path: PathBuf,
        /// The id of the cluster that is asked for.
        cluster: u64,
    },
    /// The placement member's directory was restored from a backup, or copied, and the member has
    /// run with a newer one since.
    #[error(
        "the directory {} of placement member {name} is an older copy: {told_by} has seen it later; \
         put the newest back; if it is lost for good, empty the directory, start again, and run \
         `esker placement replace {name}`", path.display()
    )]
    OlderMember {
        /// The member's directory.
        path: PathBuf,
        /// The member's name.
        name: String,
        /// The name of the member that remembers more.
        told_by: String,
    },
    /// The directories of two placement members were exchanged.
    #[error(
        "{} is the directory of member {found}, and this node runs member {wanted}: give each \
         member its own directory and address back", path.display()
    )]
    OtherMember {
        /// The member's directory.
        path: PathBuf,
        /// The name of the directory's member.
        found: String,
        /// The name of this node's member.
        wanted: String,
    },
    /// [`Node`](crate::Node) was given the directory of a whole [`Cluster`](crate::Cluster).
    #[error(
        "{} holds a playground of several nodes: start it with `esker playground --data-dir {}`",
        path.display(), path.display()
    )]
    Playground {
        /// The directory.
        path: PathBuf,
    },
    /// One of the directories of a [`Cluster`](crate::Cluster)'s nodes is gone.
    #[error(
        "{} is lost, although this playground was complete: put it back (is a disk not mounted?), \
         or start with an empty --data-dir", path.display()
    )]
    PlaygroundPart {
        /// The directory that is gone.
        path: PathBuf,
    },
    /// [`Cluster`](crate::Cluster) was given the directory of a single [`Node`](crate::Node).
    #[error(
        "{} is the data directory of a single node: start it with `esker start --data-dir {}`, or \
         choose another directory", path.display(), path.display()
    )]
    SingleNode {
        /// The directory.
        path: PathBuf,
    },
    /// A file in which a placement member keeps what it must remember is missing or makes no sense.
    #[error("{} cannot be used: {reason}", path.display())]
    Record {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// An invariant of Esker does not hold. Please report it.
    #[error("this should not happen, please report it: {reason}")]
    Internal {
        /// The invariant.
        reason: String,
    },
    /// A file of settings is refused.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The settings are out of their ranges, or contradict each other.
    #[error(transparent)]
    Setting(#[from] SettingError),
    /// The addresses of `listen`, `advertise` and `join` are malformed, or do not fit together.
    #[error(transparent)]
    Addresses(#[from] AddressesError),
    /// A file beside the engines cannot be read as what it is.
    #[error("{} is damaged: {reason}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The file system refuses to read or write a file beside the engines.
    #[error("{what} {}: {source}", path.display())]
    File {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The system refuses what the runtime of the command line needs. A program that embeds a node
    /// has a runtime of its own, and does not get this.
    #[error("cannot start the runtime: {0}")]
    Runtime(std::io::Error),
    /// The command line was started with a low limit of open files. A program that embeds a node
    /// does not get this: see
    /// [`NodeBuilder::max_descriptors`](crate::NodeBuilder::max_descriptors).
    #[error(
        "this process may have {limit} open files, but needs {needed}; \
         raise its limit (`ulimit -n`, or `LimitNOFILE=` in systemd)"
    )]
    FewDescriptors {
        /// The limit, which cannot be raised further.
        limit: u64,
        /// The least with which the nodes run.
        needed: u64,
    },
    /// [`Roles`](crate::node::Roles) without any role.
    #[error("a node that runs neither a store nor placement has nothing to do; give it a role")]
    NoRole,
    /// [`Roles`](crate::node::Roles) ask for a placement member, and `join` does not list this
    /// node.
    #[error(
        "this node is a placement member, but its address {address} is not in --join {members}"
    )]
    NotAMember {
        /// This node's address.
        address: String,
        /// The addresses of `join`, with commas between them.
        members: String,
    },
    /// [`NodeBuilder::data_dir`](crate::NodeBuilder::data_dir) was not called.
    #[error("no data directory given; a node needs one of its own")]
    NoDataDir,
    /// [`ClusterOptions::stores`](crate::ClusterOptions::stores) is out of its range.
    #[error("a cluster on one machine has 1 to {MAX_STORES} stores, not {stores}")]
    Stores {
        /// The number that was given.
        stores: u32,
    },
    /// [`ClusterOptions::placements`](crate::ClusterOptions::placements) is not 1, 3 or 5, or more
    /// than there are stores.
    #[error(
        "a placement driver has 1, 3 or 5 members, at most one for each store: \
         not {placements} on {stores} stores"
    )]
    Placements {
        /// The number of members that was given.
        placements: u32,
        /// The number of stores that was given.
        stores: u32,
    },
    /// The directory holds a [`Cluster`](crate::Cluster) of another size, and a cluster does not
    /// change its size.
    #[error(
        "{} holds a cluster of {found} {what}, not of {wanted}: give {option} {found}, \
         or another data directory", path.display()
    )]
    OtherSize {
        /// The directory.
        path: PathBuf,
        /// What is counted.
        what: &'static str,
        /// The option that sets it.
        option: &'static str,
        /// How many the directory has.
        found: u32,
        /// How many were asked for.
        wanted: u32,
    },
    /// Some region has no leader, or not all its replicas, after the time that
    /// [`Cluster::ready`](crate::Cluster::ready) waits. To be expected on a very busy machine.
    #[error("the cluster was not ready within {seconds} s: {reason}")]
    Slow {
        /// For how many seconds the cluster was waited for.
        seconds: u64,
        /// What it lacked.
        reason: String,
    },
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
