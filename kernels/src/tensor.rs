//! Tensors own device memory; views name a rectangle of it.

use std::fmt;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::OnceLock;

use half::{bf16, f16};

use crate::pool::Block;
use crate::{Device, Result};

/// The type of a tensor's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    F32,
    Bf16,
    F16,
    U32,
}

impl DType {
    pub fn bytes(self) -> usize {
        match self {
            DType::F32 | DType::U32 => 4,
            DType::Bf16 | DType::F16 => 2,
        }
    }

    /// As tables and kernels call it.
    pub fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::Bf16 => "bf16",
            DType::F16 => "f16",
            DType::U32 => "u32",
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
impl Element for f16 {
    const DTYPE: DType = DType::F16;
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

impl fmt::Debug for Tensor {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} tensor [{}, {}] on {}", self.dtype.name(), self.rows, self.cols, self.device.name())
    }
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

    /// A copy of the elements in order, from any device; waits for what is under way there.
    pub fn download<T: Element>(&self) -> Result<Vec<T>> {
        let mut values = vec![T::zeroed(); self.rows * self.cols];
        self.view().read(&mut values)?;
        Ok(values)
    }

    /// The elements in order, on the CPU.
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

    /// The memory of each row as elements of another, no larger type: as many, from the row's beginning on.
    pub(crate) fn with_elements_of(self, dtype: DType) -> Self {
        assert!(dtype.bytes() <= self.dtype.bytes());
        View { dtype, stride: self.stride * self.dtype.bytes() / dtype.bytes(), ..self }
    }

    pub(crate) fn is_contiguous(&self) -> bool {
        self.stride == self.cols || self.rows <= 1
    }

    /// Copies the elements of a view without gaps to the host, from any device; waits for what is under way there.
    pub fn read<T: Element>(&self, values: &mut [T]) -> Result<()> {
        assert!(self.is_contiguous(), "read of a view with gaps");
        assert_eq!(self.dtype, T::DTYPE);
        assert_eq!(values.len(), self.rows * self.cols, "values for a {} x {} view", self.rows, self.cols);
        match self.device {
            Device::Cpu(_) => values.copy_from_slice(self.as_slice()),
            Device::Gpu(gpu) => gpu.download(self.address, bytemuck::cast_slice_mut(values))?,
        }
        Ok(())
    }

    /// Hands all elements of a view without gaps to `take`, in order and in pieces, from any device: without a copy of the
    /// whole on the host.
    pub fn read_in_pieces<T: Element, E: From<crate::Error>>(
        &self,
        mut take: impl FnMut(&[T]) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        const PIECE: usize = 4 << 20;
        if let Device::Cpu(_) = self.device {
            return take(self.as_slice());
        }
        let elements = self.rows * self.cols;
        let mut buffer = vec![T::zeroed(); PIECE.min(elements)];
        for start in (0..elements).step_by(PIECE) {
            let piece = &mut buffer[..PIECE.min(elements - start)];
            self.reshape(start, 1, piece.len()).read(piece)?;
            take(piece)?;
        }
        Ok(())
    }

    /// Of the first element, in the device's address space.
    pub(crate) fn address(&self) -> usize {
        self.address
    }

    /// The same memory as one of `device`, which can reach it too.
    pub(crate) fn on_device<'b>(self, device: &'b Device) -> View<'b>
    where
        'a: 'b,
    {
        View { device, ..self }
    }

    /// The elements of a view without gaps, on the CPU.
    pub fn as_slice<T: Element>(&self) -> &'a [T] {
        assert!(self.is_contiguous(), "slice of a view with gaps");
        assert_eq!(self.dtype, T::DTYPE);
        self.assert_on_cpu();
        // SAFETY: a view is only made from a tensor borrowed for 'a, and stays inside it; the memory was initialised
        // when the pool allocated it, blocks are aligned for every element type, and offsets are whole elements.
        unsafe { std::slice::from_raw_parts(self.address as *const T, self.rows * self.cols) }
    }

    /// One row, on the CPU.
    pub fn row<T: Element>(&self, index: usize) -> &'a [T] {
        self.rows_range(index..index + 1).as_slice()
    }

    pub(crate) fn as_ptr<T: Element>(&self) -> *const T {
        assert_eq!(self.dtype, T::DTYPE);
        self.assert_on_cpu();
        self.address as *const T
    }

    fn assert_on_cpu(&self) {
        assert!(matches!(self.device, Device::Cpu(_)), "host access to memory of {}", self.device.name());
    }
}

