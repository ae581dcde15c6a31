//! Tokenizers trained on a job's own data. Both trainings are deterministic: equal texts, equal vocabularies.

use std::borrow::Cow;
use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};

use serde_json::{Map, Value, json};
use tokenizers::models::unigram::{Unigram, UnigramTrainer};

use super::{EOS_TOKEN, PAD_TOKEN, UNK_TOKEN, eos_template, object};
use crate::error::{Error, Result};

const SPECIAL_TOKENS: [&str; 3] = [PAD_TOKEN, EOS_TOKEN, UNK_TOKEN];
const UNK_ID: usize = 2;
/// T5's sentinels for span corruption, at the very end of the vocabulary in descending order.
const SENTINELS: usize = 100;
const UNIGRAM_VOCAB_SIZE: usize = 8000;
/// SentencePiece's mark of a word's beginning.
const WORD_START: char = '▁';
/// Text without white space is cut into words of this many characters, so that a word's lattice stays small.
const WORD_CHARACTERS_MAX: usize = 256;

/// A tokenizer.json whose tokens are the words between white space: after the special tokens the most frequent first,
/// equally frequent ones in alphabetical order.
pub(super) fn wordlevel<'t>(
    texts: impl Iterator<Item = Cow<'t, str>>,
    vocab_size: Option<usize>,
) -> Result<Map<String, Value>> {
    let room = match vocab_size {
        Some(size) if size <= SPECIAL_TOKENS.len() => {
            let message =
                format!("a vocabulary of {size} holds no words; ask for {} or more", SPECIAL_TOKENS.len() + 1);
            return Err(Error::tokenizer("wordlevel", message));
        }
        Some(size) => size - SPECIAL_TOKENS.len(),
        None => usize::MAX,
    };
    let mut words: Vec<(String, u64)> = count_words(texts).into_iter().collect();
    words.sort_unstable_by(|(a, a_count), (b, b_count)| (Reverse(a_count), a).cmp(&(Reverse(b_count), b)));
    let tokens = SPECIAL_TOKENS.into_iter().chain(words.iter().map(|(word, _)| word.as_str()).take(room));
    let vocab: Map<_, _> = tokens.enumerate().map(|(id, token)| (token.to_owned(), Value::from(id))).collect();
    Ok(document(
        special_tokens(&[]),
        Value::Null,
        json!({"type": "WhitespaceSplit"}),
        // Without a decoder, tokens are joined with spaces.
        Value::Null,
        json!({"type": "WordLevel", "vocab": vocab, "unk_token": UNK_TOKEN}),
    ))
}

/// A tokenizer.json with a unigram model (Kudo, 2018) as SentencePiece trains it, laid out as T5's: special tokens,
/// pieces, sentinels. White space of any kind and length is one space to it.
pub(super) fn unigram<'t>(
    texts: impl Iterator<Item = Cow<'t, str>>,
    vocab_size: Option<usize>,
) -> Result<Map<String, Value>> {
    let words = marked_words(texts);
    let alphabet = {
        let mut characters: Vec<char> = words.iter().flat_map(|(word, _)| word.chars()).collect();
        characters.sort_unstable();
        characters.dedup();
        characters.len()
    };
    if alphabet == 0 {
        return Err(Error::tokenizer("unigram", "the training texts hold nothing but white space"));
    }
    let reserved = SPECIAL_TOKENS.len() + SENTINELS;
    // One more than the alphabet, because the trainer's pruning stops too late at exactly that.
    let smallest = reserved + alphabet + 1;
    let size = vocab_size.unwrap_or(UNIGRAM_VOCAB_SIZE.max(smallest));
    if size < smallest {
        let message = format!(
            "a vocabulary of {size} is too small for {alphabet} different characters, {} special tokens and \
             {SENTINELS} sentinels; ask for {smallest} or more",
            SPECIAL_TOKENS.len()
        );
        return Err(Error::tokenizer("unigram", message));
    }
    let pieces = train_pieces(words, size - reserved)?;
    let sentinels: Vec<String> = (0..SENTINELS).rev().map(|number| format!("<extra_id_{number}>")).collect();
    let first_sentinel = SPECIAL_TOKENS.len() + pieces.len();
    let vocab: Vec<Value> = SPECIAL_TOKENS
        .into_iter()
        .map(|token| json!([token, 0.0]))
        .chain(pieces.iter().map(|(piece, score)| json!([piece, score])))
        .chain(sentinels.iter().map(|token| json!([token, 0.0])))
        .collect();
    let sentinels: Vec<(usize, &str)> = (first_sentinel..).zip(sentinels.iter().map(String::as_str)).collect();
    let metaspace = json!({"type": "Metaspace", "replacement": WORD_START, "prepend_scheme": "always", "split": true});
    Ok(document(
        special_tokens(&sentinels),
        json!({"type": "Sequence", "normalizers": [
            {"type": "Strip", "strip_left": true, "strip_right": true},
            {"type": "Replace", "pattern": {"Regex": "\\s+"}, "content": " "},
        ]}),
        metaspace.clone(),
        metaspace,
        json!({"type": "Unigram", "unk_id": UNK_ID, "vocab": vocab, "byte_fallback": false}),
    ))
}

