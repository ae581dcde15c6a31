//! Linear layers without bias: `y = x · wᵀ`.

use crate::{Result, View, ViewMut};

/// `y[N,O] = x[N,I] · w[O,I]ᵀ`, plus the old `y` if `accumulate`. `y` may be f32 where `x` and `w` are bf16.
pub fn linear_forward(x: View, w: View, y: ViewMut, accumulate: bool) -> Result<()> {
    let _ = (x, w, y, accumulate);
    todo!()
}

/// `d_x[N,I] = d_y[N,O] · w[O,I]`, plus the old `d_x` if `accumulate`.
pub fn linear_backward_input(d_y: View, w: View, d_x: ViewMut, accumulate: bool) -> Result<()> {
    let _ = (d_y, w, d_x, accumulate);
    todo!()
}

/// `d_w[O,I] += d_y[N,O]ᵀ · x[N,I]`; `d_w` is f32.
pub fn linear_backward_weight(d_y: View, x: View, d_w: ViewMut) -> Result<()> {
    let _ = (d_y, x, d_w);
    todo!()
}
