//! The arena: all parameters in one piece of memory, with names for its parts.
//!
//! Gradients, moments and master weights are arenas of the same layout. Tensors that one product uses together (q, k and
//! v; k and v of cross-attention; wi_0 and wi_1) lie side by side, so that together they are one taller matrix.

use std::ops::{Deref, Range};
use std::sync::Arc;

use quintet_kernels::{DType, Device, Tensor, View, ViewMut, ops};

use crate::arena::{Adapter, Arena, Slot};
use crate::classifier::ClassifierLayout;
use crate::config::ModelClass;
use crate::{Config, Result};

/// Where each tensor lies in the arena of a configuration.
#[derive(Debug)]
pub struct Layout {
    arena: Arc<Arena>,
    pub(crate) shared: Slot,
    /// The output head, where it has a weight of its own.
    pub(crate) lm_head: Option<Slot>,
    /// The embedding, where it is the output head's weight too.
    pub(crate) tied_head: Option<Slot>,
    pub(crate) encoder: StackLayout,
    /// `None` of an encoder alone.
    decoder: Option<StackLayout>,
    /// In the place of an output head.
    pub(crate) classifier: Option<ClassifierLayout>,
}

/// The slots of one stack.
#[derive(Debug)]
pub(crate) struct StackLayout {
    pub(crate) blocks: Vec<BlockLayout>,
    /// One table for all blocks, or one for each (UMT5).
    pub(crate) bias_tables: Vec<Slot>,
    pub(crate) final_norm: Slot,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct BlockLayout {
    pub(crate) attention: SelfAttentionLayout,
    pub(crate) cross: Option<CrossAttentionLayout>,
    pub(crate) feed_forward: FeedForwardLayout,
}

impl BlockLayout {
    /// The first element of a block in the arena.
    pub(crate) fn start(&self) -> usize {
        self.attention.norm.start()
    }
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct SelfAttentionLayout {
    pub(crate) norm: Slot,
    /// `[3 · inner, d_model]`: q, k, v.
    pub(crate) qkv: Slot,
    pub(crate) o: Slot,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct CrossAttentionLayout {
    pub(crate) norm: Slot,
    pub(crate) q: Slot,
    /// `[2 · inner, d_model]`: k, v.
    pub(crate) kv: Slot,
    pub(crate) o: Slot,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct FeedForwardLayout {
    pub(crate) norm: Slot,
    /// `[d_ff, d_model]`, or `[2 · d_ff, d_model]` when gated: wi_0, wi_1.
    pub(crate) wi: Slot,
    pub(crate) wo: Slot,
}

impl Layout {
    pub fn new(config: &Config) -> Self {
        let class = config.class();
        let mut builder = Builder { arena: Arena::default(), prefix: class.prefix() };
        let shared = builder.matrix("shared.weight", config.vocab_size, config.d_model);
        let encoder = builder.stack(config, "encoder", config.num_layers);
        let decoder = (class != ModelClass::Encoder).then(|| builder.stack(config, "decoder", config.decoder_layers()));
        let generates = class == ModelClass::ConditionalGeneration;
        let lm_head = (generates && !config.tie_word_embeddings)
            .then(|| builder.matrix("lm_head.weight", config.vocab_size, config.d_model));
        let classifier = (class == ModelClass::SequenceClassification).then(|| builder.classifier(config));
        let tied_head = (generates && config.tie_word_embeddings).then_some(shared);
        Layout { arena: Arc::new(builder.arena), shared, lm_head, tied_head, encoder, decoder, classifier }
    }

    /// The map of the arena.
    pub fn arena(&self) -> &Arc<Arena> {
        &self.arena
    }

    /// The weight of the output head: its own, or the embedding's.
    ///
    /// # Panics
    /// If the model has none: it classifies, or only encodes.
    pub(crate) fn head(&self) -> Slot {
        self.lm_head.or(self.tied_head).expect("a model that generates") // why: who asks has looked at the class
    }

    /// # Panics
    /// If the model only encodes.
    pub(crate) fn decoder(&self) -> &StackLayout {
        self.decoder.as_ref().expect("a model that decodes") // why: who asks has looked at the class
    }
}

impl Deref for Layout {
    type Target = Arena;

    fn deref(&self) -> &Arena {
        &self.arena
    }
}

struct Builder {
    arena: Arena,
    /// Of the stacks' names.
    prefix: &'static str,
}

impl Builder {
    fn group(&mut self, parts: &[(String, usize)], cols: usize) -> Slot {
        let parts: Vec<(String, usize)> =
            parts.iter().map(|(name, rows)| (format!("{}{name}", self.prefix), *rows)).collect();
        self.arena.push_group(&parts, cols)
    }

    fn matrix(&mut self, name: &str, rows: usize, cols: usize) -> Slot {
        self.group(&[(name.to_string(), rows)], cols)
    }

    fn norm(&mut self, name: &str, size: usize) -> Slot {
        self.arena.push(format!("{}{name}", self.prefix), &[size])
    }

    fn classifier(&mut self, config: &Config) -> ClassifierLayout {
        let (size, classes) = (config.d_model, config.num_labels());
        let mut push = |name: &str, shape: &[usize]| self.arena.push(format!("classification_head.{name}"), shape);
        ClassifierLayout {
            dense: push("dense.weight", &[size, size]),
            dense_bias: push("dense.bias", &[size]),
            out_proj: push("out_proj.weight", &[classes, size]),
            out_bias: push("out_proj.bias", &[classes]),
        }
    }

    fn stack(&mut self, config: &Config, stack: &str, blocks: usize) -> StackLayout {
        let mut bias_tables = Vec::new();
        let blocks = (0..blocks)
            .map(|index| {
                let block = format!("{stack}.block.{index}");
                let attention = self.self_attention(config, &format!("{block}.layer.0"));
                if index == 0 || config.bias_in_every_layer() {
                    bias_tables.push(self.matrix(
                        &format!("{block}.layer.0.SelfAttention.relative_attention_bias.weight"),
                        config.relative_attention_num_buckets,
                        config.num_heads,
                    ));
                }
                let cross = (stack == "decoder").then(|| self.cross_attention(config, &format!("{block}.layer.1")));
                let last = if cross.is_some() { 2 } else { 1 };
                let feed_forward = self.feed_forward(config, &format!("{block}.layer.{last}"));
                BlockLayout { attention, cross, feed_forward }
            })
            .collect();
        let final_norm = self.norm(&format!("{stack}.final_layer_norm.weight"), config.d_model);
        StackLayout { blocks, bias_tables, final_norm }
    }

    fn self_attention(&mut self, config: &Config, layer: &str) -> SelfAttentionLayout {
        let name = |letter| (format!("{layer}.SelfAttention.{letter}.weight"), config.inner());
        SelfAttentionLayout {
            norm: self.norm(&format!("{layer}.layer_norm.weight"), config.d_model),
            qkv: self.group(&[name("q"), name("k"), name("v")], config.d_model),
            o: self.matrix(&format!("{layer}.SelfAttention.o.weight"), config.d_model, config.inner()),
        }
    }

    fn cross_attention(&mut self, config: &Config, layer: &str) -> CrossAttentionLayout {
        let name = |letter| (format!("{layer}.EncDecAttention.{letter}.weight"), config.inner());
        CrossAttentionLayout {
            norm: self.norm(&format!("{layer}.layer_norm.weight"), config.d_model),
            q: self.group(&[name("q")], config.d_model),
            kv: self.group(&[name("k"), name("v")], config.d_model),
            o: self.matrix(&format!("{layer}.EncDecAttention.o.weight"), config.d_model, config.inner()),
        }
    }

    fn feed_forward(&mut self, config: &Config, layer: &str) -> FeedForwardLayout {
        let name = |part: &str| (format!("{layer}.DenseReluDense.{part}.weight"), config.d_ff);
        let inputs = if config.is_gated() { vec![name("wi_0"), name("wi_1")] } else { vec![name("wi")] };
        FeedForwardLayout {
            norm: self.norm(&format!("{layer}.layer_norm.weight"), config.d_model),
            wi: self.group(&inputs, config.d_model),
            wo: self.matrix(&format!("{layer}.DenseReluDense.wo.weight"), config.d_model, config.d_ff),
        }
    }
}

/// One arena of values: weights, or anything of the same layout.
pub struct Parameters {
    arena: Arc<Arena>,
    values: Tensor,
}

impl Parameters {
    pub fn zeros(device: &Device, arena: Arc<Arena>, dtype: DType) -> Result<Self> {
        let values = device.zeros(dtype, 1, arena.len())?;
        Ok(Parameters { arena, values })
    }

    /// An arena over `values[1, len]`.
    pub fn new(arena: Arc<Arena>, values: Tensor) -> Self {
        assert_eq!((values.rows(), values.cols()), (1, arena.len()), "values of another layout");
        Parameters { arena, values }
    }

    pub fn into_values(self) -> Tensor {
        self.values
    }

    pub fn layout(&self) -> &Arc<Arena> {
        &self.arena
    }

    pub fn dtype(&self) -> DType {
        self.values.dtype()
    }

    /// The whole arena, `[1, len]`.
    pub fn view(&self) -> View<'_> {
        self.values.view()
    }

    pub fn view_mut(&mut self) -> ViewMut<'_> {
        self.values.view_mut()
    }

    /// Elements `range` of the arena, `[1, len]`.
    pub fn range(&self, range: Range<usize>) -> View<'_> {
        self.values.view().columns(range)
    }

