//! A classifier at work on texts.

use quintet_data::Tokenizer;
use quintet_t5::{Batch, Model, Weights};

use crate::Result;

/// Of each text the log probabilities of the model's classes. Texts are cut to `max_source_length` tokens.
///
/// # Errors
/// A text that cannot be tokenized, or the device.
///
/// # Panics
/// If the model is no classifier.
pub fn log_probabilities(
    model: &Model,
    weights: Weights,
    tokenizer: &Tokenizer,
    texts: &[impl AsRef<str>],
    max_source_length: usize,
) -> Result<Vec<Vec<f64>>> {
    let (mut ids, mut offsets) = (Vec::new(), vec![0]);
    for text in texts {
        ids.extend(tokenizer.encode(text.as_ref(), max_source_length)?);
        offsets.push(ids.len() as u32);
    }
    let config = model.config();
    // Labels are of no consequence to logits.
    let labels = vec![0; texts.len()];
    let (start, eos) = (config.decoder_start_token_id, config.eos_token_id);
    let batch = Batch::classification(model.device(), &ids, &offsets, &labels, start, eos)?;
    let (_, logits) = model.classify(weights, &batch)?;
    Ok(logits.chunks_exact(config.num_labels()).map(log_softmax).collect())
}

fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let above = |logit: f32| f64::from(logit) - f64::from(largest);
    let sum: f64 = logits.iter().map(|&logit| above(logit).exp()).sum();
    logits.iter().map(|&logit| above(logit) - sum.ln()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_add_up_to_one() {
        let logs = log_softmax(&[1000.0, 1001.0, -1e30]);
        assert!((logs.iter().map(|log| log.exp()).sum::<f64>() - 1.0).abs() < 1e-12);
        assert!((logs[0] - logs[1] + 1.0).abs() < 1e-12 && logs[2] < -1e29);
    }
}
