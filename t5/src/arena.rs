//! The map of an arena: which tensors lie where in one piece of memory, and what a matrix of the model is there.
//!
//! The model's own arena holds all of its tensors. A smaller one can lie over it (`overlay`): it holds what is trained where
//! the rest is frozen, which is adapters of some matrices and copies of others that take their place. Layers know the
//! model's own slots only; where an arena has something for a slot is looked up here, and the model's own arena has itself.

use std::ops::Range;

/// A matrix in an arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Slot {
    pub(crate) offset: usize,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
}

impl Slot {
    /// Its first element in the arena.
    pub(crate) fn start(self) -> usize {
        self.offset
    }

    pub(crate) fn end(self) -> usize {
        self.offset + self.rows * self.cols
    }

    pub(crate) fn rows(self) -> usize {
        self.rows
    }

    pub(crate) fn cols(self) -> usize {
        self.cols
    }
}

/// A tensor of the model under the name that Hugging Face gives it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedTensor {
    pub name: String,
    /// Its elements in the arena.
    pub range: Range<usize>,
    /// `[out, in]`, or `[size]` for a norm.
    pub shape: Vec<usize>,
}

impl NamedTensor {
    /// As one matrix; a vector is a single row.
    pub(crate) fn slot(&self) -> Slot {
        let cols = self.shape.last().copied().unwrap_or(1);
        Slot { offset: self.range.start, rows: self.range.len() / cols.max(1), cols }
    }
}

/// Where each tensor lies in an arena.
#[derive(Debug, Default)]
pub struct Arena {
    tensors: Vec<NamedTensor>,
    length: usize,
    /// Of an arena over the model's own: what it has for which of the model's matrices, in their order.
    patches: Option<Vec<Patch>>,
}

/// What an arena has for a matrix of the model.
#[derive(Clone, Debug)]
pub(crate) struct Patch {
    /// The matrix, in the model's own arena.
    pub(crate) base: Slot,
    pub(crate) kind: PatchKind,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum PatchKind {
    /// A copy that takes its place.
    Replaced(Slot),
    /// What is added to its product.
    Adapted(Adapter),
}

/// A low-rank addition to a linear layer: `y += scale · dropout(x) · aᵀ · bᵀ`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Adapter {
    /// Tells dropout masks apart.
    pub(crate) number: u32,
    /// `[r, in]`
    pub(crate) a: Slot,
    /// `[out, r]`
    pub(crate) b: Slot,
    pub(crate) scale: f32,
    pub(crate) dropout: f32,
}

impl Patch {
    /// Its first element in the arena that has it.
    fn start(&self) -> usize {
        match self.kind {
            PatchKind::Replaced(slot) => slot.start(),
            PatchKind::Adapted(adapter) => adapter.a.start(),
        }
    }
}

/// Tensors and groups begin at multiples of this many elements: 64 bytes of f32.
const ALIGNMENT: usize = 16;

impl Arena {
    /// All tensors, in the order of the arena.
    pub fn tensors(&self) -> &[NamedTensor] {
        &self.tensors
    }

    /// Elements of the arena, the gaps that align tensors included.
    pub fn len(&self) -> usize {
        self.length
    }

    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Elements of all tensors.
    pub fn parameter_count(&self) -> usize {
        self.tensors.iter().map(|tensor| tensor.range.len()).sum()
    }

    /// Whether it is a model's own, not one over it.
    pub fn is_whole(&self) -> bool {
        self.patches.is_none()
    }

    /// Matrices of one width, one below the other without a gap.
    pub(crate) fn push_group(&mut self, parts: &[(String, usize)], cols: usize) -> Slot {
        let offset = self.length;
        let mut rows = 0;
        for (name, part_rows) in parts {
            self.push_tensor(name.clone(), offset + rows * cols, vec![*part_rows, cols]);
            rows += part_rows;
        }
        Slot { offset, rows, cols }
    }

    pub(crate) fn push(&mut self, name: String, shape: &[usize]) -> Slot {
        self.push_tensor(name, self.length, shape.to_vec());
        self.tensors[self.tensors.len() - 1].slot()
    }

    fn push_tensor(&mut self, name: String, offset: usize, shape: Vec<usize>) {
        let range = offset..offset + shape.iter().product::<usize>();
        self.length = range.end.next_multiple_of(ALIGNMENT);
        self.tensors.push(NamedTensor { name, range, shape });
    }

    /// Makes it one over the model's own.
    pub(crate) fn lay_over(&mut self, patches: Vec<Patch>) {
        assert!(patches.is_sorted_by_key(|patch| patch.base.start()), "patches in the order of the model");
        self.patches = Some(patches);
    }

    pub(crate) fn patches(&self) -> &[Patch] {
        self.patches.as_deref().unwrap_or_default()
    }

    /// Where this arena has the model's matrix `slot` itself, if it has.
    pub(crate) fn place(&self, slot: Slot) -> Option<Slot> {
        let Some(patches) = &self.patches else { return Some(slot) };
        let first = patches.partition_point(|patch| patch.base.start() < slot.start());
        patches[first..].iter().take_while(|patch| patch.base.start() == slot.start()).find_map(|patch| {
            match patch.kind {
                PatchKind::Replaced(place) => Some(place),
                PatchKind::Adapted(_) => None,
            }
        })
    }

    /// The adapters of the model's matrices that lie in `slot`, and which of its rows each is of.
    pub(crate) fn adapters(&self, slot: Slot) -> impl Iterator<Item = (Range<usize>, Adapter)> + '_ {
        let patches = self.patches();
        let first = patches.partition_point(|patch| patch.base.start() < slot.start());
        let inside = patches[first..].iter().take_while(move |patch| patch.base.start() < slot.end());
        inside.filter_map(move |patch| match patch.kind {
            PatchKind::Replaced(_) => None,
            PatchKind::Adapted(adapter) => {
                let row = (patch.base.start() - slot.start()) / slot.cols();
                Some((row..row + patch.base.rows(), adapter))
            }
        })
    }

    /// The first element that belongs to the model's elements from `start` on: all further ones do too.
    pub(crate) fn start_of(&self, start: usize) -> usize {
        let Some(patches) = &self.patches else { return start };
        let first = patches.partition_point(|patch| patch.base.start() < start);
        // Nothing is before the first, so that the whole is finished with it.
        if start == 0 { 0 } else { patches.get(first).map_or(self.length, Patch::start) }
    }
}
