//! A decoder that takes one token a sequence and remembers keys and values.
//!
//! Keys and values of earlier tokens are rows of one tensor for each block, in the order in which they were computed; a
//! sequence is a list of such rows. So hypotheses of a beam search that have a common past share its rows, and choosing
//! among them, or leaving out those that are done, copies and computes nothing. Those of the source are computed once, and
//! all sequences of a source attend to the same ones.

use std::collections::HashMap;

use quintet_kernels::ops::{self, Attention, CachedAttention, PreparedWeight};
use quintet_kernels::{DType, Dropout, Segments, Tensor, View};

use crate::arena::Slot;
use crate::layers::FeedForward;
use crate::parameters::{BlockLayout, CrossAttentionLayout, Layout, SelfAttentionLayout, Weights};
use crate::pass::{Pass, Sequences, Site};
use crate::stack::{self, Keep, Stack};
use crate::{Model, Result};

/// The weights that each token of a decoder is multiplied with, as the device reads them fastest.
pub(crate) struct PreparedWeights(HashMap<Slot, PreparedWeight>);

impl PreparedWeights {
    pub(super) fn new(layout: &Layout, weights: Weights) -> Self {
        let mut slots = vec![layout.head()];
        for block in &layout.decoder().blocks {
            let cross = block.cross.iter().flat_map(|cross| [cross.q, cross.o]);
            slots.extend([block.attention.qkv, block.attention.o, block.feed_forward.wi, block.feed_forward.wo]);
            slots.extend(cross);
        }
        let prepare = |slot: Slot| Some((slot, PreparedWeight::new(weights.slot(slot))?));
        PreparedWeights(slots.into_iter().filter_map(prepare).collect())
    }

    pub(crate) fn get(&self, slot: Slot) -> Option<&PreparedWeight> {
        self.0.get(&slot)
    }
}

/// Legend: B sequences, C rows of a cache, Ns source tokens, I = heads · d_kv, D model, V vocabulary.
pub(super) struct Decoder<'a> {
    model: &'a Model,
    pass: &'a Pass<'a>,
    sources: &'a Segments,
    biases: Vec<Tensor>,
    blocks: Vec<Cache>,
    /// Rows of the caches that are in use.
    used: usize,
    /// Of each sequence: the rows of its tokens so far.
    rows: Vec<Vec<u32>>,
    /// Of each sequence; rising.
    source_of: Vec<usize>,
    attention: SourceAttention,
}

/// The keys and values of one block.
struct Cache {
    /// Of earlier tokens, `[C, 2I]`.
    own: Tensor,
    /// Of the source, `[Ns, 2I]`.
    cross: Tensor,
}

/// Tokens of each source that a cache has room for at first.
const TOKENS_AT_FIRST: usize = 16;

/// Which sequences attend to which source: the sequences of one are its queries.
struct SourceAttention {
    queries: Segments,
    keys: Segments,
}

impl SourceAttention {
    fn new(source_of: &[usize], sources: &Segments) -> Self {
        let groups: Vec<&[usize]> = source_of.chunk_by(|a, b| a == b).collect();
        let ends = groups.iter().scan(0, |end, group| {
            *end += group.len() as u32;
            Some(*end)
        });
        let offsets: Vec<u32> = std::iter::once(0).chain(ends).collect();
        let keys = groups.iter().map(|group| sources.rows(group[0]));
        SourceAttention { queries: Segments::from_offsets(&offsets), keys: Segments::from_ranges(keys) }
    }

    fn sequences(&self) -> Sequences<'_> {
        Sequences { queries: &self.queries, keys: &self.keys }
    }
}

impl<'a> Decoder<'a> {
    /// Runs the encoder; begins with one sequence for each source.
    pub(super) fn new(model: &'a Model, pass: &'a Pass, source_ids: &[u32], sources: &'a Segments) -> Result<Self> {
        let layout = model.layout();
        let encoded = encode(model, pass, source_ids, sources)?;
        let mut blocks = Vec::with_capacity(layout.decoder().blocks.len());
        for block in &layout.decoder().blocks {
            let cross = pass.linear(encoded.view(), cross_layout(block).kv)?;
            let own = pass.empty(TOKENS_AT_FIRST * sources.len(), 2 * pass.config.inner())?;
            blocks.push(Cache { own, cross });
        }
        let biases = stack::biases(pass, layout.decoder(), true)?;
        let source_of: Vec<usize> = (0..sources.len()).collect();
        let attention = SourceAttention::new(&source_of, sources);
        let rows = vec![Vec::new(); sources.len()];
        Ok(Decoder { model, pass, sources, biases, blocks, used: 0, rows, source_of, attention })
    }

    /// The source of each sequence.
    pub(super) fn source_of(&self) -> &[usize] {
        &self.source_of
    }

    /// From now on sequence `i` is what continues the former `parents[i]`; in the order of their sources.
    pub(super) fn select(&mut self, parents: &[usize]) {
        let source_of: Vec<usize> = parents.iter().map(|&parent| self.source_of[parent]).collect();
        assert!(source_of.is_sorted(), "sequences out of the order of their sources");
        if source_of != self.source_of {
            self.attention = SourceAttention::new(&source_of, self.sources);
        }
        self.rows = parents.iter().map(|&parent| self.rows[parent].clone()).collect();
        self.source_of = source_of;
    }

