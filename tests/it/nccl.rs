//! Gradients between GPUs: emulated ones, for which a stand-in of NCCL (kernels/tests/fake_cuda) adds up. What it is told to
//! do wrong, the run survives.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use crate::harness::{Ended, Process, quintet};
use crate::jobs::{RunOutput, Workspace, words};

/// The folder of the stand-in; none if it cannot be built, and then tests are skipped.
#[expect(clippy::print_stderr, reason = "a check that is skipped says so")]
fn stand_in() -> Option<&'static Path> {
    static FOLDER: OnceLock<Option<PathBuf>> = OnceLock::new();
    let build = || {
        if crate::devices::emulator_is_missing() {
            return None;
        }
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("nccl");
        std::fs::create_dir_all(&folder).unwrap();
        let unfinished = folder.join(format!("{}.so", std::process::id()));
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/../kernels/tests/fake_cuda/nccl.c");
        let mut command = Command::new("cc");
        command.args(["-shared", "-fPIC", "-O1", "-pthread", "-fvisibility=hidden", source, "-o"]).arg(&unfinished);
        if !command.status().is_ok_and(|status| status.success()) {
            eprintln!("SKIPPED: there is no C compiler `cc` to make a stand-in for NCCL with");
            return None;
        }
        std::fs::rename(unfinished, folder.join("libnccl_emulated.so")).unwrap();
        Some(folder)
    };
    FOLDER.get_or_init(build).as_deref()
}

const SETTINGS: &str = "training.max_steps=4 training.learning_rate=1e-3 training.warmup_steps=1 training.eval_steps=4 \
                        evaluation.max_examples=3";
const BY_NCCL: &str = "gradients are reduced by NCCL 2.99.0 between 2 GPUs";

/// A run on emulated GPUs that finds the stand-in, which is to do what `fault` says.
fn train(workspace: &Workspace, output: &str, arguments: &str, fault: &str) -> Option<Ended> {
    let mut command = quintet(workspace.path());
    command.args(["train", "job.toml", "--device", "emulated", "--output", output]);
    command.args(words(SETTINGS)).args(words(arguments)).env("LD_LIBRARY_PATH", stand_in()?);
    Some(Process::start(command.env("FAKE_NCCL_FAULT", fault)).wait())
}

/// A run of one worker, to which all others must come close.
fn alone() -> &'static (Workspace, RunOutput) {
    static ALONE: OnceLock<(Workspace, RunOutput)> = OnceLock::new();
    ALONE.get_or_init(|| {
        let workspace = Workspace::new();
        let run = workspace.trained("run", &format!("--device emulated {SETTINGS}"));
        (workspace, run)
    })
}

/// What several ranks add up differs from what one does by rounding.
#[track_caller]
fn assert_same_training(run: &RunOutput, what: &str) {
    for key in ["loss", "grad_norm"] {
        let (expected, found) = (alone().1.column(key), run.column(key));
        assert_eq!(expected.len(), found.len(), "{what}");
        for (expected, found) in expected.into_iter().zip(found) {
            assert!((expected - found).abs() <= 1e-5 * expected, "{key}: {expected} alone, {found} with {what}");
        }
    }
    run.check_ledger(4);
}

#[test]
fn two_and_three_gpus_train_as_one() {
    let workspace = Workspace::new();
    for workers in [2, 3] {
        // Leases differ: a step has five micro-batches, the last of an epoch four.
        let output = workers.to_string();
        let Some(ended) = train(&workspace, &output, &format!("--workers {workers}"), "") else { return };
        let line = format!("gradients are reduced by NCCL 2.99.0 between {workers} GPUs\n");
        let ended = ended.expect(0);
        assert!(ended.stderr.contains(&line), "{}", ended.stderr);
        assert_same_training(&workspace.output(&output), &format!("{workers} workers"));
    }
}

#[test]
fn a_rank_without_micro_batches_takes_part_in_the_sum() {
    let workspace = Workspace::new();
    let arguments = "training.micro_batch_size=10 training.max_steps=2";
    let Some(ended) = train(&workspace, "2", &format!("--workers 2 {arguments}"), "") else { return };
    ended.expect(0);
    train(&workspace, "1", arguments, "");
    // What is added to the gradient is nothing.
    for key in ["loss", "grad_norm"] {
        assert_eq!(workspace.output("1").column(key), workspace.output("2").column(key));
    }
}

#[test]
fn without_nccl_gradients_go_through_the_host_and_it_is_said() {
    if crate::devices::emulator_is_missing() {
        return;
    }
    let workspace = Workspace::new();
    let ended = workspace.train("run", &format!("--device emulated --workers 2 {SETTINGS}")).expect(0);
    let line = "gradients are reduced through the host by TCP, which is slower than NCCL; rank 0: NCCL for emulated GPUs \
                is missing: libnccl_emulated.so";
    assert!(ended.stderr.contains(line), "{}", ended.stderr);
    assert_same_training(&workspace.output("run"), "the host between");
}

#[test]
fn a_rank_that_dies_in_a_sum_costs_the_step() {
    let workspace = Workspace::new();
    let Some(ended) = train(&workspace, "run", "--workers 2", "kill:1:20") else { return };
    let ended = ended.expect(0);
    assert!(ended.stderr.contains("committed by 1 worker(s) as generation 2, after "), "{}", ended.stderr);
    assert_same_training(&workspace.output("run"), "a dead rank");
}

#[test]
fn a_sum_that_fails_is_tried_again_with_a_new_communicator() {
    let workspace = Workspace::new();
    for (output, fault) in [("0", "fail:0:3"), ("1", "fail:1:20")] {
        let Some(ended) = train(&workspace, output, "--workers 2", fault) else { return };
        let ended = ended.expect(0);
        assert!(
            ended.stderr.contains("failed, though all workers are alive; it is computed again"),
            "{}",
            ended.stderr
        );
        assert!(ended.stderr.contains("committed by 2 worker(s) as generation 2, after "), "{}", ended.stderr);
        assert_eq!(ended.stderr.matches(BY_NCCL).count(), 2, "{}", ended.stderr);
        assert_same_training(&workspace.output(output), fault);
    }
}

#[test]
fn a_sum_that_hangs_is_given_up() {
    let workspace = Workspace::new();
    let arguments = "--workers 2 cluster.step_timeout_seconds=6 cluster.heartbeat_timeout_seconds=6";
    let Some(ended) = train(&workspace, "run", arguments, "hang:1:20") else { return };
    let ended = ended.expect(0);
    assert!(ended.stderr.contains("committed by 2 worker(s) as generation 2, after "), "{}", ended.stderr);
    assert_same_training(&workspace.output("run"), "a sum that hangs");
}

#[test]
fn a_communicator_that_does_not_come_about_is_done_without() {
    let workspace = Workspace::new();
    let Some(ended) = train(&workspace, "run", "--workers 2 cluster.step_timeout_seconds=6", "absent:1") else {
        return;
    };
    let ended = ended.expect(0);
    let line =
        "through the host by TCP, which is slower than NCCL; rank 0: NCCL: meeting the other ranks: nothing from";
    assert!(ended.stderr.contains(line), "{}", ended.stderr);
    assert_same_training(&workspace.output("run"), "an absent rank");
}
