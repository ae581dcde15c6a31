//! The worker's end of the stream to the coordinator, for a thread that computes.
//!
//! A thread of its own keeps the stream alive: it sends heartbeats while the computing thread is
//! busy, and it interrupts the computing thread, which may be blocked in a collective with a dead
//! peer, as soon as the coordinator says that the work has become void. A stream that breaks can
//! be replaced by another ([`Session::reconnect`]): coordinators come back.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use quintet_proto::PROTOCOL_VERSION;
use quintet_proto::v1::{Commit, FromWorker, Heartbeat, Hello, Interrupted, Plan, State, Stop, ToWorker, to_worker};
use tokio::sync::{mpsc as async_mpsc, oneshot};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::transport::Uri;
use tonic::{Status, Streaming};

use crate::access::{Access, refusal};

pub use quintet_proto::v1::from_worker::Report;
pub use quintet_proto::v1::{Store, Welcome};

/// Well below any heartbeat timeout that the configuration allows.
const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(1);
/// For connecting, and again for the coordinator's answer.
pub(crate) const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);
/// Pauses between attempts to connect again.
const RECONNECT_PAUSES: std::ops::RangeInclusive<Duration> = Duration::from_millis(50)..=Duration::from_secs(1);
/// How long the coordinator may take to read the last reports of a session that ends.
const GOODBYE_TIMEOUT: Duration = Duration::from_secs(5);
/// A coordinator whose machine does not answer for longer is gone.
pub(crate) const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(60);

/// Why there is no session, or no more.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SessionError {
    /// The coordinator's address makes no sense.
    #[error("{url:?} is no coordinator's address: {problem}; expected https://ADDRESS:PORT, or http:// on one machine")]
    Url {
        /// As given.
        url: String,
        /// What is wrong.
        problem: String,
    },
    /// Plain text would leave the machine.
    #[error(
        "connecting to {0} would send the run in plain text over the network: \
         connect to a loopback address, or accept the risk with --insecure-plaintext"
    )]
    NotLoopback(SocketAddr),
    /// Nobody answers.
    #[error("cannot reach the coordinator at {address}: {problem}")]
    Unreachable {
        /// Where it should be.
        address: SocketAddr,
        /// What was seen.
        problem: String,
    },
    /// Somebody else answers.
    #[error("who answers at {address} is not the coordinator that the join token is for: {problem}")]
    Untrusted {
        /// Where the coordinator should be.
        address: SocketAddr,
        /// What TLS found.
        problem: String,
    },
    /// This worker's own key or certificate cannot be used.
    #[error("{0}")]
    Identity(String),
    /// The coordinator does not want this worker.
    #[error("the coordinator refuses this worker: {0}")]
    Refused(String),
    /// The stream broke.
    #[error("the connection to the coordinator broke: {0}")]
    Disconnected(String),
    /// The coordinator said what the contract does not allow.
    #[error("the coordinator broke the protocol: {0}")]
    Protocol(&'static str),
    /// The operating system gives no thread or no event loop.
    #[error("cannot start the session's thread: {0}")]
    Thread(String),
}

impl SessionError {
    /// Whether the way the worker was started is at fault: never worth a retry.
    pub fn is_user_error(&self) -> bool {
        matches!(self, Self::Url { .. } | Self::NotLoopback(_) | Self::Refused(_) | Self::Untrusted { .. })
    }
}

type Result<T> = std::result::Result<T, SessionError>;

/// What the coordinator wants done.
#[derive(Clone, Debug, PartialEq)]
pub enum Command {
    /// Begin a generation.
    Plan(Plan),
    /// The step is recorded: update, act, go on.
    Commit(Commit),
    /// Exit.
    Stop(Stop),
}

/// The state that a welcomed worker is to start with; `None` where it gets that of a run under way later.
pub fn start_of(welcome: &Welcome) -> Option<State> {
    let state = State { step: welcome.resume_step, generation: welcome.resume_generation };
    (!welcome.under_way).then_some(state)
}

/// A stream to the coordinator. Dropping it delivers what was sent, then leaves the run.
pub struct Session {
    dial: Dial,
    vitals: Arc<Vitals>,
    stream: Stream,
    /// The stream's reports, for other threads.
    reports: Arc<Mutex<async_mpsc::WeakUnboundedSender<FromWorker>>>,
}

/// How to reach the coordinator, and who is calling.
struct Dial {
    address: SocketAddr,
    access: Access,
    hello: Hello,
}

