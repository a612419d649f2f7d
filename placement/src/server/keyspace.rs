//! The gRPC service `keyspacepb.Keyspace`. There is one key space, `DEFAULT`
//! with id 0, always enabled.
//!
//! Clients that scan a key space to its end rely on a region that ends there. So the regions are
//! cut at the key space's bounds before the first client that loads it gets its answer. They are
//! not cut earlier, because a client without key spaces may see fewer keys where there are more
//! regions. Nothing is remembered. The call that loads the key space looks at the map, asks the
//! leaders of regions that reach over a bound to cut them, and looks again. A crash or a new
//! leader, here or on a store, costs one more look.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use esker_model::RegionReport;
use esker_rpc::proto::keyspacepb::keyspace_server::Keyspace;
use esker_rpc::proto::{keyspacepb, pdpb};
use futures_util::{StreamExt, stream};
use tonic::codegen::BoxStream;
use tonic::{Request, Response, Status};

use super::{Refusal, Shared, pd, stores};
use crate::cluster::Cluster;
use crate::lead::{Lead, PATIENCE};

/// The key space that always exists.
const DEFAULT_NAME: &str = "DEFAULT";
const DEFAULT_ID: u32 = 0;

/// The bounds of the raw and of the transactional keys of the default key space, in the
/// memcomparable form in which regions have their bounds.
const BOUNDS: [&[u8]; 4] = [
    b"r\0\0\0\0\0\0\0\xfb",
    b"r\0\0\x01\0\0\0\0\xfb",
    b"x\0\0\0\0\0\0\0\xfb",
    b"x\0\0\x01\0\0\0\0\xfb",
];

/// How long after an order to split the next order is given, if the regions are not cut yet.
const ASK_AGAIN: Duration = Duration::from_millis(250);

/// `keyspacepb.Keyspace` over one member of the placement driver.
pub struct KeyspaceService {
    shared: Arc<Shared>,
}

impl KeyspaceService {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }
}

fn default_keyspace() -> keyspacepb::KeyspaceMeta {
    keyspacepb::KeyspaceMeta {
        id: Some(DEFAULT_ID),
        name: DEFAULT_NAME.to_owned(),
        state: keyspacepb::KeyspaceState::Enabled.into(),
        ..Default::default()
    }
}

fn unknown(what: &str) -> Refusal {
    Refusal::header(
        pdpb::ErrorType::EntryNotFound,
        format!("key space {what} does not exist; there is {DEFAULT_NAME}, with id {DEFAULT_ID}"),
    )
}

/// Why the bounds of the key space are not bounds of regions yet.
enum Uncut {
    /// The leader of some region has not reported yet.
    Unknown,
    /// Regions that reach over bounds, with these bounds.
    Regions(Vec<(Arc<RegionReport>, Vec<Bytes>)>),
}

fn uncut(cluster: &Cluster) -> Option<Uncut> {
    let mut regions = BTreeMap::new();
    for bound in BOUNDS {
        let Some(holder) = cluster.regions.by_key(bound) else { return Some(Uncut::Unknown) };
        if **holder.region.range.start() != *bound {
            let (_, keys) =
                regions.entry(holder.region.id).or_insert_with(|| (Arc::clone(holder), Vec::new()));
            keys.push(Bytes::from_static(bound));
        }
    }
    (!regions.is_empty()).then(|| Uncut::Regions(regions.into_values().collect()))
}

/// Has the regions cut at the bounds of the key space, and waits until they are.
async fn cut(lead: &Lead) -> Result<(), Refusal> {
    if !lead.is_bootstrapped() {
        return Err(stores::not_bootstrapped());
    }
    let cutting = async {
        let _one_at_a_time = lead.cutting.lock().await;
        let mut changes = lead.map_changes();
        loop {
            changes.mark_unchanged();
            let Some(uncut) = uncut(&lead.cluster.read()) else { return Ok(()) };
            if let Uncut::Regions(regions) = uncut {
                for (report, keys) in regions {
                    lead.ask_split(&report, keys);
                }
            }
            let again = tokio::time::Instant::now() + ASK_AGAIN;
            // Waits until the map has the cuts, or until it is time to ask again. A report of some
            // other region is no reason to ask again.
            loop {
                tokio::select! {
                    changed = tokio::time::timeout_at(again, changes.changed()) => {
                        if !matches!(changed, Ok(Ok(()))) {
                            break;
                        }
                    }
                    () = lead.ended() => return Err(lead.deposed().into()),
                }
                if self::uncut(&lead.cluster.read()).is_none() {
                    return Ok(());
                }
            }
        }
    };
    tokio::time::timeout(PATIENCE, cutting).await.unwrap_or_else(|_| {
        Err(Refusal::Status(Status::unavailable(format!(
            "the regions are not cut at the bounds of key space {DEFAULT_NAME} yet; ask again"
        ))))
    })
}

