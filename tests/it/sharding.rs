//! With the optimizer's state sharded, a run has the numbers of one where every worker has all of it, whatever happens.

use std::fs;
use std::sync::LazyLock;

use rustix::process::Signal;

use crate::harness::{references, send_signal};
use crate::jobs::{RunOutput, Workspace, words};
use crate::recovery::Coordinator;

/// A model of seven blocks of 32,768 weights, so that four workers have slices.
const WIDE: &str = "model.architecture.d_model=64 model.architecture.d_ff=256";
const SHARDED: &str = "training.zero_stage=1";
const STEPS: u64 = 60;
const LONG: &str = "training.max_steps=60 training.save_steps=10 training.eval_steps=30 \
                    model.architecture.d_model=64 model.architecture.d_ff=256";

/// What such a run leaves where nothing happens, and nothing is sharded.
struct Undisturbed {
    weights: Vec<u8>,
    loss: Vec<f64>,
    optimizer: Vec<u8>,
}

static UNDISTURBED: LazyLock<Undisturbed> = LazyLock::new(|| {
    let workspace = Workspace::new();
    let run = workspace.trained("run", &format!("--workers 1 {LONG}"));
    Undisturbed { weights: run.weights(), loss: run.column("loss"), optimizer: optimizer(&run, STEPS) }
});

/// The optimizer's state in a checkpoint, as bytes.
#[track_caller]
fn optimizer(run: &RunOutput, step: u64) -> Vec<u8> {
    fs::read(run.path(&format!("checkpoints/step-{step:08}/optimizer.safetensors"))).unwrap()
}

/// Checks that a run went as if nothing had happened, and nothing were sharded.
#[track_caller]
fn assert_undisturbed(run: &RunOutput) {
    assert!(run.weights() == UNDISTURBED.weights, "the weights differ");
    assert!(optimizer(run, STEPS) == UNDISTURBED.optimizer, "the optimizer's state differs");
    assert_eq!(run.column("loss"), UNDISTURBED.loss);
    run.check_ledger(STEPS);
}

#[track_caller]
fn steps_recomputed(run: &RunOutput) -> u64 {
    run.events("recovery").iter().map(|event| event["steps_recomputed"].as_u64().unwrap()).sum()
}

#[test]
fn nothing_differs_for_any_number_of_workers() {
    let workspace = Workspace::new();
    for (name, settings, workers) in [
        ("adamw", "training.weight_decay=0.1", 2..=4),
        ("scaled", "training.optimizer=adamw_scaled training.precision=bf16", 3..=4),
        ("fp16", "training.precision=fp16 training.gradient_checkpointing=true", 3..=3),
    ] {
        let whole = workspace.trained(name, &format!("--workers 1 {WIDE} {settings}"));
        for workers in workers {
            let sharded = format!("--workers {workers} {WIDE} {SHARDED} {settings}");
            let sharded = workspace.trained(&format!("{name}-{workers}"), &sharded);
            assert!(sharded.weights() == whole.weights(), "the weights of {workers} differ with {settings}");
            assert_eq!(sharded.column("grad_norm"), whole.column("grad_norm"), "{workers} with {settings}");
            assert_eq!(sharded.events("eval"), whole.events("eval"), "{workers} with {settings}");
            // A checkpoint is the same files, whoever held what.
            assert!(optimizer(&sharded, 20) == optimizer(&whole, 20), "{workers} with {settings}");
            sharded.check_ledger(22);
        }
    }
}

#[test]
fn adapters_have_a_state_to_shard_too() {
    let workspace = Workspace::fine_tuning(&references().join("byt5"), "[lora]\nr = 4\n");
    let whole = workspace.trained("whole", "--workers 1");
    let sharded = workspace.trained("sharded", &format!("--workers 3 {SHARDED}"));
    assert!(sharded.weights() == whole.weights());
    assert!(optimizer(&sharded, 20) == optimizer(&whole, 20));
}

