//! What machines that lack the run's files read here: examples of its data, and the files of artifacts.
//!
//! Everything is read on threads for blocking work, so that the run does not wait for a disk.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use quintet_data::{LEAVES_MAX, Shelf};
use quintet_proto::v1::{self, LeavesReply, ListReply, Part, Piece, Publication, Published};
use quintet_proto::{HASH_BYTES, PIECE_BYTES, is_file_name};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use crate::Error;
use crate::receive;
use crate::secret::Secret;

/// Answers grow no larger than this by more than one leaf.
const REPLY_BYTES: usize = 4 << 20;
/// Pieces that are read ahead of the network.
const PIECES_AHEAD: usize = 4;
/// Requests that are read for at once.
const READERS_MAX: usize = 32;
/// More files than any model has.
const FILES_MAX: usize = 1024;
/// What a model or a checkpoint consists of: weights, configurations, tokenizers.
const EXTENSIONS: [&str; 3] = ["safetensors", "json", "model"];

pub(crate) type Answer<T> = Result<T, Status>;

/// What may be read.
#[derive(Clone, Debug)]
pub struct Share {
    shelf: Shelf,
    /// By name.
    directories: HashMap<&'static str, PathBuf>,
    output_dir: PathBuf,
    probe: String,
    digests: Arc<Mutex<Digests>>,
    readers: Arc<Semaphore>,
}

/// The file by which a worker finds out whether it shares the run's directory.
pub const PROBE: &str = ".probe";

/// The artifact that the job begins with.
pub const MODEL: &str = "model";
/// The adapter that the job begins with.
pub const ADAPTER: &str = "adapter";
/// The classifier that toxicity is measured by.
pub const TOXICITY_MODEL: &str = "toxicity";
pub(crate) const CHECKPOINTS: &str = "checkpoints/";

