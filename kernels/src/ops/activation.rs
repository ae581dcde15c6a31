//! The non-linearities of the feed-forward layers, with the dropout that follows them.
//!
//! `gelu_tanh(x) = x/2 · (1 + tanh u)` with `u = √(2/π) · (x + 0.044715 x³)`. As `(1 + tanh u)/2 = σ(2u)`, this is
//! `x · s` with `s = 1/(1 + e^-2u)`, and its derivative is `s + x · s · (1 − s) · 2u'`.

use std::f32::consts::{FRAC_2_SQRT_PI, SQRT_2};

use super::elementwise::Elementwise;
use super::{check_dtype, check_shape};
use crate::driver::Gpu;
use crate::float::{Float, with_float};
use crate::parallel::{SharedMut, for_each_row_block, rows_per_task};
use crate::simd::{exp, multiversion};
use crate::{Device, Dropout, Result, View, ViewMut};

/// `h[N,F] = dropout(relu(x[N,F]))`.
pub fn relu_forward(x: View, mask: Dropout, h: ViewMut) -> Result<()> {
    check_shape!(x, h.rows(), h.cols());
    check_dtype!(x.dtype(), h);
    match h.device() {
        Device::Gpu(gpu) => launch(gpu, "relu_forward", &[x, h.view()], h.cols(), mask)?,
        Device::Cpu(_) => with_float!(x.dtype(), T => relu_forward_cpu::<T>(x, mask, h)),
    }
    Ok(())
}

fn relu_forward_cpu<T: Float>(x: View, mask: Dropout, h: ViewMut) {
    let h = SharedMut::<T>::new(h);
    for_each_row_block(x.rows(), rows_per_task(x.cols()), x.cols().div_ceil(2), |_, rows| {
        for row in rows {
            let x = x.row::<T>(row);
            mask.for_each_piece(row, h.cols(), |columns, factors| {
                // SAFETY: a row belongs to one task.
                relu_piece(&x[columns.clone()], factors, unsafe { h.row(row, columns) });
            });
        }
    });
}

multiversion! {
    // Not `max`, which would make 0 of NaN.
    fn relu_piece<T: Float>(x: &[T], factors: &[f32], h: &mut [T]) {
        for ((h, x), factor) in h.iter_mut().zip(x).zip(factors) {
            let x = x.to_f32();
            *h = T::from_f32(if x < 0.0 { 0.0 } else { x } * factor);
        }
    }
}

/// `d_x[N,F]` from `d_h[N,F]` and the input `x[N,F]`.
pub fn relu_backward(x: View, d_h: View, mask: Dropout, d_x: ViewMut) -> Result<()> {
    check_shape!(x, d_x.rows(), d_x.cols());
    check_shape!(d_h, d_x.rows(), d_x.cols());
    check_dtype!(x.dtype(), d_h, d_x);
    match d_x.device() {
        Device::Gpu(gpu) => launch(gpu, "relu_backward", &[x, d_h, d_x.view()], d_h.cols(), mask)?,
        Device::Cpu(_) => with_float!(x.dtype(), T => relu_backward_cpu::<T>(x, d_h, mask, d_x)),
    }
    Ok(())
}

fn relu_backward_cpu<T: Float>(x: View, d_h: View, mask: Dropout, d_x: ViewMut) {
    let d_x = SharedMut::<T>::new(d_x);
    for_each_row_block(x.rows(), rows_per_task(x.cols()), x.cols().div_ceil(2), |_, rows| {
        for row in rows {
            let (x, d_h) = (x.row::<T>(row), d_h.row::<T>(row));
            mask.for_each_piece(row, x.len(), |columns, factors| {
                // SAFETY: a row belongs to one task.
                let d_x = unsafe { d_x.row(row, columns.clone()) };
                relu_backward_piece(&x[columns.clone()], &d_h[columns], factors, d_x);
            });
        }
    });
}