    /// Writes elements of an f32 arena, from the host.
    pub fn write(&mut self, range: Range<usize>, values: &[f32]) -> Result<()> {
        Ok(self.values.view_mut().reshape(range.start, 1, range.len()).write(values)?)
    }

    /// A copy of an f32 arena on the host.
    pub fn download(&self) -> Result<Vec<f32>> {
        Ok(self.values.download()?)
    }

    /// The same values in another type.
    pub fn to_dtype(&self, dtype: DType) -> Result<Self> {
        let mut copy = Self::zeros(self.values.device(), self.arena.clone(), dtype)?;
        ops::cast(self.view(), copy.view_mut())?;
        Ok(copy)
    }

    /// Copies tensors of the same shapes from another arena; `source` is what each of this one's is called there.
    pub(crate) fn copy_by_name(&mut self, from: &Parameters, source: impl Fn(&str) -> Option<String>) -> Result<()> {
        for tensor in self.arena.clone().tensors() {
            let source = source(&tensor.name).and_then(|name| from.arena.tensors().iter().find(|one| one.name == name));
            if let Some(source) = source {
                ops::cast(from.slot(source.slot()), self.slot_mut(tensor.slot()))?;
            }
        }
        Ok(())
    }

    /// BLAKE3 of an f32 arena's bytes.
    pub fn digest(&self) -> Result<blake3::Hash> {
        let mut hasher = blake3::Hasher::new();
        self.view().read_in_pieces(|values: &[f32]| -> Result<()> {
            hasher.update(bytemuck::cast_slice(values));
            Ok(())
        })?;
        Ok(hasher.finalize())
    }

