//! What a worker reads from the coordinator's machine because its own lacks it: examples, and the files of artifacts.
//!
//! Calls wait for their answer, on whatever thread they are made. They go over a connection of their own, made when it is
//! needed first. A coordinator that is away may come back, so that they are tried again for as long as a session would be.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use quintet_data::{Leaf, Origin};
use quintet_proto::v1::coordinator_client::CoordinatorClient;
use quintet_proto::v1::part::Content;
use quintet_proto::v1::{self, LeavesReply, LeavesRequest, ListRequest, Part, Publication, ReadRequest};
use quintet_proto::{HASH_BYTES, PIECE_BYTES};
use tokio::runtime::Runtime;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::access::Access;
use crate::session::{Ended, SessionError};
use crate::{Error, Result};

/// Pauses between attempts.
const PAUSES: std::ops::RangeInclusive<Duration> = Duration::from_millis(50)..=Duration::from_secs(1);

/// Pieces that are read ahead of the network.
const PARTS_AHEAD: usize = 4;

/// The coordinator's machine.
pub struct Remote {
    address: SocketAddr,
    access: Access,
    /// How long to try to reach a coordinator that is away.
    patience: Duration,
    /// Tells when the coordinator wants no more of this worker.
    ended: Ended,
    runtime: OnceLock<Runtime>,
    client: Mutex<Option<Client>>,
}

type Client = CoordinatorClient<Channel>;

/// Why an attempt came to nothing.
enum Failure {
    /// It may succeed later.
    Lost(String),
    Refused(String),
}

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        let problem = status.message().to_owned();
        match status.code() {
            // What tonic makes of broken connections, and what the coordinator says at its end.
            Code::Unavailable | Code::Unknown | Code::Cancelled | Code::Internal | Code::Aborted => Self::Lost(problem),
            _ => Self::Refused(problem),
        }
    }
}

impl From<SessionError> for Failure {
    fn from(error: SessionError) -> Self {
        match error {
            SessionError::Unreachable { .. } | SessionError::Disconnected(_) => Self::Lost(error.to_string()),
            _ => Self::Refused(error.to_string()),
        }
    }
}

impl fmt::Debug for Remote {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Remote({})", self.address)
    }
}

impl Remote {
    /// Connects to nobody yet.
    pub fn new(address: SocketAddr, access: Access, patience: Duration, ended: Ended) -> Self {
        Self { address, access, patience, ended, runtime: OnceLock::new(), client: Mutex::new(None) }
    }

    /// The files of an artifact.
    ///
    /// # Errors
    /// [`Error::Remote`]; [`SessionError::Disconnected`] where the coordinator does not come back.
    pub fn list(&self, artifact: &str) -> Result<Vec<v1::File>> {
        let request = ListRequest { run_token: self.access.run_token(), artifact: artifact.to_owned() };
        let listed = self.call(async |mut client| Ok(client.list(request.clone()).await?.into_inner().files));
        listed.map_err(|failure| failure.into_error(&format!("list the files of {artifact}")))
    }

    /// The bytes of a file from `offset` on, as they come. A connection that breaks is made
    /// anew, and goes on where it was.
    ///
    /// # Errors
    /// As of [`Remote::list`], and those of `take`.
    pub fn read(
        &self,
        artifact: &str,
        name: &str,
        offset: u64,
        mut take: impl FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        let mut offset = offset;
        // Got on with, the patience begins anew.
        loop {
            let start = offset;
            let request = ReadRequest {
                run_token: self.access.run_token(),
                artifact: artifact.to_owned(),
                name: name.to_owned(),
                offset,
            };
            let taken = self.call(async |mut client| {
                let mut pieces = client.read(request.clone()).await?.into_inner();
                loop {
                    match pieces.message().await {
                        Ok(Some(piece)) => {
                            if let Err(error) = take(&piece.data) {
                                return Ok(Err(error));
                            }
                            offset += piece.data.len() as u64;
                        }
                        Ok(None) => return Ok(Ok(true)),
                        Err(_) if offset > start => return Ok(Ok(false)),
                        Err(status) => return Err(status.into()),
                    }
                }
            });
            match taken.map_err(|failure| failure.into_error(&format!("read {artifact}/{name}")))?? {
                true => return Ok(()),
                false => self.disconnect(),
            }
        }
    }

