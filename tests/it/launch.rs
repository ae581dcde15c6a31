//! `quintet launch`: by a real sshd on loopback; what it would run or submit elsewhere.

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use rustix::process::Signal;

use crate::harness::{Ended, Process, quintet, run, send_signal};
use crate::jobs::Workspace;

/// An sshd of our own, with keys of its own, that lets this user in as hosts `n1` and `n2`; `nobody` is a host where none
/// listens.
struct Sshd {
    child: Child,
    /// For `--ssh`.
    ssh: String,
}

impl Sshd {
    /// None, said aloud, where there is no sshd.
    fn start(directory: &Path) -> Option<Self> {
        let Some(sshd) = find(&["/usr/sbin/sshd", "/usr/local/sbin/sshd", "/usr/bin/sshd"]) else {
            eprintln!("SKIPPED: launching by ssh, because there is no sshd (Debian: openssh-server)");
            return None;
        };
        let folder = directory.join("ssh");
        fs::create_dir(&folder).unwrap();
        for name in ["host", "user"] {
            let key = folder.join(name);
            let arguments = ["-q", "-t", "ed25519", "-N", "", "-f"];
            assert!(Command::new("ssh-keygen").args(arguments).arg(&key).status().unwrap().success());
        }
        fs::copy(folder.join("user.pub"), folder.join("authorized")).unwrap();
        // Free ports: of one that is taken, sshd says so and ends, and the test fails.
        let ports = [TcpListener::bind("127.0.0.1:0").unwrap(), TcpListener::bind("127.0.0.1:0").unwrap()];
        let [port, absent] = ports.each_ref().map(|listener| listener.local_addr().unwrap().port());
        drop(ports);
        let place = folder.display();
        let server = format!(
            "Port {port}\nListenAddress 127.0.0.1\nHostKey {place}/host\nAuthorizedKeysFile {place}/authorized\n\
             PidFile none\nUsePAM no\nStrictModes no\nPasswordAuthentication no\nPermitRootLogin prohibit-password\n"
        );
        let client = format!(
            "Host n1 n2 nobody\n HostName 127.0.0.1\n Port {port}\n IdentityFile {place}/user\n IdentitiesOnly yes\n \
             UserKnownHostsFile {place}/known\n StrictHostKeyChecking accept-new\n LogLevel ERROR\n"
        );
        fs::write(folder.join("server"), server).unwrap();
        fs::write(folder.join("client"), format!("Host nobody\n Port {absent}\n{client}")).unwrap();
        // Of root, sshd wants this folder, which the system's own service makes.
        let _ = fs::create_dir_all("/run/sshd");
        let mut child = Command::new(sshd)
            .args(["-D", "-e", "-f"])
            .arg(folder.join("server"))
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = std::io::BufRead::lines(std::io::BufReader::new(child.stderr.take().unwrap()));
        let first = lines.find(|line| line.as_ref().is_ok_and(|line| line.contains("Server listening")));
        assert!(first.is_some(), "sshd does not listen");
        // It goes on talking.
        std::thread::spawn(move || lines.for_each(drop));
        Some(Sshd { child, ssh: format!("ssh -F {}/client", folder.display()) })
    }

    fn launch(&self, workspace: &Workspace, hosts: &str, arguments: &str) -> Process {
        let mut command = quintet(workspace.path());
        command.args(["launch", "ssh", "job.toml", "--hosts", hosts, "--ssh", &self.ssh]);
        command.args(arguments.split_whitespace());
        Process::start(&mut command)
    }
}

