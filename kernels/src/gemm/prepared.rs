//! A right operand that is packed once and multiplied often: decoding takes the same weights at every token.

use std::ops::Range;

use super::pack::pack_parallel;
use super::{Matrix, MatrixMut, Microkernel, Operand, Product, SHARED_A, ranges};
use crate::float::Float;
use crate::parallel::for_each_task;
use crate::pool::Line;

/// The most rows of the left operand that are packed at a time.
const ROWS_PACKED: usize = 1020;

/// A matrix in the microkernel's order, in f32.
pub(crate) struct Prepared {
    panels: Vec<Line>,
    depth: usize,
    cols: usize,
}

impl Prepared {
    /// Of `b[K,N]`.
    pub(crate) fn new<T: Float>(b: Matrix<T>) -> Self {
        let kernel = Microkernel::detect();
        let floats = b.cols.next_multiple_of(kernel.lanes) * b.rows;
        let lines = floats.div_ceil(size_of::<Line>() / size_of::<f32>());
        let mut panels: Vec<Line> = vec![bytemuck::Zeroable::zeroed(); lines];
        pack_parallel(b.transposed(), kernel.cols, kernel.lanes, &mut bytemuck::cast_slice_mut(&mut panels)[..floats]);
        Prepared { panels, depth: b.rows, cols: b.cols }
    }

    /// `K`
    pub(crate) fn depth(&self) -> usize {
        self.depth
    }

    /// `N`
    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    fn panels(&self) -> &[f32] {
        bytemuck::cast_slice(&self.panels)
    }
}

/// `c = a · b`, to the bit what [`super::gemm`] computes, on all threads of the pool.
pub(crate) fn gemm_prepared<A: Float, C: Float>(a: Matrix<A>, b: &Prepared, c: MatrixMut<C>) {
    let kernel = Microkernel::detect();
    // The product reads operands that are packed; of the matrix itself it only knows the shape.
    let shape = Matrix::<f32>::from_slice(b.panels(), b.depth, b.cols, 0);
    let operand = Operand::packed(b.panels(), 0..b.cols, 0..b.depth, kernel.cols, kernel.lanes);
    let product = Product::new(a, shape, c, false);
    for rows in ranges(0..product.c.rows, ROWS_PACKED) {
        let multiply = |a: &Operand| multiply(&product, a, &operand, rows.clone());
        if rows.len() <= kernel.rows {
            // All of it at once, so there is an operand.
            product.share_a(rows.clone(), false, |a| a.into_iter().for_each(multiply));
            continue;
        }
        // Rows that lie a power of two apart would push each other out of the cache.
        let depths = 0..product.a.cols;
        SHARED_A.with(rows.len().next_multiple_of(kernel.rows) * depths.len(), |panels| {
            pack_parallel(product.a.block(rows.clone(), depths.clone()), kernel.rows, kernel.rows, panels);
            multiply(&Operand::packed(panels, rows.clone(), depths, kernel.rows, kernel.rows));
        });
    }
}

/// Some rows of the product: a task takes all of them and a few panels of `b`, which so come from memory once.
fn multiply<A: Float, C: Float>(product: &Product<A, f32, C>, a: &Operand, b: &Operand, rows: Range<usize>) {
    const PANELS_MAX: usize = 4;
    let (all, width) = (product.c.cols, product.kernel.cols);
    let panels = all.div_ceil(width) / (8 * rayon::current_num_threads());
    let task_cols = panels.clamp(1, PANELS_MAX) * width;
    for_each_task(all.div_ceil(task_cols), product.nanoseconds(), |task| {
        let cols = task * task_cols..all.min((task + 1) * task_cols);
        product.sum(rows.clone(), cols.clone(), |_, add| add(a, b));
    });
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::gemm::gemm;

    #[test]
    fn bits_are_those_of_the_product_that_packs_for_itself() {
        for (rows, depth, cols) in [(1, 3, 5), (4, 512, 64), (13, 700, 33), (128, 64, 96), (1100, 20, 40)] {
            let value = |index: usize| (index * 7919 % 2003) as f32 / 1000.0 - 1.0;
            let a: Vec<f32> = (0..rows * depth).map(value).collect();
            let w: Vec<bf16> = (0..cols * depth).map(|index| bf16::from_f32(value(index + 17))).collect();
            let a = Matrix::from_slice(&a, rows, depth, depth);
            let w = Matrix::from_slice(&w, cols, depth, depth).transposed();
            let (mut want, mut got) = (vec![0.0_f32; rows * cols], vec![f32::NAN; rows * cols]);
            gemm(a, w, MatrixMut::from_slice(&mut want, rows, cols, cols), false);
            gemm_prepared(a, &Prepared::new(w), MatrixMut::from_slice(&mut got, rows, cols, cols));
            assert_eq!(got, want, "{rows} x {depth} x {cols}");
        }
    }
}
