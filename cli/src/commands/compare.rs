//! `quintet evaluate --compare`: predictions of several systems on the same examples, side by side.

use std::path::{Path, PathBuf};

use quintet_worker::Metric;
use quintet_worker::metrics::{Contributions, Interval, Pair, Resampling};
use serde_json::{Map, Value, json};

use crate::commands::evaluate::{Line, read_predictions};
use crate::error::{Failure, Result};

/// Enough for the second digit of an interval's width.
const RESAMPLES: u32 = 1000;
/// The same table for the same files.
const SEED: u64 = 42;

/// A system's predictions.
struct System {
    name: String,
    lines: Vec<Line>,
}

/// One metric of one system.
struct Cell {
    score: f64,
    interval: Interval,
    /// To the first system; none for itself.
    difference: Option<Difference>,
}

/// By how much a system is above the first one.
struct Difference {
    value: f64,
    interval: Interval,
}

/// The table as JSON: rows are systems, in the order given.
pub(crate) fn compare(paths: &[PathBuf], metrics: &[Metric]) -> Result<Value> {
    if paths.len() < 2 {
        return Err(Failure::bad_input("--compare: give at least two files of predictions or run directories"));
    }
    let systems = paths.iter().map(|path| System::read(path)).collect::<Result<Vec<System>>>()?;
    systems[1..].iter().try_for_each(|other| systems[0].check_same_examples(other))?;
    let resampling = Resampling { seed: SEED, resamples: RESAMPLES };
    let mut rows: Vec<Map<String, Value>> = systems.iter().map(|_| Map::new()).collect();
    for &metric in metrics {
        for (row, cell) in rows.iter_mut().zip(column(&systems, metric, resampling)) {
            row.insert(metric.name().to_string(), cell.to_json(metric));
        }
    }
    let rows = systems.iter().zip(rows).map(|(system, row)| json!({"name": system.name, "metrics": row}));
    Ok(json!({
        "examples": systems[0].lines.len(),
        "resamples": RESAMPLES,
        "seed": SEED,
        "systems": rows.collect::<Vec<Value>>(),
    }))
}

/// Scores of all systems by one metric, on the same samples.
fn column(systems: &[System], metric: Metric, resampling: Resampling) -> Vec<Cell> {
    let scored = |system: &System| {
        let pairs: Vec<Pair> =
            system.lines.iter().map(|line| Pair { prediction: &line.prediction, target: &line.target }).collect();
        let contributions = Contributions::new(metric, &pairs)?;
        Some((contributions.score(), resampling.scores(&contributions)))
    };
    let scored: Vec<(f64, Vec<f64>)> = systems.iter().filter_map(scored).collect();
    let cell = |(index, (score, samples)): (usize, &(f64, Vec<f64>))| {
        let (first_score, first_samples) = &scored[0];
        let differences = || -> Vec<f64> { samples.iter().zip(first_samples).map(|(a, b)| a - b).collect() };
        let difference =
            (index > 0).then(|| Difference { value: score - first_score, interval: Interval::of(&differences()) });
        Cell { score: *score, interval: Interval::of(samples), difference }
    };
    scored.iter().enumerate().map(cell).collect()
}

impl Cell {
    fn to_json(&self, metric: Metric) -> Value {
        let Interval { low, high } = self.interval;
        let mut value = json!({"score": self.score, "low": low, "high": high});
        if let Some(Difference { value: difference, interval }) = &self.difference {
            let better = (*difference > 0.0) == metric.greater_is_better();
            value["difference"] = json!({
                "value": difference,
                "low": interval.low,
                "high": interval.high,
                "verdict": match (interval.excludes_zero(), better) {
                    (false, _) => "no significant difference",
                    (true, true) => "better",
                    (true, false) => "worse",
                },
            });
        }
        value
    }
}

impl System {
    /// A file of predictions, or a directory that has one.
    fn read(path: &Path) -> Result<Self> {
        let file = if path.is_dir() { path.join("predictions.jsonl") } else { path.to_path_buf() };
        Ok(System { name: path.display().to_string(), lines: read_predictions(&file)? })
    }

    /// Scores can be compared only on the same examples.
    fn check_same_examples(&self, other: &System) -> Result<()> {
        let differ = |what: String| {
            let (one, two) = (&self.name, &other.name);
            Err(Failure::bad_input(format!("--compare: {one} and {two} are of different examples: {what}")))
        };
        let (one, two) = (self.lines.len(), other.lines.len());
        if one != two {
            return differ(format!("{one} and {two} of them"));
        }
        let target = |(one, two): (&Line, &Line)| one.target != two.target;
        match self.lines.iter().zip(&other.lines).position(target) {
            Some(index) => differ(format!("other targets in prediction {}", index + 1)),
            None => Ok(()),
        }
    }
}

/// The table for people: a row a system, and below it what is hardly chance.
pub(crate) fn print_table(table: &Value) {
    let systems = table["systems"].as_array().map_or(&[][..], Vec::as_slice);
    let metrics: Vec<&String> = systems[0]["metrics"].as_object().into_iter().flat_map(Map::keys).collect();
    let number = |value: &Value| value.as_f64().unwrap_or(f64::NAN);
    let text = |system: &Value, metric: &str| {
        let cell = &system["metrics"][metric];
        let mark = match cell["difference"]["verdict"].as_str() {
            Some("better") => " +",
            Some("worse") => " -",
            _ => "  ",
        };
        format!("{:.4} [{:.4}, {:.4}]{mark}", number(&cell["score"]), number(&cell["low"]), number(&cell["high"]))
    };
    let name = |system: &Value| system["name"].as_str().unwrap_or_default().to_string();
    let width = systems.iter().map(|system| name(system).chars().count()).max().unwrap_or(0);
    let heading: Vec<String> = metrics.iter().map(|metric| format!("{metric:<26}")).collect();
    println!("{:width$}  {}", "", heading.join("  ").trim_end());
    for system in systems {
        let cells: Vec<String> = metrics.iter().map(|metric| format!("{:<26}", text(system, metric))).collect();
        println!("{:width$}  {}", name(system), cells.join("  ").trim_end());
    }
    println!(
        "{} examples; intervals of 95 % from {} samples; + significantly better than {}, - worse",
        table["examples"],
        table["resamples"],
        name(&systems[0])
    );
}
