//! The model against the numbers that Hugging Face's gave for the same files: losses, gradients, optimizer trajectories
//! and greedy outputs of every family, in f32 and without dropout. `tests/references/generate.py` made the numbers.

use std::collections::HashMap;
use std::fs;
use std::ops::Range;

use quintet_kernels::{DType, Device, ops};
use quintet_t5::{Batch, LossSums, Model, Parameters, TrainOptions, load_pretrained, save_pretrained};
use quintet_t5::{Generated, GenerationOptions, Generator, Sources};
use quintet_worker::optimizer::{ClippedMean, Hyperparameters, NamedSlot, Optimizer, OptimizerKind};
use safetensors::SafeTensors;
use serde_json::Value;

use crate::harness::references;

/// Every family, and the first v1.1 model once more in several files.
const NAMES: [&str; 7] = ["t5_v1_0", "t5_v1_1", "t5_v1_1_buckets", "byt5", "mt5", "umt5", "sharded"];

/// A stored model, its batch, and what is expected of them.
pub(crate) struct Reference {
    pub(crate) name: &'static str,
    pub(crate) model: Model,
    pub(crate) weights: Parameters,
    pub(crate) source: Vec<Vec<u32>>,
    pub(crate) labels: Vec<Vec<u32>>,
    pub(crate) expected: Value,
    /// d mean loss / d parameter.
    gradients: HashMap<String, Vec<f32>>,
}

const PLAIN: TrainOptions =
    TrainOptions { seed: 0, micro_batch: 0, label_smoothing: 0.0, gradient_checkpointing: false, gradient_scale: 1.0 };

impl Reference {
    pub(crate) fn open(name: &'static str) -> Self {
        Self::open_on(&Device::cpu(), name)
    }

    pub(crate) fn open_on(device: &Device, name: &'static str) -> Self {
        let numbers = references().join(if name == "sharded" { "t5_v1_1" } else { name });
        let (model, weights) = load_pretrained(device, &references().join(name)).unwrap();
        assert_eq!(model.config().dropout_rate, 0.0);
        let json = |file| -> Value { serde_json::from_slice(&fs::read(numbers.join(file)).unwrap()).unwrap() };
        let batch = json("batch.json");
        let rows = |key| -> Vec<Vec<u32>> { serde_json::from_value(batch[key].clone()).unwrap() };
        let bytes = fs::read(numbers.join("gradients.safetensors")).unwrap();
        let gradients = SafeTensors::deserialize(&bytes).unwrap();
        let gradients = gradients.iter().map(|(name, view)| (name.to_string(), floats(view.data()))).collect();
        let (source, labels) = (rows("source"), rows("labels"));
        Reference { name, model, weights, source, labels, expected: json("expected.json"), gradients }
    }

    /// Some of the rows.
    pub(crate) fn rows(&self, rows: Range<usize>) -> Batch {
        let (source, source_offsets) = concatenate(&self.source[rows.clone()]);
        let (labels, label_offsets) = concatenate(&self.labels[rows]);
        let start = self.model.config().decoder_start_token_id;
        Batch::new(self.model.device(), &source, &source_offsets, &labels, &label_offsets, start).unwrap()
    }

    fn batch(&self) -> Batch {
        self.rows(0..self.source.len())
    }

    /// The loss of a batch, and the gradient of its sum.
    fn train(&self, weights: &Parameters, batch: &Batch, options: TrainOptions) -> (LossSums, Parameters) {
        let mut gradients = self.model.zero_parameters(DType::F32).unwrap();
        let sums = self.model.train(weights, batch, options, &mut gradients).unwrap();
        (sums, gradients)
    }

    fn greedy_tokens(&self) -> Option<usize> {
        self.expected["greedy"]["max_new_tokens"].as_u64().map(|most| most as usize)
    }

    pub(crate) fn generate(&self, sources: &[Vec<u32>], options: GenerationOptions) -> Vec<Vec<Generated>> {
        let numbers: Vec<u64> = (0..sources.len() as u64).collect();
        self.generate_numbered(sources, &numbers, options)
    }

    /// As [`Reference::generate`], for the inputs of these numbers.
    pub(crate) fn generate_numbered(
        &self,
        sources: &[Vec<u32>],
        numbers: &[u64],
        options: GenerationOptions,
    ) -> Vec<Vec<Generated>> {
        let generation = options.resolve(self.model.config()).unwrap();
        let (ids, offsets) = concatenate(sources);
        let sources = Sources { ids: &ids, offsets: &offsets, numbers };
        Generator::new(&self.model, &self.weights, generation).generate(sources, &mut |_, _, _| {}).unwrap()
    }

