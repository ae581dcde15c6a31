//! Optimizers over a flat f32 arena: which rule updates which tensor, with which rate, and
//! what of it a checkpoint keeps. The arithmetic is in
//! `adamw.rs`, `adafactor.rs` and `norm.rs`.
//!
//! The work is cut into blocks whose bounds depend on the tensors only, and every reduction
//! adds its blocks in order, so the bits do not depend on the number of threads.

mod adafactor;
mod adamw;
mod norm;
#[cfg(test)]
mod tests;

use std::ops::Range;

use serde::{Deserialize, Serialize};

pub use norm::{ClippedMean, global_norm};

use crate::Result;
use crate::checkpoint::NamedTensor;
use adafactor::{Factors, Moments};
use norm::root_mean_square;

/// Elements worked on by one task.
const BLOCK: usize = 1 << 15;

/// The least factor by which `adamw_scaled` scales a rate.
const SCALE_MIN: f64 = 1e-3;

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

/// A tensor in the arena.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorSlot {
    pub name: String,
    /// Its elements in the arena, `rows · cols` of them.
    pub range: Range<usize>,
    pub rows: usize,
    pub cols: usize,
    /// Two-dimensional: factored by Adafactor, scaled by `adamw_scaled`.
    pub is_matrix: bool,
    /// Subject to weight decay.
    pub decays: bool,
}

impl TensorSlot {
    /// A slot that decays if Hugging Face's Trainer would decay it: neither norms nor anything
    /// called a bias, the relative attention bias included, does.
    pub fn new(name: String, range: Range<usize>, rows: usize, cols: usize, is_matrix: bool) -> Self {
        let decays = is_matrix && !name.contains("bias");
        Self { name, range, rows, cols, is_matrix, decays }
    }

    fn shape(&self) -> Vec<usize> {
        if self.is_matrix { vec![self.rows, self.cols] } else { vec![self.range.len()] }
    }
}

/// An optimizer and its state over one arena.
pub struct Optimizer {
    kind: OptimizerKind,
    hyperparameters: Hyperparameters,
    slots: Vec<TensorSlot>,
    /// Updates made, for bias correction and Adafactor's decay.
    steps: u64,
    state: State,
}

enum State {
    AdamW {
        exp_avg: Vec<f32>,
        exp_avg_sq: Vec<f32>,
    },
    /// By slot.
    Adafactor(Vec<Moments>),
}

impl Optimizer {
    /// `slots` are in ascending order of `range` and do not overlap; elements of the arena
    /// outside of them (padding) are never touched.
    pub fn new(kind: OptimizerKind, hyperparameters: Hyperparameters, slots: &[TensorSlot]) -> Self {
        for slot in slots {
            assert_eq!(slot.rows * slot.cols, slot.range.len(), "{}'s shape", slot.name);
        }
        for pair in slots.windows(2) {
            let (a, b) = (&pair[0], &pair[1]);
            assert!(a.range.end <= b.range.start, "{} and {} overlap", a.name, b.name);
        }
        let state = match kind {
            OptimizerKind::AdamW | OptimizerKind::AdamWScaled => {
                let elements = slots.last().map_or(0, |slot| slot.range.end);
                State::AdamW { exp_avg: vec![0.0; elements], exp_avg_sq: vec![0.0; elements] }
            }
            OptimizerKind::Adafactor => State::Adafactor(slots.iter().map(Moments::new).collect()),
        };
        Self { kind, hyperparameters, slots: slots.to_vec(), steps: 0, state }
    }

    /// Updates made so far.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// One update of `params` by the gradient `gradient_scale · grads`, both whole arenas. The scale is there so that
    /// neither the mean over tokens nor clipping costs a pass over memory.
    pub fn step(&mut self, learning_rate: f64, params: &mut [f32], grads: &[f32], gradient_scale: f32) {
        assert_eq!(params.len(), grads.len(), "parameters and gradients differ in size");
        self.steps += 1;
        for (index, slot) in self.slots.iter().enumerate() {
            let range = slot.range.clone();
            let (p, g) = (&mut params[range.clone()], &grads[range.clone()]);
            let weight_decay = if slot.decays { self.hyperparameters.weight_decay } else { 0.0 };
            match &mut self.state {
                State::AdamW { exp_avg, exp_avg_sq } => {
                    let is_scaled = self.kind == OptimizerKind::AdamWScaled && slot.is_matrix;
                    let scale = if is_scaled { root_mean_square(p).max(SCALE_MIN) } else { 1.0 };
                    let rate = learning_rate * scale;
                    let hyperparameters = Hyperparameters { weight_decay, ..self.hyperparameters };
                    let update = adamw::Update::new(rate, gradient_scale, hyperparameters, self.steps);
                    adamw::step(update, p, g, &mut exp_avg[range.clone()], &mut exp_avg_sq[range]);
                }
                State::Adafactor(moments) => {
                    let update = adafactor::Update { learning_rate, weight_decay, gradient_scale, step: self.steps };
                    adafactor::step(update, p, g, &mut moments[index]);
                }
            }
        }
    }

    /// The state's tensors, named as torch names them behind the parameter's name, for a
    /// checkpoint. [`Optimizer::steps`] is the rest of the state.
    pub fn state(&self) -> Vec<NamedTensor<'_>> {
        let mut tensors = Vec::new();
        for (index, slot) in self.slots.iter().enumerate() {
            let mut push = |suffix: &str, shape, values| {
                tensors.push(NamedTensor { name: format!("{}.{suffix}", slot.name), shape, values });
            };
            match &self.state {
                State::AdamW { exp_avg, exp_avg_sq } => {
                    push("exp_avg", slot.shape(), &exp_avg[slot.range.clone()]);
                    push("exp_avg_sq", slot.shape(), &exp_avg_sq[slot.range.clone()]);
                }
                State::Adafactor(moments) => match &moments[index] {
                    Moments::Factored(Factors { row, col, .. }) => {
                        push("exp_avg_sq_row", vec![row.len()], row);
                        push("exp_avg_sq_col", vec![col.len()], col);
                    }
                    Moments::Full(exp_avg_sq) => push("exp_avg_sq", slot.shape(), exp_avg_sq),
                },
            }
        }
        tensors
    }

    /// Restores what [`Optimizer::state`] gave: `read` fills the values of the named tensor
    /// of the given shape.
    ///
    /// # Errors
    /// Those of `read`; the state is then undefined.
    pub fn load_state(
        &mut self,
        steps: u64,
        mut read: impl FnMut(&str, &[usize], &mut [f32]) -> Result<()>,
    ) -> Result<()> {
        for (index, slot) in self.slots.iter().enumerate() {
            let name = |suffix: &str| format!("{}.{suffix}", slot.name);
            match &mut self.state {
                State::AdamW { exp_avg, exp_avg_sq } => {
                    read(&name("exp_avg"), &slot.shape(), &mut exp_avg[slot.range.clone()])?;
                    read(&name("exp_avg_sq"), &slot.shape(), &mut exp_avg_sq[slot.range.clone()])?;
                }
                State::Adafactor(moments) => match &mut moments[index] {
                    Moments::Factored(Factors { row, col, .. }) => {
                        read(&name("exp_avg_sq_row"), &[row.len()], row)?;
                        read(&name("exp_avg_sq_col"), &[col.len()], col)?;
                    }
                    Moments::Full(exp_avg_sq) => read(&name("exp_avg_sq"), &slot.shape(), exp_avg_sq)?,
                },
            }
        }
        self.steps = steps;
        Ok(())
    }
}