impl Share {
    /// The run's examples, the directories of [`MODEL`], [`ADAPTER`] and [`TOXICITY_MODEL`] as far as there are any, and
    /// that of the run, in which a [`PROBE`] is written.
    ///
    /// # Errors
    /// [`Error::File`]; no random numbers.
    pub fn new(
        shelf: Shelf,
        directories: impl IntoIterator<Item = (&'static str, PathBuf)>,
        output_dir: PathBuf,
    ) -> crate::Result<Self> {
        receive::remove_leftovers(&output_dir);
        let (path, probe) = (output_dir.join(PROBE), Secret::generate()?.to_hex());
        fs::write(&path, &probe).map_err(Error::file("write", &path))?;
        let readers = Arc::new(Semaphore::new(READERS_MAX));
        let directories = directories.into_iter().collect();
        Ok(Self { shelf, directories, output_dir, probe, digests: Arc::default(), readers })
    }

    pub(crate) fn probe(&self) -> &str {
        &self.probe
    }

    /// Ends the run's sharing.
    pub(crate) fn close(&self) {
        // Nobody is misled by one that stays: it has a coordinator's own random number.
        let _ = fs::remove_file(self.output_dir.join(PROBE));
    }

    /// For workers, to check by what they read.
    pub(crate) fn stores(&self) -> Vec<v1::Store> {
        let stores = self.shelf.stores();
        stores.iter().map(|store| v1::Store { items: store.items, root: store.root.to_vec() }).collect()
    }

    pub(crate) async fn leaves(&self, store: u32, numbers: Vec<u64>) -> Answer<LeavesReply> {
        if numbers.len() > LEAVES_MAX {
            return Err(Status::invalid_argument(format!("{} leaves at once, more than {LEAVES_MAX}", numbers.len())));
        }
        let shelf = self.shelf.clone();
        self.read(move || {
            let (mut leaves, mut bytes) = (Vec::new(), 0);
            for number in numbers {
                let leaf = shelf.leaf(store, number);
                let leaf = leaf.ok_or_else(|| Status::not_found(format!("store {store} has no leaf {number}")))?;
                bytes += leaf.items.iter().map(Vec::len).sum::<usize>() + HASH_BYTES * leaf.proof.len();
                leaves.push(v1::Leaf { items: leaf.items, proof: leaf.proof.concat() });
                if bytes >= REPLY_BYTES {
                    break;
                }
            }
            Ok(LeavesReply { leaves })
        })
        .await
    }

    /// Receives what a worker hands in.
    pub(crate) async fn publish(&self, publication: Publication, parts: Streaming<Part>) -> Answer<Published> {
        let _permit = self.permit().await?;
        receive::receive(&self.output_dir, publication, parts).await.map(|()| Published {})
    }

    pub(crate) async fn list(&self, artifact: &str) -> Answer<ListReply> {
        if artifact == CHECKPOINTS.trim_end_matches('/') {
            return self.checkpoints().await;
        }
        let (directory, digests) = (self.directory(artifact)?, Arc::clone(&self.digests));
        self.read(move || {
            let mut files = Vec::new();
            for name in names(&directory).map_err(|error| unreadable(&directory, &error))? {
                let path = directory.join(&name);
                // One at a time: whoever comes second finds it done.
                let mut digests = digests.lock().unwrap_or_else(PoisonError::into_inner);
                let (bytes, digest) = digests.of(&path).map_err(|error| unreadable(&path, &error))?;
                files.push(v1::File { name, bytes, digest: digest.as_bytes().to_vec() });
            }
            Ok(ListReply { files })
        })
        .await
    }

    /// The names of checkpoints.
    async fn checkpoints(&self) -> Answer<ListReply> {
        let directory = self.output_dir.join(CHECKPOINTS);
        self.read(move || {
            let entries = fs::read_dir(&directory).into_iter().flatten().flatten();
            let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
            let names = names.filter(|name| checkpoint_name(name).is_ok());
            Ok(ListReply { files: names.map(|name| v1::File { name, ..v1::File::default() }).collect() })
        })
        .await
    }

    pub(crate) async fn content(
        &self,
        artifact: &str,
        name: &str,
        offset: u64,
    ) -> Answer<ReceiverStream<Answer<Piece>>> {
        let (path, permit) = (self.directory(artifact)?.join(file_name(name)?), self.permit().await?);
        let (pieces, receiver) = mpsc::channel(PIECES_AHEAD);
        tokio::task::spawn_blocking(move || {
            if let Err(error) = send_file(&path, offset, &pieces) {
                // Whoever is gone needs no reason.
                let _ = pieces.blocking_send(Err(unreadable(&path, &error)));
            }
            drop(permit);
        });
        Ok(ReceiverStream::new(receiver))
    }

    async fn permit(&self) -> Answer<OwnedSemaphorePermit> {
        let permit = Arc::clone(&self.readers).acquire_owned().await;
        permit.map_err(|_| Status::unavailable("the run is over"))
    }

    /// Does blocking work elsewhere.
    async fn read<T: Send + 'static>(&self, work: impl FnOnce() -> Answer<T> + Send + 'static) -> Answer<T> {
        let permit = self.permit().await?;
        let done = tokio::task::spawn_blocking(work).await;
        drop(permit);
        done.map_err(|error| Status::internal(error.to_string()))?
    }

    fn directory(&self, artifact: &str) -> Answer<PathBuf> {
        if let Some(step) = artifact.strip_prefix(CHECKPOINTS) {
            return Ok(self.output_dir.join(CHECKPOINTS).join(checkpoint_name(step)?));
        }
        let known = self.directories.get(artifact).cloned();
        known.ok_or_else(|| Status::not_found(format!("this run has no {artifact:?} to read")))
    }
}

/// The name of a checkpoint's directory, and nothing else.
pub(crate) fn checkpoint_name(name: &str) -> Answer<&str> {
    let is_one = name
        .strip_prefix("step-")
        .is_some_and(|step| (8..=20).contains(&step.len()) && step.bytes().all(|byte| byte.is_ascii_digit()));
    if is_one { Ok(name) } else { Err(Status::invalid_argument(format!("{name:?} is no checkpoint's name"))) }
}

/// The name of a file in a directory, and not the way out of it.
pub(crate) fn file_name(name: &str) -> Answer<&str> {
    match is_file_name(name) {
        true => Ok(name),
        false => Err(Status::invalid_argument(format!("{name:?} is no name of a file here"))),
    }
}

/// The files of a directory that others need, by name.
fn names(directory: &Path) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let is_wanted = path.extension().is_some_and(|extension| EXTENSIONS.iter().any(|wanted| extension == *wanted));
        let name = path.file_name().and_then(|name| file_name(name.to_str()?).ok());
        // In the hub's cache, files are links.
        if let Some(name) = name.filter(|_| is_wanted && path.is_file()) {
            names.push(name.to_owned());
        }
        if names.len() > FILES_MAX {
            return Err(io::Error::other(format!("more than {FILES_MAX} files")));
        }
    }
    names.sort_unstable();
    Ok(names)
}