    fn number(&self, key: &str) -> f64 {
        self.expected[key].as_f64().unwrap()
    }

    /// The losses of the first steps, each before its update.
    fn trajectory(&self, kind: OptimizerKind, steps: usize) -> Vec<f64> {
        let settings = &self.expected[optimizer_name(kind)];
        let number = |key: &str| settings[key].as_f64().unwrap();
        let betas = &settings["betas"];
        let hyperparameters = Hyperparameters {
            beta1: betas[0].as_f64().unwrap_or_default(),
            beta2: betas[1].as_f64().unwrap_or_default(),
            epsilon: settings["eps"].as_f64().unwrap_or_default(),
            weight_decay: number("weight_decay"),
        };
        let mut optimizer = Optimizer::new(self.model.device(), kind, hyperparameters, self.slots()).unwrap();
        let mut weights = self.copy_of_weights();
        let batch = self.batch();
        let step = |_| {
            let (sums, gradients) = self.train(&weights, &batch, PLAIN);
            let max_norm = settings["max_grad_norm"].as_f64().unwrap_or(0.0);
            let clipped = ClippedMean::new(gradients.view(), sums.target_tokens as f64, max_norm).unwrap();
            optimizer.step(number("lr"), weights.view_mut(), gradients.view(), clipped.scale).unwrap();
            mean(sums)
        };
        (0..steps).map(step).collect()
    }

    /// As torch's plain optimizers see the parameters: all of them decay.
    fn slots(&self) -> Vec<NamedSlot> {
        let mut slots: Vec<NamedSlot> = self.model.layout().tensors().iter().map(NamedSlot::from).collect();
        slots.iter_mut().for_each(|tensor| tensor.slot.decays = true);
        slots
    }

    fn copy_of_weights(&self) -> Parameters {
        let mut copy = self.model.zero_parameters(DType::F32).unwrap();
        ops::cast(self.weights.view(), copy.view_mut()).unwrap();
        copy
    }
}

pub(crate) fn optimizer_name(kind: OptimizerKind) -> String {
    serde_json::to_value(kind).unwrap().as_str().unwrap().to_string()
}

pub(crate) fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()
}

pub(crate) fn concatenate(rows: &[Vec<u32>]) -> (Vec<u32>, Vec<u32>) {
    let mut offsets = vec![0];
    for row in rows {
        offsets.push(offsets[offsets.len() - 1] + row.len() as u32);
    }
    (rows.concat(), offsets)
}

pub(crate) fn mean(sums: LossSums) -> f64 {
    sums.loss_sum / sums.target_tokens as f64
}

fn norm(values: impl IntoIterator<Item = f64>) -> f64 {
    values.into_iter().map(|value| value * value).sum::<f64>().sqrt()
}

pub(crate) fn global_norm(arena: &Parameters) -> f64 {
    ops::global_norm(arena.view()).unwrap()
}

/// Of the angle between two gradients.
pub(crate) fn cosine(a: &Parameters, b: &Parameters) -> f64 {
    let pairs = a.download().unwrap().into_iter().zip(b.download().unwrap());
    pairs.map(|(a, b)| f64::from(a) * f64::from(b)).sum::<f64>() / (global_norm(a) * global_norm(b))
}

/// Whether gradients in bf16 lie as near to those in f32 as torch's own do, by 1 − cosine. A quarter more is allowed, because
/// both are roundings of one gradient that fall differently.
#[track_caller]
pub(crate) fn assert_rounds_as_torch(what: &str, distance: f64, peer: f64) {
    eprintln!("{what}: bf16 is {distance:.2e} from f32; torch: {peer:.2e}");
    assert!(distance <= 1.25 * peer, "{what}: bf16 is {distance:e} from f32; torch: {peer:e}");
}

/// Whether logits are those of a reference: none further off than 1e-5 of the largest, which is some tens of f32's
/// roundings, as many as lie one behind the other in a pass.
#[track_caller]
pub(crate) fn assert_same_logits(what: &str, got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len(), "{what}");
    assert!(got.iter().all(|logit| logit.is_finite()), "{what}");
    let largest = |values: Vec<f32>| values.into_iter().fold(0.0_f32, |most, value| most.max(value.abs()));
    let off = largest(got.iter().zip(want).map(|(got, want)| got - want).collect());
    let most = largest(want.to_vec());
    eprintln!("{what}: logits up to {most:.3}, {off:.1e} apart at most");
    assert!(off <= 1e-5 * most, "{what}: logits up to {most} are off by {off:e}");
}

