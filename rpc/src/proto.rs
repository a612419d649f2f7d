//! The generated wire types, one module for each package of the schemas.
//!
//! Everything else in this crate is written by hand; the schemas in `proto/` say what the
//! messages mean.

#![allow(missing_docs, clippy::all)]

include!(concat!(env!("OUT_DIR"), "/schemas.rs"));
