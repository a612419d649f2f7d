//! The pages of a node, by plain HTTP.

use std::io::Result;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::process::PATIENCE;

/// A page with its head, or the error if there is none.
pub async fn try_page(address: &str, path: &str) -> Result<String> {
    let asked = async {
        let mut stream = TcpStream::connect(address).await?;
        let request =
            format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        Ok(answer)
    };
    timeout(PATIENCE, asked).await?
}

/// A page of a node that must answer.
pub async fn page(address: &str, path: &str) -> String {
    try_page(address, path).await.expect("the node answers")
}

/// The value of a metric without labels; `None` before it is first counted.
pub async fn metric(address: &str, name: &str) -> Option<f64> {
    let page = page(address, "/metrics").await;
    let value = |line: &str| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok();
    page.lines().find_map(value)
}
