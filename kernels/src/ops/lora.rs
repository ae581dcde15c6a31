//! Low-rank additions to linear layers (LoRA, Hu et al. 2021): `y += scale · dropout(x) · aᵀ · bᵀ`, as PEFT has them.
//!
//! Backward, with `low = scale · dropout(x) · aᵀ` and `d_low = scale · d_y · b`:
//! `d_a += d_lowᵀ · dropout(x)`, `d_b += d_yᵀ · low`, `d_x += dropout(d_low · a)`.
//!
//! On GPUs these are products and dropouts one after the other. On the CPU some rows at a time go through all of it while
//! they are in a core's cache: each product alone, of so few columns, would be over before it is handed out to threads.
//!
//! Legend: N rows, I inputs, O outputs, R rank.

use std::ops::Range;

use super::{cast, check_dtype, check_shape, dropout, linear_backward_input, linear_backward_weight, residual_forward};
use super::{linear_backward_input_scaled, linear_forward, linear_forward_scaled};
use crate::float::{Float, with_float};
use crate::gemm::{Matrix, MatrixMut, gemm, gemm_serial};
use crate::parallel::{Scratch, SharedMut, for_each_row_block, with_scratch};
use crate::simd::multiversion;
use crate::{DType, Device, Dropout, Result, Tensor, View, ViewMut};

/// An adapter of a linear layer, and the layer's input.
#[derive(Clone, Copy)]
pub struct Lora<'a> {
    /// `[N,I]`
    pub x: View<'a>,
    /// `[R,I]`, of the type of `x`.
    pub a: View<'a>,
    /// `[O,R]`, likewise.
    pub b: View<'a>,
    pub scale: f32,
    pub mask: Dropout,
}

/// Where the gradients accumulate.
pub struct LoraGradients<'a> {
    /// `[R,I]`, f32.
    pub d_a: ViewMut<'a>,
    /// `[O,R]`, f32.
    pub d_b: ViewMut<'a>,
    /// `[N,I]`, of the type of `x`.
    pub d_x: ViewMut<'a>,
}

/// Rows that go through an adapter together: whole tiles of a matrix product, few enough that it reads the other operand
/// where that is.
const BLOCK: usize = 96;

thread_local! {
    static FACTORS: Scratch = Scratch::default();
    static DROPPED: Scratch = Scratch::default();
    static LOW: Scratch = Scratch::default();
}

impl Lora<'_> {
    fn check(&self, outputs: usize) {
        let Lora { x, a, b, .. } = *self;
        check_shape!(a, b.cols(), x.cols());
        check_shape!(b, outputs, a.rows());
        check_dtype!(x.dtype(), a, b);
    }

    /// About the nanoseconds that a row takes for `products` products and as many dropouts.
    fn row_work(&self, products: usize) -> usize {
        products * (self.a.rows() * (self.x.cols() + self.b.rows()) / 100 + self.x.cols() / 2)
    }

    /// Calls `f` with the factors of the elements of some rows; with none where nothing is dropped.
    fn with_factors<R>(&self, rows: &Range<usize>, f: impl FnOnce(&[f32]) -> R) -> R {
        if self.mask.is_none() {
            return f(&[]);
        }
        let cols = self.x.cols();
        with_scratch(&FACTORS, rows.len() * cols, |factors| {
            self.mask.factors((rows.start * cols) as u64, factors);
            f(factors)
        })
    }
}

/// `y[N,O] += scale · dropout(x) · aᵀ · bᵀ`; `y` may be f32 where `x` is not.
pub fn lora_forward(lora: Lora, mut y: ViewMut) -> Result<()> {
    let Lora { x, a, b, scale, mask } = lora;
    lora.check(y.cols());
    check_shape!(x, y.rows(), a.cols());
    if let Device::Cpu(_) = y.device() {
        return with_float!(x.dtype(), T => with_float!(y.dtype(), Y => forward_cpu::<T, Y>(lora, y)));
    }
    let dropped = dropped(x, mask)?;
    let mut low = x.device().empty(x.dtype(), x.rows(), a.rows())?;
    linear_forward_scaled(dropped.as_ref().map_or(x, Tensor::view), a, scale, low.view_mut())?;
    linear_forward(low.view(), b, y.reborrow(), true)
}

/// `dropout(x)`, or nothing where it is `x` itself.
fn dropped(x: View, mask: Dropout) -> Result<Option<Tensor>> {
    if mask.is_none() {
        return Ok(None);
    }
    let mut dropped = x.device().empty(x.dtype(), x.rows(), x.cols())?;
    dropout(x, mask, dropped.view_mut())?;
    Ok(Some(dropped))
}

