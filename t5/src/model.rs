//! A T5: what a micro-batch's loss is, and its gradient.

use std::sync::Arc;

use quintet_kernels::ops::CrossEntropy;
use quintet_kernels::{DType, Device, Segments, Tensor, View};

use crate::classifier::Classifier;
use crate::parameters::{Layout, Parameters, Weights};
use crate::pass::{BackwardPass, Masks, OnFinished, Pass};
use crate::stack::{Encoded, Keep, Stack, StackSaved};
use crate::{Batch, Config, Result, head};

/// The plan of a T5 on a device; the weights are handed to it.
pub struct Model {
    device: Device,
    config: Config,
    layout: Arc<Layout>,
}

/// The loss of a micro-batch as a sum, never a mean: means are taken once, over the global batch.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LossSums {
    /// Σ −log p(label), without smoothing.
    pub loss_sum: f64,
    pub target_tokens: u64,
}

/// What training is besides a loss.
#[derive(Clone, Copy, Debug)]
pub struct TrainOptions {
    /// The randomness of dropout, the same whoever computes the micro-batch: one seed per run and step.
    pub seed: u64,
    /// The number of this micro-batch within its step.
    pub micro_batch: u32,
    pub label_smoothing: f32,
    /// Keep only each block's input, and compute the block again on the way back.
    pub gradient_checkpointing: bool,
    /// The gradient is this many times that of the loss, from the logits on: more than 1 so that fp16 can hold it.
    pub gradient_scale: f32,
}

/// The two stacks of a forward pass, with what their backward passes need.
struct Forward {
    encoded: Tensor,
    encoder: StackSaved,
    decoded: Tensor,
    decoder: StackSaved,
}

impl Model {
    /// Fails where the configuration is out of range.
    pub fn new(device: &Device, config: Config) -> Result<Self> {
        config.validate()?;
        let layout = Arc::new(Layout::new(&config));
        Ok(Model { device: device.clone(), config, layout })
    }

    pub fn device(&self) -> &Device {
        &self.device
    }

    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Replaces the configuration's `dropout_rate`, which [`Model::train`] uses.
    pub fn set_dropout_rate(&mut self, rate: f32) {
        assert!((0.0..1.0).contains(&rate));
        self.config.dropout_rate = rate;
    }

    pub fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    pub fn zero_parameters(&self, dtype: DType) -> Result<Parameters> {
        Parameters::zeros(&self.device, self.layout.arena().clone(), dtype)
    }

    pub(crate) fn pass<'a>(&'a self, weights: Weights<'a>, masks: Masks) -> Pass<'a> {
        Pass { device: &self.device, config: &self.config, layout: &self.layout, weights, masks, prepared: None }
    }

    pub(crate) fn inference_pass<'a>(&'a self, weights: Weights<'a>) -> Pass<'a> {
        self.pass(weights, Masks { training: false, probability: 0.0, seed: 0, micro_batch: 0 })
    }

