//! Adafactor (Shazeer & Stern 2018) as T5 uses it, which is `transformers.Adafactor` with
//! `scale_parameter=False, relative_step=False, beta1=None`. For a matrix g `[rows, cols]`:
//!
//! ```text
//! β = 1 − t^−0.8
//! r ← β·r + (1 − β)·mean over columns of (g² + ε)        [rows]
//! c ← β·c + (1 − β)·mean over rows of (g² + ε)           [cols]
//! u = g / (√(r / mean r) · √c)
//! p ← p·(1 − η·λ) − η·u / max(1, RMS(u) / d)
//! ```
//! and for a vector u = g / √v with v the running mean of g² + ε itself. η is the learning rate, λ the weight decay, t the
//! step counted from 1, ε = 1e-30, d = 1.

use rayon::prelude::*;

use super::norm::{LANES, sum_by_lanes};
use super::slots::{BLOCK, FactoredMoments, TensorSlots};
use super::{check_dtype, check_shape};
use crate::driver::{Argument, Gpu, Launch, Module};
use crate::simd::multiversion;
use crate::{DType, Device, Result, View, ViewMut};

const EPSILON: f64 = 1e-30;
const DECAY_RATE: f64 = -0.8;
const CLIP_THRESHOLD: f64 = 1.0;

/// Blocks of rows with column sums of their own, at most: bounds the memory for those.
const ROW_BLOCKS_MAX: usize = 256;

/// The scalars of one update.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Adafactor {
    pub learning_rate: f64,
    /// Decoupled: `p -= rate · weight_decay · p`, of the tensors that decay.
    pub weight_decay: f64,
    /// Counted from 1.
    pub step: u64,
    /// What g is of what is given as g, so that neither the mean over tokens nor clipping costs a pass over memory.
    pub gradient_scale: f32,
}

/// One update of the arena `parameters[1,N]` by `gradient[1,N]`; `moments` lie as [`TensorSlots::factored_moments`] says.
/// All f32.
pub fn adafactor(
    rule: Adafactor,
    slots: &TensorSlots,
    parameters: ViewMut,
    gradient: View,
    moments: ViewMut,
) -> Result<()> {
    check_dtype!(DType::F32, parameters, gradient, moments);
    check_shape!(gradient, 1, parameters.cols());
    check_shape!(moments, 1, slots.factored_moments_len());
    assert!(slots.end() <= parameters.cols(), "tensors beyond the arena");
    match parameters.device() {
        Device::Cpu(_) => cpu(rule, slots, parameters, gradient.as_slice(), moments.into_slice()),
        Device::Gpu(gpu) => launch(gpu, rule, slots, parameters, gradient, moments),
    }
}

fn cpu(rule: Adafactor, slots: &TensorSlots, parameters: ViewMut, g: &[f32], moments: &mut [f32]) -> Result<()> {
    let device = parameters.device();
    let p = parameters.into_slice::<f32>();
    for (slot, places) in slots.as_slice().iter().zip(slots.factored_moments()) {
        let update = Update::new(&rule, slot.decays);
        let (p, g) = (&mut p[slot.range.clone()], &g[slot.range.clone()]);
        match places {
            FactoredMoments::Factored { row, col } => {
                let (row, col) = two_ranges(moments, row.clone(), col.clone());
                update_matrix(device, &update, p, g, row, col)?;
            }
            FactoredMoments::Full(range) => update_vector(&update, p, g, &mut moments[range.clone()]),
        }
    }
    Ok(())
}

/// Two ranges of a slice, the first before the second.
fn two_ranges(
    values: &mut [f32],
    first: std::ops::Range<usize>,
    second: std::ops::Range<usize>,
) -> (&mut [f32], &mut [f32]) {
    let (head, tail) = values.split_at_mut(second.start);
    (&mut head[first], &mut tail[..second.len()])
}

/// The scalars of one tensor's update.
struct Update {
    beta: f64,
    keep: f32,
    learning_rate: f64,
    gradient_scale: f32,
}

impl Update {
    fn new(rule: &Adafactor, decays: bool) -> Self {
        let weight_decay = if decays { rule.weight_decay } else { 0.0 };
        Update {
            beta: 1.0 - (rule.step as f64).powf(DECAY_RATE),
            keep: (1.0 - rule.learning_rate * weight_decay) as f32,
            learning_rate: rule.learning_rate,
            gradient_scale: rule.gradient_scale,
        }
    }

    /// The rate for an update of `elements` elements with this Σ u².
    fn rate(&self, sum_of_squares: f64, elements: usize) -> f32 {
        let rms = (sum_of_squares / elements as f64).sqrt();
        (self.learning_rate / (rms / CLIP_THRESHOLD).max(1.0)) as f32
    }
}

