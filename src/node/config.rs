//! What an operator may set in a file. Every setting has a default and a range.
//!
//! [`SETTINGS`] is the one table of them. [`NodeConfig`] has a field for each, the configuration
//! file is read by the table, and `docs/operations.md` is checked against it. A value that is out
//! of range is refused before a node makes anything, with the setting's name and range.

use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use esker_engine::EngineOptions;
use esker_raftstore::StoreConfig;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// One setting: its name in a file, its default, and its range.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// As in a file, with dashes: `block-cache-mib`. The end names the unit: `-mib` is 2²⁰ bytes,
    /// `-ms` milliseconds. Without such an end it is a number of things.
    pub name: &'static str,
    /// What is in effect if the setting is not set.
    pub default: u64,
    /// The values that are accepted.
    pub range: RangeInclusive<u64>,
    /// For people, in one sentence.
    pub meaning: &'static str,
}

macro_rules! settings {
    ($($field:ident, $name:literal = $default:literal in $range:expr, $meaning:literal;)*) => {
        /// A node's settings. `None` stands for the default. The end of a name is its unit: `mib`
        /// is 2²⁰ bytes, `ms` milliseconds, and the others are numbers of things.
        ///
        /// ```
        /// use esker::NodeConfig;
        ///
        /// let config = NodeConfig { block_cache_mib: Some(1_024), ..NodeConfig::default() };
        /// assert!(config.check().is_ok());
        /// let config = NodeConfig { workers: Some(0), ..NodeConfig::default() };
        /// assert!(config.check().is_err(), "a node with this would not start");
        /// ```
        ///
        /// [`read`](Self::read) takes them from a file, where they are TOML, with dashes in their
        /// names. Unknown names are refused.
        ///
        /// ```toml
        /// block-cache-mib = 1024
        /// election-timeout-ms = 1000
        /// ```
        #[derive(Clone, Debug, Default, PartialEq, Eq)]
        pub struct NodeConfig {
            $(
                #[doc = concat!(
                    "`", $name, "`: ", $meaning, ".\n\nDefault: ", $default, ". Range: `",
                    stringify!($range), "`."
                )]
                pub $field: Option<u64>,
            )*
        }

        /// All settings of a node, in the order in which they are documented.
        pub const SETTINGS: &[Setting] = &[
            $(Setting { name: $name, default: $default, range: $range, meaning: $meaning },)*
        ];

        impl NodeConfig {
            /// The values of [`SETTINGS`] that are set, in their order.
            fn values(&self) -> [Option<u64>; SETTINGS.len()] {
                [$(self.$field,)*]
            }

            /// The field for the setting of this name.
            fn slot(&mut self, name: &str) -> Option<&mut Option<u64>> {
                match name {
                    $($name => Some(&mut self.$field),)*
                    _ => None,
                }
            }
        }

        /// The values in effect, with the defaults filled in.
        struct Effective {
            $($field: u64,)*
        }

        impl From<&NodeConfig> for Effective {
            fn from(config: &NodeConfig) -> Self {
                Effective { $($field: config.$field.unwrap_or($default),)* }
            }
        }
    };
}

settings! {
    block_cache_mib, "block-cache-mib" = 256 in 1..=1_048_576,
        "memory for blocks read from disk";
    write_buffer_mib, "write-buffer-mib" = 64 in 1..=4_096,
        "one memtable of the key-value engine; a column family has up to four";
    workers, "workers" = 2 in 1..=64,
        "threads that run the regions' Raft groups";
    apply_workers, "apply-workers" = 2 in 1..=64,
        "threads that apply committed entries";
    election_timeout_ms, "election-timeout-ms" = 1_000 in 100..=60_000,
        "a follower without a leader campaigns after one to two of these; also the length of leases. The same on all nodes";
    heartbeat_interval_ms, "heartbeat-interval-ms" = 200 in 10..=30_000,
        "how often a leader is heard of; at most half of the above";
    log_gc_threshold, "log-gc-threshold" = 4_096 in 1..=1_000_000_000,
        "entries kept behind the slowest follower that is waited for";
    log_gc_max_lag, "log-gc-max-lag" = 100_000 in 1..=1_000_000_000,
        "a follower so many entries behind is not waited for; it will need a snapshot. At least the above";
    log_gc_interval_ms, "log-gc-interval-ms" = 3_000 in 10..=3_600_000,
        "how often a region looks at whether its log may be shortened";
    flush_after_ms, "flush-after-ms" = 300_000 in 1_000..=86_400_000,
        "data that was applied so long ago is flushed; until then the log keeps what led there";
    schedule_interval_ms, "schedule-interval-ms" = 500 in 10..=3_600_000,
        "how often the placement driver looks for something to do";
}

