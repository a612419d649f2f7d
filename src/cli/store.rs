//! `esker store`: the processes that hold replicas.

use std::time::{SystemTime, UNIX_EPOCH};

use clap::{Args, Subcommand};

use super::cluster::{Cluster, ClusterArguments};
use super::error::CliError;
use super::output::{print, print_json};
use super::view::{StoreView, store_table};

/// Shows stores, the processes that hold the replicas of regions
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  esker store list")]
pub struct StoreArguments {
    #[command(flatten)]
    cluster: ClusterArguments,
    #[command(subcommand)]
    command: StoreCommand,
}

#[derive(Debug, Subcommand)]
enum StoreCommand {
    /// Lists all stores with the numbers of their regions and leaders
    #[command(after_help = "Example:\n  esker store list --json")]
    List,
}

impl StoreArguments {
    pub async fn execute(self) -> Result<(), CliError> {
        let cluster = Cluster::connect(&self.cluster).await?;
        let StoreCommand::List = self.command;
        let regions = cluster.regions().await?;
        let mut stores: Vec<_> = cluster
            .stores()
            .await?
            .into_iter()
            .map(|store| StoreView::new(store, &regions))
            .collect();
        stores.sort_by_key(|store| store.id);
        if self.cluster.json {
            return print_json(&stores);
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        print(&store_table(&stores, u64::try_from(now.as_millis()).unwrap_or(u64::MAX)))
    }
}
