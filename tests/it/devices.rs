//! Other devices than the CPU: the emulated GPU, and what is said where there is none.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::harness::run;
use crate::jobs::{RunOutput, Workspace};

/// Whether there is no compiler for the emulated GPU; then what needs one is skipped.
pub(crate) fn emulator_is_missing() -> bool {
    let missing = quintet_kernels::emulator_compiler().err();
    if let Some(error) = &missing {
        eprintln!("SKIPPED: nothing runs on the emulated GPU, because {error}");
    }
    missing.is_some()
}

/// Losses and norms of two runs, within `tolerance` of each other, relative.
#[track_caller]
fn assert_near(one: &RunOutput, other: &RunOutput, tolerance: f64, what: &str) {
    for key in ["loss", "grad_norm"] {
        let (a, b) = (one.column(key), other.column(key));
        assert_eq!(a.len(), b.len(), "{what}");
        for (step, (a, b)) in (1..).zip(a.into_iter().zip(b)) {
            assert!((a - b).abs() <= tolerance * a.abs(), "{key} of step {step}: {a} and {b}, {what}");
        }
    }
    for key in ["learning_rate", "target_tokens", "source_tokens", "examples", "epoch"] {
        assert_eq!(one.column(key), other.column(key), "{key}, {what}");
    }
}

/// Small steps: what differs is rounding, and rounding grows with every step.
const SHORT: &str = "training.max_steps=4 training.global_batch_size=6 training.micro_batch_size=2 \
                     training.learning_rate=1e-3 training.warmup_steps=1 training.eval_steps=4 evaluation.max_examples=3";

#[test]
fn training_on_the_emulated_gpu_agrees_with_the_cpu() {
    if emulator_is_missing() {
        return;
    }
    let workspace = Workspace::new();
    let cpu = workspace.trained("cpu", &format!("--device cpu {SHORT}"));
    let one = workspace.trained("1", &format!("--device emulated {SHORT}"));
    assert_near(&cpu, &one, 1e-4, "one worker");
    let (cpu_eval, eval) = (&cpu.events("eval")[0], &one.events("eval")[0]);
    let [a, b] = [cpu_eval, eval].map(|event| event["eval_loss"].as_f64().unwrap());
    assert!((a - b).abs() <= 1e-4 * a, "{a} and {b}");
    assert_eq!(cpu.lines("predictions.jsonl"), one.lines("predictions.jsonl"));
    // Ranks add up their parts through the host.
    let two = workspace.trained("2", &format!("--device emulated --workers 2 {SHORT}"));
    assert_near(&cpu, &two, 1e-4, "two workers");
}

#[test]
fn a_checkpoint_of_the_cpu_goes_on_on_the_emulated_gpu() {
    if emulator_is_missing() {
        return;
    }
    let workspace = Workspace::new();
    let arguments = format!("{SHORT} training.save_steps=2");
    let cpu = workspace.trained("cpu", &format!("--device cpu {arguments}"));
    let first = workspace.trained("run", &format!("--device cpu {arguments}"));
    fs::remove_dir_all(first.path("checkpoints/step-00000004")).unwrap();
    fs::remove_dir_all(first.path("model")).unwrap();
    let resumed = workspace.trained("run", &format!("--device emulated --resume {arguments}"));
    assert_eq!(resumed.checkpoints(), ["step-00000002", "step-00000004"]);
    assert_near(&cpu, &resumed, 1e-4, "resumed");
}

#[test]
fn the_emulated_gpu_evaluates_and_generates_as_the_cpu() {
    if emulator_is_missing() {
        return;
    }
    let workspace = Workspace::new();
    workspace.trained("run", "training.max_steps=6 training.eval_steps=6");
    let on = |device: &str, command: &str| {
        let arguments = ["--model", "run/model", "--max-new-tokens", "6", "--json", "--device", device];
        run(workspace.path(), command.split('|').chain(arguments)).expect(0).stdout
    };
    let generate = "generate|--input|say: a bee";
    let [cpu, emulated] = ["cpu", "emulated"].map(|device| -> Value { json(&on(device, generate)) });
    assert_eq!(cpu["outputs"][0]["token_ids"], emulated["outputs"][0]["token_ids"]);
    let evaluate = "evaluate|--data|validation.jsonl|--input|say: {source}|--target|{target}|--max-examples|4";
    let [cpu, emulated] = ["cpu", "emulated"].map(|device| -> Value { json(&on(device, evaluate)) });
    assert_eq!(cpu["metrics"], emulated["metrics"]);
    let [a, b] = [&cpu, &emulated].map(|result| result["loss"].as_f64().unwrap());
    assert!((a - b).abs() <= 1e-4 * a, "{a} and {b}");
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

#[test]
fn every_optimizer_and_precision_runs_on_the_emulated_gpu() {
    if emulator_is_missing() {
        return;
    }
    let workspace = Workspace::new();
    for (settings, tolerance) in [
        ("training.optimizer=adafactor", 1e-4),
        ("training.optimizer=adamw_scaled training.gradient_checkpointing=true", 1e-4),
        ("training.precision=bf16", 2e-2),
        ("training.precision=fp16", 1e-2),
    ] {
        let name = settings.split('=').next_back().unwrap_or_default();
        let steps = SHORT.replace("max_steps=4", "max_steps=2").replace("eval_steps=4", "eval_steps=2");
        let on = |device: &str| {
            workspace.trained(&format!("{device}-{name}"), &format!("--device {device} {steps} {settings}"))
        };
        assert_near(&on("cpu"), &on("emulated"), tolerance, settings);
    }
}

#[test]
fn fp16_tells_its_loss_scale() {
    let workspace = Workspace::new();
    let run = workspace.trained("run", "training.precision=fp16 training.max_steps=3");
    assert_eq!(run.column("loss_scale"), [65536.0; 3]);
}

#[test]
fn a_run_says_where_it_computes_and_why() {
    if Path::new("/dev/nvidia0").exists() {
        eprintln!("SKIPPED: this machine has a GPU");
        return;
    }
    let workspace = Workspace::new();
    let steps = "training.max_steps=1 training.warmup_steps=0";
    let ended = workspace.train("auto", steps).expect(0);
    let lines: Vec<&str> = ended.stderr.lines().filter(|line| line.starts_with("device: ")).collect();
    assert_eq!(lines.len(), 1, "{}", ended.stderr);
    assert!(lines[0].starts_with("device: cpu, not a GPU: "), "{}", lines[0]);
    let ended = workspace.train("cpu", &format!("--device cpu {steps}")).expect(0);
    assert!(ended.stderr.lines().any(|line| line == "device: cpu"), "{}", ended.stderr);
    let ended = workspace.train("cuda", &format!("--device cuda {steps}")).expect(2);
    assert!(ended.error().starts_with("error: device cuda: "), "{}", ended.error());
}
