//! BLEU (Papineni et al. 2002) over a whole set, equal to sacrebleu's with its defaults: the tokens of mteval-v13a, and
//! precisions of 0 smoothed as NIST does. <https://github.com/mjpost/sacrebleu>

use std::ops::AddAssign;
use std::sync::LazyLock;

use regex::Regex;

use super::text::{Numbering, common, count, strip_end, words};

/// Longest n-gram.
const ORDER: usize = 4;

/// What a set's score follows from; those of parts add up to that of the whole.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    predicted_tokens: u64,
    target_tokens: u64,
    /// By n − 1: n-grams of the prediction that the target has too.
    correct: [u64; ORDER],
    /// By n − 1: n-grams of the prediction.
    total: [u64; ORDER],
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Counts) {
        self.predicted_tokens += other.predicted_tokens;
        self.target_tokens += other.target_tokens;
        self.correct.iter_mut().zip(other.correct).for_each(|(sum, count)| *sum += count);
        self.total.iter_mut().zip(other.total).for_each(|(sum, count)| *sum += count);
    }
}

impl Counts {
    pub(super) fn of(prediction: &str, target: &str) -> Self {
        let (prediction, target) = (tokenize(prediction), tokenize(target));
        let mut numbering = Numbering::default();
        let mut numbers = |text| -> Vec<u32> { words(text).map(|word| numbering.number(word)).collect() };
        let (predicted, wanted) = (numbers(&prediction), numbers(&target));
        let mut counts = Counts {
            predicted_tokens: predicted.len() as u64,
            target_tokens: wanted.len() as u64,
            ..Counts::default()
        };
        for n in 1..=ORDER {
            counts.correct[n - 1] = common(&count(predicted.windows(n)), &count(wanted.windows(n)));
            counts.total[n - 1] = predicted.windows(n).len() as u64;
        }
        counts
    }

    /// Geometric mean of the precisions times the penalty for brevity, from 0 to 1.
    pub(super) fn score(&self) -> f64 {
        if self.correct.iter().all(|&correct| correct == 0) || self.total.contains(&0) {
            return 0.0;
        }
        let mut smoothing = 1.0;
        let mut log_precision = 0.0;
        for (&correct, &total) in self.correct.iter().zip(&self.total) {
            let precision = if correct == 0 {
                smoothing *= 2.0;
                1.0 / (smoothing * total as f64)
            } else {
                correct as f64 / total as f64
            };
            log_precision += precision.ln();
        }
        self.brevity_penalty() * (log_precision / ORDER as f64).exp()
    }

    fn brevity_penalty(&self) -> f64 {
        match self.predicted_tokens < self.target_tokens {
            true => (1.0 - self.target_tokens as f64 / self.predicted_tokens as f64).exp(),
            false => 1.0,
        }
    }
}

/// Rules of mteval-v13a: symbols stand alone; so do periods and commas unless between digits, and dashes after digits.
static RULES: LazyLock<[(Regex, &str); 4]> = LazyLock::new(|| {
    [
        (r"[{-~\[-` -&(-+:-@/]", " $0 "),
        (r"([^0-9])([.,])", "$1 $2 "),
        (r"([.,])([^0-9])", " $1 $2"),
        (r"([0-9])(-)", "$1 $2 "),
    ]
    .map(|(pattern, replacement)| (Regex::new(pattern).expect("a constant"), replacement))
});

/// The text with white space between its tokens.
fn tokenize(text: &str) -> String {
    let mut text = strip_end(text).replace("<skipped>", "").replace("-\n", "").replace('\n', " ");
    if text.contains('&') {
        for (entity, character) in [("&quot;", "\""), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")] {
            text = text.replace(entity, character);
        }
    }
    text = format!(" {text} ");
    for (pattern, replacement) in RULES.iter() {
        text = pattern.replace_all(&text, *replacement).into_owned();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_those_of_mteval() {
        for (text, expected) in [
            ("Hello, world!", "Hello , world !"),
            ("3.14 is 1,000-ish.", "3.14 is 1,000 - ish ."),
            ("a well-\nknown &quot;thing&quot;", "a wellknown \" thing \""),
            ("don't e.g. stop", "don't e . g . stop"),
        ] {
            assert_eq!(words(&tokenize(text)).collect::<Vec<_>>().join(" "), expected);
        }
    }

    #[test]
    fn what_is_empty_or_too_short_scores_nothing() {
        for (prediction, target) in [("", ""), ("", "a b c d"), ("a b c", "a b c"), ("w x y z", "a b c d")] {
            assert_eq!(Counts::of(prediction, target).score(), 0.0, "{prediction:?}, {target:?}");
        }
        assert_eq!(Counts::of("a b c d", "a b c d").score(), 1.0);
    }
}
