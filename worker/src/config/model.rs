//! `[model]`: where the weights come from, and what for.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::check;
use crate::{Error, Result};

/// `model.task`: what the model is trained for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ModelTask {
    /// To write the target.
    #[default]
    #[serde(rename = "seq2seq")]
    Seq2Seq,
    /// To tell which of several classes the target is.
    SequenceClassification,
}

impl ModelTask {
    fn is_usual(&self) -> bool {
        *self == Self::default()
    }
}

/// `[model]`: where the weights come from.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelSection {
    /// A directory or a hub id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pretrained: Option<String>,
    /// The configuration of a model with fresh weights, in the keys of `config.json`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub architecture: Option<Map<String, Value>>,
    /// A built-in tokenizer's name, a `tokenizer.json`, or a directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<String>,
    /// Replaces the model configuration's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dropout_rate: Option<f32>,
    #[serde(default, skip_serializing_if = "ModelTask::is_usual")]
    pub task: ModelTask,
}

impl ModelSection {
    /// # Errors
    /// A user error that names the key and says what to do.
    pub fn validate(&self) -> Result<()> {
        match (&self.pretrained, &self.architecture) {
            (Some(_), Some(_)) => {
                return Err(Error::config("model", "give either pretrained or architecture, not both"));
            }
            (None, None) => {
                return Err(Error::config(
                    "model",
                    "give pretrained (a directory or a hub id), or architecture for fresh weights",
                ));
            }
            (None, Some(_)) if self.tokenizer.is_none() => {
                return Err(Error::config("model.tokenizer", "a model with fresh weights needs one, such as \"byt5\""));
            }
            _ => {}
        }
        if let Some(rate) = self.dropout_rate {
            check("model.dropout_rate", (0.0..1.0).contains(&rate), rate, "at least 0 and below 1")?;
        }
        Ok(())
    }
}
