//! RMSNorm as T5 has it: no mean, no bias, variance in f32.
//!
//! `y = cast(x · r) · w` with `r = (mean(x²) + eps)^-½`, per row.
//!
//! Backward, with `g = d_y · w`: `d_x += r · g − x · r³ · mean(g · x)`, and `d_w += Σ d_y · cast(x · r)` over the rows.

use super::{check_dtype, check_shape};
use crate::driver::{Argument, Gpu, Launch, Module, has_whole_vectors};
use crate::float::{Float, with_float};
use crate::parallel::{SharedMut, for_each_row_block, rows_per_task};
use crate::simd::{add_assign, multiversion, sum};
use crate::{DType, Device, Result, View, ViewMut};

/// Rows whose share of `d_weight` is summed before it is added to the others'; part of what its bits are.
const ROW_BLOCK: usize = 64;

/// `y[N,D]` from `x[N,D]` and `weight[1,D]`; `rstd[N,1]` (f32) keeps `r` for the backward pass.
pub fn rms_norm_forward(x: View, weight: View, eps: f32, y: ViewMut, rstd: ViewMut) -> Result<()> {
    check_shape!(x, y.rows(), y.cols());
    check_shape!(weight, 1, y.cols());
    check_shape!(rstd, y.rows(), 1);
    check_dtype!(x.dtype(), weight, y);
    match y.device() {
        Device::Gpu(gpu) => forward_gpu(gpu, x, weight, eps, y, rstd)?,
        Device::Cpu(_) => with_float!(x.dtype(), T => forward_cpu::<T>(x, weight, eps, y, rstd)),
    }
    Ok(())
}

fn forward_cpu<T: Float>(x: View, weight: View, eps: f32, y: ViewMut, rstd: ViewMut) {
    let weight = weight.row::<T>(0);
    let (y, rstd) = (SharedMut::<T>::new(y), SharedMut::<f32>::new(rstd));
    for_each_row_block(x.rows(), rows_per_task(x.cols()), x.cols().div_ceil(4), |_, rows| {
        for row in rows {
            // SAFETY: a row belongs to one task.
            let (y, rstd) = unsafe { (y.row(row, 0..y.cols()), rstd.row(row, 0..1)) };
            rstd[0] = forward_row(x.row::<T>(row), weight, eps, y);
        }
    });
}

multiversion! {
    fn forward_row<T: Float>(x: &[T], weight: &[T], eps: f32, y: &mut [T]) -> f32 {
        let squares = sum(x.len(), |index| x[index].to_f32() * x[index].to_f32());
        let r = 1.0 / (squares / x.len() as f32 + eps).sqrt();
        for ((y, x), weight) in y.iter_mut().zip(x).zip(weight) {
            *y = T::from_f32(T::from_f32(x.to_f32() * r).to_f32() * weight.to_f32());
        }
        r
    }
}

/// Adds the gradient to `d_x[N,D]` (the residual stream's gradient is already in it) and to `d_weight[1,D]` (f32).
pub fn rms_norm_backward(d_y: View, x: View, weight: View, rstd: View, d_x: ViewMut, d_weight: ViewMut) -> Result<()> {
    check_shape!(d_y, d_x.rows(), d_x.cols());
    check_shape!(x, d_x.rows(), d_x.cols());
    check_shape!(weight, 1, d_x.cols());
    check_shape!(rstd, d_x.rows(), 1);
    check_shape!(d_weight, 1, d_x.cols());
    check_dtype!(x.dtype(), weight, d_y, d_x);
    check_dtype!(DType::F32, rstd, d_weight);
    match d_x.device() {
        Device::Gpu(gpu) => backward_gpu(gpu, d_y, x, weight, rstd, d_x, d_weight),
        Device::Cpu(_) => with_float!(x.dtype(), T => backward_cpu::<T>(d_y, x, weight, rstd, d_x, d_weight)),
    }
}

fn backward_cpu<T: Float>(d_y: View, x: View, weight: View, rstd: View, d_x: ViewMut, d_weight: ViewMut) -> Result<()> {
    let (count, cols) = (x.rows(), x.cols());
    let weight = weight.row::<T>(0);
    let mut partials = d_x.device().empty(DType::F32, count.div_ceil(ROW_BLOCK), cols)?;
    let (d_x, shared) = (SharedMut::<T>::new(d_x), SharedMut::<f32>::new(partials.view_mut()));
    for_each_row_block(count, ROW_BLOCK, cols.div_ceil(2), |block, rows| {
        // SAFETY: a block has its own row of partial sums.
        let partial = unsafe { shared.row(block, 0..cols) };
        partial.fill(0.0);
        for row in rows {
            // SAFETY: a row belongs to one task.
            let d_x = unsafe { d_x.row(row, 0..cols) };
            backward_row(d_y.row::<T>(row), x.row::<T>(row), weight, rstd.row::<f32>(row)[0], d_x, partial);
        }
    });
    let d_weight = d_weight.into_slice::<f32>();
    (0..partials.rows()).for_each(|block| add_assign(d_weight, partials.view().row(block)));
    Ok(())
}

