//! How probable given targets are.

use quintet_kernels::Segments;
use quintet_kernels::ops::CrossEntropy;

use super::decoder::encode;
use crate::parameters::Weights;
use crate::stack::{Encoded, Keep, Stack};
use crate::{Model, Result, head};

impl Model {
    /// Σ log p of each of `targets`, eos included, for one source, which is encoded once.
    ///
    /// # Panics
    /// Without targets, or where one is empty.
    pub fn score_targets<'a>(
        &'a self,
        weights: impl Into<Weights<'a>>,
        source_ids: &[u32],
        targets: &[Vec<u32>],
    ) -> Result<Vec<f32>> {
        assert!(!targets.is_empty() && targets.iter().all(|target| !target.is_empty()), "no targets, or an empty one");
        let (device, layout, config) = (self.device(), self.layout(), self.config());
        let weights = weights.into();
        let pass = self.inference_pass(weights);
        let source = Segments::from_offsets(&[0, source_ids.len() as u32]);
        let encoded = encode(self, &pass, source_ids, &source)?;

        let labels: Vec<u32> = targets.concat();
        let shifted = targets.iter().flat_map(|target| {
            std::iter::once(config.decoder_start_token_id).chain(target[..target.len() - 1].iter().copied())
        });
        let decoder_ids: Vec<u32> = shifted.collect();
        let ends = targets.iter().scan(0, |end, target| {
            *end += target.len() as u32;
            Some(*end)
        });
        let offsets: Vec<u32> = std::iter::once(0).chain(ends).collect();
        let target = Segments::from_offsets(&offsets);
        // All targets attend to the same source.
        let sources = Segments::from_ranges(targets.iter().map(|_| 0..source_ids.len()));
        let ids = device.upload(&decoder_ids, decoder_ids.len(), 1)?;
        let encoded = Some(Encoded { segments: &sources, output: encoded.view() });
        let stack = Stack { layout: layout.decoder(), decoder: true, ids: ids.view(), segments: &target, encoded };
        let (decoded, _) = stack.forward(&pass, Keep::Nothing)?;

        let labels = device.upload(&labels, labels.len(), 1)?;
        let loss = CrossEntropy { scale: config.head_scale(), label_smoothing: 0.0, gradient_scale: 1.0 };
        let losses = head::loss(&pass, decoded.view(), labels.view(), loss)?.download::<f32>()?;
        Ok((0..targets.len()).map(|index| -losses[target.rows(index)].iter().sum::<f32>()).collect())
    }
}
