//! Processes are killed; the run ends with the numbers of a run that nothing happened to.

use std::path::Path;
use std::sync::LazyLock;

use quintet_worker::checkpoint;
use rustix::process::Signal;
use serde_json::Value;

use crate::harness::{Ended, Process, quintet, send_signal};
use crate::jobs::{RunOutput, Workspace, words};

/// Long enough that a signal sent in its first half finds it running.
const STEPS: u64 = 160;
const LONG: &str = "training.max_steps=160 training.save_steps=10 training.eval_steps=40";

/// What the run leaves when nothing happens to it.
struct Undisturbed {
    weights: Vec<u8>,
    loss: Vec<f64>,
    evaluations: Vec<Value>,
}

static UNDISTURBED: LazyLock<Undisturbed> = LazyLock::new(|| {
    let workspace = Workspace::new();
    let run = workspace.trained("run", &format!("--workers 2 {LONG}"));
    Undisturbed { weights: run.weights(), loss: run.column("loss"), evaluations: run.events("eval") }
});

/// Checks that a run went as if nothing had happened.
#[track_caller]
fn assert_undisturbed(run: &RunOutput) {
    assert!(run.weights() == UNDISTURBED.weights, "the weights differ");
    assert_eq!(run.column("loss"), UNDISTURBED.loss);
    assert_eq!(run.events("eval"), UNDISTURBED.evaluations);
    run.check_ledger(STEPS);
}

/// The step of the newest checkpoint, which must be whole; 0 without any.
#[track_caller]
fn newest_checkpoint(run: &RunOutput) -> u64 {
    let latest = checkpoint::latest(&run.path("checkpoints")).unwrap();
    assert!(latest.skipped.is_empty(), "{:?}", latest.skipped);
    latest.checkpoint.map_or(0, |checkpoint| checkpoint.progress.step)
}

#[test]
fn killed_at_any_step_and_resumed_by_any_number_of_workers() {
    // Before the first checkpoint, at one, between two, and late.
    for (workers, committed, resumed_by) in [(2, 4, 3), (1, 30, 2), (3, 47, 1), (2, 101, 4)] {
        let workspace = Workspace::new();
        let run = workspace.output("run");
        let mut process = workspace.start("run", &format!("--workers {workers} {LONG}"));
        assert!(process.wait_for_lines(&run.path("ledger.jsonl"), committed));
        assert_eq!(process.kill().code, None);
        let saved = newest_checkpoint(&run);
        let ended = workspace.train("run", &format!("--resume --workers {resumed_by} {LONG}")).expect(0);
        assert_eq!(ended.stderr.contains(&format!("resuming after step {saved}\n")), saved > 0, "{}", ended.stderr);
        assert_undisturbed(&run);
    }
}

#[test]
fn killed_while_saving_again_and_again() {
    let workspace = Workspace::new();
    let run = workspace.output("run");
    let settings =
        "--workers 2 training.max_steps=160 training.eval_steps=40 training.save_steps=1 training.save_total_limit=2";
    let mut state = 7_u64;
    let mut next = |below: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    let mut saved = 0;
    for _ in 0..10 {
        // A directory without a committed step may be started in, or resumed.
        let mut process = workspace.start("run", &format!("--resume {settings}"));
        let committed = (saved + 2 + next(12)) as usize;
        assert!(process.wait_for_lines(&run.path("ledger.jsonl"), committed), "ended at {}", committed);
        // Some moment of the save that follows.
        (0..next(200_000)).for_each(|_| std::hint::spin_loop());
        assert_eq!(process.kill().code, None);
        let newest = newest_checkpoint(&run);
        assert!(newest >= saved, "step {saved} was saved, and now the newest is {newest}");
        saved = newest;
    }
    assert!(saved > 10);
    workspace.train("run", &format!("--resume {settings}")).expect(0);
    assert_undisturbed(&run);
    assert_eq!(run.checkpoints(), ["step-00000159", "step-00000160"]);
}

