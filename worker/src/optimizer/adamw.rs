//! AdamW (Loshchilov & Hutter 2019), in the order of operations of `torch.optim.AdamW`:
//!
//! ```text
//! p ← p − η·λ·p
//! m ← m + (1 − β₁)·(g − m)
//! v ← β₂·v + (1 − β₂)·g²
//! p ← p − η/(1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + ε)
//! ```
//! with η the learning rate, λ the weight decay, t the step counted from 1.

use rayon::prelude::*;

use super::norm::vectorized;
use super::{BLOCK, Hyperparameters};

/// The scalars of one step, computed in f64.
#[derive(Clone, Copy)]
pub(super) struct Update {
    /// 1 − η·λ
    keep: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    /// η / (1 − β₁ᵗ)
    step_size: f32,
    /// 1 / √(1 − β₂ᵗ)
    root_correction: f32,
    epsilon: f32,
    /// What g is of what is given as g.
    gradient_scale: f32,
}

impl Update {
    pub(super) fn new(rate: f64, gradient_scale: f32, hyperparameters: Hyperparameters, step: u64) -> Self {
        let Hyperparameters { beta1, beta2, epsilon, weight_decay } = hyperparameters;
        let correction = |beta: f64| 1.0 - beta.powf(step as f64);
        Self {
            keep: (1.0 - rate * weight_decay) as f32,
            one_minus_beta1: (1.0 - beta1) as f32,
            beta2: beta2 as f32,
            one_minus_beta2: (1.0 - beta2) as f32,
            step_size: (rate / correction(beta1)) as f32,
            root_correction: correction(beta2).sqrt().recip() as f32,
            epsilon: epsilon as f32,
            gradient_scale,
        }
    }
}

/// Updates the parameters `p` of one tensor by its gradient `g`, and the moments `m` and `v`.
pub(super) fn step(update: Update, p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32]) {
    if p.len() <= BLOCK {
        return block(update, p, g, m, v);
    }
    p.par_chunks_mut(BLOCK)
        .zip(g.par_chunks(BLOCK))
        .zip(m.par_chunks_mut(BLOCK).zip(v.par_chunks_mut(BLOCK)))
        .for_each(|((p, g), (m, v))| block(update, p, g, m, v));
}

fn block(u: Update, p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32]) {
    vectorized(|| {
        for (((p, &g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
            let g = g * u.gradient_scale;
            *m += u.one_minus_beta1 * (g - *m);
            *v = u.beta2 * *v + u.one_minus_beta2 * (g * g);
            *p = *p * u.keep - u.step_size * *m / (v.sqrt() * u.root_correction + u.epsilon);
        }
    })
}
