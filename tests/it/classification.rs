//! Sequence classification and the encoder alone: against the numbers of transformers
//! (`tests/references/generate_classifiers.py` made them), and as users train and use classifiers.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use quintet_kernels::{DType, Device};
use quintet_t5::{Batch, LossSums, Model, ModelClass, Parameters, TrainOptions};
use quintet_t5::{into_classifier, into_encoder, load_pretrained, save_pretrained};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::bad_input::assert_refused;
use crate::harness::{references, run};
use crate::jobs::{RunOutput, Workspace};
use crate::parity::{assert_close, assert_rounds_as_torch, assert_same_logits};
use crate::parity::{concatenate, cosine, floats, global_norm, mean, relative_distance};

const NAMES: [&str; 6] = ["t5_v1_0", "t5_v1_1", "t5_v1_1_buckets", "byt5", "mt5", "umt5"];

const PLAIN: TrainOptions =
    TrainOptions { seed: 0, micro_batch: 0, label_smoothing: 0.0, gradient_checkpointing: false, gradient_scale: 1.0 };

/// A tensor's shape and bytes.
pub(crate) type Tensors = HashMap<String, (Vec<usize>, Vec<u8>)>;

pub(crate) fn read_tensors(path: &Path) -> Tensors {
    let bytes = fs::read(path).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    tensors.iter().map(|(name, view)| (name.to_string(), (view.shape().to_vec(), view.data().to_vec()))).collect()
}

pub(crate) fn write_tensors(tensors: &Tensors, path: &Path) {
    let views: Vec<(&String, TensorView)> = tensors
        .iter()
        .map(|(name, (shape, bytes))| (name, TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap()))
        .collect();
    safetensors::serialize_to_file(views, None, path).unwrap();
}

pub(crate) fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// A directory as `save_pretrained` of transformers writes it: the stored head over the stacks of the stored model.
pub(crate) fn classifier_directory(name: &str) -> TempDir {
    let (directory, base) = (tempfile::tempdir().unwrap(), references().join(name));
    fs::copy(base.join("classifier/config.json"), directory.path().join("config.json")).unwrap();
    let mut tensors = read_tensors(&base.join("classifier/head.safetensors"));
    for (name, tensor) in read_tensors(&base.join("model.safetensors")) {
        if name != "lm_head.weight" {
            tensors.insert(format!("transformer.{name}"), tensor);
        }
    }
    write_tensors(&tensors, &directory.path().join("model.safetensors"));
    directory
}

/// A classifier, its batch, and what is expected of them.
struct Classifier {
    name: &'static str,
    model: Model,
    weights: Parameters,
    source: Vec<Vec<u32>>,
    labels: Vec<u32>,
    expected: Value,
}

impl Classifier {
    fn open(name: &'static str) -> Self {
        Self::open_on(&Device::cpu(), name)
    }

    fn open_on(device: &Device, name: &'static str) -> Self {
        let (model, weights) = load_pretrained(device, classifier_directory(name).path()).unwrap();
        let stored = references().join(name);
        let source = serde_json::from_value(read_json(&stored.join("batch.json"))["source"].clone()).unwrap();
        let expected = read_json(&stored.join("classifier/expected.json"));
        let labels = serde_json::from_value(expected["labels"].clone()).unwrap();
        Classifier { name, model, weights, source, labels, expected }
    }

    fn batch(&self) -> Batch {
        let (ids, offsets) = concatenate(&self.source);
        Batch::classification(self.model.device(), &ids, &offsets, &self.labels, 0, 1).unwrap()
    }

    fn train(&self, weights: &Parameters, options: TrainOptions) -> (LossSums, Parameters) {
        let mut gradients = self.model.zero_parameters(DType::F32).unwrap();
        let sums = self.model.train(weights, &self.batch(), options, &mut gradients).unwrap();
        (sums, gradients)
    }

