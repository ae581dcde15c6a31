//! What a run remembers: the commit record and the events, as they stand in the run's files.
//! Names and order of the fields are those of the files.

use std::collections::BTreeMap;

use quintet_proto::v1::Actions;
use serde::{Deserialize, Deserializer, Serialize};

use super::WorkerId;

/// A committed step: one line of `ledger.jsonl`, durable before any worker updates its weights.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommitRecord {
    /// Counted from 1 over the whole run.
    pub step: u64,
    /// Counted from 0.
    pub epoch: u64,
    /// `[first, last_exclusive]` in the epoch's order.
    pub positions: [u64; 2],
    /// The membership that computed the step.
    pub generation: u64,
    /// Number of workers in it.
    pub workers: u32,
    /// Hexadecimal digest of the weights the step *began* with, equal on all workers; `None` on
    /// steps where it was not taken. (Those it ends with exist only after the record.)
    pub weights_digest: Option<String>,
}

/// What a coordinator must know to go on in place of another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// The newest.
    pub generation: u64,
    /// The last committed step.
    pub committed_step: u64,
    /// The generation in which it was committed.
    pub committed_generation: u64,
    /// Members of the newest generation.
    pub workers: u32,
    /// An evaluation is due on the committed step.
    pub evaluate: bool,
    /// A checkpoint is due, or was being written.
    pub save: bool,
    /// What is left is to write what the run leaves.
    pub finish: bool,
    /// The highest number that was given to a worker.
    pub last_worker: WorkerId,
}

impl Record {
    /// What is due on the committed step.
    pub(super) fn due(&self, best_step: u64) -> Actions {
        Actions { digest: false, evaluate: self.evaluate, save: self.save, finish: self.finish, best_step }
    }
}

/// What becomes durable at once: a new record, and the lines of the run's files that go with it.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// A line of the ledger.
    pub commit: Option<CommitRecord>,
    /// For the one who watches; `train`, `eval` and `recovery` are also lines of the metrics.
    pub events: Vec<Event>,
    /// What holds from here on.
    pub record: Record,
}

/// What a run tells the one who watches it.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A worker joined; the run starts when all `expected` are ready.
    Joined {
        /// The newcomer.
        worker: WorkerId,
        /// Its machine.
        host: String,
        /// Its process there.
        pid: u32,
        /// Workers so far.
        joined: u32,
        /// Workers the run waits for.
        expected: u32,
    },
    /// All workers are ready and the first leases are out.
    Started {
        /// Number of workers.
        workers: u32,
        /// The first step to compute.
        step: u64,
    },
    /// A worker's machine lacks files, or does not see the run's directory.
    ThroughCoordinator {
        /// Who, what and why, for people.
        what: String,
    },
    /// GPUs of several workers are connected.
    Linked {
        /// How they reduce gradients, for people.
        gradients: String,
    },
    /// A step was committed.
    Train(TrainMetrics),
    /// The model was evaluated.
    Eval(EvalMetrics),
    /// The run ends, and this evaluation's weights become the final model.
    Best(EvalMetrics),
    /// A checkpoint is durable.
    Saved {
        /// The step it holds.
        step: u64,
    },
    /// A checkpoint could not be written; those before it are whole, and the run goes on.
    SaveFailed {
        /// The step it would have held.
        step: u64,
        /// What went wrong.
        problem: String,
    },
    /// The record or the ledger cannot be written, and the run waits for room.
    StorageFull {
        /// What went wrong.
        problem: String,
        /// For so long.
        seconds: f64,
    },
    /// Workers were lost.
    Lost {
        /// Who, and how.
        workers: Vec<LostWorker>,
        /// How many go on.
        left: u32,
    },
    /// The step in flight failed, though nobody is lost; it is computed once more.
    TriedAgain {
        /// Which.
        step: u64,
    },
    /// A worker that wanted to join cannot.
    Refused {
        /// Why.
        reason: String,
    },
    /// Too few workers are there, and the run waits for others.
    Waiting {
        /// So many are there.
        workers: u32,
        /// So many it takes.
        needed: u32,
        /// For so long.
        seconds: f64,
    },
    /// The workers that are there lack a part of the optimizer's state, and the run waits for one who has it.
    StateIncomplete {
        /// Which part.
        problem: String,
        /// For so long.
        seconds: f64,
    },
    /// The first step after a change of membership is committed.
    Recovery(Recovery),
}

