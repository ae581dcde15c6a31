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
use super::slots::{BLOCK, TensorSlot, TensorSlots};
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

/// The moments of a part of an arena: of its elements from `first` on, as many as these hold `[1,n]`.
pub struct Moments<'a> {
    pub first: usize,
    pub exp_avg: ViewMut<'a>,
    pub exp_avg_sq: ViewMut<'a>,
}

/// One update of those elements of the arena `parameters[1,N]` that there are `moments` of, by `gradient[1,N]`, of which
/// nothing else is looked at. The parts do not overlap, and may end beyond the arena's last tensor. All f32. A GPU takes
/// the whole arena as one part.
pub fn adamw(
    rule: AdamW,
    slots: &TensorSlots,
    parameters: ViewMut,
    gradient: View,
    moments: &mut [Moments],
) -> Result<()> {
    check_dtype!(DType::F32, parameters, gradient);
    check_shape!(gradient, 1, parameters.cols());
    assert!(slots.end() <= parameters.cols(), "tensors beyond the arena");
    for Moments { exp_avg, exp_avg_sq, .. } in moments.iter() {
        check_dtype!(DType::F32, exp_avg, exp_avg_sq);
        check_shape!(exp_avg, 1, exp_avg_sq.cols());
    }
    match parameters.device() {
        Device::Cpu(_) => cpu(rule, slots, parameters.into_slice(), gradient.as_slice(), moments),
        Device::Gpu(gpu) => launch(gpu, rule, slots, parameters, gradient, moments)?,
    }
    Ok(())
}

fn cpu(rule: AdamW, slots: &TensorSlots, p: &mut [f32], g: &[f32], moments: &mut [Moments]) {
    let slots = slots.as_slice();
    // Before anything is updated: parts may share a tensor.
    let ends = |part: &Moments| (part.first, part.first + part.exp_avg.cols());
    let shares = |slot: &TensorSlot, (first, end): (usize, usize)| slot.range.start < end && first < slot.range.end;
    let update = |slot: &TensorSlot| {
        let is_scaled = rule.scale_by_rms && slot.is_matrix && moments.iter().any(|part| shares(slot, ends(part)));
        let scale = if is_scaled { root_mean_square(&p[slot.range.clone()]).max(SCALE_MIN) } else { 1.0 };
        Update::new(&rule, rule.learning_rate * scale, slot.decays)
    };
    let updates: Vec<Update> = slots.iter().map(update).collect();
    for part in moments {
        let (first, end) = ends(part);
        let (m, v) = (part.exp_avg.reborrow().into_slice::<f32>(), part.exp_avg_sq.reborrow().into_slice::<f32>());
        for (slot, &update) in slots.iter().zip(&updates).filter(|(slot, _)| shares(slot, (first, end))) {
            let range = slot.range.start.max(first)..slot.range.end.min(end);
            let here = range.start - first..range.end - first;
            p[range.clone()]
                .par_chunks_mut(BLOCK)
                .zip(g[range].par_chunks(BLOCK))
                .zip(m[here.clone()].par_chunks_mut(BLOCK).zip(v[here].par_chunks_mut(BLOCK)))
                .for_each(|((p, g), (m, v))| update_block(update, p, g, m, v));
        }
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
    moments: &mut [Moments],
) -> Result<()> {
    const THREADS: usize = 256;
    let [Moments { first: 0, exp_avg, exp_avg_sq }] = moments else { panic!("a part of an arena on a GPU") };
    assert!(slots.end() <= exp_avg.cols(), "tensors without moments");
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
        (&*exp_avg).into(),
        (&*exp_avg_sq).into(),
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