/// The session's end of one stream.
struct Stream {
    reports: Option<async_mpsc::UnboundedSender<FromWorker>>,
    commands: mpsc::Receiver<Result<Command>>,
    interrupt: Arc<Mutex<Interrupt>>,
    goodbye: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// What heartbeats tell of the computing thread.
#[derive(Default)]
struct Vitals {
    waiting: AtomicBool,
    progress: AtomicU64,
    /// The coordinator said stop, or this worker leaves.
    ended: AtomicBool,
}

/// Tells other threads when the session is over.
#[derive(Clone, Default)]
pub struct Ended(Arc<Vitals>);

impl Ended {
    pub(crate) fn is_true(&self) -> bool {
        self.0.ended.load(Ordering::Relaxed)
    }
}

/// While it lives, the computing thread waits for others.
pub struct Waiting<'a>(&'a Vitals);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.store(false, Ordering::Relaxed);
    }
}

impl Session {
    /// Joins a run: says hello and waits to be admitted.
    ///
    /// `url` is `https://ADDRESS:PORT` for an access by certificate, else `http://ADDRESS:PORT`; `host` names this
    /// machine to people.
    ///
    /// # Errors
    /// See [`SessionError`].
    pub fn connect(url: &str, access: &Access, host: &str) -> Result<(Self, Welcome)> {
        let address = access.address(url)?;
        let hello = Hello {
            protocol_version: PROTOCOL_VERSION,
            run_token: access.run_token(),
            host: host.to_owned(),
            pid: std::process::id(),
            // The hasher's keys are the system's random numbers.
            instance: RandomState::new().build_hasher().finish(),
        };
        let dial = Dial { address, access: access.clone(), hello };
        let vitals = Arc::new(Vitals::default());
        let (stream, welcome) = Stream::open(&dial, &vitals, CONNECT_TIMEOUT)?;
        let reports = Arc::new(Mutex::new(stream.weak_reports()));
        Ok((Self { dial, vitals, stream, reports }, welcome))
    }

