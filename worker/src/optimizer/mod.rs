//! Optimizers over a flat f32 arena: which rule updates which tensor, with which rate, and what of it a checkpoint keeps.
//! The arithmetic is in `quintet_kernels::ops`.

mod clip;
mod state;
#[cfg(test)]
mod tests;

use std::ops::Range;

use quintet_kernels::ops::{self, FactoredMoments, Moments, TensorSlot, TensorSlots};
use quintet_kernels::{Device, View, ViewMut};
use serde::{Deserialize, Serialize};

pub use clip::ClippedMean;
use state::Origin;
pub use state::{Part, ReadSaved};

use crate::Result;
use crate::checkpoint::NamedTensor;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum OptimizerKind {
    /// AdamW as in torch.
    #[serde(rename = "adamw")]
    AdamW,
    /// AdamW with the rate of each matrix multiplied by max(RMS of its weights, 1e-3), which
    /// is what keeps T5's pre-training stable (nanoT5's AdamWScale).
    #[serde(rename = "adamw_scaled")]
    AdamWScaled,
    /// Adafactor as T5 uses it: `scale_parameter=False`, `relative_step=False`, no momentum.
    #[serde(rename = "adafactor")]
    Adafactor,
}

/// Settings of the rules; Adafactor takes `weight_decay` only, its others are T5's constants.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Hyperparameters {
    pub beta1: f64,
    pub beta2: f64,
    pub epsilon: f64,
    /// Decoupled: `p -= rate · weight_decay · p`, of the tensors that decay.
    pub weight_decay: f64,
}

/// A tensor in the arena, under the name that checkpoints know it by.
#[derive(Clone, Debug, PartialEq)]
pub struct NamedSlot {
    pub name: String,
    pub slot: TensorSlot,
}

impl NamedSlot {
    /// A tensor of this `[rows, cols]` or `[size]`, which decays if Hugging Face's Trainer would decay it: neither norms
    /// nor anything called a bias, the relative attention bias included, does.
    pub fn new(name: String, offset: usize, shape: &[usize]) -> Self {
        let is_matrix = shape.len() == 2;
        let (rows, cols) = if is_matrix { (shape[0], shape[1]) } else { (1, shape.iter().product()) };
        let decays = is_matrix && !name.contains("bias");
        NamedSlot { name, slot: TensorSlot { range: offset..offset + rows * cols, rows, cols, is_matrix, decays } }
    }
}

/// An optimizer and its state over one arena, or parts of it.
pub struct Optimizer {
    device: Device,
    kind: OptimizerKind,
    hyperparameters: Hyperparameters,
    names: Vec<String>,
    slots: TensorSlots,
    /// Updates made, for bias correction and Adafactor's decay.
    steps: u64,
    /// Of f32, on the device of what is updated: the elements that [`Optimizer::step`] updates, ascending.
    parts: Vec<Part>,
    /// What any part can be made from, until the first update.
    origin: Option<Origin>,
}

impl Optimizer {
    /// With the state of the whole arena. `slots` are in ascending order and do not overlap; elements of the arena outside
    /// of them (padding) are never touched.
    ///
    /// # Errors
    /// Memory for the state.
    pub fn new(
        device: &Device,
        kind: OptimizerKind,
        hyperparameters: Hyperparameters,
        slots: Vec<NamedSlot>,
    ) -> Result<Self> {
        let mut optimizer = Self::without_state(device, kind, hyperparameters, slots);
        optimizer.hold(0..optimizer.slots.end())?;
        Ok(optimizer)
    }

    /// [`Optimizer::new`] without any state in memory: [`Optimizer::hold`] says of what it is to have some.
    pub fn without_state(
        device: &Device,
        kind: OptimizerKind,
        hyperparameters: Hyperparameters,
        slots: Vec<NamedSlot>,
    ) -> Self {
        let (names, slots) = slots.into_iter().map(|NamedSlot { name, slot }| (name, slot)).unzip();
        let (device, slots, parts) = (device.clone(), TensorSlots::new(slots), Vec::new());
        Self { device, kind, hyperparameters, names, slots, steps: 0, parts, origin: Some(Origin::Zeros) }
    }

