//! `esker playground`: a cluster on loopback, for a first look and for tests.

use std::io::Write;
use std::path::PathBuf;

use super::interrupt::Interrupt;
use super::process::{block_on, raise_descriptors};
use crate::Error;
use crate::cluster::{Cluster, ClusterOptions};

/// The options of `esker playground`.
#[derive(Debug, Clone)]
pub struct PlaygroundOptions {
    pub stores: u32,
    pub placements: u32,
    pub data_dir: Option<PathBuf>,
    pub port: u16,
}

/// Runs a cluster until Ctrl-C or SIGTERM.
///
/// # Errors
/// When the cluster did not start.
pub fn run(options: PlaygroundOptions) -> Result<(), Error> {
    raise_descriptors(options.stores.into())?;
    block_on(async {
        let mut stop = Interrupt::listen()?;
        let cluster_options = ClusterOptions {
            stores: options.stores,
            placements: options.placements,
            data_dir: options.data_dir.clone(),
            port: options.port,
            ..ClusterOptions::default()
        };
        let cluster = tokio::select! {
            cluster = Cluster::start(cluster_options) => cluster?,
            () = stop.comes() => return Ok(()),
        };
        // A program may wait for this line on a pipe, or may have stopped reading.
        let mut out = std::io::stdout().lock();
        let _ = out.write_all(greeting(&cluster, &options).as_bytes()).and_then(|()| out.flush());
        drop(out);
        stop.comes().await;
        cluster.stop().await;
        Ok(())
    })
}

fn greeting(cluster: &Cluster, options: &PlaygroundOptions) -> String {
    let placement = cluster.placement_address();
    let mut text = format!("ready: placement at {placement}\n\n");
    for node in cluster.nodes() {
        if let Some(id) = node.store_id() {
            text += &format!("  store {id:<4} {}\n", node.address());
        }
    }
    text += &match &options.data_dir {
        Some(directory) => format!("  data       {}\n", directory.display()),
        None => "  data       temporary, gone when this ends\n".to_owned(),
    };
    let flag = match options.port == 2379 {
        true => String::new(),
        false => format!(" --placement {placement}"),
    };
    text += &format!(
        "\nTry, in another terminal:\n\n  esker kv put hello world{flag}\n  esker region list{flag}\n  \
         esker ycsb all --workload a --records 100000 --operations 200000 --threads 64{flag}\n\n\
         Ctrl-C stops the cluster.\n"
    );
    text
}
