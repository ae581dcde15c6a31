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

use super::norm::root_mean_square;
use super::slots::{BLOCK, TensorSlots};
use super::{check_dtype, check_shape};
use crate::driver::{Argument, Gpu, Launch, Module};
use crate::simd::multiversion;
use crate::{DType, Device, Result, View, ViewMut};

/// The least factor by which a rate is scaled.
const SCALE_MIN: f64 = 1e-3;

/// The scalars of one update.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    pub learning_rate: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub epsilon: f64,
    /// Decoupled: `p -= rate · weight_decay · p`, of the tensors that decay.
    pub weight_decay: f64,
    /// Multiplies the rate of each matrix by max(RMS of its weights, 1e-3), which is what keeps T5's pre-training stable
    /// (nanoT5's AdamWScale).
    pub scale_by_rms: bool,
    /// Counted from 1.
    pub step: u64,
    /// What g is of what is given as g, so that neither the mean over tokens nor clipping costs a pass over memory.
    pub gradient_scale: f32,
}

/// One update of the arena `parameters[1,N]` by `gradient[1,N]`, with the moments `exp_avg` and `exp_avg_sq` (`[1,N]`, or
/// shorter: up to the end of the last tensor). All f32.
pub fn adamw(
    rule: AdamW,
    slots: &TensorSlots,
    parameters: ViewMut,
    gradient: View,
    exp_avg: ViewMut,
    exp_avg_sq: ViewMut,
) -> Result<()> {
    check_dtype!(DType::F32, parameters, gradient, exp_avg, exp_avg_sq);
    check_shape!(gradient, 1, parameters.cols());
    check_shape!(exp_avg, 1, exp_avg_sq.cols());
    assert!(slots.end() <= parameters.cols() && slots.end() <= exp_avg.cols(), "tensors beyond the arena");
    match parameters.device() {
        Device::Cpu(_) => {
            let gradient = gradient.as_slice();
            cpu(rule, slots, parameters.into_slice(), gradient, exp_avg.into_slice(), exp_avg_sq.into_slice());
        }
        Device::Gpu(gpu) => launch(gpu, rule, slots, parameters, gradient, exp_avg, exp_avg_sq)?,
    }
    Ok(())
}

fn cpu(rule: AdamW, slots: &TensorSlots, p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32]) {
    for slot in slots.as_slice() {
        let range = slot.range.clone();
        let p = &mut p[range.clone()];
        let scale = if rule.scale_by_rms && slot.is_matrix { root_mean_square(p).max(SCALE_MIN) } else { 1.0 };
        let update = Update::new(&rule, rule.learning_rate * scale, slot.decays);
        p.par_chunks_mut(BLOCK)
            .zip(g[range.clone()].par_chunks(BLOCK))
            .zip(m[range.clone()].par_chunks_mut(BLOCK).zip(v[range].par_chunks_mut(BLOCK)))
            .for_each(|((p, g), (m, v))| update_block(update, p, g, m, v));
    }
}

/// The scalars of one tensor's update, computed in f64.
#[derive(Clone, Copy)]
struct Update {
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
    gradient_scale: f32,
}

impl Update {
    fn new(rule: &AdamW, rate: f64, decays: bool) -> Self {
        let AdamW { beta1, beta2, epsilon, gradient_scale, .. } = *rule;
        let weight_decay = if decays { rule.weight_decay } else { 0.0 };
        let correction = |beta: f64| 1.0 - beta.powf(rule.step as f64);
        Update {
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

multiversion! {
    fn update_block(u: Update, p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32]) {
        for (((p, &g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
            let g = g * u.gradient_scale;
            *m += u.one_minus_beta1 * (g - *m);
            *v = u.beta2 * *v + u.one_minus_beta2 * (g * g);
            *p = *p * u.keep - u.step_size * *m / (v.sqrt() * u.root_correction + u.epsilon);
        }
    }
}

fn launch(
    gpu: &Gpu,
    rule: AdamW,
    slots: &TensorSlots,
    parameters: ViewMut,
    gradient: View,
    exp_avg: ViewMut,
    exp_avg_sq: ViewMut,
) -> Result<()> {
    const THREADS: usize = 256;
    let device = parameters.device();
    let tables = slots.on_device(device)?;
    let (count, tasks) = (tables.slots.rows(), tables.tasks.rows());
    let arenas = [parameters.view(), gradient, exp_avg.view(), exp_avg_sq.view()];
    let aligned = Argument::from(arenas.iter().all(|arena| arena.address().is_multiple_of(16)));
    let (slot_table, task_table) = (tables.slots.view().into(), tables.tasks.view().into());
    let launch = |function, blocks: usize, shared_bytes, arguments: &[Argument]| {
        gpu.launch(Launch {
            module: Module { source: "adamw", element: DType::F32, constants: &[] },
            function,
            grid: [blocks as u32, 1, 1],
            block: THREADS as u32,
            shared_bytes,
            arguments,
        })
    };

    let mut scales = None;
    if rule.scale_by_rms {
        // There is no tensor of f64: two words each.
        let partials = device.empty(DType::U32, tasks, 2)?;
        let scales = scales.insert(device.empty(DType::F32, 1, count)?);
        let partials = partials.view().into();
        let sums = THREADS / 32 * 8;
        launch("adamw_squares", tasks, sums, &[slot_table, task_table, (&parameters).into(), partials, aligned])?;
        launch("adamw_scales", count, sums, &[slot_table, partials, scales.view().into()])?;
    }
    let update = Update::new(&rule, rule.learning_rate, false);
    let arguments = [
        slot_table,
        task_table,
        (&parameters).into(),
        gradient.into(),
        (&exp_avg).into(),
        (&exp_avg_sq).into(),
        scales.as_ref().map_or(Argument::Pointer(0), |scales| scales.view().into()),
        aligned,
        ((rule.learning_rate * rule.weight_decay) as f32).into(),
        update.one_minus_beta1.into(),
        update.beta2.into(),
        update.one_minus_beta2.into(),
        update.step_size.into(),
        update.root_correction.into(),
        update.epsilon.into(),
        update.gradient_scale.into(),
    ];
    launch("adamw", tasks, 0, &arguments)
}
