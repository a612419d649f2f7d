//! Why a request was not carried out, and how its client learns of that.
//!
//! Every failure is a [`StorageError`], and becomes an answer in one place. A failure that concerns
//! the region becomes a region error, which clients act on. A fault of the request itself becomes a
//! message for the user.

use esker_engine::EngineError;
use esker_model::RegionId;
use esker_raftstore::{RequestError, StoreError, SurveyError};
use esker_rpc::convert::Malformed;
use esker_rpc::proto::errorpb;
use esker_rpc::proto::kvrpcpb::*;
use esker_rpc::service::ScanHabit;
use tonic::Status;

use crate::Storage;

/// Why a request was not carried out.
#[derive(Debug)]
pub enum StorageError {
    /// For the part of the client that finds regions.
    Region(RequestError),
    /// For the user: what is wrong with the request. A repeated request would be refused again.
    Refused(String),
    /// The request is for another cluster, which perhaps had this address before.
    OtherCluster { asked: u64, here: u64 },
    /// The engine cannot read data that it should hold.
    Engine(EngineError),
    /// Stored data makes no sense.
    Damaged(String),
}

impl From<RequestError> for StorageError {
    fn from(error: RequestError) -> Self {
        match error {
            // Nothing about the region is wrong, so asking elsewhere would not help.
            RequestError::EmptyKey | RequestError::KeyTooLarge { .. } => {
                StorageError::Refused(error.to_string())
            }
            other => StorageError::Region(other),
        }
    }
}

impl From<Malformed> for StorageError {
    fn from(error: Malformed) -> Self {
        StorageError::Refused(error.to_string())
    }
}

impl From<SurveyError> for StorageError {
    fn from(error: SurveyError) -> Self {
        match error {
            SurveyError::Refused(error) => error.into(),
            SurveyError::Engine(error) => error.into(),
        }
    }
}

impl From<StoreError> for StorageError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Engine(error) => error.into(),
            damaged => StorageError::Damaged(damaged.to_string()),
        }
    }
}

impl From<EngineError> for StorageError {
    fn from(error: EngineError) -> Self {
        StorageError::Engine(error)
    }
}

/// What a client gets instead of an answer.
enum Refusal {
    /// Inside the response, where the client's region logic acts on it.
    Region(Box<errorpb::Error>),
    /// For the user: in the response if it has a place for a text, otherwise a status.
    Said(Status),
    /// For the user, always a status, because the client must not interpret a response.
    Status(Status),
}

impl Refusal {
    fn of(storage: &Storage, error: StorageError) -> Refusal {
        match error {
            StorageError::Region(error) => Refusal::Region(Box::new(error.to_proto())),
            StorageError::Refused(why) => Refusal::Said(Status::invalid_argument(why)),
            StorageError::OtherCluster { asked, here } => {
                Refusal::Status(Status::failed_precondition(format!(
                    "the request is for cluster {asked}, this store belongs to cluster {here}: \
                     check the client's placement addresses"
                )))
            }
            // The store has begun to hand its regions over, and another replica has the data. So
            // the client is sent there, as when a store stops.
            StorageError::Engine(error) if error.is_corruption() => {
                let (store, region) = (storage.store.store_id(), RegionId(0));
                Refusal::Region(Box::new(RequestError::Stopped { store, region }.to_proto()))
            }
            StorageError::Engine(error) => Refusal::Said(Status::data_loss(error.to_string())),
            StorageError::Damaged(what) => Refusal::Said(Status::data_loss(what)),
        }
    }
}

/// A response that has a place for a region error, and perhaps one for a text.
pub(crate) trait Refusable: Default {
    fn set_region_error(&mut self, error: errorpb::Error);

    /// Puts a text for the user into the response.
    ///
    /// # Errors
    /// The text's status, where the response has no place for a text. Responses to reads of several
    /// keys have a place for an error in each pair, but published clients take that error for data.
    fn set_text(&mut self, said: Status) -> Result<(), Status> {
        Err(said)
    }
}

macro_rules! refusable {
    (text { $($with:ident,)* } no_text { $($without:ident,)* }) => {
        $(impl Refusable for $with {
            fn set_region_error(&mut self, error: errorpb::Error) {
                self.region_error = Some(error.into());
            }

            fn set_text(&mut self, said: Status) -> Result<(), Status> {
                self.error = said.message().to_owned();
                Ok(())
            }
        })*
        $(impl Refusable for $without {
            fn set_region_error(&mut self, error: errorpb::Error) {
                self.region_error = Some(error.into());
            }
        })*
    };
}

refusable! {
    text {
        RawGetResponse,
        RawPutResponse,
        RawBatchPutResponse,
        RawDeleteResponse,
        RawBatchDeleteResponse,
        RawDeleteRangeResponse,
        RawGetKeyTtlResponse,
        RawCasResponse,
        RawChecksumResponse,
    }
    no_text {
        RawBatchGetResponse,
        RawScanResponse,
        RawBatchScanResponse,
        SplitRegionResponse,
    }
}

/// The answer. A failure is put into the response where the response has a place for it.
pub(crate) fn told<R: Refusable>(
    storage: &Storage,
    answer: Result<R, StorageError>,
) -> Result<R, Status> {
    let error = match answer {
        Ok(response) => return Ok(response),
        Err(error) => error,
    };
    let mut response = R::default();
    match Refusal::of(storage, error) {
        Refusal::Region(error) => response.set_region_error(*error),
        Refusal::Said(status) => response.set_text(status)?,
        Refusal::Status(status) => return Err(status),
    }
    Ok(response)
}

/// The answer to a scan for a client that ignores region errors. The client gets a status in their
/// place.
pub(crate) fn for_habit(
    answer: Result<RawScanResponse, Status>,
    habit: ScanHabit,
) -> Result<RawScanResponse, Status> {
    match answer {
        Ok(RawScanResponse { region_error: Some(error), .. })
            if habit == ScanHabit::IgnoresRegionErrors =>
        {
            Err(Status::unavailable(error.message))
        }
        answer => answer,
    }
}

impl Storage {
    /// The failure, for a response that has a place for nothing but a region error.
    pub fn region_error(&self, error: StorageError) -> errorpb::Error {
        match Refusal::of(self, error) {
            Refusal::Region(error) => *error,
            Refusal::Said(status) | Refusal::Status(status) => {
                errorpb::Error { message: status.message().to_owned(), ..Default::default() }
            }
        }
    }
}
