//! The placement driver on the wire: the gRPC services `pdpb.PD`,
//! `keyspacepb.Keyspace` and `esker.PlacementAdmin`, and the HTTP pages that tools read.
//!
//! A member that does not lead answers `GetMembers` with the leader's address (`server/roll.rs`), and
//! everything else with gRPC `UNAVAILABLE` after a short wait. Clients then look up the leader
//! again. The wait matters, because published clients retry at once a small number of times, but
//! look up the leader at most once a second.
//!
//! A request for another cluster is an error in the response's header. The connection stays open.

mod admin;
pub(crate) mod checks;
pub(crate) mod convert;
mod headers;
mod http;
mod keyspace;
mod pd;
mod regions;
mod roll;
mod stores;
mod streams;

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::Router;
use esker_model::Clock;
use esker_rpc::channel::Dialer;
use esker_rpc::proto::esker::members_server::MembersServer;
use esker_rpc::proto::esker::placement_admin_server::PlacementAdminServer;
use esker_rpc::proto::keyspacepb::keyspace_server::KeyspaceServer;
use esker_rpc::proto::pdpb;
use esker_rpc::proto::pdpb::pd_server::PdServer;
use tokio::sync::watch;
use tonic::{Response, Status};

use self::headers::ResponseWithHeader;
use self::roll::{Roll, RollCall};
use crate::lead::{Lead, LeadError, PATIENCE, office};
use crate::operator::OperatorLimits;
use crate::schedule::ScheduleConfig;
use crate::state::{DamagedState, MemberInfo, ReplicatedState};

pub use admin::AdminService;
pub use keyspace::KeyspaceService;
pub use pd::PdService;
pub use roll::MembersService;

/// How long a member that does not lead waits for a leader before it refuses. Clients try up to ten
/// times in a row. Ten refusals last longer than the second for which clients do not look up the
/// leader again.
const REFUSAL_PATIENCE: Duration = Duration::from_millis(250);

/// The shortest life of a stream of timestamps, also of one that is refused. A published client
/// fails every request at once when its stream is gone, and opens a new stream only when it last
/// connected more than a second ago.
pub(crate) const MIN_STREAM_LIFE: Duration = Duration::from_millis(1_100);

/// How a member of the placement driver runs.
#[derive(Clone, Debug)]
pub struct PlacementConfig {
    pub name: String,
    pub schedule: ScheduleConfig,
    pub limits: OperatorLimits,
    /// How often regions are patrolled and leaders balanced.
    pub schedule_interval: Duration,
    /// How it reaches the other members.
    pub dialer: Dialer,
}

impl PlacementConfig {
    /// The settings of a member with this name, and with all others at their defaults.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            schedule: ScheduleConfig::default(),
            limits: OperatorLimits::default(),
            schedule_interval: Duration::from_millis(500),
            dialer: Dialer::default(),
        }
    }
}

/// The state that the services, the pages and the background task of a member share.
pub(crate) struct Shared {
    pub config: PlacementConfig,
    pub state: Arc<dyn ReplicatedState>,
    pub clock: Arc<dyn Clock>,
    /// Zero until the id is known.
    cluster_id: AtomicU64,
    pub lead: watch::Sender<Option<Arc<Lead>>>,
    roll_call: RollCall,
}

impl Shared {
    pub fn cluster_id(&self) -> Option<u64> {
        match self.cluster_id.load(Ordering::Acquire) {
            0 => None,
            id => Some(id),
        }
    }

    pub fn set_cluster_id(&self, id: u64) {
        self.cluster_id.store(id, Ordering::Release);
    }

    /// This member's lead. Waits a moment for a term of office that is about to begin, and for a
    /// lease that is late.
    pub async fn lead(&self) -> Result<Arc<Lead>, Status> {
        self.lead_within(REFUSAL_PATIENCE).await
    }

    /// As [`Shared::lead`], but waits for `patience` if this member is not elected, and longer if
    /// it is elected and only has to load its state.
    pub async fn lead_within(&self, patience: Duration) -> Result<Arc<Lead>, Status> {
        let mut leads = self.lead.subscribe();
        let is_elected = self.state.leadership().borrow().is_self;
        let patience = if is_elected { PATIENCE } else { patience };
        let lead = tokio::time::timeout(patience, leads.wait_for(Option::is_some))
            .await
            .ok()
            .and_then(Result::ok)
            .and_then(|lead| lead.clone());
        let Some(lead) = lead else {
            return Err(self.not_leader());
        };
        match lead.current().await {
            Ok(()) => Ok(lead),
            Err(_) => Err(self.not_leader()),
        }
    }

    /// Whether this member leads and serves, under a lease that holds right now.
    pub fn leads(&self) -> bool {
        self.lead.borrow().as_ref().is_some_and(|lead| lead.is_current())
    }

    /// Which members answer, and which one leads.
    pub async fn roll(&self) -> Arc<Roll> {
        self.roll_call.take(self).await
    }

