//! Matrix multiplication, of any strides and of f32 and bf16 in any mixture, accumulated in f32.
//!
//! The scheme is Goto's: blocks of the operands are packed into the order in which a register-sized microkernel reads
//! them, which is also where bf16 becomes f32. An element of the product is summed in order of depth, in runs of
//! [`DEPTH_BLOCK`]; nothing else decides its bits, so the rows and columns can be dealt out to threads at will.

mod microkernel;
mod pack;
mod prepared;

use std::marker::PhantomData;
use std::ops::Range;

use microkernel::{Microkernel, Tile};
use pack::{pack, pack_parallel};
pub(crate) use prepared::{Prepared, gemm_prepared};

use crate::float::Float;
use crate::parallel::{INLINE_WORK, Scratch, SharedScratch, for_each_task, with_scratch};
use crate::simd::convert;
use crate::{View, ViewMut};

/// Products summed before the sum is added to the result; part of what a product's bits are.
const DEPTH_BLOCK: usize = 512;

/// The most rows and columns of a block that one thread computes, so that with [`DEPTH_BLOCK`] its operands stay in a
/// core's cache. Rows that are not packed are cheap to have many of.
const PACKED_ROWS: usize = 516;
const PACKED_COLS: usize = 512;
const ROWS_IN_PLACE: usize = 1024;

/// The most of an operand that is packed for all threads at a time: 16 MiB.
const SHARED_FLOATS: usize = 4 << 20;

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
    if rayon::current_num_threads() == 1 || product.nanoseconds() < INLINE_WORK {
        product.serial();
    } else {
        product.parallel();
    }
}