fn send_file(path: &Path, offset: u64, pieces: &mpsc::Sender<Answer<Piece>>) -> io::Result<()> {
    let mut file = File::open(path)?;
    file.seek(SeekFrom::Start(offset))?;
    loop {
        let mut data = Vec::with_capacity(PIECE_BYTES);
        if file.by_ref().take(PIECE_BYTES as u64).read_to_end(&mut data)? == 0 {
            return Ok(());
        }
        if pieces.blocking_send(Ok(Piece { data })).is_err() {
            return Ok(());
        }
    }
}

fn unreadable(path: &Path, error: &io::Error) -> Status {
    let problem = format!("{}: {error}", path.display());
    if error.kind() == io::ErrorKind::NotFound { Status::not_found(problem) } else { Status::data_loss(problem) }
}

/// Digests of files, taken once unless a file changes.
#[derive(Debug, Default)]
struct Digests(HashMap<PathBuf, (Stamp, blake3::Hash)>);

/// By what a file that changed is known.
type Stamp = (u64, Option<SystemTime>);

impl Digests {
    /// A file's length and digest.
    fn of(&mut self, path: &Path) -> io::Result<(u64, blake3::Hash)> {
        let file = File::open(path)?;
        let metadata = file.metadata()?;
        let stamp = (metadata.len(), metadata.modified().ok());
        if let Some((_, digest)) = self.0.get(path).filter(|(known, _)| *known == stamp) {
            return Ok((stamp.0, *digest));
        }
        let digest = blake3::Hasher::new().update_reader(file)?.finalize();
        self.0.insert(path.to_owned(), (stamp, digest));
        Ok((stamp.0, digest))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn share(directory: &Path) -> Share {
        Share::new(Shelf::default(), [(MODEL, directory.join("model"))], directory.to_owned()).unwrap()
    }

    #[tokio::test]
    async fn only_files_of_artifacts_are_read() {
        let directory = tempfile::tempdir().unwrap();
        let step = directory.path().join("checkpoints/step-00000007");
        for folder in [&directory.path().join("model/inner"), &step] {
            fs::create_dir_all(folder).unwrap();
        }
        for (name, text) in [
            ("secret.json", "s"),
            ("model/config.json", "{}"),
            ("model/model.safetensors", "weights"),
            ("model/pytorch_model.bin", "code"),
            ("model/.hidden.json", "h"),
            ("checkpoints/step-00000007/state.json", "7"),
        ] {
            fs::write(directory.path().join(name), text).unwrap();
        }
        let share = share(directory.path());
        let listed = |files: ListReply| files.files.into_iter().map(|file| (file.name, file.bytes)).collect::<Vec<_>>();
        let model = listed(share.list(MODEL).await.unwrap());
        assert_eq!(model, [("config.json".to_owned(), 2), ("model.safetensors".to_owned(), 7)]);
        assert_eq!(listed(share.list("checkpoints/step-00000007").await.unwrap()).len(), 1);
        let checkpoints = listed(share.list("checkpoints").await.unwrap());
        assert_eq!(checkpoints, [("step-00000007".to_owned(), 0)]);
        for artifact in [
            "",
            ADAPTER,
            "model/",
            "model/inner",
            "..",
            "checkpoints/",
            "checkpoints/..",
            "checkpoints/step-0000000",
            "checkpoints/step-00000007/../..",
            "checkpoints/.tmp-step-00000007",
            "/etc",
        ] {
            assert!(share.list(artifact).await.is_err(), "{artifact}");
            assert!(share.content(artifact, "secret.json", 0).await.is_err(), "{artifact}");
        }
        for name in ["", "..", "../secret.json", "/etc/passwd", ".hidden.json", "a\0b", "inner/x.json"] {
            assert!(share.content(MODEL, name, 0).await.is_err(), "{name:?}");
        }
        let mut pieces = share.content(MODEL, "model.safetensors", 3).await.unwrap();
        let piece = tokio_stream::StreamExt::next(&mut pieces).await.unwrap().unwrap();
        assert_eq!(piece.data, b"ghts");
        assert!(tokio_stream::StreamExt::next(&mut pieces).await.is_none());
    }
}
