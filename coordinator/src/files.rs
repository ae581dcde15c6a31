//! What a run writes as it goes: `ledger.jsonl`, one line a committed step, and `metrics.jsonl`,
//! one line an event.
//!
//! Lines are appended with one write each and reach the disk for good ([`RunFiles::sync`]) when a
//! checkpoint is saved: nothing before a checkpoint that is not on disk can be resumed from. A
//! resumed run cuts both files back to the step it goes on from.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::state::{CommitRecord, EvalMetrics, Event};
use crate::{Error, Result};

const LEDGER: &str = "ledger.jsonl";
const METRICS: &str = "metrics.jsonl";

/// The ledger and the metrics file of a run, open for appending.
#[derive(Debug)]
pub struct RunFiles {
    ledger: Lines,
    metrics: Lines,
}

impl RunFiles {
    /// Files of a fresh run in an existing directory.
    ///
    /// # Errors
    /// [`Error::RunExists`] where a step was committed already; [`Error::File`].
    pub fn create(directory: &Path) -> Result<Self> {
        let ledger = directory.join(LEDGER);
        if fs::metadata(&ledger).is_ok_and(|metadata| metadata.len() > 0) {
            return Err(Error::RunExists { directory: directory.to_owned() });
        }
        replace(&ledger, "")?;
        replace(&directory.join(METRICS), "")?;
        Self::open(directory)
    }

