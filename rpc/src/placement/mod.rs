//! A client of the placement driver.
//!
//! Calls flow in as methods; each goes to the member that leads, which the client finds by asking
//! any member it knows and finds again when a call fails. It promises that a call ends within
//! [`CALL_DEADLINE`], and that it never talks to members of another cluster than the one it
//! connected to. Calls are repeated when their outcome is unknown: all are either reads, or
//! harmless to repeat (an id or a timestamp more is lost).

mod calls;
mod heartbeat;
mod leader;
mod timestamps;

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tonic::transport::Channel;
use tonic::{Code, Response, Status};

use crate::backoff::Backoff;
use crate::channel;
use crate::error::{ClientError, waited_since};
use crate::proto::pdpb::{self, ErrorType};

pub use calls::RegionInfo;
pub use timestamps::MAX_TIMESTAMPS_PER_REQUEST;

/// How long one call may take, retries included.
pub const CALL_DEADLINE: Duration = Duration::from_secs(10);

/// How long one attempt may take before the leader is looked for again.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(3);

/// How long `connect` looks for a leader.
pub const CONNECT_DEADLINE: Duration = Duration::from_secs(5);

const FIRST_RETRY: Duration = Duration::from_millis(20);
const LONGEST_RETRY: Duration = Duration::from_millis(500);

/// How a member that does not lead refuses a call: with this at the start of the message of the
/// header's error, or of a gRPC status.
pub const NOT_LEADER: &str = "not leader";

/// A client of one cluster's placement driver. Cheap to clone; clones share connections.
#[derive(Clone)]
pub struct PlacementClient {
    shared: Arc<Shared>,
}

struct Shared {
    cluster_id: u64,
    leader: leader::Leader,
    timestamps: timestamps::Oracle,
}

impl PlacementClient {
    /// Finds the leader by way of `endpoints` (`host:port`), within [`CONNECT_DEADLINE`].
    pub async fn connect(endpoints: Vec<String>) -> Result<Self, ClientError> {
        Self::connect_within(endpoints, CONNECT_DEADLINE).await
    }

    /// The same with a deadline of the caller's.
    pub async fn connect_within(
        endpoints: Vec<String>,
        deadline: Duration,
    ) -> Result<Self, ClientError> {
        let leader = leader::Leader::find(endpoints, deadline).await?;
        let shared = Arc::new_cyclic(|shared| Shared {
            cluster_id: leader.cluster_id(),
            leader,
            timestamps: timestamps::Oracle::new(shared.clone()),
        });
        Ok(PlacementClient { shared })
    }

    pub fn cluster_id(&self) -> u64 {
        self.shared.cluster_id
    }

    /// The address of the member that leads, as far as this client knows.
    pub fn leader_address(&self) -> String {
        self.shared.leader.address()
    }
}

/// A response with the header that every response has.
trait Answered {
    fn header(&self) -> Option<&pdpb::ResponseHeader>;
}

/// What a failed attempt means for the next one.
enum Attempt {
    /// Look for the leader and try again.
    Again(String),
    /// It would fail again.
    Final(ClientError),
}

impl Shared {
    fn header(&self) -> pdpb::RequestHeader {
        pdpb::RequestHeader { cluster_id: self.cluster_id, ..Default::default() }
    }

    /// Makes a call on the leader until it is answered, refused, or the deadline has passed.
    async fn call<T, F, Fut>(&self, call: &'static str, make: F) -> Result<T, ClientError>
    where
        T: Answered,
        F: Fn(Channel, pdpb::RequestHeader) -> Fut,
        Fut: Future<Output = Result<Response<T>, Status>>,
    {
        let started = Instant::now();
        let mut backoff = Backoff::new(FIRST_RETRY, LONGEST_RETRY);
        loop {
            let current = self.leader.current();
            let left = CALL_DEADLINE.saturating_sub(started.elapsed());
            let timeout = ATTEMPT_TIMEOUT.min(left);
            let attempt = make(current.channel.clone(), self.header());
            let failed = match tokio::time::timeout(timeout, attempt).await {
                Ok(Ok(response)) => {
                    let response = response.into_inner();
                    match self.judge(call, response.header()) {
                        Ok(()) => return Ok(response),
                        Err(failed) => failed,
                    }
                }
                Ok(Err(status)) => judge_status(call, &status),
                Err(_) => Attempt::Again(format!("no answer within {timeout:?}")),
            };
            let reason = match failed {
                Attempt::Final(error) => return Err(error),
                Attempt::Again(reason) => reason,
            };
            tracing::debug!(call, leader = %current.address, reason, "a placement call failed");
            let wait = backoff.step();
            if started.elapsed() + wait >= CALL_DEADLINE {
                return Err(ClientError::PlacementUnreachable {
                    endpoints: self.leader.known(),
                    waited: waited_since(started),
                    reason: format!("{call}: {reason}"),
                });
            }
            tokio::time::sleep(wait).await;
            self.leader.refresh(current.generation).await;
        }
    }

    /// Whether a response's header means success.
    fn judge(
        &self,
        call: &'static str,
        header: Option<&pdpb::ResponseHeader>,
    ) -> Result<(), Attempt> {
        let problem = "no header: it is not a placement driver";
        let header =
            header.ok_or(Attempt::Final(ClientError::PlacementAnswer { call, problem }))?;
        match &header.error {
            None => Ok(()),
            Some(error) if error.message.starts_with(NOT_LEADER) => {
                Err(Attempt::Again(error.message.clone()))
            }
            Some(error) => Err(Attempt::Final(ClientError::PlacementRefused {
                call,
                kind: error.r#type(),
                message: error.message.clone(),
            })),
        }
    }
}

fn judge_status(call: &'static str, status: &Status) -> Attempt {
    match status.code() {
        Code::Unimplemented | Code::InvalidArgument | Code::PermissionDenied => {
            Attempt::Final(ClientError::PlacementRefused {
                call,
                kind: ErrorType::Unknown,
                message: channel::describe(status),
            })
        }
        _ => Attempt::Again(channel::describe(status)),
    }
}
