//! Matrix multiplication, of any strides and of f32 and bf16 in any mixture, accumulated in f32.
//!
//! The scheme is Goto's: blocks of the operands are packed into the order in which a register-sized microkernel reads
//! them, which is also where bf16 becomes f32. An element of the product is summed in order of depth, in runs of
//! [`DEPTH_BLOCK`]; nothing else decides its bits, so the rows and columns can be dealt out to threads at will.

mod microkernel;
mod pack;

use std::marker::PhantomData;
use std::ops::Range;

use microkernel::{Microkernel, Tile};
use pack::pack;

use crate::float::Float;
use crate::parallel::{Scratch, for_each_task, with_scratch};
use crate::simd::convert;
use crate::{View, ViewMut};

/// Products summed before the sum is added to the result; part of what a product's bits are.
const DEPTH_BLOCK: usize = 512;

/// The most rows and columns of a block, so that with [`DEPTH_BLOCK`] its operands stay in a core's cache. Rows that are
/// not packed are cheap to have many of.
const PACKED_ROWS: usize = 516;
const PACKED_COLS: usize = 512;
const ROWS_IN_PLACE: usize = 1024;

/// An operand: `rows × cols` elements at any strides.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a, T> {
    pointer: *const T,
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
    life: PhantomData<&'a [T]>,
}

// SAFETY: a shared borrow of elements that can be shared.
unsafe impl<T: Sync> Sync for Matrix<'_, T> {}
// SAFETY: likewise.
unsafe impl<T: Sync> Send for Matrix<'_, T> {}

impl<'a, T: Float> Matrix<'a, T> {
    pub(crate) fn from_view(view: View<'a>) -> Self {
        let (rows, cols, stride) = (view.rows(), view.cols(), view.stride());
        Matrix { pointer: view.as_ptr(), rows, cols, row_stride: stride, col_stride: 1, life: PhantomData }
    }

    /// Rows of `cols` elements that begin `stride` elements apart.
    pub(crate) fn from_slice(slice: &'a [T], rows: usize, cols: usize, stride: usize) -> Self {
        assert!(rows == 0 || (rows - 1) * stride + cols <= slice.len(), "matrix beyond its slice");
        Matrix { pointer: slice.as_ptr(), rows, cols, row_stride: stride, col_stride: 1, life: PhantomData }
    }

    pub(crate) fn transposed(self) -> Self {
        Matrix { rows: self.cols, cols: self.rows, row_stride: self.col_stride, col_stride: self.row_stride, ..self }
    }

    fn block(self, rows: Range<usize>, cols: Range<usize>) -> Self {
        debug_assert!(rows.end <= self.rows && cols.end <= self.cols);
        let pointer = self.pointer.wrapping_add(rows.start * self.row_stride + cols.start * self.col_stride);
        Matrix { pointer, rows: rows.len(), cols: cols.len(), ..self }
    }

    #[inline(always)]
    fn get(&self, row: usize, col: usize) -> T {
        debug_assert!(row < self.rows && col < self.cols);
        // SAFETY: whoever made the matrix has shown that its elements are in the borrowed memory.
        unsafe { *self.pointer.add(row * self.row_stride + col * self.col_stride) }
    }

    /// Rows `first..first + count` of column `col`, where rows are next to each other.
    #[inline(always)]
    fn contiguous_column(&self, col: usize, first: usize, count: usize) -> &'a [T] {
        assert!(self.row_stride == 1 && col < self.cols && first + count <= self.rows);
        // SAFETY: as in `get`; the elements are next to each other.
        unsafe { std::slice::from_raw_parts(self.pointer.add(col * self.col_stride + first), count) }
    }

    /// `N` elements of row `row` from column `first` on, where columns are next to each other.
    #[inline(always)]
    fn contiguous_row<const N: usize>(&self, row: usize, first: usize) -> &'a [T; N] {
        assert!(self.col_stride == 1 && row < self.rows && first + N <= self.cols);
        // SAFETY: as in `get`; the elements are next to each other.
        unsafe { &*self.pointer.add(row * self.row_stride + first).cast() }
    }

    /// The same memory, if it holds f32.
    fn as_f32(&self) -> Option<*const f32> {
        (T::DTYPE == crate::DType::F32).then_some(self.pointer.cast())
    }
}

