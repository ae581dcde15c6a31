//! Norms and scaling. Sums run over fixed blocks of fixed lanes in f64.

use rayon::prelude::*;

use super::BLOCK;

/// Independent partial sums of a block, so that it vectorises.
pub(super) const LANES: usize = 8;

/// Runs `f` compiled for AVX2 where the processor has it. The bits are the same either way:
/// wider registers change neither the lanes that a sum is written in nor any rounding.
#[inline(always)]
pub(super) fn vectorized<R>(f: impl FnOnce() -> R) -> R {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2")]
        fn with_avx2<R>(f: impl FnOnce() -> R) -> R {
            f()
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has the feature that the function is compiled for.
            return unsafe { with_avx2(f) };
        }
    }
    f()
}

/// Σ x² in f64, with the same bits for any number of threads.
pub(super) fn sum_of_squares(values: &[f32]) -> f64 {
    if values.len() <= BLOCK {
        return block_sum_of_squares(values);
    }
    let blocks: Vec<f64> = values.par_chunks(BLOCK).map(block_sum_of_squares).collect();
    blocks.iter().sum()
}

fn block_sum_of_squares(block: &[f32]) -> f64 {
    vectorized(|| sum_by_lanes(block, |x| f64::from(x) * f64::from(x)))
}

/// Σ f(x), lane by lane.
#[inline(always)]
pub(super) fn sum_by_lanes(values: &[f32], f: impl Fn(f32) -> f64) -> f64 {
    let mut lanes = [0.0f64; LANES];
    let (whole, rest) = values.as_chunks::<LANES>();
    for chunk in whole {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane += f(x);
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(rest) {
        *lane += f(x);
    }
    lanes.iter().sum()
}

/// √(Σ x² / n); 0 of nothing.
pub(super) fn root_mean_square(values: &[f32]) -> f64 {
    (sum_of_squares(values) / values.len().max(1) as f64).sqrt()
}

/// The Euclidean norm of the whole arena.
pub fn global_norm(values: &[f32]) -> f64 {
    sum_of_squares(values).sqrt()
}

/// The clipped mean gradient, as a multiple of the sum that it is the mean of: neither is a pass over memory.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ClippedMean {
    /// The Euclidean norm of the mean, before clipping.
    pub norm: f64,
    /// What turns the sum into the clipped mean.
    pub scale: f32,
}

impl ClippedMean {
    /// Of a gradient that is the sum over `count` tokens; as `torch.nn.utils.clip_grad_norm_` clips the mean, and not
    /// at all where `max_norm` is 0.
    pub fn new(sum: &[f32], count: u64, max_norm: f64) -> Self {
        let norm = global_norm(sum) / count as f64;
        let coefficient = if max_norm == 0.0 { 1.0 } else { (max_norm / (norm + 1e-6)).min(1.0) };
        ClippedMean { norm, scale: (coefficient / count as f64) as f32 }
    }
}