/// Why settings are refused. A node with them is not started, and nothing is made on disk.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SettingError {
    /// A value is not in the range of its setting, or is no whole number.
    #[error("{name} = {value} is out of range: it is a whole number from {low} to {high}")]
    OutOfRange {
        /// The setting, as in a file.
        name: &'static str,
        /// The value, as it was given.
        value: String,
        /// The least value that is accepted.
        low: u64,
        /// The greatest value that is accepted.
        high: u64,
    },
    /// `heartbeat_interval_ms` is more than half of `election_timeout_ms`. If only one of them is
    /// set, the default of the other counts.
    #[error(
        "heartbeat-interval-ms ({heartbeat}) must be at most half of election-timeout-ms \
         ({election}): a follower would campaign between two heartbeats"
    )]
    HeartbeatTooRare {
        /// `heartbeat_interval_ms` in effect.
        heartbeat: u64,
        /// `election_timeout_ms` in effect.
        election: u64,
    },
    /// `log_gc_max_lag` is less than `log_gc_threshold`. If only one of them is set, the default of
    /// the other counts.
    #[error(
        "log-gc-max-lag ({max_lag}) must be at least log-gc-threshold ({threshold}): no follower \
         would ever be waited for"
    )]
    LagBelowThreshold {
        /// `log_gc_max_lag` in effect.
        max_lag: u64,
        /// `log_gc_threshold` in effect.
        threshold: u64,
    },
}

/// Why a configuration file is refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file is not there, may not be read, or is not text.
    #[error("cannot read the configuration {}: {source}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The file is not TOML.
    #[error("cannot read the configuration {}: line {line}: {reason}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// The line of the mistake, from 1.
        line: usize,
        /// What is wrong there.
        reason: String,
    },
    /// There is no setting of that name in [`SETTINGS`].
    #[error(
        "cannot read the configuration {}: line {line}: there is no setting `{name}`; there are {}",
        path.display(), names()
    )]
    Unknown {
        /// The file.
        path: PathBuf,
        /// The line of the name, from 1.
        line: usize,
        /// The name as it is in the file.
        name: String,
    },
    /// A value is out of its range.
    #[error("cannot use the configuration {}: line {line}: {source}", path.display())]
    Value {
        /// The file.
        path: PathBuf,
        /// The line of the setting, from 1.
        line: usize,
        /// What is wrong with the value.
        source: SettingError,
    },
    /// Two values contradict each other.
    #[error("cannot use the configuration {}: {source}", path.display())]
    Together {
        /// The file.
        path: PathBuf,
        /// Which two, and why.
        source: SettingError,
    },
}

fn names() -> String {
    SETTINGS.iter().map(|setting| setting.name).collect::<Vec<_>>().join(", ")
}

impl Setting {
    fn accept(&self, value: Option<u64>, typed: impl ToString) -> Result<u64, SettingError> {
        value.filter(|value| self.range.contains(value)).ok_or_else(|| SettingError::OutOfRange {
            name: self.name,
            value: typed.to_string(),
            low: *self.range.start(),
            high: *self.range.end(),
        })
    }
}

