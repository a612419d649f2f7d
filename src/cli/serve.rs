//! `esker playground` and `esker start`: the arguments become the options of the servers, which
//! then run until a signal ends them.

use std::collections::BTreeMap;
use std::io::IsTerminal as _;
use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, ValueEnum};
use tracing_subscriber::EnvFilter;

use super::error::CliError;
use super::number::whole;
use super::playground::{self, PlaygroundOptions};
use super::process::{self, NodeOptions};
use crate::cluster::MAX_STORES;
use crate::node::{Address, Roles};

/// Set to something like `info` or `warn,esker_raft=debug` to choose what is logged.
const LOG_VARIABLE: &str = "ESKER_LOG";

/// Runs a whole cluster in this process, on loopback
///
/// Prints `ready: placement at 127.0.0.1:PORT` once every store is up and every region has all
/// its replicas. Ctrl-C stops it.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  esker playground --stores 3 --data-dir /tmp/esker")]
pub struct PlaygroundArguments {
    /// How many stores
    #[arg(long, value_name = "N", default_value_t = 3, allow_negative_numbers = true,
          value_parser = whole(1, MAX_STORES))]
    stores: u32,
    /// How many members of the placement driver, at most one for each store
    #[arg(long, value_name = "N", default_value = "1", allow_negative_numbers = true,
          value_parser = ["1", "3", "5"])]
    placements: String,
    /// Keeps the data here, where the same command finds it again; without it the data is temporary
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Port of the placement driver; 0 takes any that is free
    #[arg(long, default_value_t = 2379, allow_negative_numbers = true)]
    port: u16,
}

impl PlaygroundArguments {
    pub fn execute(self) -> Result<(), CliError> {
        log_to_standard_error("warn")?;
        playground::run(self.into()).map_err(|error| CliError::Server(error.into()))
    }
}

impl From<PlaygroundArguments> for PlaygroundOptions {
    fn from(arguments: PlaygroundArguments) -> Self {
        PlaygroundOptions {
            stores: arguments.stores,
            placements: match arguments.placements.as_str() {
                "5" => 5,
                "3" => 3,
                _ => 1,
            },
            data_dir: arguments.data_dir,
            port: arguments.port,
        }
    }
}

/// Runs one node on one port
///
/// Serves clients, Raft and placement over gRPC, and metrics and status over HTTP. A
/// node whose own address is in --join is a member of the placement driver, and every
/// node runs a store, unless --roles is given. Ctrl-C or SIGTERM stops it.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  esker start --data-dir /var/lib/esker --listen 10.0.0.1:2379 --join 10.0.0.1:2379,10.0.0.2:2379,10.0.0.3:2379"
)]
pub struct StartArguments {
    /// Where the node keeps its data
    #[arg(long, value_name = "DIR")]
    data_dir: PathBuf,
    /// The address at which this node listens, and by which the others reach it
    #[arg(long, value_name = "HOST:PORT")]
    listen: Address,
    /// The address by which the others reach this node, if it is not the one it listens at
    #[arg(long, value_name = "HOST:PORT")]
    advertise: Option<Address>,
    /// The members of the placement driver: one, three or five, the same list for every node
    #[arg(long, value_name = "HOST:PORT,...", required = true, value_delimiter = ',')]
    join: Vec<Address>,
    /// What this node does
    #[arg(long, value_name = "ROLE,...", value_enum, value_delimiter = ',')]
    roles: Vec<Role>,
    /// The location of this node: kept and shown, but replicas are not yet placed by it
    #[arg(long, value_name = "KEY=VALUE,...", value_parser = Labels::from_str)]
    labels: Option<Labels>,
    /// A file with settings
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// This store takes the place of the one that had its address and lost its data for good; this
    /// store's directory must be empty
    #[arg(long)]
    replace: bool,
}

impl StartArguments {
    pub fn execute(self) -> Result<(), CliError> {
        log_to_standard_error("info")?;
        process::run_node(self.into()).map_err(|error| CliError::Server(error.into()))
    }
}

