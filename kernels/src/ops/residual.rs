//! Dropout, and the addition of a sub-layer's output to the residual stream.

use std::ops::Range;

use super::elementwise::Elementwise;
use super::{check_dtype, check_shape};
use crate::driver::Gpu;
use crate::float::{Float, with_float};
use crate::parallel::{SharedMut, for_each_task};
use crate::simd::multiversion;
use crate::{Device, Dropout, Result, View, ViewMut};

/// `y[N,D] = x[N,D] + dropout(delta[N,D])`; in f16, a sum beyond its range is ±64504, not infinite. Backward: the
/// gradient of `x` is that of `y`; the gradient of `delta` is
/// [`dropout`] of it with the same mask.
pub fn residual_forward(x: View, delta: View, mask: Dropout, y: ViewMut) -> Result<()> {
    check_shape!(x, y.rows(), y.cols());
    check_shape!(delta, y.rows(), y.cols());
    check_dtype!(x.dtype(), delta, y);
    match y.device() {
        Device::Cpu(_) => with_float!(x.dtype(), T => residual_cpu::<T>(x, delta, mask, y)),
        Device::Gpu(gpu) => launch(gpu, "residual_forward", &[x, delta, y.view()], mask)?,
    }
    Ok(())
}

fn residual_cpu<T: Float>(x: View, delta: View, mask: Dropout, y: ViewMut) {
    let ([x, delta], y) = as_one_row([x, delta], y);
    let y = SharedMut::<T>::new(y);
    for_each_span(x.rows(), x.cols(), |row, span| {
        let (x, delta) = (x.row::<T>(row), delta.row::<T>(row));
        mask.for_each_piece_of(row * y.cols(), span, |columns, factors| {
            // SAFETY: an element belongs to one task.
            let y = unsafe { y.row(row, columns.clone()) };
            add_scaled(&x[columns.clone()], &delta[columns], factors, y);
        });
    });
}

/// Tensors of one shape, of which none has gaps, as single rows: many short ones would cost more than their elements.
fn as_one_row<'a, 'b, const N: usize>(x: [View<'a>; N], y: ViewMut<'b>) -> ([View<'a>; N], ViewMut<'b>) {
    let elements = y.rows() * y.cols();
    if !y.view().is_contiguous() || !x.iter().all(View::is_contiguous) {
        return (x, y);
    }
    (x.map(|x| x.reshape(0, 1, elements)), y.reshape(0, 1, elements))
}

/// Runs `task(row, columns)` for all elements of a tensor, in parallel if it is worth it.
fn for_each_span(rows: usize, cols: usize, task: impl Fn(usize, Range<usize>) + Sync + Send) {
    const SPAN: usize = 16_384;
    let spans = cols.div_ceil(SPAN);
    for_each_task(rows * spans, rows * cols.div_ceil(2), |index| {
        let start = index % spans * SPAN;
        task(index / spans, start..cols.min(start + SPAN));
    });
}

multiversion! {
    fn add_scaled<T: Float>(x: &[T], delta: &[T], factors: &[f32], y: &mut [T]) {
        for (((y, x), delta), factor) in y.iter_mut().zip(x).zip(delta).zip(factors) {
            *y = T::from_f32_saturating(x.to_f32() + delta.to_f32() * factor);
        }
    }
}

/// `y[N,D] = dropout(x[N,D])`; its own backward pass. With [`Dropout::NONE`] a copy.
pub fn dropout(x: View, mask: Dropout, y: ViewMut) -> Result<()> {
    check_shape!(x, y.rows(), y.cols());
    check_dtype!(x.dtype(), y);
    match y.device() {
        Device::Cpu(_) => with_float!(x.dtype(), T => dropout_cpu::<T>(x, mask, y)),
        Device::Gpu(gpu) => launch(gpu, "dropout", &[x, y.view()], mask)?,
    }
    Ok(())
}

fn dropout_cpu<T: Float>(x: View, mask: Dropout, y: ViewMut) {
    let ([x], y) = as_one_row([x], y);
    let y = SharedMut::<T>::new(y);
    for_each_span(x.rows(), x.cols(), |row, span| {
        let x = x.row::<T>(row);
        mask.for_each_piece_of(row * y.cols(), span, |columns, factors| {
            // SAFETY: an element belongs to one task.
            scale(&x[columns.clone()], factors, unsafe { y.row(row, columns) });
        });
    });
}

/// All views are `[N,D]`.
fn launch(gpu: &Gpu, function: &'static str, views: &[View], mask: Dropout) -> Result<()> {
    let (element, cols) = (views[0].dtype(), views[0].cols());
    let source = "residual";
    Elementwise { source, function, element, constants: &[], first: &[], views, cols, mask: Some(mask) }.launch(gpu)
}

multiversion! {
    /// `y = x · factors`
    pub(super) fn scale<T: Float>(x: &[T], factors: &[f32], y: &mut [T]) {
        for ((y, x), factor) in y.iter_mut().zip(x).zip(factors) {
            *y = T::from_f32(x.to_f32() * factor);
        }
    }
}
