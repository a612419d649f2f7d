//! The streams: timestamps, heartbeats of regions, and lookups in bulk.
//!
//! Each stream belongs to one term of office and ends with it, with an error that makes the client
//! look up the leader again.

use std::collections::HashMap;
use std::sync::Arc;

use esker_model::{RegionId, RegionReport, StoreId};
use esker_rpc::convert::{down_messages, pending_messages};
use esker_rpc::members::BEAT_INTERVAL;
use esker_rpc::proto::pdpb;
use futures_util::stream;
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_stream::wrappers::ReceiverStream;
use tonic::codegen::BoxStream;
use tonic::{Status, Streaming};
use tracing::debug;

use super::convert::Malformed;
use super::headers::ResponseWithHeader;
use super::{MIN_STREAM_LIFE, Refusal, Shared, checks, convert};
use crate::lead::{Lead, OrderStream};
use crate::map::RefusedReport;

/// Orders that wait for one store. More than one for each of its regions makes no sense. An order
/// that does not fit comes again with the region's next report.
const MAX_WAITING_ORDERS: usize = 1_024;
/// Keys and ids that one message of a bulk lookup may name.
const MAX_QUERIES: usize = 16_384;

/// The next message of a client. `None` when the client closed the stream or hung up; an error when
/// the term of office ended.
async fn next<T>(
    shared: &Shared,
    lead: &Lead,
    messages: &mut Streaming<T>,
) -> Result<Option<T>, Status> {
    tokio::select! {
        message = messages.message() => match message {
            Ok(message) => Ok(message),
            Err(error) => {
                debug!(%error, "a client hung up");
                Ok(None)
            }
        },
        () = lead.ended() => Err(shared.not_leader()),
    }
}

/// Puts an answer or an error under a header. Only an error because of which this member cannot go
/// on ends the stream.
fn reply<R: ResponseWithHeader>(shared: &Shared, answer: Result<R, Refusal>) -> Result<R, Status> {
    shared.answer(answer).map(tonic::Response::into_inner)
}

/// Answers messages one by one, in order, only as fast as the client reads. The stream ends with
/// the term of office, but not before `least`.
fn answer_each<Q, R, F>(
    shared: Arc<Shared>,
    lead: Arc<Lead>,
    messages: Streaming<Q>,
    least: Instant,
    answer: impl Fn(Arc<Shared>, Arc<Lead>, Q) -> F + Send + 'static,
) -> BoxStream<R>
where
    Q: Send + 'static,
    R: ResponseWithHeader,
    F: Future<Output = Result<R, Refusal>> + Send + 'static,
{
    let state = Some((shared, lead, messages, answer));
    Box::pin(stream::unfold(state, move |state| async move {
        let (shared, lead, mut messages, answer) = state?;
        let outcome = match next(&shared, &lead, &mut messages).await {
            Ok(message) => {
                let answered = answer(Arc::clone(&shared), Arc::clone(&lead), message?).await;
                reply(&shared, answered)
            }
            Err(status) => Err(status),
        };
        match outcome {
            Ok(response) => Some((Ok(response), Some((shared, lead, messages, answer)))),
            Err(status) => {
                tokio::time::sleep_until(least).await;
                Some((Err(status), None))
            }
        }
    }))
}

/// Batches of timestamps. There is one answer for each request, in the order of the requests,
/// because clients match them by that order.
pub fn timestamps(
    shared: Arc<Shared>,
    lead: Arc<Lead>,
    requests: Streaming<pdpb::TsoRequest>,
    opened: Instant,
) -> BoxStream<pdpb::TsoResponse> {
    answer_each(
        shared,
        lead,
        requests,
        opened + MIN_STREAM_LIFE,
        |shared, lead, request: pdpb::TsoRequest| async move {
            shared.check_cluster(&lead, request.header.as_ref())?;
            if request.count == 0 {
                return Err(Refusal::invalid("a request for no timestamps"));
            }
            let last = lead.timestamps(request.count).await?;
            Ok(pdpb::TsoResponse {
                count: request.count,
                timestamp: Some(last.into()),
                ..Default::default()
            })
        },
    )
}

/// Lookups by key and by id, many in one message.
pub fn region_queries(
    shared: Arc<Shared>,
    lead: Arc<Lead>,
    requests: Streaming<pdpb::QueryRegionRequest>,
) -> BoxStream<pdpb::QueryRegionResponse> {
    answer_each(
        shared,
        lead,
        requests,
        Instant::now(),
        |shared, lead, request: pdpb::QueryRegionRequest| async move {
            shared.check_cluster(&lead, request.header.as_ref())?;
            lead.current().await?;
            query_regions(&lead, &request)
        },
    )
}

