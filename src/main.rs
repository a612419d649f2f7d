//! The `esker` binary: the command line of the library, and nothing else.

use std::process::ExitCode;

fn main() -> ExitCode {
    esker::cli::main()
}
