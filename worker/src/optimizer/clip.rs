//! The mean of a gradient sum, and its clipping.

use quintet_kernels::{View, ops};

use crate::Result;

/// The clipped mean gradient, as a multiple of the sum that it is the mean of: neither is a pass over memory.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ClippedMean {
    /// The Euclidean norm of the mean, before clipping.
    pub norm: f64,
    /// What turns the sum into the clipped mean.
    pub scale: f32,
}

impl ClippedMean {
    /// Of a gradient that is `divisor` times the mean: the number of tokens that it is the sum over, and what else it was
    /// multiplied with. As `torch.nn.utils.clip_grad_norm_` clips the mean, and not at all where `max_norm` is 0.
    pub fn new(sum: View, divisor: f64, max_norm: f64) -> Result<Self> {
        Ok(Self::of_norm(ops::global_norm(sum)?, divisor, max_norm))
    }

    /// [`ClippedMean::new`] of a gradient sum whose norm is known.
    pub fn of_norm(norm: f64, divisor: f64, max_norm: f64) -> Self {
        let norm = norm / divisor;
        let coefficient = if max_norm == 0.0 { 1.0 } else { (max_norm / (norm + 1e-6)).min(1.0) };
        ClippedMean { norm, scale: (coefficient / divisor) as f32 }
    }
}
