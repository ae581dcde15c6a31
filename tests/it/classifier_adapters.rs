//! LoRA of classifiers: against PEFT's numbers (`tests/references/generate_classifiers.py` and, of adapters that were
//! trained here, `generate_trained_adapters.sh` made them), and as jobs.

use std::fs;
use std::path::PathBuf;

use quintet_kernels::{DType, Device};
use quintet_t5::{AdapterFiles, Batch, Config, Model, TrainOptions, Weights};
use quintet_t5::{into_classifier, load_pretrained, save_adapter, with_adapter};
use serde_json::{Value, json};

use crate::adapters::assert_saved_again;
use crate::bad_input::assert_refused;
use crate::classification::{classifier_directory, edit_job, read_json, read_tensors, workspace};
use crate::harness::{references, run};
use crate::jobs::Workspace;
use crate::parity::{assert_close, assert_same_logits, concatenate, floats, mean, relative_distance};

const NAMES: [&str; 6] = ["t5_v1_0", "t5_v1_1", "t5_v1_1_buckets", "byt5", "mt5", "umt5"];

fn adapter_directory(name: &str) -> PathBuf {
    references().join(name).join("classifier/lora")
}

/// The batch of a stored classifier.
fn batch(name: &str) -> Batch {
    let labels = read_json(&references().join(name).join("classifier/expected.json"))["labels"].clone();
    batch_of(name, &serde_json::from_value::<Vec<u32>>(labels).unwrap())
}

/// The sources of a stored model's batch, with these labels.
fn batch_of(name: &str, labels: &[u32]) -> Batch {
    let batch = read_json(&references().join(name).join("batch.json"));
    let (ids, offsets) = concatenate(&serde_json::from_value::<Vec<Vec<u32>>>(batch["source"].clone()).unwrap());
    Batch::classification(&Device::cpu(), &ids, &offsets, labels, 0, 1).unwrap()
}

#[test]
fn logits_losses_and_every_gradient_are_those_of_peft() {
    for name in NAMES {
        let expected = read_json(&adapter_directory(name).join("expected.json"));
        let (model, base) = load_pretrained(&Device::cpu(), classifier_directory(name).path()).unwrap();
        let fingerprint = base.digest().unwrap().to_hex().to_string();
        let files = AdapterFiles::open(&model, &adapter_directory(name)).unwrap();
        let adapter = files.load(&Device::cpu(), &fingerprint).unwrap();
        assert_eq!(json!(adapter.layout().parameter_count()), expected["trainable_parameters"], "{name}");
        let weights = Weights::from(&adapter).over(Weights::from(&base));
        let (_, logits) = model.classify(weights, &batch(name)).unwrap();
        let want: Vec<Vec<f32>> = serde_json::from_value(expected["logits"].clone()).unwrap();
        assert_same_logits(&format!("{name}/classifier/lora"), &logits, &want.concat());
        let mut gradients = weights.zero_gradients().unwrap();
        let options = TrainOptions {
            seed: 0,
            micro_batch: 0,
            label_smoothing: 0.0,
            gradient_checkpointing: false,
            gradient_scale: 1.0,
        };
        let sums = model.train(weights, &batch(name), options, &mut gradients).unwrap();
        assert_close(name, mean(sums), expected["loss"].as_f64().unwrap(), 1e-5);
        let want = read_tensors(&adapter_directory(name).join("gradients.safetensors"));
        assert_eq!(adapter.layout().tensors().len(), want.len(), "{name}");
        let all = gradients.download().unwrap();
        for tensor in adapter.layout().tensors() {
            let got = &all[tensor.range.clone()];
            let distance = relative_distance(got, 1.0 / sums.target_tokens as f64, &floats(&want[&tensor.name].1));
            assert!(distance <= 1e-4, "{name}: {} is off by {distance:e}", tensor.name);
        }

        // Written again it is what PEFT wrote, and names its classes besides.
        let saved = tempfile::tempdir().unwrap();
        save_adapter(&model, &files.spec, &adapter, "", &fingerprint, saved.path()).unwrap();
        let [ours, theirs] = [saved.path(), &adapter_directory(name)]
            .map(|directory| read_tensors(&directory.join("adapter_model.safetensors")));
        assert!(ours == theirs, "{name}");
        let [ours, theirs] =
            [saved.path(), &adapter_directory(name)].map(|directory| read_json(&directory.join("adapter_config.json")));
        for key in ["task_type", "modules_to_save", "target_modules", "use_rslora"] {
            assert_eq!(ours[key], theirs[key], "{name}: {key}");
        }

        // Over the model without a head, its own head makes a classifier of it.
        let (bare, weights) = load_pretrained(&Device::cpu(), &references().join(name)).unwrap();
        let (merged, weights) = with_adapter(bare, weights, &adapter_directory(name)).unwrap();
        assert_eq!(Config::labels(merged.config()), ["LABEL_0", "LABEL_1", "LABEL_2"], "{name}");
        let loss = Model::loss(&merged, &weights, &batch(name)).unwrap();
        assert_close(name, loss.loss_sum, sums.loss_sum, 1e-5);
    }
}

