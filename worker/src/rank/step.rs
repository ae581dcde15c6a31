//! A step's gradient: the micro-batches of a lease, computed and reduced.

use std::ops::Range;
use std::time::Instant;

use quintet_data::{PackedBatch, share};
use quintet_kernels::ops;
use quintet_proto::v1::{Lease, MicroBatch, State, StepDone};

use super::{Place, Rank};
use crate::replica::Update;
use crate::session::{Session, SessionError};
use crate::{Error, Result, evaluation};

/// What a step's attempt came to.
pub(super) enum Attempt {
    Done(StepDone),
    /// Not finite: where.
    Poisoned(String),
}

impl Rank {
    /// Computes and reduces the gradient of a lease's step.
    pub(super) fn attempt(&mut self, session: &Session, place: &mut Place, lease: &Lease) -> Result<Attempt> {
        let started = Instant::now();
        let plan = self.schedule.step(lease.step);
        let range = lease.first_micro_batch..lease.last_exclusive;
        self.gradient.begin(range.clone(), plan.micro_batches)?;
        let mut reports = Vec::with_capacity(range.len());
        for index in range {
            if session.is_void(place.generation) {
                return Err(Error::Interrupted);
            }
            session.count_progress();
            let packed = self.next_batch(lease.step, index)?;
            let batch = evaluation::upload(self.replica.model(), &packed)?;
            let is_last = index + 1 == lease.last_exclusive;
            let sums =
                self.gradient.compute(&self.replica, &mut place.collective, (lease.step, index), &batch, is_last)?;
            if !sums.loss_sum.is_finite() {
                return Ok(Attempt::Poisoned(format!("the loss of micro-batch {index}")));
            }
            reports.push(MicroBatch {
                index,
                loss_sum: sums.loss_sum,
                target_tokens: sums.target_tokens,
                source_tokens: batch.source_tokens() as u64,
                examples: batch.examples() as u64,
            });
        }
        // Before the sum, so that a bad number tells whose it is. A rank alone sees it in the norm, for no pass over memory,
        // and so do ranks whose sum is under way already; what overflows under a loss scale is skipped by all ranks, who
        // see it there too.
        let is_whole = place.world_size == 1 || place.collective.overlaps();
        if !is_whole
            && self.replica.loss_scaler().is_none()
            && let Some(index) = self.gradient.find_not_finite()?
        {
            return Ok(Attempt::Poisoned(format!("the gradient of {}", self.tensor_at(index))));
        }
        let waiting = session.wait();
        let target_tokens = self.global_target_tokens(place, lease.step, &reports)?;
        let ranges: Vec<Range<u32>> =
            (0..place.world_size).map(|rank| share(plan.micro_batches, rank, place.world_size)).collect();
        self.gradient.reduce(&mut place.collective, lease.step, &ranges, &place.shards)?;
        let norm = self.gradient.norm(&mut place.collective, lease.step, &place.shards)?;
        drop(waiting);
        let Some(update) = self.replica.plan_update(norm, target_tokens) else {
            return Ok(Attempt::Poisoned(self.poisoned_total(place)?));
        };
        self.pending = Some((State { step: lease.step, generation: place.generation }, update));
        Ok(Attempt::Done(StepDone {
            generation: place.generation,
            step: lease.step,
            grad_norm: match update {
                Update::Apply(mean) => mean.norm,
                Update::Skip => f64::NAN,
            },
            skipped: update == Update::Skip,
            loss_scale: self.replica.loss_scaler().map(|scaler| scaler.scale()),
            learning_rate: self.replica.learning_rate(lease.step),
            micro_batches: reports,
            step_seconds: started.elapsed().as_secs_f64(),
            peak_memory_bytes: crate::memory::peak_bytes(self.replica.model().device()),
            weights_digest: self.digest.take().map(|digest| digest.as_bytes().to_vec()),
        }))
    }

    /// What of the reduced gradient is not finite, as far as this rank sees it.
    fn poisoned_total(&self, place: &Place) -> Result<String> {
        for part in place.shards.parts(place.rank) {
            let start = part.start;
            if let Some(index) = ops::find_not_finite(self.gradient.total().columns(part))? {
                return Ok(format!("the global gradient of {}", self.tensor_at(start + index)));
            }
        }
        // Squares of f32 do not overflow the norm's f64, so there is one.
        Ok("the global gradient, in a part that other workers hold,".to_owned())
    }

    /// The name of the tensor that has element `index` of the arena.
    fn tensor_at(&self, index: usize) -> &str {
        let mut tensors = self.replica.master().layout().tensors().iter();
        tensors.find(|tensor| tensor.range.contains(&index)).map_or("the padding", |tensor| &tensor.name)
    }

    /// Target tokens of the whole step, over all ranks.
    fn global_target_tokens(&self, place: &mut Place, step: u64, reports: &[MicroBatch]) -> Result<u64> {
        let mine: u64 = reports.iter().map(|report| report.target_tokens).sum();
        let all = place.collective.all_gather_bytes(step, &mine.to_le_bytes())?;
        let counts = all.iter().map(|bytes| bytes.as_slice().try_into().map_or(0, u64::from_le_bytes));
        Ok(counts.sum())
    }

    /// Asks for this lease's micro-batches, and for those that the next step will most likely lease to this rank.
    pub(super) fn request_ahead(&mut self, place: &Place, lease: &Lease) {
        let mut wanted: Vec<(u64, u32)> =
            (lease.first_micro_batch..lease.last_exclusive).map(|index| (lease.step, index)).collect();
        if lease.step < self.schedule.total_steps {
            let next = self.schedule.step(lease.step + 1);
            wanted.extend(share(next.micro_batches, place.rank, place.world_size).map(|index| (next.step, index)));
        }
        if !self.requested.iter().zip(&wanted).all(|(have, want)| have == want) {
            self.forget_requests();
        }
        for &(step, index) in &wanted[self.requested.len().min(wanted.len())..] {
            let plan = self.schedule.step(step);
            self.loader.request(plan.epoch, plan.micro_batch(index));
            self.requested.push_back((step, index));
        }
    }

    pub(super) fn forget_requests(&mut self) {
        self.loader.clear();
        self.requested.clear();
    }

    fn next_batch(&mut self, step: u64, index: u32) -> Result<PackedBatch> {
        let requested = self.requested.pop_front();
        assert_eq!(requested, Some((step, index)), "batches arrive in the order of their requests");
        self.loader.next().map_err(|error| match error {
            // It is found out whether the coordinator comes back.
            quintet_data::Error::Origin { problem, is_lost: true } => SessionError::Disconnected(problem).into(),
            other => other.into(),
        })
    }
}
