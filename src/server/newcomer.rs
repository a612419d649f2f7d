//! A node's placement member, also before it has an id and a group.
//!
//! The port is served from the beginning, so that members with empty directories can ask each
//! other. The placement driver's services are there, too, and refuse until the member's store is
//! open.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use esker_placement::{
    Leadership, MemberId, MemberInfo, Pairs, ReplicatedState, StateError, StateWrite,
};
use esker_rpc::proto::esker::founding_server::Founding;
use esker_rpc::proto::esker::{
    GroupMember, MemberStage, MemberStageRequest, ReplaceMemberRequest, ReplaceMemberResponse,
};
use futures_util::future::BoxFuture;
use tokio::sync::watch;
use tonic::{Request, Response, Status};

use super::founding::{Record, group_message};
use super::member::{MemberState, Members};
use super::recall::Recall;
use super::replacing;
use crate::Error;

/// The state of this node's member, which may not be open yet.
pub struct LateMember {
    members: Members,
    nonce: AtomicU64,
    /// Whether this node's store is in use, and so has belonged to a group.
    is_used: AtomicBool,
    /// The cluster that a request asked for here before there was one.
    asked_for: AtomicU64,
    /// The record of the member's group in its directory, until its store is open.
    record: OnceLock<Record>,
    /// What the member remembers of the others, when its directory is open.
    recall: OnceLock<Arc<Recall>>,
    state: OnceLock<Arc<MemberState>>,
    leadership: watch::Sender<Leadership>,
}

impl LateMember {
    pub fn new(members: Members) -> Self {
        LateMember {
            members,
            nonce: AtomicU64::new(0),
            is_used: AtomicBool::new(false),
            asked_for: AtomicU64::new(0),
            record: OnceLock::new(),
            recall: OnceLock::new(),
            state: OnceLock::new(),
            leadership: watch::Sender::new(Leadership::default()),
        }
    }

    /// The members of this node's configuration.
    pub fn configured(&self) -> &Members {
        &self.members
    }

    /// Notes that the member belongs to this group, while it is checked whether it may send
    /// messages.
    pub fn is_of(&self, record: Record) {
        let _ = self.record.set(record);
    }

    /// Lets the member answer what it remembers of others.
    pub fn remember(&self, recall: Arc<Recall>) {
        let _ = self.recall.set(recall);
    }

    /// Notes that the directory is empty. `lost` is a cluster that it is known to have lost, or
    /// zero, and `is_used` is whether the node's store is not empty.
    pub fn is_empty(&self, lost: u64, is_used: bool) {
        // A request may have named a cluster already.
        if lost != 0 {
            self.asked_for.store(lost, Ordering::Release);
        }
        self.is_used.store(is_used, Ordering::Release);
    }

    /// Offers the member to the others, under the number of its empty directory. They may found a
    /// group with it, or admit it.
    pub fn offer(&self, nonce: u64) {
        self.nonce.store(nonce, Ordering::Release);
    }

    /// Why the empty directory does not belong to a new group; `None` if it may.
    pub fn lost(&self, directory: &Path) -> Option<Error> {
        let path = directory.to_owned();
        match self.asked_for.load(Ordering::Acquire) {
            _ if self.is_used.load(Ordering::Acquire) => Some(Error::MemberLost { path }),
            0 => None,
            cluster => Some(Error::ClusterLost { path, cluster }),
        }
    }

    /// Notes that the member belongs to a group now, and is open.
    pub fn open(&self, state: Arc<MemberState>) {
        let mut leadership = state.leadership();
        let _ = self.state.set(state);
        self.nonce.store(0, Ordering::Release);
        let sender = self.leadership.clone();
        tokio::spawn(async move {
            loop {
                sender.send_replace(*leadership.borrow_and_update());
                if leadership.changed().await.is_err() {
                    return;
                }
            }
        });
    }