fn update_vector(update: &Update, p: &mut [f32], g: &[f32], v: &mut [f32]) {
    let (beta, scale, keep) = (update.beta as f32, update.gradient_scale, update.keep);
    let blocks = v.par_chunks_mut(BLOCK).zip(g.par_chunks(BLOCK)).map(|(v, g)| accumulate_vector(g, scale, v, beta));
    let sum_of_squares: f64 = blocks.collect::<Vec<f64>>().iter().sum();
    let rate = update.rate(sum_of_squares, g.len()) * scale;
    p.par_chunks_mut(BLOCK).zip(g.par_chunks(BLOCK)).zip(v.par_chunks(BLOCK)).for_each(|((p, g), v)| {
        for ((p, &g), &v) in p.iter_mut().zip(g).zip(v) {
            *p = *p * keep - rate * (g / v.sqrt());
        }
    });
}

/// Updates the moments `v` of a block of a vector; returns its Σ u².
fn accumulate_vector(g: &[f32], scale: f32, v: &mut [f32], beta: f32) -> f64 {
    let mut sum = 0.0;
    for (v, &g) in v.iter_mut().zip(g) {
        let g = g * scale;
        *v = beta * *v + (1.0 - beta) * (g * g + EPSILON as f32);
        let u = f64::from(g) / f64::from(*v).sqrt();
        sum += u * u;
    }
    sum
}

/// Updates a matrix, whose moments are `row` and `col`.
fn update_matrix(
    device: &Device,
    update: &Update,
    p: &mut [f32],
    g: &[f32],
    row: &mut [f32],
    col: &mut [f32],
) -> Result<()> {
    let (rows, cols, scale) = (row.len(), col.len(), update.gradient_scale);
    let rows_per_block = (BLOCK / cols).max(rows.div_ceil(ROW_BLOCKS_MAX)).max(1);
    let block = rows_per_block * cols;
    let blend = Blend { beta: update.beta };

    // There is no tensor of f64: two words each.
    let mut col_sums = device.empty(DType::U32, rows.div_ceil(rows_per_block), 2 * cols)?;
    let col_sums: &mut [f64] = bytemuck::cast_slice_mut(col_sums.as_mut_slice::<u32>());
    g.par_chunks(block)
        .zip(row.par_chunks_mut(rows_per_block))
        .zip(col_sums.par_chunks_mut(cols))
        .for_each(|((g, row), col_sums)| accumulate_rows(blend, g, scale, row, col_sums));
    let (totals, others) = col_sums.split_at_mut(cols);
    for sums in others.chunks_exact(cols) {
        totals.iter_mut().zip(sums).for_each(|(total, sum)| *total += sum);
    }
    for (col, &total) in col.iter_mut().zip(totals.iter()) {
        *col = blend.of(*col, total / rows as f64);
    }

    // 1/√(row / mean row) and 1/√col
    let mut factors = device.empty(DType::F32, 1, rows + cols)?;
    let (row_factor, col_factor) = factors.as_mut_slice::<f32>().split_at_mut(rows);
    let row_mean = sum_by_lanes(row, f64::from) / rows as f64;
    for (factor, &row) in row_factor.iter_mut().zip(row.iter()) {
        *factor = (f64::from(row) / row_mean).sqrt().recip() as f32;
    }
    for (factor, &col) in col_factor.iter_mut().zip(col.iter()) {
        *factor = f64::from(col).sqrt().recip() as f32;
    }

    let (row_factor, col_factor) = (&*row_factor, &*col_factor);
    let blocks = g.par_chunks(block).zip(row_factor.par_chunks(rows_per_block));
    let blocks = blocks.map(|(g, row_factor)| update_sum_of_squares(g, scale, row_factor, col_factor));
    let sum_of_squares: f64 = blocks.collect::<Vec<f64>>().iter().sum();

    let rate = update.rate(sum_of_squares, g.len()) * scale;
    p.par_chunks_mut(block)
        .zip(g.par_chunks(block))
        .zip(row_factor.par_chunks(rows_per_block))
        .for_each(|((p, g), row_factor)| apply(update.keep, rate, p, g, row_factor, col_factor));
    Ok(())
}

/// A running mean of squares.
#[derive(Clone, Copy)]
struct Blend {
    beta: f64,
}

impl Blend {
    #[inline(always)]
    fn of(self, old: f32, mean: f64) -> f32 {
        (self.beta * f64::from(old) + (1.0 - self.beta) * (mean + EPSILON)) as f32
    }
}

multiversion! {
    /// Takes a block of rows into the running means `row`; `col_sums` are its sums of squares by column.
    fn accumulate_rows(blend: Blend, g: &[f32], scale: f32, row: &mut [f32], col_sums: &mut [f64]) {
        let cols = col_sums.len();
        col_sums.fill(0.0);
        for (g, row) in g.chunks_exact(cols).zip(row) {
            *row = blend.of(*row, sum_by_lanes(g, |x| square(x * scale)) / cols as f64);
            col_sums.iter_mut().zip(g).for_each(|(sum, &x)| *sum += square(x * scale));
        }
    }
}

