//! Loss and metrics of a model on a dataset, shared out over ranks.

use std::ops::Range;

use std::sync::Arc;

use quintet_data::{Dataset, Limits, Order, PackedBatch, Packer, Tokenizer, share};
use quintet_t5::{Batch, Generated, Generator, Model, Sources, Weights};
use serde::{Deserialize, Serialize};

use crate::Result;
use crate::config::EvaluationConfig;
use crate::metrics::{self, Pair};
use crate::task::Task;
use crate::toxicity::{self, ToxicityModel};

/// What an evaluation is over: the first examples of a dataset, in file order.
pub struct EvaluationTask<'a> {
    dataset: &'a Dataset,
    tokenizer: &'a Tokenizer,
    packer: Packer,
    config: &'a EvaluationConfig,
    task: &'a Task,
    toxicity: Option<&'a ToxicityModel>,
}

/// One example and what the model made of it: a line of `predictions.jsonl`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prediction {
    pub input: String,
    pub target: String,
    pub prediction: String,
}

impl Prediction {
    /// For scoring.
    pub fn pair(&self) -> Pair<'_> {
        Pair { prediction: &self.prediction, target: &self.target }
    }
}

/// The evaluation of one batch, as ranks exchange it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BatchEvaluation {
    pub loss_sum: f64,
    pub target_tokens: u64,
    pub examples: u64,
    pub predictions: Vec<Prediction>,
    /// Of each prediction, where that was asked for.
    pub toxicities: Vec<f64>,
}

/// An evaluation as a whole.
#[derive(Clone, Debug, PartialEq)]
pub struct Evaluation {
    /// Token mean.
    pub loss: f64,
    pub examples: u64,
    pub target_tokens: u64,
    /// By name, in the order asked for, but toxicity last.
    pub metrics: Vec<(&'static str, f64)>,
    pub predictions: Vec<Prediction>,
}

impl<'a> EvaluationTask<'a> {
    pub fn new(
        dataset: &'a Arc<Dataset>,
        tokenizer: &'a Arc<Tokenizer>,
        limits: Limits,
        config: &'a EvaluationConfig,
        task: &'a Task,
        toxicity: Option<&'a ToxicityModel>,
    ) -> Self {
        let order = Order::new(dataset.len(), 0, false);
        let packer = packer(dataset, tokenizer, order, limits, task);
        EvaluationTask { dataset, tokenizer, packer, config, task, toxicity }
    }

    fn examples(&self) -> u64 {
        let all = self.dataset.len();
        self.config.max_examples.map_or(all, |most| most.min(all))
    }

    fn batches(&self) -> u32 {
        self.examples().div_ceil(u64::from(self.config.batch_size)) as u32
    }

    fn batch(&self, index: u32) -> Range<u64> {
        let size = u64::from(self.config.batch_size);
        let first = u64::from(index) * size;
        first..(first + size).min(self.examples())
    }

    /// The batches of one rank of several.
    pub fn evaluate_share(
        &self,
        model: &Model,
        weights: Weights,
        rank: u32,
        world_size: u32,
    ) -> Result<Vec<BatchEvaluation>> {
        let predicts = self.config.metrics.iter().any(|metric| metric.needs_predictions());
        let generator = match self.task {
            Task::Generation(generation) if predicts => Some(Generator::new(model, weights, generation.clone())),
            _ => None,
        };
        let batches = share(self.batches(), rank, world_size);
        batches.map(|index| self.evaluate_batch(model, weights, generator.as_ref(), index)).collect()
    }

