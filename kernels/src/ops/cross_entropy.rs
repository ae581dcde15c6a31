//! The output head and its loss in one, by chunks of rows: a `[tokens, vocabulary]` tensor of logits never exists.
//!
//! `logits = scale · h · wᵀ`; the loss of a row with label `y` is `logsumexp(logits) − logits[y]`, and with smoothing `s`
//! the gradient is that of `(1 − s) · loss + s · (logsumexp(logits) − mean(logits))`, as Hugging Face's LabelSmoother.
//! That gradient, by logit, is `softmax(logits) − s/V`, and less `1 − s` at the label.

use super::{check_dtype, check_shape};
use crate::float::{Float, with_float};
use crate::gemm::{Matrix, MatrixMut, gemm};
use crate::parallel::{SharedMut, for_each_task};
use crate::simd::{exp, max, multiversion, sum};
use crate::{DType, Device, Result, View, ViewMut};

/// Rows with this label have no loss and no gradient.
pub const IGNORED_LABEL: u32 = u32::MAX;

/// Logits that are in memory at a time: 32 MiB. More rows in a chunk are fewer passes over `w` and `d_w`.
const CHUNK_LOGITS: usize = 8 << 20;
/// No chunk profits from more rows than this.
const CHUNK_ROWS: usize = 512;

/// What the loss is besides its inputs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CrossEntropy {
    /// Of the logits: `D^-½` where the head is tied to the embedding, else 1.
    pub scale: f32,
    pub label_smoothing: f32,
    /// What the gradient is multiplied with, before anything of it is rounded: fp16's loss scale.
    pub gradient_scale: f32,
}

/// `losses[N,1]` (f32): the loss of each row, without smoothing, from `h[N,D]`, `w[V,D]` and `labels[N,1]` (u32).
pub fn cross_entropy_forward(h: View, w: View, labels: View, loss: CrossEntropy, losses: ViewMut) -> Result<()> {
    run(h, w, labels, loss, losses, None)
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
    check_shape!(d_h, h.rows(), h.cols());
    check_shape!(d_w, w.rows(), w.cols());
    check_dtype!(h.dtype(), d_h);
    check_dtype!(DType::F32, d_w);
    run(h, w, labels, loss, losses, Some((d_h, d_w)))
}

fn run(
    h: View,
    w: View,
    labels: View,
    loss: CrossEntropy,
    losses: ViewMut,
    gradients: Option<(ViewMut, ViewMut)>,
) -> Result<()> {
    check_shape!(h, losses.rows(), w.cols());
    check_shape!(labels, losses.rows(), 1);
    check_shape!(losses, h.rows(), 1);
    check_dtype!(h.dtype(), w);
    check_dtype!(DType::F32, losses);
    match losses.device() {
        Device::Gpu(_) => return crate::error::not_on_gpu_yet("run"),
        Device::Cpu(_) => with_float!(h.dtype(), T => cpu::<T>(h, w, labels, loss, losses, gradients)),
    }
}

fn cpu<T: Float>(
    h: View,
    w: View,
    labels: View,
    loss: CrossEntropy,
    losses: ViewMut,
    mut gradients: Option<(ViewMut, ViewMut)>,
) -> Result<()> {
    let (rows, vocabulary) = (h.rows(), w.rows());
    let chunk = (CHUNK_LOGITS / vocabulary).clamp(1, CHUNK_ROWS).min(rows.max(1));
    let mut logits = losses.device().empty(DType::F32, chunk, vocabulary)?;
    let losses = SharedMut::<f32>::new(losses);
    for start in (0..rows).step_by(chunk) {
        let range = start..rows.min(start + chunk);
        let h = Matrix::<T>::from_view(h.rows_range(range.clone()));
        let mut logits = logits.view_mut().rows_range(0..range.len());
        gemm(h, Matrix::<T>::from_view(w).transposed(), MatrixMut::<f32>::from_view(logits.reborrow()), false);
        let shared = SharedMut::<f32>::new(logits.reborrow());
        for_each_task(range.len(), range.len() * vocabulary / 2, |row| {
            let label = labels.row::<u32>(start + row)[0];
            // SAFETY: a row belongs to one task.
            let (logits, row_loss) = unsafe { (shared.row(row, 0..vocabulary), losses.row(start + row, 0..1)) };
            row_loss[0] = loss_of_row(logits, label, loss, gradients.is_some());
        });
        if let Some((d_h, d_w)) = &mut gradients {
            let d_logits = Matrix::<f32>::from_view(logits.view());
            let d_h = d_h.reborrow().rows_range(range);
            gemm(d_logits, Matrix::<T>::from_view(w), MatrixMut::<T>::from_view(d_h), false);
            gemm(d_logits.transposed(), h, MatrixMut::<f32>::from_view(d_w.reborrow()), true);
        }
    }
    Ok(())
}

/// The loss of a row; if asked for, its logits become the gradient by `h · wᵀ`, the scale included.
fn loss_of_row(logits: &mut [f32], label: u32, loss: CrossEntropy, gradient: bool) -> f32 {
    if label == IGNORED_LABEL {
        logits.fill(0.0);
        return 0.0;
    }
    let label = label as usize;
    assert!(label < logits.len(), "label {label} of a vocabulary of {}", logits.len());
    let at_label = logits[label] * loss.scale;
    let logsumexp = logsumexp(logits, loss.scale);
    if gradient {
        let background = loss.label_smoothing / logits.len() as f32;
        let factor = loss.scale * loss.gradient_scale;
        differentiate(logits, loss.scale, logsumexp, background, factor);
        logits[label] -= (1.0 - loss.label_smoothing) * factor;
    }
    logsumexp - at_label
}

multiversion! {
    fn logsumexp(logits: &[f32], scale: f32) -> f32 {
        let most = max(logits) * scale;
        most + sum(logits.len(), |index| exp(logits[index] * scale - most)).ln()
    }
}

multiversion! {
    fn differentiate(logits: &mut [f32], scale: f32, logsumexp: f32, background: f32, factor: f32) {
        for logit in logits {
            *logit = (exp(*logit * scale - logsumexp) - background) * factor;
        }
    }
}
