//! Beam search over one source, as transformers 5 has it: which hypotheses go on, which are finished, when to stop.
//!
//! No model here: log probabilities come in, choices go out.

use super::scores::Candidate;
use super::{EarlyStopping, Generated, Generation};

/// The search of one source.
pub(super) struct Beams {
    /// Best first; a sequence of the decoder each.
    running: Vec<Hypothesis>,
    /// Best first, at most as many as there are beams; scores have their length penalty.
    finished: Vec<Generated>,
    done: bool,
}

/// Tokens and Σ log p.
struct Hypothesis {
    tokens: Vec<u32>,
    score: f32,
}

/// A hypothesis, by its number among the source's, and one more token.
#[derive(Clone, Copy)]
struct Continuation {
    parent: usize,
    token: u32,
    score: f32,
}

impl Beams {
    pub(super) fn new() -> Self {
        Beams { running: vec![Hypothesis { tokens: Vec::new(), score: 0.0 }], finished: Vec::new(), done: false }
    }

    /// The tokens of the hypotheses that go on; none when the search is done.
    pub(super) fn running(&self) -> impl Iterator<Item = &[u32]> {
        let running = if self.done { &[] } else { &self.running[..] };
        running.iter().map(|hypothesis| &hypothesis.tokens[..])
    }

    /// A step: `candidates` of each running hypothesis, best first and as many as are kept at least. Returns which
    /// hypothesis each of the next step's continues.
    pub(super) fn advance(&mut self, candidates: &[Vec<Candidate>], generation: &Generation) -> Vec<usize> {
        let length = self.running[0].tokens.len() + 1;
        let continuations = self.continuations(candidates, generation.beams_to_keep());
        let ends = |continuation: &Continuation| {
            length == generation.max_new_tokens || generation.eos_token_ids.contains(&continuation.token)
        };
        // Those beyond the number of beams are only there so that enough go on.
        for continuation in continuations.iter().take(generation.num_beams).filter(|it| ends(it)) {
            self.finish(*continuation, length, generation);
        }
        let going_on: Vec<&Continuation> =
            continuations.iter().filter(|it| !ends(it)).take(generation.num_beams).collect();
        let parents = going_on.iter().map(|continuation| continuation.parent).collect();
        let next: Vec<Hypothesis> = going_on.iter().map(|continuation| self.extended(continuation)).collect();
        if next.is_empty() && self.finished.is_empty() {
            // Everything is banned: what there is counts as finished.
            let length = length - 1;
            let left = self.running.iter().map(|hypothesis| Generated {
                token_ids: hypothesis.tokens.clone(),
                score: penalized(hypothesis.score, length.max(1), generation),
            });
            self.finished = left.collect();
        }
        self.running = next;
        self.done = self.is_done(length, generation);
        if self.done { Vec::new() } else { parents }
    }

    /// The best of all hypotheses' candidates, by the sum of log probabilities.
    fn continuations(&self, candidates: &[Vec<Candidate>], count: usize) -> Vec<Continuation> {
        let mut all: Vec<Continuation> = Vec::new();
        for (parent, (hypothesis, candidates)) in self.running.iter().zip(candidates).enumerate() {
            all.extend(candidates.iter().map(|candidate| Continuation {
                parent,
                token: candidate.token,
                score: hypothesis.score + candidate.value,
            }));
        }
        all.sort_by(|a, b| b.score.total_cmp(&a.score));
        all.truncate(count);
        all
    }

    fn extended(&self, continuation: &Continuation) -> Hypothesis {
        let mut tokens = self.running[continuation.parent].tokens.clone();
        tokens.push(continuation.token);
        Hypothesis { tokens, score: continuation.score }
    }

    /// Keeps a finished hypothesis if it is among the best.
    fn finish(&mut self, continuation: Continuation, length: usize, generation: &Generation) {
        let Hypothesis { tokens, score } = self.extended(&continuation);
        let score = penalized(score, length, generation);
        let place = self.finished.partition_point(|other| other.score >= score);
        self.finished.insert(place, Generated { token_ids: tokens, score });
        self.finished.truncate(generation.num_beams);
    }

    /// Whether the finished ones are final, after a step to `length` tokens.
    fn is_done(&self, length: usize, generation: &Generation) -> bool {
        let Some(best) = self.running.first() else { return true };
        if length == generation.max_new_tokens {
            return true;
        }
        if self.finished.len() < generation.num_beams {
            return false;
        }
        let worst = self.finished[self.finished.len() - 1].score;
        let hopeful_length = match generation.early_stopping {
            EarlyStopping::Always => return true,
            // A longer hypothesis may then have a better score with the same sum.
            EarlyStopping::Never if generation.length_penalty > 0.0 => generation.max_new_tokens,
            EarlyStopping::Never | EarlyStopping::Heuristic => length,
        };
        penalized(best.score, hopeful_length, generation) <= worst
    }

    /// The best finished hypotheses.
    pub(super) fn into_outputs(mut self, generation: &Generation) -> Vec<Generated> {
        self.finished.truncate(generation.num_return_sequences);
        self.finished
    }
}

fn penalized(score: f32, length: usize, generation: &Generation) -> f32 {
    score / (length as f64).powf(generation.length_penalty) as f32
}
