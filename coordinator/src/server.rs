//! The shell of the state machine: a gRPC server with one stream a worker.
//!
//! One task owns the [`Machine`]. For each input it carries out the effects in their order: first
//! what must be on disk, then what workers hear. While the disk is full it waits, and so does the
//! run. Nothing is decided here.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use quintet_identity::Role;
use quintet_proto::v1::coordinator_server::{Coordinator, CoordinatorServer};
use quintet_proto::v1::{
    self, FromWorker, Hello, JoinReply, JoinRequest, LeavesReply, LeavesRequest, ListReply, ListRequest, Part, Piece,
    Published, ReadRequest, ToWorker, from_worker::Report, part::Content, to_worker::Command,
};
use quintet_proto::{FROM_WORKER_BYTES_MAX, PROTOCOL_VERSION, TO_WORKER_BYTES_MAX};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::MissedTickBehavior;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Server;
use tonic::{Request, Response, Status, Streaming};

use crate::admission::{Admission, peer};
use crate::exit_code;
use crate::files::RunFiles;
use crate::gate;
use crate::launch::Death;
use crate::secret::Secret;
use crate::share::Share;
use crate::state::{Abandoned, Effect, Entry, Event, Input, Machine, Record, Settings, WorkerId};
use crate::{Error, Result};

/// How long a stranger may take to say hello.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// Strangers who may be about to say hello at once.
const HELLOS_MAX: usize = 64;
/// How long workers may take to close their streams at the end.
const GOODBYE_TIMEOUT: Duration = Duration::from_secs(5);
/// Pause between attempts to write to a disk that is full.
const STORAGE_PAUSE: Duration = Duration::from_millis(200);
/// Commands that may wait for a worker: its session always reads, so that more mean it is stuck.
const COMMANDS_WAITING_MAX: usize = 64;
/// Reports of all workers that may wait for the machine.
const REPORTS_WAITING_MAX: usize = 1024;

/// Bytes that a connection may have under way to here.
const WINDOW_BYTES: u32 = 256 << 10;
const HEADER_BYTES_MAX: u32 = 8 << 10;
/// A peer whose machine is gone ends its connection, but says nothing.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(15);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(60);

/// A run to serve.
#[derive(Clone, Debug)]
pub struct Run {
    /// For the state machine.
    pub settings: Settings,
    /// The resolved job, for workers.
    pub job_json: String,
    /// The run's tokenizer, for workers; empty for a built-in one.
    pub tokenizer_json: String,
    /// What workers must present.
    pub admission: Admission,
    /// By which ranks know each other in the collective.
    pub collective_token: Secret,
    /// What workers without the run's files read here.
    pub share: Share,
    /// Where another coordinator left the run, to go on there.
    pub taken_over: Option<Record>,
    /// How long the run waits for room on a full disk.
    pub storage_timeout: Duration,
    /// Listen on other than loopback addresses, though everything is sent in plain text.
    pub insecure: bool,
}

/// What the owner of the process may tell a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Control {
    /// Save after the step in flight and stop.
    Preempt,
    /// A worker process of the local launcher ended.
    WorkerDied(Death),
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// One of [`exit_code`]'s.
    pub exit_code: u32,
    /// One line for people.
    pub reason: String,
    /// The state is lost: the run can go on from its last checkpoint, and workers that come will
    /// find it there.
    pub abandoned: Option<Abandoned>,
}