    /// A slot of this arena.
    pub(crate) fn slot(&self, slot: Slot) -> View<'_> {
        self.values.view().reshape(slot.offset, slot.rows, slot.cols)
    }

    pub(crate) fn slot_mut(&mut self, slot: Slot) -> ViewMut<'_> {
        self.values.view_mut().reshape(slot.offset, slot.rows, slot.cols)
    }

    /// Two slots of this arena, of which the first ends before the second begins.
    pub(crate) fn two_slots_mut(&mut self, first: Slot, second: Slot) -> (ViewMut<'_>, ViewMut<'_>) {
        let (before, after) = self.values.view_mut().split_columns(second.start());
        (before.reshape(first.offset, first.rows, first.cols), after.reshape(0, second.rows, second.cols))
    }

    /// What this arena has in the place of a matrix of the model: nothing where that is frozen.
    pub(crate) fn place_mut(&mut self, slot: Slot) -> Option<ViewMut<'_>> {
        let place = self.arena.place(slot)?;
        Some(self.slot_mut(place))
    }
}

/// The weights of a pass: in the type that it computes in, and in f32 those that fp16 would ruin.
#[derive(Clone, Copy)]
pub struct Weights<'a> {
    /// What is trained.
    own: Values<'a>,
    /// What lies below where the former is not the whole model; else the same.
    base: Values<'a>,
}

#[derive(Clone, Copy)]
struct Values<'a> {
    compute: &'a Parameters,
    master: &'a Parameters,
}

