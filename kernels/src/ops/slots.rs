//! The tensors of a flat arena, as a rule that updates the whole of it sees them.

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use crate::{Device, Result, Tensor};

/// Elements that one task of an update works on; fixed, so that the bits of a sum are.
pub(super) const BLOCK: usize = 1 << 15;

/// Second moments begin at multiples of this many elements: 64 bytes.
const ALIGNMENT: usize = 16;

/// A tensor of an arena: a matrix row by row, or a vector as a single row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSlot {
    /// Its elements in the arena, `rows · cols` of them.
    pub range: Range<usize>,
    pub rows: usize,
    pub cols: usize,
    /// Two-dimensional: factored by Adafactor, and what AdamW scales by the root mean square.
    pub is_matrix: bool,
    /// Subject to weight decay.
    pub decays: bool,
}

/// Where Adafactor's second moments of a tensor lie in the arena of all of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FactoredMoments {
    /// Of a matrix: means over columns (one a row) and over rows (one a column).
    Factored { row: Range<usize>, col: Range<usize> },
    /// Of a vector: those of its elements.
    Full(Range<usize>),
}

/// All tensors of an arena; what lies between them is never touched.
#[derive(Clone, Debug)]
pub struct TensorSlots {
    slots: Vec<TensorSlot>,
    moments: Vec<FactoredMoments>,
    moments_length: usize,
    tables: Arc<OnceLock<Tables>>,
}

/// The tensors as kernels see them (cuda/slots.cuh).
#[derive(Debug)]
pub(super) struct Tables {
    /// A row for each tensor.
    pub(super) slots: Tensor,
    /// A row for each task: whole rows of a tensor, about [`BLOCK`] elements.
    pub(super) tasks: Tensor,
    /// Elements of Adafactor's sums over columns: for each task of a matrix, as many as it has columns.
    pub(super) col_sums: usize,
    /// Columns of the widest tensor.
    pub(super) cols_max: usize,
}

impl TensorSlots {
    /// `slots` are in ascending order of `range` and do not overlap.
    pub fn new(slots: Vec<TensorSlot>) -> Self {
        for slot in &slots {
            assert_eq!(slot.rows * slot.cols, slot.range.len(), "shape of the tensor at {:?}", slot.range);
            assert!(slot.is_matrix || slot.rows == 1, "a vector is one row");
        }
        assert!(slots.is_sorted_by(|a, b| a.range.end <= b.range.start), "tensors overlap");
        let mut moments_length = 0;
        let mut place = |length: usize| {
            let start = moments_length;
            moments_length = (start + length).next_multiple_of(ALIGNMENT);
            start..start + length
        };
        let moments = slots
            .iter()
            .map(|slot| match slot.is_matrix {
                true => FactoredMoments::Factored { row: place(slot.rows), col: place(slot.cols) },
                false => FactoredMoments::Full(place(slot.cols)),
            })
            .collect();
        TensorSlots { slots, moments, moments_length, tables: Arc::default() }
    }

    pub fn as_slice(&self) -> &[TensorSlot] {
        &self.slots
    }

    /// One more than the last element of any tensor.
    pub fn end(&self) -> usize {
        self.slots.last().map_or(0, |slot| slot.range.end)
    }

    /// By tensor, for [`adafactor`](super::adafactor).
    pub fn factored_moments(&self) -> &[FactoredMoments] {
        &self.moments
    }

    /// Elements of the arena of [`TensorSlots::factored_moments`].
    pub fn factored_moments_len(&self) -> usize {
        self.moments_length
    }

    /// The tables on `device`: the same ones at each call.
    pub(super) fn on_device(&self, device: &Device) -> Result<&Tables> {
        let tables = match self.tables.get() {
            Some(tables) => tables,
            None => {
                let tables = self.upload(device)?;
                self.tables.get_or_init(|| tables)
            }
        };
        assert!(tables.slots.device().is_same(device), "tensors of another device");
        Ok(tables)
    }

    fn upload(&self, device: &Device) -> Result<Tables> {
        let (mut slots, mut tasks, mut col_sums) = (Vec::new(), Vec::new(), 0);
        for (index, (slot, moments)) in self.slots.iter().zip(&self.moments).enumerate() {
            let rows_per_task = (BLOCK / slot.cols.max(1)).max(1);
            let first_task = tasks.len() / TASK_WORDS;
            for row in (0..slot.rows).step_by(rows_per_task) {
                tasks.extend([index as u32, row as u32, rows_per_task.min(slot.rows - row) as u32, 0]);
            }
            let count = tasks.len() / TASK_WORDS - first_task;
            let (row_moments, col_moments) = match moments {
                FactoredMoments::Factored { row, col } => (row.start, col.start),
                FactoredMoments::Full(range) => (0, range.start),
            };
            let places = [slot.range.start, row_moments, col_moments, col_sums];
            slots.extend(places.iter().flat_map(|&place| [place as u32, (place as u64 >> 32) as u32]));
            slots.extend([slot.rows, slot.cols, first_task, count].map(|number| number as u32));
            slots.extend([slot.is_matrix, slot.decays].map(u32::from));
            col_sums += if slot.is_matrix { count * slot.cols } else { 0 };
        }
        Ok(Tables {
            slots: device.upload(&slots, self.slots.len(), SLOT_WORDS)?,
            tasks: device.upload(&tasks, tasks.len() / TASK_WORDS, TASK_WORDS)?,
            col_sums,
            cols_max: self.slots.iter().map(|slot| slot.cols).max().unwrap_or(0),
        })
    }
}

/// Of a `Slot` and a `Task` in cuda/slots.cuh, words of 32 bits.
const SLOT_WORDS: usize = 14;
const TASK_WORDS: usize = 4;