/// A result: `rows` rows of `cols` elements that begin `stride` elements apart.
pub(crate) struct MatrixMut<'a, T> {
    pointer: *mut T,
    rows: usize,
    cols: usize,
    stride: usize,
    life: PhantomData<&'a mut [T]>,
}

// SAFETY: tasks write blocks that do not overlap; see `Product::block`.
unsafe impl<T: Send> Sync for MatrixMut<'_, T> {}
// SAFETY: an exclusive borrow of elements that can be sent.
unsafe impl<T: Send> Send for MatrixMut<'_, T> {}

impl<'a, T: Float> MatrixMut<'a, T> {
    pub(crate) fn from_view(view: ViewMut<'a>) -> Self {
        let (rows, cols, stride) = (view.rows(), view.cols(), view.stride());
        MatrixMut { pointer: view.as_mut_ptr(), rows, cols, stride, life: PhantomData }
    }

    pub(crate) fn from_slice(slice: &'a mut [T], rows: usize, cols: usize, stride: usize) -> Self {
        assert!(rows == 0 || (rows - 1) * stride + cols <= slice.len(), "matrix beyond its slice");
        MatrixMut { pointer: slice.as_mut_ptr(), rows, cols, stride, life: PhantomData }
    }

    /// # Safety
    /// `rows` rows of `cols` elements must be writable at these strides, and nobody else's for `'a`.
    pub(crate) unsafe fn from_raw(pointer: *mut T, rows: usize, cols: usize, stride: usize) -> Self {
        MatrixMut { pointer, rows, cols, stride, life: PhantomData }
    }
}

/// `c = a · b`, plus the old `c` if `accumulate`, on all threads of the pool.
pub(crate) fn gemm<A: Float, B: Float, C: Float>(a: Matrix<A>, b: Matrix<B>, c: MatrixMut<C>, accumulate: bool) {
    let product = Product::new(a, b, c, accumulate);
    let (rows, cols) = product.block_size(rayon::current_num_threads());
    let (down, across) = (product.c.rows.div_ceil(rows), product.c.cols.div_ceil(cols));
    for_each_task(down * across, product.nanoseconds(), |task| {
        let (row, col) = (task / across * rows, task % across * cols);
        product.block(row..product.c.rows.min(row + rows), col..product.c.cols.min(col + cols));
    });
}

/// As [`gemm`], on the calling thread.
pub(crate) fn gemm_serial<A: Float, B: Float, C: Float>(a: Matrix<A>, b: Matrix<B>, c: MatrixMut<C>, accumulate: bool) {
    let product = Product::new(a, b, c, accumulate);
    let (rows, cols) = product.block_size(1);
    for row in (0..product.c.rows).step_by(rows) {
        for col in (0..product.c.cols).step_by(cols) {
            product.block(row..product.c.rows.min(row + rows), col..product.c.cols.min(col + cols));
        }
    }
}

/// A multiplication to be done.
struct Product<'a, A, B, C> {
    a: Matrix<'a, A>,
    b: Matrix<'a, B>,
    c: MatrixMut<'a, C>,
    accumulate: bool,
    kernel: &'static Microkernel,
}

thread_local! {
    static PACKED_A: Scratch = Scratch::default();
    static PACKED_B: Scratch = Scratch::default();
    static WIDE_C: Scratch = Scratch::default();
}

impl<'a, A: Float, B: Float, C: Float> Product<'a, A, B, C> {
    fn new(a: Matrix<'a, A>, b: Matrix<'a, B>, c: MatrixMut<'a, C>, accumulate: bool) -> Self {
        assert_eq!((a.rows, b.cols, a.cols), (c.rows, c.cols, b.rows), "shapes of a matrix product");
        Product { a, b, c, accumulate, kernel: Microkernel::detect() }
    }

