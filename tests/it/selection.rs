//! The best checkpoint and early stopping, for any number of workers and over resuming.

use crate::harness::references;
use crate::jobs::{RunOutput, Workspace};

/// Evaluates every second step, and takes the highest loss for the best, which is that of the first evaluation.
const WORSE_IS_BETTER: &str = "training.lr_scheduler_type=\"constant\" training.warmup_steps=0 training.learning_rate=3e-3 \
    model.dropout_rate=0.0 training.eval_steps=2 training.greater_is_better=true training.early_stopping_patience=2 \
    training.load_best_model_at_end=true training.save_total_limit=1";

/// The steps of the evaluations, whose losses must fall as the tests assume.
fn evaluated(run: &RunOutput) -> Vec<u64> {
    let evaluations = run.events("eval");
    let losses: Vec<f64> = evaluations.iter().map(|event| event["eval_loss"].as_f64().unwrap()).collect();
    assert!(losses.windows(2).all(|pair| pair[0] > pair[1]), "{losses:?}");
    evaluations.iter().map(|event| event["step"].as_u64().unwrap()).collect()
}

#[test]
fn the_best_model_is_saved_and_a_run_without_hope_ends() {
    let workspace = Workspace::new();
    let settings =
        WORSE_IS_BETTER.replace("training.early_stopping_patience=2 training.load_best_model_at_end=true", "");
    let settings = settings.replace("training.greater_is_better=true", "");
    let best = workspace.trained("best", &format!("--workers 1 {settings} training.max_steps=2"));
    let runs = [1, 3].map(|workers| {
        let name = format!("workers-{workers}");
        let ended = workspace.train(&name, &format!("--workers {workers} {WORSE_IS_BETTER}")).expect(0);
        assert!(ended.stderr.contains("trained to step 6, early: loss has not become better in 2"), "{}", ended.stderr);
        assert!(ended.stderr.contains("the best model is that of step 2"), "{}", ended.stderr);
        let run = workspace.output(&name);
        run.check_ledger(6);
        assert_eq!(evaluated(&run), [2, 4, 6]);
        assert_eq!(run.checkpoints(), ["step-00000002", "step-00000006"]);
        run
    });
    assert!(runs.iter().all(|run| run.weights() == best.weights()), "not the weights of step 2");
}

#[test]
fn the_best_adapter_is_saved() {
    let workspace = Workspace::fine_tuning(&references().join("byt5"), "[lora]\nr = 2\n");
    let settings = WORSE_IS_BETTER.replace("training.early_stopping_patience=2", "training.max_steps=4");
    let run = workspace.trained("selected", &format!("--workers 2 {settings}"));
    assert_eq!(evaluated(&run), [2, 4]);
    let best = workspace.trained(
        "best",
        "--workers 1 training.lr_scheduler_type=\"constant\" training.warmup_steps=0 \
        training.learning_rate=3e-3 model.dropout_rate=0.0 training.eval_steps=2 training.max_steps=2",
    );
    assert!(run.path("adapter").is_dir());
    assert!(run.weights() == best.weights(), "not the adapter of step 2");
}

#[test]
fn a_resumed_run_remembers_its_best_and_its_patience() {
    let workspace = Workspace::new();
    let whole = workspace.trained("whole", &format!("--workers 1 {WORSE_IS_BETTER}"));
    let mut run = workspace.start("killed", &format!("--workers 2 {WORSE_IS_BETTER}"));
    run.wait_for_lines(&workspace.path().join("killed/ledger.jsonl"), 5);
    run.kill();
    let resumed = workspace.trained("killed", &format!("--workers 2 {WORSE_IS_BETTER} --resume"));
    resumed.check_ledger(6);
    assert_eq!(evaluated(&resumed), [2, 4, 6]);
    assert_eq!(resumed.weights(), whole.weights());
    // With more patience, what ended early goes on.
    let patient = WORSE_IS_BETTER.replace("patience=2", "patience=3");
    let ended = workspace.trained("killed", &format!("--workers 1 {patient} --resume"));
    assert_eq!(evaluated(&ended), [2, 4, 6, 8]);
    assert_eq!(ended.checkpoints(), ["step-00000002", "step-00000008"]);
}

#[test]
fn what_cannot_be_selected_is_refused() {
    let workspace = Workspace::new();
    let refused = |settings: &str| workspace.train("refused", settings).expect(2).error().to_string();
    let error = refused("training.load_best_model_at_end=true training.metric_for_best_model=bleu");
    assert!(error.contains("training.metric_for_best_model: bleu is not computed"), "{error}");
    let job = std::fs::read_to_string(workspace.path().join("job.toml")).unwrap();
    let lines = job.lines().filter(|line| !line.starts_with("validation") && !line.starts_with("eval_steps"));
    workspace.write("job.toml", &lines.map(|line| format!("{line}\n")).collect::<String>());
    let error = refused("training.early_stopping_patience=2");
    assert!(error.contains("training.early_stopping_patience: there is nothing to evaluate on"), "{error}");
}
