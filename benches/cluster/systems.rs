//! What is measured: clusters in this process, clusters of processes, and etcd. Each is loaded once
//! and started anew for every round, so that nothing else runs while it is measured.

use std::fmt;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use esker::client::admin::SplitAt;
use esker::ycsb::{
    self, Database, DatabaseError, EtcdClient, Length, Progress, RecordShape, Workload,
};
use esker::{AdminClient, Cluster, ClusterOptions, KvClient, PlacementClient};
use tokio::process::{Child, Command};

use crate::Outcome;
use crate::options::Options;
use crate::rows::{LARGE_BATCHES, Load, RECORDS, VALUE_BYTES};

/// How long a system may take to start, and a leader to move.
const PATIENCE: Duration = Duration::from_secs(120);
const LOOK_AGAIN: Duration = Duration::from_millis(100);
const NODES: usize = 3;
/// The most keys at which a region is split by one request.
const SPLIT_KEYS: usize = 256;
/// As many outstanding as one likes, of small values.
const MANY: usize = 4_096;
/// Bytes of a small value.
pub const SMALL: usize = 16;

/// Where the engine runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// Three nodes and the clients in one process.
    Embedded,
    /// Three processes, and the clients in another one, over gRPC.
    Processes,
    /// Three processes of etcd.
    Etcd,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Place::Embedded => "embedded",
            Place::Processes => "grpc",
            Place::Etcd => "etcd",
        })
    }
}

pub struct System {
    place: Place,
    regions: u32,
    folder: PathBuf,
    addresses: Vec<String>,
    etcd: PathBuf,
    /// The regions are there, and are to be led by all stores.
    is_split: bool,
}

/// A system that was started.
pub enum Running {
    Embedded { cluster: Cluster, client: Arc<KvClient> },
    Processes { children: Vec<Child>, client: Arc<KvClient> },
    Etcd { children: Vec<Child>, client: Arc<EtcdClient> },
}

impl fmt::Display for System {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.place, self.regions) {
            (Place::Etcd, _) => f.write_str("etcd"),
            (place, 1) => write!(f, "{place}, 1 region"),
            (place, regions) => write!(f, "{place}, {regions} regions"),
        }
    }
}

fn free_address() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("loopback has a free port");
    listener.local_addr().expect("it is bound").to_string()
}

impl System {
    /// All systems that the options ask for.
    pub fn all(options: &Options, folder: &Path) -> Vec<System> {
        let regions = || std::iter::once(1).chain(options.regions.iter().copied());
        let places = [Place::Embedded, Place::Processes];
        let mut all: Vec<_> = places
            .into_iter()
            .flat_map(|place| regions().map(move |count| (place, count)))
            .collect();
        let works = std::process::Command::new(&options.etcd)
            .arg("--version")
            .stdout(Stdio::null())
            .status();
        match works {
            Ok(status) if status.success() => all.push((Place::Etcd, 1)),
            _ => eprintln!(
                "etcd is left out: `{}` is no program here; Debian's package is etcd-server",
                options.etcd.display()
            ),
        }
        all.into_iter()
            .map(|(place, regions)| System {
                place,
                regions,
                folder: folder.join(format!("{place}-{regions}")),
                addresses: (0..2 * NODES).map(|_| free_address()).collect(),
                etcd: options.etcd.clone(),
                is_split: false,
            })
            .collect()
    }

    pub fn place(&self) -> Place {
        self.place
    }

    pub fn regions(&self) -> u32 {
        self.regions
    }

    /// The loads of this system.
    pub fn loads(&self, options: &Options) -> Vec<Load> {
        let mut loads = vec![Load::updates(64), Load::updates(256)];
        if self.regions == 1 {
            loads.push(Load::updates(1));
            loads.push(Load::new(Workload::C, 64, VALUE_BYTES));
            if self.place != Place::Embedded {
                loads.push(Load::new(Workload::A, 64, VALUE_BYTES));
                loads.push(Load::new(Workload::F, 64, VALUE_BYTES));
            }
            if self.place != Place::Etcd {
                loads.push(Load::new(Workload::U, MANY, SMALL));
                loads.extend(LARGE_BATCHES.map(|(bytes, _)| Load::new(Workload::U, 64, bytes)));
            }
        }
        loads.sort();
        loads.retain(|load| {
            options.load.as_ref().is_none_or(|wanted| load.to_string().contains(wanted.as_str()))
        });
        loads
    }

