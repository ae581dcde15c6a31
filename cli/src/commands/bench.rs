//! `quintet bench`: how fast a training step is, as a share of what this machine's matrix products allow.

use std::path::Path;
use std::time::Instant;

use quintet_kernels::{DType, Device, ops};
use quintet_t5::{Batch, BatchShape, Model, Parameters, preset, training_flops};
use quintet_worker::collective::{Collective, TreeSum};
use quintet_worker::memory::peak_resident_bytes;
use quintet_worker::replica::Replica;
use quintet_worker::{Precision, TrainingConfig};
use serde_json::json;

use crate::args::{BenchArguments, BenchCommand, BenchStepArguments};
use crate::commands::{on_threads, open_device, print_json};
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
    let device = open_device(arguments.device);
    let precision: Precision = serde_json::from_value(json!(arguments.precision))
        .map_err(|error| Failure::bad_input(format!("--precision: {error}")))?;
    let (model, weights) = open(&device, &arguments.model)?;
    let training = TrainingConfig {
        precision: Some(precision),
        gradient_checkpointing: arguments.gradient_checkpointing,
        ..TrainingConfig::default()
    };
    let parameters = model.layout().parameter_count();
    let batch = batch(&model, arguments)?;
    let shape = BatchShape { lengths: vec![(arguments.source_length, arguments.target_length); arguments.batch_size] };
    let flops = training_flops(model.config(), &shape);
    let mut replica = Replica::new(model, weights, &training, u64::MAX)?;
    // As a rank that is the only one does it.
    let mut collective = Collective::local();
    let elements = replica.master().layout().len();
    let mut reduced = device.zeros(DType::F32, 1, elements)?;
    let mut sum = TreeSum::new(&device, elements);
    let resting = device.memory().live_bytes;
    device.reset_peak_memory();
    let mut seconds = Vec::with_capacity(arguments.steps);
    for number in 1..=(WARM_UP_STEPS + arguments.steps) as u64 {
        let started = Instant::now();
        sum.begin(0..1, 1);
        let (sums, gradient) = replica.compute(number, 0, &batch, sum.lend()?)?;
        sum.push(gradient);
        collective.all_reduce_tree(number, &mut sum, std::slice::from_ref(&(0..1)), &mut reduced)?;
        let mean = replica.mean(reduced.view(), sums.target_tokens)?;
        replica.update(number, reduced.view(), mean)?;
        if number > WARM_UP_STEPS as u64 {
            seconds.push(started.elapsed().as_secs_f64());
        }
    }
    seconds.sort_by(f64::total_cmp);
    let median = seconds[seconds.len() / 2];
    let tokens = arguments.batch_size * (arguments.source_length + arguments.target_length);
    let ceiling = matrix_product_flops(&device)?;
    let result = json!({
        "device": device.name(),
        "precision": arguments.precision,
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
        "peak_memory_bytes": peak_resident_bytes(),
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
        quintet_t5::initialize(model.config(), 42, &mut weights);
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

/// What one large f32 matrix product reaches here: the ceiling that `mfu` is a share of.
fn matrix_product_flops(device: &Device) -> Result<f64> {
    const SIZE: usize = 1024;
    let values: Vec<f32> = (0..SIZE * SIZE).map(|index| (index % 7) as f32 - 3.0).collect();
    let (x, w) = (device.upload(&values, SIZE, SIZE)?, device.upload(&values, SIZE, SIZE)?);
    let mut y = device.empty(DType::F32, SIZE, SIZE)?;
    let mut best = f64::INFINITY;
    for _ in 0..8 {
        let started = Instant::now();
        ops::linear_forward(x.view(), w.view(), y.view_mut(), false)?;
        best = best.min(started.elapsed().as_secs_f64());
    }
    Ok(2.0 * (SIZE as f64).powi(3) / best)
}
