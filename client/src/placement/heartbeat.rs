//! The stream of region heartbeats, which outlives connections and leaders.
//!
//! A placement member that leads sends a sign of life on every stream, every [`BEAT_INTERVAL`], as
//! long as its lease holds. So a frozen leader, or a connection that is dead at one end, is
//! noticed: after [`SILENCE`] the stream's holder asks all members, and goes to the current leader.

use std::sync::Arc;
use std::time::Duration;

use esker_model::{Order, RegionReport};
use esker_rpc::backoff::Backoff;
use esker_rpc::channel;
use esker_rpc::convert;
use esker_rpc::members::BEAT_INTERVAL;
use esker_rpc::proto::pdpb::RegionHeartbeatRequest;
use esker_rpc::proto::pdpb::pd_client::PdClient;
use esker_rpc::repeat::Repeated;
use futures_util::StreamExt;
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;

use super::leader::Current;
use super::{Attempt, FIRST_RETRY, LONGEST_RETRY, PlacementClient, Shared};
use crate::error::ClientError;

/// How long a leader may be silent before the other members are asked which one leads.
const SILENCE: Duration = Duration::from_millis(900);

/// How long a stream may be silent while the members still name its leader. The member itself is
/// fine, so the connection is not.
const LONGEST_SILENCE: Duration = Duration::from_secs(3);

/// Steps that may wait for the region logic; beyond this the stream is not read.
const MAX_WAITING_STEPS: usize = 1024;

/// Heartbeats that wait to be sent on one connection.
const HEARTBEATS_AHEAD: usize = 64;

impl PlacementClient {
    /// For stores. Sends every heartbeat to the current leader, and returns the orders that come
    /// back. Headers are filled in here. While no leader is reachable, heartbeats wait in the
    /// caller's channel. A heartbeat that was on its way when a connection broke is lost, because
    /// the next one contains more. `opened` is called for each new stream. The leader at its other
    /// end may know nothing, so every region led here is to be reported. A stream whose leader
    /// falls silent is left as soon as another member leads. Ends when either channel is closed.
    pub fn region_heartbeats(
        &self,
        outgoing: mpsc::Receiver<RegionReport>,
        opened: impl Fn() + Send + Sync + 'static,
    ) -> mpsc::Receiver<Order> {
        let (steps, incoming) = mpsc::channel(MAX_WAITING_STEPS);
        tokio::spawn(run(Arc::clone(&self.shared), outgoing, steps, opened));
        incoming
    }
}

/// Why a connection is no longer used.
enum End {
    /// The caller has closed one of its channels.
    Done,
    Broken(String),
}

async fn run(
    shared: Arc<Shared>,
    mut outgoing: mpsc::Receiver<RegionReport>,
    steps: mpsc::Sender<Order>,
    opened: impl Fn() + Send + Sync + 'static,
) {
    let mut backoff = Backoff::new(FIRST_RETRY, LONGEST_RETRY);
    let (mut breaks, mut refusals) = (Repeated::new(), Repeated::new());
    // A stream is open from the beginning, and a broken stream is replaced at once. A new leader
    // must hear of all regions now, and not only when a region has something to report. A member
    // that lost its memory must hear that there is a cluster.
    loop {
        let current = shared.leader.current();
        let heard = Mutex::new(Instant::now());
        let judged = |judgement: Result<(), (u64, ClientError)>| match judgement {
            Ok(()) => {
                *heard.lock() = Instant::now();
                backoff.reset();
                if let Some(over) = breaks.recovered(Instant::now()) {
                    tracing::info!(breaks = over.times, after = ?over.lasted, "region heartbeats are heard again");
                }
            }
            // The error concerns one region, not the stream.
            Err((region, error)) => {
                if let Some(times) = refusals.failed(Instant::now()) {
                    tracing::warn!(times, %error, region, "a heartbeat was refused");
                }
            }
        };
        let talk =
            converse(&shared, current.channel.clone(), &mut outgoing, &steps, &opened, judged);
        let end = tokio::select! {
            end = talk => end,
            reason = silence(&shared, &current, &heard) => End::Broken(reason),
        };
        match end {
            End::Done => return,
            End::Broken(_) if steps.is_closed() || outgoing.is_closed() => return,
            End::Broken(reason) => {
                if let Some(times) = breaks.failed(Instant::now()) {
                    tracing::info!(leader = %current.address, times, reason, "region heartbeats broke off");
                }
                tokio::time::sleep(backoff.step()).await;
                shared.leader.refresh(current.generation).await;
            }
        }
    }
}

/// Completes when the stream to `current` is to be left although it has not broken.
async fn silence(shared: &Shared, current: &Current, heard: &Mutex<Instant>) -> String {
    let listening = async {
        loop {
            let quiet = heard.lock().elapsed();
            if quiet < SILENCE {
                tokio::time::sleep(SILENCE - quiet).await;
            } else if quiet < LONGEST_SILENCE {
                shared.leader.doubt(current.generation).await;
                tokio::time::sleep(BEAT_INTERVAL).await;
            } else {
                return format!("silent for {quiet:?}");
            }
        }
    };
    tokio::select! {
        () = shared.leader.moved(current) => "another member leads".into(),
        reason = listening => reason,
    }
}

async fn converse(
    shared: &Shared,
    channel: tonic::transport::Channel,
    outgoing: &mut mpsc::Receiver<RegionReport>,
    steps: &mpsc::Sender<Order>,
    opened: &(impl Fn() + Send + Sync),
    mut judged: impl FnMut(Result<(), (u64, ClientError)>),
) -> End {
    let stamp = |report: RegionReport| RegionHeartbeatRequest {
        header: Some(shared.header()),
        ..report.into()
    };
    let (requests, stream) = mpsc::channel(HEARTBEATS_AHEAD);
    let mut client = PdClient::new(channel);
    let mut responses = match client.region_heartbeat(ReceiverStream::new(stream)).await {
        Ok(responses) => responses.into_inner(),
        Err(status) => return End::Broken(channel::describe(&status)),
    };
    opened();
    // Each direction goes on while the other waits. A leader that is slow to read must not keep us
    // from taking its orders, because it may be waiting for that itself.
    let sending = async {
        while let Some(heartbeat) = outgoing.recv().await {
            if requests.send(stamp(heartbeat)).await.is_err() {
                return End::Broken("the stream ended".into());
            }
        }
        End::Done
    };
    let receiving = async {
        loop {
            let response = match responses.next().await {
                Some(Ok(response)) => response,
                Some(Err(status)) => return End::Broken(channel::describe(&status)),
                None => return End::Broken("the stream ended".into()),
            };
            match shared.judge("region_heartbeat", response.header.as_ref()) {
                Ok(()) => judged(Ok(())),
                Err(Attempt::Again(reason)) => return End::Broken(reason),
                Err(Attempt::Final(error)) => {
                    judged(Err((response.region_id, error)));
                    continue;
                }
            }
            match convert::order(response) {
                Ok(Some(order)) => {
                    if steps.send(order).await.is_err() {
                        return End::Done;
                    }
                }
                // The leader's sign of life.
                Ok(None) => {}
                Err(error) => tracing::debug!(%error, "an order that no store carries out"),
            }
        }
    };
    tokio::select! {
        end = sending => end,
        end = receiving => end,
        () = steps.closed() => End::Done,
    }
}
