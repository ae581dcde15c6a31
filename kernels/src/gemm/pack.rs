//! Copies of operands in the order in which the microkernel reads them.

use super::Matrix;
use crate::float::Float;
use crate::simd::multiversion;

/// Copies `lines × depth` of `source` into panels of `width` lines: element (line, k) of a panel is at `k · width + line`.
/// A line is a row of the left operand or a column of the right one. The last panel is filled up with zeros.
///
/// `source` has the lines as its rows.
pub(super) fn pack<T: Float>(source: Matrix<T>, width: usize, panels: &mut [f32]) {
    let (lines, depth) = (source.rows, source.cols);
    for (index, panel) in panels.chunks_exact_mut(width * depth).enumerate() {
        let first = index * width;
        let count = width.min(lines - first);
        if count < width {
            panel.fill(0.0);
        }
        if source.row_stride == 1 {
            for (k, packed) in panel.chunks_exact_mut(width).enumerate() {
                copy_line(source.contiguous_column(k, first, count), &mut packed[..count]);
            }
        } else {
            pack_transposed(source, first, count, width, panel);
        }
    }
}

multiversion! {
    fn copy_line<T: Float>(source: &[T], packed: &mut [f32]) {
        for (packed, value) in packed.iter_mut().zip(source) {
            *packed = value.to_f32();
        }
    }
}

multiversion! {
    fn pack_transposed<T: Float>(source: Matrix<T>, first: usize, count: usize, width: usize, panel: &mut [f32]) {
        for (k, packed) in panel.chunks_exact_mut(width).enumerate() {
            for (line, packed) in packed[..count].iter_mut().enumerate() {
                *packed = source.get(first + line, k).to_f32();
            }
        }
    }
}
