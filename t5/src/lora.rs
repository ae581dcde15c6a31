//! LoRA: low-rank additions to frozen linear layers, `y = x · wᵀ + scale · dropout(x) · aᵀ · bᵀ`, as PEFT has them.
//!
//! What is trained lies in an arena of its own ([`adapter_arena`]) over the model's; see `arena`. Which layers have
//! adapters is known to the arena alone, and [`Pass::linear`] asks it.

use std::collections::BTreeSet;
use std::sync::Arc;

use quintet_kernels::{DType, Tensor, View, ViewMut, ops};
use regex::Regex;
use serde::{Deserialize, Serialize};

use crate::arena::{Adapter, Arena, NamedTensor, Patch, PatchKind, Slot};
use crate::init::fill_uniform;
use crate::parameters::{Layout, Parameters};
use crate::pass::{BackwardPass, Pass};
use crate::{Config, Error, Model, Result};

/// What an adapter is, in the words of PEFT's `LoraConfig`.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraSpec {
    pub r: usize,
    pub lora_alpha: f64,
    pub lora_dropout: f32,
    pub target_modules: TargetModules,
    /// The scale is `alpha / √r`, not `alpha / r`.
    pub use_rslora: bool,
    /// Modules that are trained whole.
    pub modules_to_save: Vec<String>,
}

/// Which linear layers have adapters.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum TargetModules {
    /// Those whose path ends with one of these names.
    Names(Vec<String>),
    /// Those whose whole path matches this regular expression, or, with `all-linear`, all but the output head.
    Pattern(String),
}

/// The targets that stand for all linear layers but the output head.
const ALL_LINEAR: &str = "all-linear";

/// What PEFT puts before a module's path.
pub(crate) const PREFIX: &str = "base_model.model.";

impl LoraSpec {
    pub(crate) fn scale(&self) -> f32 {
        let r = self.r as f64;
        (self.lora_alpha / if self.use_rslora { r.sqrt() } else { r }) as f32
    }

    /// Checks every range; the message names the key.
    pub fn validate(&self) -> Result<()> {
        let wrong = |message: String| Err(Error::Config(message));
        if !(1..=1 << 12).contains(&self.r) {
            return wrong(format!("lora.r is {}, must be 1 to 4096", self.r));
        }
        if !(self.lora_alpha > 0.0 && self.lora_alpha.is_finite()) {
            return wrong(format!("lora.lora_alpha is {}, must be above 0", self.lora_alpha));
        }
        if !(0.0..1.0).contains(&self.lora_dropout) {
            return wrong(format!("lora.lora_dropout is {}, must be at least 0 and below 1", self.lora_dropout));
        }
        Ok(())
    }
}

/// Whether a module's path is, or ends with, a name.
fn is_called(path: &str, name: &str) -> bool {
    path.strip_suffix(name).is_some_and(|before| before.is_empty() || before.ends_with('.'))
}

/// A linear layer that can have an adapter.
#[derive(Clone, Debug)]
struct Linear {
    /// Of the module, as Hugging Face has it.
    path: String,
    slot: Slot,
}

/// All of a model, in the order of its arena.
fn linears(layout: &Layout) -> Vec<Linear> {
    // The embedding's table is the head's matrix where they are tied.
    let tied = layout.tied_head.map(|slot| Linear { path: "lm_head".to_string(), slot });
    let is_linear = |tensor: &&NamedTensor| {
        tensor.shape.len() == 2
            && !["shared", "relative_attention_bias"].iter().any(|name| is_called(module(tensor), name))
    };
    let own = layout.tensors().iter().filter(is_linear);
    tied.into_iter().chain(own.map(|tensor| Linear { path: module(tensor).to_string(), slot: tensor.slot() })).collect()
}

/// The path of the module that a tensor belongs to.
fn module(tensor: &NamedTensor) -> &str {
    tensor.name.rsplit_once('.').map_or(&tensor.name, |(path, _)| path)
}

/// Names by which the linear layers of a model can be called.
fn names<'a>(linears: impl IntoIterator<Item = &'a Linear>) -> BTreeSet<&'a str> {
    linears.into_iter().map(|linear| linear.path.rsplit('.').next().unwrap_or_default()).collect()
}