    /// The logits `[B,V]` (f32), without the head's scale, after one more token for each sequence.
    pub(super) fn step(&mut self, tokens: &[u32]) -> Result<Tensor> {
        let (pass, layout) = (self.pass, self.model.layout());
        let count = tokens.len();
        assert_eq!(count, self.rows.len(), "a token for each sequence");
        self.reserve(self.used + count)?;
        for (index, rows) in self.rows.iter_mut().enumerate() {
            rows.push((self.used + index) as u32);
        }
        let length = self.rows[0].len();
        let rows = pass.device.upload(&self.rows.concat(), count, length)?;
        let ids = pass.device.upload(tokens, count, 1)?;
        let mut x = pass.empty(count, pass.config.d_model)?;
        ops::embedding_forward(ids.view(), pass.weights.slot(layout.shared), Dropout::NONE, x.view_mut())?;
        for (index, block) in layout.decoder().blocks.iter().enumerate() {
            let cache = &mut self.blocks[index];
            let bias = self.biases[stack::shared_or_own(&self.biases, index)].view();
            x = self_attention(pass, &block.attention, &mut cache.own, self.used, rows.view(), bias, x)?;
            x = cross_attention(pass, cross_layout(block), &cache.cross, self.attention.sequences(), x)?;
            let site = Site { decoder: true, block: index };
            x = FeedForward { layout: &block.feed_forward, site }.forward(pass, x)?.0;
        }
        self.used += count;
        let (hidden, _) = pass.norm(x.view(), layout.decoder().final_norm)?;
        let mut logits = pass.device.empty(DType::F32, count, pass.config.vocab_size)?;
        pass.linear_into(hidden.view(), layout.head(), logits.view_mut())?;
        Ok(logits)
    }

    /// Room for so many rows in every cache, twice as many as before at least.
    fn reserve(&mut self, rows: usize) -> Result<()> {
        let room = self.blocks[0].own.rows();
        if rows <= room {
            return Ok(());
        }
        let room = rows.max(2 * room);
        for cache in &mut self.blocks {
            let mut larger = self.pass.empty(room, cache.own.cols())?;
            if self.used > 0 {
                let kept = cache.own.view().rows_range(0..self.used);
                ops::cast(kept, larger.view_mut().rows_range(0..self.used))?;
            }
            cache.own = larger;
        }
        Ok(())
    }
}

/// The encoder's output, `[Ns,D]`.
pub(super) fn encode(model: &Model, pass: &Pass, source_ids: &[u32], sources: &Segments) -> Result<Tensor> {
    let ids = model.device().upload(source_ids, source_ids.len(), 1)?;
    let layout = &model.layout().encoder;
    let encoder = Stack { layout, decoder: false, ids: ids.view(), segments: sources, encoded: None };
    Ok(encoder.forward(pass, Keep::Nothing)?.0)
}

fn cross_layout(block: &BlockLayout) -> &CrossAttentionLayout {
    block.cross.as_ref().expect("a decoder's block attends to the encoder") // why: `Layout::new` gives every decoder block one
}

/// One token a sequence against the rows of the cache that the sequence names; its own is row `used` and those after it.
fn self_attention(
    pass: &Pass,
    layout: &SelfAttentionLayout,
    cache: &mut Tensor,
    used: usize,
    rows: View,
    bias: View,
    x: Tensor,
) -> Result<Tensor> {
    let inner = pass.config.inner();
    let (normed, _) = pass.norm(x.view(), layout.norm)?;
    let qkv = pass.linear(normed.view(), layout.qkv)?;
    let place = cache.view_mut().rows_range(used..used + x.rows());
    ops::cast(qkv.view().columns(inner..3 * inner), place)?;
    let mut out = pass.empty(x.rows(), inner)?;
    let inputs = CachedAttention {
        q: qkv.view().columns(0..inner),
        k: cache.view().columns(0..inner),
        v: cache.view().columns(inner..2 * inner),
        rows,
        heads: pass.config.num_heads,
        bias,
    };
    ops::cached_attention(inputs, out.view_mut())?;
    let delta = pass.linear(out.view(), layout.o)?;
    pass.residual(x.view(), delta.view(), Dropout::NONE)
}

fn cross_attention(
    pass: &Pass,
    layout: &CrossAttentionLayout,
    kv: &Tensor,
    sequences: Sequences,
    x: Tensor,
) -> Result<Tensor> {
    let inner = pass.config.inner();
    let (normed, _) = pass.norm(x.view(), layout.norm)?;
    let q = pass.linear(normed.view(), layout.q)?;
    let (out, _) = pass.attention(Attention {
        q: q.view(),
        k: kv.view().columns(0..inner),
        v: kv.view().columns(inner..2 * inner),
        queries: sequences.queries,
        keys: sequences.keys,
        heads: pass.config.num_heads,
        bias: None,
        causal: false,
        mask: Dropout::NONE,
    })?;
    let delta = pass.linear(out.view(), layout.o)?;
    pass.residual(x.view(), delta.view(), Dropout::NONE)
}
