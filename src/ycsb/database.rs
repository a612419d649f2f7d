//! What YCSB needs of a database, and its implementations: for a cluster of Esker, and for what it is
//! measured beside.

mod bare;
mod etcd;
#[cfg(feature = "tikv-target")]
mod tikv;

use std::future::Future;

use bytes::Bytes;
use esker_client::{ClientError, KvClient};

pub use self::bare::BareRocksDb;
pub use self::etcd::EtcdClient;
#[cfg(feature = "tikv-target")]
pub use self::tikv::TikvClient;

/// A request that failed, or an answer that is not what the load phase stored.
/// Records are named by their keys, which are plain text.
#[derive(Debug, thiserror::Error)]
pub enum DatabaseError {
    #[error("record {} is not there: run `esker ycsb load` with the same --records first", text(.key))]
    NotFound { key: Bytes },
    #[error(
        "record {} has {found} bytes instead of {expected}: give the --fields and --value-size of the load",
        text(.key)
    )]
    Shape { key: Bytes, expected: usize, found: usize },
    #[error("a scan of {limit} records from {} found {found}", text(.key))]
    ScanLimit { key: Bytes, limit: u64, found: usize },
    #[error("too many inserts are unanswered: the cluster does not keep up")]
    InsertsAhead,
    #[error("it was not answered before the benchmark gave up")]
    Silent,
    /// An error of the client, which names the request and the key.
    #[error("{0}")]
    Request(Box<dyn std::error::Error + Send + Sync>),
}

fn text(key: &Bytes) -> std::borrow::Cow<'_, str> {
    String::from_utf8_lossy(key)
}

/// A table of records, each a value under a key.
pub trait Database: Send + Sync + 'static {
    /// The record, or `None` if there is none.
    fn read(&self, key: Bytes)
    -> impl Future<Output = Result<Option<Bytes>, DatabaseError>> + Send;

    /// Stores the record, whether it existed or not.
    fn write(
        &self,
        key: Bytes,
        value: Bytes,
    ) -> impl Future<Output = Result<(), DatabaseError>> + Send;

    /// Stores all the records. Some of them may be stored when this fails.
    fn write_batch(
        &self,
        records: Vec<(Bytes, Bytes)>,
    ) -> impl Future<Output = Result<(), DatabaseError>> + Send;

    /// At most `limit` records from `start` on, in the order of their keys.
    fn scan(
        &self,
        start: Bytes,
        limit: u32,
    ) -> impl Future<Output = Result<Vec<(Bytes, Bytes)>, DatabaseError>> + Send;
}

/// The raw key-value client as YCSB's table.
impl Database for KvClient {
    async fn read(&self, key: Bytes) -> Result<Option<Bytes>, DatabaseError> {
        self.get(key).await.map_err(failed)
    }

    async fn write(&self, key: Bytes, value: Bytes) -> Result<(), DatabaseError> {
        self.put(key, value).await.map_err(failed)
    }

    async fn write_batch(&self, records: Vec<(Bytes, Bytes)>) -> Result<(), DatabaseError> {
        self.batch_put(records).await.map_err(failed)
    }

    async fn scan(&self, start: Bytes, limit: u32) -> Result<Vec<(Bytes, Bytes)>, DatabaseError> {
        KvClient::scan(self, start, Bytes::new(), limit).await.map_err(failed)
    }
}

fn failed(error: ClientError) -> DatabaseError {
    DatabaseError::Request(error.into())
}
