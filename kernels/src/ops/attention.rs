//! Multi-head attention of T5, over sequences without padding.
//!
//! For a head, `p = softmax(q · kᵀ + bias[clamp(key − query)])`, not scaled by `K^-½`; `out = dropout(p) · v`. Nothing of
//! size query × key is kept: the backward pass computes `p` again from `logsumexp`.

use crate::{Dropout, Result, Segments, View, ViewMut};

/// The inputs of an attention layer.
#[derive(Clone, Copy)]
pub struct Attention<'a> {
    /// `[Nq, H·K]`
    pub q: View<'a>,
    /// `[Nk, H·K]`
    pub k: View<'a>,
    /// `[Nk, H·K]`
    pub v: View<'a>,
    /// Rows of `q` of each sequence, and of `k` and `v`: as many of the one as of the other.
    pub queries: &'a Segments,
    pub keys: &'a Segments,
    pub heads: usize,
    /// `[H, 2R+1]` (f32) by clamped distance, or none (cross-attention).
    pub bias: Option<View<'a>>,
    /// A query sees keys up to its own position. The last query is at the position of the last key, so that a query
    /// against a key/value cache is where it belongs; without `causal` too (for the bias).
    pub causal: bool,
    pub mask: Dropout,
}

/// Where the gradients go; all but `d_bias` are overwritten.
pub struct AttentionGradients<'a> {
    pub d_q: ViewMut<'a>,
    pub d_k: ViewMut<'a>,
    pub d_v: ViewMut<'a>,
    /// `[H, 2R+1]` (f32), accumulated; there if and only if there is a bias.
    pub d_bias: Option<ViewMut<'a>>,
}

/// `out[Nq, H·K]`, and `logsumexp[Nq, H]` (f32) of the scores for the backward pass.
pub fn attention_forward(inputs: Attention, out: ViewMut, logsumexp: ViewMut) -> Result<()> {
    let _ = (inputs, out, logsumexp);
    todo!()
}

/// The gradients from `d_out[Nq, H·K]`, given the forward pass's `out` and `logsumexp`.
pub fn attention_backward(
    inputs: Attention,
    out: View,
    logsumexp: View,
    d_out: View,
    gradients: AttentionGradients,
) -> Result<()> {
    let _ = (inputs, out, logsumexp, d_out, gradients);
    todo!()
}
