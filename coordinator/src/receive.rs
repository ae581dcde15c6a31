//! What a worker hands in that does not share the run's directory: received beside, verified, synced, then renamed, so that
//! its name is a promise here as everywhere.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use quintet_proto::HASH_BYTES;
use quintet_proto::v1::{Part, Publication, part::Content};
use tokio::sync::mpsc;
use tonic::{Status, Streaming};

use crate::share::{ADAPTER, Answer, CHECKPOINTS, MODEL, checkpoint_name, file_name};

/// The file of the last evaluation's predictions.
const PREDICTIONS: &str = "predictions.jsonl";
/// What is not complete.
const BESIDE: &str = ".tmp-upload-";
/// More files than any model has.
const FILES_MAX: usize = 1024;
/// More than any run keeps.
const REMOVED_MAX: usize = 10_000;
/// Pieces that wait for the disk.
const PIECES_AHEAD: usize = 4;
/// How long a worker may take for its first word, and for the next.
const SILENCE_MAX: Duration = Duration::from_secs(60);

/// Tells what is received at the same time apart.
static RECEIVED: AtomicU64 = AtomicU64::new(0);

/// Removes what a coordinator that was killed had not received whole.
pub(crate) fn remove_leftovers(output_dir: &Path) {
    let folders = [output_dir.to_owned(), output_dir.join(CHECKPOINTS)];
    let entries = folders.iter().filter_map(|folder| fs::read_dir(folder).ok()).flatten().flatten();
    for path in entries.map(|entry| entry.path()) {
        if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(BESIDE)) {
            // What stays is only in nobody's way.
            let _ = remove(&path);
        }
    }
}

/// Where an artifact belongs, and whether it is a directory.
fn target(output_dir: &Path, artifact: &str) -> Answer<(PathBuf, bool)> {
    match artifact.strip_prefix(CHECKPOINTS) {
        Some(step) => Ok((output_dir.join(CHECKPOINTS).join(checkpoint_name(step)?), true)),
        None if [MODEL, ADAPTER].contains(&artifact) => Ok((output_dir.join(artifact), true)),
        None if artifact == PREDICTIONS => Ok((output_dir.join(artifact), false)),
        None => Err(Status::invalid_argument(format!("{artifact:?} is nothing that a run keeps"))),
    }
}

/// Receives an artifact, puts it in its place, and removes the checkpoints that need not stay any more.
pub(crate) async fn receive(output_dir: &Path, publication: Publication, mut parts: Streaming<Part>) -> Answer<()> {
    let receiving = Receiving::new(output_dir, publication)?;
    let (pieces, waiting) = mpsc::channel::<Vec<u8>>(PIECES_AHEAD);
    let written = tokio::task::spawn_blocking(move || receiving.run(waiting));
    // What ends early, for whatever reason, the writer finds too short.
    while let Ok(Ok(Some(part))) = tokio::time::timeout(SILENCE_MAX, parts.message()).await {
        let Some(Content::Data(data)) = part.content else { break };
        if pieces.send(data).await.is_err() {
            break;
        }
    }
    drop(pieces);
    written.await.map_err(|error| Status::internal(error.to_string()))?
}

/// An artifact on its way.
struct Receiving {
    publication: Publication,
    target: PathBuf,
    is_directory: bool,
    /// Beside the target, until all of it is there.
    beside: PathBuf,
    removed: Vec<PathBuf>,
}

