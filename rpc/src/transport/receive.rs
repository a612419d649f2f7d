//! The receiving side: checks what arrives and passes it to the region logic.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::mpsc;
use tonic::{Request, Response, Status, Streaming};

use super::SnapshotError;
use crate::proto::esker::snapshot_chunk::Part;
use crate::proto::esker::transport_server::{Transport, TransportServer};
use crate::proto::esker::{
    RaftBatch, RaftDone, RaftMessage, SnapshotBlock, SnapshotChunk, SnapshotDone, SnapshotHead,
    SnapshotTail,
};
use crate::server::MAX_MESSAGE_BYTES;

/// Parts of a snapshot that are received ahead of the sink.
const BLOCKS_AHEAD: usize = 4;

/// The region logic, as the network sees it.
pub trait RaftHandler: Send + Sync + 'static {
    /// The cluster of a store that runs here; `None` if the store does not run here.
    fn cluster_id(&self, store: u64) -> Option<u64>;

    /// Takes one message. Must not block. A message that finds no room is dropped, as a network
    /// would drop it.
    fn on_raft(&self, from_store: u64, to_store: u64, message: RaftMessage);

    /// Begins to take over a snapshot. An error refuses the snapshot, with a reason for the
    /// sender's log. Called on a thread that may block.
    fn begin_snapshot(&self, head: SnapshotHead) -> Result<Box<dyn SnapshotSink>, SnapshotError>;
}

/// Takes over the data of one snapshot, on a thread that may block. Dropping the sink unfinished
/// means that the rest will not come. Then nothing of the snapshot may stay behind.
pub trait SnapshotSink: Send {
    /// Takes the next pairs of a column family. Their checksum has been checked.
    fn block(&mut self, cf: u32, pairs: Bytes) -> Result<(), SnapshotError>;

    /// Finishes the snapshot, all of which has arrived. The size and the checksum of the whole have
    /// been checked. The sink has to check the number of pairs. When this returns, the snapshot is
    /// durable and will be applied.
    fn finish(self: Box<Self>, tail: SnapshotTail) -> Result<(), SnapshotError>;
}

/// Serves the calls of the `Transport` service.
#[derive(Debug)]
pub struct TransportService<H> {
    handler: Arc<H>,
}

impl<H: RaftHandler> TransportService<H> {
    pub fn new(handler: Arc<H>) -> Self {
        TransportService { handler }
    }

    /// The service with the limits of this crate, ready for [`tonic::service::Routes`].
    pub fn into_server(self) -> TransportServer<Self> {
        TransportServer::new(self)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES)
    }

    /// Checks that a sender means this store. A store that was rebuilt at another store's address,
    /// or that belongs to another cluster, must not take part in the votes of others.
    fn check(&self, cluster_id: u64, to_store: u64) -> Result<(), Status> {
        match self.handler.cluster_id(to_store) {
            Some(ours) if ours == cluster_id => Ok(()),
            Some(ours) => Err(Status::failed_precondition(format!(
                "store {to_store} belongs to cluster {ours}, not to {cluster_id}"
            ))),
            None => Err(Status::failed_precondition(format!("store {to_store} is not here"))),
        }
    }
}

#[tonic::async_trait]
impl<H: RaftHandler> Transport for TransportService<H> {
    async fn raft(
        &self,
        request: Request<Streaming<RaftBatch>>,
    ) -> Result<Response<RaftDone>, Status> {
        let mut batches = request.into_inner();
        while let Some(batch) = batches.message().await? {
            self.check(batch.cluster_id, batch.to_store)?;
            for message in batch.messages {
                self.handler.on_raft(batch.from_store, batch.to_store, message);
            }
        }
        Ok(Response::new(RaftDone {}))
    }

    async fn snapshot(
        &self,
        request: Request<Streaming<SnapshotChunk>>,
    ) -> Result<Response<SnapshotDone>, Status> {
        let mut chunks = request.into_inner();
        let first = chunks.message().await?.and_then(|chunk| chunk.part);
        let Some(Part::Head(head)) = first else {
            return Err(Status::invalid_argument("a snapshot begins with its head"));
        };
        self.check(head.cluster_id, head.to_store)?;
        let (parts, received) = mpsc::channel(BLOCKS_AHEAD);
        let handler = Arc::clone(&self.handler);
        let taking = tokio::task::spawn_blocking(move || take_over(&*handler, head, received));
        // On an error of the stream `parts` is dropped, and the unfinished sink with it.
        while let Some(chunk) = chunks.message().await? {
            let Some(part) = chunk.part else {
                return Err(Status::invalid_argument("a chunk of a snapshot is empty"));
            };
            if parts.send(part).await.is_err() {
                // The sink has stopped taking parts. Its task returns the reason.
                break;
            }
        }
        drop(parts);
        taking.await.map_err(|error| Status::internal(error.to_string()))??;
        Ok(Response::new(SnapshotDone {}))
    }
}

/// Passes the parts to a sink, on a thread that may block.
fn take_over(
    handler: &impl RaftHandler,
    head: SnapshotHead,
    mut parts: mpsc::Receiver<Part>,
) -> Result<(), Status> {
    let mut sink = handler
        .begin_snapshot(head)
        .map_err(|error| Status::aborted(format!("the snapshot was refused: {error}")))?;
    let failed = |error: SnapshotError| Status::internal(format!("taking it over: {error}"));
    let mut sum = crc32fast::Hasher::new();
    let mut bytes = 0;
    while let Some(part) = parts.blocking_recv() {
        match part {
            Part::Block(SnapshotBlock { cf, pairs, crc32 }) => {
                if crc32fast::hash(&pairs) != crc32 {
                    return Err(Status::data_loss(format!(
                        "a block of {} bytes has the wrong sum",
                        pairs.len()
                    )));
                }
                sum.update(&pairs);
                bytes += pairs.len() as u64;
                sink.block(cf, pairs).map_err(failed)?;
            }
            Part::Tail(tail) => {
                if tail.bytes != bytes || tail.crc32 != sum.finalize() {
                    return Err(Status::data_loss(format!(
                        "{bytes} bytes arrived of {}, or not the right ones",
                        tail.bytes
                    )));
                }
                return sink.finish(tail).map_err(failed);
            }
            Part::Head(_) => {
                return Err(Status::invalid_argument("a snapshot has a second head"));
            }
        }
    }
    Err(Status::data_loss(format!("the snapshot broke off after {bytes} bytes")))
}