    /// Joins again after the stream has broken, trying for as long as `patience`.
    ///
    /// # Errors
    /// See [`SessionError`]; the last attempt's.
    pub fn reconnect(&mut self, patience: Duration) -> Result<Welcome> {
        let deadline = Instant::now() + patience;
        let mut pause = *RECONNECT_PAUSES.start();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = left.clamp(Duration::from_secs(1), CONNECT_TIMEOUT);
            match Stream::open(&self.dial, &self.vitals, timeout) {
                Ok((stream, welcome)) => {
                    *self.reports.lock().unwrap_or_else(PoisonError::into_inner) = stream.weak_reports();
                    self.stream = stream;
                    return Ok(welcome);
                }
                Err(SessionError::Unreachable { .. } | SessionError::Disconnected(_)) if left > pause => {
                    thread::sleep(pause);
                    pause = (2 * pause).min(*RECONNECT_PAUSES.end());
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Says in heartbeats that the computing thread waits for peers, until the answer is dropped.
    pub fn wait(&self) -> Waiting<'_> {
        self.vitals.waiting.store(true, Ordering::Relaxed);
        Waiting(&self.vitals)
    }

    /// Says in heartbeats that the computing thread has got on.
    pub fn count_progress(&self) {
        self.vitals.progress.fetch_add(1, Ordering::Relaxed);
    }

    /// Says to other threads that nothing of the coordinator is waited for any more.
    pub fn leave(&self) {
        self.vitals.ended.store(true, Ordering::Relaxed);
    }

    /// For other threads that wait for the coordinator.
    pub fn ended(&self) -> Ended {
        Ended(Arc::clone(&self.vitals))
    }

    /// Waits for the next command.
    ///
    /// # Errors
    /// [`SessionError::Disconnected`], after which it may [`Session::reconnect`];
    /// [`SessionError::Protocol`].
    pub fn recv(&self) -> Result<Command> {
        let _waiting = self.wait();
        self.stream.commands.recv().map_err(|_| ended())?
    }

    /// Sends a report, without waiting.
    ///
    /// # Errors
    /// [`SessionError::Disconnected`]; [`Session::recv`] knows more.
    pub fn send(&self, report: Report) -> Result<()> {
        let message = FromWorker { report: Some(report) };
        self.stream.reports.as_ref().and_then(|reports| reports.send(message).ok()).ok_or_else(ended)
    }

    /// For another thread: tells the coordinator that this worker's host wants it gone, so that the run is saved while
    /// there is time. Does nothing when the session has ended.
    pub fn interrupter(&self) -> impl Fn() + Send + 'static {
        let reports = Arc::clone(&self.reports);
        move || {
            if let Some(reports) = reports.lock().unwrap_or_else(PoisonError::into_inner).upgrade() {
                // Whoever has left needs to save nothing.
                let _ = reports.send(FromWorker { report: Some(Report::Interrupted(Interrupted {})) });
            }
        }
    }

    /// Has `callback` called, on another thread, as soon as the work of `generation` is void: when
    /// a newer plan or a stop arrives or the stream breaks; at once, if that has happened already.
    /// Replaces the callback before.
    ///
    /// The callback must release the computing thread and return quickly; the computing thread
    /// then finds the cause by [`Session::recv`], behind commands that came earlier.
    pub fn on_interrupt(&self, generation: u64, callback: Box<dyn Fn() + Send>) {
        let mut interrupt = lock(&self.stream.interrupt);
        if interrupt.newest_generation > generation {
            callback();
        }
        interrupt.callback = Some((generation, callback));
    }

    /// Whether the work of `generation` is void, so that one need not begin with it.
    pub fn is_void(&self, generation: u64) -> bool {
        lock(&self.stream.interrupt).newest_generation > generation
    }
}

impl Stream {
    /// Connects, says hello and waits to be admitted.
    fn open(dial: &Dial, vitals: &Arc<Vitals>, timeout: Duration) -> Result<(Self, Welcome)> {
        let (reports, outgoing) = async_mpsc::unbounded_channel();
        // The receiver is at hand, so that this cannot fail.
        let _ = reports.send(FromWorker { report: Some(Report::Hello(dial.hello.clone())) });
        let (incoming, commands) = mpsc::channel();
        let (admit, admitted) = mpsc::channel();
        let (goodbye, leaving) = oneshot::channel();
        let interrupt = Arc::new(Mutex::new(Interrupt::default()));
        let line = Line {
            incoming,
            interrupt: Arc::clone(&interrupt),
            heartbeats: reports.downgrade(),
            vitals: Arc::clone(vitals),
        };
        let (address, access) = (dial.address, dial.access.clone());
        let thread = thread::Builder::new()
            .name("session".to_owned())
            .spawn(move || line.run(address, &access, timeout, outgoing, &admit, leaving))
            .map_err(|error| SessionError::Thread(error.to_string()))?;
        let stream = Self { reports: Some(reports), commands, interrupt, goodbye: Some(goodbye), thread: Some(thread) };
        let welcome = admitted.recv().map_err(|_| ended())??;
        Ok((stream, welcome))
    }

    fn weak_reports(&self) -> async_mpsc::WeakUnboundedSender<FromWorker> {
        // Only a stream that is dropped has none.
        self.reports
            .as_ref()
            .map_or_else(|| async_mpsc::unbounded_channel().0.downgrade(), |reports| reports.downgrade())
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.goodbye = None;
        self.reports = None;
        if let Some(thread) = self.thread.take() {
            // It holds no state that its panic could spoil.
            let _ = thread.join();
        }
    }
}

#[derive(Default)]
struct Interrupt {
    /// Work of older generations is void; the highest number when all work is.
    newest_generation: u64,
    callback: Option<(u64, Box<dyn Fn() + Send>)>,
}

impl Interrupt {
    fn raise(&mut self, generation: u64) {
        self.newest_generation = self.newest_generation.max(generation);
        if let Some((since, callback)) = &self.callback
            && self.newest_generation > *since
        {
            callback();
        }
    }
}

fn lock(interrupt: &Mutex<Interrupt>) -> MutexGuard<'_, Interrupt> {
    // A callback that panicked has changed nothing here.
    interrupt.lock().unwrap_or_else(PoisonError::into_inner)
}

fn ended() -> SessionError {
    SessionError::Disconnected("the session has ended".to_owned())
}

/// The session's thread.
struct Line {
    incoming: mpsc::Sender<Result<Command>>,
    interrupt: Arc<Mutex<Interrupt>>,
    /// Weak, so that the stream ends when the session lets go of it.
    heartbeats: async_mpsc::WeakUnboundedSender<FromWorker>,
    vitals: Arc<Vitals>,
}

