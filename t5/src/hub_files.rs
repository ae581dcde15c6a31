//! Hugging Face's directories: `config.json`, `generation_config.json`, `model.safetensors`, split or not.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::ops::Deref;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use memmap2::Mmap;
use quintet_kernels::{DType, Device};
use safetensors::SafeTensorError;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::{Value, json};

use crate::arena::NamedTensor;
use crate::config::{Config, ModelClass};
use crate::{Error, Model, Parameters, Result};

/// The model of a directory, with its weights in f32.
///
/// Whether the head is tied is decided by what the weights hold, because versions of transformers disagree about
/// `tie_word_embeddings` for the v1.1 family.
pub fn load_pretrained(device: &Device, directory: &Path) -> Result<(Model, Parameters)> {
    let (model, weights) = open(device, directory)?;
    let parameters = read(&model, &weights)?;
    Ok((model, parameters))
}

/// The model of a directory without its weights, of which only names and shapes are read.
pub fn open_pretrained(device: &Device, directory: &Path) -> Result<Model> {
    Ok(open(device, directory)?.0)
}

fn open(device: &Device, directory: &Path) -> Result<(Model, WeightFiles)> {
    let weights = WeightFiles::open(directory)?;
    let config = read_config(directory)?;
    let model = model_of(device, config, &weights)?;
    Ok((model, weights))
}

const CONFIG_FILE: &str = "config.json";
pub(crate) const GENERATION_FILE: &str = "generation_config.json";

/// The configuration of a directory's model, as it is written there.
pub fn read_config(directory: &Path) -> Result<Config> {
    let path = directory.join(CONFIG_FILE);
    let mut config = parse_config(&path, &read_text(&path)?)?;
    let path = directory.join(GENERATION_FILE);
    if path.is_file() {
        let keys = serde_json::from_str(&read_text(&path)?);
        config.generation = keys.map_err(|error| file_error(&path, format!("not a JSON object: {error}")))?;
    }
    Ok(config)
}

fn read_text(path: &Path) -> Result<String> {
    fs::read_to_string(path).map_err(|error| file_error(path, format!("cannot read: {error}")))
}

fn parse_config(path: &Path, text: &str) -> Result<Config> {
    let config: Config =
        serde_json::from_str(text).map_err(|error| file_error(path, format!("not a T5 configuration: {error}")))?;
    config.validate().map_err(|error| match error {
        Error::Config(message) => file_error(path, message),
        other => other,
    })?;
    Ok(config)
}

/// A model that is part of the program: the text of its `config.json` and the bytes of its `model.safetensors`.
pub fn load_embedded(device: &Device, config: &str, weights: &'static [u8]) -> Result<(Model, Parameters)> {
    let mut files = WeightFiles::default();
    files.add("model.safetensors".into(), Box::new(weights))?;
    let model = model_of(device, parse_config(Path::new(CONFIG_FILE), config)?, &files)?;
    let parameters = read(&model, &files)?;
    Ok((model, parameters))
}

fn model_of(device: &Device, mut config: Config, weights: &WeightFiles) -> Result<Model> {
    let class = config.class();
    if class == ModelClass::ConditionalGeneration {
        decide_tying(&mut config, weights)?;
    }
    let model = Model::new(device, config)?;
    let mut known: HashSet<&str> = model.layout().tensors().iter().map(|tensor| tensor.name.as_str()).collect();
    known.insert("lm_head.weight");
    let is_alias = |name: &str| name.strip_prefix(class.prefix()).is_some_and(|name| IGNORED.contains(&name));
    if let Some((name, path)) = weights.paths.iter().find(|(name, _)| !known.contains(name.as_str()) && !is_alias(name))
    {
        let message = "is no part of this architecture; check config.json".to_string();
        return Err(Error::Tensor { path: path.clone(), tensor: name.clone(), message });
    }
    Ok(model)
}

/// For messages: who asks for a shape.
const CONFIG_ASKS: &str = "config.json asks";

