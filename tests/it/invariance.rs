//! What must not depend on how the work is shared out: the numbers, to the bit.

use serde_json::{Value, json};

use crate::jobs::{RunOutput, Workspace};

/// Weights, losses, norms and scores of two runs, bit for bit.
#[track_caller]
fn assert_same(one: &RunOutput, other: &RunOutput, what: &str) {
    for key in ["loss", "grad_norm", "learning_rate", "target_tokens", "source_tokens", "examples", "epoch"] {
        assert_eq!(one.column(key), other.column(key), "{key}, {what}");
    }
    assert_eq!(one.events("eval"), other.events("eval"), "{what}");
    assert_eq!(one.lines("predictions.jsonl"), other.lines("predictions.jsonl"), "{what}");
    assert!(one.weights() == other.weights(), "the weights differ, {what}");
}

#[test]
fn weights_are_the_same_for_any_number_of_workers() {
    let workspace = Workspace::new();
    let one = workspace.trained("1", "--workers 1");
    one.check_ledger(22);
    for (name, arguments) in [
        ("2", "--workers 2"),
        ("3", "--workers 3"),
        ("4", "--workers 4"),
        ("checkpointing-1", "--workers 1 training.gradient_checkpointing=true"),
        ("checkpointing-3", "--workers 3 training.gradient_checkpointing=true"),
    ] {
        let other = workspace.trained(name, arguments);
        assert_same(&one, &other, arguments);
        other.check_ledger(22);
    }
    // The comparison can fail.
    assert!(one.weights() != workspace.trained("seed", "--workers 2 training.seed=43").weights());
}

#[test]
fn workers_without_a_micro_batch_change_nothing() {
    let workspace = Workspace::new();
    let micro_batches = "training.micro_batch_size=5 training.max_steps=9";
    let one = workspace.trained("1", &format!("--workers 1 {micro_batches}"));
    let four = workspace.trained("4", &format!("--workers 4 {micro_batches}"));
    assert_same(&one, &four, "two micro-batches for four workers");
    four.check_ledger(9);
}

#[test]
fn bf16_and_adafactor_are_the_same_for_any_number_of_workers() {
    let workspace = Workspace::new();
    for settings in [
        "training.precision=bf16 training.max_steps=8",
        "training.precision=fp16 training.max_steps=8",
        "training.optimizer=adafactor training.max_steps=8",
        "model.tokenizer=wordlevel training.label_smoothing_factor=0.1 training.max_steps=8",
    ] {
        let name =
            |workers: u32| format!("{}-{workers}", settings.split('=').nth(1).unwrap_or_default().replace(' ', "-"));
        let one = workspace.trained(&name(1), &format!("--workers 1 {settings}"));
        let three = workspace.trained(&name(3), &format!("--workers 3 {settings}"));
        assert_same(&one, &three, settings);
    }
}

#[test]
fn accumulation_changes_nothing_but_rounding() {
    let workspace = Workspace::new();
    let settings = "model.dropout_rate=0.0 training.learning_rate=1e-3 training.max_steps=8";
    let whole = workspace.trained("10", &format!("--workers 1 {settings} training.micro_batch_size=10"));
    for (micro_batch, workers) in [(1, 2), (2, 1), (2, 3), (5, 2), (5, 4)] {
        let name = format!("{micro_batch}-{workers}");
        let split = format!("--workers {workers} {settings} training.micro_batch_size={micro_batch}");
        let split = workspace.trained(&name, &split);
        for key in ["loss", "grad_norm"] {
            for (step, (a, b)) in (1..).zip(whole.column(key).into_iter().zip(split.column(key))) {
                assert!((a - b).abs() <= 1e-5 * a.abs(), "{key} of step {step}: {a} and {b} with {name}");
            }
        }
        assert_eq!(whole.column("target_tokens"), split.column("target_tokens"));
        split.check_ledger(8);
    }
}

#[test]
fn files_are_as_documented() {
    let workspace = Workspace::new();
    let run =
        workspace.trained("run", "--workers 2 training.max_steps=103 training.eval_steps=50 training.save_steps=40");
    run.check_ledger(103);
    for record in run.lines("ledger.jsonl") {
        let keys: Vec<&String> = record.as_object().unwrap().keys().collect();
        assert_eq!(keys, ["step", "epoch", "positions", "generation", "workers", "weights_digest"]);
        assert_eq!((&record["generation"], &record["workers"]), (&json!(1), &json!(2)));
        // The weights that a step begins with, first and after every hundredth step.
        let taken = [1, 101].contains(&record["step"].as_u64().unwrap());
        assert_eq!(record["weights_digest"].is_string(), taken, "{record}");
        assert_eq!(record["weights_digest"].is_null(), !taken, "{record}");
    }
    let train = run.events("train");
    assert_eq!(train.len(), 103);
    for event in &train {
        let keys: Vec<&String> = event.as_object().unwrap().keys().collect();
        let expected = "event step epoch loss grad_norm learning_rate examples source_tokens target_tokens step_seconds \
                        tokens_per_second workers peak_memory_bytes";
        assert_eq!(keys, expected.split_whitespace().collect::<Vec<_>>());
    }
    assert_eq!(train[3]["examples"], 7, "the last step of an epoch takes what is left");
    let loss = run.column("loss");
    assert!(loss[102] < 0.8 * loss[0], "it learns: from {} to {}", loss[0], loss[102]);
    let evaluations = run.events("eval");
    assert_eq!(evaluations.iter().map(|event| event["step"].as_u64().unwrap()).collect::<Vec<_>>(), [50, 100, 103]);
    assert!(evaluations.iter().all(|event| event["eval_loss"].is_f64() && event["metrics"]["exact_match"].is_f64()));
    assert_eq!(run.checkpoints(), ["step-00000040", "step-00000080", "step-00000103"]);
    let prediction = &run.lines("predictions.jsonl")[8];
    assert_eq!(prediction.as_object().unwrap().keys().collect::<Vec<_>>(), ["input", "target", "prediction"]);
    for name in ["config.json", "generation_config.json", "tokenizer_config.json"] {
        let text = std::fs::read_to_string(run.path("model").join(name)).unwrap();
        serde_json::from_str::<Value>(&text).unwrap();
    }
    assert!(run.path("job.toml").is_file());
}

#[test]
fn without_intervals_a_run_evaluates_and_saves_at_its_end() {
    let workspace = Workspace::new();
    let job = std::fs::read_to_string(workspace.path().join("job.toml")).unwrap();
    let lines = job.lines().filter(|line| !line.starts_with("eval_steps") && !line.starts_with("save_steps"));
    workspace.write("job.toml", &lines.map(|line| format!("{line}\n")).collect::<String>());
    let run = workspace.trained("run", "--workers 2 training.max_steps=6");
    let evaluations = run.events("eval");
    assert_eq!(evaluations.len(), 1);
    assert_eq!(evaluations[0]["step"], 6);
    assert_eq!(run.checkpoints(), ["step-00000006"]);
}
