//! What every layer needs during a pass: weights, dropout masks, and short names for frequent operations.

use quintet_kernels::{DType, Device, Dropout, Segments, Tensor, View, ViewMut, ops};

use crate::arena::{Adapter, Slot};
use crate::generate::PreparedWeights;
use crate::parameters::{Layout, Parameters, Weights};
use crate::{Config, Result};

/// The places of a model that have a dropout mask of their own.
#[derive(Clone, Copy)]
pub(crate) enum Place {
    Embedding,
    FinalNorm,
    AttentionProbabilities,
    AttentionOutput,
    CrossProbabilities,
    CrossOutput,
    FeedForwardInner,
    FeedForwardOutput,
    ClassifierInput,
    ClassifierHidden,
}

/// A block of a stack, for telling dropout masks apart.
#[derive(Clone, Copy)]
pub(crate) struct Site {
    pub(crate) decoder: bool,
    pub(crate) block: usize,
}

impl Site {
    /// Numbers of places never meet: four bits for the place, one for the stack, the rest for the block.
    fn number(self, place: Place) -> u64 {
        (self.block as u64) << 5 | u64::from(self.decoder) << 4 | place as u64
    }
}

/// The randomness of one micro-batch of one step.
#[derive(Clone, Copy)]
pub(crate) struct Masks {
    /// Otherwise nothing is dropped.
    pub(crate) training: bool,
    pub(crate) probability: f32,
    pub(crate) seed: u64,
    pub(crate) micro_batch: u32,
}

/// A forward pass: the weights it uses and the masks that it draws.
pub(crate) struct Pass<'a> {
    pub(crate) device: &'a Device,
    pub(crate) config: &'a Config,
    pub(crate) layout: &'a Layout,
    pub(crate) weights: Weights<'a>,
    pub(crate) masks: Masks,
    /// Copies of some weights that products read faster.
    pub(crate) prepared: Option<&'a PreparedWeights>,
}

impl<'a> Pass<'a> {
    pub(crate) fn mask(&self, site: Site, place: Place) -> Dropout {
        self.mask_of(self.masks.probability, site, place)
    }

    pub(crate) fn mask_of(&self, probability: f32, site: Site, place: Place) -> Dropout {
        self.numbered_mask(probability, site.number(place))
    }

    fn numbered_mask(&self, probability: f32, number: u64) -> Dropout {
        if !self.masks.training || probability == 0.0 {
            return Dropout::NONE;
        }
        let stream = u64::from(self.masks.micro_batch) << 32 | number;
        Dropout::new(probability, self.masks.seed, stream)
    }

    /// The mask before an adapter; its numbers never meet those of [`Site::number`].
    pub(crate) fn adapter_mask(&self, adapter: Adapter) -> Dropout {
        self.numbered_mask(adapter.dropout, 1 << 31 | u64::from(adapter.number))
    }

    /// A new activation of the weights' type.
    pub(crate) fn empty(&self, rows: usize, cols: usize) -> Result<Tensor> {
        Ok(self.device.empty(self.weights.dtype(), rows, cols)?)
    }

    /// `x · wᵀ`, and what adapters add to it.
    pub(crate) fn linear(&self, x: View, w: Slot) -> Result<Tensor> {
        let mut y = self.empty(x.rows(), w.rows())?;
        self.linear_into(x, w, y.view_mut())?;
        Ok(y)
    }

    /// As [`Pass::linear`], into memory that is there; f32 where the weights are not, if wanted.
    pub(crate) fn linear_into(&self, x: View, w: Slot, mut y: ViewMut) -> Result<()> {
        match self.prepared.and_then(|prepared| prepared.get(w)) {
            Some(w) => ops::linear_forward_prepared(x, w, y.reborrow())?,
            None => ops::linear_forward(x, self.weights.slot(w), y.reborrow(), false)?,
        }
        self.adapt(x, w, y)
    }

    /// `x · wᵀ` computed in f32, whatever the type of the pass: what T5's `wo` needs where that is f16.
    pub(crate) fn linear_in_f32(&self, x: View, w: Slot) -> Result<Tensor> {
        let x = self.cast(x, DType::F32)?;
        let mut y = self.device.empty(DType::F32, x.rows(), w.rows())?;
        ops::linear_forward(x.view(), self.weights.master_slot(w), y.view_mut(), false)?;
        self.adapt(x.view(), w, y.view_mut())?;
        self.cast(y.view(), self.weights.dtype())
    }

    pub(crate) fn cast(&self, x: View, dtype: DType) -> Result<Tensor> {
        let mut y = self.device.empty(dtype, x.rows(), x.cols())?;
        ops::cast(x, y.view_mut())?;
        Ok(y)
    }

    /// RMSNorm of `x`, and the reciprocal deviations for its backward pass.
    pub(crate) fn norm(&self, x: View, weight: Slot) -> Result<(Tensor, Tensor)> {
        let mut y = self.empty(x.rows(), x.cols())?;
        let mut rstd = self.device.empty(DType::F32, x.rows(), 1)?;
        let eps = self.config.layer_norm_epsilon;
        ops::rms_norm_forward(x, self.weights.slot(weight), eps, y.view_mut(), rstd.view_mut())?;
        Ok((y, rstd))
    }

    /// `x + dropout(delta)`
    pub(crate) fn residual(&self, x: View, delta: View, mask: Dropout) -> Result<Tensor> {
        let mut y = self.empty(x.rows(), x.cols())?;
        ops::residual_forward(x, delta, mask, y.view_mut())?;
        Ok(y)
    }

