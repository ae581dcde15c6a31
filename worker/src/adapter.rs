//! The adapter of a LoRA run: a fresh one, or one to go on with.

use std::path::Path;
use std::sync::Arc;

use quintet_kernels::DType;
use quintet_t5::{AdapterFiles, Arena, LoraSpec, Model, Parameters, adapter_arena, initialize_adapter};

use crate::Result;
use crate::config::LoraConfig;

/// What a LoRA run trains, over a base that stays as it is.
pub struct Adapter {
    pub spec: LoraSpec,
    /// f32.
    pub weights: Parameters,
    pub base: Base,
}

/// The model that an adapter is of.
#[derive(Clone, Debug)]
pub struct Base {
    /// What the job calls it.
    pub name: String,
    /// Of its weights as they were found, before a head was added.
    pub fingerprint: String,
}

impl Adapter {
    /// The adapter that a job asks for, for a model with these weights.
    ///
    /// # Errors
    /// A user error where it cannot be of this model.
    pub fn open(config: &LoraConfig, model: &Model, model_weights: &Parameters, base: Base, seed: u64) -> Result<Self> {
        let (spec, weights) = match &config.pretrained {
            Some(directory) => {
                let files = AdapterFiles::open(model, Path::new(directory))?;
                let weights = files.load(model.device(), &base.fingerprint)?;
                (files.spec, weights)
            }
            None => {
                let (spec, arena) = plan(config, model)?;
                let mut weights = Parameters::zeros(model.device(), arena, DType::F32)?;
                initialize_adapter(seed, model_weights, &mut weights)?;
                (spec, weights)
            }
        };
        Ok(Adapter { spec, weights, base })
    }
}

/// What a job's adapter is, and its arena, without any weights.
///
/// # Errors
/// A user error where it cannot be of this model.
pub fn plan(config: &LoraConfig, model: &Model) -> Result<(LoraSpec, Arc<Arena>)> {
    let (spec, arena) = match &config.pretrained {
        Some(directory) => {
            let files = AdapterFiles::open(model, Path::new(directory))?;
            (files.spec, files.arena)
        }
        None => {
            let spec = config.spec(model.config().is_classifier());
            let arena = adapter_arena(model, &spec)?;
            (spec, arena)
        }
    };
    Ok((spec, arena))
}
