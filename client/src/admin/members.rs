//! The members of the placement driver: their states, and the replacement of a member.

use std::time::Duration;

use esker_rpc::channel::Dialer;
use esker_rpc::members::MemberClient;
use esker_rpc::proto::esker as wire;
use esker_rpc::proto::esker::founding_client::FoundingClient;
use esker_rpc::proto::pdpb;
use futures_util::future::join_all;
use tokio::time::{Instant, sleep};

use super::AdminClient;
use super::store::connect;
use crate::error::ClientError;

/// For how long, and how often, the client asks again to replace a member.
const REPLACE_WITHIN: Duration = Duration::from_secs(10);
const REPLACE_AGAIN: Duration = Duration::from_millis(250);

/// How long a placement member may take to answer how it is.
const STATUS_TIMEOUT: Duration = Duration::from_secs(1);

/// A member of the placement driver.
#[derive(Clone, Debug, PartialEq)]
pub struct MemberInfo {
    /// Its name, id and addresses, as the leader knows them.
    pub member: pdpb::Member,
    /// Whether it is the leader.
    pub leads: bool,
    /// What it is doing.
    pub state: MemberState,
}

/// What a placement member is doing, as the member itself reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemberState {
    /// It takes part in the group.
    Up,
    /// It runs, and waits to be let in. Its directory is empty, or is being looked at.
    Waiting,
    /// It does not answer.
    Silent,
}

/// The ids of a member that was replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplacedMember {
    /// The id that is no longer a member.
    pub removed: u64,
    /// The id that took its place.
    pub added: u64,
}

/// Asks a member for its state.
async fn state_of(dialer: &Dialer, member: &pdpb::Member) -> MemberState {
    let address = member.client_urls.first().map_or("", |url| url.trim_start_matches("http://"));
    let Ok(client) = MemberClient::new(dialer, address) else { return MemberState::Silent };
    match client.status(STATUS_TIMEOUT).await {
        // It does not belong to a cluster yet.
        Ok(status) if status.cluster_id == 0 => MemberState::Waiting,
        Ok(status) if status.member_id == member.member_id => MemberState::Up,
        // Another member has its address by now.
        Ok(_) | Err(_) => MemberState::Silent,
    }
}

impl AdminClient {
    /// All members of the placement driver. Each is asked for its state, all at once. A member that
    /// does not answer within 1 s is silent.
    pub async fn members(&self) -> Result<Vec<MemberInfo>, ClientError> {
        let answer = self.placement.get_members().await?;
        let leader = answer.leader;
        let infos = answer.members.into_iter().map(|member| async {
            let state = state_of(self.placement.dialer(), &member).await;
            let leads = leader.as_ref().is_some_and(|leader| leader.member_id == member.member_id);
            MemberInfo { member, leads, state }
        });
        Ok(join_all(infos).await)
    }

    /// Lets the placement member of this name (`placement-1`, as [`members`](Self::members) shows
    /// it) join again under a new id, after it lost its directory. Its node must run, with an empty
    /// directory and the same addresses as before. The leader may take as long as it needs. When
    /// the leader cannot be asked, another one is asked, for up to 10 s.
    ///
    /// # Errors
    /// [`ClientError::NotReplaced`] if the leader refuses, or cannot be asked;
    /// [`ClientError::ReplacementUnknown`] if a leader was asked whose answer did not arrive.
    pub async fn replace_member(&self, name: &str) -> Result<ReplacedMember, ClientError> {
        let began = Instant::now();
        let mut unknown = false;
        let failed = |unknown: bool, reason: String| match unknown {
            true => ClientError::ReplacementUnknown { name: name.to_owned(), reason },
            false => ClientError::NotReplaced { reason },
        };
        loop {
            match self.try_replace(name, &mut unknown).await {
                Ok(answer) if answer.refusal.is_empty() => {
                    let id = |member: Option<wire::GroupMember>| member.map_or(0, |m| m.id);
                    let (removed, added) = (id(answer.removed), id(answer.added));
                    return Ok(ReplacedMember { removed, added });
                }
                // Also the refusal to do again what an earlier attempt may have done.
                Ok(answer) => return Err(failed(unknown, answer.refusal)),
                // The leader has just changed. The new leader continues where the old one was.
                Err(_) if began.elapsed() < REPLACE_WITHIN => sleep(REPLACE_AGAIN).await,
                Err(reason) => return Err(failed(unknown, reason)),
            }
        }
    }

    /// Sets `unknown` if the leader was asked, and no answer of it arrived.
    async fn try_replace(
        &self,
        name: &str,
        unknown: &mut bool,
    ) -> Result<wire::ReplaceMemberResponse, String> {
        let leader = self.placement.get_members().await.map_err(|error| error.to_string())?.leader;
        let address = leader.and_then(|leader| leader.client_urls.first().cloned());
        let address = address.ok_or("the placement driver has no leader; try again")?;
        // There is no limit to the answer, because the member has its own limit and a dead
        // connection is noticed.
        let channel = connect(self.placement.dialer(), &address, |endpoint| endpoint).await?;
        let request = wire::ReplaceMemberRequest { name: name.to_owned() };
        let answer = FoundingClient::new(channel).replace(request).await;
        *unknown |= answer.is_err();
        answer.map(tonic::Response::into_inner).map_err(|status| status.message().to_owned())
    }
}
