//! `quintet worker`: a rank of a run, or several on one machine.

use std::ffi::OsString;
use std::fs;
use std::io::{BufRead, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use quintet_coordinator::admission::{JOIN_TOKEN_VARIABLE, RUN_TOKEN_VARIABLE};
use quintet_coordinator::launch::environment::Place;
use quintet_coordinator::launch::invitation::Invitation;
use quintet_coordinator::launch::{LocalWorkers, address};
use quintet_coordinator::secret::Secret;
use quintet_worker::access::{Access, Pass};
use quintet_worker::rank::{self, RankJob};
use quintet_worker::session::{self, Session, SessionError};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::args::WorkerArguments;
use crate::commands::{on_threads, tokens};
use crate::device::Decision;
use crate::error::{Failure, Result, exit};
use crate::hub;
use crate::job::Job;
use crate::prepare::working_directory;

/// Longer than a coordinator takes to read its data and to train a tokenizer, where it starts with its workers.
const INVITATION_PATIENCE: Duration = Duration::from_secs(600);

pub(crate) fn run(arguments: WorkerArguments) -> Result<u8> {
    let variable = |name: &str| std::env::var(name).ok();
    let place = Place::from_variables(variable, arguments.coordinator.clone())?;
    if !arguments.supervised && place.is_told() {
        say(&place.to_string());
    }
    let count = arguments.nproc_per_node.unwrap_or(1);
    let joining = Joining::find(&arguments, &place, count)?;
    if count > 1 {
        return supervise(&arguments, &place, &joining, count);
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let share = (cores / place.local_world_size.value.max(1) as usize).max(1);
    let threads = arguments.threads.unwrap_or(share);
    on_threads(Some(threads), || work(&arguments, &place, &joining))
}

/// Where to join and with what.
struct Joining {
    coordinator: String,
    /// One for each worker of this process; or, for one worker of its own, those to try. Join tokens where the URL is
    /// https, else run tokens.
    tokens: Vec<String>,
}

impl Joining {
    fn find(arguments: &WorkerArguments, place: &Place, count: u32) -> Result<Self> {
        let (coordinator, tokens) = match &arguments.join {
            Some(path) if path == Path::new("-") => {
                let invitation = read_invitation()?;
                (invitation.coordinator, invitation.tokens)
            }
            Some(path) => {
                let invitation = Invitation::wait_for(path, INVITATION_PATIENCE)?;
                let mine = invitation.tokens.into_iter().skip((place.rank.value * count) as usize);
                (invitation.coordinator, mine.collect())
            }
            None => {
                let coordinator = place.coordinator.as_ref().ok_or_else(|| {
                    Failure::bad_input(
                        "where is the coordinator? Give --coordinator URL, as it printed it, or set QUINTET_COORDINATOR",
                    )
                })?;
                let coordinator = coordinator.value.clone();
                if is_encrypted(&coordinator) {
                    let tokens = tokens::given(arguments.token_index)?;
                    return Joining { coordinator, tokens }.for_processes(count, || {
                        format!("{count} processes need a join token each, in the file of {}", tokens::FILE_VARIABLE)
                    });
                }
                let tokens = std::env::var(RUN_TOKEN_VARIABLE).unwrap_or_default();
                (coordinator, tokens.split(',').map(str::to_string).cycle().take(count as usize).collect())
            }
        };
        let mut tokens: Vec<String> = tokens;
        if !is_encrypted(&coordinator) {
            tokens.retain(|token| Secret::from_hex(token).is_some());
        }
        tokens.truncate(count as usize);
        Joining { coordinator, tokens }.for_processes(count, || match arguments.join {
            Some(_) => format!("the invitation has no token for process {}", place.rank.value),
            None => format!("{RUN_TOKEN_VARIABLE} must hold the token that the coordinator printed"),
        })
    }

    fn for_processes(self, count: u32, problem: impl FnOnce() -> String) -> Result<Self> {
        if self.tokens.len() < count as usize { Err(Failure::bad_input(problem())) } else { Ok(self) }
    }

    /// By the tokens of one worker.
    fn access(&self, insecure: bool) -> std::result::Result<Access, SessionError> {
        if is_encrypted(&self.coordinator) {
            return Pass::join(&self.coordinator, &self.tokens).map(Access::Certificate);
        }
        let token = Secret::from_hex(&self.tokens[0]).expect("checked when it was found"); // why: `find` keeps no other
        Ok(Access::Plain { run_token: *token.as_bytes(), insecure })
    }
}

fn is_encrypted(coordinator: &str) -> bool {
    coordinator.starts_with("https://")
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
        eprintln!("error: the launcher is gone");
        std::process::exit(i32::from(exit::FAILURE));
    });
    Invitation::parse(&line).ok_or_else(|| Failure::bad_input("standard input holds no invitation of a launcher"))
}