async fn load(
    lead: Arc<Lead>,
    request: keyspacepb::LoadKeyspaceRequest,
) -> Result<keyspacepb::LoadKeyspaceResponse, Refusal> {
    if request.name != DEFAULT_NAME {
        return Err(unknown(&request.name));
    }
    cut(&lead).await?;
    Ok(keyspacepb::LoadKeyspaceResponse {
        keyspace: Some(default_keyspace()),
        ..Default::default()
    })
}

async fn load_by_id(
    lead: Arc<Lead>,
    request: keyspacepb::LoadKeyspaceByIdRequest,
) -> Result<keyspacepb::LoadKeyspaceResponse, Refusal> {
    let id = request.id.unwrap_or(DEFAULT_ID);
    if id != DEFAULT_ID {
        return Err(unknown(&id.to_string()));
    }
    cut(&lead).await?;
    Ok(keyspacepb::LoadKeyspaceResponse {
        keyspace: Some(default_keyspace()),
        ..Default::default()
    })
}

async fn look_up(
    _: Arc<Lead>,
    request: keyspacepb::LookupKeyspaceRequest,
) -> Result<keyspacepb::LookupKeyspaceResponse, Refusal> {
    if request.name != DEFAULT_NAME {
        return Err(unknown(&request.name));
    }
    Ok(keyspacepb::LookupKeyspaceResponse {
        keyspaces: vec![default_keyspace()],
        ..Default::default()
    })
}

async fn all(
    _: Arc<Lead>,
    request: keyspacepb::GetAllKeyspacesRequest,
) -> Result<keyspacepb::GetAllKeyspacesResponse, Refusal> {
    let keyspaces = match request.start_id {
        None | Some(DEFAULT_ID) => vec![default_keyspace()],
        Some(_) => Vec::new(),
    };
    Ok(keyspacepb::GetAllKeyspacesResponse { keyspaces, ..Default::default() })
}

async fn update_state(
    _: Arc<Lead>,
    request: keyspacepb::UpdateKeyspaceStateRequest,
) -> Result<keyspacepb::UpdateKeyspaceStateResponse, Refusal> {
    let id = request.id.unwrap_or(DEFAULT_ID);
    if id != DEFAULT_ID {
        return Err(unknown(&id.to_string()));
    }
    if request.state != i32::from(keyspacepb::KeyspaceState::Enabled) {
        return Err(Refusal::invalid(format!("key space {DEFAULT_NAME} is always enabled")));
    }
    Ok(keyspacepb::UpdateKeyspaceStateResponse {
        keyspace: Some(default_keyspace()),
        ..Default::default()
    })
}

#[tonic::async_trait]
impl Keyspace for KeyspaceService {
    async fn load_keyspace(
        &self,
        request: Request<keyspacepb::LoadKeyspaceRequest>,
    ) -> Result<Response<keyspacepb::LoadKeyspaceResponse>, Status> {
        pd::unary(&self.shared, request, load).await
    }

    async fn lookup_keyspace(
        &self,
        request: Request<keyspacepb::LookupKeyspaceRequest>,
    ) -> Result<Response<keyspacepb::LookupKeyspaceResponse>, Status> {
        pd::unary(&self.shared, request, look_up).await
    }

    async fn load_keyspace_by_id(
        &self,
        request: Request<keyspacepb::LoadKeyspaceByIdRequest>,
    ) -> Result<Response<keyspacepb::LoadKeyspaceResponse>, Status> {
        pd::unary(&self.shared, request, load_by_id).await
    }

    async fn get_all_keyspaces(
        &self,
        request: Request<keyspacepb::GetAllKeyspacesRequest>,
    ) -> Result<Response<keyspacepb::GetAllKeyspacesResponse>, Status> {
        pd::unary(&self.shared, request, all).await
    }

    async fn update_keyspace_state(
        &self,
        request: Request<keyspacepb::UpdateKeyspaceStateRequest>,
    ) -> Result<Response<keyspacepb::UpdateKeyspaceStateResponse>, Status> {
        pd::unary(&self.shared, request, update_state).await
    }

    /// All key spaces once. After that nothing changes until the term of office ends.
    async fn watch_keyspaces(
        &self,
        request: Request<keyspacepb::WatchKeyspacesRequest>,
    ) -> Result<Response<BoxStream<keyspacepb::WatchKeyspacesResponse>>, Status> {
        let lead = self.shared.lead().await?;
        let all =
            self.shared.check_cluster(&lead, request.into_inner().header.as_ref()).map(|()| {
                keyspacepb::WatchKeyspacesResponse {
                    keyspaces: vec![default_keyspace()],
                    ..Default::default()
                }
            });
        let first = self.shared.answer(all).map(Response::into_inner);
        let shared = Arc::clone(&self.shared);
        let end = stream::once(async move {
            lead.ended().await;
            Err(shared.not_leader())
        });
        Ok(Response::new(Box::pin(stream::once(async move { first }).chain(end))))
    }
}
