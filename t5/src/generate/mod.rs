//! Text out of a model: greedy search, sampling and beam search with a key/value cache, and the probabilities of given
//! targets. What is generated for an input does not depend on the inputs beside it, on the CPU to the bit.

mod beams;
mod decoder;
mod options;
mod sampling;
mod scores;
mod targets;

use quintet_kernels::Segments;

use self::beams::Beams;
use self::decoder::Decoder;
pub(crate) use self::decoder::PreparedWeights;
pub use self::options::{EarlyStopping, Generation, GenerationOptions, TokenIds};
use self::sampling::Draw;
use self::scores::Processors;
use crate::parameters::Weights;
use crate::pass::Pass;
use crate::{Model, Result};

/// What a model wrote for one input.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Generated {
    /// Without the start token; ends with eos unless `max_new_tokens` came first.
    pub token_ids: Vec<u32>,
    /// Σ log p of the tokens by the model; of a beam search's hypothesis as the search has it: after the processors, and
    /// divided by its length to the power of `length_penalty`.
    pub score: f32,
}

/// Sources to generate for.
#[derive(Clone, Copy, Debug)]
pub struct Sources<'a> {
    /// Concatenated.
    pub ids: &'a [u32],
    /// Where each begins (`cu_seqlens`).
    pub offsets: &'a [u32],
    /// The number of each among all inputs: its random numbers depend on it, not on its place in the batch.
    pub numbers: &'a [u64],
}

/// Told of each token as it is chosen: the source's place in the batch, the number of the sequence, the token. Beam search
/// chooses its tokens at the end, and tells nothing.
pub type OnToken<'a> = &'a mut dyn FnMut(usize, usize, u32);

/// A model that is ready to generate: on the CPU, with a second copy of the decoder's weights.
pub struct Generator<'a> {
    model: &'a Model,
    weights: Weights<'a>,
    prepared: PreparedWeights,
    generation: Generation,
}

impl<'a> Generator<'a> {
    pub fn new(model: &'a Model, weights: impl Into<Weights<'a>>, generation: Generation) -> Self {
        let weights = weights.into();
        let prepared = PreparedWeights::new(model.layout(), weights);
        Generator { model, weights, prepared, generation }
    }

    /// `num_return_sequences` outputs for each source, the best first where they are beams.
    pub fn generate(&self, sources: Sources, on_token: OnToken) -> Result<Vec<Vec<Generated>>> {
        let segments = Segments::from_offsets(sources.offsets);
        assert_eq!(sources.numbers.len(), segments.len(), "a number for each source");
        if segments.is_empty() {
            return Ok(Vec::new());
        }
        let pass = Pass { prepared: Some(&self.prepared), ..self.model.inference_pass(self.weights) };
        let decoder = Decoder::new(self.model, &pass, sources.ids, &segments)?;
        match self.generation.num_beams {
            1 => self.write(decoder, sources.numbers, on_token),
            _ => self.search(decoder),
        }
    }

    fn processors(&self) -> Processors<'_> {
        Processors { generation: &self.generation, start: self.model.config().decoder_start_token_id }
    }

    /// Greedy search or sampling, token by token.
    fn write(&self, mut decoder: Decoder, numbers: &[u64], on_token: OnToken) -> Result<Vec<Vec<Generated>>> {
        let (generation, config) = (&self.generation, self.model.config());
        let mut outputs = vec![vec![Generated::default(); generation.num_return_sequences]; numbers.len()];
        // Source and number of each sequence that is being written. The first token of all of a source's sequences is drawn
        // from one distribution.
        let mut live: Vec<(usize, usize)> = (0..numbers.len()).map(|source| (source, 0)).collect();
        let mut tokens = vec![config.decoder_start_token_id; live.len()];
        for step in 0..generation.max_new_tokens {
            let logits = decoder.step(&tokens)?;
            let written: Vec<&[u32]> =
                live.iter().map(|&(source, number)| &outputs[source][number].token_ids[..]).collect();
            let scale = config.head_scale();
            let candidates = match sampling::candidates_needed(generation, config.vocab_size) {
                Some(count) => self.processors().best(logits, scale, &written, count)?,
                None => self.processors().all(&logits, scale, &written)?,
            };
            let (mut parents, mut next) = (Vec::new(), Vec::new());
            tokens.clear();
            for (row, &(source, number)) in live.iter().enumerate() {
                let sequences = if step == 0 { 0..generation.num_return_sequences } else { number..number + 1 };
                for sequence in sequences {
                    let draw = Draw { input: numbers[source], sequence: sequence as u64, step: step as u64 };
                    let Some(chosen) = sampling::choose(&candidates[row], generation, draw) else { continue };
                    let output = &mut outputs[source][sequence];
                    output.token_ids.push(chosen.token);
                    output.score += chosen.log_prob;
                    on_token(source, sequence, chosen.token);
                    if !generation.eos_token_ids.contains(&chosen.token) {
                        parents.push(row);
                        next.push((source, sequence));
                        tokens.push(chosen.token);
                    }
                }
            }
            if next.is_empty() {
                break;
            }
            decoder.select(&parents);
            live = next;
        }
        Ok(outputs)
    }

    /// Beam search.
    fn search(&self, mut decoder: Decoder) -> Result<Vec<Vec<Generated>>> {
        let (generation, config) = (&self.generation, self.model.config());
        let mut searches: Vec<Beams> = decoder.source_of().iter().map(|_| Beams::new()).collect();
        let mut tokens = vec![config.decoder_start_token_id; searches.len()];
        loop {
            let logits = decoder.step(&tokens)?;
            let running: Vec<&[u32]> = searches.iter().flat_map(Beams::running).collect();
            let kept = generation.beams_to_keep();
            let candidates = self.processors().best(logits, config.head_scale(), &running, kept)?;
            let (mut parents, mut first) = (Vec::new(), 0);
            for search in &mut searches {
                let count = search.running().count();
                if count > 0 {
                    let own = search.advance(&candidates[first..first + count], generation);
                    parents.extend(own.into_iter().map(|parent| first + parent));
                    first += count;
                }
            }
            if parents.is_empty() {
                return Ok(searches.into_iter().map(|search| search.into_outputs(generation)).collect());
            }
            decoder.select(&parents);
            tokens = searches.iter().flat_map(Beams::running).map(|tokens| tokens[tokens.len() - 1]).collect();
        }
    }
}
