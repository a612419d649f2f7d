//! A process that is a server: it runs until a signal ends it.

use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::interrupt::Interrupt;
use crate::Error;
use crate::node::descriptors::{self, LEAST, MOST, Share};
use crate::node::{Node, NodeConfig, Roles};
use crate::server::pages;

/// The options of `esker start`.
#[derive(Debug, Clone)]
pub struct NodeOptions {
    pub data_dir: PathBuf,
    pub listen: String,
    /// The address by which others reach the node, if it is not `listen`.
    pub advertise: Option<String>,
    pub join: Vec<String>,
    pub roles: Option<Roles>,
    pub labels: Vec<(String, String)>,
    pub config: Option<PathBuf>,
    /// The store at this address lost its memory for good, and this store takes its place.
    pub replace: bool,
}

/// Runs a node until Ctrl-C or SIGTERM. Both end it cleanly at any time, also while it starts.
///
/// # Errors
/// When the node did not start.
pub fn run_node(options: NodeOptions) -> Result<(), Error> {
    raise_descriptors(1)?;
    block_on(async {
        let mut stop = Interrupt::listen()?;
        let config = match &options.config {
            Some(path) => NodeConfig::read(path)?,
            None => NodeConfig::default(),
        };
        let mut builder = Node::builder()
            .data_dir(&options.data_dir)
            .listen(&options.listen)
            .join(options.join.clone())
            .labels(options.labels.clone())
            .replace(options.replace)
            .config(config);
        if let Some(roles) = options.roles {
            builder = builder.roles(roles);
        }
        if let Some(address) = &options.advertise {
            builder = builder.advertise(address);
        }
        let node = tokio::select! {
            node = builder.start() => node?,
            () = stop.comes() => return Ok(()),
        };
        let store = node.store_id().map_or_else(String::new, |id| format!(" store {id}"));
        if let Some(error) = node.store_failure() {
            eprintln!("error: only the placement member of this node runs: {error}");
        }
        // The program that started the node may have stopped reading.
        let _ = writeln!(std::io::stdout(), "ready: node at {}{store}", node.address());
        stop.comes().await;
        node.stop().await;
        Ok(())
    })
}

/// Runs `body` on a runtime of its own, with metrics collected.
pub fn block_on<T>(body: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    /// How often the exporter combines what was measured since the last time.
    const UPKEEP: Duration = Duration::from_secs(5);
    /// How long the remaining background tasks may take at the end. None of them matters by then.
    /// The look-up of a name may take minutes.
    const BACKGROUND_GRACE: Duration = Duration::from_secs(1);
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(Error::Runtime)?;
    let outcome = runtime.block_on(async {
        if let Some(metrics) = pages::collect_metrics() {
            tokio::spawn(async move {
                let mut upkeep = tokio::time::interval(UPKEEP);
                loop {
                    upkeep.tick().await;
                    metrics.run_upkeep();
                }
            });
        }
        body.await
    });
    runtime.shutdown_timeout(BACKGROUND_GRACE);
    outcome
}

/// Raises the soft limit of this process to the hard limit, and logs the result. Not for programs
/// that embed a node, because the limit is one of the whole process.
///
/// # Errors
/// When even the raised limit is too small for so many nodes.
pub fn raise_descriptors(nodes: u64) -> Result<(), Error> {
    let Rlimit { current: before, maximum } = getrlimit(Resource::Nofile);
    let before = before.unwrap_or(MOST);
    let mut wanted = maximum.unwrap_or(MOST).min(MOST);
    // Some systems refuse their own hard limit, and accept less.
    while wanted > before
        && setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), maximum }).is_err()
    {
        wanted /= 2;
    }
    let limit = descriptors::current();
    let share = Share::of(limit / nodes.max(1));
    tracing::info!(
        limit,
        before,
        connections = share.connections,
        files_of_each_engine = share.engine_files,
        "open files"
    );
    let needed = LEAST * nodes.max(1);
    match limit < needed {
        true => Err(Error::FewDescriptors { limit, needed }),
        false => Ok(()),
    }
}