impl NodeConfig {
    /// Reads a configuration file. A setting that it does not name is `None`.
    ///
    /// # Errors
    /// When the file cannot be read, or contains an unknown setting or a value out of its range.
    /// Each error names the file, and the line where there is one.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let path = path.to_owned();
        match std::fs::read_to_string(&path) {
            Ok(text) => NodeConfig::parse(&text, path),
            Err(source) => Err(ConfigError::Unreadable { path, source }),
        }
    }

    fn parse(text: &str, path: PathBuf) -> Result<Self, ConfigError> {
        let line = |at: usize| text[..at].matches('\n').count() + 1;
        let table = DeTable::parse(text).map_err(|error| ConfigError::Malformed {
            path: path.clone(),
            line: line(error.span().map_or(0, |span| span.start)),
            reason: error.message().to_owned(),
        })?;
        let mut config = NodeConfig::default();
        for (key, value) in table.get_ref() {
            let (name, line) = (key.get_ref().as_ref(), line(key.span().start));
            let setting = SETTINGS.iter().find(|setting| setting.name == name);
            let (Some(setting), Some(slot)) = (setting, config.slot(name)) else {
                let name = name.to_owned();
                return Err(ConfigError::Unknown { path, line, name });
            };
            match setting.accept(whole_number(value), &text[value.span()]) {
                Ok(value) => *slot = Some(value),
                Err(source) => return Err(ConfigError::Value { path, line, source }),
            }
        }
        match config.check() {
            Ok(()) => Ok(config),
            Err(source) => Err(ConfigError::Together { path, source }),
        }
    }

    /// Checks that every value is in its range, and that the values fit each other.
    /// [`NodeBuilder::start`](crate::NodeBuilder::start) does so, too, before anything else.
    ///
    /// # Errors
    /// The first value that does not.
    pub fn check(&self) -> Result<(), SettingError> {
        for (setting, value) in SETTINGS.iter().zip(self.values()) {
            if let Some(value) = value {
                setting.accept(Some(value), value)?;
            }
        }
        let all = Effective::from(self);
        let (heartbeat, election) = (all.heartbeat_interval_ms, all.election_timeout_ms);
        if heartbeat * 2 > election {
            return Err(SettingError::HeartbeatTooRare { heartbeat, election });
        }
        let (max_lag, threshold) = (all.log_gc_max_lag, all.log_gc_threshold);
        if max_lag < threshold {
            return Err(SettingError::LagBelowThreshold { max_lag, threshold });
        }
        Ok(())
    }

    pub(crate) fn store(&self) -> StoreConfig {
        let all = Effective::from(self);
        StoreConfig {
            workers: in_memory(all.workers),
            apply_workers: in_memory(all.apply_workers),
            election_timeout: Duration::from_millis(all.election_timeout_ms),
            heartbeat_interval: Duration::from_millis(all.heartbeat_interval_ms),
            log_gc_threshold: all.log_gc_threshold,
            log_gc_max_lag: all.log_gc_max_lag,
            log_gc_interval: Duration::from_millis(all.log_gc_interval_ms),
            flush_after: Duration::from_millis(all.flush_after_ms),
            ..StoreConfig::default()
        }
    }

    pub(crate) fn engine(&self) -> EngineOptions {
        const MIB: u64 = 1 << 20;
        let all = Effective::from(self);
        EngineOptions {
            block_cache_bytes: in_memory(all.block_cache_mib * MIB),
            write_buffer_bytes: in_memory(all.write_buffer_mib * MIB),
            ..EngineOptions::default()
        }
    }

    pub(crate) fn schedule_interval(&self) -> Duration {
        Duration::from_millis(Effective::from(self).schedule_interval_ms)
    }
}

