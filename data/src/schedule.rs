//! How epochs are cut into steps, and steps into micro-batches.

use std::ops::Range;

use crate::error::{Error, Result};

/// How long to train.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum TrainingLength {
    /// This many optimizer steps.
    Steps(u64),
    /// This many passes over the training examples; a fraction of an epoch is rounded up to whole steps.
    Epochs(f64),
}

/// Which positions every step takes. A pure function of the job: it knows no workers.
///
/// A step takes the next `global_batch_size` positions of its epoch, cut into micro-batches of `micro_batch_size`; the
/// last step of an epoch takes what is left, and then its last micro-batch may be smaller.
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule {
    /// Examples of an epoch; at least 1.
    pub examples: u64,
    /// Examples of one optimizer step, whatever the number of workers.
    pub global_batch_size: u64,
    /// Examples of one forward and backward pass; divides `global_batch_size`.
    pub micro_batch_size: u64,
    /// The number of the last step; at least 1.
    pub total_steps: u64,
}

/// The examples of one step.
#[derive(Clone, Debug, PartialEq)]
pub struct StepPlan {
    /// The step, from 1.
    pub step: u64,
    /// The epoch, from 0.
    pub epoch: u64,
    /// The positions of that epoch's order.
    pub positions: Range<u64>,
    /// The number of micro-batches.
    pub micro_batches: u32,
    micro_batch_size: u64,
}

/// No step has more examples: micro-batch numbers are `u32`, and a larger batch is a slip of the keyboard.
const GLOBAL_BATCH_SIZE_MAX: u64 = 1 << 31;

impl Schedule {
    /// The schedule of a job.
    ///
    /// # Errors
    /// A size or length out of range, or a global batch that is no multiple of the micro-batch.
    pub fn new(examples: u64, global_batch_size: u64, micro_batch_size: u64, length: TrainingLength) -> Result<Self> {
        assert!(examples > 0, "loading refuses empty data");
        if !(1..=GLOBAL_BATCH_SIZE_MAX).contains(&global_batch_size) {
            let message = format!("{global_batch_size} is out of range; give 1 to {GLOBAL_BATCH_SIZE_MAX} examples");
            return Err(Error::setting("training.global_batch_size", message));
        }
        if micro_batch_size == 0 || !global_batch_size.is_multiple_of(micro_batch_size) {
            let message = format!(
                "{micro_batch_size} does not divide training.global_batch_size = {global_batch_size}; \
                 make the one a multiple of the other"
            );
            return Err(Error::setting("training.micro_batch_size", message));
        }
        let mut schedule = Self { examples, global_batch_size, micro_batch_size, total_steps: 0 };
        schedule.total_steps = schedule.steps_of(length)?;
        Ok(schedule)
    }

    fn steps_of(&self, length: TrainingLength) -> Result<u64> {
        match length {
            TrainingLength::Steps(0) => Err(Error::setting("training.max_steps", "is 0; give at least 1 step")),
            TrainingLength::Steps(steps) => Ok(steps),
            TrainingLength::Epochs(epochs) => {
                let steps = (epochs * self.steps_per_epoch() as f64).ceil();
                // Written so that NaN fails too; 2^53 is where f64 stops counting.
                if !(1.0..=9.0e15).contains(&steps) {
                    let message = format!("{epochs} is out of range; give a positive number of epochs");
                    return Err(Error::setting("training.num_train_epochs", message));
                }
                Ok(steps as u64)
            }
        }
    }

    /// The number of steps that take every example once.
    pub fn steps_per_epoch(&self) -> u64 {
        self.examples.div_ceil(self.global_batch_size)
    }

    /// The examples of a step.
    ///
    /// # Panics
    /// When `step` is not in `1..=total_steps`.
    pub fn step(&self, step: u64) -> StepPlan {
        assert!((1..=self.total_steps).contains(&step), "step {step} of {}", self.total_steps);
        let steps_per_epoch = self.steps_per_epoch();
        let (epoch, index) = ((step - 1) / steps_per_epoch, (step - 1) % steps_per_epoch);
        let first = index * self.global_batch_size;
        let positions = first..self.examples.min(first + self.global_batch_size);
        // At most GLOBAL_BATCH_SIZE_MAX, which fits.
        let micro_batches = (positions.end - positions.start).div_ceil(self.micro_batch_size) as u32;
        StepPlan { step, epoch, positions, micro_batches, micro_batch_size: self.micro_batch_size }
    }
}

