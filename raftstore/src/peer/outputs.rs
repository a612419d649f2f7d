//! What a worker's turn puts out.

use esker_model::RegionId;

use crate::disk::Seen;
use crate::envelope::Envelope;
use crate::message::{ApplyTask, LogTask};

/// What all peers of a worker want after one turn, gathered so that it leaves in batches.
#[derive(Debug, Default)]
pub struct Outputs {
    /// The appends of all regions: one task for the log writer.
    pub log: LogTask,
    pub apply: Vec<(RegionId, ApplyTask)>,
    /// May leave at once, beside the log write.
    pub messages: Vec<Envelope>,
    /// Where this worker's regions won or lost their leadership.
    pub leadership: Vec<RegionId>,
    /// What was seen of the disk.
    pub disk: Seen,
}
