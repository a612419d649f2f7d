//! A cluster as the commands see it: through the placement driver, and through the
//! admin service of one store.

use std::time::Duration;

use clap::Args;
use esker_client::placement::CONNECT_DEADLINE;
use esker_client::{ClientError, KvClient, PlacementClient};
use esker_rpc::members::MemberClient;
use esker_rpc::proto::esker as wire;
use esker_rpc::proto::esker::admin_client::AdminClient;
use esker_rpc::proto::esker::founding_client::FoundingClient;
use esker_rpc::proto::pdpb;
use futures_util::future::join_all;
use tonic::transport::{Channel, Endpoint};

use super::error::CliError;
use super::key::Text;
use super::placement::ReplacedView;
use super::view::{MemberState, MemberView, RegionView};
use crate::node::Address;

/// Regions asked for in one request.
const REGION_PAGE: u32 = 1_024;

/// How long a store may take to accept a connection, and to answer.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// For how long, and how often, another leader is asked to replace a member.
const REPLACE_WITHIN: Duration = Duration::from_secs(10);
const REPLACE_AGAIN: Duration = Duration::from_millis(250);

/// How long a placement member may take to say how it is.
const STATUS_TIMEOUT: Duration = Duration::from_secs(1);

/// Where these stand in the help of every command that has them.
const CLUSTER_HEADING: &str = "Cluster";

/// Where the placement driver is, for commands that are not told.
pub const VARIABLE: &str = "ESKER_PLACEMENT";

/// Which cluster, and how to print what it says.
#[derive(Debug, Args)]
pub struct ClusterArguments {
    /// Members of the cluster's placement driver, of which one that answers is enough
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

/// What a member says of itself.
async fn state_of(member: &pdpb::Member) -> MemberState {
    let address = member.client_urls.first().map_or("", |url| url.trim_start_matches("http://"));
    let Ok(client) = MemberClient::new(address) else { return MemberState::Silent };
    match client.status(STATUS_TIMEOUT).await {
        // Of no cluster yet.
        Ok(status) if status.cluster_id == 0 => MemberState::Waiting,
        Ok(status) if status.member_id == member.member_id => MemberState::Up,
        // Another one has its address by now.
        Ok(_) | Err(_) => MemberState::Silent,
    }
}

pub struct Cluster {
    placement: PlacementClient,
}

impl Cluster {
    pub async fn connect(arguments: &ClusterArguments) -> Result<Self, CliError> {
        Self::connect_within(arguments, CONNECT_DEADLINE).await
    }

    /// The same with another limit to how long a leader is looked for.
    pub async fn connect_within(
        arguments: &ClusterArguments,
        deadline: Duration,
    ) -> Result<Self, CliError> {
        let endpoints = arguments.placement.iter().map(ToString::to_string).collect();
        let connected = PlacementClient::connect_within(endpoints, deadline).await;
        let placement = connected.map_err(CliError::Connect)?;
        Ok(Cluster { placement })
    }

    /// A client for keys, of the same cluster.
    pub fn kv(&self) -> KvClient {
        KvClient::new(self.placement.clone(), [])
    }

    /// All regions, in the order of their keys.
    pub async fn regions(&self) -> Result<Vec<RegionView>, CliError> {
        let mut regions: Vec<RegionView> = Vec::new();
        loop {
            // A page starts where the last one ended; the first one at the first key.
            let start = regions.last().map(|region| region.end_key.0.clone()).unwrap_or_default();
            let found =
                self.placement.scan_regions(start.clone(), Default::default(), REGION_PAGE).await?;
            let page = found.into_iter().map(RegionView::from);
            let before = regions.len();
            // One that does not go on behind the last one is not news.
            regions.extend(page.filter(|region| before == 0 || region.start_key.0 >= start));
            let complete = regions.last().is_none_or(|last| last.end_key.0.is_empty());
            if complete || regions.len() == before {
                return Ok(regions);
            }
        }
    }

    pub async fn region(&self, id: u64) -> Result<RegionView, CliError> {
        let found = self.placement.region_by_id(id).await?;
        found.map(RegionView::from).ok_or(CliError::NoSuchRegion(id))
    }

    pub async fn region_of(&self, key: &Text) -> Result<RegionView, CliError> {
        let found = self.placement.region_by_key(key.0.clone()).await?;
        found.map(RegionView::from).ok_or_else(|| CliError::NoRegionFor(key.clone()))
    }

    /// Every store, by id, and whether placement has heard from it.
    pub async fn store_states(&self) -> Result<Vec<wire::StoreState>, CliError> {
        Ok(self.placement.store_states().await?)
    }

    /// Where a store listens.
    pub async fn address(&self, store: u64) -> Result<String, CliError> {
        match self.placement.get_store(store).await {
            Ok((known, _)) => Ok(known.address),
            Err(ClientError::PlacementRefused { kind: pdpb::ErrorType::EntryNotFound, .. }) => {
                Err(CliError::NoSuchStore(store))
            }
            Err(error) => Err(error.into()),
        }
    }