#[test]
fn a_death_takes_no_state_along_and_no_step_is_computed_again() {
    for victim in 0..4 {
        let workspace = Workspace::new();
        let run = workspace.output("run");
        let mut process = workspace.start("run", &format!("--workers 4 {SHARDED} {LONG}"));
        assert!(process.wait_for_lines(&run.path("ledger.jsonl"), 13));
        send_signal(process.children()[victim], Signal::KILL);
        process.wait_for("lost worker ");
        process.wait().expect(0);
        assert_undisturbed(&run);
        assert_eq!(steps_recomputed(&run), 0);
        let lost: usize = run.events("recovery").iter().map(|event| event["lost"].as_array().unwrap().len()).sum();
        assert_eq!(lost, 1);
    }
}

#[test]
fn two_neighbours_at_once_cost_the_steps_since_the_checkpoint() {
    let workspace = Workspace::new();
    let run = workspace.output("run");
    let mut process = workspace.start("run", &format!("--workers 3 {SHARDED} {LONG}"));
    process.wait_for("step 10: checkpoint saved");
    assert!(process.wait_for_lines(&run.path("ledger.jsonl"), 14));
    let workers = process.children();
    // Of three, any two are neighbours. Both stand still before the first is missed.
    for signal in [Signal::STOP, Signal::KILL] {
        workers[1..].iter().for_each(|&worker| send_signal(worker, signal));
    }
    let said = process.wait_for("the state of step ");
    assert!(said.contains("is lost: ") && said.ends_with("; going on from the last checkpoint"), "{said}");
    process.wait_for("committed steps are computed again");
    process.wait().expect(0);
    assert_undisturbed(&run);
    assert!((1..=50).contains(&steps_recomputed(&run)));
    let recoveries = run.events("recovery");
    assert_eq!(recoveries[0]["lost"].as_array().unwrap().len(), 2, "{recoveries:?}");
}

#[test]
fn a_run_is_resumed_by_any_number_sharded_or_not() {
    for (begun, resumed) in [
        (format!("--workers 3 {SHARDED}"), format!("--workers 2 {SHARDED}")),
        (format!("--workers 4 {SHARDED}"), "--workers 2".to_string()),
        ("--workers 2".to_string(), format!("--workers 4 {SHARDED}")),
    ] {
        let workspace = Workspace::new();
        let run = workspace.output("run");
        let mut process = workspace.start("run", &format!("{begun} {LONG}"));
        process.wait_for("step 10: checkpoint saved");
        assert!(process.wait_for_lines(&run.path("ledger.jsonl"), 16));
        process.kill();
        let ended = workspace.train("run", &format!("--resume {resumed} {LONG}")).expect(0);
        assert!(ended.stderr.contains("resuming after step "), "{}", ended.stderr);
        assert_undisturbed(&run);
    }
}

#[test]
fn a_coordinator_that_comes_back_finds_all_parts_with_the_workers() {
    let workspace = Workspace::new();
    let run = workspace.output("run");
    let settings = format!("--workers 3 {SHARDED} {LONG}");
    let mut coordinator = Coordinator::start(&workspace, &words(&settings));
    let address = coordinator.url.trim_start_matches("http://").to_string();
    let workers = [0, 1, 2].map(|_| coordinator.worker(workspace.path(), &coordinator.token));
    for committed in [7, 26] {
        assert!(coordinator.process.wait_for_lines(&run.path("ledger.jsonl"), committed));
        coordinator.process.kill();
        coordinator = Coordinator::start_at(&workspace, &address, &words(&format!("--resume {settings}")));
    }
    coordinator.process.wait().expect(0);
    for worker in workers {
        worker.wait().expect(0);
    }
    assert_undisturbed(&run);
    assert_eq!(steps_recomputed(&run), 0);
}

#[test]
fn what_cannot_be_sharded_is_refused() {
    let workspace = Workspace::new();
    for (settings, problem) in [
        ("training.zero_stage=2", "training.zero_stage: is 2, must be 0, or 1"),
        ("training.zero_stage=1 training.optimizer=adafactor", "training.zero_stage: adafactor keeps two vectors"),
        ("training.zero_stage=1 --device emulated", "training.zero_stage: the optimizer's state is sharded between"),
    ] {
        let ended = workspace.train("run", settings).expect(2);
        assert!(ended.error().contains(problem), "{}", ended.stderr);
    }
}