    /// Logits, loss and every gradient.
    fn check(&self) {
        let name = self.name;
        let (sums, logits) = self.model.classify(&self.weights, &self.batch()).unwrap();
        assert_eq!(sums.target_tokens, self.labels.len() as u64, "{name}: an example is a target");
        assert_close(name, mean(sums), self.expected["loss"].as_f64().unwrap(), 1e-5);
        let want: Vec<Vec<f32>> = serde_json::from_value(self.expected["logits"].clone()).unwrap();
        assert_same_logits(name, &logits, &want.concat());

        let (trained, gradients) = self.train(&self.weights, PLAIN);
        assert_close(name, trained.loss_sum, sums.loss_sum, 1e-6);
        let want = read_tensors(&references().join(name).join("classifier/gradients.safetensors"));
        assert_eq!(self.model.layout().tensors().len(), want.len(), "{name}");
        let (scale, all) = (1.0 / sums.target_tokens as f64, gradients.download().unwrap());
        for tensor in self.model.layout().tensors() {
            let distance = relative_distance(&all[tensor.range.clone()], scale, &floats(&want[&tensor.name].1));
            assert!(distance <= 1e-4, "{name}: {} is off by {distance:e}", tensor.name);
        }
        assert_close(name, global_norm(&gradients) * scale, self.expected["grad_norm"].as_f64().unwrap(), 1e-5);
    }
}

#[test]
fn logits_losses_and_every_gradient_are_those_of_hugging_face() {
    NAMES.map(Classifier::open).iter().for_each(Classifier::check);
}

#[test]
fn the_emulated_gpu_agrees() {
    if crate::devices::emulator_is_missing() {
        return;
    }
    let device = Device::emulated(3).unwrap();
    for name in ["t5_v1_0", "umt5"] {
        Classifier::open_on(&device, name).check();
    }
}

#[test]
fn an_example_alone_has_the_logits_that_it_has_in_a_batch() {
    let classifier = Classifier::open("t5_v1_1");
    let (_, together) = classifier.model.classify(&classifier.weights, &classifier.batch()).unwrap();
    for (index, together) in together.chunks(3).enumerate() {
        let ids = &classifier.source[index];
        let offsets = [0, ids.len() as u32];
        let batch = Batch::classification(&Device::cpu(), ids, &offsets, &[0], 0, 1).unwrap();
        let (_, alone) = classifier.model.classify(&classifier.weights, &batch).unwrap();
        assert!(relative_distance(&alone, 1.0, together) < 1e-5, "example {index}");
    }
}

#[test]
fn bf16_follows_f32() {
    for mut classifier in NAMES.map(Classifier::open) {
        let rounded = classifier.weights.to_dtype(DType::Bf16).unwrap();
        let peer = classifier.expected["bf16"].clone();
        let batches = peer["batches"].as_array().unwrap();
        let distances = batches.iter().map(|batch| {
            classifier.source = serde_json::from_value(batch["source"].clone()).unwrap();
            classifier.labels = serde_json::from_value(batch["labels"].clone()).unwrap();
            let (sums, exact) = classifier.train(&classifier.weights, PLAIN);
            let (rounded_sums, gradients) = classifier.train(&rounded, PLAIN);
            assert_close(classifier.name, rounded_sums.loss_sum, sums.loss_sum, 0.03);
            1.0 - cosine(&exact, &gradients)
        });
        let mean = distances.sum::<f64>() / batches.len() as f64;
        assert_rounds_as_torch(classifier.name, mean, peer["distance"].as_f64().unwrap());
    }
}

