//! Dropout, and the addition of a sub-layer's output to the residual stream.

use super::elementwise::Elementwise;
use super::{check_dtype, check_shape};
use crate::driver::Gpu;
use crate::float::{Float, with_float};
use crate::parallel::{SharedMut, for_each_row_block, rows_per_task};
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
    let y = SharedMut::<T>::new(y);
    for_each_row_block(x.rows(), rows_per_task(x.cols()), x.cols().div_ceil(2), |_, rows| {
        for row in rows {
            let (x, delta) = (x.row::<T>(row), delta.row::<T>(row));
            mask.for_each_piece(row, y.cols(), |columns, factors| {
                // SAFETY: a row belongs to one task.
                let y = unsafe { y.row(row, columns.clone()) };
                add_scaled(&x[columns.clone()], &delta[columns], factors, y);
            });
        }
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
    let y = SharedMut::<T>::new(y);
    for_each_row_block(x.rows(), rows_per_task(x.cols()), x.cols().div_ceil(2), |_, rows| {
        for row in rows {
            let x = x.row::<T>(row);
            mask.for_each_piece(row, y.cols(), |columns, factors| {
                // SAFETY: a row belongs to one task.
                scale(&x[columns.clone()], factors, unsafe { y.row(row, columns) });
            });
        }
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
