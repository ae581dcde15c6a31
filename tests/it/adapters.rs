//! LoRA against PEFT's numbers (`tests/references/generate_adapters.py` and, of adapters that were trained here,
//! `generate_trained_adapters.sh` made them), and LoRA jobs as users run them.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use quintet_kernels::{DType, Device};
use quintet_t5::{AdapterFiles, Batch, LoraSpec, LossSums, Model, Parameters, TrainOptions, Weights};
use quintet_t5::{GenerationOptions, Generator, Sources};
use quintet_t5::{adapter_base, load_pretrained, save_adapter, with_adapter};
use quintet_worker::optimizer::{ClippedMean, Hyperparameters, NamedSlot, Optimizer, OptimizerKind};
use rustix::process::Signal;
use safetensors::SafeTensors;
use serde_json::Value;

use crate::harness::{references, run, send_signal};
use crate::jobs::Workspace;
use crate::parity::{assert_close, assert_rounds_as_torch, assert_same_logits};
use crate::parity::{concatenate, cosine, floats, mean, relative_distance};

const NAMES: [&str; 6] = ["t5_v1_0", "t5_v1_1", "t5_v1_1_buckets", "byt5", "mt5", "umt5"];

const PLAIN: TrainOptions =
    TrainOptions { seed: 0, micro_batch: 0, label_smoothing: 0.0, gradient_checkpointing: false, gradient_scale: 1.0 };

/// A stored model with its adapter and a batch.
struct Adapted {
    name: &'static str,
    model: Model,
    base: Parameters,
    files: AdapterFiles,
    adapter: Parameters,
    batch: Batch,
    /// Where the rows of the batch end.
    label_offsets: Vec<u32>,
    expected: Value,
}

fn adapter_directory(name: &str) -> PathBuf {
    references().join(name).join("lora")
}

impl Adapted {
    fn open(name: &'static str) -> Self {
        Self::open_in(&Device::cpu(), name, &adapter_directory(name))
    }

    fn open_in(device: &Device, name: &'static str, adapter_directory: &Path) -> Self {
        let directory = references().join(name);
        let (model, base) = load_pretrained(device, &directory).unwrap();
        let files = AdapterFiles::open(&model, adapter_directory).unwrap();
        let adapter = files.load(device, &fingerprint(&base)).unwrap();
        let json = |path: PathBuf| -> Value { serde_json::from_slice(&fs::read(path).unwrap()).unwrap() };
        let (batch, label_offsets) = batch_of(device, &json(directory.join("batch.json")));
        let expected = json(adapter_directory.join("expected.json"));
        Adapted { name, model, base, files, adapter, batch, label_offsets, expected }
    }

    fn weights(&self) -> Weights<'_> {
        Weights::from(&self.adapter).over(Weights::from(&self.base))
    }

    fn train(&self, options: TrainOptions) -> (LossSums, Parameters) {
        train(&self.model, self.weights(), &self.batch, options)
    }

    fn number(&self, key: &str) -> f64 {
        self.expected[key].as_f64().unwrap()
    }

    /// The logits of the last target token of each row.
    fn last_logits(&self) -> Vec<f32> {
        let logits = self.model.logits(self.weights(), &self.batch).unwrap();
        let rows: Vec<&[f32]> = logits.chunks(self.model.config().vocab_size).collect();
        assert_eq!(rows.len(), self.batch.target_tokens());
        self.label_offsets[1..].iter().map(|&end| rows[end as usize - 1]).collect::<Vec<_>>().concat()
    }
}

/// The batch of these rows, and where those of its labels end.
fn batch_of(device: &Device, rows: &Value) -> (Batch, Vec<u32>) {
    let rows = |key: &str| -> Vec<Vec<u32>> { serde_json::from_value(rows[key].clone()).unwrap() };
    let ((source, source_offsets), (labels, label_offsets)) =
        (concatenate(&rows("source")), concatenate(&rows("labels")));
    (Batch::new(device, &source, &source_offsets, &labels, &label_offsets, 0).unwrap(), label_offsets)
}

fn train(model: &Model, weights: Weights, batch: &Batch, options: TrainOptions) -> (LossSums, Parameters) {
    let mut gradients = weights.zero_gradients().unwrap();
    let sums = model.train(weights, batch, options, &mut gradients).unwrap();
    (sums, gradients)
}

