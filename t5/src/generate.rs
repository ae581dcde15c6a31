//! Greedy generation with a key/value cache.

use quintet_kernels::ops::{self, Attention};
use quintet_kernels::{DType, Dropout, Segments, Tensor, View};

use crate::layers::FeedForward;
use crate::parameters::{CrossAttentionLayout, SelfAttentionLayout, Weights};
use crate::pass::{Pass, Site};
use crate::stack::{self, Keep, Stack};
use crate::{Model, Result};

/// What a model wrote for one input.
#[derive(Clone, Debug, PartialEq)]
pub struct Generated {
    /// Without the start token; ends with eos unless `max_new_tokens` came first.
    pub token_ids: Vec<u32>,
    /// Σ log p of the tokens.
    pub score: f32,
}

impl Model {
    /// The most probable next token, again and again, for each source of a batch.
    ///
    /// `source_ids` are concatenated, `source_offsets` say where each begins (`cu_seqlens`).
    pub fn generate_greedy<'a>(
        &'a self,
        weights: impl Into<Weights<'a>>,
        source_ids: &[u32],
        source_offsets: &[u32],
        max_new_tokens: usize,
    ) -> Result<Vec<Generated>> {
        let sources = Segments::from_offsets(source_offsets);
        let pass = self.inference_pass(weights.into());
        let mut decoder = Decoder::new(self, &pass, source_ids, &sources, max_new_tokens)?;
        let config = self.config();
        let mut outputs = vec![Generated { token_ids: Vec::new(), score: 0.0 }; sources.len()];
        let mut tokens = vec![config.decoder_start_token_id; sources.len()];
        let mut finished = vec![false; sources.len()];
        for _ in 0..max_new_tokens {
            let logits = decoder.step(&pass, &tokens)?;
            for (row, output) in outputs.iter_mut().enumerate() {
                if finished[row] {
                    continue;
                }
                let (token, log_probability) = most_probable(&logits[row * config.vocab_size..][..config.vocab_size]);
                output.token_ids.push(token);
                output.score += log_probability;
                tokens[row] = token;
                finished[row] = token == config.eos_token_id;
            }
            if finished.iter().all(|&done| done) {
                break;
            }
        }
        Ok(outputs)
    }
}

/// A decoder that takes one token a sequence and remembers keys and values.
///
/// Legend: B sequences, T tokens at most, I = heads · d_kv, D model.
struct Decoder<'a> {
    model: &'a Model,
    sources: &'a Segments,
    biases: Vec<Tensor>,
    caches: Vec<Cache>,
    length: usize,
    capacity: usize,
}

/// The keys and values of one block.
struct Cache {
    /// Of earlier tokens, `[B, T · 2I]`: a sequence a row, so that a new token is a column range.
    own: Tensor,
    /// Of the source, `[Ns, 2I]`.
    cross: Tensor,
}

impl<'a> Decoder<'a> {
    fn new(model: &'a Model, pass: &Pass, source_ids: &[u32], sources: &'a Segments, capacity: usize) -> Result<Self> {
        let layout = model.layout();
        let ids = model.device().upload(source_ids, source_ids.len(), 1)?;
        let encoder =
            Stack { layout: &layout.encoder, decoder: false, ids: ids.view(), segments: sources, encoded: None };
        let (encoded, _) = encoder.forward(pass, Keep::Nothing)?;
        let inner = model.config().inner();
        let mut caches = Vec::with_capacity(layout.decoder.blocks.len());
        for block in &layout.decoder.blocks {
            let cross = cross_layout(block.cross.as_ref());
            caches.push(Cache {
                own: pass.empty(sources.len(), capacity * 2 * inner)?,
                cross: pass.linear(encoded.view(), cross.kv)?,
            });
        }
        let biases = stack::biases(pass, &layout.decoder, true)?;
        Ok(Decoder { model, sources, biases, caches, length: 0, capacity })
    }

