pub mod cli;
pub mod ycsb;
