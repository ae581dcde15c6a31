//! What tests share: where the reference data is, and how to run the program.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// Longer than any run of a test takes on a busy machine; a process that is still there has hung.
const DEADLINE: Duration = Duration::from_secs(120);

/// The models with stored numbers of Hugging Face's.
pub(crate) fn references() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/references")
}

/// The program, to be started in `directory`.
pub(crate) fn quintet(directory: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_quintet"));
    command.current_dir(directory);
    // No test asks the real hub.
    command.env("HF_HUB_OFFLINE", "1").env("HF_HOME", directory);
    command
}

/// Runs the program to its end.
pub(crate) fn run<I: IntoIterator<Item: AsRef<OsStr>>>(directory: &Path, arguments: I) -> Ended {
    Process::start(quintet(directory).args(arguments)).wait()
}

/// A process under way, killed when dropped.
pub(crate) struct Process {
    child: Child,
    stdout: Option<JoinHandle<String>>,
    /// Ends when the process and all that it started have: they share one standard error.
    stderr: Receiver<String>,
    seen: String,
    deadline: Instant,
}

/// How a process ended.
#[derive(Debug)]
pub(crate) struct Ended {
    /// None where a signal ended it.
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Process {
    pub(crate) fn start(command: &mut Command) -> Self {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let (mut stdout, stderr) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
        let (send, lines) = channel();
        std::thread::spawn(move || BufReader::new(stderr).lines().map_while(Result::ok).try_for_each(|l| send.send(l)));
        let stdout = std::thread::spawn(move || {
            let mut text = String::new();
            stdout.read_to_string(&mut text).unwrap();
            text
        });
        let deadline = Instant::now() + DEADLINE;
        Process { child, stdout: Some(stdout), stderr: lines, seen: String::new(), deadline }
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// The next line on standard error; none when all processes are gone.
    pub(crate) fn next_line(&mut self) -> Option<String> {
        match self.stderr.recv_timeout(self.deadline.saturating_duration_since(Instant::now())) {
            Ok(line) => {
                self.seen += &line;
                self.seen += "\n";
                Some(line)
            }
            Err(RecvTimeoutError::Disconnected) => None,
            Err(RecvTimeoutError::Timeout) => panic!("still running after {DEADLINE:?}; it said:\n{}", self.seen),
        }
    }

    /// Waits for a line on standard error that contains `text`.
    pub(crate) fn wait_for(&mut self, text: &str) -> String {
        while let Some(line) = self.next_line() {
            if line.contains(text) {
                return line;
            }
        }
        panic!("ended without saying {text:?}; it said:\n{}", self.seen)
    }

    /// Waits until a file of JSON lines has so many; whether it came to that before the end.
    pub(crate) fn wait_for_lines(&mut self, file: &Path, count: usize) -> bool {
        loop {
            let text = std::fs::read(file).unwrap_or_default();
            if text.iter().filter(|&&byte| byte == b'\n').count() >= count {
                return true;
            }
            if self.child.try_wait().unwrap().is_some() {
                return false;
            }
            assert!(Instant::now() < self.deadline, "{} does not grow; it said:\n{}", file.display(), self.seen);
            // A file tells nobody that it grew: look again as soon as others had the processor.
            std::thread::yield_now();
        }
    }

    /// Whether it has ended; what it said then is all there, unless its children still run.
    pub(crate) fn has_ended(&mut self) -> bool {
        let ended = self.child.try_wait().unwrap().is_some();
        if ended {
            self.give(DEADLINE);
        }
        ended
    }

    /// Time from now on, instead of what was left of it.
    pub(crate) fn give(&mut self, time: Duration) {
        self.deadline = Instant::now() + time;
    }

    /// The processes that this one started.
    pub(crate) fn children(&self) -> Vec<u32> {
        children(self.id())
    }

    pub(crate) fn signal(&self, signal: Signal) {
        send_signal(self.id(), signal);
    }

    /// Waits until this process and all that it started have ended.
    pub(crate) fn wait(mut self) -> Ended {
        while self.next_line().is_some() {}
        let code = self.child.wait().unwrap().code();
        let stdout = self.stdout.take().unwrap().join().unwrap();
        Ended { code, stdout, stderr: std::mem::take(&mut self.seen) }
    }

    /// kill -9, and the end of all that it started.
    pub(crate) fn kill(mut self) -> Ended {
        self.child.kill().unwrap();
        self.give(DEADLINE);
        self.wait()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It has mostly ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Ended {
    /// Fails the test, with all that was said, unless the exit code is this one.
    #[track_caller]
    pub(crate) fn expect(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "it said:\n{}\n{}", self.stderr, self.stdout);
        self
    }

    /// The only line of error.
    #[track_caller]
    pub(crate) fn error(&self) -> &str {
        let errors: Vec<&str> = self.stderr.lines().filter(|line| line.starts_with("error")).collect();
        assert_eq!(errors.len(), 1, "one line that says what is wrong, but it said:\n{}", self.stderr);
        errors[0]
    }
}

/// Says a line that is seen although the test passes.
pub(crate) fn announce(line: &str) {
    // Without standard error there is nobody to tell.
    let _ = writeln!(std::io::stderr(), "{line}");
}

pub(crate) fn send_signal(process: u32, signal: Signal) {
    let process = Pid::from_raw(i32::try_from(process).unwrap()).unwrap();
    kill_process(process, signal).unwrap();
}

/// The processes whose parent is `parent`, oldest first.
fn children(parent: u32) -> Vec<u32> {
    let processes =
        std::fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let mut found: Vec<u32> = processes.filter(|&process| parent_of(process) == Some(parent)).collect();
    found.sort_unstable();
    found
}

fn parent_of(process: u32) -> Option<u32> {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // The name before it, in parentheses, may hold anything.
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}
