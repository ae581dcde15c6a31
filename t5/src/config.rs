//! `config.json` as Hugging Face writes it, and what it means.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::{Error, Result};

/// A T5's architecture. The names and defaults are those of Hugging Face's `T5Config`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Config {
    pub model_type: ModelType,
    pub vocab_size: usize,
    pub d_model: usize,
    pub d_kv: usize,
    pub d_ff: usize,
    pub num_layers: usize,
    /// As many as `num_layers` where the file does not say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub num_decoder_layers: Option<usize>,
    pub num_heads: usize,
    pub relative_attention_num_buckets: usize,
    pub relative_attention_max_distance: usize,
    pub dropout_rate: f32,
    /// Of a classification head.
    pub classifier_dropout: f32,
    pub layer_norm_epsilon: f32,
    pub initializer_factor: f32,
    pub feed_forward_proj: FeedForwardKind,
    pub tie_word_embeddings: bool,
    /// Whether the decoder's output is multiplied by `d_model^-½` before the head. transformers 5 writes it; elsewhere it
    /// follows from tying.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scale_decoder_outputs: Option<bool>,
    pub pad_token_id: u32,
    pub eos_token_id: u32,
    pub decoder_start_token_id: u32,
    /// Everything else in the file, written back as it was.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
    /// What the `generation_config.json` beside the file says, written back as it was.
    #[serde(skip)]
    pub generation: Map<String, Value>,
}

/// Which of the family a checkpoint is; they share code, and UMT5 has a bias table in every layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ModelType {
    T5,
    Mt5,
    Umt5,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FeedForwardKind {
    /// `wo(relu(wi x))`
    Relu,
    /// `wo(gelu_tanh(wi_0 x) · wi_1 x)`
    GatedGelu,
}

/// What a model is for: which parts it has besides the encoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ModelClass {
    /// A decoder and an output head.
    ConditionalGeneration,
    /// A decoder and a classification head.
    SequenceClassification,
    /// Nothing.
    Encoder,
}

impl ModelClass {
    /// All but the usual one.
    const SPECIAL: [Self; 2] = [Self::SequenceClassification, Self::Encoder];

    /// What transformers calls it, behind the family's name.
    fn suffix(self) -> &'static str {
        match self {
            Self::ConditionalGeneration => "ForConditionalGeneration",
            Self::SequenceClassification => "ForSequenceClassification",
            Self::Encoder => "EncoderModel",
        }
    }

    /// What transformers puts before the names of the stacks' tensors.
    pub(crate) fn prefix(self) -> &'static str {
        if self == Self::SequenceClassification { "transformer." } else { "" }
    }
}

impl Default for Config {
    fn default() -> Self {
        Config {
            model_type: ModelType::T5,
            vocab_size: 32128,
            d_model: 512,
            d_kv: 64,
            d_ff: 2048,
            num_layers: 6,
            num_decoder_layers: None,
            num_heads: 8,
            relative_attention_num_buckets: 32,
            relative_attention_max_distance: 128,
            dropout_rate: 0.1,
            classifier_dropout: 0.0,
            layer_norm_epsilon: 1e-6,
            initializer_factor: 1.0,
            feed_forward_proj: FeedForwardKind::Relu,
            tie_word_embeddings: true,
            scale_decoder_outputs: None,
            pad_token_id: 0,
            eos_token_id: 1,
            decoder_start_token_id: 0,
            extra: Map::new(),
            generation: Map::new(),
        }
    }
}

impl Config {
    /// Width of all heads together; need not be `d_model`.
    pub fn inner(&self) -> usize {
        self.num_heads * self.d_kv
    }

    pub fn decoder_layers(&self) -> usize {
        self.num_decoder_layers.unwrap_or(self.num_layers)
    }

    pub fn is_gated(&self) -> bool {
        self.feed_forward_proj == FeedForwardKind::GatedGelu
    }

    /// Whether every layer has its own relative bias table, not only the first.
    pub fn bias_in_every_layer(&self) -> bool {
        self.model_type == ModelType::Umt5
    }

    /// What the model is for, by the name of its class in transformers.
    pub fn class(&self) -> ModelClass {
        let names = self.extra.get("architectures").and_then(Value::as_array);
        let mut names = names.into_iter().flatten().filter_map(Value::as_str);
        let with_suffix = |name: &str| ModelClass::SPECIAL.into_iter().find(|class| name.ends_with(class.suffix()));
        names.find_map(with_suffix).unwrap_or(ModelClass::ConditionalGeneration)
    }

    /// The name of its class in transformers.
    pub fn class_name(&self) -> String {
        self.name_of(self.class())
    }

    fn name_of(&self, class: ModelClass) -> String {
        let family = match self.model_type {
            ModelType::T5 => "T5",
            ModelType::Mt5 => "MT5",
            ModelType::Umt5 => "UMT5",
        };
        format!("{family}{}", class.suffix())
    }

    pub fn is_classifier(&self) -> bool {
        self.class() == ModelClass::SequenceClassification
    }

    fn with_class(mut self, class: ModelClass) -> Self {
        let name = self.name_of(class);
        self.extra.insert("architectures".to_string(), vec![name].into());
        self
    }