#[test]
fn a_terminated_run_saves_and_can_be_resumed() {
    for signal in [Signal::TERM, Signal::INT, Signal::USR1] {
        let workspace = Workspace::new();
        let run = workspace.output("run");
        let mut process = workspace.start("run", &format!("--workers 2 {LONG}"));
        assert!(process.wait_for_lines(&run.path("ledger.jsonl"), 23));
        process.signal(signal);
        let ended = process.wait().expect(75);
        let committed = run.lines("ledger.jsonl").len() as u64;
        run.check_ledger(committed);
        assert_eq!(newest_checkpoint(&run), committed);
        let said = format!("preempted; step {committed} is saved, --resume goes on from it");
        assert!(ended.error().ends_with(&said), "{}", ended.stderr);
        assert!(!run.path("model").exists());
        workspace.train("run", &format!("--resume --workers 3 {LONG}")).expect(0);
        assert_undisturbed(&run);
    }
}

#[test]
fn a_killed_worker_is_replaced_and_the_run_goes_on_meanwhile() {
    for victim in 0..3 {
        let workspace = Workspace::new();
        let run = workspace.output("run");
        let mut process = workspace.start("run", &format!("--workers 3 {LONG}"));
        assert!(process.wait_for_lines(&run.path("ledger.jsonl"), 15));
        let workers = process.children();
        assert_eq!(workers.len(), 3);
        send_signal(workers[victim], Signal::KILL);
        process.wait_for("lost worker ");
        // The replacement is there before the end.
        process.wait_for("1 joined (1 given the state)");
        let ended = process.wait().expect(0);
        assert_undisturbed(&run);
        let recoveries = run.events("recovery");
        let losses: Vec<&Value> = recoveries.iter().flat_map(|event| event["lost"].as_array().unwrap()).collect();
        assert_eq!(losses.len(), 1, "{recoveries:?}");
        assert_eq!(losses[0]["pid"], workers[victim]);
        let joined: Vec<&Value> = recoveries.iter().flat_map(|event| event["joined"].as_array().unwrap()).collect();
        assert_eq!((joined.len(), &joined[0]["healed"]), (1, &true.into()), "{recoveries:?}");
        assert_eq!(run.lines("ledger.jsonl").last().unwrap()["workers"], 3, "{}", ended.stderr);
    }
}

#[test]
fn a_worker_that_hangs_is_dropped_and_comes_back() {
    let workspace = Workspace::new();
    let coordinator = Coordinator::start(&workspace, &[&["--workers", "2"], &words(LONG)[..]].concat());
    let workers = [0, 1].map(|_| coordinator.worker(workspace.path(), &coordinator.token));
    let mut process = coordinator.process;
    let run = workspace.output("run");
    assert!(process.wait_for_lines(&run.path("ledger.jsonl"), 15));
    workers[0].signal(Signal::STOP);
    process.wait_for("not heard of for ");
    workers[0].signal(Signal::CONT);
    process.wait_for("1 joined (1 given the state)");
    process.wait().expect(0);
    for worker in workers {
        worker.wait().expect(0);
    }
    assert_undisturbed(&run);
}

#[test]
fn a_coordinator_is_killed_and_comes_back_and_no_worker_is_restarted() {
    let workspace = Workspace::new();
    let arguments = [&["--workers", "2"], &words(LONG)[..]].concat();
    let mut coordinator = Coordinator::start(&workspace, &arguments);
    let (address, token) = (coordinator.url.trim_start_matches("http://").to_string(), coordinator.token.clone());
    let workers = [0, 1].map(|_| coordinator.worker(workspace.path(), &token));
    let run = workspace.output("run");
    for committed in [7, 31, 58, 90] {
        assert!(coordinator.process.wait_for_lines(&run.path("ledger.jsonl"), committed));
        coordinator.process.kill();
        coordinator = Coordinator::start_at(&workspace, &address, &[&["--resume"], &arguments[..]].concat());
        assert_eq!(coordinator.token, token, "workers know the run by it");
    }
    coordinator.process.wait().expect(0);
    for worker in workers {
        worker.wait().expect(0);
    }
    assert_undisturbed(&run);
    let restarts = run.events("recovery").iter().filter(|event| event["coordinator_restarted"] == true).count();
    assert_eq!(restarts, 4);
    for event in run.events("recovery") {
        assert!(event["joined"].as_array().unwrap().iter().all(|joined| joined["healed"] == false), "{event}");
    }
}

