//! A model and a batch to measure with.

use std::path::Path;

use quintet_kernels::{DType, Device};
use quintet_t5::{Batch, BatchShape, Model, ModelClass, Parameters, preset};
use quintet_worker::{DeviceChoice, Precision};
use serde_json::json;

use crate::error::{Failure, Result};
use crate::hub;
use crate::prepare::working_directory;

/// A preset with fresh weights, or the model of a directory or of a hub's repository.
pub(super) fn open(device: &Device, name: &str) -> Result<(Model, Parameters)> {
    if let Some(config) = preset(name) {
        let model = Model::new(device, config)?;
        let mut weights = model.zero_parameters(DType::F32)?;
        quintet_t5::initialize(model.config(), 42, &mut weights)?;
        return Ok((model, weights));
    }
    // A name without a slash is more likely a preset, misspelt, than a repository of the hub.
    if !Path::new(name).is_dir() && !name.contains('/') {
        let known = quintet_t5::PRESETS.join(", ");
        return Err(Failure::bad_input(format!("--model {name}: neither a directory nor one of {known}")));
    }
    let directory = hub::model("--model", name, &working_directory()?)?.directory;
    let (model, weights) = quintet_t5::load_pretrained(device, &directory)?;
    match model.config().class() {
        ModelClass::ConditionalGeneration => Ok((model, weights)),
        _ => Err(Failure::bad_input(format!("--model {name}: is no model that generates"))),
    }
}

pub(super) fn precision(name: Option<&str>, device: DeviceChoice) -> Result<Precision> {
    match name {
        None => Ok(Precision::default_on(device)),
        Some(name) => {
            serde_json::from_value(json!(name)).map_err(|error| Failure::bad_input(format!("--precision: {error}")))
        }
    }
}

/// Of full length, or any length from a quarter of it on, spread evenly. The latter by a formula that
/// benchmarks/step_torch.py has too.
pub(super) fn length(full: usize, row: usize, spread: u64, ragged: bool) -> usize {
    let least = full.div_ceil(4);
    let fraction = (row as u64 + 1) * spread % (1 << 32);
    if ragged { least + ((fraction * (full - least + 1) as u64) >> 32) as usize } else { full }
}

/// Arbitrary tokens.
pub(super) fn ids(vocabulary: usize, count: usize, salt: u64) -> Vec<u32> {
    (0..count as u64).map(|index| ((index * 2_654_435_761 + salt * 40_503) % vocabulary as u64) as u32).collect()
}

pub(super) fn sum(shape: &BatchShape, length: impl Fn(&(usize, usize)) -> usize) -> usize {
    shape.lengths.iter().map(length).sum()
}

/// Examples of arbitrary tokens.
pub(super) fn batch(model: &Model, shape: &BatchShape) -> Result<Batch> {
    let vocabulary = model.config().vocab_size;
    let offsets = |length: fn(&(usize, usize)) -> usize| -> Vec<u32> {
        let ends = shape.lengths.iter().scan(0, |end, lengths| {
            *end += length(lengths) as u32;
            Some(*end)
        });
        std::iter::once(0).chain(ends).collect()
    };
    Ok(Batch::new(
        model.device(),
        &ids(vocabulary, sum(shape, |lengths| lengths.0), 1),
        &offsets(|lengths| lengths.0),
        &ids(vocabulary, sum(shape, |lengths| lengths.1), 2),
        &offsets(|lengths| lengths.1),
        model.config().decoder_start_token_id,
    )?)
}
