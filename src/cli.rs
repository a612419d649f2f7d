//! The command line: arguments in, a table or JSON and an exit status out. It is public for
//! `src/main.rs` alone, and no promise is made about it.
//!
//! [`main`] is the whole of the `esker` binary. Bytes that a person typed become types here
//! (addresses, keys, labels), so that nothing behind the command line checks them again. Commands
//! that need a cluster find it as any client does, through the placement driver.
//!
//! Promises: exit status 0 means done, 1 refused or failed with one line on standard error that
//! gives the reason, 2 wrong usage. Results and nothing else go to standard output. Progress is
//! drawn on a terminal only.

mod cluster;
mod error;
mod interrupt;
mod key;
mod kv;
mod number;
mod output;
mod placement;
mod playground;
mod process;
mod region;
mod serve;
mod store;
mod view;
mod ycsb;

#[cfg(test)]
mod tests;

use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;

use clap::error::ContextKind;
use clap::{Parser, Subcommand};
use cluster::VARIABLE;
use error::CliError;
use output::one_line;

/// The exit status of a command that makes no sense.
const WRONG_USAGE: u8 = 2;

/// A sharded, replicated key-value store
#[derive(Debug, Parser)]
#[command(
    name = "esker",
    bin_name = "esker",
    version,
    disable_help_subcommand = true,
    after_help = "Example:\n  esker playground"
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Playground(serve::PlaygroundArguments),
    Start(serve::StartArguments),
    Region(region::RegionArguments),
    Store(store::StoreArguments),
    Placement(placement::PlacementArguments),
    Kv(kv::KvArguments),
    Ycsb(ycsb::YcsbArguments),
}

/// Reads the process's arguments, carries them out, and reports.
pub fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => return usage(&error),
    };
    match execute(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        // The reader of the output has seen enough of it.
        Err(error) if error.is_broken_pipe() => ExitCode::SUCCESS,
        Err(error) => {
            // If standard error is closed, too, there is no other place for a message.
            let _ = writeln!(std::io::stderr(), "error: {}", one_line(&error));
            error.exit_code()
        }
    }
}

/// Prints help, or what is wrong with the arguments.
fn usage(error: &clap::Error) -> ExitCode {
    let _ = error.print();
    let named = error.get(ContextKind::InvalidArg).map(ToString::to_string).unwrap_or_default();
    // Not every argument is text.
    let is_typed = |argument: OsString| argument.as_encoded_bytes().starts_with(b"--placement");
    if named.starts_with("--placement") && !std::env::args_os().any(is_typed) {
        let _ = writeln!(std::io::stderr(), "The value is that of the variable {VARIABLE}.");
    }
    ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(WRONG_USAGE))
}

fn execute(arguments: Arguments) -> Result<(), CliError> {
    match arguments.command {
        Command::Playground(arguments) => arguments.execute(),
        Command::Start(arguments) => arguments.execute(),
        Command::Region(arguments) => wait_for(arguments.execute()),
        Command::Store(arguments) => wait_for(arguments.execute()),
        Command::Placement(arguments) => wait_for(arguments.execute()),
        Command::Kv(arguments) => wait_for(arguments.execute()),
        Command::Ycsb(arguments) => wait_for(arguments.execute()),
    }
}

/// Runs a client command to its end.
fn wait_for(command: impl Future<Output = Result<(), CliError>>) -> Result<(), CliError> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(CliError::Runtime)?
        .block_on(command)
}