#[test]
fn peft_gives_the_same_logits_with_a_classifiers_adapter_that_was_trained_here() {
    for name in NAMES {
        let stored = references().join(name).join("classifier/trained");
        let labels = quintet_t5::adapter_labels(&stored).unwrap().unwrap();
        assert_eq!(labels, ["letter", "word"], "{name}");
        let (model, base) = load_pretrained(&Device::cpu(), &references().join(name)).unwrap();
        let fingerprint = base.digest().unwrap().to_hex().to_string();
        let (model, base) = into_classifier(model, base, &labels, 0).unwrap();
        let files = AdapterFiles::open(&model, &stored).unwrap();
        let adapter = files.load(&Device::cpu(), &fingerprint).unwrap();
        let weights = Weights::from(&adapter).over(Weights::from(&base));
        let (_, logits) = model.classify(weights, &batch_of(name, &[0; 5])).unwrap();
        let want = floats(&read_tensors(&stored.join("logits.safetensors"))["logits"].1);
        assert_same_logits(&format!("{name}/classifier/trained"), &logits, &want);
        assert_saved_again(&model, &files.spec, &adapter, &fingerprint, &stored);
    }
}

/// The tiny job as one that trains an adapter and a head over a stored model.
fn adapting() -> Workspace {
    let workspace = workspace();
    let base = references().join("byt5").display().to_string();
    edit_job(&workspace, |job| {
        let fresh = job.lines().find(|line| line.starts_with("architecture")).unwrap();
        let lora = "[lora]\nr = 3\nlora_alpha = 6\nlora_dropout = 0.1\ntarget_modules = [\"q\", \"v\", \"wo\"]\n";
        format!("{}\n{lora}", job.replace(fresh, &format!("pretrained = {base:?}")))
    });
    workspace
}

#[test]
fn a_classifiers_adapter_is_the_same_for_any_number_of_workers_and_is_used_merged_and_trained_on() {
    let workspace = adapting();
    let one = workspace.trained("1", "--workers 1");
    let other = workspace.trained("2", "--workers 2 training.gradient_checkpointing=true");
    assert!(one.weights() == other.weights(), "not one bit");
    let whole = one.weights();
    for gone in ["20", "22"] {
        fs::remove_dir_all(one.path(&format!("checkpoints/step-000000{gone}"))).unwrap();
    }
    fs::remove_dir_all(one.path("adapter")).unwrap();
    assert!(workspace.trained("1", "--workers 3 --resume").weights() == whole, "resumed after step 15");

    let config = read_json(&one.path("adapter/adapter_config.json"));
    assert_eq!(
        (&config["task_type"], &config["modules_to_save"]),
        (&json!("SEQ_CLS"), &json!(["classification_head"]))
    );
    assert_eq!(quintet_t5::adapter_labels(&one.path("adapter")).unwrap().unwrap(), ["bees", "seas"]);
    let tensors = read_tensors(&one.path("adapter/adapter_model.safetensors"));
    assert!(tensors.contains_key("base_model.model.classification_head.out_proj.bias"));

    let quintet = |arguments: &str| run(workspace.path(), arguments.split('|')).expect(0).stdout;
    let evaluate = |model: &str| -> Value {
        let data = "--data|validation.jsonl|--input|say: {source}|--target|{target}|--json";
        serde_json::from_str(&quintet(&format!("evaluate|--model|{model}|{data}"))).unwrap()
    };
    let named = evaluate("1/adapter");
    let last = one.events("eval").pop().unwrap();
    assert_eq!(named["metrics"]["accuracy"], last["metrics"]["accuracy"]);
    assert_close("loss", named["loss"].as_f64().unwrap(), last["eval_loss"].as_f64().unwrap(), 1e-5);
    quintet("merge|--model|1/adapter|--output|merged");
    assert_eq!(evaluate("merged"), named);
    let classify = |model: &str| quintet(&format!("generate|--model|{model}|--input|say: bee bee|--json"));
    assert_eq!(classify("1/adapter"), classify("merged"));

    // It goes on with its head and its classes.
    edit_job(&workspace, |job| {
        let start = job.find("[lora]").unwrap();
        format!("{}[lora]\npretrained = \"1/adapter\"\n", &job[..start])
    });
    let settings = "training.max_steps=2 training.learning_rate=1e-9 model.dropout_rate=0.0 training.eval_steps=2";
    let further = workspace.trained("further", &format!("--workers 1 {settings}"));
    let again = further.events("eval").pop().unwrap()["eval_loss"].as_f64().unwrap();
    assert_close("loss", again, named["loss"].as_f64().unwrap(), 1e-4);
    let other = "{\"source\": \"a\", \"target\": \"dees\"}\n{\"source\": \"a\", \"target\": \"bees\"}\n";
    workspace.write("other.jsonl", other);
    let needles = ["data.train: example 1 has the class \"dees\"", "\"bees\", \"seas\""];
    assert_refused(&workspace.train("refused", "data.train=other.jsonl"), 2, &needles, "other classes");
}