    pub fn set_steps(&mut self, steps: u64) {
        self.steps = steps;
    }

    /// Updates made so far.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// One update of those elements of `parameters` whose state is held by the gradient `gradient_scale · gradient`, both
    /// whole f32 arenas. The scale is there so that neither the mean over tokens nor clipping costs a pass over memory.
    pub fn step(&mut self, learning_rate: f64, parameters: ViewMut, gradient: View, gradient_scale: f32) -> Result<()> {
        self.steps += 1;
        self.origin = None;
        let step = self.steps;
        let Hyperparameters { beta1, beta2, epsilon, weight_decay } = self.hyperparameters;
        match self.kind {
            OptimizerKind::AdamW | OptimizerKind::AdamWScaled => {
                let scale_by_rms = self.kind == OptimizerKind::AdamWScaled;
                let rule = ops::AdamW {
                    learning_rate,
                    beta1,
                    beta2,
                    epsilon,
                    weight_decay,
                    scale_by_rms,
                    step,
                    gradient_scale,
                };
                let mut moments: Vec<Moments> = self.parts.iter_mut().map(moments).collect();
                ops::adamw(rule, &self.slots, parameters, gradient, &mut moments)?;
            }
            OptimizerKind::Adafactor => {
                let rule = ops::Adafactor { learning_rate, weight_decay, step, gradient_scale };
                let moments = self.parts[0].tensors[0].view_mut();
                ops::adafactor(rule, &self.slots, parameters, gradient, moments)?;
            }
        }
        Ok(())
    }

    /// The state's tensors, named as torch names them behind the parameter's name, and where they lie in the whole.
    pub fn pieces(&self) -> Vec<Piece> {
        let mut pieces = Vec::new();
        let tensors = self.names.iter().zip(self.slots.as_slice()).zip(self.slots.factored_moments());
        for ((name, slot), moments) in tensors {
            let mut push = |suffix: &str, arena, shape, range| {
                pieces.push(Piece { name: format!("{name}.{suffix}"), arena, shape, range });
            };
            let shape = if slot.is_matrix { vec![slot.rows, slot.cols] } else { vec![slot.cols] };
            match (self.kind, moments) {
                (OptimizerKind::AdamW | OptimizerKind::AdamWScaled, _) => {
                    push("exp_avg", 0, shape.clone(), slot.range.clone());
                    push("exp_avg_sq", 1, shape, slot.range.clone());
                }
                (OptimizerKind::Adafactor, FactoredMoments::Factored { row, col }) => {
                    push("exp_avg_sq_row", 0, vec![slot.rows], row.clone());
                    push("exp_avg_sq_col", 0, vec![slot.cols], col.clone());
                }
                (OptimizerKind::Adafactor, FactoredMoments::Full(range)) => {
                    push("exp_avg_sq", 0, shape, range.clone());
                }
            }
        }
        pieces
    }
}

/// AdamW's part of an arena.
fn moments(part: &mut Part) -> Moments<'_> {
    let [exp_avg, exp_avg_sq] = part.tensors.as_mut_slice() else { panic!("a part of another rule") };
    Moments { first: part.range.start, exp_avg: exp_avg.view_mut(), exp_avg_sq: exp_avg_sq.view_mut() }
}

/// A tensor in one of several arenas.
#[derive(Clone, Debug)]
pub struct Piece {
    pub name: String,
    /// Which of the arenas.
    pub arena: usize,
    pub shape: Vec<usize>,
    pub range: Range<usize>,
}

/// The tensors of arenas, for a checkpoint.
pub fn named<'a>(pieces: &[Piece], arenas: &[View<'a>]) -> Vec<NamedTensor<'a>> {
    let tensor = |Piece { name, arena, shape, range }: &Piece| {
        let values = arenas[*arena].columns(range.clone());
        NamedTensor { name: name.clone(), shape: shape.clone(), values }
    };
    pieces.iter().map(tensor).collect()
}