multiversion! {
    fn relu_backward_piece<T: Float>(x: &[T], d_h: &[T], factors: &[f32], d_x: &mut [T]) {
        for (((d_x, x), d_h), factor) in d_x.iter_mut().zip(x).zip(d_h).zip(factors) {
            let gradient = d_h.to_f32() * factor;
            *d_x = T::from_f32(if x.to_f32() > 0.0 { gradient } else { 0.0 });
        }
    }
}

/// `y[N,F] = tanh(x[N,F])`.
pub fn tanh_forward(x: View, y: ViewMut) -> Result<()> {
    check_shape!(x, y.rows(), y.cols());
    check_dtype!(x.dtype(), y);
    match y.device() {
        Device::Gpu(gpu) => launch(gpu, "tanh_forward", &[x, y.view()], y.cols(), Dropout::NONE)?,
        Device::Cpu(_) => with_float!(x.dtype(), T => {
            let y = SharedMut::<T>::new(y);
            for_each_row_block(x.rows(), rows_per_task(x.cols()), x.cols(), |_, rows| {
                for row in rows {
                    // SAFETY: a row belongs to one task.
                    let y = unsafe { y.row(row, 0..x.cols()) };
                    for (y, x) in y.iter_mut().zip(x.row::<T>(row)) {
                        *y = T::from_f32(x.to_f32().tanh());
                    }
                }
            });
        }),
    }
    Ok(())
}

/// `d_x[N,F] = d_y[N,F] · (1 − y²)`, from the output `y[N,F]`.
pub fn tanh_backward(y: View, d_y: View, d_x: ViewMut) -> Result<()> {
    check_shape!(y, d_x.rows(), d_x.cols());
    check_shape!(d_y, d_x.rows(), d_x.cols());
    check_dtype!(y.dtype(), d_y, d_x);
    match d_x.device() {
        Device::Gpu(gpu) => launch(gpu, "tanh_backward", &[y, d_y, d_x.view()], y.cols(), Dropout::NONE)?,
        Device::Cpu(_) => with_float!(y.dtype(), T => {
            let d_x = SharedMut::<T>::new(d_x);
            for_each_row_block(y.rows(), rows_per_task(y.cols()), y.cols(), |_, rows| {
                for row in rows {
                    // SAFETY: a row belongs to one task.
                    let d_x = unsafe { d_x.row(row, 0..y.cols()) };
                    for ((d_x, y), d_y) in d_x.iter_mut().zip(y.row::<T>(row)).zip(d_y.row::<T>(row)) {
                        *d_x = T::from_f32(d_y.to_f32() * (1.0 - y.to_f32() * y.to_f32()));
                    }
                }
            });
        }),
    }
    Ok(())
}

/// `h[N,F] = dropout(gelu_tanh(x[:, ..F]) · x[:, F..])` for `x[N,2F]`, the outputs of `wi_0` and `wi_1` side by side.
pub fn gated_gelu_forward(x: View, mask: Dropout, h: ViewMut) -> Result<()> {
    check_shape!(x, h.rows(), 2 * h.cols());
    check_dtype!(x.dtype(), h);
    match h.device() {
        Device::Gpu(gpu) => launch(gpu, "gated_gelu_forward", &[x, h.view()], h.cols(), mask)?,
        Device::Cpu(_) => with_float!(x.dtype(), T => gated_gelu_forward_cpu::<T>(x, mask, h)),
    }
    Ok(())
}

fn gated_gelu_forward_cpu<T: Float>(x: View, mask: Dropout, h: ViewMut) {
    let h = SharedMut::<T>::new(h);
    for_each_row_block(x.rows(), rows_per_task(x.cols()), x.cols(), |_, rows| {
        for row in rows {
            let (gate, up) = x.row::<T>(row).split_at(h.cols());
            mask.for_each_piece(row, h.cols(), |columns, factors| {
                // SAFETY: a row belongs to one task.
                let h = unsafe { h.row(row, columns.clone()) };
                gated_gelu_piece(&gate[columns.clone()], &up[columns], factors, h);
            });
        }
    });
}