    /// About how long it takes on one thread: 50 multiply-adds a nanosecond.
    fn nanoseconds(&self) -> usize {
        self.c.rows * self.c.cols * self.a.cols / 50
    }

    /// The rows and columns of the blocks that tasks compute: enough blocks to keep the threads busy, cut so that the
    /// least is packed. Blocks side by side pack the same of `a`, blocks below each other the same of `b`.
    fn block_size(&self, threads: usize) -> (usize, usize) {
        let (tile_rows, tile_cols) = (self.kernel.rows, self.kernel.cols);
        let (rows, cols) = (self.c.rows.max(1), self.c.cols.max(1));
        let (tiles_down, tiles_across) = (rows.div_ceil(tile_rows), cols.div_ceil(tile_cols));
        let a_is_packed = !self.reads_a_in_place();
        let down_min = rows.div_ceil(if a_is_packed { PACKED_ROWS } else { ROWS_IN_PLACE });
        let across_min = cols.div_ceil(PACKED_COLS);
        let wanted = match (threads, a_is_packed) {
            (1, _) => 1,
            (_, true) => 2 * threads,
            (_, false) => 8 * threads,
        };
        let packed = |down: usize, across: usize| if a_is_packed { across * rows } else { 0 } + down * cols;
        let grids = (down_min..=down_min.max(tiles_down.min(wanted)))
            .map(|down| (down, wanted.div_ceil(down).clamp(across_min, across_min.max(tiles_across))));
        let enough = |&(down, across): &(usize, usize)| (down * across < wanted, packed(down, across));
        let (down, across) = grids.min_by_key(enough).unwrap_or((down_min, across_min));
        (tiles_down.div_ceil(down) * tile_rows, tiles_across.div_ceil(across) * tile_cols)
    }

    /// Computes a block of `c`. Blocks that run at the same time must not overlap.
    fn block(&self, rows: Range<usize>, cols: Range<usize>) {
        let c = self.c.pointer.wrapping_add(rows.start * self.c.stride + cols.start);
        if C::DTYPE == crate::DType::F32 {
            self.sum(rows, cols, c.cast(), self.c.stride, self.accumulate);
            return;
        }
        with_scratch(&WIDE_C, rows.len() * cols.len(), |wide| {
            let line = |row: usize| {
                // SAFETY: a row of this block, which is ours alone.
                unsafe { std::slice::from_raw_parts_mut(c.add(row * self.c.stride), cols.len()) }
            };
            if self.accumulate {
                wide.chunks_exact_mut(cols.len()).enumerate().for_each(|(row, wide)| convert(line(row), wide));
            }
            self.sum(rows.clone(), cols.clone(), wide.as_mut_ptr(), cols.len(), self.accumulate);
            wide.chunks_exact(cols.len()).enumerate().for_each(|(row, wide)| convert(wide, line(row)));
        });
    }

    /// The block in f32, at `c`.
    fn sum(&self, rows: Range<usize>, cols: Range<usize>, c: *mut f32, c_stride: usize, accumulate: bool) {
        let depth = self.a.cols;
        if depth == 0 && !accumulate {
            // SAFETY: rows of this block.
            (0..rows.len()).for_each(|row| unsafe { c.add(row * c_stride).write_bytes(0, cols.len()) });
        }
        for start in (0..depth).step_by(DEPTH_BLOCK) {
            let depths = start..depth.min(start + DEPTH_BLOCK);
            let a = self.a.block(rows.clone(), depths.clone());
            let b = self.b.block(depths, cols.clone());
            self.with_a(a, |a| self.with_b(b, |b| self.tiles(&a, &b, c, c_stride, accumulate || start > 0)));
        }
    }