/// Serves a run until it ends.
///
/// `events` is for watching: an event that finds it full is dropped there (the files hold them
/// all). `controls` may be closed at any time. `replacements` are the processes of the local
/// launcher to start another for, and to kill if they still run.
///
/// # Errors
/// [`Error::NotLoopback`]; [`Error::File`], after workers were told to stop; trouble with the
/// listener. A run that ends badly by itself is an [`Outcome`], no error.
pub async fn serve(
    listener: TcpListener,
    run: Run,
    files: RunFiles,
    events: mpsc::Sender<Event>,
    controls: mpsc::Receiver<Control>,
    replacements: mpsc::UnboundedSender<u32>,
) -> Result<Outcome> {
    let address = listener.local_addr().map_err(Error::Listener)?;
    let tls = match &run.admission {
        Admission::Authority(authority) => Some(authority.coordinator_server(address.ip(), SystemTime::now())?),
        Admission::Secret(_) if quintet_identity::is_private(address.ip()) || run.insecure => None,
        Admission::Secret(_) => return Err(Error::NotLoopback(address)),
    };
    let (inbox, messages) = mpsc::channel(REPORTS_WAITING_MAX);
    let share = run.share.clone();
    let service = Service {
        admission: run.admission.clone(),
        share: share.clone(),
        inbox,
        workers: AtomicU64::new(run.taken_over.as_ref().map_or(0, |record| record.last_worker + 1)),
        hellos: Arc::new(Semaphore::new(HELLOS_MAX)),
    };
    let service = CoordinatorServer::new(service)
        .max_decoding_message_size(FROM_WORKER_BYTES_MAX)
        .max_encoding_message_size(TO_WORKER_BYTES_MAX);
    let (end, ended) = oneshot::channel::<()>();
    let server = limited().add_service(service).serve_with_incoming_shutdown(
        gate::incoming(listener, tls, gate::LIMITS),
        async {
            let _ = ended.await;
        },
    );
    let mut server = tokio::spawn(server);
    let shell = Shell {
        machine: match &run.taken_over {
            Some(record) => Machine::take_over(run.settings.clone(), record),
            None => Machine::new(run.settings.clone()),
        },
        run,
        files,
        events,
        replacements,
        commands: HashMap::new(),
        stuck: VecDeque::new(),
        outcome: None,
    };
    let outcome = tokio::select! {
        outcome = shell.run(messages, controls) => outcome,
        ended = &mut server => return match ended {
            Ok(Err(error)) => Err(Error::Server(error)),
            Ok(Ok(())) | Err(_) => Err(Error::ServerEnded),
        },
    };
    share.close();
    // The shell is gone and with it every stream's sender: streams end when they are flushed.
    let _ = end.send(());
    if tokio::time::timeout(GOODBYE_TIMEOUT, &mut server).await.is_err() {
        server.abort();
    }
    outcome
}

/// What a connection may take of this process. Reports are small, so that narrow windows cost nothing.
fn limited() -> Server {
    Server::builder()
        .max_concurrent_streams(4)
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES)
        .http2_max_header_list_size(HEADER_BYTES_MAX)
        .http2_max_pending_accept_reset_streams(Some(8))
        .http2_keepalive_interval(Some(KEEP_ALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEP_ALIVE_TIMEOUT))
}

/// From a stream to the machine's task.
enum Message {
    Joined { worker: WorkerId, hello: Hello, commands: CommandSender },
    Report { worker: WorkerId, report: Report },
    Left { worker: WorkerId, why: String },
}

type CommandSender = mpsc::Sender<std::result::Result<ToWorker, Status>>;

/// Owns the machine and everything that its effects touch.
struct Shell {
    machine: Machine,
    run: Run,
    files: RunFiles,
    events: mpsc::Sender<Event>,
    replacements: mpsc::UnboundedSender<u32>,
    commands: HashMap<WorkerId, CommandSender>,
    /// Workers found not to read their commands, for the machine to hear of.
    stuck: VecDeque<WorkerId>,
    outcome: Option<Outcome>,
}

impl Shell {
    async fn run(
        mut self,
        mut messages: mpsc::Receiver<Message>,
        mut controls: mpsc::Receiver<Control>,
    ) -> Result<Outcome> {
        let tick = Duration::from_millis((self.run.settings.heartbeat_timeout_ms / 10).clamp(10, 1000));
        let mut ticks = tokio::time::interval(tick);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        let start = Instant::now();
        let mut controlled = true;
        loop {
            let input = tokio::select! {
                Some(message) = messages.recv() => self.input(message),
                control = controls.recv(), if controlled => match control {
                    Some(control) => control.into(),
                    None => { controlled = false; continue }
                },
                _ = ticks.tick() => Input::Tick,
            };
            let now_ms = start.elapsed().as_millis() as u64;
            if let Err(error) = self.take(now_ms, input).await {
                self.tell_all_to_stop(&error);
                return Err(error);
            }
            if let Some(outcome) = self.outcome.take() {
                // What is abandoned may still be gone on with, by the same workers.
                if outcome.abandoned.is_none() {
                    self.files.finish()?;
                }
                return Ok(outcome);
            }
        }
    }

    fn input(&mut self, message: Message) -> Input {
        match message {
            Message::Joined { worker, hello, commands } => {
                self.commands.insert(worker, commands);
                Input::Joined { worker, host: hello.host, pid: hello.pid, instance: hello.instance }
            }
            Message::Report { worker, report } => Input::Report { worker, report },
            Message::Left { worker, why } => {
                self.commands.remove(&worker);
                Input::Left { worker, why }
            }
        }
    }

