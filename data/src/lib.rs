//! Sources, templates, tokenizers, the order of examples and how steps are cut from it.
//!
//! Everything here is a pure function of (source, seed, epoch, position): which text the p-th example of epoch e is,
//! which positions a step takes, and what their tokens are, is the same for whoever asks. There are deliberately no
//! ranks, no tensors and no network in this crate.
//!
//! From a job file to tokens: [`DataConfig`] names sources and templates; [`Splits::load`] reads and renders them into
//! [`Dataset`]s; a [`Schedule`] cuts epochs into steps of positions; an [`Order`] says which example lies at a
//! position; a [`Packer`] turns positions into the tokens of a micro-batch, and a [`Loader`] does so ahead of time.

mod classes;
mod config;
mod dataset;
mod error;
mod filter;
mod load;
mod loader;
mod mixture;
mod objective;
mod order;
mod prompt;
mod remote;
mod schedule;
mod source;
mod store;
mod template;
mod tokenizer;
mod tree;

pub use classes::Classes;
pub use config::{DataConfig, LabelNames, Sample, SourceList};
pub use dataset::{Dataset, Example};
pub use error::{Error, Result};
pub use filter::{Filter, FilterError};
pub use load::{SourceCounts, Splits};
pub use loader::{Limits, Loader, PackedBatch, Packer};
pub use mixture::MixtureSource;
pub use objective::{DenoiserConfig, Objective};
pub use order::{Order, PartOrder};
pub use remote::{Catalogue, LEAVES_MAX, Leaf, Origin, Shelf, StoreAbout};
pub use schedule::{Schedule, StepPlan, TrainingLength, share};
pub use source::{Record, Source, Value, resolve_sources};
pub use template::{Template, TemplateError};
pub use tokenizer::{Tokenizer, TokenizerSpec};
