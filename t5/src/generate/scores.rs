//! What the next token of each sequence may be, and how probable it is: logits after Hugging Face's processors.

use quintet_kernels::Tensor;
use quintet_kernels::ops::{self, TopTokens};

use super::Generation;
use crate::{Error, Result};

/// A token that a sequence may go on with.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Candidate {
    pub(super) token: u32,
    /// What it is chosen by: its log probability (of beams) or logit, after the processors.
    pub(super) value: f32,
    /// By the model.
    pub(super) log_prob: f32,
}

/// What the processors do to a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Change {
    Ban,
    Penalize,
}

/// The processors, between a model's logits and the choice of a token.
pub(super) struct Processors<'a> {
    pub(super) generation: &'a Generation,
    /// The token before the first, which counts as one of the decoder's.
    pub(super) start: u32,
}

impl Processors<'_> {
    /// The tokens of a sequence that are changed, each once, in rising order.
    fn changes(&self, tokens: &[u32]) -> Vec<(u32, Change)> {
        let generation = self.generation;
        let mut changes = Vec::new();
        if tokens.len() < generation.min_new_tokens {
            changes.extend(generation.eos_token_ids.iter().map(|&token| (token, Change::Ban)));
        }
        if generation.no_repeat_ngram_size > 0 || generation.repetition_penalty != 1.0 {
            let all: Vec<u32> = std::iter::once(self.start).chain(tokens.iter().copied()).collect();
            let banned = repeating(&all, generation.no_repeat_ngram_size);
            changes.extend(banned.map(|token| (token, Change::Ban)));
            if generation.repetition_penalty != 1.0 {
                changes.extend(all.iter().map(|&token| (token, Change::Penalize)));
            }
        }
        // A ban goes before a penalty.
        changes.sort_unstable();
        changes.dedup_by_key(|change| change.0);
        changes
    }

    fn penalized(&self, value: f32) -> f32 {
        let penalty = self.generation.repetition_penalty;
        if value < 0.0 { value * penalty } else { value / penalty }
    }

    /// The best candidates of each row of `logits[B,V]`, which it uses up: `count` of them, or all that there are.
    /// `sequences` are the tokens of each row so far.
    pub(super) fn best(
        &self,
        mut logits: Tensor,
        scale: f32,
        sequences: &[&[u32]],
        count: usize,
    ) -> Result<Vec<Vec<Candidate>>> {
        let changes: Vec<_> = sequences.iter().map(|tokens| self.changes(tokens)).collect();
        let found = Found::in_logits(&mut logits, scale, &changes, count)?;
        let by_log_prob = self.generation.num_beams > 1;
        let rows = changes.iter().enumerate().map(|(row, changes)| {
            let logsumexp = found.logsumexp[row];
            if !logsumexp.is_finite() {
                return Err(Error::NotFinite);
            }
            let value = |log_prob: f32| if by_log_prob { log_prob } else { log_prob + logsumexp };
            let places = row * count..(row + 1) * count;
            let top = found.tokens[places.clone()].iter().zip(&found.log_probs[places]);
            let top = top.map(|(&token, &log_prob)| Candidate { token, value: value(log_prob), log_prob });
            let apart = changes.iter().zip(&found.apart[found.starts[row] as usize..]);
            let penalized = apart
                .filter(|((_, change), _)| *change == Change::Penalize)
                .map(|(&(token, _), &log_prob)| Candidate { token, value: self.penalized(value(log_prob)), log_prob });
            let mut candidates: Vec<Candidate> =
                top.chain(penalized).filter(|candidate| candidate.value > f32::NEG_INFINITY).collect();
            candidates.sort_by(|a, b| b.value.total_cmp(&a.value).then(a.token.cmp(&b.token)));
            candidates.truncate(count);
            Ok(candidates)
        });
        rows.collect()
    }

    /// All tokens of each row as candidates, by token; banned ones are left out.
    pub(super) fn all(&self, logits: &Tensor, scale: f32, sequences: &[&[u32]]) -> Result<Vec<Vec<Candidate>>> {
        let vocabulary = logits.cols();
        let logits = logits.download::<f32>()?;
        let rows = logits.chunks_exact(vocabulary).zip(sequences).map(|(logits, tokens)| {
            let changes = self.changes(tokens);
            let most = logits.iter().fold(f32::NEG_INFINITY, |most, &logit| most.max(logit)) * scale;
            let sum: f64 = logits.iter().map(|&logit| f64::from(logit * scale - most).exp()).sum();
            let logsumexp = most + sum.ln() as f32;
            if !logsumexp.is_finite() {
                return Err(Error::NotFinite);
            }
            let mut changes = changes.into_iter().peekable();
            let candidates = logits.iter().zip(0..).filter_map(|(&logit, token)| {
                let logit = logit * scale;
                let value = match changes.next_if(|change| change.0 == token) {
                    Some((_, Change::Ban)) => return None,
                    Some((_, Change::Penalize)) => self.penalized(logit),
                    None => logit,
                };
                Some(Candidate { token, value, log_prob: logit - logsumexp })
            });
            Ok(candidates.collect())
        });
        rows.collect()
    }
}

