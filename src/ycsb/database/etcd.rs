//! etcd as YCSB's table, over its gRPC protocol.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use esker_rpc::channel::{Dialer, describe};
use esker_rpc::proto::etcdserverpb::kv_client::KvClient;
use esker_rpc::proto::etcdserverpb::maintenance_client::MaintenanceClient;
use esker_rpc::proto::etcdserverpb::{
    PutRequest, RangeRequest, RequestOp, StatusRequest, TxnRequest, request_op,
};
use tonic::transport::Channel;

use super::{Database, DatabaseError};

/// Connections to the leader. With one, requests of many clients wait for each other in HTTP/2;
/// with one for each client, etcd takes more processor time for the same requests.
const CONNECTIONS: usize = 8;

/// How long a request may take, as long as one of Esker's client.
const DEADLINE: Duration = Duration::from_secs(20);

/// The most operations of one transaction, which is etcd's own default.
const MAX_OPERATIONS: usize = 128;

/// The largest answer: that of a scan of long records.
const MAX_ANSWER_BYTES: usize = 64 << 20;

/// A client of etcd. It sends everything to the leader, which spares a follower to pass it on, as
/// etcd's own benchmark does when it is told to (`--target-leader`). Reads are linearizable.
pub struct EtcdClient {
    connections: Vec<KvClient<Channel>>,
    next: AtomicUsize,
    is_at_leader: bool,
}

impl EtcdClient {
    /// Connects to the leader, if one of `endpoints` is, or else to the first that answers.
    ///
    /// # Errors
    /// One line for each endpoint that was tried, if none answers.
    pub async fn connect(endpoints: &[String]) -> Result<EtcdClient, String> {
        let dialer = Dialer::default();
        let (mut first, mut is_at_leader) = (None, false);
        let mut refusals = Vec::new();
        for endpoint in endpoints {
            match EtcdClient::leads(&dialer, endpoint).await {
                Ok(true) => {
                    (first, is_at_leader) = (Some(endpoint), true);
                    break;
                }
                Ok(false) => {
                    first.get_or_insert(endpoint);
                }
                Err(refusal) => refusals.push(refusal),
            }
        }
        let Some(endpoint) = first else { return Err(refusals.join("; ")) };
        let mut connections = Vec::new();
        for _ in 0..CONNECTIONS {
            let client = KvClient::new(dialer.connect(endpoint).await?)
                .max_decoding_message_size(MAX_ANSWER_BYTES);
            connections.push(client);
        }
        Ok(EtcdClient { connections, next: AtomicUsize::new(0), is_at_leader })
    }

    /// Whether it is the leader that it connected to. A follower passes everything on, which is
    /// slower.
    pub fn is_at_leader(&self) -> bool {
        self.is_at_leader
    }

    async fn leads(dialer: &Dialer, endpoint: &str) -> Result<bool, String> {
        let mut client = MaintenanceClient::new(dialer.connect(endpoint).await?);
        let status = client
            .status(StatusRequest {})
            .await
            .map_err(|status| format!("{endpoint} is no etcd: {}", describe(&status)))?
            .into_inner();
        Ok(status.header.is_some_and(|header| header.member_id == status.leader))
    }

    fn connection(&self) -> KvClient<Channel> {
        let number = self.next.fetch_add(1, Ordering::Relaxed) % self.connections.len();
        self.connections[number].clone()
    }

    async fn range(&self, request: RangeRequest) -> Result<Vec<(Bytes, Bytes)>, DatabaseError> {
        let mut connection = self.connection();
        let answer = within(connection.range(request)).await?;
        Ok(answer.kvs.into_iter().map(|pair| (pair.key, pair.value)).collect())
    }
}

async fn within<T>(
    request: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
) -> Result<T, DatabaseError> {
    match tokio::time::timeout(DEADLINE, request).await {
        Ok(Ok(answer)) => Ok(answer.into_inner()),
        Ok(Err(status)) => {
            Err(DatabaseError::Request(format!("etcd: {}", describe(&status)).into()))
        }
        Err(_) => {
            let seconds = DEADLINE.as_secs();
            Err(DatabaseError::Request(format!("etcd did not answer within {seconds} s").into()))
        }
    }
}

impl Database for EtcdClient {
    async fn read(&self, key: Bytes) -> Result<Option<Bytes>, DatabaseError> {
        let found = self.range(RangeRequest { key, ..RangeRequest::default() }).await?;
        Ok(found.into_iter().next().map(|(_, value)| value))
    }

    async fn write(&self, key: Bytes, value: Bytes) -> Result<(), DatabaseError> {
        let mut connection = self.connection();
        within(connection.put(PutRequest { key, value, lease: 0 })).await?;
        Ok(())
    }

    async fn write_batch(&self, records: Vec<(Bytes, Bytes)>) -> Result<(), DatabaseError> {
        for part in records.chunks(MAX_OPERATIONS) {
            let put = |(key, value): &(Bytes, Bytes)| {
                let put = PutRequest { key: key.clone(), value: value.clone(), lease: 0 };
                RequestOp { request: Some(request_op::Request::RequestPut(put)) }
            };
            let request = TxnRequest { success: part.iter().map(put).collect() };
            let mut connection = self.connection();
            within(connection.txn(request)).await?;
        }
        Ok(())
    }

    async fn scan(&self, start: Bytes, limit: u32) -> Result<Vec<(Bytes, Bytes)>, DatabaseError> {
        let request = RangeRequest {
            key: start,
            range_end: Bytes::from_static(&[0]),
            limit: i64::from(limit),
            ..RangeRequest::default()
        };
        self.range(request).await
    }
}