impl Line {
    fn run(
        self,
        address: SocketAddr,
        access: &Access,
        timeout: Duration,
        outgoing: async_mpsc::UnboundedReceiver<FromWorker>,
        admit: &mpsc::Sender<Result<Welcome>>,
        leaving: oneshot::Receiver<()>,
    ) {
        let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime,
            Err(error) => {
                let _ = admit.send(Err(SessionError::Thread(error.to_string())));
                return;
            }
        };
        runtime.block_on(async {
            match join(address, access, timeout, outgoing).await {
                Ok((welcome, commands)) => {
                    let _ = admit.send(Ok(welcome));
                    self.carry(commands, leaving).await;
                }
                Err(error) => {
                    let _ = admit.send(Err(error));
                }
            }
        });
    }

    /// Carries commands in and heartbeats out until either end leaves.
    async fn carry(&self, mut commands: Streaming<ToWorker>, mut leaving: oneshot::Receiver<()>) {
        let mut heartbeat = tokio::time::interval(HEARTBEAT_INTERVAL);
        heartbeat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                message = commands.message() => if !self.deliver(message) { return },
                _ = heartbeat.tick() => if let Some(reports) = self.heartbeats.upgrade() {
                    let _ = reports.send(FromWorker { report: Some(Report::Heartbeat(self.heartbeat())) });
                },
                _ = &mut leaving => break,
            }
        }
        // The coordinator ends its side when it has read all of ours.
        let drained = async { while let Ok(Some(_)) = commands.message().await {} };
        let _ = tokio::time::timeout(GOODBYE_TIMEOUT, drained).await;
    }

    fn heartbeat(&self) -> Heartbeat {
        let Vitals { waiting, progress, .. } = &*self.vitals;
        Heartbeat { waiting: waiting.load(Ordering::Relaxed), progress: progress.load(Ordering::Relaxed) }
    }

    /// Passes a command to the computing thread, and interrupts it if what it does is now void.
    /// Answers whether more can come.
    fn deliver(&self, message: std::result::Result<Option<ToWorker>, Status>) -> bool {
        let command = match message {
            Ok(Some(ToWorker { command: Some(command) })) => match command {
                to_worker::Command::Plan(plan) => Ok(Command::Plan(plan)),
                to_worker::Command::Commit(commit) => Ok(Command::Commit(commit)),
                // The run goes on, and this stream is none of it any more.
                to_worker::Command::Stop(stop) if stop.rejoin => Err(SessionError::Disconnected(stop.reason)),
                to_worker::Command::Stop(stop) => Ok(Command::Stop(stop)),
                to_worker::Command::Welcome(_) => Err(SessionError::Protocol("it said welcome twice")),
            },
            Ok(Some(ToWorker { command: None })) => Err(SessionError::Protocol("it sent a command of an unknown kind")),
            Ok(None) => Err(SessionError::Disconnected("the coordinator closed it".to_owned())),
            Err(status) => Err(SessionError::Disconnected(status.message().to_owned())),
        };
        let void_before = match &command {
            Ok(Command::Plan(plan)) => plan.generation,
            Ok(Command::Commit(_)) => 0,
            Ok(Command::Stop(_)) | Err(_) => u64::MAX,
        };
        if matches!(command, Ok(Command::Stop(_))) {
            self.vitals.ended.store(true, Ordering::Relaxed);
        }
        let more = command.is_ok();
        // First the command, so that the interrupted thread finds it.
        let _ = self.incoming.send(command);
        if void_before > 0 {
            lock(&self.interrupt).raise(void_before);
        }
        more
    }
}

/// Connects and waits to be admitted.
async fn join(
    address: SocketAddr,
    access: &Access,
    timeout: Duration,
    outgoing: async_mpsc::UnboundedReceiver<FromWorker>,
) -> Result<(Welcome, Streaming<ToWorker>)> {
    let unreachable = |problem: String| SessionError::Unreachable { address, problem };
    let admission = async {
        let mut client = access.open(address).await?;
        let response = client.work(UnboundedReceiverStream::new(outgoing)).await;
        let mut commands = response.map_err(|status| refusal(address, &status))?.into_inner();
        let first = commands.message().await.map_err(|status| refusal(address, &status))?;
        match first.and_then(|message| message.command) {
            Some(to_worker::Command::Welcome(welcome)) => Ok((welcome, commands)),
            Some(to_worker::Command::Stop(stop)) => Err(SessionError::Refused(stop.reason)),
            Some(_) => Err(SessionError::Protocol("its first command was not welcome")),
            None => Err(SessionError::Disconnected("the coordinator closed it".to_owned())),
        }
    };
    tokio::time::timeout(timeout, admission)
        .await
        .map_err(|_| unreachable(format!("no answer within {:.0} seconds", timeout.as_secs_f64())))?
}

