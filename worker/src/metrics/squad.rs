//! Exact match and F1 of answers, as the official script of SQuAD 1.1 computes them.
//! <https://github.com/huggingface/evaluate/blob/main/metrics/squad/compute_score.py>

use std::sync::LazyLock;

use regex::Regex;

use super::text::{common, count, words};

/// Runs of what Python's regular expressions take for letters of words.
static WORD: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"[\p{L}\p{N}_]+").expect("a constant"));

/// Whether the answers are the same but for case, punctuation, articles and white space.
pub(super) fn exact_match(prediction: &str, target: &str) -> f64 {
    let (prediction, target) = (normalize(prediction), normalize(target));
    f64::from(u8::from(words(&prediction).eq(words(&target))))
}

/// The F-measure over words, as bags.
pub(super) fn f1(prediction: &str, target: &str) -> f64 {
    let (prediction, target) = (normalize(prediction), normalize(target));
    let hits = common(&count(words(&prediction)), &count(words(&target)));
    if hits == 0 {
        return 0.0;
    }
    2.0 * hits as f64 / (words(&prediction).count() + words(&target).count()) as f64
}

/// Lower case, without ASCII punctuation and English articles.
fn normalize(text: &str) -> String {
    let text: String = text.to_lowercase().chars().filter(|c| !c.is_ascii_punctuation()).collect();
    let without_article = |captures: &regex::Captures| match &captures[0] {
        "a" | "an" | "the" => " ".to_string(),
        word => word.to_string(),
    };
    WORD.replace_all(&text, without_article).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn case_punctuation_and_articles_do_not_matter() {
        for (prediction, target, exact, f1_score) in [
            ("The Cat!", "cat", 1.0, 1.0),
            ("an apple, a pear", "Apple  pear", 1.0, 1.0),
            ("New York City", "new york", 0.0, 0.8),
            ("there", "the re", 0.0, 0.0),
            ("don't", "dont", 1.0, 1.0),
            ("", "", 1.0, 0.0),
            ("the", "a", 1.0, 0.0),
            ("x x y", "x", 0.0, 0.5),
        ] {
            assert_eq!((exact_match(prediction, target), f1(prediction, target)), (exact, f1_score), "{prediction:?}");
        }
    }
}