fn fingerprint(base: &Parameters) -> String {
    base.digest().unwrap().to_hex().to_string()
}

fn tensors(path: &Path) -> HashMap<String, Vec<f32>> {
    let bytes = fs::read(path).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    tensors.iter().map(|(name, view)| (name.to_string(), floats(view.data()))).collect()
}

#[test]
fn logits_are_those_of_peft_whoever_trained_the_adapter() {
    for (name, adapter) in NAMES.iter().flat_map(|name| [(name, "lora"), (name, "trained")]) {
        let directory = references().join(name).join(adapter);
        let adapted = Adapted::open_in(&Device::cpu(), name, &directory);
        let want = &tensors(&directory.join("logits.safetensors"))["logits"];
        assert_same_logits(&format!("{name}/{adapter}"), &adapted.last_logits(), want);
        let loss = adapted.model.loss(adapted.weights(), &adapted.batch).unwrap();
        assert_close(name, mean(loss), adapted.number("loss"), 1e-5);
    }
}

#[test]
fn losses_and_every_gradient_are_those_of_peft() {
    for adapted in NAMES.map(Adapted::open) {
        let name = adapted.name;
        let (sums, gradients) = adapted.train(PLAIN);
        assert_close(name, mean(sums), adapted.number("loss"), 1e-5);
        let arena = adapted.adapter.layout();
        assert_eq!(arena.parameter_count() as f64, adapted.number("trainable_parameters"), "{name}");
        let want = tensors(&adapter_directory(name).join("gradients.safetensors"));
        assert_eq!(arena.tensors().len(), want.len(), "{name}");
        let all = gradients.download().unwrap();
        for tensor in arena.tensors() {
            let got = &all[tensor.range.clone()];
            let distance = relative_distance(got, 1.0 / sums.target_tokens as f64, &want[&tensor.name]);
            assert!(distance <= 1e-4, "{name}: {} is off by {distance:e}", tensor.name);
        }
    }
}

#[test]
fn ten_steps_of_adamw_follow_peft() {
    for mut adapted in NAMES.map(Adapted::open) {
        let settings = adapted.expected["adamw"].clone();
        let number = |key: &str| settings[key].as_f64().unwrap();
        let hyperparameters = Hyperparameters {
            beta1: settings["betas"][0].as_f64().unwrap(),
            beta2: settings["betas"][1].as_f64().unwrap(),
            epsilon: number("eps"),
            weight_decay: number("weight_decay"),
        };
        let slots = adapted.adapter.layout().tensors().iter().map(NamedSlot::from).collect();
        let mut optimizer = Optimizer::new(&Device::cpu(), OptimizerKind::AdamW, hyperparameters, slots).unwrap();
        let want = settings["losses"].as_array().unwrap();
        assert_eq!(want.len(), 10);
        for (step, want) in want.iter().enumerate() {
            let (sums, gradients) = adapted.train(PLAIN);
            assert_close(&format!("{}, step {step}", adapted.name), mean(sums), want.as_f64().unwrap(), 1e-4);
            let tokens = sums.target_tokens as f64;
            let clipped = ClippedMean::new(gradients.view(), tokens, number("max_grad_norm")).unwrap();
            optimizer.step(number("lr"), adapted.adapter.view_mut(), gradients.view(), clipped.scale).unwrap();
        }
    }
}

#[test]
fn merged_is_as_unmerged() {
    for adapted in NAMES.map(Adapted::open) {
        let name = adapted.name;
        let (model, merged) = load_pretrained(&Device::cpu(), &references().join(name)).unwrap();
        let (model, merged) = with_adapter(model, merged, &adapter_directory(name)).unwrap();
        assert!(!model.config().tie_word_embeddings, "{name}: a tied head with an adapter is untied");
        let apart = adapted.model.loss(adapted.weights(), &adapted.batch).unwrap();
        let together = model.loss(&merged, &adapted.batch).unwrap();
        assert_close(name, together.loss_sum, apart.loss_sum, 1e-5);
        let (source, offsets) = ([9, 5, 1, 20, 30, 40, 1], [0, 3, 7]);
        let generate = |model, weights| {
            let options = GenerationOptions { max_new_tokens: Some(12), num_beams: Some(2), ..Default::default() };
            let generation = options.resolve(Model::config(model)).unwrap();
            let sources = Sources { ids: &source, offsets: &offsets, numbers: &[0, 1] };
            let outputs = Generator::new(model, weights, generation).generate(sources, &mut |_, _, _| {}).unwrap();
            outputs.into_iter().flatten().map(|output| output.token_ids).collect::<Vec<_>>()
        };
        let together = generate(&model, Weights::from(&merged));
        assert_eq!(generate(&adapted.model, adapted.weights()), together, "{name}");
    }
}

