//! What a model is to make of an input: a text, or one of several classes.

use std::path::Path;
use std::sync::Arc;

use quintet_data::{Classes, Objective, Splits};
use quintet_t5::{Config, Generation, Model, ModelClass, Parameters, into_classifier};

use crate::config::{EvaluationConfig, LoraConfig, ModelSection, ModelTask};
use crate::{Error, Result};

/// How predictions are made.
#[derive(Clone, Debug)]
pub enum Task {
    /// By generating, so.
    Generation(Generation),
    /// By choosing one of these.
    Classification(Arc<Classes>),
}

impl Task {
    /// The evaluation's, by a model from this directory, if it came from one.
    ///
    /// # Errors
    /// A user error that names the key.
    pub fn new(
        classes: Option<Arc<Classes>>,
        evaluation: &EvaluationConfig,
        config: &Config,
        directory: Option<&Path>,
    ) -> Result<Self> {
        match classes {
            Some(classes) => Ok(Self::Classification(classes)),
            None => Ok(Self::Generation(evaluation.resolve_generation(config, directory)?)),
        }
    }

    pub(crate) fn classes(&self) -> Option<&Arc<Classes>> {
        match self {
            Self::Classification(classes) => Some(classes),
            Self::Generation(_) => None,
        }
    }
}

/// The classes that a job's model is to tell apart, if that is its task: those of the model that it begins with, from this
/// directory, if that is a classifier, those of the adapter that it goes on with, or those that the training data has.
///
/// # Errors
/// A user error where the task, the model and the data do not fit each other.
pub fn classes(
    section: &ModelSection,
    lora: Option<&LoraConfig>,
    directory: Option<&Path>,
    splits: &Splits,
) -> Result<Option<Arc<Classes>>> {
    let pretrained = directory.map(quintet_t5::read_config).transpose()?;
    let class = pretrained.as_ref().map_or(ModelClass::ConditionalGeneration, Config::class);
    if class == ModelClass::Encoder {
        return Err(Error::config("model.pretrained", "is an encoder alone, which cannot be trained here"));
    }
    if section.task == ModelTask::Seq2Seq {
        return match class {
            ModelClass::SequenceClassification => {
                let problem = "is a classifier; to train it, set model.task = \"sequence_classification\"";
                Err(Error::config("model.pretrained", problem))
            }
            _ => Ok(None),
        };
    }
    let adapter = lora.and_then(|lora| lora.pretrained.as_deref());
    let known = match pretrained.filter(Config::is_classifier) {
        Some(config) => Some(config.labels()),
        None => adapter.map(|adapter| quintet_t5::adapter_labels(Path::new(adapter))).transpose()?.flatten(),
    };
    let classes = match known {
        Some(labels) => {
            let classes = Classes::new(labels);
            classes.check(&splits.train, "data.train")?;
            classes
        }
        None => Classes::of(&splits.train)?,
    };
    if let Some(validation) = &splits.validation {
        classes.check(validation, "data.validation")?;
    }
    Ok(Some(Arc::new(classes)))
}

/// Whether a job's data can be of this task.
///
/// # Errors
/// A user error that names the key.
pub fn check_objective(task: ModelTask, objective: Objective) -> Result<()> {
    match task {
        ModelTask::SequenceClassification if objective != Objective::Seq2Seq => Err(Error::config(
            "data.objective",
            "makes targets of its own, and a classifier needs classes; remove this",
        )),
        _ => Ok(()),
    }
}

/// The model for a task: with a fresh head where it is to classify and was none that does.
///
/// # Errors
/// A user error where it cannot be one.
pub fn model_for(
    classes: Option<&Classes>,
    model: Model,
    weights: Parameters,
    seed: u64,
) -> Result<(Model, Parameters)> {
    match classes {
        Some(classes) => Ok(into_classifier(model, weights, classes.names(), seed)?),
        None => Ok((model, weights)),
    }
}
