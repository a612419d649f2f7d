//! The network between the machines, and between machines and clients.
//!
//! Connections of clients carry bytes in order, late, and not at all while the network is cut; a
//! connection ends when either machine does. Between stores there are single messages, which may
//! also be lost and overtake each other.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use esker_rpc::channel::{Dial, Stream};
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

/// A machine, or the place of a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Host(pub u32);

impl std::fmt::Display for Host {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            members @ 0..STORES => write!(f, "member{}", members + 1),
            stores @ STORES..CLIENTS => write!(f, "store{}", stores - STORES + 1),
            clients => write!(f, "client{}", clients - CLIENTS + 1),
        }
    }
}

/// The first host that is a store's, and the first that is a client's.
pub const STORES: u32 = 10;
pub const CLIENTS: u32 = 100;

impl Host {
    pub fn member(number: u32) -> Host {
        Host(number)
    }

    pub fn store(number: u32) -> Host {
        Host(STORES + number)
    }

    pub fn client(number: u32) -> Host {
        Host(CLIENTS + number)
    }
}

/// Bytes that wait on one side of a connection.
const BUFFER_BYTES: usize = 64 << 10;
/// How often a connection looks at whether the network is whole again.
const LOOK: Duration = Duration::from_millis(20);
/// How long a machine that lost power is not missed by the other sides of its connections.
const SILENCE: Duration = Duration::from_secs(5);
/// How long a new connection waits for a network that is cut.
const SYN_PATIENCE: Duration = Duration::from_secs(3);

/// What the network does to everything that it carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quality {
    /// The longest that a message or a piece of a connection is on its way.
    pub delay_ms: u64,
    /// Of a hundred messages between stores, how many are lost.
    pub loss_percent: u32,
}

/// One end where connections arrive.
type Door = mpsc::UnboundedSender<DuplexStream>;

struct Inner {
    quality: Quality,
    rng: ChaCha8Rng,
    /// In one direction each.
    cuts: BTreeSet<(Host, Host)>,
    doors: BTreeMap<String, (Host, Door)>,
    /// Changes when a host's connections all end.
    lives: BTreeMap<Host, watch::Sender<u64>>,
    /// Whether the power of a host has gone, so that nothing leaves it.
    powers: BTreeMap<Host, Arc<AtomicBool>>,
    /// The old connections of a host that lost power end without a word to the other side, which
    /// finds out by itself, or at this time.
    silences: BTreeMap<Host, Instant>,
}

impl Inner {
    fn is_cut(&self, from: Host, to: Host) -> bool {
        let is_dark =
            |host| self.powers.get(&host).is_some_and(|power| power.load(Ordering::SeqCst));
        self.cuts.contains(&(from, to)) || is_dark(from) || is_dark(to)
    }
}

/// The network. Clones are the same one.
#[derive(Clone)]
pub struct Network(Arc<Mutex<Inner>>);

impl Network {
    pub fn new(seed: u64, quality: Quality) -> Network {
        Network(Arc::new(Mutex::new(Inner {
            quality,
            rng: ChaCha8Rng::seed_from_u64(seed),
            cuts: BTreeSet::new(),
            doors: BTreeMap::new(),
            lives: BTreeMap::new(),
            powers: BTreeMap::new(),
            silences: BTreeMap::new(),
        })))
    }

    pub fn set_quality(&self, quality: Quality) {
        self.0.lock().quality = quality;
    }

    pub fn cut(&self, from: Host, to: Host) {
        self.0.lock().cuts.insert((from, to));
    }

    /// Cuts are mended.
    pub fn heal(&self) {
        self.0.lock().cuts.clear();
    }

    fn is_cut(&self, from: Host, to: Host) -> bool {
        self.0.lock().is_cut(from, to)
    }

    /// Nothing leaves the host while `is_dark`.
    pub fn watch_power(&self, host: Host, is_dark: Arc<AtomicBool>) {
        self.0.lock().powers.insert(host, is_dark);
    }

    /// When a message that is sent now arrives, if it does.
    pub fn fate(&self, from: Host, to: Host) -> Option<Duration> {
        let mut inner = self.0.lock();
        let Quality { delay_ms, loss_percent } = inner.quality;
        let is_lost = inner.rng.random_range(0..100) < loss_percent;
        let delay = Duration::from_micros(inner.rng.random_range(100..=delay_ms.max(1) * 1000));
        (!is_lost && !inner.is_cut(from, to)).then_some(delay)
    }

    /// Whether a message that has been under way arrives.
    pub fn arrives(&self, from: Host, to: Host) -> bool {
        !self.is_cut(from, to)
    }

