//! Copies of operands in the order in which the microkernel reads them.

use std::ops::Range;

use rayon::prelude::*;

use super::Matrix;
use crate::float::Float;
use crate::simd::multiversion;
#[cfg(target_arch = "x86_64")]
use crate::simd::{Level, level};

/// Copies `lines × depth` of `source` into panels of `width` lines: element (line, k) of a panel is at `k · width + line`.
/// A line is a row of the left operand or a column of the right one. The last panel is only as wide as it must be to hold
/// the lines that are left and be a multiple of `grain`; it is filled up with zeros.
///
/// `source` has the lines as its rows.
pub(super) fn pack<T: Float>(source: Matrix<T>, width: usize, grain: usize, panels: &mut [f32]) {
    let (lines, depth) = (source.rows, source.cols);
    for (first, panel) in (0..lines).step_by(width).zip(panels.chunks_mut(width * depth)) {
        let count = width.min(lines - first);
        let width = count.next_multiple_of(grain);
        let panel = &mut panel[..width * depth];
        if count < width {
            panel.fill(0.0);
        }
        if source.row_stride == 1 {
            copy_lines(source, first, count, width, panel);
        } else {
            pack_transposed(source, first, count, width, panel);
        }
    }
}

/// As [`pack`], on all threads.
pub(super) fn pack_parallel<T: Float>(source: Matrix<T>, width: usize, grain: usize, panels: &mut [f32]) {
    /// Floats that a task packs, about.
    const TASK: usize = 1 << 16;
    let (lines, depth) = (source.rows, source.cols);
    if lines == 0 || depth == 0 {
        return;
    }
    let group = (TASK / (width * depth)).max(1) * width;
    panels.par_chunks_mut(group * depth).enumerate().for_each(|(task, panels)| {
        let first = task * group;
        pack(source.block(first..lines.min(first + group), 0..depth), width, grain, panels);
    });
}

multiversion! {
    /// Copies lines `first..first + count`, which are next to each other at every depth, into a panel.
    fn copy_lines<T: Float>(source: Matrix<T>, first: usize, count: usize, width: usize, panel: &mut [f32]) {
        for (k, packed) in panel.chunks_exact_mut(width).enumerate() {
            // In arrays, because a call to copy memory costs more than so few lines do.
            let (arrays, rest) = source.contiguous_column(k, first, count).as_chunks::<SQUARE>();
            let (packed_arrays, packed_rest) = packed[..count].as_chunks_mut::<SQUARE>();
            for (packed, array) in packed_arrays.iter_mut().zip(arrays) {
                *packed = array.map(T::to_f32);
            }
            for (packed, value) in packed_rest.iter_mut().zip(rest) {
                *packed = value.to_f32();
            }
        }
    }
}

/// Lines and depths of the squares that are turned at a time.
const SQUARE: usize = 8;

/// Copies lines `first..first + count`, whose elements are next to each other, across a panel.
fn pack_transposed<T: Float>(source: Matrix<T>, first: usize, count: usize, width: usize, panel: &mut [f32]) {
    let depth = source.cols;
    let (mut whole_lines, mut whole_depth) = (0, 0);
    #[cfg(target_arch = "x86_64")]
    if level() >= Level::Avx2 && source.col_stride == 1 {
        (whole_lines, whole_depth) = (count / SQUARE * SQUARE, depth / SQUARE * SQUARE);
        for line in (0..whole_lines).step_by(SQUARE) {
            let lines = source.block(first + line..first + line + SQUARE, 0..depth);
            // SAFETY: the machine has AVX2.
            unsafe { turn_squares(lines, &mut panel[line..], width) }
        }
    }
    copy_elements(source, first, 0..whole_lines, whole_depth..depth, width, panel);
    copy_elements(source, first, whole_lines..count, 0..depth, width, panel);
}

/// What [`turn_squares`] leaves.
fn copy_elements<T: Float>(
    source: Matrix<T>,
    first: usize,
    lines: Range<usize>,
    depths: Range<usize>,
    width: usize,
    panel: &mut [f32],
) {
    for k in depths {
        for line in lines.clone() {
            panel[k * width + line] = source.get(first + line, k).to_f32();
        }
    }
}

/// Transposes eight lines, as far as their depth is whole squares: rows of `panel`, `width` apart, get eight elements.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn turn_squares<T: Float>(lines: Matrix<T>, panel: &mut [f32], width: usize) {
    use std::arch::x86_64::{
        __m256, _mm256_permute2f128_ps, _mm256_shuffle_ps, _mm256_unpackhi_ps, _mm256_unpacklo_ps,
    };
    for start in (0..lines.cols / SQUARE * SQUARE).step_by(SQUARE) {
        let row = |line: usize| -> __m256 {
            let values: &[T; SQUARE] = lines.contiguous_row(line, start);
            bytemuck::cast(values.map(T::to_f32))
        };
        // Pairs of lines, then fours, then all eight.
        let [r0, r1, r2, r3, r4, r5, r6, r7] = [row(0), row(1), row(2), row(3), row(4), row(5), row(6), row(7)];
        let (a0, a1) = (_mm256_unpacklo_ps(r0, r1), _mm256_unpackhi_ps(r0, r1));
        let (a2, a3) = (_mm256_unpacklo_ps(r2, r3), _mm256_unpackhi_ps(r2, r3));
        let (a4, a5) = (_mm256_unpacklo_ps(r4, r5), _mm256_unpackhi_ps(r4, r5));
        let (a6, a7) = (_mm256_unpacklo_ps(r6, r7), _mm256_unpackhi_ps(r6, r7));
        let (b0, b1) = (_mm256_shuffle_ps::<0x44>(a0, a2), _mm256_shuffle_ps::<0xee>(a0, a2));
        let (b2, b3) = (_mm256_shuffle_ps::<0x44>(a1, a3), _mm256_shuffle_ps::<0xee>(a1, a3));
        let (b4, b5) = (_mm256_shuffle_ps::<0x44>(a4, a6), _mm256_shuffle_ps::<0xee>(a4, a6));
        let (b6, b7) = (_mm256_shuffle_ps::<0x44>(a5, a7), _mm256_shuffle_ps::<0xee>(a5, a7));
        let low = [(b0, b4), (b1, b5), (b2, b6), (b3, b7)];
        for (k, (left, right)) in low.into_iter().enumerate() {
            let at = (start + k) * width;
            let values: [f32; SQUARE] = bytemuck::cast(_mm256_permute2f128_ps::<0x20>(left, right));
            panel[at..at + SQUARE].copy_from_slice(&values);
            let at = (start + k + SQUARE / 2) * width;
            let values: [f32; SQUARE] = bytemuck::cast(_mm256_permute2f128_ps::<0x31>(left, right));
            panel[at..at + SQUARE].copy_from_slice(&values);
        }
    }
}