/// With dropout everywhere, where torch's masks cannot be had: the slope of the loss along the gradient is the gradient's
/// square. And gradient checkpointing changes no bit, and what is told to be finished is.
#[test]
fn gradients_with_dropout_are_slopes_of_the_loss() {
    let directory = classifier_directory("t5_v1_1");
    let path = directory.path().join("config.json");
    let mut config = read_json(&path);
    (config["classifier_dropout"], config["dropout_rate"]) = (json!(0.3), json!(0.2));
    fs::write(&path, config.to_string()).unwrap();
    let mut classifier = Classifier::open("t5_v1_1");
    (classifier.model, classifier.weights) = load_pretrained(&Device::cpu(), directory.path()).unwrap();
    let options = TrainOptions { seed: 5, micro_batch: 3, ..PLAIN };
    let (dropped, gradients) = classifier.train(&classifier.weights, options);
    let kept = classifier.model.loss(&classifier.weights, &classifier.batch()).unwrap();
    assert_ne!(dropped.loss_sum, kept.loss_sum);
    let gradients = gradients.download().unwrap();
    let checkpointed = classifier.train(&classifier.weights, TrainOptions { gradient_checkpointing: true, ..options });
    assert!(checkpointed.1.download().unwrap() == gradients);

    let weights = classifier.weights.download().unwrap();
    let mut moved = classifier.model.zero_parameters(DType::F32).unwrap();
    for tensor in classifier.model.layout().tensors().iter().filter(|one| one.name.starts_with("classification_head")) {
        let direction = &gradients[tensor.range.clone()];
        let square: f64 = direction.iter().map(|&d| f64::from(d).powi(2)).sum();
        let step = 1e-2 / square.sqrt();
        let mut loss = |steps: f64| {
            let mut values = weights.clone();
            for (value, &d) in values[tensor.range.clone()].iter_mut().zip(direction) {
                *value = (f64::from(*value) + steps * step * f64::from(d)) as f32;
            }
            moved.write(0..values.len(), &values).unwrap();
            classifier.train(&moved, options).0.loss_sum
        };
        let slope = (8.0 * (loss(1.0) - loss(-1.0)) - (loss(2.0) - loss(-2.0))) / (12.0 * step);
        assert_close(&tensor.name, slope, square, 1e-2);
    }

    let mut seen: Vec<(usize, Vec<f32>)> = Vec::new();
    let mut arena = classifier.model.zero_parameters(DType::F32).unwrap();
    let mut observe = |gradients: &mut Parameters, start: usize| {
        seen.push((start, gradients.download().unwrap().split_off(start)));
    };
    classifier
        .model
        .train_observed(&classifier.weights, &classifier.batch(), options, &mut arena, &mut observe)
        .unwrap();
    let head = classifier.model.layout().tensors().iter().find(|one| one.name == "classification_head.dense.weight");
    assert_eq!(seen[0].0, head.unwrap().range.start, "the head is finished first");
    assert!(seen.iter().all(|(start, part)| gradients[*start..] == *part));
}

#[test]
fn saving_and_loading_changes_no_bit() {
    for classifier in NAMES.map(Classifier::open) {
        let (name, saved) = (classifier.name, tempfile::tempdir().unwrap());
        save_pretrained(&classifier.model, &classifier.weights, saved.path()).unwrap();
        let original = classifier_directory(name);
        let [before, after] = [&original, &saved].map(|one| read_tensors(&one.path().join("model.safetensors")));
        assert!(before == after, "{name}: tensors");
        let [before, after] = [&original, &saved].map(|one| read_json(&one.path().join("config.json")));
        for (key, value) in before.as_object().unwrap().iter().filter(|(key, _)| *key != "dtype") {
            assert_eq!(&after[key], value, "{name}: {key}");
        }
        assert!(!saved.path().join("generation_config.json").exists(), "{name}");
    }
}

