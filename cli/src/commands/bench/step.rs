//! `quintet bench step`: how fast a training step is, as a share of what this machine's matrix products allow.

use std::time::Instant;

use quintet_kernels::{DType, Device, inventory, ops};
use quintet_t5::{Batch, BatchShape, TargetModules, training_flops};
use quintet_worker::adapter::{Adapter, Base};
use quintet_worker::collective::Collective;
use quintet_worker::gradient::StepGradient;
use quintet_worker::memory::peak_bytes;
use quintet_worker::replica::Replica;
use quintet_worker::shards::Shards;
use quintet_worker::{LoraConfig, Precision, TrainingConfig};
use serde_json::json;

use super::model::{batch, length, open, precision, sum};
use super::{median, print_result, require_positive};
use crate::args::BenchStepArguments;
use crate::device::Decision;
use crate::error::{Failure, Result};

/// The timed steps are divided into so many rounds, whose median counts: a hiccup of the machine spoils one of them.
const ROUNDS: usize = 5;

/// Steps that are not timed: they fill the memory pool, compile kernels, and bring a GPU up to speed.
fn warm_up_steps(device: &Device) -> usize {
    if device.name() == "cuda" { 10 } else { 2 }
}

pub(super) fn run(arguments: &BenchStepArguments) -> Result<()> {
    require_positive(&[
        ("--batch-size", arguments.batch_size),
        ("--source-length", arguments.source_length),
        ("--target-length", arguments.target_length),
        ("--steps", arguments.steps),
    ])?;
    let decision = Decision::new(arguments.device.into(), 0)?;
    eprintln!("{}", decision.line());
    let precision = precision(arguments.precision.as_deref(), decision.choice)?;
    let device = decision.open()?;
    let (model, weights) = open(&device, &arguments.model)?;
    let training =
        TrainingConfig { gradient_checkpointing: arguments.gradient_checkpointing, ..TrainingConfig::default() };
    let parameters = model.layout().parameter_count();
    let shape = shape(arguments);
    let batch = batch(&model, &shape)?;
    let flops = training_flops(model.config(), &shape);
    let [source_tokens, target_tokens] = [sum(&shape, |lengths| lengths.0), sum(&shape, |lengths| lengths.1)];
    let adapter = match arguments.lora_r {
        None => None,
        Some(r) => {
            let target_modules = arguments.lora_target_modules.clone().map(TargetModules::Pattern);
            let lora_dropout = Some(arguments.lora_dropout);
            let lora = LoraConfig { r: Some(r), lora_dropout, target_modules, ..LoraConfig::default() };
            let fingerprint = weights.digest()?.to_hex().to_string();
            let base = Base { name: arguments.model.clone(), fingerprint };
            Some(Adapter::open(&lora, &model, &weights, base, training.seed)?)
        }
    };
    let trainable = adapter.as_ref().map_or(parameters, |adapter| adapter.weights.layout().parameter_count());
    let mut replica = Replica::new(model, weights, adapter, &training, precision, u64::MAX, target_tokens as u64)?;
    replica.hold_all()?;
    let elements = replica.master().layout().len();
    let gradient = StepGradient::new(&device, elements)?;
    let shards = Shards::replicated(elements, 1);
    // As a rank that is the only one does it.
    let mut stepper = Stepper { replica, collective: Collective::local(), gradient, shards, number: 0 };
    let resting = device.memory().live_bytes;
    device.reset_peak_memory();
    let seconds = stepper.time(&device, &batch, arguments.steps)?;
    let tokens = source_tokens + target_tokens;
    let peak = peak_bytes(&device);
    let peak_activation_bytes = device.memory().peak_bytes.saturating_sub(resting);
    drop(stepper);
    let measured = matrix_product_flops(&device, precision)?;
    let gpu = (device.name() == "cuda").then(|| inventory().gpus.into_iter().next()).flatten();
    let datasheet = gpu.as_ref().and_then(|gpu| dense_peak_flops(&gpu.name, precision));
    let peak_flops = datasheet.unwrap_or(measured);
    let result = json!({
        "device": device.name(),
        "gpu": gpu.map(|gpu| gpu.name),
        "precision": precision,
        "model": arguments.model,
        "threads": rayon::current_num_threads(),
        "gradient_checkpointing": arguments.gradient_checkpointing,
        "parameters": parameters,
        "lora_r": arguments.lora_r,
        "lora_target_modules": arguments.lora_target_modules,
        "lora_dropout": arguments.lora_dropout,
        "trainable_parameters": trainable,
        "batch_size": arguments.batch_size,
        "source_length": arguments.source_length,
        "target_length": arguments.target_length,
        "ragged": arguments.ragged,
        "source_tokens": source_tokens,
        "target_tokens": target_tokens,
        "steps": arguments.steps,
        "seconds_per_step": seconds,
        "tokens_per_second": tokens as f64 / seconds,
        "model_flops_per_step": flops,
        "mfu": flops / seconds / peak_flops,
        "peak_flops_per_second": peak_flops,
        "peak_flops_of": if datasheet.is_some() { "datasheet" } else { "matrix product" },
        "matrix_product_flops_per_second": measured,
        "peak_memory_bytes": peak,
        "peak_activation_bytes": peak_activation_bytes,
    });
    print_result(&result, arguments.json);
    Ok(())
}