    /// Files of a run that goes on from committed step `step`, cut back to it, and the last
    /// generation the run had before.
    ///
    /// # Errors
    /// [`Error::Damaged`] when the ledger does not hold every step up to `step`, or a line other
    /// than a torn last one is not ours; [`Error::File`]. The files are then as they were.
    pub fn resume(directory: &Path, step: u64) -> Result<(Self, u64)> {
        let (ledger, metrics) = (directory.join(LEDGER), directory.join(METRICS));
        let records = read::<CommitRecord>(&ledger)?;
        let events = read::<EventStep>(&metrics)?;
        let generation = records.iter().map(|(record, _)| record.generation).max().unwrap_or(0);
        let mut kept = String::new();
        let mut next = 1;
        for (record, line) in records.iter().take_while(|(record, _)| record.step <= step) {
            if record.step != next {
                let problem = format!("expected step {next}, found {}", record.step);
                return Err(Error::Damaged { path: ledger, line: next as usize, problem });
            }
            next += 1;
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
        Ok((Self::open(directory)?, generation))
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

    fn open(directory: &Path) -> Result<Self> {
        let ledger = Lines::open(directory.join(LEDGER))?;
        let metrics = Lines::open(directory.join(METRICS))?;
        Ok(Self { ledger, metrics })
    }

    /// Appends a committed step to the ledger.
    ///
    /// # Errors
    /// [`Error::File`]: the step must then not be announced as committed.
    pub fn commit(&mut self, record: &CommitRecord) -> Result<()> {
        self.ledger.append(record)
    }

    /// Appends an event to the metrics, if it is of a kind that goes there.
    ///
    /// # Errors
    /// [`Error::File`].
    pub fn event(&mut self, event: &Event) -> Result<()> {
        match event {
            Event::Train(metrics) => self.metrics.append(metrics),
            Event::Eval(metrics) => self.metrics.append(metrics),
            Event::Recovery(recovery) => self.metrics.append(recovery),
            Event::Joined { .. }
            | Event::Linked { .. }
            | Event::Started { .. }
            | Event::Best(_)
            | Event::Saved { .. } => Ok(()),
        }
    }

    /// Waits until everything appended is on disk.
    ///
    /// # Errors
    /// [`Error::File`].
    pub fn sync(&mut self) -> Result<()> {
        self.ledger.sync()?;
        self.metrics.sync()
    }
}

/// A file of JSON lines, open for appending.
#[derive(Debug)]
struct Lines {
    file: File,
    path: PathBuf,
}

impl Lines {
    fn open(path: PathBuf) -> Result<Self> {
        let file = OpenOptions::new().append(true).open(&path);
        Ok(Self { file: file.map_err(Error::file("open", &path))?, path })
    }

    fn append(&mut self, line: &impl Serialize) -> Result<()> {
        let text = serde_json::to_string(line).map_err(std::io::Error::from);
        let written = text.and_then(|text| self.file.write_all((text + "\n").as_bytes()));
        written.map_err(Error::file("append to", &self.path))
    }

    fn sync(&mut self) -> Result<()> {
        self.file.sync_data().map_err(Error::file("sync", &self.path))
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
mod tests {
    use super::*;
    use crate::state::{LostWorker, Recovery, TrainMetrics};

    fn record(step: u64) -> CommitRecord {
        CommitRecord {
            step,
            epoch: 0,
            positions: [4 * (step - 1), 4 * step],
            generation: 3,
            workers: 2,
            weights_digest: (step == 2).then(|| "ab".to_owned()),
        }
    }

    fn train(step: u64) -> Event {
        Event::Train(TrainMetrics {
            step,
            epoch: 0,
            loss: 1.5,
            grad_norm: 2.0,
            learning_rate: 0.001,
            examples: 4,
            source_tokens: 10,
            target_tokens: 6,
            step_seconds: 0.5,
            tokens_per_second: 32.0,
            workers: 2,
            peak_memory_bytes: 1024,
            loss_scale: None,
        })
    }

    fn run_of(directory: &Path, steps: u64) -> RunFiles {
        let mut files = RunFiles::create(directory).unwrap();
        for step in 1..=steps {
            files.commit(&record(step)).unwrap();
            files.event(&train(step)).unwrap();
        }
        files.sync().unwrap();
        files
    }

    fn text(directory: &Path, name: &str) -> String {
        fs::read_to_string(directory.join(name)).unwrap()
    }

    #[test]
    fn lines_are_as_documented() {
        let directory = tempfile::tempdir().unwrap();
        let mut files = run_of(directory.path(), 2);
        files.event(&Event::Saved { step: 2 }).unwrap();
        let metrics = [("exact_match".to_owned(), 0.25)].into();
        files.event(&Event::Eval(EvalMetrics { step: 2, eval_loss: 0.75, metrics })).unwrap();
        let lost = LostWorker { worker: 1, host: "h".into(), pid: 9, why: "gone".into() };
        let recovery = Recovery { step: 3, generation: 4, lost: vec![lost], workers: 1 };
        files.event(&Event::Recovery(recovery)).unwrap();
        assert_eq!(
            text(directory.path(), LEDGER),
            r#"{"step":1,"epoch":0,"positions":[0,4],"generation":3,"workers":2,"weights_digest":null}
{"step":2,"epoch":0,"positions":[4,8],"generation":3,"workers":2,"weights_digest":"ab"}
"#
        );
        let metrics = text(directory.path(), METRICS);
        let lines: Vec<&str> = metrics.lines().skip(1).collect();
        let expected = [
            r#"{"event":"train","step":2,"epoch":0,"loss":1.5,"grad_norm":2.0,"learning_rate":0.001,"examples":4,"source_tokens":10,"target_tokens":6,"step_seconds":0.5,"tokens_per_second":32.0,"workers":2,"peak_memory_bytes":1024}"#,
            r#"{"event":"eval","step":2,"eval_loss":0.75,"metrics":{"exact_match":0.25}}"#,
            r#"{"event":"recovery","step":3,"generation":4,"lost":[{"worker":1,"host":"h","pid":9,"why":"gone"}],"workers":1}"#,
        ];
        assert_eq!(lines, expected);
        let evaluations = RunFiles::evaluations(directory.path()).unwrap();
        assert_eq!(evaluations.iter().map(|eval| (eval.step, eval.eval_loss)).collect::<Vec<_>>(), [(2, 0.75)]);
    }

    #[test]
    fn resuming_cuts_both_files_back_and_appends() {
        let directory = tempfile::tempdir().unwrap();
        drop(run_of(directory.path(), 5));
        let torn = r#"{"step":6,"epo"#;
        for name in [LEDGER, METRICS] {
            let path = directory.path().join(name);
            fs::write(&path, text(directory.path(), name) + torn).unwrap();
        }
        let (mut files, generation) = RunFiles::resume(directory.path(), 3).unwrap();
        assert_eq!(generation, 3);
        files.commit(&record(4)).unwrap();
        files.event(&train(4)).unwrap();
        let whole = tempfile::tempdir().unwrap();
        drop(run_of(whole.path(), 4));
        for name in [LEDGER, METRICS] {
            assert_eq!(text(directory.path(), name), text(whole.path(), name));
        }
    }

    #[test]
    fn resuming_before_the_first_checkpoint_starts_empty() {
        let directory = tempfile::tempdir().unwrap();
        let (_, generation) = RunFiles::resume(directory.path(), 0).unwrap();
        assert_eq!((generation, text(directory.path(), LEDGER)), (0, String::new()));
    }

    #[test]
    fn a_ledger_with_a_gap_is_refused_and_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        drop(run_of(directory.path(), 4));
        let before = text(directory.path(), LEDGER);
        let error = RunFiles::resume(directory.path(), 9).unwrap_err();
        assert!(error.is_user_error());
        assert!(error.to_string().contains("line 5: the checkpoint's step 9 is not recorded"), "{error}");
        assert_eq!(text(directory.path(), LEDGER), before);

        let gap: String = before.lines().filter(|l| !l.contains("\"step\":2")).map(|l| format!("{l}\n")).collect();
        fs::write(directory.path().join(LEDGER), &gap).unwrap();
        let error = RunFiles::resume(directory.path(), 4).unwrap_err();
        assert!(error.to_string().contains("line 2: expected step 2, found 3"), "{error}");

        fs::write(directory.path().join(LEDGER), "nonsense\n").unwrap();
        let error = RunFiles::resume(directory.path(), 0).unwrap_err();
        assert!(error.to_string().contains("line 1: expected"), "{error}");
    }

    #[test]
    fn a_fresh_run_does_not_overwrite_another() {
        let directory = tempfile::tempdir().unwrap();
        drop(RunFiles::create(directory.path()).unwrap());
        drop(run_of(directory.path(), 1));
        let error = RunFiles::create(directory.path()).unwrap_err();
        assert!(matches!(error, Error::RunExists { .. }) && error.is_user_error());
        assert_eq!(text(directory.path(), LEDGER).lines().count(), 1);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk_is_an_error_that_says_what_to_do() {
        let path = PathBuf::from("/dev/full");
        let error = Lines::open(path).unwrap().append(&record(1)).unwrap_err();
        assert!(!error.is_user_error());
        let text = error.to_string();
        assert!(text.starts_with("cannot append to /dev/full: No space left"), "{text}");
        assert!(text.ends_with("go on with --resume"), "{text}");
    }
}
