//! Scores of predicted texts against their targets.

use crate::config::Metric;

/// Counts from which the scores of a set follow. Tallies of parts add up to that of the whole.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    pub examples: u64,
    /// Predictions equal to the target, character by character.
    pub exact: u64,
    /// Examples whose sequences of tokens differ.
    pub wrong_sequences: u64,
    /// Sum of edit distances, in tokens.
    pub token_errors: u64,
    /// Tokens in all targets.
    pub target_tokens: u64,
}

impl Tally {
    /// Scores one prediction. Tokens are what whitespace separates.
    pub fn add(&mut self, prediction: &str, target: &str) {
        let predicted: Vec<&str> = prediction.split_whitespace().collect();
        let wanted: Vec<&str> = target.split_whitespace().collect();
        self.examples += 1;
        self.exact += u64::from(prediction == target);
        self.wrong_sequences += u64::from(predicted != wanted);
        self.token_errors += edit_distance(&predicted, &wanted);
        self.target_tokens += wanted.len() as u64;
    }

    pub fn merge(&mut self, other: Tally) {
        self.examples += other.examples;
        self.exact += other.exact;
        self.wrong_sequences += other.wrong_sequences;
        self.token_errors += other.token_errors;
        self.target_tokens += other.target_tokens;
    }

    /// The share of predictions equal to their target; 0 without examples.
    pub fn exact_match(&self) -> f64 {
        ratio(self.exact, self.examples)
    }

    /// Insertions, deletions and substitutions of tokens, as a share of the targets' tokens;
    /// above 1 where predictions ramble.
    pub fn phoneme_error_rate(&self) -> f64 {
        ratio(self.token_errors, self.target_tokens)
    }

    /// The share of examples with any wrong token.
    ///
    /// This is the word error rate of grapheme-to-phoneme conversion, where an example is a
    /// word; it is not speech recognition's, which is an edit distance over words.
    pub fn word_error_rate(&self) -> f64 {
        ratio(self.wrong_sequences, self.examples)
    }
}

/// The scores asked for, by name; the loss is not among them, because texts do not tell it.
pub fn scores(wanted: &[Metric], tally: &Tally) -> Vec<(&'static str, f64)> {
    let score = |&metric: &Metric| {
        let value = match metric {
            Metric::Loss => return None,
            Metric::ExactMatch => tally.exact_match(),
            Metric::PhonemeErrorRate => tally.phoneme_error_rate(),
            Metric::WordErrorRate => tally.word_error_rate(),
        };
        Some((metric.name(), value))
    };
    wanted.iter().filter_map(score).collect()
}

fn ratio(count: u64, total: u64) -> f64 {
    count as f64 / total.max(1) as f64
}

/// The Levenshtein distance: the least number of insertions, deletions and substitutions.
fn edit_distance(a: &[&str], b: &[&str]) -> u64 {
    // distances[j]: from the tokens of `a` seen so far to the first j of `b`.
    let mut distances: Vec<u64> = (0..=b.len() as u64).collect();
    for (seen, x) in (1..).zip(a) {
        let mut diagonal = std::mem::replace(&mut distances[0], seen);
        for (j, y) in b.iter().enumerate() {
            let substituted = diagonal + u64::from(x != y);
            diagonal = distances[j + 1];
            distances[j + 1] = substituted.min(diagonal + 1).min(distances[j] + 1);
        }
    }
    distances[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tally(pairs: &[(&str, &str)]) -> Tally {
        let mut tally = Tally::default();
        pairs.iter().for_each(|(prediction, target)| tally.add(prediction, target));
        tally
    }

    #[test]
    fn edit_distances() {
        for (a, b, distance) in [
            ("", "", 0),
            ("", "a b c", 3),
            ("a b c", "", 3),
            ("k i t t e n", "s i t t i n g", 3),
            ("s a t u r d a y", "s u n d a y", 3),
            ("a b c", "b c a", 2),
            ("HH AH L OW", "HH EH L OW", 1),
        ] {
            assert_eq!(tally(&[(a, b)]).token_errors, distance, "{a} → {b}");
            assert_eq!(tally(&[(b, a)]).token_errors, distance, "{b} → {a}");
        }
    }

    #[test]
    fn rates() {
        let pairs =
            [("HH AH L OW", "HH AH L OW"), ("W ER L", "W ER L D"), ("K AE T S", "K AE T"), (" D AO G", "D AO G")];
        let whole = tally(&pairs);
        assert_eq!(whole.exact_match(), 0.25);
        assert_eq!(whole.phoneme_error_rate(), 2.0 / 14.0);
        assert_eq!(whole.word_error_rate(), 0.5);
        let mut parts = tally(&pairs[..1]);
        parts.merge(tally(&pairs[1..]));
        assert_eq!(parts, whole);
    }

    #[test]
    fn nothing_to_score_is_not_a_nan() {
        let none = Tally::default();
        assert_eq!((none.exact_match(), none.phoneme_error_rate(), none.word_error_rate()), (0.0, 0.0, 0.0));
    }
}