#[test]
fn an_adapter_is_written_as_peft_writes_it() {
    for adapted in NAMES.map(Adapted::open) {
        let (name, directory) = (adapted.name, tempfile::tempdir().unwrap());
        let base = fingerprint(&adapted.base);
        let (model, spec) = (&adapted.model, &adapted.files.spec);
        save_adapter(model, spec, &adapted.adapter, "the/base", &base, directory.path()).unwrap();
        let file = "adapter_model.safetensors";
        let (ours, theirs) = (tensors(&directory.path().join(file)), tensors(&adapter_directory(name).join(file)));
        let theirs: HashMap<String, Vec<f32>> =
            theirs.into_iter().filter(|(name, _)| !name.contains("base_layer")).collect();
        assert!(ours == theirs, "{name}");
        let json = |directory: &Path| -> Value {
            serde_json::from_slice(&fs::read(directory.join("adapter_config.json")).unwrap()).unwrap()
        };
        let (ours, theirs) = (json(directory.path()), json(&adapter_directory(name)));
        for (key, value) in theirs.as_object().unwrap().iter().filter(|(key, _)| *key != "base_model_name_or_path") {
            assert_eq!(&ours[key], value, "{name}: {key}");
        }
        assert_eq!(ours["base_model_name_or_path"], "the/base");
        let again = AdapterFiles::open(model, directory.path()).unwrap();
        assert_eq!(&again.spec, spec, "{name}");
        assert!(again.load(&Device::cpu(), &base).unwrap().download().unwrap() == adapted.adapter.download().unwrap());
    }
}

#[test]
fn an_adapter_that_was_trained_here_is_saved_again_to_the_byte() {
    for name in NAMES {
        let stored = references().join(name).join("trained");
        let adapted = Adapted::open_in(&Device::cpu(), name, &stored);
        let (spec, base) = (&adapted.files.spec, fingerprint(&adapted.base));
        assert_saved_again(&adapted.model, spec, &adapted.adapter, &base, &stored);
    }
}

/// Saves what was loaded from a directory, and compares.
pub(crate) fn assert_saved_again(model: &Model, spec: &LoraSpec, adapter: &Parameters, base: &str, stored: &Path) {
    let saved = tempfile::tempdir().unwrap();
    save_adapter(model, spec, adapter, &adapter_base(stored).unwrap(), base, saved.path()).unwrap();
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        let [before, after] = [stored, saved.path()].map(|directory| fs::read(directory.join(file)).unwrap());
        assert!(before == after, "{}: {file}", stored.display());
    }
}