fn read(model: &Model, weights: &WeightFiles) -> Result<Parameters> {
    // Before memory is taken for them: a configuration can name any size, files are as large as they are.
    model.layout().tensors().iter().try_for_each(|tensor| weights.find(tensor, CONFIG_ASKS).map(|_| ()))?;
    let mut parameters = model.zero_parameters(DType::F32)?;
    for tensor in model.layout().tensors() {
        let mut values = vec![0.0; tensor.range.len()];
        weights.read(tensor, CONFIG_ASKS, &mut values)?;
        parameters.write(tensor.range.clone(), &values)?;
    }
    Ok(parameters)
}

/// Aliases and a table without effect that old files contain.
const IGNORED: [&str; 3] = [
    "encoder.embed_tokens.weight",
    "decoder.embed_tokens.weight",
    "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
];

pub(crate) fn file_error(path: &Path, message: impl Into<String>) -> Error {
    Error::File { path: path.to_path_buf(), message: message.into() }
}

/// A head of its own that differs from the embedding is untied, whatever the configuration says.
fn decide_tying(config: &mut Config, weights: &WeightFiles) -> Result<()> {
    let tied = match weights.tensor("lm_head.weight")? {
        None => true,
        Some(head) => {
            config.tie_word_embeddings
                && weights.tensor("shared.weight")?.is_some_and(|shared| shared.data() == head.data())
        }
    };
    if tied != config.tie_word_embeddings && config.scale_decoder_outputs.is_none() {
        // The scale belongs to the architecture that the configuration names, unless it was only ever implied by tying.
        config.scale_decoder_outputs = Some(tied && config.tie_word_embeddings);
    }
    config.tie_word_embeddings = tied;
    if config.scale_decoder_outputs == Some(tied) {
        config.scale_decoder_outputs = None;
    }
    Ok(())
}

/// The contents of a file, mapped or embedded.
type Bytes = Box<dyn Deref<Target = [u8]>>;

/// The safetensors of a model, and which of them holds which tensor.
#[derive(Default)]
pub(crate) struct WeightFiles {
    files: HashMap<PathBuf, Bytes>,
    paths: BTreeMap<String, PathBuf>,
}

impl WeightFiles {
    fn open(directory: &Path) -> Result<Self> {
        if !directory.is_dir() {
            return Err(file_error(directory, "no such directory; a model is a directory with config.json"));
        }
        let index = directory.join("model.safetensors.index.json");
        let single = directory.join("model.safetensors");
        let mut weights = WeightFiles::default();
        let names = if single.is_file() {
            vec![single]
        } else if index.is_file() {
            shard_paths(directory, &index)?
        } else {
            return Err(file_error(directory, "holds no model.safetensors (PyTorch's .bin files are not read)"));
        };
        for path in names {
            let map = map(&path)?;
            weights.add(path, Box::new(map))?;
        }
        Ok(weights)
    }

    /// A single file.
    pub(crate) fn open_file(path: PathBuf) -> Result<Self> {
        let mut weights = WeightFiles::default();
        let map = map(&path)?;
        weights.add(path, Box::new(map))?;
        Ok(weights)
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.paths.keys().map(String::as_str)
    }

    /// The shape of a tensor, if there is one of this name.
    pub(crate) fn shape(&self, name: &str) -> Result<Option<Vec<usize>>> {
        Ok(self.tensor(name)?.map(|tensor| tensor.shape().to_vec()))
    }

    /// A value of the metadata of one of the files.
    pub(crate) fn metadata(&self, path: &Path, key: &str) -> Result<Option<String>> {
        let (_, metadata) = SafeTensors::read_metadata(&self.files[path]).map_err(|error| not_whole(path, &error))?;
        Ok(metadata.metadata().as_ref().and_then(|metadata| metadata.get(key).cloned()))
    }

    fn add(&mut self, path: PathBuf, bytes: Bytes) -> Result<()> {
        for name in parse(&path, &bytes)?.names() {
            self.paths.insert(name.to_string(), path.clone());
        }
        self.files.insert(path, bytes);
        Ok(())
    }

