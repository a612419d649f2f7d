//! `esker store`: the processes that hold replicas.

use clap::{Args, Subcommand};

use super::cluster::ClusterArguments;
use super::error::CliError;
use super::output::{print, print_json};
use super::view::{RegionView, StoreView, store_table};

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
    ///
    /// STATE is `up`, `disconnected` after 20 seconds without a heartbeat and `down` after 30
    /// minutes, when the store's replicas are replaced. HEARTBEAT is the time since the last
    /// heartbeat, by the placement driver's own clock. `none for 5 s` means that the store has been
    /// silent since the present leader of the placement driver began to lead.
    #[command(after_help = "Example:\n  esker store list --json")]
    List,
}

impl StoreArguments {
    pub async fn execute(self) -> Result<(), CliError> {
        let admin = self.cluster.admin().await?;
        let StoreCommand::List = self.command;
        let regions = admin.regions().await?;
        let regions: Vec<_> = regions.into_iter().map(RegionView::from).collect();
        let states = admin.placement().store_states().await?;
        let stores: Vec<_> =
            states.into_iter().map(|state| StoreView::new(state, &regions)).collect();
        if self.cluster.json { print_json(&stores) } else { print(&store_table(&stores)) }
    }
}
