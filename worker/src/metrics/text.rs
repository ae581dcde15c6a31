//! What Python's string methods do, where a metric is defined by them.

use std::collections::HashMap;
use std::hash::Hash;

/// White space as `str.split` and `str.rstrip` see it: Unicode's, and four control characters.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// `str.split()`.
pub(super) fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(is_space).filter(|word| !word.is_empty())
}

/// `str.strip()`.
pub(super) fn strip(text: &str) -> &str {
    text.trim_matches(is_space)
}

/// `str.rstrip()`.
pub(super) fn strip_end(text: &str) -> &str {
    text.trim_end_matches(is_space)
}

/// How often each item occurs.
pub(super) fn count<T: Hash + Eq>(items: impl IntoIterator<Item = T>) -> HashMap<T, u64> {
    let mut counts = HashMap::new();
    items.into_iter().for_each(|item| *counts.entry(item).or_default() += 1);
    counts
}

/// How many items two multisets have in common.
pub(super) fn common<T: Hash + Eq>(a: &HashMap<T, u64>, b: &HashMap<T, u64>) -> u64 {
    let (few, many) = if a.len() < b.len() { (a, b) } else { (b, a) };
    few.iter().map(|(item, &count)| count.min(many.get(item).copied().unwrap_or(0))).sum()
}

/// Numbers for words, the same for the same word.
#[derive(Default)]
pub(super) struct Numbering<'a>(HashMap<std::borrow::Cow<'a, str>, u32>);

impl<'a> Numbering<'a> {
    pub(super) fn number(&mut self, word: impl Into<std::borrow::Cow<'a, str>>) -> u32 {
        let next = self.0.len() as u32;
        *self.0.entry(word.into()).or_insert(next)
    }
}
