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
    if source.row_stride == 1 {
        copy_lines(source, width, grain, panels);
        return;
    }
    let (lines, depth) = (source.rows, source.cols);
    for (first, panel) in (0..lines).step_by(width).zip(panels.chunks_mut(width * depth)) {
        let count = width.min(lines - first);
        let width = count.next_multiple_of(grain);
        let panel = &mut panel[..width * depth];
        if count < width {
            panel.fill(0.0);
        }
        pack_transposed(source, first, count, width, panel);
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

/// Depths whose lines are copied at a time: their cache lines, which are often a power of two apart, fit a set of the
/// first-level cache.
const DEPTHS: usize = 8;

multiversion! {
    /// [`pack`] where lines are next to each other at every depth. All panels get some depths before any gets the next,
    /// so that a cache line of the source, which several panels need, is fetched once.
    fn copy_lines<T: Float>(source: Matrix<T>, width: usize, grain: usize, panels: &mut [f32]) {
        let (lines, depth) = (source.rows, source.cols);
        for start in (0..depth).step_by(DEPTHS) {
            let depths = start..depth.min(start + DEPTHS);
            for first in (0..lines).step_by(width) {
                let count = width.min(lines - first);
                let width_here = count.next_multiple_of(grain);
                let panel = &mut panels[first * depth..][..width_here * depth];
                let packed = panel[depths.start * width_here..depths.end * width_here].chunks_exact_mut(width_here);
                match count {
                    // The widths of whole panels: a copy of a length that is known is no call.
                    12 => copy_some::<T, 12>(source, first, depths.clone().zip(packed)),
                    24 => copy_some::<T, 24>(source, first, depths.clone().zip(packed)),
                    32 => copy_some::<T, 32>(source, first, depths.clone().zip(packed)),
                    _ => depths.clone().zip(packed).for_each(|(k, packed)| {
                        let (packed, padding) = packed.split_at_mut(count);
                        let values = source.contiguous_column(k, first, count);
                        packed.iter_mut().zip(values).for_each(|(packed, value)| *packed = value.to_f32());
                        padding.fill(0.0);
                    }),
                }
            }
        }
    }
}

/// Copies lines `first..first + N` at each depth to where it goes.
#[inline(always)]
fn copy_some<'p, T: Float, const N: usize>(
    source: Matrix<T>,
    first: usize,
    places: impl Iterator<Item = (usize, &'p mut [f32])>,
) {
    for (k, place) in places {
        let (Some(values), Some(place)) =
            (source.contiguous_column(k, first, N).first_chunk::<N>(), place.first_chunk_mut())
        else {
            unreachable!("both are of {N} lines")
        };
        *place = values.map(T::to_f32);
    }
}

/// Lines and depths of the squares that are turned at a time.
const SQUARE: usize = 8;
/// Depths of a panel that are turned before the next.
#[cfg(target_arch = "x86_64")]
const TURNED: usize = 64;

/// Copies lines `first..first + count`, whose elements are next to each other, across a panel.
fn pack_transposed<T: Float>(source: Matrix<T>, first: usize, count: usize, width: usize, panel: &mut [f32]) {
    let depth = source.cols;
    let (mut whole_lines, mut whole_depth) = (0, 0);
    #[cfg(target_arch = "x86_64")]
    if level() >= Level::Avx2 && source.col_stride == 1 {
        (whole_lines, whole_depth) = (count / SQUARE * SQUARE, depth / SQUARE * SQUARE);
        // Part of the panel after part of it, so that it is in the first-level cache until all lines are in it.
        for start in (0..whole_depth).step_by(TURNED) {
            let depths = start..whole_depth.min(start + TURNED);
            for line in (0..whole_lines).step_by(SQUARE) {
                let lines = source.block(first + line..first + line + SQUARE, depths.clone());
                // SAFETY: the machine has AVX2.
                unsafe { turn_squares(lines, &mut panel[start * width + line..], width) }
            }
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
