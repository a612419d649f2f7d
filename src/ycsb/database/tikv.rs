//! TiKV as YCSB's table, by way of its own client, unmodified. Esker speaks the same protocol.

use bytes::Bytes;
use tikv_client::{Config, Error, RawClient};

use super::{Database, DatabaseError};

/// TiKV's client.
pub struct TikvClient(RawClient);

impl TikvClient {
    /// Connects to a cluster by its placement driver.
    ///
    /// # Errors
    /// What the client says, as one line.
    pub async fn connect(endpoints: Vec<String>) -> Result<TikvClient, String> {
        // By default the client gives up after two seconds, which is less than an election.
        let config = Config::default().with_timeout(std::time::Duration::from_secs(20));
        let connected = RawClient::new_with_config(endpoints, config).await;
        connected.map(TikvClient).map_err(|error| error.to_string())
    }
}

fn failed(error: Error) -> DatabaseError {
    DatabaseError::Request(error.into())
}

impl Database for TikvClient {
    async fn read(&self, key: Bytes) -> Result<Option<Bytes>, DatabaseError> {
        let value = self.0.get(Vec::from(key)).await.map_err(failed)?;
        Ok(value.map(Bytes::from))
    }

    async fn write(&self, key: Bytes, value: Bytes) -> Result<(), DatabaseError> {
        self.0.put(Vec::from(key), Vec::from(value)).await.map_err(failed)
    }

    async fn write_batch(&self, records: Vec<(Bytes, Bytes)>) -> Result<(), DatabaseError> {
        let pairs = records.into_iter().map(|(key, value)| (Vec::from(key), Vec::from(value)));
        self.0.batch_put(pairs).await.map_err(failed)
    }

    async fn scan(&self, start: Bytes, limit: u32) -> Result<Vec<(Bytes, Bytes)>, DatabaseError> {
        let found = self.0.scan(Vec::from(start).., limit).await.map_err(failed)?;
        let pair = |pair: tikv_client::KvPair| (Vec::from(pair.0).into(), pair.1.into());
        Ok(found.into_iter().map(pair).collect())
    }
}