/// The `train` event of `metrics.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "event", rename = "train")]
pub struct TrainMetrics {
    /// The committed step.
    pub step: u64,
    /// Counted from 0.
    pub epoch: u64,
    /// Mean over target tokens of the global batch, without smoothing.
    pub loss: f64,
    /// Global norm before clipping; `null` in the file (not a number here) where the gradient overflowed under fp16's loss
    /// scale and the step changed no weights.
    pub grad_norm: f64,
    /// Of this step's update.
    pub learning_rate: f64,
    /// In the global batch.
    pub examples: u64,
    /// In the global batch.
    pub source_tokens: u64,
    /// In the global batch.
    pub target_tokens: u64,
    /// Of the slowest worker.
    pub step_seconds: f64,
    /// Source and target tokens a second.
    pub tokens_per_second: f64,
    /// Number of workers.
    pub workers: u32,
    /// Of the worker that used most.
    pub peak_memory_bytes: u64,
    /// Of fp16.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss_scale: Option<f64>,
}

/// The `eval` event of `metrics.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename = "eval")]
pub struct EvalMetrics {
    /// The committed step whose weights were evaluated.
    pub step: u64,
    /// Mean over target tokens.
    #[serde(deserialize_with = "nan_for_null")]
    pub eval_loss: f64,
    /// By name.
    #[serde(deserialize_with = "nans_for_nulls")]
    pub metrics: BTreeMap<String, f64>,
}

/// JSON has no other way to write a number that is none.
fn nan_for_null<'de, D: Deserializer<'de>>(value: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(value)?.unwrap_or(f64::NAN))
}

fn nans_for_nulls<'de, D: Deserializer<'de>>(values: D) -> Result<BTreeMap<String, f64>, D::Error> {
    let values = BTreeMap::<String, Option<f64>>::deserialize(values)?;
    Ok(values.into_iter().map(|(name, value)| (name, value.unwrap_or(f64::NAN))).collect())
}

/// The `recovery` event of `metrics.jsonl`: what happened between two commits, in the second's
/// step, and what it cost.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "event", rename = "recovery")]
pub struct Recovery {
    /// The first step committed by the new generation.
    pub step: u64,
    /// The new generation.
    pub generation: u64,
    /// Who left; empty when others came, or all stayed and only tried again.
    pub lost: Vec<LostWorker>,
    /// Workers of the new generation.
    pub workers: u32,
    /// Who came.
    pub joined: Vec<JoinedWorker>,
    /// The coordinator itself came back.
    pub coordinator_restarted: bool,
    /// From noticing the first change to this commit.
    pub seconds: f64,
    /// Micro-batches that were leased and computed in vain.
    pub micro_batches_recomputed: u64,
    /// Committed steps that are computed again, because nobody held their outcome any more: those after the checkpoint
    /// from which the run goes on.
    pub steps_recomputed: u64,
}

/// How a loss was noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Notice {
    /// Its connection ended.
    Connection,
    /// Its process ended.
    Process,
    /// It sent no heartbeats.
    Silence,
    /// It sent heartbeats, and got nowhere.
    Watchdog,
    /// It and another could not connect to each other.
    Link,
}

/// A worker that left, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LostWorker {
    /// Its number.
    pub worker: WorkerId,
    /// Its machine.
    pub host: String,
    /// Its process there.
    pub pid: u32,
    /// What was seen of its end.
    pub why: String,
    /// By what.
    pub noticed_by: Notice,
}

/// A worker that came, or came back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct JoinedWorker {
    /// Its number.
    pub worker: WorkerId,
    /// Its machine.
    pub host: String,
    /// Its process there.
    pub pid: u32,
    /// Whether it was given the state by another.
    pub healed: bool,
}