impl Drop for Sshd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn find(paths: &[&'static str]) -> Option<&'static str> {
    paths.iter().find(|path| Path::new(path).exists()).copied()
}

/// Process numbers in lines such as `1 of 2 workers joined: process 123 on host`.
fn joined(said: &str) -> Vec<u32> {
    let numbers = said.lines().filter_map(|line| line.split_once("workers joined: process ")?.1.split(' ').next());
    numbers.map(|number| number.parse().unwrap()).collect()
}

/// Waits until processes are gone, which nobody tells of those that sshd started.
fn wait_for_end(processes: &[u32]) {
    let start = std::time::Instant::now();
    for process in processes {
        let running = || {
            let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
            stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
        };
        while running() {
            assert!(start.elapsed().as_secs() < 60, "process {process} still runs");
            std::thread::yield_now();
        }
    }
}

#[test]
fn workers_on_two_hosts_by_ssh() {
    let workspace = Workspace::new();
    let Some(sshd) = Sshd::start(workspace.path()) else { return };
    let local = workspace.trained("local", "--workers 1");
    let ended = sshd.launch(&workspace, "n1:2,n2", "--output hosts").wait().expect(0);
    let hosts = workspace.output("hosts");
    assert!(hosts.weights() == local.weights());
    hosts.check_ledger(22);
    assert_eq!(joined(&ended.stderr).len(), 3, "{}", ended.stderr);
    for line in ["\n[n1] process 0 of 2", "\n[n2] process 1 of 2", "\n[n1] device: cpu"] {
        assert!(ended.stderr.contains(line), "{line:?} is not in\n{}", ended.stderr);
    }
    wait_for_end(&joined(&ended.stderr));
}

#[test]
fn what_is_copied_is_what_was_named() {
    let workspace = Workspace::new();
    let Some(sshd) = Sshd::start(workspace.path()) else { return };
    // There, the data are in the folder of a host; the run's folder is shared. Not on 127.0.0.1, it is encrypted.
    let there = workspace.path().join("there");
    let run = workspace.path().join("run");
    let arguments = format!(
        "--remote-dir {} --output {} --copy train.jsonl --copy validation.jsonl --listen 127.0.0.2:0",
        there.display(),
        run.display()
    );
    sshd.launch(&workspace, "n1:2", &arguments).wait().expect(0);
    assert!(run.join("security").exists(), "a certificate authority");
    let mut copied: Vec<_> = fs::read_dir(there).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    copied.sort();
    assert_eq!(copied, ["train.jsonl", "validation.jsonl"]);
}

#[test]
fn the_first_host_that_fails_is_named() {
    let workspace = Workspace::new();
    let Some(sshd) = Sshd::start(workspace.path()) else { return };
    let ended = sshd.launch(&workspace, "n1,nobody", "").wait().expect(1);
    assert!(ended.error().contains(" on nobody: exit status: 255; it said last: "), "{}", ended.stderr);
    assert!(ended.error().contains("Connection refused"), "{}", ended.stderr);
    wait_for_end(&joined(&ended.stderr));
    let ended = sshd.launch(&workspace, "n1", "--remote-quintet /absent/quintet").wait().expect(2);
    assert!(ended.error().contains(" on n1: exit status: 127; "), "{}", ended.stderr);
}

#[test]
fn remote_workers_end_with_their_launcher() {
    for (signal, code) in [(Signal::TERM, Some(75)), (Signal::KILL, None)] {
        let workspace = Workspace::new();
        let Some(sshd) = Sshd::start(workspace.path()) else { return };
        let mut process = sshd.launch(&workspace, "n1,n2", "--set training.max_steps=100000");
        assert!(process.wait_for_lines(&workspace.path().join("run/ledger.jsonl"), 5));
        process.signal(signal);
        let Ended { code: ended, stderr, .. } = process.wait();
        assert_eq!(ended, code, "{stderr}");
        let workers = joined(&stderr);
        assert_eq!(workers.len(), 2, "{stderr}");
        wait_for_end(&workers);
    }
}

#[test]
fn a_killed_remote_worker_is_replaced_where_it_was() {
    let workspace = Workspace::new();
    let Some(sshd) = Sshd::start(workspace.path()) else { return };
    let settings = ["training.max_steps=160", "training.save_steps=10", "training.eval_steps=40"];
    let local = workspace.trained("local", &format!("--workers 1 {}", settings.join(" ")));
    // Not on 127.0.0.1, tokens admit once.
    let arguments = format!("--output hosts --listen 127.0.0.2:0 --set {}", settings.join(" --set "));
    let mut process = sshd.launch(&workspace, "n1:2,n2", &arguments);
    let worker = joined(&process.wait_for("3 of 3 workers joined: process "))[0];
    assert!(process.wait_for_lines(&workspace.path().join("hosts/ledger.jsonl"), 15));
    send_signal(worker, Signal::KILL);
    process.wait_for(&format!("process {worker} died (signal: 9 (SIGKILL)); another takes its place, 1 of 10"));
    process.wait_for("1 joined (1 given the state)");
    process.wait().expect(0);
    let hosts = workspace.output("hosts");
    assert!(hosts.weights() == local.weights());
    hosts.check_ledger(160);
}

#[test]
fn a_dry_run_shows_what_would_be_done() {
    let workspace = Workspace::new();
    workspace.write("hosts", "n1 slots=4\nme@n2:2\n");
    let show =
        |arguments: &str| run(workspace.path(), ["launch"].into_iter().chain(arguments.split(' '))).expect(0).stdout;
    let program = env!("CARGO_BIN_EXE_quintet");
    assert_eq!(show("local job.toml --workers 2 --dry-run"), format!("{program} train job.toml --workers 2\n"));
    let shown = show("ssh job.toml --hostfile hosts --workers 5 --remote-dir /jobs --remote-quintet quintet --dry-run");
    let lines: Vec<&str> = shown.lines().collect();
    assert_eq!(lines.len(), 2);
    assert!(lines[0].starts_with("ssh -T -o BatchMode=yes ") && lines[0].contains(" -- n1 'cd /jobs && "), "{shown}");
    assert!(lines[1].ends_with("exec env RANK=1 WORLD_SIZE=2 quintet worker --join - --nproc-per-node 1'"), "{shown}");
    let shown = show("slurm job.toml --nodes 2 --gpus-per-node 8 --set training.seed=1 --dry-run -- --time=1:00:00");
    assert!(shown.contains("\n#SBATCH --nodes=2\n") && shown.contains("\n#SBATCH --time=1:00:00\n"), "{shown}");
    assert!(shown.ends_with(&format!("\nexec {program} launch slurm job.toml --set training.seed=1\n")), "{shown}");
    let shown = show("kubernetes job.toml --image quintet --claim data --nodes 3 --gpus-per-node 2 --dry-run");
    assert!(shown.starts_with("---\n") && shown.matches("\nkind: Job\n").count() == 2, "{shown}");
    assert!(shown.contains("\n  name: job-workers\n") && shown.contains("training"), "{shown}");
    assert!(!workspace.path().join("run").exists(), "nothing was done");
}

#[test]
fn a_doctor_measures_every_link_of_a_cluster() {
    let workspace = Workspace::new();
    let Some(sshd) = Sshd::start(workspace.path()) else { return };
    let doctor = |hosts: &str, more: &[&str]| {
        let mut command = quintet(workspace.path());
        command.args(["doctor", "--cluster", "job.toml", "--hosts", hosts, "--ssh", &sshd.ssh]).args(more);
        Process::start(&mut command).wait()
    };
    let found: serde_json::Value = serde_json::from_str(&doctor("n1,n2", &["--json"]).expect(0).stdout).unwrap();
    assert_eq!(found["hosts"], serde_json::json!(["here", "n1", "n2"]));
    assert_eq!(found["links"].as_array().unwrap().len(), 6, "{found}");
    assert!(found["links"].as_array().unwrap().iter().all(|link| link["bytes_per_second"].as_f64().unwrap() > 1e5));
    assert_eq!(found["problems"], serde_json::json!([]));
    // A host that cannot be reached, and data that are not the same.
    let there = workspace.path().join("there");
    fs::create_dir(&there).unwrap();
    for name in ["job.toml", "validation.jsonl"] {
        fs::copy(workspace.path().join(name), there.join(name)).unwrap();
    }
    fs::write(there.join("train.jsonl"), "{\"source\": \"a\", \"target\": \"b\"}\n").unwrap();
    let said = doctor("n1,nobody", &["--remote-dir", there.to_str().unwrap()]).expect(1).stdout;
    assert!(said.contains("FAILED here -> nobody: start: ") && said.contains("Connection refused"), "{said}");
    assert!(said.contains("FAILED here -> n1: data: the data have the fingerprint "), "{said}");
    assert!(said.contains("ok     here -> n1 (127.0.0.1): connects in "), "{said}");
}
