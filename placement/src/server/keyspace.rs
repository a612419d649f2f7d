//! The gRPC service `keyspacepb.Keyspace`. There is one key space, `DEFAULT`
//! with id 0, always enabled.

use std::sync::Arc;

use esker_rpc::proto::keyspacepb::keyspace_server::Keyspace;
use esker_rpc::proto::{keyspacepb, pdpb};
use futures_util::{StreamExt, stream};
use tonic::codegen::BoxStream;
use tonic::{Request, Response, Status};

use super::{Refusal, Shared, pd};
use crate::lead::Lead;

/// The key space that always exists.
const DEFAULT_NAME: &str = "DEFAULT";
const DEFAULT_ID: u32 = 0;

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

async fn load(
    _: Arc<Lead>,
    request: keyspacepb::LoadKeyspaceRequest,
) -> Result<keyspacepb::LoadKeyspaceResponse, Refusal> {
    if request.name != DEFAULT_NAME {
        return Err(unknown(&request.name));
    }
    Ok(keyspacepb::LoadKeyspaceResponse {
        keyspace: Some(default_keyspace()),
        ..Default::default()
    })
}

async fn load_by_id(
    _: Arc<Lead>,
    request: keyspacepb::LoadKeyspaceByIdRequest,
) -> Result<keyspacepb::LoadKeyspaceResponse, Refusal> {
    let id = request.id.unwrap_or(DEFAULT_ID);
    if id != DEFAULT_ID {
        return Err(unknown(&id.to_string()));
    }
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

    /// All key spaces once; then nothing changes until the office ends.
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
