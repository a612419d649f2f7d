//! The table of a benchmark, for eyes and as JSON.

use std::collections::BTreeSet;
use std::fmt;

use comfy_table::presets::NOTHING as PLAIN;
use comfy_table::{Cell, CellAlignment};
use serde::Serialize;

use crate::Outcome;
use crate::limit::BATCHES;
use crate::options::Options;
use crate::rows::{Load, Round, Sample, VALUE_BYTES};
use crate::systems::Place;

/// One measured load of one system: medians of all rounds.
#[derive(Debug, Serialize)]
struct Row {
    system: String,
    regions: u32,
    load: String,
    per_second: f64,
    p50_us: f64,
    p99_us: f64,
    reads_p99_us: Option<f64>,
    processor_us: f64,
    ratios: Vec<Ratio>,
}

/// A ratio within one round, and the goal for it.
#[derive(Debug, Serialize)]
struct Ratio {
    of: String,
    value: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    at_least: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    at_most: Option<f64>,
}

impl Ratio {
    fn met(&self) -> Option<bool> {
        match (self.at_least, self.at_most) {
            (Some(least), _) => Some(self.value >= least),
            (None, Some(most)) => Some(self.value <= most),
            (None, None) => None,
        }
    }
}

#[derive(Debug, Serialize)]
struct Limits {
    synced_put_us: f64,
    writes_per_second: Vec<(usize, f64)>,
    gets_per_second: f64,
}

#[derive(Debug, Serialize)]
pub struct Table {
    cores: usize,
    rounds: u32,
    seconds: u64,
    value_bytes: usize,
    limits: Limits,
    rows: Vec<Row>,
}

/// The middle of what the rounds gave; of an even number, the lower of the two.
fn median(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<_> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len().checked_sub(1)? / 2).copied()
}

impl Table {
    pub fn of(rounds: &[Round], options: &Options) -> Table {
        let keys: BTreeSet<_> = rounds.iter().flat_map(|round| round.samples.keys()).collect();
        let limit = |get: &dyn Fn(&Round) -> f64| median(rounds.iter().map(get)).unwrap_or(0.0);
        Table {
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            rounds: options.rounds,
            seconds: options.seconds,
            value_bytes: VALUE_BYTES,
            limits: Limits {
                synced_put_us: limit(&|round| round.limits.synced_put_us),
                writes_per_second: BATCHES
                    .map(|batch| (batch, limit(&|round| round.limits.writes(batch).unwrap_or(0.0))))
                    .to_vec(),
                gets_per_second: limit(&|round| round.limits.gets),
            },
            rows: keys.into_iter().map(|key| row(rounds, *key)).collect(),
        }
    }

    pub fn json(&self) -> Outcome<String> {
        Ok(serde_json::to_string_pretty(self)?)
    }
}

fn row(rounds: &[Round], key: (Place, u32, Load)) -> Row {
    let (place, regions, load) = key;
    let of = |get: &dyn Fn(&Sample) -> f64| {
        median(rounds.iter().filter_map(|round| Some(get(round.samples.get(&key)?)))).unwrap_or(0.0)
    };
    let reads = rounds.iter().filter_map(|round| round.samples.get(&key)?.reads_p99_us);
    Row {
        system: place.to_string(),
        regions,
        load: load.to_string(),
        per_second: of(&|sample| sample.rate),
        p50_us: of(&|sample| sample.p50_us),
        p99_us: of(&|sample| sample.p99_us),
        reads_p99_us: median(reads),
        processor_us: of(&|sample| sample.processor_us),
        ratios: ratios(rounds, key),
    }
}