    /// The refusal that makes a client look up the leader again.
    pub fn not_leader(&self) -> Status {
        let leader = self.leader();
        Status::unavailable(leader.map_or_else(
            || "not leader; no leader is known".to_owned(),
            |leader| format!("not leader; {} at {} is", leader.name, leader.address),
        ))
    }

    /// The member that leads, as far as this member knows. It may be gone.
    pub fn leader(&self) -> Option<MemberInfo> {
        let leader = self.state.leadership().borrow().leader?;
        self.state.members().into_iter().find(|member| member.id == leader)
    }

    /// Gives a response its header.
    pub fn answer<R: ResponseWithHeader>(
        &self,
        answer: Result<R, Refusal>,
    ) -> Result<Response<R>, Status> {
        let (mut response, error) = match answer {
            Ok(response) => (response, None),
            Err(Refusal::Header(error)) => (R::default(), Some(error)),
            Err(Refusal::Status(status)) => return Err(status),
        };
        response
            .set_header(pdpb::ResponseHeader { cluster_id: self.cluster_id().unwrap_or(0), error });
        Ok(Response::new(response))
    }

    /// Whether a request is meant for this cluster.
    pub fn check_cluster(
        &self,
        lead: &Lead,
        header: Option<&pdpb::RequestHeader>,
    ) -> Result<(), Refusal> {
        let asked = header.map_or(0, |header| header.cluster_id);
        if asked == lead.cluster_id {
            return Ok(());
        }
        Err(Refusal::header(
            pdpb::ErrorType::Unknown,
            format!("the request is for cluster {asked}, but this is cluster {}", lead.cluster_id),
        ))
    }
}

/// A failed request: an error in the response's header, or a status in place of the response.
#[derive(Debug)]
pub(crate) enum Refusal {
    Header(pdpb::Error),
    Status(Status),
}

impl Refusal {
    pub fn header(kind: pdpb::ErrorType, message: impl Into<String>) -> Self {
        Self::Header(pdpb::Error { r#type: kind.into(), message: message.into() })
    }

    /// The refusal of a request with an impossible content.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::header(pdpb::ErrorType::InvalidValue, message)
    }
}

impl From<convert::Malformed> for Refusal {
    fn from(malformed: convert::Malformed) -> Self {
        Self::invalid(malformed.to_string())
    }
}

impl From<LeadError> for Refusal {
    fn from(error: LeadError) -> Self {
        match error {
            LeadError::Deposed { .. } => {
                Self::Status(Status::unavailable(format!("not leader; {error}")))
            }
            LeadError::Slow => Self::Status(Status::unavailable(error.to_string())),
            LeadError::Ids(_) | LeadError::Timestamps(_) => Self::invalid(error.to_string()),
        }
    }
}

/// One member of the placement driver.
#[derive(Clone)]
pub struct PlacementServer {
    shared: Arc<Shared>,
}

impl PlacementServer {
    /// A member that keeps its state in `state`. It serves nothing before [`PlacementServer::run`]
    /// is polled.
    pub fn new(
        config: PlacementConfig,
        state: Arc<dyn ReplicatedState>,
        clock: Arc<dyn Clock>,
    ) -> Self {
        Self {
            shared: Arc::new(Shared {
                config,
                state,
                clock,
                cluster_id: AtomicU64::new(0),
                lead: watch::Sender::new(None),
                roll_call: RollCall::default(),
            }),
        }
    }

    /// The service `pdpb.PD`.
    pub fn pd_service(&self) -> PdServer<PdService> {
        PdServer::new(PdService::new(Arc::clone(&self.shared)))
    }

    /// The service `keyspacepb.Keyspace`. Clients expect it at the same address.
    pub fn keyspace_service(&self) -> KeyspaceServer<KeyspaceService> {
        KeyspaceServer::new(KeyspaceService::new(Arc::clone(&self.shared)))
    }

    /// The service `esker.Members`, which the other members call at the same address.
    pub fn members_service(&self) -> MembersServer<MembersService> {
        MembersServer::new(MembersService::new(Arc::clone(&self.shared)))
    }

    /// The service `esker.PlacementAdmin`, for operators at the same address.
    pub fn admin_service(&self) -> PlacementAdminServer<AdminService> {
        PlacementAdminServer::new(AdminService::new(Arc::clone(&self.shared)))
    }

    /// The HTTP pages under `/pd/api/v1`, for the same address.
    pub fn http(&self) -> Router {
        http::router(Arc::clone(&self.shared))
    }

    /// The background task, which follows elections and serves while this member leads. It ends
    /// when the group of members ends, or with an error when the stored state cannot be read. Then
    /// the node should stop.
    pub fn run(&self) -> impl Future<Output = Result<(), DamagedState>> + Send + 'static {
        office::run(Arc::clone(&self.shared))
    }

    /// Completes when this member leads and serves, for programs that start the member in their own
    /// process.
    pub async fn serving(&self) {
        let mut leads = self.shared.lead.subscribe();
        // The sender is a field of `self`, so the wait ends only with a value.
        let _ = leads.wait_for(Option::is_some).await;
    }

    /// The cluster's id, once this member knows it.
    pub fn cluster_id(&self) -> Option<u64> {
        self.shared.cluster_id()
    }
}
