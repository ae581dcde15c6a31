//! `quintet worker`: a rank of a run, or several on one machine.

use std::ffi::OsString;
use std::fs;
use std::io::{BufRead, Read, Write};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use quintet_coordinator::admission::{JOIN_TOKEN_VARIABLE, RUN_TOKEN_VARIABLE};
use quintet_coordinator::config::ClusterConfig;
use quintet_coordinator::launch::environment::Place;
use quintet_coordinator::launch::invitation::Invitation;
use quintet_coordinator::launch::{Death, LocalWorkers, address};
use quintet_coordinator::secret::Secret;
use quintet_data::StoreAbout;
use quintet_worker::access::{Access, Pass};
use quintet_worker::rank::{self, RankJob};
use quintet_worker::remote::Remote;
use quintet_worker::session::{self, Session, SessionError, Store, Welcome};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::args::WorkerArguments;
use crate::commands::{on_threads, tokens};
use crate::device::Decision;
use crate::elsewhere::{Machine, Settled};
use crate::error::{Failure, Result, exit};
use crate::hub;
use crate::job::Job;
use crate::prepare::working_directory;

/// Longer than a coordinator takes to read its data and to train a tokenizer, where it starts with its workers.
const INVITATION_PATIENCE: Duration = Duration::from_secs(600);

/// How often a coordinator is tried that is not there yet.
const JOIN_INTERVAL: Duration = Duration::from_millis(500);

/// How long a coordinator may take to be there, when a worker has failed that another could take the place of.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// The exit code of a Rust program whose main thread panicked.
const PANICKED: u32 = 101;

