//! The non-linearities of the feed-forward layers, with the dropout that follows them.

use crate::{Dropout, Result, View, ViewMut};

/// `h[N,F] = dropout(relu(x[N,F]))`.
pub fn relu_forward(x: View, mask: Dropout, h: ViewMut) -> Result<()> {
    let _ = (x, mask, h);
    todo!()
}

/// `d_x[N,F]` from `d_h[N,F]` and the input `x[N,F]`.
pub fn relu_backward(x: View, d_h: View, mask: Dropout, d_x: ViewMut) -> Result<()> {
    let _ = (x, d_h, mask, d_x);
    todo!()
}

/// `h[N,F] = dropout(gelu_tanh(x[:, ..F]) · x[:, F..])` for `x[N,2F]`, the outputs of `wi_0` and `wi_1` side by side.
pub fn gated_gelu_forward(x: View, mask: Dropout, h: ViewMut) -> Result<()> {
    let _ = (x, mask, h);
    todo!()
}

/// `d_x[N,2F]` from `d_h[N,F]` and the input `x[N,2F]`.
pub fn gated_gelu_backward(x: View, d_h: View, mask: Dropout, d_x: ViewMut) -> Result<()> {
    let _ = (x, d_h, mask, d_x);
    todo!()
}
