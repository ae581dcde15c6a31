//! What programs read: documents on standard output, with the documented keys and nothing beside them.

use serde_json::{Value, json};

use crate::harness::{Ended, run};
use crate::jobs::Workspace;

/// Standard output as JSON lines.
#[track_caller]
fn documents(ended: &Ended) -> Vec<Value> {
    ended.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Runs a command that prints a single document.
#[track_caller]
fn document(workspace: &Workspace, line: &str) -> Value {
    let ended = run(workspace.path(), line.split_whitespace()).expect(0);
    let mut documents = documents(&ended);
    assert_eq!(documents.len(), 1, "{}", ended.stdout);
    documents.remove(0)
}

#[track_caller]
fn assert_keys(value: &Value, expected: &str) {
    let keys: Vec<&String> = value.as_object().unwrap().keys().collect();
    assert_eq!(keys, expected.split_whitespace().collect::<Vec<_>>());
}

#[test]
fn a_trained_model_evaluates_and_generates() {
    let workspace = Workspace::new();
    let summary = document(&workspace, "train job.toml --workers 2 --json");
    assert_keys(&summary, "exit_code reason output_dir step loss eval_loss metrics predictions");
    assert_eq!((&summary["exit_code"], &summary["step"]), (&json!(0), &json!(22)));
    assert_keys(&summary["predictions"][0], "input target prediction");
    let last = workspace.output("run").events("eval").pop().unwrap();
    assert_eq!((&summary["eval_loss"], &summary["metrics"]), (&last["eval_loss"], &last["metrics"]));

    // The saved model scores as the run did, batch by batch or not.
    let evaluate = "evaluate --model run/model --data validation.jsonl --input {source} --target {target} --json \
                    --max-source-length 40 --max-target-length 20 --metrics loss,exact_match,perplexity --max-new-tokens 8";
    let evaluate = |more: &[&str]| {
        let words = evaluate.split_whitespace().map(|w| if w == "{source}" { "say: {source}" } else { w });
        documents(&run(workspace.path(), words.chain(more.iter().copied())).expect(0)).remove(0)
    };
    let evaluation = evaluate(&[]);
    assert_keys(&evaluation, "loss examples target_tokens metrics");
    assert_eq!(evaluation["examples"], 9);
    assert_eq!(evaluation["metrics"]["exact_match"], last["metrics"]["exact_match"]);
    let perplexity = evaluation["metrics"]["perplexity"].as_f64().unwrap();
    assert_eq!(perplexity, evaluation["loss"].as_f64().unwrap().exp());
    let (loss, during) = (evaluation["loss"].as_f64().unwrap(), last["eval_loss"].as_f64().unwrap());
    assert!((loss - during).abs() < 1e-5 * during, "{loss} and {during}");

    // Of some records; both parts together are all.
    let [some, others] = ["len(source) > 8", "len(source) <= 8"].map(|condition| evaluate(&["--where", condition]));
    let sum = |part: &Value| part["loss"].as_f64().unwrap() * part["target_tokens"].as_f64().unwrap();
    assert!(some["examples"].as_u64().unwrap() > 0 && others["examples"].as_u64().unwrap() > 0);
    assert!((sum(&some) + sum(&others) - sum(&evaluation)).abs() < 1e-5 * sum(&evaluation));

    let predictions = workspace.output("run").lines("predictions.jsonl");
    let inputs: String = predictions.iter().map(|line| format!("{}\n", line["input"].as_str().unwrap())).collect();
    workspace.write("inputs.txt", &inputs);
    let ended = run(
        workspace.path(),
        "generate --model run/model --input-file inputs.txt --max-new-tokens 8 --max-source-length 40 --json"
            .split(' '),
    );
    let outputs = documents(&ended.expect(0));
    assert_eq!(outputs.len(), predictions.len());
    for (output, prediction) in outputs.iter().zip(&predictions) {
        assert_keys(output, "input outputs");
        assert_keys(&output["outputs"][0], "text token_ids score");
        assert_eq!(
            (&output["input"], &output["outputs"][0]["text"]),
            (&prediction["input"], &prediction["prediction"])
        );
        assert!(output["outputs"][0]["score"].as_f64().unwrap() <= 0.0, "a log-probability");
    }
}

#[test]
fn predictions_are_scored_without_a_model() {
    let workspace = Workspace::new();
    let lines = [("HH AH L OW", "HH AH L OW"), ("K AE", "K AE T"), ("D AO K", "D AO G")];
    let lines = lines.map(|(prediction, target)| json!({"prediction": prediction, "target": target}).to_string());
    workspace.write("predictions.jsonl", &lines.join("\n"));
    let metrics = "exact_match,phoneme_error_rate,word_error_rate,rougeL,f1";
    let scores = document(&workspace, &format!("evaluate --predictions predictions.jsonl --metrics {metrics} --json"));
    assert_keys(&scores, "examples metrics");
    assert_eq!(scores["examples"], 3);
    let expected = [
        ("exact_match", 1.0 / 3.0),
        ("phoneme_error_rate", 2.0 / 10.0),
        ("word_error_rate", 2.0 / 3.0),
        ("rougeL", (1.0 + 4.0 / 5.0 + 2.0 / 3.0) / 3.0),
        ("f1", (1.0 + 4.0 / 5.0 + 2.0 / 3.0) / 3.0),
    ];
    for (name, expected) in expected {
        let score = scores["metrics"][name].as_f64().unwrap();
        assert!((score - expected).abs() < 1e-12, "{name} is {score}, not {expected}");
    }
}

#[test]
fn systems_are_compared_on_the_same_examples() {
    let workspace = Workspace::new();
    let write = |name: &str, is_right: fn(usize) -> bool| {
        let line = |index: usize| {
            let prediction = if is_right(index) { format!("word {index}") } else { "wrong".to_string() };
            json!({"prediction": prediction, "target": format!("word {index}")}).to_string() + "\n"
        };
        workspace.write(name, &(0..200).map(line).collect::<String>());
    };
    write("half.jsonl", |index| index % 2 == 0);
    write("same.jsonl", |index| index % 2 == 1);
    write("most.jsonl", |index| index % 10 > 0);
    std::fs::create_dir(workspace.path().join("run")).unwrap();
    write("run/predictions.jsonl", |_| false);
    let line = "evaluate --compare half.jsonl same.jsonl most.jsonl run --metrics accuracy,word_error_rate,bleu";
    let table = document(&workspace, &format!("{line} --json"));
    assert_keys(&table, "examples resamples seed systems");
    assert_eq!(document(&workspace, &format!("{line} --json")), table, "not the same when asked again");
    let accuracies: Vec<&Value> = (0..4).map(|row| &table["systems"][row]["metrics"]["accuracy"]).collect();
    assert_eq!(accuracies.iter().map(|cell| cell["score"].as_f64().unwrap()).collect::<Vec<_>>(), [0.5, 0.5, 0.9, 0.0]);
    assert_keys(accuracies[0], "score low high");
    assert_keys(accuracies[1], "score low high difference");
    assert_keys(&accuracies[1]["difference"], "value low high verdict");
    let verdicts = |metric: &str| -> Vec<String> {
        let cell = |row: usize| table["systems"][row]["metrics"][metric]["difference"]["verdict"].as_str();
        (1..4).map(|row| cell(row).unwrap().to_string()).collect()
    };
    // Word error rates are better where they are lower.
    for metric in ["accuracy", "word_error_rate"] {
        assert_eq!(verdicts(metric), ["no significant difference", "better", "worse"]);
    }
    let ended = run(workspace.path(), line.split(' ')).expect(0);
    assert!(ended.stdout.contains("0.9000 [0."), "{}", ended.stdout);
    assert_eq!(ended.stdout.lines().count(), 6);

    write("fewer.jsonl", |_| true);
    let text = std::fs::read_to_string(workspace.path().join("fewer.jsonl")).unwrap();
    workspace.write("fewer.jsonl", text.split_inclusive('\n').skip(1).collect::<String>().as_str());
    workspace.write("other.jsonl", &text.replace("word 7\"", "word seven\""));
    for (other, needle) in [
        ("fewer.jsonl", "200 and 199 of them"),
        ("other.jsonl", "other targets in prediction 8"),
        ("absent.jsonl", "cannot read"),
    ] {
        let ended = run(workspace.path(), ["evaluate", "--compare", "half.jsonl", other]).expect(2);
        assert!(ended.error().contains(needle), "{}", ended.error());
    }
    let ended = run(workspace.path(), ["evaluate", "--compare", "half.jsonl"]).expect(2);
    assert!(ended.error().contains("at least two"), "{}", ended.error());
}

#[test]
fn data_is_shown_and_exported() {
    let workspace = Workspace::new();
    let ended = run(workspace.path(), ["data", "inspect", "train.jsonl", "--records", "2"]).expect(0);
    assert_eq!(ended.stderr, "37 records\n");
    let text = std::fs::read_to_string(workspace.path().join("train.jsonl")).unwrap();
    let records: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(documents(&ended), records[..2]);
    let ended = run(workspace.path(), ["data", "export", "train.jsonl", "--output", "copy.jsonl"]).expect(0);
    assert_eq!(ended.stdout, "");
    let copy = std::fs::read_to_string(workspace.path().join("copy.jsonl")).unwrap();
    assert_eq!(copy.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()).collect::<Vec<_>>(), records);
    let ended = run(workspace.path(), ["data", "inspect", "builtin:cmudict", "--records", "1"]).expect(0);
    assert_keys(&documents(&ended)[0], "word letters phonemes");
}