/// ‖got·scale − want‖ / ‖want‖
pub(crate) fn relative_distance(got: &[f32], scale: f64, want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len());
    let pairs = got.iter().zip(want);
    norm(pairs.map(|(&got, &want)| f64::from(got) * scale - f64::from(want))) / norm(want.iter().map(|&w| f64::from(w)))
}

#[track_caller]
pub(crate) fn assert_close(what: &str, got: f64, want: f64, tolerance: f64) {
    assert!((got - want).abs() <= tolerance * want.abs(), "{what}: {got}, expected {want} within {tolerance} relative");
}

#[test]
fn losses_are_those_of_hugging_face() {
    for reference in NAMES.map(Reference::open) {
        let name = reference.name;
        let sums = reference.model.loss(&reference.weights, &reference.batch()).unwrap();
        assert_eq!(sums.target_tokens as f64, reference.number("target_tokens"), "{name}");
        assert_close(name, mean(sums), reference.number("loss"), 1e-5);
        for (row, want) in reference.expected["row_loss_sums"].as_array().unwrap().iter().enumerate() {
            let sums = reference.model.loss(&reference.weights, &reference.rows(row..row + 1)).unwrap();
            assert_close(&format!("{name}, row {row}"), sums.loss_sum, want.as_f64().unwrap(), 1e-5);
        }
    }
}

#[test]
fn every_gradient_is_that_of_hugging_face() {
    for reference in NAMES.map(Reference::open) {
        let name = reference.name;
        let (sums, gradients) = reference.train(&reference.weights, &reference.batch(), PLAIN);
        assert_close(name, mean(sums), reference.number("loss"), 1e-5);
        let scale = 1.0 / sums.target_tokens as f64;
        let tensors = reference.model.layout().tensors();
        assert_eq!(tensors.len(), reference.gradients.len(), "{name}");
        let all = gradients.download().unwrap();
        for tensor in tensors {
            let got = &all[tensor.range.clone()];
            let distance = relative_distance(got, scale, &reference.gradients[&tensor.name]);
            assert!(distance <= 1e-4, "{name}: {} is off by {distance:e}", tensor.name);
        }
        let grad_norm = global_norm(&gradients) * scale;
        assert_close(name, grad_norm, reference.number("grad_norm"), 1e-5);
    }
}

#[test]
fn label_smoothing_changes_the_gradient_and_not_the_reported_loss() {
    for reference in NAMES.map(Reference::open) {
        let smoothing = &reference.expected["label_smoothing"];
        let options = TrainOptions { label_smoothing: smoothing["epsilon"].as_f64().unwrap() as f32, ..PLAIN };
        let (sums, gradients) = reference.train(&reference.weights, &reference.batch(), options);
        assert_close(reference.name, mean(sums), reference.number("loss"), 1e-5);
        let grad_norm = global_norm(&gradients) / sums.target_tokens as f64;
        assert_close(reference.name, grad_norm, smoothing["grad_norm"].as_f64().unwrap(), 1e-4);
    }
}

#[test]
fn twenty_steps_of_each_optimizer_follow_hugging_face() {
    for reference in NAMES.map(Reference::open) {
        for kind in [OptimizerKind::AdamW, OptimizerKind::Adafactor] {
            let optimizer = optimizer_name(kind);
            let want = reference.expected[&optimizer]["losses"].as_array().unwrap();
            assert_eq!(want.len(), 20);
            for (step, (got, want)) in reference.trajectory(kind, want.len()).into_iter().zip(want).enumerate() {
                let what = format!("{}, {optimizer}, step {step}", reference.name);
                assert_close(&what, got, want.as_f64().unwrap(), 1e-4);
            }
        }
    }
}

