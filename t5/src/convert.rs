//! Models of the same stacks for another purpose.

use quintet_kernels::DType;

use crate::config::{Config, ModelClass};
use crate::init::initialize;
use crate::{Error, Model, Parameters, Result};

/// A model that tells these classes apart: itself where it does already, else its stacks with a fresh head, drawn from the
/// seed.
///
/// # Errors
/// A user error where it tells other classes apart, or has no decoder.
pub fn into_classifier(model: Model, weights: Parameters, labels: &[String], seed: u64) -> Result<(Model, Parameters)> {
    let config = model.config();
    match config.class() {
        ModelClass::ConditionalGeneration => {}
        ModelClass::SequenceClassification if config.labels() == labels => return Ok((model, weights)),
        ModelClass::SequenceClassification => {
            let message = format!("the model tells {:?} apart, not {labels:?}", config.labels());
            return Err(Error::Config(message));
        }
        ModelClass::Encoder => {
            return Err(Error::Config("an encoder alone cannot classify: T5's classifiers have a decoder".to_string()));
        }
    }
    let (classifier, mut parameters) = converted(&model, config.clone().into_classifier(labels))?;
    initialize(classifier.config(), seed, &mut parameters)?;
    let prefix = ModelClass::SequenceClassification.prefix();
    parameters.copy_by_name(&weights, |name| name.strip_prefix(prefix).map(str::to_string))?;
    Ok((classifier, parameters))
}

/// A model's encoder alone.
///
/// # Errors
/// Memory.
pub fn into_encoder(model: Model, weights: Parameters) -> Result<(Model, Parameters)> {
    let prefix = model.config().class().prefix();
    let (encoder, mut parameters) = converted(&model, model.config().clone().into_encoder())?;
    parameters.copy_by_name(&weights, |name| Some(format!("{prefix}{name}")))?;
    Ok((encoder, parameters))
}

fn converted(model: &Model, config: Config) -> Result<(Model, Parameters)> {
    let other = Model::new(model.device(), config)?;
    let parameters = other.zero_parameters(DType::F32)?;
    Ok((other, parameters))
}