    /// Makes the data that the loads want: the records, in so many regions, led by all stores.
    pub async fn prepare(&mut self, options: &Options) -> Outcome<()> {
        std::fs::create_dir_all(&self.folder)?;
        let running = self.start().await?;
        match &running {
            Running::Embedded { client, .. } | Running::Processes { client, .. } => {
                if self.regions > 1 {
                    self.split(client.placement()).await?;
                    self.is_split = true;
                }
                load(client, options).await?;
            }
            Running::Etcd { client, .. } => load(client, options).await?,
        }
        running.stop().await;
        Ok(())
    }

    pub async fn start(&mut self) -> Outcome<Running> {
        match self.place {
            Place::Embedded => {
                let data_dir = Some(self.folder.clone());
                let options = ClusterOptions { data_dir, ..ClusterOptions::default() };
                let cluster = Cluster::start(options).await?;
                if self.is_split {
                    self.spread(cluster.placement()).await?;
                }
                let client = Arc::new(cluster.local_client().await?);
                Ok(Running::Embedded { cluster, client })
            }
            Place::Processes => {
                let join = self.addresses[..NODES].join(",");
                let mut children = Vec::new();
                for (number, address) in self.addresses[..NODES].iter().enumerate() {
                    let data = self.folder.join(number.to_string());
                    let child = Command::new(env!("CARGO_BIN_EXE_esker"))
                        .args(["start", "--listen", address, "--join", &join, "--data-dir"])
                        .arg(data)
                        .env("ESKER_LOG", "warn")
                        .stdin(Stdio::null())
                        .stdout(Stdio::null())
                        .kill_on_drop(true)
                        .spawn()?;
                    children.push(child);
                }
                let members = self.addresses[..NODES].to_vec();
                let placement = PlacementClient::connect_within(members, PATIENCE).await?;
                self.ready(&placement).await?;
                if self.is_split {
                    self.spread(&placement).await?;
                }
                let client = Arc::new(KvClient::new(placement, []));
                Ok(Running::Processes { children, client })
            }
            Place::Etcd => {
                let (clients, peers) = self.addresses.split_at(NODES);
                let cluster: Vec<_> = peers
                    .iter()
                    .enumerate()
                    .map(|(number, peer)| format!("m{number}=http://{peer}"))
                    .collect();
                let mut children = Vec::new();
                for number in 0..NODES {
                    let client = format!("http://{}", clients[number]);
                    let peer = format!("http://{}", peers[number]);
                    let child = Command::new(&self.etcd)
                        .args(["--name", &format!("m{number}"), "--data-dir"])
                        .arg(self.folder.join(number.to_string()))
                        .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
                        .args(["--listen-peer-urls", &peer])
                        .args(["--initial-advertise-peer-urls", &peer])
                        .args(["--initial-cluster", &cluster.join(",")])
                        .args(["--quota-backend-bytes", "8589934592", "--logger", "zap"])
                        .args(["--log-level", "error"])
                        .stdin(Stdio::null())
                        .stdout(Stdio::null())
                        .stderr(Stdio::null())
                        .kill_on_drop(true)
                        .spawn()?;
                    children.push(child);
                }
                let began = Instant::now();
                let client = loop {
                    let connected = EtcdClient::connect(clients).await;
                    match connected {
                        Ok(client)
                            if client.is_at_leader()
                                && client.write("ready".into(), "".into()).await.is_ok() =>
                        {
                            break client;
                        }
                        _ if began.elapsed() > PATIENCE => return Err("etcd does not start".into()),
                        _ => tokio::time::sleep(LOOK_AGAIN).await,
                    }
                };
                Ok(Running::Etcd { children, client: Arc::new(client) })
            }
        }
    }

