//! The tensors of a flat arena, as a rule that updates the whole of it sees them.

use std::ops::Range;

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
        TensorSlots { slots, moments, moments_length }
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
}