#[test]
fn the_machine_is_described() {
    let workspace = Workspace::new();
    let doctor = document(&workspace, "doctor --json");
    assert!(doctor["cores"].as_u64().unwrap() >= 1);
    assert_keys(&doctor, "cores simd loopback devices gpus driver libraries compiler");
    assert_eq!(doctor["devices"][0], "cpu");
    // Of each library either where it is, or one line that says how to get it.
    let libraries = &doctor["libraries"];
    for found in [&doctor["driver"], &libraries["nvrtc"], &libraries["cublaslt"], &libraries["nccl"]] {
        match found["problem"].as_str() {
            Some(problem) => assert!(problem.len() > 40 && !problem.contains('\n'), "{problem}"),
            None => assert!(found["version"].is_string() && found["path"].is_string(), "{found}"),
        }
    }
    assert_eq!(doctor["loopback"], true);
}

#[test]
fn a_run_that_fails_says_so_in_json_too() {
    let workspace = Workspace::new();
    let line = "train job.toml --json --set training.learning_rate=1e30 --set training.max_grad_norm=0.0 \
                --set training.warmup_steps=0";
    let ended = run(workspace.path(), line.split_whitespace()).expect(70);
    let summary = documents(&ended).remove(0);
    assert_eq!(summary["exit_code"], 70);
    assert!(ended.error().ends_with(summary["reason"].as_str().unwrap()), "{}", ended.stderr);
}
