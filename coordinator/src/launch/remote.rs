//! Runs the command lines of launchers (`ssh`, `srun`), each of which stands for workers elsewhere.

use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncWriteExt, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::{mpsc, watch};

use super::command::CommandLine;
use crate::{Error, Result};

/// A command to run, and who it stands for.
#[derive(Clone, Debug)]
pub struct Remote {
    /// Before every line that it says, and in errors: the host.
    pub name: String,
    /// What to run.
    pub command: CommandLine,
    /// For its standard input, which then stays open for as long as the run: its end means the run's.
    pub input: String,
}

/// What running commands have to tell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RemoteEvent {
    /// A line of output.
    Line {
        /// Whose.
        name: String,
        /// Without its end.
        text: String,
    },
    /// A command ended.
    Ended(RemoteEnd),
}

/// How a command ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteEnd {
    /// Whose.
    pub name: String,
    /// Its process number here.
    pub pid: u32,
    /// Its exit code, unless a signal ended it.
    pub exit_code: Option<u32>,
    /// The same for people, with the last line it said.
    pub status: String,
}

/// Commands that run. They end with this value, and with this process.
#[derive(Debug)]
pub struct Remotes {
    /// Dropped to have all killed, after their input was closed.
    alive: watch::Sender<()>,
    events: mpsc::Receiver<RemoteEvent>,
}

/// Lines that may wait to be shown; then the hosts wait.
const EVENTS_WAITING_MAX: usize = 1024;
/// A line that is longer is shown in pieces.
const LINE_BYTES_MAX: u64 = 16 * 1024;
/// How long a command whose input has ended may take, before it is killed.
const END_TIMEOUT: Duration = Duration::from_secs(5);

impl Remotes {
    /// Starts all of them, each as a process group of its own, as workers are.
    ///
    /// # Errors
    /// [`Error::Spawn`]; what was started already is killed.
    pub fn spawn(remotes: Vec<Remote>) -> Result<Self> {
        let (report, events) = mpsc::channel(EVENTS_WAITING_MAX);
        let (alive, _) = watch::channel(());
        for remote in remotes {
            let child = spawn(&remote.command).map_err(|source| {
                let executable = remote.command.program.clone().into();
                Error::Spawn { executable, source }
            })?;
            tokio::spawn(supervise(remote, child, alive.subscribe(), report.clone()));
        }
        Ok(Self { alive, events })
    }

    /// The next thing to tell; `None` when all have ended.
    pub async fn next(&mut self) -> Option<RemoteEvent> {
        self.events.recv().await
    }

    /// Waits until all have ended, and hands on what they still say. After `grace`, ends what still runs.
    pub async fn end(mut self, grace: Duration, mut show: impl FnMut(RemoteEvent)) {
        let all_ended = async {
            while let Some(event) = self.events.recv().await {
                show(event);
            }
        };
        // Who is late is ended.
        let _ = tokio::time::timeout(grace, all_ended).await;
        drop(self.alive);
        while let Some(event) = self.events.recv().await {
            show(event);
        }
    }
}

