//! RMSNorm as T5 has it: no mean, no bias, variance in f32.
//!
//! `y = cast(x · r) · w` with `r = (mean(x²) + eps)^-½`, per row.

use crate::{Result, View, ViewMut};

/// `y[N,D]` from `x[N,D]` and `weight[1,D]`; `rstd[N,1]` (f32) keeps `r` for the backward pass.
pub fn rms_norm_forward(x: View, weight: View, eps: f32, y: ViewMut, rstd: ViewMut) -> Result<()> {
    let _ = (x, weight, eps, y, rstd);
    todo!()
}

/// Adds the gradient to `d_x[N,D]` (the residual stream's gradient is already in it) and to `d_weight[1,D]` (f32).
pub fn rms_norm_backward(d_y: View, x: View, weight: View, rstd: View, d_x: ViewMut, d_weight: ViewMut) -> Result<()> {
    let _ = (d_y, x, weight, rstd, d_x, d_weight);
    todo!()
}
