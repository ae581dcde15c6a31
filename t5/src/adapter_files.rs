//! PEFT's directories: `adapter_config.json` and `adapter_model.safetensors`.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use quintet_kernels::{DType, Device};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::arena::Arena;
use crate::convert::into_classifier;
use crate::hub_files::{WeightFiles, file_error, write_json, write_weights};
use crate::lora::{self, LoraSpec, PREFIX, TargetModules};
use crate::{Error, Model, Parameters, Result};

const CONFIG_FILE: &str = "adapter_config.json";
const WEIGHTS_FILE: &str = "adapter_model.safetensors";
/// The base model's fingerprint, in the metadata of the weights; PEFT reads none.
const BASE_KEY: &str = "base_model_blake3";

/// The names of a classifier's classes, likewise; in the order of their numbers, as a JSON list.
const LABELS_KEY: &str = "labels";
const SEQUENCE_CLASSIFICATION: &str = "SEQ_CLS";
/// What of a classifier's head tells how many classes it has.
const HEAD_BIAS: &str = "base_model.model.classification_head.out_proj.bias";

/// The files of an adapter, and what they say of themselves.
pub struct AdapterFiles {
    pub spec: LoraSpec,
    /// What it trains of the model that it was opened for.
    pub arena: Arc<Arena>,
    path: PathBuf,
    weights: WeightFiles,
}

/// What of PEFT's configuration decides numbers; other keys are allowed where they are empty.
#[derive(Deserialize)]
struct AdapterConfig {
    peft_type: String,
    #[serde(default)]
    task_type: Option<String>,
    #[serde(default)]
    base_model_name_or_path: Option<String>,
    r: usize,
    #[serde(default = "default_alpha")]
    lora_alpha: f64,
    #[serde(default)]
    lora_dropout: f32,
    #[serde(default)]
    target_modules: Option<TargetModules>,
    #[serde(default)]
    use_rslora: bool,
    #[serde(default)]
    modules_to_save: Option<Vec<String>>,
    #[serde(default)]
    bias: Option<String>,
    #[serde(flatten)]
    others: Map<String, Value>,
}

/// PEFT's.
fn default_alpha() -> f64 {
    8.0
}

/// Keys of variants of LoRA that compute something else.
const VARIANTS: [&str; 12] = [
    "use_dora",
    "alpha_pattern",
    "rank_pattern",
    "lora_bias",
    "layer_replication",
    "use_qalora",
    "use_bdlora",
    "fan_in_fan_out",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
];

/// Whether a directory holds an adapter and no model.
pub fn is_adapter(directory: &Path) -> bool {
    directory.join(CONFIG_FILE).is_file() && !directory.join("config.json").is_file()
}

/// The model that an adapter's configuration names: a directory or a hub id.
pub fn adapter_base(directory: &Path) -> Result<String> {
    let path = directory.join(CONFIG_FILE);
    let none = || file_error(&path, "names no base_model_name_or_path; give the model and this as its --adapter");
    read_config(&path)?.base_model_name_or_path.filter(|name| !name.is_empty()).ok_or_else(none)
}

fn read_config(path: &Path) -> Result<AdapterConfig> {
    let text = fs::read_to_string(path).map_err(|error| file_error(path, format!("cannot read: {error}")))?;
    let config: AdapterConfig =
        serde_json::from_str(&text).map_err(|error| file_error(path, format!("not a LoRA configuration: {error}")))?;
    if config.peft_type != "LORA" {
        return Err(file_error(path, format!("peft_type {} is not read; LORA is", config.peft_type)));
    }
    if let Some(bias) = config.bias.as_ref().filter(|bias| *bias != "none") {
        return Err(file_error(path, format!("bias = {bias:?} is not read: T5's linear layers have none")));
    }
    let is_empty = |value: &Value| match value {
        Value::Null | Value::Bool(false) => true,
        Value::Object(map) => map.is_empty(),
        Value::Array(list) => list.is_empty(),
        _ => false,
    };
    if let Some(key) = VARIANTS.iter().find(|key| config.others.get(**key).is_some_and(|value| !is_empty(value))) {
        return Err(file_error(path, format!("{key} is set, a variant of LoRA that is not read")));
    }
    Ok(config)
}