fn forward_cpu<T: Float, Y: Float>(lora: Lora, y: ViewMut) -> Result<()> {
    let (inputs, rank, outputs) = (lora.a.cols(), lora.a.rows(), y.cols());
    let (a, b) = (transposed::<T>(lora.a, lora.scale)?, transposed::<T>(lora.b, 1.0)?);
    let (a, b) = (Matrix::<f32>::from_view(a.view()), Matrix::<f32>::from_view(b.view()));
    let y = SharedMut::<Y>::new(y);
    for_each_row_block(lora.x.rows(), BLOCK, lora.row_work(1), |_, rows| {
        with_scratch(&LOW, rows.len() * rank, |low| {
            lora.with_factors(&rows, |factors| {
                with_scratch(&DROPPED, rows.len() * inputs, |dropped| {
                    low_rows::<T>(lora.x, a, &rows, factors, dropped, low);
                });
            });
            let low = Matrix::<f32>::from_slice(low, rows.len(), rank, rank);
            // SAFETY: rows of `y`, which belong to one task.
            let y = unsafe { MatrixMut::from_raw(y.address(rows.start, 0), rows.len(), outputs, y.stride()) };
            gemm_serial(low, b, y, true);
        });
    });
    Ok(())
}

/// `factor · matrixᵀ` in f32.
fn transposed<T: Float>(matrix: View, factor: f32) -> Result<Tensor> {
    let (rows, cols) = (matrix.rows(), matrix.cols());
    let mut transposed = matrix.device().empty(DType::F32, cols, rows)?;
    let elements = transposed.view_mut().into_slice::<f32>();
    for row in 0..rows {
        for (column, value) in matrix.row::<T>(row).iter().enumerate() {
            elements[column * rows + row] = value.to_f32() * factor;
        }
    }
    Ok(transposed)
}

/// Some rows of `low = dropout(x) · a`; and of `dropped = dropout(x)` where there are factors.
fn low_rows<T: Float>(
    x: View,
    a: Matrix<f32>,
    rows: &Range<usize>,
    factors: &[f32],
    dropped: &mut [f32],
    low: &mut [f32],
) {
    let (cols, rank) = (x.cols(), low.len() / rows.len());
    let low = MatrixMut::from_slice(low, rows.len(), rank, rank);
    if factors.is_empty() {
        return gemm_serial(Matrix::<T>::from_view(x.rows_range(rows.clone())), a, low, false);
    }
    let lines = dropped.chunks_exact_mut(cols).zip(factors.chunks_exact(cols));
    for (row, (dropped, factors)) in rows.clone().zip(lines) {
        multiply(x.row::<T>(row), factors, dropped);
    }
    gemm_serial(Matrix::<f32>::from_slice(dropped, rows.len(), cols, cols), a, low, false);
}

multiversion! {
    fn multiply<T: Float>(x: &[T], factors: &[f32], y: &mut [f32]) {
        for ((y, x), factor) in y.iter_mut().zip(x).zip(factors) {
            *y = x.to_f32() * factor;
        }
    }
}

/// Reverses [`lora_forward`], from `d_y[N,O]`.
pub fn lora_backward(lora: Lora, d_y: View, gradients: LoraGradients) -> Result<()> {
    let Lora { x, a, b, scale, mask } = lora;
    let LoraGradients { d_a, d_b, mut d_x } = gradients;
    lora.check(d_y.cols());
    check_shape!(d_y, x.rows(), b.rows());
    check_shape!(d_a, a.rows(), a.cols());
    check_shape!(d_b, b.rows(), b.cols());
    check_shape!(d_x, x.rows(), x.cols());
    check_dtype!(x.dtype(), d_y, d_x);
    check_dtype!(DType::F32, d_a, d_b);
    if let Device::Cpu(_) = d_x.device() {
        let gradients = LoraGradients { d_a, d_b, d_x };
        return with_float!(x.dtype(), T => backward_cpu::<T>(lora, d_y, gradients));
    }
    let (device, dtype, rows) = (x.device(), x.dtype(), x.rows());
    let dropped = dropped(x, mask)?;
    let dropped = dropped.as_ref().map_or(x, Tensor::view);
    let (mut low, mut d_low) = (device.empty(dtype, rows, a.rows())?, device.empty(dtype, rows, a.rows())?);
    linear_forward_scaled(dropped, a, scale, low.view_mut())?;
    linear_backward_weight(d_y, low.view(), d_b)?;
    linear_backward_input_scaled(d_y, b, scale, d_low.view_mut())?;
    linear_backward_weight(d_low.view(), dropped, d_a)?;
    lora_backward_input(d_low.view(), a, mask, d_x.reborrow())
}

/// `d_x[N,I] += dropout(d_low[N,R] · a[R,I])`
pub fn lora_backward_input(d_low: View, a: View, mask: Dropout, mut d_x: ViewMut) -> Result<()> {
    if mask.is_none() {
        return linear_backward_input(d_low, a, d_x, true);
    }
    let (device, rows, cols) = (d_x.device(), d_x.rows(), d_x.cols());
    // Sums of f16 would saturate, and hide that the loss scale is too large.
    let dtype = if d_x.dtype() == DType::F16 { DType::F32 } else { d_x.dtype() };
    let (mut delta, mut sum) = (device.empty(dtype, rows, cols)?, device.empty(dtype, rows, cols)?);
    linear_backward_input(d_low, a, delta.view_mut(), false)?;
    if dtype == d_x.dtype() {
        residual_forward(d_x.view(), delta.view(), mask, sum.view_mut())?;
    } else {
        let mut before = device.empty(dtype, rows, cols)?;
        cast(d_x.view(), before.view_mut())?;
        residual_forward(before.view(), delta.view(), mask, sum.view_mut())?;
    }
    cast(sum.view(), d_x.reborrow())
}

