//! Multi-head attention of T5, over sequences without padding.
//!
//! For a head, `p = softmax(q · kᵀ + bias[clamp(key − query)])`, not scaled by `K^-½`; `out = dropout(p) · v`. Nothing of
//! size query × key is kept: the backward pass computes `p` again from `logsumexp`.

mod cpu;
mod gpu;

use super::{check_dtype, check_shape};
use crate::float::with_float;
use crate::{DType, Device, Dropout, Result, Segments, View, ViewMut};

/// The dropout generator numbers the probabilities of a query and a head from a multiple of this on, by key: which of
/// them are dropped depends on nothing else, such as the other sequences of the batch or how the work is cut.
const KEYS_MAX: usize = 1 << 20;

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

impl<'a> Attention<'a> {
    fn check(&self) {
        let (inner, keys) = (self.q.cols(), self.k);
        check_shape!(keys, self.k.rows(), inner);
        let values = self.v;
        check_shape!(values, self.k.rows(), inner);
        check_dtype!(self.q.dtype(), keys, values);
        assert!(self.heads > 0 && inner.is_multiple_of(self.heads), "{inner} columns for {} heads", self.heads);
        assert_eq!(self.queries.len(), self.keys.len(), "sequences of queries and of keys");
        assert!(self.queries.end() <= self.q.rows() && self.keys.end() <= self.k.rows(), "segments beyond the rows");
        assert!(self.keys.longest() <= KEYS_MAX, "a sequence of more than {KEYS_MAX} keys");
        if let Some(bias) = self.bias {
            check_shape!(bias, self.heads, bias.cols());
            check_dtype!(DType::F32, bias);
            assert!(bias.cols() % 2 == 1, "bias over an even number of distances");
        }
        for sequence in 0..self.queries.len() {
            let (queries, keys) = (self.queries.rows(sequence).len(), self.keys.rows(sequence).len());
            assert!(keys > 0, "sequence {sequence} has no keys");
            assert!(!self.causal || queries <= keys, "sequence {sequence} has more queries than keys");
        }
    }

    fn head_size(&self) -> usize {
        self.q.cols() / self.heads
    }
}

/// `out[Nq, H·K]`, and `logsumexp[Nq, H]` (f32) of the scores for the backward pass.
pub fn attention_forward(inputs: Attention, out: ViewMut, logsumexp: ViewMut) -> Result<()> {
    inputs.check();
    check_shape!(out, inputs.q.rows(), inputs.q.cols());
    check_shape!(logsumexp, inputs.q.rows(), inputs.heads);
    check_dtype!(inputs.q.dtype(), out);
    match out.device() {
        Device::Cpu(_) => with_float!(out.dtype(), T => cpu::forward::<T>(inputs, out, logsumexp)),
        Device::Gpu(gpu) => gpu::forward(gpu, &inputs, &out, &logsumexp)?,
    }
    Ok(())
}

/// The gradients from `d_out[Nq, H·K]`, given the forward pass's `out` and `logsumexp`.
///
/// With `f` the dropout factors and `d_p = f · (d_out · vᵀ)`: `d_v = (f · p)ᵀ · d_out`, `d_score = p · (d_p − δ)` where
/// `δ = Σ p · d_p` over the keys, `d_q = d_score · k`, `d_k = d_scoreᵀ · q`. `δ` is also `d_out · out`, for a device that
/// does not have a query's keys together; but that costs precision where `out` is bf16.
pub fn attention_backward(
    inputs: Attention,
    out: View,
    logsumexp: View,
    d_out: View,
    gradients: AttentionGradients,
) -> Result<()> {
    inputs.check();
    let AttentionGradients { d_q, d_k, d_v, d_bias } = &gradients;
    for view in [out, d_out, d_q.view()] {
        check_shape!(view, inputs.q.rows(), inputs.q.cols());
    }
    for view in [d_k.view(), d_v.view()] {
        check_shape!(view, inputs.k.rows(), inputs.k.cols());
    }
    check_shape!(logsumexp, inputs.q.rows(), inputs.heads);
    check_dtype!(inputs.q.dtype(), out, d_out, d_q, d_k, d_v);
    let distances = |bias: View| (bias.rows(), bias.cols());
    assert_eq!(inputs.bias.map(distances), d_bias.as_ref().map(|d_bias| distances(d_bias.view())), "shape of d_bias");
    match out.device() {
        Device::Cpu(_) => with_float!(out.dtype(), T => cpu::backward::<T>(inputs, logsumexp, d_out, gradients)),
        Device::Gpu(gpu) => gpu::backward(gpu, &inputs, out, logsumexp, d_out, &gradients),
    }
}
