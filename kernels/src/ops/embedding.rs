//! Token embeddings, with the dropout that follows them.

use super::elementwise::Elementwise;
use super::residual::scale;
use super::{check_dtype, check_shape};
use crate::driver::{Gpu, Launch, Module, dropout_arguments, has_whole_vectors};
use crate::float::{Float, with_float};
use crate::parallel::{SharedMut, for_each_row_block, for_each_task, rows_per_task};
use crate::simd::multiversion;
use crate::{DType, Device, Dropout, Result, View, ViewMut};

/// Columns of the table's gradient that a task computes; whole groups of the dropout generator.
const COLUMNS: usize = 128;

/// `y[n] = dropout(table[ids[n]])` for `ids[N,1]` (u32), `table[V,D]`, `y[N,D]`.
pub fn embedding_forward(ids: View, table: View, mask: Dropout, y: ViewMut) -> Result<()> {
    check_shape!(ids, y.rows(), 1);
    check_shape!(table, table.rows(), y.cols());
    check_dtype!(table.dtype(), y);
    match y.device() {
        Device::Gpu(gpu) => forward_gpu(gpu, ids, table, mask, y)?,
        Device::Cpu(_) => with_float!(y.dtype(), T => forward_cpu::<T>(ids, table, mask, y)),
    }
    Ok(())
}

fn forward_cpu<T: Float>(ids: View, table: View, mask: Dropout, y: ViewMut) {
    let y = SharedMut::<T>::new(y);
    for_each_row_block(ids.rows(), rows_per_task(y.cols()), y.cols().div_ceil(2), |_, rows| {
        for row in rows {
            let embedding = table.row::<T>(ids.row::<u32>(row)[0] as usize);
            mask.for_each_piece(row, y.cols(), |columns, factors| {
                // SAFETY: a row belongs to one task.
                scale(&embedding[columns.clone()], factors, unsafe { y.row(row, columns) });
            });
        }
    });
}

/// `d_table[ids[n]] += dropout(d_y[n])`, in the order of the rows whatever the number of threads; `d_table[V,D]` is f32.
pub fn embedding_backward(ids: View, d_y: View, mask: Dropout, d_table: ViewMut) -> Result<()> {
    check_shape!(ids, d_y.rows(), 1);
    check_shape!(d_table, d_table.rows(), d_y.cols());
    check_dtype!(DType::F32, d_table);
    match d_table.device() {
        Device::Gpu(gpu) => backward_gpu(gpu, ids, d_y, mask, d_table)?,
        Device::Cpu(_) => with_float!(d_y.dtype(), T => backward_cpu::<T>(ids, d_y, mask, d_table)),
    }
    Ok(())
}

/// Tasks take columns, so that each element of the table sees the rows in order.
fn backward_cpu<T: Float>(ids: View, d_y: View, mask: Dropout, d_table: ViewMut) {
    let cols = d_y.cols();
    let d_table = SharedMut::<f32>::new(d_table);
    for_each_task(cols.div_ceil(COLUMNS), d_y.rows() * cols.div_ceil(2), |task| {
        let columns = task * COLUMNS..cols.min((task + 1) * COLUMNS);
        let mut factors = [1.0; COLUMNS];
        let factors = &mut factors[..columns.len()];
        for row in 0..d_y.rows() {
            mask.factors((row * cols + columns.start) as u64, factors);
            // SAFETY: these columns belong to this task.
            let sum = unsafe { d_table.row(ids.row::<u32>(row)[0] as usize, columns.clone()) };
            accumulate(&d_y.row::<T>(row)[columns.clone()], factors, sum);
        }
    });
}

multiversion! {
    fn accumulate<T: Float>(d_y: &[T], factors: &[f32], sum: &mut [f32]) {
        for ((sum, d_y), factor) in sum.iter_mut().zip(d_y).zip(factors) {
            *sum += d_y.to_f32() * factor;
        }
    }
}

fn forward_gpu(gpu: &Gpu, ids: View, table: View, mask: Dropout, y: ViewMut) -> Result<()> {
    assert!(ids.is_contiguous(), "ids with gaps");
    Elementwise {
        source: "embedding",
        function: "embedding_forward",
        element: y.dtype(),
        constants: &[],
        first: &[ids.into(), table.rows().into()],
        views: &[table, y.view()],
        cols: y.cols(),
        mask: Some(mask),
    }
    .launch(gpu)
}

fn backward_gpu(gpu: &Gpu, ids: View, d_y: View, mask: Dropout, d_table: ViewMut) -> Result<()> {
    assert!(ids.is_contiguous(), "ids with gaps");
    const THREADS: usize = 256;
    /// Rows that a block looks through at a time, with 13 bytes of shared memory for each.
    const WINDOW: usize = 8 * THREADS;
    /// Each block looks through all ids: that many blocks keep a GPU busy, a power of two.
    const BLOCKS_MAX: usize = 512;
    /// Rows that a block is worth.
    const BLOCK_ROWS: usize = 16;
    let blocks = ids.rows().div_ceil(BLOCK_ROWS).next_power_of_two().min(BLOCKS_MAX);
    let [seed, stream, threshold, scale] = dropout_arguments(mask);
    gpu.launch(Launch {
        module: Module { source: "embedding", element: d_y.dtype(), constants: &[] },
        function: "embedding_backward",
        grid: [blocks as u32, 1, 1],
        block: THREADS as u32,
        shared_bytes: THREADS / 32 * 4 + WINDOW * 13,
        arguments: &[
            ids.into(),
            d_y.into(),
            d_y.stride().into(),
            (&d_table).into(),
            d_table.stride().into(),
            d_y.rows().into(),
            d_y.cols().into(),
            d_table.rows().into(),
            has_whole_vectors(&[d_y, d_table.view()]).into(),
            seed,
            stream,
            threshold,
            scale,
        ],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_beyond_the_table_shows_on_a_gpu_and_touches_nothing() {
        if crate::driver::emulated::is_missing() {
            return;
        }
        let device = Device::emulated(7).unwrap();
        let ids = device.upload(&[1_u32, 2, u32::MAX, 0], 4, 1).unwrap();
        let table = device.upload(&[1.0_f32, 2.0, 3.0, 4.0], 2, 2).unwrap();
        let mut y = device.upload(&[9.0_f32; 8], 4, 2).unwrap();
        embedding_forward(ids.view(), table.view(), Dropout::NONE, y.view_mut()).unwrap();
        let y = y.download::<f32>().unwrap();
        assert_eq!((&y[..2], &y[6..]), (&[3.0, 4.0][..], &[1.0, 2.0][..]));
        assert!(y[2..6].iter().all(|y| y.is_nan()), "{y:?}");
        let d_y = device.upload(&[1.0_f32, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], 4, 2).unwrap();
        let mut d_table = device.zeros(DType::F32, 2, 2).unwrap();
        embedding_backward(ids.view(), d_y.view(), Dropout::NONE, d_table.view_mut()).unwrap();
        assert_eq!(d_table.download::<f32>().unwrap(), [7.0, 8.0, 1.0, 2.0]);
    }
}