    /// The logits `[B,V]`, on the host, after one more token for each sequence.
    fn step(&mut self, pass: &Pass, tokens: &[u32]) -> Result<Vec<f32>> {
        assert!(self.length < self.capacity);
        let layout = self.model.layout();
        let config = pass.config;
        let ids = pass.device.upload(tokens, tokens.len(), 1)?;
        let mut x = pass.empty(tokens.len(), config.d_model)?;
        ops::embedding_forward(ids.view(), pass.weights.slot(layout.shared), Dropout::NONE, x.view_mut())?;
        let sequences = Sequences {
            queries: Segments::strided(tokens.len(), 1, 1),
            cached: Segments::strided(tokens.len(), self.capacity, self.length + 1),
            sources: self.sources,
            length: self.length,
        };
        for (index, block) in layout.decoder.blocks.iter().enumerate() {
            let cache = &mut self.caches[index];
            let bias = self.biases[stack::shared_or_own(&self.biases, index)].view();
            x = self_attention(pass, &block.attention, &mut cache.own, &sequences, bias, x)?;
            x = cross_attention(pass, cross_layout(block.cross.as_ref()), &cache.cross, &sequences, x)?;
            let site = Site { decoder: true, block: index };
            x = FeedForward { layout: &block.feed_forward, site }.forward(pass, x)?.0;
        }
        self.length += 1;
        let (hidden, _) = pass.norm(x.view(), layout.decoder.final_norm)?;
        let mut logits = pass.device.empty(DType::F32, tokens.len(), config.vocab_size)?;
        pass.linear_into(hidden.view(), layout.head(), logits.view_mut())?;
        let mut logits = logits.download::<f32>()?;
        let scale = config.head_scale();
        logits.iter_mut().for_each(|logit| *logit *= scale);
        Ok(logits)
    }
}

fn cross_layout(cross: Option<&CrossAttentionLayout>) -> &CrossAttentionLayout {
    cross.expect("a decoder's block attends to the encoder") // why: `Layout::new` gives every decoder block one
}

/// The rows of each sequence at one step, the same for all blocks.
struct Sequences<'a> {
    /// One token each.
    queries: Segments,
    /// The tokens so far, this one included.
    cached: Segments,
    sources: &'a Segments,
    /// The tokens before this one.
    length: usize,
}

/// One token a sequence against the cache, which it joins.
fn self_attention(
    pass: &Pass,
    layout: &SelfAttentionLayout,
    cache: &mut Tensor,
    sequences: &Sequences,
    bias: View,
    x: Tensor,
) -> Result<Tensor> {
    let inner = pass.config.inner();
    let (normed, _) = pass.norm(x.view(), layout.norm)?;
    let q = pass.linear(normed.view(), layout.qkv.rows_range(0..inner))?;
    let (_, after) = cache.view_mut().split_columns(sequences.length * 2 * inner);
    let (place, _) = after.split_columns(2 * inner);
    pass.linear_into(normed.view(), layout.qkv.rows_range(inner..3 * inner), place)?;
    let rows = cache.rows() * cache.cols() / (2 * inner);
    let cached = cache.view().reshape(0, rows, 2 * inner);
    let (out, _) = pass.attention(Attention {
        q: q.view(),
        k: cached.columns(0..inner),
        v: cached.columns(inner..2 * inner),
        queries: &sequences.queries,
        keys: &sequences.cached,
        heads: pass.config.num_heads,
        bias: Some(bias),
        causal: true,
        mask: Dropout::NONE,
    })?;
    let delta = pass.linear(out.view(), layout.o)?;
    pass.residual(x.view(), delta.view(), Dropout::NONE)
}

fn cross_attention(
    pass: &Pass,
    layout: &CrossAttentionLayout,
    kv: &Tensor,
    sequences: &Sequences,
    x: Tensor,
) -> Result<Tensor> {
    let inner = pass.config.inner();
    let (normed, _) = pass.norm(x.view(), layout.norm)?;
    let q = pass.linear(normed.view(), layout.q)?;
    let (out, _) = pass.attention(Attention {
        q: q.view(),
        k: kv.view().columns(0..inner),
        v: kv.view().columns(inner..2 * inner),
        queries: &sequences.queries,
        keys: sequences.sources,
        heads: pass.config.num_heads,
        bias: None,
        causal: false,
        mask: Dropout::NONE,
    })?;
    let delta = pass.linear(out.view(), layout.o)?;
    pass.residual(x.view(), delta.view(), Dropout::NONE)
}

/// The first of the largest logits, and its log probability.
fn most_probable(logits: &[f32]) -> (u32, f32) {
    let mut best = 0;
    for (index, &logit) in logits.iter().enumerate() {
        if logit > logits[best] {
            best = index;
        }
    }
    let largest = f64::from(logits[best]);
    let sum: f64 = logits.iter().map(|&logit| (f64::from(logit) - largest).exp()).sum();
    (best as u32, -sum.ln() as f32)
}