    /// Waits until all regions have three replicas and a leader.
    async fn ready(&self, placement: &PlacementClient) -> Outcome<()> {
        let began = Instant::now();
        loop {
            let regions = placement.scan_regions(&esker::model::KeyRange::all(), 0).await;
            let complete = |info: &esker::client::RegionInfo| {
                info.region.peers.len() == NODES && info.leader.is_some() && info.pending.is_empty()
            };
            if regions.is_ok_and(|found| found.len() >= 2 && found.iter().all(complete)) {
                return Ok(());
            }
            if began.elapsed() > PATIENCE {
                return Err(format!("{self} does not get ready").into());
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    /// Splits the records into regions, and waits until every store leads its share.
    async fn split(&self, placement: &PlacementClient) -> Outcome<()> {
        let mut keys: Vec<_> = (0..RECORDS).map(ycsb::record_key).collect();
        keys.sort();
        let each = keys.len() / self.regions as usize;
        let cuts: Vec<_> = keys.iter().skip(each).step_by(each).cloned().collect();
        let cuts = &cuts[..(self.regions as usize - 1).min(cuts.len())];
        let admin = AdminClient::new(placement.clone());
        for part in cuts.chunks(SPLIT_KEYS) {
            let region =
                placement.region_by_key(part[0].clone()).await?.ok_or("no region has the key")?;
            admin.split_region(region.region.id, &SplitAt::Keys(part.to_vec())).await?;
        }
        self.spread(placement).await
    }

    /// Waits until every store leads its share of the regions.
    async fn spread(&self, placement: &PlacementClient) -> Outcome<()> {
        let began = Instant::now();
        loop {
            let regions = placement.scan_regions(&esker::model::KeyRange::all(), 0).await?;
            let mut led = std::collections::BTreeMap::new();
            for info in &regions {
                if let Some(leader) = info.leader {
                    *led.entry(leader.store).or_insert(0_usize) += 1;
                }
            }
            let fair = self.regions as usize / NODES;
            if led.len() == NODES && led.values().all(|led| led * 10 >= fair * 8) {
                return Ok(());
            }
            if began.elapsed() > PATIENCE {
                return Err(format!("the leaders of {self} are not spread: {led:?}").into());
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }
}

async fn load<D: Database>(client: &Arc<D>, options: &Options) -> Outcome<()> {
    let table = Arc::new(Table::new(client, VALUE_BYTES));
    let settings = ycsb::Options {
        workload: Workload::U,
        records: RECORDS,
        length: Length::Time(options.window()),
        threads: 64,
        shape: RecordShape { fields: 1, field_size: VALUE_BYTES },
        seed: 7,
        warmup: None,
        batch: 16,
        give_up_after: Duration::from_secs(30),
    };
    crate::check(&ycsb::load(&table, &settings, &Arc::new(Progress::default())).await)
}

impl Running {
    /// The processes that it consists of, beside this one.
    pub fn processes(&self) -> Vec<u32> {
        match self {
            Running::Embedded { .. } => Vec::new(),
            Running::Processes { children, .. } | Running::Etcd { children, .. } => {
                children.iter().filter_map(Child::id).collect()
            }
        }
    }

    pub async fn stop(self) {
        match self {
            Running::Embedded { cluster, .. } => cluster.stop().await,
            Running::Processes { children, .. } | Running::Etcd { children, .. } => {
                for child in &children {
                    if let Some(id) =
                        child.id().and_then(|id| rustix::process::Pid::from_raw(id as i32))
                    {
                        // A process that has ended already needs no signal.
                        let _ = rustix::process::kill_process(id, rustix::process::Signal::TERM);
                    }
                }
                for mut child in children {
                    // One that does not end in time is killed when it is dropped.
                    let _ = tokio::time::timeout(PATIENCE, child.wait()).await;
                }
            }
        }
    }
}

/// The records of one size. Their keys differ from those of another size, so that a load finds what
/// it expects.
pub struct Table<D> {
    database: Arc<D>,
    prefix: Option<String>,
}

impl<D> Table<D> {
    pub fn new(database: &Arc<D>, value_bytes: usize) -> Table<D> {
        let prefix = (value_bytes != VALUE_BYTES).then(|| format!("user5-{value_bytes}-"));
        Table { database: Arc::clone(database), prefix }
    }

    fn key(&self, key: Bytes) -> Bytes {
        match &self.prefix {
            None => key,
            Some(prefix) => [prefix.as_bytes(), &key].concat().into(),
        }
    }
}

impl<D: Database> Database for Table<D> {
    async fn read(&self, key: Bytes) -> Result<Option<Bytes>, DatabaseError> {
        self.database.read(self.key(key)).await
    }

    async fn write(&self, key: Bytes, value: Bytes) -> Result<(), DatabaseError> {
        self.database.write(self.key(key), value).await
    }

    async fn write_batch(&self, records: Vec<(Bytes, Bytes)>) -> Result<(), DatabaseError> {
        let records = records.into_iter().map(|(key, value)| (self.key(key), value)).collect();
        self.database.write_batch(records).await
    }

    async fn scan(&self, start: Bytes, limit: u32) -> Result<Vec<(Bytes, Bytes)>, DatabaseError> {
        self.database.scan(self.key(start), limit).await
    }
}
