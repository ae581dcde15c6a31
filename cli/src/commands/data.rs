//! `quintet data`: look at a source or at what a job makes of its data, tokenize ahead, write a source as JSON lines.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::Arc;

use quintet_data::{
    Loader, Order, Packer, Record, Source, SourceCounts, Splits, Tokenizer, Value as Field, resolve_sources,
};
use serde_json::{Map, Value, json};

use crate::args::{DataArguments, DataCommand, DataJobArguments};
use crate::commands::print_json;
use crate::error::{Failure, Result, exit};
use crate::job::Job;
use crate::prepare::{pretrained, run_tokenizer, working_directory};

pub(crate) fn run(arguments: DataArguments) -> Result<u8> {
    match arguments.command {
        DataCommand::Inspect { job, records } if is_job(&job.job) => inspect_job(&job, records)?,
        DataCommand::Inspect { job, records } => inspect(&job.job.to_string_lossy(), records)?,
        DataCommand::Prepare { job, json } => prepare(&job, json)?,
        DataCommand::Export { source, output } => export(&source, &output)?,
    }
    Ok(exit::DONE)
}

fn is_job(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "toml")
}

fn open(source: &str) -> Result<Vec<Source>> {
    Ok(resolve_sources(&[source.to_string()], &working_directory()?, "train")?)
}

fn inspect(source: &str, shown: usize) -> Result<()> {
    let mut count = 0;
    for source in open(source)? {
        source.for_each(|_, record| {
            if count < shown {
                print_json(&to_json(&record));
            }
            count += 1;
            Ok(())
        })?;
    }
    eprintln!("{count} records");
    Ok(())
}

fn export(source: &str, output: &Path) -> Result<()> {
    let failure = |error: std::io::Error| Failure::failed(format!("{}: cannot write: {error}", output.display()));
    let sources = open(source)?;
    let mut file = BufWriter::new(File::create(output).map_err(failure)?);
    for source in sources {
        source.for_each(|_, record| writeln!(file, "{}", to_json(&record)).map_err(|error| error.to_string()))?;
    }
    file.flush().map_err(failure)
}

fn to_json(record: &Record) -> Value {
    let fields = record.fields().map(|(name, field)| (name.to_string(), field_to_json(field)));
    Value::Object(fields.collect::<Map<String, Value>>())
}

fn field_to_json(field: &Field) -> Value {
    match field {
        Field::Text(text) => text.as_str().into(),
        Field::Bool(truth) => (*truth).into(),
        Field::Null => Value::Null,
        // As it is written, where JSON can say it; a Parquet file's NaN it cannot.
        Field::Number(number) => serde_json::from_str(number).unwrap_or(Value::Null),
        Field::Nested(nested) => serde_json::from_str(nested).unwrap_or(Value::Null),
    }
}

/// A job's data, ready to be trained on.
pub(crate) struct JobData {
    pub(crate) job: Job,
    pub(crate) splits: Splits,
    pub(crate) tokenizer: Arc<Tokenizer>,
}

impl JobData {
    /// Reads a job's examples and its tokenizer.
    pub(crate) fn load(arguments: &DataJobArguments) -> Result<Self> {
        let job = Job::load(&arguments.as_job())?;
        let base = working_directory()?;
        let splits = Splits::load(&job.data, &base, job.training.seed)?;
        let model = if job.model.tokenizer.is_some() { None } else { pretrained(&job, &base)? };
        let tokenizer = Arc::new(run_tokenizer(&job, &base, model.as_ref(), &splits, false)?);
        Ok(Self { job, splits, tokenizer })
    }

    /// With what was tokenized ahead, and what the objective needs so.
    pub(crate) fn tokenized(self) -> Result<Self> {
        Ok(Self { splits: self.splits.tokenized(&self.tokenizer)?, ..self })
    }

    pub(crate) fn packer(&self) -> Packer {
        let train = Arc::new(self.splits.train.clone());
        Packer::new(train, self.tokenizer.clone(), self.splits.order(), self.job.data.limits())
    }
}

