//! The worker's end of the stream to the coordinator, for a thread that computes.
//!
//! A thread of its own keeps the stream alive: it sends heartbeats while the computing thread is
//! busy, and it interrupts the computing thread, which may be blocked in a collective with a dead
//! peer, as soon as the coordinator says that the work has become void.

use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use quintet_proto::PROTOCOL_VERSION;
use quintet_proto::v1::{Commit, FromWorker, Heartbeat, Hello, Interrupted, Plan, Stop, ToWorker, to_worker};
use tokio::sync::{mpsc as async_mpsc, oneshot};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::transport::Uri;
use tonic::{Status, Streaming};

use crate::access::{Access, refusal};

pub use quintet_proto::v1::Welcome;
pub use quintet_proto::v1::from_worker::Report;

/// Well below any heartbeat timeout that the configuration allows.
const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(1);
/// For connecting, and again for the coordinator's answer.
pub(crate) const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);
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

/// A stream to the coordinator. Dropping it delivers what was sent, then leaves the run.
pub struct Session {
    reports: Option<async_mpsc::UnboundedSender<FromWorker>>,
    commands: mpsc::Receiver<Result<Command>>,
    interrupt: Arc<Mutex<Interrupt>>,
    goodbye: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
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
        let (reports, outgoing) = async_mpsc::unbounded_channel();
        let hello = Hello {
            protocol_version: PROTOCOL_VERSION,
            run_token: access.run_token(),
            host: host.to_owned(),
            pid: std::process::id(),
        };
        // The receiver is at hand, so that this cannot fail.
        let _ = reports.send(FromWorker { report: Some(Report::Hello(hello)) });
        let (incoming, commands) = mpsc::channel();
        let (admit, admitted) = mpsc::channel();
        let (goodbye, leaving) = oneshot::channel();
        let interrupt = Arc::new(Mutex::new(Interrupt::default()));
        let line = Line { incoming, interrupt: Arc::clone(&interrupt), heartbeats: reports.downgrade() };
        let access = access.clone();
        let thread = thread::Builder::new()
            .name("session".to_owned())
            .spawn(move || line.run(address, &access, outgoing, &admit, leaving))
            .map_err(|error| SessionError::Thread(error.to_string()))?;
        let session =
            Self { reports: Some(reports), commands, interrupt, goodbye: Some(goodbye), thread: Some(thread) };
        let welcome = admitted.recv().map_err(|_| ended())??;
        Ok((session, welcome))
    }

    /// Waits for the next command.
    ///
    /// # Errors
    /// [`SessionError::Disconnected`] or [`SessionError::Protocol`]: the worker must exit.
    pub fn recv(&self) -> Result<Command> {
        self.commands.recv().map_err(|_| ended())?
    }

    /// Sends a report, without waiting.
    ///
    /// # Errors
    /// [`SessionError::Disconnected`]; [`Session::recv`] knows more.
    pub fn send(&self, report: Report) -> Result<()> {
        let message = FromWorker { report: Some(report) };
        self.reports.as_ref().and_then(|reports| reports.send(message).ok()).ok_or_else(ended)
    }

    /// For another thread: tells the coordinator that this worker's host wants it gone, so that the run is saved while
    /// there is time. Does nothing when the session has ended.
    pub fn interrupter(&self) -> impl Fn() + Send + 'static {
        let reports = self.reports.as_ref().map(async_mpsc::UnboundedSender::downgrade);
        move || {
            if let Some(reports) = reports.as_ref().and_then(async_mpsc::WeakUnboundedSender::upgrade) {
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
        let mut interrupt = lock(&self.interrupt);
        if interrupt.newest_generation > generation {
            callback();
        }
        interrupt.callback = Some((generation, callback));
    }

    /// Whether the work of `generation` is void, so that one need not begin with it.
    pub fn is_void(&self, generation: u64) -> bool {
        lock(&self.interrupt).newest_generation > generation
    }
}

impl Drop for Session {
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
}

impl Line {
    fn run(
        self,
        address: SocketAddr,
        access: &Access,
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
            match join(address, access, outgoing).await {
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
                    let _ = reports.send(FromWorker { report: Some(Report::Heartbeat(Heartbeat {})) });
                },
                _ = &mut leaving => break,
            }
        }
        // The coordinator ends its side when it has read all of ours.
        let drained = async { while let Ok(Some(_)) = commands.message().await {} };
        let _ = tokio::time::timeout(GOODBYE_TIMEOUT, drained).await;
    }

    /// Passes a command to the computing thread, and interrupts it if what it does is now void.
    /// Answers whether more can come.
    fn deliver(&self, message: std::result::Result<Option<ToWorker>, Status>) -> bool {
        let command = match message {
            Ok(Some(ToWorker { command: Some(command) })) => match command {
                to_worker::Command::Plan(plan) => Ok(Command::Plan(plan)),
                to_worker::Command::Commit(commit) => Ok(Command::Commit(commit)),
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
    tokio::time::timeout(CONNECT_TIMEOUT, admission)
        .await
        .map_err(|_| unreachable(format!("no answer within {} seconds", CONNECT_TIMEOUT.as_secs())))?
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
    use quintet_proto::v1::{Finished, JoinReply, JoinRequest};
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

        async fn join(&self, _: Request<JoinRequest>) -> std::result::Result<Response<JoinReply>, Status> {
            Err(Status::unimplemented("plain text"))
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
