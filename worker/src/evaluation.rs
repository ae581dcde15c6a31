//! Loss and metrics of a model on a dataset, shared out over ranks.

use std::ops::Range;

use std::sync::Arc;

use quintet_data::{Dataset, Limits, Order, PackedBatch, Packer, Tokenizer, share};
use quintet_t5::{Batch, Generation, Generator, Model, Sources, Weights};
use serde::{Deserialize, Serialize};

use crate::Result;
use crate::config::EvaluationConfig;
use crate::metrics::{self, Pair};

/// What an evaluation is over: the first examples of a dataset, in file order.
pub struct EvaluationTask<'a> {
    dataset: &'a Dataset,
    tokenizer: &'a Tokenizer,
    packer: Packer,
    config: &'a EvaluationConfig,
    generation: &'a Generation,
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
}

/// An evaluation as a whole.
#[derive(Clone, Debug, PartialEq)]
pub struct Evaluation {
    /// Token mean.
    pub loss: f64,
    pub examples: u64,
    pub target_tokens: u64,
    /// By name, in the order asked for.
    pub metrics: Vec<(&'static str, f64)>,
    pub predictions: Vec<Prediction>,
}

impl<'a> EvaluationTask<'a> {
    pub fn new(
        dataset: &'a Arc<Dataset>,
        tokenizer: &'a Arc<Tokenizer>,
        limits: Limits,
        config: &'a EvaluationConfig,
        generation: &'a Generation,
    ) -> Self {
        let order = Order::new(dataset.len(), 0, false);
        let packer = Packer::new(dataset.clone(), tokenizer.clone(), order, limits);
        EvaluationTask { dataset, tokenizer, packer, config, generation }
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
        let generates = self.config.metrics.iter().any(|metric| metric.needs_predictions());
        let generator = generates.then(|| Generator::new(model, weights, self.generation.clone()));
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
        let sums = model.loss(weights, &batch)?;
        let predictions = match generator {
            Some(generator) => self.predict(generator, &packed, examples.clone())?,
            None => Vec::new(),
        };
        Ok(BatchEvaluation {
            loss_sum: sums.loss_sum,
            target_tokens: sums.target_tokens,
            examples: examples.end - examples.start,
            predictions,
        })
    }

    /// The best output for each example; random numbers belong to the example, whoever computes it.
    fn predict(&self, generator: &Generator, packed: &PackedBatch, examples: Range<u64>) -> Result<Vec<Prediction>> {
        let numbers: Vec<u64> = examples.clone().collect();
        let sources = Sources { ids: &packed.source_ids, offsets: &packed.source_offsets, numbers: &numbers };
        let outputs = generator.generate(sources, &mut |_, _, _| {})?;
        let predictions = examples.zip(outputs).map(|(example, outputs)| {
            let example = self.dataset.example(example);
            let best = outputs.first().map_or(&[][..], |output| &output.token_ids);
            Prediction {
                input: example.input.into_owned(),
                target: example.target.into_owned(),
                prediction: self.tokenizer.decode(best),
            }
        });
        Ok(predictions.collect())
    }

    /// The whole from the batches of all ranks, in order: the same numbers for any number of ranks.
    pub fn summarize(&self, batches: impl IntoIterator<Item = BatchEvaluation>) -> Evaluation {
        let (mut loss_sum, mut target_tokens, mut examples) = (0.0, 0, 0);
        let mut predictions = Vec::new();
        for batch in batches {
            loss_sum += batch.loss_sum;
            target_tokens += batch.target_tokens;
            examples += batch.examples;
            predictions.extend(batch.predictions);
        }
        let loss = loss_sum / target_tokens.max(1) as f64;
        let pairs: Vec<Pair> = predictions.iter().map(Prediction::pair).collect();
        let metrics = metrics::scores(&self.config.metrics, &pairs, Some(loss));
        Evaluation { loss, examples, target_tokens, metrics, predictions }
    }
}

/// A packed batch on the model's device.
pub fn upload(model: &Model, packed: &PackedBatch) -> Result<Batch> {
    Ok(Batch::new(
        model.device(),
        &packed.source_ids,
        &packed.source_offsets,
        &packed.target_ids,
        &packed.target_offsets,
        model.config().decoder_start_token_id,
    )?)
}