    /// Feeds the machine, and what becomes of its effects again, until it rests.
    async fn take(&mut self, now_ms: u64, input: Input) -> Result<()> {
        let mut next = Some(input);
        while let Some(input) = next {
            for effect in self.machine.step(now_ms, input) {
                self.perform(effect).await?;
            }
            let why = "it does not read its commands".to_owned();
            next = self.stuck.pop_front().map(|worker| Input::Left { worker, why });
        }
        Ok(())
    }

    async fn perform(&mut self, effect: Effect) -> Result<()> {
        match effect {
            Effect::Record(entry) => {
                self.record(&entry).await?;
                entry.events.into_iter().for_each(|event| self.tell(event));
            }
            Effect::Event(event) => self.tell(event),
            Effect::Welcome { worker, under_way } => {
                let welcome = self.welcome(worker, under_way);
                self.send(worker, Command::Welcome(welcome));
            }
            Effect::Send { worker, command } => self.send(worker, command),
            Effect::Dismiss { worker, reason, rejoin } => {
                self.send(worker, Command::Stop(v1::Stop { exit_code: exit_code::FAILURE, reason, rejoin }));
                self.commands.remove(&worker);
            }
            // Nobody listens where no worker is ours to start.
            Effect::Replace { pid } => drop(self.replacements.send(pid)),
            Effect::Abandon { reason, abandoned } => {
                let exit_code = exit_code::TOO_FEW_WORKERS;
                self.outcome = Some(Outcome { exit_code, reason, abandoned: Some(abandoned) });
            }
            Effect::Stop { exit_code, reason } => {
                self.outcome = Some(Outcome { exit_code, reason, abandoned: None });
            }
        }
        Ok(())
    }

    /// Makes an entry durable. While the disk is full, nothing else happens: the step that the
    /// entry commits is held, and workers wait.
    async fn record(&mut self, entry: &Entry) -> Result<()> {
        let began = Instant::now();
        let mut told = false;
        loop {
            match self.files.record(entry) {
                Err(error) if error.is_storage_full() && began.elapsed() < self.run.storage_timeout => {
                    if !std::mem::replace(&mut told, true) {
                        let seconds = self.run.storage_timeout.as_secs_f64();
                        self.tell(Event::StorageFull { problem: error.to_string(), seconds });
                    }
                    tokio::time::sleep(STORAGE_PAUSE).await;
                }
                result => return result,
            }
        }
    }

    fn tell(&self, event: Event) {
        let _ = self.events.try_send(event);
    }

    fn welcome(&self, worker_id: WorkerId, under_way: bool) -> v1::Welcome {
        v1::Welcome {
            worker_id,
            job_json: self.run.job_json.clone(),
            tokenizer_json: self.run.tokenizer_json.clone(),
            collective_token: self.run.collective_token.as_bytes().to_vec(),
            resume_step: self.run.settings.start_step,
            resume_generation: self.run.settings.start_step_generation,
            under_way,
            dataset_fingerprint: self.run.settings.dataset_fingerprint.clone(),
            stores: self.run.share.stores(),
            probe: self.run.share.probe().to_owned(),
        }
    }

    fn send(&mut self, worker: WorkerId, command: Command) {
        let Some(commands) = self.commands.get(&worker) else {
            return;
        };
        match commands.try_send(Ok(ToWorker { command: Some(command) })) {
            Ok(()) => {}
            Err(mpsc::error::TrySendError::Full(_)) => {
                self.commands.remove(&worker);
                self.stuck.push_back(worker);
            }
            // Its stream broke; the task that reads it says so, in order with its last reports.
            Err(mpsc::error::TrySendError::Closed(_)) => {}
        }
    }

    fn tell_all_to_stop(&mut self, error: &Error) {
        let workers: Vec<WorkerId> = self.commands.keys().copied().collect();
        for worker in workers {
            let stop = v1::Stop { exit_code: exit_code::FAILURE, reason: error.to_string(), rejoin: false };
            self.send(worker, Command::Stop(stop));
        }
    }
}

impl From<Control> for Input {
    fn from(control: Control) -> Self {
        match control {
            Control::Preempt => Self::Preempt,
            Control::WorkerDied(Death { pid, exit_code, status }) => {
                Self::ProcessExited { pid, exit_code, why: status }
            }
        }
    }
}

/// Admits streams and reads them.
struct Service {
    admission: Admission,
    share: Share,
    inbox: mpsc::Sender<Message>,
    /// Workers so far: the number of the next.
    workers: AtomicU64,
    hellos: Arc<Semaphore>,
}

#[tonic::async_trait]
impl Coordinator for Service {
    type WorkStream = ReceiverStream<std::result::Result<ToWorker, Status>>;
    type ReadStream = ReceiverStream<std::result::Result<Piece, Status>>;

