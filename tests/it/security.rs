//! Runs that leave 127.0.0.1, and strangers who come by meanwhile.

use std::io::Write;
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use quintet_identity::{Authority, Role};

use crate::harness::{Process, quintet};
use crate::jobs::Workspace;

/// Long enough that strangers meet it.
const STEPS: u64 = 60;
const SETTINGS: &str = "training.max_steps=60";
/// As of two machines.
const COORDINATOR: &str = "127.0.0.2:0";
const WORKERS: [&str; 2] = ["127.0.0.3:0", "127.0.0.4:0"];

/// A coordinator that is to be reached by TLS.
struct Coordinator {
    process: Process,
    url: String,
}

impl Coordinator {
    fn start(workspace: &Workspace) -> Self {
        Self::start_at(workspace, COORDINATOR, &[])
    }

    fn start_at(workspace: &Workspace, address: &str, arguments: &[&str]) -> Self {
        let mut command = quintet(workspace.path());
        command.args(["coordinator", "job.toml", "--listen", address, "--output", "run", "--workers", "2"]);
        let mut process = Process::start(command.args(["--set", SETTINGS]).args(arguments));
        let line = process.wait_for("QUINTET_JOIN_TOKEN_FILE=run/security/tokens ");
        let url = line.trim().split(' ').next_back().unwrap().to_string();
        assert!(url.starts_with("https://127.0.0.2:"), "{url}");
        Coordinator { process, url }
    }

    fn address(&self) -> SocketAddr {
        self.url.trim_start_matches("https://").parse().unwrap()
    }

    /// A worker that is given its tokens by this variable.
    fn worker(&self, workspace: &Workspace, listen: &str, variable: &str, value: &str) -> Process {
        let mut command = quintet(workspace.path());
        command.args(["worker", "--coordinator", &self.url, "--threads", "1", "--listen", listen]);
        Process::start(command.env(variable, value))
    }
}