    /// Connections to `address` from now on; `host` is where it is.
    pub fn listen(&self, host: Host, address: &str) -> mpsc::UnboundedReceiver<DuplexStream> {
        let (door, arriving) = mpsc::unbounded_channel();
        self.0.lock().doors.insert(address.to_owned(), (host, door));
        arriving
    }

    /// Ends all connections of a host, and those of nobody else.
    pub fn hang_up(&self, host: Host) {
        if let Some(life) = self.0.lock().lives.get(&host) {
            life.send_modify(|life| *life += 1);
        }
    }

    /// The same, and for some time the other sides do not hear of it.
    pub fn fall_silent(&self, host: Host) {
        let until = Instant::now() + SILENCE;
        self.0.lock().silences.insert(host, until);
        self.close(host);
    }

    /// Until when the end of a connection is not heard of.
    fn silence(&self, (from, to): (Host, Host)) -> Option<Instant> {
        let inner = self.0.lock();
        [from, to].iter().filter_map(|host| inner.silences.get(host).copied()).max()
    }

    /// The host is gone: nothing listens there any more.
    pub fn close(&self, host: Host) {
        self.0.lock().doors.retain(|_, (at, _)| *at != host);
        self.hang_up(host);
    }

    fn life(&self, host: Host) -> watch::Receiver<u64> {
        self.0.lock().lives.entry(host).or_insert_with(|| watch::Sender::new(0)).subscribe()
    }

    /// The way into the network from one host.
    pub fn from(&self, host: Host) -> NetworkDial {
        NetworkDial { network: self.clone(), host }
    }

    /// Carries what one side writes to the other until the connection breaks.
    async fn carry(
        self,
        (from, to): (Host, Host),
        mut source: tokio::io::ReadHalf<DuplexStream>,
        mut sink: tokio::io::WriteHalf<DuplexStream>,
        mut lives: (watch::Receiver<u64>, watch::Receiver<u64>),
    ) {
        let carrying = async {
            let mut piece = vec![0; BUFFER_BYTES];
            loop {
                let length = match source.read(&mut piece).await {
                    Ok(0) | Err(_) => break,
                    Ok(length) => length,
                };
                let delay = {
                    let mut inner = self.0.lock();
                    let longest = inner.quality.delay_ms.max(1) * 1000;
                    Duration::from_micros(inner.rng.random_range(100..=longest))
                };
                tokio::time::sleep(delay).await;
                while self.is_cut(from, to) {
                    tokio::time::sleep(LOOK).await;
                }
                if sink.write_all(&piece[..length]).await.is_err() {
                    break;
                }
            }
        };
        tokio::select! {
            biased;
            _ = lives.0.changed() => {}
            _ = lives.1.changed() => {}
            () = carrying => {}
        }
        // Both ends are held until then.
        if let Some(until) = self.silence((from, to)) {
            tokio::time::sleep_until(until).await;
        }
        let _ = sink.shutdown().await;
    }
}

/// How the programs on one host open connections.
pub struct NetworkDial {
    network: Network,
    host: Host,
}

impl Dial for NetworkDial {
    fn dial(&self, address: &str) -> BoxFuture<'static, io::Result<Box<dyn Stream>>> {
        let (network, from, address) = (self.network.clone(), self.host, address.to_owned());
        Box::pin(async move {
            let refused = || io::Error::from(io::ErrorKind::ConnectionRefused);
            let known = network.0.lock().doors.get(&address).map(|(to, _)| *to);
            let to = known.ok_or_else(refused)?;
            let connecting = async {
                while network.is_cut(from, to) || network.is_cut(to, from) {
                    tokio::time::sleep(LOOK).await;
                }
            };
            tokio::time::timeout(SYN_PATIENCE, connecting)
                .await
                .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?;
            let door = network.0.lock().doors.get(&address).map(|(_, door)| door.clone());
            let (near, near_wire) = tokio::io::duplex(BUFFER_BYTES);
            let (far, far_wire) = tokio::io::duplex(BUFFER_BYTES);
            door.ok_or_else(refused)?.send(far).map_err(|_| refused())?;
            let (near_source, near_sink) = tokio::io::split(near_wire);
            let (far_source, far_sink) = tokio::io::split(far_wire);
            let lives = (network.life(from), network.life(to));
            let there = network.clone().carry((from, to), near_source, far_sink, lives.clone());
            let back = network.clone().carry((to, from), far_source, near_sink, lives);
            tokio::spawn(async move {
                tokio::join!(there, back);
            });
            Ok(Box::new(near) as Box<dyn Stream>)
        })
    }
}
