//! Connections to stores in other processes.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use esker_model::StoreId;
use esker_rpc::channel;
use esker_rpc::procedures::{Batched, BatchedReply};
use esker_rpc::proto::metapb::StoreState;
use esker_rpc::proto::pdpb::ErrorType;
use esker_rpc::proto::tikvpb::BatchCommandsEmptyRequest;
use esker_rpc::proto::tikvpb::tikv_client::TikvClient;
use esker_rpc::server::MAX_MESSAGE_BYTES;
use esker_rpc::service::{Reply, Request, is_refusal};
use parking_lot::RwLock;
use tonic::Status;
use tonic::transport::Channel;

use super::batch::BatchStream;
use crate::error::ClientError;
use crate::placement::PlacementClient;

/// Why there is no response.
#[derive(Clone, Debug)]
pub(super) enum SendError {
    /// The store has not seen the request.
    NotSent(String),
    /// The store may have seen the request, and may have acted on it.
    Unknown(String),
    /// The store has seen the request, and does not serve such requests.
    Refused(String),
    /// The store cannot be sent to.
    Final(ClientError),
}

impl SendError {
    /// The error for a status that `store` returned.
    pub(super) fn of(store: impl std::fmt::Display, status: &Status) -> Self {
        let reason = format!("{store}: {}", channel::describe(status));
        match is_refusal(status) {
            true => SendError::Refused(reason),
            false => SendError::Unknown(reason),
        }
    }
}

/// A connection and the stream on it.
#[derive(Clone)]
pub(super) struct Connection {
    address: String,
    channel: Channel,
    batch: BatchStream,
    remembers_writes: bool,
}

impl Connection {
    /// Whether the store answered that its regions remember tagged writes.
    pub(super) fn remembers_writes(&self) -> bool {
        self.remembers_writes
    }

    /// Sends a request and waits for its answer. `seen` is set once the store may have seen the
    /// request, for a caller that stops waiting.
    pub(super) async fn send(
        &self,
        request: Request,
        seen: &AtomicBool,
    ) -> Result<Reply, SendError> {
        match request.into_batched() {
            Ok(command) => {
                let reply = self.batch.send(Box::new(command), seen).await?;
                Reply::of_batched(reply)
                    .ok_or_else(|| SendError::Unknown("the store answered another command".into()))
            }
            Err(request) => {
                seen.store(true, Ordering::Relaxed);
                let mut client = TikvClient::new(self.channel.clone())
                    .max_decoding_message_size(MAX_MESSAGE_BYTES)
                    .max_encoding_message_size(MAX_MESSAGE_BYTES);
                // Large, and only for requests that have no place in a batch.
                let answered = Box::pin(request.send_alone(&mut client)).await;
                answered.map_err(|status| SendError::of(&self.address, &status))
            }
        }
    }
}

/// The connections, opened when first needed and again when they break.
pub(super) struct Stores {
    placement: PlacementClient,
    connections: RwLock<HashMap<StoreId, Connection>>,
    /// Held by the task that connects, so that a hundred requests make one connection to a store.
    connecting: tokio::sync::Mutex<HashMap<StoreId, Arc<tokio::sync::Mutex<()>>>>,
}

impl Stores {
    pub(super) fn new(placement: PlacementClient) -> Self {
        Stores { placement, connections: RwLock::default(), connecting: Default::default() }
    }

    /// The connection to a store.
    pub(super) async fn connection(&self, store: StoreId) -> Result<Connection, SendError> {
        if let Some(connection) = self.open(store) {
            return Ok(connection);
        }
        let gate = Arc::clone(self.connecting.lock().await.entry(store).or_default());
        let _connecting = gate.lock().await;
        if let Some(connection) = self.open(store) {
            return Ok(connection);
        }
        // Asked again each time, because a store may have moved.
        let (described, _) = match self.placement.get_store(store).await {
            Ok(found) => found,
            // A region's peers may name a store before placement knows it.
            Err(
                error @ (ClientError::NoStore { .. }
                | ClientError::PlacementRefused { kind: ErrorType::EntryNotFound, .. }),
            ) => {
                return Err(SendError::NotSent(error.to_string()));
            }
            Err(error) => return Err(SendError::Final(error)),
        };
        if described.state() == StoreState::Tombstone {
            return Err(SendError::NotSent(format!("store {store} has left the cluster")));
        }
        let address = described.address;
        let dialled = self.placement.dialer().connect(&address).await;
        let channel =
            dialled.map_err(|reason| SendError::NotSent(format!("store {store} at {reason}")))?;
        let batch = BatchStream::open(address.clone(), channel.clone());
        let remembers_writes = remembers_writes(&batch).await.map_err(|reason| {
            SendError::NotSent(format!("store {store} at {address}: {reason}"))
        })?;
        let connection = Connection { address, channel, batch, remembers_writes };
        self.connections.write().insert(store, connection.clone());
        Ok(connection)
    }

    /// The connection to a store, if there is one that works.
    pub(super) fn open(&self, store: StoreId) -> Option<Connection> {
        // The stream ends when the connection does, so its end stands for both.
        self.connections.read().get(&store).filter(|known| !known.batch.has_ended()).cloned()
    }
}

/// Asks a store whether its regions remember tagged writes. Every TiKV answers the command. A store
/// that does not know the field leaves it out.
async fn remembers_writes(batch: &BatchStream) -> Result<bool, String> {
    let question = Batched::Empty(BatchCommandsEmptyRequest::default());
    match batch.send(Box::new(question), &AtomicBool::new(false)).await {
        Ok(BatchedReply::Empty(answer)) => Ok(answer.remembers_writes),
        Ok(_) | Err(SendError::Refused(_)) => Ok(false),
        Err(SendError::NotSent(reason) | SendError::Unknown(reason)) => Err(reason),
        Err(SendError::Final(error)) => Err(error.to_string()),
    }
}
