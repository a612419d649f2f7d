//! What `make bench ARGS='…'` takes.

use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;

/// Measures whole clusters on this machine
#[derive(Debug, Parser)]
#[command(name = "make bench", after_help = "Example:\n  make bench ARGS='--rounds 1 --only grpc'")]
pub struct Options {
    /// Rounds; the table has the medians
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=99))]
    pub rounds: u32,
    /// Seconds that each load runs for
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=600))]
    pub seconds: u64,
    /// Numbers of regions beside one
    #[arg(long, value_delimiter = ',', default_value = "30,300",
          value_parser = clap::value_parser!(u32).range(2..=10_000))]
    pub regions: Vec<u32>,
    /// Only the systems whose name contains this: embedded, grpc, etcd, or `300 regions`
    #[arg(long)]
    pub only: Option<String>,
    /// Only the loads whose name contains this, such as `64 clients`
    #[arg(long)]
    pub load: Option<String>,
    /// The program of etcd; without one, etcd is left out
    #[arg(long, default_value = "etcd")]
    pub etcd: PathBuf,
    /// Where the data is kept while it runs: on a disk, not in memory
    #[arg(long, default_value_os_t = std::env::temp_dir())]
    pub dir: PathBuf,
    /// The file for the JSON
    #[arg(long, default_value_os_t = std::env::temp_dir().join("esker-bench.json"))]
    pub json: PathBuf,
    /// Cargo says so to every benchmark
    #[arg(long, hide = true)]
    bench: bool,
}

impl Options {
    pub fn window(&self) -> Duration {
        Duration::from_secs(self.seconds)
    }

    pub fn warm_up(&self) -> Duration {
        Duration::from_secs(1)
    }

    pub fn wants(&self, system: &str) -> bool {
        self.only.as_ref().is_none_or(|only| system.contains(only.as_str()))
    }
}
