//! Worker processes on this machine.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use tokio::process::{Child, Command};
use tokio::sync::{mpsc, oneshot, watch};

use crate::{Error, Result};

/// A worker process ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Death {
    /// Its process number.
    pub pid: u32,
    /// Its exit code, unless a signal ended it.
    pub exit_code: Option<u32>,
    /// The same for people: "signal: 9 (SIGKILL)".
    pub status: String,
}

/// Running worker processes. They end with this value, and with this process.
#[derive(Debug)]
pub struct LocalWorkers {
    launch: Launch,
    /// By process: its arguments, and what has it killed when dropped.
    started: HashMap<u32, (Vec<OsString>, oneshot::Sender<()>)>,
    /// Dropped to have all killed.
    alive: watch::Sender<()>,
    /// Changed to have all told to stop.
    terminate: watch::Sender<()>,
    report: mpsc::UnboundedSender<Death>,
    deaths: mpsc::UnboundedReceiver<Death>,
}

/// What lets a worker in, anew for each that is started: an environment variable and its value.
pub type Ticket = Box<dyn FnMut() -> Result<(&'static str, String)> + Send>;

/// What all processes are started with.
struct Launch {
    executable: PathBuf,
    variables: Vec<(String, String)>,
    ticket: Ticket,
}

impl fmt::Debug for Launch {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Launch").field("executable", &self.executable).finish_non_exhaustive()
    }
}

impl LocalWorkers {
    /// Starts a process of `executable` for each list of `arguments`, with the environment variable that `ticket` gives it
    /// to join by. Their standard error is
    /// ours, and so is their environment but for `variables`; their standard output and input are closed. Each is a process group of its own, so
    /// that Ctrl-C in a terminal reaches the coordinator alone, which then ends the run in order.
    ///
    /// Call it, and [`LocalWorkers::replace`], inside a tokio runtime, in a thread that lives as
    /// long as the run (the main one): on Linux, workers die when that thread does.
    ///
    /// # Errors
    /// [`Error::Spawn`]; the ticket's. What was started already is killed.
    pub fn spawn(
        executable: &Path,
        arguments: &[Vec<OsString>],
        variables: &[(&str, &str)],
        ticket: Ticket,
    ) -> Result<Self> {
        let (report, deaths) = mpsc::unbounded_channel();
        let (alive, _) = watch::channel(());
        let (terminate, _) = watch::channel(());
        let variables = variables.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())).collect();
        let launch = Launch { executable: executable.to_owned(), variables, ticket };
        let mut workers = Self { launch, started: HashMap::new(), alive, terminate, report, deaths };
        arguments.iter().try_for_each(|arguments| workers.start(arguments.clone()))?;
        Ok(workers)
    }

    /// Starts another process in place of one, with the same arguments; kills the one if it still
    /// runs.
    ///
    /// # Errors
    /// [`Error::Spawn`]; the ticket's.
    pub fn replace(&mut self, pid: u32) -> Result<()> {
        match self.started.remove(&pid) {
            Some((arguments, _kill)) => self.start(arguments),
            // Not one of ours.
            None => Ok(()),
        }
    }

    fn start(&mut self, arguments: Vec<OsString>) -> Result<()> {
        let child = self.launch.spawn(&arguments)?;
        let Some(pid) = child.id() else { return Ok(()) };
        let (kill, killed) = oneshot::channel();
        let signals = Signals { alive: self.alive.subscribe(), terminate: self.terminate.subscribe(), killed };
        tokio::spawn(supervise(child, pid, signals, self.report.clone()));
        self.started.insert(pid, (arguments, kill));
        Ok(())
    }

    /// The next process to end.
    pub async fn next_death(&mut self) -> Option<Death> {
        self.deaths.recv().await
    }

    /// Sends SIGTERM to all that run, on Linux; a worker passes it on to its coordinator.
    pub fn terminate(&self) {
        // Without workers that run there is nobody to tell.
        let _ = self.terminate.send(());
    }

    /// Waits until all have ended; after `grace`, kills what still runs. A worker that is told to stop may be in the
    /// middle of a checkpoint.
    pub async fn end(self, grace: Duration) {
        let Self { started, alive, report, mut deaths, .. } = self;
        // What is left of it is held by the processes that run.
        drop(report);
        let all_ended = async { while deaths.recv().await.is_some() {} };
        // Who is late is killed.
        let _ = tokio::time::timeout(grace, all_ended).await;
        drop((alive, started));
        while deaths.recv().await.is_some() {}
    }
}

impl Launch {
    fn spawn(&mut self, arguments: &[OsString]) -> Result<Child> {
        let (name, value) = (self.ticket)()?;
        let mut command = Command::new(&self.executable);
        command
            .args(arguments)
            .envs(self.variables.iter().map(|(name, value)| (name, value)))
            .env(name, value)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .kill_on_drop(true);
        #[cfg(unix)]
        command.process_group(0);
        #[cfg(target_os = "linux")]
        die_with_parent(&mut command);
        command.spawn().map_err(|source| Error::Spawn { executable: self.executable.clone(), source })
    }
}

/// A coordinator that is killed closes no stream in order: have the kernel end its workers. (They
/// also end by themselves when their stream breaks; this holds for one stuck in a computation.)
#[cfg(target_os = "linux")]
pub(super) fn die_with_parent(command: &mut Command) {
    use rustix::process::{Signal, getppid, set_parent_process_death_signal};

    let parent = rustix::process::getpid();
    let in_child = move || {
        set_parent_process_death_signal(Some(Signal::KILL))?;
        // The parent may have died before the call above.
        if getppid() == Some(parent) { Ok(()) } else { Err(rustix::io::Errno::SRCH.into()) }
    };
    // SAFETY: between fork and exec, the closure makes two system calls and neither allocates nor
    // takes locks.
    unsafe { command.pre_exec(in_child) };
}

