//! The output head and its loss.
//!
//! The loss never has all logits in memory, so what an adapter of the head adds to them is made part of the product:
//! `h · wᵀ + low · bᵀ = [h, low] · [w, b]ᵀ`, with the adapter's `low = scale · dropout(h) · aᵀ`.

use quintet_kernels::ops::{self, CrossEntropy};
use quintet_kernels::{DType, Device, Dropout, Tensor, View};

use crate::Result;
use crate::arena::{Adapter, Slot};
use crate::pass::{BackwardPass, Pass};

/// The losses `[N,1]` of the decoder's output `h[N,D]`.
pub(crate) fn loss(pass: &Pass, h: View, labels: View, loss: CrossEntropy) -> Result<Tensor> {
    let head = pass.layout.head();
    let wide = Wide::new(pass, h, head)?;
    let (h, w) = wide.as_ref().map_or((h, pass.weights.slot(head)), Wide::operands);
    let mut losses = pass.device.empty(DType::F32, h.rows(), 1)?;
    ops::cross_entropy_forward(h, w, labels, loss, losses.view_mut())?;
    Ok(losses)
}

/// The losses, and the gradient of `h`; that of the head's parameters is added to the others.
pub(crate) fn train(
    backward: &mut BackwardPass,
    h: View,
    labels: View,
    loss: CrossEntropy,
) -> Result<(Tensor, Tensor)> {
    let pass = backward.pass;
    let head = pass.layout.head();
    let mut losses = pass.device.empty(DType::F32, h.rows(), 1)?;
    let mut d_h = pass.empty(h.rows(), h.cols())?;
    match Wide::new(pass, h, head)? {
        Some(wide) => wide.train(backward, h, labels, loss, &mut losses, &mut d_h)?,
        None => {
            let (w, d_w) = (pass.weights.slot(head), backward.gradients.place_mut(head));
            ops::cross_entropy_forward_backward(h, w, labels, loss, losses.view_mut(), d_h.view_mut(), d_w)?;
        }
    }
    Ok((losses, d_h))
}

/// The operands with an adapter's part beside them.
struct Wide {
    adapter: Adapter,
    /// `[N,D+r]`
    h: Tensor,
    /// `[V,D+r]`
    w: Tensor,
}

impl Wide {
    /// None where the head has no adapter.
    fn new(pass: &Pass, h: View, head: Slot) -> Result<Option<Self>> {
        let Some((_, adapter)) = pass.weights.adapters(head).next() else { return Ok(None) };
        let ops::Lora { a, b, scale, mask, .. } = pass.lora(h, adapter);
        let mut low = pass.empty(h.rows(), a.rows())?;
        ops::linear_forward_scaled(dropped(pass, h, mask)?.view(), a, scale, low.view_mut())?;
        let h = beside(pass, h, low.view())?;
        let w = beside(pass, pass.weights.slot(head), b)?;
        Ok(Some(Wide { adapter, h, w }))
    }

    fn operands(&self) -> (View<'_>, View<'_>) {
        (self.h.view(), self.w.view())
    }

    fn train(
        &self,
        backward: &mut BackwardPass,
        h: View,
        labels: View,
        loss: CrossEntropy,
        losses: &mut Tensor,
        d_h: &mut Tensor,
    ) -> Result<()> {
        let (pass, adapter, width) = (backward.pass, self.adapter, h.cols());
        let mut d_wide = pass.empty(h.rows(), self.h.cols())?;
        let mut d_w = pass.device.zeros(DType::F32, self.w.rows(), self.w.cols())?;
        let (h_wide, w_wide) = self.operands();
        let gradients = (d_wide.view_mut(), Some(d_w.view_mut()));
        ops::cross_entropy_forward_backward(h_wide, w_wide, labels, loss, losses.view_mut(), gradients.0, gradients.1)?;
        ops::cast(d_wide.view().columns(0..width), d_h.view_mut())?;

        let rank = width..self.h.cols();
        let one = identity(pass.device, rank.len())?;
        let d_b = backward.gradients.slot_mut(adapter.b);
        ops::linear_forward(d_w.view().columns(rank.clone()), one.view(), d_b, true)?;
        // The scale is a factor of what enters the product here.
        let one = pass.cast(one.view(), h.dtype())?;
        let mut d_low = pass.empty(h.rows(), rank.len())?;
        ops::linear_forward_scaled(d_wide.view().columns(rank), one.view(), adapter.scale, d_low.view_mut())?;
        let ops::Lora { a, mask, .. } = pass.lora(h, adapter);
        let x = dropped(pass, h, mask)?;
        ops::linear_backward_weight(d_low.view(), x.view(), backward.gradients.slot_mut(adapter.a))?;
        Ok(ops::lora_backward_input(d_low.view(), a, mask, d_h.view_mut())?)
    }
}

fn dropped(pass: &Pass, h: View, mask: Dropout) -> Result<Tensor> {
    let mut dropped = pass.empty(h.rows(), h.cols())?;
    ops::dropout(h, mask, dropped.view_mut())?;
    Ok(dropped)
}

/// `[left, right]`
fn beside(pass: &Pass, left: View, right: View) -> Result<Tensor> {
    let mut both = pass.device.empty(left.dtype(), left.rows(), left.cols() + right.cols())?;
    let (to_left, to_right) = both.view_mut().split_columns(left.cols());
    ops::cast(left, to_left)?;
    ops::cast(right, to_right)?;
    Ok(both)
}

/// `[size, size]` in f32: a product with it copies.
pub(crate) fn identity(device: &Device, size: usize) -> Result<Tensor> {
    let values: Vec<f32> = (0..size * size).map(|index| if index % (size + 1) == 0 { 1.0 } else { 0.0 }).collect();
    Ok(device.upload(&values, size, size)?)
}