    /// The same stacks in a model that tells these classes apart.
    #[must_use]
    pub fn into_classifier(self, labels: &[String]) -> Self {
        let mut config = self.with_class(ModelClass::SequenceClassification);
        let numbered = || labels.iter().enumerate();
        let id2label: Map<String, Value> =
            numbered().map(|(id, label)| (id.to_string(), label.as_str().into())).collect();
        let label2id: Map<String, Value> = numbered().map(|(id, label)| (label.clone(), id.into())).collect();
        config.extra.remove("num_labels");
        config.extra.insert("id2label".to_string(), id2label.into());
        config.extra.insert("label2id".to_string(), label2id.into());
        config.extra.insert("problem_type".to_string(), SINGLE_LABEL.into());
        config
    }

    /// The encoder alone.
    #[must_use]
    pub fn into_encoder(self) -> Self {
        self.with_class(ModelClass::Encoder)
    }

    /// Names of a classifier's classes, by their numbers.
    pub fn labels(&self) -> Vec<String> {
        let names = self.extra.get("id2label").and_then(Value::as_object);
        let name = |id: usize| names.and_then(|names| names.get(&id.to_string())?.as_str());
        (0..self.num_labels()).map(|id| name(id).map_or_else(|| format!("LABEL_{id}"), str::to_string)).collect()
    }

    /// The number of a classifier's classes; two where the file does not say, as in transformers.
    pub fn num_labels(&self) -> usize {
        let count = self.extra.get("num_labels").and_then(Value::as_u64);
        let names = self.extra.get("id2label").and_then(Value::as_object);
        names.map_or(count.map_or(2, |count| count as usize), Map::len)
    }

    /// What the logits are multiplied by.
    pub fn head_scale(&self) -> f32 {
        let generates = self.class() == ModelClass::ConditionalGeneration;
        if generates && self.scale_decoder_outputs.unwrap_or(self.tie_word_embeddings) {
            (self.d_model as f32).powf(-0.5)
        } else {
            1.0
        }
    }

    /// Checks every range; the message names the key.
    pub fn validate(&self) -> Result<()> {
        let sizes = [
            ("vocab_size", self.vocab_size, 3, 1 << 24),
            ("d_model", self.d_model, 1, 1 << 16),
            ("d_kv", self.d_kv, 1, 1 << 12),
            ("d_ff", self.d_ff, 1, 1 << 20),
            ("num_layers", self.num_layers, 1, 1 << 12),
            ("num_decoder_layers", self.decoder_layers(), 1, 1 << 12),
            ("num_heads", self.num_heads, 1, 1 << 12),
            ("relative_attention_num_buckets", self.relative_attention_num_buckets, 4, 1 << 12),
            ("relative_attention_max_distance", self.relative_attention_max_distance, 2, 1 << 20),
        ];
        for (key, value, least, most) in sizes {
            if !(least..=most).contains(&value) {
                return Err(Error::Config(format!("{key} = {value} is out of range: {least} to {most}")));
            }
        }
        if self.relative_attention_max_distance <= self.relative_attention_num_buckets / 2 {
            return Err(Error::Config(format!(
                "relative_attention_max_distance = {} must be more than half of relative_attention_num_buckets = {}",
                self.relative_attention_max_distance, self.relative_attention_num_buckets
            )));
        }
        if !(0.0..1.0).contains(&self.dropout_rate) {
            return Err(Error::Config(format!("dropout_rate = {} is out of range: 0 to below 1", self.dropout_rate)));
        }
        for (key, value) in
            [("layer_norm_epsilon", self.layer_norm_epsilon), ("initializer_factor", self.initializer_factor)]
        {
            if !(value > 0.0 && value.is_finite()) {
                return Err(Error::Config(format!("{key} = {value} must be more than 0")));
            }
        }
        for (key, id) in [
            ("pad_token_id", self.pad_token_id),
            ("eos_token_id", self.eos_token_id),
            ("decoder_start_token_id", self.decoder_start_token_id),
        ] {
            if id as usize >= self.vocab_size {
                return Err(Error::Config(format!("{key} = {id} is not below vocab_size = {}", self.vocab_size)));
            }
        }
        self.validate_classes()
    }

    fn validate_classes(&self) -> Result<()> {
        let dropout = self.classifier_dropout;
        if !(0.0..1.0).contains(&dropout) {
            return Err(Error::Config(format!("classifier_dropout = {dropout} is out of range: 0 to below 1")));
        }
        if !self.is_classifier() {
            return Ok(());
        }
        match self.extra.get("problem_type") {
            None | Some(Value::Null) => {}
            Some(kind) if kind == SINGLE_LABEL => {}
            Some(other) => {
                return Err(Error::Config(format!("problem_type = {other} is not supported; {SINGLE_LABEL} is")));
            }
        }
        let (count, most) = (self.num_labels(), 1 << 12);
        if !(2..=most).contains(&count) {
            return Err(Error::Config(format!("a classifier of {count} classes; there must be 2 to {most}")));
        }
        let names = self.extra.get("id2label").and_then(Value::as_object);
        let missing = |id: &usize| names.is_some_and(|names| !names.get(&id.to_string()).is_some_and(Value::is_string));
        match (0..count).find(missing) {
            Some(id) => Err(Error::Config(format!("id2label has {count} names, but none for class {id}"))),
            None => Ok(()),
        }
    }
}

/// transformers' name of the only kind of classification there is here: one class an example.
const SINGLE_LABEL: &str = "single_label_classification";