impl View<'_> {
    /// Zeroes the first `rows` rows, which have no gaps; only for [`ViewMut::fill_zero`].
    fn fill_zero(&self, rows: usize) -> Result<()> {
        let length = rows * self.cols * self.dtype.bytes();
        match self.device {
            Device::Cpu(_) => {
                // SAFETY: without gaps these are the bytes of an exclusive view; zeros are a valid element of every type.
                let all = unsafe { std::slice::from_raw_parts_mut(self.address as *mut u8, length) };
                crate::parallel::fill_zero(all);
                Ok(())
            }
            Device::Gpu(gpu) => gpu.fill_zero(self.address, length),
        }
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

    pub fn columns(self, range: Range<usize>) -> Self {
        ViewMut { view: self.view.columns(range), life: PhantomData }
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

    /// Copies values from the host to a view without gaps, on any device.
    pub fn write<T: Element>(self, values: &[T]) -> Result<()> {
        assert!(self.view.is_contiguous(), "write to a view with gaps");
        assert_eq!(self.view.dtype, T::DTYPE);
        let (rows, cols) = (self.view.rows, self.view.cols);
        assert_eq!(values.len(), rows * cols, "values for a {rows} x {cols} view");
        match self.view.device {
            Device::Cpu(_) => self.into_slice().copy_from_slice(values),
            Device::Gpu(gpu) => gpu.upload(self.view.address, bytemuck::cast_slice(values))?,
        }
        Ok(())
    }

    pub fn fill_zero(self) -> Result<()> {
        if self.view.is_contiguous() {
            return self.view.fill_zero(self.view.rows);
        }
        (0..self.view.rows).try_for_each(|row| self.view.rows_range(row..row + 1).fill_zero(1))
    }

    pub(crate) fn address(&self) -> usize {
        self.view.address
    }

    /// As [`View::on_device`].
    pub(crate) fn on_device<'b>(self, device: &'b Device) -> ViewMut<'b>
    where
        'a: 'b,
    {
        ViewMut { view: self.view.on_device(device), life: PhantomData }
    }

    pub(crate) fn as_mut_ptr<T: Element>(&self) -> *mut T {
        self.view.as_ptr::<T>().cast_mut()
    }
}

/// Which rows of a padding-free batch belong to which sequence.
#[derive(Debug)]
pub struct Segments {
    starts: Vec<usize>,
    lengths: Vec<usize>,
    /// Starts and then lengths, uploaded when first asked for.
    on_device: OnceLock<Tensor>,
}

impl Clone for Segments {
    fn clone(&self) -> Self {
        Segments::new(self.starts.clone(), self.lengths.clone())
    }
}

impl PartialEq for Segments {
    fn eq(&self, other: &Self) -> bool {
        (&self.starts, &self.lengths) == (&other.starts, &other.lengths)
    }
}

impl Eq for Segments {}

impl Segments {
    /// From `cu_seqlens`: sequence `i` is rows `offsets[i]..offsets[i + 1]`.
    pub fn from_offsets(offsets: &[u32]) -> Self {
        assert!(offsets.first() == Some(&0) && offsets.is_sorted(), "offsets must rise from 0");
        Segments::new(
            offsets[..offsets.len() - 1].iter().map(|&offset| offset as usize).collect(),
            offsets.windows(2).map(|pair| (pair[1] - pair[0]) as usize).collect(),
        )
    }

    /// From the rows of each sequence, which may overlap where they are only read.
    pub fn from_ranges(ranges: impl Iterator<Item = Range<usize>>) -> Self {
        let (starts, lengths) = ranges.map(|range| (range.start, range.len())).unzip();
        Segments::new(starts, lengths)
    }

    fn new(starts: Vec<usize>, lengths: Vec<usize>) -> Self {
        Segments { starts, lengths, on_device: OnceLock::new() }
    }

    /// Starts and lengths, `[2, sequences]` (u32), on `device`: the same one at each call.
    pub(crate) fn on_device(&self, device: &Device) -> Result<View<'_>> {
        let tensor = match self.on_device.get() {
            Some(tensor) => tensor,
            None => {
                let values: Vec<u32> = self.starts.iter().chain(&self.lengths).map(|&value| value as u32).collect();
                let tensor = device.upload(&values, 2, self.len())?;
                self.on_device.get_or_init(|| tensor)
            }
        };
        assert!(tensor.device().is_same(device), "segments of another device");
        Ok(tensor.view())
    }

    /// `count` sequences that begin `stride` rows apart, each `length` rows long: a key/value cache that is being filled.
    pub fn strided(count: usize, stride: usize, length: usize) -> Self {
        assert!(length <= stride);
        Segments::new((0..count).map(|index| index * stride).collect(), vec![length; count])
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
        right.fill_zero().unwrap();
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
