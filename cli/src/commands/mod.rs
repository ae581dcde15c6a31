//! One file a command.

pub(crate) mod bench;
mod bench_data;
mod classify;
pub(crate) mod compare;
pub(crate) mod coordinator;
pub(crate) mod data;
pub(crate) mod doctor;
pub(crate) mod embed;
pub(crate) mod evaluate;
pub(crate) mod generate;
pub(crate) mod import_args;
pub(crate) mod launch;
pub(crate) mod merge;
pub(crate) mod selftest;
pub(crate) mod tokens;
pub(crate) mod train;
pub(crate) mod worker;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use quintet_data::{Tokenizer, TokenizerSpec};
use quintet_kernels::Device;
use quintet_t5::{Model, ModelClass, Parameters, with_adapter};
use quintet_worker::ModelSection;

use crate::args::{InputArguments, ModelArguments};
use crate::error::{Failure, Result};
use crate::hub;

/// Prints a document as the result of a command.
fn print_json(value: &serde_json::Value) {
    println!("{value}");
}

/// Runs what computes inside the pool of threads that its operations share their work with; from outside, each
/// operation would first have to wake the pool. All cores without a number.
pub(crate) fn on_threads(threads: Option<usize>, compute: impl FnOnce() -> Result<u8> + Send) -> Result<u8> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads.unwrap_or(0)).build();
    pool.map_err(|error| Failure::failed(format!("cannot start threads: {error}")))?.install(compute)
}

/// A model with its tokenizer.
struct Loaded {
    /// Of the model's files, also where an adapter or the hub was named.
    directory: PathBuf,
    model: Model,
    weights: Parameters,
    tokenizer: Arc<Tokenizer>,
}

/// The model of a directory or a hub's repository with its tokenizer, and an adapter folded into it. A directory that is an
/// adapter names its model.
fn open_model(device: &Device, directory: &Path, adapter: Option<&Path>, tokenizer: Option<&str>) -> Result<Loaded> {
    if quintet_t5::is_adapter(directory) {
        if adapter.is_some() {
            let name = directory.display();
            return Err(Failure::bad_input(format!("--model {name}: is an adapter itself; give one of the two")));
        }
        let base = quintet_t5::adapter_base(directory)?;
        return open_model(device, Path::new(&base), Some(directory), tokenizer);
    }
    let base = crate::prepare::working_directory()?;
    let directory = hub::model("--model", &directory.to_string_lossy(), &base)?.directory;
    let spec = match tokenizer {
        Some(text) => TokenizerSpec::parse(text, &base),
        // A run's adapter has the run's tokenizer beside it; PEFT saves none.
        None => match adapter.filter(|adapter| adapter.join("tokenizer_config.json").is_file()) {
            Some(adapter) => TokenizerSpec::Path(adapter.to_path_buf()),
            None => TokenizerSpec::Path(directory.clone()),
        },
    };
    if spec.is_trained() {
        return Err(Failure::bad_input("--tokenizer: names a tokenizer that is trained on data; give its directory"));
    }
    let section = ModelSection { pretrained: Some(directory.display().to_string()), ..ModelSection::default() };
    let tokenizer = Tokenizer::from_spec(&spec, std::iter::empty(), None)?;
    let (mut model, mut weights) = quintet_worker::replica::load_model(device, &section, &tokenizer, 0)?;
    if let Some(adapter) = adapter {
        (model, weights) = with_adapter(model, weights, adapter)?;
    }
    Ok(Loaded { directory, model, weights, tokenizer: Arc::new(tokenizer) })
}

impl ModelArguments {
    fn open(&self, device: &Device) -> Result<Loaded> {
        open_model(device, &self.model, self.adapter.as_deref(), self.tokenizer.as_deref())
    }
}

impl InputArguments {
    /// The inputs: one, or the lines of a file.
    fn read(&self) -> Result<Vec<String>> {
        match (&self.input, &self.input_file) {
            (Some(input), _) => Ok(vec![input.clone()]),
            (None, Some(path)) => {
                let text = std::fs::read_to_string(path)
                    .map_err(|error| Failure::bad_input(format!("{}: cannot read: {error}", path.display())))?;
                if text.is_empty() {
                    return Err(Failure::bad_input(format!("{}: holds no inputs; an input is a line", path.display())));
                }
                Ok(text.lines().map(str::to_string).collect())
            }
            (None, None) => Err(Failure::bad_input("give --input or --input-file")),
        }
    }
}

/// Refuses a model that does not write.
fn require_decoder(model: &Model) -> Result<()> {
    match model.config().class() {
        ModelClass::Encoder => {
            Err(Failure::bad_input("--model: is an encoder alone; `quintet embed` is what it can do"))
        }
        _ => Ok(()),
    }
}
