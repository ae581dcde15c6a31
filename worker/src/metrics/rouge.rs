//! ROUGE (Lin 2004), equal to the F-measures of the Python package rouge-score with its stemmer.
//! <https://github.com/google-research/google-research/tree/master/rouge>

use std::collections::HashMap;

use super::text::{Numbering, common, count};
use super::{lcs, porter};

/// Words this short are not stemmed.
const UNSTEMMED_MAX: usize = 3;

/// The F-measure over n-grams.
pub(super) fn rouge_n(prediction: &str, target: &str, n: usize) -> f64 {
    let mut numbering = Numbering::default();
    let (predicted, wanted) = (tokens(prediction, &mut numbering), tokens(target, &mut numbering));
    let (predicted, wanted) = (predicted.windows(n), wanted.windows(n));
    let hits = common(&count(predicted.clone()), &count(wanted.clone()));
    f_measure(hits, predicted.len(), wanted.len())
}

/// The F-measure over the longest common subsequence of the whole texts.
pub(super) fn rouge_l(prediction: &str, target: &str) -> f64 {
    let mut numbering = Numbering::default();
    let (predicted, wanted) = (tokens(prediction, &mut numbering), tokens(target, &mut numbering));
    f_measure(lcs::length(&wanted, &predicted) as u64, predicted.len(), wanted.len())
}

/// The F-measure at the level of summaries: for each of the target's sentences (lines) the union of its longest common
/// subsequences with the prediction's, no word counted more often than both texts have it.
pub(super) fn rouge_l_sum(prediction: &str, target: &str) -> f64 {
    let mut numbering = Numbering::default();
    let mut sentences = |text: &str| -> Vec<Vec<u32>> {
        text.split('\n').filter(|line| !line.is_empty()).map(|line| tokens(line, &mut numbering)).collect()
    };
    let (predicted, wanted) = (sentences(prediction), sentences(target));
    let mut left_predicted = count(predicted.iter().flatten().copied());
    let mut left_wanted = count(wanted.iter().flatten().copied());
    let mut hits = 0;
    for sentence in &wanted {
        for token in union_of_subsequences(sentence, &predicted) {
            hits += u64::from(take(&mut left_predicted, &mut left_wanted, token));
        }
    }
    let words = |sentences: &[Vec<u32>]| sentences.iter().map(Vec::len).sum();
    f_measure(hits, words(&predicted), words(&wanted))
}

/// The tokens of `sentence`, in order, that are in its longest common subsequence with any of the others.
fn union_of_subsequences(sentence: &[u32], others: &[Vec<u32>]) -> Vec<u32> {
    let mut hit = vec![false; sentence.len()];
    for other in others {
        let table = lcs::Table::new(sentence, other);
        table.subsequence(sentence, other).into_iter().for_each(|place| hit[place] = true);
    }
    sentence.iter().zip(hit).filter_map(|(&token, hit)| hit.then_some(token)).collect()
}

/// Takes a token out of both bags, if both have one left.
fn take(a: &mut HashMap<u32, u64>, b: &mut HashMap<u32, u64>, token: u32) -> bool {
    match (a.get_mut(&token), b.get_mut(&token)) {
        (Some(a), Some(b)) if *a > 0 && *b > 0 => {
            *a -= 1;
            *b -= 1;
            true
        }
        _ => false,
    }
}

fn f_measure(hits: u64, predicted: usize, wanted: usize) -> f64 {
    if hits == 0 {
        return 0.0;
    }
    let (precision, recall) = (hits as f64 / predicted as f64, hits as f64 / wanted as f64);
    2.0 * precision * recall / (precision + recall)
}

/// Runs of ASCII letters and digits of the text in lower case, stemmed.
fn tokens(text: &str, numbering: &mut Numbering) -> Vec<u32> {
    let text = text.to_lowercase();
    let words = text.split(|c: char| !c.is_ascii_lowercase() && !c.is_ascii_digit()).filter(|word| !word.is_empty());
    words
        .map(|word| numbering.number(if word.len() > UNSTEMMED_MAX { porter::stem(word) } else { word.to_string() }))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_of_the_packages_readme() {
        let (target, prediction) =
            ("The quick brown fox jumps over the lazy dog", "The quick brown dog jumps on the log.");
        assert!((rouge_n(prediction, target, 1) - 2.0 * 0.75 * (6.0 / 9.0) / (0.75 + 6.0 / 9.0)).abs() < 1e-12);
        assert!((rouge_l(prediction, target) - 2.0 * 0.625 * (5.0 / 9.0) / (0.625 + 5.0 / 9.0)).abs() < 1e-12);
    }

    #[test]
    fn summaries_count_a_word_once() {
        assert_eq!(rouge_l_sum("a b", "a b\na b"), 2.0 * 1.0 * 0.5 / 1.5);
        assert_eq!(rouge_l_sum("", "a"), 0.0);
        assert_eq!(rouge_l_sum("b\na", "a\nb"), 1.0);
        assert_eq!(rouge_l("b\na", "a\nb"), 0.5);
    }
}
