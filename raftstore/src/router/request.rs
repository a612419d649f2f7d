//! One request of one region: what can be asked, and the way to the answer.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use esker_model::limits::{MAX_BOUND_BYTES, MAX_COMMAND_BYTES, MAX_STORED_KEY_BYTES};
use esker_model::{Epoch, RegionId};
use tokio::sync::oneshot;
use tokio::time::Sleep;

use super::StoreHandle;
use super::hold::Held;
use crate::command::{Keys, Mutation};
use crate::door::check_request;
use crate::error::RequestError;
use crate::message::{
    Admin, AdminRequest, AdminResult, Answer, Input, ReadRequest, RegionStatus, Reply,
    RequestContext, WriteRequest, WriteResult,
};
use crate::read::RegionSnapshot;

/// Something that a region can be asked.
pub trait Call: Clone + Unpin {
    type Answer;
    /// Whether the region may be another afterwards: then the outcome is unknown where no answer
    /// comes.
    const CHANGES: bool;
    /// Whether the request is held and sent again while its refusal is one that is over soon.
    const IS_HELD: bool;

    /// What can be answered on the caller's thread, without the region's worker.
    fn answer_here(&self, _store: &StoreHandle, _region: RegionId) -> Option<Self::Answer> {
        None
    }

    /// The message to the region's worker, if it is one that may be sent, and if there is room for
    /// it in the store.
    fn input(
        self,
        store: &StoreHandle,
        region: RegionId,
        reply: Reply<Self::Answer>,
    ) -> Result<Input, RequestError>;
}

/// A request that is not sent yet. It is sent when it is awaited, and again for as long as it is
/// held. [`Request::start`] sends it once, for callers without an executor.
#[must_use = "a request is sent when it is awaited or started"]
pub struct Request<'a, C: Call> {
    store: &'a StoreHandle,
    region: RegionId,
    call: C,
    held: Held,
    at: At<C::Answer>,
}

/// Where a request is that is awaited.
enum At<T> {
    /// Here, and new.
    New,
    /// Here, to be sent.
    Due,
    /// With the region's worker.
    Sent(Answer<T>),
    /// Refused, and held.
    Held(Pin<Box<Sleep>>),
}

impl<'a, C: Call> Request<'a, C> {
    pub(super) fn new(store: &'a StoreHandle, region: RegionId, call: C) -> Self {
        Request { store, region, call, held: Held::default(), at: At::New }
    }

    /// Sends the request once. The answer comes through the channel, which the store closes when
    /// it stops.
    ///
    /// # Errors
    /// When the request cannot be sent. It has had no effect then.
    pub fn start(self) -> Result<Answer<C::Answer>, RequestError> {
        match self.call.answer_here(self.store, self.region) {
            Some(answer) => {
                let (reply, receiver) = oneshot::channel();
                let _ = reply.send(Ok(answer));
                Ok(receiver)
            }
            None => send(self.store, self.region, self.call),
        }
    }

    /// The worker drops a reply only when the store stops.
    fn no_answer(&self) -> RequestError {
        if C::CHANGES {
            RequestError::Undetermined(self.region)
        } else {
            self.store.stopped(self.region)
        }
    }
}

fn send<C: Call>(
    store: &StoreHandle,
    region: RegionId,
    call: C,
) -> Result<Answer<C::Answer>, RequestError> {
    let (reply, answer) = oneshot::channel();
    store.deliver(region, call.input(store, region, reply)?)?;
    Ok(answer)
}

impl<C: Call> Future for Request<'_, C> {
    type Output = Result<C::Answer, RequestError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.get_mut();
        loop {
            let outcome = match &mut this.at {
                At::New => match this.call.answer_here(this.store, this.region) {
                    Some(answer) => Ok(answer),
                    None => {
                        this.at = At::Due;
                        continue;
                    }
                },
                At::Due => match send(this.store, this.region, this.call.clone()) {
                    Ok(answer) => {
                        this.at = At::Sent(answer);
                        continue;
                    }
                    Err(refused) => Err(refused),
                },
                At::Sent(answer) => match ready!(Pin::new(answer).poll(cx)) {
                    Ok(answer) => answer,
                    Err(_) => Err(this.no_answer()),
                },
                At::Held(sleep) => {
                    ready!(sleep.as_mut().poll(cx));
                    this.at = At::Due;
                    continue;
                }
            };
            // What is held has had no effect, as every error but an unknown outcome promises.
            let wait = match &outcome {
                Err(error) if C::IS_HELD => this.held.next_wait(&this.store.held, error),
                _ => None,
            };
            match wait {
                Some(wait) => this.at = At::Held(Box::pin(tokio::time::sleep(wait))),
                None => return Poll::Ready(outcome),
            }
        }
    }
}