#[test]
fn a_head_is_put_on_a_pretrained_model() {
    let labels = ["no", "perhaps", "yes"].map(str::to_string);
    for name in NAMES {
        let base = || load_pretrained(&Device::cpu(), &references().join(name)).unwrap();
        let (model, weights) = base();
        let (classifier, fresh) = into_classifier(model, weights, &labels, 7).unwrap();
        let config = classifier.config();
        assert_eq!((config.class(), config.labels()), (ModelClass::SequenceClassification, labels.to_vec()), "{name}");
        let (model, weights) = base();
        let (_, again) = into_classifier(model, weights, &labels, 7).unwrap();
        assert!(fresh.download().unwrap() == again.download().unwrap(), "{name}: a head of its seed");
        let (all, stored) =
            (fresh.download().unwrap(), read_tensors(&references().join(name).join("model.safetensors")));
        for tensor in classifier.layout().tensors() {
            let values = &all[tensor.range.clone()];
            match tensor.name.strip_prefix("transformer.") {
                Some(name) => assert!(values == floats(&stored[name].1), "{name}"),
                None if tensor.name.ends_with("bias") => assert!(values.iter().all(|&bias| bias == 0.0)),
                None => assert!(values.iter().all(|&weight| weight != 0.0)),
            }
        }
        // With other classes it is another model.
        assert!(into_classifier(classifier, fresh, &labels[1..], 7).err().unwrap().to_string().contains("perhaps"));
    }
}

#[test]
fn the_encoder_alone_gives_the_hidden_states_of_hugging_face() {
    for name in NAMES {
        let stored = references().join(name);
        let source: Vec<Vec<u32>> =
            serde_json::from_value(read_json(&stored.join("batch.json"))["source"].clone()).unwrap();
        let (ids, offsets) = concatenate(&source);
        let want = floats(&read_tensors(&stored.join("encoder.safetensors"))["last_hidden_state"].1);
        let (model, weights) = load_pretrained(&Device::cpu(), &stored).unwrap();
        let whole = model.encode(&weights, &ids, &offsets).unwrap();
        assert!(relative_distance(&whole, 1.0, &want) < 1e-5, "{name}");

        let (encoder, weights) = into_encoder(model, weights).unwrap();
        assert!(
            encoder
                .layout()
                .tensors()
                .iter()
                .all(|one| one.name == "shared.weight" || one.name.starts_with("encoder."))
        );
        let saved = tempfile::tempdir().unwrap();
        save_pretrained(&encoder, &weights, saved.path()).unwrap();
        assert_eq!(read_json(&saved.path().join("config.json"))["is_encoder_decoder"], false, "{name}");
        let (encoder, weights) = load_pretrained(&Device::cpu(), saved.path()).unwrap();
        assert_eq!(encoder.config().class(), ModelClass::Encoder, "{name}");
        assert!(encoder.encode(&weights, &ids, &offsets).unwrap() == whole, "{name}: saved alone");

        // The encoder of a classifier is the same.
        let (classifier, weights) = load_pretrained(&Device::cpu(), classifier_directory(name).path()).unwrap();
        let (encoder, weights) = into_encoder(classifier, weights).unwrap();
        assert!(encoder.encode(&weights, &ids, &offsets).unwrap() == whole, "{name}: of a classifier");
    }
}

/// Whether a text has more of one letter than of another, with ragged lengths.
fn examples(count: usize, salt: usize) -> String {
    let word = |index: usize| if (index * 7 + salt * 3 + index * index / 5).is_multiple_of(2) { "bee" } else { "sea" };
    let line = |index: usize| {
        let text: Vec<&str> = (0..1 + index % 7).map(|place| word(index * 3 + place * place)).collect();
        let bees = text.iter().filter(|&&word| word == "bee").count();
        let target = if 2 * bees > text.len() { "bees" } else { "seas" };
        format!("{}\n", json!({"source": text.join(" "), "target": target}))
    };
    (0..count).map(line).collect()
}

/// The tiny job as one of classification.
pub(crate) fn workspace() -> Workspace {
    let workspace = Workspace::new();
    edit_job(&workspace, |job| {
        job.replace("dropout_rate = 0.1", "dropout_rate = 0.1\ntask = \"sequence_classification\"")
            .replace("metrics = [\"exact_match\"]\nmax_new_tokens = 8", "metrics = [\"accuracy\", \"macro_f1\"]")
    });
    workspace.write("train.jsonl", &examples(37, 1));
    workspace.write("validation.jsonl", &examples(9, 2));
    workspace
}

pub(crate) fn edit_job(workspace: &Workspace, change: impl FnOnce(&str) -> String) {
    let job = fs::read_to_string(workspace.path().join("job.toml")).unwrap();
    workspace.write("job.toml", &change(&job));
}