    fn tensor(&self, name: &str) -> Result<Option<TensorView<'_>>> {
        let Some(path) = self.paths.get(name) else { return Ok(None) };
        let tensors = parse(path, &self.files[path])?;
        Ok(tensors.tensor(name).ok())
    }

    /// A tensor, whose shape is as `what` asks for.
    fn find(&self, tensor: &NamedTensor, what: &str) -> Result<TensorView<'_>> {
        let found = match self.tensor(&tensor.name)? {
            Some(found) => found,
            // The embedding under the names of its aliases.
            None => match tensor.name.strip_suffix("shared.weight") {
                Some(prefix) => {
                    let alias = |name: &str| self.tensor(&format!("{prefix}{name}"));
                    alias(IGNORED[0])?.or(alias(IGNORED[1])?).ok_or_else(|| self.missing(tensor))?
                }
                None => return Err(self.missing(tensor)),
            },
        };
        if found.shape() != tensor.shape {
            return Err(self.unfit(tensor, format!("shape {:?}, but {what} for {:?}", found.shape(), tensor.shape)));
        }
        Ok(found)
    }

    /// The values of a tensor, whose shape is as `what` asks for.
    pub(crate) fn read(&self, tensor: &NamedTensor, what: &str, target: &mut [f32]) -> Result<()> {
        let found = self.find(tensor, what)?;
        decode(found.dtype(), found.data(), target).map_err(|message| self.unfit(tensor, message))
    }

    fn unfit(&self, tensor: &NamedTensor, message: String) -> Error {
        let path = self.paths.get(&tensor.name).cloned().unwrap_or_default();
        Error::Tensor { path, tensor: tensor.name.clone(), message }
    }

    fn missing(&self, tensor: &NamedTensor) -> Error {
        let path = self.files.keys().min().cloned().unwrap_or_default();
        let message = "is missing; the file does not fit config.json".to_string();
        Error::Tensor { path, tensor: tensor.name.clone(), message }
    }
}

fn map(path: &Path) -> Result<Mmap> {
    let file = File::open(path).map_err(|error| file_error(path, format!("cannot open: {error}")))?;
    // SAFETY: the map is only read, through a parser that checks every offset; a file that another process cuts short
    // while it is being read is outside what can be guarded against, as for any mapped file.
    unsafe { Mmap::map(&file) }.map_err(|error| file_error(path, format!("cannot map: {error}")))
}

fn parse<'a>(path: &Path, bytes: &'a [u8]) -> Result<SafeTensors<'a>> {
    SafeTensors::deserialize(bytes).map_err(|error| not_whole(path, &error))
}

fn not_whole(path: &Path, error: &SafeTensorError) -> Error {
    file_error(path, format!("not a whole safetensors file ({error}); fetch or copy it again"))
}

/// The shards that an index names, which must be plain file names beside it.
fn shard_paths(directory: &Path, index: &Path) -> Result<Vec<PathBuf>> {
    let text = fs::read_to_string(index).map_err(|error| file_error(index, format!("cannot read: {error}")))?;
    let value: Value = serde_json::from_str(&text).map_err(|error| file_error(index, format!("not JSON: {error}")))?;
    let map = value.get("weight_map").and_then(Value::as_object);
    let map = map.ok_or_else(|| file_error(index, "has no weight_map"))?;
    let mut names = HashSet::new();
    for name in map.values() {
        let name =
            name.as_str().ok_or_else(|| file_error(index, "weight_map names a file by something not a string"))?;
        if Path::new(name).file_name() != Some(name.as_ref()) {
            return Err(file_error(index, format!("weight_map leaves the directory: {name}")));
        }
        names.insert(name);
    }
    let mut paths: Vec<PathBuf> = names.into_iter().map(|name| directory.join(name)).collect();
    paths.sort();
    Ok(paths)
}

fn decode(dtype: Dtype, bytes: &[u8], target: &mut [f32]) -> std::result::Result<(), String> {
    match dtype {
        Dtype::F32 => convert(bytes, target, f32::from_le_bytes),
        Dtype::BF16 => convert(bytes, target, |bytes| bf16::from_le_bytes(bytes).to_f32()),
        Dtype::F16 => convert(bytes, target, |bytes| f16::from_le_bytes(bytes).to_f32()),
        other => return Err(format!("type {other:?} is not read; F32, BF16 and F16 are")),
    }
    Ok(())
}