impl StepPlan {
    /// The positions of the k-th micro-batch.
    ///
    /// # Panics
    /// When there is no such micro-batch.
    pub fn micro_batch(&self, k: u32) -> Range<u64> {
        assert!(k < self.micro_batches, "micro-batch {k} of {}", self.micro_batches);
        let first = self.positions.start + u64::from(k) * self.micro_batch_size;
        first..self.positions.end.min(first + self.micro_batch_size)
    }

    /// The number of examples.
    pub fn examples(&self) -> u64 {
        self.positions.end - self.positions.start
    }
}

/// The micro-batches of rank `rank` of `world`: contiguous, and as many as any other rank's give or take one. Empty for
/// some when there are fewer micro-batches than ranks.
///
/// # Panics
/// When `rank` is not below `world`.
pub fn share(micro_batches: u32, rank: u32, world: u32) -> Range<u32> {
    assert!(rank < world, "rank {rank} of {world}");
    let bound = |rank: u32| (u64::from(micro_batches) * u64::from(rank) / u64::from(world)) as u32;
    bound(rank)..bound(rank + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn steps(examples: u64, global: u64, micro: u64, steps: u64) -> Schedule {
        Schedule::new(examples, global, micro, TrainingLength::Steps(steps)).unwrap()
    }

    #[test]
    fn every_epoch_covers_every_position_once_in_order() {
        for examples in [1, 2, 5, 7, 8, 9, 16, 23] {
            for (global, micro) in [(1, 1), (4, 1), (4, 2), (4, 4), (8, 2), (32, 8)] {
                let per_epoch = steps(examples, global, micro, 1).steps_per_epoch();
                let schedule = steps(examples, global, micro, 3 * per_epoch);
                for epoch in 0..3 {
                    let mut positions = Vec::new();
                    for step in 1..=per_epoch {
                        let plan = schedule.step(epoch * per_epoch + step);
                        assert_eq!(plan.epoch, epoch);
                        let batches: Vec<_> = (0..plan.micro_batches).map(|k| plan.micro_batch(k)).collect();
                        assert!(batches.iter().all(|batch| !batch.is_empty()));
                        assert!(batches.iter().rev().skip(1).all(|batch| batch.end - batch.start == micro));
                        assert!(batches.iter().cloned().flatten().eq(plan.positions.clone()));
                        positions.extend(plan.positions);
                    }
                    assert!(positions.into_iter().eq(0..examples), "{examples} {global} {micro}");
                }
            }
        }
    }

    #[test]
    fn the_last_step_takes_what_is_left() {
        let plan = steps(21, 8, 4, 3).step(3);
        assert_eq!((plan.epoch, plan.positions.clone(), plan.micro_batches), (0, 16..21, 2));
        assert_eq!((plan.micro_batch(0), plan.micro_batch(1), plan.examples()), (16..20, 20..21, 5));
    }

    #[test]
    fn epochs_become_steps_rounded_up() {
        let epochs = |epochs| Schedule::new(21, 8, 4, TrainingLength::Epochs(epochs)).map(|s| s.total_steps);
        assert_eq!(epochs(1.0).unwrap(), 3);
        assert_eq!(epochs(0.5).unwrap(), 2);
        assert_eq!(epochs(2.1).unwrap(), 7);
        for bad in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert!(epochs(bad).unwrap_err().to_string().starts_with("training.num_train_epochs: "));
        }
    }

    #[test]
    fn bad_sizes_are_named() {
        let error = |global, micro, length| Schedule::new(9, global, micro, length).unwrap_err().to_string();
        let one = TrainingLength::Steps(1);
        assert_eq!(error(1, 1, TrainingLength::Steps(0)), "training.max_steps: is 0; give at least 1 step");
        assert!(error(0, 1, one).starts_with("training.global_batch_size: 0 is out of range"));
        assert_eq!(
            error(8, 3, one),
            "training.micro_batch_size: 3 does not divide training.global_batch_size = 8; \
             make the one a multiple of the other"
        );
        assert!(error(8, 0, one).starts_with("training.micro_batch_size: 0 "));
        assert!(error(8, 16, one).starts_with("training.micro_batch_size: 16 "));
    }

    #[test]
    fn shares_are_contiguous_and_balanced() {
        for micro_batches in 0..20 {
            for world in 1..7 {
                let shares: Vec<_> = (0..world).map(|rank| share(micro_batches, rank, world)).collect();
                assert!(shares.iter().cloned().flatten().eq(0..micro_batches));
                let sizes = shares.iter().map(|share| share.end - share.start);
                assert!(sizes.clone().max().unwrap() - sizes.min().unwrap() <= 1);
            }
        }
    }
}