/// With dropout in the model and before the adapters, where PEFT's masks cannot be had: the slope of the loss along the
/// gradient is the gradient's square.
#[test]
fn gradients_with_dropout_are_slopes_of_the_loss() {
    for name in ["t5_v1_1", "umt5"] {
        let mut adapted = Adapted::open(name);
        let directory = tempfile::tempdir().unwrap();
        let mut spec = adapted.files.spec.clone();
        spec.lora_dropout = 0.3;
        save_adapter(&adapted.model, &spec, &adapted.adapter, "", &fingerprint(&adapted.base), directory.path())
            .unwrap();
        adapted.files = AdapterFiles::open(&adapted.model, directory.path()).unwrap();
        adapted.adapter = adapted.files.load(&Device::cpu(), &fingerprint(&adapted.base)).unwrap();
        adapted.model.set_dropout_rate(0.2);
        let options = TrainOptions { seed: 11, micro_batch: 2, ..PLAIN };
        let (dropped, gradients) = adapted.train(options);
        assert_ne!(dropped.loss_sum, adapted.model.loss(adapted.weights(), &adapted.batch).unwrap().loss_sum);
        let (kept, checkpointed) = adapted.train(TrainOptions { gradient_checkpointing: true, ..options });
        let gradients = gradients.download().unwrap();
        assert_eq!(kept, dropped, "{name}");
        assert!(checkpointed.download().unwrap() == gradients, "{name}: gradient checkpointing changes no bit");
        let weights = adapted.adapter.download().unwrap();
        for tensor in adapted.adapter.layout().clone().tensors() {
            let direction = &gradients[tensor.range.clone()];
            let square: f64 = direction.iter().map(|&d| f64::from(d).powi(2)).sum();
            let step = 1e-3 / square.sqrt();
            let mut loss = |steps: f64| {
                let moved = weights[tensor.range.clone()].iter().zip(direction);
                let moved: Vec<f32> =
                    moved.map(|(&w, &d)| (f64::from(w) + steps * step * f64::from(d)) as f32).collect();
                adapted.adapter.write(tensor.range.clone(), &moved).unwrap();
                adapted.train(options).0.loss_sum
            };
            let slope = (8.0 * (loss(4.0) - loss(-4.0)) - (loss(8.0) - loss(-8.0))) / (48.0 * step);
            assert_close(&format!("{name}: {}", tensor.name), slope, square, 2e-2);
            adapted.adapter.write(tensor.range.clone(), &weights[tensor.range.clone()]).unwrap();
        }
    }
}

#[test]
fn the_emulated_gpu_agrees() {
    if crate::devices::emulator_is_missing() {
        return;
    }
    let device = Device::emulated(3).unwrap();
    for name in ["t5_v1_0", "byt5"] {
        let (here, there) = (Adapted::open(name), Adapted::open_in(&device, name, &adapter_directory(name)));
        let ((sums, gradients), (other_sums, others)) = (here.train(PLAIN), there.train(PLAIN));
        assert_close(name, other_sums.loss_sum, sums.loss_sum, 1e-5);
        let distance = relative_distance(&others.download().unwrap(), 1.0, &gradients.download().unwrap());
        assert!(distance <= 1e-4, "{name}: gradients are {distance:e} apart");
    }
}

#[test]
fn bf16_follows_f32() {
    for adapted in NAMES.map(Adapted::open) {
        let [base, adapter] = [&adapted.base, &adapted.adapter].map(|values| values.to_dtype(DType::Bf16).unwrap());
        let rounded = Weights::from(&adapter).over(Weights::from(&base));
        let peer = &adapted.expected["bf16"];
        let batches = peer["batches"].as_array().unwrap();
        let distances = batches.iter().map(|rows| {
            let (batch, _) = batch_of(&Device::cpu(), rows);
            let (sums, exact) = train(&adapted.model, adapted.weights(), &batch, PLAIN);
            let (rounded_sums, gradients) = train(&adapted.model, rounded, &batch, PLAIN);
            // Random adapters are steeper than trained weights, and relu has kinks.
            assert_close(adapted.name, rounded_sums.loss_sum, sums.loss_sum, 0.02);
            1.0 - cosine(&exact, &gradients)
        });
        let mean = distances.sum::<f64>() / batches.len() as f64;
        assert_rounds_as_torch(adapted.name, mean, peer["distance"].as_f64().unwrap());
    }
}

const LORA: &str =
    "[lora]\nr = 3\nlora_alpha = 6\nlora_dropout = 0.1\ntarget_modules = [\"q\", \"v\", \"wo\", \"lm_head\"]\n";

fn workspace() -> Workspace {
    Workspace::fine_tuning(&references().join("byt5"), LORA)
}