fn metric(run: &RunOutput, name: &str) -> f64 {
    run.events("eval").last().unwrap()["metrics"][name].as_f64().unwrap()
}

#[test]
fn a_classifier_is_the_same_for_any_number_of_workers_and_over_resuming() {
    let workspace = workspace();
    let one = workspace.trained("1", "--workers 1");
    one.check_ledger(22);
    for (name, arguments) in [("2", "--workers 2"), ("3", "--workers 3 training.gradient_checkpointing=true")] {
        let other = workspace.trained(name, arguments);
        assert_eq!(one.column("grad_norm"), other.column("grad_norm"), "{arguments}");
        assert_eq!(one.lines("predictions.jsonl"), other.lines("predictions.jsonl"), "{arguments}");
        assert!(one.weights() == other.weights(), "{arguments}");
    }
    let examples = one.column("examples");
    assert_eq!(one.column("target_tokens"), examples, "an example is one target");
    let whole = one.weights();
    for gone in ["20", "22"] {
        fs::remove_dir_all(one.path(&format!("checkpoints/step-000000{gone}"))).unwrap();
    }
    fs::remove_dir_all(one.path("model")).unwrap();
    assert!(workspace.trained("1", "--workers 2 --resume").weights() == whole, "resumed after step 15");
    assert!(workspace.trained("seed", "training.seed=43").weights() != whole, "the comparison can fail");
}

#[test]
fn a_classifier_learns_and_is_used() {
    let workspace = workspace();
    let settings = "training.max_steps=120 training.eval_steps=20 training.save_steps=20 training.save_total_limit=2 \
                    model.dropout_rate=0.0 training.load_best_model_at_end=true training.metric_for_best_model=accuracy";
    let run_of = workspace.trained("run", &format!("--workers 2 {settings}"));
    let losses = run_of.column("loss");
    assert!(losses[119] < 0.5 * losses[0], "it learns: from {} to {}", losses[0], losses[119]);
    let best =
        run_of.events("eval").iter().map(|event| event["metrics"]["accuracy"].as_f64().unwrap()).fold(0.0, f64::max);
    for line in run_of.lines("predictions.jsonl") {
        assert!(["bees", "seas"].contains(&line["prediction"].as_str().unwrap()), "{line}");
    }
    let config = read_json(&run_of.path("model/config.json"));
    assert_eq!(config["architectures"], json!(["T5ForSequenceClassification"]));
    assert_eq!(config["id2label"], json!({"0": "bees", "1": "seas"}));
    assert_eq!(config["label2id"], json!({"bees": 0, "seas": 1}));

    let quintet = |line: &str| run(workspace.path(), line.split_whitespace());
    let arguments = ["evaluate", "--model", "run/model", "--data", "validation.jsonl", "--input", "say: {source}"];
    let evaluated = run(workspace.path(), arguments.iter().chain(&["--target", "{target}", "--json"])).expect(0);
    let evaluated: Value = serde_json::from_str(&evaluated.stdout).unwrap();
    assert_eq!(evaluated["metrics"]["accuracy"], best, "the best model is the one that is saved");
    assert_eq!((&evaluated["examples"], &evaluated["target_tokens"]), (&json!(9), &json!(9)));

    workspace.write("inputs.txt", "say: bee bee bee\nsay: sea sea\n");
    let generated = quintet("generate --model run/model --input-file inputs.txt").expect(0);
    assert_eq!(generated.stdout, "bees\nseas\n");
    let generated = quintet("generate --model run/model --input-file inputs.txt --json --batch-size 1").expect(0);
    for (line, best) in generated.stdout.lines().zip(["bees", "seas"]) {
        let line: Value = serde_json::from_str(line).unwrap();
        let outputs = line["outputs"].as_array().unwrap();
        assert_eq!(outputs[0]["text"], best);
        let sum: f64 = outputs.iter().map(|output| output["score"].as_f64().unwrap().exp()).sum();
        assert!((sum - 1.0).abs() < 1e-9 && outputs.len() == 2, "{line}");
    }

    // It is trained further from its own head.
    edit_job(&workspace, |job| {
        let fresh = job.lines().find(|line| line.starts_with("architecture")).unwrap();
        job.replace(fresh, "pretrained = \"run/model\"")
    });
    let settings = "training.max_steps=1 training.eval_steps=1 training.warmup_steps=0 training.learning_rate=1e-9";
    let further = workspace.trained("further", &format!("--workers 1 {settings}"));
    let loss = further.events("eval")[0]["eval_loss"].as_f64().unwrap();
    assert_close("loss", loss, evaluated["loss"].as_f64().unwrap(), 1e-4);
    assert!(metric(&further, "macro_f1") > 0.0);
    for (line, needles) in [
        ("generate --model run/model --input x --num-beams 2", ["--num-beams: ", "classifier"]),
        ("generate --model run/model --input x --candidates y", ["--candidates: ", "classifier"]),
        (
            "evaluate --model run/model --data train.jsonl --input {source} --target {source}",
            ["--target: example 1", "\"bees\""],
        ),
        (
            "evaluate --model run/model --data train.jsonl --input {source} --target {target} --metrics bleu",
            ["--metrics: bleu", "macro_f1"],
        ),
        ("bench step --model run/model", ["--model run/model", "no model that generates"]),
    ] {
        assert_refused(&quintet(line), 2, &needles, line);
    }
}

