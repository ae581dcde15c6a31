//! Work spread over the calling thread's rayon pool, and the memory that tasks write to and compute in.
//!
//! Whoever computes a task, its result is the same; reductions over rows run in [blocks](for_each_row_block) that do not
//! depend on the number of threads. So the bits of a result never do.

use std::cell::RefCell;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};
use std::thread::LocalKey;

use rayon::prelude::*;

use crate::pool::Line;
use crate::{Element, ViewMut};

/// Work below this runs on the calling thread: handing it out costs 5–10 µs. The unit is about a nanosecond.
pub(crate) const INLINE_WORK: usize = 20_000;

/// Runs `task(0)`, `task(1)`, … `task(count - 1)`, in any order and in parallel if it is worth it. `work` is about the
/// nanoseconds that all of it takes on one thread.
pub(crate) fn for_each_task(count: usize, work: usize, task: impl Fn(usize) + Sync + Send) {
    if count <= 1 || work < INLINE_WORK || rayon::current_num_threads() == 1 {
        (0..count).for_each(task);
    } else {
        (0..count).into_par_iter().with_max_len(count.div_ceil(64)).for_each(task);
    }
}

/// Cuts `0..rows` into blocks that depend on nothing but the arguments, and runs `task(block number, rows)` for each.
/// `row_work` is about the nanoseconds that a row takes.
pub(crate) fn for_each_row_block(
    rows: usize,
    block: usize,
    row_work: usize,
    task: impl Fn(usize, Range<usize>) + Sync + Send,
) {
    for_each_task(rows.div_ceil(block), rows * row_work, |index| {
        task(index, index * block..rows.min((index + 1) * block));
    });
}

/// Sets all bytes to zero.
pub(crate) fn fill_zero(bytes: &mut [u8]) {
    const BLOCK: usize = 1 << 20;
    if bytes.len() <= BLOCK {
        bytes.fill(0);
    } else {
        bytes.par_chunks_mut(BLOCK).for_each(|block| block.fill(0));
    }
}

/// Rows in a block of an elementwise operation with rows of `cols` elements.
pub(crate) fn rows_per_task(cols: usize) -> usize {
    (16_384 / cols.max(1)).max(1)
}

/// A rectangle that several tasks write, each its own rows or columns of it.
pub(crate) struct SharedMut<'a, T> {
    pointer: *mut T,
    rows: usize,
    cols: usize,
    stride: usize,
    life: PhantomData<&'a mut [T]>,
}

// SAFETY: elements are only reached through the unsafe methods, whose callers promise not to overlap.
unsafe impl<T: Send> Sync for SharedMut<'_, T> {}
// SAFETY: it is an exclusive borrow of the elements.
unsafe impl<T: Send> Send for SharedMut<'_, T> {}

impl<'a, T: Element> SharedMut<'a, T> {
    pub(crate) fn new(view: ViewMut<'a>) -> Self {
        let (rows, cols, stride) = (view.rows(), view.cols(), view.stride());
        SharedMut { pointer: view.as_mut_ptr(), rows, cols, stride, life: PhantomData }
    }

    /// Columns `columns` of row `row`.
    ///
    /// # Safety
    /// Nobody else may have these elements while the slice lives.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn row(&self, row: usize, columns: Range<usize>) -> &mut [T] {
        assert!(row < self.rows && columns.start <= columns.end && columns.end <= self.cols);
        // SAFETY: inside the rectangle, which is borrowed exclusively; the caller keeps others away.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.add(row * self.stride + columns.start), columns.len()) }
    }

    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    pub(crate) fn stride(&self) -> usize {
        self.stride
    }

    /// The address of an element.
    pub(crate) fn address(&self, row: usize, column: usize) -> *mut T {
        assert!(row < self.rows && column < self.cols);
        self.pointer.wrapping_add(row * self.stride + column)
    }
}

/// Memory of a thread that its tasks compute in, kept from task to task.
#[derive(Default)]
pub(crate) struct Scratch(RefCell<Vec<Line>>);

/// Runs `f` with `length` floats of left-over contents, aligned to cache lines. `f` must not wait for other tasks of the
/// pool: the thread might take up another task that wants the same scratch.
pub(crate) fn with_scratch<R>(key: &'static LocalKey<Scratch>, length: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    key.with(|scratch| {
        let mut lines = scratch.0.borrow_mut();
        let wanted = length.div_ceil(size_of::<Line>() / size_of::<f32>());
        if lines.len() < wanted {
            lines.resize(wanted, bytemuck::Zeroable::zeroed());
        }
        f(&mut bytemuck::cast_slice_mut(&mut lines[..wanted])[..length])
    })
}

/// Memory that the tasks of an operation share, kept from operation to operation. Unlike [`Scratch`] it may be used by
/// who waits for tasks.
pub(crate) struct SharedScratch(Mutex<Vec<Vec<Line>>>);

impl SharedScratch {
    pub(crate) const fn new() -> Self {
        SharedScratch(Mutex::new(Vec::new()))
    }

    /// Runs `f` with `length` floats of left-over contents, aligned to cache lines.
    pub(crate) fn with<R>(&self, length: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
        let kept = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut lines = kept().pop().unwrap_or_default();
        let wanted = length.div_ceil(size_of::<Line>() / size_of::<f32>());
        if lines.len() < wanted {
            lines.resize(wanted, bytemuck::Zeroable::zeroed());
        }
        let result = f(&mut bytemuck::cast_slice_mut(&mut lines[..wanted])[..length]);
        kept().push(lines);
        result
    }
}