/// The tokens that would end a second copy of `size` tokens of `all`.
fn repeating(all: &[u32], size: usize) -> impl Iterator<Item = u32> {
    let enough = size > 0 && all.len() >= size;
    let last = if enough { &all[all.len() + 1 - size..] } else { &[] };
    let windows = all.windows(size.max(1)).filter(move |window| enough && window[..size - 1] == *last);
    windows.map(move |window| window[window.len() - 1])
}

/// What the device found in logits, on the host.
struct Found {
    tokens: Vec<u32>,
    log_probs: Vec<f32>,
    starts: Vec<u32>,
    apart: Vec<f32>,
    logsumexp: Vec<f32>,
}

impl Found {
    fn in_logits(logits: &mut Tensor, scale: f32, changes: &[Vec<(u32, Change)>], count: usize) -> Result<Self> {
        let (device, rows) = (logits.device().clone(), changes.len());
        let mut apart: Vec<u32> = changes.iter().flatten().map(|change| change.0).collect();
        let ends = changes.iter().scan(0, |end, changes| {
            *end += changes.len() as u32;
            Some(*end)
        });
        let starts: Vec<u32> = std::iter::once(0).chain(ends).collect();
        if apart.is_empty() {
            apart.push(0); // a tensor has an element at least; no row names this one
        }
        let apart_starts = device.upload(&starts, starts.len(), 1)?;
        let apart = device.upload(&apart, apart.len(), 1)?;
        let mut tokens = device.upload(&vec![0_u32; rows * count], rows, count)?;
        let [mut log_probs, mut logsumexp, mut of_apart] = [
            device.zeros(quintet_kernels::DType::F32, rows, count)?,
            device.zeros(quintet_kernels::DType::F32, rows, 1)?,
            device.zeros(quintet_kernels::DType::F32, apart.rows(), 1)?,
        ];
        let found = TopTokens {
            apart: apart.view(),
            apart_starts: apart_starts.view(),
            tokens: tokens.view_mut(),
            log_probs: log_probs.view_mut(),
            apart_log_probs: of_apart.view_mut(),
            logsumexp: logsumexp.view_mut(),
        };
        ops::top_tokens(logits.view_mut(), scale, found)?;
        Ok(Found {
            tokens: tokens.download()?,
            log_probs: log_probs.download()?,
            starts,
            apart: of_apart.download()?,
            logsumexp: logsumexp.download()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ngrams_are_not_completed_twice() {
        let banned = |all: &[u32], size| repeating(all, size).collect::<Vec<_>>();
        assert_eq!(banned(&[0, 5, 6, 5], 2), [6]);
        assert_eq!(banned(&[0, 5, 6, 5, 7, 5], 2), [6, 7]);
        assert_eq!(banned(&[0, 5, 6, 7, 5, 6], 3), [7]);
        assert_eq!(banned(&[0, 5, 6], 1), [0, 5, 6]);
        assert_eq!(banned(&[0, 0], 2), [0]);
        for (all, size) in [(&[0, 5][..], 3), (&[0, 5, 6, 7], 2), (&[0, 5, 5], 0)] {
            assert!(banned(all, size).is_empty(), "{all:?} {size}");
        }
    }
}
