//! `grpc.health.v1.Health`: whether a node serves, for load balancers and for clients that ask
//! before they come back. (Go clients do so after a call that failed.)
//!
//! The node sets what is ready. [`Health`] keeps it for callers that ask or watch. A part does not
//! serve before it was set, and nothing serves after [`Health::stop`].

use std::sync::Arc;

use esker_rpc::proto::grpc::health::v1::health_check_response::ServingStatus;
use esker_rpc::proto::grpc::health::v1::health_server::{self, HealthServer};
use esker_rpc::proto::grpc::health::v1::{HealthCheckRequest, HealthCheckResponse};
use futures_util::stream::{self, StreamExt};
use tokio::sync::watch;
use tonic::codegen::BoxStream;
use tonic::{Request, Response, Status};

/// The names of services by which a client may ask for one of a node's parts.
const TIKV: &str = "tikvpb.Tikv";
const PD: &str = "pdpb.PD";

/// The parts of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The store: open, and known to placement.
    Store,
    /// The placement member: it leads, or knows the leader.
    Placement,
}

/// Whether the parts of a node serve. Clones share the state.
#[derive(Clone, Debug)]
pub struct Health {
    state: Arc<watch::Sender<State>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Readiness {
    NotYet,
    Ready,
    /// It never serves again, for example after damage.
    Failed,
}

#[derive(Clone, Copy, Debug)]
struct State {
    /// `None` if the node has no such part.
    store: Option<Readiness>,
    placement: Option<Readiness>,
    stopped: bool,
}

impl State {
    /// The status of a service; `None` for a service that the node does not have.
    fn of(&self, service: &str) -> Option<ServingStatus> {
        let ready = match service {
            TIKV => self.store,
            PD => self.placement,
            // For a client of the store the placement member beside it does not matter.
            "" => self.store.or(self.placement),
            _ => None,
        }?;
        Some(match ready {
            Readiness::Ready if !self.stopped => ServingStatus::Serving,
            _ => ServingStatus::NotServing,
        })
    }
}

impl Health {
    /// The health of a node with these parts, none of which serves yet.
    pub fn new(store: bool, placement: bool) -> Self {
        let state = State {
            store: store.then_some(Readiness::NotYet),
            placement: placement.then_some(Readiness::NotYet),
            stopped: false,
        };
        Health { state: Arc::new(watch::Sender::new(state)) }
    }

    /// Sets whether a part serves from now on. Has no effect on a part that has failed.
    pub fn set(&self, part: Part, serving: bool) {
        self.change(part, if serving { Readiness::Ready } else { Readiness::NotYet });
    }

    /// Sets that a part does not serve any more. Later calls of [`Health::set`] do not change that.
    pub fn fail(&self, part: Part) {
        self.change(part, Readiness::Failed);
    }

    fn change(&self, part: Part, readiness: Readiness) {
        self.state.send_modify(|state| {
            let known = match part {
                Part::Store => &mut state.store,
                Part::Placement => &mut state.placement,
            };
            if matches!(known, Some(Readiness::NotYet | Readiness::Ready)) {
                *known = Some(readiness);
            }
        });
    }

    /// Sets that nothing serves any more. Later calls do not change that.
    pub fn stop(&self) {
        self.state.send_modify(|state| state.stopped = true);
    }

    pub fn status(&self, service: &str) -> Option<ServingStatus> {
        self.state.borrow().of(service)
    }

    pub fn into_server(self) -> HealthServer<HealthService> {
        HealthServer::new(HealthService { health: self })
    }
}

pub struct HealthService {
    health: Health,
}

fn answer(status: ServingStatus) -> HealthCheckResponse {
    HealthCheckResponse { status: status.into() }
}

#[tonic::async_trait]
impl health_server::Health for HealthService {
    async fn check(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        let service = request.into_inner().service;
        let status = self.health.status(&service).ok_or_else(|| {
            Status::not_found(format!("this node has no service `{}`", service.escape_debug()))
        })?;
        Ok(Response::new(answer(status)))
    }

    async fn watch(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<BoxStream<HealthCheckResponse>>, Status> {
        let service = request.into_inner().service;
        let changes = self.health.state.subscribe();
        // Each status once. A watcher that is slower than the changes gets only the latest.
        let statuses = stream::unfold((changes, None), move |(mut changes, told)| {
            let service = service.clone();
            async move {
                loop {
                    let state = *changes.borrow_and_update();
                    let status = state.of(&service).unwrap_or(ServingStatus::ServiceUnknown);
                    if told != Some(status) {
                        return Some((Ok(answer(status)), (changes, Some(status))));
                    }
                    changes.changed().await.ok()?;
                }
            }
        });
        Ok(Response::new(statuses.boxed()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_serves_what_it_was_said_to_until_it_stops() {
        let health = Health::new(true, false);
        assert_eq!(health.status(""), Some(ServingStatus::NotServing));
        health.set(Part::Store, true);
        for service in ["", TIKV] {
            assert_eq!(health.status(service), Some(ServingStatus::Serving));
        }
        health.set(Part::Placement, true);
        assert_eq!(health.status(PD), None, "the node has no placement member");
        health.set(Part::Store, false);
        assert_eq!(health.status(""), Some(ServingStatus::NotServing));
        health.stop();
        health.set(Part::Store, true);
        assert_eq!(health.status(TIKV), Some(ServingStatus::NotServing));
    }

    #[test]
    fn what_has_failed_does_not_come_back() {
        let health = Health::new(true, true);
        health.set(Part::Placement, true);
        health.set(Part::Store, true);
        health.fail(Part::Store);
        health.set(Part::Store, true);
        assert_eq!(health.status(TIKV), Some(ServingStatus::NotServing));
        assert_eq!(health.status(PD), Some(ServingStatus::Serving), "beside it");
    }

    #[test]
    fn a_store_serves_although_the_placement_member_beside_it_has_no_leader() {
        let health = Health::new(true, true);
        health.set(Part::Store, true);
        assert_eq!(health.status(""), Some(ServingStatus::Serving));
        assert_eq!(health.status(PD), Some(ServingStatus::NotServing));
        let alone = Health::new(false, true);
        alone.set(Part::Placement, true);
        assert_eq!(alone.status(""), Some(ServingStatus::Serving));
    }
}