/// PEFT always names `classifier` and `score` among what it saves, which T5 has not, and by itself not T5's head.
#[test]
fn pefts_adapter_of_a_classifier_is_trained_on_with_or_without_a_head_of_its_own() {
    let (workspace, base) = (workspace(), classifier_directory("byt5"));
    let targets = ["bad", "good", "so-so"].iter().cycle().zip(0..);
    let lines = targets.map(|(target, number)| format!("{{\"source\": \"{number}\", \"target\": {target:?}}}\n"));
    for (file, count) in [("train.jsonl", 37), ("validation.jsonl", 9)] {
        workspace.write(file, &lines.clone().take(count).collect::<String>());
    }
    edit_job(&workspace, |job| {
        let fresh = job.lines().find(|line| line.starts_with("architecture")).unwrap();
        let job = job.replace(fresh, &format!("pretrained = {:?}", base.path().display().to_string()));
        format!("{job}\n[lora]\npretrained = \"peft\"\n")
    });
    let (adapter, stored) = (workspace.path().join("peft"), adapter_directory("byt5"));
    fs::create_dir(&adapter).unwrap();
    let mut config = read_json(&stored.join("adapter_config.json"));
    let mut tensors = read_tensors(&stored.join("adapter_model.safetensors"));
    for run in ["own", "bases"] {
        if run == "bases" {
            config["modules_to_save"] = json!(["classifier", "score"]);
            tensors.retain(|name, _| !name.contains("classification_head"));
        }
        workspace.write("peft/adapter_config.json", &config.to_string());
        crate::classification::write_tensors(&tensors, &adapter.join("adapter_model.safetensors"));
        let further = workspace.trained(run, "training.max_steps=2");
        let saved = read_json(&further.path("adapter/adapter_config.json"));
        assert_eq!(saved["modules_to_save"], config["modules_to_save"], "{run}");
        let saved = read_tensors(&further.path("adapter/adapter_model.safetensors"));
        assert!(saved.len() == tensors.len() && saved.keys().all(|name| tensors.contains_key(name)), "{run}");
    }
}

#[test]
fn an_adapter_that_lost_its_head_is_refused() {
    let (directory, name) = (tempfile::tempdir().unwrap(), "t5_v1_0");
    let (model, weights) = load_pretrained(&Device::cpu(), &references().join(name)).unwrap();
    let config = read_json(&adapter_directory(name).join("adapter_config.json"));
    fs::write(directory.path().join("adapter_config.json"), config.to_string()).unwrap();
    let mut headless = read_tensors(&adapter_directory(name).join("adapter_model.safetensors"));
    headless.retain(|name, _| !name.contains("classification_head"));
    crate::classification::write_tensors(&headless, &directory.path().join("adapter_model.safetensors"));
    let error = with_adapter(model, weights, directory.path()).err().unwrap();
    assert!(
        error.is_user_error() && error.to_string().contains("modules_to_save = [\"classification_head\"]"),
        "{error}"
    );

    // Over a classifier of other classes than those that an adapter was saved with.
    let labels = |names: &[&str]| -> Vec<String> { names.iter().map(|name| (*name).to_string()).collect() };
    let base = || load_pretrained(&Device::cpu(), &references().join(name)).unwrap();
    let classifier = |names: &[&str]| {
        let (model, weights) = base();
        into_classifier(model, weights, &labels(names), 0).unwrap()
    };
    let (model, _) = classifier(&["a", "b", "c"]);
    let files = AdapterFiles::open(&model, &adapter_directory(name)).unwrap();
    let adapter = quintet_t5::Parameters::zeros(&Device::cpu(), files.arena.clone(), DType::F32).unwrap();
    save_adapter(&model, &files.spec, &adapter, "", "", directory.path()).unwrap();
    let error = AdapterFiles::open(&classifier(&["a", "b", "d"]).0, directory.path()).err().unwrap();
    assert!(error.to_string().contains("[\"a\", \"b\", \"c\"] apart"), "{error}");
}
