//! Choosing a token: the most probable one, or one drawn after temperature, top-k and top-p.

use quintet_kernels::uniform;

use super::Generation;
use super::scores::Candidate;

/// More candidates than this are not worth selecting on the device.
const TOP_K_MAX: usize = 256;

/// One sequence of an input, whose random numbers are its own: they do not depend on what else is in the batch.
#[derive(Clone, Copy, Debug)]
pub(super) struct Draw {
    /// The number of the input among all.
    pub(super) input: u64,
    /// The number of the sequence among those of the input.
    pub(super) sequence: u64,
    /// The number of the token.
    pub(super) step: u64,
}

/// How many of the best candidates decide; none: all.
pub(super) fn candidates_needed(generation: &Generation, vocabulary: usize) -> Option<usize> {
    match (generation.do_sample, generation.top_k) {
        (false, _) => Some(1),
        (true, 1..=TOP_K_MAX) => Some(generation.top_k.min(vocabulary)),
        (true, _) => None,
    }
}

/// The probabilities of what sampling draws from, most probable first: Hugging Face's warpers in their order.
///
/// Of the tokens before it, one that is kept has less than `top_p` of all probability.
pub(super) fn warped(mut candidates: Vec<Candidate>, generation: &Generation) -> Vec<(Candidate, f64)> {
    candidates.sort_by(|a, b| b.value.total_cmp(&a.value).then(a.token.cmp(&b.token)));
    if generation.top_k > 0 {
        candidates.truncate(generation.top_k);
    }
    let Some(first) = candidates.first() else { return Vec::new() };
    let most = first.value / generation.temperature;
    let weight = |candidate: &Candidate| f64::from(candidate.value / generation.temperature - most).exp();
    let mut weighted: Vec<(Candidate, f64)> = candidates.iter().map(|it| (*it, weight(it))).collect();
    let total: f64 = weighted.iter().map(|(_, weight)| weight).sum();
    if generation.top_p < 1.0 {
        let mut before = 0.0;
        let kept = weighted.iter().take_while(|(_, weight)| {
            let keep = before < generation.top_p * total;
            before += weight;
            keep
        });
        let kept = kept.count();
        weighted.truncate(kept);
    }
    let total: f64 = weighted.iter().map(|(_, weight)| weight).sum();
    weighted.iter_mut().for_each(|(_, weight)| *weight /= total);
    weighted
}

/// The next token; none where all are banned.
pub(super) fn choose(candidates: &[Candidate], generation: &Generation, draw: Draw) -> Option<Candidate> {
    if !generation.do_sample {
        return candidates.first().copied();
    }
    let weighted = warped(candidates.to_vec(), generation);
    // A stream for each sequence, of a number for each of its tokens.
    let number = uniform(generation.seed, draw.input << 16 | draw.sequence, draw.step);
    let mut end = 0.0;
    let drawn = weighted.iter().find(|(_, probability)| {
        end += probability;
        number < end
    });
    drawn.or(weighted.last()).map(|(candidate, _)| *candidate)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generate::GenerationOptions;

    fn generation(options: serde_json::Value) -> Generation {
        let options: GenerationOptions = serde_json::from_value(options).unwrap();
        GenerationOptions { do_sample: Some(true), ..options }.resolve(&crate::Config::default()).unwrap()
    }

    fn candidates(logits: &[f32]) -> Vec<Candidate> {
        logits.iter().zip(0..).map(|(&value, token)| Candidate { token, value, log_prob: value }).collect()
    }

    fn tokens(logits: &[f32], options: serde_json::Value) -> Vec<u32> {
        warped(candidates(logits), &generation(options)).iter().map(|(candidate, _)| candidate.token).collect()
    }

    #[test]
    fn warpers_follow_each_other() {
        use serde_json::json;
        let logits = [0.4_f32, 0.3, 0.2, 0.1].map(f32::ln);
        assert_eq!(tokens(&logits, json!({"top_k": 0})), [0, 1, 2, 3]);
        assert_eq!(tokens(&logits, json!({"top_k": 2})), [0, 1]);
        assert_eq!(tokens(&logits, json!({"top_p": 0.3})), [0]);
        assert_eq!(tokens(&logits, json!({"top_p": 0.41})), [0, 1]);
        assert_eq!(tokens(&logits, json!({"top_p": 0.71})), [0, 1, 2]);
        // Of two tokens the first has 4/7: top-p sees what top-k left.
        assert_eq!(tokens(&logits, json!({"top_k": 2, "top_p": 0.57})), [0]);
        assert_eq!(tokens(&logits, json!({"top_k": 2, "top_p": 0.58})), [0, 1]);
        // Squared and normed: 16, 9, 4 and 1 of 30.
        assert_eq!(tokens(&logits, json!({"temperature": 0.5, "top_p": 0.53})), [0]);
        assert_eq!(tokens(&logits, json!({"temperature": 0.5, "top_p": 0.54})), [0, 1]);
    }

    /// χ² of 20,000 draws against the exact probabilities after warping.
    #[test]
    fn draws_have_the_warped_distribution() {
        use serde_json::json;
        let logits: Vec<f32> = (0..40).map(|index| ((index * 29) % 41) as f32 / 12.0).collect();
        for options in [
            json!({"top_k": 0}),
            json!({"top_k": 12}),
            json!({"top_k": 0, "top_p": 0.8}),
            json!({"temperature": 0.6, "top_k": 20, "top_p": 0.9}),
            json!({"temperature": 1.7, "top_k": 0}),
        ] {
            let generation = generation(options.clone());
            let exact = warped(candidates(&logits), &generation);
            let draws = 20_000;
            let mut counts = vec![0_u32; logits.len()];
            for index in 0..draws {
                let draw = Draw { input: index / 8, sequence: index % 4, step: index / 4 % 2 };
                let drawn = choose(&candidates(&logits), &generation, draw).unwrap();
                counts[drawn.token as usize] += 1;
            }
            let expected = |probability: f64| probability * draws as f64;
            let chi_squared: f64 = exact
                .iter()
                .map(|(candidate, probability)| {
                    let difference = f64::from(counts[candidate.token as usize]) - expected(*probability);
                    difference * difference / expected(*probability)
                })
                .sum();
            let inside: u32 = exact.iter().map(|(candidate, _)| counts[candidate.token as usize]).sum();
            assert_eq!(u64::from(inside), draws, "{options}: drawn outside of what warping left");
            // Mean k and deviation √2k for k degrees of freedom: four deviations above.
            let freedom = (exact.len() - 1) as f64;
            assert!(chi_squared < freedom + 4.0 * (2.0 * freedom).sqrt(), "{options}: {chi_squared} of {freedom}");
            assert!(exact.iter().all(|(_, probability)| expected(*probability) > 5.0));
        }
    }
}
