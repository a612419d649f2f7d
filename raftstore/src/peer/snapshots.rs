//! Snapshots of the region: one that takes the place of this peer's data, and the message that
//! goes with one to a follower.

use bytes::Bytes;
use esker_model::RegionId;
use esker_raft::{Group, LogIndex, Message, MessageBody, PeerId, SnapshotMeta};

use super::log::GroupLog;
use crate::apply::decode_snapshot;
use crate::envelope::Consensus;
use crate::error::StoreError;
use crate::message::ApplyTask;
use crate::snapshot::{ReceivedSnapshot, RegionSnapshotSource};

/// A snapshot for this peer, of which there is one at a time.
pub struct Snapshots {
    region: RegionId,
    incoming: Incoming,
}

/// While a snapshot is installed no other is received: the worker refuses it.
enum Incoming {
    Nothing,
    /// Its files are on the disk, and the group is being asked whether it wants them. It says so
    /// within the same call of the worker: then they are installed or removed.
    Received(ReceivedSnapshot),
    /// The group wanted it, and the apply worker has it, until the worker hears that it is in
    /// place. The engine may hold no data of the region meanwhile: nothing is read from it.
    Installing,
}

impl Snapshots {
    pub fn new(region: RegionId) -> Self {
        Snapshots { region, incoming: Incoming::Nothing }
    }

    pub fn is_installing(&self) -> bool {
        matches!(self.incoming, Incoming::Installing)
    }

    /// Takes a snapshot whose files are on this store's disk.
    pub fn received(&mut self, files: ReceivedSnapshot) {
        let before = std::mem::replace(&mut self.incoming, Incoming::Received(files));
        if let Incoming::Received(earlier) = before {
            earlier.discard();
        }
    }

    /// The group did not want the snapshot that was received: its files go.
    pub fn drop_unused(&mut self) {
        if let Incoming::Received(unused) = &self.incoming {
            unused.discard();
            self.incoming = Incoming::Nothing;
        }
    }

    /// The group wants the snapshot that was received. Returns the task that installs it.
    pub fn install(
        &mut self,
        generation: u64,
        meta: SnapshotMeta,
        data: Bytes,
    ) -> Result<ApplyTask, StoreError> {
        let region = self.region;
        let corrupt = |why: String| StoreError::Corrupt {
            what: format!("a snapshot of region {region}"),
            why,
        };
        let (descriptor, remembered) = decode_snapshot(data).map_err(corrupt)?;
        let Incoming::Received(files) = std::mem::replace(&mut self.incoming, Incoming::Installing)
        else {
            return Err(corrupt("its files are not here".into()));
        };
        Ok(ApplyTask::Install {
            region,
            generation,
            meta,
            descriptor,
            remembered: Box::new(remembered),
            files,
        })
    }

    /// The snapshot's data is in place.
    pub fn installed(&mut self) {
        self.incoming = Incoming::Nothing;
    }
}

/// The message that goes with a snapshot to a follower.
pub fn message(group: &Group<GroupLog>, to: PeerId, taken: &RegionSnapshotSource) -> Consensus {
    let message = Message {
        group: group.identity().group,
        from: group.id(),
        to,
        term: group.term(),
        body: MessageBody::InstallSnapshot {
            meta: Box::new(taken.meta.clone()),
            data: taken.data.clone(),
        },
    };
    let creates = Some(taken.descriptor.range.clone());
    Consensus { message, applied: LogIndex(0), creates }
}