#[test]
fn adapters_are_the_same_for_any_number_of_workers_and_over_resuming() {
    let workspace = workspace();
    let one = workspace.trained("1", "--workers 1");
    one.check_ledger(22);
    let loss = one.column("loss");
    assert!(loss[21] < loss[0], "it learns: from {} to {}", loss[0], loss[21]);
    for (name, arguments) in [("2", "--workers 2"), ("4", "--workers 4 training.gradient_checkpointing=true")] {
        let other = workspace.trained(name, arguments);
        assert_eq!(one.column("grad_norm"), other.column("grad_norm"), "{arguments}");
        assert!(one.weights() == other.weights(), "{arguments}");
    }
    // Back to the middle.
    for gone in ["20", "22"] {
        fs::remove_dir_all(one.path(&format!("checkpoints/step-000000{gone}"))).unwrap();
    }
    let whole = one.weights();
    fs::remove_dir_all(one.path("adapter")).unwrap();
    let resumed = workspace.trained("1", "--workers 3 --resume");
    assert!(resumed.weights() == whole, "resumed after step 15");
    let optimizer = fs::metadata(resumed.path("checkpoints/step-00000022/optimizer.safetensors")).unwrap().len();
    assert!(optimizer < 60_000, "only adapters have moments: {optimizer} bytes");
    assert!(workspace.trained("seed", "training.seed=43").weights() != whole, "the comparison can fail");
}

#[test]
fn an_adapter_survives_the_death_of_a_worker_and_is_handed_to_its_replacement() {
    const LONG: &str = "training.max_steps=120 training.save_steps=10";
    let workspace = workspace();
    let whole = workspace.trained("whole", &format!("--workers 2 {LONG}"));
    let run = workspace.output("run");
    let mut process = workspace.start("run", &format!("--workers 2 {LONG}"));
    assert!(process.wait_for_lines(&run.path("ledger.jsonl"), 15));
    send_signal(process.children()[0], Signal::KILL);
    process.wait_for("1 joined (1 given the state)");
    process.wait().expect(0);
    assert!(run.weights() == whole.weights());
    // What a checkpoint beside the training says of its weights is true of them.
    fs::remove_dir_all(run.path("checkpoints/step-00000120")).unwrap();
    fs::remove_dir_all(run.path("adapter")).unwrap();
    let resumed = workspace.train("run", &format!("--workers 1 --resume {LONG}")).expect(0);
    assert!(resumed.stderr.contains("resuming after step 110\n"), "{}", resumed.stderr);
    assert!(run.weights() == whole.weights(), "resumed");
}

#[test]
fn an_adapter_is_used_merged_and_trained_on() {
    let workspace = workspace();
    let ended = workspace.train("run", "training.max_steps=12 training.eval_steps=12").expect(0);
    assert!(ended.stderr.contains("trainable params: 2,214 || all params: "), "{}", ended.stderr);
    assert!(ended.stdout.contains("adapter: run/adapter"), "{}", ended.stdout);
    let run_output = workspace.output("run");
    assert!(!run_output.path("model").exists());
    let base = references().join("byt5").display().to_string();
    let quintet = |arguments: &str| run(workspace.path(), arguments.split('|')).expect(0).stdout;
    let evaluate = |model: &str| -> Value {
        let data = "--data|validation.jsonl|--input|say: {source}|--target|{target}|--max-new-tokens|8|--json";
        serde_json::from_str(&quintet(&format!("evaluate|--model|{model}|{data}"))).unwrap()
    };
    let named = evaluate("run/adapter");
    assert_close(
        "loss",
        named["loss"].as_f64().unwrap(),
        run_output.events("eval")[0]["eval_loss"].as_f64().unwrap(),
        1e-5,
    );
    assert_eq!(evaluate(&format!("{base}|--adapter|run/adapter")), named);
    quintet("merge|--model|run/adapter|--output|merged");
    assert_eq!(evaluate("merged"), named);
    assert_ne!(evaluate(&format!("{base}|--tokenizer|byt5"))["loss"], named["loss"]);
    let generate =
        |model: &str| quintet(&format!("generate|--model|{model}|--input|say: a bee|--max-new-tokens|6|--json"));
    assert_eq!(generate("run/adapter"), generate("merged"));

    let on = Workspace::fine_tuning(
        &references().join("byt5"),
        &format!("[lora]\npretrained = {:?}\n", run_output.path("adapter").display().to_string()),
    );
    let more = on.trained("run", "training.max_steps=3 training.learning_rate=1e-4");
    let (first, last) = (run_output.column("loss")[0], more.column("loss")[0]);
    assert!(last < first, "it goes on where it was: {last}, from {first}");
}