/// The GPU's kernels, on the processor: of every family the loss and all gradients, of one the first steps and an output.
#[test]
fn the_emulated_gpu_gives_the_numbers_of_hugging_face() {
    if crate::devices::emulator_is_missing() {
        return;
    }
    let device = Device::emulated(3).unwrap();
    for name in ["t5_v1_0", "t5_v1_1", "umt5"] {
        let reference = Reference::open_on(&device, name);
        let (sums, gradients) = reference.train(&reference.weights, &reference.batch(), PLAIN);
        assert_close(name, mean(sums), reference.number("loss"), 1e-5);
        let (scale, all) = (1.0 / sums.target_tokens as f64, gradients.download().unwrap());
        for tensor in reference.model.layout().tensors() {
            let distance = relative_distance(&all[tensor.range.clone()], scale, &reference.gradients[&tensor.name]);
            assert!(distance <= 1e-4, "{name}: {} is off by {distance:e}", tensor.name);
        }
    }
    let reference = Reference::open_on(&device, "t5_v1_1");
    for kind in [OptimizerKind::AdamW, OptimizerKind::Adafactor] {
        let want = reference.expected[optimizer_name(kind)]["losses"].as_array().unwrap();
        for (step, (got, want)) in reference.trajectory(kind, 3).into_iter().zip(want).enumerate() {
            assert_close(&format!("{kind:?}, step {step}"), got, want.as_f64().unwrap(), 1e-4);
        }
    }
    let want: Vec<Vec<u32>> = serde_json::from_value(reference.expected["greedy"]["outputs"].clone()).unwrap();
    let options = GenerationOptions { max_new_tokens: reference.greedy_tokens(), ..GenerationOptions::default() };
    assert_eq!(reference.generate(&reference.source[..1], options)[0][0].token_ids, want[0]);
}

#[test]
fn greedy_outputs_are_those_of_hugging_face() {
    for reference in NAMES.map(Reference::open) {
        let greedy = &reference.expected["greedy"];
        let want: Vec<Vec<u32>> = serde_json::from_value(greedy["outputs"].clone()).unwrap();
        let generate = |rows: &[Vec<u32>]| -> Vec<Vec<u32>> {
            let options =
                GenerationOptions { max_new_tokens: reference.greedy_tokens(), ..GenerationOptions::default() };
            reference.generate(rows, options).into_iter().map(|mut outputs| outputs.remove(0).token_ids).collect()
        };
        assert_eq!(generate(&reference.source), want, "{}", reference.name);
        for (row, want) in reference.source.iter().zip(&want) {
            assert_eq!(generate(std::slice::from_ref(row)), [want.as_slice()], "{}, alone", reference.name);
        }
    }
}

#[test]
fn gradient_checkpointing_changes_no_bit() {
    for mut reference in NAMES.map(Reference::open) {
        reference.model.set_dropout_rate(0.1);
        let batch = reference.batch();
        let run = |gradient_checkpointing| {
            let options = TrainOptions { seed: 3, gradient_checkpointing, ..PLAIN };
            let (sums, gradients) = reference.train(&reference.weights, &batch, options);
            (sums.loss_sum.to_bits(), gradients.download().unwrap().iter().map(|g| g.to_bits()).collect::<Vec<_>>())
        };
        assert!(run(false) == run(true), "{}", reference.name);
    }
}

/// What is told to be finished is not touched again, or whoever reduces it meanwhile reduces something else.
#[test]
fn finished_gradients_are_final() {
    for mut reference in NAMES.map(Reference::open) {
        reference.model.set_dropout_rate(0.1);
        let mut gradients = reference.model.zero_parameters(DType::F32).unwrap();
        let mut seen: Vec<(usize, Vec<f32>)> = Vec::new();
        let options = TrainOptions { gradient_checkpointing: true, ..PLAIN };
        let mut observe = |gradients: &mut Parameters, start| {
            seen.push((start, gradients.download().unwrap().split_off(start)));
        };
        let batch = reference.batch();
        reference.model.train_observed(&reference.weights, &batch, options, &mut gradients, &mut observe).unwrap();
        let whole = gradients.download().unwrap();
        for (start, part) in &seen {
            assert!(whole[*start..] == *part, "{}: the gradient from {start} on", reference.name);
        }
        let starts: Vec<usize> = seen.iter().map(|(start, _)| *start).collect();
        assert!(starts.is_sorted_by(|a, b| a > b) && starts.last() == Some(&0), "{}: {starts:?}", reference.name);
        assert!(starts.len() > 4, "{}: {starts:?}", reference.name);
    }
}