/// What a process may be told.
struct Signals {
    alive: watch::Receiver<()>,
    terminate: watch::Receiver<()>,
    killed: oneshot::Receiver<()>,
}

async fn supervise(mut child: Child, pid: u32, signals: Signals, report: mpsc::UnboundedSender<Death>) {
    let Signals { mut alive, mut terminate, mut killed } = signals;
    let status = loop {
        tokio::select! {
            biased;
            status = child.wait() => break status,
            // Nothing is ever sent: the senders are gone.
            _ = async { tokio::select! { _ = alive.changed() => {}, _ = &mut killed => {} } } => {
                break match child.kill().await {
                    Ok(()) => child.wait().await,
                    Err(error) => Err(error),
                };
            }
            Ok(()) = terminate.changed() => send_terminate(&child),
        }
    };
    let death = match status {
        Ok(status) => Death { pid, exit_code: exit_code(status), status: status.to_string() },
        Err(error) => Death { pid, exit_code: None, status: format!("cannot be waited for: {error}") },
    };
    // Nobody listens any more when the run is over.
    let _ = report.send(death);
}

/// The child has not been waited for, so that its number is still its own.
#[cfg(target_os = "linux")]
fn send_terminate(child: &Child) {
    use rustix::process::{Pid, Signal, kill_process};

    if let Some(pid) = child.id().and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?)) {
        // One that has just ended needs no signal.
        let _ = kill_process(pid, Signal::TERM);
    }
}

#[cfg(not(target_os = "linux"))]
fn send_terminate(_: &Child) {}

fn exit_code(status: ExitStatus) -> Option<u32> {
    status.code().and_then(|code| u32::try_from(code).ok())
}

#[cfg(unix)]
#[cfg(test)]
mod tests {
    use super::*;
    use crate::admission::{Admission, RUN_TOKEN_VARIABLE};
    use crate::secret::Secret;

    fn ticket() -> Result<(&'static str, String)> {
        Admission::Secret(Secret::from_bytes([1; 32])).ticket()
    }

    fn shell(script: &str, count: usize) -> LocalWorkers {
        let arguments = vec![["-c", script].map(OsString::from).to_vec(); count];
        LocalWorkers::spawn(Path::new("/bin/sh"), &arguments, &[("GREETING", "hello")], Box::new(ticket)).unwrap()
    }

    #[tokio::test]
    async fn deaths_are_reported_with_their_cause() {
        let mut workers = shell("exit 3", 2);
        for _ in 0..2 {
            let death = workers.next_death().await.unwrap();
            assert_eq!((death.exit_code, death.status.as_str()), (Some(3), "exit status: 3"));
        }
        let mut workers = shell("kill -9 $$", 1);
        let death = workers.next_death().await.unwrap();
        assert_eq!(death.exit_code, None);
        assert!(death.status.contains("SIGKILL"), "{}", death.status);
    }

    #[tokio::test]
    async fn the_token_travels_in_the_environment() {
        let expected = Secret::from_bytes([1; 32]).to_hex();
        let script = format!("test \"${RUN_TOKEN_VARIABLE}\" = {expected} && test \"$GREETING\" = hello");
        let mut workers = shell(&script, 1);
        assert_eq!(workers.next_death().await.unwrap().exit_code, Some(0));
    }

    #[tokio::test]
    async fn killing_ends_what_runs() {
        let workers = shell("exec tail -f /dev/null", 2);
        // Returns only when every child was reaped.
        workers.end(Duration::ZERO).await;
    }

    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn all_can_be_told_to_stop() {
        let mut workers = shell("trap 'exit 75' TERM; while :; do sleep 0.01; done", 2);
        for _ in 0..2 {
            // The trap may not be set yet, but then the signal ends the shell.
            workers.terminate();
            let death = workers.next_death().await.unwrap();
            assert!(death.exit_code == Some(75) || death.status.contains("SIGTERM"), "{}", death.status);
        }
    }

    #[tokio::test]
    async fn a_process_that_runs_is_killed_for_its_replacement() {
        let mut workers = shell("exec tail -f /dev/null", 1);
        let first = *workers.started.keys().next().unwrap();
        workers.replace(first).unwrap();
        assert_eq!(workers.next_death().await.unwrap().pid, first);
        let second = *workers.started.keys().next().unwrap();
        assert_ne!(first, second);
        workers.replace(first).unwrap();
        assert_eq!(workers.started.len(), 1, "replaced twice");
        workers.end(Duration::ZERO).await;
    }

    #[tokio::test]
    async fn who_ends_by_itself_is_not_killed() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("written");
        let workers = shell(&format!("echo done > {}", file.display()), 1);
        workers.end(Duration::from_secs(60)).await;
        assert_eq!(std::fs::read_to_string(file).unwrap(), "done\n");
    }

    #[tokio::test]
    async fn an_absent_executable_is_named() {
        let error = LocalWorkers::spawn(Path::new("/absent/quintet"), &[vec![]], &[], Box::new(ticket)).unwrap_err();
        assert!(error.to_string().starts_with("cannot start /absent/quintet: "), "{error}");
    }
}
