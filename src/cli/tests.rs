use clap::{Command as Clap, CommandFactory, error::ErrorKind};
use esker_model::RegionId;

use super::*;

fn parse(line: &str) -> Result<Arguments, clap::Error> {
    Arguments::try_parse_from(line.split_whitespace())
}

fn each_command(command: &Clap, visit: &mut impl FnMut(&Clap)) {
    visit(command);
    for child in command.get_subcommands() {
        each_command(child, visit);
    }
}

#[test]
fn the_commands_do_not_contradict_themselves() {
    Arguments::command().debug_assert();
}

#[test]
fn every_command_shows_an_example_that_parses() {
    let mut examples = 0;
    each_command(&Arguments::command(), &mut |command| {
        let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
        let lines: Vec<_> = help.lines().filter(|line| line.starts_with("  esker ")).collect();
        assert!(!lines.is_empty(), "`{}` shows no example", command.get_name());
        for line in lines {
            let words = line.split_whitespace().map(|word| word.trim_matches('\''));
            let parsed = Arguments::try_parse_from(words);
            assert!(parsed.is_ok(), "{line}: {:?}", parsed.err());
            examples += 1;
        }
    });
    assert!(examples > 20);
}

#[test]
fn every_command_of_a_cluster_takes_its_address_and_json_at_either_end() {
    for line in [
        "esker region list --placement 10.0.0.1:9 --json",
        "esker region --placement 10.0.0.1:9 --json list",
        "esker store list --placement 10.0.0.1:9 --json",
        "esker placement tso --placement 10.0.0.1:9 --json",
        "esker kv get k --placement 10.0.0.1:9 --json",
        "esker ycsb load --workload a --placement 10.0.0.1:9 --json",
    ] {
        let parsed = parse(line);
        assert!(parsed.is_ok(), "{line}: {:?}", parsed.err());
    }
}

#[test]
fn the_address_and_json_reach_the_command() {
    let arguments = parse("esker kv get k --placement 10.0.0.1:9 --json").expect("right");
    let debug = format!("{arguments:?}");
    let address =
        format!("{:?}", "10.0.0.1:9".parse::<crate::node::Address>().expect("an address"));
    assert!(debug.contains(&address) && debug.contains("json: true"), "{debug}");
}

#[test]
fn a_key_or_value_may_begin_with_a_hyphen() {
    let arguments = parse("esker kv put -k --5 --json").expect("both are text");
    let debug = format!("{arguments:?}");
    assert!(
        debug.contains("-k") && debug.contains("--5") && debug.contains("json: true"),
        "{debug}"
    );
}

#[test]
fn keys_may_begin_with_a_dash_everywhere() {
    // These keys are no options, although they begin with dashes.
    for key in ["-", "-2", "-2.5", "-k", "-key", "--key-", "-100", "-é", "---", "-hello", "-x=1"] {
        for line in [
            vec!["kv", "get", key],
            vec!["kv", "put", key, key],
            vec!["kv", "delete", key],
            vec!["kv", "scan", "--from", key, "--to", key],
            vec!["region", "key", key],
            vec!["region", "split", "7", "--key", key, "--key", key],
        ] {
            let words = std::iter::once("esker").chain(line.iter().copied());
            match Arguments::try_parse_from(words) {
                Ok(arguments) => {
                    let debug = format!("{arguments:?}");
                    let taken = format!("{:?}", bytes::Bytes::copy_from_slice(key.as_bytes()));
                    assert!(debug.contains(&taken), "{line:?}: {debug}");
                }
                Err(error) => panic!("{line:?}: {error}"),
            }
        }
    }
    // A key that looks like an option must follow the end of the options.
    for key in ["-h", "--help", "--json", "-V", "--"] {
        for line in [vec!["kv", "put", "--", key, key], vec!["region", "key", "--", key]] {
            let words = std::iter::once("esker").chain(line.iter().copied());
            let parsed = Arguments::try_parse_from(words);
            assert!(parsed.is_ok(), "{line:?}: {:?}", parsed.err());
        }
    }
    for key in ["-h", "--help", "--json", "--"] {
        let parsed = Arguments::try_parse_from(["esker", "kv", "scan", "--from", key]);
        assert!(parsed.is_ok(), "--from {key}: {:?}", parsed.err());
    }
}