impl TargetModules {
    fn select<'a>(&self, linears: &'a [Linear]) -> Result<Vec<&'a Linear>> {
        let unknown = |what: &str| {
            let known: Vec<&str> = names(linears).into_iter().collect();
            Error::Config(format!(
                "lora.target_modules: no linear layer is called {what}; there are {}",
                known.join(", ")
            ))
        };
        let is_head =
            |linear: &Linear| is_called(&linear.path, "lm_head") || linear.path.starts_with("classification_head");
        match self {
            Self::Names(wanted) => {
                if let Some(name) = wanted.iter().find(|name| !linears.iter().any(|one| is_called(&one.path, name))) {
                    return Err(unknown(&format!("{name:?}")));
                }
                if wanted.is_empty() {
                    return Err(unknown("nothing"));
                }
                Ok(linears.iter().filter(|one| wanted.iter().any(|name| is_called(&one.path, name))).collect())
            }
            Self::Pattern(pattern) if pattern == ALL_LINEAR => Ok(linears.iter().filter(|one| !is_head(one)).collect()),
            Self::Pattern(pattern) => {
                let regex = Regex::new(&format!("^(?:{pattern})$")).map_err(|error| {
                    Error::Config(format!("lora.target_modules: {}", last_line(&error.to_string())))
                })?;
                let found: Vec<&Linear> = linears.iter().filter(|one| regex.is_match(&one.path)).collect();
                if found.is_empty() { Err(unknown(&format!("as {pattern:?} says"))) } else { Ok(found) }
            }
        }
    }

    /// As PEFT writes it: `all-linear` by its names.
    pub(crate) fn resolved(&self, layout: &Layout) -> Result<Self> {
        match self {
            Self::Pattern(pattern) if pattern == ALL_LINEAR => {
                let linears = linears(layout);
                let names = names(self.select(&linears)?).into_iter().map(str::to_string).collect();
                Ok(Self::Names(names))
            }
            other => Ok(other.clone()),
        }
    }
}

/// The last line of a message is what is wrong; those before it show where.
fn last_line(text: &str) -> &str {
    text.trim().lines().last().unwrap_or(text).trim()
}

/// The arena of what `spec` trains in a model.
///
/// # Errors
/// A target or a module to save that there is not, or that cannot be had: what there is.
pub fn adapter_arena(model: &Model, spec: &LoraSpec) -> Result<Arc<Arena>> {
    spec.validate()?;
    let linears = linears(model.layout());
    let targets = spec.target_modules.select(&linears)?;
    for name in &spec.modules_to_save {
        if !model.layout().tensors().iter().any(|tensor| is_in(tensor, name)) {
            return Err(Error::Config(format!("lora.modules_to_save: no module is called {name:?}")));
        }
    }
    let targets: BTreeSet<&str> = targets.into_iter().map(|linear| linear.path.as_str()).collect();
    let is_saved = |tensor: &NamedTensor| spec.modules_to_save.iter().any(|name| is_in(tensor, name));
    build(model.layout(), spec, |path| targets.contains(path), is_saved)
}

/// Whether a tensor is part of a module of this name.
fn is_in(tensor: &NamedTensor, name: &str) -> bool {
    let path = module(tensor);
    path.match_indices('.').map(|(end, _)| &path[..end]).chain([path]).any(|path| is_called(path, name))
}

