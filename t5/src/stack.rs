//! A stack of blocks: the encoder, or the decoder. Gradient checkpointing is decided here and invisible to the layers.

use quintet_kernels::ops::{self, RelativeBuckets};
use quintet_kernels::{DType, Segments, Tensor, View};

use crate::layers::{CrossAttention, CrossAttentionSaved, FeedForward, FeedForwardSaved};
use crate::layers::{SelfAttention, SelfAttentionSaved};
use crate::parameters::StackLayout;
use crate::pass::{BackwardPass, Norm, Pass, Place, Sequences, Site};
use crate::{Config, Result};

/// A stack over one batch. Legend: N tokens, D model, R the largest distance that the bias tells apart.
pub(crate) struct Stack<'a> {
    pub(crate) layout: &'a StackLayout,
    pub(crate) decoder: bool,
    /// `[N,1]`
    pub(crate) ids: View<'a>,
    pub(crate) segments: &'a Segments,
    /// What the decoder attends to: the encoder's sequences and output.
    pub(crate) encoded: Option<Encoded<'a>>,
}

#[derive(Clone, Copy)]
pub(crate) struct Encoded<'a> {
    pub(crate) segments: &'a Segments,
    pub(crate) output: View<'a>,
}

/// What the backward pass needs of a stack.
pub(crate) struct StackSaved {
    /// `[heads, 2R+1]`, one for all blocks or one for each.
    biases: Vec<Tensor>,
    blocks: Vec<BlockSaved>,
    /// The input of the final norm.
    x: Tensor,
    rstd: Tensor,
}

/// Either all that a block's backward pass needs, or the input from which to compute it again.
#[expect(clippy::large_enum_variant, reason = "a few dozen live at a time; boxes would be allocations in every step")]
enum BlockSaved {
    Kept(Activations),
    Input(Tensor),
}

struct Activations {
    attention: SelfAttentionSaved,
    cross: Option<CrossAttentionSaved>,
    feed_forward: FeedForwardSaved,
}

/// What a forward pass keeps.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Keep {
    /// Nothing: there will be no backward pass.
    Nothing,
    Activations,
    /// Gradient checkpointing: only the input of each block.
    Inputs,
}

/// How the distances of a stack fall into buckets.
pub(crate) fn buckets(config: &Config, decoder: bool) -> RelativeBuckets {
    RelativeBuckets {
        num_buckets: config.relative_attention_num_buckets,
        max_distance: config.relative_attention_max_distance,
        bidirectional: !decoder,
    }
}

/// The biases of a stack by clamped distance.
pub(crate) fn biases(pass: &Pass, layout: &StackLayout, decoder: bool) -> Result<Vec<Tensor>> {
    let buckets = buckets(pass.config, decoder);
    let expand = |&table| -> Result<Tensor> {
        let mut bias = pass.device.empty(DType::F32, pass.config.num_heads, 2 * buckets.max_distance + 1)?;
        ops::relative_bias_forward(pass.weights.slot(table), buckets, bias.view_mut())?;
        Ok(bias)
    };
    layout.bias_tables.iter().map(expand).collect()
}

impl<'a> Stack<'a> {
    fn site(&self, block: usize) -> Site {
        Site { decoder: self.decoder, block }
    }

    /// The final hidden states `[N,D]`, normed and dropped out.
    pub(crate) fn forward(&self, pass: &Pass, keep: Keep) -> Result<(Tensor, StackSaved)> {
        let biases = biases(pass, self.layout, self.decoder)?;
        let table = pass.weights.slot(pass.layout.shared);
        let mut x = pass.empty(self.ids.rows(), pass.config.d_model)?;
        ops::embedding_forward(self.ids, table, pass.mask(self.site(0), Place::Embedding), x.view_mut())?;

        let mut blocks = Vec::with_capacity(self.layout.blocks.len());
        for block in 0..self.layout.blocks.len() {
            let (y, activations) = self.block_forward(pass, &biases, block, x)?;
            x = y;
            match keep {
                Keep::Nothing => {}
                Keep::Activations => blocks.push(BlockSaved::Kept(activations)),
                Keep::Inputs => blocks.push(BlockSaved::Input(activations.attention.x)),
            }
        }

        let (normed, rstd) = pass.norm(x.view(), self.layout.final_norm)?;
        let output = pass.dropped(normed, pass.mask(self.site(0), Place::FinalNorm))?;
        Ok((output, StackSaved { biases, blocks, x, rstd }))
    }