/// The names of the classes that an adapter's head tells apart, if it has a head and says what it is for.
///
/// # Errors
/// A user error where the files are damaged.
pub fn adapter_labels(directory: &Path) -> Result<Option<Vec<String>>> {
    let path = directory.join(WEIGHTS_FILE);
    labels_in(&WeightFiles::open_file(path.clone())?, &path)
}

fn labels_in(weights: &WeightFiles, path: &Path) -> Result<Option<Vec<String>>> {
    let Some(text) = weights.metadata(path, LABELS_KEY)? else { return Ok(None) };
    let labels = serde_json::from_str(&text);
    labels.map(Some).map_err(|error| file_error(path, format!("{LABELS_KEY} is no list of names: {error}")))
}

/// A model as the adapter of a directory needs it: as a classifier, where that is what the adapter is of.
fn base_for(model: Model, weights: Parameters, directory: &Path) -> Result<(Model, Parameters)> {
    let (config_path, path) = (directory.join(CONFIG_FILE), directory.join(WEIGHTS_FILE));
    let of_classifier = read_config(&config_path)?.task_type.as_deref() == Some(SEQUENCE_CLASSIFICATION);
    if !of_classifier || model.config().is_classifier() {
        return Ok((model, weights));
    }
    let files = WeightFiles::open_file(path.clone())?;
    let Some(shape) = files.shape(HEAD_BIAS)? else {
        let message = "is of a classifier, but has no classification head, and the model has none; PEFT saves one with \
                       modules_to_save = [\"classification_head\"]";
        return Err(file_error(&path, message));
    };
    let unnamed = || (0..shape.first().copied().unwrap_or(0)).map(|id| format!("LABEL_{id}")).collect();
    let labels: Vec<String> = labels_in(&files, &path)?.unwrap_or_else(unnamed);
    // Its head is the adapter's, so that no seed matters.
    into_classifier(model, weights, &labels, 0)
}

/// A model with the adapter of a directory folded into its f32 weights.
///
/// A head that is tied to the embedding is untied if it has an adapter, which the embedding must not get. A classifier's
/// adapter makes a classifier of a model that is none.
///
/// # Errors
/// As those of [`AdapterFiles`].
pub fn with_adapter(model: Model, weights: Parameters, directory: &Path) -> Result<(Model, Parameters)> {
    let fingerprint = weights.digest()?.to_hex().to_string();
    let (model, weights) = base_for(model, weights, directory)?;
    let mut files = AdapterFiles::open(&model, directory)?;
    let adapter = files.load(model.device(), &fingerprint)?;
    let is_tied = model.layout().tied_head.is_some_and(|head| files.arena.adapters(head).next().is_some());
    if !is_tied {
        let mut weights = weights;
        lora::merge_adapter(&adapter, &mut weights)?;
        return Ok((model, weights));
    }
    let (model, mut weights) = lora::untie(&model, &weights)?;
    files = AdapterFiles::open(&model, directory)?;
    lora::merge_adapter(&files.load(model.device(), &fingerprint)?, &mut weights)?;
    Ok((model, weights))
}

/// All but copies of frozen weights, which PEFT saves for an adapter of the output head.
fn own_tensors(files: &WeightFiles) -> impl Iterator<Item = &str> {
    files.names().filter(|name| !name.ends_with(".base_layer.weight"))
}

impl AdapterFiles {
    /// An adapter of this model.
    ///
    /// # Errors
    /// A user error where the files are damaged, or cannot belong to the model.
    pub fn open(model: &Model, directory: &Path) -> Result<Self> {
        let config_path = directory.join(CONFIG_FILE);
        if !config_path.is_file() {
            return Err(file_error(directory, format!("holds no {CONFIG_FILE}; name the directory of an adapter")));
        }
        let config = read_config(&config_path)?;
        let spec = LoraSpec {
            r: config.r,
            lora_alpha: config.lora_alpha,
            lora_dropout: config.lora_dropout,
            target_modules: config.target_modules.unwrap_or(TargetModules::Names(Vec::new())),
            use_rslora: config.use_rslora,
            modules_to_save: config.modules_to_save.unwrap_or_default(),
        };
        let in_file = |error| match error {
            Error::Config(message) => file_error(&config_path, message),
            other => other,
        };
        spec.validate().map_err(in_file)?;
        let path = directory.join(WEIGHTS_FILE);
        let weights = WeightFiles::open_file(path.clone())?;
        let arena = arena_of(model, &spec, &weights, &path).map_err(in_file)?;
        if let Some(labels) = labels_in(&weights, &path)?
            && labels != model.config().labels()
        {
            let message = format!("tells {labels:?} apart, and the model {:?}", model.config().labels());
            return Err(file_error(&path, message));
        }
        Ok(AdapterFiles { spec, arena, path, weights })
    }

