//! Tensors own device memory; views name a rectangle of it.

use std::marker::PhantomData;
use std::ops::Range;

use half::bf16;

use crate::Device;
use crate::pool::Block;

/// The type of a tensor's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    F32,
    Bf16,
    U32,
}

impl DType {
    pub fn bytes(self) -> usize {
        match self {
            DType::F32 | DType::U32 => 4,
            DType::Bf16 => 2,
        }
    }
}

/// A Rust type that a tensor can hold.
pub trait Element: bytemuck::Pod + Send + Sync {
    const DTYPE: DType;
}

impl Element for f32 {
    const DTYPE: DType = DType::F32;
}
impl Element for bf16 {
    const DTYPE: DType = DType::Bf16;
}
impl Element for u32 {
    const DTYPE: DType = DType::U32;
}

/// A `[rows, cols]` matrix in device memory, row-major and without gaps.
pub struct Tensor {
    device: Device,
    block: Block,
    dtype: DType,
    rows: usize,
    cols: usize,
}

impl Tensor {
    pub(crate) fn new(device: Device, block: Block, dtype: DType, rows: usize, cols: usize) -> Self {
        Tensor { device, block, dtype, rows, cols }
    }

    pub fn device(&self) -> &Device {
        &self.device
    }

    pub fn dtype(&self) -> DType {
        self.dtype
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn cols(&self) -> usize {
        self.cols
    }

    pub fn view(&self) -> View<'_> {
        View {
            device: &self.device,
            address: self.block.address(),
            dtype: self.dtype,
            rows: self.rows,
            cols: self.cols,
            stride: self.cols,
            life: PhantomData,
        }
    }

    pub fn view_mut(&mut self) -> ViewMut<'_> {
        ViewMut { view: self.view(), life: PhantomData }
    }

    /// The elements in order, where the host can reach them.
    pub fn as_slice<T: Element>(&self) -> &[T] {
        self.view().as_slice()
    }

    /// As [`Tensor::as_slice`], for writing.
    pub fn as_mut_slice<T: Element>(&mut self) -> &mut [T] {
        self.view_mut().into_slice()
    }
}

/// A rectangle of a tensor: `rows` rows of `cols` elements that begin `stride` elements apart.
#[derive(Clone, Copy)]
pub struct View<'a> {
    device: &'a Device,
    /// Of the first element, in the device's address space.
    address: usize,
    dtype: DType,
    rows: usize,
    cols: usize,
    stride: usize,
    life: PhantomData<&'a [u8]>,
}

impl<'a> View<'a> {
    pub fn device(&self) -> &'a Device {
        self.device
    }

    pub fn dtype(&self) -> DType {
        self.dtype
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Elements between the beginnings of two rows.
    pub fn stride(&self) -> usize {
        self.stride
    }

    pub fn columns(self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.cols, "columns {range:?} of {}", self.cols);
        View { address: self.address + range.start * self.dtype.bytes(), cols: range.len(), ..self }
    }

    pub fn rows_range(self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.rows, "rows {range:?} of {}", self.rows);
        View { address: self.address + range.start * self.stride * self.dtype.bytes(), rows: range.len(), ..self }
    }

    /// Elements `range` of a view without gaps, as a `[rows, cols]` matrix.
    pub fn reshape(self, offset: usize, rows: usize, cols: usize) -> Self {
        assert!(self.is_contiguous(), "reshape of a view with gaps");
        assert!(offset + rows * cols <= self.rows * self.cols, "reshape beyond the end");
        View { address: self.address + offset * self.dtype.bytes(), rows, cols, stride: cols, ..self }
    }

    fn is_contiguous(&self) -> bool {
        self.stride == self.cols || self.rows <= 1
    }

    /// The elements of a view without gaps, where the host can reach them.
    pub fn as_slice<T: Element>(&self) -> &'a [T] {
        assert!(self.is_contiguous(), "slice of a view with gaps");
        assert_eq!(self.dtype, T::DTYPE);
        let Device::Cpu(_) = self.device;
        // SAFETY: a view is only made from a tensor borrowed for 'a, and stays inside it; the memory was initialised
        // when the pool allocated it, blocks are aligned for every element type, and offsets are whole elements.
        unsafe { std::slice::from_raw_parts(self.address as *const T, self.rows * self.cols) }
    }

    /// One row, where the host can reach it.
    pub fn row<T: Element>(&self, index: usize) -> &'a [T] {
        self.rows_range(index..index + 1).as_slice()
    }

    pub(crate) fn as_ptr<T: Element>(&self) -> *const T {
        assert_eq!(self.dtype, T::DTYPE);
        let Device::Cpu(_) = self.device;
        self.address as *const T
    }
}

/// A [`View`] that may be written, and the only one there is of its rectangle.
pub struct ViewMut<'a> {
    view: View<'a>,
    life: PhantomData<&'a mut [u8]>,
}