    /// The loss of a batch as in evaluation: no dropout, no smoothing.
    pub fn loss<'a>(&'a self, weights: impl Into<Weights<'a>>, batch: &Batch) -> Result<LossSums> {
        let weights = weights.into();
        let pass = self.inference_pass(weights);
        let forward = self.forward(&pass, batch, Keep::Nothing)?;
        let (decoded, labels, loss) = (forward.decoded.view(), batch.labels.view(), self.cross_entropy(0.0, 1.0));
        let losses = match self.classifier(batch) {
            Some(classifier) => classifier.loss(&pass, decoded, labels, loss)?.0,
            None => head::loss(&pass, decoded, labels, loss)?,
        };
        sums(&losses)
    }

    fn cross_entropy(&self, label_smoothing: f32, gradient_scale: f32) -> CrossEntropy {
        CrossEntropy { scale: self.config.head_scale(), label_smoothing, gradient_scale }
    }

    /// The loss of a micro-batch, and the gradient of its **sum** over target tokens (times
    /// [`TrainOptions::gradient_scale`]), added to `gradients` (f32).
    pub fn train<'a>(
        &'a self,
        weights: impl Into<Weights<'a>>,
        batch: &Batch,
        options: TrainOptions,
        gradients: &mut Parameters,
    ) -> Result<LossSums> {
        self.train_observed(weights, batch, options, gradients, &mut |_, _| {})
    }

    /// [`Model::train`] for one who wants the gradient piece by piece: the arena is finished from its end to its start, the
    /// decoder before the encoder, and the embedding last.
    pub fn train_observed<'a>(
        &'a self,
        weights: impl Into<Weights<'a>>,
        batch: &Batch,
        options: TrainOptions,
        gradients: &mut Parameters,
        on_finished: OnFinished,
    ) -> Result<LossSums> {
        assert_eq!(gradients.dtype(), DType::F32);
        let TrainOptions { seed, micro_batch, label_smoothing, gradient_checkpointing, gradient_scale } = options;
        let weights = weights.into();
        let masks = Masks { training: true, probability: self.config.dropout_rate, seed, micro_batch };
        let pass = self.pass(weights, masks);
        let keep = if gradient_checkpointing { Keep::Inputs } else { Keep::Activations };
        let Forward { encoded, encoder, decoded, decoder } = self.forward(&pass, batch, keep)?;
        let mut backward = BackwardPass { pass: &pass, gradients, on_finished };

        let loss = self.cross_entropy(label_smoothing, gradient_scale);
        let (h, labels) = (decoded.view(), batch.labels.view());
        let (losses, d_decoded) = match self.classifier(batch) {
            Some(classifier) => classifier.train(&mut backward, h, labels, loss)?,
            None => head::train(&mut backward, h, labels, loss)?,
        };
        drop(decoded);
        if let Some(head) = self.layout.lm_head {
            backward.finished(head.start());
        }

        let mut d_encoded = self.device.zeros(weights.dtype(), encoded.rows(), encoded.cols())?;
        self.decoder(batch, &encoded).backward(&mut backward, decoder, d_decoded, Some(&mut d_encoded))?;
        drop(encoded);
        self.encoder(batch.source_ids.view(), &batch.source).backward(&mut backward, encoder, d_encoded, None)?;
        backward.finished(0);
        sums(&losses)
    }

    /// The logits `[target tokens, vocab_size]` of a batch as in evaluation, row after row, which no loss ever has in memory.
    ///
    /// # Panics
    /// If the model has no output head.
    pub fn logits<'a>(&'a self, weights: impl Into<Weights<'a>>, batch: &Batch) -> Result<Vec<f32>> {
        let pass = self.inference_pass(weights.into());
        let decoded = self.forward(&pass, batch, Keep::Nothing)?.decoded;
        let mut logits = self.device.empty(DType::F32, decoded.rows(), self.config.vocab_size)?;
        pass.linear_into(decoded.view(), self.layout.head(), logits.view_mut())?;
        let scale = self.config.head_scale();
        Ok(logits.download::<f32>()?.into_iter().map(|logit| logit * scale).collect())
    }

    /// Of a classifier: the loss as in evaluation, and the logits `[examples, classes]`, row after row.
    ///
    /// # Panics
    /// If the model or the batch is none of a classifier.
    pub fn classify<'a>(&'a self, weights: impl Into<Weights<'a>>, batch: &Batch) -> Result<(LossSums, Vec<f32>)> {
        let pass = self.inference_pass(weights.into());
        let forward = self.forward(&pass, batch, Keep::Nothing)?;
        let classifier = self.classifier(batch).expect("a classifier"); // why: who asks has looked at the class
        let loss = self.cross_entropy(0.0, 1.0);
        let (losses, logits) = classifier.loss(&pass, forward.decoded.view(), batch.labels.view(), loss)?;
        Ok((sums(&losses)?, pass.cast(logits.view(), DType::F32)?.download()?))
    }

    /// The head over a batch, of a classifier.
    fn classifier<'a>(&'a self, batch: &'a Batch) -> Option<Classifier<'a>> {
        let layout = self.layout.classifier.as_ref()?;
        let pooled_rows = batch.pooled_rows.as_ref().expect("a batch of `Batch::classification`"); // why: its promise
        Some(Classifier { layout, pooled_rows: pooled_rows.view() })
    }

    /// The encoder's last hidden states `[tokens, d_model]`, row after row, of concatenated ids and their offsets
    /// (`cu_seqlens`, one more than there are texts).
    pub fn encode<'a>(&'a self, weights: impl Into<Weights<'a>>, ids: &[u32], offsets: &[u32]) -> Result<Vec<f32>> {
        let pass = self.inference_pass(weights.into());
        let segments = Segments::from_offsets(offsets);
        assert_eq!(segments.end(), ids.len(), "offsets end with the ids");
        let ids = self.device.upload(ids, ids.len(), 1)?;
        let (encoded, _) = self.encoder(ids.view(), &segments).forward(&pass, Keep::Nothing)?;
        Ok(pass.cast(encoded.view(), DType::F32)?.download()?)
    }

    fn forward(&self, pass: &Pass, batch: &Batch, keep: Keep) -> Result<Forward> {
        let (encoded, encoder) = self.encoder(batch.source_ids.view(), &batch.source).forward(pass, keep)?;
        let (decoded, decoder) = self.decoder(batch, &encoded).forward(pass, keep)?;
        Ok(Forward { encoded, encoder, decoded, decoder })
    }

    fn encoder<'a>(&'a self, ids: View<'a>, segments: &'a Segments) -> Stack<'a> {
        Stack { layout: &self.layout.encoder, decoder: false, ids, segments, encoded: None }
    }

    fn decoder<'a>(&'a self, batch: &'a Batch, encoded: &'a Tensor) -> Stack<'a> {
        Stack {
            layout: self.layout.decoder(),
            decoder: true,
            ids: batch.decoder_ids.view(),
            segments: &batch.target,
            encoded: Some(Encoded { segments: &batch.source, output: encoded.view() }),
        }
    }
}

/// Sums in f64, in the order of the rows.
fn sums(losses: &Tensor) -> Result<LossSums> {
    let losses = losses.download::<f32>()?;
    Ok(LossSums { loss_sum: losses.iter().map(|&loss| f64::from(loss)).sum(), target_tokens: losses.len() as u64 })
}