    fn stage(&self) -> MemberStage {
        let group = match (self.state.get(), self.record.get()) {
            (Some(state), _) => {
                let book = state.book();
                Some(group_message(book.record(), book.known()))
            }
            (None, Some(record)) => {
                let founders = record.founders.iter().map(GroupMember::from).collect();
                Some(group_message(record, founders))
            }
            (None, None) => None,
        };
        // Read before the values that were written before it.
        let nonce = self.nonce.load(Ordering::Acquire);
        let lost =
            self.is_used.load(Ordering::Acquire) || self.asked_for.load(Ordering::Acquire) != 0;
        MemberStage {
            name: self.members.name().to_owned(),
            nonce,
            group,
            join: self.members.tag,
            lost,
            known: None,
        }
    }
}

impl ReplicatedState for LateMember {
    fn write(
        &self,
        writes: Vec<StateWrite>,
        term: u64,
    ) -> BoxFuture<'static, Result<(), StateError>> {
        match self.state.get() {
            Some(state) => state.write(writes, term),
            None => Box::pin(std::future::ready(Err(StateError::NotLeader { leader: None }))),
        }
    }

    fn scan(&self, prefix: Vec<u8>) -> BoxFuture<'static, Result<Pairs, StateError>> {
        match self.state.get() {
            Some(state) => state.scan(prefix),
            None => Box::pin(std::future::ready(Err(StateError::NotLeader { leader: None }))),
        }
    }

    fn scan_stale(&self, prefix: Vec<u8>) -> BoxFuture<'static, Result<Pairs, StateError>> {
        match self.state.get() {
            Some(state) => state.scan_stale(prefix),
            None => Box::pin(std::future::ready(Ok(Pairs::new()))),
        }
    }

    fn leadership(&self) -> watch::Receiver<Leadership> {
        self.leadership.subscribe()
    }

    fn lease(&self) -> Option<u64> {
        self.state.get()?.lease()
    }

    fn heard_of_cluster(&self, cluster: u64) {
        if self.state.get().is_none() {
            self.asked_for.store(cluster, Ordering::Release);
        }
    }

    fn me(&self) -> MemberId {
        self.state.get().map_or(self.members.me, |state| state.me())
    }

    fn members(&self) -> Vec<MemberInfo> {
        self.state.get().map_or_else(|| self.members.all.clone(), |state| state.members())
    }
}

/// The service by which members find each other. A node without a member answers that it has none.
pub struct FoundingService(pub Option<Arc<LateMember>>);

#[tonic::async_trait]
impl Founding for FoundingService {
    async fn stage(
        &self,
        request: Request<MemberStageRequest>,
    ) -> Result<Response<MemberStage>, Status> {
        let Some(member) = &self.0 else { return Ok(Response::new(MemberStage::default())) };
        let mut stage = member.stage();
        if let (Some(memory), Some(recall)) = (request.into_inner().memory, member.recall.get()) {
            let recall = Arc::clone(recall);
            let heard = tokio::task::spawn_blocking(move || recall.hear(&memory)).await;
            stage.known = Some(heard.map_err(|error| Status::internal(error.to_string()))?);
        }
        Ok(Response::new(stage))
    }

    async fn replace(
        &self,
        request: Request<ReplaceMemberRequest>,
    ) -> Result<Response<ReplaceMemberResponse>, Status> {
        let not_leader = || Status::unavailable("not leader; no leader is known");
        let state = self.0.as_ref().and_then(|member| member.state.get()).cloned();
        let state = state.ok_or_else(not_leader)?;
        if state.lease().is_none() {
            return Err(not_leader());
        }
        let name = request.into_inner().name;
        // The change goes on if the caller hangs up, so that it is not left half done.
        let work = tokio::spawn(async move { replacing::replace(&state, &name).await });
        let outcome = work.await.map_err(|error| Status::internal(error.to_string()))?;
        Ok(Response::new(match outcome {
            Ok(replaced) => ReplaceMemberResponse {
                refusal: String::new(),
                removed: Some(replaced.removed),
                added: Some(replaced.added),
            },
            Err(refusal) => ReplaceMemberResponse { refusal, ..Default::default() },
        }))
    }
}
