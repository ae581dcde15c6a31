//! How far a score could be from what it is on this set by chance: bootstrap resampling (Efron 1979; for texts Koehn 2004),
//! paired, so that two systems are compared on the same drawn examples.

use rayon::prelude::*;

use super::Contributions;

/// Samples of a set, each as large as the set, drawn with repetitions: the same for the same seed.
#[derive(Clone, Copy, Debug)]
pub struct Resampling {
    pub seed: u64,
    pub resamples: u32,
}

/// The middle 95 % of a distribution.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Interval {
    pub low: f64,
    pub high: f64,
}

impl Resampling {
    /// The score of each sample.
    pub fn scores(&self, contributions: &Contributions) -> Vec<f64> {
        let examples = contributions.len() as u64;
        let score = |sample| contributions.score_of(draws(self.seed, sample, examples));
        (0..u64::from(self.resamples)).into_par_iter().map(score).collect()
    }
}

impl Interval {
    /// Of a distribution that samples show; `values` may be in any order.
    pub fn of(values: &[f64]) -> Self {
        let mut sorted = values.to_vec();
        sorted.sort_unstable_by(f64::total_cmp);
        Self { low: percentile(&sorted, 0.025), high: percentile(&sorted, 0.975) }
    }

    /// Whether all of it is on one side of 0: a difference that is so is hardly chance.
    pub fn excludes_zero(&self) -> bool {
        self.low > 0.0 || self.high < 0.0
    }
}

/// Between the two values nearest to the place, in proportion, as numpy's default.
fn percentile(sorted: &[f64], share: f64) -> f64 {
    let place = share * sorted.len().saturating_sub(1) as f64;
    let (below, fraction) = (place.floor() as usize, place.fract());
    let at = |index: usize| sorted.get(index.min(sorted.len().saturating_sub(1))).copied().unwrap_or(f64::NAN);
    at(below) + (at(below + 1) - at(below)) * fraction
}

/// The examples of a sample.
fn draws(seed: u64, sample: u64, examples: u64) -> impl Iterator<Item = usize> {
    let mut state = mix(seed ^ mix(sample));
    (0..examples).map(move |_| {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        // The upper half of the product: uniform but for less than examples / 2^64.
        ((u128::from(mix(state)) * u128::from(examples)) >> 64) as usize
    })
}

/// The output function of SplitMix64 (Steele, Lea, Flood 2014).
fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::super::{Metric, Pair};
    use super::*;

    #[test]
    fn percentiles_are_numpys() {
        let sorted = [1.0, 2.0, 4.0, 8.0];
        assert_eq!([0.0, 0.25, 0.5, 1.0].map(|share| percentile(&sorted, share)), [1.0, 1.75, 3.0, 8.0]);
        assert_eq!(Interval::of(&[5.0]), Interval { low: 5.0, high: 5.0 });
    }

    /// Of n answers of which a share p is right, the share of a sample spreads by √(p (1 − p) / n).
    #[test]
    fn intervals_are_as_wide_as_statistics_say() {
        let texts: Vec<&str> = (0..400).map(|index| if index % 4 == 0 { "yes" } else { "no" }).collect();
        let pairs: Vec<Pair> = texts.iter().map(|prediction| Pair { prediction, target: "yes" }).collect();
        let contributions = Contributions::new(Metric::Accuracy, &pairs).unwrap();
        let resampling = Resampling { seed: 1, resamples: 2000 };
        let scores = resampling.scores(&contributions);
        assert_eq!(scores, resampling.scores(&contributions));
        let mean = scores.iter().sum::<f64>() / scores.len() as f64;
        assert!((mean - 0.25).abs() < 0.002, "{mean}");
        let spread = (0.25_f64 * 0.75 / 400.0).sqrt();
        let Interval { low, high } = Interval::of(&scores);
        assert!((high - low - 2.0 * 1.96 * spread).abs() < 0.2 * spread, "{low} to {high}");
        assert!(Resampling { seed: 2, resamples: 2000 }.scores(&contributions) != scores);
    }
}
