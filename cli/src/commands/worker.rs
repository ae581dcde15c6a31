//! `quintet worker`: a rank of a run, or several on one machine.

mod joining;
mod supervise;

use std::fs;
use std::io::Write;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use quintet_coordinator::launch::address;
use quintet_coordinator::launch::environment::Place;
use quintet_data::StoreAbout;
use quintet_worker::access::Access;
use quintet_worker::rank::{self, RankJob};
use quintet_worker::remote::Remote;
use quintet_worker::session::{self, Session, SessionError, Store, Welcome};
use tokio::signal::unix::{SignalKind, signal};

use self::joining::{Joining, is_encrypted};
use crate::args::WorkerArguments;
use crate::commands::on_threads;
use crate::device::Decision;
use crate::elsewhere::{Machine, Settled};
use crate::error::{Failure, Result, exit};
use crate::hub;
use crate::job::Job;
use crate::prepare::working_directory;

/// How often a coordinator is tried that is not there yet.
const JOIN_INTERVAL: Duration = Duration::from_millis(500);

pub(crate) fn run(arguments: WorkerArguments) -> Result<u8> {
    let variable = |name: &str| std::env::var(name).ok();
    let place = Place::from_variables(variable, arguments.coordinator.clone())?;
    if !arguments.supervised && place.is_told() {
        say(&place.to_string());
    }
    let joining = Joining::find(&arguments, &place, arguments.nproc_per_node.unwrap_or(1))?;
    if let Some(count) = arguments.nproc_per_node {
        return supervise::supervise(&arguments, &place, joining, count);
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let share = (cores / place.local_world_size.value.max(1) as usize).max(1);
    let threads = arguments.threads.unwrap_or(share);
    on_threads(Some(threads), || work(&arguments, &place, &joining))
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

/// A line of a worker among others that write to the same file: in one piece.
fn say(line: &str) {
    // Without standard error there is nobody to tell.
    let _ = std::io::stderr().write_all(format!("{line}\n").as_bytes());
}

fn host_name() -> String {
    let name = fs::read_to_string("/proc/sys/kernel/hostname");
    name.map_or_else(|_| "unknown".to_string(), |name| name.trim().to_string())
}
