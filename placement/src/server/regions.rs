//! Lookups of regions, splits, scatter and operators.
//!
//! A key whose region's leader has not reported yet is in a gap. A lookup of such a key waits for
//! the heartbeat that closes the gap, and returns an error only after that wait. Clients retry
//! after the error. After an answer without a region they would give up or ask in a tight loop.

use std::sync::Arc;
use std::time::Duration;

use esker_model::{KeyRange, Region, RegionId, RegionReport};
use esker_rpc::convert::{bound, down_messages, pending_messages};
use esker_rpc::proto::pdpb;

use super::{Refusal, checks, convert, stores};
use crate::cluster::Cluster;
use crate::lead::{Lead, PATIENCE};
use crate::operator::Status;

/// How long a lookup waits for an unknown region id. Unlike a key, the id may well not exist at
/// all.
const UNKNOWN_ID_PATIENCE: Duration = Duration::from_millis(300);
/// The most regions that one scan returns.
const MAX_SCAN: usize = 16_384;
/// Ranges that one batch scan may ask for.
const MAX_RANGES: usize = 16_384;
/// New regions that one request may ask ids for.
const MAX_SPLIT: u32 = 1_024;
/// Regions that one request may scatter.
const MAX_SCATTER: usize = 16_384;

/// Looks again and again until `look` finds something or `patience` ends.
async fn look_until<T>(
    lead: &Lead,
    patience: Duration,
    mut look: impl FnMut(&Cluster) -> Option<T>,
) -> Option<T> {
    let deadline = tokio::time::Instant::now() + patience;
    let mut changes = lead.map_changes();
    loop {
        changes.mark_unchanged();
        if let Some(found) = look(&lead.cluster.read()) {
            return Some(found);
        }
        tokio::select! {
            changed = tokio::time::timeout_at(deadline, changes.changed()) => {
                if !matches!(changed, Ok(Ok(()))) {
                    return None;
                }
            }
            () = lead.ended() => return None,
        }
    }
}

fn bootstrapped(lead: &Lead) -> Result<(), Refusal> {
    if lead.is_bootstrapped() { Ok(()) } else { Err(stores::not_bootstrapped()) }
}

fn not_found(what: &str) -> Refusal {
    Refusal::header(
        pdpb::ErrorType::RegionNotFound,
        format!("{what}: no leader has reported such a region yet; ask again"),
    )
}

fn found(report: &RegionReport) -> pdpb::GetRegionResponse {
    pdpb::GetRegionResponse {
        region: Some((&report.region).into()),
        leader: Some(report.leader.into()),
        down_peers: down_messages(&report.region, &report.down),
        pending_peers: pending_messages(&report.region, &report.pending),
        ..Default::default()
    }
}

pub async fn get_region(
    lead: Arc<Lead>,
    request: pdpb::GetRegionRequest,
) -> Result<pdpb::GetRegionResponse, Refusal> {
    bootstrapped(&lead)?;
    let key = request.region_key;
    let report = look_until(&lead, PATIENCE, |cluster| cluster.regions.by_key(&key).cloned())
        .await
        .ok_or_else(|| not_found(&format!("key {}", esker_rpc::display_key(&key))))?;
    Ok(found(&report))
}

/// The region before the one that holds the key; `None` before the first.
pub async fn get_prev_region(
    lead: Arc<Lead>,
    request: pdpb::GetRegionRequest,
) -> Result<pdpb::GetRegionResponse, Refusal> {
    bootstrapped(&lead)?;
    let key = request.region_key;
    let report = look_until(&lead, PATIENCE, |cluster| {
        let holder = cluster.regions.by_key(&key)?;
        if holder.region.range.start().is_empty() {
            return Some(None);
        }
        cluster.regions.previous(&key).cloned().map(Some)
    })
    .await
    .ok_or_else(|| not_found(&format!("the region before key {}", esker_rpc::display_key(&key))))?;
    Ok(report.as_deref().map(found).unwrap_or_default())
}

pub async fn get_region_by_id(
    lead: Arc<Lead>,
    request: pdpb::GetRegionByIdRequest,
) -> Result<pdpb::GetRegionResponse, Refusal> {
    bootstrapped(&lead)?;
    let id = RegionId(request.region_id);
    let report = look_until(&lead, UNKNOWN_ID_PATIENCE, |cluster| cluster.regions.get(id).cloned())
        .await
        .ok_or_else(|| not_found(&format!("region {id}")))?;
    Ok(found(&report))
}

/// A limit from the wire. Zero and less mean as many as one answer may hold.
fn limit_of(limit: i32) -> usize {
    match usize::try_from(limit) {
        Ok(limit) if limit > 0 => limit.min(MAX_SCAN),
        _ => MAX_SCAN,
    }
}

