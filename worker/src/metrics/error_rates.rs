//! Error rates of sequences of tokens, which are what white space separates.

/// Edits that turn a prediction into its target, and the target's tokens; their ratio over a set is its error rate, above 1
/// where predictions ramble.
pub(super) fn token_errors(prediction: &str, target: &str) -> [u64; 2] {
    let predicted: Vec<&str> = prediction.split_whitespace().collect();
    let wanted: Vec<&str> = target.split_whitespace().collect();
    [edit_distance(&predicted, &wanted), wanted.len() as u64]
}

/// 1 where any token is wrong.
///
/// The mean is the word error rate of grapheme-to-phoneme conversion, where an example is a word; it is not speech
/// recognition's, which is an edit distance over words.
pub(super) fn is_wrong(prediction: &str, target: &str) -> f64 {
    f64::from(u8::from(!prediction.split_whitespace().eq(target.split_whitespace())))
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
            assert_eq!(token_errors(a, b)[0], distance, "{a} → {b}");
            assert_eq!(token_errors(b, a)[0], distance, "{b} → {a}");
        }
    }
}
