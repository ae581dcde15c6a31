//! What a run writes as it goes: `ledger.jsonl`, one line a committed step, and `metrics.jsonl`,
//! one line an event.
//!
//! Lines become durable in the coordinator's record ([`crate::journal`]), with one sync for all of
//! an entry; the files themselves are synced now and then, and at the end. Whoever opens a run
//! that was cut off writes their ends anew from the record, so that the three always agree. A run
//! that is resumed from a checkpoint cuts both files back to its step.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
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
        replace(&ledger, "")?;
        replace(&directory.join(METRICS), "")?;
        Self::open(directory, identity, None)
    }

    /// Files of a run that goes on from committed step `step`, cut back to it, and the last
    /// generation the run had before, and that of the step.
    ///
    /// # Errors
    /// [`Error::Damaged`] when the ledger does not hold every step up to `step`, or a line other
    /// than a torn last one is not ours; [`Error::File`]. The files are then as they were.
    pub fn resume(directory: &Path, step: u64, identity: &Identity) -> Result<(Self, u64, u64)> {
        let recorded = repair(directory)?.and_then(|content| content.record);
        let (ledger, metrics) = (directory.join(LEDGER), directory.join(METRICS));
        let records = read::<CommitRecord>(&ledger)?;
        let events = read::<EventStep>(&metrics)?;
        let generations = records.iter().map(|(record, _)| record.generation);
        let generation = generations.chain(recorded.map(|record| record.generation)).max().unwrap_or(0);
        let (mut kept, mut next, mut of_step) = (String::new(), 1, 0);
        for (record, line) in records.iter().take_while(|(record, _)| record.step <= step) {
            if record.step != next {
                let problem = format!("expected step {next}, found {}", record.step);
                return Err(Error::Damaged { path: ledger, line: next as usize, problem });
            }
            (next, of_step) = (next + 1, record.generation);
            kept.extend([line, "\n"]);
        }
        if next != step + 1 {
            let problem = format!("the checkpoint's step {step} is not recorded");
            return Err(Error::Damaged { path: ledger, line: next as usize, problem });
        }
        replace(&ledger, &kept)?;
        let events = events.iter().filter(|(event, _)| event.step <= step);
        let kept: String = events.flat_map(|(_, line)| [line, "\n"]).collect();
        replace(&metrics, &kept)?;
        Ok((Self::open(directory, identity, None)?, generation, of_step))
    }

    /// The run of a coordinator that was killed, as it was; `None` where there is none.
    ///
    /// # Errors
    /// [`Error::File`].
    pub fn take_over(directory: &Path) -> Result<Option<CutOff>> {
        let Some(content) = repair(directory)? else { return Ok(None) };
        let (Some(record), Some(identity)) = (content.record.clone(), content.identity()) else { return Ok(None) };
        let files = Self::open(directory, &identity, Some(record.clone()))?;
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

    fn open(directory: &Path, identity: &Identity, record: Option<Record>) -> Result<Self> {
        let ledger = Lines::open(directory.join(LEDGER))?;
        let metrics = Lines::open(directory.join(METRICS))?;
        let content = Content::new(identity, record, ledger.no_tail(), metrics.no_tail());
        let journal = Journal::open(directory, &content)?;
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

/// Writes the ends of a run's files as its record has them, and answers the record.
fn repair(directory: &Path) -> Result<Option<Content>> {
    let Some(content) = Journal::read(directory)? else { return Ok(None) };
    for (name, tail) in [(LEDGER, &content.ledger), (METRICS, &content.metrics)] {
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
    }
    Ok(Some(content))
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

/// The lines of a file, parsed and verbatim. A file that is absent is empty; what follows the last
/// line's end is a write cut short by a crash and does not count.
fn read<T: DeserializeOwned>(path: &Path) -> Result<Vec<(T, String)>> {
    let text = match fs::read_to_string(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
        text => text.map_err(Error::file("read", path))?,
    };
    let whole = &text[..text.rfind('\n').map_or(0, |end| end + 1)];
    let parse = |(index, line): (usize, &str)| match serde_json::from_str(line) {
        Ok(value) => Ok((value, line.to_owned())),
        Err(error) => Err(Error::Damaged { path: path.to_owned(), line: index + 1, problem: error.to_string() }),
    };
    whole.lines().enumerate().map(parse).collect()
}

/// Replaces a file's content at once: written beside, synced, renamed.
fn replace(path: &Path, content: &str) -> Result<()> {
    let beside = path.with_extension("jsonl.tmp");
    let write = || {
        let mut file = File::create(&beside)?;
        file.write_all(content.as_bytes())?;
        file.sync_all()?;
        fs::rename(&beside, path)?;
        // The new name is safe only when the directory is.
        File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()
    };
    write().map_err(Error::file("write", path))
}

#[cfg(test)]
mod tests;