fn count_words<'t>(texts: impl Iterator<Item = Cow<'t, str>>) -> HashMap<String, u64> {
    let mut counts = HashMap::<String, u64>::new();
    for text in texts {
        for word in text.split_whitespace().filter(|word| !SPECIAL_TOKENS.contains(word)) {
            match counts.get_mut(word) {
                Some(count) => *count += 1,
                None => drop(counts.insert(word.to_owned(), 1)),
            }
        }
    }
    counts
}

/// Words as the model will see them, with their counts, in alphabetical order.
fn marked_words<'t>(texts: impl Iterator<Item = Cow<'t, str>>) -> Vec<(String, u32)> {
    let mut counts = BTreeMap::<String, u64>::new();
    for (word, count) in count_words(texts) {
        let marked: Vec<char> = std::iter::once(WORD_START).chain(word.chars()).collect();
        for part in marked.chunks(WORD_CHARACTERS_MAX) {
            *counts.entry(part.iter().collect()).or_default() += count;
        }
    }
    // The trainer adds counts up in 32 bits; beyond that only proportions matter.
    let scale = counts.values().sum::<u64>().div_ceil(u64::from(u32::MAX / 2)).max(1);
    counts.into_iter().map(|(word, count)| (word, count.div_ceil(scale) as u32)).collect()
}

/// The `count` pieces of a unigram model with their log-probabilities, best first.
fn train_pieces(words: Vec<(String, u32)>, count: usize) -> Result<Vec<(String, f64)>> {
    let failed = |error: &dyn std::fmt::Display| Error::tokenizer("unigram", format!("training failed: {error}"));
    let count = u32::try_from(count).map_err(|error| failed(&error))?;
    let trainer =
        UnigramTrainer::builder().show_progress(false).vocab_size(count).build().map_err(|error| failed(&error))?;
    let mut model = Unigram::default();
    // On one thread, because the trainer sums in an order that depends on how many there are and which is faster.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().map_err(|error| failed(&error))?;
    pool.install(|| trainer.do_train(words, &mut model)).map_err(|error| failed(&error))?;
    let mut pieces: Vec<(String, f64)> = model.iter().cloned().collect();
    level_rare_characters(&mut pieces);
    pieces.sort_by(|(a, a_score), (b, b_score)| b_score.total_cmp(a_score).then_with(|| a.cmp(b)));
    Ok(pieces)
}

/// The trainer gives characters that no text needs as pieces of their own the lowest score plus a small step for each,
/// in the random order of a hash set. Giving all of them the lowest score itself makes training reproducible.
fn level_rare_characters(pieces: &mut [(String, f64)]) {
    const STEP: f64 = 1e-4;
    let lowest = pieces.iter().map(|&(_, score)| score).fold(f64::INFINITY, f64::min);
    let is_character = |piece: &str| piece.chars().nth(1).is_none();
    let characters = pieces.iter().filter(|(piece, _)| is_character(piece)).count();
    for (piece, score) in pieces {
        if is_character(piece) && *score <= lowest + STEP * characters as f64 {
            *score = lowest;
        }
    }
}

fn special_tokens(sentinels: &[(usize, &str)]) -> Value {
    let tokens = SPECIAL_TOKENS.into_iter().enumerate().chain(sentinels.iter().copied());
    tokens
        .map(|(id, content)| {
            json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": true})
        })
        .collect()
}

fn document(added: Value, normalizer: Value, pre_tokenizer: Value, decoder: Value, model: Value) -> Map<String, Value> {
    object([
        ("version", "1.0".into()),
        ("truncation", Value::Null),
        ("padding", Value::Null),
        ("added_tokens", added),
        ("normalizer", normalizer),
        ("pre_tokenizer", pre_tokenizer),
        ("post_processor", eos_template(EOS_TOKEN, 1)),
        ("decoder", decoder),
        ("model", model),
    ])
}
