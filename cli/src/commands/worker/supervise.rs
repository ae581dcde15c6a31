//! Several workers on one machine, and others in place of those that die.

use std::ffi::OsString;
use std::sync::Arc;
use std::time::Duration;

use quintet_coordinator::launch::environment::Place;
use quintet_coordinator::launch::{Death, LocalWorkers};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::joining::Joining;
use super::say;
use crate::args::WorkerArguments;
use crate::error::{Failure, Result, exit};

/// How long a coordinator may take to be there, when a worker has failed that another could take the place of.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// The exit code of a Rust program whose main thread panicked.
const PANICKED: u32 = 101;

/// Starts `count` workers on this machine, and others in place of those that die, and waits for their end; the exit code
/// is that of the first that failed and was not replaced.
pub(super) fn supervise(arguments: &WorkerArguments, place: &Place, joining: Joining, count: u32) -> Result<u8> {
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