/// See [`StoreHandle::write`].
#[derive(Clone)]
pub struct Write {
    pub(super) context: RequestContext,
    pub(super) mutations: Vec<Mutation>,
}

impl Call for Write {
    type Answer = WriteResult;
    const CHANGES: bool = true;
    const IS_HELD: bool = true;

    fn input(
        self,
        store: &StoreHandle,
        region: RegionId,
        reply: Reply<WriteResult>,
    ) -> Result<Input, RequestError> {
        /// What a tag adds to its entry.
        const TAG_BYTES: usize = 40;
        let Write { context, mutations } = self;
        let mut bytes = check_mutations(region, &mutations)?;
        if context.tag.is_some() {
            bytes += TAG_BYTES;
        }
        let taken = store.writes.take(bytes).ok_or_else(|| store.is_busy())?;
        Ok(Input::Write(WriteRequest { region, context, mutations, bytes, taken, reply }))
    }
}

/// See [`StoreHandle::snapshot`].
#[derive(Clone)]
pub struct Read {
    pub(super) context: RequestContext,
}

impl Call for Read {
    type Answer = RegionSnapshot;
    const CHANGES: bool = false;
    const IS_HELD: bool = true;

    fn answer_here(&self, store: &StoreHandle, region: RegionId) -> Option<RegionSnapshot> {
        let now = store.clock.now();
        let snapshot = store.delegates.lease_read(&store.kv, region, &self.context, now);
        match snapshot {
            Some(_) => metrics::counter!("esker_reads_total", "path" => "lease").increment(1),
            None => metrics::counter!("esker_reads_total", "path" => "confirmed").increment(1),
        }
        snapshot
    }

    fn input(
        self,
        _: &StoreHandle,
        region: RegionId,
        reply: Reply<RegionSnapshot>,
    ) -> Result<Input, RequestError> {
        Ok(Input::Read(ReadRequest { region, context: self.context, reply }))
    }
}

/// See [`StoreHandle::admin`].
#[derive(Clone)]
pub struct Administer {
    pub(super) epoch: Epoch,
    pub(super) admin: Admin,
}

impl Call for Administer {
    type Answer = AdminResult;
    const CHANGES: bool = true;
    const IS_HELD: bool = false;

    fn input(
        self,
        _: &StoreHandle,
        region: RegionId,
        reply: Reply<AdminResult>,
    ) -> Result<Input, RequestError> {
        let Administer { epoch, admin } = self;
        check_admin(region, &admin)?;
        Ok(Input::Admin(AdminRequest { region, epoch, admin, reply }))
    }
}

/// See [`StoreHandle::status`].
#[derive(Clone)]
pub struct Status;

impl Call for Status {
    type Answer = RegionStatus;
    const CHANGES: bool = false;
    const IS_HELD: bool = true;

    fn input(
        self,
        _: &StoreHandle,
        region: RegionId,
        reply: Reply<RegionStatus>,
    ) -> Result<Input, RequestError> {
        Ok(Input::Status { region, reply })
    }
}

/// What other stores would refuse to take into their logs must not get into this one's.
fn check_admin(region: RegionId, admin: &Admin) -> Result<(), RequestError> {
    check_request(admin).map_err(|fault| match admin {
        Admin::Split { .. } => RequestError::Split { region, reason: fault.to_string() },
        _ => RequestError::Malformed { region, reason: fault.to_string() },
    })
}

fn check_mutations(region: RegionId, mutations: &[Mutation]) -> Result<usize, RequestError> {
    assert!(
        mutations.len() == 1 || !mutations.iter().any(Mutation::is_swap),
        "a compare-and-swap must be alone in its write"
    );
    // What an entry needs for each mutation besides its keys and values: without
    // it a great many small ones would make an entry too large to be sent.
    const MUTATION_BYTES: usize = 32;
    let mut bytes = mutations.len() * MUTATION_BYTES;
    for mutation in mutations {
        // A range may end where the last region begins, above all keys.
        let (limit, longest) = match mutation.keys() {
            Keys::One(key) if key.is_empty() => return Err(RequestError::EmptyKey),
            Keys::One(key) => (MAX_STORED_KEY_BYTES, key.len()),
            Keys::Range(range) => {
                let end = range.end().map_or(0, |end| end.len());
                (MAX_BOUND_BYTES, range.start().len().max(end))
            }
        };
        if longest > limit {
            return Err(RequestError::KeyTooLarge { size: longest, limit });
        }
        bytes += mutation.bytes();
    }
    if bytes > MAX_COMMAND_BYTES {
        return Err(RequestError::EntryTooLarge {
            region,
            size: bytes as u64,
            limit: MAX_COMMAND_BYTES as u64,
        });
    }
    Ok(bytes)
}