/// An arena with an adapter for each of these linear layers, and a copy of each of these tensors.
pub(crate) fn build(
    layout: &Layout,
    spec: &LoraSpec,
    is_target: impl Fn(&str) -> bool,
    is_saved: impl Fn(&NamedTensor) -> bool,
) -> Result<Arc<Arena>> {
    enum Part<'a> {
        Linear(&'a Linear),
        Saved(&'a NamedTensor),
    }
    let linears = linears(layout);
    let adapted =
        linears.iter().filter(|linear| is_target(&linear.path)).map(|linear| (linear.slot, Part::Linear(linear)));
    let saved = layout.tensors().iter().filter(|tensor| is_saved(tensor));
    let mut parts: Vec<(Slot, Part)> =
        adapted.chain(saved.map(|tensor| (tensor.slot(), Part::Saved(tensor)))).collect();
    parts.sort_by_key(|(base, _)| base.start());
    if let Some(pair) = parts.windows(2).find(|pair| pair[0].0 == pair[1].0)
        && let (Part::Linear(linear), _) | (_, Part::Linear(linear)) = (&pair[0].1, &pair[1].1)
    {
        let message = format!("lora.modules_to_save: {} is in target_modules too; leave it out of one", linear.path);
        return Err(Error::Config(message));
    }
    let (mut arena, mut patches) = (Arena::default(), Vec::with_capacity(parts.len()));
    for (number, (base, part)) in parts.into_iter().enumerate() {
        let kind = match part {
            Part::Linear(Linear { path, .. }) => {
                let a = arena.push(format!("{PREFIX}{path}.lora_A.weight"), &[spec.r, base.cols()]);
                let b = arena.push(format!("{PREFIX}{path}.lora_B.weight"), &[base.rows(), spec.r]);
                let (scale, dropout) = (spec.scale(), spec.lora_dropout);
                PatchKind::Adapted(Adapter { number: number as u32, a, b, scale, dropout })
            }
            Part::Saved(tensor) => {
                check_whole(tensor)?;
                PatchKind::Replaced(arena.push(format!("{PREFIX}{}", tensor.name), &tensor.shape))
            }
        };
        patches.push(Patch { base, kind });
    }
    arena.lay_over(patches);
    Ok(Arc::new(arena))
}

/// Whether a copy of the tensor can take its place.
fn check_whole(tensor: &NamedTensor) -> Result<()> {
    // The embedding's other users keep the frozen one in PEFT; the others are part of a taller matrix.
    let parts = ["shared", "q", "k", "v", "wi_0", "wi_1"];
    match parts.iter().find(|part| is_called(module(tensor), part)) {
        Some(part) => {
            let message =
                format!("lora.modules_to_save: {part} cannot be trained whole in a LoRA run; target it instead");
            Err(Error::Config(message))
        }
        None => Ok(()),
    }
}

/// Fills a fresh adapter: `a` as PEFT draws it (Kaiming uniform with √5, which is ±in^-½), `b` zero, saved modules as they
/// are in the model. Each element is a pure function of the seed, its tensor's name and its index.
pub fn initialize_adapter(seed: u64, base: &Parameters, adapter: &mut Parameters) -> Result<()> {
    adapter.view_mut().fill_zero()?;
    let arena = adapter.layout().clone();
    for tensor in arena.tensors().iter().filter(|tensor| tensor.name.ends_with(".lora_A.weight")) {
        let mut values = vec![0.0; tensor.range.len()];
        fill_uniform(&mut values, seed, &tensor.name, (tensor.shape[1] as f64).powf(-0.5));
        adapter.write(tensor.range.clone(), &values)?;
    }
    for patch in arena.patches() {
        if let PatchKind::Replaced(place) = patch.kind {
            ops::cast(base.slot(patch.base), adapter.slot_mut(place))?;
        }
    }
    Ok(())
}

/// Folds an adapter into the weights of its model, both in f32: afterwards they compute alone what both did together,
/// but where it adapts a head that is tied to the embedding.
pub(crate) fn merge_adapter(adapter: &Parameters, base: &mut Parameters) -> Result<()> {
    for patch in adapter.layout().patches() {
        match patch.kind {
            PatchKind::Replaced(place) => ops::cast(adapter.slot(place), base.slot_mut(patch.base))?,
            PatchKind::Adapted(Adapter { a, b, scale, .. }) => {
                let mut scaled = vec![0.0_f32; a.rows() * a.cols()];
                adapter.slot(a).read(&mut scaled)?;
                scaled.iter_mut().for_each(|value| *value *= scale);
                let scaled = adapter.view().device().upload(&scaled, a.rows(), a.cols())?;
                ops::linear_backward_input(adapter.slot(b), scaled.view(), base.slot_mut(patch.base), true)?;
            }
        }
    }
    Ok(())
}

/// The same model with a head of its own, a copy of the embedding.
pub(crate) fn untie(model: &Model, weights: &Parameters) -> Result<(Model, Parameters)> {
    let is_scaled = Some(model.config().head_scale() != 1.0);
    let config = Config { tie_word_embeddings: false, scale_decoder_outputs: is_scaled, ..model.config().clone() };
    let untied = Model::new(model.device(), config)?;
    let mut copy = untied.zero_parameters(DType::F32)?;
    copy.copy_by_name(weights, |name| Some(if name == "lm_head.weight" { "shared.weight" } else { name }.to_string()))?;
    Ok((untied, copy))
}

impl Pass<'_> {
    /// Adds to `y` what the adapters of `w` make of `x`.
    pub(crate) fn adapt(&self, x: View, w: Slot, mut y: ViewMut) -> Result<()> {
        for (columns, adapter) in self.weights.adapters(w) {
            ops::lora_forward(self.lora(x, adapter), y.reborrow().columns(columns))?;
        }
        Ok(())
    }

    /// An adapter with its input.
    pub(crate) fn lora<'x>(&'x self, x: View<'x>, adapter: Adapter) -> ops::Lora<'x> {
        let [a, b] = [adapter.a, adapter.b].map(|slot| self.weights.adapter_slot(slot, x.dtype()));
        ops::Lora { x, a, b, scale: adapter.scale, mask: self.adapter_mask(adapter) }
    }
}

impl BackwardPass<'_> {
    /// Whether a linear layer has anything to train.
    pub(crate) fn trains(&self, w: Slot) -> bool {
        let arena = self.gradients.layout();
        arena.place(w).is_some() || arena.adapters(w).next().is_some()
    }

    /// Reverses [`Pass::adapt`]: adds to the gradients of the adapters of `w`, and to that of their input.
    pub(crate) fn adapt(&mut self, w: Slot, d_y: View, x: View, d_x: &mut Tensor) -> Result<()> {
        let pass = self.pass;
        for (columns, adapter) in pass.weights.adapters(w) {
            let (d_a, d_b) = self.gradients.two_slots_mut(adapter.a, adapter.b);
            let gradients = ops::LoraGradients { d_a, d_b, d_x: d_x.view_mut() };
            ops::lora_backward(pass.lora(x, adapter), d_y.columns(columns), gradients)?;
        }
        Ok(())
    }
}
