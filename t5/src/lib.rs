//! T5 from scratch: configuration, parameters, forward and backward passes, generation, Hugging Face's files.
//!
//! There is no tape: every layer has `forward` and `backward` side by side, and backward reads as forward reversed. All
//! parameters live in one arena ([`Parameters`]), and a model ([`Model`]) is only the plan of how to use it, so that the
//! optimizer, the all-reduce, digests and checkpoints work on flat ranges. The crate knows no ranks, no data source and
//! no optimizer.

mod adapter_files;
mod arena;
mod batch;
mod classifier;
mod config;
mod convert;
mod error;
mod flops;
mod generate;
mod head;
mod hub_files;
mod init;
mod layers;
mod lora;
mod model;
mod parameters;
mod pass;
mod presets;
mod stack;

pub use adapter_files::{AdapterFiles, adapter_base, adapter_labels, is_adapter, save_adapter, with_adapter};
pub use arena::{Arena, NamedTensor};
pub use batch::Batch;
pub use config::{Config, FeedForwardKind, ModelClass, ModelType};
pub use convert::{into_classifier, into_encoder};
pub use error::{Error, Result};
pub use flops::{BatchShape, training_flops};
pub use generate::{EarlyStopping, Generated, Generation, GenerationOptions, Generator, OnToken, Sources, TokenIds};
pub use hub_files::{load_embedded, load_pretrained, open_pretrained, read_config, save_pretrained};
pub use init::initialize;
pub use lora::{LoraSpec, TargetModules, adapter_arena, initialize_adapter};
pub use model::{LossSums, Model, TrainOptions};
pub use parameters::{Layout, Parameters, Weights};
pub use pass::OnFinished;
pub use presets::{PRESETS, preset};
