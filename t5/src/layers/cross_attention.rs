//! Attention of the decoder over the encoder's output; without bias.

use quintet_kernels::ops::{self, Attention, AttentionGradients};
use quintet_kernels::{Tensor, View};

use crate::Result;
use crate::parameters::CrossAttentionLayout;
use crate::pass::{BackwardPass, Norm, Pass, Place, Sequences, Site};

/// Legend: Nt target tokens, Ns source tokens, D model, I = heads · d_kv.
#[derive(Clone, Copy)]
pub(crate) struct CrossAttention<'a> {
    pub(crate) layout: &'a CrossAttentionLayout,
    pub(crate) site: Site,
    pub(crate) sequences: Sequences<'a>,
}

pub(crate) struct CrossAttentionSaved {
    /// `[Nt,D]`
    x: Tensor,
    rstd: Tensor,
    /// `[Nt,I]`
    q: Tensor,
    /// `[Ns,2I]`
    kv: Tensor,
    /// `[Nt,I]`
    out: Tensor,
    logsumexp: Tensor,
}

impl CrossAttention<'_> {
    fn inputs<'t>(&'t self, pass: &Pass, q: &'t Tensor, kv: &'t Tensor) -> Attention<'t> {
        let inner = pass.config.inner();
        Attention {
            q: q.view(),
            k: kv.view().columns(0..inner),
            v: kv.view().columns(inner..2 * inner),
            queries: self.sequences.queries,
            keys: self.sequences.keys,
            heads: pass.config.num_heads,
            bias: None,
            causal: false,
            mask: pass.mask(self.site, Place::CrossProbabilities),
        }
    }

    /// Keys and values of the encoder's output, `[Ns,2I]`.
    pub(crate) fn keys_and_values(&self, pass: &Pass, encoded: View) -> Result<Tensor> {
        pass.linear(encoded, self.layout.kv)
    }

    pub(crate) fn forward(&self, pass: &Pass, x: Tensor, kv: Tensor) -> Result<(Tensor, CrossAttentionSaved)> {
        let (normed, rstd) = pass.norm(x.view(), self.layout.norm)?;
        let q = pass.linear(normed.view(), self.layout.q)?;
        drop(normed);
        let (out, logsumexp) = pass.attention(self.inputs(pass, &q, &kv))?;
        let delta = pass.linear(out.view(), self.layout.o)?;
        let y = pass.residual(x.view(), delta.view(), pass.mask(self.site, Place::CrossOutput))?;
        Ok((y, CrossAttentionSaved { x, rstd, q, kv, out, logsumexp }))
    }

    /// `d` is the gradient of the residual stream; `d_encoded[Ns,D]` accumulates.
    pub(crate) fn backward(
        &self,
        backward: &mut BackwardPass,
        saved: CrossAttentionSaved,
        encoded: View,
        d: &mut Tensor,
        d_encoded: &mut Tensor,
    ) -> Result<()> {
        let pass = backward.pass;
        let inner = pass.config.inner();
        let CrossAttentionSaved { x, rstd, q, kv, out, logsumexp } = saved;

        let d_delta = backward.masked(d, pass.mask(self.site, Place::CrossOutput))?;
        let d_delta = d_delta.as_ref().unwrap_or(d).view();
        let d_out = backward.linear(self.layout.o, d_delta, out.view())?;

        let mut d_q = pass.empty(q.rows(), q.cols())?;
        let mut d_kv = pass.empty(kv.rows(), kv.cols())?;
        let (d_k, d_v) = d_kv.view_mut().split_columns(inner);
        let gradients = AttentionGradients { d_q: d_q.view_mut(), d_k, d_v, d_bias: None };
        ops::attention_backward(self.inputs(pass, &q, &kv), out.view(), logsumexp.view(), d_out.view(), gradients)?;
        drop((q, kv, out, d_out));

        backward.linear_into(self.layout.kv, d_kv.view(), encoded, d_encoded, true)?;
        let norm = Norm { weight: self.layout.norm, x: x.view(), rstd: rstd.view() };
        backward.normed_linear(self.layout.q, d_q.view(), norm, d)
    }
}