    /// The weights, in f32, for a base with this fingerprint.
    ///
    /// # Errors
    /// A user error where shapes do not fit, or [`save_adapter`] noted another base.
    pub fn load(&self, device: &Device, base_fingerprint: &str) -> Result<Parameters> {
        let trained_on = self.weights.metadata(&self.path, BASE_KEY)?;
        if let Some(trained_on) = trained_on.filter(|trained_on| trained_on != base_fingerprint) {
            let message = format!(
                "is an adapter of another model: its base has the fingerprint {trained_on:.12}…, this model {base_fingerprint:.12}…"
            );
            return Err(file_error(&self.path, message));
        }
        let mut parameters = Parameters::zeros(device, self.arena.clone(), DType::F32)?;
        for tensor in self.arena.tensors() {
            let mut values = vec![0.0; tensor.range.len()];
            self.weights.read(tensor, "this model and the adapter's r ask", &mut values)?;
            parameters.write(tensor.range.clone(), &values)?;
        }
        Ok(parameters)
    }
}

/// The arena of what a file holds.
fn arena_of(model: &Model, spec: &LoraSpec, files: &WeightFiles, path: &Path) -> Result<Arc<Arena>> {
    let mut targets = BTreeSet::new();
    let mut saved = BTreeSet::new();
    for name in own_tensors(files) {
        let inner = name.strip_prefix(PREFIX).unwrap_or(name);
        match inner.strip_suffix(".lora_A.weight").or(inner.strip_suffix(".lora_B.weight")) {
            Some(target) => targets.insert(target),
            None => saved.insert(inner),
        };
    }
    let arena = lora::build(
        model.layout(),
        spec,
        |path| targets.contains(path),
        |tensor| saved.contains(tensor.name.as_str()),
    )?;
    let known: BTreeSet<&str> = arena.tensors().iter().map(|tensor| tensor.name.as_str()).collect();
    match own_tensors(files).find(|name| !known.contains(name)) {
        None if known.is_empty() => Err(file_error(path, "holds no tensors")),
        None => Ok(arena),
        Some(name) => {
            let message = "is no part of this model; the adapter is of another".to_string();
            Err(Error::Tensor { path: path.to_path_buf(), tensor: name.to_string(), message })
        }
    }
}

/// Writes an adapter as PEFT does, into a directory that exists. `base` is what the job calls the model.
pub fn save_adapter(
    model: &Model,
    spec: &LoraSpec,
    parameters: &Parameters,
    base: &str,
    base_fingerprint: &str,
    directory: &Path,
) -> Result<()> {
    let is_classifier = model.config().is_classifier();
    let task_type = if is_classifier { SEQUENCE_CLASSIFICATION } else { "SEQ_2_SEQ_LM" };
    // By way of text, in which an f32 has its shortest digits: 0.1, not 0.10000000149011612.
    let dropout: Value = spec.lora_dropout.to_string().parse::<f64>().map_or(Value::Null, Value::from);
    let config = json!({
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base,
        "r": spec.r,
        "lora_alpha": whole(spec.lora_alpha),
        "lora_dropout": dropout,
        "target_modules": spec.target_modules.resolved(model.layout())?,
        "bias": "none",
        "modules_to_save": (!spec.modules_to_save.is_empty()).then_some(&spec.modules_to_save),
        "use_rslora": spec.use_rslora,
        "use_dora": false,
        "fan_in_fan_out": false,
        "inference_mode": true,
    });
    write_json(&directory.join(CONFIG_FILE), &config)?;
    let mut metadata = json!({"format": "pt", BASE_KEY: base_fingerprint});
    if is_classifier {
        metadata[LABELS_KEY] = Value::from(model.config().labels()).to_string().into();
    }
    write_weights(parameters, &metadata, &directory.join(WEIGHTS_FILE))
}

/// A whole number as one: PEFT's `lora_alpha` is an integer.
fn whole(value: f64) -> Value {
    if value.fract() == 0.0 && value < 1e15 { Value::from(value as u64) } else { Value::from(value) }
}