    /// Whether the microkernel reads `a` where it is: its rows lie in order of depth, or few columns profit from packing.
    fn reads_a_in_place(&self) -> bool {
        A::DTYPE == crate::DType::F32 && (self.a.col_stride == 1 || self.c.cols <= 2 * self.kernel.cols)
    }

    /// `a` as the microkernel reads it.
    fn with_a(&self, a: Matrix<A>, f: impl FnOnce(Operand)) {
        let width = self.kernel.rows;
        match a.as_f32() {
            Some(pointer) if self.reads_a_in_place() => f(Operand {
                pointer,
                lines: a.rows,
                depth: a.cols,
                panel_stride: width * a.row_stride,
                line_stride: a.row_stride,
                depth_stride: a.col_stride,
                is_packed: false,
            }),
            _ => with_scratch(&PACKED_A, a.rows.next_multiple_of(width) * a.cols, |panels| {
                pack(a, width, width, panels);
                f(Operand::packed(panels, a.rows, a.cols, width));
            }),
        }
    }

    /// `b` as the microkernel reads it: in place if its rows are whole vectors and few rows of `a` profit from packing.
    fn with_b(&self, b: Matrix<B>, f: impl FnOnce(Operand)) {
        let width = self.kernel.cols;
        match b.as_f32() {
            Some(pointer)
                if b.col_stride == 1
                    && b.cols.is_multiple_of(self.kernel.lanes)
                    && self.c.rows <= 8 * self.kernel.rows =>
            {
                f(Operand {
                    pointer,
                    lines: b.cols,
                    depth: b.rows,
                    panel_stride: width,
                    line_stride: 1,
                    depth_stride: b.row_stride,
                    is_packed: false,
                });
            }
            _ => with_scratch(&PACKED_B, b.cols.next_multiple_of(self.kernel.lanes) * b.rows, |panels| {
                pack(b.transposed(), width, self.kernel.lanes, panels);
                f(Operand::packed(panels, b.cols, b.rows, width));
            }),
        }
    }

    fn tiles(&self, a: &Operand, b: &Operand, c: *mut f32, c_stride: usize, accumulate: bool) {
        let (tile_rows, tile_cols, lanes) = (self.kernel.rows, self.kernel.cols, self.kernel.lanes);
        for col in (0..b.lines).step_by(tile_cols) {
            for row in (0..a.lines).step_by(tile_rows) {
                let tile = Tile {
                    depth: a.depth,
                    rows: tile_rows.min(a.lines - row),
                    cols: tile_cols.min(b.lines - col),
                    a: a.pointer.wrapping_add(row / tile_rows * a.panel_stride),
                    a_row_stride: a.line_stride,
                    a_depth_stride: a.depth_stride,
                    b: b.pointer.wrapping_add(col / tile_cols * b.panel_stride),
                    b_depth_stride: if b.is_packed {
                        tile_cols.min((b.lines - col).next_multiple_of(lanes))
                    } else {
                        b.depth_stride
                    },
                    c: c.wrapping_add(row * c_stride + col),
                    c_stride,
                    accumulate,
                };
                // SAFETY: operands cover the tile's rows, columns and depth, `b` in whole vectors (packed panels are
                // filled up; in place they are whole); the block of `c` is ours alone.
                unsafe { self.kernel.run(&tile) }
            }
        }
    }
}

/// An operand in panels of lines (rows of `a`, columns of `b`).
struct Operand {
    pointer: *const f32,
    lines: usize,
    depth: usize,
    panel_stride: usize,
    line_stride: usize,
    depth_stride: usize,
    is_packed: bool,
}

impl Operand {
    fn packed(panels: &[f32], lines: usize, depth: usize, width: usize) -> Self {
        let pointer = panels.as_ptr();
        Operand {
            pointer,
            lines,
            depth,
            panel_stride: width * depth,
            line_stride: 1,
            depth_stride: width,
            is_packed: true,
        }
    }
}

#[cfg(test)]
mod tests;
