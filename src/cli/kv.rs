//! `esker kv`: single keys and ranges, as the raw clients see them.

use std::io::Write as _;

use bytes::{BufMut, Bytes, BytesMut};
use clap::{Args, Subcommand};
use esker_model::limits::MAX_KEY_BYTES;
use serde::Serialize;

use super::cluster::ClusterArguments;
use super::error::CliError;
use super::key::{Text, TextError};
use super::number::whole;
use super::output::{Align, print, print_json, table};

/// Pairs asked for in one request of a scan.
const SCAN_PAGE: u32 = 1_000;

/// The most pairs that one command prints, all of which are in memory at once.
const MAX_PAIRS: u64 = 1_000_000;

/// Reads and writes keys
///
/// Keys and values are text. `\xNN` stands for any byte, `\\` for a backslash. What is printed
/// reads back as the same bytes. Keys and values may begin with a dash. A key or value that looks
/// like an option of the command, such as `-h`, must follow a `--`.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  esker kv put greeting hello")]
pub struct KvArguments {
    #[command(flatten)]
    cluster: ClusterArguments,
    #[command(subcommand)]
    command: KvCommand,
}

#[derive(Debug, Subcommand)]
enum KvCommand {
    /// Prints the value of a key; exit status 3 if there is none
    #[command(after_help = "Example:\n  esker kv get greeting")]
    Get {
        /// The key
        #[arg(value_name = "KEY", allow_hyphen_values = true, value_parser = stored_key)]
        key: Text,
    },
    /// Stores a value under a key
    #[command(after_help = "Example:\n  esker kv put greeting 'hello\\x0A'")]
    Put {
        /// The key
        #[arg(value_name = "KEY", allow_hyphen_values = true, value_parser = stored_key)]
        key: Text,
        /// The value
        #[arg(value_name = "VALUE", allow_hyphen_values = true)]
        value: Text,
    },
    /// Removes a key, whether it exists or not
    #[command(after_help = "Example:\n  esker kv delete greeting")]
    Delete {
        /// The key
        #[arg(value_name = "KEY", allow_hyphen_values = true, value_parser = stored_key)]
        key: Text,
    },
    /// Prints the pairs of a range in the order of their keys
    #[command(after_help = "Example:\n  esker kv scan --from user --to 'user\\xFF' --limit 10")]
    Scan {
        /// The first key of the range
        #[arg(
            long,
            value_name = "KEY",
            default_value = "",
            hide_default_value = true,
            allow_hyphen_values = true
        )]
        from: Text,
        /// Where the range ends, exclusive; without it the range has no end
        #[arg(
            long,
            value_name = "KEY",
            default_value = "",
            hide_default_value = true,
            allow_hyphen_values = true
        )]
        to: Text,
        /// The most pairs to print
        #[arg(long, value_name = "N", default_value_t = 100, allow_negative_numbers = true,
              value_parser = whole(1, MAX_PAIRS))]
        limit: u64,
    },
}

/// A key under which something can be stored.
fn stored_key(typed: &str) -> Result<Text, String> {
    let key: Text = typed.parse().map_err(|error: TextError| error.to_string())?;
    match key.0.len() {
        0 => Err("a key has at least one byte".into()),
        1..=MAX_KEY_BYTES => Ok(key),
        bytes => Err(format!("it has {bytes} bytes, and a key has at most {MAX_KEY_BYTES}")),
    }
}

#[derive(Debug, Serialize)]
struct Pair {
    key: Text,
    value: Text,
}

/// The JSON for a program when there is nothing else to report.
#[derive(Debug, Serialize)]
struct Done {
    done: bool,
}

impl KvArguments {
    pub async fn execute(self) -> Result<(), CliError> {
        let json = self.cluster.json;
        let kv = self.cluster.kv().await?;
        match self.command {
            KvCommand::Get { key } => {
                let Some(value) = kv.get(key.0.clone()).await?.map(Text) else {
                    return Err(CliError::NoSuchKey(key));
                };
                if json { print_json(&Pair { key, value }) } else { print(&value.to_string()) }
            }
            KvCommand::Put { key, value } => {
                kv.put(key.0, value.0).await?;
                print_done(json)
            }
            KvCommand::Delete { key } => {
                kv.delete(key.0).await?;
                print_done(json)
            }
            KvCommand::Scan { from, to, limit } => {
                if !to.0.is_empty() && from.0 > to.0 {
                    return Err(CliError::EmptyRange { from, to });
                }
                // One more than is printed, to know whether there are more.
                let most = limit + 1;
                let mut pairs = Vec::new();
                let mut start = from.0;
                while (pairs.len() as u64) < most {
                    let page = (most - pairs.len() as u64).min(u64::from(SCAN_PAGE)) as u32;
                    let found = kv.scan(start, to.0.clone(), page).await?;
                    let full = found.len() as u64 >= u64::from(page);
                    pairs.extend(
                        found
                            .into_iter()
                            .map(|(key, value)| Pair { key: Text(key), value: Text(value) }),
                    );
                    match pairs.last() {
                        Some(last) if full => start = successor(&last.key.0),
                        _ => break,
                    }
                }
                let next = if pairs.len() as u64 == most { pairs.pop() } else { None };
                if json {
                    return print_json(&pairs);
                }
                print(&pair_table(&pairs))?;
                if let Some(Pair { key, .. }) = next {
                    // The pairs are printed, whether anybody reads this or not.
                    let _ = writeln!(
                        std::io::stderr(),
                        "there are more pairs: go on with --from '{key}', or give a larger --limit"
                    );
                }
                Ok(())
            }
        }
    }
}

/// The first key after `key`.
fn successor(key: &Bytes) -> Bytes {
    let mut next = BytesMut::with_capacity(key.len() + 1);
    next.extend_from_slice(key);
    next.put_u8(0);
    next.freeze()
}

fn print_done(json: bool) -> Result<(), CliError> {
    if json { print_json(&Done { done: true }) } else { print("done") }
}

fn pair_table(pairs: &[Pair]) -> String {
    let rows = pairs.iter().map(|pair| vec![pair.key.cell(), pair.value.cell()]);
    table(&[("KEY", Align::Left), ("VALUE", Align::Left)], rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_key_lies_between_a_key_and_its_successor() {
        assert_eq!(successor(&Bytes::from_static(b"a")), Bytes::from_static(b"a\x00"));
    }

    #[test]
    fn pairs_print_one_a_line_with_bytes_escaped() {
        let pair =
            Pair { key: Text(Bytes::from_static(b"k")), value: Text(Bytes::from_static(b"a\nb")) };
        assert_eq!(pair_table(&[pair]), "KEY  VALUE\nk    a\\x0Ab");
    }
}