    /// The attention of queries over keys, and the logsumexp for its backward pass.
    pub(crate) fn attention(&self, inputs: ops::Attention) -> Result<(Tensor, Tensor)> {
        let mut out = self.empty(inputs.q.rows(), inputs.q.cols())?;
        let mut logsumexp = self.device.empty(DType::F32, inputs.q.rows(), inputs.heads)?;
        ops::attention_forward(inputs, out.view_mut(), logsumexp.view_mut())?;
        Ok((out, logsumexp))
    }

    /// `dropout(x)`, as a copy; or `x` itself where nothing is dropped.
    pub(crate) fn dropped(&self, x: Tensor, mask: Dropout) -> Result<Tensor> {
        if mask.is_none() {
            return Ok(x);
        }
        let mut y = self.empty(x.rows(), x.cols())?;
        ops::dropout(x.view(), mask, y.view_mut())?;
        Ok(y)
    }
}

/// Told of the gradients that a backward pass has finished: all elements of the arena from this one on. It never rises.
pub type OnFinished<'a> = &'a mut dyn FnMut(&mut Parameters, usize);

/// A backward pass: the forward pass that it reverses, and where parameter gradients accumulate.
pub(crate) struct BackwardPass<'a> {
    pub(crate) pass: &'a Pass<'a>,
    pub(crate) gradients: &'a mut Parameters,
    pub(crate) on_finished: OnFinished<'a>,
}

impl BackwardPass<'_> {
    /// The pass adds to no gradient of the model's elements from `start` on any more.
    pub(crate) fn finished(&mut self, start: usize) {
        let start = self.gradients.layout().start_of(start);
        (self.on_finished)(self.gradients, start);
    }

    /// The gradient behind a dropout, or nothing where it is `d` itself.
    pub(crate) fn masked(&self, d: &Tensor, mask: Dropout) -> Result<Option<Tensor>> {
        if mask.is_none() {
            return Ok(None);
        }
        let mut masked = self.pass.empty(d.rows(), d.cols())?;
        ops::dropout(d.view(), mask, masked.view_mut())?;
        Ok(Some(masked))
    }

    /// Reverses [`Pass::linear`]: adds to the gradients of the layer's parameters; the gradient of its input.
    pub(crate) fn linear(&mut self, w: Slot, d_y: View, x: View) -> Result<Tensor> {
        let mut d_x = self.pass.empty(d_y.rows(), w.cols())?;
        self.linear_into(w, d_y, x, &mut d_x, false)?;
        Ok(d_x)
    }

    /// As [`BackwardPass::linear`], into `d_x`, or added to it.
    pub(crate) fn linear_into(&mut self, w: Slot, d_y: View, x: View, d_x: &mut Tensor, add: bool) -> Result<()> {
        self.weight(w, d_y, x)?;
        ops::linear_backward_input(d_y, self.pass.weights.slot(w), d_x.view_mut(), add)?;
        self.adapt(w, d_y, x, d_x)
    }

    /// `d_w += d_yᵀ · x`, unless `w` is frozen.
    fn weight(&mut self, w: Slot, d_y: View, x: View) -> Result<()> {
        Ok(self.gradients.place_mut(w).map_or(Ok(()), |d_w| ops::linear_backward_weight(d_y, x, d_w))?)
    }

    /// Reverses `linear(norm(x))`, and adds what flows through the norm to the gradient `d` of the residual stream.
    pub(crate) fn normed_linear(&mut self, w: Slot, d_y: View, norm: Norm, d: &mut Tensor) -> Result<()> {
        let pass = self.pass;
        let normed = if self.trains(w) { Some(pass.norm(norm.x, norm.weight)?.0) } else { None };
        // Who trains nothing asks for no input.
        let x = normed.as_ref().map_or(norm.x, Tensor::view);
        let d_normed = self.linear(w, d_y, x)?;
        drop(normed);
        self.norm(norm, d_normed.view(), d)
    }

    /// Reverses [`Pass::linear_in_f32`].
    pub(crate) fn linear_in_f32(&mut self, w: Slot, d_y: View, x: View) -> Result<Tensor> {
        let pass = self.pass;
        let (d_y, x) = (pass.cast(d_y, DType::F32)?, pass.cast(x, DType::F32)?);
        self.weight(w, d_y.view(), x.view())?;
        let mut d_x = pass.device.empty(DType::F32, x.rows(), x.cols())?;
        ops::linear_backward_input(d_y.view(), pass.weights.master_slot(w), d_x.view_mut(), false)?;
        self.adapt(w, d_y.view(), x.view(), &mut d_x)?;
        pass.cast(d_x.view(), pass.weights.dtype())
    }

    /// Adds what flows through an RMSNorm to the gradient of the residual stream.
    pub(crate) fn norm(&mut self, norm: Norm, d_y: View, d_x: &mut Tensor) -> Result<()> {
        let pass = self.pass;
        let weight = pass.weights.slot(norm.weight);
        // One row, which costs less than an operation of its own that leaves it out.
        let mut unwanted = None;
        let d_weight = match self.gradients.place_mut(norm.weight) {
            Some(d_weight) => d_weight,
            None => unwanted.insert(pass.device.zeros(DType::F32, 1, weight.cols())?).view_mut(),
        };
        Ok(ops::rms_norm_backward(d_y, norm.x, weight, norm.rstd, d_x.view_mut(), d_weight)?)
    }
}

/// An RMSNorm that has been computed.
#[derive(Clone, Copy)]
pub(crate) struct Norm<'a> {
    pub(crate) weight: Slot,
    /// Its input.
    pub(crate) x: View<'a>,
    pub(crate) rstd: View<'a>,
}

/// The rows of each sequence on the two sides of an attention.
#[derive(Clone, Copy)]
pub(crate) struct Sequences<'a> {
    pub(crate) queries: &'a Segments,
    pub(crate) keys: &'a Segments,
}
