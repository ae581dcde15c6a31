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
//! and for a vector u = g / √v with v the running mean of g² + ε itself. η is the learning
//! rate, λ the weight decay, t the step counted from 1, ε = 1e-30, d = 1.

use rayon::prelude::*;

use super::norm::{LANES, sum_by_lanes, vectorized};
use super::{BLOCK, TensorSlot};

const EPSILON: f64 = 1e-30;
const DECAY_RATE: f64 = -0.8;
const CLIP_THRESHOLD: f64 = 1.0;

/// Blocks of rows with column sums of their own, at most: bounds the memory for those.
const ROW_BLOCKS_MAX: usize = 256;

/// Second moments of one tensor.
pub(super) enum Moments {
    Factored(Factors),
    Full(Vec<f32>),
}

pub(super) struct Factors {
    /// Means over columns, one a row.
    pub(super) row: Vec<f32>,
    /// Means over rows, one a column.
    pub(super) col: Vec<f32>,
    rows_per_block: usize,
    /// Of one step: 1/√(row / mean row), 1/√col, and the column sums of each block of rows.
    row_factor: Vec<f32>,
    col_factor: Vec<f32>,
    col_sums: Vec<f64>,
}

impl Moments {
    pub(super) fn new(slot: &TensorSlot) -> Self {
        if !slot.is_matrix {
            return Self::Full(vec![0.0; slot.range.len()]);
        }
        let (rows, cols) = (slot.rows, slot.cols);
        let rows_per_block = (BLOCK / cols).max(rows.div_ceil(ROW_BLOCKS_MAX)).max(1);
        Self::Factored(Factors {
            row: vec![0.0; rows],
            col: vec![0.0; cols],
            rows_per_block,
            row_factor: vec![0.0; rows],
            col_factor: vec![0.0; cols],
            col_sums: vec![0.0; rows.div_ceil(rows_per_block) * cols],
        })
    }
}

/// The scalars of one step.
#[derive(Clone, Copy)]
pub(super) struct Update {
    pub(super) learning_rate: f64,
    pub(super) weight_decay: f64,
    /// What g is of what is given as g.
    pub(super) gradient_scale: f32,
    pub(super) step: u64,
}

/// Updates the parameters `p` of one tensor by its gradient `g`, and its moments.
pub(super) fn step(update: Update, p: &mut [f32], g: &[f32], moments: &mut Moments) {
    let Update { learning_rate, weight_decay, gradient_scale: scale, step } = update;
    let beta = 1.0 - (step as f64).powf(DECAY_RATE);
    let keep = (1.0 - learning_rate * weight_decay) as f32;
    let rate = |sum_of_squares: f64| {
        let rms = (sum_of_squares / g.len() as f64).sqrt();
        (learning_rate / (rms / CLIP_THRESHOLD).max(1.0)) as f32
    };
    match moments {
        Moments::Factored(factors) => {
            factors.accumulate(g, scale, beta);
            let rate = rate(factors.update_sum_of_squares(g, scale));
            factors.apply(keep, rate * scale, p, g);
        }
        Moments::Full(v) => {
            let rate = rate(accumulate_full(g, scale, v, beta as f32)) * scale;
            p.par_chunks_mut(BLOCK).zip(g.par_chunks(BLOCK)).zip(v.par_chunks(BLOCK)).for_each(|((p, g), v)| {
                for ((p, &g), &v) in p.iter_mut().zip(g).zip(v) {
                    *p = *p * keep - rate * (g / v.sqrt());
                }
            });
        }
    }
}

/// Updates the moments `v` of a vector; returns Σ u².
fn accumulate_full(g: &[f32], scale: f32, v: &mut [f32], beta: f32) -> f64 {
    let blocks: Vec<f64> = v
        .par_chunks_mut(BLOCK)
        .zip(g.par_chunks(BLOCK))
        .map(|(v, g)| {
            let mut sum = 0.0;
            for (v, &g) in v.iter_mut().zip(g) {
                let g = g * scale;
                *v = beta * *v + (1.0 - beta) * (g * g + EPSILON as f32);
                let u = f64::from(g) / f64::from(*v).sqrt();
                sum += u * u;
            }
            sum
        })
        .collect();
    blocks.iter().sum()
}

impl Factors {
    fn block_elements(&self) -> usize {
        self.rows_per_block * self.col.len()
    }

    /// Takes the step's gradient into the running means and derives the factors.
    fn accumulate(&mut self, g: &[f32], scale: f32, beta: f64) {
        let (rows, cols, block) = (self.row.len(), self.col.len(), self.block_elements());
        let blend = |old: f32, mean: f64| (beta * f64::from(old) + (1.0 - beta) * (mean + EPSILON)) as f32;
        g.par_chunks(block)
            .zip(self.row.par_chunks_mut(self.rows_per_block))
            .zip(self.col_sums.par_chunks_mut(cols))
            .for_each(|((g, row), col_sums)| {
                vectorized(|| {
                    col_sums.fill(0.0);
                    for (g, row) in g.chunks_exact(cols).zip(row) {
                        *row = blend(*row, sum_by_lanes(g, |x| square(x * scale)) / cols as f64);
                        col_sums.iter_mut().zip(g).for_each(|(sum, &x)| *sum += square(x * scale));
                    }
                });
            });
        let (totals, others) = self.col_sums.split_at_mut(cols);
        for sums in others.chunks_exact(cols) {
            totals.iter_mut().zip(sums).for_each(|(total, sum)| *total += sum);
        }
        for (col, &total) in self.col.iter_mut().zip(totals.iter()) {
            *col = blend(*col, total / rows as f64);
        }
        let row_mean = sum_by_lanes(&self.row, f64::from) / rows as f64;
        for (factor, &row) in self.row_factor.iter_mut().zip(&self.row) {
            *factor = (f64::from(row) / row_mean).sqrt().recip() as f32;
        }
        for (factor, &col) in self.col_factor.iter_mut().zip(&self.col) {
            *factor = f64::from(col).sqrt().recip() as f32;
        }
    }

    /// Σ u².
    fn update_sum_of_squares(&self, g: &[f32], scale: f32) -> f64 {
        let cols = self.col.len();
        let blocks: Vec<f64> = g
            .par_chunks(self.block_elements())
            .zip(self.row_factor.par_chunks(self.rows_per_block))
            .map(|(g, row_factor)| {
                vectorized(|| {
                    let rows = g.chunks_exact(cols).zip(row_factor);
                    rows.map(|(g, &r)| row_update_sum_of_squares(g, r * scale, &self.col_factor)).sum()
                })
            })
            .collect();
        blocks.iter().sum()
    }

    fn apply(&self, keep: f32, rate: f32, p: &mut [f32], g: &[f32]) {
        let (cols, block) = (self.col.len(), self.block_elements());
        p.par_chunks_mut(block).zip(g.par_chunks(block)).zip(self.row_factor.par_chunks(self.rows_per_block)).for_each(
            |((p, g), row_factor)| {
                vectorized(|| {
                    let rows = p.chunks_exact_mut(cols).zip(g.chunks_exact(cols));
                    for ((p, g), &r) in rows.zip(row_factor) {
                        for ((p, &g), &c) in p.iter_mut().zip(g).zip(&self.col_factor) {
                            *p = *p * keep - rate * (g * (r * c));
                        }
                    }
                });
            },
        );
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