impl Receiving {
    fn new(output_dir: &Path, publication: Publication) -> Answer<Self> {
        let (target, is_directory) = target(output_dir, &publication.artifact)?;
        let files = &publication.files;
        let is_plausible = if is_directory { (1..=FILES_MAX).contains(&files.len()) } else { files.len() == 1 };
        if !is_plausible || publication.removed.len() > REMOVED_MAX {
            return Err(Status::invalid_argument(format!("{} files for {}", files.len(), publication.artifact)));
        }
        for file in files {
            file_name(&file.name)?;
            if file.digest.len() != HASH_BYTES {
                return Err(Status::invalid_argument(format!("{}: its digest has another length", file.name)));
            }
        }
        let checkpoints = output_dir.join(CHECKPOINTS);
        let removed = publication.removed.iter().map(|name| Ok(checkpoints.join(checkpoint_name(name)?)));
        let removed = removed.collect::<Answer<_>>()?;
        let number = RECEIVED.fetch_add(1, Ordering::Relaxed);
        let name = target.file_name().unwrap_or_default().to_string_lossy();
        let beside = target.with_file_name(format!("{BESIDE}{number}-{name}"));
        Ok(Self { publication, target, is_directory, beside, removed })
    }

    fn run(self, mut pieces: mpsc::Receiver<Vec<u8>>) -> Answer<()> {
        self.write(&mut pieces).and_then(|()| self.finish()).map_err(|error| {
            // The error that stopped it is the one to report.
            let _ = remove(&self.beside);
            let problem = format!("{}: {error}", self.target.display());
            match error.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Status::resource_exhausted(problem),
                // The connection broke: to be sent again.
                io::ErrorKind::UnexpectedEof => Status::aborted(problem),
                _ => Status::data_loss(problem),
            }
        })
    }

    fn write(&self, pieces: &mut mpsc::Receiver<Vec<u8>>) -> io::Result<()> {
        if self.is_directory {
            fs::create_dir_all(&self.beside)?;
        }
        for wanted in &self.publication.files {
            let path = if self.is_directory { self.beside.join(&wanted.name) } else { self.beside.clone() };
            let (mut file, mut hasher, mut left) = (File::create_new(path)?, blake3::Hasher::new(), wanted.bytes);
            while left > 0 {
                let piece = pieces.blocking_recv().ok_or(io::ErrorKind::UnexpectedEof)?;
                left = left.checked_sub(piece.len() as u64).ok_or_else(|| other_content(&wanted.name))?;
                hasher.update(&piece);
                file.write_all(&piece)?;
            }
            if hasher.finalize().as_bytes() != wanted.digest.as_slice() {
                return Err(other_content(&wanted.name));
            }
            file.sync_all()?;
        }
        if self.is_directory { sync(&self.beside) } else { Ok(()) }
    }

    /// Gives what is whole its name, in the place of what had it.
    fn finish(&self) -> io::Result<()> {
        let old = self.beside.with_extension("old");
        if self.is_directory && self.target.exists() {
            fs::rename(&self.target, &old)?;
        }
        fs::rename(&self.beside, &self.target)?;
        if let Some(parent) = self.target.parent() {
            sync(parent)?;
        }
        remove(&old)?;
        for path in self.removed.iter().filter(|path| **path != self.target) {
            // Its name is gone before the first of its files is.
            match fs::rename(path, &old) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                renamed => renamed.and_then(|()| remove(&old))?,
            }
        }
        Ok(())
    }
}

fn other_content(name: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("what comes of {name} does not match its length and digest"))
}

/// Makes the names in a directory durable.
fn sync(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}