impl<'a> ViewMut<'a> {
    pub fn device(&self) -> &'a Device {
        self.view.device
    }

    pub fn dtype(&self) -> DType {
        self.view.dtype
    }

    pub fn rows(&self) -> usize {
        self.view.rows
    }

    pub fn cols(&self) -> usize {
        self.view.cols
    }

    pub fn stride(&self) -> usize {
        self.view.stride
    }

    /// This view again, for a shorter time.
    pub fn reborrow(&mut self) -> ViewMut<'_> {
        ViewMut { view: self.view, life: PhantomData }
    }

    pub fn view(&self) -> View<'_> {
        self.view
    }

    pub fn rows_range(self, range: Range<usize>) -> Self {
        ViewMut { view: self.view.rows_range(range), life: PhantomData }
    }

    pub fn reshape(self, offset: usize, rows: usize, cols: usize) -> Self {
        ViewMut { view: self.view.reshape(offset, rows, cols), life: PhantomData }
    }

    /// Columns before `at`, and the rest: two rectangles that do not overlap.
    pub fn split_columns(self, at: usize) -> (Self, Self) {
        let left = self.view.columns(0..at);
        let right = self.view.columns(at..self.view.cols);
        (ViewMut { view: left, life: PhantomData }, ViewMut { view: right, life: PhantomData })
    }

    pub fn into_slice<T: Element>(self) -> &'a mut [T] {
        assert!(self.view.is_contiguous(), "slice of a view with gaps");
        let length = self.view.rows * self.view.cols;
        // SAFETY: as in `View::as_slice`; this view is the only one of its rectangle, and without gaps the slice
        // covers nothing else.
        unsafe { std::slice::from_raw_parts_mut(self.as_mut_ptr(), length) }
    }

    pub fn fill_zero(self) {
        let Device::Cpu(_) = self.view.device;
        let bytes = self.view.cols * self.view.dtype.bytes();
        if self.view.is_contiguous() {
            let length = self.view.rows * bytes;
            // SAFETY: without gaps these are the bytes of this exclusive view; zeros are a valid element of every type.
            let all = unsafe { std::slice::from_raw_parts_mut(self.view.address as *mut u8, length) };
            return crate::parallel::fill_zero(all);
        }
        for row in 0..self.view.rows {
            let start = self.view.rows_range(row..row + 1).address as *mut u8;
            // SAFETY: the row lies inside this exclusive view, and zero bytes are a valid element of every type.
            unsafe { start.write_bytes(0, bytes) }
        }
    }

    pub(crate) fn as_mut_ptr<T: Element>(&self) -> *mut T {
        self.view.as_ptr::<T>().cast_mut()
    }
}

/// Which rows of a padding-free batch belong to which sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segments {
    starts: Vec<usize>,
    lengths: Vec<usize>,
}

impl Segments {
    /// From `cu_seqlens`: sequence `i` is rows `offsets[i]..offsets[i + 1]`.
    pub fn from_offsets(offsets: &[u32]) -> Self {
        assert!(offsets.first() == Some(&0) && offsets.is_sorted(), "offsets must rise from 0");
        Segments {
            starts: offsets[..offsets.len() - 1].iter().map(|&offset| offset as usize).collect(),
            lengths: offsets.windows(2).map(|pair| (pair[1] - pair[0]) as usize).collect(),
        }
    }

    /// `count` sequences that begin `stride` rows apart, each `length` rows long: a key/value cache that is being filled.
    pub fn strided(count: usize, stride: usize, length: usize) -> Self {
        assert!(length <= stride);
        Segments { starts: (0..count).map(|index| index * stride).collect(), lengths: vec![length; count] }
    }

    /// The number of sequences.
    pub fn len(&self) -> usize {
        self.starts.len()
    }

    pub fn is_empty(&self) -> bool {
        self.starts.is_empty()
    }

    /// The rows of sequence `index`.
    pub fn rows(&self, index: usize) -> Range<usize> {
        self.starts[index]..self.starts[index] + self.lengths[index]
    }

    /// One more than the last row of any sequence.
    pub fn end(&self) -> usize {
        (0..self.len()).map(|index| self.rows(index).end).max().unwrap_or(0)
    }

    pub fn longest(&self) -> usize {
        self.lengths.iter().copied().max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn views_name_rectangles() {
        let device = Device::cpu();
        let values: Vec<f32> = (0..12).map(|value| value as f32).collect();
        let mut tensor = device.upload(&values, 3, 4).unwrap();
        let view = tensor.view().rows_range(1..3).columns(1..3);
        assert_eq!(view.row::<f32>(0), [5.0, 6.0]);
        assert_eq!(view.row::<f32>(1), [9.0, 10.0]);
        let (left, right) = tensor.view_mut().split_columns(3);
        assert_eq!((left.cols(), right.cols()), (3, 1));
        right.fill_zero();
        assert_eq!(tensor.as_slice::<f32>(), [0., 1., 2., 0., 4., 5., 6., 0., 8., 9., 10., 0.]);
    }

    #[test]
    fn segments_of_a_batch_and_of_a_cache() {
        let batch = Segments::from_offsets(&[0, 3, 3, 7]);
        assert_eq!((batch.len(), batch.rows(2), batch.end(), batch.longest()), (3, 3..7, 7, 4));
        let cache = Segments::strided(2, 10, 4);
        assert_eq!((cache.rows(1), cache.end()), (10..14, 14));
    }
}
