//! A client of the placement driver.
//!
//! Calls flow in as methods, and each goes to the member that leads. The client finds that member
//! by asking the members it knows. It looks again when a call fails, or when the leader is silent,
//! and changes over when another member has taken the leader's place. It promises that a call ends
//! within [`CALL_DEADLINE`], and that it never makes a call on members of another cluster than the
//! one it connected to. Calls are repeated when their outcome is unknown, because every call is
//! either a read or harmless to repeat (an id or a timestamp more is lost).

mod calls;
mod heartbeat;
mod leader;
mod timestamps;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use esker_rpc::backoff::Backoff;
use esker_rpc::channel::{self, Dialer};
use esker_rpc::proto::pdpb::{self, ErrorType};
use leader::Current;
use tokio::time::Instant;
use tonic::transport::Channel;
use tonic::{Code, Response, Status};

use crate::error::{ClientError, waited_since};

pub use calls::RegionInfo;
pub use timestamps::MAX_TIMESTAMPS_PER_REQUEST;

/// How long one call may take, retries included.
pub const CALL_DEADLINE: Duration = Duration::from_secs(10);

/// How long one attempt may take before it is given up, even if no other member is known to lead: a
/// little longer than the leader lets a lookup wait. The connection may be dead at one end.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(2);

/// The least time that an attempt gets. An attempt that the deadline cuts shorter would fail with
/// nothing but that as its reason, and hide what the attempts before it found.
const LEAST_ATTEMPT: Duration = Duration::from_millis(500);

/// How long `connect` looks for a leader.
pub const CONNECT_DEADLINE: Duration = Duration::from_secs(5);

const FIRST_RETRY: Duration = Duration::from_millis(20);
const LONGEST_RETRY: Duration = Duration::from_millis(500);

/// How a member that does not lead refuses a call: the message of the header's error, or of a gRPC
/// status, begins with this.
pub const NOT_LEADER: &str = "not leader";

/// A client of one cluster's placement driver. Cheap to clone: clones share connections.
///
/// It answers where regions and stores are, and hands out ids and timestamps. What is meant for
/// stores alone says so: the store of a node makes these calls itself.
///
/// ```no_run
/// # use esker_client::{ClientError, PlacementClient};
/// # async fn example() -> Result<(), ClientError> {
/// let placement = PlacementClient::connect(vec!["127.0.0.1:2379".into()]).await?;
/// if let Some(found) = placement.region_by_key("fruit/apple".into()).await? {
///     println!("{:?} is on {} stores", found.region.range, found.region.peers.len());
/// }
/// let id = placement.alloc_id(1).await?.start;
/// let timestamp = placement.tso(1).await?;
/// println!("id {id}, {} ms after 1970", timestamp.physical());
/// # Ok(())
/// # }
/// ```
///
/// # Errors
///
/// Every call ends within [`CALL_DEADLINE`]. It fails with [`ClientError::PlacementUnreachable`] if
/// no leading member has answered until then, and with [`ClientError::PlacementRefused`] or
/// [`ClientError::PlacementAnswer`] if a member answered what a repetition would not change. Other
/// errors are named at the methods that return them.
#[derive(Clone)]
pub struct PlacementClient {
    shared: Arc<Shared>,
}

struct Shared {
    cluster_id: u64,
    leader: Arc<leader::Leader>,
    timestamps: timestamps::Oracle,
}

impl PlacementClient {
    /// Finds the leader by asking `endpoints` (`host:port`), within [`CONNECT_DEADLINE`]. One
    /// address of a member that runs is enough, because it names the others.
    ///
    /// # Errors
    /// [`ClientError::Address`] or [`ClientError::NoEndpoints`] for endpoints that cannot be asked,
    /// [`ClientError::NoPlacement`] if no address is that of a member,
    /// [`ClientError::ClusterMismatch`] if the endpoints belong to different clusters, and
    /// [`ClientError::PlacementUnreachable`] if no leader is found in time.
    pub async fn connect(endpoints: Vec<String>) -> Result<Self, ClientError> {
        Self::connect_within(endpoints, CONNECT_DEADLINE).await
    }

    /// As [`connect`](Self::connect), with a deadline of the caller's.
    pub async fn connect_within(
        endpoints: Vec<String>,
        deadline: Duration,
    ) -> Result<Self, ClientError> {
        Self::connect_as_of(Dialer::default(), endpoints, None, deadline).await
    }