/// Connects to `address` in every way that is none of ours, until `over`; how often.
fn disturb(address: SocketAddr, over: &AtomicBool) -> usize {
    let oversized = [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".as_slice(), &[0xff; 100_000]].concat();
    let words: [&[u8]; 6] = [
        b"",
        b"GET / HTTP/1.1\r\nHost: coordinator\r\n\r\n",
        &[0x47; 5000],
        // Heads of TLS records, of a hello that never comes and of one that is longer than any.
        &[22, 3, 1, 2, 0, 1, 0, 1, 252],
        &[22, 3, 3, 0xff, 0xff, 0],
        &oversized,
    ];
    let (mut count, mut held) = (0, Vec::new());
    while !over.load(Ordering::Relaxed) && count < 5000 {
        let Ok(mut stream) = TcpStream::connect_timeout(&address, Duration::from_secs(1)) else { continue };
        // Whoever is answered by a reset was refused.
        let _ = stream.write_all(words[count % words.len()]);
        if count % 3 == 0 {
            // Says no more, and stays.
            held.push(stream);
            held.truncate(50);
        } else {
            let _ = stream.shutdown(Shutdown::Both);
        }
        count += 1;
    }
    count
}

#[test]
fn a_run_over_tls_ends_with_the_bits_of_a_local_one_whoever_comes_by() {
    let workspace = Workspace::new();
    let local = workspace.trained("local", &format!("--workers 2 {SETTINGS}"));
    let coordinator = Coordinator::start(&workspace);
    let tokens = std::fs::read_to_string(workspace.path().join("run/security/tokens")).unwrap();
    let over = AtomicBool::new(false);
    let address = coordinator.address();
    let run = workspace.output("run");
    let ended = std::thread::scope(|scope| {
        let strangers = scope.spawn(|| disturb(address, &over));
        let workers = [0, 1].map(|index| {
            let mut command = quintet(workspace.path());
            command.args(["worker", "--coordinator", &coordinator.url, "--threads", "1", "--listen", WORKERS[index]]);
            // Both begin with the first token; one finds it used.
            Process::start(command.env("QUINTET_JOIN_TOKEN_FILE", "run/security/tokens"))
        });
        let Coordinator { mut process, .. } = coordinator;
        assert!(process.wait_for_lines(&run.path("ledger.jsonl"), STEPS as usize / 2));
        let ended = process.wait();
        over.store(true, Ordering::Relaxed);
        let met = strangers.join().unwrap();
        assert!(met > 50, "only {met} strangers came by");
        for worker in workers {
            worker.wait().expect(0);
        }
        ended.expect(0)
    });
    assert!(run.weights() == local.weights());
    run.check_ledger(STEPS);
    assert!(run.events("recovery").is_empty());
    // Nothing of a token is in any log.
    let proof = tokens.lines().next().unwrap().rsplit('.').next().unwrap();
    assert!(!ended.stderr.contains(proof) && !ended.stdout.contains(proof));
}

#[test]
fn tokens_admit_once_in_time_and_to_their_run() {
    let workspace = Workspace::new();
    let coordinator = Coordinator::start(&workspace);
    let security = workspace.path().join("run/security");
    let refused = |token: &str, problem: &str| {
        let ended = coordinator.worker(&workspace, WORKERS[0], "QUINTET_JOIN_TOKEN", token).wait().expect(2);
        assert!(ended.error().contains(problem), "{}", ended.error());
    };
    let issue = |directory: &Path, role, since| {
        let authority = Authority::open(directory, directory).unwrap();
        authority.issue_token(role, since, Duration::from_secs(3600)).unwrap().to_text()
    };
    let now = SystemTime::now();
    refused("", "QUINTET_JOIN_TOKEN must hold a join token");
    refused("5a5a", "this is no join token");
    let text = issue(&security, Role::Worker, now);
    refused(&text.replace(".worker.", ".operator."), "unknown join token");
    refused(&issue(&security, Role::Worker, now - Duration::from_secs(7200)), "the join token expired 360");
    refused(&issue(&security, Role::Reader, now), "does not permit what takes a worker");
    let other = tempfile::tempdir().unwrap();
    refused(&issue(other.path(), Role::Worker, now), "is not the coordinator that the join token is for");

    let first = coordinator.worker(&workspace, WORKERS[0], "QUINTET_JOIN_TOKEN", &text);
    let Coordinator { mut process, url } = coordinator;
    process.wait_for("1 of 2 workers joined");
    let coordinator = Coordinator { process, url };
    let again = coordinator.worker(&workspace, WORKERS[1], "QUINTET_JOIN_TOKEN", &text).wait().expect(2);
    assert!(again.error().contains("the join token was used before"), "{}", again.error());
    // More tokens for a run under way.
    let made = crate::harness::run(workspace.path(), ["tokens", "run/security", "--count", "2"]).expect(0);
    assert_eq!(made.stdout.lines().count(), 2);
    let second = made.stdout.lines().nth(1).unwrap();
    let second = coordinator.worker(&workspace, WORKERS[1], "QUINTET_JOIN_TOKEN", second);
    coordinator.process.wait().expect(0);
    first.wait().expect(0);
    second.wait().expect(0);
    workspace.output("run").check_ledger(STEPS);
}

#[test]
fn plain_text_leaves_the_machine_only_where_it_is_asked_for() {
    let workspace = Workspace::new();
    let refused = |arguments: &[&str], problem: &str| {
        let mut command = quintet(workspace.path());
        command.arg("worker").args(arguments).env("QUINTET_RUN_TOKEN", "5a".repeat(32));
        let ended = Process::start(&mut command).wait().expect(2);
        assert!(ended.error().contains(problem) && ended.error().contains("--insecure-plaintext"), "{}", ended.error());
    };
    refused(&["--coordinator", "http://127.0.0.1:1", "--listen", "0.0.0.0:0"], "--listen 0.0.0.0:0");
    refused(&["--coordinator", "http://127.0.0.2:1", "--listen", "127.0.0.1:0"], "127.0.0.2:1");
}

#[test]
fn a_coordinator_that_was_killed_is_known_by_its_authority() {
    let workspace = Workspace::new();
    let whole = workspace.trained("local", &format!("--workers 2 {SETTINGS}"));
    let mut coordinator = Coordinator::start(&workspace);
    let tokens = std::fs::read_to_string(workspace.path().join("run/security/tokens")).unwrap();
    let workers: Vec<Process> = WORKERS
        .iter()
        .zip(tokens.lines())
        .map(|(listen, token)| coordinator.worker(&workspace, listen, "QUINTET_JOIN_TOKEN", token))
        .collect();
    let run = workspace.output("run");
    assert!(coordinator.process.wait_for_lines(&run.path("ledger.jsonl"), STEPS as usize / 3));
    let address = coordinator.address().to_string();
    coordinator.process.kill();
    let coordinator = Coordinator::start_at(&workspace, &address, &["--resume"]);
    coordinator.process.wait().expect(0);
    for worker in workers {
        worker.wait().expect(0);
    }
    assert!(run.weights() == whole.weights());
    run.check_ledger(STEPS);
    let recoveries = run.events("recovery");
    assert_eq!((recoveries.len(), &recoveries[0]["coordinator_restarted"]), (1, &true.into()), "{recoveries:?}");
}
