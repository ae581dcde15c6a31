//! The feed-forward sub-layer: relu (v1.0) or gated GELU (v1.1 and its family).
//!
//! Where everything else is f16, `wo` and its input are f32: T5's activations there leave f16's range.

use quintet_kernels::{DType, Tensor, ops};

use crate::Result;
use crate::parameters::FeedForwardLayout;
use crate::pass::{BackwardPass, Norm, Pass, Place, Site};

/// Legend: N tokens, D model, F feed-forward.
#[derive(Clone, Copy)]
pub(crate) struct FeedForward<'a> {
    pub(crate) layout: &'a FeedForwardLayout,
    pub(crate) site: Site,
}

pub(crate) struct FeedForwardSaved {
    /// `[N,D]`
    x: Tensor,
    rstd: Tensor,
    /// `[N,2F]`, outputs of wi_0 and wi_1; not needed for relu, whose sign shows in `hidden`.
    gate: Option<Tensor>,
    /// `[N,F]`, after activation and dropout.
    hidden: Tensor,
}

impl FeedForward<'_> {
    pub(crate) fn forward(&self, pass: &Pass, x: Tensor) -> Result<(Tensor, FeedForwardSaved)> {
        let (normed, rstd) = pass.norm(x.view(), self.layout.norm)?;
        let gate = pass.linear(normed.view(), self.layout.wi)?;
        drop(normed);
        let mask = pass.mask(self.site, Place::FeedForwardInner);
        let mut hidden = pass.empty(x.rows(), pass.config.d_ff)?;
        let gate = if pass.config.is_gated() {
            ops::gated_gelu_forward(gate.view(), mask, hidden.view_mut())?;
            Some(gate)
        } else {
            ops::relu_forward(gate.view(), mask, hidden.view_mut())?;
            None
        };
        let delta = match pass.weights.dtype() {
            DType::F16 => pass.linear_in_f32(hidden.view(), self.layout.wo)?,
            _ => pass.linear(hidden.view(), self.layout.wo)?,
        };
        let y = pass.residual(x.view(), delta.view(), pass.mask(self.site, Place::FeedForwardOutput))?;
        Ok((y, FeedForwardSaved { x, rstd, gate, hidden }))
    }

    /// `d` is the gradient of the residual stream.
    pub(crate) fn backward(&self, backward: &mut BackwardPass, saved: FeedForwardSaved, d: &mut Tensor) -> Result<()> {
        let pass = backward.pass;
        let FeedForwardSaved { x, rstd, gate, hidden } = saved;

        let d_delta = backward.masked(d, pass.mask(self.site, Place::FeedForwardOutput))?;
        let d_delta = d_delta.as_ref().unwrap_or(d).view();
        let d_hidden = match pass.weights.dtype() {
            DType::F16 => backward.linear_in_f32(self.layout.wo, d_delta, hidden.view())?,
            _ => backward.linear(self.layout.wo, d_delta, hidden.view())?,
        };

        let mask = pass.mask(self.site, Place::FeedForwardInner);
        let mut d_gate = pass.empty(x.rows(), self.layout.wi.rows())?;
        match gate {
            Some(gate) => ops::gated_gelu_backward(gate.view(), d_hidden.view(), mask, d_gate.view_mut())?,
            // Where `hidden` is 0, the input was negative or dropped: no gradient either way.
            None => ops::relu_backward(hidden.view(), d_hidden.view(), mask, d_gate.view_mut())?,
        }
        drop((hidden, d_hidden));

        let norm = Norm { weight: self.layout.norm, x: x.view(), rstd: rstd.view() };
        backward.normed_linear(self.layout.wi, d_gate.view(), norm, d)
    }
}