/// Takes one training step after the other.
struct Stepper {
    replica: Replica,
    collective: Collective,
    gradient: StepGradient,
    shards: Shards,
    /// Of the last step.
    number: u64,
}

impl Stepper {
    /// Seconds of a step: of the wall clock, over steps that follow each other as in training.
    fn time(&mut self, device: &Device, batch: &Batch, steps: usize) -> Result<f64> {
        for _ in 0..warm_up_steps(device) {
            self.step(batch)?;
        }
        let rounds = ROUNDS.min(steps);
        let mut seconds = Vec::with_capacity(rounds);
        for round in 0..rounds {
            let steps = steps * (round + 1) / rounds - steps * round / rounds;
            device.synchronize()?;
            let started = Instant::now();
            for _ in 0..steps {
                self.step(batch)?;
            }
            device.synchronize()?;
            seconds.push(started.elapsed().as_secs_f64() / steps as f64);
        }
        Ok(median(seconds))
    }

    fn step(&mut self, batch: &Batch) -> Result<()> {
        self.number += 1;
        let number = self.number;
        self.gradient.begin(0..1, 1)?;
        let (sums, gradient) = self.replica.compute(number, 0, batch, self.gradient.lend()?, &mut |_, _| {});
        self.gradient.give_back(gradient);
        let sums = sums?;
        self.gradient.reduce(&mut self.collective, number, std::slice::from_ref(&(0..1)), &self.shards)?;
        let norm = self.gradient.norm(&mut self.collective, number, &self.shards)?;
        let update = self.replica.plan_update(norm, sums.target_tokens);
        let update = update.ok_or_else(|| Failure::failed(format!("the gradient of step {number} is not finite")))?;
        Ok(self.replica.update(number, self.gradient.total(), update)?)
    }
}

/// How long the examples are.
fn shape(arguments: &BenchStepArguments) -> BatchShape {
    let lengths = |row: usize| {
        let source = length(arguments.source_length, row, 2_654_435_761, arguments.ragged);
        (source, length(arguments.target_length, row, 2_246_822_519, arguments.ragged))
    };
    BatchShape { lengths: (0..arguments.batch_size).map(lengths).collect() }
}

/// What a GPU's tensor cores can do by its datasheet, without sparsity, in FLOP/s: what the published utilisations are
/// shares of. None for other GPUs, and for f32, which tensor cores do not multiply.
fn dense_peak_flops(gpu: &str, precision: Precision) -> Option<f64> {
    // Longer names first: an "NVIDIA H100 PCIe" is not an "NVIDIA H100 80GB HBM3".
    let sixteen_bits = [
        ("H100 PCIe", 756e12),
        ("H100 NVL", 835e12),
        ("H200 NVL", 835e12),
        ("GH200", 989.4e12),
        ("H200", 989.4e12),
        ("H100", 989.4e12),
        ("A100", 312e12),
        ("A30", 165e12),
        ("L40S", 362e12),
    ];
    let (_, peak) = sixteen_bits.into_iter().find(|(name, _)| gpu.contains(name))?;
    match precision {
        Precision::Fp32 => None,
        Precision::Tf32 => Some(peak / 2.0),
        Precision::Bf16 | Precision::Fp16 => Some(peak),
    }
}

/// What one large matrix product of this precision reaches here.
fn matrix_product_flops(device: &Device, precision: Precision) -> Result<f64> {
    // Large enough to fill the device, small enough to be done in an instant. On the CPU all types are computed in f32,
    // which it is fastest in.
    let (size, dtype, repeats) = match device.name() {
        "cuda" => (8192, precision.dtype(), 20),
        _ => (1024, DType::F32, 1),
    };
    // Numbers without a pattern: a GPU is faster on those that change few of its wires.
    let values: Vec<f32> = (0..(size * size) as u32)
        .map(|index| {
            index.wrapping_mul(2_654_435_761).rotate_left(13).wrapping_mul(2_246_822_519) as f32 / 2_f32.powi(31) - 1.0
        })
        .collect();
    let values = device.upload(&values, size, size)?;
    let [mut x, mut y] = [device.empty(dtype, size, size)?, device.empty(dtype, size, size)?];
    ops::cast(values.view(), x.view_mut())?;
    let mut best = f64::INFINITY;
    for _ in 0..8 {
        device.synchronize()?;
        let started = Instant::now();
        for _ in 0..repeats {
            ops::linear_forward(x.view(), x.view(), y.view_mut(), false)?;
        }
        device.synchronize()?;
        best = best.min(started.elapsed().as_secs_f64() / repeats as f64);
    }
    Ok(2.0 * (size as f64).powi(3) / best)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_datasheet_is_found_by_the_name_that_the_driver_gives() {
        let peak = |gpu| dense_peak_flops(gpu, Precision::Bf16);
        assert_eq!(peak("NVIDIA H200"), Some(989.4e12));
        assert_eq!(peak("NVIDIA H100 80GB HBM3"), Some(989.4e12));
        assert_eq!(peak("NVIDIA H100 PCIe"), Some(756e12));
        assert_eq!(peak("NVIDIA A100-SXM4-80GB"), Some(312e12));
        assert_eq!(peak("NVIDIA GeForce RTX 4090"), None);
        assert_eq!(dense_peak_flops("NVIDIA H200", Precision::Tf32), Some(494.7e12));
        assert_eq!(dense_peak_flops("NVIDIA H200", Precision::Fp32), None);
    }
}