#[test]
fn micro_batches_add_up_to_the_batch() {
    for reference in NAMES.map(Reference::open) {
        let (whole, gradients) = reference.train(&reference.weights, &reference.batch(), PLAIN);
        let rows = reference.source.len();
        for size in [1, 2, 5] {
            let (mut sum, mut tokens) = (0.0, 0);
            let mut accumulated = reference.model.zero_parameters(DType::F32).unwrap();
            for first in (0..rows).step_by(size) {
                let batch = reference.rows(first..(first + size).min(rows));
                let sums = reference.model.train(&reference.weights, &batch, PLAIN, &mut accumulated).unwrap();
                (sum, tokens) = (sum + sums.loss_sum, tokens + sums.target_tokens);
            }
            let what = format!("{}, micro-batches of {size}", reference.name);
            assert_eq!(tokens, whole.target_tokens, "{what}");
            assert_close(&what, sum, whole.loss_sum, 1e-6);
            let distance = relative_distance(&accumulated.download().unwrap(), 1.0, &gradients.download().unwrap());
            assert!(distance <= 1e-6, "{what}: gradients are {distance:e} apart");
        }
    }
}

#[test]
fn bf16_follows_f32() {
    for reference in NAMES.map(Reference::open) {
        let batch = reference.batch();
        let (sums, exact) = reference.train(&reference.weights, &batch, PLAIN);
        let mut rounded = reference.model.zero_parameters(DType::Bf16).unwrap();
        ops::cast(reference.weights.view(), rounded.view_mut()).unwrap();
        let (rounded_sums, gradients) = reference.train(&rounded, &batch, PLAIN);
        assert_close(reference.name, rounded_sums.loss_sum, sums.loss_sum, 0.02);
        assert_ne!(rounded_sums.loss_sum, sums.loss_sum, "{}: bf16 rounds", reference.name);
        let cosine = cosine(&exact, &gradients);
        assert!(cosine > 0.99, "{}: cosine {cosine}", reference.name);
    }
}

/// The gradient against the loss itself, where Hugging Face's masks cannot be had: with dropout on. Along a direction
/// that takes half of a tensor's elements, each as far as its gradient says, the slope must be what the gradient says.
#[test]
fn gradients_with_dropout_are_slopes_of_the_loss() {
    for mut reference in NAMES.map(Reference::open) {
        reference.model.set_dropout_rate(0.2);
        // Relu has kinks, which no difference is small enough to avoid.
        let (reach, tolerance) = if reference.model.config().is_gated() { (1e-2, 2e-3) } else { (2e-3, 4e-2) };
        let batch = reference.batch();
        let options = TrainOptions { seed: 11, micro_batch: 2, ..PLAIN };
        let (_, gradients) = reference.train(&reference.weights, &batch, options);
        let (gradients, weights) = (gradients.download().unwrap(), reference.weights.download().unwrap());
        for (index, tensor) in reference.model.layout().tensors().iter().enumerate() {
            let values = &weights[tensor.range.clone()];
            let direction = half_of(&gradients[tensor.range.clone()], index);
            let largest = direction.iter().fold(0.0, |largest: f64, d| largest.max(d.abs()));
            let step = reach * norm(values.iter().map(|&v| f64::from(v))) / (values.len() as f64).sqrt() / largest;
            let loss = |steps: f64| {
                let mut moved = reference.copy_of_weights();
                let away = |(&value, d): (&f32, &f64)| (f64::from(value) + steps * step * d) as f32;
                let values: Vec<f32> = values.iter().zip(&direction).map(away).collect();
                moved.write(tensor.range.clone(), &values).unwrap();
                reference.train(&moved, &batch, options).0.loss_sum
            };
            // Central differences of fourth order.
            let slope = (8.0 * (loss(1.0) - loss(-1.0)) - (loss(2.0) - loss(-2.0))) / (12.0 * step);
            let want = norm(direction.iter().copied()).powi(2);
            assert_close(&format!("{}: {}", reference.name, tensor.name), slope, want, tolerance);
        }
    }
}

