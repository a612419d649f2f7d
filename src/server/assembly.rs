//! The assembly of a store and its way to other stores. It is the same for the data store and for
//! the placement member's store.

use std::sync::Arc;

use esker_engine::{DataDir, Engines};
use esker_model::{StoreId, SystemClock};
use esker_raftstore::{Parts, RunningStore, Store, StoreConfig, StoreHandle};
use esker_rpc::transport::{AddressResolver, RaftTransport};

use super::outbox::{Audience, Events, NodeOutbox};
use super::traffic::Traffic;
use crate::Error;

/// What differs between the two stores of a node.
pub struct Plan {
    pub store: StoreId,
    /// The id of the data's cluster, or of the placement driver's group. Stores exchange messages
    /// only within it.
    pub cluster: u64,
    pub config: StoreConfig,
    /// Where other stores are.
    pub addresses: Arc<dyn AddressResolver>,
    /// What the store reports to.
    pub audience: Audience,
}

/// A store that runs, and receives messages of other stores.
pub struct OpenStore {
    running: RunningStore,
    events: Arc<Events>,
}

impl OpenStore {
    /// Opens the store on its engines and gives its parts threads. From then on it receives the
    /// messages of `traffic`. Must be called within a runtime.
    ///
    /// # Errors
    /// When the disk fails, what is on it contradicts itself, or the system refuses a thread.
    pub fn open(
        plan: Plan,
        data: &DataDir,
        engines: Engines,
        traffic: &Traffic,
    ) -> Result<OpenStore, Error> {
        let Plan { store, cluster, config, addresses, audience } = plan;
        let events = Arc::new(Events::default());
        let runtime = tokio::runtime::Handle::current();
        let transport = RaftTransport::new(addresses, store.0, cluster, runtime, events.clone());
        let opened = Store::open(Parts {
            store,
            kv: engines.kv,
            log: engines.log,
            snapshots: data.snap(),
            config,
            outbox: Arc::new(NodeOutbox::new(transport, audience)),
            clock: Arc::new(SystemClock::new()),
        })?;
        // The files of an interrupted installation have been used by now.
        data.empty_snapshots()?;
        let running = opened.start()?;
        let handle = running.handle().clone();
        events.connect(handle.clone());
        traffic.add(cluster, handle, data.snap());
        Ok(OpenStore { running, events })
    }

    pub fn handle(&self) -> &StoreHandle {
        self.running.handle()
    }

    /// Blocks until everything is on disk and the directory is free.
    pub fn stop(self) {
        self.events.disconnect();
        self.running.stop();
    }
}
