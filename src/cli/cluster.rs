//! Which cluster a command is for, and the clients for it.

use std::time::Duration;

use clap::Args;
use esker_client::placement::CONNECT_DEADLINE;
use esker_client::{AdminClient, ClientError, KvClient, PlacementClient};

use super::error::CliError;
use crate::node::Address;

/// The heading of these arguments in the help of every command that has them.
const CLUSTER_HEADING: &str = "Cluster";

/// Where the placement driver is, for commands without `--placement`.
pub const VARIABLE: &str = "ESKER_PLACEMENT";

/// Which cluster a command is for, and how to print its answers.
#[derive(Debug, Args)]
pub struct ClusterArguments {
    /// Members of the cluster's placement driver; one that answers is enough
    #[arg(
        long,
        global = true,
        value_name = "HOST:PORT,...",
        value_delimiter = ',',
        env = VARIABLE,
        hide_env_values = true,
        default_value = "127.0.0.1:2379",
        help_heading = CLUSTER_HEADING
    )]
    pub placement: Vec<Address>,
    /// Prints JSON, for programs
    #[arg(long, global = true, help_heading = CLUSTER_HEADING)]
    pub json: bool,
}

impl ClusterArguments {
    /// A client for keys.
    pub async fn kv(&self) -> Result<KvClient, CliError> {
        Ok(KvClient::new(self.connect_within(CONNECT_DEADLINE).await?, []))
    }

    /// A client for everything else.
    pub async fn admin(&self) -> Result<AdminClient, CliError> {
        Ok(AdminClient::new(self.connect_within(CONNECT_DEADLINE).await?))
    }

    /// Looks for a leader of the placement driver, within `deadline`.
    async fn connect_within(&self, deadline: Duration) -> Result<PlacementClient, CliError> {
        let endpoints = self.placement.iter().map(ToString::to_string).collect();
        let connected = PlacementClient::connect_within(endpoints, deadline).await;
        connected.map_err(|error| match (error, self.placement.len()) {
            (error @ ClientError::PlacementUnreachable { .. }, members @ 2..) => {
                CliError::ConnectToMost { error, members }
            }
            (error, _) => CliError::Connect(error),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_cluster_that_is_not_there_is_a_failure_that_names_the_address() {
        let free = std::net::TcpListener::bind("127.0.0.1:0").expect("loopback has a free port");
        let address = free.local_addr().expect("it is bound").to_string();
        drop(free);
        let placement = address.parse().expect("what a socket says is an address");
        let arguments = ClusterArguments { placement: vec![placement], json: false };
        let connected = arguments.connect_within(Duration::from_millis(100)).await;
        let text = connected.err().expect("nobody listens").to_string();
        assert!(text.contains(&address) && text.contains("--placement HOST:PORT"), "{text}");
    }
}
