//! A node inside a program of your own, and a client beside it: `cargo run --example embed`.
//! With `.join(["host:port"])` the node would belong to a cluster of many.

use std::error::Error;

use esker::Node;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let data_dir = tempfile::tempdir()?;
    let node = Node::builder().data_dir(data_dir.path()).listen("127.0.0.1:0").start().await?;
    println!("a cluster of one node, at {}", node.address());

    // Requests to regions that are led on this node are function calls.
    let client = node.client().await?;
    for (fruit, colour) in [("apple", "red"), ("banana", "yellow"), ("cherry", "dark red")] {
        client.put(format!("fruit/{fruit}"), colour).await?;
    }
    let apple = client.get("fruit/apple").await?;
    println!("an apple is {}", String::from_utf8_lossy(&apple.unwrap_or_default()));
    for (key, value) in client.scan("fruit/", "fruit0", 10).await? {
        println!("{}: {}", String::from_utf8_lossy(&key), String::from_utf8_lossy(&value));
    }

    node.stop().await;
    Ok(())
}