    pub async fn members(&self) -> Result<Vec<MemberView>, CliError> {
        let answer = self.placement.get_members().await?;
        let leader = answer.leader;
        let views = answer.members.into_iter().map(|member| async {
            let state = state_of(&member).await;
            MemberView::new(member, leader.as_ref(), state)
        });
        Ok(join_all(views).await)
    }

    /// Replaces a placement member that lost its directory.
    pub async fn replace_member(&self, name: &str) -> Result<ReplacedView, CliError> {
        let began = tokio::time::Instant::now();
        loop {
            match self.try_replace(name).await {
                Ok(answer) if answer.refusal.is_empty() => {
                    let id = |member: Option<wire::GroupMember>| member.map_or(0, |m| m.id);
                    let (removed, added) = (id(answer.removed), id(answer.added));
                    return Ok(ReplacedView { name: name.to_owned(), removed, added });
                }
                Ok(answer) => return Err(CliError::NotReplaced(answer.refusal)),
                // The leader has just changed: another one goes on where it was.
                Err(_) if began.elapsed() < REPLACE_WITHIN => {
                    tokio::time::sleep(REPLACE_AGAIN).await;
                }
                Err(reason) => return Err(CliError::NotReplaced(reason)),
            }
        }
    }

    async fn try_replace(&self, name: &str) -> Result<wire::ReplaceMemberResponse, String> {
        let leader = self.placement.get_members().await.map_err(|error| error.to_string())?.leader;
        let address = leader.and_then(|leader| leader.client_urls.first().cloned());
        let address = address.ok_or("the placement driver has no leader; try again")?;
        // No limit to the answer: the member has its own, and a dead connection is noticed.
        let channel = connect(&address, |endpoint| endpoint).await?;
        let request = wire::ReplaceMemberRequest { name: name.to_owned() };
        let answer = FoundingClient::new(channel).replace(request).await;
        answer.map(tonic::Response::into_inner).map_err(|status| status.message().to_owned())
    }

    /// One timestamp: its milliseconds since 1970, and its logical part.
    pub async fn timestamp(&self) -> Result<(u64, u64), CliError> {
        let last = self.placement.tso(1).await?;
        let part = |number: i64| u64::try_from(number).unwrap_or(0);
        Ok((part(last.physical), part(last.logical)))
    }

    /// The admin service of a store.
    pub async fn admin(&self, store: u64) -> Result<StoreAdmin, CliError> {
        let address = self.address(store).await?;
        match connect(&address, |endpoint| endpoint.timeout(ANSWER_TIMEOUT)).await {
            Ok(channel) => Ok(StoreAdmin { store, address, client: AdminClient::new(channel) }),
            Err(reason) => Err(CliError::Store { store, address, reason }),
        }
    }
}

/// Connects to one of the cluster's servers.
async fn connect(
    address: &str,
    adjusted: impl FnOnce(Endpoint) -> Endpoint,
) -> Result<Channel, String> {
    let endpoint = esker_rpc::channel::endpoint(address).map_err(|error| error.to_string())?;
    let connected = adjusted(endpoint.connect_timeout(CONNECT_TIMEOUT)).connect().await;
    connected.map_err(|error| causes(&error))
}

/// An error and what caused it: the transport's own message does not say.
fn causes(error: &dyn std::error::Error) -> String {
    std::iter::successors(Some(error), |error| error.source())
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(": ")
}

/// The admin service of one store.
pub struct StoreAdmin {
    store: u64,
    address: String,
    client: AdminClient<Channel>,
}

impl StoreAdmin {
    pub async fn split_region(
        mut self,
        request: wire::SplitRegionRequest,
    ) -> Result<wire::SplitRegionResponse, CliError> {
        let answer = self.client.split_region(request).await;
        self.answer(answer)
    }

    pub async fn transfer_leader(
        mut self,
        request: wire::TransferLeaderRequest,
    ) -> Result<wire::TransferLeaderResponse, CliError> {
        let answer = self.client.transfer_leader(request).await;
        self.answer(answer)
    }

    pub async fn region_detail(
        mut self,
        request: wire::RegionDetailRequest,
    ) -> Result<wire::RegionDetailResponse, CliError> {
        let answer = self.client.region_detail(request).await;
        self.answer(answer)
    }

    fn answer<T>(self, answer: Result<tonic::Response<T>, tonic::Status>) -> Result<T, CliError> {
        match answer {
            Ok(answer) => Ok(answer.into_inner()),
            Err(status) => Err(CliError::Store {
                store: self.store,
                address: self.address,
                reason: status.message().to_owned(),
            }),
        }
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
        let connected = Cluster::connect_within(&arguments, Duration::from_millis(100)).await;
        let text = connected.err().expect("nobody listens").to_string();
        assert!(text.contains(&address) && text.contains("--placement HOST:PORT"), "{text}");
    }
}