/// Scans when no gap is left, or when the patience ends, whatever is known by then.
async fn scan(lead: &Lead, ranges: &[KeyRange], limit: usize) -> Vec<Arc<RegionReport>> {
    let whole =
        look_until(lead, PATIENCE, |cluster| cluster.regions.scan_ranges(ranges, limit, true).ok())
            .await;
    match whole {
        Some(whole) => whole,
        None => lead.cluster.read().regions.scan_ranges(ranges, limit, false).unwrap_or_default(),
    }
}

pub async fn scan_regions(
    lead: Arc<Lead>,
    request: pdpb::ScanRegionsRequest,
) -> Result<pdpb::ScanRegionsResponse, Refusal> {
    bootstrapped(&lead)?;
    let Ok(range) = KeyRange::new(request.start_key, bound(request.end_key)) else {
        // An empty range holds no region. Clients do ask for one.
        return Ok(pdpb::ScanRegionsResponse::default());
    };
    let reports = scan(&lead, &[range], limit_of(request.limit)).await;
    Ok(pdpb::ScanRegionsResponse {
        region_metas: reports.iter().map(|report| (&report.region).into()).collect(),
        leaders: reports.iter().map(|report| report.leader.into()).collect(),
        regions: reports.iter().map(|report| convert::report_message(report)).collect(),
        ..Default::default()
    })
}

pub async fn batch_scan_regions(
    lead: Arc<Lead>,
    request: pdpb::BatchScanRegionsRequest,
) -> Result<pdpb::BatchScanRegionsResponse, Refusal> {
    bootstrapped(&lead)?;
    if request.ranges.len() > MAX_RANGES {
        return Err(Refusal::invalid(format!(
            "{} ranges in one request: at most {MAX_RANGES} are answered",
            request.ranges.len()
        )));
    }
    let ranges = request
        .ranges
        .into_iter()
        .map(|range| KeyRange::new(range.start_key, bound(range.end_key)))
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| Refusal::invalid(error.to_string()))?;
    let is_in_order = ranges.windows(2).all(|pair| !pair[0].is_above(pair[1].start()));
    if !is_in_order {
        return Err(Refusal::invalid("the ranges overlap or are not in key order"));
    }
    let limit = limit_of(request.limit);
    let reports = scan(&lead, &ranges, limit).await;
    if request.contain_all_key_range {
        let cluster = lead.cluster.read();
        if let Err(gap) = cluster.regions.scan_ranges(&ranges, limit, true) {
            return Err(Refusal::header(
                pdpb::ErrorType::RegionsNotContainAllKeyRange,
                gap.to_string(),
            ));
        }
    }
    Ok(pdpb::BatchScanRegionsResponse {
        regions: reports.iter().map(|report| convert::report_message(report)).collect(),
        ..Default::default()
    })
}

/// Checks that a leader that wants to split its region is up to date.
fn may_split(
    lead: &Lead,
    region: Option<esker_rpc::proto::metapb::Region>,
) -> Result<Region, Refusal> {
    bootstrapped(lead)?;
    let region = convert::region(region).map_err(|error| Refusal::invalid(error.to_string()))?;
    // After a change of leader here, the region may not be known yet. It may split, because its
    // epoch guards it and ids cost nothing.
    let cluster = lead.cluster.read();
    checks::belongs(lead, &cluster, &region)?;
    if let Some(known) = cluster.regions.get(region.id) {
        let (known, asked) = (known.region.epoch, region.epoch);
        if asked.version < known.version || asked.conf_ver < known.conf_ver {
            return Err(Refusal::invalid(format!(
                "region {} asks with epoch {asked}, but is known with {known}",
                region.id
            )));
        }
    }
    Ok(region)
}

/// Ids for `count` new regions with as many replicas each as `region` has.
async fn split_ids(
    lead: &Lead,
    region: &Region,
    count: u32,
) -> Result<Vec<pdpb::SplitId>, Refusal> {
    let replicas = u32::try_from(region.peers.len()).unwrap_or(u32::MAX);
    let total = replicas
        .checked_add(1)
        .and_then(|each| each.checked_mul(count))
        .ok_or_else(|| Refusal::invalid("more ids than there are"))?;
    let last = lead.ids(total).await?;
    let mut next = last - u64::from(total) + 1..=last;
    Ok((0..count)
        .map(|_| pdpb::SplitId {
            new_region_id: next.next().unwrap_or_default(),
            new_peer_ids: next.by_ref().take(replicas as usize).collect(),
        })
        .collect())
}