/// Zero stands for a region that is not known.
fn query_regions(
    lead: &Lead,
    request: &pdpb::QueryRegionRequest,
) -> Result<pdpb::QueryRegionResponse, Refusal> {
    let count = request.keys.len() + request.prev_keys.len() + request.ids.len();
    if count > MAX_QUERIES {
        return Err(Refusal::invalid(format!(
            "{count} lookups in one message: at most {MAX_QUERIES} are answered"
        )));
    }
    let cluster = lead.cluster.read();
    let mut regions_by_id = HashMap::new();
    let mut take = |report: Option<&Arc<RegionReport>>| {
        let Some(report) = report else {
            return 0;
        };
        let id = report.region.id.0;
        regions_by_id.insert(
            id,
            pdpb::RegionResponse {
                region: Some((&report.region).into()),
                leader: Some(report.leader.into()),
                down_peers: down_messages(&report.region, &report.down),
                pending_peers: pending_messages(&report.region, &report.pending),
            },
        );
        id
    };
    let regions = &cluster.regions;
    let key_id_map = request.keys.iter().map(|key| take(regions.by_key(key)));
    let key_id_map = key_id_map.collect();
    let prev_key_id_map = request.prev_keys.iter().map(|key| take(regions.previous(key))).collect();
    for id in &request.ids {
        take(regions.get(RegionId(*id)));
    }
    Ok(pdpb::QueryRegionResponse {
        key_id_map,
        prev_key_id_map,
        regions_by_id,
        ..Default::default()
    })
}

/// Takes in reports, and sends orders. The two are not paired, because a scheduler's tick may also
/// cause an order. While the lease holds, the store gets a sign of life at every beat. A store
/// leaves a leader that is silent.
pub fn region_heartbeats(
    shared: Arc<Shared>,
    lead: Arc<Lead>,
    reports: Streaming<pdpb::RegionHeartbeatRequest>,
) -> BoxStream<pdpb::RegionHeartbeatResponse> {
    let (orders, waiting) = mpsc::channel(MAX_WAITING_ORDERS);
    tokio::spawn(take_reports(shared, lead, reports, orders));
    Box::pin(ReceiverStream::new(waiting))
}

async fn take_reports(
    shared: Arc<Shared>,
    lead: Arc<Lead>,
    mut reports: Streaming<pdpb::RegionHeartbeatRequest>,
    orders: OrderStream,
) {
    let mut connected: Option<StoreId> = None;
    let mut beats = tokio::time::interval(BEAT_INTERVAL);
    beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let report = tokio::select! {
            _ = beats.tick() => {
                if lead.is_current() {
                    let beat = reply(&shared, Ok(pdpb::RegionHeartbeatResponse::default()));
                    // If the queue is full, its orders are sign of life enough.
                    let _ = orders.try_send(beat);
                }
                continue;
            }
            report = next(&shared, &lead, &mut reports) => report,
            () = orders.closed() => break,
        };
        match report {
            Ok(Some(report)) => {
                if let Err(refusal) = take_report(&shared, &lead, report, &orders, &mut connected) {
                    let refused = reply::<pdpb::RegionHeartbeatResponse>(&shared, Err(refusal));
                    let is_over = refused.is_err();
                    if orders.send(refused).await.is_err() || is_over {
                        break;
                    }
                }
            }
            Ok(None) => break,
            Err(status) => {
                // The client may not be reading any more.
                let _ = orders.try_send(Err(status));
                break;
            }
        }
    }
    if let Some(store) = connected {
        lead.disconnect(store, &orders);
    }
}

fn take_report(
    shared: &Shared,
    lead: &Lead,
    message: pdpb::RegionHeartbeatRequest,
    orders: &OrderStream,
    connected: &mut Option<StoreId>,
) -> Result<(), Refusal> {
    shared.check_cluster(lead, message.header.as_ref())?;
    if !lead.is_bootstrapped() {
        return Err(super::stores::not_bootstrapped());
    }
    // A stream belongs to the store that sends the first report on it.
    let report = checked_report(lead, message, *connected)
        .inspect_err(|malformed| checks::complain(*connected, malformed))?;
    let store = report.leader.store;
    if connected.is_none() {
        *connected = Some(store);
        lead.connect(store, orders.clone());
    } else {
        lead.stay_connected(store, orders);
    }
    let now = lead.clock.awake();
    let heard = lead.cluster.write().heartbeat(report, now, &mut || lead.fresh_peer());
    match heard {
        Ok(order) => {
            lead.map_changed();
            // Without a lease the map may learn, but no order is sent.
            if lead.is_current() {
                lead.tell(order);
            }
        }
        // Late reports are common, and the sender finds out by itself.
        Err(RefusedReport::Stale(stale)) => debug!(%stale, "a late heartbeat"),
        Err(impossible) => checks::complain(Some(store), &impossible),
    }
    Ok(())
}

fn checked_report(
    lead: &Lead,
    message: pdpb::RegionHeartbeatRequest,
    connected: Option<StoreId>,
) -> Result<RegionReport, Malformed> {
    let report = convert::report(message)?;
    let sender = connected.unwrap_or(report.leader.store);
    let cluster = lead.cluster.read();
    checks::is_senders(&cluster, &report, sender)?;
    checks::belongs(lead, &cluster, &report.region)?;
    Ok(report)
}
