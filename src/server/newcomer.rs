//! A node's placement member, from before it knows what it is.
//!
//! The port is served from the beginning, so that members with empty directories can ask
//! each other; the placement driver's services are there, too, and refuse until the
//! member's store is open.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use esker_placement::{
    Leadership, MemberId, MemberInfo, Pairs, ReplicatedState, StateError, StateWrite,
};
use esker_rpc::proto::esker::founding_server::Founding;
use esker_rpc::proto::esker::{
    MemberStage, MemberStageRequest, ReplaceMemberRequest, ReplaceMemberResponse,
};
use futures_util::future::BoxFuture;
use tokio::sync::watch;
use tonic::{Request, Response, Status};

use super::founding::group_message;
use super::member::{MemberState, Members};
use super::replacing;

/// The state of this node's member: of one that is yet to be, none.
pub struct LateMember {
    members: Members,
    nonce: AtomicU64,
    state: OnceLock<Arc<MemberState>>,
    leadership: watch::Sender<Leadership>,
}

impl LateMember {
    pub fn new(members: Members) -> Self {
        LateMember {
            members,
            nonce: AtomicU64::new(0),
            state: OnceLock::new(),
            leadership: watch::Sender::new(Leadership::default()),
        }
    }

    /// The members as this node was told.
    pub fn configured(&self) -> &Members {
        &self.members
    }

    /// The directory is empty, and this number stands for it.
    pub fn is_empty_with(&self, nonce: u64) {
        self.nonce.store(nonce, Ordering::Release);
    }

    /// The member is one of a group now.
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
        let group = self.state.get().map(|state| {
            let book = state.book();
            group_message(book.record(), book.known())
        });
        let nonce = self.nonce.load(Ordering::Acquire);
        MemberStage { name: self.members.name().to_owned(), nonce, group }
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

    fn me(&self) -> MemberId {
        self.state.get().map_or(self.members.me, |state| state.me())
    }

    fn members(&self) -> Vec<MemberInfo> {
        self.state.get().map_or_else(|| self.members.all.clone(), |state| state.members())
    }
}

/// The service by which members find each other; on a node without one it says so.
pub struct FoundingService(pub Option<Arc<LateMember>>);

#[tonic::async_trait]
impl Founding for FoundingService {
    async fn stage(&self, _: Request<MemberStageRequest>) -> Result<Response<MemberStage>, Status> {
        let stage = self.0.as_ref().map(|member| member.stage());
        Ok(Response::new(stage.unwrap_or_default()))
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
        // A caller who hangs up does not leave a change half made.
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
