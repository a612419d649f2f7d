//! `esker region`: the regions that cover the key space, and changes that an operator makes to
//! them.

mod detail;

use std::time::Duration;

use clap::{Args, Subcommand};
use esker_client::AdminClient;
use esker_client::admin::SplitAt;
use esker_model::{Region, RegionId, StoreId};
use tokio::time::{sleep, timeout};

use super::cluster::ClusterArguments;
use super::error::CliError;
use super::key::Text;
use super::number::whole;
use super::output::{print, print_json};
use super::view::{RegionView, region_table};

/// The most parts of one split. Each needs ids for a region and its peers from placement.
const MAX_PARTS: u32 = 128;

/// How long a transfer of leadership may take: a few election timeouts.
const TRANSFER_DEADLINE: Duration = Duration::from_secs(10);

/// How long a split waits until the new regions have leaders, and how often it looks.
const LEADER_WITHIN: Duration = Duration::from_secs(3);
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// Shows and changes regions, the ranges of keys that are replicated together
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  esker region list")]
pub struct RegionArguments {
    #[command(flatten)]
    cluster: ClusterArguments,
    #[command(subcommand)]
    command: RegionCommand,
}

#[derive(Debug, Subcommand)]
enum RegionCommand {
    /// Lists all regions in the order of their keys
    #[command(after_help = "Example:\n  esker region list --json")]
    List,
    /// Shows one region and the progress of each of its replicas
    #[command(after_help = "Example:\n  esker region show 2")]
    Show {
        /// The region
        #[arg(value_name = "ID", allow_negative_numbers = true, value_parser = region)]
        id: RegionId,
    },
    /// Shows the region that covers a key
    #[command(after_help = "Example:\n  esker region key 'user42\\x00'")]
    Key {
        /// The key, with \xNN for bytes that cannot be typed
        #[arg(value_name = "KEY", allow_hyphen_values = true)]
        key: Text,
    },
    /// Splits a region, at the keys given or into parts of about equal size
    #[command(
        after_help = "Examples:\n  esker region split 2 --key g --key p\n  esker region split 2 --parts 4"
    )]
    Split {
        /// The region
        #[arg(value_name = "ID", allow_negative_numbers = true, value_parser = region)]
        id: RegionId,
        /// Where a new region starts; may be given more than once
        #[arg(long = "key", value_name = "KEY", allow_hyphen_values = true)]
        keys: Vec<Text>,
        /// How many regions there are to be afterwards [default: 2]
        #[arg(long, value_name = "N", conflicts_with = "keys", allow_negative_numbers = true,
              value_parser = whole(2, MAX_PARTS))]
        parts: Option<u32>,
    },
    /// Makes the replica on another store the leader of a region
    #[command(after_help = "Example:\n  esker region transfer-leader 2 --to 3")]
    TransferLeader {
        /// The region
        #[arg(value_name = "ID", allow_negative_numbers = true, value_parser = region)]
        id: RegionId,
        /// The store whose replica is to lead
        #[arg(long, value_name = "STORE", allow_negative_numbers = true, value_parser = store)]
        to: StoreId,
    },
}

fn region(typed: &str) -> Result<RegionId, String> {
    id(typed).map(RegionId)
}

fn store(typed: &str) -> Result<StoreId, String> {
    id(typed).map(StoreId)
}

/// The id of a region or a store.
fn id(typed: &str) -> Result<u64, String> {
    typed.parse().map_err(|_| {
        "an id is a number, as `esker region list` and `esker store list` show them".to_owned()
    })
}

impl RegionArguments {
    pub async fn execute(self) -> Result<(), CliError> {
        let json = self.cluster.json;
        let admin = self.cluster.admin().await?;
        match self.command {
            RegionCommand::List => {
                let regions = admin.regions().await?;
                let regions: Vec<_> = regions.into_iter().map(RegionView::from).collect();
                print_regions(&regions, json)
            }
            RegionCommand::Key { key } => print_regions(&[region_of(&admin, key).await?], json),
            RegionCommand::Show { id } => {
                let detail = detail::detail(&admin, admin.region(id).await?).await;
                if json { print_json(&detail) } else { print(&detail.text()) }
            }
            RegionCommand::Split { id, keys, parts } => {
                print_regions(&split(&admin, id, keys, parts.unwrap_or(2)).await?, json)
            }
            RegionCommand::TransferLeader { id, to } => {
                admin.transfer_leader(id, to, TRANSFER_DEADLINE).await?;
                print_regions(&[admin.region(id).await?.into()], json)
            }
        }
    }
}

fn print_regions(regions: &[RegionView], json: bool) -> Result<(), CliError> {
    if json { print_json(&regions) } else { print(&region_table(regions)) }
}

async fn split(
    admin: &AdminClient,
    id: RegionId,
    keys: Vec<Text>,
    parts: u32,
) -> Result<Vec<RegionView>, CliError> {
    let is_twice = |(at, key): &(usize, &Text)| keys[..*at].contains(key);
    if let Some((_, key)) = keys.iter().enumerate().find(is_twice) {
        return Err(CliError::KeyTwice(key.clone()));
    }
    let at = match keys.is_empty() {
        true => SplitAt::Parts(parts),
        false => SplitAt::Keys(keys.into_iter().map(|key| key.0).collect()),
    };
    let parts = admin.split_region(id, &at).await?;
    let views = parts.into_iter().map(|part| with_leader(admin, part));
    Ok(futures_util::future::join_all(views).await)
}

/// A part of a region that was split just now. Placement hears soon who leads it.
async fn with_leader(admin: &AdminClient, part: Region) -> RegionView {
    let found = async {
        loop {
            match admin.region(part.id).await {
                Ok(found) if found.leader.is_some() => return RegionView::from(found),
                _ => sleep(LOOK_AGAIN).await,
            }
        }
    };
    let found = timeout(LEADER_WITHIN, found).await;
    found.unwrap_or_else(|_| RegionView::new(part, None))
}

/// The region that covers a key.
async fn region_of(admin: &AdminClient, key: Text) -> Result<RegionView, CliError> {
    let found = admin.placement().region_by_key(key.0.clone()).await?;
    found.map(RegionView::from).ok_or(CliError::NoRegionFor(key))
}
