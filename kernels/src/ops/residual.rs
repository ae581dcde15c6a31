//! Dropout, and the addition of a sub-layer's output to the residual stream.

use crate::{Dropout, Result, View, ViewMut};

/// `y[N,D] = x[N,D] + dropout(delta[N,D])`. Backward: the gradient of `x` is that of `y`; the gradient of `delta` is
/// [`dropout`] of it with the same mask.
pub fn residual_forward(x: View, delta: View, mask: Dropout, y: ViewMut) -> Result<()> {
    let _ = (x, delta, mask, y);
    todo!()
}

/// `y[N,D] = dropout(x[N,D])`; its own backward pass. With [`Dropout::NONE`] a copy.
pub fn dropout(x: View, mask: Dropout, y: ViewMut) -> Result<()> {
    let _ = (x, mask, y);
    todo!()
}