/// The address that a URL of this scheme names.
pub(crate) fn resolve(url: &str, scheme: &str) -> Result<SocketAddr> {
    let wrong = |problem: &str| SessionError::Url { url: url.to_owned(), problem: problem.to_owned() };
    let uri: Uri = url.parse().map_err(|_| wrong("it is not a URL"))?;
    if uri.scheme_str() != Some(scheme) {
        return Err(wrong(&format!("it does not begin with {scheme}://")));
    }
    let host = uri.host().ok_or_else(|| wrong("it has no host"))?;
    let port = uri.port_u16().ok_or_else(|| wrong("it has no port"))?;
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let mut addresses = (host, port).to_socket_addrs().map_err(|error| wrong(&error.to_string()))?;
    addresses.next().ok_or_else(|| wrong("its host has no address"))
}

#[cfg(test)]
mod tests {
    use std::pin::Pin;

    use quintet_proto::TOKEN_BYTES;
    use quintet_proto::v1::coordinator_server::{Coordinator, CoordinatorServer};
    use quintet_proto::v1::{Finished, JoinReply, JoinRequest, LeavesReply, LeavesRequest, ListReply, ListRequest};
    use quintet_proto::v1::{Part, Piece, Published, ReadRequest};
    use tokio_stream::{Stream, StreamExt};
    use tonic::{Request, Response};

    use super::*;

    type Commands = UnboundedReceiverStream<std::result::Result<ToWorker, Status>>;
    type CommandSender = async_mpsc::UnboundedSender<std::result::Result<ToWorker, Status>>;

    /// A coordinator that hands both directions of the one stream to the test.
    struct Scripted {
        streams: mpsc::Sender<(CommandSender, mpsc::Receiver<Report>)>,
    }

    #[tonic::async_trait]
    impl Coordinator for Scripted {
        type WorkStream = Pin<Box<dyn Stream<Item = std::result::Result<ToWorker, Status>> + Send>>;
        type ReadStream = tokio_stream::Empty<std::result::Result<Piece, Status>>;

        async fn join(&self, _: Request<JoinRequest>) -> std::result::Result<Response<JoinReply>, Status> {
            Err(Status::unimplemented("plain text"))
        }

        async fn leaves(&self, _: Request<LeavesRequest>) -> std::result::Result<Response<LeavesReply>, Status> {
            Err(Status::unimplemented("no data"))
        }

        async fn list(&self, _: Request<ListRequest>) -> std::result::Result<Response<ListReply>, Status> {
            Err(Status::unimplemented("no files"))
        }

        async fn publish(&self, _: Request<Streaming<Part>>) -> std::result::Result<Response<Published>, Status> {
            Err(Status::unimplemented("no files"))
        }

        async fn read(&self, _: Request<ReadRequest>) -> std::result::Result<Response<Self::ReadStream>, Status> {
            Err(Status::unimplemented("no files"))
        }

        async fn work(
            &self,
            request: Request<Streaming<FromWorker>>,
        ) -> std::result::Result<Response<Self::WorkStream>, Status> {
            let mut reports = request.into_inner();
            let Some(Report::Hello(hello)) = reports.message().await?.and_then(|m| m.report) else {
                return Err(Status::invalid_argument("no hello"));
            };
            if hello.run_token != [1; TOKEN_BYTES] {
                return Err(Status::unauthenticated("wrong run token"));
            }
            let (commands, receiver) = async_mpsc::unbounded_channel();
            let (sender, received) = mpsc::channel();
            self.streams.send((commands.clone(), received)).unwrap();
            commands.send(Ok(command(to_worker::Command::Welcome(Welcome::default())))).unwrap();
            tokio::spawn(async move {
                // Keeps the answer open as long as the worker speaks.
                let _commands = commands;
                while let Some(Ok(FromWorker { report: Some(report) })) = reports.next().await {
                    if !matches!(report, Report::Heartbeat(_)) {
                        let _ = sender.send(report);
                    }
                }
            });
            Ok(Response::new(Box::pin(Commands::new(receiver))))
        }
    }

    fn command(command: to_worker::Command) -> ToWorker {
        ToWorker { command: Some(command) }
    }

    fn plan(generation: u64) -> std::result::Result<ToWorker, Status> {
        Ok(command(to_worker::Command::Plan(Plan { generation, ..Plan::default() })))
    }

