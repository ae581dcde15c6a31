//! What a run writes as it goes: `ledger.jsonl`, one line a committed step, and `metrics.jsonl`,
//! one line an event.
//!
//! Lines become durable in the coordinator's record ([`crate::journal`]), with one sync for all of
//! an entry; the files themselves are synced now and then, and at the end. Whoever opens a run
//! that was cut off writes their ends anew from the record, so that the three always agree. A run
//! that is resumed from a checkpoint cuts both files back to its step: on record first, so that a
//! crash on the way is one like any other.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::journal::{Content, Identity, Journal, Tail};
use crate::state::{CommitRecord, Entry, EvalMetrics, Event, Record};
use crate::{Error, Result};

const LEDGER: &str = "ledger.jsonl";
const METRICS: &str = "metrics.jsonl";
/// The files are synced when the record would carry more of them.
const TAIL_BYTES_MAX: usize = 8 << 10;

/// The ledger, the metrics file and the record of a run, open for writing.
#[derive(Debug)]
pub struct RunFiles {
    directory: PathBuf,
    journal: Journal,
    content: Content,
    ledger: Lines,
    metrics: Lines,
}

/// A run that was cut off while it was under way.
#[derive(Debug)]
pub struct CutOff {
    /// Its files, which agree with the record.
    pub files: RunFiles,
    /// Where it was.
    pub record: Record,
    /// By what its workers know it.
    pub identity: Identity,
}

impl RunFiles {
    /// Files of a fresh run in an existing directory.
    ///
    /// # Errors
    /// [`Error::RunExists`] where a step was committed already; [`Error::File`].
    pub fn create(directory: &Path, identity: &Identity) -> Result<Self> {
        let ledger = directory.join(LEDGER);
        if fs::metadata(&ledger).is_ok_and(|metadata| metadata.len() > 0) {
            return Err(Error::RunExists { directory: directory.to_owned() });
        }
        Self::open(directory, Content::new(identity, 0, Tail::default(), Tail::default()))
    }

    /// Files of a run that goes on from committed step `step`, cut back to it, and the last
    /// generation the run had before, and that of the step.
    ///
    /// # Errors
    /// [`Error::Damaged`] when the ledger does not hold every step up to `step`, or a line other
    /// than a torn last one is not ours; [`Error::File`]. The files are then as they were.
    pub fn resume(directory: &Path, step: u64, identity: &Identity) -> Result<(Self, u64, u64)> {
        let (content, of_step) = cut_back(directory, step, identity)?;
        let generation = content.generation();
        Ok((Self::open(directory, content)?, generation, of_step))
    }

    /// The run of a coordinator that was killed, as it was; `None` where there is none.
    ///
    /// # Errors
    /// [`Error::File`].
    pub fn take_over(directory: &Path) -> Result<Option<CutOff>> {
        let Some(content) = Journal::read(directory)? else { return Ok(None) };
        let (Some(record), Some(identity)) = (content.record.clone(), content.identity()) else { return Ok(None) };
        let files = Self::open(directory, content)?;
        Ok(Some(CutOff { files, record, identity }))
    }

    /// By what the workers of a run that was cut off know it.
    ///
    /// # Errors
    /// [`Error::File`].
    pub fn identity(directory: &Path) -> Result<Option<Identity>> {
        Ok(Journal::read(directory)?.and_then(|content| content.identity()))
    }

    /// The evaluations that the metrics file of `directory` holds; of lines of other kinds nothing is asked.
    ///
    /// # Errors
    /// [`Error::File`], [`Error::Damaged`].
    pub fn evaluations(directory: &Path) -> Result<Vec<EvalMetrics>> {
        #[derive(serde::Deserialize)]
        #[serde(untagged)]
        enum Line {
            Eval(EvalMetrics),
            Other {},
        }
        let lines = read::<Line>(&directory.join(METRICS))?;
        let evaluation = |(line, _)| match line {
            Line::Eval(metrics) => Some(metrics),
            Line::Other {} => None,
        };
        Ok(lines.into_iter().filter_map(evaluation).collect())
    }

    /// The files as `content` has them, which is on record before they are.
    fn open(directory: &Path, mut content: Content) -> Result<Self> {
        let mut journal = Journal::open(directory, &content)?;
        let [ledger, metrics] = apply(directory, &content)?;
        (content.ledger, content.metrics) = (ledger.no_tail(), metrics.no_tail());
        journal.write(&content)?;
        Ok(Self { directory: directory.to_owned(), journal, content, ledger, metrics })
    }

    /// Makes an entry durable and writes its lines. After an error the same entry, and no other,
    /// may be given again.
    ///
    /// # Errors
    /// [`Error::File`]: what the entry says must then not be announced.
    pub fn record(&mut self, entry: &Entry) -> Result<()> {
        let ledger: String = entry.commit.iter().map(line).collect();
        let metrics: String = entry.events.iter().map(metrics_line).collect();
        if self.content.ledger.text.len() + self.content.metrics.text.len() > TAIL_BYTES_MAX {
            self.sync()?;
        }
        let mut content = self.content.clone();
        content.record = Some(entry.record.clone());
        content.ledger.text += &ledger;
        content.metrics.text += &metrics;
        self.journal.write(&content)?;
        self.ledger.write(&ledger)?;
        self.metrics.write(&metrics)?;
        // From here on it cannot fail, so that it is never written twice.
        self.ledger.bytes += ledger.len() as u64;
        self.metrics.bytes += metrics.len() as u64;
        self.content = content;
        Ok(())
    }

