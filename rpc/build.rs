//! Compiles the schemas in `proto/` to Rust, in Rust, so that no `protoc` is needed on the machine.

use std::error::Error;

const SCHEMAS: [&str; 13] = [
    "proto/command.proto",
    "proto/deadlock.proto",
    "proto/eraftpb.proto",
    "proto/errorpb.proto",
    "proto/esker.proto",
    "proto/etcdserverpb.proto",
    "proto/health.proto",
    "proto/keyspacepb.proto",
    "proto/kvrpcpb.proto",
    "proto/metapb.proto",
    "proto/mvccpb.proto",
    "proto/pdpb.proto",
    "proto/tikvpb.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto");
    let schemas = protox::compile(SCHEMAS, ["proto"])?;
    tonic_prost_build::configure()
        // Keys and values are slices of the message that they came in, not copies.
        .bytes(".")
        // It is large and rarely there, and an answer can hold a hundred thousand pairs.
        .boxed(".kvrpcpb.KvPair.error")
        // Each is large and rarely there, and every answer of every procedure would be as large.
        .boxed("region_error")
        .boxed("exec_details_v2")
        .boxed("exec_details")
        // A method that a service does not implement answers UNIMPLEMENTED.
        .generate_default_stubs(true)
        .include_file("schemas.rs")
        .compile_fds(schemas)?;
    Ok(())
}