    async fn join(&self, request: Request<JoinRequest>) -> std::result::Result<Response<JoinReply>, Status> {
        self.admission.join(request, SystemTime::now()).map(Response::new)
    }

    async fn work(
        &self,
        request: Request<Streaming<FromWorker>>,
    ) -> std::result::Result<Response<Self::WorkStream>, Status> {
        self.admission.check_certificate(&request, Role::Worker)?;
        let peer = peer(&request)?;
        let permit = self.hellos.try_acquire();
        let permit = permit.map_err(|_| Status::resource_exhausted("too many workers join at once; try again"))?;
        let mut reports = request.into_inner();
        let hello = tokio::time::timeout(HELLO_TIMEOUT, reports.message())
            .await
            .map_err(|_| Status::deadline_exceeded("no hello in time"))??;
        let hello = self.admit(hello)?;
        peer.admit();
        drop(permit);
        let worker = self.workers.fetch_add(1, Ordering::Relaxed);
        let (commands, receiver) = mpsc::channel(COMMANDS_WAITING_MAX);
        let joined = Message::Joined { worker, hello, commands };
        self.inbox.send(joined).await.map_err(|_| Status::unavailable("the run is over"))?;
        tokio::spawn(read(worker, reports, self.inbox.clone()));
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn leaves(&self, request: Request<LeavesRequest>) -> std::result::Result<Response<LeavesReply>, Status> {
        let LeavesRequest { store, numbers, .. } = self.of_worker(request, |request| &request.run_token)?;
        self.share.leaves(store, numbers).await.map(Response::new)
    }

    async fn list(&self, request: Request<ListRequest>) -> std::result::Result<Response<ListReply>, Status> {
        let ListRequest { artifact, .. } = self.of_worker(request, |request| &request.run_token)?;
        self.share.list(&artifact).await.map(Response::new)
    }

    async fn read(&self, request: Request<ReadRequest>) -> std::result::Result<Response<Self::ReadStream>, Status> {
        let ReadRequest { artifact, name, offset, .. } = self.of_worker(request, |request| &request.run_token)?;
        self.share.content(&artifact, &name, offset).await.map(Response::new)
    }

    async fn publish(&self, request: Request<Streaming<Part>>) -> std::result::Result<Response<Published>, Status> {
        self.admission.check_certificate(&request, Role::Worker)?;
        let peer = peer(&request)?;
        let mut parts = request.into_inner();
        let first = tokio::time::timeout(HELLO_TIMEOUT, parts.message()).await;
        let first = first.map_err(|_| Status::deadline_exceeded("no publication in time"))??;
        let Some(Part { content: Some(Content::Publication(publication)) }) = first else {
            return Err(Status::invalid_argument("the first part must be the publication"));
        };
        self.admission.check_secret(&publication.run_token)?;
        peer.admit();
        self.share.publish(publication, parts).await.map(Response::new)
    }
}

impl Service {
    /// A request that stands for itself, if it is a worker's, whose connection may then stay.
    fn of_worker<T>(&self, request: Request<T>, token: fn(&T) -> &[u8]) -> std::result::Result<T, Status> {
        self.admission.check_certificate(&request, Role::Worker)?;
        self.admission.check_secret(token(request.get_ref()))?;
        peer(&request)?.admit();
        Ok(request.into_inner())
    }

    fn admit(&self, message: Option<FromWorker>) -> std::result::Result<Hello, Status> {
        let Some(FromWorker { report: Some(Report::Hello(hello)) }) = message else {
            return Err(Status::invalid_argument("the first message must be hello"));
        };
        self.admission.check_secret(&hello.run_token)?;
        if hello.protocol_version != PROTOCOL_VERSION {
            return Err(Status::failed_precondition(format!(
                "the worker speaks protocol version {}, the coordinator {PROTOCOL_VERSION}: \
                 run the same quintet on all machines",
                hello.protocol_version
            )));
        }
        Ok(hello)
    }
}

/// Carries a worker's reports to the machine, and last that it left.
async fn read(worker: WorkerId, mut reports: Streaming<FromWorker>, inbox: mpsc::Sender<Message>) {
    let why = loop {
        match reports.message().await {
            Ok(Some(FromWorker { report: Some(report) })) => {
                if inbox.send(Message::Report { worker, report }).await.is_err() {
                    return;
                }
            }
            // A kind of report that a later version may add.
            Ok(Some(FromWorker { report: None })) => {}
            Ok(None) => break "it closed its connection".to_owned(),
            Err(status) => break format!("its connection broke ({})", status.message()),
        }
    };
    let _ = inbox.send(Message::Left { worker, why }).await;
}

#[cfg(test)]
mod tests;
