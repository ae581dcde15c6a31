//! The output head and its loss in one, by chunks of rows: a `[tokens, vocabulary]` tensor of logits never exists.
//!
//! `logits = scale · h · wᵀ`; the loss of a row with label `y` is `logsumexp(logits) − logits[y]`, and with smoothing `s`
//! the gradient is that of `(1 − s) · loss + s · (logsumexp(logits) − mean(logits))`, as Hugging Face's LabelSmoother.
//! That gradient, by logit, is `softmax(logits) − s/V`, and less `1 − s` at the label.

use super::{check_dtype, check_shape};
use crate::driver::{Argument, Gpu, Launch, Module, Product, has_whole_vectors};
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
/// `d_w[V,D]` (f32) accumulates; none of a frozen head.
pub fn cross_entropy_forward_backward(
    h: View,
    w: View,
    labels: View,
    loss: CrossEntropy,
    losses: ViewMut,
    d_h: ViewMut,
    d_w: Option<ViewMut>,
) -> Result<()> {
    check_shape!(d_h, h.rows(), h.cols());
    check_dtype!(h.dtype(), d_h);
    if let Some(d_w) = &d_w {
        check_shape!(d_w, w.rows(), w.cols());
        check_dtype!(DType::F32, d_w);
    }
    run(h, w, labels, loss, losses, Some((d_h, d_w)))
}

fn run(
    h: View,
    w: View,
    labels: View,
    loss: CrossEntropy,
    losses: ViewMut,
    gradients: Option<(ViewMut, Option<ViewMut>)>,
) -> Result<()> {
    check_shape!(h, losses.rows(), w.cols());
    check_shape!(labels, losses.rows(), 1);
    check_shape!(losses, h.rows(), 1);
    check_dtype!(h.dtype(), w);
    check_dtype!(DType::F32, losses);
    match losses.device() {
        Device::Gpu(gpu) => launch(gpu, gpu_chunk(w.rows()), h, w, labels, loss, losses, gradients),
        Device::Cpu(_) => with_float!(h.dtype(), T => cpu::<T>(h, w, labels, loss, losses, gradients)),
    }
}

