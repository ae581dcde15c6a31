//! The gradient of a step: where a rank's micro-batches add up, and how ranks add theirs.
//!
//! On the CPU every micro-batch has a gradient of its own and a tree fixes the order of additions, so that the bits do not
//! depend on the number of ranks. On a GPU all micro-batches of a rank add to one arena on the device, and ranks add
//! theirs by NCCL, piece by piece while the last backward pass still runs, or through the host in the order of a tree over
//! ranks: the same sum, with bits that depend on who computed what.

use std::ops::Range;

use quintet_kernels::{DType, Device, Tensor, View, ViewMut, ops};
use quintet_t5::{Batch, LossSums, Parameters};

use crate::Result;
use crate::collective::{Collective, TreeSum};
use crate::replica::Replica;
use crate::shards::Shards;

/// What holds and reduces the gradient of a step.
pub enum StepGradient {
    Host(HostTree),
    Device(DeviceSum),
}

/// A tree over micro-batches, in the host's memory.
pub struct HostTree {
    sum: TreeSum,
    total: Tensor,
}

/// One arena on a GPU.
pub struct DeviceSum {
    device: Device,
    elements: usize,
    /// Absent while it is lent.
    sum: Option<Tensor>,
    /// For more than one rank: what passes through the host.
    staging: Option<HostTree>,
}

impl StepGradient {
    /// Of `elements` elements, for weights on `device`.
    pub fn new(device: &Device, elements: usize) -> Result<Self> {
        match device {
            Device::Cpu(_) => Ok(Self::Host(HostTree::new(device, elements)?)),
            Device::Gpu(_) => {
                Ok(Self::Device(DeviceSum { device: device.clone(), elements, sum: None, staging: None }))
            }
        }
    }

    /// Starts a step, of whose micro-batches `0..count` this rank computes `range`.
    pub fn begin(&mut self, range: Range<u32>, count: u32) -> Result<()> {
        match self {
            Self::Host(tree) => tree.sum.begin(range, count),
            Self::Device(DeviceSum { device, elements, sum, .. }) => match sum {
                Some(sum) => sum.view_mut().fill_zero()?,
                None => *sum = Some(device.zeros(DType::F32, 1, *elements)?),
            },
        }
        Ok(())
    }

    /// An f32 arena to add the gradient of the next micro-batch to, for [`StepGradient::give_back`].
    pub fn lend(&mut self) -> Result<Tensor> {
        match self {
            Self::Host(tree) => tree.sum.lend(),
            Self::Device(device) => Ok(device.sum.take().expect("one micro-batch at a time, in a step that began")),
        }
    }

    /// Takes the arena back, with a micro-batch's gradient in it; in ascending order of micro-batches.
    pub fn give_back(&mut self, gradient: Tensor) {
        match self {
            Self::Host(tree) => tree.sum.push(gradient),
            Self::Device(device) => device.sum = Some(gradient),
        }
    }

    /// Computes the next micro-batch's gradient and takes it in; the last one's part of the sum begins to be reduced while
    /// the rest is computed, where the collective does that.
    ///
    /// # Errors
    /// Those of [`Replica::compute`].
    pub fn compute(
        &mut self,
        replica: &Replica,
        collective: &mut Collective,
        (step, index): (u64, u32),
        batch: &Batch,
        is_last: bool,
    ) -> Result<LossSums> {
        let mut reduce = |gradients: &mut Parameters, start| {
            if is_last {
                // SAFETY: the memory is ours; it outlives the collective, or at least nobody looks at it before `reduce`
                // and, after a failure, not before the collective is dropped.
                unsafe { collective.advance_sum(gradients.view_mut(), start) };
            }
        };
        let gradient = self.lend()?;
        let (sums, gradient) = replica.compute(step, index, batch, gradient, &mut reduce);
        self.give_back(gradient);
        sums
    }

    /// An element of this rank's part that is infinite or not a number.
    pub fn find_not_finite(&self) -> Result<Option<usize>> {
        match self {
            Self::Host(tree) => tree.sum.find_not_finite(),
            Self::Device(device) => Ok(ops::find_not_finite(device.sum())?),
        }
    }

    /// Adds up what all ranks have, of whom rank `r` computed the micro-batches `ranges[r]`. What a rank holds of `shards`
    /// is then in [`StepGradient::total`]; a GPU has the whole.
    ///
    /// # Errors
    /// Those of [`Collective::reduce_tree`] and [`Collective::finish_sum`].
    pub fn reduce(
        &mut self,
        collective: &mut Collective,
        step: u64,
        ranges: &[Range<u32>],
        shards: &Shards,
    ) -> Result<()> {
        match self {
            Self::Host(tree) => collective.reduce_tree(step, &mut tree.sum, ranges, shards, &mut tree.total),
            Self::Device(_) if collective.world_size() == 1 => Ok(()),
            Self::Device(device) if collective.overlaps() => collective.finish_sum(device.sum_mut()),
            Self::Device(device) => device.reduce_through_host(collective, step),
        }
    }

    /// The reduced gradient, `[1, elements]` on the device, of which a rank has what it holds.
    pub fn total(&self) -> View<'_> {
        match self {
            Self::Host(tree) => tree.total.view(),
            Self::Device(device) => device.sum(),
        }
    }

    /// The norm of the whole reduced gradient, the same bits on every rank, whatever it has of it.
    ///
    /// # Errors
    /// Those of [`Collective::all_gather_bytes`].
    pub fn norm(&self, collective: &mut Collective, step: u64, shards: &Shards) -> Result<f64> {
        if shards.is_replicated() {
            return Ok(ops::global_norm(self.total())?);
        }
        let own = shards.slices()[collective.rank() as usize].clone();
        let blocks = ops::sums_of_squares(self.total().columns(own));
        let all = collective.all_gather_bytes(step, bytemuck::cast_slice(&blocks))?;
        let blocks = all.iter().flat_map(|bytes| bytes.as_chunks::<{ size_of::<f64>() }>().0);
        Ok(blocks.map(|block| f64::from_le_bytes(*block)).sum::<f64>().sqrt())
    }
}

impl HostTree {
    fn new(device: &Device, elements: usize) -> Result<Self> {
        Ok(Self { sum: TreeSum::new(device, elements), total: device.zeros(DType::F32, 1, elements)? })
    }
}

impl DeviceSum {
    fn sum(&self) -> View<'_> {
        self.sum.as_ref().expect("nobody has the sum while it is asked for").view()
    }

    fn sum_mut(&mut self) -> ViewMut<'_> {
        self.sum.as_mut().expect("nobody has the sum while it is asked for").view_mut()
    }

    /// A copy to the host and one back, and a tree whose leaves are the ranks.
    fn reduce_through_host(&mut self, collective: &mut Collective, step: u64) -> Result<()> {
        let (rank, world_size) = (collective.rank(), collective.world_size());
        let staging = match &mut self.staging {
            Some(staging) => staging,
            none => none.insert(HostTree::new(&Device::cpu(), self.elements)?),
        };
        let sum = self.sum.as_mut().expect("nobody has the sum while it is reduced");
        staging.sum.begin(rank..rank + 1, world_size);
        let mut part = staging.sum.lend()?;
        sum.view().read(part.as_mut_slice::<f32>())?;
        staging.sum.push(part);
        let ranges: Vec<Range<u32>> = (0..world_size).map(|rank| rank..rank + 1).collect();
        let shards = Shards::replicated(self.elements, world_size);
        collective.reduce_tree(step, &mut staging.sum, &ranges, &shards, &mut staging.total)?;
        Ok(sum.view_mut().write(staging.total.as_slice::<f32>())?)
    }
}