/// The ratios that a load is judged by.
fn ratios(rounds: &[Round], key: (Place, u32, Load)) -> Vec<Ratio> {
    let (place, regions, load) = key;
    let mut ratios = Vec::new();
    let mut add = |of: &str, value: &dyn Fn(&Round, &Sample) -> Option<f64>, least, most| {
        let values = rounds.iter().filter_map(|round| value(round, round.samples.get(&key)?));
        if let Some(value) = median(values) {
            let (at_least, at_most) =
                if place == Place::Etcd { (None, None) } else { (least, most) };
            ratios.push(Ratio { of: of.into(), value, at_least, at_most });
        }
    };
    let embedded = place == Place::Embedded;
    let pick = |here: f64, there: f64| Some(if embedded { here } else { there });
    if load.is_update() && load.clients == 1 {
        add(
            "synced put",
            &|round, sample| Some(sample.p50_us / round.limits.synced_put_us),
            None,
            pick(1.6, 2.4),
        );
    }
    if load.is_update() && load.value_bytes == VALUE_BYTES && regions == 1 {
        let least = match load.clients {
            64 => pick(1.1, 0.95),
            256 => pick(1.4, 0.85),
            _ => None,
        };
        let limit = format!("limit({})", load.clients);
        add(
            &limit,
            &|round, sample| Some(sample.rate / round.limits.writes(load.clients)?),
            least,
            None,
        );
    }
    if load.is_update() && load.clients == 64 && load.value_bytes == VALUE_BYTES {
        add("p99 : p50", &|_, sample| Some(sample.p99_us / sample.p50_us), None, pick(3.0, 4.0));
    }
    if regions > 1 {
        let least = match regions {
            ..=30 => 0.85,
            31..=300 => 0.75,
            _ => 0.65,
        };
        let one = |round: &Round, sample: &Sample| {
            Some(sample.rate / round.samples.get(&(place, 1, load))?.rate)
        };
        add("one region", &one, Some(least), None);
    }
    if load.is_read() {
        add(
            "bare gets",
            &|round, sample| Some(sample.rate / round.limits.gets),
            pick(1.2, 0.25),
            None,
        );
    }
    if load.value_bytes > VALUE_BYTES {
        add(
            "limit",
            &|round, sample| Some(sample.rate / round.limits.large(load.value_bytes)?),
            pick(0.6, 0.5),
            None,
        );
    }
    if load.value_bytes < VALUE_BYTES {
        // Writes for each second of processor time: of each core that is in use.
        add(
            "writes per core : 100,000",
            &|_, sample| Some(1e6 / sample.processor_us / 1e5),
            pick(1.0, 0.5),
            None,
        );
    }
    if place == Place::Processes && regions == 1 {
        let least = match () {
            () if load.is_read() => Some(6.0),
            () if load.is_update() && load.clients > 1 => Some(3.5),
            () if !load.is_update() => Some(4.0),
            () => None,
        };
        let etcd = |round: &Round, sample: &Sample| {
            Some(sample.rate / round.samples.get(&(Place::Etcd, 1, load))?.rate)
        };
        add("etcd", &etcd, least, None);
    }
    if !load.is_update() && !load.is_read() {
        add("reads' p99 in ms", &|_, sample| Some(sample.reads_p99_us? / 1_000.0), None, Some(2.0));
    }
    ratios
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let headers =
            ["SYSTEM", "REGIONS", "LOAD", "PER SECOND", "P50 µs", "P99 µs", "CPU µs", "RATIOS"];
        let mut table = comfy_table::Table::new();
        table.load_style(PLAIN).force_no_tty();
        table.set_header(headers);
        for row in &self.rows {
            let number =
                |value: f64| Cell::new(format!("{value:.0}")).set_alignment(CellAlignment::Right);
            let ratios: Vec<_> = row.ratios.iter().map(text).collect();
            table.add_row([
                Cell::new(&row.system),
                number(f64::from(row.regions)),
                Cell::new(&row.load),
                number(row.per_second),
                number(row.p50_us),
                number(row.p99_us),
                Cell::new(format!("{:.1}", row.processor_us)).set_alignment(CellAlignment::Right),
                Cell::new(ratios.join("; ")),
            ]);
        }
        writeln!(
            f,
            "{} cores; medians of {} rounds of {} s; CPU is the processor time of an operation, of \
             servers and clients together",
            self.cores, self.rounds, self.seconds
        )?;
        write!(
            f,
            "one synced put {:.0} µs; limit(batch) in records a second:",
            self.limits.synced_put_us
        )?;
        for (batch, rate) in &self.limits.writes_per_second {
            write!(f, " ({batch}) {rate:.0}")?;
        }
        writeln!(f, "; bare gets by two threads {:.0} a second", self.limits.gets_per_second)?;
        write!(f, "{table}")
    }
}

/// `0.93 of limit(64) (goal: 1.1)`
fn text(ratio: &Ratio) -> String {
    let goal = match (ratio.at_least, ratio.at_most) {
        (Some(least), _) => format!(" (at least {least})"),
        (None, Some(most)) => format!(" (at most {most})"),
        (None, None) => String::new(),
    };
    let mark = if ratio.met() == Some(false) { " SHORT" } else { "" };
    format!("{:.2} {}{goal}{mark}", ratio.value, ratio.of)
}