/// A value as a `usize`. The ranges end below the largest `usize` of a small machine.
fn in_memory(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

/// A value as a whole number that is not negative; `None` if it is not such a number.
fn whole_number(value: &Spanned<DeValue<'_>>) -> Option<u64> {
    match value.get_ref() {
        DeValue::Integer(integer) => u64::from_str_radix(integer.as_str(), integer.radix()).ok(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<NodeConfig, String> {
        NodeConfig::parse(text, "esker.toml".into()).map_err(|error| error.to_string())
    }

    /// A file in which one setting has a value, and the settings that must fit it do.
    fn with(setting: &Setting, value: impl ToString) -> Result<NodeConfig, String> {
        let mut text = format!("{} = {}\n", setting.name, value.to_string());
        text += match setting.name {
            "election-timeout-ms" => "heartbeat-interval-ms = 10\n",
            "heartbeat-interval-ms" => "election-timeout-ms = 60000\n",
            "log-gc-threshold" => "log-gc-max-lag = 1000000000\n",
            "log-gc-max-lag" => "log-gc-threshold = 1\n",
            _ => "",
        };
        parse(&text)
    }

    #[test]
    fn every_setting_takes_both_ends_of_its_range_and_nothing_beyond() {
        for setting in SETTINGS {
            let (low, high) = (*setting.range.start(), *setting.range.end());
            for inside in [low, high, setting.default] {
                let mut config = with(setting, inside).expect("it is in the range");
                assert_eq!(config.slot(setting.name), Some(&mut Some(inside)));
                // No conversion of an accepted value overflows.
                let _ = (config.store(), config.engine(), config.schedule_interval());
            }
            for outside in [
                (low - 1).to_string(),
                (high + 1).to_string(),
                (1_u64 << 60).to_string(),
                u128::MAX.to_string(),
                "-1".to_owned(),
                "2.5".to_owned(),
                "true".to_owned(),
                "\"2\"".to_owned(),
                "[2]".to_owned(),
            ] {
                let refused = with(setting, &outside).expect_err("it is out of the range");
                let expected = format!(
                    "line 1: {} = {outside} is out of range: it is a whole number from {low} to {high}",
                    setting.name
                );
                assert!(refused.ends_with(&expected), "{refused}");
            }
        }
    }

    #[test]
    fn an_embedding_program_is_held_to_the_same_ranges_as_a_file() {
        let zero = NodeConfig { schedule_interval_ms: Some(0), ..NodeConfig::default() };
        let refused = zero.check().expect_err("an interval of nothing").to_string();
        assert!(refused.starts_with("schedule-interval-ms = 0 is out of range"), "{refused}");
        assert_eq!(NodeConfig::default().check(), Ok(()));
    }

    #[test]
    fn settings_that_contradict_each_other_are_both_named() {
        for (text, names) in [
            ("heartbeat-interval-ms = 501", ["heartbeat-interval-ms (501)", "(1000)"]),
            ("election-timeout-ms = 399", ["election-timeout-ms (399)", "(200)"]),
            ("log-gc-max-lag = 4095", ["log-gc-max-lag (4095)", "log-gc-threshold (4096)"]),
            ("log-gc-threshold = 100001", ["log-gc-max-lag (100000)", "(100001)"]),
        ] {
            let refused = parse(text).expect_err("they do not fit");
            assert!(names.iter().all(|name| refused.contains(name)), "{refused}");
        }
    }

    #[test]
    fn a_mistake_in_the_file_is_named_with_its_line() {
        let refused = parse("workers = 4\n\nblocks = 3\n").expect_err("no such setting");
        assert!(refused.contains("line 3: there is no setting `blocks`"), "{refused}");
        assert!(refused.contains("block-cache-mib, write-buffer-mib"), "{refused}");
        let refused = parse("workers = 4\nworkers = 5\n").expect_err("given twice");
        assert!(refused.contains("line 2: ") && !refused.contains('\n'), "{refused}");
        let refused = parse("workers 4").expect_err("no TOML");
        assert!(refused.contains("line 1: ") && !refused.contains('\n'), "{refused}");
        let refused = parse("[server]\nworkers = 4\n").expect_err("there are no tables");
        assert!(refused.contains("line 1: there is no setting `server`"), "{refused}");
        let all = parse("workers = 0x10 # sixteen\nblock-cache-mib = 1_024").expect("all right");
        assert_eq!((all.workers, all.block_cache_mib), (Some(16), Some(1_024)));
        assert_eq!(parse(""), Ok(NodeConfig::default()));
    }

    #[test]
    fn the_defaults_are_those_of_the_parts_that_are_set() {
        let (ours, theirs) = (NodeConfig::default().store(), StoreConfig::default());
        assert_eq!((ours.workers, ours.apply_workers), (theirs.workers, theirs.apply_workers));
        assert_eq!(ours.election_timeout, theirs.election_timeout);
        assert_eq!(ours.heartbeat_interval, theirs.heartbeat_interval);
        assert_eq!(ours.log_gc_threshold, theirs.log_gc_threshold);
        assert_eq!(ours.log_gc_max_lag, theirs.log_gc_max_lag);
        assert_eq!(ours.log_gc_interval, theirs.log_gc_interval);
        assert_eq!(ours.flush_after, theirs.flush_after);
        let (ours, theirs) = (NodeConfig::default().engine(), EngineOptions::default());
        assert_eq!(ours.block_cache_bytes, theirs.block_cache_bytes);
        assert_eq!(ours.write_buffer_bytes, theirs.write_buffer_bytes);
    }

    #[test]
    fn the_documentation_has_every_setting_with_its_default_and_range() {
        let documented: Vec<_> = include_str!("../../docs/operations.md")
            .lines()
            .skip_while(|line| *line != "## Settings")
            .skip_while(|line| !line.starts_with("|---"))
            .skip(1)
            .take_while(|line| line.starts_with('|'))
            .collect();
        let table: Vec<_> = SETTINGS
            .iter()
            .map(|Setting { name, default, range, meaning }| {
                format!(
                    "| `{name}` | {default} | {} to {} | {meaning} |",
                    range.start(),
                    range.end()
                )
            })
            .collect();
        assert_eq!(documented, table, "docs/operations.md should have:\n{}", table.join("\n"));
    }
}
