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

/// The most rows and columns of a block of a product that one thread computes alone.
const SERIAL_ROWS: usize = 516;
const SERIAL_COLS: usize = 512;

/// The most rows or columns that are multiplied with a packed piece of the other operand before it is packed anew, which
/// costs nothing worth mentioning beside so many.
const LINES_PER_PIECE: usize = 4096;

/// Rows of tiles in a block, so that with [`DEPTH_BLOCK`] the operands of a block stay in a core's second-level cache.
const TILES_DOWN: usize = 8;
/// Likewise columns of tiles in a piece of the right operand.
const TILES_ACROSS: usize = 4;

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
    if product.nanoseconds() < INLINE_WORK {
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
        for rows in ranges(0..self.c.rows, SERIAL_ROWS) {
            for cols in ranges(0..self.c.cols, SERIAL_COLS) {
                self.sum(rows.clone(), cols.clone(), |depths, add| {
                    self.with_a(rows.clone(), depths.clone(), |a| self.with_b(cols.clone(), depths, |b| add(&a, &b)));
                });
            }
        }
    }

    /// On all threads. Of two operands that must be packed, the smaller one is packed by all together beforehand, and read
    /// by every task; the larger one, or the only one, piece by piece by whoever multiplies with a piece, so that it goes
    /// through that core's cache and nowhere else.
    fn parallel(&self) {
        let (packs_a, packs_b) = (!self.reads_a_in_place(), !self.reads_b_in_place());
        let pieces_of_a = packs_a && (!packs_b || self.c.rows > self.c.cols);
        let pieces_of_b = packs_b && !pieces_of_a;
        let stripe = |shared: bool, lines: usize, width: usize| {
            if shared { (SHARED_FLOATS / self.a.cols.max(1)).max(1).next_multiple_of(width) } else { lines.max(1) }
        };
        for rows in ranges(0..self.c.rows, stripe(packs_a && !pieces_of_a, self.c.rows, self.kernel.rows)) {
            self.share_a(rows.clone(), pieces_of_a, |a| {
                for cols in ranges(0..self.c.cols, stripe(packs_b && !pieces_of_b, self.c.cols, self.kernel.cols)) {
                    self.share_b(cols.clone(), pieces_of_b, |b| self.multiply(a, b, rows.clone(), cols));
                }
            });
        }
    }

    /// `rows` and `cols` of the product on all threads. An operand that is not given is packed by the tasks.
    fn multiply(&self, a: Option<&Operand>, b: Option<&Operand>, rows: Range<usize>, cols: Range<usize>) {
        let (task_rows, task_cols) = self.task_size(a.is_none(), b.is_none(), rows.len(), cols.len());
        let (down, across) = (rows.len().div_ceil(task_rows), cols.len().div_ceil(task_cols));
        for_each_task(down * across, self.nanoseconds(), |task| {
            // One below the other, which read the same of `b`.
            let (row, col) = (rows.start + task % down * task_rows, cols.start + task / down * task_cols);
            let (rows, cols) = (row..rows.end.min(row + task_rows), col..cols.end.min(col + task_cols));
            self.sum(rows.clone(), cols.clone(), |depths, add| match (a, b) {
                (Some(a), Some(b)) => add(a, b),
                (None, Some(b)) => self.with_a(rows.clone(), depths, |a| add(&a, b)),
                (Some(a), None) => self.with_b(cols.clone(), depths, |b| add(a, &b)),
                (None, None) => unreachable!("at most one operand is packed by the tasks"),
            });
        });
    }

    /// Rows and columns of a task: a piece of what is packed by tasks with all there is of the other operand, as long as
    /// there are tasks for all threads, even if some are late.
    fn task_size(&self, pieces_of_a: bool, pieces_of_b: bool, rows: usize, cols: usize) -> (usize, usize) {
        let (tile_rows, tile_cols) = (self.kernel.rows, self.kernel.cols);
        let mut size = [TILES_DOWN * tile_rows, TILES_ACROSS * tile_cols];
        let mut least = [tile_rows, tile_cols];
        if pieces_of_a {
            (size[1], least) = (cols.min(LINES_PER_PIECE).next_multiple_of(tile_cols), [2 * tile_rows, 8 * tile_cols]);
        }
        if pieces_of_b {
            (size[0], least) = (rows.min(LINES_PER_PIECE).next_multiple_of(tile_rows), [16 * tile_rows, tile_cols]);
        }
        // Pieces become narrower before they are packed several times.
        let order = if pieces_of_a { [(0, tile_rows), (1, tile_cols)] } else { [(1, tile_cols), (0, tile_rows)] };
        let wanted = 8 * rayon::current_num_threads();
        for (axis, tile) in order {
            while rows.div_ceil(size[0]) * cols.div_ceil(size[1]) < wanted && size[axis] > least[axis] {
                size[axis] = (size[axis] / 2).next_multiple_of(tile);
            }
        }
        (size[0], size[1])
    }

    /// Computes a block of `c`: `runs` is called with each run of depths, and calls what adds the product of the operands it
    /// has for them. Blocks that run at the same time must not overlap.
    fn sum(&self, rows: Range<usize>, cols: Range<usize>, runs: impl Fn(Range<usize>, &mut AddProduct)) {
        let c = self.c.pointer.wrapping_add(rows.start * self.c.stride + cols.start);
        if C::DTYPE == crate::DType::F32 {
            self.sum_at(&Block { rows, cols, c: c.cast(), stride: self.c.stride }, runs);
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
            let block = Block { rows, cols: cols.clone(), c: wide.as_mut_ptr(), stride: cols.len() };
            self.sum_at(&block, runs);
            wide.chunks_exact(cols.len()).enumerate().for_each(|(row, wide)| convert(wide, line(row)));
        });
    }

    fn sum_at(&self, block: &Block, runs: impl Fn(Range<usize>, &mut AddProduct)) {
        if self.a.cols == 0 && !self.accumulate {
            let row = |row: usize| block.c.wrapping_add(row * block.stride);
            // SAFETY: rows of this block.
            (0..block.rows.len()).for_each(|index| unsafe { row(index).write_bytes(0, block.cols.len()) });
        }
        for depths in ranges(0..self.a.cols, DEPTH_BLOCK) {
            let accumulate = self.accumulate || depths.start > 0;
            runs(depths.clone(), &mut |a, b| self.tiles(a, b, block, &depths, accumulate));
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

    fn a_in_place(&self) -> Option<Operand> {
        let pointer = self.a.as_f32().filter(|_| self.reads_a_in_place())?;
        Some(Operand { pointer, order: Order::InPlace { line: self.a.row_stride, depth: self.a.col_stride } })
    }

    fn b_in_place(&self) -> Option<Operand> {
        let pointer = self.b.as_f32().filter(|_| self.reads_b_in_place())?;
        Some(Operand { pointer, order: Order::InPlace { line: 1, depth: self.b.row_stride } })
    }

    /// Some rows and depths of `a` as the microkernel reads them, packed by this thread if need be.
    fn with_a(&self, rows: Range<usize>, depths: Range<usize>, f: impl FnOnce(Operand)) {
        let width = self.kernel.rows;
        match self.a_in_place() {
            Some(operand) => f(operand),
            None => with_scratch(&PACKED_A, rows.len().next_multiple_of(width) * depths.len(), |panels| {
                pack(self.a.block(rows.clone(), depths.clone()), width, width, panels);
                f(Operand::packed(panels, rows, depths, width, width));
            }),
        }
    }

    /// Likewise columns and depths of `b`.
    fn with_b(&self, cols: Range<usize>, depths: Range<usize>, f: impl FnOnce(Operand)) {
        let (width, lanes) = (self.kernel.cols, self.kernel.lanes);
        match self.b_in_place() {
            Some(operand) => f(operand),
            None => with_scratch(&PACKED_B, cols.len().next_multiple_of(lanes) * depths.len(), |panels| {
                pack(self.b.block(depths.clone(), cols.clone()).transposed(), width, lanes, panels);
                f(Operand::packed(panels, cols, depths, width, lanes));
            }),
        }
    }

    /// Some rows of `a` at all depths, packed by all threads if need be; nothing where the tasks pack pieces of it.
    fn share_a(&self, rows: Range<usize>, in_pieces: bool, f: impl FnOnce(Option<&Operand>)) {
        let (width, depths) = (self.kernel.rows, 0..self.a.cols);
        match self.a_in_place() {
            _ if in_pieces => f(None),
            Some(operand) => f(Some(&operand)),
            None => SHARED_A.with(rows.len().next_multiple_of(width) * depths.len(), |panels| {
                pack_parallel(self.a.block(rows.clone(), depths.clone()), width, width, panels);
                f(Some(&Operand::packed(panels, rows, depths, width, width)));
            }),
        }
    }

    /// Likewise some columns of `b`.
    fn share_b(&self, cols: Range<usize>, in_pieces: bool, f: impl FnOnce(Option<&Operand>)) {
        let (width, lanes, depths) = (self.kernel.cols, self.kernel.lanes, 0..self.b.rows);
        match self.b_in_place() {
            _ if in_pieces => f(None),
            Some(operand) => f(Some(&operand)),
            None => SHARED_B.with(cols.len().next_multiple_of(lanes) * depths.len(), |panels| {
                pack_parallel(self.b.block(depths.clone(), cols.clone()).transposed(), width, lanes, panels);
                f(Some(&Operand::packed(panels, cols, depths, width, lanes)));
            }),
        }
    }

    /// Adds to a block, or writes, the product of some depths of the operands.
    fn tiles(&self, a: &Operand, b: &Operand, block: &Block, depths: &Range<usize>, accumulate: bool) {
        for rows in ranges(block.rows.clone(), TILES_DOWN * self.kernel.rows) {
            for tile_cols in ranges(block.cols.clone(), self.kernel.cols) {
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
                        c: block.address(tile_rows.start, tile_cols.start),
                        c_stride: block.stride,
                        accumulate,
                    };
                    // SAFETY: operands cover the tile's rows, columns and depth, `b` in whole vectors (packed panels are
                    // filled up; in place they are whole); the block of `c` is ours alone.
                    unsafe { self.kernel.run(&tile) }
                }
            }
        }
    }
}