fn prepare(arguments: &DataJobArguments, json: bool) -> Result<()> {
    let JobData { job, mut splits, tokenizer } = JobData::load(arguments)?;
    let (present, sources) = splits.prepare(&tokenizer)?;
    let folder = job.data.cache_dir.unwrap_or_default();
    let (train, validation) = (splits.train.len(), splits.validation.map(|validation| validation.len()));
    if json {
        let made = sources - present;
        print_json(&json!({"cache_dir": folder, "examples": train, "validation_examples": validation,
            "sources_tokenized": made, "sources_present": present}));
        return Ok(());
    }
    let validation = validation.map_or(String::new(), |examples| format!(" and {examples} validation"));
    println!("{}: {train} training{validation} examples, tokenized", folder.display());
    if present > 0 {
        println!("{present} of {sources} sources were there already");
    }
    Ok(())
}

/// Lengths are those of so many examples.
const MEASURED_EXAMPLES: u64 = 10_000;

fn inspect_job(arguments: &DataJobArguments, shown: usize) -> Result<()> {
    let data = JobData::load(arguments)?.tokenized()?;
    let train = &data.splits.train;
    let order = data.splits.order();
    for position in 0..order.positions().min(shown as u64) {
        let example = train.example(order.example(0, position));
        print_json(&json!({"input": example.input, "target": example.target}));
    }
    for (counts, share) in data.splits.counts.iter().zip(shares(&order, &train.part_lens())) {
        eprintln!("{}", describe(counts, share));
    }
    let validation = data.splits.validation.as_ref();
    let validation =
        validation.map_or("no validation examples".to_string(), |set| format!("{} validation examples", set.len()));
    eprintln!("{} training examples, {} positions an epoch, {validation}", train.len(), order.positions());
    let (mut sources, mut targets) = lengths(&data, order.positions().min(MEASURED_EXAMPLES))?;
    let limits = data.job.data.limits();
    eprintln!("source tokens: {}", quantiles(&mut sources, limits.max_source_length));
    eprintln!("target tokens: {}", quantiles(&mut targets, limits.max_target_length));
    Ok(())
}

/// The share of an epoch's positions of each source.
fn shares(order: &Order, examples: &[u64]) -> Vec<f64> {
    let positions = order.slots();
    let slots = if positions.is_empty() { examples.to_vec() } else { positions };
    slots.iter().map(|&slots| slots as f64 / order.positions() as f64).collect()
}

fn describe(counts: &SourceCounts, share: f64) -> String {
    let name =
        counts.name.as_ref().map_or(String::new(), |name| format!("{name} ({:.1} % of an epoch): ", 100.0 * share));
    let SourceCounts { records, filtered, by_length, .. } = counts;
    format!("{name}{records} records, less {filtered} by data.where and {by_length} by length")
}

/// Lengths in tokens of the first so many positions' examples.
fn lengths(data: &JobData, examples: u64) -> Result<(Vec<u32>, Vec<u32>)> {
    const BATCH: u64 = 64;
    let mut loader = Loader::new(data.packer(), 1);
    let (mut sources, mut targets) = (Vec::new(), Vec::new());
    for first in (0..examples).step_by(BATCH as usize) {
        loader.request(0, first..examples.min(first + BATCH));
        let batch = loader.next()?;
        sources.extend(batch.source_offsets.windows(2).map(|pair| pair[1] - pair[0]));
        targets.extend(batch.target_offsets.windows(2).map(|pair| pair[1] - pair[0]));
    }
    Ok((sources, targets))
}

fn quantiles(lengths: &mut [u32], limit: usize) -> String {
    lengths.sort_unstable();
    let at = |part: f64| lengths[((lengths.len() - 1) as f64 * part) as usize];
    let full = lengths.iter().filter(|&&length| length as usize >= limit).count();
    let mean = lengths.iter().map(|&length| f64::from(length)).sum::<f64>() / lengths.len() as f64;
    format!(
        "mean {mean:.1}, median {}, 95 % {}, longest {}; {:.1} % at the limit of {limit}",
        at(0.5),
        at(0.95),
        at(1.0),
        100.0 * full as f64 / lengths.len() as f64
    )
}
