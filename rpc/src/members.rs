//! What the members of the placement driver ask each other, and how often the leading member sends
//! a sign of life to the stores.

use std::time::Duration;

use tonic::transport::Channel;

use crate::channel::{self, AddressError, Dialer};
use crate::proto::esker::members_client::MembersClient;
use crate::proto::esker::{MemberStatusRequest, MemberStatusResponse};

/// How often a leader sends a sign of life on each stream of heartbeats: a message about no region.
pub const BEAT_INTERVAL: Duration = Duration::from_millis(300);

/// A connection to one member, opened when it is first used and again when it breaks.
#[derive(Clone)]
pub struct MemberClient {
    dialer: Dialer,
    address: String,
    client: MembersClient<Channel>,
}

impl MemberClient {
    /// A client that has not connected yet. Must be called within a runtime.
    ///
    /// # Errors
    /// Only for a text that is not `host:port`.
    pub fn new(dialer: &Dialer, address: &str) -> Result<Self, AddressError> {
        let channel = dialer.connect_lazy(address)?;
        Ok(MemberClient {
            dialer: dialer.clone(),
            address: address.to_owned(),
            client: MembersClient::new(channel),
        })
    }

    /// The same on a connection of its own, for when this one seems to be dead.
    pub fn reopened(&self) -> Self {
        MemberClient::new(&self.dialer, &self.address).unwrap_or_else(|_| self.clone())
    }

    /// The address as it was given.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// What the member reports of itself, or one line about why there is no answer.
    pub async fn status(&self, within: Duration) -> Result<MemberStatusResponse, String> {
        let mut client = self.client.clone();
        let asked = client.member_status(MemberStatusRequest {});
        match tokio::time::timeout(within, asked).await {
            Ok(Ok(answer)) => Ok(answer.into_inner()),
            Ok(Err(status)) => Err(format!("{}: {}", self.address, channel::describe(&status))),
            Err(_) => Err(format!("{}: no answer within {within:?}", self.address)),
        }
    }
}
