//! Floating-point operations of a training step, for utilisation figures.

use crate::Config;

/// Token counts of a batch, per example where attention is quadratic in them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BatchShape {
    /// Source and target tokens of each example.
    pub lengths: Vec<(usize, usize)>,
}

/// Operations of forward and backward (three times the forward pass; recomputation is not counted).
///
/// A product of `m×k` and `k×n` counts `2·m·k·n`. Attention counts every pair of query and key, also those that a causal
/// mask hides, as is usual. "6 · parameters · tokens" is wrong for an encoder–decoder, more than twofold.
pub fn training_flops(config: &Config, batch: &BatchShape) -> f64 {
    let [d, d_ff, vocab] = [config.d_model, config.d_ff, config.vocab_size].map(|size| size as f64);
    let inner = config.inner() as f64;
    let (encoder_layers, decoder_layers) = (config.num_layers as f64, config.decoder_layers() as f64);
    let feed_forward = if config.is_gated() { 3.0 } else { 2.0 } * d * d_ff;
    let forward = |&(source, target): &(usize, usize)| {
        let (source, target) = (source as f64, target as f64);
        let encoder =
            encoder_layers * (2.0 * (4.0 * d * inner + feed_forward) * source + 4.0 * inner * source * source);
        let decoder =
            decoder_layers * (2.0 * (6.0 * d * inner + feed_forward) * target + 4.0 * inner * target * target);
        let cross = decoder_layers * (4.0 * d * inner * source + 4.0 * inner * target * source);
        encoder + decoder + cross + 2.0 * vocab * d * target
    };
    3.0 * batch.lengths.iter().map(forward).sum::<f64>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn v1_1_base_at_512_114_is_426_gflop() {
        let config = crate::preset("t5-v1_1-base").unwrap();
        let flops = training_flops(&config, &BatchShape { lengths: vec![(512, 114)] });
        assert!((flops / 1e9 - 425.9).abs() < 0.05, "{flops}");
    }
}