/// Removes a file or a directory, if it is there.
fn remove(path: &Path) -> io::Result<()> {
    let removed = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

#[cfg(test)]
mod tests {
    use quintet_proto::v1;

    use super::*;

    fn publication(artifact: &str, files: &[(&str, &str)]) -> Publication {
        let file = |&(name, text): &(&str, &str)| v1::File {
            name: name.to_owned(),
            bytes: text.len() as u64,
            digest: blake3::hash(text.as_bytes()).as_bytes().to_vec(),
        };
        let files = files.iter().map(file).collect();
        Publication { artifact: artifact.to_owned(), files, ..Publication::default() }
    }

    fn receive(directory: &Path, publication: Publication, sent: &[&str]) -> Answer<()> {
        let (pieces, waiting) = mpsc::channel(sent.len().max(1));
        sent.iter().for_each(|text| pieces.try_send(text.as_bytes().to_vec()).unwrap());
        drop(pieces);
        Receiving::new(directory, publication)?.run(waiting)
    }

    fn names(directory: &Path) -> Vec<String> {
        let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name());
        let mut names: Vec<String> = entries.map(|name| name.into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn an_artifact_is_there_whole_or_as_it_was() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        let model = |text| publication(MODEL, &[("a.json", "{}"), ("b.safetensors", text)]);
        receive(path, model("one two"), &["{}", "one ", "two"]).unwrap();
        assert_eq!(fs::read_to_string(path.join("model/b.safetensors")).unwrap(), "one two");
        // Cut off, too long, other content.
        for sent in [&["{}"][..], &["{}", "four"], &["{}", "three and more"], &["{}", "fivx!"], &["()", "five!"]] {
            receive(path, model("five!"), sent).unwrap_err();
            assert_eq!(fs::read_to_string(path.join("model/b.safetensors")).unwrap(), "one two", "{sent:?}");
        }
        receive(path, publication(MODEL, &[("b.safetensors", "five!")]), &["five!"]).unwrap();
        assert_eq!(names(&path.join("model")), ["b.safetensors"]);
        receive(path, publication(PREDICTIONS, &[(PREDICTIONS, "p")]), &["p"]).unwrap();
        receive(path, publication(PREDICTIONS, &[(PREDICTIONS, "q")]), &["q"]).unwrap();
        assert_eq!(
            (names(path), fs::read(path.join(PREDICTIONS)).unwrap()),
            (vec!["model".into(), PREDICTIONS.into()], b"q".to_vec())
        );
    }

    #[test]
    fn checkpoints_that_need_not_stay_make_room() {
        let directory = tempfile::tempdir().unwrap();
        for step in ["step-00000001", "step-00000002", "step-00000003"] {
            let removed =
                if step.ends_with('3') { vec!["step-00000001".to_owned(), "step-00000009".to_owned()] } else { vec![] };
            let publication =
                Publication { removed, ..publication(&format!("checkpoints/{step}"), &[("state.json", step)]) };
            receive(directory.path(), publication, &[step]).unwrap();
        }
        assert_eq!(names(&directory.path().join("checkpoints")), ["step-00000002", "step-00000003"]);
        fs::create_dir(directory.path().join("checkpoints/.tmp-upload-7-step-00000004")).unwrap();
        remove_leftovers(directory.path());
        assert_eq!(names(&directory.path().join("checkpoints")).len(), 2);
    }

    #[test]
    fn nothing_leads_out_of_the_run() {
        let directory = tempfile::tempdir().unwrap();
        let run = directory.path().join("run");
        fs::create_dir(&run).unwrap();
        fs::write(directory.path().join("outside"), "o").unwrap();
        for artifact in
            ["", ".", "..", "../outside", "/tmp/x", "ledger.jsonl", "checkpoints/", "checkpoints/../model", "security"]
        {
            receive(&run, publication(artifact, &[("a", "x")]), &["x"]).unwrap_err();
        }
        for name in ["", "..", "../outside", "/tmp/x", "a/b", ".hidden", "a\0"] {
            receive(&run, publication(MODEL, &[(name, "x")]), &["x"]).unwrap_err();
        }
        for name in ["..", "../outside", "model", "step-1", ""] {
            let removed = vec![name.to_owned()];
            receive(&run, Publication { removed, ..publication(MODEL, &[("a", "x")]) }, &["x"]).unwrap_err();
        }
        receive(&run, publication(MODEL, &[]), &[]).unwrap_err();
        receive(&run, publication(PREDICTIONS, &[("a", "x"), ("b", "y")]), &["x", "y"]).unwrap_err();
        assert_eq!((names(&run).len(), names(directory.path())), (0, vec!["outside".to_owned(), "run".to_owned()]));
    }
}