fn cpu<T: Float>(
    h: View,
    w: View,
    labels: View,
    loss: CrossEntropy,
    losses: ViewMut,
    mut gradients: Option<(ViewMut, Option<ViewMut>)>,
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
            if let Some(d_w) = d_w {
                gemm(d_logits.transposed(), h, MatrixMut::<f32>::from_view(d_w.reborrow()), true);
            }
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
    pub(super) fn logsumexp(logits: &[f32], scale: f32) -> f32 {
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

/// Rows in a chunk on a GPU: 256 MiB of f32 logits, but 512 rows at least, below which products do not fill it and reading
/// and writing `d_w` costs as much as they do.
fn gpu_chunk(vocabulary: usize) -> usize {
    const LOGITS: usize = 64 << 20;
    const ROWS_MIN: usize = 512;
    const MULTIPLE: usize = 128;
    (LOGITS / vocabulary / MULTIPLE * MULTIPLE).max(ROWS_MIN)
}

/// What the gradient by the logits, at most 1, is multiplied with where it is stored: fp16 has no room to spare below.
fn stored_scale(element: DType) -> f32 {
    if element == DType::F16 { 32_768.0 } else { 1.0 }
}

/// As on the CPU, with at most `chunk` rows at a time. The products' operands must have one type, so the gradient by the
/// logits is rounded to that of `h`, in the place of the logits; the products multiply it with its scales.
#[expect(clippy::too_many_arguments, reason = "the operation's, a device and a size")]
fn launch(
    gpu: &Gpu,
    chunk: usize,
    h: View,
    w: View,
    labels: View,
    loss: CrossEntropy,
    losses: ViewMut,
    mut gradients: Option<(ViewMut, Option<ViewMut>)>,
) -> Result<()> {
    assert!(labels.is_contiguous() && losses.view().is_contiguous(), "labels or losses with gaps");
    let (rows, vocabulary) = (h.rows(), w.rows());
    let mut logits = losses.device().empty(DType::F32, chunk.min(rows), vocabulary)?;
    for start in (0..rows).step_by(chunk) {
        let range = start..rows.min(start + chunk);
        let h = h.rows_range(range.clone());
        let mut logits = logits.view_mut().rows_range(0..range.len());
        let (b, c, alpha) = (w, logits.reborrow(), loss.scale);
        gpu.gemm(Product { a: h, a_transposed: false, b, b_transposed: true, c, alpha, accumulate: false })?;
        let element = h.dtype();
        let differentiate = gradients.is_some().then_some(loss.label_smoothing);
        let (labels, losses) = (labels.rows_range(range.clone()), losses.view().rows_range(range.clone()));
        launch_rows(gpu, element, logits.view(), labels, losses, differentiate)?;
        if let Some((d_h, d_w)) = &mut gradients {
            let a = logits.view().with_elements_of(element);
            let alpha = loss.scale * loss.gradient_scale / stored_scale(element);
            let c = d_h.reborrow().rows_range(range);
            gpu.gemm(Product { a, a_transposed: false, b, b_transposed: false, c, alpha, accumulate: false })?;
            if let Some(d_w) = d_w {
                let c = d_w.reborrow();
                gpu.gemm(Product { a, a_transposed: true, b: h, b_transposed: false, c, alpha, accumulate: true })?;
            }
        }
    }
    Ok(())
}

/// The losses of some rows; with `smoothing`, their logits become the gradient.
fn launch_rows(
    gpu: &Gpu,
    element: DType,
    logits: View,
    labels: View,
    losses: View,
    smoothing: Option<f32>,
) -> Result<()> {
    const THREADS_MAX: usize = 512;
    let vocabulary = logits.cols();
    let threads = vocabulary.div_ceil(16).next_multiple_of(32).min(THREADS_MAX);
    let function = if smoothing.is_some() { "cross_entropy_forward_backward" } else { "cross_entropy_forward" };
    let mut arguments = vec![logits.into(), labels.into(), losses.into(), vocabulary.into()];
    arguments.extend(smoothing.into_iter().flat_map(|smoothing| [smoothing, stored_scale(element)].map(Argument::F32)));
    arguments.push(has_whole_vectors(&[logits]).into());
    gpu.launch(Launch {
        module: Module { source: "cross_entropy", element, constants: &[] },
        function,
        grid: [logits.rows() as u32, 1, 1],
        block: threads as u32,
        shared_bytes: (threads / 32 * 8).next_multiple_of(16),
        arguments: &arguments,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_on_a_gpu_make_no_difference_but_to_the_order_of_d_w() {
        if crate::driver::emulated::is_missing() {
            return;
        }
        let device = Device::emulated(5).unwrap();
        let Device::Gpu(gpu) = &device else { panic!("not a GPU") };
        let (rows, width, vocabulary) = (13, 8, 40);
        let values = |count: usize| (0..count).map(|index| (index * 37 % 101) as f32 / 50.0 - 1.0).collect::<Vec<_>>();
        let upload = |rows: usize, cols: usize| device.upload(&values(rows * cols), rows, cols).unwrap();
        let (h, w) = (upload(rows, width), upload(vocabulary, width));
        let labels: Vec<u32> = (0..rows as u32).map(|row| if row == 4 { IGNORED_LABEL } else { row * 3 }).collect();
        let labels = device.upload(&labels, rows, 1).unwrap();
        let run = |chunk: usize| {
            let loss = CrossEntropy { scale: 0.5, label_smoothing: 0.1, gradient_scale: 3.0 };
            let (mut losses, mut d_h) = (upload(rows, 1), upload(rows, width));
            let mut d_w = device.zeros(DType::F32, vocabulary, width).unwrap();
            let gradients = Some((d_h.view_mut(), Some(d_w.view_mut())));
            launch(gpu, chunk, h.view(), w.view(), labels.view(), loss, losses.view_mut(), gradients).unwrap();
            [losses, d_h, d_w].map(|tensor| tensor.download::<f32>().unwrap())
        };
        let [losses, d_h, d_w] = run(100);
        for chunk in [1, 5, 12, 13] {
            let [same_losses, same_d_h, other_d_w] = run(chunk);
            assert_eq!((&same_losses, &same_d_h), (&losses, &d_h), "{chunk}");
            assert!(other_d_w.iter().zip(&d_w).all(|(a, b)| (a - b).abs() < 1e-5), "{chunk}");
        }
    }

    #[test]
    fn a_label_beyond_the_vocabulary_shows_on_a_gpu() {
        if crate::driver::emulated::is_missing() {
            return;
        }
        let device = Device::emulated(6).unwrap();
        let (h, w) = (device.upload(&[1.0_f32; 8], 2, 4).unwrap(), device.upload(&[1.0_f32; 12], 3, 4).unwrap());
        let labels = device.upload(&[2_u32, 3], 2, 1).unwrap();
        let mut losses = device.upload(&[0.0_f32; 2], 2, 1).unwrap();
        let loss = CrossEntropy { scale: 1.0, label_smoothing: 0.0, gradient_scale: 1.0 };
        cross_entropy_forward(h.view(), w.view(), labels.view(), loss, losses.view_mut()).unwrap();
        let losses = losses.download::<f32>().unwrap();
        assert!((losses[0] - 3.0_f32.ln()).abs() < 1e-6 && losses[1].is_nan(), "{losses:?}");
    }

    #[test]
    fn chunks_hold_at_most_256_mib_or_512_rows() {
        assert_eq!(gpu_chunk(32_128), 2048);
        assert_eq!(gpu_chunk(250_112), 512);
        assert_eq!(gpu_chunk(1 << 17), 512);
        assert_eq!((gpu_chunk(384) * 384) >> 20, 63);
    }
}
