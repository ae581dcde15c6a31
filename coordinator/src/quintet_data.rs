#![allow(missing_docs)]
use std::ops::Range;
#[derive(Clone, Debug)]
pub struct Schedule {
    pub examples: u64,
    pub global_batch_size: u32,
    pub micro_batch_size: u32,
    pub total_steps: u64,
}
pub struct StepPlan {
    pub step: u64,
    pub epoch: u64,
    pub positions: Range<u64>,
    pub micro_batches: u32,
}
impl Schedule {
    pub fn step(&self, step: u64) -> StepPlan {
        let g = u64::from(self.global_batch_size);
        let per = self.examples.div_ceil(g);
        let (epoch, k) = ((step - 1) / per, (step - 1) % per);
        let positions = k * g..((k + 1) * g).min(self.examples);
        let micro_batches =
            (positions.end - positions.start).div_ceil(u64::from(self.micro_batch_size)) as u32;
        StepPlan {
            step,
            epoch,
            positions,
            micro_batches,
        }
    }
}
pub fn share(n: u32, rank: u32, world: u32) -> Range<u32> {
    let at = |r: u32| (u64::from(n) * u64::from(r) / u64::from(world)) as u32;
    at(rank)..at(rank + 1)
}