    /// As [`connect_within`](Self::connect_within), for a caller that has belonged to a cluster
    /// before. The caller names that cluster to the members, so a member that has lost its memory
    /// learns that there was one. The members that answer may belong to another cluster all the
    /// same.
    pub async fn connect_as_of(
        dialer: Dialer,
        endpoints: Vec<String>,
        cluster: Option<u64>,
        deadline: Duration,
    ) -> Result<Self, ClientError> {
        let leader = leader::Leader::find(dialer, endpoints, cluster, deadline).await?;
        let shared = Arc::new_cyclic(|shared| Shared {
            cluster_id: leader.cluster_id(),
            leader: Arc::new(leader),
            timestamps: timestamps::Oracle::new(shared.clone()),
        });
        Ok(PlacementClient { shared })
    }

    /// The way in which the client reaches servers.
    pub fn dialer(&self) -> &Dialer {
        self.shared.leader.dialer()
    }

    /// The id of the cluster that the client is connected to. It never changes. It was drawn when
    /// the cluster was founded, and distinguishes it from other clusters.
    pub fn cluster_id(&self) -> u64 {
        self.shared.cluster_id
    }

    /// The address of the member that leads (`host:port`), as far as this client knows.
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
    /// A repeated attempt would fail again.
    Final(ClientError),
}

impl Shared {
    fn header(&self) -> pdpb::RequestHeader {
        pdpb::RequestHeader { cluster_id: self.cluster_id, ..Default::default() }
    }

    /// Makes a call on the leader until the call is answered or refused, or the deadline has
    /// passed.
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
            let attempt = async {
                match make(current.channel.clone(), self.header()).await {
                    Ok(response) => {
                        let response = response.into_inner();
                        self.judge(call, response.header()).map(|()| response)
                    }
                    Err(status) => Err(judge_status(call, &status)),
                }
            };
            let reason = match self.attempt(&current, started, attempt).await {
                Ok(response) => return Ok(response),
                Err(Attempt::Final(error)) => return Err(error),
                Err(Attempt::Again(reason)) => reason,
            };
            tracing::debug!(call, leader = %current.address, reason, "a placement call failed");
            self.before_next(call, started, &mut backoff, &current, reason).await?;
        }
    }

    /// One attempt on the leader. It ends when it takes too long, and as soon as another member is
    /// found to lead, because a frozen leader never answers and never hangs up.
    async fn attempt<T>(
        &self,
        current: &Current,
        started: Instant,
        attempt: impl Future<Output = Result<T, Attempt>>,
    ) -> Result<T, Attempt> {
        let within = ATTEMPT_TIMEOUT.min(CALL_DEADLINE.saturating_sub(started.elapsed()));
        let unanswered = self.leader.asked(current);
        let ended = tokio::select! {
            biased;
            answered = tokio::time::timeout(within, attempt) => match answered {
                Ok(answer) => {
                    self.leader.answered();
                    answer
                }
                Err(_) => {
                    Err(Attempt::Again(format!("{}: no answer within {within:?}", current.address)))
                }
            },
            () = self.leader.left(current) => {
                Err(Attempt::Again(format!("{} does not lead any more", current.address)))
            }
        };
        unanswered.ended();
        ended
    }

    /// Waits a moment and looks for the leader, or returns why there will be no further attempt.
    async fn before_next(
        &self,
        call: &'static str,
        started: Instant,
        backoff: &mut Backoff,
        failed: &Current,
        reason: String,
    ) -> Result<(), ClientError> {
        let wait = backoff.step();
        let left = CALL_DEADLINE.saturating_sub(started.elapsed() + LEAST_ATTEMPT);
        let searched = async {
            tokio::time::sleep(wait).await;
            self.leader.refresh(failed.generation).await;
        };
        match tokio::time::timeout(left, searched).await {
            Ok(()) => Ok(()),
            Err(_) => Err(ClientError::PlacementUnreachable {
                endpoints: self.leader.known(),
                waited: waited_since(started),
                reason: format!("{call}: {reason}"),
            }),
        }
    }

    /// Whether a response's header means success.
    fn judge(
        &self,
        call: &'static str,
        header: Option<&pdpb::ResponseHeader>,
    ) -> Result<(), Attempt> {
        let problem = "no header: it is not a placement driver";
        let header = header.ok_or(Attempt::Final(ClientError::PlacementAnswer {
            call,
            problem: problem.into(),
        }))?;
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