    fn evaluate_batch(
        &self,
        model: &Model,
        weights: Weights,
        generator: Option<&Generator>,
        index: u32,
    ) -> Result<BatchEvaluation> {
        let examples = self.batch(index);
        let packed = self.packer.pack(0, examples.clone())?;
        let batch = upload(model, &packed)?;
        let (sums, texts) = match (self.task, generator) {
            (Task::Classification(classes), _) => {
                let (sums, logits) = model.classify(weights, &batch)?;
                let best = logits.chunks_exact(classes.names().len()).map(index_of_best);
                (sums, best.map(|class| classes.names()[class].clone()).collect())
            }
            (_, Some(generator)) => {
                (model.loss(weights, &batch)?, self.generate(generator, &packed, examples.clone())?)
            }
            (_, None) => (model.loss(weights, &batch)?, Vec::new()),
        };
        let toxicities = match self.toxicity {
            Some(model) => model.probabilities(&texts)?,
            None => Vec::new(),
        };
        Ok(BatchEvaluation {
            loss_sum: sums.loss_sum,
            target_tokens: sums.target_tokens,
            examples: examples.end - examples.start,
            predictions: examples.zip(texts).map(|(example, text)| self.prediction(example, text)).collect(),
            toxicities,
        })
    }

    fn prediction(&self, example: u64, prediction: String) -> Prediction {
        let example = self.dataset.example(example);
        Prediction { input: example.input.into_owned(), target: example.target.into_owned(), prediction }
    }

    /// The best output for each example; random numbers belong to the example, whoever computes it.
    fn generate(&self, generator: &Generator, packed: &PackedBatch, examples: Range<u64>) -> Result<Vec<String>> {
        let numbers: Vec<u64> = examples.collect();
        let sources = Sources { ids: &packed.source_ids, offsets: &packed.source_offsets, numbers: &numbers };
        let outputs = generator.generate(sources, &mut |_, _, _| {})?;
        let best =
            |outputs: Vec<Generated>| outputs.into_iter().next().map(|output| output.token_ids).unwrap_or_default();
        Ok(outputs.into_iter().map(|outputs| self.tokenizer.decode(&best(outputs))).collect())
    }

    /// The whole from the batches of all ranks, in order: the same numbers for any number of ranks.
    pub fn summarize(&self, batches: impl IntoIterator<Item = BatchEvaluation>) -> Evaluation {
        let (mut loss_sum, mut target_tokens, mut examples) = (0.0, 0, 0);
        let (mut predictions, mut toxicities) = (Vec::new(), Vec::new());
        for batch in batches {
            loss_sum += batch.loss_sum;
            target_tokens += batch.target_tokens;
            examples += batch.examples;
            predictions.extend(batch.predictions);
            toxicities.extend(batch.toxicities);
        }
        let loss = loss_sum / target_tokens.max(1) as f64;
        let pairs: Vec<Pair> = predictions.iter().map(Prediction::pair).collect();
        let mut metrics = metrics::scores(&self.config.metrics, &pairs, Some(loss));
        if self.toxicity.is_some() {
            metrics.extend(toxicity::scores(&toxicities));
        }
        Evaluation { loss, examples, target_tokens, metrics, predictions }
    }
}

/// The first of the largest.
fn index_of_best(logits: &[f32]) -> usize {
    (1..logits.len()).fold(0, |best, index| if logits[index] > logits[best] { index } else { best })
}

/// A packer of what the task's batches need.
pub fn packer(dataset: &Arc<Dataset>, tokenizer: &Arc<Tokenizer>, order: Order, limits: Limits, task: &Task) -> Packer {
    let packer = Packer::new(dataset.clone(), tokenizer.clone(), order, limits);
    match task.classes() {
        Some(classes) => packer.with_classes(classes.clone()),
        None => packer,
    }
}

/// A packed batch on the model's device.
pub fn upload(model: &Model, packed: &PackedBatch) -> Result<Batch> {
    let PackedBatch { source_ids, source_offsets, target_ids, target_offsets, .. } = packed;
    let (device, config) = (model.device(), model.config());
    let (start, eos) = (config.decoder_start_token_id, config.eos_token_id);
    Ok(match config.is_classifier() {
        true => Batch::classification(device, source_ids, source_offsets, target_ids, start, eos)?,
        false => Batch::new(device, source_ids, source_offsets, target_ids, target_offsets, start)?,
    })
}
