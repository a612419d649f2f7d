//! The `Tikv` service over a [`StoreService`].

use std::sync::Arc;

use tonic::codegen::BoxStream;
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status, Streaming};

use super::{MAX_MESSAGE_BYTES, batch};
use crate::procedures::with_procedures;
use crate::proto::kvrpcpb;
use crate::proto::tikvpb::tikv_server::{Tikv, TikvServer};
use crate::proto::tikvpb::{BatchCommandsRequest, BatchCommandsResponse};
use crate::service::{self, Caller, Procedure, ScanHabit, StoreService};

/// Serves the calls of the `Tikv` service from a store.
#[derive(Debug)]
pub struct TikvService<S> {
    service: Arc<S>,
}

impl<S: StoreService> TikvService<S> {
    pub fn new(service: Arc<S>) -> Self {
        TikvService { service }
    }

    /// Answers a unary call.
    async fn answer<P: Procedure>(
        &self,
        request: Request<P>,
    ) -> Result<Response<P::Response>, Status> {
        let caller = Caller { scans: scan_habit(request.metadata()) };
        let request: service::Request = request.into_inner().into();
        let name = request.name();
        let reply = self.service.handle(request, caller).await?;
        P::response(reply).map(Response::new).ok_or_else(|| {
            Status::internal(format!("the store answered {name} with another reply"))
        })
    }

    /// The service with the limits of this crate, ready for [`tonic::service::Routes`].
    pub fn into_server(self) -> TikvServer<Self> {
        TikvServer::new(self)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES)
    }
}

/// Recognises two published clients with special habits by their headers. Both are built on
/// tonic 0.10, which no other published client uses. Only the later accepts compressed answers.
fn scan_habit(headers: &MetadataMap) -> ScanHabit {
    let of = |name| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
    // An application may put its own name before tonic's.
    let by_tonic_0_10 = of("user-agent").split(' ').any(|part| part.starts_with("tonic/0.10."));
    let takes_gzip = of("grpc-accept-encoding").split(',').any(|kind| kind.trim() == "gzip");
    match (by_tonic_0_10, takes_gzip) {
        (true, true) => ScanHabit::StopsOrWraps,
        (true, false) => ScanHabit::IgnoresRegionErrors,
        (false, _) => ScanHabit::Walks,
    }
}

/// Generates the service from the table of procedures.
macro_rules! tikv_service {
    (
        batched { $($batched:ident($bq:ident) -> $br:ident = $bm:ident,)* }
        alone { $($alone:ident($aq:ident) -> $ar:ident = $am:ident,)* }
    ) => {
        #[tonic::async_trait]
        impl<S: StoreService> Tikv for TikvService<S> {
            $(
                async fn $bm(
                    &self,
                    request: Request<kvrpcpb::$bq>,
                ) -> Result<Response<kvrpcpb::$br>, Status> {
                    self.answer(request).await
                }
            )*
            $(
                async fn $am(
                    &self,
                    request: Request<kvrpcpb::$aq>,
                ) -> Result<Response<kvrpcpb::$ar>, Status> {
                    self.answer(request).await
                }
            )*
            async fn batch_commands(
                &self,
                request: Request<Streaming<BatchCommandsRequest>>,
            ) -> Result<Response<BoxStream<BatchCommandsResponse>>, Status> {
                let responses =
                    batch::Responses::new(Arc::clone(&self.service), request.into_inner());
                Ok(Response::new(Box::pin(responses)))
            }
        }
    };
}

with_procedures!(tikv_service);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_with_habits_of_their_own_are_known_by_their_headers() {
        let habit = |agent: &'static str, accepts: Option<&'static str>| {
            let mut headers = MetadataMap::new();
            headers.insert("user-agent", agent.parse().unwrap());
            if let Some(accepts) = accepts {
                headers.insert("grpc-accept-encoding", accepts.parse().unwrap());
            }
            scan_habit(&headers)
        };
        assert_eq!(habit("tonic/0.10.2", Some("gzip,identity")), ScanHabit::StopsOrWraps);
        assert_eq!(habit("app/1 tonic/0.10.2", Some("gzip")), ScanHabit::StopsOrWraps);
        assert_eq!(habit("tonic/0.10.2", None), ScanHabit::IgnoresRegionErrors);
        assert_eq!(habit("tonic/0.14.9", Some("gzip")), ScanHabit::Walks);
        assert_eq!(habit("grpc-go/1.63.2", Some("gzip")), ScanHabit::Walks);
        assert_eq!(scan_habit(&MetadataMap::new()), ScanHabit::Walks);
    }
}
