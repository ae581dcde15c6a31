//! Self-attention with relative position bias.

use quintet_kernels::ops::{self, Attention, AttentionGradients};
use quintet_kernels::{Segments, Tensor, View};

use crate::Result;
use crate::parameters::SelfAttentionLayout;
use crate::pass::{BackwardPass, Norm, Pass, Place, Site};

/// Legend: N tokens, D model, I = heads · d_kv.
#[derive(Clone, Copy)]
pub(crate) struct SelfAttention<'a> {
    pub(crate) layout: &'a SelfAttentionLayout,
    pub(crate) site: Site,
    pub(crate) segments: &'a Segments,
    /// By clamped distance, `[heads, 2R+1]`.
    pub(crate) bias: View<'a>,
}

pub(crate) struct SelfAttentionSaved {
    /// `[N,D]`
    pub(crate) x: Tensor,
    rstd: Tensor,
    /// `[N,3I]`
    qkv: Tensor,
    /// `[N,I]`
    out: Tensor,
    logsumexp: Tensor,
}

impl SelfAttention<'_> {
    fn inputs<'t>(&'t self, pass: &Pass, qkv: &'t Tensor) -> Attention<'t> {
        let inner = pass.config.inner();
        Attention {
            q: qkv.view().columns(0..inner),
            k: qkv.view().columns(inner..2 * inner),
            v: qkv.view().columns(2 * inner..3 * inner),
            queries: self.segments,
            keys: self.segments,
            heads: pass.config.num_heads,
            bias: Some(self.bias),
            causal: self.site.decoder,
            mask: pass.mask(self.site, Place::AttentionProbabilities),
        }
    }

    pub(crate) fn forward(&self, pass: &Pass, x: Tensor) -> Result<(Tensor, SelfAttentionSaved)> {
        let (normed, rstd) = pass.norm(x.view(), self.layout.norm)?;
        let qkv = pass.linear(normed.view(), self.layout.qkv)?;
        drop(normed);
        let (out, logsumexp) = pass.attention(self.inputs(pass, &qkv))?;
        let delta = pass.linear(out.view(), self.layout.o)?;
        let y = pass.residual(x.view(), delta.view(), pass.mask(self.site, Place::AttentionOutput))?;
        Ok((y, SelfAttentionSaved { x, rstd, qkv, out, logsumexp }))
    }

    /// `d` is the gradient of the residual stream; `d_bias[heads, 2R+1]` accumulates.
    pub(crate) fn backward(
        &self,
        backward: &mut BackwardPass,
        saved: SelfAttentionSaved,
        d: &mut Tensor,
        d_bias: &mut Tensor,
    ) -> Result<()> {
        let pass = backward.pass;
        let inner = pass.config.inner();
        let SelfAttentionSaved { x, rstd, qkv, out, logsumexp } = saved;

        let d_delta = backward.masked(d, pass.mask(self.site, Place::AttentionOutput))?;
        let d_delta = d_delta.as_ref().unwrap_or(d).view();
        let d_out = backward.linear(self.layout.o, d_delta, out.view())?;

        let mut d_qkv = pass.empty(qkv.rows(), qkv.cols())?;
        let (d_q, d_kv) = d_qkv.view_mut().split_columns(inner);
        let (d_k, d_v) = d_kv.split_columns(inner);
        let gradients = AttentionGradients { d_q, d_k, d_v, d_bias: Some(d_bias.view_mut()) };
        ops::attention_backward(self.inputs(pass, &qkv), out.view(), logsumexp.view(), d_out.view(), gradients)?;
        drop((qkv, out, d_out));

        let norm = Norm { weight: self.layout.norm, x: x.view(), rstd: rstd.view() };
        backward.normed_linear(self.layout.qkv, d_qkv.view(), norm, d)
    }
}
