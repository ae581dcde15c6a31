//! `[lora]`: what is trained instead of the whole model.

use quintet_t5::{LoraSpec, TargetModules};
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// `[lora]`, with the names of PEFT's `LoraConfig`. The section alone, without keys, asks for PEFT's defaults.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LoraConfig {
    /// The adapters' rank.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub r: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lora_alpha: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lora_dropout: Option<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_modules: Option<TargetModules>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub use_rslora: Option<bool>,
    /// Modules that are trained whole; of a classifier, its head always is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub modules_to_save: Option<Vec<String>>,
    /// The directory of an adapter to go on with.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pretrained: Option<String>,
}

/// PEFT's module of a T5 classifier's head, which it does not save unless told to.
const CLASSIFICATION_HEAD: &str = "classification_head";

impl LoraConfig {
    /// # Errors
    /// A user error that names the key and says what to do.
    pub fn validate(&self) -> Result<()> {
        if self.pretrained.is_some() {
            for (key, is_given) in [
                ("lora.r", self.r.is_some()),
                ("lora.lora_alpha", self.lora_alpha.is_some()),
                ("lora.target_modules", self.target_modules.is_some()),
                ("lora.use_rslora", self.use_rslora.is_some()),
                ("lora.modules_to_save", self.modules_to_save.is_some()),
            ] {
                if is_given {
                    return Err(Error::config(key, "the adapter of lora.pretrained has its own; leave it out"));
                }
            }
        }
        Ok(self.spec(false).validate()?)
    }

    /// Of a fresh adapter.
    pub fn spec(&self, is_classifier: bool) -> LoraSpec {
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_string()).collect();
        let mut modules_to_save: Vec<String> = self.modules_to_save.clone().unwrap_or_default();
        if is_classifier && !modules_to_save.iter().any(|name| name == CLASSIFICATION_HEAD) {
            modules_to_save.push(CLASSIFICATION_HEAD.to_string());
        }
        LoraSpec {
            r: self.r.unwrap_or(8),
            lora_alpha: self.lora_alpha.unwrap_or(8.0),
            lora_dropout: self.lora_dropout.unwrap_or(0.0),
            target_modules: self.target_modules.clone().unwrap_or(TargetModules::Names(names(&["q", "v"]))),
            use_rslora: self.use_rslora.unwrap_or(false),
            modules_to_save,
        }
    }
}