/// As [`gemm`], on the calling thread.
pub(crate) fn gemm_serial<A: Float, B: Float, C: Float>(a: Matrix<A>, b: Matrix<B>, c: MatrixMut<C>, accumulate: bool) {
    Product::new(a, b, c, accumulate).serial();
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

static SHARED_A: SharedScratch = SharedScratch::new();
static SHARED_B: SharedScratch = SharedScratch::new();

impl<'a, A: Float, B: Float, C: Float> Product<'a, A, B, C> {
    fn new(a: Matrix<'a, A>, b: Matrix<'a, B>, c: MatrixMut<'a, C>, accumulate: bool) -> Self {
        assert_eq!((a.rows, b.cols, a.cols), (c.rows, c.cols, b.rows), "shapes of a matrix product");
        Product { a, b, c, accumulate, kernel: Microkernel::detect() }
    }

    /// About how long it takes on one thread: 50 multiply-adds a nanosecond.
    fn nanoseconds(&self) -> usize {
        self.c.rows * self.c.cols * self.a.cols / 50
    }

    /// Block by block, each packing what it reads.
    fn serial(&self) {
        let (rows, cols) = (if self.reads_a_in_place() { ROWS_IN_PLACE } else { PACKED_ROWS }, PACKED_COLS);
        for rows in ranges(0..self.c.rows, rows) {
            for cols in ranges(0..self.c.cols, cols) {
                self.sum(rows.clone(), cols.clone(), |depths, add| {
                    let a = self.a.block(rows.clone(), depths.clone());
                    let b = self.b.block(depths.clone(), cols.clone());
                    self.with_a(a, |a| self.with_b(b, |b| add(&a, &b, 0..rows.len(), 0..cols.len(), 0..depths.len())));
                });
            }
        }
    }

    /// All threads pack, then all multiply: nothing is packed twice, and the pieces of the product that are dealt out are
    /// so small that no thread waits long for the last.
    fn parallel(&self) {
        let depth = self.a.cols.max(1);
        let stripe = |in_place: bool, lines: usize, width: usize| {
            if in_place { lines.max(1) } else { (SHARED_FLOATS / depth).max(1).next_multiple_of(width) }
        };
        let rows = stripe(self.reads_a_in_place(), self.c.rows, self.kernel.rows);
        let cols = stripe(self.reads_b_in_place(), self.c.cols, self.kernel.cols);
        for rows in ranges(0..self.c.rows, rows) {
            let a = self.a.block(rows.clone(), 0..self.a.cols);
            self.share_a(a, |a| {
                for cols in ranges(0..self.c.cols, cols) {
                    let b = self.b.block(0..self.b.rows, cols.clone());
                    self.share_b(b, |b| self.multiply(a, b, rows.clone(), cols));
                }
            });
        }
    }

    /// `rows` and `cols` of the product on all threads, from all of what their operands hold.
    fn multiply(&self, a: &Operand, b: &Operand, rows: Range<usize>, cols: Range<usize>) {
        let (mut task_rows, mut task_cols) = (8 * self.kernel.rows, 4 * self.kernel.cols);
        let tasks = |task_rows, task_cols| rows.len().div_ceil(task_rows) * cols.len().div_ceil(task_cols);
        let wanted = 8 * rayon::current_num_threads();
        while tasks(task_rows, task_cols) < wanted && task_cols > self.kernel.cols {
            task_cols /= 2;
        }
        while tasks(task_rows, task_cols) < wanted && task_rows > self.kernel.rows {
            task_rows /= 2;
        }
        let down = rows.len().div_ceil(task_rows);
        for_each_task(tasks(task_rows, task_cols), self.nanoseconds(), |task| {
            // One below the other, which read the same of `b`.
            let (row, col) = (task % down * task_rows, task / down * task_cols);
            let (task_rows, task_cols) = (row..rows.len().min(row + task_rows), col..cols.len().min(col + task_cols));
            let of_c = |range: &Range<usize>, start: usize| start + range.start..start + range.end;
            self.sum(of_c(&task_rows, rows.start), of_c(&task_cols, cols.start), |depths, add| {
                add(a, b, task_rows.clone(), task_cols.clone(), depths);
            });
        });
    }

    /// Computes a block of `c`: `runs` is called with each run of depths, and calls what adds the product of some rows,
    /// columns and depths of two operands. Blocks that run at the same time must not overlap.
    fn sum(&self, rows: Range<usize>, cols: Range<usize>, runs: impl Fn(Range<usize>, &mut AddProduct)) {
        let c = self.c.pointer.wrapping_add(rows.start * self.c.stride + cols.start);
        if C::DTYPE == crate::DType::F32 {
            self.sum_at(rows.len(), cols.len(), c.cast(), self.c.stride, runs);
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
            self.sum_at(rows.len(), cols.len(), wide.as_mut_ptr(), cols.len(), runs);
            wide.chunks_exact(cols.len()).enumerate().for_each(|(row, wide)| convert(wide, line(row)));
        });
    }

    /// The block in f32, at `c`.
    fn sum_at(
        &self,
        rows: usize,
        cols: usize,
        c: *mut f32,
        c_stride: usize,
        runs: impl Fn(Range<usize>, &mut AddProduct),
    ) {
        if self.a.cols == 0 && !self.accumulate {
            // SAFETY: rows of this block.
            (0..rows).for_each(|row| unsafe { c.add(row * c_stride).write_bytes(0, cols) });
        }
        for depths in ranges(0..self.a.cols, DEPTH_BLOCK) {
            let accumulate = self.accumulate || depths.start > 0;
            runs(depths, &mut |a, b, rows, cols, depths| {
                self.tiles(a, b, rows, cols, depths, c, c_stride, accumulate);
            });
        }
    }

    /// Whether the microkernel reads `a` where it is: its rows lie in order of depth, or few columns profit from packing.
    fn reads_a_in_place(&self) -> bool {
        A::DTYPE == crate::DType::F32 && (self.a.col_stride == 1 || self.c.cols <= 2 * self.kernel.cols)
    }

    /// Whether it reads `b` where it is: its rows are whole vectors, and few rows of `a` profit from packing.
    fn reads_b_in_place(&self) -> bool {
        B::DTYPE == crate::DType::F32
            && self.b.col_stride == 1
            && self.c.cols.is_multiple_of(self.kernel.lanes)
            && self.c.rows <= 8 * self.kernel.rows
    }

    fn a_in_place(&self, a: &Matrix<A>) -> Option<Operand> {
        let pointer = a.as_f32().filter(|_| self.reads_a_in_place())?;
        Some(Operand { pointer, lines: a.rows, order: Order::InPlace { line: a.row_stride, depth: a.col_stride } })
    }

    fn b_in_place(&self, b: &Matrix<B>) -> Option<Operand> {
        let pointer = b.as_f32().filter(|_| self.reads_b_in_place())?;
        Some(Operand { pointer, lines: b.cols, order: Order::InPlace { line: 1, depth: b.row_stride } })
    }

    /// `a` as the microkernel reads it, packed by this thread if need be.
    fn with_a(&self, a: Matrix<A>, f: impl FnOnce(Operand)) {
        let width = self.kernel.rows;
        match self.a_in_place(&a) {
            Some(operand) => f(operand),
            None => with_scratch(&PACKED_A, a.rows.next_multiple_of(width) * a.cols, |panels| {
                pack(a, width, width, panels);
                f(Operand::packed(panels, a.rows, a.cols, width, width));
            }),
        }
    }

    /// Likewise `b`.
    fn with_b(&self, b: Matrix<B>, f: impl FnOnce(Operand)) {
        let (width, lanes) = (self.kernel.cols, self.kernel.lanes);
        match self.b_in_place(&b) {
            Some(operand) => f(operand),
            None => with_scratch(&PACKED_B, b.cols.next_multiple_of(lanes) * b.rows, |panels| {
                pack(b.transposed(), width, lanes, panels);
                f(Operand::packed(panels, b.cols, b.rows, width, lanes));
            }),
        }
    }

    /// As [`Product::with_a`], packed by all threads.
    fn share_a(&self, a: Matrix<A>, f: impl FnOnce(&Operand)) {
        let width = self.kernel.rows;
        match self.a_in_place(&a) {
            Some(operand) => f(&operand),
            None => SHARED_A.with(a.rows.next_multiple_of(width) * a.cols, |panels| {
                pack_parallel(a, width, width, panels);
                f(&Operand::packed(panels, a.rows, a.cols, width, width));
            }),
        }
    }

    /// Likewise `b`.
    fn share_b(&self, b: Matrix<B>, f: impl FnOnce(&Operand)) {
        let (width, lanes) = (self.kernel.cols, self.kernel.lanes);
        match self.b_in_place(&b) {
            Some(operand) => f(&operand),
            None => SHARED_B.with(b.cols.next_multiple_of(lanes) * b.rows, |panels| {
                pack_parallel(b.transposed(), width, lanes, panels);
                f(&Operand::packed(panels, b.cols, b.rows, width, lanes));
            }),
        }
    }

    #[expect(clippy::too_many_arguments, reason = "two operands, a part of them, and where it goes")]
    fn tiles(
        &self,
        a: &Operand,
        b: &Operand,
        rows: Range<usize>,
        cols: Range<usize>,
        depths: Range<usize>,
        c: *mut f32,
        c_stride: usize,
        accumulate: bool,
    ) {
        for tile_cols in ranges(cols.clone(), self.kernel.cols) {
            let (b, _, b_depth_stride) = b.at(tile_cols.start, depths.start);
            for tile_rows in ranges(rows.clone(), self.kernel.rows) {
                let (a, a_row_stride, a_depth_stride) = a.at(tile_rows.start, depths.start);
                let tile = Tile {
                    depth: depths.len(),
                    rows: tile_rows.len(),
                    cols: tile_cols.len(),
                    a,
                    a_row_stride,
                    a_depth_stride,
                    b,
                    b_depth_stride,
                    c: c.wrapping_add((tile_rows.start - rows.start) * c_stride + tile_cols.start - cols.start),
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

/// Adds the product of rows, columns and depths of two operands to a block.
type AddProduct<'f> = dyn FnMut(&Operand, &Operand, Range<usize>, Range<usize>, Range<usize>) + 'f;

/// `range` in pieces of `length`.
fn ranges(range: Range<usize>, length: usize) -> impl Iterator<Item = Range<usize>> {
    let end = range.end;
    range.step_by(length).map(move |start| start..end.min(start + length))
}

/// Lines of an operand (rows of `a`, columns of `b`).
struct Operand {
    pointer: *const f32,
    lines: usize,
    order: Order,
}

enum Order {
    /// Where the matrix is: elements between lines and between depths.
    InPlace { line: usize, depth: usize },
    /// In panels of `width` lines, `panel` elements apart, of which the last is as wide as whole `grain`s must be.
    Packed { width: usize, grain: usize, panel: usize },
}

// SAFETY: it is only read, for as long as what it points to is borrowed by who made it.
unsafe impl Sync for Operand {}

impl Operand {
    fn packed(panels: &[f32], lines: usize, depth: usize, width: usize, grain: usize) -> Self {
        let order = Order::Packed { width, grain, panel: width * depth };
        Operand { pointer: panels.as_ptr(), lines, order }
    }

    /// The address of an element, the first of a panel, and the elements from it to the next line and the next depth.
    fn at(&self, line: usize, depth: usize) -> (*const f32, usize, usize) {
        match self.order {
            Order::InPlace { line: line_stride, depth: depth_stride } => {
                (self.pointer.wrapping_add(line * line_stride + depth * depth_stride), line_stride, depth_stride)
            }
            Order::Packed { width, grain, panel } => {
                debug_assert!(line.is_multiple_of(width) && line < self.lines);
                let width_here = width.min((self.lines - line).next_multiple_of(grain));
                (self.pointer.wrapping_add(line / width * panel + depth * width_here), 1, width_here)
            }
        }
    }
}

#[cfg(test)]
mod tests;
