//! The generated wire types, one module for each package of the schemas.
//!
//! Everything else in this crate is written by hand. The comments in the schemas in `proto/`
//! describe the messages.

#![allow(missing_docs, clippy::all)]

include!(concat!(env!("OUT_DIR"), "/schemas.rs"));
