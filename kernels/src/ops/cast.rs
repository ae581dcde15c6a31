//! Copies between element types.

use super::check_shape;
use super::elementwise::Elementwise;
use crate::driver::Gpu;
use crate::float::{Float, with_float};
use crate::parallel::{SharedMut, for_each_row_block, rows_per_task};
use crate::simd::convert;
use crate::{DType, Device, Result, View, ViewMut};

/// `y = x`, rounded to nearest even where `y` is narrower.
pub fn cast(x: View, y: ViewMut) -> Result<()> {
    check_shape!(x, y.rows(), y.cols());
    match y.device() {
        Device::Gpu(gpu) if x.dtype() == y.dtype() && x.is_contiguous() && y.view().is_contiguous() => {
            gpu.copy(x, y)?
        }
        Device::Gpu(gpu) => launch(gpu, x, y)?,
        Device::Cpu(_) => with_float!(x.dtype(), X => with_float!(y.dtype(), Y => cpu::<X, Y>(x, y))),
    }
    Ok(())
}

fn cpu<X: Float, Y: Float>(x: View, y: ViewMut) {
    let y = SharedMut::<Y>::new(y);
    for_each_row_block(x.rows(), rows_per_task(x.cols()), x.cols().div_ceil(4), |_, rows| {
        for row in rows {
            // SAFETY: a row belongs to one task.
            convert(x.row::<X>(row), unsafe { y.row(row, 0..y.cols()) });
        }
    });
}

fn launch(gpu: &Gpu, x: View, y: ViewMut) -> Result<()> {
    let to = match y.dtype() {
        DType::F32 => 0,
        DType::Bf16 => 1,
        DType::F16 => 2,
        DType::U32 => panic!("cast to integers"),
    };
    Elementwise {
        source: "cast",
        function: "cast",
        element: x.dtype(),
        constants: &[("TO", to)],
        first: &[],
        views: &[x, y.view()],
        cols: y.cols(),
        mask: None,
    }
    .launch(gpu)
}
