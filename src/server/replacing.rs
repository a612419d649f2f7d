//! The replacement of a placement member that lost its directory, under a new id.
//!
//! The member that leads does it. Every step may be repeated, so a call is simply made again if its
//! connection broke or the leader was deposed:
//!
//! 1. the node at the member's address answers that its directory is empty, with its nonce;
//! 2. the nonce is recorded under a new id, which lets the node take that id;
//! 3. the new id becomes a learner, and gets the data;
//! 4. in one joint change it becomes a voter and the old id a learner, so that there are never
//!    fewer live voters than before;
//! 5. the old id is removed.

use std::time::Duration;

use esker_model::{PeerChange, PeerId, Role, Seat};
use esker_placement::{MemberId, ReplicatedState, StateWrite};
use esker_raftstore::{Admin, RegionStatus, ReplicaRole, RequestError};
use esker_rpc::proto::esker::GroupMember;
use tokio::time::Instant;

use super::founding;
use super::member::{MemberState, REGION, later_member, store_of, write_member};

/// How long a newcomer may take to get the state, which is small.
const FILLED_WITHIN: Duration = Duration::from_secs(60);
/// How long one change of members may take.
const CHANGED_WITHIN: Duration = Duration::from_secs(20);
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// The removed and the added member.
pub struct Replaced {
    pub removed: GroupMember,
    pub added: GroupMember,
}

/// Replaces the member of this name.
///
/// # Errors
/// Why it was not replaced or the replacement is not finished, and what to do.
pub async fn replace(state: &MemberState, name: &str) -> Result<Replaced, String> {
    // Two calls at once could give one id to two members.
    static ONE_AT_A_TIME: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
    let _alone = ONE_AT_A_TIME.lock().await;
    let status = leading(state).await?;
    let book = state.book();
    let mut of_name: Vec<GroupMember> =
        book.group().into_iter().filter(|member| member.name == name).collect();
    of_name.sort_by_key(|member| member.id);
    let Some(old) = of_name.first().cloned() else {
        let names: Vec<String> = book.group().into_iter().map(|member| member.name).collect();
        return Err(format!("there is no member {name:?}; there are {}", names.join(", ")));
    };
    let address = book.address(name).unwrap_or_default().to_owned();
    let stage = founding::ask(&address, None).await.ok_or_else(|| {
        format!("{name} at {address} does not answer; start it with an empty directory first")
    })?;
    if stage.name != name {
        return Err(format!("the node at {address} is not {name}; check its --join"));
    }
    let added = match &stage.group {
        // In an earlier call the newcomer has already joined.
        Some(_) if of_name.len() > 1 => of_name[of_name.len() - 1].clone(),
        Some(_) => {
            return Err(format!(
                "{name} at {address} has its directory and is a member: nothing is to be replaced"
            ));
        }
        None if stage.nonce == 0 => {
            return Err(format!("{name} at {address} is still starting; try again"));
        }
        None => written_down(state, &status, name, stage.nonce).await?,
    };
    let seat = |id: u64| Seat { peer: PeerId(id), store: store_of(MemberId(id)) };
    if status.region.peer(PeerId(added.id)).is_none() {
        change(state, vec![PeerChange::AddLearner(seat(added.id))]).await?;
    }
    filled(state, added.id).await?;
    // All other members of that name are removed: the one that was lost, and newcomers that were
    // lost before they were voters.
    let gone: Vec<GroupMember> =
        book.group().into_iter().filter(|m| m.name == name && m.id != added.id).collect();
    let status = leading(state).await?;
    let role = |id: u64| status.region.peer(PeerId(id)).map(|peer| peer.role);
    let mut swap = Vec::new();
    if role(added.id) == Some(Role::Learner) {
        swap.push(PeerChange::AddVoter(seat(added.id)));
    }
    for member in gone.iter().filter(|member| role(member.id) == Some(Role::Voter)) {
        swap.push(PeerChange::AddLearner(seat(member.id)));
    }
    if !swap.is_empty() {
        change(state, swap).await?;
    }
    for member in &gone {
        change(state, vec![PeerChange::Remove(seat(member.id))]).await?;
    }
    tracing::info!(name, removed = old.id, added = added.id, "a placement member was replaced");
    Ok(Replaced { removed: old, added })
}

/// The group as its leader sees it.
async fn leading(state: &MemberState) -> Result<RegionStatus, String> {
    let status = state.store().status(REGION).await.map_err(|error| error.to_string())?;
    match status.role {
        ReplicaRole::Leader => Ok(status),
        _ => Err("this member no longer leads; try again".to_owned()),
    }
}

/// Gives the newcomer an id. A repeated call returns the same one.
async fn written_down(
    state: &MemberState,
    status: &RegionStatus,
    name: &str,
    nonce: u64,
) -> Result<GroupMember, String> {
    let later = state.book().later();
    if let Some(known) = later.iter().find(|m| m.name == name && m.nonce == nonce) {
        return Ok(known.clone());
    }
    // Never an id that a member had before, because the votes under it are not the newcomer's.
    let founders = state.book().record().founders.iter().map(|founder| founder.id);
    let peers = status.region.peers.iter().map(|peer| peer.id.0);
    let highest = founders.chain(peers).chain(later.iter().map(|m| m.id)).max().unwrap_or(0);
    let member = GroupMember { id: highest + 1, name: name.to_owned(), nonce };
    let write = StateWrite::Put { key: later_member(member.id), value: write_member(&member) };
    state.write(vec![write], status.term.0).await.map_err(|error| error.to_string())?;
    Ok(member)
}

/// Carries out one change of members, and waits until it has taken effect.
async fn change(state: &MemberState, changes: Vec<PeerChange>) -> Result<(), String> {
    let deadline = Instant::now() + CHANGED_WITHIN;
    loop {
        let status = leading(state).await?;
        let why = if status.region.in_joint() {
            "an earlier change of members is not finished".to_owned()
        } else {
            let admin = Admin::ChangePeers(changes.clone());
            match state.store().admin(REGION, status.region.epoch, admin).await {
                Ok(_) => return Ok(()),
                Err(
                    error @ (RequestError::EpochNotMatch { .. }
                    | RequestError::ServerIsBusy { .. }
                    | RequestError::Change(esker_raftstore::region::ChangeError::Joint(_))),
                ) => error.to_string(),
                Err(error) => return Err(format!("{error}; try again")),
            }
        };
        if Instant::now() >= deadline {
            return Err(format!("{why}; try again"));
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

/// Waits until the newcomer holds what the leader had applied when the wait began.
async fn filled(state: &MemberState, id: u64) -> Result<(), String> {
    let deadline = Instant::now() + FILLED_WITHIN;
    let goal = leading(state).await?.applied;
    loop {
        let status = leading(state).await?;
        let progress = status.progress.iter().find(|progress| progress.peer.0 == id);
        if progress.is_some_and(|progress| progress.matched >= goal) {
            return Ok(());
        }
        if Instant::now() >= deadline {
            return Err(format!(
                "the new member does not hold the state within {} s; is its node running? try again",
                FILLED_WITHIN.as_secs()
            ));
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}
