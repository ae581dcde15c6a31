//! The first training steps of a stored model, against the losses that transformers and torch gave for them.

use quintet_kernels::selftest::Outcome;
use quintet_kernels::{DType, Device, ops};
use quintet_t5::{Batch, Model, Parameters, TrainOptions, Weights, load_embedded};
use quintet_worker::Precision;
use quintet_worker::optimizer::{ClippedMean, Hyperparameters, NamedSlot, Optimizer, OptimizerKind};
use serde::Deserialize;

use crate::error::Result;

/// A file of the reference that the integration tests use too; the program carries it.
macro_rules! reference {
    ($include:ident, $file:literal) => {
        $include!(concat!("../../../../tests/data/references/t5_v1_1/", $file))
    };
}

/// Steps compared: enough for an error of the optimizer to show in the loss.
const STEPS: usize = 5;

#[derive(Deserialize)]
struct Rows {
    source: Vec<Vec<u32>>,
    labels: Vec<Vec<u32>>,
}

#[derive(Deserialize)]
struct Expected {
    adamw: AdamW,
}

/// The settings of a run, and its losses, each of before its update.
#[derive(Deserialize)]
struct AdamW {
    lr: f64,
    betas: [f64; 2],
    eps: f64,
    weight_decay: f64,
    max_grad_norm: f64,
    losses: Vec<f64>,
}

/// One row a step: the relative error of its loss.
pub(super) fn run(device: &Device) -> Result<Vec<Outcome>> {
    let parsed = "the program's own reference"; // why: the tests read the same files
    let rows: Rows = serde_json::from_str(reference!(include_str, "batch.json")).expect(parsed);
    let Expected { adamw } = serde_json::from_str(reference!(include_str, "expected.json")).expect(parsed);
    let mut outcomes = Vec::new();
    // f32 differs by the order of its sums; bf16 keeps eight bits of each number, f16 and the factors of tf32 eleven.
    for (precision, name, tolerance) in [
        (Precision::Fp32, "f32", 1e-4),
        (Precision::Tf32, "tf32", 2e-3),
        (Precision::Bf16, "bf16", 2e-2),
        (Precision::Fp16, "f16", 2e-3),
    ] {
        match device {
            Device::Gpu(gpu) => gpu.set_tf32(precision == Precision::Tf32),
            Device::Cpu(_) if precision == Precision::Tf32 => continue,
            Device::Cpu(_) => {}
        }
        for (step, (got, want)) in
            losses(device, precision.dtype(), &rows, &adamw)?.into_iter().zip(&adamw.losses).enumerate()
        {
            let max_error = (got - want).abs() / want;
            outcomes.push(Outcome {
                op: format!("train_step t5_v1_1, loss {}", step + 1),
                dtype: name,
                shape: format!("{} examples", rows.source.len()),
                max_error,
                tolerance,
                passed: max_error <= tolerance,
            });
        }
    }
    Ok(outcomes)
}

/// The mean losses of the first steps, with the weights that the model computes with in `dtype`.
fn losses(device: &Device, dtype: DType, rows: &Rows, adamw: &AdamW) -> Result<Vec<f64>> {
    let weights = reference!(include_bytes, "model.safetensors");
    let (model, mut master) = load_embedded(device, reference!(include_str, "config.json"), weights)?;
    let batch = batch(&model, rows)?;
    let mut compute = model.zero_parameters(dtype)?;
    let mut gradients = model.zero_parameters(DType::F32)?;
    let mut optimizer = adamw_of_torch(adamw, &master)?;
    // Small numbers in f16 need help.
    let gradient_scale = if dtype == DType::F16 { 256.0 } else { 1.0 };
    let options =
        TrainOptions { seed: 0, micro_batch: 0, label_smoothing: 0.0, gradient_checkpointing: false, gradient_scale };
    let mut losses = Vec::with_capacity(STEPS);
    for _ in 0..STEPS {
        ops::cast(master.view(), compute.view_mut())?;
        gradients.view_mut().fill_zero()?;
        let sums = model.train(Weights::new(&compute, &master), &batch, options, &mut gradients)?;
        let divisor = sums.target_tokens as f64 * f64::from(gradient_scale);
        losses.push(sums.loss_sum / sums.target_tokens as f64);
        let mean = ClippedMean::new(gradients.view(), divisor, adamw.max_grad_norm)?;
        optimizer.step(adamw.lr, master.view_mut(), gradients.view(), mean.scale)?;
    }
    Ok(losses)
}

fn batch(model: &Model, rows: &Rows) -> Result<Batch> {
    let offsets = |rows: &[Vec<u32>]| -> Vec<u32> {
        let lengths = rows.iter().scan(0, |end, row| {
            *end += row.len() as u32;
            Some(*end)
        });
        std::iter::once(0).chain(lengths).collect()
    };
    let (source, labels) = (rows.source.concat(), rows.labels.concat());
    let start = model.config().decoder_start_token_id;
    Ok(Batch::new(model.device(), &source, &offsets(&rows.source), &labels, &offsets(&rows.labels), start)?)
}

/// As torch has it: every tensor decays.
fn adamw_of_torch(adamw: &AdamW, weights: &Parameters) -> Result<Optimizer> {
    let mut slots: Vec<NamedSlot> = weights.layout().tensors().iter().map(NamedSlot::from).collect();
    slots.iter_mut().for_each(|tensor| tensor.slot.decays = true);
    let [beta1, beta2] = adamw.betas;
    let hyperparameters = Hyperparameters { beta1, beta2, epsilon: adamw.eps, weight_decay: adamw.weight_decay };
    Ok(Optimizer::new(weights.view().device(), OptimizerKind::AdamW, hyperparameters, slots)?)
}
