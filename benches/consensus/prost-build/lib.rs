//! Stands in for `prost-build` 0.11 while the crate `raft` is built, so that no
//! `protoc` is needed on the machine. `protox` reads the schema in pure Rust,
//! as everywhere in Esker, and a real `prost-build` generates the code.

use std::io::{Error, Result};
use std::path::{Path, PathBuf};

/// The part of the real `Config` that its only user here, `protobuf-build`,
/// calls.
#[derive(Default)]
pub struct Config(generator::Config);

impl Config {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn out_dir(&mut self, path: impl Into<PathBuf>) -> &mut Self {
        self.0.out_dir(path);
        self
    }

    pub fn compile_protos(
        &mut self,
        protos: &[impl AsRef<Path>],
        includes: &[impl AsRef<Path>],
    ) -> Result<()> {
        self.0.compile_fds(protox::compile(protos, includes).map_err(Error::other)?)
    }
}
