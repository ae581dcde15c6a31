//! Linear layers without bias: `y = x · wᵀ`.

use super::{check_dtype, check_shape};
use crate::driver::Product;
use crate::float::{Float, with_float};
use crate::gemm::{Matrix, MatrixMut, Prepared, gemm, gemm_prepared};
use crate::{DType, Device, Result, View, ViewMut};

/// `y[N,O] = x[N,I] · w[O,I]ᵀ`, plus the old `y` if `accumulate`. `y` may be f32 where `x` and `w` are bf16.
pub fn linear_forward(x: View, w: View, y: ViewMut, accumulate: bool) -> Result<()> {
    check_shape!(x, y.rows(), w.cols());
    check_shape!(y, x.rows(), w.rows());
    check_dtype!(x.dtype(), w);
    match y.device() {
        Device::Gpu(gpu) => {
            gpu.gemm(Product { a: x, a_transposed: false, b: w, b_transposed: true, c: y, alpha: 1.0, accumulate })?
        }
        Device::Cpu(_) => with_float!(x.dtype(), T => with_float!(y.dtype(), Y => {
            let (x, w) = (Matrix::<T>::from_view(x), Matrix::<T>::from_view(w).transposed());
            gemm(x, w, MatrixMut::<Y>::from_view(y), accumulate);
        })),
    }
    Ok(())
}

/// A weight `[O,I]` that many products will take: on the CPU a copy in the order in which they read it, in f32.
pub struct PreparedWeight(Prepared);

impl PreparedWeight {
    /// Nothing where products are no faster for it: on GPUs.
    pub fn new(w: View) -> Option<Self> {
        match w.device() {
            Device::Gpu(_) => None,
            Device::Cpu(_) => Some(with_float!(w.dtype(), T => {
                PreparedWeight(Prepared::new(Matrix::<T>::from_view(w).transposed()))
            })),
        }
    }
}

/// As [`linear_forward`], with the same bits.
pub fn linear_forward_prepared(x: View, w: &PreparedWeight, y: ViewMut) -> Result<()> {
    check_shape!(x, y.rows(), w.0.depth());
    check_shape!(y, x.rows(), w.0.cols());
    with_float!(x.dtype(), T => with_float!(y.dtype(), Y => {
        gemm_prepared(Matrix::<T>::from_view(x), &w.0, MatrixMut::<Y>::from_view(y));
    }));
    Ok(())
}

/// `y[N,O] = factor · x[N,I] · w[O,I]ᵀ`, for small O: on the CPU the factor is a pass over `y`.
pub fn linear_forward_scaled(x: View, w: View, factor: f32, mut y: ViewMut) -> Result<()> {
    match y.device() {
        Device::Gpu(gpu) => {
            check_shape!(x, y.rows(), w.cols());
            check_shape!(y, x.rows(), w.rows());
            check_dtype!(x.dtype(), w);
            let (alpha, accumulate) = (factor, false);
            gpu.gemm(Product { a: x, a_transposed: false, b: w, b_transposed: true, c: y, alpha, accumulate })
        }
        Device::Cpu(_) => {
            linear_forward(x, w, y.reborrow(), false)?;
            scale_cpu(y, factor);
            Ok(())
        }
    }
}

fn scale_cpu(y: ViewMut, factor: f32) {
    with_float!(y.dtype(), T => {
        for value in y.into_slice::<T>() {
            *value = T::from_f32(value.to_f32() * factor);
        }
    });
}

/// `d_x[N,I] = d_y[N,O] · w[O,I]`, plus the old `d_x` if `accumulate`.
pub fn linear_backward_input(d_y: View, w: View, d_x: ViewMut, accumulate: bool) -> Result<()> {
    check_shape!(d_y, d_x.rows(), w.rows());
    check_shape!(d_x, d_y.rows(), w.cols());
    check_dtype!(d_y.dtype(), w);
    match d_x.device() {
        Device::Gpu(gpu) => gpu.gemm(Product {
            a: d_y,
            a_transposed: false,
            b: w,
            b_transposed: false,
            c: d_x,
            alpha: 1.0,
            accumulate,
        })?,
        Device::Cpu(_) => with_float!(d_y.dtype(), T => with_float!(d_x.dtype(), X => {
            let (d_y, w) = (Matrix::<T>::from_view(d_y), Matrix::<T>::from_view(w));
            gemm(d_y, w, MatrixMut::<X>::from_view(d_x), accumulate);
        })),
    }
    Ok(())
}

/// `d_x[N,I] = factor · d_y[N,O] · w[O,I]`, for small I: on the CPU the factor is a pass over `d_x`.
pub fn linear_backward_input_scaled(d_y: View, w: View, factor: f32, mut d_x: ViewMut) -> Result<()> {
    match d_x.device() {
        Device::Gpu(gpu) => {
            check_shape!(d_y, d_x.rows(), w.rows());
            check_shape!(d_x, d_y.rows(), w.cols());
            check_dtype!(d_y.dtype(), w);
            let (alpha, accumulate) = (factor, false);
            gpu.gemm(Product { a: d_y, a_transposed: false, b: w, b_transposed: false, c: d_x, alpha, accumulate })
        }
        Device::Cpu(_) => {
            linear_backward_input(d_y, w, d_x.reborrow(), false)?;
            scale_cpu(d_x, factor);
            Ok(())
        }
    }
}

/// `d_w[O,I] += d_y[N,O]ᵀ · x[N,I]`; `d_w` is f32.
pub fn linear_backward_weight(d_y: View, x: View, d_w: ViewMut) -> Result<()> {
    check_shape!(d_y, x.rows(), d_w.rows());
    check_shape!(x, d_y.rows(), d_w.cols());
    check_dtype!(d_y.dtype(), x);
    check_dtype!(DType::F32, d_w);
    match d_w.device() {
        Device::Gpu(gpu) => gpu.gemm(Product {
            a: d_y,
            a_transposed: true,
            b: x,
            b_transposed: false,
            c: d_w,
            alpha: 1.0,
            accumulate: true,
        })?,
        Device::Cpu(_) => with_float!(x.dtype(), T => {
            let (d_y, x) = (Matrix::<T>::from_view(d_y).transposed(), Matrix::<T>::from_view(x));
            gemm(d_y, x, MatrixMut::<f32>::from_view(d_w), true);
        }),
    }
    Ok(())
}
