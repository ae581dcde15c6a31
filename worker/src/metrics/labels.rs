//! Scores of predictions that name a class. Classes are whatever labels occur in predictions or targets.

use std::collections::HashMap;

use super::text::{Numbering, strip};

/// Whether the label is the right one; white space around it does not matter.
pub(super) fn is_right(prediction: &str, target: &str) -> f64 {
    f64::from(u8::from(strip(prediction) == strip(target)))
}

/// The classes of each example's prediction and target, as numbers.
pub(super) fn classes<'a>(pairs: impl Iterator<Item = (&'a str, &'a str)>) -> Vec<[u32; 2]> {
    let mut numbering = Numbering::default();
    pairs.map(|(prediction, target)| [prediction, target].map(|label| numbering.number(strip(label)))).collect()
}

/// The mean over classes of the F-measure of finding them, as scikit-learn's `f1_score(average="macro")`: classes that occur in
/// predictions alone count, with 0.
pub(super) fn macro_f1(classes: impl Iterator<Item = [u32; 2]>) -> f64 {
    /// Of one class: found rightly, predicted, there to be found.
    #[derive(Default)]
    struct Found {
        right: u64,
        predicted: u64,
        wanted: u64,
    }
    let mut found: HashMap<u32, Found> = HashMap::new();
    for [predicted, wanted] in classes {
        found.entry(predicted).or_default().predicted += 1;
        let class = found.entry(wanted).or_default();
        class.wanted += 1;
        class.right += u64::from(predicted == wanted);
    }
    let count = found.len().max(1) as f64;
    // Added in an order that is the same on every run.
    let mut scores: Vec<f64> =
        found.values().map(|class| 2.0 * class.right as f64 / (class.predicted + class.wanted) as f64).collect();
    scores.sort_unstable_by(f64::total_cmp);
    scores.iter().sum::<f64>() / count
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_class_counts_alike() {
        let score = |pairs: &[(&str, &str)]| macro_f1(classes(pairs.iter().copied()).into_iter());
        assert_eq!(score(&[("pos", "pos"), (" neg\n", "neg")]), 1.0);
        // pos: 2/3, neg: 2/3, and "good", which nobody asked for: 0.
        let pairs = [("pos", "pos"), ("pos", "neg"), ("neg", "neg"), ("good", "pos"), ("neg", "neg")];
        let expected = (2.0 / 4.0 + 4.0 / 5.0 + 0.0) / 3.0;
        assert!((score(&pairs) - expected).abs() < 1e-12);
        assert_eq!(score(&[]), 0.0);
    }
}