    /// From the gradient of the output; `d_encoded` accumulates that of the encoder's output, in a decoder.
    pub(crate) fn backward(
        &self,
        backward: &mut BackwardPass,
        saved: StackSaved,
        d_output: Tensor,
        mut d_encoded: Option<&mut Tensor>,
    ) -> Result<()> {
        let pass = backward.pass;
        let StackSaved { biases, blocks, x, rstd } = saved;
        let d_normed = pass.dropped(d_output, pass.mask(self.site(0), Place::FinalNorm))?;
        let mut d = pass.device.zeros(pass.weights.dtype(), x.rows(), x.cols())?;
        let norm = Norm { weight: self.layout.final_norm, x: x.view(), rstd: rstd.view() };
        backward.norm(norm, d_normed.view(), &mut d)?;
        drop((d_normed, x, rstd));

        let mut d_biases = Vec::with_capacity(biases.len());
        for bias in &biases {
            d_biases.push(pass.device.zeros(DType::F32, bias.rows(), bias.cols())?);
        }
        for (block, saved) in blocks.into_iter().enumerate().rev() {
            let activations = match saved {
                BlockSaved::Kept(activations) => activations,
                BlockSaved::Input(x) => self.block_forward(pass, &biases, block, x)?.1,
            };
            let bias = shared_or_own(&biases, block);
            let d_bias = &mut d_biases[bias];
            self.block_backward(backward, &biases[bias], block, activations, &mut d, d_bias, &mut d_encoded)?;
            // A bias is a part of the first block that uses it, which is the last to add to its gradient.
            if bias == block
                && let Some(table) = backward.gradients.place_mut(self.layout.bias_tables[bias])
            {
                ops::relative_bias_backward(d_bias.view(), buckets(pass.config, self.decoder), table)?;
            }
            backward.finished(self.layout.blocks[block].start());
        }

        let mask = pass.mask(self.site(0), Place::Embedding);
        if let Some(table) = backward.gradients.place_mut(pass.layout.shared) {
            ops::embedding_backward(self.ids, d.view(), mask, table)?;
        }
        Ok(())
    }

    fn attention<'t>(&'t self, block: usize, bias: &'t Tensor) -> SelfAttention<'t> {
        let layout = &self.layout.blocks[block].attention;
        SelfAttention { layout, site: self.site(block), segments: self.segments, bias: bias.view() }
    }

    /// The cross-attention of a decoder's block, and what it attends to.
    fn cross(&self, block: usize) -> Option<(CrossAttention<'_>, Encoded<'a>)> {
        let layout = self.layout.blocks[block].cross.as_ref()?;
        let encoded = self.encoded.expect("a decoder attends to an encoder"); // why: `Model` makes decoders so
        let sequences = Sequences { queries: self.segments, keys: encoded.segments };
        Some((CrossAttention { layout, site: self.site(block), sequences }, encoded))
    }

    fn feed_forward(&self, block: usize) -> FeedForward<'_> {
        FeedForward { layout: &self.layout.blocks[block].feed_forward, site: self.site(block) }
    }

    fn block_forward(&self, pass: &Pass, biases: &[Tensor], block: usize, x: Tensor) -> Result<(Tensor, Activations)> {
        let bias = &biases[shared_or_own(biases, block)];
        let (mut x, attention) = self.attention(block, bias).forward(pass, x)?;
        let mut cross_saved = None;
        if let Some((cross, encoded)) = self.cross(block) {
            let kv = cross.keys_and_values(pass, encoded.output)?;
            let (y, saved) = cross.forward(pass, x, kv)?;
            x = y;
            cross_saved = Some(saved);
        }
        let (x, feed_forward) = self.feed_forward(block).forward(pass, x)?;
        Ok((x, Activations { attention, cross: cross_saved, feed_forward }))
    }

    #[expect(clippy::too_many_arguments, reason = "the gradients of a block's five inputs")]
    fn block_backward(
        &self,
        backward: &mut BackwardPass,
        bias: &Tensor,
        block: usize,
        saved: Activations,
        d: &mut Tensor,
        d_bias: &mut Tensor,
        d_encoded: &mut Option<&mut Tensor>,
    ) -> Result<()> {
        self.feed_forward(block).backward(backward, saved.feed_forward, d)?;
        if let (Some((cross, encoded)), Some(saved), Some(d_encoded)) = (self.cross(block), saved.cross, d_encoded) {
            cross.backward(backward, saved, encoded.output, d, d_encoded)?;
        }
        self.attention(block, bias).backward(backward, saved.attention, d, d_bias)
    }
}

/// Which of a stack's biases a block uses.
pub(crate) fn shared_or_own(biases: &[Tensor], block: usize) -> usize {
    if biases.len() == 1 { 0 } else { block }
}