#[test]
fn what_cannot_be_classified_is_refused() {
    let workspace = workspace();
    let refused =
        |settings: &str, needles: &[&str]| assert_refused(&workspace.train("refused", settings), 2, needles, settings);
    workspace.write("other.jsonl", "{\"source\": \"a\", \"target\": \"dees\"}\n");
    refused(
        "data.validation=other.jsonl",
        &["data.validation: example 1 has the class \"dees\"", "\"bees\", \"seas\""],
    );
    refused("data.train=other.jsonl", &["data.target: is \"dees\" in every example"]);
    refused("evaluation.metrics=[\"rouge1\"]", &["evaluation.metrics: rouge1 does not fit a classifier", "accuracy"]);
    refused("evaluation.num_beams=4", &["evaluation.num_beams: ", "remove this"]);
    refused("data.objective=span_corruption data.target=\"\"", &["data.objective: ", "classes"]);
    refused("model.task=seq2sec", &["seq2sec"]);
    let classifier = classifier_directory("byt5");
    let pretrained = format!("pretrained = {:?}", classifier.path().display().to_string());
    edit_job(&workspace, |job| {
        let fresh = job.lines().find(|line| line.starts_with("architecture")).unwrap();
        job.replace(fresh, &pretrained)
    });
    refused("", &["data.train: example 1 has the class", "\"bad\", \"good\", \"so-so\""]);
    refused("model.task=seq2seq evaluation.metrics=[\"loss\"]", &["model.pretrained: is a classifier", "model.task"]);
    let path: PathBuf = classifier.path().join("config.json");
    for (key, value, needles) in [
        ("problem_type", json!("regression"), ["config.json: problem_type = \"regression\" is not supported", ""]),
        ("id2label", json!({"0": "bad", "2": "good"}), ["config.json: id2label has 2 names, but none for class 1", ""]),
        ("id2label", json!({"0": "bad"}), ["config.json: a classifier of 1 classes", "2 to "]),
        ("id2label", json!({"0": "bees", "1": "seas"}), ["out_proj.weight: shape [3, 10]", "[2, 10]"]),
        ("classifier_dropout", json!(1.0), ["config.json: classifier_dropout = 1 is out of range", ""]),
    ] {
        let original = read_json(&path);
        let mut config = original.clone();
        config[key] = value;
        fs::write(&path, config.to_string()).unwrap();
        refused("--workers 1", &needles);
        fs::write(&path, original.to_string()).unwrap();
    }
}
