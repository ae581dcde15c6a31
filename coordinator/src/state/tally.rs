//! Sums of a step over its micro-batches, in an order that no membership can change.

use quintet_data::Schedule;
use quintet_proto::v1::{MicroBatch, StepDone};

use super::record::TrainMetrics;

/// Puts the reports of all ranks, by rising rank, together to the step's metrics.
///
/// Losses are added in `f64` by rising micro-batch number, so that the result does not depend on
/// how many workers shared the step. Panics unless the reports hold every micro-batch exactly
/// once: the machine has checked each against its lease, and leases cover the step.
pub(super) fn tally(schedule: &Schedule, step: u64, reports: &[&StepDone]) -> TrainMetrics {
    let plan = schedule.step(step);
    let micro_batches: Vec<&MicroBatch> = reports.iter().flat_map(|report| &report.micro_batches).collect();
    assert!(
        micro_batches.iter().map(|micro_batch| micro_batch.index).eq(0..plan.micro_batches),
        "step {step}: the workers' reports do not hold every micro-batch exactly once"
    );
    let examples = micro_batches.iter().map(|m| m.examples).sum::<u64>();
    let source_tokens = micro_batches.iter().map(|m| m.source_tokens).sum::<u64>();
    let target_tokens = micro_batches.iter().map(|m| m.target_tokens).sum::<u64>();
    let loss_sum = micro_batches.iter().map(|m| m.loss_sum).sum::<f64>();
    let step_seconds = reports.iter().map(|r| r.step_seconds).fold(0.0, f64::max);
    TrainMetrics {
        step,
        epoch: plan.epoch,
        loss: loss_sum / target_tokens.max(1) as f64,
        grad_norm: reports[0].grad_norm,
        learning_rate: reports[0].learning_rate,
        examples,
        source_tokens,
        target_tokens,
        step_seconds,
        tokens_per_second: (source_tokens + target_tokens) as f64 / step_seconds.max(1e-9),
        workers: reports.len() as u32,
        peak_memory_bytes: reports.iter().map(|r| r.peak_memory_bytes).max().unwrap_or(0),
        loss_scale: reports[0].loss_scale,
    }
}