#[test]
fn a_wrong_number_is_refused_by_the_name_of_its_option() {
    for (line, named) in [
        ("esker kv scan --limit -1", "'--limit <N>'"),
        ("esker kv scan --limit 0", "'--limit <N>'"),
        ("esker kv scan --limit 1000001", "'--limit <N>'"),
        ("esker region show -1", "'<ID>'"),
        ("esker region split -1", "'<ID>'"),
        ("esker region split 2 --parts -2", "'--parts <N>'"),
        ("esker region split 2 --parts 129", "'--parts <N>'"),
        ("esker region transfer-leader 2 --to -3", "'--to <STORE>'"),
        ("esker playground --stores -1", "'--stores <N>'"),
        ("esker playground --stores 33", "'--stores <N>'"),
        ("esker playground --placements 4", "'--placements <N>'"),
        ("esker playground --placements -1", "'--placements <N>'"),
        ("esker playground --port 65536", "'--port <PORT>'"),
        ("esker playground --port -1", "'--port <PORT>'"),
    ] {
        let error = parse(line).expect_err(line);
        assert!(error.exit_code() == 2 && error.to_string().contains(named), "{line}: {error}");
    }
}

#[test]
fn the_placement_driver_is_a_list_of_addresses() {
    let line = "esker store list --placement LOCALHOST:1,10.0.0.1:2,[::1]:3";
    let debug = format!("{:?}", parse(line).expect("three addresses"));
    for part in ["localhost", "10.0.0.1", "::1"] {
        assert!(debug.contains(part), "{debug}");
    }
    for line in ["esker store list --placement a:1,", "esker store list --placement a:1,b"] {
        let error = parse(line).expect_err(line);
        assert!(error.exit_code() == 2 && error.to_string().contains("--placement"), "{error}");
    }
}

#[test]
fn wrong_usage_is_told_from_failure() {
    for line in [
        "esker",
        "esker region",
        "esker region merge 1 2",
        "esker region show two",
        "esker region list --placement http://a:1",
        "esker region list --placement nowhere",
        "esker region split 2 --parts 1",
        "esker region split 2 --parts 2 --key k",
        "esker region transfer-leader 2",
        "esker kv get k\\x0",
        "esker kv put k",
        "esker kv put k back\\slash",
        "esker kv scan --limit -1",
        "esker playground --stores 0",
        "esker playground --placements 2",
        "esker start --data-dir d --listen 127.0.0.1:0 --join 127.0.0.1:1",
        "esker start --data-dir d --listen 0:1 --join 127.0.0.1:1",
        "esker start --data-dir d --listen :::1 --join 127.0.0.1:1",
        "esker start --data-dir d --listen 127.0.0.1:1 --join 127.0.0.1:0",
        "esker start --data-dir d --listen 127.0.0.1:1 --join 127.0.0.1:1 --advertise a:0",
        "esker start --data-dir d --listen 127.0.0.1:1 --join 127.0.0.1:1 --advertise a",
        "esker start --data-dir d --listen 127.0.0.1:1 --join 127.0.0.1:1 --roles leader",
    ] {
        let error = parse(line).expect_err(line);
        assert_eq!(error.exit_code(), 2, "{line}");
    }
}

#[test]
fn a_malformed_address_says_what_is_wrong_with_it() {
    let error = parse("esker store list --placement 127.0.0.1").expect_err("the port is missing");
    assert_eq!(error.kind(), ErrorKind::ValueValidation);
    assert!(error.to_string().contains("the port is missing"), "{error}");
}

#[test]
fn a_malformed_escape_says_which() {
    let error = parse("esker region key a\\q").expect_err("no such escape");
    assert!(error.to_string().contains("`\\q` is not an escape"), "{error}");
}

#[test]
fn errors_are_one_line() {
    let reason = "its log\n  is full".to_owned();
    let error = esker_client::ClientError::RegionRefused { region: RegionId(2), reason };
    assert!(one_line(CliError::from(error)).starts_with("region 2 refused: its log is full; "));
}