#[test]
fn a_coordinator_to_whom_nobody_comes_back_goes_on_from_the_checkpoint() {
    let workspace = Workspace::new();
    let arguments = [&["--workers", "2"], &words(LONG)[..], &words("cluster.reconnect_timeout_seconds=0")[..]].concat();
    let mut coordinator = Coordinator::start(&workspace, &arguments);
    let workers = [0, 1].map(|_| coordinator.worker(workspace.path(), &coordinator.token));
    assert!(coordinator.process.wait_for_lines(&workspace.output("run").path("ledger.jsonl"), 27));
    coordinator.process.kill();
    for worker in workers {
        let ended = worker.wait().expect(1);
        assert!(ended.error().starts_with("error: cannot reach the coordinator"), "{}", ended.stderr);
    }
    let mut coordinator = Coordinator::start(&workspace, &[&["--resume"], &arguments[..]].concat());
    coordinator.process.wait_for("going on from the last checkpoint");
    let (url, token) = announced(&mut coordinator.process);
    assert_eq!(token, coordinator.token);
    coordinator.url = url;
    let workers = [0, 1].map(|_| coordinator.worker(workspace.path(), &coordinator.token));
    coordinator.process.wait().expect(0);
    for worker in workers {
        worker.wait().expect(0);
    }
    assert_undisturbed(&workspace.output("run"));
}

#[test]
fn a_worker_joins_a_run_under_way() {
    let workspace = Workspace::new();
    let coordinator = Coordinator::start(&workspace, &[&["--workers", "2"], &words(LONG)[..]].concat());
    let run = workspace.output("run");
    let [leaver, stayer] = [0, 1].map(|_| coordinator.worker(workspace.path(), &coordinator.token));
    let (url, token) = (coordinator.url.clone(), coordinator.token.clone());
    let mut process = coordinator.process;
    assert!(process.wait_for_lines(&run.path("ledger.jsonl"), 15));
    leaver.kill();
    process.wait_for("lost worker ");
    let newcomer = worker(&url, workspace.path(), &token);
    process.wait_for("1 joined (1 given the state)");
    process.wait().expect(0);
    for worker in [stayer, newcomer] {
        worker.wait().expect(0);
    }
    assert_undisturbed(&run);
}

#[test]
fn too_few_workers_end_the_run_at_its_last_checkpoint() {
    let workspace = Workspace::new();
    let run = workspace.output("run");
    let mut process =
        workspace.start("run", &format!("--workers 3 cluster.min_workers=3 cluster.max_restarts=0 {LONG}"));
    process.wait_for("step 20: checkpoint saved");
    send_signal(process.children()[1], Signal::KILL);
    let ended = process.wait().expect(69);
    assert!(ended.error().starts_with("error: 2 workers left, 3 needed: worker "), "{}", ended.stderr);
    assert!(newest_checkpoint(&run) >= 20);
    workspace.train("run", &format!("--resume --workers 2 {LONG}")).expect(0);
    assert_undisturbed(&run);
}

/// `quintet coordinator`, and what it prints for workers.
pub(crate) struct Coordinator {
    pub(crate) process: Process,
    pub(crate) url: String,
    pub(crate) token: String,
}

impl Coordinator {
    pub(crate) fn start(workspace: &Workspace, arguments: &[&str]) -> Self {
        Self::start_at(workspace, "127.0.0.1:0", arguments)
    }

    pub(crate) fn start_at(workspace: &Workspace, address: &str, arguments: &[&str]) -> Self {
        let mut command = quintet(workspace.path());
        command.args(["coordinator", "job.toml", "--listen", address]).args(arguments);
        let mut process = Process::start(&mut command);
        let (url, token) = announced(&mut process);
        Coordinator { process, url, token }
    }