fn spawn(command: &CommandLine) -> std::io::Result<Child> {
    let mut process = Command::new(&command.program);
    process
        .args(&command.arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    #[cfg(unix)]
    process.process_group(0);
    #[cfg(target_os = "linux")]
    super::local::die_with_parent(&mut process);
    process.spawn()
}

async fn supervise(
    remote: Remote,
    mut child: Child,
    mut alive: watch::Receiver<()>,
    report: mpsc::Sender<RemoteEvent>,
) {
    let Some(pid) = child.id() else { return };
    let mut stdin = child.stdin.take();
    if let Some(stdin) = &mut stdin {
        // One that ends at once says why by itself.
        let _ = stdin.write_all(remote.input.as_bytes()).await;
        let _ = stdin.flush().await;
    }
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let output = tokio::spawn(forward(remote.name.clone(), stdout, report.clone()));
    let errors = tokio::spawn(forward(remote.name.clone(), stderr, report.clone()));
    let status = tokio::select! {
        status = child.wait() => status,
        // Nothing is ever sent: the sender is gone.
        _ = alive.changed() => {
            drop(stdin.take());
            match tokio::time::timeout(END_TIMEOUT, child.wait()).await {
                Ok(status) => status,
                Err(_) => match child.kill().await {
                    Ok(()) => child.wait().await,
                    Err(error) => Err(error),
                },
            }
        }
    };
    let _ = output.await;
    let last_line = errors.await.ok().flatten();
    let (exit_code, mut said) = match status {
        Ok(status) => (exit_code(status), status.to_string()),
        Err(error) => (None, format!("cannot be waited for: {error}")),
    };
    if let Some(line) = last_line {
        said = format!("{said}; it said last: {line}");
    }
    // Nobody listens any more when the run is over.
    let _ = report.send(RemoteEvent::Ended(RemoteEnd { name: remote.name, pid, exit_code, status: said })).await;
}

/// Hands on lines as they come; the last one.
async fn forward(
    name: String,
    stream: Option<impl AsyncRead + Unpin>,
    report: mpsc::Sender<RemoteEvent>,
) -> Option<String> {
    use tokio::io::AsyncReadExt;

    let mut reader = BufReader::new(stream?);
    let mut last = None;
    loop {
        let mut line = Vec::new();
        let read = (&mut reader).take(LINE_BYTES_MAX).read_until(b'\n', &mut line).await;
        if !read.is_ok_and(|bytes| bytes > 0) {
            return last;
        }
        let text = String::from_utf8_lossy(&line).trim_end().to_owned();
        // What a host says must not steer the terminal.
        let text: String = text.chars().filter(|c| !c.is_control() || *c == '\t').collect();
        last = Some(text.clone());
        let _ = report.send(RemoteEvent::Line { name: name.clone(), text }).await;
    }
}

fn exit_code(status: ExitStatus) -> Option<u32> {
    status.code().and_then(|code| u32::try_from(code).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn remote(name: &str, script: &str, input: &str) -> Remote {
        let command = CommandLine::new("sh", ["-c", script]);
        Remote { name: name.to_owned(), command, input: input.to_owned() }
    }

    async fn all(mut remotes: Remotes) -> Vec<RemoteEvent> {
        let mut events = Vec::new();
        while let Some(event) = remotes.next().await {
            events.push(event);
        }
        events
    }

    #[tokio::test]
    async fn lines_come_with_the_hosts_name_and_the_end_with_the_last_of_them() {
        let script = "read word; echo \"got $word\"; printf 'no \\033[1mroute' >&2; exit 255";
        let events = all(Remotes::spawn(vec![remote("n1", script, "token\n")]).unwrap()).await;
        let line = |text: &str| RemoteEvent::Line { name: "n1".to_owned(), text: text.to_owned() };
        assert_eq!(events.len(), 3);
        assert!(events.contains(&line("got token")) && events.contains(&line("no [1mroute")), "{events:?}");
        let RemoteEvent::Ended(end) = &events[2] else { panic!("{events:?}") };
        assert_eq!(end.exit_code, Some(255));
        assert_eq!(end.status, "exit status: 255; it said last: no [1mroute");
    }

    #[tokio::test]
    async fn the_end_of_input_is_the_end_of_the_run() {
        let remotes = Remotes::spawn(vec![remote("n1", "cat >/dev/null; echo bye", "token\n")]).unwrap();
        let mut events = Vec::new();
        remotes.end(Duration::ZERO, |event| events.push(event)).await;
        assert_eq!(events[0], RemoteEvent::Line { name: "n1".to_owned(), text: "bye".to_owned() });
        assert!(matches!(&events[1], RemoteEvent::Ended(end) if end.exit_code == Some(0)));
    }
}
