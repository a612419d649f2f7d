//! One port for gRPC and HTTP, and how it stops.

use axum::routing::get;
use esker_rpc::proto::kvrpcpb::RawGetRequest;
use esker_rpc::proto::pdpb::GetMembersRequest;
use esker_rpc::proto::pdpb::pd_client::PdClient;
use esker_rpc::proto::tikvpb::tikv_client::TikvClient;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;

use crate::support::{Server, echo, soon};

async fn http_get(server: &Server, path: &str) -> String {
    let mut socket = TcpStream::connect(server.address).await.expect("it listens");
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    socket.write_all(request.as_bytes()).await.expect("sent");
    let mut answer = String::new();
    soon("an answer", socket.read_to_string(&mut answer)).await.expect("text");
    answer
}

#[tokio::test]
async fn grpc_and_plain_http_share_a_port() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let http = axum::Router::new().route("/status", get(|| async { "all is well" }));
    let server = Server::start_on(listener, echo(), http);
    let answer = http_get(&server, "/status").await;
    assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("all is well"), "{answer}");
    let answer = http_get(&server, "/nothing").await;
    assert!(answer.starts_with("HTTP/1.1 404"), "{answer}");
    let mut client = TikvClient::connect(server.url()).await.expect("it listens");
    client.raw_get(RawGetRequest::default()).await.expect("answered");
    server.stop().await;
}

#[tokio::test]
async fn a_service_that_is_not_served_is_unimplemented() {
    let server = Server::start(echo()).await;
    let mut client = PdClient::connect(server.url()).await.expect("it listens");
    let status = client.get_members(GetMembersRequest::default()).await.expect_err("not served");
    assert_eq!(status.code(), Code::Unimplemented);
    server.stop().await;
}

#[tokio::test]
async fn a_server_stops_though_a_client_holds_a_stream_open() {
    let server = Server::start(echo()).await;
    let mut client = TikvClient::connect(server.url()).await.expect("it listens");
    let (requests, outgoing) = mpsc::channel(1);
    let mut responses =
        client.batch_commands(ReceiverStream::new(outgoing)).await.expect("a stream").into_inner();
    let address = server.stop().await;
    soon("the stream breaks", responses.message()).await.expect_err("cut");
    drop(requests);
    TcpListener::bind(address).await.expect("the port is free again");
}