fn work(arguments: &WorkerArguments, place: &Place, joining: &Joining) -> Result<u8> {
    let insecure = arguments.insecure_plaintext;
    let listen = match arguments.listen {
        Some(address) => address,
        None => own_address(&joining.coordinator)?,
    };
    if !is_encrypted(&joining.coordinator) && !quintet_identity::is_private(listen.ip()) && !insecure {
        return Err(Failure::bad_input(format!(
            "--listen {listen}: gradients would cross the network in plain text; join by https, or accept that with \
             --insecure-plaintext"
        )));
    }
    let joined = joining.access(insecure).and_then(|access| {
        let (session, welcome) = Session::connect(&joining.coordinator, &access, &host_name())?;
        Ok((access, session, welcome))
    });
    let (access, mut session, welcome) = match joined {
        Ok(joined) => joined,
        // Mostly the run was over before this worker came.
        Err(error) if arguments.supervised && !error.is_user_error() => return Ok(exit::FAILURE),
        Err(error) => return Err(quintet_worker::Error::from(error).into()),
    };
    if !arguments.supervised {
        pass_on_signals(session.interrupter())?;
    }
    let start = session::start_of(&welcome);
    let mut job: Job = serde_json::from_str(&welcome.job_json)
        .map_err(|error| Failure::failed(format!("the coordinator sent a job that is not understood: {error}")))?;
    let fingerprint = job.fingerprint();
    let base_dir = working_directory()?;
    let base_name = job.model.pretrained.as_deref().map(hub::without_commit);
    if let Some(name) = &job.model.pretrained {
        // Of another machine's hub: at the commit that the coordinator chose.
        let model = hub::model("model.pretrained", name, &base_dir)?;
        job.model.pretrained = Some(model.directory.display().to_string());
    }
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
        output_dir: job.output_dir,
        base_dir,
        tokenizer_json: welcome.tokenizer_json,
        collective_token,
        access,
        listen,
        start,
        reconnect_timeout: Duration::from_secs_f64(job.cluster.reconnect_timeout_seconds),
    };
    // How the run ended, and what went wrong here, is for the coordinator to tell, which has heard of it; unless it is
    // the coordinator that is gone.
    match rank::run(&mut session, job) {
        Ok((exit_code, _)) => Ok(exit_code),
        Err(error @ quintet_worker::Error::Session(_)) if !arguments.supervised => Err(error.into()),
        Err(error) => Ok(Failure::from(error).exit_code),
    }
}

/// Of this machine on the way to the coordinator.
fn own_address(coordinator: &str) -> Result<SocketAddr> {
    let peer = session::resolve(coordinator).map_err(quintet_worker::Error::from)?;
    // A coordinator that cannot be reached is found out when it is to be joined.
    let ip = address::towards(peer).unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
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

/// Starts `count` workers on this machine and waits for their end; the exit code is that of the first that failed.
fn supervise(arguments: &WorkerArguments, place: &Place, joining: &Joining, count: u32) -> Result<u8> {
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
        for (index, token) in (0..count).zip(&joining.tokens) {
            let child = child_arguments(arguments, &joining.coordinator, index);
            let variables = place.child(index, count);
            let variables = variables.each_ref().map(|(name, value)| (*name, value.as_str()));
            let name = if is_encrypted(&joining.coordinator) { JOIN_TOKEN_VARIABLE } else { RUN_TOKEN_VARIABLE };
            let token = token.clone();
            let ticket = Box::new(move || Ok((name, token.clone())));
            let worker = LocalWorkers::spawn(&executable, &[child], &variables, ticket)?;
            running.spawn(watch_over(worker, told.subscribe()));
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

/// Passes signals on to a worker until it ends; its exit code.
async fn watch_over(mut worker: LocalWorkers, mut told: watch::Receiver<()>) -> u8 {
    loop {
        tokio::select! {
            death = worker.next_death() => {
                let code = death.and_then(|death| death.exit_code);
                return code.and_then(|code| u8::try_from(code).ok()).unwrap_or(exit::FAILURE);
            }
            Ok(()) = told.changed() => worker.terminate(),
        }
    }
}

fn child_arguments(arguments: &WorkerArguments, coordinator: &str, index: u32) -> Vec<OsString> {
    let mut words = vec!["worker".to_string(), "--coordinator".to_string(), coordinator.to_string()];
    if let Some(mut listen) = arguments.listen {
        // Each has a port of its own: the next ones, unless the system chooses.
        let step = if listen.port() == 0 { 0 } else { u16::try_from(index).unwrap_or(0) };
        listen.set_port(listen.port().saturating_add(step));
        words.extend(["--listen".to_string(), listen.to_string()]);
    }
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
