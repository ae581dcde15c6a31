//! The output head and its loss in one, by chunks of rows: a `[tokens, vocabulary]` tensor of logits never exists.
//!
//! `logits = scale · h · wᵀ`; the loss of a row with label `y` is `logsumexp(logits) − logits[y]`, and with smoothing `s`
//! the gradient is that of `(1 − s) · loss + s · (logsumexp(logits) − mean(logits))`, as Hugging Face's LabelSmoother.

use crate::{Result, View, ViewMut};

/// Rows with this label have no loss and no gradient.
pub const IGNORED_LABEL: u32 = u32::MAX;

/// What the loss is besides its inputs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CrossEntropy {
    /// Of the logits: `D^-½` where the head is tied to the embedding, else 1.
    pub scale: f32,
    pub label_smoothing: f32,
}

/// `losses[N,1]` (f32): the loss of each row, without smoothing, from `h[N,D]`, `w[V,D]` and `labels[N,1]` (u32).
pub fn cross_entropy_forward(h: View, w: View, labels: View, loss: CrossEntropy, losses: ViewMut) -> Result<()> {
    let _ = (h, w, labels, loss, losses);
    todo!()
}

/// As [`cross_entropy_forward`], and the gradient of the **sum** of the (smoothed) losses: `d_h[N,D]` is overwritten,
/// `d_w[V,D]` (f32) accumulates.
pub fn cross_entropy_forward_backward(
    h: View,
    w: View,
    labels: View,
    loss: CrossEntropy,
    losses: ViewMut,
    d_h: ViewMut,
    d_w: ViewMut,
) -> Result<()> {
    let _ = (h, w, labels, loss, losses, d_h, d_w);
    todo!()
}
