//! YCSB, the Yahoo! Cloud Serving Benchmark (Cooper et al., SoCC 2010), against any [`Database`]. It
//! is what `esker ycsb` runs, and no promise is made to other programs.
//!
//! [`Options`] and a database flow in. A [`PhaseReport`] for each phase flows out. The load phase
//! inserts records `0..records`, and the run phase makes the requests of a [`Workload`] on them.
//! Keys, distributions and shares are those of the original: hashed keys, scrambled zipfian or
//! latest popularity with constant 0.99, scans of 1 to 100 records.
//!
//! Where a plain key-value store forces a choice:
//! - A record is one value that holds all the fields, and a read reads all of them.
//! - An update writes the whole record, as YCSB does with `writeallfields=true`, because writing
//!   one field of a value would need a read first. A read-modify-write does read, and changes one
//!   field.
//! - A record that is not found, or is not of the expected size, is an error.
//!
//! Promises: the requests follow from the seed. A client whose request fails goes on with its next
//! request. Every request is counted either in a histogram or as an error.

mod database;
mod generator;
mod measure;
mod phase;
mod record;
mod report;
mod workload;

#[cfg(feature = "tikv-target")]
pub use database::TikvClient;
pub use database::{BareRocksDb, Database, DatabaseError, EtcdClient};
pub use measure::Kind;
pub use phase::{GIVE_UP_AFTER, Length, Options, Progress, load, run};
pub use record::{RecordShape, key as record_key};
pub use report::{CutShort, Phase, PhaseReport, RequestReport};
pub use workload::{Mix, Workload};