    /// Waits until the files are on disk themselves.
    fn sync(&mut self) -> Result<()> {
        self.ledger.sync()?;
        self.metrics.sync()?;
        (self.content.ledger, self.content.metrics) = (self.ledger.no_tail(), self.metrics.no_tail());
        Ok(())
    }

    /// Ends the record of a run that ends in order.
    ///
    /// # Errors
    /// [`Error::File`].
    pub fn finish(mut self) -> Result<()> {
        self.sync()?;
        Journal::remove(&self.directory)
    }
}

fn metrics_line(event: &Event) -> String {
    match event {
        Event::Train(metrics) => line(metrics),
        Event::Eval(metrics) => line(metrics),
        Event::Recovery(recovery) => line(recovery),
        // For people only.
        _ => String::new(),
    }
}

fn line(value: &impl Serialize) -> String {
    // Plain records of numbers and strings always have a JSON form.
    serde_json::to_string(value).map(|text| text + "\n").unwrap_or_default()
}

/// What to put on record for a run to go on from `step`, and the generation of that step.
fn cut_back(directory: &Path, step: u64, identity: &Identity) -> Result<(Content, u64)> {
    let recorded = Journal::read(directory)?;
    if let Some(content) = &recorded {
        apply(directory, content)?;
    }
    let [ledger, metrics] = [LEDGER, METRICS].map(|name| directory.join(name));
    let records = read::<CommitRecord>(&ledger)?;
    let events = read::<EventStep>(&metrics)?;
    let generations = records.iter().map(|(record, _)| record.generation);
    let generation = generations.chain(recorded.map(|content| content.generation())).max().unwrap_or(0);
    let (mut commits, mut next, mut of_step) = (String::new(), 1, 0);
    for (record, line) in records.iter().take_while(|(record, _)| record.step <= step) {
        if record.step != next {
            let problem = format!("expected step {next}, found {}", record.step);
            return Err(Error::Damaged { path: ledger, line: next as usize, problem });
        }
        (next, of_step) = (next + 1, record.generation);
        commits.extend([line, "\n"]);
    }
    if next != step + 1 {
        let problem = format!("the checkpoint's step {step} is not recorded");
        return Err(Error::Damaged { path: ledger, line: next as usize, problem });
    }
    let kept = events.iter().filter(|(event, _)| event.step <= step);
    let kept: String = kept.flat_map(|(_, line)| [line, "\n"]).collect();
    let ledger = Tail::between(&read_text(&ledger)?, &commits);
    let metrics = Tail::between(&read_text(&metrics)?, &kept);
    Ok((Content::new(identity, generation, ledger, metrics), of_step))
}

/// Gives a run's files the ends that its record has; the files.
fn apply(directory: &Path, content: &Content) -> Result<[Lines; 2]> {
    let end = |name: &str, tail: &Tail| {
        let path = directory.join(name);
        let mut lines = Lines::open(path.clone())?;
        if lines.bytes < tail.offset {
            let problem = format!("the file ends {} bytes before what is on record", tail.offset - lines.bytes);
            return Err(Error::Damaged { path, line: 0, problem });
        }
        lines.bytes = tail.offset;
        lines.write(&tail.text)?;
        lines.bytes += tail.text.len() as u64;
        lines.sync()?;
        Ok(lines)
    };
    let files = [end(LEDGER, &content.ledger)?, end(METRICS, &content.metrics)?];
    // Names that are new are safe only when the directory is.
    File::open(directory).and_then(|names| names.sync_all()).map_err(Error::file("sync", directory))?;
    Ok(files)
}

/// A file of JSON lines that grows.
#[derive(Debug)]
struct Lines {
    file: File,
    path: PathBuf,
    /// What lies beyond was not written in whole.
    bytes: u64,
}

impl Lines {
    fn open(path: PathBuf) -> Result<Self> {
        let open = || {
            let file = OpenOptions::new().write(true).create(true).truncate(false).open(&path)?;
            let bytes = file.metadata()?.len();
            Ok((file, bytes))
        };
        let (file, bytes) = open().map_err(Error::file("open", &path))?;
        Ok(Self { file, path, bytes })
    }

    fn no_tail(&self) -> Tail {
        Tail { offset: self.bytes, text: String::new() }
    }

    /// Puts `text` at the end, without counting it.
    fn write(&mut self, text: &str) -> Result<()> {
        self.file.write_all_at(text.as_bytes(), self.bytes).map_err(Error::file("append to", &self.path))
    }

    fn sync(&mut self) -> Result<()> {
        // Nothing else writes here; but an attempt may have been given up.
        let sync = self.file.set_len(self.bytes).and_then(|()| self.file.sync_data());
        sync.map_err(Error::file("sync", &self.path))
    }
}

/// As much of an event as resuming needs.
#[derive(serde::Deserialize)]
struct EventStep {
    step: u64,
}

/// A file's whole lines. One that is absent is empty; what follows the last line's end is a write cut short by a crash
/// and does not count.
fn read_text(path: &Path) -> Result<String> {
    let mut text = match fs::read_to_string(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
        text => text.map_err(Error::file("read", path))?,
    };
    text.truncate(text.rfind('\n').map_or(0, |end| end + 1));
    Ok(text)
}

/// The lines of a file, parsed and verbatim.
fn read<T: DeserializeOwned>(path: &Path) -> Result<Vec<(T, String)>> {
    let parse = |(index, line): (usize, &str)| match serde_json::from_str(line) {
        Ok(value) => Ok((value, line.to_owned())),
        Err(error) => Err(Error::Damaged { path: path.to_owned(), line: index + 1, problem: error.to_string() }),
    };
    read_text(path)?.lines().enumerate().map(parse).collect()
}

#[cfg(test)]
mod tests;