#[test]
fn a_wrong_adapter_is_refused_with_one_line() {
    let workspace = workspace();
    for (arguments, needles) in [
        ("lora.r=0", vec!["lora.r is 0", "1 to 4096"]),
        ("lora.lora_dropout=1.0", vec!["lora.lora_dropout is 1"]),
        ("lora.lora_alpha=0", vec!["lora.lora_alpha is 0"]),
        (
            "lora.target_modules=[\"query\"]",
            vec!["lora.target_modules", "\"query\"", "k, lm_head, o, q, v, wi_0, wi_1, wo"],
        ),
        ("lora.target_modules=[]", vec!["lora.target_modules", "nothing"]),
        ("lora.target_modules=decoder\\.(", vec!["lora.target_modules", "unclosed group"]),
        ("lora.target_modules=nowhere", vec!["lora.target_modules", "nowhere"]),
        ("lora.modules_to_save=[\"score\"]", vec!["lora.modules_to_save", "\"score\""]),
        ("lora.modules_to_save=[\"k\"]", vec!["lora.modules_to_save", "k cannot be trained whole"]),
        ("lora.modules_to_save=[\"lm_head\"]", vec!["lora.modules_to_save", "lm_head is in target_modules too"]),
        ("lora.pretrained=absent", vec!["lora.r", "lora.pretrained"]),
        ("lora.rank=3", vec!["rank", "lora"]),
    ] {
        let ended = workspace.train("run", arguments);
        assert_eq!(ended.code, Some(2), "{arguments}: {}", ended.stderr);
        let error = ended.error();
        assert!(needles.iter().all(|needle| error.contains(needle)), "{arguments}: {error}");
    }
    let fresh = Workspace::new();
    let ended = fresh.train("run", "lora.r=2");
    assert_eq!((ended.code, ended.error().contains("model.pretrained")), (Some(2), true), "{}", ended.stderr);

    workspace.trained("run", "training.max_steps=2");
    let adapter = workspace.path().join("run/adapter");
    let file = adapter.join("adapter_model.safetensors");
    let refused = |what: &str, base: &str, needles: &[&str]| {
        let base = references().join(base).display().to_string();
        let arguments = ["generate", "--model", &base, "--adapter", "run/adapter", "--input", "a"];
        let ended = run(workspace.path(), arguments);
        assert_eq!(ended.code, Some(2), "{what}: {}", ended.stderr);
        let error = ended.error();
        assert!(needles.iter().all(|needle| error.contains(needle)), "{what}: {error}");
    };
    let whole = fs::read(&file).unwrap();
    let config = fs::read_to_string(adapter.join("adapter_config.json")).unwrap();
    fs::write(&file, &whole[..whole.len() - 5]).unwrap();
    refused("cut short", "byt5", &["adapter_model.safetensors", "not a whole safetensors file"]);
    fs::write(&file, &whole).unwrap();
    fs::write(adapter.join("adapter_config.json"), config.replace("\"r\": 3", "\"r\": 4")).unwrap();
    refused("another rank", "byt5", &["lora_A", "shape [3, ", "[4, "]);
    fs::write(adapter.join("adapter_config.json"), config.replace("\"use_dora\": false", "\"use_dora\": true"))
        .unwrap();
    refused("a variant", "byt5", &["adapter_config.json", "use_dora"]);
    fs::write(adapter.join("adapter_config.json"), config.replace("LORA", "IA3")).unwrap();
    refused("another method", "byt5", &["adapter_config.json", "IA3"]);
    fs::write(adapter.join("adapter_config.json"), "{").unwrap();
    refused("no JSON", "byt5", &["adapter_config.json", "not a LoRA configuration"]);
    fs::write(adapter.join("adapter_config.json"), &config).unwrap();
    fs::remove_file(&file).unwrap();
    refused("no weights", "byt5", &["adapter_model.safetensors", "cannot open"]);
    fs::write(&file, &whole).unwrap();
    // The base of the same shapes, with other weights.
    let other = workspace.path().join("other");
    fs::create_dir(&other).unwrap();
    let (model, mut weights) = load_pretrained(&Device::cpu(), &references().join("byt5")).unwrap();
    weights.write(5..6, &[0.25]).unwrap();
    quintet_t5::save_pretrained(&model, &weights, &other).unwrap();
    refused("another base", &other.display().to_string(), &["adapter of another model", "fingerprint"]);
}
