//! chrF and chrF++ (Popović 2015, 2017) over a whole set, equal to sacrebleu's with its defaults.
//! <https://github.com/mjpost/sacrebleu>

use std::ops::AddAssign;

use super::text::{Numbering, words};

/// Longest n-gram of characters.
const CHARACTER_ORDER: usize = 6;
/// Longest n-gram of words in chrF++.
const WORD_ORDER: usize = 2;
const ORDERS: usize = CHARACTER_ORDER + WORD_ORDER;
/// How much more recall weighs than precision.
const BETA: f64 = 2.0;

/// What a set's score follows from; those of parts add up to that of the whole.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts([Order; ORDERS]);

/// The n-grams of one length.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Order {
    predicted: u64,
    wanted: u64,
    matched: u64,
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Counts) {
        for (sum, order) in self.0.iter_mut().zip(other.0) {
            sum.predicted += order.predicted;
            sum.wanted += order.wanted;
            sum.matched += order.matched;
        }
    }
}

impl Counts {
    /// Of chrF, over characters other than white space.
    pub(super) fn of(prediction: &str, target: &str) -> Self {
        let characters = |text| -> Vec<char> { words(text).flat_map(str::chars).collect() };
        let (predicted, wanted) = (characters(prediction), characters(target));
        let mut counts = Counts::default();
        for n in 1..=CHARACTER_ORDER {
            // Of 21 bits each, six fit.
            let key = |gram: &[char]| gram.iter().fold(0, |key, &c| key << 21 | u128::from(u32::from(c)));
            let grams = |text: &[char]| text.windows(n).map(key).collect();
            counts.0[n - 1] = Order::of(grams(&predicted), grams(&wanted));
        }
        counts
    }

    /// Of chrF++, over words too.
    pub(super) fn with_words(prediction: &str, target: &str) -> Self {
        let mut counts = Self::of(prediction, target);
        let mut numbering = Numbering::default();
        let mut numbers = |text| -> Vec<u32> {
            let pieces = words(text).flat_map(without_punctuation);
            pieces.map(|piece| numbering.number(piece)).collect()
        };
        let (predicted, wanted) = (numbers(prediction), numbers(target));
        for n in 1..=WORD_ORDER {
            let key = |gram: &[u32]| gram.iter().fold(0, |key, &word| key << 32 | u128::from(word));
            let grams = |words: &[u32]| words.windows(n).map(key).collect();
            counts.0[CHARACTER_ORDER + n - 1] = Order::of(grams(&predicted), grams(&wanted));
        }
        counts
    }

    /// F-score of the mean precision and recall of the orders that both sides have, from 0 to 1.
    pub(super) fn score(&self) -> f64 {
        let present = || self.0.iter().filter(|order| order.predicted > 0 && order.wanted > 0);
        let orders = present().count().max(1) as f64;
        let mean =
            |total: fn(&Order) -> u64| present().map(|o| o.matched as f64 / total(o) as f64).sum::<f64>() / orders;
        let (precision, recall) = (mean(|order| order.predicted), mean(|order| order.wanted));
        if precision + recall == 0.0 {
            return 0.0;
        }
        (1.0 + BETA * BETA) * precision * recall / (BETA * BETA * precision + recall)
    }
}

impl Order {
    fn of(mut predicted: Vec<u128>, mut wanted: Vec<u128>) -> Self {
        predicted.sort_unstable();
        wanted.sort_unstable();
        // A target too short to have any says nothing about the prediction's.
        let predicted_count = if wanted.is_empty() { 0 } else { predicted.len() };
        Order { predicted: predicted_count as u64, wanted: wanted.len() as u64, matched: in_both(&predicted, &wanted) }
    }
}

/// How many elements two sorted multisets have in common.
fn in_both(a: &[u128], b: &[u128]) -> u64 {
    let (mut i, mut j, mut matched) = (0, 0, 0);
    while i < a.len() && j < b.len() {
        match a[i].cmp(&b[j]) {
            std::cmp::Ordering::Less => i += 1,
            std::cmp::Ordering::Greater => j += 1,
            std::cmp::Ordering::Equal => (i, j, matched) = (i + 1, j + 1, matched + 1),
        }
    }
    matched
}

/// A word with one mark at its end, or else at its beginning, cut off.
fn without_punctuation(word: &str) -> impl Iterator<Item = &str> {
    let is_mark = |c: Option<char>| c.is_some_and(|c| c.is_ascii_punctuation());
    let cut = if word.chars().nth(1).is_none() {
        word.len()
    } else if is_mark(word.chars().next_back()) {
        word.len() - 1
    } else if is_mark(word.chars().next()) {
        1
    } else {
        word.len()
    };
    let (first, second) = word.split_at(cut);
    [first, second].into_iter().filter(|piece| !piece.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_mark_is_cut_off() {
        for (word, pieces) in
            [("(hi)", "(hi )"), ("\"so", "\" so"), ("!", "!"), ("été.", "été ."), ("plain", "plain"), ("--", "- -")]
        {
            assert_eq!(without_punctuation(word).collect::<Vec<_>>().join(" "), pieces);
        }
    }

    #[test]
    fn what_is_empty_scores_nothing_and_what_is_equal_all() {
        for (prediction, target, score) in [("", "", 0.0), ("", "a", 0.0), ("a", "", 0.0), ("a b", "ab", 1.0)] {
            assert_eq!(Counts::of(prediction, target).score(), score, "{prediction:?}, {target:?}");
        }
        assert_eq!(Counts::with_words("é 猫", "é 猫").score(), 1.0);
    }
}