multiversion! {
    fn gated_gelu_piece<T: Float>(gate: &[T], up: &[T], factors: &[f32], h: &mut [T]) {
        for (((h, gate), up), factor) in h.iter_mut().zip(gate).zip(up).zip(factors) {
            let (gelu, _) = gelu_tanh(gate.to_f32());
            *h = T::from_f32(gelu * up.to_f32() * factor);
        }
    }
}

/// `d_x[N,2F]` from `d_h[N,F]` and the input `x[N,2F]`.
pub fn gated_gelu_backward(x: View, d_h: View, mask: Dropout, d_x: ViewMut) -> Result<()> {
    check_shape!(x, d_x.rows(), d_x.cols());
    check_shape!(d_x, d_h.rows(), 2 * d_h.cols());
    check_dtype!(x.dtype(), d_h, d_x);
    match d_x.device() {
        Device::Gpu(gpu) => launch(gpu, "gated_gelu_backward", &[x, d_h, d_x.view()], d_h.cols(), mask)?,
        Device::Cpu(_) => with_float!(x.dtype(), T => gated_gelu_backward_cpu::<T>(x, d_h, mask, d_x)),
    }
    Ok(())
}

fn gated_gelu_backward_cpu<T: Float>(x: View, d_h: View, mask: Dropout, d_x: ViewMut) {
    let width = d_h.cols();
    let d_x = SharedMut::<T>::new(d_x);
    for_each_row_block(x.rows(), rows_per_task(x.cols()), x.cols(), |_, rows| {
        for row in rows {
            let (gate, up) = x.row::<T>(row).split_at(width);
            let d_h = d_h.row::<T>(row);
            mask.for_each_piece(row, width, |columns, factors| {
                let (left, right) = (columns.clone(), columns.start + width..columns.end + width);
                // SAFETY: a row belongs to one task, and its halves do not overlap.
                let (d_gate, d_up) = unsafe { (d_x.row(row, left), d_x.row(row, right)) };
                let (gate, up) = (&gate[columns.clone()], &up[columns.clone()]);
                gated_gelu_backward_piece(gate, up, &d_h[columns], factors, d_gate, d_up);
            });
        }
    });
}

multiversion! {
    fn gated_gelu_backward_piece<T: Float>(
        gate: &[T],
        up: &[T],
        d_h: &[T],
        factors: &[f32],
        d_gate: &mut [T],
        d_up: &mut [T],
    ) {
        let inputs = gate.iter().zip(up).zip(d_h).zip(factors);
        for ((d_gate, d_up), (((gate, up), d_h), factor)) in d_gate.iter_mut().zip(d_up).zip(inputs) {
            let (gelu, slope) = gelu_tanh(gate.to_f32());
            let gradient = d_h.to_f32() * factor;
            *d_gate = T::from_f32(gradient * up.to_f32() * slope);
            *d_up = T::from_f32(gradient * gelu);
        }
    }
}

/// `gelu_tanh(x)` and its derivative.
#[inline(always)]
fn gelu_tanh(x: f32) -> (f32, f32) {
    const SCALE: f32 = FRAC_2_SQRT_PI * SQRT_2; // 2 · √(2/π)
    const CUBIC: f32 = 0.044_715;
    let square = x * x;
    let twice_u = SCALE * x * (1.0 + CUBIC * square);
    let twice_u_slope = SCALE * (1.0 + 3.0 * CUBIC * square);
    let e = exp(-twice_u); // finite, so that nothing below is ∞/∞
    let s = 1.0 / (1.0 + e);
    // 1 − s without cancellation. Where e is huge, s · (1 − s) is nothing whatever x is.
    let rest = e * s;
    (x * s, s + x * s * rest * twice_u_slope)
}

/// `cols` is F.
fn launch(gpu: &Gpu, function: &'static str, views: &[View], cols: usize, mask: Dropout) -> Result<()> {
    let (source, element) = ("activation", views[0].dtype());
    Elementwise { source, function, element, constants: &[], first: &[], views, cols, mask: Some(mask) }.launch(gpu)
}
