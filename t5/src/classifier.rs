//! The classification head of `T5ForSequenceClassification`.
//!
//! The decoder reads the input itself, shifted right; its output at the input's last end of sequence stands for the whole:
//! `logits = out_proj · dropout(tanh(dense · dropout(pooled)))`. Legend: N tokens, B examples, D model, C classes.

use quintet_kernels::ops::{self, CrossEntropy};
use quintet_kernels::{DType, Dropout, Tensor, View};

use crate::Result;
use crate::arena::Slot;
use crate::head::identity;
use crate::pass::{BackwardPass, Pass, Place, Site};

/// Two linear layers with biases.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ClassifierLayout {
    pub(crate) dense: Slot,
    pub(crate) dense_bias: Slot,
    pub(crate) out_proj: Slot,
    pub(crate) out_bias: Slot,
}

/// The head over one batch.
pub(crate) struct Classifier<'a> {
    pub(crate) layout: &'a ClassifierLayout,
    /// The decoder's rows that stand for the examples, `[B,1]`.
    pub(crate) pooled_rows: View<'a>,
}

/// What the backward pass needs.
struct Saved {
    /// `[B,D]`, after their dropouts but for `hidden`.
    pooled: Tensor,
    hidden: Tensor,
    dropped: Tensor,
    /// `[B,1]` of ones: what a bias is a weight of.
    ones: Tensor,
}

impl Classifier<'_> {
    fn mask(&self, pass: &Pass, place: Place) -> Dropout {
        pass.mask_of(pass.config.classifier_dropout, Site { decoder: true, block: 0 }, place)
    }

    /// `x · wᵀ + b`
    fn linear(pass: &Pass, x: View, w: Slot, bias: Slot, ones: View) -> Result<Tensor> {
        let mut y = pass.linear(x, w)?;
        let bias = pass.weights.slot(bias).reshape(0, w.rows(), 1);
        ops::linear_forward(ones, bias, y.view_mut(), true)?;
        Ok(y)
    }

    fn forward(&self, pass: &Pass, decoded: View) -> Result<(Tensor, Saved)> {
        let rows = self.pooled_rows.rows();
        let ones = pass.device.upload(&vec![1.0_f32; rows], rows, 1)?;
        let ones = pass.cast(ones.view(), pass.weights.dtype())?;
        let mut pooled = pass.empty(rows, decoded.cols())?;
        let mask = self.mask(pass, Place::ClassifierInput);
        ops::embedding_forward(self.pooled_rows, decoded, mask, pooled.view_mut())?;
        let dense = Self::linear(pass, pooled.view(), self.layout.dense, self.layout.dense_bias, ones.view())?;
        let mut hidden = pass.empty(rows, decoded.cols())?;
        ops::tanh_forward(dense.view(), hidden.view_mut())?;
        let mut dropped = pass.empty(rows, decoded.cols())?;
        ops::dropout(hidden.view(), self.mask(pass, Place::ClassifierHidden), dropped.view_mut())?;
        let logits = Self::linear(pass, dropped.view(), self.layout.out_proj, self.layout.out_bias, ones.view())?;
        Ok((logits, Saved { pooled, hidden, dropped, ones }))
    }

    /// The losses of the examples `[B,1]`, and the logits `[B,C]`.
    pub(crate) fn loss(
        &self,
        pass: &Pass,
        decoded: View,
        labels: View,
        loss: CrossEntropy,
    ) -> Result<(Tensor, Tensor)> {
        let (logits, _) = self.forward(pass, decoded)?;
        let mut losses = pass.device.empty(DType::F32, logits.rows(), 1)?;
        let one = one(pass, &logits)?;
        ops::cross_entropy_forward(logits.view(), one.view(), labels, loss, losses.view_mut())?;
        Ok((losses, logits))
    }

    /// The losses, and the gradient of the decoder's output `[N,D]`; that of the head's parameters is added to the others.
    pub(crate) fn train(
        &self,
        backward: &mut BackwardPass,
        decoded: View,
        labels: View,
        loss: CrossEntropy,
    ) -> Result<(Tensor, Tensor)> {
        let pass = backward.pass;
        let (logits, saved) = self.forward(pass, decoded)?;
        let mut losses = pass.device.empty(DType::F32, logits.rows(), 1)?;
        let mut d_logits = pass.empty(logits.rows(), logits.cols())?;
        let one = one(pass, &logits)?;
        let (h, w) = (logits.view(), one.view());
        ops::cross_entropy_forward_backward(h, w, labels, loss, losses.view_mut(), d_logits.view_mut(), None)?;
        let d_decoded = self.backward(backward, decoded, saved, d_logits.view())?;
        Ok((losses, d_decoded))
    }

    fn backward(&self, backward: &mut BackwardPass, decoded: View, saved: Saved, d_logits: View) -> Result<Tensor> {
        let pass = backward.pass;
        let Saved { pooled, hidden, dropped, ones } = saved;
        let layout = self.layout;
        let d_dropped = Self::linear_backward(backward, layout.out_proj, layout.out_bias, d_logits, &dropped, &ones)?;
        let mut d_hidden = pass.empty(hidden.rows(), hidden.cols())?;
        ops::dropout(d_dropped.view(), self.mask(pass, Place::ClassifierHidden), d_hidden.view_mut())?;
        let mut d_dense = pass.empty(hidden.rows(), hidden.cols())?;
        ops::tanh_backward(hidden.view(), d_hidden.view(), d_dense.view_mut())?;
        let d_pooled =
            Self::linear_backward(backward, layout.dense, layout.dense_bias, d_dense.view(), &pooled, &ones)?;
        let mut d_decoded = pass.device.zeros(DType::F32, decoded.rows(), decoded.cols())?;
        let mask = self.mask(pass, Place::ClassifierInput);
        ops::embedding_backward(self.pooled_rows, d_pooled.view(), mask, d_decoded.view_mut())?;
        backward.finished(layout.dense.start());
        match decoded.dtype() {
            DType::F32 => Ok(d_decoded),
            dtype => pass.cast(d_decoded.view(), dtype),
        }
    }

    fn linear_backward(
        backward: &mut BackwardPass,
        w: Slot,
        bias: Slot,
        d_y: View,
        x: &Tensor,
        ones: &Tensor,
    ) -> Result<Tensor> {
        if let Some(d_bias) = backward.gradients.place_mut(bias) {
            ops::linear_backward_weight(d_y, ones.view(), d_bias.reshape(0, w.rows(), 1))?;
        }
        backward.linear(w, d_y, x.view())
    }
}

/// The loss multiplies by an output head's matrix; of a classifier it is the identity, because its layers have biases and
/// may have adapters.
fn one(pass: &Pass, logits: &Tensor) -> Result<Tensor> {
    pass.cast(identity(pass.device, logits.cols())?.view(), logits.dtype())
}
