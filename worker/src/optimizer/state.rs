//! The state of an optimizer, as far as a rank holds it: parts of the arena, and what all others can be made from at the
//! start.

use std::fmt;
use std::ops::Range;

use quintet_kernels::{DType, Device, Tensor, View, ViewMut, ops};

use super::{Optimizer, OptimizerKind, Piece};
use crate::Result;

/// Reads elements of the saved tensor of this name and shape.
pub type ReadSaved = Box<dyn Fn(&str, &[usize], Range<usize>, &mut [f32]) -> Result<()> + Send>;

/// What a state is before its first update.
pub(super) enum Origin {
    /// No updates were made.
    Zeros,
    /// That of a checkpoint, which stays where it is but for what is held.
    Saved(ReadSaved),
}

/// The state of some elements of the arena.
pub struct Part {
    pub range: Range<usize>,
    /// Of each of the state's tensors `[1, n]` what belongs to these elements.
    pub tensors: Vec<Tensor>,
}

impl fmt::Debug for Part {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "state of {:?}", self.range)
    }
}

impl Optimizer {
    /// The elements whose state is in memory, part by part.
    pub fn held(&self) -> Vec<Range<usize>> {
        self.parts.iter().map(|part| part.range.clone()).collect()
    }

    /// Whether one part has the state of all these elements.
    pub fn holds(&self, range: &Range<usize>) -> bool {
        self.parts.iter().any(|part| part.range.start <= range.start && range.end <= part.range.end)
    }

    /// Whether the state of all other elements can be had from where it began: until the first update.
    pub fn has_origin(&self) -> bool {
        self.origin.is_some()
    }

    /// Goes on from the state of a checkpoint, after so many updates; holds none of it yet.
    pub fn begin_at(&mut self, steps: u64, saved: ReadSaved) {
        self.parts.clear();
        (self.steps, self.origin) = (steps, Some(Origin::Saved(saved)));
    }

    /// Drops all state: what follows is [`Optimizer::hold`] and [`Optimizer::write`].
    pub fn forget(&mut self) {
        self.parts.clear();
        self.origin = None;
    }

    /// Makes `range` a part, beside the others, with what is at hand of its state. The rest is zeros, to be written.
    ///
    /// # Errors
    /// Memory; those of reading a checkpoint. Nothing has changed then.
    pub fn hold(&mut self, range: Range<usize>) -> Result<()> {
        if !self.parts.iter().any(|part| part.range == range) {
            let part = self.copy(&self.device, range)?;
            self.parts.push(part);
        }
        Ok(())
    }

    /// Drops all parts but those of `ranges`.
    pub fn retain(&mut self, ranges: &[Range<usize>]) {
        self.parts.retain(|part| ranges.contains(&part.range));
        self.parts.sort_unstable_by_key(|part| part.range.start);
    }

    /// A copy of the state of `range` on a device, with zeros for what is not at hand.
    ///
    /// # Errors
    /// Memory; those of reading a checkpoint.
    pub fn copy(&self, device: &Device, range: Range<usize>) -> Result<Part> {
        let zeros = |extent: &Range<usize>| device.zeros(DType::F32, 1, extent.len());
        let tensors = self.extents(&range).iter().map(zeros).collect::<std::result::Result<_, _>>()?;
        let mut part = Part { range, tensors };
        match &self.origin {
            Some(Origin::Zeros) => {}
            Some(Origin::Saved(read)) => self.read_saved(read, &mut part)?,
            None => self.parts.iter().try_for_each(|held| self.copy_common(held, &mut part))?,
        }
        Ok(part)
    }

    /// What lies, of each of the state's tensors, where in them for elements `range` of the arena.
    pub fn extents(&self, range: &Range<usize>) -> Vec<Range<usize>> {
        match self.kind {
            OptimizerKind::AdamW | OptimizerKind::AdamWScaled => vec![range.clone(), range.clone()],
            // Moments of rows and columns belong to whole matrices: it is always held as one part.
            OptimizerKind::Adafactor => std::iter::once(0..self.slots.factored_moments_len()).collect(),
        }
    }

    /// Elements `extent` of one of the state's tensors, which are in memory.
    pub fn read(&self, tensor: usize, extent: Range<usize>, values: &mut [f32]) -> Result<()> {
        let (part, here) = (0..self.parts.len())
            .find_map(|part| Some((part, self.place(&self.parts[part], tensor, &extent)?)))
            .expect("what is read is held");
        Ok(self.parts[part].tensors[tensor].view().columns(here).read(values)?)
    }

    /// Overwrites elements `extent` of one of the state's tensors in the part `range`.
    pub fn write(&mut self, range: &Range<usize>, tensor: usize, extent: Range<usize>, values: &[f32]) -> Result<()> {
        let (part, here) = (0..self.parts.len())
            .filter(|&part| self.parts[part].range == *range)
            .find_map(|part| Some((part, self.place(&self.parts[part], tensor, &extent)?)))
            .expect("what is written is held");
        Ok(self.parts[part].tensors[tensor].view_mut().columns(here).write(values)?)
    }

    /// Where a part's tensor has elements `extent` of the whole, if it has all of them.
    fn place(&self, part: &Part, tensor: usize, extent: &Range<usize>) -> Option<Range<usize>> {
        let whole = &self.extents(&part.range)[tensor];
        let is_inside = whole.start <= extent.start && extent.end <= whole.end;
        is_inside.then(|| extent.start - whole.start..extent.end - whole.start)
    }

    fn copy_common(&self, held: &Part, part: &mut Part) -> Result<()> {
        let (from, to) = (self.extents(&held.range), self.extents(&part.range));
        for (index, (from, to)) in from.into_iter().zip(to).enumerate() {
            let common = common(&from, &to);
            if !common.is_empty() {
                let source = held.tensors[index].view().columns(common.start - from.start..common.end - from.start);
                copy(source, part.tensors[index].view_mut().columns(common.start - to.start..common.end - to.start))?;
            }
        }
        Ok(())
    }

    fn read_saved(&self, read: &ReadSaved, part: &mut Part) -> Result<()> {
        let extents = self.extents(&part.range);
        for Piece { name, arena, shape, range } in self.pieces() {
            let (extent, common) = (&extents[arena], common(&extents[arena], &range));
            if !common.is_empty() {
                let mut values = vec![0.0; common.len()];
                read(&name, &shape, common.start - range.start..common.end - range.start, &mut values)?;
                let place = common.start - extent.start..common.end - extent.start;
                part.tensors[arena].view_mut().columns(place).write(&values)?;
            }
        }
        Ok(())
    }
}

/// What two ranges share; empty where that is nothing.
fn common(a: &Range<usize>, b: &Range<usize>) -> Range<usize> {
    let start = a.start.max(b.start);
    start..a.end.min(b.end).max(start)
}

fn copy(from: View, to: ViewMut) -> Result<()> {
    match to.device() {
        Device::Cpu(_) => from.read(to.into_slice::<f32>())?,
        Device::Gpu(_) => ops::cast(from, to)?,
    }
    Ok(())
}