    pub(crate) fn worker(&self, directory: &Path, token: &str) -> Process {
        worker(&self.url, directory, token)
    }
}

/// The URL and the token that a coordinator prints.
fn announced(process: &mut Process) -> (String, String) {
    let line = process.wait_for("QUINTET_RUN_TOKEN=");
    let (token, command) = line.trim().split_once(' ').unwrap();
    let url = command.split(' ').next_back().unwrap().to_string();
    (url, token.trim_start_matches("QUINTET_RUN_TOKEN=").to_string())
}

fn worker(url: &str, directory: &Path, token: &str) -> Process {
    let mut command = quintet(directory);
    command.args(["worker", "--coordinator", url, "--threads", "1"]).env("QUINTET_RUN_TOKEN", token);
    Process::start(&mut command)
}

#[test]
fn the_halves_by_hand_train_the_same_weights() {
    let workspace = Workspace::new();
    let whole = workspace.trained("whole", "--workers 1");
    let coordinator = Coordinator::start(&workspace, &["--workers", "2", "--output", "halves"]);
    let intruder = coordinator.worker(workspace.path(), &"5a".repeat(32)).wait().expect(2);
    assert!(intruder.error().contains("wrong run token"), "{}", intruder.stderr);
    let unreadable = coordinator.worker(workspace.path(), "secret").wait().expect(2);
    assert!(unreadable.error().contains("QUINTET_RUN_TOKEN"), "{}", unreadable.stderr);
    let workers = [0, 1].map(|_| coordinator.worker(workspace.path(), &coordinator.token));
    let ended = coordinator.process.wait().expect(0);
    assert!(ended.stdout.contains("model: halves/model"), "{}", ended.stdout);
    for worker in workers {
        let Ended { stdout, stderr, .. } = worker.wait().expect(0);
        assert_eq!((stdout.as_str(), stderr.lines().count()), ("", 1), "{stderr}");
        assert!(stderr.starts_with("device: "), "{stderr}");
    }
    let halves = workspace.output("halves");
    assert!(halves.weights() == whole.weights());
    halves.check_ledger(22);
}

#[test]
fn a_worker_killed_before_the_run_began_ends_it_cleanly() {
    let workspace = Workspace::new();
    let mut coordinator = Coordinator::start(&workspace, &["--workers", "2"]);
    let worker = coordinator.worker(workspace.path(), &coordinator.token);
    coordinator.process.wait_for("1 of 2 workers joined");
    worker.kill();
    let ended = coordinator.process.wait().expect(69);
    assert!(ended.error().starts_with("error: a worker left before training began: worker 0 "), "{}", ended.stderr);
    // Nothing was done, so that nothing is in the way.
    workspace.trained("run", "--workers 2").check_ledger(22);
}

#[test]
fn a_run_stopped_before_it_began_leaves_nothing_in_the_way() {
    let workspace = Workspace::new();
    let coordinator = Coordinator::start(&workspace, &["--workers", "2"]);
    coordinator.process.signal(Signal::TERM);
    let ended = coordinator.process.wait().expect(75);
    assert!(ended.error().contains("nothing to save"), "{}", ended.stderr);
    workspace.trained("run", "--workers 1").check_ledger(22);
}

#[test]
fn workers_end_with_their_coordinator_and_say_why() {
    let workspace = Workspace::new();
    let settings = words("--workers 1 training.max_steps=100000 cluster.reconnect_timeout_seconds=0");
    let coordinator = Coordinator::start(&workspace, &settings);
    let worker = coordinator.worker(workspace.path(), &coordinator.token);
    let mut process = coordinator.process;
    assert!(process.wait_for_lines(&workspace.output("run").path("ledger.jsonl"), 3));
    process.kill();
    let ended = worker.wait().expect(1);
    assert!(ended.error().starts_with("error: cannot reach the coordinator at "), "{}", ended.stderr);
}