fn backward_cpu<T: Float>(lora: Lora, d_y: View, gradients: LoraGradients) -> Result<()> {
    let Lora { x, a, b, scale, mask } = lora;
    let LoraGradients { d_a, d_b, d_x } = gradients;
    let (inputs, rank) = (a.cols(), a.rows());
    let empty = |cols: usize| x.device().empty(DType::F32, x.rows(), cols);
    let (mut low, mut d_low) = (empty(rank)?, empty(rank)?);
    let mut dropped = if mask.is_none() { None } else { Some(empty(inputs)?) };
    {
        let a_transposed = transposed::<T>(a, scale)?;
        let a_transposed = Matrix::<f32>::from_view(a_transposed.view());
        let [a, b] = [a, b].map(Matrix::<T>::from_view);
        let [low, d_low] = [&mut low, &mut d_low].map(|tensor| SharedMut::<f32>::new(tensor.view_mut()));
        let dropped = dropped.as_mut().map(|tensor| SharedMut::<f32>::new(tensor.view_mut()));
        let d_x = SharedMut::<T>::new(d_x);
        for_each_row_block(x.rows(), BLOCK, lora.row_work(2), |_, rows| {
            // SAFETY: rows belong to one task.
            let (low, d_low) = unsafe { (lines(&low, &rows), lines(&d_low, &rows)) };
            // SAFETY: likewise.
            let dropped = dropped.as_ref().map_or(&mut [][..], |dropped| unsafe { lines(dropped, &rows) });
            lora.with_factors(&rows, |factors| {
                low_rows::<T>(x, a_transposed, &rows, factors, dropped, low);
                let d_y = Matrix::<T>::from_view(d_y.rows_range(rows.clone()));
                gemm_serial(d_y, b, MatrixMut::from_slice(d_low, rows.len(), rank, rank), false);
                d_low.iter_mut().for_each(|value| *value *= scale);
                let d_low = Matrix::<f32>::from_slice(d_low, rows.len(), rank, rank);
                if factors.is_empty() {
                    // SAFETY: likewise.
                    let d_x =
                        unsafe { MatrixMut::from_raw(d_x.address(rows.start, 0), rows.len(), inputs, d_x.stride()) };
                    return gemm_serial(d_low, a, d_x, true);
                }
                with_scratch(&DROPPED, rows.len() * inputs, |delta| {
                    gemm_serial(d_low, a, MatrixMut::from_slice(delta, rows.len(), inputs, inputs), false);
                    let lines = delta.chunks_exact(inputs).zip(factors.chunks_exact(inputs));
                    for (row, (delta, factors)) in rows.clone().zip(lines) {
                        // SAFETY: likewise.
                        add_multiple(delta, factors, unsafe { d_x.row(row, 0..inputs) });
                    }
                });
            });
        });
    }
    let [low, d_low] = [&low, &d_low].map(|tensor| Matrix::<f32>::from_view(tensor.view()));
    let (d_a, d_b) = (MatrixMut::<f32>::from_view(d_a), MatrixMut::<f32>::from_view(d_b));
    match &dropped {
        Some(dropped) => gemm(d_low.transposed(), Matrix::<f32>::from_view(dropped.view()), d_a, true),
        None => gemm(d_low.transposed(), Matrix::<T>::from_view(x), d_a, true),
    }
    gemm(Matrix::<T>::from_view(d_y).transposed(), low, d_b, true);
    Ok(())
}

/// Some rows of a tensor without gaps.
///
/// # Safety
/// Nobody else may have them while the slice lives.
#[allow(clippy::mut_from_ref)]
unsafe fn lines<'t>(tensor: &'t SharedMut<f32>, rows: &Range<usize>) -> &'t mut [f32] {
    assert!(tensor.stride() == tensor.cols() && !rows.is_empty());
    let (first, _last) = (tensor.address(rows.start, 0), tensor.address(rows.end - 1, 0));
    // SAFETY: from the first row to the last, which `address` found in the tensor; the caller keeps others away.
    unsafe { std::slice::from_raw_parts_mut(first, rows.len() * tensor.cols()) }
}

multiversion! {
    fn add_multiple<T: Float>(delta: &[f32], factors: &[f32], d_x: &mut [T]) {
        for ((d_x, delta), factor) in d_x.iter_mut().zip(delta).zip(factors) {
            *d_x = T::from_f32(d_x.to_f32() + delta * factor);
        }
    }
}
