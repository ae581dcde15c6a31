//! `quintet bench generate`: how many tokens a second a model writes.

use std::time::Instant;

use quintet_kernels::{DType, ops};
use quintet_t5::{GenerationOptions, Generator, Parameters, Sources, Weights};
use quintet_worker::memory::peak_bytes;
use serde_json::json;

use super::model::{ids, length, open, precision};
use super::{median, print_result};
use crate::args::BenchGenerateArguments;
use crate::commands::generate::flag_error;
use crate::device::Decision;
use crate::error::{Failure, Result};

pub(super) fn run(arguments: &BenchGenerateArguments) -> Result<()> {
    for (flag, value) in [
        ("--batch-size", arguments.batch_size),
        ("--source-length", arguments.source_length),
        ("--rounds", arguments.rounds),
    ] {
        if value == 0 {
            return Err(Failure::bad_input(format!("{flag} must be at least 1")));
        }
    }
    let decision = Decision::new(arguments.device.into(), 0)?;
    eprintln!("{}", decision.line());
    let precision = precision(arguments.precision.as_deref(), decision.choice)?;
    let device = decision.open()?;
    let (model, master) = open(&device, &arguments.model)?;
    let generation = options(arguments).resolve(model.config()).map_err(flag_error)?;
    let compute: Option<Parameters> = match precision.dtype() {
        DType::F32 => None,
        dtype => {
            let mut compute = model.zero_parameters(dtype)?;
            ops::cast(master.view(), compute.view_mut())?;
            Some(compute)
        }
    };
    let weights = match &compute {
        Some(compute) => Weights::new(compute, &master),
        None => Weights::from(&master),
    };
    let lengths: Vec<usize> = (0..arguments.batch_size)
        .map(|row| length(arguments.source_length, row, 2_654_435_761, arguments.ragged))
        .collect();
    let source_tokens = lengths.iter().sum();
    let ids = ids(model.config().vocab_size, source_tokens, 1);
    let ends = lengths.iter().scan(0, |end, length| {
        *end += *length as u32;
        Some(*end)
    });
    let offsets: Vec<u32> = std::iter::once(0).chain(ends).collect();
    let numbers: Vec<u64> = (0..arguments.batch_size as u64).collect();
    let sources = Sources { ids: &ids, offsets: &offsets, numbers: &numbers };

    let generator = Generator::new(&model, weights, generation);
    let mut rounds = Vec::with_capacity(arguments.rounds);
    for round in 0..=arguments.rounds {
        let started = Instant::now();
        let outputs = generator.generate(sources, &mut |_, _, _| {})?;
        device.synchronize()?;
        if round > 0 {
            rounds.push(started.elapsed().as_secs_f64());
        }
        let whole = outputs.iter().flatten().all(|output| output.token_ids.len() == arguments.new_tokens);
        assert!(whole && outputs.len() == arguments.batch_size, "outputs of the length that was asked for");
    }
    let seconds = median(rounds.clone());
    let tokens = arguments.batch_size * arguments.new_tokens;
    let result = json!({
        "device": device.name(),
        "threads": rayon::current_num_threads(),
        "precision": precision,
        "model": arguments.model,
        "batch_size": arguments.batch_size,
        "source_length": arguments.source_length,
        "source_tokens": source_tokens,
        "new_tokens": arguments.new_tokens,
        "num_beams": arguments.num_beams,
        "do_sample": arguments.do_sample,
        "ragged": arguments.ragged,
        "seconds": seconds,
        "rounds": rounds,
        "tokens_per_second": tokens as f64 / seconds,
        "peak_memory_bytes": peak_bytes(&device),
    });
    print_result(&result, arguments.json);
    Ok(())
}

/// So many tokens, no more and no fewer: what is measured then depends on no weights.
fn options(arguments: &BenchGenerateArguments) -> GenerationOptions {
    GenerationOptions {
        max_new_tokens: Some(arguments.new_tokens),
        min_new_tokens: Some(arguments.new_tokens),
        num_beams: Some(arguments.num_beams),
        do_sample: Some(arguments.do_sample),
        ..GenerationOptions::default()
    }
}