/// A block of the product in f32, exclusive to who computes it.
struct Block {
    rows: Range<usize>,
    cols: Range<usize>,
    /// Of its first element.
    c: *mut f32,
    /// Elements from row to row.
    stride: usize,
}

impl Block {
    /// The address of an element of the product that lies in the block.
    fn address(&self, row: usize, col: usize) -> *mut f32 {
        self.c.wrapping_add((row - self.rows.start) * self.stride + col - self.cols.start)
    }
}

/// Adds the product of two operands to a block.
type AddProduct<'f> = dyn FnMut(&Operand, &Operand) + 'f;

/// `range` in pieces of `length`.
fn ranges(range: Range<usize>, length: usize) -> impl Iterator<Item = Range<usize>> {
    let end = range.end;
    range.step_by(length).map(move |start| start..end.min(start + length))
}

/// Lines of an operand (rows of `a`, columns of `b`), or some of them at some depths.
struct Operand {
    pointer: *const f32,
    order: Order,
}

enum Order {
    /// All of it, where the matrix is: elements between lines and between depths.
    InPlace { line: usize, depth: usize },
    /// `lines` at `depths`, in panels of `width` lines, of which the last is as wide as whole `grain`s must be.
    Packed { lines: Range<usize>, depths: Range<usize>, width: usize, grain: usize },
}

// SAFETY: it is only read, for as long as what it points to is borrowed by who made it.
unsafe impl Sync for Operand {}

impl Operand {
    fn packed(panels: &[f32], lines: Range<usize>, depths: Range<usize>, width: usize, grain: usize) -> Self {
        Operand { pointer: panels.as_ptr(), order: Order::Packed { lines, depths, width, grain } }
    }

    /// The address of an element, the first of a panel, and the elements from it to the next line and the next depth.
    fn at(&self, line: usize, depth: usize) -> (*const f32, usize, usize) {
        match &self.order {
            Order::InPlace { line: line_stride, depth: depth_stride } => {
                (self.pointer.wrapping_add(line * line_stride + depth * depth_stride), *line_stride, *depth_stride)
            }
            Order::Packed { lines, depths, width, grain } => {
                debug_assert!(lines.contains(&line) && depths.contains(&depth));
                debug_assert!((line - lines.start).is_multiple_of(*width));
                let width_here = (*width).min((lines.end - line).next_multiple_of(*grain));
                let panel = (line - lines.start) * depths.len();
                (self.pointer.wrapping_add(panel + (depth - depths.start) * width_here), 1, width_here)
            }
        }
    }
}

#[cfg(test)]
mod tests;
