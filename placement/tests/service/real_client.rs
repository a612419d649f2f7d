//! An unmodified TiKV client against the placement driver.

use std::time::Duration;

use tikv_client::TimestampExt;
use tikv_client::{Config, TransactionClient};

use super::pair;

#[tokio::test]
async fn the_tikv_client_gets_growing_timestamps_across_a_change_of_leader() {
    let (group, _, first, second) = pair().await;
    let endpoints = [&first, &second].map(|pd| pd.address.to_string());
    let config = Config::default().with_timeout(Duration::from_secs(5));
    // The follower learns the cluster's id from what it applied.
    let client = loop {
        match TransactionClient::new_with_config(endpoints.to_vec(), config.clone()).await {
            Ok(client) => break client,
            Err(error) => println!("not yet: {error}"),
        }
    };
    let before = client.current_timestamp().await.unwrap().version();
    group.elect(2);
    let after = client.current_timestamp().await.unwrap().version();
    assert!(after > before, "{after} after {before}");
    group.elect(1);
    assert!(client.current_timestamp().await.unwrap().version() > after);
}