multiversion! {
    /// Σ u² of a block of rows.
    fn update_sum_of_squares(g: &[f32], scale: f32, row_factor: &[f32], col_factor: &[f32]) -> f64 {
        let rows = g.chunks_exact(col_factor.len()).zip(row_factor);
        rows.map(|(g, &r)| row_update_sum_of_squares(g, r * scale, col_factor)).sum()
    }
}

multiversion! {
    fn apply(keep: f32, rate: f32, p: &mut [f32], g: &[f32], row_factor: &[f32], col_factor: &[f32]) {
        let cols = col_factor.len();
        let rows = p.chunks_exact_mut(cols).zip(g.chunks_exact(cols));
        for ((p, g), &r) in rows.zip(row_factor) {
            for ((p, &g), &c) in p.iter_mut().zip(g).zip(col_factor) {
                *p = *p * keep - rate * (g * (r * c));
            }
        }
    }
}

#[inline(always)]
fn square(x: f32) -> f64 {
    f64::from(x) * f64::from(x)
}

/// Σ u² of one row with the row factor `r`, lane by lane.
#[inline(always)]
fn row_update_sum_of_squares(g: &[f32], r: f32, col_factor: &[f32]) -> f64 {
    let mut lanes = [0.0f64; LANES];
    let (g, g_rest) = g.as_chunks::<LANES>();
    let (c, c_rest) = col_factor.as_chunks::<LANES>();
    for (g, c) in g.iter().zip(c) {
        for ((lane, g), c) in lanes.iter_mut().zip(g).zip(c) {
            *lane += square(g * (r * c));
        }
    }
    for ((lane, g), c) in lanes.iter_mut().zip(g_rest).zip(c_rest) {
        *lane += square(g * (r * c));
    }
    lanes.iter().sum()
}

fn launch(
    gpu: &Gpu,
    rule: Adafactor,
    slots: &TensorSlots,
    parameters: ViewMut,
    gradient: View,
    moments: ViewMut,
) -> Result<()> {
    const THREADS: usize = 256;
    const FACTOR_THREADS: usize = 1024;
    /// Blocks that share a tensor's columns, at most.
    const STRIPES_MAX: usize = 64;
    let device = parameters.device();
    let tables = slots.on_device(device)?;
    let (count, tasks) = (tables.slots.rows(), tables.tasks.rows());
    let empty = |dtype, cols| device.empty(dtype, 1, cols);
    let col_sums = empty(DType::F32, tables.col_sums)?;
    let factors = empty(DType::F32, moments.cols())?;
    let partials = empty(DType::U32, 2 * tasks)?; // there is no tensor of f64: two words each
    let rates = empty(DType::F32, count)?;
    let launch = |function, grid: [usize; 2], threads: usize, shared_bytes, arguments: &[Argument]| {
        gpu.launch(Launch {
            module: Module { source: "adafactor", element: DType::F32, constants: &[] },
            function,
            grid: [grid[0] as u32, grid[1] as u32, 1],
            block: threads as u32,
            shared_bytes,
            arguments,
        })
    };

    let update = Update::new(&rule, false);
    let betas = [Argument::F32(update.beta as f32), Argument::F32((1.0 - update.beta) as f32)];
    let gradient_scale = Argument::F32(rule.gradient_scale);
    let aligned = [parameters.view(), gradient].iter().all(|arena| arena.address().is_multiple_of(16)).into();
    let (slots, task_table) = (tables.slots.view().into(), tables.tasks.view().into());
    let (p, g, moments) = ((&parameters).into(), gradient.into(), (&moments).into());
    let (col_sums, factors) = (col_sums.view().into(), factors.view().into());
    let (partials, rates) = (partials.view().into(), rates.view().into());
    let sums = THREADS / 32 * 8;

    let arguments = [slots, task_table, g, moments, col_sums, betas[0], betas[1], gradient_scale];
    launch("adafactor_moments", [tasks, 1], THREADS, 0, &arguments)?;
    let grid = [tables.cols_max.div_ceil(32).min(STRIPES_MAX), count];
    let arguments = [slots, moments, col_sums, factors, betas[0], betas[1]];
    launch("adafactor_factors", grid, FACTOR_THREADS, FACTOR_THREADS * 4 + 32 * 8, &arguments)?;
    let arguments = [slots, task_table, g, factors, partials, aligned, gradient_scale];
    launch("adafactor_squares", [tasks, 1], THREADS, sums, &arguments)?;
    let arguments = [slots, partials, rates, Argument::F32(rule.learning_rate as f32), gradient_scale];
    launch("adafactor_rates", [count, 1], THREADS, sums, &arguments)?;
    let decay = Argument::F32((rule.learning_rate * rule.weight_decay) as f32);
    launch("adafactor", [tasks, 1], THREADS, 0, &[slots, task_table, p, g, factors, rates, aligned, decay])
}