impl<'a> Weights<'a> {
    /// `compute` holds the values of `master`, rounded.
    pub fn new(compute: &'a Parameters, master: &'a Parameters) -> Self {
        assert_eq!(master.dtype(), DType::F32, "type of the master weights");
        let values = Values { compute, master };
        Weights { own: values, base: values }
    }

    /// These weights, of adapters and the like, over those of a model.
    #[must_use]
    pub fn over(self, base: Weights<'a>) -> Self {
        assert_eq!(self.dtype(), base.dtype(), "type of the weights below");
        assert!(base.own.compute.arena.is_whole(), "one arena over a model's");
        Weights { own: self.own, base: base.own }
    }

    pub(crate) fn dtype(self) -> DType {
        self.own.compute.dtype()
    }

    /// An arena for the gradient of what is trained.
    pub fn zero_gradients(self) -> Result<Parameters> {
        let own = self.own.compute;
        Parameters::zeros(own.values.device(), own.arena.clone(), DType::F32)
    }

    /// A matrix of the model.
    pub(crate) fn slot(self, slot: Slot) -> View<'a> {
        self.find(slot, |values| values.compute)
    }

    /// In f32.
    pub(crate) fn master_slot(self, slot: Slot) -> View<'a> {
        self.find(slot, |values| values.master)
    }

    fn find(self, slot: Slot, of: impl Fn(Values<'a>) -> &'a Parameters) -> View<'a> {
        match self.own.compute.arena.place(slot) {
            Some(place) => of(self.own).slot(place),
            None => of(self.base).slot(slot),
        }
    }

    /// The adapters of a matrix of the model, and which of its rows each is of.
    pub(crate) fn adapters(self, slot: Slot) -> impl Iterator<Item = (Range<usize>, Adapter)> + 'a {
        self.own.compute.arena.adapters(slot)
    }

    /// A matrix of an adapter, in this type.
    pub(crate) fn adapter_slot(self, slot: Slot, dtype: DType) -> View<'a> {
        if dtype == self.dtype() { self.own.compute.slot(slot) } else { self.own.master.slot(slot) }
    }
}

impl<'a> From<&'a Parameters> for Weights<'a> {
    fn from(parameters: &'a Parameters) -> Self {
        assert_ne!(parameters.dtype(), DType::F16, "f16 needs some weights in f32 too");
        let values = Values { compute: parameters, master: parameters };
        Weights { own: values, base: values }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::FeedForwardKind;

    #[test]
    fn the_arena_holds_each_tensor_once() {
        for tied in [true, false] {
            let config = Config {
                vocab_size: 37,
                d_model: 10,
                d_kv: 3,
                d_ff: 13,
                num_layers: 3,
                num_decoder_layers: Some(2),
                num_heads: 2,
                feed_forward_proj: FeedForwardKind::GatedGelu,
                tie_word_embeddings: tied,
                ..Config::default()
            };
            let layout = Layout::new(&config);
            let mut end = 0;
            for tensor in layout.tensors() {
                assert!(tensor.range.start >= end, "{} overlaps", tensor.name);
                assert_eq!(tensor.range.len(), tensor.shape.iter().product::<usize>());
                end = tensor.range.end;
            }
            assert!(end <= layout.len());
            assert_eq!(layout.tensors().iter().any(|tensor| tensor.name == "lm_head.weight"), !tied);
            // 9 tensors an encoder block, 14 a decoder block, two tables, two final norms, the embedding.
            assert_eq!(layout.tensors().len(), 3 * 9 + 2 * 14 + 2 + 2 + 1 + usize::from(!tied));
        }
    }

    #[test]
    fn a_group_is_one_taller_matrix() {
        let config = Config { d_model: 5, d_kv: 3, num_heads: 1, ..Config::default() };
        let layout = Layout::new(&config);
        let qkv = layout.encoder.blocks[0].attention.qkv;
        let k = layout.tensors().iter().find(|tensor| tensor.name.ends_with("SelfAttention.k.weight")).unwrap();
        assert_eq!(qkv.offset + 3 * qkv.cols, k.range.start);
        assert_eq!((qkv.rows, qkv.cols), (9, 5));
    }
}
