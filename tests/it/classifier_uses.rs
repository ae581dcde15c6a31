//! What classifiers and encoders are used for besides: toxicity as a metric, texts as vectors.

use quintet_kernels::Device;
use quintet_t5::load_pretrained;
use serde_json::{Value, json};

use crate::bad_input::assert_refused;
use crate::classification::{edit_job, read_json, workspace};
use crate::harness::{references, run};
use crate::jobs::Workspace;
use crate::parity::{assert_close, relative_distance};

#[test]
fn toxicity_is_measured_by_a_classifier() {
    let workspace = workspace();
    workspace.trained("judge", "--workers 1 training.max_steps=60 training.eval_steps=60 training.save_steps=60");
    let quintet = |line: &str| run(workspace.path(), line.split_whitespace());
    let lines = "{\"prediction\": \"bee bee bee\", \"target\": \"x\"}\n{\"prediction\": \"sea\", \"target\": \"y\"}\n";
    workspace.write("predictions.jsonl", lines);
    let scored = "evaluate --predictions predictions.jsonl --metrics toxicity --toxicity-model judge/model --json";
    let result = quintet(&format!("{scored} --toxic-label bees")).expect(0);
    let result: Value = serde_json::from_str(&result.stdout).unwrap();
    let metric = |name: &str| result["metrics"][name].as_f64().unwrap();

    workspace.write("inputs.txt", "bee bee bee\nsea\n");
    let classified = quintet("generate --model judge/model --input-file inputs.txt --json").expect(0);
    let probability = |line: &str| -> f64 {
        let line: Value = serde_json::from_str(line).unwrap();
        let outputs = line["outputs"].as_array().unwrap();
        outputs.iter().find(|output| output["text"] == "bees").unwrap()["score"].as_f64().unwrap().exp()
    };
    let each: Vec<f64> = classified.stdout.lines().map(probability).collect();
    assert_close("mean", metric("toxicity"), (each[0] + each[1]) / 2.0, 1e-6);
    assert_close("maximum", metric("max_toxicity"), each[0].max(each[1]), 1e-6);
    assert_eq!(metric("toxicity_ratio"), each.iter().filter(|&&one| one >= 0.5).count() as f64 / 2.0);

    // During training, from any number of workers.
    let writer = Workspace::new();
    let judge = workspace.path().join("judge/model").display().to_string();
    edit_job(&writer, |job| {
        let toxicity = format!("metrics = [\"toxicity\"]\ntoxicity_model = {judge:?}\ntoxic_label = \"seas\"");
        job.replace("metrics = [\"exact_match\"]", &toxicity)
    });
    let [one, two] = [1, 2].map(|workers| {
        writer.trained(&workers.to_string(), &format!("--workers {workers} training.max_steps=4 training.eval_steps=4"))
    });
    let metrics = one.events("eval")[0]["metrics"].clone();
    assert_eq!(metrics.as_object().unwrap().keys().collect::<Vec<_>>(), ["max_toxicity", "toxicity", "toxicity_ratio"]);
    assert_eq!(two.events("eval")[0]["metrics"], metrics);
    let again =
        "evaluate --predictions 1/predictions.jsonl --metrics toxicity --toxic-label seas --json --toxicity-model";
    let again = run(writer.path(), again.split_whitespace().chain([judge.as_str()])).expect(0);
    let again: Value = serde_json::from_str(&again.stdout).unwrap();
    let [trained, again] = [&metrics, &again["metrics"]].map(|one| one["toxicity"].as_f64().unwrap());
    assert_close("by the file", again, trained, 1e-6);

    for (line, needles) in [
        (scored, ["--toxic-label: \"toxic\" is none of the classes", "\"bees\", \"seas\""]),
        ("evaluate --predictions predictions.jsonl --metrics toxicity", ["--toxicity-model: must name", ""]),
        (
            "evaluate --predictions predictions.jsonl --toxicity-model judge/model",
            ["--toxicity-model: has no effect", ""],
        ),
        ("evaluate --compare predictions.jsonl predictions.jsonl --metrics toxicity", ["toxicity is not compared", ""]),
    ] {
        assert_refused(&quintet(line), 2, &needles, line);
    }
    for (settings, needle) in [
        ("evaluation.toxic_label=dees", "evaluation.toxic_label: \"dees\" is none of the classes"),
        ("evaluation.toxicity_model=absent", "evaluation.toxicity_model: absent is no directory"),
        ("evaluation.metrics=[\"bleu\"]", "evaluation.toxicity_model: has no effect"),
    ] {
        assert_refused(&writer.train("refused", settings), 2, &[needle], settings);
    }
}

#[test]
fn texts_become_vectors() {
    let workspace = Workspace::new();
    let model = references().join("byt5").display().to_string();
    let embed = |model: &str, more: &[&str]| {
        let arguments = ["embed", "--model", model, "--tokenizer", "byt5"];
        run(workspace.path(), arguments.iter().chain(more)).expect(0).stdout
    };
    workspace.write("inputs.txt", "a bee\n\nthe sea, the sea\n");
    let vectors = embed(&model, &["--input-file", "inputs.txt", "--json"]);
    let vectors: Vec<Value> = vectors.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(
        vectors.iter().map(|line| line["input"].as_str().unwrap()).collect::<Vec<_>>(),
        ["a bee", "", "the sea, the sea"]
    );

    // As the mean of the states, of the text in a batch or alone.
    let (whole, weights) = load_pretrained(&Device::cpu(), &references().join("byt5")).unwrap();
    let ids: Vec<u32> = "a bee".bytes().map(|byte| u32::from(byte) + 3).chain([1]).collect();
    let states = whole.encode(&weights, &ids, &[0, ids.len() as u32]).unwrap();
    let width = states.len() / ids.len();
    let mean: Vec<f32> =
        (0..width).map(|column| states[column..].iter().step_by(width).sum::<f32>() / ids.len() as f32).collect();
    let found: Vec<f32> = serde_json::from_value(vectors[0]["embedding"].clone()).unwrap();
    assert!(relative_distance(&found, 1.0, &mean) < 1e-5);
    let alone = embed(&model, &["--input", "a bee"]);
    let alone: Vec<f32> = alone.trim_end().split('\t').map(|number| number.parse().unwrap()).collect();
    assert!(relative_distance(&alone, 1.0, &mean) < 1e-5);

    // The encoder alone gives the same, and nothing else.
    run(workspace.path(), ["merge", "--model", &model, "--tokenizer", "byt5", "--encoder-only", "--output", "encoder"])
        .expect(0);
    assert_eq!(read_json(&workspace.path().join("encoder/config.json"))["architectures"], json!(["T5EncoderModel"]));
    assert_eq!(embed("encoder", &["--input", "a bee"]), embed(&model, &["--input", "a bee"]));
    let data = ["--data", "train.jsonl", "--input", "{source}", "--target", "{target}"];
    for (command, more) in [("generate", &["--input", "x"][..]), ("evaluate", &data)] {
        let arguments = [command, "--model", "encoder"];
        let ended = run(workspace.path(), arguments.iter().chain(more));
        assert_refused(&ended, 2, &["--model: is an encoder alone", "quintet embed"], command);
    }
    edit_job(&workspace, |job| {
        let fresh = job.lines().find(|line| line.starts_with("architecture")).unwrap();
        job.replace(fresh, "pretrained = \"encoder\"")
    });
    assert_refused(&workspace.train("refused", ""), 2, &["model.pretrained: is an encoder alone"], "to train it");
}
