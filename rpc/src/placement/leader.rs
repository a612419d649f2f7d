//! Which member leads, and the connection to it.

use std::time::{Duration, Instant};

use parking_lot::RwLock;
use tonic::transport::Channel;

use super::{FIRST_RETRY, LONGEST_RETRY};
use crate::backoff::Backoff;
use crate::channel;
use crate::error::{ClientError, waited_since};
use crate::proto::pdpb::pd_client::PdClient;
use crate::proto::pdpb::{GetMembersRequest, GetMembersResponse, Member};

/// How long one member may take to say who leads.
const ASK_TIMEOUT: Duration = Duration::from_secs(2);

/// Endpoints that are remembered; a placement driver has a handful of members.
const MAX_ENDPOINTS: usize = 32;

/// The leader as it is known, shared by all calls.
pub(super) struct Leader {
    cluster_id: u64,
    known: RwLock<Known>,
    /// Held by the one who looks, so that a hundred failed calls look once.
    looking: tokio::sync::Mutex<()>,
}

struct Known {
    endpoints: Vec<String>,
    current: Current,
}

/// A connection to the member that led when it was found.
#[derive(Clone)]
pub(super) struct Current {
    pub(super) address: String,
    pub(super) channel: Channel,
    /// Grows with every search, so that a caller can say which connection failed it.
    pub(super) generation: u64,
}

/// What one member said.
struct Found {
    cluster_id: u64,
    address: String,
    channel: Channel,
    endpoints: Vec<String>,
}

impl Leader {
    pub(super) async fn find(
        endpoints: Vec<String>,
        deadline: Duration,
    ) -> Result<Self, ClientError> {
        if endpoints.is_empty() {
            return Err(ClientError::NoEndpoints);
        }
        for address in &endpoints {
            channel::endpoint(address)?;
        }
        let started = Instant::now();
        let mut backoff = Backoff::new(FIRST_RETRY, LONGEST_RETRY);
        loop {
            let reason = match look(&endpoints, None).await {
                Ok(found) => {
                    let current =
                        Current { address: found.address, channel: found.channel, generation: 0 };
                    let endpoints = merge(found.endpoints, endpoints);
                    return Ok(Leader {
                        cluster_id: found.cluster_id,
                        known: RwLock::new(Known { endpoints, current }),
                        looking: tokio::sync::Mutex::new(()),
                    });
                }
                Err(Miss::Fatal(error)) => return Err(error),
                Err(Miss::Again(reason)) => reason,
            };
            let wait = backoff.step();
            if started.elapsed() + wait >= deadline {
                return Err(ClientError::PlacementUnreachable {
                    endpoints: endpoints.join(","),
                    waited: waited_since(started),
                    reason,
                });
            }
            tokio::time::sleep(wait).await;
        }
    }

    pub(super) fn cluster_id(&self) -> u64 {
        self.cluster_id
    }

    pub(super) fn current(&self) -> Current {
        self.known.read().current.clone()
    }

    pub(super) fn address(&self) -> String {
        self.known.read().current.address.clone()
    }

    /// The endpoints that would be asked, for error messages.
    pub(super) fn known(&self) -> String {
        self.known.read().endpoints.join(",")
    }

    /// Looks for the leader once, unless somebody has since the connection of this generation was
    /// handed out. Without success everything stays as it was.
    pub(super) async fn refresh(&self, failed_generation: u64) {
        let _looking = self.looking.lock().await;
        let (endpoints, generation) = {
            let known = self.known.read();
            (known.endpoints.clone(), known.current.generation)
        };
        if generation != failed_generation {
            return;
        }
        match look(&endpoints, Some(self.cluster_id)).await {
            Ok(found) => {
                let mut known = self.known.write();
                known.endpoints = merge(found.endpoints, endpoints);
                let generation = generation + 1;
                known.current =
                    Current { address: found.address, channel: found.channel, generation };
            }
            Err(Miss::Again(reason)) => tracing::debug!(reason, "no placement leader found"),
            Err(Miss::Fatal(error)) => tracing::warn!(%error, "no placement leader found"),
        }
    }
}

enum Miss {
    Again(String),
    Fatal(ClientError),
}

/// Asks the endpoints in turn until one names a leader that answers.
async fn look(endpoints: &[String], cluster: Option<u64>) -> Result<Found, Miss> {
    let mut reason = String::new();
    for address in endpoints {
        let (channel, members) = match ask(address).await {
            Ok(answer) => answer,
            Err(miss) => {
                reason = miss;
                continue;
            }
        };
        let cluster_id = members.header.as_ref().map_or(0, |header| header.cluster_id);
        if let Some(expected) = cluster
            && expected != cluster_id
        {
            let address = address.clone();
            let error = ClientError::ClusterMismatch { address, expected, actual: cluster_id };
            // Another endpoint may still be one of ours.
            reason = error.to_string();
            tracing::warn!(%error, "a placement member was replaced");
            continue;
        }
        let Some(leader) = members.leader.clone() else {
            reason = format!("{address} knows of no leader");
            continue;
        };
        let endpoints = urls(&members.members);
        // The member that was asked may lead itself, under a name that we reach it by.
        let own = leader.client_urls.iter().any(|url| bare(url) == bare(address));
        if own {
            return Ok(Found { cluster_id, address: address.clone(), channel, endpoints });
        }
        for url in &leader.client_urls {
            match ask(url).await {
                Ok((channel, answer)) => {
                    let actual = answer.header.as_ref().map_or(0, |header| header.cluster_id);
                    if actual != cluster_id {
                        return Err(Miss::Fatal(ClientError::ClusterMismatch {
                            address: url.clone(),
                            expected: cluster_id,
                            actual,
                        }));
                    }
                    return Ok(Found { cluster_id, address: bare(url).into(), channel, endpoints });
                }
                Err(miss) => reason = miss,
            }
        }
    }
    Err(Miss::Again(reason))
}

/// One member's view of who is there.
async fn ask(address: &str) -> Result<(Channel, GetMembersResponse), String> {
    let asking = async {
        let channel = channel::connect(address).await?;
        let mut client = PdClient::new(channel.clone());
        let members = client
            .get_members(GetMembersRequest::default())
            .await
            .map_err(|status| format!("{address}: {}", channel::describe(&status)))?
            .into_inner();
        match members.header.as_ref() {
            None => return Err(format!("{address}: not a placement driver")),
            Some(header) => {
                if let Some(error) = &header.error {
                    return Err(format!("{address}: {}", error.message));
                }
            }
        }
        Ok((channel, members))
    };
    tokio::time::timeout(ASK_TIMEOUT, asking)
        .await
        .unwrap_or_else(|_| Err(format!("{address}: no answer within {ASK_TIMEOUT:?}")))
}

fn bare(url: &str) -> &str {
    url.trim().trim_start_matches("http://").trim_end_matches('/')
}

fn urls(members: &[Member]) -> Vec<String> {
    members.iter().flat_map(|m| &m.client_urls).map(|url| bare(url).into()).collect()
}

/// The members' own addresses first, then those that we were given, which may be the only ones
/// that work from here.
fn merge(found: Vec<String>, given: Vec<String>) -> Vec<String> {
    let mut merged: Vec<String> = Vec::new();
    for address in found.into_iter().chain(given) {
        if merged.len() < MAX_ENDPOINTS && !merged.iter().any(|known| bare(known) == bare(&address))
        {
            merged.push(address);
        }
    }
    merged
}