pub(crate) fn run(arguments: WorkerArguments) -> Result<u8> {
    let variable = |name: &str| std::env::var(name).ok();
    let place = Place::from_variables(variable, arguments.coordinator.clone())?;
    if !arguments.supervised && place.is_told() {
        say(&place.to_string());
    }
    let joining = Joining::find(&arguments, &place, arguments.nproc_per_node.unwrap_or(1))?;
    if let Some(count) = arguments.nproc_per_node {
        return supervise(&arguments, &place, joining, count);
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let share = (cores / place.local_world_size.value.max(1) as usize).max(1);
    let threads = arguments.threads.unwrap_or(share);
    on_threads(Some(threads), || work(&arguments, &place, &joining))
}

/// Where to join and with what.
struct Joining {
    coordinator: String,
    /// By worker of this process: its token, and those of the processes that may take its place. A worker joins with the
    /// first that nobody has used.
    tokens: Vec<Vec<String>>,
    /// The file that they are from, and the line of the first: workers look there for themselves.
    file: Option<(String, usize)>,
    /// How often a worker may be replaced.
    max_restarts: u32,
}

impl Joining {
    fn find(arguments: &WorkerArguments, place: &Place, count: u32) -> Result<Self> {
        let first = arguments.token_index.unwrap_or((place.rank.value * count) as usize);
        let joining = match &arguments.join {
            Some(path) if path == Path::new("-") => Self::from(read_invitation()?, arguments.token_index.unwrap_or(0)),
            Some(path) => Self::from(Invitation::wait_for(path, INVITATION_PATIENCE)?, first),
            None => {
                let coordinator = place.coordinator.as_ref().ok_or_else(|| {
                    Failure::bad_input(
                        "where is the coordinator? Give --coordinator URL, as it printed it, or set QUINTET_COORDINATOR",
                    )
                })?;
                Self::by_variables(coordinator.value.clone(), first, count)?
            }
        };
        let is_secret = |token: &String| Secret::from_hex(token).is_some();
        if !is_encrypted(&joining.coordinator) && !joining.tokens.iter().flatten().all(is_secret) {
            return Err(Failure::bad_input(format!(
                "{RUN_TOKEN_VARIABLE} must hold the token that the coordinator printed"
            )));
        }
        let tokens = if joining.file.is_some() { joining.tokens[0].len() } else { joining.tokens.len() };
        if tokens < count as usize {
            return Err(Failure::bad_input(format!("there are not {count} tokens to join by")));
        }
        Ok(joining)
    }

    fn from(invitation: Invitation, first: usize) -> Self {
        let Invitation { coordinator, mut tokens } = invitation;
        tokens.retain(|lives| !lives.is_empty());
        let first = first % tokens.len().max(1);
        tokens.rotate_left(first);
        let max_restarts = tokens.first().map_or(0, |lives| lives.len() as u32 - 1);
        Joining { coordinator, tokens, file: None, max_restarts }
    }

    /// What the environment gives; how often the run would have workers replaced, is not known yet.
    fn by_variables(coordinator: String, first: usize, count: u32) -> Result<Self> {
        let often = ClusterConfig::default().max_restarts;
        if !is_encrypted(&coordinator) {
            // The run has one for all.
            let token = std::env::var(RUN_TOKEN_VARIABLE).unwrap_or_default();
            let tokens = vec![vec![token]; count as usize];
            return Ok(Joining { coordinator, tokens, file: None, max_restarts: often });
        }
        let file = std::env::var(tokens::FILE_VARIABLE).ok().map(|path| (path, first));
        let max_restarts = if file.is_some() { often } else { 0 };
        Ok(Joining { coordinator, tokens: vec![tokens::given(first)?], file, max_restarts })
    }

    /// For the worker of this index in this process, which was replaced so often: the variable by which it joins.
    fn ticket(&self, index: usize, restarts: usize) -> (&'static str, String) {
        if let Some((path, _)) = &self.file {
            return (tokens::FILE_VARIABLE, path.clone());
        }
        let lives = &self.tokens[index];
        if is_encrypted(&self.coordinator) {
            (JOIN_TOKEN_VARIABLE, lives[restarts].clone())
        } else {
            (RUN_TOKEN_VARIABLE, lives[0].clone())
        }
    }

    fn access(&self, insecure: bool) -> std::result::Result<Access, SessionError> {
        let tokens = &self.tokens[0];
        match Secret::from_hex(&tokens[0]).filter(|_| !is_encrypted(&self.coordinator)) {
            Some(secret) => Ok(Access::Plain { run_token: *secret.as_bytes(), insecure }),
            None => Pass::join(&self.coordinator, tokens).map(Access::Certificate),
        }
    }
}

fn is_encrypted(url: &str) -> bool {
    url.starts_with("https://")
}

/// From the launcher's pipe, whose end is this process's.
fn read_invitation() -> Result<Invitation> {
    let mut line = String::new();
    let mut stdin = std::io::stdin().lock();
    let read = stdin.read_line(&mut line);
    drop(stdin);
    read.map_err(|error| Failure::failed(format!("standard input: {error}")))?;
    std::thread::spawn(|| {
        // Whatever comes is none of ours; what counts is that it ends.
        let _ = std::io::stdin().lock().read_to_end(&mut Vec::new());
        // Nor may there be anybody to read this.
        say("error: the launcher is gone");
        std::process::exit(i32::from(exit::FAILURE));
    });
    Invitation::parse(&line).ok_or_else(|| Failure::bad_input("standard input holds no invitation of a launcher"))
}

fn work(arguments: &WorkerArguments, place: &Place, joining: &Joining) -> Result<u8> {
    check_encryption(arguments, joining)?;
    let url = &joining.coordinator;
    let joined = join(arguments, joining);
    let (access, mut session, welcome) = match joined {
        Ok(joined) => joined,
        // Mostly the run was over before this worker came.
        Err(failure) if arguments.supervised && failure.exit_code != exit::BAD_INPUT => return Ok(exit::FAILURE),
        Err(failure) => return Err(failure),
    };
    let listen = listen_address(arguments, access.address(url).map_err(quintet_worker::Error::from)?)?;
    if !arguments.supervised {
        pass_on_signals(session.interrupter())?;
    }
    let start = session::start_of(&welcome);
    let mut job: Job = serde_json::from_str(&welcome.job_json)
        .map_err(|error| Failure::failed(format!("the coordinator sent a job that is not understood: {error}")))?;
    let fingerprint = job.fingerprint();
    let base_dir = working_directory()?;
    let base_name = job.model.pretrained.as_deref().map(hub::without_commit);
    let reconnect_timeout = Duration::from_secs_f64(job.cluster.reconnect_timeout_seconds);
    let address = access.address(url).map_err(quintet_worker::Error::from)?;
    let remote = Arc::new(Remote::new(address, access.clone(), reconnect_timeout, session.ended()));
    let machine = Machine { remote: &remote, base: &base_dir, probe: &welcome.probe };
    let Settled { notes, fetched, output } = machine.settle(&mut job)?;
    let stores = welcome.stores.iter().map(store_about).collect::<Option<_>>();
    let stores = stores.ok_or_else(|| Failure::failed("the coordinator sent a bad digest of its data"))?;
    let collective_token = welcome.collective_token.as_slice().try_into();
    let collective_token = collective_token.map_err(|_| Failure::failed("the coordinator sent a bad token"))?;
    let wanted = arguments.device.map_or(job.cluster.device, Into::into);
    let device = Decision::new(wanted, arguments.gpu.unwrap_or(place.local_rank.value as usize))?;
    if !arguments.supervised {
        say(&device.line());
    }
    let job = RankJob {
        device: device.choice,
        shares_gpu: std::env::var("NCCL_MULTI_RANK_GPU_ENABLE").is_ok_and(|value| value == "1"),
        fingerprint,
        silence_limit: Duration::from_secs_f64(job.cluster.step_timeout_seconds),
        model: job.model,
        base_name,
        lora: job.lora,
        data: job.data,
        training: job.training,
        evaluation: job.evaluation,
        output,
        base_dir,
        tokenizer_json: welcome.tokenizer_json,
        collective_token,
        access,
        listen,
        start,
        reconnect_timeout,
        remote,
        dataset_fingerprint: welcome.dataset_fingerprint,
        stores,
        through_coordinator: notes,
    };
    // How the run ended, and what went wrong here, is for the coordinator to tell, which has heard of it; unless it is
    // the coordinator that is gone.
    let ended = rank::run(&mut session, job);
    drop(fetched);
    match ended {
        Ok((exit_code, _)) => Ok(exit_code),
        Err(error @ quintet_worker::Error::Session(_)) if !arguments.supervised => Err(error.into()),
        Err(error) => Ok(Failure::from(error).exit_code),
    }
}

fn store_about(store: &Store) -> Option<StoreAbout> {
    Some(StoreAbout { items: store.items, root: store.root.as_slice().try_into().ok()? })
}

/// Joins the run. A coordinator that cannot be reached may be about to start.
fn join(arguments: &WorkerArguments, joining: &Joining) -> Result<(Access, Session, Welcome)> {
    let patience = Duration::from_secs(arguments.wait_seconds.into());
    let start = Instant::now();
    loop {
        let joined = joining.access(arguments.insecure_plaintext).and_then(|access| {
            let (session, welcome) = Session::connect(&joining.coordinator, &access, &host_name())?;
            Ok((access, session, welcome))
        });
        match joined {
            Err(SessionError::Unreachable { .. }) if start.elapsed() < patience => std::thread::sleep(JOIN_INTERVAL),
            // A name that has no address yet, as those of pods.
            Err(SessionError::Url { .. }) if start.elapsed() < patience => std::thread::sleep(JOIN_INTERVAL),
            other => return other.map_err(|error| quintet_worker::Error::from(error).into()),
        }
    }
}

/// Refuses what would be in plain text on a network, unless that is wanted.
fn check_encryption(arguments: &WorkerArguments, joining: &Joining) -> Result<()> {
    match (is_encrypted(&joining.coordinator), arguments.insecure_plaintext, arguments.listen) {
        (true, true, _) => {
            Err(Failure::bad_input("--insecure-plaintext: the coordinator's URL is https, and encrypted"))
        }
        (false, false, Some(listen)) if !quintet_identity::is_private(listen.ip()) => Err(Failure::bad_input(format!(
            "--listen {listen}: gradients would cross the network in plain text; join by https, or accept that with \
             --insecure-plaintext"
        ))),
        _ => Ok(()),
    }
}

/// Where other workers reach this one: as told, or on the interface that leads to the coordinator.
fn listen_address(arguments: &WorkerArguments, coordinator: SocketAddr) -> Result<SocketAddr> {
    if let Some(listen) = arguments.listen {
        return Ok(listen);
    }
    let ip = address::towards(coordinator).map_err(|error| {
        Failure::failed(format!("no address of this machine leads to {coordinator}: {error}; give one with --listen"))
    })?;
    Ok(SocketAddr::new(ip, 0))
}

/// Schedulers send SIGTERM or SIGUSR1 some time before they kill: the coordinator uses it to save and to end the run.
fn pass_on_signals(interrupt: impl Fn() + Send + 'static) -> Result<()> {
    let failed = |error: std::io::Error| Failure::failed(format!("cannot watch for signals: {error}"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
    let (mut terminate, mut user) = {
        let _context = runtime.enter();
        let listen = |kind| signal(kind).map_err(failed);
        (listen(SignalKind::terminate())?, listen(SignalKind::user_defined1())?)
    };
    std::thread::spawn(move || {
        runtime.block_on(async {
            loop {
                tokio::select! { _ = terminate.recv() => {} _ = user.recv() => {} }
                interrupt();
            }
        });
    });
    Ok(())
}

/// Starts `count` workers on this machine, and others in place of those that die, and waits for their end; the exit code
/// is that of the first that failed and was not replaced.
fn supervise(arguments: &WorkerArguments, place: &Place, joining: Joining, count: u32) -> Result<u8> {
    let executable = std::env::current_exe()
        .map_err(|error| Failure::failed(format!("cannot find this program's own file: {error}")))?;
    let failed = |error: std::io::Error| Failure::failed(format!("cannot watch for signals: {error}"));
    // Workers die with the thread that started them, so that it must be this one.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
        let mut user = signal(SignalKind::user_defined1()).map_err(failed)?;
        let (told, _) = watch::channel(());
        let mut running = JoinSet::new();
        let joining = Arc::new(joining);
        for index in 0..count {
            let child = child_arguments(arguments, &joining, index);
            let variables = place.child(index, count);
            let variables = variables.each_ref().map(|(name, value)| (*name, value.as_str()));
            let (tickets, mut started) = (joining.clone(), 0);
            let ticket = Box::new(move || {
                started += 1;
                Ok(tickets.ticket(index as usize, started - 1))
            });
            let worker = LocalWorkers::spawn(&executable, &[child], &variables, ticket)?;
            running.spawn(watch_over(worker, joining.clone(), told.subscribe()));
        }
        let mut code = exit::DONE;
        loop {
            tokio::select! {
                ended = running.join_next() => match ended {
                    Some(ended) if code == exit::DONE => code = ended.unwrap_or(exit::FAILURE),
                    Some(_) => {}
                    None => return Ok(code),
                },
                _ = terminate.recv() => { let _ = told.send(()); }
                _ = user.recv() => { let _ = told.send(()); }
            }
        }
    })
}

/// Passes signals on to a worker until it ends, and replaces it where that makes sense; the last one's exit code.
async fn watch_over(mut worker: LocalWorkers, joining: Arc<Joining>, mut told: watch::Receiver<()>) -> u8 {
    let mut restarts = 0;
    let mut is_told = false;
    loop {
        tokio::select! {
            death = worker.next_death() => {
                let Some(death) = death else { return exit::FAILURE };
                if is_told || restarts == joining.max_restarts || !is_worth_replacing(&death, &joining).await {
                    return death.exit_code.and_then(|code| u8::try_from(code).ok()).unwrap_or(exit::FAILURE);
                }
                restarts += 1;
                let Death { pid, status, .. } = &death;
                say(&format!("process {pid} died ({status}); another takes its place, {restarts} of {}", joining.max_restarts));
                if let Err(error) = worker.replace(*pid) {
                    say(&format!("error: {error}"));
                    return exit::FAILURE;
                }
            }
            Ok(()) = told.changed() => {
                is_told = true;
                worker.terminate();
            }
        }
    }
}

/// A worker that was killed or that failed, other than by what would make the next one fail as well: bad input, the end of
/// the run, or that its coordinator is gone.
async fn is_worth_replacing(death: &Death, joining: &Joining) -> bool {
    match death.exit_code {
        None => true,
        Some(code) if code == u32::from(exit::FAILURE) || code == PANICKED => {
            let address = joining.coordinator.split_once("://").map_or("", |(_, address)| address);
            let connect = tokio::net::TcpStream::connect(address.trim_end_matches('/'));
            matches!(tokio::time::timeout(CONNECT_TIMEOUT, connect).await, Ok(Ok(_)))
        }
        Some(_) => false,
    }
}

fn child_arguments(arguments: &WorkerArguments, joining: &Joining, index: u32) -> Vec<OsString> {
    let mut words = vec!["worker".to_string(), "--coordinator".to_string(), joining.coordinator.clone()];
    if let Some((_, first)) = &joining.file {
        words.extend(["--token-index".to_string(), (first + index as usize).to_string()]);
    }
    if let Some(mut listen) = arguments.listen {
        // Each has a port of its own: the next ones, unless the system chooses.
        let step = if listen.port() == 0 { 0 } else { u16::try_from(index).unwrap_or(0) };
        listen.set_port(listen.port().saturating_add(step));
        words.extend(["--listen".to_string(), listen.to_string()]);
    }
    words.extend(["--wait-seconds".to_string(), arguments.wait_seconds.to_string()]);
    if let Some(device) = arguments.device {
        words.extend(["--device".to_string(), device.name()]);
    }
    if let Some(threads) = arguments.threads {
        words.extend(["--threads".to_string(), threads.to_string()]);
    }
    if arguments.insecure_plaintext {
        words.push("--insecure-plaintext".to_string());
    }
    words.into_iter().map(OsString::from).collect()
}

/// A line of a worker among others that write to the same file: in one piece.
fn say(line: &str) {
    // Without standard error there is nobody to tell.
    let _ = std::io::stderr().write_all(format!("{line}\n").as_bytes());
}

fn host_name() -> String {
    let name = fs::read_to_string("/proc/sys/kernel/hostname");
    name.map_or_else(|_| "unknown".to_string(), |name| name.trim().to_string())
}