    /// Puts an artifact into the run's directory: `files`, whose contents are at `paths`. What breaks off is sent again.
    ///
    /// # Errors
    /// As of [`Remote::list`].
    pub fn publish(&self, artifact: &str, files: Vec<v1::File>, paths: &[PathBuf], removed: Vec<String>) -> Result<()> {
        let (run_token, artifact) = (self.access.run_token(), artifact.to_owned());
        let publication = Publication { run_token, artifact, files, removed };
        let published = self.call(async |mut client| {
            let (parts, sent) = mpsc::channel(PARTS_AHEAD);
            let (publication, paths) = (publication.clone(), paths.to_vec());
            // What ends early is refused over there.
            tokio::task::spawn_blocking(move || send_files(publication, &paths, &parts));
            client.publish(ReceiverStream::new(sent)).await?;
            Ok(())
        });
        published.map_err(|failure| failure.into_error(&format!("write {}", publication.artifact)))
    }

    /// Makes attempts until one succeeds or is refused, or patience is at its end.
    fn call<T>(
        &self,
        mut attempt: impl AsyncFnMut(Client) -> std::result::Result<T, Failure>,
    ) -> std::result::Result<T, Failure> {
        let deadline = Instant::now() + self.patience;
        let mut pause = *PAUSES.start();
        let runtime = self.runtime()?;
        loop {
            let attempted = runtime.block_on(async { attempt(self.client().await?).await });
            match attempted {
                Err(Failure::Lost(problem)) => {
                    self.disconnect();
                    if self.ended.is_true() || Instant::now() + pause > deadline {
                        return Err(Failure::Lost(problem));
                    }
                    thread::sleep(pause);
                    pause = (2 * pause).min(*PAUSES.end());
                }
                done => return done,
            }
        }
    }

    fn runtime(&self) -> std::result::Result<&Runtime, Failure> {
        if let Some(runtime) = self.runtime.get() {
            return Ok(runtime);
        }
        // One thread serves the connection for all that wait.
        let made = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let made = made.map_err(|error| Failure::Refused(format!("cannot start an event loop: {error}")))?;
        Ok(self.runtime.get_or_init(|| made))
    }

    async fn client(&self) -> std::result::Result<Client, Failure> {
        if let Some(client) = self.lock().clone() {
            return Ok(client);
        }
        let client = self.access.open(self.address).await?;
        *self.lock() = Some(client.clone());
        Ok(client)
    }

    /// Forgets a connection: the next one is made with the newest certificate.
    fn disconnect(&self) {
        *self.lock() = None;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Client>> {
        // Nobody panics between lock and unlock.
        self.client.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Sends a publication and its files' contents, until somebody has heard enough.
fn send_files(publication: Publication, paths: &[PathBuf], parts: &mpsc::Sender<Part>) -> std::io::Result<()> {
    let send = |content| parts.blocking_send(Part { content: Some(content) }).map_err(std::io::Error::other);
    send(Content::Publication(publication))?;
    for path in paths {
        let mut file = File::open(path)?;
        loop {
            let mut data = Vec::with_capacity(PIECE_BYTES);
            if file.by_ref().take(PIECE_BYTES as u64).read_to_end(&mut data)? == 0 {
                break;
            }
            send(Content::Data(data))?;
        }
    }
    Ok(())
}

impl Failure {
    fn into_error(self, action: &str) -> Error {
        match self {
            Self::Lost(problem) => SessionError::Disconnected(problem).into(),
            Self::Refused(problem) => Error::Remote { action: action.to_owned(), problem },
        }
    }
}

impl Origin for Remote {
    fn leaves(&self, store: u32, numbers: &[u64]) -> quintet_data::Result<Vec<Leaf>> {
        let mut leaves = Vec::with_capacity(numbers.len());
        while leaves.len() < numbers.len() {
            let numbers = numbers[leaves.len()..].to_vec();
            let request = LeavesRequest { run_token: self.access.run_token(), store, numbers };
            let asked = request.numbers.len();
            let got = self.call(async |mut client| Ok(client.leaves(request.clone()).await?.into_inner()));
            let LeavesReply { leaves: got } = got.map_err(Failure::into_data_error)?;
            if got.is_empty() || got.len() > asked {
                let problem = "answers with another number of examples than it was asked for".to_owned();
                return Err(quintet_data::Error::Origin { problem, is_lost: false });
            }
            leaves.extend(got.into_iter().map(|v1::Leaf { items, proof }| {
                // A proof that does not come out even does not hold.
                let proof = proof.chunks(HASH_BYTES).map(|hash| hash.try_into().unwrap_or_default()).collect();
                Leaf { items, proof }
            }));
        }
        Ok(leaves)
    }
}

impl Failure {
    fn into_data_error(self) -> quintet_data::Error {
        let (problem, is_lost) = match self {
            Self::Lost(problem) => (format!("cannot be reached for examples: {problem}"), true),
            Self::Refused(problem) => (format!("hands over no examples: {problem}"), false),
        };
        quintet_data::Error::Origin { problem, is_lost }
    }
}