multiversion! {
    fn backward_row<T: Float>(d_y: &[T], x: &[T], weight: &[T], r: f32, d_x: &mut [T], d_weight: &mut [f32]) {
        let cols = x.len();
        let (d_y, weight, d_x, d_weight) = (&d_y[..cols], &weight[..cols], &mut d_x[..cols], &mut d_weight[..cols]);
        let g_x = sum(cols, |index| d_y[index].to_f32() * weight[index].to_f32() * x[index].to_f32());
        let along_x = r * r * r * (g_x / cols as f32);
        for index in 0..cols {
            let (d_y, x) = (d_y[index].to_f32(), x[index].to_f32());
            let gradient = r * (d_y * weight[index].to_f32()) - x * along_x;
            d_x[index] = T::from_f32(d_x[index].to_f32() + gradient);
            d_weight[index] += d_y * T::from_f32(x * r).to_f32();
        }
    }
}

const THREADS: usize = 256;

/// What the source is compiled with for rows of `cols` columns.
pub(super) fn constants(cols: usize) -> Vec<(&'static str, u32)> {
    Team::new(cols).constants.to_vec()
}

/// How rows of `cols` columns are dealt out to warps (cuda/rms_norm.cu).
struct Team {
    constants: [(&'static str, u32); 2],
    /// Rows that a block has at a time.
    rows: usize,
}

impl Team {
    fn new(cols: usize) -> Self {
        // As driver/sources.rs lists them.
        const PACKS_MAX: usize = 4;
        let packs = cols.div_ceil(32 * 8);
        let warps = packs.div_ceil(PACKS_MAX).next_power_of_two();
        assert!(warps <= 8, "RMSNorm over {cols} columns");
        let constants = [("WARPS", warps as u32), ("PACKS", packs.min(PACKS_MAX) as u32)];
        Team { constants, rows: THREADS / (32 * warps) }
    }

    fn launch(
        &self,
        gpu: &Gpu,
        element: DType,
        function: &'static str,
        blocks: usize,
        shared_floats: usize,
        arguments: &[Argument],
    ) -> Result<()> {
        gpu.launch(Launch {
            module: Module { source: "rms_norm", element, constants: &self.constants },
            function,
            grid: [blocks as u32, 1, 1],
            block: THREADS as u32,
            shared_bytes: THREADS / 32 * 4 + shared_floats * 4,
            arguments,
        })
    }
}

fn forward_gpu(gpu: &Gpu, x: View, weight: View, eps: f32, y: ViewMut, rstd: ViewMut) -> Result<()> {
    let team = Team::new(x.cols());
    let arguments = [
        x.into(),
        x.stride().into(),
        weight.into(),
        eps.into(),
        (&y).into(),
        y.stride().into(),
        rstd_argument(rstd.view()),
        x.rows().into(),
        x.cols().into(),
        has_whole_vectors(&[x, weight, y.view()]).into(),
    ];
    team.launch(gpu, x.dtype(), "rms_norm_forward", x.rows().div_ceil(team.rows), 0, &arguments)
}

fn rstd_argument(rstd: View) -> Argument {
    assert!(rstd.is_contiguous(), "rstd with gaps");
    rstd.into()
}

/// Blocks of the backward pass, at most: two for each processor of a large GPU, and few rows of partial sums.
const BLOCKS_MAX: usize = 256;

fn backward_gpu(
    gpu: &Gpu,
    d_y: View,
    x: View,
    weight: View,
    rstd: View,
    d_x: ViewMut,
    d_weight: ViewMut,
) -> Result<()> {
    let (rows, cols) = (x.rows(), x.cols());
    let team = Team::new(cols);
    let rows_per_block = rows.div_ceil(BLOCKS_MAX).next_multiple_of(team.rows);
    let blocks = rows.div_ceil(rows_per_block);
    let mut partials = d_x.device().empty(DType::F32, blocks, cols)?;
    let arguments = [
        d_y.into(),
        d_y.stride().into(),
        x.into(),
        x.stride().into(),
        weight.into(),
        rstd_argument(rstd),
        (&d_x).into(),
        d_x.stride().into(),
        (&partials.view_mut()).into(),
        rows.into(),
        cols.into(),
        rows_per_block.into(),
        has_whole_vectors(&[d_y, x, weight, d_x.view()]).into(),
    ];
    team.launch(gpu, x.dtype(), "rms_norm_backward", blocks, team.rows * cols, &arguments)?;
    const SUM_THREADS: usize = 1024;
    gpu.launch(Launch {
        module: Module { source: "rms_norm", element: x.dtype(), constants: &team.constants },
        function: "rms_norm_d_weight",
        grid: [cols.div_ceil(32) as u32, 1, 1],
        block: SUM_THREADS as u32,
        shared_bytes: SUM_THREADS * 4,
        arguments: &[partials.view().into(), blocks.into(), (&d_weight).into(), cols.into()],
    })
}
