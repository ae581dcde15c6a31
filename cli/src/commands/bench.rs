//! `quintet bench`: how fast a training step is, as a share of what this machine's matrix products allow.

use std::path::Path;
use std::time::Instant;

use quintet_kernels::{DType, Device, ops};
use quintet_t5::{Batch, BatchShape, Model, Parameters, preset, training_flops};
use quintet_worker::collective::Collective;
use quintet_worker::gradient::StepGradient;
use quintet_worker::memory::peak_bytes;
use quintet_worker::replica::Replica;
use quintet_worker::{Precision, TrainingConfig};
use serde_json::json;

use crate::args::{BenchArguments, BenchCommand, BenchStepArguments};
use crate::commands::{on_threads, print_json};
use crate::device::Decision;
use crate::error::{Failure, Result, exit};

pub(crate) fn run(arguments: BenchArguments) -> Result<u8> {
    match arguments.command {
        BenchCommand::Step(arguments) => on_threads(arguments.threads, || step(&arguments).map(|()| exit::DONE)),
    }
}

/// Steps that are not timed: they fill the memory pool.
const WARM_UP_STEPS: usize = 2;

fn step(arguments: &BenchStepArguments) -> Result<()> {
    for (flag, value) in [
        ("--batch-size", arguments.batch_size),
        ("--source-length", arguments.source_length),
        ("--target-length", arguments.target_length),
        ("--steps", arguments.steps),
    ] {
        if value == 0 {
            return Err(Failure::bad_input(format!("{flag} must be at least 1")));
        }
    }
    let decision = Decision::new(arguments.device.into(), 0)?;
    eprintln!("{}", decision.line());
    let precision = match &arguments.precision {
        None => Precision::default_on(decision.choice),
        Some(name) => {
            serde_json::from_value(json!(name)).map_err(|error| Failure::bad_input(format!("--precision: {error}")))?
        }
    };
    let device = decision.open()?;
    let (model, weights) = open(&device, &arguments.model)?;
    let training =
        TrainingConfig { gradient_checkpointing: arguments.gradient_checkpointing, ..TrainingConfig::default() };
    let parameters = model.layout().parameter_count();
    let batch = batch(&model, arguments)?;
    let shape = BatchShape { lengths: vec![(arguments.source_length, arguments.target_length); arguments.batch_size] };
    let flops = training_flops(model.config(), &shape);
    let tokens_max = (arguments.batch_size * arguments.target_length) as u64;
    let mut replica = Replica::new(model, weights, &training, precision, u64::MAX, tokens_max)?;
    // As a rank that is the only one does it.
    let mut collective = Collective::local();
    let mut step_gradient = StepGradient::new(&device, replica.master().layout().len())?;
    let resting = device.memory().live_bytes;
    device.reset_peak_memory();
    let mut seconds = Vec::with_capacity(arguments.steps);
    for number in 1..=(WARM_UP_STEPS + arguments.steps) as u64 {
        let started = Instant::now();
        step_gradient.begin(0..1, 1)?;
        let (sums, gradient) = replica.compute(number, 0, &batch, step_gradient.lend()?, &mut |_, _| {});
        step_gradient.give_back(gradient);
        let sums = sums?;
        step_gradient.reduce(&mut collective, number, std::slice::from_ref(&(0..1)))?;
        let update = replica.plan_update(step_gradient.total(), sums.target_tokens)?;
        let update = update.ok_or_else(|| Failure::failed(format!("the gradient of step {number} is not finite")))?;
        replica.update(number, step_gradient.total(), update)?;
        device.synchronize()?;
        if number > WARM_UP_STEPS as u64 {
            seconds.push(started.elapsed().as_secs_f64());
        }
    }
    seconds.sort_by(f64::total_cmp);
    let median = seconds[seconds.len() / 2];
    let tokens = arguments.batch_size * (arguments.source_length + arguments.target_length);
    let ceiling = matrix_product_flops(&device, precision)?;
    let result = json!({
        "device": device.name(),
        "precision": precision,
        "model": arguments.model,
        "threads": rayon::current_num_threads(),
        "gradient_checkpointing": arguments.gradient_checkpointing,
        "parameters": parameters,
        "batch_size": arguments.batch_size,
        "source_length": arguments.source_length,
        "target_length": arguments.target_length,
        "seconds_per_step": median,
        "tokens_per_second": tokens as f64 / median,
        "model_flops_per_step": flops,
        "mfu": flops / median / ceiling,
        "matrix_product_flops_per_second": ceiling,
        "peak_memory_bytes": peak_bytes(&device),
        "peak_activation_bytes": device.memory().peak_bytes.saturating_sub(resting),
    });
    if arguments.json {
        print_json(&result);
    } else {
        for (name, value) in result.as_object().into_iter().flatten() {
            println!("{name}: {value}");
        }
    }
    Ok(())
}

/// A preset with fresh weights, or a directory.
fn open(device: &Device, name: &str) -> Result<(Model, Parameters)> {
    if let Some(config) = preset(name) {
        let model = Model::new(device, config)?;
        let mut weights = model.zero_parameters(DType::F32)?;
        quintet_t5::initialize(model.config(), 42, &mut weights)?;
        return Ok((model, weights));
    }
    let directory = Path::new(name);
    if !directory.is_dir() {
        let known = quintet_t5::PRESETS.join(", ");
        return Err(Failure::bad_input(format!("--model {name}: neither a directory nor one of {known}")));
    }
    Ok(quintet_t5::load_pretrained(device, directory)?)
}

/// Full-length examples of arbitrary tokens.
fn batch(model: &Model, arguments: &BenchStepArguments) -> Result<Batch> {
    let vocab = model.config().vocab_size as u64;
    let ids = |length: usize, salt: u64| -> Vec<u32> {
        let count = (arguments.batch_size * length) as u64;
        (0..count).map(|index| ((index * 2_654_435_761 + salt * 40_503) % vocab) as u32).collect()
    };
    let offsets = |length: usize| -> Vec<u32> { (0..=arguments.batch_size).map(|row| (row * length) as u32).collect() };
    Ok(Batch::new(
        model.device(),
        &ids(arguments.source_length, 1),
        &offsets(arguments.source_length),
        &ids(arguments.target_length, 2),
        &offsets(arguments.target_length),
        model.config().decoder_start_token_id,
    )?)
}

/// What one large matrix product of this precision reaches here: the ceiling that `mfu` is a share of.
fn matrix_product_flops(device: &Device, precision: Precision) -> Result<f64> {
    // Large enough to fill the device, small enough to be done in an instant.
    let size = if device.name() == "cuda" { 8192 } else { 1024 };
    // On the CPU all types are computed in f32, which it is fastest in.
    let dtype = if device.name() == "cuda" { precision.dtype() } else { DType::F32 };
    let values: Vec<f32> = (0..size * size).map(|index| (index % 7) as f32 - 3.0).collect();
    let values = device.upload(&values, size, size)?;
    let [mut x, mut y] = [device.empty(dtype, size, size)?, device.empty(dtype, size, size)?];
    ops::cast(values.view(), x.view_mut())?;
    let mut best = f64::INFINITY;
    for _ in 0..8 {
        device.synchronize()?;
        let started = Instant::now();
        ops::linear_forward(x.view(), x.view(), y.view_mut(), false)?;
        device.synchronize()?;
        best = best.min(started.elapsed().as_secs_f64());
    }
    Ok(2.0 * (size as f64).powi(3) / best)
}