fn convert<const SIZE: usize>(bytes: &[u8], target: &mut [f32], element: impl Fn([u8; SIZE]) -> f32) {
    let (elements, rest) = bytes.as_chunks::<SIZE>();
    assert!(rest.is_empty() && elements.len() == target.len(), "the parser checked the length");
    for (value, &bytes) in target.iter_mut().zip(elements) {
        *value = element(bytes);
    }
}

/// Writes the model in Hugging Face's layout, its weights in f32, into a directory that exists.
///
/// v1.0 is written as tied without `lm_head.weight`, the v1.1 family as untied with it: transformers 4 and 5 agree on
/// those two.
pub fn save_pretrained(model: &Model, parameters: &Parameters, directory: &Path) -> Result<()> {
    let config = model.config();
    // By way of text, in which an f32 has its shortest digits: 0.1, not 0.10000000149011612.
    let fields = serde_json::to_string(config).and_then(|text| serde_json::from_str::<Value>(&text));
    let fields = fields.map_err(|error| Error::Config(error.to_string()))?;
    let is_encoder_decoder = config.class() != ModelClass::Encoder;
    let mut value = json!({
        "architectures": [config.class_name()],
        "is_encoder_decoder": is_encoder_decoder,
        "torch_dtype": "float32",
    });
    for (key, field) in fields.as_object().into_iter().flatten() {
        if !["architectures", "torch_dtype", "dtype", "is_encoder_decoder"].contains(&key.as_str()) {
            value[key] = field.clone();
        }
    }
    write_json(&directory.join(CONFIG_FILE), &value)?;
    if config.class() == ModelClass::ConditionalGeneration {
        write_generation_config(config, directory)?;
    }
    write_weights(parameters, &json!({"format": "pt"}), &directory.join("model.safetensors"))
}

/// What the model that this one was made from says there, and the tokens that transformers must know.
fn write_generation_config(config: &Config, directory: &Path) -> Result<()> {
    let mut keys = config.generation.clone();
    for (key, id) in [
        ("decoder_start_token_id", config.decoder_start_token_id),
        ("eos_token_id", config.eos_token_id),
        ("pad_token_id", config.pad_token_id),
    ] {
        keys.entry(key).or_insert(id.into());
    }
    write_json(&directory.join(GENERATION_FILE), &keys.into())
}

pub(crate) fn write_json(path: &Path, value: &Value) -> Result<()> {
    let mut text = serde_json::to_string_pretty(value).map_err(|error| Error::Config(error.to_string()))?;
    text.push('\n');
    fs::write(path, text).map_err(|source| Error::Write { path: path.to_path_buf(), source })
}

/// A safetensors file straight from the arena, without a copy of it all in memory.
pub(crate) fn write_weights(parameters: &Parameters, metadata: &Value, path: &Path) -> Result<()> {
    let write = || -> std::io::Result<()> {
        let mut header = json!({"__metadata__": metadata});
        let mut offset = 0;
        for tensor in parameters.layout().tensors() {
            let end = offset + 4 * tensor.range.len();
            header[&tensor.name] = json!({"dtype": "F32", "shape": tensor.shape, "data_offsets": [offset, end]});
            offset = end;
        }
        let mut header = serde_json::to_vec(&header)?;
        header.resize(header.len().next_multiple_of(8), b' ');
        let mut file = BufWriter::with_capacity(1 << 20, File::create(path)?);
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(&header)?;
        for tensor in parameters.layout().tensors() {
            parameters.range(tensor.range.clone()).read_in_pieces(|values: &[f32]| {
                values.iter().try_for_each(|value| file.write_all(&value.to_le_bytes()))
            })?;
        }
        file.into_inner()?.sync_all()
    };
    write().map_err(|source| Error::Write { path: path.to_path_buf(), source })
}