impl From<StartArguments> for NodeOptions {
    fn from(arguments: StartArguments) -> Self {
        let has = |role| arguments.roles.contains(&role);
        let roles = Roles { placement: has(Role::Placement), store: has(Role::Store) };
        NodeOptions {
            data_dir: arguments.data_dir,
            listen: arguments.listen.into(),
            advertise: arguments.advertise.map(String::from),
            join: arguments.join.into_iter().map(String::from).collect(),
            roles: (!arguments.roles.is_empty()).then_some(roles),
            labels: arguments.labels.unwrap_or_default().0,
            config: arguments.config,
            replace: arguments.replace,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Role {
    /// A member of the placement driver
    Placement,
    /// A store for replicas of regions
    Store,
}

/// Labels like `zone=a,host=b`, each key once.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Labels(Vec<(String, String)>);

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
enum LabelsError {
    #[error(
        "`{0}` is not a label: labels are KEY=VALUE, separated by commas, such as zone=a,host=b"
    )]
    Malformed(String),
    #[error("the label `{0}` is given twice")]
    Twice(String),
}

impl FromStr for Labels {
    type Err = LabelsError;

    fn from_str(text: &str) -> Result<Self, LabelsError> {
        let mut labels = BTreeMap::new();
        for label in text.split(',') {
            let (key, value) = label
                .split_once('=')
                .filter(|(key, value)| !key.is_empty() && !value.is_empty() && !value.contains('='))
                .ok_or_else(|| LabelsError::Malformed(label.to_owned()))?;
            if labels.insert(key.to_owned(), value.to_owned()).is_some() {
                return Err(LabelsError::Twice(key.to_owned()));
            }
        }
        Ok(Labels(labels.into_iter().collect()))
    }
}

/// Sends the log to standard error, because standard output is for results.
fn log_to_standard_error(default: &str) -> Result<(), CliError> {
    let directives = std::env::var(LOG_VARIABLE).unwrap_or_else(|_| default.to_owned());
    let filter = EnvFilter::try_new(directives)
        .map_err(|error| CliError::Log { variable: LOG_VARIABLE, reason: error.to_string() })?;
    // Colours are for a terminal, not for a file.
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    // A program that embeds the command line may have set up its own log, which is left alone.
    let _ = log.try_init();
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Start {
        #[command(flatten)]
        arguments: StartArguments,
    }

    const NODE: [&str; 5] = ["start", "--data-dir", "d", "--listen", "127.0.0.1:1"];

    fn options(rest: &[&str]) -> Result<NodeOptions, clap::Error> {
        Start::try_parse_from(NODE.iter().chain(rest)).map(|start| start.arguments.into())
    }

    #[test]
    fn a_node_without_roles_leaves_them_to_its_addresses() {
        let options = options(&["--join", "127.0.0.1:1,127.0.0.1:2"]).expect("complete");
        assert_eq!(options.listen, "127.0.0.1:1");
        assert_eq!(options.join, ["127.0.0.1:1", "127.0.0.1:2"]);
        assert!(options.roles.is_none() && options.labels.is_empty());
    }

    #[test]
    fn roles_and_labels_are_taken_apart_at_commas() {
        let rest = ["--join", "a:1", "--roles", "store", "--labels", "zone=a,host=b"];
        let options = options(&rest).expect("complete");
        let roles = options.roles.expect("given");
        assert!(roles.store && !roles.placement);
        let labels =
            [("host", "b"), ("zone", "a")].map(|(key, value)| (key.to_owned(), value.to_owned()));
        assert_eq!(options.labels, labels);
    }

    #[test]
    fn malformed_labels_are_named() {
        assert_eq!("zone".parse::<Labels>(), Err(LabelsError::Malformed("zone".to_owned())));
        assert_eq!("zone=a,".parse::<Labels>(), Err(LabelsError::Malformed(String::new())));
        assert_eq!("zone=a,zone=b".parse::<Labels>(), Err(LabelsError::Twice("zone".to_owned())));
    }

    #[test]
    fn a_node_must_be_told_whom_to_join() {
        assert!(options(&[]).is_err());
        assert!(options(&["--join", ""]).is_err());
        assert!(options(&["--join", "a:1,nowhere"]).is_err());
    }
}