/// A vector with about half of its elements zeroed, by a coin for each from a multiplicative hash.
fn half_of(values: &[f32], salt: usize) -> Vec<f64> {
    let is_taken = |index: usize| ((1000 * salt + index) as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 63 == 0;
    values.iter().enumerate().map(|(index, &value)| if is_taken(index) { f64::from(value) } else { 0.0 }).collect()
}

#[test]
fn saving_and_loading_changes_no_bit() {
    for reference in NAMES.map(Reference::open) {
        let name = reference.name;
        let [first, second] = [0, 1].map(|_| tempfile::tempdir().unwrap());
        save_pretrained(&reference.model, &reference.weights, first.path()).unwrap();
        let (model, weights) = load_pretrained(&Device::cpu(), first.path()).unwrap();
        assert_eq!(model.config().head_scale(), reference.model.config().head_scale(), "{name}");
        assert_eq!(model.config().decoder_layers(), reference.model.config().decoder_layers(), "{name}");
        let all = [&reference.weights, &weights].map(|weights| weights.download().unwrap());
        for (tensor, again) in reference.model.layout().tensors().iter().zip(model.layout().tensors()) {
            assert_eq!(tensor, again, "{name}");
            let [before, after] = [0, 1].map(|index| &all[index][tensor.range.clone()]);
            assert!(before == after, "{name}: {}", tensor.name);
        }
        save_pretrained(&model, &weights, second.path()).unwrap();
        for file in ["config.json", "generation_config.json", "model.safetensors"] {
            let [before, after] = [&first, &second].map(|directory| fs::read(directory.path().join(file)).unwrap());
            assert!(before == after, "{name}: {file}");
        }
    }
}

/// transformers 4 and 5 agree on these two: tied without a head's weights, untied with them. Anything else one of them
/// reads as another model.
#[test]
fn saved_files_say_how_the_head_is_tied_in_the_way_that_all_versions_understand() {
    for reference in NAMES.map(Reference::open) {
        let directory = tempfile::tempdir().unwrap();
        save_pretrained(&reference.model, &reference.weights, directory.path()).unwrap();
        let config = fs::read(directory.path().join("config.json")).unwrap();
        let config: Value = serde_json::from_slice(&config).unwrap();
        let bytes = fs::read(directory.path().join("model.safetensors")).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let is_tied = reference.name == "t5_v1_0";
        assert_eq!(config["tie_word_embeddings"], is_tied, "{}", reference.name);
        assert_eq!(config.get("scale_decoder_outputs"), None, "{}", reference.name);
        assert_eq!(tensors.tensor("lm_head.weight").is_err(), is_tied, "{}", reference.name);
        let original = fs::read(references().join(reference.name).join("config.json")).unwrap();
        let original: Value = serde_json::from_slice(&original).unwrap();
        for (key, value) in original.as_object().unwrap() {
            assert_eq!(&config[key], value, "{}: {key} is lost", reference.name);
        }
    }
}

/// transformers 5 writes `tie_word_embeddings: true, scale_decoder_outputs: false` for models with a head of their own.
#[test]
fn a_configuration_of_transformers_5_is_read_for_what_it_means() {
    let reference = Reference::open("t5_v1_1");
    let directory = tempfile::tempdir().unwrap();
    let original = references().join("t5_v1_1");
    fs::copy(original.join("model.safetensors"), directory.path().join("model.safetensors")).unwrap();
    let mut config: Value = serde_json::from_slice(&fs::read(original.join("config.json")).unwrap()).unwrap();
    config["tie_word_embeddings"] = true.into();
    config["scale_decoder_outputs"] = false.into();
    fs::write(directory.path().join("config.json"), config.to_string()).unwrap();
    let (model, weights) = load_pretrained(&Device::cpu(), directory.path()).unwrap();
    let sums = model.loss(&weights, &reference.batch()).unwrap();
    assert_close("loss", mean(sums), reference.number("loss"), 1e-5);
    let again = tempfile::tempdir().unwrap();
    save_pretrained(&model, &weights, again.path()).unwrap();
    let saved: Value = serde_json::from_slice(&fs::read(again.path().join("config.json")).unwrap()).unwrap();
    assert_eq!((&saved["tie_word_embeddings"], saved.get("scale_decoder_outputs")), (&false.into(), None));
}

#[test]
fn byt5_tokenizes_as_hugging_face_does() {
    let cases: Value = serde_json::from_slice(&fs::read(references().join("byt5_tokenizer.json")).unwrap()).unwrap();
    let spec = quintet_data::TokenizerSpec::ByT5;
    let tokenizer = quintet_data::Tokenizer::from_spec(&spec, std::iter::empty(), None).unwrap();
    for case in cases.as_array().unwrap() {
        let (text, ids) = (case["text"].as_str().unwrap(), case["ids"].as_array().unwrap());
        let ids: Vec<u32> = ids.iter().map(|id| id.as_u64().unwrap() as u32).collect();
        assert_eq!(tokenizer.encode(text, 1000).unwrap(), ids, "{text:?}");
    }
}