pub async fn ask_split(
    lead: Arc<Lead>,
    request: pdpb::AskSplitRequest,
) -> Result<pdpb::AskSplitResponse, Refusal> {
    let region = may_split(&lead, request.region)?;
    let ids = split_ids(&lead, &region, 1).await?.remove(0);
    Ok(pdpb::AskSplitResponse {
        new_region_id: ids.new_region_id,
        new_peer_ids: ids.new_peer_ids,
        ..Default::default()
    })
}

pub async fn ask_batch_split(
    lead: Arc<Lead>,
    request: pdpb::AskBatchSplitRequest,
) -> Result<pdpb::AskBatchSplitResponse, Refusal> {
    if !(1..=MAX_SPLIT).contains(&request.split_count) {
        return Err(Refusal::invalid(format!(
            "a split into {} new regions: ask for 1 to {MAX_SPLIT}",
            request.split_count
        )));
    }
    let region = may_split(&lead, request.region)?;
    Ok(pdpb::AskBatchSplitResponse {
        ids: split_ids(&lead, &region, request.split_count).await?,
        ..Default::default()
    })
}

pub async fn report_batch_split(
    lead: Arc<Lead>,
    request: pdpb::ReportBatchSplitRequest,
) -> Result<pdpb::ReportBatchSplitResponse, Refusal> {
    bootstrapped(&lead)?;
    let parts = request.regions.len();
    if parts > checks::MAX_PARTS {
        return Err(Refusal::invalid(format!(
            "{parts} regions after one split: at most {} are possible",
            checks::MAX_PARTS
        )));
    }
    let regions = request.regions.into_iter().map(|region| convert::region(Some(region)));
    let regions = regions.collect::<Result<Vec<_>, _>>()?;
    for region in &regions {
        checks::belongs(&lead, &lead.cluster.read(), region)?;
    }
    let now = lead.clock.awake();
    lead.cluster.write().split_happened(regions, now);
    lead.map_changed();
    Ok(pdpb::ReportBatchSplitResponse::default())
}

/// Starts to spread the leaders of the regions that are asked for. A region counts as finished when
/// its leader need not move, or when its transfer has begun. The response names the others.
pub async fn scatter_region(
    lead: Arc<Lead>,
    request: pdpb::ScatterRegionRequest,
) -> Result<pdpb::ScatterRegionResponse, Refusal> {
    bootstrapped(&lead)?;
    let mut ids = request.regions_id;
    if ids.is_empty() {
        ids.push(request.region_id);
    }
    if ids.len() > MAX_SCATTER {
        return Err(Refusal::invalid(format!(
            "{} regions in one request: at most {MAX_SCATTER} are scattered",
            ids.len()
        )));
    }
    let now = lead.clock.awake();
    let mut orders = Vec::new();
    let mut failed = Vec::new();
    let mut reasons = Vec::new();
    {
        let mut cluster = lead.cluster.write();
        for id in &ids {
            match cluster.scatter(RegionId(*id), now) {
                Ok(order) => orders.extend(order),
                Err(error) => {
                    failed.push(*id);
                    reasons.push(error.to_string());
                }
            }
        }
    }
    lead.tell(orders);
    if failed.len() == ids.len() {
        return Err(Refusal::header(
            pdpb::ErrorType::Unknown,
            format!("nothing was scattered: {}", reasons.swap_remove(0)),
        ));
    }
    let done = (ids.len() - failed.len()) * 100 / ids.len();
    Ok(pdpb::ScatterRegionResponse {
        finished_percentage: done as u64,
        failed_regions_id: failed,
        ..Default::default()
    })
}

/// The running operator of a region, or otherwise the last one that ended.
pub async fn get_operator(
    lead: Arc<Lead>,
    request: pdpb::GetOperatorRequest,
) -> Result<pdpb::GetOperatorResponse, Refusal> {
    let id = RegionId(request.region_id);
    let cluster = lead.cluster.read();
    let (operator, status) = match cluster.operators.get(id) {
        Some(running) => (running, &Status::Running),
        None => {
            let finished = cluster.operators.last_finished(id).ok_or_else(|| {
                Refusal::header(
                    pdpb::ErrorType::RegionNotFound,
                    format!("region {id} has and had no operator"),
                )
            })?;
            (&finished.operator, &finished.status)
        }
    };
    let mut text = operator.to_string();
    if let Status::Cancelled(why) = status {
        text = format!("{text} (cancelled: {why})");
    }
    let code = match status {
        Status::Running => pdpb::OperatorStatus::Running,
        Status::Success => pdpb::OperatorStatus::Success,
        Status::Timeout => pdpb::OperatorStatus::Timeout,
        Status::Cancelled(_) => pdpb::OperatorStatus::Cancel,
    };
    Ok(pdpb::GetOperatorResponse {
        region_id: id.0,
        desc: text.into(),
        status: code.into(),
        kind: operator.kind.to_string().into(),
        ..Default::default()
    })
}