    struct Server {
        url: String,
        streams: mpsc::Receiver<(CommandSender, mpsc::Receiver<Report>)>,
        _runtime: tokio::runtime::Runtime,
    }

    fn serve() -> Server {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (streams, receiver) = mpsc::channel();
        let service = CoordinatorServer::new(Scripted { streams });
        let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
        runtime.spawn(tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming));
        Server { url, streams: receiver, _runtime: runtime }
    }

    #[test]
    fn commands_come_in_order_and_the_last_report_is_delivered() {
        let server = serve();
        let (session, welcome) = Session::connect(&server.url, &plain([1; 32]), "here").unwrap();
        assert_eq!(welcome, Welcome::default());
        let (commands, reports) = server.streams.recv().unwrap();
        commands.send(plan(1)).unwrap();
        commands.send(Ok(command(to_worker::Command::Commit(Commit::default())))).unwrap();
        commands.send(Ok(command(to_worker::Command::Stop(Stop::default())))).unwrap();
        drop(commands);
        assert!(matches!(session.recv(), Ok(Command::Plan(plan)) if plan.generation == 1));
        assert_eq!(session.recv(), Ok(Command::Commit(Commit::default())));
        assert_eq!(session.recv(), Ok(Command::Stop(Stop::default())));
        for generation in 0..1000 {
            session.send(Report::Finished(Finished { generation, weights_digest: vec![] })).unwrap();
        }
        drop(session);
        let generations: Vec<u64> = reports
            .iter()
            .map(|report| match report {
                Report::Finished(finished) => finished.generation,
                other => panic!("{other:?}"),
            })
            .collect();
        assert!(generations.into_iter().eq(0..1000));
    }

    #[test]
    fn a_newer_plan_and_a_broken_stream_interrupt() {
        let server = serve();
        let (session, _) = Session::connect(&server.url, &plain([1; 32]), "here").unwrap();
        let (commands, reports) = server.streams.recv().unwrap();
        let (called, calls) = mpsc::channel();
        let callback = |name: &'static str| {
            let called = called.clone();
            Box::new(move || called.send(name).unwrap())
        };
        commands.send(plan(1)).unwrap();
        assert!(matches!(session.recv(), Ok(Command::Plan(_))));
        assert!(!session.is_void(1));
        session.on_interrupt(1, callback("first"));
        commands.send(plan(2)).unwrap();
        assert_eq!(calls.recv().unwrap(), "first");
        // Who begins with what is void already is interrupted at once.
        session.on_interrupt(1, callback("late"));
        assert_eq!(calls.try_recv().unwrap(), "late");
        session.on_interrupt(2, callback("second"));
        assert!(calls.try_recv().is_err());
        commands.send(Err(Status::internal("lost"))).unwrap();
        assert_eq!(calls.recv().unwrap(), "second");
        assert!(session.is_void(u64::MAX - 1));
        assert!(matches!(session.recv(), Ok(Command::Plan(plan)) if plan.generation == 2));
        assert_eq!(session.recv(), Err(SessionError::Disconnected("lost".to_owned())));
        drop((session, commands, reports));
    }

    fn plain(run_token: [u8; TOKEN_BYTES]) -> Access {
        Access::Plain { run_token, insecure: false }
    }

    fn refused(url: &str, token: [u8; 32]) -> SessionError {
        Session::connect(url, &plain(token), "here").map(|_| ()).unwrap_err()
    }

    #[test]
    fn what_cannot_be_joined_says_why() {
        let server = serve();
        let error = refused(&server.url, [2; 32]);
        assert_eq!(error, SessionError::Refused("wrong run token".to_owned()));
        assert!(error.is_user_error());
        assert!(matches!(refused("coordinator", [1; 32]), SessionError::Url { .. }));
        assert!(matches!(refused("https://127.0.0.1:1", [1; 32]), SessionError::Url { .. }));
        assert!(matches!(refused("http://127.0.0.1", [1; 32]), SessionError::Url { .. }));
        assert!(matches!(refused("http://192.0.2.1:4700", [1; 32]), SessionError::NotLoopback(_)));
        // A port that was free a moment ago and that nobody listens on.
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let error = refused(&format!("http://{free}"), [1; 32]);
        assert!(matches!(error, SessionError::Unreachable { .. }) && !error.is_user_error());
        assert!(error.to_string().contains("refused"), "{error}");
    }
}
